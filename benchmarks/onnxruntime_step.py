"""ONNX Runtime on a processor: one forward pass against eager torch, and memory against tokens.

    python benchmarks/onnxruntime_step.py [--rounds 7] [--json FILE] [--skip-memory]

The model is full width but shallow: hidden size 1024, 8 heads, 4 blocks, 3,072 tokens, 512 text
tokens, float32, batch 1, random weights. Every round runs, one after another and each after a pause
that lets the other's threads go to sleep: a matrix product of torch's, eager torch, the graph that
ONNX Runtime's engine runs (`fused`) and the graph as exported. Medians of the rounds are compared;
the share is of that matrix product's speed, with the operations of `lcexport.flops`. Afterwards
where the time goes, by ONNX Runtime's own profile, and the peak memory of one forward pass of a
narrow model at 4k to 32k tokens, each in a process of its own.

Prints tables and, as the last line, one JSON document. Exit code 1 if a bar was missed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors.torch import load_file, save_file

from lcexport.checkpoint import expected_tensors, open_checkpoint, read_header, write_native
from lcexport.compare import difference
from lcexport.configs.dit import DiTConfig
from lcexport.demo import random_weight
from lcexport.dit import Geometry, dit_from_tensors
from lcexport.engines.host import peak_rss_bytes, reset_peak_rss, resident_bytes
from lcexport.engines.ort import OrtEngine
from lcexport.flops import forward_flops
from lcexport.graph import GraphSpec, onnx_from_dit, save_graph
from lcexport.graph.fused import fused_graph

TEXT = 512
SPEED = DiTConfig(
    hidden_size=1024, depth=4, num_heads=8, caption_channels=1024, text_tokens_zero_pad=True
)
GRID = Geometry(1, 4, 24, 32)  # 3,072 tokens
NARROW = SPEED.model_copy(update={"hidden_size": 256, "num_heads": 2, "depth": 2})
FRAMES = (4, 8, 16, 32)  # of 1,024 tokens
EXPORTED_FRAMES = 8  # the graph as exported keeps all scores, twice: at 32k tokens, 17 GB
PRODUCT, PRODUCTS = 2048, 4
PAUSE_SECONDS = 0.3
FORMS = ("fused", "exported")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("GRAPH", "FORM"), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        print(json.dumps(peak_of_a_pass(Path(asked.child[0]))))
        return 0
    with tempfile.TemporaryDirectory(prefix="onnxruntime-step-") as folder:
        report = speed(Path(folder) / "speed", asked.rounds)
        memory = [] if asked.skip_memory else memory_table(Path(folder) / "memory")
    bars = {
        "as fast as eager torch": report["eager_over_fused"] >= 1.0,
        "0.90 of the matrix product": report["share"]["fused"] >= 0.90,
    }
    if memory:
        bars["memory grows no faster than tokens"] = is_linear(memory)
    document = {
        "schema_version": 1,
        "benchmark": "onnxruntime_step",
        "environment": environment(),
        **report,
        "memory": memory,
        "bars": bars,
        "passed": all(bars.values()),
    }
    for name, met in bars.items():
        print(f"{'met   ' if met else 'MISSED'} {name}")
    line = json.dumps(document)
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0 if document["passed"] else 1


def make_model(folder: Path, config: DiTConfig) -> None:
    """A checkpoint of random weights as a bundle's weights file."""
    source = folder / "checkpoint"
    source.mkdir(parents=True)
    torch.manual_seed(0)
    described = {"_class_name": "LongCatVideoTransformer3DModel", **config.model_dump(mode="json")}
    (source / "config.json").write_text(json.dumps(described))
    shapes = expected_tensors(config, "original")
    weights = {name: random_weight(name, shape) for name, shape in shapes.items()}
    save_file(weights, source / "diffusion_pytorch_model.safetensors")
    write_native(open_checkpoint(source), folder / "dit.safetensors", bulk="fp32")


def make_graphs(folder: Path, config: DiTConfig, geometry: Geometry) -> dict[str, Path]:
    """The graph as exported, and as ONNX Runtime's engine runs it."""
    paths = {form: folder / f"{form}.{geometry.tokens}.onnx" for form in FORMS}
    spec = GraphSpec(geometry, TEXT, torch.float32)
    weights = read_header(folder / "dit.safetensors").tensors
    save_graph(onnx_from_dit(config, spec, weights, "0"), paths["exported"])
    save_graph(fused_graph(ir.load(paths["exported"]), config.num_heads), paths["fused"])
    return paths


def tensors_for(engine: OrtEngine) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs from a seed and room for the output."""
    torch.manual_seed(1)
    inputs = {}
    for spec in engine.inputs:
        made = torch.rand(spec.shape) if spec.dtype == torch.bool else torch.randn(spec.shape)
        inputs[spec.name] = made > 0.3 if spec.dtype == torch.bool else made
    inputs["timestep"].fill_(500.0)
    return inputs, {spec.name: torch.empty(spec.shape) for spec in engine.outputs}


def speed(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians of alternating passes, and what they are made of."""
    make_model(folder, SPEED)
    graphs = make_graphs(folder, SPEED, GRID)
    engines = {form: OrtEngine(path) for form, path in graphs.items()}
    inputs, outputs = tensors_for(engines["fused"])
    dit = dit_from_tensors(SPEED, load_file(folder / "dit.safetensors"))
    square = torch.randn(PRODUCT, PRODUCT)
    runs: dict[str, Callable[[], object]] = {
        "product": lambda: [square @ square for _ in range(PRODUCTS)],
        "eager": lambda: dit(**inputs),
        "fused": lambda: engines["fused"].run(inputs, outputs),
        "exported": lambda: engines["exported"].run(inputs, outputs),
    }
    with torch.inference_mode():
        eager = dit(**inputs)
        seconds = alternate(runs, rounds)
    errors = {}
    for form, engine in engines.items():
        engine.run(inputs, outputs)
        errors[form] = difference(outputs["velocity"], eager).as_dict()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    peak = PRODUCTS * 2 * PRODUCT**3 / median["product"]
    operations = forward_flops(SPEED, GRID.frames, GRID.tokens, TEXT).total
    share = {name: operations / median[name] / peak for name in ("eager", *FORMS)}
    profiles = {form: profile(path, inputs) for form, path in graphs.items()}
    print(f"matrix product {peak / 1e9:.0f} GFLOP/s; one pass is {operations / 1e9:.0f} GFLOP\n")
    print(f"{'':10}{'median s':>10}{'best s':>10}{'share':>8}{'eager /':>9}")
    for name, part in share.items():
        ratio = median["eager"] / median[name]
        best = min(seconds[name])
        print(f"{name:10}{median[name]:10.3f}{best:10.3f}{part:8.3f}{ratio:9.3f}")
    for form, rows in profiles.items():
        listed = ", ".join(f"{kind} {100 * part:.1f}%" for kind, part in list(rows.items())[:8])
        print(f"\n{form}: {listed}")
    print()
    return {
        "tokens": GRID.tokens,
        "flops": operations,
        "product_flops_per_second": round(peak),
        "seconds": {name: [round(value, 4) for value in times] for name, times in seconds.items()},
        "share": {name: round(value, 4) for name, value in share.items()},
        "eager_over_fused": round(median["eager"] / median["fused"], 4),
        "exported_over_fused": round(median["exported"] / median["fused"], 4),
        "difference_from_eager": errors,
        "profile": profiles,
    }


def alternate(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def profile(graph: Path, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each kind of operation's share of the time, the largest first."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling = True
    options.profile_file_prefix = str(graph.with_suffix(".profile"))
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    for _ in range(2):
        session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    times: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text("utf-8")):
        if event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]] += event["dur"]
    return {kind: round(spent / times.total(), 4) for kind, spent in times.most_common()}


def memory_table(folder: Path) -> list[dict[str, object]]:
    """Peak memory of one pass by form and tokens, each in a process of its own."""
    make_model(folder, NARROW)
    print(f"{'tokens':>8}{'form':>10}{'opened MB':>11}{'peak MB':>9}{'a pass':>8}{'KB/token':>10}")
    rows = []
    for frames in FRAMES:
        for form, path in make_graphs(folder, NARROW, Geometry(1, frames, 32, 32)).items():
            if form == "exported" and frames > EXPORTED_FRAMES:
                continue
            command = [sys.executable, __file__, "--child", str(path), form]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            tokens = frames * 1024
            row = {"tokens": tokens, "form": form, **found}
            row["pass_bytes"] = found["peak_bytes"] - found["opened_bytes"]
            rows.append(row)
            sizes = [found["opened_bytes"], found["peak_bytes"], row["pass_bytes"]]
            shown = [size / 1e6 for size in sizes]
            each = row["pass_bytes"] / tokens / 1e3
            print(
                f"{tokens:8}{form:>10}{shown[0]:11.0f}{shown[1]:9.0f}{shown[2]:8.0f}{each:10.1f}",
                flush=True,
            )
    print()
    return rows


def peak_of_a_pass(graph: Path) -> dict[str, int]:
    """Resident bytes of this process before one pass, and at the most during it (Linux)."""
    with OrtEngine(graph) as engine:
        inputs, outputs = tensors_for(engine)
        for tensor in outputs.values():
            tensor.zero_()  # its pages are there before the pass
        reset_peak_rss()  # forget the peak of opening it
        opened = resident_bytes()
        start = time.perf_counter()
        engine.run(inputs, outputs)
        seconds = time.perf_counter() - start
        peak = peak_rss_bytes()
    assert np.isfinite(outputs["velocity"].numpy()).all()
    return {"opened_bytes": opened, "peak_bytes": peak, "milliseconds": round(1000 * seconds)}


def is_linear(rows: list[dict[str, object]]) -> bool:
    """Whether a pass's memory grows as tokens do, or by at most a tenth more, at every step."""
    sizes = {int(str(r["tokens"])): int(str(r["pass_bytes"])) for r in rows if r["form"] == "fused"}
    return all(sizes[b] / sizes[a] <= 1.1 * b / a for a, b in pairwise(sorted(sizes)))


def environment() -> dict[str, object]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "onnx")},
    }


if __name__ == "__main__":
    sys.exit(main())
