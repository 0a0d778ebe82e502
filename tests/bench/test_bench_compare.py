"""A run against an earlier one."""

import copy
import json
from typing import Any

import pytest

from lcexport.bench.compare import changes, check_comparable, limit_from, read_old
from lcexport.configs.errors import IncompatibleError, InputError, UsageError

OLD = {
    "schema_version": 1,
    "kind": "bench",
    "device": {"type": "cpu", "name": "a processor", "torch_threads": 2},
    "subject": {"task": "t2v", "tokens": 72},
    "options": {"steps": 2},
    "contestants": [
        {
            "name": "eager", "backend": "eager", "batch": 1, "precision": "fp32",
            "weights_dtype": "bulk", "step": {"median_seconds": 2.0}, "host_peak_bytes": 1000,
            "text": {"median_seconds": 0.5}, "cold_start_seconds": 3.0,
        }
    ],
}  # fmt: skip


def changed(*path: str | int, to: object) -> dict:
    new = copy.deepcopy(OLD)
    inner: Any = new
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return new


def test_equal_runs_have_no_regression():
    found = changes(OLD, copy.deepcopy(OLD), 0.0)
    assert [change.metric for change in found] == ["step", "text", "host memory"]
    assert [change.change for change in found] == [0, 0, 0]
    assert not any(change.regressed for change in found)


@pytest.mark.parametrize(("seconds", "regressed"), [(2.15, False), (2.17, True), (1.0, False)])
def test_more_than_the_limit_is_a_regression(seconds, regressed):
    new = changed("contestants", 0, "step", "median_seconds", to=seconds)
    step = changes(OLD, new, 0.08)[0]
    assert (step.old, step.new) == (2.0, seconds)
    assert step.change == pytest.approx(seconds / 2 - 1)
    assert step.regressed is regressed


def test_a_single_reading_is_no_regression():
    new = changed("contestants", 0, "cold_start_seconds", to=300.0)
    assert not any(change.regressed for change in changes(OLD, new, 0.08))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("device", "name"), "another", "another device; got name a processor"),
        (("device", "torch_threads"), 8, "another device; got torch_threads 2"),
        (("subject", "tokens"), 480, "another subject; got tokens 72"),
        (("options", "steps"), 3, "another options; got steps 2"),
        (("contestants", 0, "name"), "onnxruntime", "none of these contestants"),
        (("contestants", 0, "batch"), 2, "eager is not what it was.*got batch 1"),
    ],
)
def test_runs_that_cannot_be_compared(path, value, said):
    check_comparable(OLD, copy.deepcopy(OLD))
    with pytest.raises(IncompatibleError, match=said):
        check_comparable(OLD, changed(*path, to=value))


def test_an_earlier_run_is_read(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(OLD))
    assert read_old(tmp_path / "old.json", 1) == OLD
    with pytest.raises(IncompatibleError, match=r"another schema version; got 1; wanted 2"):
        read_old(tmp_path / "old.json", 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not what `lcexport bench --json` prints"),
        ('{"schema_version": 1}', "not what `lcexport bench --json` prints"),
        ('{"schema_version": 1, "kind": "bench"}', "not whole; got no device"),
        (json.dumps(OLD | {"contestants": [1]}), "not whole; got a contestant without a name"),
        (json.dumps(OLD | {"contestants": [{"name": []}]}), "a contestant without a name"),
    ],
)
def test_a_file_that_is_no_earlier_run(tmp_path, text, said):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(InputError, match=said):
        read_old(tmp_path / "old.json", 1)


def test_an_earlier_run_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_old(tmp_path / "nothing.json", 1)


@pytest.mark.parametrize(("text", "share"), [("8%", 0.08), ("8", 0.08), (" 2.5 %", 0.025)])
def test_a_limit_is_a_percentage(text, share):
    assert limit_from(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "eight", "-8%", "nan", "8%%", "1e3"])
def test_a_limit_that_is_none(text):
    with pytest.raises(UsageError, match="not a limit"):
        limit_from(text)


@pytest.mark.parametrize("seconds", [0, "2", None, float("nan")])
def test_an_earlier_run_without_figures_is_refused_before_anything_is_measured(seconds):
    bare = changed("contestants", 0, "step", to={"median_seconds": seconds})
    bare["contestants"][0].update(text={}, host_peak_bytes=seconds)
    with pytest.raises(InputError, match="no figures of eager"):
        check_comparable(bare, OLD)


def test_no_figure_in_common_is_no_pass():
    new = changed("contestants", 0, "step", to={})
    new["contestants"][0].update(text={}, host_peak_bytes=None)
    with pytest.raises(IncompatibleError, match="no figure in common"):
        changes(OLD, new, 0.08)
