"""Execution backends behind one contract: one file each, the same verbs.

An engine computes the DiT's velocity for one static shape. It knows nothing of prompts,
guidance or sampling; those are the runtime's.

Inputs and output of every DiT engine, B the batch it was built for (1 unless asked otherwise):

    hidden_states           float32 [B, 16, T, H, W]   latents
    encoder_hidden_states   float32 [B, 1, L, C_text]  UMT5's output, padding included
    timestep                float32 [B, T]             0..1000, one per latent frame
    encoder_attention_mask  bool    [B, L]             True where a token is not padding
    velocity                float32 [B, 16, T, H, W]   x0 - noise, as the network predicts it

A continuation's clean frames, M tokens of them, are keys and values of each layer (A heads of
dimension D): outputs of one engine, which takes their latents and timesteps alone, and inputs of
another, which takes all of the above.

    key.0, value.0, ...     bulk    [B, A, M, D]       keys after their norm and before RoPE
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol, Self, get_args

from lcexport.configs.errors import IncompatibleError, UsageError

if TYPE_CHECKING:
    import torch

    from lcexport.engines.bundle import Bundle

# Backend -> its module, which has `open_engine(backend, bundle, resolution, device, like)` and
# `require(backend, precision, device)`. Strings, so that a backend's library is imported only when
# that backend is asked for. `eager` lives on the other side of the arrow: it needs the model's
# code, which the runtime otherwise does without.
BACKENDS = {
    "onnxruntime": "lcexport.engines.ort",
    "onnxruntime-tensorrt": "lcexport.engines.ort",
    "onnxruntime-tensorrt-rtx": "lcexport.engines.ort",
    "tensorrt": "lcexport.engines.trt.backend",
    "tensorrt-rtx": "lcexport.engines.trt.backend",
    "aotinductor": "lcexport.engines.aoti",
    "eager": "lcexport.eager",
}

TensorRT = Literal["tensorrt", "tensorrt-rtx"]
TENSORRT: tuple[TensorRT, ...] = get_args(TensorRT)  # these run on GPUs alone
Compiled = Literal["tensorrt", "tensorrt-rtx", "aotinductor"]
COMPILED: tuple[Compiled, ...] = get_args(Compiled)  # these have plans to compile

# ONNX Runtime runs a compiled backend's plans too, as the backend `onnxruntime-<compiled>`; with
# this execution provider, by ONNX Runtime's name for it.
PROVIDERS: dict[TensorRT, str] = {
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, static shape and dtype of one input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def check(self, tensor: torch.Tensor, device: torch.device | None = None) -> None:
        """Raise UsageError unless `tensor` has this shape and dtype, is contiguous and on `device`.

        Without a device its place is the caller's to check.
        """
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise UsageError(
                f"engine tensor {self.name} does not fit",
                got=f"{tensor.dtype} {list(tensor.shape)}",
                wanted=f"{self.dtype} {list(self.shape)}",
            )
        if not tensor.is_contiguous():
            raise UsageError(f"engine tensor {self.name} is not contiguous")
        if device and not same_device(tensor.device, device):
            raise UsageError(
                f"engine tensor {self.name} is elsewhere", got=tensor.device, wanted=device
            )


class Engine(Protocol):
    """One compiled (or eager) DiT at one shape. Not thread-safe: one engine, one thread."""

    @property
    def backend(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Fill `outputs` from `inputs`, in place.

        Every tensor is contiguous, on `device`, and has the shape and dtype of its spec.
        """
        ...

    def close(self) -> None:
        """Give everything back. Harmless when called twice."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...


def cache_names(layer: int) -> tuple[str, str]:
    """Names of one layer's cached keys and values."""
    return f"key.{layer}", f"value.{layer}"


def is_cached(name: str) -> bool:
    """Whether an engine's tensor of that name is part of a key/value cache."""
    return name.startswith(("key.", "value."))


def open_engine(
    backend: str,
    bundle: Bundle,
    resolution: str,
    device: str = "cpu",
    like: Engine | None = None,
    options: Mapping[str, object] | None = None,
) -> Engine:
    """Open `backend`'s engine for one resolution of a bundle.

    Args:
        like: an open engine of the same backend, bundle and device: what memory the two can share,
            they do, and must not run at the same time. ONNX Runtime shares none.
        options: how the backend runs it: `cuda_graph`, of TensorRT's and of `onnxruntime` on CUDA,
            and `weight_budget` (bytes of streamed weights that may stay on the device, or "auto")
            of TensorRT's.

    Raises:
        UsageError: no such backend, or the bundle holds no such resolution.
        IncompatibleError: the backend's library or the device is missing; says how to get it.
    """
    require_backend(backend, bundle.manifest.precision, device)
    module = import_module(backend_module(backend))
    if not options:
        return module.open_engine(backend, bundle, resolution, device, like)
    if backend not in (*TENSORRT, "onnxruntime"):
        raise UsageError(f"{backend} has no options of its own", got=", ".join(options))
    return module.open_engine(backend, bundle, resolution, device, like, options)


def require_backend(backend: str, precision: str, device: str) -> None:
    """Raise unless `backend` can run a bundle of this precision on this device.

    Raises:
        UsageError: no such backend or device.
        IncompatibleError: the library, the device or the precision is not to be had here.
    """
    kind, name = device_from(device), backend_module(backend)
    try:
        module = import_module(name)
    except (ImportError, AttributeError) as error:  # half a library is a module without names
        raise IncompatibleError(
            f"the library of {backend} does not load",
            got=error,
            do="Install it again: pip install --force-reinstall lcexport",
        ) from error
    module.require(backend, precision, kind)


def device_from(name: str) -> torch.device:
    """The device of that name, whether or not this machine has it.

    Raises:
        UsageError: no such device, or one that engines do not run on.
    """
    import torch  # here: what only reads a manifest does without

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown_device(name) from error
    if device.type not in ("cpu", "cuda"):
        raise unknown_device(name)
    return device


def unknown_device(name: str) -> UsageError:
    return UsageError("unknown device", got=repr(name), wanted="cpu, cuda or cuda:N")


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether both are the same; `cuda` is `cuda:0`."""
    return (one.type, one.index or 0) == (other.type, other.index or 0)


def backend_module(backend: str) -> str:
    """Import path of a backend. Raises UsageError where there is no such backend."""
    if backend not in BACKENDS:
        raise UsageError(
            "unknown backend", got=repr(backend), wanted=f"one of {', '.join(BACKENDS)}"
        )
    return BACKENDS[backend]
