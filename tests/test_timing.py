"""Durations, and the products that they are held against."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcexport import timing
from lcexport.configs.dit import DiTConfig
from lcexport.timing import Products, mark, matrix_products, seconds_between, seconds_of, summary

CPU = torch.device("cpu")


def test_a_summary_of_seconds():
    assert summary([3.0, 1.0, 2.0, 10.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 0.0]) == {
        "min_seconds": 0.0, "median_seconds": 5.0, "p90_seconds": 9.0, "max_seconds": 10.0,
        "runs": 11,
    }  # fmt: skip


def test_a_run_is_run_once_and_takes_time():
    ran: list[int] = []
    assert seconds_of(lambda: ran.append(1), CPU) > 0
    assert ran == [1]
    begin = mark(CPU)
    assert seconds_between(begin, mark(CPU)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_the_models_own_by_every_library_that_a_backend_uses(monkeypatch, dtype):
    monkeypatch.setattr(timing, "PRODUCTS_PER_TRY", 3)
    config = DiTConfig(hidden_size=64, num_heads=2)
    wide = config.ffn_hidden
    sizes = ((64, 64), (64, wide), (wide, 64))
    libraries = ("mm", "linear") if dtype is torch.float32 else ("mm",)
    expected = [(library, *size) for size in sizes for library in libraries]
    for products, (library, inner, columns) in zip(
        matrix_products(config, 10, dtype, CPU), expected, strict=True
    ):
        with Recorded() as recorded:
            products.run()
        assert len(recorded.calls) == 3
        name, x, out = recorded.calls[0]
        assert library in name
        assert x == (10, inner)
        assert out == (10, columns)
        assert products.operations == 3 * 2 * 10 * inner * columns


class Recorded(TorchDispatchMode):
    """The products that torch is asked for: names, and shapes of their first input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if out.ndim == 2 and len(args) > 1:
            self.calls.append((str(func), tuple(args[0].shape), tuple(out.shape)))
        return out


def test_more_rows_than_fit_are_not_multiplied():
    config = DiTConfig(hidden_size=2, num_heads=1)
    few, many = (
        [one.operations for one in matrix_products(config, rows, torch.float32, CPU)]
        for rows in (timing.MOST_ROWS, timing.MOST_ROWS + 1)
    )
    assert few == many


def test_operations_per_second(monkeypatch):
    monkeypatch.setattr(timing, "seconds_of", lambda run, device: 2.0)
    assert Products(lambda: None, 10).per_second(CPU) == pytest.approx(5.0)
