"""What an engine costs beside its passes: to start, to hold in memory, to pass between segments."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from lcexport.configs.errors import LcexportError
from lcexport.engines.manifest import EngineRecord, TensorRecord
from lcexport.engines.trt.worker import child_environment
from lcexport.qualify.claims import Check, Claim, Result, measured, untested
from lcexport.qualify.subject import Subject
from lcexport.timing import seconds_of

START = Claim(
    "start",
    "How long until an engine has run once.",
    "A new process from its start to the end of its first pass, and the engine opened again here. "
    "The files may lie in the page cache.",
)
MEMORY = Claim(
    "memory",
    "How much memory an engine takes, on the device and on the host.",
    "That new process' device memory, TensorRT's own allocations included, and its largest "
    "resident size.",
)
SEAMS = Claim(
    "seams",
    "What cutting the engine into segments costs.",
    "Bytes that one segment writes and another reads, from the manifest; on a GPU also the time "
    "they take at the bandwidth of a copy on it. An upper bound: one plan writes most of them too.",
)
COMMAND = (sys.executable, "-P", "-m", "lcexport.qualify.cold")
COPY_BYTES = 1 << 30
COPIES = 5


def start(subject: Subject) -> Iterator[Result]:
    """Both figures of a cold start, and a warm one."""
    begin = time.perf_counter()
    got = run_cold(subject)
    until_run = time.perf_counter() - begin
    seconds = {name: value for name, value in got.items() if name.endswith("_seconds")}
    memory = {name: value for name, value in got.items() if name not in seconds}
    begin = time.perf_counter()
    with subject.open():
        seconds["warm_open_seconds"] = time.perf_counter() - begin
    yield measured(START, {"process_to_first_run_seconds": until_run, **seconds})
    yield measured(MEMORY, {**memory, "weights_file_bytes": subject.weights.stat().st_size})


def run_cold(subject: Subject) -> dict[str, object]:
    """Start `cold` and wait for its answer.

    Raises:
        LcexportError: it ended without one; says the last thing it said.
    """
    request = {
        "folder": str(subject.bundle.folder.absolute()),
        "resolution": subject.resolution,
        "backend": subject.backend,
        "device": str(subject.device),
    }
    command = [*COMMAND, json.dumps(request)]
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing said"]
        raise LcexportError(
            "a new process could not run the engine", got=f"status {done.returncode}: {said[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def seams(subject: Subject) -> Iterator[Result]:
    record = subject.engine_record
    if record is None or len(record.plans) == 1:
        yield untested(SEAMS, "the engine is in one piece")
        return
    written, read = crossing_bytes(record)
    got: dict[str, object] = {
        "segments": len(record.plans),
        "bytes_written": written,
        "bytes_read": read,
    }
    if subject.on_gpu:
        bandwidth = copy_bandwidth(subject.device)
        got["copy_bytes_per_second"] = bandwidth
        got["seconds_per_pass"] = (written + read) / bandwidth
    yield measured(SEAMS, got)


def crossing_bytes(record: EngineRecord) -> tuple[int, int]:
    """Bytes that plans write for later ones, and bytes that those read, in one pass."""
    uses = [(call.plan, call.tensors) for call in record.calls]
    uses = uses or [(index, {}) for index in range(len(record.plans))]
    outputs = [
        (names.get(tensor.name, tensor.name), size(tensor))
        for index, names in uses
        for tensor in record.plans[index].outputs
    ]
    inputs = [
        (names.get(tensor.name, tensor.name), size(tensor))
        for index, names in uses
        for tensor in record.plans[index].inputs
    ]
    made, wanted = ({name for name, _ in tensors} for tensors in (outputs, inputs))
    written = sum(nbytes for name, nbytes in outputs if name in wanted)
    read = sum(nbytes for name, nbytes in inputs if name in made)
    return written, read


def size(tensor: TensorRecord) -> int:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return torch.Size(tensor.shape).numel() * dtype.itemsize


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy, best of several."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * COPY_BYTES / min(seconds_of(copy, device) for _ in range(COPIES))


CHECKS = (Check((START, MEMORY), start), Check((SEAMS,), seams))
