"""The `eager` backend: the bundle's weights in the native torch DiT."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import IncompatibleError
from lcexport.dit import LongCatDiT, dit_from_tensors
from lcexport.dit.attention import KeyValue
from lcexport.dit.sparse import job_sparsity
from lcexport.engines import Engine, TensorSpec, cache_names, is_cached
from lcexport.engines.bundle import Bundle
from lcexport.engines.eager import EagerEngine
from lcexport.engines.manifest import DIT_CONFIG, WEIGHTS, GraphRecord, TensorRecord


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
    path = bundle.path(WEIGHTS)
    if isinstance(like, DitEngine) and like.dit is not None and like.source == path:
        return DitEngine(like.dit, record, like.device, like.source)
    dit = dit_from_files(bundle.path(DIT_CONFIG), path, device)
    return DitEngine(dit, record, torch.device(device), path)


def require(backend: str, precision: str, device: torch.device) -> None:
    """See `lcexport.engines.require_backend`; torch computes both precisions everywhere."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise IncompatibleError(
            "torch sees no CUDA device", do="Install a CUDA build of torch, or use --device cpu."
        )


class DitEngine(EagerEngine):
    """`dit` as an engine with the inputs and outputs of a graph.

    `source` is the file its weights are from: engines of one file can use one DiT, which is None
    once this engine is closed.
    """

    def __init__(
        self,
        dit: LongCatDiT,
        record: GraphRecord,
        device: torch.device,
        source: Path | None = None,
    ) -> None:
        job = record.job
        # a compiled module need not have a configuration
        sparse = job_sparsity(dit.config, job) if job.sparse else None

        def forward(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
            if job.part == "cache":
                return [tensor for layer in dit.cache(**inputs) for tensor in layer]
            named = {name: t for name, t in inputs.items() if not is_cached(name)}
            cache = keys_values(inputs) if job.cached_latents else None
            clean = job.num_cond_latents
            return [dit(**named, num_cond_latents=clean, cache=cache, sparse=sparse)]

        super().__init__(forward, specs_of(record.inputs), specs_of(record.outputs), device)
        self.dit: LongCatDiT | None = dit
        self.source = source

    def close(self) -> None:
        """Release the weights, where no other engine uses them."""
        super().close()
        self.dit = None


def specs_of(tensors: Iterable[TensorRecord]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.name, t.shape, getattr(torch, t.dtype)) for t in tensors)


def keys_values(inputs: Mapping[str, torch.Tensor]) -> list[KeyValue]:
    """The cache among a graph's inputs, layer by layer."""
    depth = sum(map(is_cached, inputs)) // 2
    return [(inputs[key], inputs[value]) for key, value in map(cache_names, range(depth))]


def dit_from_files(config: Path, weights: Path, device: str = "cpu") -> LongCatDiT:
    """The native DiT over a bundle's weights file, in the precision that file holds."""
    return dit_from_tensors(DiTConfig.from_json(config), load_file(weights, device=device))
