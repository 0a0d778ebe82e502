"""Do the full 13.6 B graphs break our rules? Checked for three targets, and parsed for real.

    python benchmarks/full_size_check.py [--workdir DIR] [--json FILE]

Makes the 480p and 720p bfloat16 graphs of the released size over a sparse weights file (27 GB of
holes: no disk, no memory), runs `check_graph` for each target, and parses each graph with TensorRT
for RTX in a process of its own. Needs no GPU. Parsing maps the weights and reads none, so that
holes cost what real weights cost; nothing is built.

Prints a table and, as the last line, one JSON document. Exit code 1 if a bar was missed.
"""

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch

from lcexport.checkpoint import expected_tensors, is_island, read_header
from lcexport.configs.dit import DiTConfig
from lcexport.configs.presets import preset_from
from lcexport.dit import Geometry
from lcexport.engines.host import peak_rss_bytes
from lcexport.graph import GraphSpec, onnx_from_dit, save_graph
from lcexport.graph.check import Target, check_graph

CONFIG = DiTConfig(text_tokens_zero_pad=True)  # the released sizes
RESOLUTIONS = ("480p", "720p")
ATTENTIONS = 2 * CONFIG.depth
RSS_LIMIT_BYTES = 2 << 30
CHECKS = 7  # runs of each check; the median is reported


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    parser.add_argument("--parse", type=Path, help=argparse.SUPPRESS)  # the parsing process
    asked = parser.parse_args(arguments)
    if asked.parse:
        print(json.dumps(parse(asked.parse)))
        return 0
    asked.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="full-size-check-", dir=asked.workdir) as folder:
        report = measure(Path(folder))
    print_table(report)
    line = json.dumps(report)
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0 if report["passed"] else 1


def measure(folder: Path) -> dict[str, Any]:
    weights = folder / "dit.safetensors"
    weights_bytes = write_sparse(weights)
    rows = []
    for resolution in RESOLUTIONS:
        print(f"{resolution} ...", file=sys.stderr, flush=True)
        path, graph_seconds = make_graph(weights, resolution)
        checks = {target: check(path, target) for target in get_args(Target)}
        command = [sys.executable, __file__, "--parse", str(path)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        parsed = json.loads(done.stdout.splitlines()[-1])
        passed = (
            not any(found["violations"] for found in checks.values())
            and not parsed["errors"]
            and parsed["attentions"] == ATTENTIONS
            and parsed["decomposable"] == 0
            and parsed["peak_rss_bytes"] < RSS_LIMIT_BYTES
        )
        rows.append(
            {
                "resolution": resolution,
                "tokens": preset_from(resolution).tokens,
                "graph_seconds": round(graph_seconds, 1),
                "graph_bytes": path.stat().st_size,
                "checks": checks,
                "parse": parsed,
                "passed": passed,
            }
        )
    return {
        "schema_version": 1,
        "benchmark": "full_size_check",
        "versions": {name: version(name) for name in ("lcexport", "onnx", "onnx-ir", "torch")},
        "cores": os.cpu_count(),
        "weights_bytes": weights_bytes,
        "rss_limit_bytes": RSS_LIMIT_BYTES,
        "graphs": rows,
        "passed": all(row["passed"] for row in rows),
    }


def write_sparse(path: Path) -> int:
    """A bundle's weights file of the released size: the header is written, the data are holes."""
    entries: dict[str, object] = {}
    position = 0
    for name, shape in expected_tensors(CONFIG, "native").items():
        island = is_island(name)
        end = position + (4 if island else 2) * torch.Size(shape).numel()
        dtype = "F32" if island else "BF16"
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 64 + 56)  # data begin at a multiple of 64
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)
    return position


def make_graph(weights: Path, resolution: str) -> tuple[Path, float]:
    """The graph that `lcexport build` would make, and its seconds."""
    preset = preset_from(resolution)
    _, frames, height, width = preset.latent_shape
    geometry = Geometry(1, frames, height // 2, width // 2)
    spec = GraphSpec(geometry, preset.text_tokens, torch.bfloat16)
    path = weights.with_name(f"dit.{resolution}.onnx")
    start = time.perf_counter()
    save_graph(onnx_from_dit(CONFIG, spec, read_header(weights).tensors, "0"), path)
    seconds = time.perf_counter() - start
    gc.collect()
    gc.freeze()  # what tracing leaves behind is not the checker's to walk through
    return path, seconds


def check(path: Path, target: Target) -> dict[str, Any]:
    """The checker's verdict from the file on disk, and the median of its times."""
    violations, times = [], []
    for _ in range(CHECKS):
        start = time.perf_counter()
        violations = check_graph(path, target)
        times.append((time.perf_counter() - start) * 1e3)
    return {
        "milliseconds": round(median(times)),
        "slowest_milliseconds": round(max(times)),
        "violations": [str(found) for found in violations],
    }


def parse(path: Path) -> dict[str, Any]:
    """Parse with TensorRT for RTX; what this process needed, and what the network holds."""
    trt: Any = importlib.import_module("tensorrt_rtx")  # it carries no types

    class Errors(trt.ILogger):
        """Keeps errors; warnings about equal node names, one for every block, are noise."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(msg)

    logger = Errors()
    before = peak_rss_bytes()
    start = time.perf_counter()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path.resolve()))
    seconds = time.perf_counter() - start
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    inputs = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            inputs.append(layer.attention.decomposable)
    return {
        "tensorrt_rtx": trt.__version__,
        "errors": errors or ([] if parsed else [*logger.messages, "not parsed"]),
        "seconds": round(seconds, 2),
        "rss_before_bytes": before,
        "peak_rss_bytes": peak_rss_bytes(),
        "layers": network.num_layers,
        "attentions": len(inputs),
        "decomposable": sum(inputs),
    }


def print_table(report: dict[str, Any]) -> None:
    print(f"{'graph':<8}{'tokens':>8}{'target':>15}{'check ms':>10}{'violations':>12}")
    for row in report["graphs"]:
        for target, found in row["checks"].items():
            count = len(found["violations"])
            name, tokens, spent = row["resolution"], row["tokens"], found["milliseconds"]
            print(f"{name:<8}{tokens:>8}{target:>15}{spent:>10}{count:>12}")
    columns = ("graph", "parse s", "peak GiB", "added GiB", "layers", "attentions", "decomposable")
    print("\n" + "".join(f"{column:>13}" for column in columns))
    for row in report["graphs"]:
        parsed = row["parse"]
        peak = f"{parsed['peak_rss_bytes'] / 2**30:.2f}"
        added = f"{(parsed['peak_rss_bytes'] - parsed['rss_before_bytes']) / 2**30:.2f}"
        values = [row["resolution"], parsed["seconds"], peak, added]
        values += [parsed[name] for name in ("layers", "attentions", "decomposable")]
        print("".join(f"{value:>13}" for value in values))
        for error in parsed["errors"]:
            print(f"  {error}")
    print()


if __name__ == "__main__":
    sys.exit(main())
