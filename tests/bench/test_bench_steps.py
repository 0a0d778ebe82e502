"""Steps in turn, each engine's runs apart from what is around them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcexport.bench import steps
from lcexport.bench.steps import grouped, measure_steps, take_turns
from lcexport.bench.subject import subject_from


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)


def test_contestants_take_turns_and_another_is_first_each_time(monkeypatch):
    order: list[str] = []
    contestant = SimpleNamespace(dtype=torch.float32)
    rivals: Any = [
        SimpleNamespace(contestant=contestant, sample=lambda plan, name=name: order.append(name))
        for name in "abc"
    ]
    rate = SimpleNamespace(per_second=lambda device: order.append("product") or 7.0)
    monkeypatch.setattr(steps, "products_of", lambda subject, dtype: [rate])
    subject: Any = SimpleNamespace(device=torch.device("cpu"))
    rates = take_turns(rivals, subject, 2, 4, None)
    turns = [["product", *turn] for turn in ("abc", "bca", "cab", "abc")]
    assert order == [name for turn in turns for name in turn]
    assert rates == {torch.float32: [7.0] * 4}


def test_every_step_of_every_contestant_is_kept(demo_bundle, pair):
    subject = subject_from([demo_bundle, pair], "cpu", ["eager", "compile"])
    turns: list[tuple[int, int]] = []
    found, order = measure_steps(subject, 2, 3, lambda done, of: turns.append((done, of)))
    assert order == "in turn"
    assert turns == [(1, 3), (2, 3), (3, 3)]
    assert list(found) == ["bundle:eager", "bundle:compile", "pair:eager", "pair:compile"]
    runs = {name: one["engine_runs_per_step"] for name, one in found.items()}
    assert list(runs.values()) == [2, 2, 1, 1]  # a batch of two takes both branches at once
    for one in found.values():
        kept: Any = one
        assert len(kept["step_seconds"]) == kept["step"]["runs"] == 6
        assert all(
            step > inside > 0
            for step, inside in zip(
                (kept["step"]["min_seconds"], kept["step"]["max_seconds"]),
                (kept["engine"]["min_seconds"], kept["engine"]["max_seconds"]),
                strict=True,
            )
        )
        rate = subject.flops.total * 2 / kept["engine"]["median_seconds"]
        assert kept["operations_per_second"] == pytest.approx(rate)
        peak = kept["matrix_product_operations_per_second"]
        assert kept["share_of_matrix_products"] == pytest.approx(rate / peak)


@pytest.mark.parametrize(
    ("task", "runs"), [("i2v", 2), ("vc", 2), ("vc-uncached", 2), ("refine", 1)]
)
def test_steps_of_every_kind_of_start(task_bundle, task, runs):
    subject = subject_from([task_bundle], "cpu", ["eager"], task=task)
    found, _ = measure_steps(subject, 1, 1)
    assert found["eager"]["engine_runs_per_step"] == subject.branches == runs


def test_torch_compile_shares_the_weights_of_eager(demo_bundle):
    subject = subject_from([demo_bundle], "cpu", ["eager", "compile"])
    eager, compiled = subject.contestants
    with eager.open(subject.device) as first, compiled.open(subject.device, first) as second:
        theirs, ours = (engine.dit.state_dict() for engine in (first, second))  # pyright: ignore[reportAttributeAccessIssue]
        assert theirs.keys() == ours.keys()
        assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in theirs)


def test_where_the_memory_does_not_hold_all_each_is_on_its_own(demo_bundle, monkeypatch):
    subject = subject_from([demo_bundle], "cpu", ["onnxruntime", "eager"])
    assert [len(group) for group in grouped(subject)] == [2]
    monkeypatch.setattr(steps, "available_memory_bytes", lambda: 0)
    assert [len(group) for group in grouped(subject)] == [1, 1]
    found, order = measure_steps(subject, 1, 1)
    assert order.startswith("one after another")
    assert list(found) == ["onnxruntime", "eager"]
