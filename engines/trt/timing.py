"""The timing cache: what the builder measured, kept for the next build on the same GPU.

The caller names the file, one per GPU and TensorRT version. Several builds may share it: each
merges its measurements into what the file holds by then, under a lock, and replaces it whole.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lcexport.configs.errors import IncompatibleError, ResourceError
from lcexport.engines.files import resource_errors, write_bytes

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT


def load_timing_cache(config: TensorRT.IBuilderConfig, path: Path) -> TensorRT.ITimingCache:
    """Give the builder the measurements in `path`, or an empty cache where there is no file.

    The cache returned must live until the build has ended.

    Raises:
        IncompatibleError: the file was measured on another GPU or by another version.
        ResourceError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise ResourceError("no such folder", got=path.parent, do="Create it first.")
    cache = cache_from(config, path.read_bytes() if path.exists() else b"", path)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise foreign(path)
    return cache


def merge_timing_cache(config: TensorRT.IBuilderConfig, path: Path) -> None:
    """Add what this build measured to what the file holds now; it is replaced whole.

    Raises:
        IncompatibleError: the file has become another GPU's in the meantime.
    """
    measured = config.get_timing_cache()
    with locked(path):
        if path.exists():
            present = cache_from(config, path.read_bytes(), path)
            if not measured.combine(present, ignore_mismatch=False):
                raise foreign(path)
        write_bytes(path, bytes(memoryview(measured.serialize())), replace=True)


def cache_from(config: TensorRT.IBuilderConfig, data: bytes, path: Path) -> TensorRT.ITimingCache:
    cache = config.create_timing_cache(data)
    if cache is None:
        raise foreign(path)
    return cache


def foreign(path: Path) -> IncompatibleError:
    return IncompatibleError(
        f"{path} is a timing cache of another GPU or another TensorRT, or is damaged",
        do="Name another file: one for each GPU and version.",
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`; wait for it where another build is merging."""
    with (
        resource_errors(path),
        path.with_name(f".{path.name}.lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
