"""What the FP32 islands' weights are worth: released values against values rounded to bfloat16.

    python benchmarks/islands.py [--model DIR] [--json FILE]

Runs the DiT of a checkpoint, a freshly made demo checkpoint unless one is named, over the same
random latents and text in float32, in bfloat16 with islands "checkpoint", and in bfloat16 with
islands "original", and prints the relative L2 distances of the velocities, averaged over inputs.

What the numbers mean. The row `float32, islands rounded` is the effect of rounding the islands'
weights alone. In bfloat16 two runs that differ in anything also differ in how every later rounding
falls, so the two bfloat16 runs can be further from each other than that. The timestep 752 is exact
in bfloat16; 998.3 is not: the original rounds it to 1000, and so does every bfloat16 run here.

Prints a table and, as the last line, one JSON document.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lcexport.compare import difference
from lcexport.configs.presets import preset_from
from lcexport.demo import make_demo_checkpoint
from lcexport.dit import LongCatDiT, load_dit

TIMESTEPS = (752.0, 998.3)
SEEDS = range(4)
PROMPT_TOKENS = 24
VARIANTS = {
    "float32": (torch.float32, "checkpoint"),
    "float32, islands rounded": (torch.float32, "original"),
    "bfloat16, islands checkpoint": (torch.bfloat16, "checkpoint"),
    "bfloat16, islands original": (torch.bfloat16, "original"),
}
PAIRS = (
    ("float32, islands rounded", "float32"),
    ("bfloat16, islands checkpoint", "float32"),
    ("bfloat16, islands original", "float32"),
    ("bfloat16, islands original", "bfloat16, islands checkpoint"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder; a demo one if not given")
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or Path(folder) / "demo"
        if asked.model is None:
            make_demo_checkpoint(model)
        rows = measure(model)
    print_table(rows)
    report = {
        "schema_version": 1,
        "benchmark": "islands",
        "model": "demo checkpoint" if asked.model is None else model.name,
        "torch": torch.__version__,
        "inputs": len(SEEDS),
        "relative_l2": rows,
    }
    line = json.dumps(report)
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0


def measure(model: Path) -> list[dict[str, object]]:
    """Mean relative L2 of each pair at each timestep; one model in memory at a time."""
    velocities = {
        name: run(load_dit(model, dtype, islands=islands))
        for name, (dtype, islands) in VARIANTS.items()
    }
    rows: list[dict[str, object]] = []
    for got, wanted in PAIRS:
        row: dict[str, object] = {"of": got, "from": wanted}
        for timestep in TIMESTEPS:
            pairs = zip(velocities[got][timestep], velocities[wanted][timestep], strict=True)
            found = [difference(a, b).relative_l2 for a, b in pairs]
            row[str(timestep)] = sum(found) / len(found)
        rows.append(row)
    return rows


@torch.inference_mode()
def run(dit: LongCatDiT) -> dict[float, list[torch.Tensor]]:
    """Velocities by timestep, one for each seed, at the demo preset's size."""
    preset = preset_from("demo")
    mask = torch.arange(preset.text_tokens)[None] < PROMPT_TOKENS
    velocities: dict[float, list[torch.Tensor]] = {timestep: [] for timestep in TIMESTEPS}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, *preset.latent_shape, generator=generator)
        features = (1, 1, preset.text_tokens, dit.config.caption_channels)
        text = torch.randn(features, generator=generator)
        for timestep, found in velocities.items():
            found.append(dit(latents, text, torch.tensor([timestep]), mask))
    return velocities


def print_table(rows: list[dict[str, object]]) -> None:
    titles = "".join(f"{f't = {timestep}':>12}" for timestep in TIMESTEPS)
    print(f"{'relative L2 of':<30}{'from':<30}{titles}")
    for row in rows:
        values = "".join(f"{row[str(timestep)]:>12.2e}" for timestep in TIMESTEPS)
        print(f"{row['of']:<30}{row['from']:<30}{values}")
    print()


if __name__ == "__main__":
    sys.exit(main())
