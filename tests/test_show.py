"""What is shown fits 80 columns, is shown as it is, and is JSON where JSON was asked for."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lcexport.builder import make_plan, open_source
from lcexport.checkpoint import convert, validate
from lcexport.configs.presets import preset_from
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import read_manifest
from lcexport.qualify.claims import Claim, Result
from lcexport.qualify.run import Qualification
from lcexport.show import console
from lcexport.show.build import show_plan
from lcexport.show.bundle import show_bundle, show_verification
from lcexport.show.checkpoint import show_validation
from lcexport.show.console import show_json, show_text
from lcexport.show.qualification import show_qualification
from lcexport.verify import Check, Report, verify

COLUMNS = 80


@pytest.fixture
def shown(monkeypatch):
    """`shown(show_plan, plan)` is what that prints in a terminal of 80 columns, line by line."""

    monkeypatch.setattr(console.out, "width", COLUMNS)

    def call(function, *given) -> list[str]:
        with console.out.capture() as printed:
            function(*given)
        return printed.get().splitlines()

    return call


def test_a_bundle_fits_80_columns(shown, demo_bundle):
    lines = shown(show_bundle, Bundle(demo_bundle, read_manifest(demo_bundle)))
    assert max(map(len, lines[1:])) <= COLUMNS  # the first holds the folder, which is not cut
    text = "\n".join(lines)
    for whole in ("vae/diffusion_pytorch_model.safetensors", "engine:onnxruntime:64x96x9"):
        assert whole in text


def test_a_plan_fits_80_columns(shown, demo_options):
    presets = tuple(map(preset_from, ("480p", "480p-portrait", "720p")))
    options = demo_options.model_copy(
        update={"presets": presets, "model": demo_options.model, "output": Path("bundle")}
    )
    lines = shown(show_plan, make_plan(open_source(options), options))
    assert max(len(line) for line in lines if str(demo_options.model) not in line) <= COLUMNS
    assert any("one step's activations, 480p-portrait" in line for line in lines)


def test_a_verification_fits_80_columns_and_no_number_is_cut(shown, demo_bundle):
    report = verify(demo_bundle, "step")
    lines = shown(show_verification, report)
    assert max(map(len, lines)) <= COLUMNS
    rows = [line for line in lines if "blocks." in line]
    assert len(rows) == 4
    assert all("max" in row and "l2" in row and "cos 1" in row and "ok" in row for row in rows)
    assert lines[-1] == "verified"


def test_what_is_piped_fits_100_columns_and_long_reasons_are_wrapped(capsys):
    why = "tensorrt engines run on NVIDIA GPUs, and there is none of them to be seen here. " * 4
    check = Check("load", "64x96x9", "tensorrt", "inputs", {}, why.strip(), False)
    show_verification(Report("bundle", "load", (check,)))
    result = Result(Claim("faster-than-compile", "s", "t"), "refuted", why=why.strip())
    show_qualification(
        Qualification({"backend": "b", "resolution": "r"}, {}, (result,), True), Path("r")
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    words = printed.replace("refuted", "").replace("FAILED", "").split()
    assert " ".join(words).count(why.strip()) == 2


def test_a_validation_keeps_the_names_of_files_whole(shown, demo_checkpoint):
    lines = shown(show_validation, validate(demo_checkpoint, scan=False))
    assert max(map(len, lines)) <= COLUMNS
    name = "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert any(f"{name}, 7.86 MB" in line for line in lines)


@pytest.mark.parametrize("name", ["[b]bold[/b]", "a[/]", "[link=x]", ":cat:", "[red]"])
def test_no_name_is_taken_for_markup(shown, tmp_path, demo_checkpoint, name):
    report = replace(validate(demo_checkpoint, scan=False), folder=name, problems=[name])
    assert "\n".join(shown(show_validation, report)).count(name) == 2
    check = Check("hash", "", "", name, {}, f"wanted {name}", False)
    lines = shown(show_verification, Report("bundle", "hash", (check,)))
    assert "".join(lines).count(name) == 2
    assert shown(show_text, name) == [name]


def test_json_has_null_where_a_number_is_not_finite(capsys):
    check = Check("step", "r", "b", "n", {"rms": math.nan, "max_abs": math.inf}, "w", False)
    show_json(Report("bundle", "step", (check,)).as_dict())

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert document["checks"][0]["got"] == {"rms": None, "max_abs": None}
    assert document["schema_version"] == 1


def test_a_conversion_as_json(capsys, demo_checkpoint, tmp_path):
    show_json(convert(demo_checkpoint, tmp_path / "out", to="native", check=True).as_dict())
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["destination"] == str(tmp_path / "out")
    assert Path(document["weights"]["file"]).is_file()
    assert document["weights"]["tensors"] == document["tensors_checked"]
    assert set(document["components"]) == {"text_encoder", "tokenizer", "vae", "scheduler"}
