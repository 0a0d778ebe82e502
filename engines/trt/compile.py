"""One graph compiled to one plan, in this process. `worker` does the same in a process of its own.

TensorRT calls back into Python from C++, which swallows exceptions: the callbacks here and in
`progress` keep theirs, tell TensorRT to stop, and they are raised when TensorRT has returned.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from lcexport.configs.errors import BuildError, LcexportError, ResourceError
from lcexport.engines.files import new_file, refuse_existing
from lcexport.engines.host import available_memory_bytes, peak_rss_bytes
from lcexport.engines.trt.failures import build_error
from lcexport.engines.trt.network import (
    Expectations,
    NetworkSummary,
    check_network,
)
from lcexport.engines.trt.options import TrtOptions, configure, require_supported
from lcexport.engines.trt.parsing import parse_network
from lcexport.engines.trt.product import MessageLog, Product, builder_for, logger_for
from lcexport.engines.trt.progress import Cancel, OnProgress, Progress, monitor_for
from lcexport.engines.trt.timing import TimingCache

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

# Host memory of a build, measured with TensorRT for RTX 1.7: about three times the weights.
BYTES_PER_WEIGHT_BYTE = 3.0
FIXED_BYTES = 512 << 20


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
            "the build is likely to need more host memory than there is",
            got=f"{available / 1e9:.1f} GB available",
            wanted=f"{needed / 1e9:.1f} GB: {FIXED_BYTES / 1e9:.1f}, and about "
            f"{BYTES_PER_WEIGHT_BYTE:.0f} times the weights' {weights_bytes / 1e9:.1f}",
            do="Build in more segments, with --weights shared, or free memory.",
        )
