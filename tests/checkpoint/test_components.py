"""Components are checked as their loaders will read them: what would fail there is said here."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.builder import BuildOptions, build
from lcexport.checkpoint import check_components, convert, copy_folder, open_checkpoint, validate
from lcexport.checkpoint.components import component_errors
from lcexport.configs.errors import InputError
from lcexport.configs.presets import preset_from
from lcexport.demo import CONFIG
from lcexport.engines.files import sha256_of
from lcexport.engines.manifest import COMPONENTS, FileRecord

VAE, ENCODER = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
CONV, QUERY = "decoder.conv_in.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"
Damage = Callable[[Path], object]


@pytest.fixture
def components(demo_checkpoint: Path, tmp_path: Path) -> dict[str, Path]:
    """The demo's components, to be damaged; a weight file is a few megabytes at most."""
    return {
        name: Path(shutil.copytree(demo_checkpoint / name, tmp_path / "ck" / name))
        for name in COMPONENTS
    }


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        (folder / name).unlink()
        save_file(found, folder / name, {"format": "pt"})

    return damage


def config(name: str, **changes: object) -> Damage:
    """Change keys of a JSON file; None removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return damage


def text(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def missing(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def shards(folder: Path, *, drop: bool = False) -> None:
    """Cut the text encoder in two, with an index; perhaps lose the second part."""
    found = sorted(load_file(folder / ENCODER).items())
    (folder / ENCODER).unlink()
    weight_map = {}
    for part in range(2):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        held = dict(found[part::2])
        save_file(held, folder / "text_encoder" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "text_encoder/model.safetensors.index.json").write_text(index)
    if drop:
        (folder / "text_encoder/model-00002-of-00002.safetensors").unlink()


def test_sound_components_have_no_errors(components):
    assert component_errors(components, CONFIG) == []


def test_sharded_weights_and_tensors_no_loader_reads_are_sound(components, tmp_path):
    shards(tmp_path / "ck")
    tensors(VAE, lambda found: found.update(note=torch.zeros(1, dtype=torch.int64)))(
        tmp_path / "ck"
    )
    assert component_errors(components, CONFIG) == []


DAMAGES = [
    ("VAE lacks a tensor", tensors(VAE, lambda t: t.pop(CONV)), f"missing: {CONV}"),
    (
        "VAE tensor of another shape",
        tensors(VAE, lambda t: t.update({CONV: torch.zeros(3)})),
        r"decoder\.conv_in\.weight \(in diffusion_pytorch_model\.safetensors: got \[3\], wanted",
    ),
    (
        "VAE tensor of integers",
        tensors(VAE, lambda t: t.update({CONV: t[CONV].to(torch.int8)})),
        r"unsupported dtype: decoder\.conv_in\.weight \(I8",
    ),
    ("VAE weights missing", missing(VAE), "holds no weights"),
    ("VAE without means", config("vae/config.json", latents_mean=None), "no usable latents_mean"),
    ("VAE without deviations", config("vae/config.json", latents_std=None), "latents_std"),
    ("too few means", config("vae/config.json", latents_mean=[0.0] * 15), "got 15 values"),
    ("a mean of NaN", config("vae/config.json", latents_mean=[float("nan")] * 16), "latents_mean"),
    ("a deviation of 0", config("vae/config.json", latents_std=[0.0] * 16), "not above 0"),
    ("8 latent channels", config("vae/config.json", z_dim=8), "got z_dim 8; wanted 16"),
    ("nonsense in the VAE", config("vae/config.json", dim_mult="x"), "no usable VAE in"),
    ("endless VAE", config("vae/config.json", num_res_blocks=10**9), "num_res_blocks is absurd"),
    ("VAE of another size", config("vae/config.json", base_dim=32), "of another shape"),
    ("VAE config binary", text("vae/config.json", bytes(range(256))), "is not JSON"),
    ("VAE config a list", text("vae/config.json", b"[]"), "is not a JSON object"),
    ("VAE config missing", missing("vae/config.json"), r"config\.json is missing"),
    ("encoder lacks a tensor", tensors(ENCODER, lambda t: t.pop(QUERY)), f"missing: {QUERY}"),
    ("encoder lacks a shard", lambda f: shards(f, drop=True), "00002-of-00002.* is missing"),
    ("encoder of another size", config("text_encoder/config.json", d_ff=97), "another shape"),
    ("encoder nonsense", config("text_encoder/config.json", d_model="x"), "no usable text encoder"),
    ("endless encoder", config("text_encoder/config.json", num_layers=10**9), "absurd"),
    ("encoder config missing", missing("text_encoder/config.json"), "is missing"),
    ("tokenizer empty", text("tokenizer/tokenizer.json", b"{}"), "no usable tokenizer in"),
    (
        "tokenizer binary",
        text("tokenizer/tokenizer.json", bytes(range(256))),
        "no usable tokenizer",
    ),
    ("tokenizer missing", missing("tokenizer/tokenizer.json"), "tokenizer in"),
    ("shift of text", config("scheduler/scheduler_config.json", shift="x"), "no usable shift"),
    ("shift of true", config("scheduler/scheduler_config.json", shift=True), "no usable shift"),
    ("no shift", config("scheduler/scheduler_config.json", shift=None), "no usable shift"),
    ("scheduler missing", missing("scheduler/scheduler_config.json"), "is missing"),
]


@pytest.mark.parametrize(
    ("damage", "match"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES]
)
def test_one_damage_is_one_error_that_names_the_folder(components, tmp_path, damage, match):
    damage(tmp_path / "ck")
    (error,) = component_errors(components, CONFIG)
    assert re.search(match, str(error))
    assert str(tmp_path / "ck") in str(error)
    assert error.do


def test_every_damaged_component_is_named(components, tmp_path):
    config("vae/config.json", latents_mean=None)(tmp_path / "ck")
    config("scheduler/scheduler_config.json", shift="x")(tmp_path / "ck")
    names = [str(error) for error in component_errors(components, CONFIG)]
    assert len(names) == 2
    assert "vae" in names[0]
    assert "scheduler" in names[1]


def test_a_text_encoder_of_another_width_than_the_dits(components):
    other = CONFIG.model_copy(update={"caption_channels": 32})
    (error,) = component_errors(components, other)
    assert "another width; got 64; wanted 32" in str(error)


def test_a_tokenizer_with_more_tokens_than_the_encoder_knows(components, tmp_path):
    config("text_encoder/config.json", vocab_size=50)(tmp_path / "ck")
    cut = {"shared.weight": lambda value: value[:50].clone()}
    tensors(ENCODER, lambda t: t.update({name: change(t[name]) for name, change in cut.items()}))(
        tmp_path / "ck"
    )
    (error,) = component_errors(components, CONFIG)
    assert "more tokens than" in str(error)


def test_what_is_no_file_is_refused(components):
    os.mkfifo(components["vae"] / "pipe")
    (error,) = component_errors(components, CONFIG)
    assert "pipe cannot be copied" in str(error)


def test_validate_convert_and_build_refuse_the_same(demo_checkpoint, tmp_path):
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "ck"))
    config("scheduler/scheduler_config.json", shift="x")(folder)
    (problem,) = validate(folder, scan=False).problems
    for work in (
        lambda: check_components(open_checkpoint(folder)),
        lambda: convert(folder, tmp_path / "out", to="native"),
        lambda: build(
            BuildOptions(model=folder, output=tmp_path / "out", presets=(preset_from("64x96x9"),))
        ),
    ):
        with pytest.raises(InputError) as caught:
            work()
        assert str(caught.value) == problem
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def nan(found: dict[str, torch.Tensor]) -> None:
    found[CONV].view(-1)[3] = torch.nan


def test_the_scan_finds_nan_in_a_component(demo_checkpoint, tmp_path):
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "ck"))
    tensors(VAE, nan)(folder)
    assert validate(folder, scan=False).ok
    seen = []
    report = validate(folder, on_progress=lambda done, total: seen.append((done, total)))
    assert report.nonfinite == [f"vae/{CONV}"]
    assert f"1 of the vae's tensors: {CONV} (in diffusion_pytorch_model" in report.problems[0]
    assert report.tensors_sha256 == validate(demo_checkpoint).tensors_sha256
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > report.bytes


def test_nan_is_found_while_a_component_is_copied(components, tmp_path):
    tensors(VAE, nan)(tmp_path / "ck")
    with pytest.raises(InputError, match=rf"tensor '{CONV}' holds NaN"):
        copy_folder(components["vae"], tmp_path / "copy")
    assert not (tmp_path / "copy" / VAE.split("/")[1]).exists()


def test_a_copy_is_the_same_bytes_with_their_digests(components, tmp_path):
    source = components["vae"]
    (source / ".cache").mkdir()
    (source / ".cache" / "note").write_text("a download's own")
    (source / "empty.txt").touch()
    records = copy_folder(source, tmp_path / "copy")
    files = {path.name: path for path in source.iterdir() if path.is_file()}
    assert records == {
        name: FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        for name, path in files.items()
    }
    for name, path in files.items():
        assert (tmp_path / "copy" / name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "copy" / ".cache").exists()
