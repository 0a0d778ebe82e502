"""Bundles to measure, and figures that were not measured."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcexport import cli
from lcexport.bench import run as bench_run
from lcexport.builder import BuildOptions, build
from lcexport.configs.presets import preset_from

SECONDS = {"min_seconds": 1.0, "median_seconds": 2.0, "p90_seconds": 3.0, "max_seconds": 4.0}
STEPS = {
    "step": {**SECONDS, "runs": 2},
    "step_seconds": [1.0, 3.0],
    "engine": {**SECONDS, "runs": 2},
    "engine_runs_per_step": 2,
    "outside": {**SECONDS, "runs": 2},
    "outside_share": 0.004,
    "operations_per_second": 5e11,
    "matrix_product_operations_per_second": 1e12,
    "matrix_product_median_per_second": 9e11,
    "share_of_matrix_products": 0.5,
}
SERVED = {
    "load_seconds": 5.0,
    "cold_start_seconds": 9.0,
    "text": {**SECONDS, "runs": 2},
    "decode": {**SECONDS, "runs": 2},
    "requests": {**SECONDS, "runs": 2},
    "requests_per_hour": 1800.0,
    "host_peak_bytes": 700_000_000,
}


@pytest.fixture(scope="session")
def pair(demo_options: BuildOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `demo_bundle`, with both branches in one call; exported only. Read only."""
    output = tmp_path_factory.mktemp("pair") / "pair"
    build(demo_options.model_copy(update={"output": output, "batch": 2, "only": "export"}))
    return output


@pytest.fixture(scope="session")
def task_bundle(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demo checkpoint for every kind of start; exported only. Read only."""
    options = BuildOptions(
        model=demo_checkpoint,
        output=tmp_path_factory.mktemp("tasks") / "bundle",
        presets=(preset_from("64x96x9"),),
        tasks=("t2v", "i2v", "vc", "vc-uncached", "refine", "spatial-i2v"),
        cond_frames=5,
        refine_size=(64, 96),
        only="export",
    )
    return build(options).folder


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is measured: figures are made up; the list says whose, as they are asked for."""
    asked: list[str] = []

    def steps(subject, *given):
        asked.extend(contestant.name for contestant in subject.contestants)
        found = {contestant.name: copy.deepcopy(STEPS) for contestant in subject.contestants}
        return found, "in turn"

    monkeypatch.setattr(bench_run, "measure_steps", steps)
    monkeypatch.setattr(bench_run, "served", lambda *given: copy.deepcopy(SERVED))
    return asked


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """`run("bench", ...)` -> (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcexport", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        streams = capsys.readouterr()
        code: Any = exit_.value.code
        return code or 0, streams.out, streams.err

    return call
