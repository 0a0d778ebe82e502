"""What this machine can do with lcexport, and what it would need for the rest.

Facts are read; verdicts are not ours: each is what `build` or `generate` would say, taken from the
checks they make themselves. Only where the advice is a GPU, what stands in its way is added.
"""

import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Literal, get_args

import torch

import lcexport
from lcexport.builder.aoti import cxx
from lcexport.builder.options import BUNDLES
from lcexport.builder.plan import existing_parent
from lcexport.configs.errors import LcexportError, UsageError
from lcexport.engines import BACKENDS, TENSORRT, backend_module, require_backend
from lcexport.engines.host import available_memory_bytes, total_memory_bytes
from lcexport.engines.manifest import Precision
from lcexport.engines.trt.memory import driver_version, missing_gpu
from lcexport.engines.trt.probe import ProductState, probe
from lcexport.engines.trt.product import OFFERS, installed_module
from lcexport.engines.trt.reader import this_platform
from lcexport.engines.trt.worker import value_from

SCHEMA_VERSION = 1
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Action = Literal["build", "run"]
ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees; its memory is unknown where the GPU does not answer."""

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int | None


@dataclass(frozen=True)
class Facts:
    """The machine and what is installed on it. Sizes in bytes; versions as their owners say."""

    lcexport: str
    python: str
    platform: str
    torch: str
    torch_cuda: str | None  # the CUDA that torch was built with
    driver_cuda: str | None  # the newest CUDA that NVIDIA's driver supports
    gpus: tuple[Gpu, ...]
    memory_total_bytes: int
    memory_available_bytes: int
    disk_folder: str  # where bundles go by default, or the nearest folder above that exists
    disk_free_bytes: int
    onnxruntime: str | None
    onnxruntime_providers: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """One of the TensorRT products. See `ProductState` for what it can do."""

    name: str
    installed: bool
    state: ProductState

    @property
    def loads(self) -> bool:
        return self.state.version is not None

    def as_dict(self) -> dict[str, object]:
        known = {"name": self.name, "installed": self.installed, "loads": self.loads}
        return {**known, **vars(self.state), "error": error_as_dict(self.state.error)}


@dataclass(frozen=True)
class Verdict:
    """Whether a backend can build, or run, in one precision on one device; None for yes."""

    backend: str
    precision: Precision
    action: Action
    device: str
    error: LcexportError | None

    def as_dict(self) -> dict[str, object]:
        return {**vars(self), "ok": self.error is None, "error": error_as_dict(self.error)}


@dataclass(frozen=True)
class Diagnosis:
    """Everything `lcexport doctor` says."""

    facts: Facts
    products: tuple[Product, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def refusal(self) -> LcexportError | None:
        """Why nothing of what was asked about can be built here; None where something can."""
        builds = [verdict.error for verdict in self.verdicts if verdict.action == "build"]
        return None if None in builds else builds[-1]

    def as_dict(self) -> dict[str, object]:
        return {
            "schema_version": SCHEMA_VERSION,
            **asdict(self.facts),
            "products": [product.as_dict() for product in self.products],
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
        }


def diagnose(backend: str | None = None, precision: str | None = None) -> Diagnosis:
    """Look at this machine; with verdicts on one backend or precision only, where one is named.

    Raises:
        UsageError: there is no such backend or precision.
    """
    if backend is not None:
        backend_module(backend)
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(
            "unknown precision", got=repr(precision), wanted=f"one of {', '.join(PRECISIONS)}"
        )
    products = tuple(
        Product(name, installed_module(OFFERS[name]) is not None, probe(name)) for name in TENSORRT
    )
    states = {product.name: product.state for product in products}
    verdicts = tuple(
        Verdict(name, kind, action, device, refusal(name, kind, action, device, states.get(name)))
        for name in ([backend] if backend else BACKENDS)
        for kind in PRECISIONS
        if precision in (None, kind)
        for action in ACTIONS
        for device in devices(name, action)
    )
    return Diagnosis(read_facts(), products, verdicts)


def devices(backend: str, action: Action) -> Iterator[str]:
    """Where it makes sense to ask. A GPU that is not there is asked for by TensorRT's engines only,
    which run nowhere else; the last device is the better one.
    """
    if backend not in TENSORRT or action == "build":
        yield "cpu"
    if torch.cuda.is_available() or (backend in TENSORRT and action == "run"):
        yield "cuda"


def refusal(
    backend: str, precision: Precision, action: Action, device: str, product: ProductState | None
) -> LcexportError | None:
    """The error that `build` or `generate` would end with; None where they would go on."""
    if product is not None and product.crashed:  # it would take this process along
        return product.error
    try:
        require_backend(backend, precision, device)
        if (backend, action) == ("aotinductor", "build"):
            cxx()
    except LcexportError as error:
        return advised(error)
    return product.error if product is not None and action == "build" else None


def advised(error: LcexportError) -> LcexportError:
    """The error; where its advice is a GPU and there is none, with what this machine lacks."""
    missing = missing_gpu()
    if missing is None or not error.do or not error.do.endswith("--device cuda."):
        return error
    do = f"{error.do.removesuffix('.')} on a machine with a GPU: this one has {missing}."
    return type(error)(error.what, got=error.got, wanted=error.wanted, do=do)


def read_facts() -> Facts:
    """Everything about the machine that needs no opinion."""
    folder = existing_parent(BUNDLES)
    onnxruntime, providers = read_onnxruntime()
    return Facts(
        lcexport=lcexport.__version__,
        python=platform.python_version(),
        platform=this_platform(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        driver_cuda=driver_version(),
        gpus=tuple(read_gpu(index) for index in range(torch.cuda.device_count())),
        memory_total_bytes=total_memory_bytes(),
        memory_available_bytes=available_memory_bytes(),
        disk_folder=str(folder),
        disk_free_bytes=shutil.disk_usage(folder).free,
        onnxruntime=onnxruntime,
        onnxruntime_providers=providers,
    )


def read_gpu(index: int) -> Gpu:
    """One of torch's GPUs."""
    found = torch.cuda.get_device_properties(index)
    try:
        free = torch.cuda.mem_get_info(index)[0]
    except RuntimeError:  # torch's base for a GPU that is busy or faulty
        free = None
    return Gpu(found.name, f"sm{found.major}{found.minor}", found.total_memory, free)


def read_onnxruntime() -> tuple[str | None, tuple[str, ...]]:
    """Its version and execution providers; the verdicts say why where it does not load."""
    try:
        module = import_module("onnxruntime")
        return module.__version__, tuple(module.get_available_providers())
    except (ImportError, AttributeError):
        return None, ()


def error_as_dict(error: LcexportError | None) -> dict[str, object] | None:
    """An error as documents hold it."""
    if error is None:
        return None
    return {"exit_code": error.exit_code, "message": str(error), **value_from(error)}
