"""Large files, read and written past the system's cache, while their user does something else.

What passes by once gains nothing from the cache, and filling it costs more of the processor than
SHA-256 does (docs/performance.md). The price: what the cache holds is read from the disk again.
Small files go through the cache, and so does all on file systems that have no other way.
"""

import errno
import fcntl
import io
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHUNK_BYTES = 8 << 20  # large enough for the disk, small enough for any machine
LARGE_BYTES = 64 << 20
PAGE_BYTES = 4096  # past the cache places, sizes and addresses are multiples of the disk's blocks
READERS = 2  # one alone does not keep the disk busy while its user computes (docs/performance.md)
BUFFERS = READERS + 2  # one in use, one waiting, the others being read
DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes `start:end` of a file."""

    path: Path
    start: int
    end: int


def chunks_of(path: Path) -> Iterator[ByteRange]:
    """A whole file."""
    size = path.stat().st_size
    for start in range(0, size, CHUNK_BYTES):
        yield ByteRange(path, start, min(start + CHUNK_BYTES, size))


def read_ahead(ranges: Iterable[ByteRange]) -> Generator[memoryview, None, None]:
    """The bytes of each range in their order, read by threads that are up to three ranges ahead.

    A range's memory is used again when the next one is asked for. What lies beyond the end of a
    file is missing. Raises OSError.
    """
    memories = cycle([_Memory() for _ in range(BUFFERS)])
    reading: deque[Future[memoryview]] = deque()
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(_Source())) for _ in range(READERS)]
        threads = [stack.enter_context(ThreadPoolExecutor(1, "reading")) for _ in sources]
        readers = cycle(zip(threads, sources, strict=True))
        for wanted in ranges:
            thread, source = next(readers)
            reading.append(thread.submit(source.read, wanted, next(memories)))
            if len(reading) == BUFFERS:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


class LargeFile(io.RawIOBase):
    """A new file, written in whole chunks; `flush` writes what is left."""

    def __init__(self, path: Path) -> None:
        self._descriptor, _ = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._chunk = memoryview(mmap(-1, CHUNK_BYTES))
        self._filled = self._position = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        """Take all of the bytes, which may change afterwards."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            count = min(len(left), CHUNK_BYTES - self._filled)
            self._chunk[self._filled : self._filled + count] = left[:count]
            self._filled, left = self._filled + count, left[count:]
            if self._filled == CHUNK_BYTES:
                self._put()
        self._position += size
        return size

    def flush(self) -> None:
        """Write what is left: no whole pages, and so through the cache from here on."""
        if not self.closed and self._filled:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
            self._put()

    def _put(self) -> None:
        left, self._filled = self._chunk[: self._filled], 0
        while left:
            left = left[os.write(self._descriptor, left) :]

    def tell(self) -> int:
        """Bytes taken so far."""
        return self._position

    def fileno(self) -> int:
        """The system's number of the file."""
        return self._descriptor

    def close(self) -> None:
        """Close the file; what was not flushed is lost."""
        if not self.closed:
            self._filled = 0
            super().close()
            os.close(self._descriptor)


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Open past the cache where the file system can; whether it can."""
    try:
        return os.open(path, flags | DIRECT, 0o666), bool(DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666), False


class _Memory:
    """Memory that starts at a page and grows."""

    def __init__(self) -> None:
        self.view = memoryview(b"")

    def of(self, size: int) -> memoryview:
        if len(self.view) < size:
            self.view = memoryview(mmap(-1, size))
        return self.view[:size]


class _Source:
    """The file that one thread reads now; another is opened when it is asked for."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor, self._direct = -1, False

    def read(self, wanted: ByteRange, memory: _Memory) -> memoryview:
        if wanted.path != self._path:
            self._open(wanted.path)
        # past the cache: the pages around what is wanted
        margin = wanted.start % PAGE_BYTES if self._direct else 0
        first, needed = wanted.start - margin, wanted.end - wanted.start + margin
        view, done = memory.of(max(-(-needed // PAGE_BYTES), 1) * PAGE_BYTES), 0
        while done < needed:
            count = os.preadv(self._descriptor, [view[done:]], first + done)
            done += count
            if not count or (self._direct and count % PAGE_BYTES):  # the file's end
                break
        return view[margin : min(done, needed)]

    def _open(self, path: Path) -> None:
        self.close()
        if path.stat().st_size >= LARGE_BYTES:
            self._descriptor, self._direct = open_direct(path, os.O_RDONLY)
        else:
            self._descriptor, self._direct = os.open(path, os.O_RDONLY), False
        self._path = path

    def close(self) -> None:
        if self._path:
            os.close(self._descriptor)
            self._path = None
