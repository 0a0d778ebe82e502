"""One graph compiled to one plan, in this process. `worker` does the same in a process of its own.

TensorRT calls back into Python from C++, which swallows exceptions: each callback here keeps its
exception, tells TensorRT to stop, and the exception is raised when TensorRT has returned.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from lcexport.configs.errors import (
    BuildError,
    Cancelled,
    IncompatibleError,
    LcexportError,
    ResourceError,
)
from lcexport.engines.files import new_file, refuse_existing
from lcexport.engines.host import available_memory_bytes, peak_rss_bytes
from lcexport.engines.trt.memory import missing_gpu
from lcexport.engines.trt.network import (
    Expectations,
    NetworkSummary,
    attention_kinds,
    check_network,
    parse_network,
)
from lcexport.engines.trt.options import TrtOptions, configure, require_supported
from lcexport.engines.trt.product import MessageLog, Product, builder_for, logger_for
from lcexport.engines.trt.timing import TimingCache

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

OnProgress = Callable[[float, str], None]
Cancel = Callable[[], bool]

# Host memory of a build, measured with TensorRT for RTX 1.7: about three times the weights.
BYTES_PER_WEIGHT_BYTE = 3.0
FIXED_BYTES = 512 << 20
CUDA_ERROR = re.compile(r"CUDA_SUCCESS|cudaError|CUDA driver")
# Where there is no driver, RTX says this after whatever went wrong.
ECHO = re.compile(r"catchCudaError.*cudaError 35\b")
OTHERWISE = "Try another optimization_level or version of TensorRT."
SMALLEST_STEP = 0.001  # of the whole; smaller progress is not reported


class PlanReport(BaseModel):
    """A finished plan: the file, what making it took, and what its maker should be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str
    seconds: float
    peak_rss_bytes: int
    version: str
    summary: NetworkSummary
    notes: tuple[str, ...] = ()


def compile_plan(
    product: Product,
    graph: bytes,
    graph_path: Path,
    options: TrtOptions,
    output: Path,
    expectations: Expectations,
    *,
    on_progress: OnProgress | None = None,
    cancel: Cancel | None = None,
    log: MessageLog | None = None,
    check_memory: bool = True,
    refittable: Iterable[str] = (),
    cache_named: bool = True,
) -> PlanReport:
    """Parse, check and compile `graph`; `output` appears whole or not at all.

    Args:
        graph_path: where the graph's external data is looked for: beside this file.
        on_progress: called with a fraction that never falls, and the builder's own phase names.
        cancel: asked at every step of the builder; True stops it.
        check_memory: refuse where the host has less memory than the build is likely to need.
        refittable: names of the weights that refitting may set, where the options ask for it.
        cache_named: the user named the timing cache: one that does not fit is an error. One that
            we chose is begun anew, with a note.

    Raises:
        UsageError, IncompatibleError: an option this product or machine does not have.
        BuildError: the parser, the checks or the compiler refuse the graph.
        ResourceError: too little memory, no room, or `output` exists.
        Cancelled: `cancel` returned True.
    """
    started = time.monotonic()
    refuse_existing(output)
    require_supported(product, options)
    log = log or MessageLog()
    logger = logger_for(product, log)
    builder = builder_for(product, logger, log)
    config = configure(product, builder, options)
    cache = None if options.timing_cache is None else TimingCache(options.timing_cache, cache_named)
    notes = cache.load(config) if cache else []
    parsed = parse_network(product, builder, logger, log, graph, graph_path)
    if options.sparse_kernel == "plugin":
        expectations = expectations.model_copy(update={"sparse_plugin": True})
    summary = check_network(product, parsed.network, expectations, graph_path)
    if options.refit or options.strip_plan:
        mark_refittable(parsed.network, refittable, graph_path)
    if check_memory:
        require_memory(summary.weights_bytes)
    progress = Progress(on_progress, cancel)
    config.progress_monitor = monitor_for(product, progress)
    with new_file(output) as file:
        sink = PlanSink(file)
        # In pieces: a plan is as large as its weights.
        writer = writer_for(product, sink)
        built = builder.build_serialized_network_to_stream(parsed.network, config, writer)
        for stopped in (progress.stopped, sink.stopped):
            if stopped is not None:
                raise stopped
        if not built or sink.written == 0:
            raise build_error(product, options, log, parsed.network, graph_path)
    if cache is not None:
        try:
            cache.merge(config)
        except LcexportError as error:  # the plan is made; the next one only takes longer
            notes.append(f"what was measured is not kept: {error}")
    return PlanReport(
        bytes=sink.written,
        sha256=sink.digest.hexdigest(),
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
        version=str(product),
        summary=summary,
        notes=tuple(notes),
    )


def mark_refittable(network: TensorRT.INetworkDefinition, names: Iterable[str], path: Path) -> None:
    """Let refitting set these weights and no others. BuildError names one there is not."""
    for name in names:
        if not network.mark_weights_refittable(name):
            raise BuildError(f"{path.name} has no weight that refitting could set", got=name)


@dataclass
class PlanSink:
    """Writes a plan to a file and digests it on the way; keeps the error that stopped it."""

    file: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)
    written: int = 0
    stopped: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Bytes written: all of them, or none, for TensorRT to stop."""
        try:
            self.file.write(data)
        except BaseException as error:
            self.stopped = error
            return 0
        self.digest.update(data)
        self.written += len(data)
        return len(data)


def writer_for(product: Product, sink: PlanSink) -> TensorRT.IStreamWriter:
    """A TensorRT stream writer over `sink`."""
    trt = product.trt

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        # The binding's own signature is its C++ side's: it calls this one with a copy.
        def write(self, data: bytes) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
            return sink.write(data)

    return Writer()


@dataclass
class Phase:
    """One running phase of the builder."""

    name: str
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """The builder's nested phases as one rising fraction, and the way to stop it.

    A step of a phase is worth an equal part of it; a phase inside it fills its present step.
    """

    def __init__(self, on_progress: OnProgress | None, cancel: Cancel | None) -> None:
        self.stopped: BaseException | None = None
        self._on_progress = on_progress or (lambda fraction, phase: None)
        self._cancel = cancel or (lambda: False)
        self._phases: dict[str, Phase] = {}
        self._reported = (-1.0, "")
        self._lock = threading.RLock()  # phases run, and report, on several threads

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = Phase(name, parent, max(steps, 1))
            self._report(name)

    def step(self, name: str, done: int) -> bool:
        """False where the build must stop."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = done + 1
            self._report(name)
            return self.stopped is None

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def _report(self, name: str) -> None:
        try:
            if self.stopped is None and self._cancel():
                self.stopped = Cancelled("the build was cancelled")
            fraction = max(self._fraction(name), self._reported[0], 0.0)
            if fraction - self._reported[0] >= SMALLEST_STEP or name != self._reported[1]:
                self._reported = (fraction, name)
                self._on_progress(fraction, name)
        except BaseException as error:  # C++ would swallow it
            self.stopped = self.stopped or error

    def _fraction(self, name: str) -> float:
        fraction, phase = 0.0, self._phases.get(name)
        while phase is not None:
            fraction = min((phase.done + fraction) / phase.steps, 1.0)
            phase = self._phases.get(phase.parent) if phase.parent else None
        return fraction


def monitor_for(product: Product, progress: Progress) -> TensorRT.IProgressMonitor:
    """A TensorRT progress monitor over `progress`."""
    trt = product.trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


def build_error(
    product: Product,
    options: TrtOptions,
    log: MessageLog,
    network: TensorRT.INetworkDefinition,
    path: Path,
) -> LcexportError:
    """The compiler gives no exception, only messages: the error that the last of them mean."""
    errors = [error for error in log.errors if not ECHO.search(error)] or list(log.errors)
    said = "\n".join(errors)
    what = f"{product} cannot compile {path.name}"
    got = errors[-1].strip() if errors else "no reason given"
    if "not supported by a dedicated kernel" in said:
        return BuildError(
            f"{what}: an attention has no fused kernel",
            got=attention_kinds(network),
            wanted="bfloat16 or float16, heads of a width that is fused (256 at most on RTX 1.7)",
            do="Unfused attention would keep every score in memory, so this is not built.",
        )
    if old := re.search(r"target\(s\) ([\w, ]+), because", said):
        return IncompatibleError(
            f"{what} for {old.group(1)}",
            got=got,
            do="GPUs before sm80 have no bfloat16: leave them out of compute_capabilities.",
        )
    if "workspace memory" in said:
        return ResourceError(what, got=got, do="Raise workspace_bytes.")
    if re.search(r"bad_alloc|out of memory|OutOfMemory|Cannot allocate", said):
        return ResourceError(
            what, got=got, do="Free memory, or build in more segments, which need less each."
        )
    if cuda := [error for error in errors if CUDA_ERROR.search(error)]:
        return cuda_error(product, options, what, cuda[-1].strip())
    return BuildError(what, got=got, do=OTHERWISE)


def cuda_error(product: Product, options: TrtOptions, what: str, got: str) -> LcexportError:
    """CUDA failed: RTX was asked for something that it does on a GPU alone, or a GPU failed."""
    if not product.is_rtx or missing_gpu() is None:
        return BuildError(f"{what}: CUDA failed", got=got, do=OTHERWISE)
    wishes = " and ".join(name for name in ("strip_plan", "refit") if getattr(options, name))
    return IncompatibleError(
        f"{what} without a GPU" + (f" with {wishes}" if wishes else ""),
        got=got,
        do=(f"Build without {wishes}, or on" if wishes else "Use")
        + " a machine with an NVIDIA GPU and its driver.",
    )


def build_bytes(weights_bytes: int) -> int:
    """Host memory that compiling a plan with these weights inside is likely to take."""
    return int(weights_bytes * BYTES_PER_WEIGHT_BYTE) + FIXED_BYTES


def require_memory(weights_bytes: int) -> None:
    """Refuse a build that this host has not the memory for, before it takes all there is.

    Raises:
        ResourceError: says how much is needed and how much there is.
    """
    needed = build_bytes(weights_bytes)
    available = available_memory_bytes()
    if needed > available:
        raise ResourceError(
            "the build would need more host memory than there is",
            got=f"{available / 1e9:.1f} GB available",
            wanted=f"{needed / 1e9:.1f} GB: about 3 times the weights' {weights_bytes / 1e9:.1f}",
            do="Build in more segments, with --weights shared, or free memory.",
        )
