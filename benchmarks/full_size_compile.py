"""The whole 13.6 B model at 480p in bf16, compiled by TensorRT for RTX on this machine.

    python benchmarks/full_size_compile.py [--workdir DIR] [--segments N] [--json FILE]

Makes a full-size checkpoint of zeros, runs `lcexport build --backend tensorrt-rtx --only compile`
and prints time, peak memory and size of each plan. Then compiles the first segment once more and
says whether its bytes are the same. Needs some 60 GB of disk; no GPU.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from full_size_export import make_checkpoint

from lcexport.engines.bundle import read_manifest

BACKEND, SIZE = "tensorrt-rtx", "480p"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--segments", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lcexport-compile-", dir=arguments.workdir))
    try:
        document = run(folder, arguments.segments)
    finally:
        shutil.rmtree(folder)
    line = json.dumps(document)
    if arguments.json:
        arguments.json.write_text(line + "\n", "utf-8")
    print(line)


def run(folder: Path, segments: int) -> dict[str, object]:
    """Build, print the table, compile one segment again."""
    print("making a sparse checkpoint of the released size ...", flush=True)
    make_checkpoint(folder / "checkpoint")
    print("converting, exporting and compiling ...", flush=True)
    bundle, start = folder / "bundle", time.perf_counter()
    command = [sys.executable, "-c", "from lcexport.cli import main; main()", "build"]
    command += ["--model", str(folder / "checkpoint"), "--res", SIZE, "--precision", "bf16"]
    command += ["--backend", BACKEND, "--only", "compile", "--segments", str(segments)]
    subprocess.run([*command, "-o", str(bundle)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    manifest = read_manifest(bundle)
    engine = manifest.engines[BACKEND][SIZE]
    stages = [stage for stage in manifest.stages if stage.name.startswith("compile:")]
    print(f"\n{'plan':<10}{'blocks':>10}{'seconds':>10}{'peak GB':>10}{'plan GB':>10}")
    for stage, plan in zip(stages, engine.plans, strict=True):
        size = manifest.files[plan.file].bytes
        blocks = f"{plan.first_block}-{plan.last_block}"
        peak = stage.peak_rss_bytes / 1e9
        name = Path(plan.file).name
        print(f"{name:<10}{blocks:>10}{stage.seconds:>10.1f}{peak:>10.2f}{size / 1e9:>10.2f}")
    print(f"whole command {seconds:.0f} s, attentions {sum(p.attentions for p in engine.plans)}")
    again = rebuilt_sha256(bundle)
    same = again == manifest.files[engine.plans[0].file].sha256
    print(f"first segment compiled again: bytes {'equal' if same else 'differ'}")
    return {
        "schema_version": 1,
        "benchmark": "full_size_compile",
        "cpu": platform.processor() or platform.machine(),
        "versions": {**manifest.versions, BACKEND: engine.version},
        "command_seconds": round(seconds, 1),
        "stages": [stage.model_dump() for stage in stages],
        "plan_bytes": [manifest.files[plan.file].bytes for plan in engine.plans],
        "rebuilt_equal": same,
    }


def rebuilt_sha256(bundle: Path) -> str:
    """Digest of the first segment's plan, compiled a second time."""
    import onnx_ir as ir
    import torch

    from lcexport.checkpoint import is_island
    from lcexport.engines.trt.network import Expectations
    from lcexport.engines.trt.options import TrtOptions
    from lcexport.engines.trt.worker import compile_graph
    from lcexport.graph import prove_precision
    from lcexport.graph.segments import segment_graph

    manifest = read_manifest(bundle)
    graph = bundle / manifest.graphs[SIZE].file
    count = len(manifest.engines[BACKEND][SIZE].plans)
    segment = segment_graph(ir.load(graph), count)[0].model
    proof = prove_precision(segment, torch.bfloat16)
    islands = [name for name in segment.graph.initializers if is_island(name)]
    data = ir.to_proto(segment).SerializeToString()
    output = bundle / "again.plan"
    expected = Expectations.from_proof(proof, islands)
    compile_graph(BACKEND, data, graph, output, TrtOptions(), expected)
    with output.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
