"""What this machine's disk writes and reads, and how fast a core digests, in bytes a second."""

import hashlib
import os
import time
from pathlib import Path

CHUNK_BYTES = 8 << 20
HASHED_BYTES = 2 << 30


def write_speed(path: Path, size: int) -> float:
    """A new file of `size` zeros, fsync included; it is removed again."""
    block = bytes(CHUNK_BYTES)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // CHUNK_BYTES):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return size / seconds


def read_speed(path: Path) -> float:
    """A whole file, front to back, that the system did not have in its cache."""
    evict(path)
    block = bytearray(CHUNK_BYTES)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
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
