"""How far int8 weights move the velocity: quantised against float, in eager torch.

    python benchmarks/int8.py [--model CHECKPOINT]

By default the golden tiny DiT of the tests.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from lcexport.checkpoint import convert, is_island
from lcexport.compare import difference
from lcexport.dit import LongCatDiT, dit_from_tensors, load_dit

GOLDEN = Path(__file__).parents[1] / "tests/golden/dit_tiny_t2v"
TIMESTEP = 752.0  # exact in bfloat16
INPUTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint's folder")
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = model or golden_checkpoint(place / "golden")
        convert(source, place / "int8", to="int8")
        for dtype in (torch.float32, torch.bfloat16):
            floats, every = load_dit(source, dtype), load_dit(place / "int8", dtype)
            kept, int8 = floats.state_dict(), every.state_dict()
            mixed = {name: (kept if is_island(name) else int8)[name] for name in kept}
            bulk = dit_from_tensors(floats.config, mixed)
            for name, dit in (("bulk", bulk), ("every Linear but the last", every)):
                print(f"{dtype}, int8 in {name}: relative L2 {distance(dit, floats):.2e}")


def golden_checkpoint(folder: Path) -> Path:
    """The golden weights as a DiT folder."""
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    shutil.copy(GOLDEN / "transformer.safetensors", folder / "model.safetensors")
    return folder


def distance(dit: LongCatDiT, reference: LongCatDiT) -> float:
    """Mean relative L2 distance of the velocities of a few random inputs."""
    total = 0.0
    for seed in range(INPUTS):
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, dit.config.in_channels, 3, 8, 12, generator=generator)
        text = torch.randn(1, 1, 10, dit.config.caption_channels, generator=generator)
        with torch.inference_mode():
            got, wanted = (m(latents, text, torch.tensor([TIMESTEP])) for m in (dit, reference))
        total += difference(got, wanted).relative_l2
    return total / INPUTS


if __name__ == "__main__":
    main()
