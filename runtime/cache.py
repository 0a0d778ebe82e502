"""A continuation's clean frames as keys and values, made once and used at every step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lcexport.configs.errors import UsageError
from lcexport.engines import Engine
from lcexport.runtime.cancel import CancelToken

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of S samples, and what they are of.

    Attributes:
        latents: the clean frames, normalised, float32 [S, 16, T, H, W].
        samples: for each sample, its tensors [1, A, M, D] by the engines' names.
        source: the weights and the graph that made them; no others can use them.
    """

    latents: torch.Tensor
    samples: tuple[Tensors, ...]
    source: tuple[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for sample in self.samples for tensor in sample.values())

    def to(self, device: torch.device | str) -> "KeyValueCache":
        """The same on another device; on the host, it waits there and is copied for each call."""
        samples = tuple(
            {name: t.to(device) for name, t in sample.items()} for sample in self.samples
        )
        return KeyValueCache(self.latents, samples, self.source)

    def check(self, source: tuple[str, str]) -> None:
        """UsageError where it was made with other weights or by another graph."""
        if self.source != source:
            raise UsageError(
                "the cache is of another resolution or model",
                got=f"graph {self.source[1]}, weights {self.source[0][:16]}",
                wanted=f"graph {source[1]}, weights {source[0][:16]}",
                do="Make it with this pipeline's `make_cache`.",
            )


def make_cache(
    engine: Engine, latents_S16THW: torch.Tensor, source: tuple[str, str], cancel: CancelToken
) -> KeyValueCache:
    """Run the engine that makes a cache over clean latents, as many samples as it takes at a time.

    Raises:
        UsageError: the latents do not fit the engine.
        Cancelled: the token was set.
    """
    wanted = engine.inputs[0].shape
    if tuple(latents_S16THW.shape[1:]) != wanted[1:]:
        raise UsageError(
            "the clean latents do not fit the engine",
            got=list(latents_S16THW.shape),
            wanted=["S", *wanted[1:]],
        )
    clean = latents_S16THW.to(engine.device, torch.float32)
    last = len(clean) - 1
    timestep = torch.zeros(wanted[0], wanted[2], device=engine.device)
    samples: list[Tensors] = []
    for first in range(0, len(clean), wanted[0]):
        cancel.check()
        rows = [min(first + slot, last) for slot in range(wanted[0])]
        inputs = {"hidden_states": clean[rows].contiguous(), "timestep": timestep}
        made = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=engine.device)
            for spec in engine.outputs
        }
        engine.run(inputs, made)
        for slot in range(min(wanted[0], len(clean) - first)):
            rows_of = {name: tensor[slot : slot + 1] for name, tensor in made.items()}
            # a slice of several rows would keep them all in memory
            samples.append(
                rows_of if wanted[0] == 1 else {n: t.clone() for n, t in rows_of.items()}
            )
    return KeyValueCache(latents_S16THW, tuple(samples), source)
