"""How long each stage took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Put the block's duration in seconds into `timings`."""
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started
