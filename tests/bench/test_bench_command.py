"""`lcexport bench`: a table or one line of JSON, a picture, a comparison; refusals come first."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lcexport.bench import example
from lcexport.bench import run as bench_run
from lcexport.bench.example import batches_from, example_bundles
from lcexport.bench.run import CACHES, Options, served
from lcexport.bench.subject import subject_from
from lcexport.configs.errors import LcexportError, UsageError
from lcexport.configs.presets import preset_from
from lcexport.configs.tasks import jobs_for
from lcexport.demo import SIBLINGS


def document_of(run, bundle: Path, *words: object) -> dict:
    code, out, _ = run("bench", bundle, *words, "--json")
    assert code == 0
    assert out.count("\n") == 1
    return json.loads(out)


def test_a_whole_run_with_real_processes(run, demo_bundle):
    words = ("--backend", "onnxruntime", "--steps", 1, "--repeats", 2, "--requests", 1)
    got = document_of(run, demo_bundle, *words)
    assert (got["schema_version"], got["kind"]) == (1, "bench")
    assert got["environment"]["torch"]
    assert got["operations"]["step"] == 2 * got["operations"]["pass"]
    (one,) = got["contestants"]
    assert one["step"]["runs"] == one["text"]["runs"] == one["decode"]["runs"] == 2
    assert one["requests"]["runs"] == 1
    assert one["cold_start_seconds"] > one["load_seconds"] > 0
    assert one["host_peak_bytes"] > one["files"]["total_bytes"] > 0
    assert "cache" not in one
    assert "device_peak_bytes" not in one


def test_the_table_names_every_contestant(run, demo_bundle, unmeasured):
    code, out, _ = run("bench", demo_bundle, "--backend", "onnxruntime,eager")
    assert code == 0
    assert unmeasured == ["onnxruntime", "eager"]
    for word in ("onnxruntime", "eager", "0.40%", "50%", "700.00 MB", "1.8e+03"):
        assert word in out


def test_a_comparison_within_the_limit_and_beyond_it(run, demo_bundle, unmeasured, tmp_path):
    words = (demo_bundle, "--backend", "eager")
    old, path = document_of(run, *words), tmp_path / "old.json"
    path.write_text(json.dumps(old))
    got = document_of(run, *words, "--compare", path)
    assert got["comparison"]["max_regression"] == pytest.approx(0.08)
    assert {one["change"] for one in got["comparison"]["changes"]} == {0}
    old["contestants"][0]["step"]["median_seconds"] = 1.9
    path.write_text(json.dumps(old))
    code, out, _ = run("bench", *words, "--compare", path, "--max-regression", "6%")
    assert (code, "worse" in out) == (0, False)
    code, out, err = run("bench", *words, "--compare", path, "--max-regression", "5%")
    assert code == 10
    assert "worse" in out
    assert "eager step +5.3%; wanted at most 5.0% more" in err


def test_a_picture(run, demo_bundle, unmeasured, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures.png"
    assert run("bench", demo_bundle, "--plot", path)[0] == 0
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.getcolors(1 << 20) or ()) > 2


def test_without_matplotlib_a_picture_is_refused_first(
    run, demo_bundle, unmeasured, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("bench", demo_bundle, "--plot", tmp_path / "figures.png")
    assert code == 5
    assert "pip install 'lcexport[plot]'" in err
    assert unmeasured == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "what is to be measured"),
        (["BUNDLE", "--demo"], 2, "what is to be measured"),
        (["BUNDLE", "--backend", "quantum"], 2, "unknown backend"),
        (["BUNDLE", "--batch", "2"], 2, "--batch is of --demo"),
        (["--demo", "--res", "480p"], 2, "--demo has one size"),
        (["--demo", "--batch", "x"], 2, "not a list of batches"),
        (["BUNDLE", "--steps", "0"], 2, "steps is out of range"),
        (["BUNDLE", "--repeats", "0"], 2, "repeats is out of range"),
        (["BUNDLE", "--requests", "-1"], 2, "requests is out of range"),
        (["BUNDLE", "--max-regression", "8%"], 2, "--max-regression is a limit to --compare"),
        (["BUNDLE", "--compare", "OLD", "--max-regression", "much"], 2, "not a limit"),
        (["BUNDLE", "--compare", "NONE"], 3, "cannot be read"),
        (["BUNDLE", "--compare", "OLD"], 5, "another schema version"),
        (["BUNDLE", "--plot", "OLD"], 2, ".png"),
        (["BUNDLE", "--plot", "TAKEN"], 4, "will not overwrite"),
        (["BUNDLE", "--backend", "tensorrt", "--device", "cpu"], 5, "tensorrt"),
        (["NONE"], 8, "not a bundle"),
    ],
)
def test_bad_input_is_one_error_before_anything_is_measured(
    run, demo_bundle, unmeasured, tmp_path, words, code, said
):
    pytest.importorskip("matplotlib")
    paths = {
        "BUNDLE": demo_bundle, "OLD": tmp_path / "old.json", "TAKEN": tmp_path / "taken.png",
        "NONE": tmp_path / "none",
    }  # fmt: skip
    paths["OLD"].write_text('{"schema_version": 0, "kind": "bench"}')
    paths["TAKEN"].write_bytes(b"")
    got, out, err = run("bench", *(paths.get(word, word) for word in words))
    assert (got, out) == (code, "")
    assert said in err
    assert unmeasured == []


def test_an_earlier_run_of_another_size_is_refused_before_anything_is_measured(
    run, demo_bundle, unmeasured, tmp_path
):
    old = document_of(run, demo_bundle)
    unmeasured.clear()
    old["subject"]["tokens"] += 1
    (tmp_path / "old.json").write_text(json.dumps(old))
    code, _, err = run("bench", demo_bundle, "--compare", tmp_path / "old.json")
    assert code == 5
    assert "another subject; got tokens" in err
    assert unmeasured == []


def test_library_components_are_another_option_to_compare_by(
    run, demo_bundle, unmeasured, tmp_path
):
    old = document_of(run, demo_bundle)
    del old["options"]["library_components"]  # of a version without it
    (tmp_path / "old.json").write_text(json.dumps(old))
    comparing = ("bench", demo_bundle, "--compare", tmp_path / "old.json")
    assert run(*comparing)[0] == 0
    code, _, err = run(*comparing, "--library-components")
    assert code == 5
    assert "another options; got library_components" in err


def test_a_process_that_fails_says_why(demo_bundle, monkeypatch):
    subject = subject_from([demo_bundle], "cpu", ["eager"])
    monkeypatch.setattr(bench_run, "COMMAND", (sys.executable, "-c", "raise SystemExit('broken')"))
    with pytest.raises(LcexportError, match=r"eager failed in a process.*status 1: broken"):
        served(subject.contestants[0], subject, Options())


def test_a_process_own_error_keeps_its_class(demo_bundle):
    subject = subject_from([demo_bundle], "cpu", ["onnxruntime"])
    (one,) = subject.contestants
    with pytest.raises(UsageError, match=r"onnxruntime: .*not built for this") as raised:
        served(one, replace(subject, job=jobs_for(preset_from("480p"), "t2v")[0]), Options())
    assert raised.value.exit_code == 2


def test_a_process_that_starts_cold_finds_nothing_compiled(demo_bundle, monkeypatch, tmp_path):
    """The parent's caches hold what it has just compiled for the steps in turn."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    say = f"import json, os; print(json.dumps({{n: os.environ[n] for n in {CACHES}}}))"
    monkeypatch.setattr(bench_run, "COMMAND", (sys.executable, "-c", say))
    subject = subject_from([demo_bundle], "cpu", ["compile"])
    first, second = (served(subject.contestants[0], subject, Options()) for _ in range(2))
    folders = [*first.values(), *second.values()]
    assert len({*folders, str(tmp_path)}) == 5
    assert not any(Path(folder).parent.exists() for folder in folders)


def test_the_example_is_the_demos_big_sibling():
    preset, config = preset_from("bench"), SIBLINGS["bench"].config
    assert preset.tokens >= 3000
    assert (config.hidden_size, config.num_heads, config.depth) == (1024, 8, 4)


def test_a_bundle_for_each_batch_of_the_example(monkeypatch):
    monkeypatch.setattr(example, "SIZE", "demo")
    with example_bundles(["eager", "compile"], "cpu", [1, 2], "64x96x9") as folders:
        subject = subject_from(folders, "cpu", ["eager"])
        assert [c.graph.batch for c in subject.contestants] == [1, 2]
        assert [c.name for c in subject.contestants] == ["batch1:eager", "batch2:eager"]
        (weights,) = {c.weights_bytes for c in subject.contestants}
        assert weights > 0
    assert not folders[0].exists()


@pytest.mark.parametrize("text", ["", "1,1", "one", "1,", "-1"])
def test_batches_that_are_none(text):
    assert batches_from("1, 2") == [1, 2]
    with pytest.raises(UsageError, match="not a list of batches"):
        batches_from(text)
