"""Bisecting names the block that was damaged, and no other before it."""

import importlib.util
from types import SimpleNamespace
from typing import cast

import double
import onnx_ir as ir
import pytest
import torch

from lcexport.builder import BuildOptions, build
from lcexport.configs.errors import BuildError, IncompatibleError
from lcexport.configs.presets import preset_from
from lcexport.configs.tasks import jobs_for
from lcexport.engines.trt.product import open_product
from lcexport.graph.segments import segment_graph
from lcexport.qualify import bisect, marked
from lcexport.qualify.claims import results_of
from lcexport.qualify.subject import Subject

(CHECK,) = bisect.CHECKS


@pytest.mark.usefixtures("polygraphy")
def test_a_sound_graph_has_no_block_outside(subject_of, pair_bundle):
    (result,) = results_of(CHECK, subject_of(pair_bundle))
    assert result.verdict == "proven", result
    rows = [name for name in result.got if name != "first_outside"]
    assert rows == ["embed.x", *(f"blocks.{i}.x_next" for i in range(4)), "velocity"]


@pytest.mark.usefixtures("polygraphy")
def test_the_first_damaged_block_is_named(subject_of, pair_bundle, damaged):
    (result,) = results_of(CHECK, subject_of(damaged(pair_bundle)))
    assert result.verdict == "refuted", result
    assert result.got["first_outside"] == "blocks.1.x_next"
    assert "blocks.1.x_next" in result.why


@pytest.mark.usefixtures("polygraphy")
def test_plans_are_bisected_segment_by_segment(subject_of, double_bundle, damaged, the_double):
    (result,) = results_of(CHECK, subject_of(double_bundle, "tensorrt"))
    assert result.verdict == "proven", result
    (result,) = results_of(CHECK, subject_of(damaged(double_bundle), "tensorrt"))
    assert result.got["first_outside"] == "blocks.1.x_next"
    assert the_double.destroyed.count("ICudaEngine") == 4  # two each time, and all are gone


@pytest.mark.usefixtures("polygraphy")
def test_nothing_is_left_of_the_plans(subject_of, double_bundle, the_double, tmp_path):
    results_of(CHECK, subject_of(double_bundle, "tensorrt"))
    assert list(tmp_path.iterdir()) == []


def test_plans_are_compiled_on_the_gpu_in_question(
    subject_of, double_bundle, the_double, monkeypatch, tmp_path
):
    asked = []

    def compile_graph(*arguments, gpu):
        asked.append(gpu)
        double.compile_graph(*arguments, gpu=gpu)

    monkeypatch.setattr(marked, "compile_graph", compile_graph)
    monkeypatch.setattr(marked, "gpu_of", lambda device: f"GPU of {device}")
    subject = subject_of(double_bundle, "tensorrt", "cuda:1")
    model = ir.load(subject.bundle.path(subject.record.file))
    assert len(list(marked.compiled(subject, model, tmp_path))) == 2
    assert asked == ["GPU of cuda:1"] * 2


def test_every_task_is_held_against_its_own_attentions(make_graph):
    path = make_graph("bf16", batch=1, frames=3, cond=1)
    (segment,) = segment_graph(ir.load(path), 1)
    (job,) = jobs_for(preset_from("demo"), "i2v")
    wanted = marked.expected(segment, torch.bfloat16, job)
    assert wanted.attentions == 3 * job.attentions == 9
    with pytest.raises(BuildError, match="precision policy"):
        marked.expected(segment, torch.bfloat16, job.model_copy(update={"num_cond_latents": 0}))


@pytest.mark.slow
def test_a_real_compiler_takes_the_marked_graph(subject_of, demo_options: BuildOptions, tmp_path):
    try:
        open_product("tensorrt-rtx")
    except IncompatibleError as error:
        pytest.skip(str(error))
    output = tmp_path / "rtx"
    changes = {"output": output, "precision": "bf16", "only": "compile", "segments": 2}
    build(demo_options.model_copy(update={**changes, "backends": ("tensorrt-rtx",)}))
    subject = subject_of(output, "tensorrt-rtx")
    model = ir.load(subject.bundle.path(subject.record.file))
    names = bisect.mark_calls(model)
    plans = list(marked.compiled(subject, model, tmp_path))
    assert len(names) == 6
    assert [plan.bytes > 0 for plan in plans] == [True, True]


def test_what_cannot_be_bisected_is_not_tested(subject_of, pair_bundle, monkeypatch):
    def why(subject) -> str:
        (result,) = results_of(CHECK, subject)
        assert result.verdict == "not tested"
        return result.why

    assert "eager" in why(subject_of(pair_bundle, "eager"))
    assert why(subject_of(pair_bundle, "aotinductor")) == (
        "only ONNX Runtime and TensorRT are bisected"
    )
    low = subject_of(pair_bundle)
    low.bundle.manifest = low.bundle.manifest.model_copy(update={"precision": "bf16"})
    assert "bisect an fp32 bundle" in why(low)
    plugin = SimpleNamespace(calls=(), options={"sparse_kernel": "plugin"})
    of_plugin = SimpleNamespace(backend="tensorrt", engine_record=plugin)
    assert "is a plugin" in bisect.obstacle(cast(Subject, of_plugin))
    monkeypatch.setattr(bisect, "available_memory_bytes", lambda: 1000)
    assert "smaller resolution" in why(subject_of(pair_bundle))


def test_polygraphy_that_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(IncompatibleError, match=r"not installed.*lcexport\[debug\]"):
        bisect.require_polygraphy()


@pytest.mark.parametrize(("version", "fits"), [("0.49.26", False), ("0.53.0", True), ("1.0", True)])
def test_polygraphy_that_is_too_old(monkeypatch, version, fits):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(bisect, "version", lambda name: version)
    if fits:
        bisect.require_polygraphy()
    else:
        with pytest.raises(IncompatibleError, match=r"too old; got 0.49.26; wanted 0.53 or newer"):
            bisect.require_polygraphy()
