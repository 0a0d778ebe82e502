"""The whole 13.6 B model in bf16, compiled by TensorRT for RTX on this machine.

    python benchmarks/full_size_compile.py [--res 480p] [--weights inside,shared] [--segments N]
                                           [--workdir DIR] [--json FILE]

Writes 28 GB of random weights in a bundle's form, exports the graph, and compiles it both ways: in
segments with the weights inside (as few as this machine's memory allows, unless told), and as one
plan for each function with the weights outside. Prints time, peak memory and size of each plan,
and whether the first plan of each way has the same bytes when it is compiled a second time. Each
plan is removed when it is measured, but for those. No GPU is used, nothing is run. Needs some
40 GB of disk.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from tensorrt_blocks import export, write_random

from lcexport.builder.compile import Unit, part_units, proposed_segments, segment_unit
from lcexport.configs.dit import DiTConfig
from lcexport.configs.presets import preset_from
from lcexport.engines.trt.compile import PlanReport
from lcexport.engines.trt.network import Expectations
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.worker import compile_graph
from lcexport.graph import prove_precision
from lcexport.graph.parts import parts_of
from lcexport.graph.segments import segment_graph

BACKEND = "tensorrt-rtx"
CONFIG = DiTConfig(text_tokens_zero_pad=True)  # the released one


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--res", default="480p", help="resolution (%(default)s)")
    parser.add_argument("--weights", default="inside,shared", help="ways (%(default)s)")
    parser.add_argument("--segments", type=int, default=0, help="0: as memory allows")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="full-size-compile-", dir=asked.workdir) as name:
        weights = Path(name) / "dit.safetensors"
        started = time.monotonic()
        write_random(weights, CONFIG)
        size = weights.stat().st_size / 1e9
        print(f"{size:.1f} GB of random weights in {time.monotonic() - started:.0f} s", flush=True)
        graph, _ = export(CONFIG, preset_from(asked.res), weights)
        ways = [measure(way, graph, asked.segments) for way in asked.weights.split(",")]
    document = {
        "schema_version": 2,
        "benchmark": "full_size_compile",
        "environment": {
            "python": sys.version.split()[0],
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "resolution": asked.res,
        "ways": ways,
    }
    line = json.dumps(document)
    if asked.json:
        asked.json.write_text(line + "\n", "utf-8")
    print(line)


def measure(way: str, graph: Path, segments: int) -> dict[str, object]:
    """Compile every plan of one way, one after another; the table's rows as records."""
    print(f"\nweights {way}")
    print(f"{'plan':<10}{'blocks':>10}{'seconds':>10}{'peak GB':>10}{'plan GB':>10}{'uses':>6}")
    rows, first, started = [], None, time.monotonic()
    for unit, uses in units(way, graph, segments):
        report = compiled(unit, graph)
        first = first or (unit, report)
        rows.append(row(unit, report, uses))
        print_row(rows[-1])
    seconds = time.monotonic() - started
    assert first is not None
    again = compiled(first[0], graph)
    attentions = sum(int(str(row["attentions"])) * int(str(row["uses"])) for row in rows)
    total = sum(int(str(row["bytes"])) for row in rows)
    print(f"together {seconds:.0f} s, {total / 1e9:.3f} GB")
    print(f"{attentions} attentions a pass, none decomposable")
    same = again.sha256 == first[1].sha256
    print(f"the first plan compiled again: bytes {'equal' if same else 'differ'}", flush=True)
    return {
        "weights": way,
        "seconds": round(seconds, 1),
        "plans": rows,
        "version": again.version,
        "rebuilt_equal": same,
    }


def units(way: str, graph: Path, segments: int) -> Iterator[tuple[Unit, int]]:
    """What becomes a plan, and how often a pass uses it."""
    model = ir.load(graph)
    if way == "shared":
        parts, calls = parts_of(model)
        for index, unit in enumerate(part_units("", parts, calls)):
            yield unit, sum(call.part == index for call in calls)
    else:
        for segment in segment_graph(model, segments or proposed_segments(model)):
            yield segment_unit("", segment), 1


def compiled(unit: Unit, graph: Path) -> PlanReport:
    """One plan, made in a process of its own and removed."""
    plan = graph.with_name(Path(unit.record.file).name)
    proof = prove_precision(unit.model, torch.bfloat16)
    report = compile_graph(
        BACKEND,
        ir.to_proto(unit.model).SerializeToString(),
        graph,
        plan,
        TrtOptions(),
        Expectations.from_proof(proof, unit.islands),
    )
    plan.unlink()
    return report


def row(unit: Unit, report: PlanReport, uses: int) -> dict[str, object]:
    return {
        "plan": Path(unit.record.file).name,
        "first_block": unit.record.first_block,
        "last_block": unit.record.last_block,
        "uses": uses,
        "seconds": round(report.seconds, 1),
        "peak_rss_bytes": report.peak_rss_bytes,
        "bytes": report.bytes,
        "attentions": report.summary.attentions,
    }


def print_row(row: dict[str, object]) -> None:
    blocks = "" if row["first_block"] is None else f"{row['first_block']}-{row['last_block']}"
    peak, size = (int(str(row[key])) / 1e9 for key in ("peak_rss_bytes", "bytes"))
    print(f"{row['plan']:<10}{blocks:>10}{row['seconds']:>10}{peak:>10.2f}", end="")
    print(f"{size:>10.3f}{row['uses']:>6}", flush=True)


if __name__ == "__main__":
    main()
