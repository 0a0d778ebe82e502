"""What exporting the full 13.6 B model, and reading the bundle again, costs on this machine.

    python benchmarks/full_size_export.py [--workdir DIR] [--json FILE]

Makes a checkpoint of the released size and layout (six float32 shards, 54 GB) as sparse files, so
that it takes no disk, and runs the real command on it: `lcexport build --res 480p --precision bf16
--only export`, then `--res 720p --add`, then a tiny resolution for AOTInductor. About 28.5 GB are
written for real and removed at the end.

What the numbers mean. Time and memory of the graphs do not depend on the weights' values: no
weight is read. The conversion reads, digests, checks and rounds every byte, but holes are read
without the disk: where checkpoint and bundle share a slow disk, add the reading. What the disk
writes and reads past the system's cache, and what one core digests, is measured in the same run:
the slower of the two is the limit, and a conversion digests each byte that it reads. The
checks, and the first pass through the model, which reads each weight once, begin with the bundle's
files out of the system's cache. Seconds and peak resident memory of the stages are those the build
itself records in the manifest.

Prints a table and, as the last line, one JSON document. Exit code 1 if a bar was missed.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from disk import evict, hash_speed, read_speed, write_speed

from lcexport.checkpoint import expected_tensors
from lcexport.configs.dit import DiTConfig
from lcexport.engines import open_engine
from lcexport.engines.bundle import open_bundle
from lcexport.engines.manifest import WEIGHTS, Manifest, StageRecord, read_manifest
from lcexport.machine import environment

CONFIG = DiTConfig(text_tokens_zero_pad=True)  # the released sizes
SHARDS = 6
PROBE_BYTES = 4 << 30
MARGIN_BYTES = 2 << 30
LCEXPORT = [sys.executable, "-P", "-c", "from lcexport.cli import main; main()"]
TINY = "64x64x1"  # 16 tokens: little arithmetic, every weight


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
    writes = [write_speed(folder / "probe", PROBE_BYTES)]
    tell(f"this disk writes {writes[0] / 1e9:.2f} GB/s; building 480p")
    first_seconds = build(bundle, "480p", "--only", "export", "--model", str(checkpoint))
    writes.append(write_speed(folder / "probe", PROBE_BYTES))
    before = sizes(bundle)
    tell("adding 720p")
    second_seconds = build(bundle, "720p", "--only", "export", "--add")
    added = check_addition(before, sizes(bundle))
    manifest = read_manifest(bundle)
    tell("reading it again")
    read = reading(bundle)
    disk = sum(writes) / len(writes)
    stages = {stage.name: stage for stage in manifest.stages}
    weights_bytes = manifest.files[WEIGHTS].bytes
    conversion = weights_bytes / stages["weights"].seconds
    limit = min(disk, read.hash_speed * weights_bytes / source_bytes)
    bars = [*building_bars(stages, added, conversion / limit), *reading_bars(read)]
    print_table(manifest, bars)
    print(f"conversion: {source_bytes / 1e9:.1f} GB in, {weights_bytes / 1e9:.1f} GB out")
    print(f"whole commands: 480p {first_seconds:.0f} s, 720p added {second_seconds:.0f} s\n")
    return {
        "schema_version": 2,
        "benchmark": "full_size_export",
        "environment": environment(torch.device("cpu"), ()),
        "source_bytes": source_bytes,
        "weights_bytes": weights_bytes,
        "graph_bytes": {name: manifest.files[g.file].bytes for name, g in manifest.graphs.items()},
        "disk_write_bytes_per_second": [round(speed) for speed in writes],
        "conversion_bytes_per_second": round(conversion),
        "command_seconds": {"480p": round(first_seconds, 1), "720p": round(second_seconds, 1)},
        "reading": asdict(read),
        "stages": [stage.model_dump() for stage in manifest.stages],
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
        "passed": all(bar.met for bar in bars),
    }


def building_bars(
    stages: Mapping[str, StageRecord], added: int, share_of_limit: float
) -> Iterator[Bar]:
    first, further, weights = stages["graph:480p"], stages["graph:720p"], stages["weights"]
    yield Bar("480p: trace, graph, checks", first.seconds, 10, "s")
    yield Bar("720p: trace, graph, checks", further.seconds, 10, "s")
    yield Bar("720p: peak memory of that", further.peak_rss_bytes / 1e9, 0.6, "GB")
    yield Bar("720p: what it adds to the bundle", added / 1e6, 30, "MB")
    yield Bar("conversion: peak memory", weights.peak_rss_bytes / 1e9, 1.5, "GB")
    yield Bar("conversion: over the slower limit", 1 / share_of_limit, 1 / 0.9, "")


@dataclass(frozen=True)
class Reading:
    """What is done with a bundle that is there. Speeds in bytes, times in seconds."""

    disk_speeds: tuple[float, float]
    hash_speed: float
    verify_speed: float
    inspect_seconds: float
    help_seconds: float
    first_pass_seconds: float
    first_pass_speed: float
    first_pass_anonymous_bytes: int

    @property
    def disk_speed(self) -> float:
        return sum(self.disk_speeds) / len(self.disk_speeds)


def reading(bundle: Path) -> Reading:
    """Each cold check between two readings of the same file."""
    weights = bundle / WEIGHTS
    size = weights.stat().st_size
    before = read_speed(weights)
    evict(weights)
    verify = size / command("verify", str(bundle), "--level", "hash")
    after = read_speed(weights)
    inspect = statistics.median(command("inspect", str(bundle)) for _ in range(5))
    shown = statistics.median(command("--help") for _ in range(5))
    build(bundle, TINY, "--only", "compile", "--backend", "aotinductor", "--add")
    evict(weights)
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # whose memory is its own
        seconds, anonymous = fresh.submit(first_pass, bundle).result()
    return Reading(
        (before, after), hash_speed(), verify, inspect, shown, seconds, size / seconds, anonymous
    )


def first_pass(bundle: Path) -> tuple[float, int]:
    """Seconds from opening a bundle to the first velocity, and this process's memory then, without
    the mapped file.
    """
    start = time.perf_counter()
    opened = open_bundle(bundle)
    with open_engine("aotinductor", opened, TINY) as engine:
        inputs = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in engine.inputs}
        outputs = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in engine.outputs}
        engine.run(inputs, outputs)
        seconds = time.perf_counter() - start
        status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return seconds, int(anonymous.split()[1]) * 1024


def reading_bars(read: Reading) -> Iterator[Bar]:
    limit = min(read.disk_speed, read.hash_speed)  # of the disk, or of SHA-256 on one core
    yield Bar("verify --level hash: over the slower limit", limit / read.verify_speed, 1 / 0.9, "")
    yield Bar("first pass: over the disk's time", read.disk_speed / read.first_pass_speed, 1.1, "")
    yield Bar(
        "first pass: memory beside the file", read.first_pass_anonymous_bytes / 1e9, 1.5, "GB"
    )
    yield Bar("inspect", read.inspect_seconds, 1, "s")
    yield Bar("--help", read.help_seconds, 0.4, "s")


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


def build(bundle: Path, resolution: str, *more: str) -> float:
    return command("build", "--res", resolution, "-o", str(bundle), "--precision", "bf16", *more)


def command(*words: str) -> float:
    """Run a command as a user would; seconds of the whole process."""
    start = time.perf_counter()
    subprocess.run([*LCEXPORT, *words], check=True, stdout=subprocess.DEVNULL)
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
    print(f"\n{'stage':<44}{'seconds':>10}{'peak GB':>10}")
    for stage in manifest.stages:
        print(f"{stage.name:<44}{stage.seconds:>10.1f}{stage.peak_rss_bytes / 1e9:>10.2f}")
    print(f"\n{'bar':<44}{'found':>10}{'limit':>10}")
    for bar in bars:
        verdict = "" if bar.met else "   MISSED"
        print(f"{bar.name:<44}{bar.value:>10.2f}{bar.limit:>10g} {bar.unit}{verdict}")
    print()


def tell(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
