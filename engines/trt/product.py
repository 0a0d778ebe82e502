"""The two products behind one API: TensorRT, and TensorRT for RTX, which compiles on any processor.

Both modules offer the same classes; what differs is said by `Product`, and asked of the module
itself where it can be. Everything in this package is handed a product and imports neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcexport.configs.errors import IncompatibleError, UsageError

if TYPE_CHECKING:
    # Made by tools/make_trt_stubs.py; there is no such module at run time.
    from tensorrt_api import TensorRT  # pyright: ignore[reportMissingModuleSource]

ProductName = Literal["tensorrt", "tensorrt-rtx"]
KEPT_MESSAGES = 20
# Said once for each node of each call of a function after the first: no fault of the graph's.
REPEATED_NODE = re.compile(r"A node named .* already exists")


@dataclass(frozen=True)
class Offer:
    """What we know of a product before it is imported."""

    module: str
    oldest: tuple[int, ...]
    extra: str


OFFERS: dict[str, Offer] = {
    "tensorrt": Offer("tensorrt", (10, 14), "lcexport[tensorrt]"),  # ONNX Attention since 10.14
    "tensorrt-rtx": Offer("tensorrt_rtx", (1, 7), "lcexport[tensorrt-rtx]"),
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
    install = f"pip install '{offer.extra}'"
    if importlib.util.find_spec(offer.module) is None:
        raise IncompatibleError(f"{name} is not installed", do=install)
    try:
        module = importlib.import_module(offer.module)
    except (ImportError, OSError, RuntimeError) as error:
        raise IncompatibleError(
            f"{name} is installed but does not load",
            got=str(error).strip() or type(error).__name__,
            wanted="its native libraries, and for libcuda NVIDIA's driver",
            do=f"Install the whole product ({install}) on a machine with NVIDIA's driver.",
        ) from error
    version = version_from(str(module.__version__))
    if version < offer.oldest:
        raise IncompatibleError(
            f"{name} is too old",
            got=module.__version__,
            wanted=f"{'.'.join(map(str, offer.oldest))} or newer",
            do=install.replace("install", "install --upgrade", 1),
        )
    return Product(name, module, version)  # pyright: ignore[reportArgumentType]


def version_from(text: str) -> tuple[int, ...]:
    """`10.14.1.48` or `11.0.0.post1` as numbers, up to the first part that is not one."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


class MessageLog:
    """The latest messages of each severity that matters; handed on as they come.

    The builder logs from several threads; appending to a deque needs no lock.
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


def builder_for(product: Product, logger: TensorRT.ILogger) -> TensorRT.Builder:
    """A TensorRT builder.

    Raises:
        IncompatibleError: the native library finds no GPU or driver it can use.
    """
    trt = product.trt
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # "factory function returned nullptr"
        raise IncompatibleError(
            f"{product} cannot make a builder here",
            got=str(error),
            wanted="its native library, NVIDIA's driver and a GPU",
            do="TensorRT builds on the GPU it builds for; `--backend tensorrt-rtx` needs none.",
        ) from error
