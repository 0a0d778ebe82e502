"""Look at every weight once: SHA-256 of each tensor, and no NaN or infinity in any."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from lcexport.checkpoint.int8 import DTYPES, SCALE
from lcexport.checkpoint.layout import whole
from lcexport.checkpoint.reading import TORCH_DTYPES, Chunk, one_thread, read_chunks, read_scale
from lcexport.configs.errors import InputError
from lcexport.engines.header import TensorInfo

Progress = Callable[[int, int], None]
"""Called with the source bytes done and the total, after each chunk. It may raise to stop."""


class SourceDigests:
    """SHA-256 of source tensors whose bytes pass by in order, a whole tensor at a time."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._current: TensorInfo | None = None
        self._hash = hashlib.sha256()
        self._bytes = 0

    def add(self, chunk: Chunk) -> None:
        """Take the next bytes of a tensor, or the first ones of the next tensor."""
        if chunk.source != self._current:
            assert self._current is None, "a tensor was left before its end"
            assert chunk.source.name not in self.digests, "a tensor was visited twice"
            self._current, self._hash, self._bytes = chunk.source, hashlib.sha256(), 0
        self._hash.update(chunk.data)
        self._bytes += len(chunk.data)
        if self._bytes == chunk.source.bytes:
            self.digests[chunk.source.name] = self._hash.hexdigest()
            self._infos[chunk.source.name] = chunk.source
            self._current = None

    def combined(self) -> str:
        """One digest over all tensors, independent of files, shards and order."""
        return tensors_digest(self._infos, self.digests)


def tensors_digest(infos: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """Hex SHA-256 over one line `name dtype 2x3 digest` per tensor, sorted by name."""
    total = hashlib.sha256()
    for name in sorted(digests):
        shape = "x".join(str(size) for size in infos[name].shape)
        total.update(f"{name} {infos[name].dtype} {shape} {digests[name]}\n".encode())
    return total.hexdigest()


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. Memory-bound: the extremes carry both along."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def check_finite(values: torch.Tensor, source: TensorInfo, narrowest: torch.dtype) -> None:
    """Require finite values that stay finite in the narrowest dtype they will pass through.

    Args:
        values: at least one element of the tensor `source`.

    Raises:
        InputError: NaN, infinity, or a value beyond the dtype's range; names the tensor.
    """
    extremes = torch.stack(torch.aminmax(values))
    where = f"{source.path}: tensor {source.name!r}"
    if not extremes.isfinite().all():
        raise InputError(
            f"{where} holds NaN or infinity", do="Download the file again, or mend the training."
        )
    if not extremes.to(narrowest).isfinite().all():
        raise InputError(
            f"{where} does not fit {str(narrowest).removeprefix('torch.')}",
            got=f"values {extremes[0]:.3g}..{extremes[1]:.3g}",
        )


def check_scales(tensors: Iterable[TensorInfo]) -> None:
    """Read the scales among these tensors, which are small, before anything is done with them.

    Raises:
        InputError: a scale is not finite or not positive; names the tensor and the row.
    """
    for info in tensors:
        if info.name.endswith(SCALE) and info.dtype == DTYPES[SCALE]:
            read_scale(whole(info))


@dataclass(frozen=True)
class ScanReport:
    """What a full read found: names with NaN or infinity, and digests as in a WriteReport."""

    nonfinite: list[str]
    digests: dict[str, str]
    tensors_sha256: str


@one_thread()
def scan_tensors(
    tensors: Iterable[TensorInfo], *, on_progress: Progress | None = None
) -> ScanReport:
    """Read every byte of these tensors once, file by file; floating dtypes are checked for NaN.

    Raises:
        InputError: a file cannot be read to the end.
    """
    ordered = sorted(tensors, key=lambda info: (info.path, info.start, info.end))
    pieces = [whole(info) for info in ordered]
    total, done = sum(info.bytes for info in ordered), 0
    digests, nonfinite = SourceDigests(), {}
    for chunk in read_chunks(pieces):
        digests.add(chunk)
        name = chunk.source.name
        checkable = chunk.source.dtype in TORCH_DTYPES and len(chunk.data) and name not in nonfinite
        if checkable and not is_finite(chunk.values()):
            nonfinite[name] = None
        done += len(chunk.data)
        if on_progress:
            on_progress(done, total)
    return ScanReport(list(nonfinite), digests.digests, digests.combined())
