"""Where the seconds of a conversion and of a first pass go, at the width of the released model.

    python benchmarks/full_size_parts.py [--depth 8] [--rounds 3] [--workdir DIR]

As `full_size_export.py` on fewer blocks: 9.6 GB of float32 in holes, 4.8 GB written and removed.

    through, past   a file written and read through the system's cache and past it
    rounding        the extremes of a chunk and its bfloat16, by all of torch's threads and by one
    conversion      processor seconds of each thread
    first pass      with weights that are asked for ahead and without, in turn, the file out of the
                    cache before each; then once more with the file there

Processor seconds count what a thread did and not what it waited for, but for torch's own threads,
which wait actively.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import full_size_export as full
import torch
from disk import CHUNK_BYTES, evict, read_speed, write_speed

from lcexport.checkpoint import open_checkpoint, write_native
from lcexport.configs.dit import DiTConfig
from lcexport.engines import aoti
from lcexport.engines.manifest import WEIGHTS

PROBE_BYTES = 2 << 30
CHUNKS = 200


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--depth", type=int, default=8, help="blocks (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of first passes (%(default)s)")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args(arguments)
    full.CONFIG = DiTConfig(text_tokens_zero_pad=True, depth=asked.depth)
    with tempfile.TemporaryDirectory(prefix="full-size-parts-", dir=asked.workdir) as name:
        folder = Path(name)
        disk(folder / "probe")
        rounding()
        full.make_checkpoint(folder / "checkpoint")
        conversion(folder)
        if asked.rounds:
            first_passes(folder, asked.rounds)
    return 0


def disk(probe: Path) -> None:
    block = bytearray(os.urandom(CHUNK_BYTES))

    def written() -> None:
        with probe.open("wb", buffering=0) as file:
            for _ in range(PROBE_BYTES // CHUNK_BYTES):
                file.write(block)
            os.fsync(file.fileno())

    def read() -> None:
        evict(probe)
        with probe.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass

    for name, work in (
        ("written past the cache", lambda: write_speed(probe, PROBE_BYTES)),
        ("written through it", written),
        ("read past the cache", lambda: read_speed(probe)),
        ("read through it", read),
    ):
        show(name, work, PROBE_BYTES)
    probe.unlink()


def rounding() -> None:
    chunks = [torch.randn(CHUNK_BYTES // 4) for _ in range(3)]

    def work() -> None:
        for number in range(CHUNKS):
            torch.aminmax(chunks[number % 3])
            chunks[number % 3].to(torch.bfloat16, copy=True)

    threads = torch.get_num_threads()
    for count in dict.fromkeys((threads, 1)):
        torch.set_num_threads(count)
        show(f"rounding, threads: {count}", work, CHUNKS * CHUNK_BYTES)
    torch.set_num_threads(threads)


def conversion(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "checkpoint" / "dit")
    start = time.perf_counter()
    with watched_threads() as spent:
        report = write_native(checkpoint, folder / WEIGHTS, bulk="bf16")
    seconds = time.perf_counter() - start
    print(f"conversion: {report.bytes / 1e9:.2f} GB in {seconds:.1f} s; processor seconds:")
    for name, used in spent.items():
        print(f"    {name:<30}{used:6.1f}")
    (folder / WEIGHTS).unlink()


@contextmanager
def watched_threads() -> Iterator[dict[str, float]]:
    """Processor seconds by thread: Python's by their names, those of libraries as `other`."""
    spent: dict[str, float] = {}
    by_number: dict[int, tuple[str, float]] = {}
    done = threading.Event()

    def look() -> None:
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        for task in Path("/proc/self/task").iterdir():
            try:
                fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            number = int(task.name)
            by_number[number] = names.get(number, by_number.get(number, ("other", 0))[0]), used

    def watch() -> None:
        while not done.wait(0.05):
            look()

    look()
    before = {number: used for number, (_, used) in by_number.items()}
    watcher = threading.Thread(target=watch, name="watching")
    watcher.start()
    yield spent
    done.set()
    watcher.join()
    for number, (name, used) in by_number.items():
        spent[name] = spent.get(name, 0.0) + used - before.get(number, 0.0)


def first_passes(folder: Path, rounds: int) -> None:
    bundle = folder / "bundle"
    full.build(bundle, "480p", "--only", "export", "--model", str(folder / "checkpoint"))
    full.build(bundle, full.TINY, "--only", "compile", "--backend", "aotinductor", "--add")
    size, real = (bundle / WEIGHTS).stat().st_size, aoti.will_need
    for _ in range(rounds):
        for name, asking in (("asked for ahead", real), ("not", lambda weights: None)):
            aoti.will_need = asking
            evict(bundle / WEIGHTS)
            show(f"first pass, {name}", lambda: full.first_pass(bundle), size)
    show("first pass, file in the cache", lambda: full.first_pass(bundle), size)
    aoti.will_need = real


def show(name: str, work: Callable[[], object], size: int) -> None:
    """Seconds, speed and the processor's share."""
    start, used = time.perf_counter(), time.process_time()
    work()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    rate = size / seconds / 1e9
    print(f"{name:<32}{seconds:6.1f} s {rate:7.2f} GB/s {used / size * 1e9:7.2f} processor s/GB")


if __name__ == "__main__":
    sys.exit(main())
