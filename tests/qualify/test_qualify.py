"""One command, two files: end to end on a processor, on the test double, and where it must stop."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport import doctor
from lcexport.configs.errors import BuildError, IncompatibleError, ResourceError, UsageError
from lcexport.engines.trt import backend as trt_backend
from lcexport.qualify import bisect, files, fusion, run
from lcexport.qualify.claims import Check, Claim, measured
from lcexport.qualify.page import page
from lcexport.qualify.run import JSON_FILE, PAGE_FILE, Qualification, qualify

SIZE = "64x96x9"
EVERY_CLAIM = [
    claim.id for check in (*run.CHECKS, *bisect.CHECKS) for claim in check.claims
]  # fmt: skip


@pytest.fixture
def command(request):
    """`command(bundle, "-o", out)` -> (exit code, stdout, stderr) of `lcexport qualify`."""
    run = request.getfixturevalue("run")  # the module of that name is `run` here
    return lambda *words: run("qualify", *words)


def verdicts(found: Qualification) -> dict[str, str]:
    return {result.claim.id: result.verdict for result in found.results}


def only(monkeypatch, *checks: Check) -> None:
    """Run these checks and no others."""
    monkeypatch.setattr(run, "CHECKS", checks)


def test_every_claim_has_an_identifier_of_its_own():
    assert len(set(EVERY_CLAIM)) == len(EVERY_CLAIM)


def test_onnx_runtime_on_a_processor_end_to_end(command, pair_bundle, tmp_path):
    code, out, err = command(pair_bundle, "--device", "cpu", "--json", "-o", tmp_path / "report")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document == json.loads((tmp_path / "report" / JSON_FILE).read_text("utf-8"))
    assert document["schema_version"] == 1
    assert document["complete"] is True
    assert document["subject"]["backend"] == "onnxruntime"
    assert document["environment"]["torch"] == torch.__version__
    found = {claim["id"]: claim["verdict"] for claim in document["claims"]}
    assert list(found) == EVERY_CLAIM
    proven = {"files", "ports", "modules", "step", "video", "identical-rows", "repeatable"}
    assert {name for name, verdict in found.items() if verdict == "proven"} == proven
    assert {name for name, verdict in found.items() if verdict == "measured"} == {
        "faster-than-eager", "faster-than-compile", "arithmetic", "start", "memory",
    }  # fmt: skip
    untested = [claim for claim in document["claims"] if claim["verdict"] == "not tested"]
    assert all(claim["why"] for claim in untested)
    text = (tmp_path / "report" / PAGE_FILE).read_text("utf-8")
    assert text == page(document)
    for claim in document["claims"]:
        assert f"## {claim['id']}\n\n**{claim['verdict'].capitalize()}.** {claim['claim']}" in text


def test_the_double_of_tensorrt_end_to_end(the_double, double_bundle, tmp_path):
    seen: list[str] = []
    found = qualify(
        double_bundle,
        tmp_path / "report",
        device="cpu",
        on_result=lambda result: seen.append(result.claim.id),
    )
    assert seen == EVERY_CLAIM
    result = {result.claim.id: result for result in found.results}
    assert not found.refuted, found.refuted
    assert not found.faults, found.faults
    assert {name for name, verdict in verdicts(found).items() if verdict == "not tested"} == {
        "bisect"
    }
    assert result["fused-attention"].verdict == "proven"
    assert result["fused-attention"].got["fused_by_plan"] == [4, 4]
    assert result["float32-islands"].verdict == "proven"
    assert result["refit"].verdict == "proven"
    assert result["seams"].got["segments"] == 2
    assert result["start"].verdict == "measured"
    layers = sorted(path.name for path in (tmp_path / "report").glob("layers-*.json"))
    assert layers == ["layers-00.json", "layers-01.json"]
    assert found.subject["engine"]["options"]["refit"] is True  # pyright: ignore[reportIndexIssue]


def test_what_is_refuted_ends_with_its_exit_code(command, pair_bundle, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(pair_bundle, tmp_path / "bundle"))
    name = f"golden/{SIZE}.safetensors"
    golden = load_file(bundle / name)
    golden["velocity_cond"] *= 1.001
    save_file(golden, bundle / name)
    only(monkeypatch, files.CHECKS[1], files.CHECKS[3])
    code, out, err = command(bundle, "--device", "cpu", "-o", tmp_path / "report")
    assert code == 7
    assert err.startswith("error: refuted: step")
    assert "outside: velocity cond" in " ".join(out.split())
    assert (tmp_path / "report" / PAGE_FILE).exists()


def test_nothing_of_a_damaged_bundle_is_opened(pair_bundle, tmp_path):
    bundle = Path(shutil.copytree(pair_bundle, tmp_path / "bundle"))
    with (bundle / "dit.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x5a")
    found = qualify(bundle, tmp_path / "report", device="cpu")
    assert verdicts(found) == {"files": "refuted"} | dict.fromkeys(EVERY_CLAIM[1:], "not tested")
    assert {result.why for result in found.results[1:]} == {"the bundle is damaged"}


def failing(name: str, error: BaseException) -> Check:
    """A check of two claims that is proven in one and ends with an error in the other."""
    first, second = Claim(f"{name}-a", "a", "t"), Claim(f"{name}-b", "b", "t")

    def check(subject):
        yield measured(first, {"figure": 1})
        raise error

    return Check((first, second), check)


def test_an_error_refutes_a_claim_and_the_others_still_run(monkeypatch, pair_bundle, tmp_path):
    error = BuildError("no kernel", do="Give up.")
    only(monkeypatch, failing("x", error), failing("y", torch.OutOfMemoryError("3 GiB")))
    found = qualify(pair_bundle, tmp_path / "report", device="cpu")
    assert verdicts(found) == {
        "x-a": "measured", "x-b": "refuted", "y-a": "measured", "y-b": "not tested",
        "bisect": "not tested",
    }  # fmt: skip
    assert [result.why for result in found.results][1:4:2] == [
        "no kernel. Give up.", "out of memory: OutOfMemoryError: 3 GiB",
    ]  # fmt: skip


def test_a_check_that_breaks_is_a_fault_of_ours(command, monkeypatch, pair_bundle, tmp_path):
    only(monkeypatch, failing("x", KeyError("roundings")))
    code, _, err = command(pair_bundle, "--device", "cpu", "-o", tmp_path / "report")
    assert code == 1
    assert "these checks failed themselves: x-b" in err
    document = json.loads((tmp_path / "report" / JSON_FILE).read_text("utf-8"))
    broken = document["claims"][1]
    assert broken["verdict"] == "not tested"
    assert "KeyError: 'roundings'" in broken["measured"]["traceback"]
    assert "Traceback" not in (tmp_path / "report" / PAGE_FILE).read_text("utf-8")


def test_an_interruption_leaves_what_was_found(monkeypatch, pair_bundle, tmp_path):
    only(monkeypatch, files.CHECKS[1], failing("x", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        qualify(pair_bundle, tmp_path / "report", device="cpu")
    document = json.loads((tmp_path / "report" / JSON_FILE).read_text("utf-8"))
    assert document["complete"] is False
    assert [claim["id"] for claim in document["claims"]] == ["ports"]
    assert [path.name for path in (tmp_path / "report").iterdir()] == [JSON_FILE]


def test_an_engine_that_is_lacking_is_built_from_a_checkpoint(
    monkeypatch, demo_bundle, demo_checkpoint, tmp_path
):
    only(monkeypatch, *files.CHECKS[:2])
    report, size = tmp_path / "report", "48x64x5"
    with pytest.raises(UsageError, match=rf"no onnxruntime engine for {size}.*lcexport build "):
        qualify(demo_bundle, report, resolution=size, device="cpu")
    assert not report.exists()
    found = qualify(demo_bundle, report, resolution=size, device="cpu", model=demo_checkpoint)
    assert verdicts(found)["ports"] == "proven"
    assert found.subject["resolution"] == size
    assert (report / "bundle" / f"dit.{size}.onnx").is_file()


def test_a_compiled_engine_is_the_default_and_must_be_there(the_double, demo_bundle, tmp_path):
    with pytest.raises(UsageError, match=r"no tensorrt engine for 64x96x9.*--backend tensorrt"):
        qualify(demo_bundle, tmp_path / "report", backend="tensorrt", device="cpu")


def test_a_report_is_never_written_over_another(command, pair_bundle, tmp_path):
    (tmp_path / "report").mkdir()
    code, _, err = command(pair_bundle, "--device", "cpu", "-o", tmp_path / "report")
    assert code == ResourceError.exit_code
    assert "will not overwrite" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_machine_without_a_gpu_is_told_so_at_once(command, pair_bundle, tmp_path, backend):
    code, _, err = command(pair_bundle, "--backend", backend, "-o", tmp_path / "report")
    assert code == IncompatibleError.exit_code
    assert "CUDA" in err
    assert not (tmp_path / "report").exists()


def test_a_compiled_engine_on_a_processor_is_one_error_before_any_claim(
    command, double_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(trt_backend, "require", lambda backend, precision, device: None)
    for missing, end in (
        (None, ""),
        ("no driver", " on a machine with a GPU: this one has no driver"),
    ):
        monkeypatch.setattr(doctor, "missing_gpu", lambda missing=missing: missing)
        code, out, err = command(double_bundle, "--device", "cpu", "-o", tmp_path / "report")
        assert (code, out) == (IncompatibleError.exit_code, "")
        assert err == (
            "error: tensorrt engines run on NVIDIA GPUs; got device cpu. "
            f"Name another --backend, or use --device cuda{end}.\n"
        )
        assert not (tmp_path / "report").exists()


def test_polygraphy_is_asked_for_before_hours_of_work(monkeypatch, pair_bundle, tmp_path):
    monkeypatch.setattr(bisect, "version", lambda name: "0.49.26")
    monkeypatch.setattr(bisect.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(IncompatibleError, match="Polygraphy is too old"):
        qualify(pair_bundle, tmp_path / "report", device="cpu", bisecting=True)
    assert not (tmp_path / "report").exists()


def test_the_order_of_the_claims_puts_files_first():
    assert run.CHECKS[0].claims == (files.FILES,)
    assert fusion.CHECKS[0] in run.CHECKS


@pytest.mark.gpu
def test_tensorrt_on_a_gpu(demo_checkpoint, demo_options, tmp_path):
    """Builds an engine of the demo checkpoint on this GPU and qualifies it. Never run so far."""
    from lcexport.builder import build

    options = {"output": tmp_path / "b", "precision": "bf16", "backends": ("eager",), "batch": 2}
    build(demo_options.model_copy(update=options))
    found = qualify(tmp_path / "b", tmp_path / "report", backend="tensorrt", model=demo_checkpoint)
    assert not found.faults
    small = {"faster-than-eager", "faster-than-compile"}  # at this size the launches are all
    assert {result.claim.id for result in found.refuted} <= small
    assert verdicts(found)["fused-attention"] == "proven"
