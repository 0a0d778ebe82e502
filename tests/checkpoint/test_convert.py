"""Whole folders: complete, provable, and all or nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.checkpoint import check_same, check_tensors, convert, open_checkpoint
from lcexport.configs.errors import InputError, ResourceError, UsageError, VerificationError

Make = Callable[..., Path]


def files_below(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_the_released_folder_becomes_a_fastvideo_folder(released: Path, tmp_path: Path) -> None:
    report = convert(released, tmp_path / "native", to="native", check=True)
    assert (report.layout, report.naming, report.checked) == ("fastvideo", "native", 95)
    made = open_checkpoint(report.destination)
    assert (made.layout, made.naming) == ("fastvideo", "native")
    assert made.config == open_checkpoint(released).config
    assert set(report.copied) == {"text_encoder", "tokenizer", "vae", "scheduler", "lora"}
    for name in report.copied:
        assert files_below(report.destination / name) == files_below(released / name)
    config = json.loads((report.destination / "transformer/config.json").read_text())
    assert config["_class_name"] == "LongCatTransformer3DModel"
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (2, 128)
    assert config["enable_flashattn2"] is True
    index = json.loads((report.destination / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "LongCatTransformer3DModel"]
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    assert report.weights.path == report.destination / "transformer/model.safetensors"
    assert report.weights.tensors == made.tensors


def test_there_and_back_gives_the_released_folder_again(
    released: Path, tmp_path: Path, weights: dict
) -> None:
    convert(released, tmp_path / "native", to="native")
    report = convert(tmp_path / "native", tmp_path / "back", to="original", check=True)
    made = open_checkpoint(report.destination)
    assert (made.layout, made.naming) == ("released", "original")
    written = load_file(report.weights.path)
    assert all(torch.equal(written[name], value) for name, value in weights.items())
    assert json.loads((tmp_path / "back/dit/config.json").read_text()) == json.loads(
        (released / "dit/config.json").read_text()
    )
    assert (tmp_path / "back/lora/file.json").is_file()


@pytest.mark.parametrize("to", ["native", "original"])
@pytest.mark.parametrize("islands", ["checkpoint", "original"])
def test_a_bare_folder_converts_to_bf16_and_the_cast_is_proved(
    make_dit: Make, fp32_weights: dict, tmp_path: Path, to, islands
) -> None:
    folder = make_dit(fp32_weights, shards=2)
    (tmp_path / "out").mkdir()  # an empty destination is welcome
    report = convert(folder, tmp_path / "out", to=to, dtype="bf16", islands=islands, check=True)
    assert (report.layout, report.checked, report.copied) == ("dit", 95, [])
    made = open_checkpoint(report.destination)
    check_tensors(made)
    assert {info.dtype for info in made.tensors.values()} == {"BF16", "F32"}


def test_check_names_the_tensor_that_differs(make_dit: Make, weights: dict, tmp_path: Path) -> None:
    source = open_checkpoint(make_dit(weights))
    convert(source.folder, tmp_path / "out", to="native")
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.self_attn.to_k.bias"][7] += 1
    save_file(tensors, path)
    with pytest.raises(VerificationError, match=r"'blocks.1.self_attn.to_k.bias'"):
        check_same(source, open_checkpoint(tmp_path / "out"))
    swapped = "blocks.0.self_attn.to_q.weight", "blocks.0.self_attn.to_v.weight"
    tensors[swapped[0]], tensors[swapped[1]] = tensors[swapped[1]], tensors[swapped[0]]
    save_file(tensors, path)
    with pytest.raises(VerificationError, match=r"to_q\.weight"):
        check_same(source, open_checkpoint(tmp_path / "out"))


def test_a_full_destination_is_left_alone(dit_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ResourceError, match="will not overwrite"):
        convert(dit_folder, tmp_path / "out", to="native")
    assert files_below(tmp_path) == {"out/mine": b"mine"}


def test_what_a_killed_conversion_left_is_swept(dit_folder: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    convert(dit_folder, tmp_path / "out", to="native")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_parent_folder_is_refused(dit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="does not exist"):
        convert(dit_folder, tmp_path / "a" / "b", to="native")


def test_a_destination_inside_the_source_is_refused(released: Path) -> None:
    with pytest.raises(UsageError, match="inside the checkpoint"):
        convert(released, released / "vae" / "out", to="native")


@pytest.mark.parametrize("kind", ["nan", "missing shard", "broken link"])
def test_after_an_error_nothing_is_left(released: Path, weights: dict, kind: str) -> None:
    if kind == "nan":
        path = next((released / "dit").glob("*00003-of*"))
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[-1] = torch.nan
        save_file(tensors, path)
    elif kind == "missing shard":
        next((released / "dit").glob("*00003-of*")).unlink()
    else:
        (released / "vae" / "config.json").resolve().unlink()
    before = {path.name for path in released.parent.iterdir()}
    with pytest.raises(InputError):
        convert(released, released.parent / "out", to="native")
    assert {path.name for path in released.parent.iterdir()} == before


def test_unknown_choices_are_usage_errors(dit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        convert(dit_folder, tmp_path / "o", to="onnx")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError):
        convert(dit_folder, tmp_path / "o", to="native", islands="original")
