"""Bits are compared as bits, and an engine that is not exact is refuted."""

import math
from collections.abc import Callable, Mapping
from typing import Self

import pytest
import torch

from lcexport.engines import Engine, TensorSpec
from lcexport.engines.trt.runtime import TrtEngine
from lcexport.qualify.exactness import (
    differing,
    identical_rows,
    refit,
    refittable,
    repeatable,
)
from lcexport.qualify.subject import Subject


class Fake:
    """An engine whose output is a function of how often it ran and of its first input."""

    backend = "fake"
    device = torch.device("cpu")

    def __init__(self, real: Engine, compute: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        self.inputs: tuple[TensorSpec, ...] = real.inputs
        self.outputs: tuple[TensorSpec, ...] = real.outputs
        self.compute, self.runs = compute, 0

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        self.runs += 1
        outputs["velocity"].copy_(self.compute(self.runs, inputs["encoder_hidden_states"].sum()))

    def close(self) -> None:
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.fixture
def faked(monkeypatch, subject_of, pair_bundle):
    """`faked(compute)`: the subject, with an engine that computes that."""

    def make(compute: Callable[[int, torch.Tensor], torch.Tensor]) -> Subject:
        subject = subject_of(pair_bundle)
        with subject.open() as real:
            engine = Fake(real, compute)
        monkeypatch.setattr(Subject, "open", lambda self: engine)
        return subject

    return make


def test_bits_are_compared_not_values():
    zero, two = torch.zeros(2), torch.tensor([2.0, 3.0])
    assert differing(two, two.clone()) == 0
    assert differing(-zero, zero) == 2
    assert differing(torch.nextafter(two, 2 * two), two) == 2
    missing = torch.tensor([math.nan, 3.0])
    assert differing(missing, missing.clone()) == 1  # equal, and still no result


def test_rows_that_differ_are_refuted(faked):
    rows = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
    (result,) = identical_rows(faked(lambda run, x: rows + x))
    assert result.verdict == "refuted"
    assert result.got["differing"][0] == 0  # pyright: ignore[reportIndexIssue]
    assert result.got["differing"][1] > 0  # pyright: ignore[reportIndexIssue]


def test_a_batch_of_one_has_no_rows_to_compare(subject_of, demo_bundle):
    (result,) = identical_rows(subject_of(demo_bundle))
    assert result.verdict == "not tested"
    assert "batch is 1" in result.why


@pytest.mark.parametrize("late", [2, 4])
def test_a_run_that_differs_is_refuted(faked, late):
    (result,) = repeatable(faked(lambda run, x: x + (run >= late)))
    assert result.verdict == "refuted"
    assert bool(result.got["second_run"]) == (late == 2)
    assert result.got["after_other_input"] != 0


def test_an_engine_that_ignores_its_input_proves_nothing(faked):
    (result,) = repeatable(faked(lambda run, x: torch.ones(())))
    assert result.verdict == "refuted"
    assert "another input gave the same output" in result.why


@pytest.mark.parametrize("kind", ["double_bundle", "shared_bundle"])
def test_weights_are_exchanged_and_put_back(request, subject_of, the_double, kind):
    (result,) = refit(subject_of(request.getfixturevalue(kind), "tensorrt"))
    assert result.verdict == "proven"
    assert list(result.got) == ["blocks.2.ffn.w2.weight", "final_layer.proj.weight"]
    for row in result.got.values():
        assert isinstance(row, dict)
        assert row["changed"] > 0
        assert row["differing_after"] == 0


@pytest.mark.parametrize("wish", ["refit", "strip_plan"])
def test_both_options_make_plans_that_can_be_refitted(subject_of, double_bundle, wish):
    record = subject_of(double_bundle, "tensorrt").engine_record
    for value in (True, False):
        options = {"refit": False, "strip_plan": False, wish: value}
        assert refittable(record.model_copy(update={"options": options})) is value


@pytest.mark.parametrize("effective", [{1}, {2, 4}])
def test_a_refit_that_does_nothing_is_refuted(
    monkeypatch, subject_of, double_bundle, the_double, effective
):
    """Of other, own, other, own: nothing is put back, or nothing is ever exchanged."""
    real, calls = TrtEngine.refit, []

    def lazy(self, weights):
        calls.append(weights)
        if len(calls) in effective:
            real(self, weights)

    monkeypatch.setattr(TrtEngine, "refit", lazy)
    (result,) = refit(subject_of(double_bundle, "tensorrt"))
    assert len(calls) == 4
    assert result.verdict == "refuted"


def test_what_cannot_be_refitted_is_not_tested(subject_of, pair_bundle):
    (result,) = refit(subject_of(pair_bundle))
    assert (result.verdict, result.why) == ("not tested", "built without refitting")
