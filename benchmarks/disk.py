"""What this machine's disk writes and reads, and how fast a core digests, in bytes a second.

Past the system's cache, whose filling is no work of the disk's, where the file system can.
"""

import hashlib
import os
import time
from mmap import mmap
from pathlib import Path

from lcexport.engines.disk import open_direct

CHUNK_BYTES = 8 << 20
HASHED_BYTES = 2 << 30


def write_speed(path: Path, size: int) -> float:
    """A new file of `size` zeros, fsync included; it is removed again."""
    block = mmap(-1, CHUNK_BYTES)
    start = time.perf_counter()
    descriptor, _ = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for _ in range(size // CHUNK_BYTES):
        os.write(descriptor, block)
    os.fsync(descriptor)
    seconds = time.perf_counter() - start
    os.close(descriptor)
    path.unlink()
    return size / seconds


def read_speed(path: Path) -> float:
    """A whole file, front to back, that the system did not have in its cache."""
    evict(path)
    block = mmap(-1, CHUNK_BYTES)
    start, done = time.perf_counter(), 0
    descriptor, _ = open_direct(path, os.O_RDONLY)
    while done < path.stat().st_size:
        done += os.preadv(descriptor, [block], done)
    os.close(descriptor)
    return path.stat().st_size / (time.perf_counter() - start)


def evict(path: Path) -> None:
    """Have the system forget a file's contents; what a hypervisor keeps stays there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hash_speed() -> float:
    """SHA-256 over memory, by one core."""
    block = os.urandom(CHUNK_BYTES)
    digest = hashlib.sha256()
    start = time.perf_counter()
    for _ in range(HASHED_BYTES // CHUNK_BYTES):
        digest.update(block)
    return HASHED_BYTES / (time.perf_counter() - start)
