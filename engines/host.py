"""Memory of this process and of this machine, read from the kernel (Linux), kept and given back."""

import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1
RESET_PEAK = "5"  # Documentation/filesystems/proc.rst: resets VmHWM


def reset_peak_rss() -> None:
    """Start a new peak at the present resident size, where the kernel lets us."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # then peaks are those of the whole process so far: still upper bounds
        return


def peak_rss_bytes() -> int:
    """Largest resident size since the last reset, mapped files included."""
    return kibibytes(STATUS, "VmHWM") * 1024


def resident_bytes() -> int:
    """What this process holds in memory now, mapped files included."""
    return kibibytes(STATUS, "VmRSS") * 1024


def available_memory_bytes() -> int:
    """Memory a new allocation can have without swapping, here and in this process's container."""
    free = kibibytes(MEMINFO, "MemAvailable") * 1024
    return max(0, min([free, *(group.limit - group.used for group in limited_groups())]))


def total_memory_bytes() -> int:
    """The machine's memory, or what of it this process's container may use."""
    total = kibibytes(MEMINFO, "MemTotal") * 1024
    return min([total, *(group.limit for group in limited_groups())])


@dataclass(frozen=True)
class MemoryGroup:
    """A control group's limit, and what it uses without the files that the kernel can drop."""

    limit: int
    used: int


def limited_groups() -> Iterator[MemoryGroup]:
    """The control groups that this process is in and that have a limit, from the inside out."""
    for line in CGROUP.read_text().splitlines() if CGROUP.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, files, prefix = CGROUPS, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            root, prefix = CGROUPS / "memory", "total_"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the host's, of which only the top is to be seen.
        leaf = root / path.lstrip("/")
        for folder in (leaf, *leaf.parents):
            if folder.is_relative_to(root) and (folder / files[0]).exists():
                yield from memory_group(folder, files, prefix)


def memory_group(folder: Path, files: tuple[str, str], prefix: str) -> Iterator[MemoryGroup]:
    """The group in `folder`, unless its limit is `max`."""
    limit, used = ((folder / name).read_text().strip() for name in files)
    if limit.isdecimal():
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        stat = {name: int(value) for name, value in lines}
        cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        yield MemoryGroup(int(limit), int(used) - cached)


def keep_freed_memory() -> bool:
    """Have this process's malloc keep what tensors leave, for the next ones: for its whole life.

    glibc gives blocks above 32 MiB back at once, and the kernel maps and clears every page of the
    next activation anew (docs/performance.md). `release` gives them back. It is for whoever owns
    the process, as the command line does. Returns whether it was done.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(what, MOST) == 1 for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def release() -> None:
    """Give back what nobody holds any more, on the device too, where torch keeps it for itself."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kibibytes(path: Path, key: str) -> int:
    """A `Key:  123 kB` line of a /proc file."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"{path} has no {key}")
