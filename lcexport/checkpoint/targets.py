"""What a written file will hold: each target tensor as a list of source byte ranges and a cast.

Splitting and joining q, k, v are the same thing here: a native target has one range, an original
one has up to three. The order of a list of targets is the order in the file.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from lcexport.checkpoint.checks import check_tensors
from lcexport.checkpoint.header import DTYPE_BYTES
from lcexport.checkpoint.layout import Checkpoint, Piece, whole
from lcexport.checkpoint.names import is_island, name_pairs
from lcexport.checkpoint.reading import TORCH_DTYPES
from lcexport.configs.errors import InputError, UsageError

Bulk = Literal["keep", "bf16", "fp32"]
Islands = Literal["checkpoint", "original"]

ALIGNMENT = 256  # bytes; what GPU runtimes want of a weight they map


@dataclass(frozen=True)
class Target:
    """One tensor to write: the concatenated `ranges`, cast to `dtype` (a safetensors name).

    `through_bf16` rounds to BF16 before widening, for islands as the original computes them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[Piece, ...]
    through_bf16: bool = False

    @property
    def bytes(self) -> int:
        """Bytes in the written file."""
        elements = sum((r.end - r.start) // DTYPE_BYTES[r.dtype] for r in self.ranges)
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def narrowest(self) -> torch.dtype:
        """The dtype with the smallest range that the values pass through."""
        return torch.bfloat16 if self.through_bf16 else TORCH_DTYPES[self.dtype]

    def cast(self, values: torch.Tensor) -> torch.Tensor:
        """Source elements as they are to be written; rounds to nearest even."""
        if self.through_bf16:
            values = values.to(torch.bfloat16)
        return values.to(TORCH_DTYPES[self.dtype])


def native_targets(checkpoint: Checkpoint, *, bulk: Bulk, islands: Islands) -> list[Target]:
    """The file of native names, in writing order.

    Raises:
        InputError: the checkpoint's tensors are not what its configuration calls for.
        UsageError: `bulk` and `islands` contradict each other.
    """
    check_choice(bulk, islands)
    return _aligned_first(
        [
            _target(name, piece.shape, (piece,), is_island(name), bulk, islands)
            for name, piece in checkpoint.native().items()
        ]
    )


def original_targets(checkpoint: Checkpoint, *, bulk: Bulk, islands: Islands) -> list[Target]:
    """The file of original names, in writing order; q, k, v and k, v are joined again.

    Raises:
        InputError: as for `native_targets`, or the parts of one tensor differ in dtype.
        UsageError: `bulk` and `islands` contradict each other.
    """
    check_choice(bulk, islands)
    check_tensors(checkpoint)
    targets = []
    for pair in name_pairs(checkpoint.config):
        names = (pair.original,) if checkpoint.naming == "original" else pair.natives
        ranges = tuple(whole(checkpoint.tensors[name]) for name in names)
        island = is_island(pair.natives[0])
        targets.append(_target(pair.original, pair.shape, ranges, island, bulk, islands))
    return _aligned_first(targets)


def check_choice(bulk: Bulk, islands: Islands) -> None:
    """Rounded islands only make sense beside a BF16 bulk: that is what the original computes.

    Raises:
        UsageError: an unknown value, or islands="original" without bulk="bf16".
    """
    if bulk not in ("keep", "bf16", "fp32"):
        raise UsageError("unknown precision of the bulk", got=repr(bulk), wanted="keep, bf16, fp32")
    if islands not in ("checkpoint", "original"):
        raise UsageError("unknown islands", got=repr(islands), wanted="checkpoint, original")
    if islands == "original" and bulk != "bf16":
        raise UsageError("islands rounded as the original's need a BF16 bulk", got=f"bulk={bulk}")


def _target(
    name: str,
    shape: tuple[int, ...],
    ranges: tuple[Piece, ...],
    island: bool,
    bulk: Bulk,
    islands: Islands,
) -> Target:
    if bulk == "keep":
        dtypes = {piece.dtype for piece in ranges}
        if len(dtypes) > 1:
            parts = ", ".join(f"{piece.source.name} {piece.dtype}" for piece in ranges)
            raise InputError(
                f"the parts of {name} differ in dtype", got=parts, do="Convert with a dtype."
            )
        return Target(name, dtypes.pop(), shape, ranges)
    dtype = "BF16" if bulk == "bf16" and not island else "F32"
    return Target(name, dtype, shape, ranges, through_bf16=island and islands == "original")


def _aligned_first(targets: list[Target]) -> list[Target]:
    """Tensors of a multiple of 256 bytes first: then every one of them starts at one too.

    The few others follow, wider elements first, so that each is aligned to its elements.
    """
    return sorted(
        targets, key=lambda t: (0, 0) if t.bytes % ALIGNMENT == 0 else (1, -DTYPE_BYTES[t.dtype])
    )
