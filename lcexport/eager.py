"""The `eager` backend: the bundle's weights in the native torch DiT."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import IncompatibleError
from lcexport.dit import LongCatDiT, dit_from_tensors
from lcexport.engines import Engine, TensorSpec
from lcexport.engines.bundle import DIT_CONFIG, WEIGHTS, Bundle, GraphRecord
from lcexport.engines.eager import EagerEngine


def open_engine(
    backend: str,
    bundle: Bundle,
    resolution: str,
    device: str = "cpu",
    like: Engine | None = None,
) -> EagerEngine:
    """The bundle's DiT with the inputs and outputs of the graph at `resolution`.

    It is `like`'s where that has the same weights file open on the same device.
    """
    record = bundle.graph(resolution)
    if isinstance(like, DitEngine) and like.source == bundle.path(WEIGHTS):
        return DitEngine(like.dit, record, like.device, like.source)
    dit = dit_from_files(bundle.path(DIT_CONFIG), bundle.path(WEIGHTS), device)
    return DitEngine(dit, record, torch.device(device), bundle.path(WEIGHTS))


def require(backend: str, precision: str, device: torch.device) -> None:
    """See `lcexport.engines.require_backend`; torch computes both precisions everywhere."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise IncompatibleError(
            "torch sees no CUDA device", do="Install a CUDA build of torch, or use --device cpu."
        )


class DitEngine(EagerEngine):
    """`dit` as an engine with the inputs and outputs of a graph.

    `source` is the file its weights are from: engines of one file can use one DiT.
    """

    def __init__(
        self,
        dit: LongCatDiT,
        record: GraphRecord,
        device: torch.device,
        source: Path | None = None,
    ) -> None:
        def forward(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return dit(**inputs, num_cond_latents=record.num_cond_latents)

        specs = [
            TensorSpec(tensor.name, tensor.shape, getattr(torch, tensor.dtype))
            for tensor in (*record.inputs, *record.outputs)
        ]
        super().__init__(forward, tuple(specs[:-1]), specs[-1], device)
        self.dit, self.source = dit, source


def dit_from_files(config: Path, weights: Path, device: str = "cpu") -> LongCatDiT:
    """The native DiT over a bundle's weights file, in the precision that file holds."""
    return dit_from_tensors(DiTConfig.from_json(config), load_file(weights, device=device))
