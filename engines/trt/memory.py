"""Device memory for TensorRT: one stream, one block, and who lies where in it.

A context that manages no memory of its own needs scratch while it runs, and segments hand
tensors to each other. Neither outlives a run, so every engine that is given the same `Workspace`
(several resolutions, several segments) uses the same block; its one stream puts their runs in
order. What is CUDA's is behind `DeviceOps`, so that tests can run on the host.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from lcexport.configs.errors import IncompatibleError, ResourceError

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

ALIGNMENT = 256  # bytes; what TensorRT asks of device memory


class DeviceOps(Protocol):
    """A device, and one stream on it that is not the default one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def stream(self) -> int:
        """The stream's handle, as `execute_async_v3` takes it."""
        ...

    def active(self) -> AbstractContextManager[object]:
        """Make the device the current one, which is where TensorRT works."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes, aligned, for use on the stream. ResourceError: out of memory."""
        ...

    def enter(self) -> None:
        """Make the stream wait for what the caller has queued; the host does not wait."""
        ...

    def leave(self) -> None:
        """Make the caller's stream wait for what the stream has queued."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` queues, without running it; the result runs it each time.

        The host waits for the device before the recording. An error of `enqueue` is raised as it
        is, with the caller's stream as it was.
        """
        ...

    def synchronize(self) -> None:
        """Make the host wait for the stream."""
        ...


class CudaOps:
    """`DeviceOps` on an NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        # With its number, which every tensor's device has: `cuda` is not equal to `cuda:0`.
        self.device = torch.device("cuda", number_of(device))
        self._stream = torch.cuda.Stream(self.device)
        self.stream = self._stream.cuda_stream

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        # On the stream: torch hands freed memory on in the order of the stream it came from.
        try:
            with torch.cuda.stream(self._stream):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise out_of_memory(nbytes, f"{gib(free)} free of {gib(total)}") from error

    def enter(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def leave(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with CUDA calls that a recording does not allow its own.
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        failed: BaseException | None = None
        try:
            # A recording that ends in an error leaves its stream current: this puts ours back.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), recording:
                try:
                    enqueue()
                except BaseException as error:
                    failed = error
                    raise
        except BaseException as error:  # of ending what `enqueue` broke, most likely
            raise failed or error from None

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def synchronize(self) -> None:
        self._stream.synchronize()


class Workspace:
    """One stream and one block of device memory, for the engines that are given it.

    They run one after another, on the stream; between two runs the block holds nothing.
    """

    def __init__(self, ops: DeviceOps) -> None:
        self.ops = ops
        self._block: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Size of the block; 0 before the first engine asked for one."""
        return 0 if self._block is None else self._block.numel()

    def reserve(self, nbytes: int) -> int:
        """Address of a block of at least `nbytes`. The block moves when it has to grow.

        Raises:
            ResourceError: the device has not that much memory left.
        """
        if self._block is None or self._block.numel() < nbytes:
            self._block = None  # given back first: the two need not fit at once
            self._block = self.ops.allocate(max(nbytes, ALIGNMENT))
        return self._block.data_ptr()

    def release(self) -> None:
        """Give the block back; the next run reserves it anew."""
        self._block = None


@dataclass(frozen=True)
class Lifetime:
    """A tensor's size, and the first and last step (both inclusive) that touch it."""

    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether some step needs both."""
        return self.first <= other.last and other.first <= self.last


def place(lifetimes: Mapping[str, Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets such that tensors alive at once do not overlap, and the bytes needed in all.

    Largest first, each at the lowest offset that is free for its whole life.
    """
    offsets: dict[str, int] = {}
    total = 0
    for name in sorted(lifetimes, key=lambda name: -lifetimes[name].nbytes):
        own = lifetimes[name]
        offset = 0
        for other in sorted(offsets, key=offsets.__getitem__):
            if not own.meets(lifetimes[other]):
                continue
            if offset + aligned(own.nbytes) <= offsets[other]:
                break
            offset = max(offset, offsets[other] + aligned(lifetimes[other].nbytes))
        offsets[name] = offset
        total = max(total, offset + aligned(own.nbytes))
    return offsets, total


def torch_dtype(trt: TensorRT, dtype: TensorRT.DataType) -> torch.dtype:
    """Torch's name of a TensorRT type; `trt.nptype` would not do, as numpy has no bfloat16."""
    known = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT8: torch.int8,
        trt.DataType.INT32: torch.int32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.BOOL: torch.bool,
    }
    if dtype not in known:
        raise IncompatibleError(
            "a plan has an input or output of a type that engines do not take",
            got=dtype,
            wanted=", ".join(str(kind).removeprefix("torch.") for kind in known.values()),
        )
    return known[dtype]


def number_of(device: torch.device) -> int:
    """The number of a CUDA device; of plain `cuda`, the current one's."""
    return torch.cuda.current_device() if device.index is None else device.index


def gpu_of(device: torch.device) -> str | None:
    """A GPU's own name, for CUDA_VISIBLE_DEVICES; None of a processor.

    Of a part of a GPU (MIG) it is the one by which this process sees it (not tried).
    """
    if device.type != "cuda":
        return None
    seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if any(name.startswith("MIG-") for name in seen):
        return seen[number_of(device)]
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def driver_version() -> str | None:
    """The CUDA version that the installed NVIDIA driver supports, "13.0"; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def missing_gpu() -> str | None:
    """What this machine lacks for torch to use an NVIDIA GPU; None where it has one."""
    if torch.cuda.is_available():
        return None
    driver = driver_version()
    lacks = [] if driver else ["no NVIDIA driver (libcuda.so.1)"]
    if torch.version.cuda is None:
        lacks.append(f"a torch without CUDA ({torch.__version__})")
    usable = f"no GPU that torch's CUDA {torch.version.cuda} can use with the driver's {driver}"
    return " and ".join(lacks) or usable


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def out_of_memory(nbytes: int, got: str) -> ResourceError:
    """The device cannot hold what an engine needs to run."""
    return ResourceError(
        "out of device memory: an engine's scratch and intermediate tensors do not fit",
        got=got,
        wanted=gib(nbytes),
        do="Close other engines, set a weight-streaming budget, or build a smaller resolution.",
    )


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
