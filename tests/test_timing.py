"""Durations, and the products that they are held against."""

import pytest
import torch

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


def test_products_are_the_models_own(monkeypatch):
    monkeypatch.setattr(timing, "PRODUCTS_PER_TRY", 3)
    shapes: list[tuple[int, int, int]] = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: shapes.append((*a.shape, b.shape[1])) or out)
    config = DiTConfig(hidden_size=64, num_heads=2)
    for products in matrix_products(config, 10, torch.float32, CPU):
        shapes.clear()
        products.run()
        assert len(shapes) == 3
        rows, inner, columns = shapes[0]
        assert rows == 10
        assert {inner, columns} <= {64, config.ffn_hidden}
        assert products.operations == 3 * 2 * rows * inner * columns


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
