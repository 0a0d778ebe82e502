"""New weights in an open engine, by the names they have in the bundle's one weights file.

A graph's initialisers carry the names of that file's tensors, and a refittable plan keeps them.
Every weight is set each time, so that base, then A, then base again should be the base, exactly; no
GPU has run it. Tensors of a safetensors file are mapped: nothing is read before TensorRT or the
device copies it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch

from lcexport.configs.errors import IntegrityError, LcexportError, UsageError
from lcexport.engines.trt.product import MessageLog, Product
from lcexport.engines.trt.reader import said

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT


def refit_from_weights(
    product: Product,
    logger: TensorRT.ILogger,
    log: MessageLog,
    engine: TensorRT.ICudaEngine,
    weights: Mapping[str, torch.Tensor],
) -> None:
    """Set every refittable weight of an `ICudaEngine`. Nothing may be running on it.

    Args:
        logger: the one that fills `log`.
        weights: tensors on the host by the engine's names; others may be among them.

    Raises:
        UsageError: the engine was built without refitting.
        IntegrityError: a weight is missing, or has another type or size.
        LcexportError: TensorRT refused; some of the engine's weights may be new by then.
    """
    if not engine.refittable:
        raise UsageError("the engine cannot be refitted", do="Build it with --trt refit=true.")
    trt = product.trt
    try:
        refitter = trt.Refitter(engine, logger)
    except (TypeError, RuntimeError) as error:  # "factory function returned nullptr"
        raise refused(log, f"no refitter: {error}") from error
    wanted: list[str] = refitter.get_all_weights()
    require_all(wanted, weights)
    held = []  # TensorRT reads them when it refits
    for name in wanted:
        tensor = weights[name].contiguous()
        held.append(tensor)
        given = trt.Weights(trt_dtype(trt, tensor.dtype), tensor.data_ptr(), tensor.numel())
        check_prototype(name, refitter.get_weights_prototype(name), given)
        if not refitter.set_named_weights(name, given):
            raise refused(log, f"set_named_weights({name!r}) returned False")
    if missing := refitter.get_missing_weights():
        raise refused(log, f"{len(missing)} weights still missing: {', '.join(missing[:5])}")
    if not refitter.refit_cuda_engine():
        raise refused(log, "refit_cuda_engine returned False")
    del held


def overwrite(present: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Copy `weights` over the tensors on the device that have their names; addresses stay.

    Raises:
        IntegrityError: a weight is missing, or has another type or shape; nothing was changed.
    """
    require_all(present, weights)
    for name, own in present.items():
        given = weights[name]
        if (given.dtype, given.shape) != (own.dtype, own.shape):
            raise does_not_fit(
                name, f"{given.dtype} {list(given.shape)}", f"{own.dtype} {list(own.shape)}"
            )
    for name, own in present.items():
        own.copy_(weights[name])


def require_all(wanted: Collection[str], weights: Mapping[str, torch.Tensor]) -> None:
    """IntegrityError where a weight is missing."""
    lacking = sorted(name for name in wanted if name not in weights)
    if lacking:
        raise IntegrityError(
            f"the weights lack {len(lacking)} of the engine's {len(wanted)}",
            got=f"none named {', '.join(lacking[:5])}",
        )


def trt_dtype(trt: TensorRT, dtype: torch.dtype) -> TensorRT.DataType:
    """TensorRT's name of torch's type. IntegrityError for one that is not refitted."""
    known = {
        torch.float32: trt.DataType.FLOAT,
        torch.float16: trt.DataType.HALF,
        torch.bfloat16: trt.DataType.BF16,
        torch.int32: trt.DataType.INT32,
        torch.int64: trt.DataType.INT64,
        torch.bool: trt.DataType.BOOL,
    }
    if dtype not in known:
        raise IntegrityError("a weight of a type that is not refitted", got=dtype)
    return known[dtype]


def check_prototype(name: str, prototype: TensorRT.Weights, weights: TensorRT.Weights) -> None:
    """Refuse, both named, what TensorRT rejects by its documentation: another type or count."""
    if (prototype.dtype, prototype.size) != (weights.dtype, weights.size):
        raise does_not_fit(
            name, f"{weights.size} x {weights.dtype}", f"{prototype.size} x {prototype.dtype}"
        )


def does_not_fit(name: str, got: str, wanted: str) -> IntegrityError:
    return IntegrityError(f"the weight {name} does not fit the engine", got=got, wanted=wanted)


def refused(log: MessageLog, call: str) -> LcexportError:
    return LcexportError(
        "TensorRT refused a refit", got=said(log, call), do="Close the engine and open it again."
    )
