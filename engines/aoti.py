"""AOTInductor: the graph's parts as compiled C++ (and CUDA kernels), without the model's code.

A package holds one part and none of its weights, which are inputs like any other: one package of
the block serves every layer, and every resolution uses the weights that are mapped from the
bundle's one file (on a processor), or copied to the GPU once. A package makes its outputs anew, so
one copy remains, of the engine's outputs to the caller's.

Intermediate tensors are dropped after their last use, to torch's own allocator.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch._C._aoti import AOTIModelPackageLoader

from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.engines import Engine, TensorSpec
from lcexport.engines.aoti_target import BACKEND, check_here
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import CallRecord, EngineRecord, TensorRecord
from lcexport.engines.trt.backend import engine_record, plan_files
from lcexport.engines.trt.memory import missing_gpu, number_of
from lcexport.engines.trt.reader import PlanFile, VerifiedPlan
from lcexport.engines.trt.rebuild import rebuild_command
from lcexport.engines.trt.steps import Step, wire
from lcexport.engines.weights import SharedWeights, shared_weights, will_need

MODEL = "model"  # what torch calls the one model of a package


@dataclass(frozen=True)
class PackageCall:
    """One use of a package.

    Attributes:
        inputs, outputs: the engine's names in the package's order.
        weights: what follows the inputs.
        done: what no later call uses.
    """

    package: int
    inputs: tuple[str, ...]
    weights: tuple[torch.Tensor, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...]


class AotiEngine:
    """One DiT at one shape in packages. See `lcexport.engines.Engine`.

    Args:
        record: the packages' inputs, weights and outputs, and their uses in order.
        packages: their files; each is checked against its digest before it is loaded.
        shared_weights: what the packages take; held as long as the engine is open.
        rebuild: what to do where a package does not load.

    Raises:
        IntegrityError: a package is not the manifest's, or they do not fit together.
        IncompatibleError: torch does not load a package.
    """

    backend = BACKEND

    def __init__(
        self,
        record: EngineRecord,
        packages: Sequence[PlanFile],
        shared_weights: SharedWeights,
        device: torch.device,
        rebuild: str,
    ) -> None:
        self.device, self.shared_weights = device, shared_weights
        steps = [step_from(record, call) for call in record.calls]
        wiring = wire(steps)
        self.inputs, self.outputs = wiring.inputs, wiring.outputs
        last = {name: lifetime.last for name, lifetime in wiring.internal.items()}
        self._calls: tuple[PackageCall, ...] = tuple(
            PackageCall(
                step.plan,
                tuple(spec.name for spec in step.inputs),
                weights_of(record, call, shared_weights),
                tuple(spec.name for spec in step.outputs),
                tuple(name for name, number in last.items() if number == index),
            )
            for index, (step, call) in enumerate(zip(steps, record.calls, strict=True))
        )
        self._loaders = [load_package(package, device, rebuild) for package in packages]

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `lcexport.engines.Engine.run`; the outputs are copied once. On CUDA it is meant to
        return once the work is queued, on the caller's stream (not run).
        """
        if not self._loaders:
            raise UsageError("the engine is closed")
        for specs, tensors in ((self.inputs, inputs), (self.outputs, outputs)):
            for spec in specs:
                spec.check(tensors[spec.name], self.device)
        alive = {spec.name: inputs[spec.name] for spec in self.inputs}
        with torch.inference_mode(), placed(self.device):
            for index, call in enumerate(self._calls):
                if self.device.type == "cpu":  # the next call's are read while this one computes
                    for following in self._calls[index + 1 : index + 2]:
                        will_need(following.weights)
                given = [*(alive[name] for name in call.inputs), *call.weights]
                made = self._loaders[call.package].run(given)
                alive |= zip(call.outputs, made, strict=True)
                for spec in self.outputs:
                    if spec.name in call.outputs:
                        outputs[spec.name].copy_(alive.pop(spec.name))
                for name in call.done:
                    del alive[name]

    def close(self) -> None:
        """Unload the packages and let the weights go."""
        self._loaders = []
        self._calls = ()
        self.shared_weights = SharedWeights()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def require(backend: str, precision: str, device: torch.device) -> None:
    """See `lcexport.engines.require_backend`; both precisions, on processors and on CUDA."""
    if device.type == "cuda" and (missing := missing_gpu()):
        raise IncompatibleError(
            f"{backend} compiles for a GPU, and runs, where that GPU is, and torch sees none",
            got=missing,
            do="Install an NVIDIA driver and a CUDA build of torch, or use --device cpu.",
        )


def open_engine(
    backend: str,
    bundle: Bundle,
    resolution: str,
    device: str = "cpu",
    like: Engine | None = None,
) -> AotiEngine:
    """Open the packages of one resolution, each package's SHA-256 checked as it is read.

    With an open engine to be `like`, both use one set of weights.

    Raises:
        UsageError: the bundle has no such engine.
        IncompatibleError: the packages were compiled for something else; says the command that
            compiles them here.
        IntegrityError: a file is not the one the manifest names.
    """
    record = engine_record(bundle, backend, resolution)
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", number_of(where))
    rebuild = rebuild_command(bundle.manifest, backend, resolution, device=where.type)
    check_here(record, where, rebuild)
    shared = like if isinstance(like, AotiEngine) and like.device == where else None
    weights = shared_weights(bundle, record, where, shared.shared_weights if shared else None)
    engine = AotiEngine(record, plan_files(bundle, record), weights, where, rebuild)
    graph = bundle.graph(resolution)
    if (engine.inputs, engine.outputs) != (specs(graph.inputs), specs(graph.outputs)):
        engine.close()
        raise IntegrityError(
            f"the {backend} engine of {resolution} has not its graph's inputs and outputs",
            do="Rebuild the bundle.",
        )
    return engine


def load_package(package: PlanFile, device: torch.device, rebuild: str) -> AOTIModelPackageLoader:
    """A package's code, loaded from a private copy of the bytes that were checked.

    One runner and no locks of its own: an engine is one thread's, and by torch's source the host
    would, with locks, wait for each block on the GPU.
    """
    index = -1 if device.index is None else device.index
    with tempfile.TemporaryDirectory(prefix="lcexport-") as folder:
        copy = Path(folder) / package.path.name
        with VerifiedPlan(package) as verified, copy.open("wb") as file:
            verified.copy_to(file)
        try:
            return AOTIModelPackageLoader(str(copy), MODEL, True, 1, index)
        except RuntimeError as error:
            raise IncompatibleError(
                f"torch {torch.__version__} cannot load {package.path}",
                got=str(error).strip().split("\n")[0],
                do=f"Rebuild it here: {rebuild}",
            ) from error


def step_from(record: EngineRecord, call: CallRecord) -> Step:
    """One use of a package, its activations under the engine's names."""
    plan = record.plans[call.plan]
    return Step(call.plan, specs(plan.inputs, call), specs(plan.outputs, call), {})


def specs(
    tensors: Sequence[TensorRecord], call: CallRecord | None = None
) -> tuple[TensorSpec, ...]:
    """The manifest's tensors as an engine's; of a call, under the engine's names."""
    return tuple(
        TensorSpec(call.tensors[t.name] if call else t.name, t.shape, getattr(torch, t.dtype))
        for t in tensors
    )


def weights_of(
    record: EngineRecord, call: CallRecord, weights: SharedWeights
) -> tuple[torch.Tensor, ...]:
    """A call's weights in the package's order. IntegrityError: one has another shape or dtype."""
    found = []
    for tensor in specs(record.plans[call.plan].weights):
        weight = weights.tensors[call.prefix + tensor.name]
        if (tuple(weight.shape), weight.dtype) != (tensor.shape, tensor.dtype):
            raise IntegrityError(
                f"the weights file does not fit the engine: {call.prefix}{tensor.name}",
                got=f"{weight.dtype} {list(weight.shape)}",
                wanted=f"{tensor.dtype} {list(tensor.shape)}",
            )
        found.append(weight)
    return tuple(found)


def placed(device: torch.device) -> AbstractContextManager[None]:
    """Where packages run: see `on_gpu`; a processor needs nothing."""
    return on_gpu(device) if device.type == "cuda" else nullcontext()


@contextmanager
def on_gpu(device: torch.device) -> Iterator[None]:
    """Work goes to this GPU; float32 products and convolutions are asked to stay float32, whatever
    the process has chosen (not run; with NVIDIA_TF32_OVERRIDE not tried).
    """
    # torch's stubs do not know the second
    kinds: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # pyright: ignore[reportAttributeAccessIssue]
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        with torch.cuda.device(device):
            yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
