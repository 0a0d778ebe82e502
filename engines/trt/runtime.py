"""The TensorRT engine: plans in, velocities out, nothing through the host in between.

An engine is a chain of steps (`steps`): a step's outputs feed later steps by name, from the
workspace, and what no step makes is the engine's input. Scratch comes from there as well, unless
`steps.make_context` says otherwise. A run binds addresses and queues kernels on the workspace's
stream; that stream waits for the caller's and the caller's for it. We make the host wait for
neither, but for recording a CUDA graph; by NVIDIA's documentation streamed weights make it wait.

Weights are inside the plans, or outside: then they are tensors on the device that several engines,
one for each resolution, use together.

TensorRT and TensorRT for RTX have the same calls here, but for `is_stream_capturable`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch

from lcexport.configs.errors import UsageError
from lcexport.engines import TensorSpec
from lcexport.engines.trt.memory import ALIGNMENT, Workspace, aligned, place
from lcexport.engines.trt.product import Product, runtime_for, shared_logger
from lcexport.engines.trt.reader import (
    PlanFile,
    VerifiedPlan,
    deserialize,
)
from lcexport.engines.trt.refit import overwrite, refit_from_weights
from lcexport.engines.trt.run_options import RunOptions, set_weight_budget
from lcexport.engines.trt.steps import (
    Call,
    Context,
    Step,
    make_context,
    refused,
    require_capturable,
    step_from,
    wire,
)
from lcexport.engines.weights import SharedWeights

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT


@dataclass
class Bound:
    """Where the caller's tensors, the block and all tensors are, and the recorded work."""

    addresses: dict[str, int] = field(default_factory=dict)
    base: int = 0
    places: dict[str, int] = field(default_factory=dict)
    replay: Callable[[], None] | None = None


class TrtEngine:
    """One DiT at one shape, compiled. See `lcexport.engines.Engine`.

    Args:
        product: its name is the engine's `backend`.
        plans: what was compiled.
        workspace: not owned; share one among engines that never run at the same time.
        options: how to run.
        calls: the uses of the plans, in order; each plan once where None.
        shared_weights: what plans without weights take; held as long as the engine is open.
        host_code: let plans bring code of their own, as version-compatible ones do.

    Raises:
        IntegrityError: a plan is not the manifest's, or the plans do not fit together.
        IncompatibleError: TensorRT refused a plan.
        ResourceError: not enough device memory.
        UsageError: an option that the plans were not built for, or a weight that does not fit.
    """

    def __init__(
        self,
        product: Product,
        plans: Sequence[PlanFile],
        workspace: Workspace,
        options: RunOptions | None = None,
        *,
        calls: Sequence[Call] | None = None,
        shared_weights: SharedWeights | None = None,
        host_code: bool = False,
    ) -> None:
        self.backend, self.device = product.name, workspace.ops.device
        self.workspace, self.shared_weights = workspace, shared_weights or SharedWeights()
        self._product, self._options = product, options or RunOptions()
        self._logger, self._log = shared_logger(product)
        self._log.errors.clear()  # what an earlier engine left is no reason for this one
        self._engines: list[TensorRT.ICudaEngine] = []
        self._contexts: list[Context] = []
        self._steps: list[Step] = []
        self._bound = Bound()
        self._runtime: TensorRT.Runtime | None = None
        try:
            with workspace.ops.active():
                self._open(plans, host_code)
                for call in calls or [Call(index) for index in range(len(plans))]:
                    self._steps.append(step_from(product, self._engines[call.plan], call))
                self._prepare()
        except BaseException as error:
            # The tracebacks' frames hold engines, which must not outlive the runtime.
            for raised in filter(None, (error, error.__cause__)):
                traceback.clear_frames(raised.__traceback__)
            self.close()
            raise

    def _open(self, plans: Sequence[PlanFile], host_code: bool) -> None:
        self._runtime = runtime_for(self._product, self._logger, self._log)
        if host_code:
            self._runtime.engine_host_code_allowed = True
        for plan in plans:
            with VerifiedPlan(plan) as verified:
                engine = deserialize(self._product, self._runtime, verified, self._log)
                self._engines.append(engine)

    def _prepare(self) -> None:
        """Weights, then the budget, then contexts: the budget must come before the contexts."""
        wiring = wire(self._steps, self.shared_weights.tensors)
        self.inputs, self.outputs = wiring.inputs, wiring.outputs
        self._weights = self._addresses(self.shared_weights.tensors, self._weight_specs())
        if self._options.weights is not None:
            self.refit(self._options.weights)
        set_weight_budget(self._engines, self._options)
        for engine in self._engines:
            self._contexts.append(make_context(self._product, engine, self._log))
        # Scratch first, as only one step runs at a time; then what they hand on.
        scratch = aligned(max(context.scratch_bytes for context in self._contexts))
        offsets, behind = place(wiring.internal)
        self._offsets = {name: scratch + offset for name, offset in offsets.items()}
        self.workspace_bytes = scratch + behind
        self.workspace.reserve(self.workspace_bytes)

    def _weight_specs(self) -> tuple[TensorSpec, ...]:
        """The shared weights that the plans take; each is used by one step."""
        specs = (spec for step in self._steps for spec in step.inputs)
        return tuple(spec for spec in specs if spec.name in self.shared_weights.tensors)

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `lcexport.engines.Engine.run`. Queues the work.

        Raises:
            IncompatibleError: it was to be recorded as a CUDA graph, and the plans cannot be.
        """
        if self._runtime is None:
            raise UsageError("the engine is closed")
        addresses = self._addresses(inputs, self.inputs) | self._addresses(outputs, self.outputs)
        ops = self.workspace.ops
        with ops.active():
            base = self.workspace.reserve(self.workspace_bytes)
            ops.enter()
            try:
                self._run(addresses, base)
            finally:
                ops.leave()

    def _run(self, addresses: dict[str, int], base: int) -> None:
        """Queue the steps, or replay what was recorded of them at these addresses."""
        if (addresses, base) != (self._bound.addresses, self._bound.base):
            self._bound = Bound()
            bound = self._bind(addresses, base)
            self._enqueue(bound)  # also the warm-up that recording needs
            self._bound = bound
            return
        if self._options.cuda_graph and self._bound.replay is None:
            if self._product.is_rtx:
                require_capturable(self._contexts, self.workspace.ops.stream)
            self._bound.replay = self.workspace.ops.capture(lambda: self._enqueue(self._bound))
        if self._bound.replay is None:
            self._enqueue(self._bound)
        else:
            self._bound.replay()

    def _addresses(
        self, tensors: Mapping[str, torch.Tensor], specs: tuple[TensorSpec, ...]
    ) -> dict[str, int]:
        for spec in specs:
            if spec.name not in tensors:
                raise UsageError(f"engine tensor {spec.name} is missing", got=sorted(tensors))
            tensor = tensors[spec.name]
            spec.check(tensor)
            if self.device.type == "cuda" and tensor.data_ptr() % ALIGNMENT:
                raise UsageError(
                    f"engine tensor {spec.name} is not aligned",
                    got=f"{tensor.data_ptr() % ALIGNMENT} bytes off",
                    wanted=f"an address that is a multiple of {ALIGNMENT}: no view into another",
                )
            if tensor.device != self.device:
                raise UsageError(
                    f"engine tensor {spec.name} is elsewhere", got=tensor.device, wanted=self.device
                )
        return {spec.name: tensors[spec.name].data_ptr() for spec in specs}

    def _bind(self, addresses: dict[str, int], base: int) -> Bound:
        """Tell every context where its scratch is, and note where each tensor is."""
        for context in self._contexts:
            if context.scratch_bytes:
                context.ready.set_device_memory(base, context.scratch_bytes)
        made = {name: base + at for name, at in self._offsets.items()}
        return Bound(addresses, base, {**self._weights, **addresses, **made})

    def _enqueue(self, bound: Bound) -> None:
        for number, step in enumerate(self._steps, start=1):
            context = self._contexts[step.plan]
            for name, own_name in step.names.items():
                if not context.ready.set_tensor_address(own_name, bound.places[name]):
                    raise refused(self._log, f"set_tensor_address({name!r}) returned False")
            if not context.ready.execute_async_v3(self.workspace.ops.stream):
                which = f" for step {number} of {len(self._steps)}"
                raise refused(self._log, f"execute_async_v3 returned False{which}")

    def inspect(self) -> tuple[str, ...]:
        """What TensorRT's inspector says of each plan, as JSON; `inspector` reads it."""
        if self._runtime is None:
            raise UsageError("the engine is closed")
        form = self._product.trt.LayerInformationFormat.JSON
        with self.workspace.ops.active():
            inspectors = [engine.create_engine_inspector() for engine in self._engines]
            return tuple(inspector.get_engine_information(form) for inspector in inspectors)

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give every plan new weights, from the host; waits for work under way.

        Weights that are shared are overwritten, for every engine that uses them.

        Raises:
            UsageError: closed, or built without refitting.
            IntegrityError: a weight is missing or of another type or size; nothing was changed
                in the plan it belongs to.
        """
        if self._runtime is None:
            raise UsageError("the engine is closed")
        with self.workspace.ops.active():
            self.workspace.ops.synchronize()
            if self.shared_weights.tensors:
                overwrite(self.shared_weights.tensors, weights)
                return
            self._bound = Bound()  # what was recorded may hold the old weights
            for engine in self._engines:
                refit_from_weights(self._product, self._logger, self._log, engine, weights)

    def close(self) -> None:
        """Give everything back, after work under way: contexts, then engines, then the runtime."""
        if self._runtime is None:
            return
        with self.workspace.ops.active():
            self.workspace.ops.synchronize()
            self._bound = Bound()
            for context in self._contexts:
                context.raw = None  # a traceback may hold the object for longer than the runtime
            self._contexts.clear()
            self._engines.clear()
            self._runtime = None
        self._steps.clear()
        self.shared_weights = SharedWeights()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
