"""Two ways to hand weights to TensorRT's parser: named in the graph, or passed by address.

    python benchmarks/tensorrt_weights.py [--blocks 4] [--res 480p] [--rounds 3] [--json FILE]

`file` is what lcexport does: the graph names byte ranges of the weights file, which the parser
maps. `address` maps the file itself and gives the parser the address of each weight
(`load_initializer`). Both compile the same graph of full-width blocks with random weights, each
time in a process of its own, alternating. Prints seconds and resident memory after parsing,
seconds and peak memory of the whole compilation, and whether both make the same plan.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import onnx
from tensorrt_blocks import export, write_random

from lcexport.configs.dit import DiTConfig
from lcexport.configs.presets import preset_from
from lcexport.engines.host import peak_rss_bytes
from lcexport.engines.trt.options import TrtOptions, configure
from lcexport.engines.trt.product import MessageLog, builder_for, logger_for, open_product

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

WAYS = ("file", "address")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--res", default="480p")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "GRAPH"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one[0], Path(asked.one[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="tensorrt-weights-", dir=asked.workdir) as name:
        weights = Path(name) / "dit.safetensors"
        config = DiTConfig(depth=asked.blocks, text_tokens_zero_pad=True)
        write_random(weights, config)
        graph, _ = export(config, preset_from(asked.res), weights)
        size = weights.stat().st_size
        rows = [
            (way, json.loads(subprocess.run(command(way, graph), check=True, stdout=-1).stdout))
            for _ in range(asked.rounds)
            for way in WAYS
        ]
    print(f"{asked.blocks} blocks, {size / 1e9:.2f} GB of weights, medians of {asked.rounds}")
    print(f"{'way':<10}{'parse s':>10}{'after GB':>10}{'all s':>10}{'peak GB':>10}")
    summary = {way: medians([row for which, row in rows if which == way]) for way in WAYS}
    for way, row in summary.items():
        print(
            f"{way:<10}{row['parse_seconds']:>10.2f}{row['parsed_rss_bytes'] / 1e9:>10.2f}", end=""
        )
        print(f"{row['seconds']:>10.1f}{row['peak_rss_bytes'] / 1e9:>10.2f}")
    same = len({row["sha256"] for _, row in rows}) == 1
    print(f"plans: {'equal' if same else 'differ'}")
    document = {
        "schema_version": 1,
        "benchmark": "tensorrt_weights",
        "blocks": asked.blocks,
        "cpus": os.cpu_count(),
        "weights_bytes": size,
        "ways": summary,
        "plans_equal": same,
    }
    line = json.dumps(document)
    if asked.json:
        asked.json.write_text(line + "\n", "utf-8")
    print(line)


def command(way: str, graph: Path) -> list[str]:
    return [sys.executable, __file__, "--one", way, str(graph)]


def medians(rows: list[dict[str, float | str]]) -> dict[str, float]:
    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    return {name: median(float(row[name]) for row in rows) for name in names}


def measure(way: str, graph: Path) -> dict[str, float | str]:
    """Parse and compile in this process."""
    product = open_product("tensorrt-rtx")
    trt = product.trt
    log = MessageLog()
    logger = logger_for(product, log)
    builder = builder_for(product, logger)
    config = configure(product, builder, TrtOptions())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    begin = time.perf_counter()
    if way == "file":
        assert parser.parse(graph.read_bytes(), str(graph)), log.errors
        held = None
    else:
        held = parse_by_address(parser, graph)
    parsed, resident = time.perf_counter(), peak_rss_bytes()
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.errors
    done = time.perf_counter()
    del held
    return {
        "parse_seconds": parsed - begin,
        "parsed_rss_bytes": float(resident),
        "seconds": done - begin,
        "peak_rss_bytes": float(peak_rss_bytes()),
        "sha256": hashlib.sha256(memoryview(plan)).hexdigest(),
    }


def parse_by_address(parser: "TensorRT.OnnxParser", graph: Path) -> np.memmap:
    """Give the parser the graph, then the address of each weight in the mapped file."""
    model = onnx.load(graph, load_external_data=False)
    mapped = np.memmap(graph.with_name("dit.safetensors"), np.uint8, "r")
    assert parser.load_model_proto(graph.read_bytes(), str(graph))
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, size = int(place["offset"]), int(place["length"])
        assert parser.load_initializer(tensor.name, mapped.ctypes.data + start, size), tensor.name
    assert parser.parse_model_proto()
    return mapped


if __name__ == "__main__":
    main()
