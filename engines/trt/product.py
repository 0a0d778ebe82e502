"""The two products behind one API: TensorRT, and TensorRT for RTX, which compiles without a GPU.

What we use of the API is the same in both modules, but for compute capabilities, what CUDA graphs
need and plugins (`tests/tensorrt_api`); what differs is said by `Product`, and asked of the module
itself where it can be. Nothing else in this package imports either by name.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.engines.trt.memory import missing_gpu

if TYPE_CHECKING:
    # Made by tools/make_trt_stubs.py; there is no such module at run time.
    from tensorrt_api import TensorRT  # pyright: ignore[reportMissingModuleSource]

ProductName = Literal["tensorrt", "tensorrt-rtx"]
KEPT_MESSAGES = 20
# Said of nodes of a function that is called more than once: no fault of the graph's.
REPEATED_NODE = re.compile(r"A node named .* already exists")


@dataclass(frozen=True)
class Offer:
    """What we know of a product before it is imported.

    Attributes:
        modules: the product's own, and that of its bindings, which do without it but for
            plugins.
        libraries: the native ones that the bindings are linked to, without `.so.<major>`.
        install: the command that gets the whole product.
    """

    modules: tuple[str, ...]
    libraries: tuple[str, ...]
    oldest: tuple[int, ...]
    install: str


OFFERS: dict[str, Offer] = {
    "tensorrt": Offer(
        ("tensorrt", "tensorrt_bindings"),
        ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"),
        (10, 14),  # ONNX Attention since 10.14
        "pip install 'lcexport[tensorrt]'",
    ),
    "tensorrt-rtx": Offer(
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"),
        (1, 7),
        "pip install 'lcexport[tensorrt-rtx]'",
    ),
}


@dataclass(frozen=True)
class Product:
    """An imported product: `trt` is its module."""

    name: ProductName
    trt: TensorRT
    version: tuple[int, ...]

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt-rtx"

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.version))}"


def open_product(name: str) -> Product:
    """Import a product.

    Raises:
        UsageError: no such product.
        IncompatibleError: it is not installed, its libraries are missing, or it is too old.
    """
    if name not in OFFERS:
        raise UsageError("unknown product", got=repr(name), wanted=f"one of {', '.join(OFFERS)}")
    offer = OFFERS[name]
    found = installed_module(offer)
    if found is None:
        raise IncompatibleError(f"{name} is not installed", do=cure(name, offer.install))
    try:
        module = importlib.import_module(found)
    except (ImportError, OSError, RuntimeError) as error:
        raise loading_error(name, offer, str(error).strip() or type(error).__name__) from error
    version = version_from(str(module.__version__))
    if version < offer.oldest:
        raise IncompatibleError(
            f"{name} is too old",
            got=module.__version__,
            wanted=f"{'.'.join(map(str, offer.oldest))} or newer",
            do=offer.install.replace("install", "install --upgrade", 1),
        )
    return Product(name, module, version)  # pyright: ignore[reportArgumentType]


def installed_module(offer: Offer) -> str | None:
    """The first of the product's modules that Python finds; nothing is imported."""
    return next((name for name in offer.modules if importlib.util.find_spec(name)), None)


def loading_error(name: str, offer: Offer, said: str) -> IncompatibleError:
    """Why bindings that are there do not load: the driver, native libraries, or what they say."""
    what = f"{name} is installed but does not load"
    if "libcuda." in said:
        return IncompatibleError(
            f"{what}: NVIDIA's driver is missing",
            got=said,
            do=cure(name, "Install NVIDIA's driver, which brings libcuda.so.1."),
        )
    if missing := missing_libraries(offer, said):
        return IncompatibleError(
            f"{what}: its Python bindings are here, its native libraries are not",
            got=f"no {', no '.join(missing)}",
            wanted="the libraries of the same version, installed by pip or on LD_LIBRARY_PATH",
            do=cure(name, f"Install the whole product: {offer.install}"),
        )
    return IncompatibleError(
        what,
        got=said,
        wanted="bindings, native libraries and NVIDIA's driver that fit each other",
        do=cure(name, f"Install the whole product again: {offer.install}"),
    )


def missing_libraries(offer: Offer, said: str) -> list[str]:
    """All that are missing, where the loader, which stops at the first, said that one is."""
    first = re.search(r"(lib\w+)(\.so[.\d]*)", said)
    if first is None or first.group(1) not in offer.libraries:
        return []
    names = [library + first.group(2) for library in offer.libraries]
    return [name for name in names if not loads(name)]


def loads(library: str) -> bool:
    """Whether the system's loader finds a library, and all that it needs."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def cure(name: str, do: str) -> str:
    """`do`, and what `tensorrt` needs besides, so that nobody installs it in vain."""
    if name != "tensorrt":
        return do
    missing = missing_gpu()
    here = f", and this machine has {missing}" if missing else ""
    return (
        f"{do.removesuffix('.')}. TensorRT builds on the GPU it builds for{here}; "
        "`--backend tensorrt-rtx` needs none."
    )


def version_from(text: str) -> tuple[int, ...]:
    """`10.14.1.48` or `11.0.0.post1` as numbers, up to the first part that is not one."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


class MessageLog:
    """The latest messages of each severity that matters; handed on as they come.

    The builder may log from several threads; appending to a deque needs no lock.
    """

    def __init__(self, on_message: Callable[[str, str], None] | None = None) -> None:
        self.errors: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self.warnings: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self._on_message = on_message

    def add(self, severity: str, message: str) -> None:
        """Keep a message of severity INTERNAL_ERROR, ERROR or WARNING."""
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self.errors.append(message)
        elif severity == "WARNING" and not REPEATED_NODE.search(message):
            self.warnings.append(message)
        else:
            return
        if self._on_message is not None:
            self._on_message(severity, message)


def logger_for(product: Product, log: MessageLog) -> TensorRT.ILogger:
    """A TensorRT logger that fills `log`. Everything made with it must not outlive it."""
    trt = product.trt

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: TensorRT.ILogger.Severity, msg: str) -> None:
            log.add(severity.name, msg)

    return Logger()


_RUNTIME_LOGGERS: dict[int, tuple[Product, TensorRT.ILogger, MessageLog]] = {}  # by their module


def shared_logger(product: Product) -> tuple[TensorRT.ILogger, MessageLog]:
    """The one logger of this process's runtimes, and what it filled; never given back.

    A second logger makes RTX 1.7.1 warn that it is ignored, which it is not; with TensorRT not
    tried: with one, no message goes astray.
    """
    key = id(product.trt)  # which stays its own, as the product is kept
    if key not in _RUNTIME_LOGGERS:
        log = MessageLog()
        _RUNTIME_LOGGERS[key] = product, logger_for(product, log), log
    return _RUNTIME_LOGGERS[key][1:]


def builder_for(
    product: Product, logger: TensorRT.ILogger, log: MessageLog | None = None
) -> TensorRT.Builder:
    """A TensorRT builder.

    Args:
        log: what `logger` fills, for the error to quote.

    Raises:
        IncompatibleError: the native library finds no GPU or driver it can use.
    """
    trt = product.trt
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # "factory function returned nullptr"
        said = log.errors[-1].strip() if log and log.errors else str(error)
        what = f"{product} loads but cannot make a builder here"
        if product.is_rtx:
            do = f"Install it again: {OFFERS[product.name].install}"
            raise IncompatibleError(what, got=said, do=do) from error
        missing = missing_gpu()
        raise IncompatibleError(
            what,
            got=f"{said}, with {missing}" if missing else said,
            wanted="NVIDIA's driver and a GPU that this version knows",
            do="TensorRT builds on the GPU it builds for; `--backend tensorrt-rtx` needs none.",
        ) from error


def runtime_for(product: Product, logger: TensorRT.ILogger, log: MessageLog) -> TensorRT.Runtime:
    """A TensorRT runtime; `log` is what `logger` fills.

    Raises:
        IncompatibleError: the native library makes none; an old driver is the likely reason, but
            only a double has done so.
    """
    try:
        return product.trt.Runtime(logger)
    except (TypeError, RuntimeError) as error:  # "factory function returned nullptr"
        raise IncompatibleError(
            f"{product} loads but cannot make a runtime here",
            got=log.errors[-1].strip() if log.errors else error,
            wanted="NVIDIA's driver, as new as the CUDA that this TensorRT was made for",
            do="Install a newer driver, or the TensorRT for the driver's CUDA: `lcexport doctor`.",
        ) from error
