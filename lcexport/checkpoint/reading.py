"""Read byte ranges of weight files: chunk by chunk, read ahead, or one tensor whole.

Memory is a few chunks whatever the size of the checkpoint.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from lcexport.checkpoint.int8 import check_scale, dequantise
from lcexport.checkpoint.layout import Piece
from lcexport.configs.errors import InputError
from lcexport.engines.disk import ByteRange, read_ahead
from lcexport.engines.header import DTYPE_BYTES, TensorInfo
from lcexport.engines.weights import TORCH_DTYPES

CHUNK_ELEMENTS = 2 << 20  # 8 MiB of F32: large enough for the disk, small enough for any machine


@dataclass(frozen=True)
class Chunk:
    """Part of a piece, from its element `first` on.

    `data` is valid only until the next chunk is asked for.
    """

    piece: int
    source: TensorInfo
    first: int
    data: memoryview
    last: bool

    def values(self) -> torch.Tensor:
        """The elements, flat, sharing memory with `data`."""
        return torch.frombuffer(self.data, dtype=TORCH_DTYPES[self.source.dtype])


@dataclass(frozen=True)
class _Part:
    piece: int
    source: TensorInfo
    first: int
    start: int
    end: int
    last: bool


def read_tensor(piece: Piece) -> torch.Tensor:
    """Read one piece into a tensor that owns its memory: `piece.shape`, the dtype of the file.

    A quantised piece is read as its float32 values.

    Raises:
        InputError: the dtype is none of `TORCH_DTYPES`, the file ended early, or a scale is none.
    """
    if piece.dtype not in TORCH_DTYPES:
        raise InputError(f"tensor {piece.source.name!r}: unsupported dtype", got=piece.dtype)
    count = (piece.end - piece.start) // DTYPE_BYTES[piece.dtype]
    flat = torch.empty(count, dtype=TORCH_DTYPES[piece.dtype])
    data = flat.view(torch.uint8).numpy().data
    with _reading(piece.source), piece.source.path.open("rb") as file:
        file.seek(piece.start)
        count = file.readinto(data)
    _check_whole(data[:count], len(data), piece.source)
    values = flat.reshape(piece.shape)
    return values if piece.scale is None else dequantise(values, read_scale(piece.scale))


def read_scale(piece: Piece) -> torch.Tensor:
    """The scales of a quantised piece, float32 [rows].

    Raises:
        InputError: one is not finite or not positive; names the tensor. Or as for `read_tensor`.
    """
    scale = read_tensor(piece)
    check_scale(scale, f"{piece.source.path}: tensor {piece.source.name!r}")
    return scale


@contextmanager
def one_thread() -> Iterator[None]:
    """The arithmetic on chunks is one thread's, beside those that read, digest and write.

    More would wait for each other, and wait actively: where these threads have work for all
    processors, rounding a chunk takes them twenty times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_chunks(pieces: Iterable[Piece], *, whole_rows: bool = False) -> Iterator[Chunk]:
    """Yield the pieces' bytes in order, in chunks of at most CHUNK_ELEMENTS elements.

    Chunks are counted in elements so that the same tensor in two dtypes is cut alike. A piece
    without elements yields one empty chunk. Abandoning the iterator stops the reading threads.

    Args:
        whole_rows: cut no row of a matrix, however long; the shapes must have been checked.

    Raises:
        InputError: a file ended early or cannot be read.
    """
    parts = list(_parts(pieces, whole_rows))
    ranges = (ByteRange(part.source.path, part.start, part.end) for part in parts)
    with closing(read_ahead(ranges)) as contents:
        for part in parts:
            with _reading(part.source):
                data = next(contents)
            _check_whole(data, part.end - part.start, part.source)
            yield Chunk(part.piece, part.source, part.first, data, part.last)


def _parts(pieces: Iterable[Piece], whole_rows: bool) -> Iterator[_Part]:
    for index, piece in enumerate(pieces):
        elements = CHUNK_ELEMENTS
        if whole_rows and len(piece.shape) == 2 and (columns := piece.shape[1]):
            elements = max(elements // columns, 1) * columns
        step = elements * DTYPE_BYTES[piece.dtype]
        start, first = piece.start, 0
        while piece.end - start > step:
            yield _Part(index, piece.source, first, start, start + step, last=False)
            start, first = start + step, first + elements
        yield _Part(index, piece.source, first, start, piece.end, last=True)


@contextmanager
def _reading(source: TensorInfo) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{source.path} cannot be read at tensor {source.name!r}: {error.strerror}"
        ) from error


def _check_whole(data: memoryview, wanted: int, source: TensorInfo) -> None:
    if len(data) != wanted:
        raise InputError(f"{source.path} became shorter while tensor {source.name!r} was read")
