"""What a written file will hold: each target tensor as a list of source byte ranges and a cast.

Splitting and joining q, k, v are the same thing here: a native target has one range, an original
one has up to three. A weight that is to become int8 is two targets: its integers, and its scales,
which have no range because they are found on the way. The order of a list of targets is the order
in the file.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from lcexport.checkpoint.checks import check_tensors
from lcexport.checkpoint.int8 import INT8, SCALE, int8_names
from lcexport.checkpoint.layout import Checkpoint, Piece
from lcexport.checkpoint.names import Pair, is_island, name_pairs
from lcexport.checkpoint.reading import TORCH_DTYPES
from lcexport.configs.errors import InputError, UsageError
from lcexport.engines.header import DTYPE_BYTES
from lcexport.engines.manifest import Islands, WeightsDtype

Bulk = Literal["keep", "bf16", "fp32", "int8"]

ALIGNMENT = 256  # bytes; what GPU runtimes want of a weight they map


@dataclass(frozen=True)
class Target:
    """One tensor to write: the concatenated `ranges`, cast to `dtype` (a safetensors name).

    `through_bf16` rounds to BF16 before widening, for islands as the original computes them.
    An "I8" target of float ranges is quantised.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[Piece, ...]
    through_bf16: bool = False

    @property
    def bytes(self) -> int:
        """Bytes in the written file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def is_quantised_here(self) -> bool:
        """Whether float values become integers and scales, these for the target named after it."""
        return self.dtype == "I8" and self.ranges[0].dtype != "I8"

    @property
    def scales(self) -> str:
        """Name of the target that holds the scales of these integers."""
        return self.name.removesuffix(INT8) + SCALE

    @property
    def narrowest(self) -> torch.dtype:
        """The dtype with the smallest range that the values pass through."""
        if self.is_quantised_here:
            return torch.float32
        return torch.bfloat16 if self.through_bf16 else TORCH_DTYPES[self.dtype]

    def cast(self, values: torch.Tensor) -> torch.Tensor:
        """Source elements as they are to be written, copied; rounds to nearest even."""
        if self.through_bf16:
            values = values.to(torch.bfloat16)
        return values.to(TORCH_DTYPES[self.dtype], copy=True)


def native_targets(
    checkpoint: Checkpoint, *, bulk: Bulk, islands: Islands, weights: WeightsDtype = "bulk"
) -> list[Target]:
    """The file of native names, in writing order. The arguments are those of `write_native`.

    Raises:
        InputError: the checkpoint's tensors are not what its configuration calls for.
        UsageError: the arguments contradict each other.
    """
    check_choice(bulk, islands, weights)
    pieces = checkpoint.native()
    targets = []
    for pair in name_pairs(checkpoint.config):
        for name in pair.natives:
            targets += _targets(pair, name, (pieces[name],), bulk, islands, weights)
    return _in_order(targets)


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
        ranges = tuple(checkpoint.piece(name) for name in names)
        targets += _targets(pair, pair.original, ranges, bulk, islands, "bulk")
    return _in_order(targets)


def check_choice(bulk: Bulk, islands: Islands, weights: WeightsDtype = "bulk") -> None:
    """Rounded islands only make sense beside a BF16 bulk: that is what the original computes.

    Raises:
        UsageError: an unknown value, islands="original" without bulk="bf16", or weights="int8"
            with a bulk that does not say what else is written.
    """
    if bulk not in get_args(Bulk):
        wanted = ", ".join(get_args(Bulk))
        raise UsageError("unknown precision of the bulk", got=repr(bulk), wanted=wanted)
    if islands not in ("checkpoint", "original"):
        raise UsageError("unknown islands", got=repr(islands), wanted="checkpoint, original")
    if islands == "original" and bulk != "bf16":
        raise UsageError("islands rounded as the original's need a BF16 bulk", got=f"bulk={bulk}")
    if weights not in get_args(WeightsDtype):
        raise UsageError(
            "unknown weights", got=repr(weights), wanted=", ".join(get_args(WeightsDtype))
        )
    if weights == "int8" and bulk not in ("bf16", "fp32"):
        raise UsageError("int8 weights need a bulk of bf16 or fp32", got=f"bulk={bulk}")


def _targets(
    pair: Pair,
    name: str,
    ranges: tuple[Piece, ...],
    bulk: Bulk,
    islands: Islands,
    weights: WeightsDtype,
) -> Iterator[Target]:
    """What is written for `name`, which is the concatenation of `ranges`: one target, or two."""
    shape = pair.shape if name == pair.original else pair.native_shape
    island = is_island(pair.natives[0])
    keep = bulk == "keep" and ranges[0].scale is not None
    int8 = pair.is_quantisable and (bulk == "int8" or (weights == "int8" and not island))
    if keep or int8:
        yield from _int8_targets(name, shape, ranges)
    elif bulk == "int8" and pair.of_linear:  # its bias
        yield Target(name, "BF16", shape, ranges)
    elif bulk in ("keep", "int8"):
        yield Target(name, _one_dtype(name, ranges), shape, ranges)
    else:
        dtype = "BF16" if bulk == "bf16" and not island else "F32"
        yield Target(name, dtype, shape, ranges, through_bf16=island and islands == "original")


def _int8_targets(name: str, shape: tuple[int, ...], ranges: tuple[Piece, ...]) -> Iterator[Target]:
    """Integers and scales: the source's own where it has them, else found when it is written."""
    _one_dtype(name, ranges)
    quantised, scale = int8_names(name)
    scales = tuple(piece.scale for piece in ranges if piece.scale is not None)
    yield Target(quantised, "I8", shape, tuple(replace(piece, scale=None) for piece in ranges))
    yield Target(scale, "F32", shape[:1], scales)


def _one_dtype(name: str, ranges: tuple[Piece, ...]) -> str:
    """The dtype all ranges have. InputError where they differ."""
    dtypes = {piece.dtype for piece in ranges}
    if len(dtypes) > 1:
        parts = ", ".join(f"{piece.source.name} {piece.dtype}" for piece in ranges)
        raise InputError(
            f"the parts of {name} differ in dtype", got=parts, do="Convert with a dtype."
        )
    return dtypes.pop()


def _in_order(targets: list[Target]) -> list[Target]:
    """Tensors of a multiple of 256 bytes first: then every one of them starts at one too.

    The few others follow, wider elements first, so that each is aligned to its elements. Scales
    come after all integers of their group, because those are what they are found from.
    """
    sizes = {target.name: target.bytes for target in targets}

    def place(target: Target) -> tuple[bool, bool, int]:
        integers = target.name.removesuffix(SCALE) + INT8
        late = sizes[target.name] % ALIGNMENT or sizes.get(integers, 0) % ALIGNMENT
        width = DTYPE_BYTES[target.dtype] if late else 0
        return bool(late), integers in sizes, -width

    return sorted(targets, key=place)
