"""The text encoder and the VAE's decoder in AOTInductor's packages, which have no weights.

They take those of the library's model, wherever it is when they are called: moving it off the GPU
between uses, or loading it for each, is as it was.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch._C._aoti import AOTIModelPackageLoader

from lcexport.configs.components import Component, components_of
from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.engines.aoti import load_package, placed, specs
from lcexport.engines.aoti_target import BACKEND, check_here
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import ComponentRecord, PlanRecord
from lcexport.engines.trt.backend import plan_files
from lcexport.engines.trt.memory import number_of
from lcexport.engines.trt.reader import PlanFile
from lcexport.engines.trt.rebuild import rebuild_command


class ComponentPackage:
    """One function of a component, loaded. Called with the library's model and its own inputs.

    Args:
        plan: names, shapes and dtypes of its inputs, weights and outputs.
        file: the package, checked against its digest before it is loaded.
        rebuild: what to do where it does not load.

    Raises:
        IntegrityError: not the manifest's package.
        IncompatibleError: torch does not load it.
    """

    def __init__(
        self, plan: PlanRecord, file: PlanFile, device: torch.device, rebuild: str
    ) -> None:
        self._inputs, self._weights = specs(plan.inputs), specs(plan.weights)
        self._device = device
        self._loader: AOTIModelPackageLoader | None = load_package(file, device, rebuild)

    def check(self, model: nn.Module) -> None:
        """Hold the library's model against the package; every model, before it is called with it.

        Raises:
            IntegrityError: the model's weights are not those it was compiled for.
        """
        there = dict(model.named_parameters())
        for spec in self._weights:
            weight = there.get(spec.name)
            if weight is None or (tuple(weight.shape), weight.dtype) != (spec.shape, spec.dtype):
                raise IntegrityError(
                    f"the library's model does not fit its compiled component: {spec.name}",
                    got="no such weight"
                    if weight is None
                    else f"{weight.dtype} {list(weight.shape)}",
                    wanted=f"{spec.dtype} {list(spec.shape)}",
                    do="Rebuild the bundle with the libraries that are here, or use theirs, with "
                    "--library-components or load(compiled_components=False).",
                )

    def __call__(self, model: nn.Module, *tensors: Tensor) -> Sequence[Tensor]:
        """Its outputs, made anew. `model` is one that `check` found to fit.

        Raises:
            UsageError: an input has another shape, dtype or place.
        """
        if self._loader is None:
            raise UsageError("the compiled component is closed")
        for spec, tensor in zip(self._inputs, tensors, strict=True):
            spec.check(tensor, self._device)
        parameters = (model.get_parameter(spec.name) for spec in self._weights)
        weights = [parameter.detach().contiguous() for parameter in parameters]
        with torch.no_grad(), placed(self._device):
            made = self._loader.run([*tensors, *weights])
        # The compiler drops copies, and what comes out may be a part of a larger tensor: the next
        # call takes dense ones only, and all of the larger one would stay in memory.
        return [tensor.contiguous() for tensor in made]

    def close(self) -> None:
        """Unload the package. Harmless when called twice."""
        self._loader = None


def open_components(
    bundle: Bundle, names: Iterable[str], device: torch.device
) -> dict[str, tuple[ComponentPackage, ...]]:
    """These compiled components of a bundle by `Component.name`, their packages in order.

    Raises:
        IncompatibleError: compiled for something else; says the command that compiles them here.
        IntegrityError: a file is not the one the manifest names.
    """
    found = {}
    with ExitStack() as stack:
        for name in names:
            found[name] = open_component(bundle, bundle.manifest.components[name], device)
            for package in found[name]:
                stack.callback(package.close)
        stack.pop_all()
    return found


def open_component(
    bundle: Bundle, record: ComponentRecord, device: torch.device
) -> tuple[ComponentPackage, ...]:
    """One of them; see `open_components`. All of its packages, or none."""
    try:
        return opened(bundle, record, device)
    except IncompatibleError as error:
        raise IncompatibleError(
            f"the compiled {record.component.name} cannot be opened: {error.what}",
            got=error.got,
            wanted=error.wanted,
            do="Use the library's, with --library-components or load(compiled_components=False). "
            f"{error.do}",
        ) from error


def opened(
    bundle: Bundle, record: ComponentRecord, device: torch.device
) -> tuple[ComponentPackage, ...]:
    """As `open_component`, whose error says which it was."""
    if device.type == "cuda":
        device = torch.device("cuda", number_of(device))
    rebuild = rebuilding(bundle, record.component, device)
    check_here(record, device, rebuild)
    files = plan_files(bundle, record)
    packages = []
    with ExitStack() as stack:
        for plan, file in zip(record.plans, files, strict=True):
            packages.append(ComponentPackage(plan, file, device, rebuild))
            stack.callback(packages[-1].close)
        stack.pop_all()
    return tuple(packages)


def rebuilding(bundle: Bundle, component: Component, device: torch.device) -> str:
    """The command that compiles a component here: a build of a graph that has use for it."""
    graphs = [bundle.graph(name) for name in bundle.manifest.engines[BACKEND]]
    users = [graph for graph in graphs if component in components_of([graph.job])]
    name = (users or graphs)[0].name
    return rebuild_command(
        bundle.manifest, BACKEND, name, device=device.type, compile_components=True
    )
