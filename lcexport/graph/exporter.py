"""torch's exporter as this project runs it: quietly, and reading its operators once a process."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import ONNXRegistry

EXPORTING = RLock()
ORIGINAL = ONNXRegistry.__dict__["from_torchlib"]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep torch's own deprecations and its notes about torchvision from a user's terminal."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        registration.setLevel(level)


@contextmanager
def known_operators() -> Iterator[None]:
    """Let `torch.onnx.export` use the translations that were read for the export before.

    Each export parses the source of 500 translations anew: a third of the time that a part of the
    graph takes. `torch.onnx.export` has no argument for them. One thread at a time.
    """
    with EXPORTING:
        setattr(ONNXRegistry, "from_torchlib", staticmethod(registry))  # noqa: B010
        try:
            yield
        finally:
            setattr(ONNXRegistry, "from_torchlib", ORIGINAL)  # noqa: B010


def registry(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
    """The translations for an opset, in lists of their own: an export adds to them."""
    read, found = torchlib(opset_version), ONNXRegistry()
    found._opset_version = opset_version
    found.functions = {name: list(translations) for name, translations in read.functions.items()}
    return found


torchlib = cache(ONNXRegistry.from_torchlib)
