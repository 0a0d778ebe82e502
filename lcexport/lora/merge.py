"""LoRAs over a model's weights: W + sum of strength * alpha_scale * concat_j(up_j @ down_j).

In FP32, from the factors' own values, and rounded once to the dtype of the weight. A weight is
taken some 2 million elements at a time, the same ones wherever it is done, so the file that `bake`
writes and the tensors of `swapped` are equal bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcexport.checkpoint import read_tensor
from lcexport.checkpoint.layout import whole
from lcexport.checkpoint.reading import CHUNK_ELEMENTS
from lcexport.configs.dit import DiTConfig
from lcexport.engines.files import sha256_of
from lcexport.engines.manifest import LoraRecord
from lcexport.lora.choice import LoraChoice
from lcexport.lora.file import LoraModule, check_fits, check_values, linears, read_lora


@dataclass(frozen=True)
class Share:
    """What one LoRA adds to one native tensor: rows of its module's change, from `row` on."""

    module: LoraModule
    row: int
    scale: float


@dataclass(frozen=True)
class Factors:
    """A module's matrices in FP32: n of [r, in] and n of [out/n, r]."""

    downs: tuple[Tensor, ...]
    ups: tuple[Tensor, ...]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first..last-1 of concat_j(up_j @ down_j)."""
        height = self.ups[0].shape[0]
        parts = []
        for j, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            own = up[max(first - j * height, 0) : max(last - j * height, 0)]
            if len(own):
                parts.append(own @ down)
        return torch.cat(parts)


class Merge:
    """Several LoRAs over one model, by native tensor. Holds the factors of one tensor at a time.

    `records` says which they are, in the order given; see `open_merge`.
    """

    def __init__(self, records: tuple[LoraRecord, ...], shares: dict[str, list[Share]]) -> None:
        self.records = records
        self._shares = shares
        self._loaded: dict[LoraModule, Factors] = {}
        self._name = ""

    def __contains__(self, name: object) -> bool:
        return name in self._shares

    def added(self, name: str, first: int, values: Tensor) -> Tensor:
        """Elements `first` and on of the tensor `name`, FP32 and flat, with the LoRAs added."""
        shares = self._shares[name]
        if name != self._name:
            wanted = {share.module for share in shares}
            kept = {module: f for module, f in self._loaded.items() if module in wanted}
            self._loaded = kept | {m: load_factors(m) for m in wanted - set(kept)}
            self._name = name
        columns = shares[0].module.in_features
        top, bottom = first // columns, -(-(first + values.numel()) // columns)
        skip = first - top * columns
        for share in shares:
            delta = self._loaded[share.module].rows(share.row + top, share.row + bottom)
            values = values + share.scale * delta.flatten()[skip : skip + values.numel()]
        return values


def open_merge(choices: Sequence[LoraChoice], config: DiTConfig) -> Merge:
    """Open LoRAs for a model of this size: all their headers first, then their values.

    Raises:
        InputError: one of them is not readable, not understood whole, does not fit or is not
            finite.
    """
    shares = shares_of(choices, config)
    records = []
    for choice in choices:
        check_values(read_lora(choice.path))
        records.append(record_of(choice))
    return Merge(tuple(records), shares)


def shares_of(choices: Sequence[LoraChoice], config: DiTConfig) -> dict[str, list[Share]]:
    """Native tensor -> what is added to it. Reads headers only; see `open_merge`."""
    known = linears(config)
    shares: dict[str, list[Share]] = {}
    for choice in choices:
        lora = read_lora(choice.path)
        check_fits(lora, config)
        for name, module in lora.modules.items():
            pair = known[name]
            for index, native in enumerate(pair.natives):
                row = index * pair.native_shape[0]
                scale = choice.strength * module.alpha_scale
                shares.setdefault(native, []).append(Share(module, row, scale))
    return shares


def record_of(choice: LoraChoice) -> LoraRecord:
    """What a manifest says of a LoRA."""
    path: Path = choice.path
    return LoraRecord(name=path.stem, sha256=sha256_of(path), strength=choice.strength)


def load_factors(module: LoraModule) -> Factors:
    """Read one module's matrices."""
    down = read_tensor(whole(module.down)).float()
    ups = tuple(read_tensor(whole(up)).float() for up in module.ups)
    return Factors(down.split(module.rank), ups)


def swapped(weights: Mapping[str, Tensor], merge: Merge) -> dict[str, Tensor]:
    """All of a model's weights with LoRAs in them, for an engine that is open.

    Args:
        weights: the base's, on the host, by native name; not changed. What no LoRA touches is
            handed through as it is.
    """
    return {
        name: merged_tensor(merge, name, tensor) if name in merge else tensor
        for name, tensor in weights.items()
    }


def merged_tensor(merge: Merge, name: str, tensor: Tensor) -> Tensor:
    """One tensor with its LoRAs, in its own dtype."""
    merged = torch.empty_like(tensor)
    first = 0
    columns = tensor.shape[-1]  # whole rows, as `contents` of the file's writer takes them
    elements = max(CHUNK_ELEMENTS // columns, 1) * columns
    pairs = (t.flatten().split(elements) for t in (tensor, merged))
    for source, target in zip(*pairs, strict=True):
        target.copy_(merge.added(name, first, source.float()))
        first += source.numel()
    return merged
