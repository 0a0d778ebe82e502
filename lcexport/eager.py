"""The `eager` backend: the bundle's weights in the native torch DiT."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import IncompatibleError
from lcexport.dit import LongCatDiT, dit_from_tensors
from lcexport.engines import TensorSpec
from lcexport.engines.bundle import DIT_CONFIG, WEIGHTS, Bundle, GraphRecord
from lcexport.engines.eager import EagerEngine


def open_engine(backend: str, bundle: Bundle, resolution: str, device: str = "cpu") -> EagerEngine:
    """Load the bundle's DiT and give it the inputs and outputs of the graph at `resolution`."""
    record = bundle.graph(resolution)
    dit = dit_from_files(bundle.path(DIT_CONFIG), bundle.path(WEIGHTS), device)
    return eager_engine(dit, record, device)


def require(backend: str, precision: str, device: torch.device) -> None:
    """See `lcexport.engines.require_backend`; torch computes both precisions everywhere."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise IncompatibleError(
            "torch sees no CUDA device", do="Install a CUDA build of torch, or use --device cpu."
        )


def eager_engine(dit: LongCatDiT, record: GraphRecord, device: str = "cpu") -> EagerEngine:
    """`dit` as an engine with the inputs and outputs of a graph."""

    def forward(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return dit(**inputs, num_cond_latents=record.num_cond_latents)

    specs = [
        TensorSpec(tensor.name, tensor.shape, getattr(torch, tensor.dtype))
        for tensor in (*record.inputs, *record.outputs)
    ]
    return EagerEngine(forward, tuple(specs[:-1]), specs[-1], torch.device(device))


def dit_from_files(config: Path, weights: Path, device: str = "cpu") -> LongCatDiT:
    """The native DiT over a bundle's weights file, in the precision that file holds."""
    return dit_from_tensors(DiTConfig.from_json(config), load_file(weights, device=device))
