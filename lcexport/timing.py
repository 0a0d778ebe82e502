"""How long something takes on its device, and how fast the device multiplies matrices."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lcexport.configs.dit import DiTConfig

PRODUCTS_PER_TRY = 10
MOST_ROWS = 8192

Run = Callable[[], object]
Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """This moment: on a GPU, in the order of the work that was queued there."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """Seconds from one mark to another; on a GPU it waits until the second is reached."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def seconds_of(run: Run, device: torch.device) -> float:
    """How long a run takes on its device: by events on a GPU, by the clock on a processor."""
    begin = mark(device)
    run()
    return seconds_between(begin, mark(device))


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Least, median, 90th percentile and most of some seconds, and how many there were."""
    ordered = sorted(seconds)
    return {
        "min_seconds": ordered[0],
        "median_seconds": statistics.median(ordered),
        "p90_seconds": ordered[int(0.9 * (len(ordered) - 1) + 0.5)],
        "max_seconds": ordered[-1],
        "runs": len(ordered),
    }


@dataclass(frozen=True)
class Products:
    """Several products of two matrices, and their operations."""

    run: Run
    operations: int

    def per_second(self, device: torch.device) -> float:
        """Operations per second of one try."""
        return self.operations / seconds_of(self.run, device)


def matrix_products(
    config: DiTConfig, rows: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Products]:
    """The model's own large products, for as many rows as they are still the model's.

    In float32 on a processor each by torch and by oneDNN: which is the faster depends on the
    processor, and backends use one or the other.
    """
    rows = min(rows, MOST_ROWS)
    size, wide = config.hidden_size, config.ffn_hidden
    onednn = (
        dtype is torch.float32 and device.type == "cpu" and torch.backends.mkldnn.is_available()
    )
    for inner, columns in ((size, size), (size, wide), (wide, size)):
        x = torch.randn(rows, inner, device=device).to(dtype)
        weight = torch.randn(columns, inner, device=device).to(dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        operations = 2 * rows * inner * columns
        yield repeated(partial(torch.mm, x, weight.t(), out=out), operations)
        if onednn:
            linear = torch.ops.mkldnn._linear_pointwise
            yield repeated(partial(linear, x, weight, None, "none", [], ""), operations)


def repeated(product: Run, operations: int) -> Products:
    """One product several times over."""

    def run() -> None:
        for _ in range(PRODUCTS_PER_TRY):
            product()

    return Products(run, PRODUCTS_PER_TRY * operations)
