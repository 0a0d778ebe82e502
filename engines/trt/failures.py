"""What a compiler's last messages mean: it gives no exception."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lcexport.configs.errors import BuildError, IncompatibleError, LcexportError, ResourceError
from lcexport.engines.trt.layers import attention_kinds
from lcexport.engines.trt.memory import missing_gpu
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.product import MessageLog, Product

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

CUDA_ERROR = re.compile(r"CUDA_SUCCESS|cudaError|CUDA driver")
# Where there is no driver, RTX says this after some errors.
ECHO = re.compile(r"catchCudaError.*cudaError 35\b")
OTHERWISE = "Try another version of TensorRT, or another optimization_level."


def build_error(
    product: Product,
    options: TrtOptions,
    log: MessageLog,
    network: TensorRT.INetworkDefinition,
    path: Path,
) -> LcexportError:
    """The compiler gives no exception, only messages: the error that the last of them mean."""
    errors = [error for error in log.errors if not ECHO.search(error)] or list(log.errors)
    said = "\n".join(errors)
    what = f"{product} cannot compile {path.name}"
    got = errors[-1].strip() if errors else "no reason given"
    if "not supported by a dedicated kernel" in said:
        return BuildError(
            f"{what}: an attention has no fused kernel",
            got=attention_kinds(network),
            wanted="bfloat16 or float16, at least two queries, at least two heads in all (batch "
            "times heads), of a width that is fused (9 to 256): as far as tried, on RTX 1.7",
            do="Unfused attention may keep every score in memory, so this is not built.",
        )
    if old := re.search(r"target\(s\) ([\w, ]+), because", said):
        return IncompatibleError(
            f"{what} for {old.group(1)}",
            got=got,
            do="GPUs before sm80 have no bfloat16: leave them out of compute_capabilities.",
        )
    if re.search(r"workspace (memory|limit)", said):
        return ResourceError(what, got=got, do="Raise workspace_bytes.")
    if re.search(r"bad_alloc|out of memory|OutOfMemory|Cannot allocate", said):
        return ResourceError(
            what, got=got, do="Free memory, or build in more segments, which need less each."
        )
    if cuda := [error for error in errors if CUDA_ERROR.search(error)]:
        return cuda_error(product, options, what, cuda[-1].strip())
    return BuildError(what, got=got, do=OTHERWISE)


def cuda_error(product: Product, options: TrtOptions, what: str, got: str) -> LcexportError:
    """CUDA failed: RTX was asked for something that it does on a GPU alone, or a GPU failed."""
    if not product.is_rtx or missing_gpu() is None:
        return BuildError(f"{what}: CUDA failed", got=got, do=OTHERWISE)
    wishes = " and ".join(name for name in ("strip_plan", "refit") if getattr(options, name))
    return IncompatibleError(
        f"{what} where torch sees no GPU" + (f" with {wishes}" if wishes else ""),
        got=got,
        do=(f"Build without {wishes}, or on" if wishes else "Use")
        + " a machine with an NVIDIA GPU and its driver (not tried).",
    )
