"""Memory of this process and of this machine, read from the kernel (Linux)."""

from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")
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


def available_memory_bytes() -> int:
    """Memory a new allocation can have without swapping."""
    return kibibytes(MEMINFO, "MemAvailable") * 1024


def kibibytes(path: Path, key: str) -> int:
    """A `Key:  123 kB` line of a /proc file."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"{path} has no {key}")
