"""Latency, without a word about how fast this machine is."""

from typing import Any

import pytest
import torch

from lcexport.flops import forward_flops
from lcexport.qualify import speed
from lcexport.qualify.speed import (
    Timed,
    arithmetic,
    latency,
    take_turns,
    time_all,
    torch_runs,
)
from lcexport.qualify.subject import Subject


def test_contestants_take_turns(monkeypatch):
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in ("engine", "eager")}
    seconds = take_turns(runs, torch.device("cpu"))
    assert order == ["engine", "eager"] * (speed.WARM_UPS + speed.FEWEST_ROUNDS)
    assert {name: len(row) for name, row in seconds.items()} == {"engine": 2, "eager": 2}


def test_rounds_follow_the_time_there_is(monkeypatch):
    monkeypatch.setattr(speed, "seconds_of", lambda run, device: 1.0)
    for budget, rounds in ((0.0, 2), (20.0, 20), (1000.0, speed.MOST_ROUNDS)):
        monkeypatch.setattr(speed, "TIMED_SECONDS", budget)
        assert len(take_turns({"engine": lambda: None}, torch.device("cpu"))["engine"]) == rounds


def test_all_three_are_timed_in_turn(subject_of, pair_bundle):
    timed = time_all(subject_of(pair_bundle))
    assert list(timed.seconds) == ["engine", "eager", "torch.compile"]
    assert timed.order == "in turn"
    assert all(second > 0 for row in timed.seconds.values() for second in row)


def test_where_memory_is_short_one_is_freed_before_the_other(monkeypatch, subject_of, pair_bundle):
    monkeypatch.setattr(Subject, "free_bytes", lambda self: 0)
    opened: list[str] = []
    real = speed.release
    monkeypatch.setattr(speed, "release", lambda: (opened.append("freed"), real()))
    timed = time_all(subject_of(pair_bundle))
    assert timed.order.startswith("one after another")
    assert opened == ["freed", "freed"]
    assert list(timed.seconds) == ["engine", "eager", "torch.compile"]


def test_a_torch_compile_that_fails_is_not_tested(monkeypatch, subject_of, pair_bundle):
    def broken(module: object) -> Any:
        def call(*given: object, **named: object) -> None:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nset CXX")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    eager, compiled, share = latency(subject_of(pair_bundle))
    assert eager.verdict == "measured"
    assert compiled.verdict == "not tested"
    assert compiled.why.endswith("RuntimeError: InvalidCxxCompiler: no working C++ compiler")
    assert share.got["share"] > 0  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize(
    ("engine", "verdict"), [(1.0, "proven"), (2.0, "refuted"), (3.0, "refuted")]
)
def test_speed_is_claimed_of_compiled_engines_on_gpus(
    monkeypatch, subject_of, double_bundle, engine, verdict
):
    seconds = {"engine": [engine] * 7, "eager": [2.0] * 7, "torch.compile": [2.0] * 7}
    monkeypatch.setattr(speed, "time_all", lambda subject: Timed(seconds, "in turn"))
    subject = subject_of(double_bundle, "tensorrt")
    assert [result.verdict for result in latency(subject)] == ["measured"] * 3
    monkeypatch.setattr(Subject, "on_gpu", True)
    assert [result.verdict for result in latency(subject)] == [verdict, verdict, "measured"]


def test_operations_are_those_of_the_whole_batch(subject_of, pair_bundle):
    subject = subject_of(pair_bundle)
    preset = subject.record.preset
    flops = forward_flops(subject.config, preset.latent_frames, preset.tokens, preset.text_tokens)
    got = arithmetic(subject, 2.0).got
    assert got["operations"] == 2 * flops.total
    assert got["tflops"] == pytest.approx(flops.total / 1e12)
    assert got["share"] == pytest.approx(got["tflops"] / got["matrix_product_tflops"])  # pyright: ignore[reportOperatorIssue]


@pytest.mark.slow
def test_torch_compiles_the_module_or_a_reason_is_kept(monkeypatch, subject_of, demo_bundle):
    monkeypatch.undo()  # the real torch.compile
    missing: dict[str, str] = {}
    with torch_runs(subject_of(demo_bundle), missing) as runs:
        for run in runs.values():
            run()
    assert {*runs, *missing} == {"eager", "torch.compile"}


def test_eager_is_not_compared_with_itself(subject_of, pair_bundle):
    eager, compiled, _ = latency(subject_of(pair_bundle, "eager"))
    assert [eager.verdict, compiled.verdict] == ["not tested"] * 2
