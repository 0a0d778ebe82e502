"""Read byte ranges of weight files: chunk by chunk with one chunk read ahead, or one tensor whole.

Memory is a few chunks whatever the size of the checkpoint. Pages already read are handed back to
the system, so that streaming 54 GB does not push everything else out of the page cache.
"""

import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lcexport.checkpoint.header import DTYPE_BYTES, TensorInfo
from lcexport.checkpoint.int8 import check_scale, dequantise
from lcexport.checkpoint.layout import Piece
from lcexport.configs.errors import InputError
from lcexport.engines.weights import TORCH_DTYPES

CHUNK_ELEMENTS = 2 << 20  # 8 MiB of F32: large enough for the disk, small enough for any machine
BUFFERS = 3  # one being read, one waiting, one in use


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
    with _open(piece.source.path) as file:
        _fill(file, piece.start, flat.view(torch.uint8).numpy().data, piece.source)
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


def read_chunks(pieces: Iterable[Piece], *, whole_rows: bool = False) -> Iterator[Chunk]:
    """Yield the pieces' bytes in order, in chunks of at most CHUNK_ELEMENTS elements.

    Chunks are counted in elements so that the same tensor in two dtypes is cut alike. A piece
    without elements yields one empty chunk. Abandoning the iterator stops the reading thread.

    Args:
        whole_rows: cut no row of a matrix, however long; the shapes must have been checked.

    Raises:
        InputError: a file ended early or cannot be read.
    """
    free: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[_Part, bytearray] | BaseException | None] = queue.SimpleQueue()
    for _ in range(BUFFERS):
        free.put(bytearray())
    thread = threading.Thread(
        target=_read_ahead,
        args=(list(_parts(pieces, whole_rows)), free, ready),
        name="weights",
        daemon=True,
    )
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            part, buffer = item
            data = memoryview(buffer)[: part.end - part.start]
            yield Chunk(part.piece, part.source, part.first, data, part.last)
            free.put(buffer)
    finally:
        free.put(None)
        thread.join()


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


def _read_ahead(parts: list[_Part], free: queue.SimpleQueue, ready: queue.SimpleQueue) -> None:
    """The reading thread: fill free buffers until the parts are done or a None says stop."""
    path, file = None, None
    try:
        for part in parts:
            buffer = free.get()
            if buffer is None:
                return
            if part.source.path != path or file is None:
                if file:
                    file.close()
                path, file = part.source.path, _open(part.source.path)
            length = part.end - part.start
            if len(buffer) < length:
                buffer = bytearray(length)
            _fill(file, part.start, memoryview(buffer)[:length], part.source)
            _forget(file, part.start, length)
            ready.put((part, buffer))
        ready.put(None)
    except BaseException as error:  # handed to the reader of the chunks, who raises it
        ready.put(error)
    finally:
        if file:
            file.close()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _fill(file: BinaryIO, start: int, view: memoryview, source: TensorInfo) -> None:
    try:
        file.seek(start)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise InputError(
                    f"{source.path} became shorter while tensor {source.name!r} was read"
                )
            done += count
    except OSError as error:
        raise InputError(
            f"{source.path} cannot be read at tensor {source.name!r}: {error.strerror}"
        ) from error


def _forget(file: BinaryIO, start: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
