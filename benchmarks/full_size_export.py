"""What exporting the full 13.6 B model costs on this machine: seconds, memory, disk.

    python benchmarks/full_size_export.py [--workdir DIR] [--json FILE]

Makes a checkpoint of the released size and layout (six float32 shards, 54 GB) as sparse files, so
that it takes no disk, and runs the real command on it: `lcexport build --res 480p --precision bf16
--only export`, then `--res 720p --add`. About 28.5 GB are written for real and removed at the end.

What the numbers mean. Time and memory of the graphs do not depend on the weights' values: no
weight is read. The conversion reads, digests, checks and rounds every byte, but holes are read
without the disk: where checkpoint and bundle share a slow disk, add the reading. The disk's
writing speed is measured in the same run with the same kind of bytes and an fsync. Seconds and
peak resident memory are those the build itself records, stage by stage, in the manifest.

Prints a table and, as the last line, one JSON document. Exit code 1 if a bar was missed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from lcexport.checkpoint import expected_tensors
from lcexport.configs.dit import DiTConfig
from lcexport.engines.bundle import WEIGHTS, Manifest, read_manifest

CONFIG = DiTConfig(text_tokens_zero_pad=True)  # the released sizes
SHARDS = 6
PROBE_BYTES = 4 << 30
CHUNK_BYTES = 8 << 20
MARGIN_BYTES = 2 << 30
BUILD = [sys.executable, "-c", "from lcexport.cli import main; main()", "build"]


@dataclass(frozen=True)
class Bar:
    """One requirement: `value` must not exceed `limit`."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the JSON document here too")
    asked = parser.parse_args(arguments)
    asked.workdir.mkdir(parents=True, exist_ok=True)
    refuse_full_disk(asked.workdir)
    with tempfile.TemporaryDirectory(prefix="full-size-export-", dir=asked.workdir) as folder:
        report = measure(Path(folder))
    line = json.dumps(report)
    if asked.json:
        asked.json.write_text(line + "\n")
    print(line)
    return 0 if report["passed"] else 1


def measure(folder: Path) -> dict[str, object]:
    """Run everything in `folder`, print the table, return the document."""
    checkpoint, bundle = folder / "LongCat-Video", folder / "bundle"
    tell("making a sparse checkpoint of the released size")
    source_bytes = make_checkpoint(checkpoint)
    disk_speed = write_speed(folder / "probe")
    tell(f"this disk writes {disk_speed / 1e9:.2f} GB/s; building 480p")
    first_seconds = build(bundle, "480p", "--model", str(checkpoint))
    before = sizes(bundle)
    tell("adding 720p")
    second_seconds = build(bundle, "720p", "--add")
    manifest = read_manifest(bundle)
    added = check_addition(before, sizes(bundle))
    stages = {stage.name: stage for stage in manifest.stages}
    graph, weights = stages["graph:480p"], stages["weights"]
    weights_bytes = manifest.files[WEIGHTS].bytes
    bars = [
        Bar("480p: trace, graph, checks", graph.seconds, 20, "s"),
        Bar("480p: peak memory of that", graph.peak_rss_bytes / 1e9, 0.8, "GB"),
        Bar("conversion: peak memory", weights.peak_rss_bytes / 1e9, 1.5, "GB"),
        Bar("720p: what it adds to the bundle", added / 1e6, 30, "MB"),
    ]
    conversion = weights_bytes / weights.seconds
    print_table(manifest, bars)
    print(
        f"conversion: {source_bytes / 1e9:.1f} GB in, {weights_bytes / 1e9:.1f} GB out at ", end=""
    )
    print(f"{conversion / 1e9:.2f} GB/s, {conversion / disk_speed:.2f} of what the disk takes")
    print(f"whole commands: 480p {first_seconds:.0f} s, 720p added {second_seconds:.0f} s\n")
    return {
        "schema_version": 1,
        "benchmark": "full_size_export",
        "environment": environment(),
        "source_bytes": source_bytes,
        "weights_bytes": weights_bytes,
        "graph_bytes": {name: manifest.files[g.file].bytes for name, g in manifest.graphs.items()},
        "disk_write_bytes_per_second": round(disk_speed),
        "conversion_bytes_per_second": round(conversion),
        "command_seconds": {"480p": round(first_seconds, 1), "720p": round(second_seconds, 1)},
        "stages": [stage.model_dump() for stage in manifest.stages],
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
        "passed": all(bar.met for bar in bars),
    }


def make_checkpoint(folder: Path) -> int:
    """The released layout with zeros for weights: headers are written, data are holes."""
    dit = folder / "dit"
    dit.mkdir(parents=True)
    config = {"_class_name": "LongCatVideoTransformer3DModel", **CONFIG.model_dump(mode="json")}
    (dit / "config.json").write_text(json.dumps(config, indent=2))
    shapes = expected_tensors(CONFIG, "original")
    total = sum(tensor_bytes(shape) for shape in shapes.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    done = 0
    for name, shape in shapes.items():
        shards[done * SHARDS // total][name] = shape
        done += tensor_bytes(shape)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write_sparse(dit / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (dit / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A float32 safetensors file whose data is one hole."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + tensor_bytes(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)


def tensor_bytes(shape: tuple[int, ...]) -> int:
    count = 4
    for size in shape:
        count *= size
    return count


def write_speed(path: Path) -> float:
    """Bytes per second this disk takes, fsync included."""
    block = bytes(CHUNK_BYTES)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(PROBE_BYTES // CHUNK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return PROBE_BYTES / seconds


def build(bundle: Path, resolution: str, *more: str) -> float:
    """Run the command as a user would; seconds of the whole process."""
    command = [*BUILD, "--res", resolution, "-o", str(bundle), *more]
    command += ["--precision", "bf16", "--only", "export"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def sizes(bundle: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file of the bundle but the manifest."""
    status = {path: path.stat() for path in bundle.rglob("*") if path.is_file()}
    return {
        path.relative_to(bundle).as_posix(): (found.st_size, found.st_mtime_ns)
        for path, found in status.items()
        if path.name != "manifest.json"
    }


def check_addition(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> int:
    """Bytes the second resolution added; nothing else may have changed."""
    changed = [name for name, found in before.items() if after.get(name) != found]
    assert not changed, f"adding a resolution changed {changed}"
    return sum(size for name, (size, _) in after.items() if name not in before)


def refuse_full_disk(folder: Path) -> None:
    shapes = expected_tensors(CONFIG, "native").values()
    needed = sum(tensor_bytes(shape) for shape in shapes) * 53 // 100  # bf16 and FP32 islands
    needed += PROBE_BYTES + MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"{folder}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free")


def print_table(manifest: Manifest, bars: list[Bar]) -> None:
    print(f"\n{'stage':<36}{'seconds':>10}{'peak GB':>10}")
    for stage in manifest.stages:
        print(f"{stage.name:<36}{stage.seconds:>10.1f}{stage.peak_rss_bytes / 1e9:>10.2f}")
    print(f"\n{'bar':<36}{'found':>10}{'limit':>10}")
    for bar in bars:
        verdict = "" if bar.met else "   MISSED"
        print(f"{bar.name:<36}{bar.value:>10.2f}{bar.limit:>10g} {bar.unit}{verdict}")
    print()


def environment() -> dict[str, object]:
    """What a reader needs to compare two runs."""
    names = ("lcexport", "torch", "onnx", "onnx-ir", "onnxscript")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def tell(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
