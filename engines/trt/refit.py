"""New weights in an existing engine, straight from the bundle's one weights file.

A graph's initialisers carry the names of the checkpoint's tensors and lie in one safetensors
file; a refittable plan keeps those names. The file is mapped, TensorRT copies from the map, and
every weight of the engine is set each time: base, then A, then base again is the base, exactly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lcexport.configs.errors import IntegrityError, LcexportError, UsageError
from lcexport.engines.trt.product import MessageLog, Product
from lcexport.engines.trt.reader import said


class StoredTensor(Protocol):
    """Where a tensor lies: bytes `start:end` of `path`. `dtype` is the safetensors name."""

    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


def refit_from_weights(
    product: Product,
    logger: Any,
    log: MessageLog,
    engine: Any,
    stored: Mapping[str, StoredTensor],
    names: Mapping[str, str] | None = None,
) -> None:
    """Set every refittable weight of an `ICudaEngine`. Nothing may be running on it.

    Args:
        logger: the one that fills `log`.
        stored: what there is, by the file's names.
        names: engine's name -> file's name, where the two differ.

    Raises:
        UsageError: the engine was built without refitting.
        IntegrityError: the file lacks a weight, or has it in another type or size.
        LcexportError: TensorRT refused; the engine's weights are then undefined.
    """
    if not engine.refittable:
        raise UsageError("the engine cannot be refitted", do="Build it with --refit.")
    trt = product.trt
    refitter = trt.Refitter(engine, logger)
    own_names: list[str] = refitter.get_all_weights()
    wanted = {name: (names or {}).get(name, name) for name in own_names}
    lacking = sorted(name for name in wanted.values() if name not in stored)
    if lacking:
        raise IntegrityError(
            f"the weights file lacks {len(lacking)} of the engine's {len(wanted)} weights",
            got=f"none named {', '.join(lacking[:5])}",
        )
    maps = {path: mapped(path) for path in {stored[name].path for name in wanted.values()}}
    for name, source in wanted.items():
        weights = weights_from(trt, stored[source], maps[stored[source].path])
        check_prototype(name, refitter.get_weights_prototype(name), weights)
        if not refitter.set_named_weights(name, weights):
            raise refused(log, f"set_named_weights({name!r}) returned False")
    if missing := refitter.get_missing_weights():
        raise refused(log, f"{len(missing)} weights still missing: {', '.join(missing[:5])}")
    if not refitter.refit_cuda_engine():  # reads the maps, which live until here
        raise refused(log, "refit_cuda_engine returned False")
    del maps


def mapped(path: Path) -> np.memmap:
    """The file's bytes, mapped. IntegrityError where it is missing or empty."""
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cannot map the weights file {path}", got=error) from error


def weights_from(trt: Any, stored: StoredTensor, data: np.memmap) -> Any:
    """A `trt.Weights` that points into the map; it copies nothing."""
    dtypes = {
        "F32": trt.DataType.FLOAT,
        "F16": trt.DataType.HALF,
        "BF16": trt.DataType.BF16,
        "I32": trt.DataType.INT32,
        "I64": trt.DataType.INT64,
        "BOOL": trt.DataType.BOOL,
    }
    if stored.dtype not in dtypes or stored.end > len(data):
        raise IntegrityError(
            f"{stored.path} holds a weight that cannot be used",
            got=f"{stored.dtype}, bytes {stored.start} to {stored.end} of {len(data)}",
        )
    return trt.Weights(dtypes[stored.dtype], data.ctypes.data + stored.start, stored.count)


def check_prototype(name: str, prototype: Any, weights: Any) -> None:
    """Refuse what TensorRT would convert or misread: type and count must be the engine's."""
    if (prototype.dtype, prototype.size) != (weights.dtype, weights.size):
        raise IntegrityError(
            f"the weight {name} does not fit the engine",
            got=f"{weights.size} x {weights.dtype}",
            wanted=f"{prototype.size} x {prototype.dtype}",
        )


def refused(log: MessageLog, call: str) -> LcexportError:
    return LcexportError(
        "TensorRT refused a refit", got=said(log, call), do="Close the engine and open it again."
    )
