"""Starting, memory and seams."""

import sys

import pytest

from lcexport.configs.errors import LcexportError
from lcexport.qualify import costs
from lcexport.qualify.cold import cold_start
from lcexport.qualify.costs import copy_bandwidth, crossing_bytes, run_cold, seams, size, start

SIZE = "64x96x9"


def test_a_new_process_starts_the_engine(subject_of, pair_bundle):
    begun, memory = start(subject_of(pair_bundle))
    assert set(begun.got) == {
        "process_to_first_run_seconds", "open_seconds", "first_run_seconds", "warm_open_seconds",
    }  # fmt: skip
    inside = begun.got["open_seconds"] + begun.got["first_run_seconds"]  # pyright: ignore[reportOperatorIssue]
    assert begun.got["process_to_first_run_seconds"] > inside
    assert set(memory.got) == {"host_peak_bytes", "weights_file_bytes"}
    assert memory.got["host_peak_bytes"] > memory.got["weights_file_bytes"]  # pyright: ignore[reportOperatorIssue]


def test_the_process_that_starts_cold_runs_the_engine(pair_bundle):
    got = cold_start(str(pair_bundle), SIZE, "onnxruntime", "cpu")
    assert all(value > 0 for value in got.values())


def test_a_process_that_fails_says_why(monkeypatch, subject_of, pair_bundle):
    script = "raise SystemExit('IntegrityError: a plan is missing')"
    monkeypatch.setattr(costs, "COMMAND", (sys.executable, "-c", script))
    with pytest.raises(LcexportError, match=r"status 1: IntegrityError: a plan is missing"):
        run_cold(subject_of(pair_bundle))


def test_seams_are_counted_from_the_manifest(subject_of, double_bundle):
    subject = subject_of(double_bundle, "tensorrt")
    (result,) = seams(subject)
    batch, tokens, size, text_tokens, frames = 2, 72, 256, 512, 3
    x, text = batch * tokens * size * 4, batch * text_tokens * size * 4
    time, table = batch * frames * 64 * 4, tokens * 64 * 4
    crossing = x + text + time + 2 * table
    assert result.got == {"segments": 2, "bytes_written": crossing, "bytes_read": crossing}


def test_the_inputs_and_the_velocity_do_not_cross(subject_of, double_bundle):
    record = subject_of(double_bundle, "tensorrt").engine_record
    assert record is not None
    alone = record.model_copy(update={"plans": record.plans[:1]})
    assert crossing_bytes(alone) == (0, 0)


def test_blocks_that_are_one_plan_hand_their_tokens_on(subject_of, shared_bundle):
    record = subject_of(shared_bundle, "tensorrt").engine_record
    written, read = crossing_bytes(record)
    tokens = next(tensor for tensor in record.plans[1].inputs if tensor.name == "x")
    depth = sum(call.plan == 1 for call in record.calls)
    others = [tensor for tensor in record.plans[0].outputs if tensor.name != tokens.name]
    once = sum(map(size, others))
    time = next(size(tensor) for tensor in others if tensor.name == "time")
    assert written == (depth + 1) * size(tokens) + once
    assert read == (depth + 1) * size(tokens) + depth * once + time


def test_an_engine_in_one_piece_has_no_seams(subject_of, pair_bundle):
    (result,) = seams(subject_of(pair_bundle))
    assert result.verdict == "not tested"


def test_bandwidth_counts_reading_and_writing(monkeypatch, subject_of, pair_bundle):
    monkeypatch.setattr(costs, "COPY_BYTES", 1000)
    monkeypatch.setattr(costs, "seconds_of", lambda run, device: (run(), 0.5)[1])
    assert copy_bandwidth(subject_of(pair_bundle).device) == 4000.0
