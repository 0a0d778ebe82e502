"""The doctor: facts of this machine, and verdicts that are the words of the checks themselves."""

import platform
import shutil
import sys

import onnxruntime
import pytest
import torch

from lcexport import doctor
from lcexport.builder import BuildOptions, build
from lcexport.configs.errors import IncompatibleError, LcexportError, UsageError
from lcexport.doctor import PRECISIONS, Diagnosis, diagnose
from lcexport.engines import BACKENDS, TENSORRT, require_backend
from lcexport.engines.trt import probe as probing
from lcexport.engines.trt.memory import missing_gpu
from lcexport.engines.trt.probe import ProductState

without_gpu = pytest.mark.skipif(missing_gpu() is None, reason="there is a GPU")
ABSENT = ProductState(error=IncompatibleError("it is not there", do="Get it."))


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return diagnose()


@pytest.fixture
def absent(monkeypatch) -> None:
    """A probe of either product finds nothing; no child is started."""
    monkeypatch.setattr(doctor, "probe", dict.fromkeys(TENSORRT, ABSENT).__getitem__)


def message(act) -> str | None:
    """What an action is refused with."""
    try:
        act()
    except LcexportError as error:
        return str(error)
    return None


def words(error: LcexportError) -> str:
    """A verdict's own words, without what the doctor says of this machine."""
    return str(error).replace(f" on a machine with a GPU: this one has {missing_gpu()}.", ".")


def test_the_facts_are_this_machines(here):
    facts = here.facts
    assert facts.python == platform.python_version()
    assert (facts.torch, facts.torch_cuda) == (torch.__version__, torch.version.cuda)
    assert len(facts.gpus) == torch.cuda.device_count()
    assert facts.onnxruntime == onnxruntime.__version__
    assert facts.onnxruntime_providers == tuple(onnxruntime.get_available_providers())
    assert 0 < facts.memory_available_bytes <= facts.memory_total_bytes
    assert facts.disk_free_bytes <= shutil.disk_usage(facts.disk_folder).total


def test_every_backend_is_judged_in_every_precision_for_both_actions(here):
    judged = {(v.backend, v.precision, v.action) for v in here.verdicts}
    assert judged == {
        (backend, precision, action)
        for backend in BACKENDS
        for precision in PRECISIONS
        for action in ("build", "run")
    }


def test_the_verdicts_are_what_the_backends_say(here):
    """Probes aside: a builder that cannot be made is the product's own error."""
    states = {product.name: product.state for product in here.products}
    for verdict in here.verdicts:
        asked = (verdict.backend, verdict.precision, verdict.device)
        said = message(lambda asked=asked: require_backend(*asked))
        if said is None and verdict.action == "build" and verdict.backend in states:
            said = states[verdict.backend].error and str(states[verdict.backend].error)
        assert (verdict.error and words(verdict.error)) == said, asked


@without_gpu
def test_a_machine_without_a_gpu_builds_and_runs_on_its_processor(here):
    can = {(v.backend, v.precision, v.action, v.device) for v in here.verdicts if v.error is None}
    rtx = {("tensorrt-rtx", "bf16", "build", "cpu")} & can
    assert can - rtx == {
        (backend, precision, action, "cpu")
        for backend, precision in (
            ("onnxruntime", "fp32"),
            *(
                (backend, precision)
                for backend in ("eager", "aotinductor")
                for precision in PRECISIONS
            ),
        )
        for action in ("build", "run")
    }
    (run,) = (v for v in here.verdicts if v.backend == "tensorrt-rtx" and v.action == "run"
              and v.precision == "bf16")  # fmt: skip
    assert run.error is not None


@without_gpu
def test_rtx_builds_without_a_gpu_and_runs_on_one_only(here):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    build, run = (
        v.error for v in here.verdicts if (v.backend, v.precision) == ("tensorrt-rtx", "bf16")
    )
    assert build is None
    assert f"torch sees none; got {missing_gpu()}" in str(run)
    (product,) = (p for p in here.products if p.name == "tensorrt-rtx")
    assert product.state.builder
    assert "sm89" in product.state.targets


@without_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_build_refuses_what_the_doctor_refuses_and_leaves_nothing(
    here, demo_options: BuildOptions, tmp_path, backend, precision
):
    (verdict,) = (
        v
        for v in here.verdicts
        if (v.backend, v.precision, v.action) == (backend, precision, "build")
    )
    if verdict.error is None:
        pytest.skip("it can be built here: other tests do")
    changes = {"output": tmp_path / "b", "backends": (backend,), "precision": precision}
    with pytest.raises(type(verdict.error)) as caught:
        build(demo_options.model_copy(update=changes))
    assert str(caught.value) == words(verdict.error)
    assert list(tmp_path.iterdir()) == []


def test_a_product_that_crashes_is_a_verdict_and_is_not_imported(monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    monkeypatch.setattr(probing, "COMMAND", (sys.executable, "-c", "import os; os.abort()"))
    monkeypatch.setattr(doctor, "require_backend", None)
    verdicts = diagnose("tensorrt-rtx", "bf16").verdicts
    assert verdicts
    assert all("crashed" in str(verdict.error) for verdict in verdicts)


def test_a_missing_builder_stands_in_the_way_of_building_only(absent, monkeypatch):
    monkeypatch.setattr(doctor, "require_backend", lambda *asked: None)
    verdicts = diagnose("tensorrt", "bf16").verdicts
    assert {v.action: v.error for v in verdicts} == {"build": ABSENT.error, "run": None}


@pytest.mark.parametrize("missing", ["no NVIDIA driver", None])
def test_a_gpu_is_advised_with_what_stands_in_its_way(absent, monkeypatch, missing):
    monkeypatch.setattr(doctor, "missing_gpu", lambda: missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backend in ("onnxruntime", "onnxruntime-tensorrt"):
        verdicts = diagnose(backend, "bf16").verdicts
        assert verdicts
        for verdict in verdicts:
            assert verdict.error is not None
            end = f" on a machine with a GPU: this one has {missing}." if missing else "."
            assert str(verdict.error).endswith(f"se --device cuda{end}")
            assert verdict.error.exit_code == 5


def test_with_a_gpu_processor_and_gpu_are_both_asked(absent, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = {(v.action, v.device) for v in diagnose("onnxruntime", "fp32").verdicts}
    assert asked == {(a, d) for a in ("build", "run") for d in ("cpu", "cuda")}


def test_the_refusal_is_none_as_soon_as_something_can_be_built(absent):
    assert diagnose("onnxruntime").refusal is None
    refused = diagnose("onnxruntime", "bf16").refusal
    if missing_gpu():
        assert refused is not None
        assert refused.exit_code == 5
        assert "no bfloat16 arithmetic on processors" in str(refused)


def test_what_does_not_exist_is_a_usage_error(absent):
    with pytest.raises(UsageError, match=r"one of onnxruntime, .*aotinductor, eager"):
        diagnose("quantum")
    with pytest.raises(UsageError, match="unknown precision; got 'fp8'; wanted one of fp32, bf16"):
        diagnose("eager", "fp8")
