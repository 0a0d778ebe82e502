"""What compiling full-width blocks with TensorRT for RTX costs: seconds, memory, size of the plan.

    python benchmarks/tensorrt_blocks.py [--blocks 1,2] [--res 480p,720p] [--json FILE]

For each number of blocks, a DiT of the released width (4096, 32 heads, bf16) with that many blocks
gets random weights, in a file; for each resolution it is exported with its real token count and
compiled, in a process of its own as the product does it. No GPU is used, nothing is run. Embedding
and final layer are part of each graph, so what a block costs is the growth from one row to the
next. Peak memory is the largest resident size of the compiling process, mapped weights included.

The machine needs room for weights and plan (1.2 GB a block together) and 1.8 GB of memory a block.
Prints a table and, as the last line, one JSON document.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import onnx_ir as ir
import torch

from lcexport.checkpoint import expected_tensors, is_island, read_header
from lcexport.configs.dit import DiTConfig
from lcexport.configs.presets import Preset, preset_from
from lcexport.dit import Geometry
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.worker import compile_graph
from lcexport.graph import GraphSpec, onnx_from_dit, prove_precision, save_graph

BULK = torch.bfloat16
SPREAD = 0.02  # of the weights; their values do not matter to the compiler
ALIGNMENT = 64


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--blocks", default="1,2,3,4,5,6", help="numbers of blocks (%(default)s)")
    parser.add_argument("--res", default="480p,720p", help="resolutions (%(default)s)")
    parser.add_argument("--targets", default="", help="such as sm89,sm120 (all of the product's)")
    parser.add_argument("--optimization-level", type=int, default=3)
    parser.add_argument("--weight-streaming", action="store_true")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    asked = parser.parse_args(arguments)
    options = TrtOptions(
        compute_capabilities=tuple(filter(None, asked.targets.split(","))),
        optimization_level=asked.optimization_level,
        weight_streaming=asked.weight_streaming,
    )
    presets = [preset_from(name) for name in asked.res.split(",")]
    rows: list[dict[str, object]] = []
    print(f"{'blocks':>6}  {'size':>5} {'tokens':>7} {'weights':>9} {'seconds':>8}", end="")
    print(f" {'peak memory':>12} {'plan':>9}")
    for blocks in map(int, asked.blocks.split(",")):
        for row in measure(blocks, presets, options, asked.workdir):
            rows.append(row)
            print_row(row)
    document = {
        "schema_version": 1,
        "benchmark": "tensorrt_blocks",
        "environment": environment(),
        "options": options.model_dump(mode="json"),
        "rows": rows,
    }
    line = json.dumps(document)
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0


def measure(
    blocks: int, presets: list[Preset], options: TrtOptions, workdir: Path
) -> Iterator[dict[str, object]]:
    """One row for each resolution; files are removed when all are done."""
    config = DiTConfig(depth=blocks, text_tokens_zero_pad=True)
    with tempfile.TemporaryDirectory(prefix="tensorrt-blocks-", dir=workdir) as name:
        weights = Path(name) / "dit.safetensors"
        write_random(weights, config)
        for preset in presets:
            graph, proof = export(config, preset, weights)
            expectations = Expectations.from_proof(proof, filter(is_island, names_of(config)))
            plan = graph.with_suffix(".plan")
            started = time.monotonic()
            report = compile_graph(
                "tensorrt-rtx", graph.read_bytes(), graph, plan, options, expectations
            )
            yield {
                "blocks": blocks,
                "resolution": preset.name,
                "tokens": tokens_of(preset),
                "weights_bytes": report.summary.weights_bytes,
                "seconds": round(report.seconds, 1),
                "seconds_with_process": round(time.monotonic() - started, 1),
                "peak_rss_bytes": report.peak_rss_bytes,
                "plan_bytes": report.bytes,
                "attentions": report.summary.attentions,
                "layers": report.summary.layers,
                "version": report.version,
            }
            plan.unlink()


def export(config: DiTConfig, preset: Preset, weights: Path) -> tuple[Path, dict[str, int]]:
    """The graph at the preset's real size beside `weights`, and the counts it proved."""
    _, frames, height, width = preset.latent_shape
    spec = GraphSpec(Geometry(1, frames, height // 2, width // 2), preset.text_tokens, BULK)
    graph = weights.with_name(f"{preset.name}.onnx")
    save_graph(onnx_from_dit(config, spec, read_header(weights).tensors, "benchmark"), graph)
    return graph, prove_precision(ir.load(graph), BULK)


def write_random(path: Path, config: DiTConfig) -> None:
    """A weights file of the bundle's form with normal values, one tensor in memory at a time."""
    shapes = expected_tensors(config, "native")
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, shape in shapes.items():
        dtype, size = ("F32", 4) if is_island(name) else ("BF16", 2)
        end = offset + size * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator).mul_(SPREAD)
            stored = values if is_island(name) else values.to(BULK)
            file.write(stored.flatten().view(torch.uint8).numpy().tobytes())


def names_of(config: DiTConfig) -> list[str]:
    return list(expected_tensors(config, "native"))


def tokens_of(preset: Preset) -> int:
    _, frames, height, width = preset.latent_shape
    return frames * (height // 2) * (width // 2)


def print_row(row: dict[str, object]) -> None:
    weights, peak, plan = (
        f"{int(str(row[key])) / 1e9:.2f} GB"
        for key in ("weights_bytes", "peak_rss_bytes", "plan_bytes")
    )
    print(f"{row['blocks']:>6}  {row['resolution']:>5} {row['tokens']:>7,}", end="")
    print(f" {weights:>9} {row['seconds']:>8} {peak:>12} {plan:>9}", flush=True)


def environment() -> dict[str, object]:
    return {"python": sys.version.split()[0], "machine": platform.machine(), "cpus": os.cpu_count()}


if __name__ == "__main__":
    raise SystemExit(main())
