"""The TensorRT engine: plans in, velocities out, nothing through the host in between.

An engine is one plan, or a chain of them (segments): a segment's outputs feed later segments by
name, from the workspace, and what no segment makes is the engine's input. Scratch comes from the
workspace as well. A run binds addresses and queues kernels on the workspace's stream; that
stream waits for the caller's and the caller's for it, and the host waits for neither.

TensorRT and TensorRT for RTX have the same calls here.
"""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch

from lcexport.configs.errors import (
    IncompatibleError,
    IntegrityError,
    LcexportError,
    ResourceError,
    UsageError,
)
from lcexport.engines import TensorSpec
from lcexport.engines.trt.memory import Lifetime, Workspace, aligned, gib, place, torch_dtype
from lcexport.engines.trt.product import MessageLog, Product, logger_for
from lcexport.engines.trt.reader import (
    BuiltFor,
    Here,
    PlanFile,
    VerifiedPlan,
    check_target,
    deserialize,
    said,
)
from lcexport.engines.trt.refit import StoredTensor, refit_from_weights


@dataclass(frozen=True)
class RunOptions:
    """How an engine is run.

    Attributes:
        weight_budget: bytes of streamable weights that may stay on the device, over all
            segments; "auto" lets TensorRT choose; None keeps them all there.
        cuda_graph: record the work the second time the same tensors come, then replay it.
        weights: refit every segment from these before the first run; stripped plans need it.
    """

    weight_budget: int | Literal["auto"] | None = None
    cuda_graph: bool = False
    weights: Mapping[str, StoredTensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight_budget, int) and self.weight_budget < 0:
            raise UsageError("the weight budget is negative", got=self.weight_budget)
        if self.cuda_graph and self.weight_budget is not None:
            raise UsageError("a CUDA graph and weight streaming exclude each other")


@dataclass(frozen=True)
class Wiring:
    """Which tensors the caller gives and takes, and how long the others live, in segments."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    internal: dict[str, Lifetime]


@dataclass
class Segment:
    """One plan, deserialised."""

    engine: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    context: Any = None
    scratch_bytes: int = 0


@dataclass
class Bound:
    """What the contexts point at, and the recorded work once there is some."""

    addresses: dict[str, int] = field(default_factory=dict)
    base: int = 0
    replay: Any = None


def open_plans(
    product: Product,
    plans: Sequence[PlanFile],
    built: BuiltFor,
    here: Here,
    workspace: Workspace,
    *,
    rebuild: str,
    options: RunOptions | None = None,
) -> "TrtEngine":
    """Open plans that were built for what is here; `TrtEngine` says the rest.

    Raises:
        IncompatibleError: built elsewhere; names the fields and the command that rebuilds.
    """
    check_target(built, here, rebuild)
    return TrtEngine(product, plans, workspace, options, host_code=built.version_compatible)


class TrtEngine:
    """One DiT at one shape, compiled. See `lcexport.engines.Engine`.

    Args:
        product: its name is the engine's `backend`.
        plans: the segments, in order.
        workspace: not owned; share one among engines that never run at the same time.
        options: how to run.
        host_code: let plans bring code of their own, as version-compatible ones do.

    Raises:
        IntegrityError: a plan is not the manifest's, or the plans do not fit together.
        IncompatibleError: TensorRT refused a plan.
        ResourceError: not enough device memory.
        UsageError: an option that the plans were not built for.
    """

    def __init__(
        self,
        product: Product,
        plans: Sequence[PlanFile],
        workspace: Workspace,
        options: RunOptions | None = None,
        *,
        host_code: bool = False,
    ) -> None:
        self.backend, self.device = product.name, workspace.ops.device
        self._product, self._options = product, options or RunOptions()
        self._log = MessageLog()
        self._logger = logger_for(product, self._log)  # outlives all that is made with it
        self._workspace = workspace
        self._segments: list[Segment] = []
        self._bound = Bound()
        self._runtime: Any = product.trt.Runtime(self._logger)
        try:
            if host_code:
                self._runtime.engine_host_code_allowed = True
            for plan in plans:
                self._segments.append(self._open(plan))
            self._prepare()
        except BaseException as error:
            # The traceback's frames hold engines, which must not outlive the runtime.
            traceback.clear_frames(error.__traceback__)
            self.close()
            raise

    def _open(self, plan: PlanFile) -> Segment:
        with VerifiedPlan(plan) as verified:
            engine = deserialize(self._product, self._runtime, verified, self._log)
        return Segment(engine, *ports_of(self._product, engine))

    def _prepare(self) -> None:
        """Weights, then the budget, then contexts: TensorRT allows no other order."""
        wiring = wire(self._segments)
        self.inputs, self.outputs = wiring.inputs, wiring.outputs
        if self._options.weights is not None:
            self.refit(self._options.weights)
        set_weight_budget([segment.engine for segment in self._segments], self._options)
        for segment in self._segments:
            make_context(self._product, segment, self._log)
        # Scratch first, as only one segment runs at a time; then what they hand on.
        scratch = aligned(max(segment.scratch_bytes for segment in self._segments))
        offsets, behind = place(wiring.internal)
        self._offsets = {name: scratch + offset for name, offset in offsets.items()}
        self.workspace_bytes = scratch + behind
        self._workspace.reserve(self.workspace_bytes)

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `lcexport.engines.Engine.run`. Returns once the work is queued."""
        if self._runtime is None:
            raise UsageError("the engine is closed")
        addresses = self._addresses(inputs, self.inputs) | self._addresses(outputs, self.outputs)
        base = self._workspace.reserve(self.workspace_bytes)
        ops = self._workspace.ops
        ops.enter()
        try:
            if (addresses, base) != (self._bound.addresses, self._bound.base):
                self._bound = Bound()
                self._bind(addresses, base)
                self._enqueue()  # also the warm-up that recording needs
                self._bound = Bound(addresses, base)
                return
            if self._options.cuda_graph and self._bound.replay is None:
                self._bound.replay = ops.capture(self._enqueue)
            (self._bound.replay or self._enqueue)()
        finally:
            ops.leave()

    def _addresses(
        self, tensors: Mapping[str, torch.Tensor], specs: tuple[TensorSpec, ...]
    ) -> dict[str, int]:
        for spec in specs:
            if spec.name not in tensors:
                raise UsageError(f"engine tensor {spec.name} is missing", got=sorted(tensors))
            tensor = tensors[spec.name]
            spec.check(tensor)
            if tensor.device != self.device:
                raise UsageError(
                    f"engine tensor {spec.name} is elsewhere", got=tensor.device, wanted=self.device
                )
        return {spec.name: tensors[spec.name].data_ptr() for spec in specs}

    def _bind(self, addresses: dict[str, int], base: int) -> None:
        """Tell every context where its scratch and each of its tensors are."""
        everything = addresses | {name: base + at for name, at in self._offsets.items()}
        for segment in self._segments:
            if segment.scratch_bytes:
                segment.context.set_device_memory(base, segment.scratch_bytes)
            for spec in (*segment.inputs, *segment.outputs):
                address = everything[spec.name]
                if not segment.context.set_tensor_address(spec.name, address):
                    raise refused(self._log, f"set_tensor_address({spec.name!r}) returned False")

    def _enqueue(self) -> None:
        for number, segment in enumerate(self._segments, start=1):
            if not segment.context.execute_async_v3(self._workspace.ops.stream):
                which = f" for segment {number} of {len(self._segments)}"
                raise refused(self._log, f"execute_async_v3 returned False{which}")

    def refit(self, weights: Mapping[str, StoredTensor]) -> None:
        """Give every segment new weights; waits for work under way.

        Raises:
            UsageError: closed, or built without refitting.
            IntegrityError: a weight is missing or of another type or size; nothing was changed
                in the segment it belongs to.
        """
        if self._runtime is None:
            raise UsageError("the engine is closed")
        self._workspace.ops.synchronize()
        self._bound = Bound()  # what was recorded may hold the old weights
        for segment in self._segments:
            refit_from_weights(self._product, self._logger, self._log, segment.engine, weights)

    def close(self) -> None:
        """Give everything back, after work under way: contexts, then engines, then the runtime."""
        if self._runtime is None:
            return
        self._workspace.ops.synchronize()
        self._bound = Bound()
        for segment in self._segments:
            segment.context = None
        for segment in self._segments:
            segment.engine = None
        self._segments.clear()
        self._runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def ports_of(
    product: Product, engine: Any
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A plan's inputs and outputs. IncompatibleError: dynamic shapes, or tensors on the host."""
    trt = product.trt
    inputs, outputs = [], []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = tuple(engine.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise IncompatibleError(f"the plan's {name} has no static shape", got=list(shape))
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise IncompatibleError(f"the plan wants {name} in host memory")
        spec = TensorSpec(name, shape, torch_dtype(trt, engine.get_tensor_dtype(name)))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs).append(spec)
    return tuple(inputs), tuple(outputs)


def wire(segments: Sequence[Segment]) -> Wiring:
    """Connect segments by name.

    Raises:
        IntegrityError: no segment, two tensors of one name, or a name whose type or shape differs.
    """
    if not segments:
        raise IntegrityError("an engine without a plan")
    inputs: dict[str, TensorSpec] = {}
    made: dict[str, tuple[int, TensorSpec]] = {}
    last_use: dict[str, int] = {}
    for step, segment in enumerate(segments):
        for spec in segment.inputs:
            if spec.name in made:
                last_use[spec.name] = step
            source = made[spec.name][1] if spec.name in made else inputs.setdefault(spec.name, spec)
            if source != spec:
                raise do_not_fit(spec, source)
        for spec in segment.outputs:
            if spec.name in made or spec.name in inputs:
                raise do_not_fit(spec, made[spec.name][1] if spec.name in made else spec)
            made[spec.name] = (step, spec)
    internal = {
        name: Lifetime(nbytes(made[name][1]), made[name][0], last)
        for name, last in last_use.items()
    }
    outputs = tuple(spec for name, (_, spec) in made.items() if name not in internal)
    return Wiring(tuple(inputs.values()), outputs, internal)


def do_not_fit(spec: TensorSpec, source: TensorSpec) -> IntegrityError:
    return IntegrityError(
        f"the segments do not fit together at {spec.name}",
        got=f"{spec.dtype} {list(spec.shape)}",
        wanted=f"{source.dtype} {list(source.shape)}, made once, before it is used",
        do="Rebuild the engine: its segments come from different graphs.",
    )


def set_weight_budget(engines: Sequence[Any], options: RunOptions) -> None:
    """Share the budget out in proportion to the segments' weights.

    Raises:
        UsageError: the plans were built without weight streaming.
        ResourceError: TensorRT did not take the budget.
    """
    if options.weight_budget is None:
        return  # the default: everything stays on the device
    sizes = [engine.streamable_weights_size for engine in engines]
    if not sum(sizes):
        raise UsageError(
            "the plans cannot stream weights",
            got=f"a weight budget of {options.weight_budget}",
            do="Build them with weight streaming.",
        )
    for engine, size in zip(engines, sizes, strict=True):
        if not size:
            continue
        if options.weight_budget == "auto":
            budget = engine.get_weight_streaming_automatic_budget()
        else:
            budget = min(size, options.weight_budget * size // sum(sizes))
        engine.weight_streaming_budget_v2 = budget
        if engine.weight_streaming_budget_v2 != budget:  # the setter does not say
            raise ResourceError(
                "TensorRT did not take the weight-streaming budget",
                got=gib(engine.weight_streaming_budget_v2),
                wanted=gib(budget),
            )


def make_context(product: Product, segment: Segment, log: MessageLog) -> None:
    """Create the context, without memory of its own, and fix its shapes.

    Raises:
        ResourceError: TensorRT made none.
        LcexportError: it refused a shape, or lacks one.
    """
    trt = product.trt
    # Asked for after the budget, which changes it.
    segment.scratch_bytes = segment.engine.device_memory_size_v2
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    segment.context = segment.engine.create_execution_context(strategy)
    if segment.context is None:
        raise ResourceError(
            "TensorRT made no execution context",
            got=said(log, "create_execution_context returned None"),
            do="Most often the device is out of memory: close other engines, or stream weights.",
        )
    for spec in segment.inputs:
        if not segment.context.set_input_shape(spec.name, spec.shape):
            raise refused(log, f"set_input_shape({spec.name!r}, {spec.shape}) returned False")
    if lacking := segment.context.infer_shapes():
        raise refused(log, f"infer_shapes lacks {', '.join(lacking)}")


def refused(log: MessageLog, call: str) -> LcexportError:
    """TensorRT said no where nothing should stop it."""
    return LcexportError(
        "TensorRT refused to run the engine",
        got=said(log, call),
        do="Close the engine and open it again; if it stays so, see docs/tensorrt.md.",
    )


def nbytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize
