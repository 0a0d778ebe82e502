"""What an engine runs: plans, once each or many times, wired together by the names of tensors.

A segment is a plan that runs once. A plan whose weights come from outside can run many times, with
other weights each time: one plan for all the blocks. Either way a run is a list of steps, and a
plan has one execution context, whose tensors are set anew for each step: as we read the API,
addresses count from the moment the work is queued, so that a plan which runs often needs no more
contexts than one that runs once. No GPU has run it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lcexport.configs.errors import IncompatibleError, IntegrityError, LcexportError, ResourceError
from lcexport.engines import TensorSpec
from lcexport.engines.trt.memory import Lifetime, torch_dtype
from lcexport.engines.trt.product import MessageLog, Product
from lcexport.engines.trt.reader import said

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT


@dataclass(frozen=True)
class Call:
    """One use of a plan.

    Attributes:
        plan: its index among the engine's plans.
        names: the plan's name of a tensor -> the engine's; where it is not there, the two agree.
    """

    plan: int
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One use of a plan: its tensors under the engine's names, and the plan's name for each."""

    plan: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    names: dict[str, str]


@dataclass
class Context:
    """A plan's execution context, which is let go before its plan, whoever holds this object."""

    scratch_bytes: int
    raw: TensorRT.IExecutionContext | None

    @property
    def ready(self) -> TensorRT.IExecutionContext:
        assert self.raw is not None, "the engine is closed"
        return self.raw


@dataclass(frozen=True)
class Wiring:
    """Which tensors the caller gives and takes, and how long the others live, in steps."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    internal: dict[str, Lifetime]


def step_from(product: Product, engine: TensorRT.ICudaEngine, call: Call) -> Step:
    """A step that runs a deserialised plan."""
    names = call.names
    inputs, outputs = ports_of(product, engine)
    renamed = [
        tuple(TensorSpec(names.get(s.name, s.name), s.shape, s.dtype) for s in specs)
        for specs in (inputs, outputs)
    ]
    own = {names.get(spec.name, spec.name): spec.name for spec in (*inputs, *outputs)}
    return Step(call.plan, renamed[0], renamed[1], own)


def ports_of(
    product: Product, engine: TensorRT.ICudaEngine
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


def wire(steps: Sequence[Step], given: Collection[str] = ()) -> Wiring:
    """Connect steps by name. `given` tensors are bound once and for all: they are no inputs.

    Raises:
        IntegrityError: no step, two tensors of one name, or a name whose type or shape differs.
    """
    if not steps:
        raise IntegrityError("an engine without a plan")
    inputs: dict[str, TensorSpec] = {}
    made: dict[str, tuple[int, TensorSpec]] = {}
    last_use: dict[str, int] = {}
    for number, step in enumerate(steps):
        for spec in step.inputs:
            if spec.name in given:
                continue
            if spec.name in made:
                last_use[spec.name] = number
            source = made[spec.name][1] if spec.name in made else inputs.setdefault(spec.name, spec)
            if source != spec:
                raise do_not_fit(spec, source)
        for spec in step.outputs:
            if spec.name in made or spec.name in inputs:
                raise do_not_fit(spec, made[spec.name][1] if spec.name in made else spec)
            made[spec.name] = (number, spec)
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


def make_context(product: Product, engine: TensorRT.ICudaEngine, log: MessageLog) -> Context:
    """Create a plan's context, which has its scratch from the workspace, and fix its shapes.

    By the builder's message a plan of RTX that streams weights allocates while it runs, which we
    read as excluding scratch from outside (the library has a message that speaks against it; not
    tried): its context has its own, and asks the workspace for none.

    Raises:
        ResourceError: TensorRT made none.
        LcexportError: it refused a shape, or lacks one.
    """
    trt = product.trt
    strategies = trt.ExecutionContextAllocationStrategy
    if product.is_rtx and engine.streamable_weights_size:
        strategy, size = strategies.STATIC, 0
    else:
        # Asked for after the budget, which changes it.
        strategy, size = strategies.USER_MANAGED, engine.device_memory_size_v2
    context = Context(size, engine.create_execution_context(strategy))
    if context.raw is None:
        raise ResourceError(
            "TensorRT made no execution context",
            got=said(log, "create_execution_context returned None"),
            do="Perhaps the device is out of memory: close other engines, or stream weights.",
        )
    # Plans are built with all that the inspector can tell, which costs time at every enqueue.
    context.ready.nvtx_verbosity = trt.ProfilingVerbosity.NONE
    for spec in ports_of(product, engine)[0]:
        if not context.ready.set_input_shape(spec.name, spec.shape):
            raise refused(log, f"set_input_shape({spec.name!r}, {spec.shape}) returned False")
    try:
        lacking = context.ready.infer_shapes()
    except RuntimeError as error:  # what is wrong is something else than a shape not given
        raise refused(log, f"infer_shapes: {error}") from error
    if lacking:
        raise refused(log, f"infer_shapes lacks {', '.join(lacking)}")
    return context


def require_capturable(contexts: Sequence[Context], stream: int) -> None:
    """Ask TensorRT for RTX whether a CUDA graph can record these contexts on this stream.

    Raises:
        IncompatibleError: names the plan that cannot.
    """
    for index, context in enumerate(contexts):
        if not context.ready.is_stream_capturable(stream):
            raise IncompatibleError(
                "a plan cannot be recorded as a CUDA graph",
                got=f"is_stream_capturable returned False for plan {index} of {len(contexts)}",
                wanted="plans that can be recorded: perhaps built without weight_streaming",
                do="Open the engine without cuda_graph, or build it anew.",
            )


def refused(log: MessageLog, call: str) -> LcexportError:
    """TensorRT said no where nothing should stop it."""
    return LcexportError(
        "TensorRT refused to run the engine",
        got=said(log, call),
        do="Close the engine and open it again; if it stays so, see docs/tensorrt.md.",
    )


def nbytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize
