"""The timing cache: what the builder measured, kept for the next build on the same GPU.

Builds name one file for each version, GPU, driver and platform. Several builds may share it: each
merges its measurements into what the file holds by then, under a lock, and replaces it whole.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcexport.configs.errors import IncompatibleError, ResourceError
from lcexport.engines.files import resource_errors, write_bytes

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT


@dataclass(frozen=True)
class TimingCache:
    """A file of measured kernels. One that the user `named` must fit; another is begun anew."""

    path: Path
    named: bool = True

    def load(self, config: TensorRT.IBuilderConfig) -> list[str]:
        """Give the builder the measurements, or an empty cache; the configuration keeps it alive.

        Returns what there is to warn of: the file was not named, and does not fit.

        Raises:
            IncompatibleError: the named file was measured on another GPU or by another version.
            ResourceError: its folder does not exist.
        """
        path = self.path
        if not path.parent.is_dir():
            raise ResourceError("no such folder", got=path.parent, do="Create it first.")
        try:
            self._give(config, path.read_bytes() if path.exists() else b"")
        except IncompatibleError as error:
            if self.named:
                raise
            self._give(config, b"")
            return [f"kernels are measured anew: {error.what}"]
        return []

    def merge(self, config: TensorRT.IBuilderConfig) -> None:
        """Add what this build measured to what the file holds now; it is replaced whole.

        Raises:
            IncompatibleError: the named file has become another GPU's in the meantime.
        """
        measured = config.get_timing_cache()
        with locked(self.path):
            if self.path.exists():
                try:
                    present = self._from(config, self.path.read_bytes())
                    if not measured.combine(present, ignore_mismatch=False):
                        raise foreign(self.path)
                except IncompatibleError:
                    if self.named:
                        raise
            write_bytes(self.path, serialized(measured), replace=True)

    def _give(self, config: TensorRT.IBuilderConfig, data: bytes) -> None:
        if not config.set_timing_cache(self._from(config, data), ignore_mismatch=False):
            raise foreign(self.path)

    def _from(self, config: TensorRT.IBuilderConfig, data: bytes) -> TensorRT.ITimingCache:
        """A cache of the file's bytes, or an empty one of none.

        Of bytes that it cannot read the library is assumed to make an empty cache. RTX 1.7.1 made
        one of damaged bytes; it warns itself that its timing caches are no-ops.
        """
        cache = config.create_timing_cache(data)
        if cache is None or (data and is_empty(config, cache) and serialized(cache) != data):
            raise foreign(self.path)
        return cache


def is_empty(config: TensorRT.IBuilderConfig, cache: TensorRT.ITimingCache) -> bool:
    return serialized(cache) == serialized(config.create_timing_cache(b""))


def serialized(cache: TensorRT.ITimingCache) -> bytes:
    return bytes(memoryview(cache.serialize()))


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
