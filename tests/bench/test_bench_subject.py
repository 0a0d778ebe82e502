"""Who is measured, and what is refused before anybody is."""

from dataclasses import replace

import pytest
import torch

from lcexport.bench.subject import Subject, check_alike, subject_from
from lcexport.configs.dit import BlockSparseParams, DiTConfig
from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.configs.tasks import jobs_for
from lcexport.engines.manifest import WEIGHTS, EngineRecord, FileRecord
from lcexport.flops import forward_flops, job_flops, share_saved
from lcexport.qualify import run as qualify_run


def test_contestants_are_backends_of_bundles(demo_bundle, pair):
    one = subject_from([demo_bundle], "cpu", ["onnxruntime", "eager", "compile"])
    assert [c.name for c in one.contestants] == ["onnxruntime", "eager", "compile"]
    two = subject_from([demo_bundle, pair], "cpu", ["onnxruntime"])
    assert [c.name for c in two.contestants] == ["bundle:onnxruntime", "pair:onnxruntime"]
    assert [c.facts()["batch"] for c in two.contestants] == [1, 2]


def test_by_default_the_bundles_engine_beside_eager_torch(demo_bundle):
    subject = subject_from([demo_bundle], "cpu")
    assert [c.backend for c in subject.contestants] == ["onnxruntime", "eager"]


@pytest.mark.parametrize(
    ("backends", "said"),
    [(["quantum"], "unknown backend"), (["eager", "eager"], "named twice")],
)
def test_backends_that_cannot_be(demo_bundle, backends, said):
    with pytest.raises(UsageError, match=said):
        subject_from([demo_bundle], "cpu", backends)


def test_a_size_or_a_task_that_the_bundle_lacks(demo_bundle):
    with pytest.raises(UsageError, match="not built for this"):
        subject_from([demo_bundle], "cpu", ["eager"], "480p")
    with pytest.raises(UsageError, match="not built for this"):
        subject_from([demo_bundle], "cpu", ["eager"], task="i2v")


def test_a_compiled_backend_without_plans(demo_bundle, monkeypatch):
    monkeypatch.setattr(qualify_run, "require_backend", lambda *given: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"no tensorrt engine for 64x96x9.*--backend tensorrt"):
        subject_from([demo_bundle], "cuda", ["tensorrt"])
    with pytest.raises(UsageError, match="tensorrt"):
        subject_from([demo_bundle], "cuda", ["onnxruntime-tensorrt"])


def test_without_a_gpu_its_device_is_refused(demo_bundle):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(IncompatibleError, match="CUDA"):
        subject_from([demo_bundle], "cuda", ["eager"])


def test_contestants_must_do_the_same_work(demo_bundle):
    (one,) = subject_from([demo_bundle], "cpu", ["eager"]).contestants
    larger = one.graph.job.model_copy(update={"height": 128})
    other = replace(one, name="other", graph=one.graph.model_copy(update={"job": larger}))
    with pytest.raises(UsageError, match="do not do the same work"):
        check_alike([one, other])
    with pytest.raises(UsageError, match="two bundles have one name"):
        check_alike([one, one])


def test_operations_are_those_of_the_plan(demo_bundle):
    subject = subject_from([demo_bundle], "cpu", ["eager"])
    job = subject.job
    flops = forward_flops(subject.config, job.latent_frames, job.tokens, job.text_tokens)
    assert subject.flops == flops
    assert (subject.branches, subject.flops_saved) == (2, None)


def test_block_sparse_attention_saves_operations():
    config = DiTConfig(hidden_size=256, num_heads=2, depth=2, bsa_params=BlockSparseParams())
    preset = preset_from("64x64x13")
    (job,) = jobs_for(preset, "refine", refine_size=(128, 128), sparse=True)
    subject = Subject((), torch.device("cpu"), config, job)
    dense = job_flops(config, job.model_copy(update={"sparse": False}))
    assert subject.flops_saved == share_saved(dense, subject.flops)
    assert 0 < share_saved(dense, subject.flops) < 1
    assert subject.branches == 1  # a refinement has no guidance


def test_files_are_those_of_the_manifest(demo_bundle):
    (one,) = subject_from([demo_bundle], "cpu", ["onnxruntime"]).contestants
    files = one.files(torch.device("cpu"))
    assert files["weights_bytes"] == (demo_bundle / WEIGHTS).stat().st_size
    assert files["graph_bytes"] == (demo_bundle / "dit.64x96x9.ort.onnx").stat().st_size
    assert files["plans_bytes"] == 0
    assert files["total_bytes"] == sum(files.values()) - files["total_bytes"]


def test_the_graph_is_the_one_that_the_backend_opens(demo_bundle):
    contestants = subject_from(
        [demo_bundle], "cpu", ["onnxruntime", "eager", "compile"]
    ).contestants
    ort, *others = contestants
    on_gpu = ort.files(torch.device("cuda"))["graph_bytes"]
    assert on_gpu == (demo_bundle / "dit.64x96x9.onnx").stat().st_size
    none = (*others, replace(ort, backend="tensorrt"), replace(ort, backend="aotinductor"))
    assert [one.files(torch.device("cpu"))["graph_bytes"] for one in none] == [0, 0, 0, 0]


def test_over_plans_the_graph_is_the_model_that_wraps_them(demo_bundle):
    (one,) = subject_from([demo_bundle], "cpu", ["onnxruntime"]).contestants
    manifest = one.bundle.manifest
    record = EngineRecord.model_construct(plans=(), ep_context="wrapped.onnx")
    files = manifest.files | {"wrapped.onnx": FileRecord(bytes=12345, sha256="0" * 64)}
    engines = {"tensorrt": {one.graph.name: record}}
    one.bundle.manifest = manifest.model_copy(update={"files": files, "engines": engines})
    sizes = {
        backend: replace(one, backend=backend).files(torch.device("cuda"))["graph_bytes"]
        for backend in ("onnxruntime-tensorrt", "tensorrt")
    }
    assert sizes == {"onnxruntime-tensorrt": 12345, "tensorrt": 0}
