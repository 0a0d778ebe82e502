"""The command line: results on standard output, one clear error and its exit code otherwise."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from lcexport.engines import BACKENDS, TENSORRT
from lcexport.engines.trt.probe import ProductState
from lcexport.runtime import Video


def test_the_main_job_from_checkpoint_to_video(run, demo_checkpoint, tmp_path):
    bundle, video, sheet = tmp_path / "bundle", tmp_path / "x.mp4", tmp_path / "x.png"
    code, out, _ = run(
        "build", "--model", demo_checkpoint, "--res", "64x96x9", "-o", bundle, "--json"
    )
    assert code == 0
    assert json.loads(out)["graphs"]["64x96x9"]["golden"] == "golden/64x96x9.safetensors"
    code, out, _ = run("verify", bundle, "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True
    code, out, _ = run(
        "generate", bundle, "--prompt", "a cat", "--out", video, "--contact-sheet", sheet,
        "--steps", 2, "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["video"] == str(video)
    assert json.loads(out)["schema_version"] == 1
    code, out, _ = run("check", bundle, "--json")
    assert code == 6  # float32 attention
    document = json.loads(out)
    assert (document["schema_version"], document["target"]) == (1, "tensorrt-11")
    assert {row["rule"] for row in document["graphs"]["64x96x9"]} == {"attention"}
    assert video.read_bytes()[4:8] == b"ftyp"
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_graphs_files_and_proof(run, demo_bundle):
    code, out, err = run("inspect", demo_bundle)
    assert code == 0
    assert err == ""
    for word in ("dit.safetensors", "dit.64x96x9.onnx", "products fp32", "golden:64x96x9"):
        assert word in out
    code, out, _ = run("inspect", demo_bundle, "--json")
    assert json.loads(out)["schema_version"] == 1


def test_inspect_shows_what_was_compiled_for_what(run, demo_bundle, tmp_path):
    """The manifest alone is read, so an engine's record will do."""
    manifest = json.loads((demo_bundle / "manifest.json").read_text("utf-8"))
    graph = manifest["graphs"]["64x96x9"]
    plan = {name: graph[name] for name in ("inputs", "outputs")}
    plan |= {"file": "engines/0.plan", "first_block": 0, "last_block": 1, "attentions": 4}
    record = {
        "plans": [plan, plan], "product": "tensorrt-rtx", "version": "1.7.1.116",
        "platform": "linux-x86_64", "compute_capabilities": ["sm89", "sm120"],
        "gpu": None, "driver": None, "verified": False,
        "options": {"optimization_level": 3, "max_aux_streams": 0, "weight_streaming": True,
                    "refit": False, "max_threads": None, "compute_capabilities": ["sm89", "sm120"]},
    }  # fmt: skip
    call = {"plan": 0, "prefix": "", "tensors": {}}
    shared = {**record, "options": {}, "calls": [call, call]}
    manifest["engines"] = {"tensorrt-rtx": {"64x96x9": record, "96x64x9": shared}}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "backends": []}), "utf-8")
    code, out, _ = run("inspect", tmp_path)
    assert code == 0
    assert "none run (compiled only)" in out
    row, _ = (line for line in out.splitlines() if "tensorrt-rtx 1.7.1.116" in line)
    assert row.split()[-6:] == ["sm89,", "sm120", "2", "8", "not", "run"]
    words = " ".join(out.split())
    options = "optimization_level=3, max_aux_streams=0, weight_streaming=True"
    assert f"engine tensorrt-rtx 64x96x9: weights inside, {options} engine" in words
    assert "engine tensorrt-rtx 96x64x9: weights shared Build" in words
    code, out, _ = run("inspect", demo_bundle)
    assert "Engines" not in out
    assert "engine tensorrt" not in out


def test_the_doctor_says_what_can_be_done_here_and_what_is_missing(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert f"torch         {torch.__version__}" in out
    for backend in BACKENDS:
        assert backend in out
    assert "Build with --precision bf16" in out


def test_the_doctors_document(run):
    code, out, _ = run("doctor", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema_version"] == 1
    assert [product["name"] for product in document["products"]] == list(TENSORRT)
    (verdict,) = (
        v for v in document["verdicts"]
        if (v["backend"], v["precision"], v["action"]) == ("tensorrt", "fp32", "build")
        and v["device"] == "cpu"
    )  # fmt: skip
    assert verdict["ok"] is False
    assert verdict["error"]["exit_code"] == 5
    assert verdict["error"]["do"].startswith("Build with --precision bf16")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--backend", "eager"], 0, ""),
        (["--backend", "onnxruntime", "--precision", "fp32"], 0, ""),
        (["--precision", "fp32"], 0, ""),
        (
            ["--backend", "tensorrt-rtx", "--precision", "fp32"],
            5,
            "error: tensorrt-rtx engines",
        ),
        (["--backend", "quantum"], 2, "error: unknown backend"),
        (["--backend", "eager", "--precision", "fp8"], 2, "error: unknown precision"),
    ],
)
def test_scripts_can_ask_the_doctor(run, monkeypatch, words, code, message):
    monkeypatch.setattr("lcexport.doctor.probe", lambda name: ProductState())
    found, _, err = run("doctor", *words)
    assert found == code
    assert err.startswith(message)
    assert len(err.splitlines()) == (1 if code else 0)


@pytest.mark.parametrize("word", ["refit", "=true", "refit="])
def test_options_of_an_engine_are_names_and_values(run, demo_checkpoint, tmp_path, word):
    more = ["--trt", "refit=true"] if word == "refit=" else []
    word = "refit=false" if more else word
    code, _, err = run(
        "build", "--model", demo_checkpoint, "-o", tmp_path / "b", "--trt", word, *more
    )
    assert code == 2
    assert "wanted name=value, once" in err


def test_an_engine_without_options_takes_none(run, demo_bundle, tmp_path):
    code, _, err = run(
        "generate", demo_bundle, "--prompt", "x", "--out", tmp_path / "x.mp4",
        "--backend", "eager", "--engine", "cuda_graph=true",
    )  # fmt: skip
    assert code == 2
    assert "eager has no options of its own; got cuda_graph" in err


def test_plan_counts_tokens_and_writes_nothing(run, demo_checkpoint, tmp_path):
    code, out, _ = run(
        "plan", "--model", demo_checkpoint, "--res", "480p", "--only", "export",
        "-o", tmp_path / "b", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["sizes"][0]["tokens"] == 37_440
    assert json.loads(out)["schema_version"] == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_a_plan(run, demo_checkpoint, tmp_path):
    code, out, _ = run(
        "build", "--model", demo_checkpoint, "--res", "demo", "-o", tmp_path / "b", "--dry-run"
    )
    assert code == 0
    assert "PFLOP" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--backend", "tensorrt-rtx"], 5),
        (["--precision", "bf16"], 5),
        (["--backend", "eager", "--device", "meta"], 2),
        (["--backend", "tensorrt-rtx", "--precision", "bf16", "--trt", "refit=perhaps"], 2),
        (["--backend", "tensorrt-rtx", "--targets", "sm89,sm89"], 2),
        (["--ep-context"], 2),
    ],
)
def test_a_plan_and_a_dry_run_refuse_what_the_build_refuses(
    run, demo_checkpoint, tmp_path, words, code
):
    words = ["--model", demo_checkpoint, "--res", "demo", "-o", tmp_path / "b", *words]
    built = run("build", *words)
    assert built[:2] == (code, "")
    assert run("plan", *words) == run("build", *words, "--dry-run") == built
    assert list(tmp_path.iterdir()) == []


def test_a_plan_reads_the_components_and_the_bundle_that_is_added_to(
    run, demo_checkpoint, demo_bundle, tmp_path
):
    copy = Path(shutil.copytree(demo_checkpoint, tmp_path / "copy"))
    shutil.rmtree(copy / "vae")
    code, out, err = run("plan", "--model", copy, "--res", "demo")
    assert (code, out) == (3, "")
    assert "vae" in err
    code, out, err = run("plan", "--add", "-o", demo_bundle, "--res", "64x96x9")
    assert (code, out) == (2, "")
    assert "has 64x96x9 already" in err
    code, out, _ = run("plan", "--add", "-o", demo_bundle, "--res", "64x64x5", "--json")
    assert code == 0
    assert json.loads(out)["stages"][0] == "graph:64x64x5"


def test_validate_and_convert(run, demo_checkpoint, tmp_path):
    code, out, _ = run("validate", demo_checkpoint, "--json")
    assert code == 0
    assert json.loads(out)["tensors_present"] == 98
    assert json.loads(out)["schema_version"] == 1
    code, out, _ = run("convert", demo_checkpoint, tmp_path / "native", "--check")
    assert code == 0
    assert "tensors equal" in out
    assert (tmp_path / "native" / "model_index.json").is_file()
    code, out, _ = run("convert", demo_checkpoint, tmp_path / "again", "--json")
    assert code == 0
    assert json.loads(out)["layout"] == "fastvideo"


def test_the_demo_checkpoint_says_what_comes_next(run, tmp_path):
    code, out, _ = run("demo-checkpoint", tmp_path / "ck")
    assert code == 0
    assert "lcexport build --model" in out


def test_the_default_checkpoint_comes_from_the_environment(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LCEXPORT_MODEL", str(tmp_path / "elsewhere"))
    code, _, err = run("build")
    assert code == 3
    assert str(tmp_path / "elsewhere") in err


def test_no_checkpoint_says_how_to_get_one(run, monkeypatch, tmp_path):
    monkeypatch.delenv("LCEXPORT_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("build", "--res", "480p")
    assert code == 3
    assert out == ""
    assert "weights/LongCat-Video" in err
    assert "hf download meituan-longcat/LongCat-Video" in err
    assert "lcexport demo-checkpoint" in err
    assert list(tmp_path.iterdir()) == []


BAD_BUILDS = [
    (["--res", "4k"], 2, "unknown resolution"),
    (["--res", "481x832x93"], 2, "multiple of 16"),
    (["--res", "480x830x93"], 2, "multiple of 16"),
    (["--res", "480x832x0"], 2, "greater than or equal"),
    (["--res", "demo", "--backend", "quantum"], 2, "unknown backend"),
    (
        ["--res", "demo", "--precision", "fp8"],
        2,
        "--precision: Input should be 'fp32' or 'bf16'; got 'fp8'",
    ),
    (["--res", "demo", "--islands", "original"], 2, "bf16"),
    (["--res", "demo,demo"], 2, "twice"),
    (["--res", "demo", "--resume"], 3, "nothing to resume"),
    (["--res", "demo", "--add"], 2, "--add takes its weights from the bundle"),
    (
        ["--res", "demo", "--batch", "0"],
        2,
        "--batch: Input should be greater than or equal to 1; got 0",
    ),
    (["--res", "demo", "--batch", "abc"], 2, "'--batch'"),
    (["--res", "demo", "--backend", "eager", "--device", "meta"], 2, "unknown device"),
    (["--nonsense"], 2, "No such option"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD_BUILDS)
def test_a_bad_build_is_one_error_and_leaves_nothing(
    run, demo_checkpoint, tmp_path, words, code, message
):
    found, out, err = run("build", "--model", demo_checkpoint, "-o", tmp_path / "b", *words)
    assert found == code
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_addition_needs_a_bundle_and_nothing_else(run, tmp_path):
    words = ("build", "--res", "demo", "--add", "-o", tmp_path / "b")
    code, _, err = run(*words)
    assert code == 8
    assert "not a bundle" in err
    code, _, err = run(*words, "--resume")
    assert code == 2
    assert "without --resume" in err
    assert list(tmp_path.iterdir()) == []


def test_verify_draws_one_bar(run, demo_bundle, monkeypatch):
    drawn = []

    @contextmanager
    def bars():
        yield lambda what, done, total: drawn.append((what, done, total))

    monkeypatch.setattr("lcexport.cli.bundle.progress_bars", bars)
    assert run("verify", demo_bundle)[0] == 0
    assert {what for what, _, _ in drawn} == {"verifying"}
    assert [done for _, done, _ in drawn] == sorted(done for _, done, _ in drawn)
    assert all(done < total == 4 for _, done, total in drawn)


def test_no_command_and_no_argument_are_said(run):
    assert run()[2].splitlines()[-1] == "error: a command is missing. See `lcexport --help`."
    assert "Missing option '--out'" in run("generate", "b", "--prompt", "x")[2]


def test_frames_that_are_not_4k_plus_1_are_rounded_and_said(run, demo_checkpoint, caplog):
    code, out, _ = run(
        "plan", "--model", demo_checkpoint, "--res", "64x96x12", "--only", "export", "--json"
    )
    assert code == 0
    assert json.loads(out)["sizes"][0]["frames"] == 13
    assert "12 frames are not 4k+1: 13 frames are used" in caplog.text


BAD_PROMPTS = [
    (["--prompt", ""], 2, "prompt is empty"),
    (["--prompt", "x" * 100_001], 2, "too long"),
    (["--prompt", "x", "--steps", "0"], 2, "steps"),
    (["--prompt", "x", "--guidance-scale", "-1"], 2, "negative guidance"),
    (["--prompt", "x", "--seed", "-1"], 2, "seed"),
    (["--prompt", "x", "--seed", str(2**63)], 2, "seed"),
    (["--prompt", "x", "--res", "480p"], 2, "was not built for this; got '480p'"),
    (["--prompt", "x", "--backend", "quantum"], 2, "unknown backend"),
    (["--prompt", "x", "--device", "cuda"], 5, "GPU"),
    (["--prompt", "x", "--device", "meta", "--backend", "eager"], 2, "unknown device"),
    (["--prompt", "x", "--contact-sheet", "x.jpg"], 2, "wanted something.png"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD_PROMPTS, ids=lambda v: str(v)[:40])
def test_a_bad_generation_is_one_error_and_leaves_no_file(
    run, demo_bundle, tmp_path, words, code, message
):
    found, out, err = run("generate", demo_bundle, "--out", tmp_path / "x.mp4", *words)
    assert found == code
    assert message in err.splitlines()[-1]
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_generate_refuses_to_overwrite_before_it_computes(run, demo_bundle, tmp_path):
    video = tmp_path / "x.mp4"
    video.write_bytes(b"mine")
    code, _, err = run("generate", demo_bundle, "--prompt", "x", "--out", video)
    assert code == 4
    assert "will not overwrite" in err
    assert video.read_bytes() == b"mine"


@pytest.fixture
def clip(tmp_path):
    """A short video file."""
    return Video(torch.rand(5, 32, 48, 3), fps=8).save(tmp_path / "clip=1.mp4")


def test_a_contact_sheet_of_several_videos(run, clip, tmp_path):
    sheet = tmp_path / "sheet.png"
    code, out, err = run("contact-sheet", sheet, f"one={clip}", f"a second={clip}", "--count", 3)
    assert (code, out.strip(), err) == (0, str(sheet), "")
    assert Image.open(sheet).size == (3 * (96 + 6) + 6, 2 * (64 + 2 * 16 + 6) + 6)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["x.png", "{clip}"], 3, "1.mp4 is missing"),  # what stands before = is the label
        (["x.png", "clip"], 2, "wanted name=value"),
        (["x.png", "a={clip}", "a={clip}"], 2, "name=value, once"),
        (["x.png", "a=no.mp4"], 3, "no.mp4 is missing"),
        (["x.png", "a=words.mp4"], 3, "words.mp4"),
        (["x.jpg", "a={clip}"], 2, "wanted something.png"),
        (["clip=1.mp4", "a={clip}"], 2, "wanted something.png"),
        (["here.png", "a={clip}"], 4, "will not overwrite"),
        (["no/x.png", "a={clip}"], 4, "no such folder; got no"),
        (["x.png", "a={clip}", "--count", "0"], 2, "--count"),
        (["x.png"], 2, "LABEL=VIDEO"),
    ],
)
def test_a_bad_contact_sheet_is_one_error_and_leaves_no_file(
    run, clip, tmp_path, monkeypatch, words, code, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("words.mp4", "here.png"):
        (tmp_path / name).write_text("not a video")
    before = sorted(tmp_path.iterdir())
    found, out, err = run("contact-sheet", *(word.format(clip=clip.name) for word in words))
    assert message in err
    assert (found, out, len(err.splitlines())) == (code, "", 1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_bundle_is_exit_8_and_a_missing_one_too(run, demo_bundle, tmp_path):
    copy = Path(shutil.copytree(demo_bundle, tmp_path / "copy"))
    graph = copy / "dit.64x96x9.onnx"
    data = bytearray(graph.read_bytes())
    data[100] ^= 1
    graph.write_bytes(data)
    code, out, err = run("verify", copy, "--level", "hash")
    assert code == 8
    assert "dit.64x96x9.onnx" in out
    assert "damaged" in err
    code, _, err = run("generate", copy, "--prompt", "x", "--out", tmp_path / "x.mp4")
    assert code == 8
    assert "dit.64x96x9.onnx" in err
    code, _, err = run("inspect", tmp_path)
    assert code == 8
    assert "not a bundle" in err


def test_another_schema_version_is_exit_5(run, demo_bundle, tmp_path):
    copy = Path(shutil.copytree(demo_bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 2}), "utf-8")
    for words in (("inspect", copy), ("verify", copy)):
        code, _, err = run(*words)
        assert code == 5
        assert "schema version" in err


def test_an_unsound_checkpoint_lists_its_problems_and_exits_3(run, demo_checkpoint, tmp_path):
    copy = Path(shutil.copytree(demo_checkpoint, tmp_path / "copy"))
    shard = next(iter(sorted((copy / "dit").glob("*.safetensors"))))
    shard.unlink()
    code, out, err = run("validate", copy)
    assert code == 3
    assert shard.name in out
    assert "not sound" in err


def test_an_unknown_command_is_exit_2(run):
    code, _, err = run("launch")
    assert code == 2
    assert "No such command" in err


def test_help_and_version_need_neither_torch_nor_the_exporter():
    script = (
        "import sys; sys.argv = ['lcexport', '--help']\n"
        "from lcexport.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'onnx', 'onnxscript', 'transformers', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "build" in done.stdout
