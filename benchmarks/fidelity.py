"""How far eager torch and ONNX Runtime are from the original code's own numbers.

    python benchmarks/fidelity.py

Runs the golden forward passes and the golden six-step sampling (tests/golden, made by running the
original code in float32) and prints the largest absolute error of each. The velocities are up to 4
in size, the latents up to 5.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lcexport.checkpoint import open_checkpoint, read_header, write_native
from lcexport.dit import Geometry, load_dit
from lcexport.engines.ort import OrtEngine
from lcexport.golden import run_once
from lcexport.graph import GraphSpec, onnx_from_dit, save_graph
from lcexport.runtime.guidance import cfg_zero
from lcexport.runtime.sampler import sample
from lcexport.runtime.schedule import schedule

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
FORWARDS = [  # case, timestep tensor, output tensor, conditioning latents
    ("dit_tiny_t2v", "timestep", "output_zero_pad", 0),
    ("dit_tiny_i2v", "timestep", "output_zero_pad", 1),
    ("dit_tiny_i2v", "timestep_cond2", "output_cond2_zero_pad", 2),
]
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def forwards(folder: Path) -> Callable[[tuple[int, ...], int, int], Iterator[tuple[str, Forward]]]:
    """The golden DiT by each engine: `(latent shape, text tokens, conditioning) -> forwards`."""
    dit = load_dit(folder)
    weights = folder / "native" / "dit.safetensors"
    weights.parent.mkdir()
    write_native(open_checkpoint(folder), weights, bulk="fp32")

    def engines(shape: tuple[int, ...], length: int, cond: int) -> Iterator[tuple[str, Forward]]:
        batch, _, frames, height, width = shape

        def eager(x: Tensor, text: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            with torch.inference_mode():
                return dit(x, text, t, mask, cond)

        yield "eager", eager
        spec = GraphSpec(
            Geometry(batch, frames, height // 2, width // 2, cond), length, torch.float32
        )
        graph = weights.with_name("dit.onnx")
        save_graph(onnx_from_dit(dit.config, spec, read_header(weights).tensors, "0"), graph)
        engine = OrtEngine(graph)

        def compiled(x: Tensor, text: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            times = t if t.ndim == 2 else t[:, None].expand(-1, frames)
            names = [spec.name for spec in engine.inputs]
            return run_once(engine, dict(zip(names, (x, text, times, mask.bool()), strict=True)))

        yield "onnxruntime", compiled

    return engines


def main() -> None:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        dit_folder = Path(folder) / "dit"
        dit_folder.mkdir()
        shutil.copy(GOLDEN / "dit_tiny_t2v" / "config.json", dit_folder)
        shutil.copy(GOLDEN / "dit_tiny_t2v" / "transformer.safetensors", dit_folder)
        engines = forwards(dit_folder)
        for name, timestep, output, cond in FORWARDS:
            case = load_file(GOLDEN / name / "data.safetensors")
            x, text = case["hidden_states"], case["encoder_hidden_states"]
            for engine, forward in engines(tuple(x.shape), text.shape[2], cond):
                got = forward(x, text, case[timestep], case["encoder_attention_mask"])
                error = (got - case[output]).abs().max().item()
                rows.append({"case": f"{name}, {output}", "engine": engine, "max_abs": error})
        case = load_file(GOLDEN / "denoise_tiny" / "data.safetensors")
        text, mask = case["prompt_embeds_cat"], case["attention_mask_cat"]
        noise = case["latents_init"]
        for engine, forward in engines((2, *noise.shape[1:]), text.shape[2], 0):

            def velocity(x: Tensor, t: Tensor, forward: Forward = forward) -> Tensor:
                both = forward(torch.cat([x, x]), text, t.expand(2), mask)
                return cfg_zero(both[1:], both[:1], 4.0)

            final = sample(velocity, noise, schedule(6))
            error = (final - case["final"]).abs().max().item()
            rows.append(
                {"case": "denoise_tiny, 6 guided steps", "engine": engine, "max_abs": error}
            )
    for row in rows:
        print(f"{row['case']:<40} {row['engine']:<12} {row['max_abs']:.1e}")
    print(json.dumps({"schema_version": 1, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
