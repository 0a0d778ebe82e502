"""Steps in turn, each engine's runs apart from what is around them."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcexport.bench import steps
from lcexport.bench.steps import ROOM, grouped, held_bytes, measure_steps, take_turns
from lcexport.bench.subject import subject_from
from lcexport.builder.plan import weights_bytes
from lcexport.engines.manifest import WEIGHTS, FileRecord


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)


def test_contestants_take_turns_and_another_is_first_each_time(monkeypatch):
    order: list[str] = []
    rivals: Any = [
        SimpleNamespace(
            contestant=SimpleNamespace(dtype=torch.float32, graph=SimpleNamespace(batch=batch)),
            sample=lambda plan, name=name: order.append(name),
        )
        for name, batch in zip("abc", (1, 2, 1), strict=True)
    ]
    rate = SimpleNamespace(per_second=lambda device: order.append("product") or 7.0)
    batches: list[int] = []

    def products_of(subject, dtype, batch):
        batches.append(batch)
        return [rate]

    monkeypatch.setattr(steps, "products_of", products_of)
    subject: Any = SimpleNamespace(device=torch.device("cpu"))
    rates = take_turns(rivals, subject, 2, 4, None)
    turns = [["product", *turn] for turn in ("abc", "bca", "cab", "abc")]
    assert order == [name for turn in turns for name in turn]
    assert rates == {torch.float32: [7.0] * 4}
    assert batches == [2]  # the peak at the rows of the largest


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


def test_one_after_another_the_weights_of_one_are_gone_before_the_next(
    demo_bundle, pair, monkeypatch
):
    subject = subject_from([demo_bundle, pair], "cpu", ["eager"])
    monkeypatch.setattr(steps, "available_memory_bytes", lambda: 0)
    weights: list[weakref.ref[torch.Tensor]] = []
    real = steps.opened

    def opened(*given):
        assert all(ref() is None for ref in weights)
        steppers = real(*given)
        (engine,) = (stepper.engine._engine for stepper in steppers)
        weights.append(weakref.ref(next(engine.dit.parameters())))  # pyright: ignore[reportAttributeAccessIssue]
        return steppers

    monkeypatch.setattr(steps, "opened", opened)
    measure_steps(subject, 1, 1)
    assert [ref() for ref in weights] == [None, None]


def test_a_closed_eager_engine_keeps_no_weights(demo_bundle):
    (eager,) = subject_from([demo_bundle], "cpu", ["eager"]).contestants
    engine: Any = eager.open(torch.device("cpu"))
    weights = weakref.ref(next(engine.dit.parameters()))
    engine.close()
    assert weights() is None
    with eager.open(torch.device("cpu"), engine) as again:  # and none are taken over from it
        assert again.dit is not None  # pyright: ignore[reportAttributeAccessIssue]


def test_weights_count_as_each_backend_holds_them(demo_bundle, pair):
    def held(folders, backends) -> int:
        return held_bytes(subject_from(folders, "cpu", backends))

    subject = subject_from([demo_bundle], "cpu", ["eager"])
    (one,) = subject.contestants
    whole = weights_bytes(subject.config, "fp32")
    assert held([demo_bundle], ["eager"]) == held([demo_bundle], ["compile"]) == whole
    assert held([demo_bundle], ["eager", "compile"]) == whole  # shared
    assert held([demo_bundle], ["compile", "eager"]) == 2 * whole  # each has its own
    assert held([demo_bundle, pair], ["eager"]) == 2 * whole
    assert held([demo_bundle], ["onnxruntime"]) == 2 * one.weights_bytes
    assert ROOM > 1


def test_int8_weights_count_as_what_eager_torch_makes_of_them(demo_bundle):
    subject = subject_from([demo_bundle], "cpu", ["eager"])
    (one,) = subject.contestants
    bundle = one.bundle
    small = bundle.manifest.files | {WEIGHTS: FileRecord(bytes=10, sha256="0" * 64)}
    bundle.manifest = bundle.manifest.model_copy(update={"files": small, "weights_dtype": "int8"})
    assert one.weights_bytes == 10
    assert held_bytes(subject) == weights_bytes(subject.config, "fp32")
