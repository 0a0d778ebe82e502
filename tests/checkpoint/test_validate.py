"""The report on a checkpoint lists everything, and only a sound one is ok."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcexport.checkpoint import open_checkpoint, scan_tensors, validate
from lcexport.configs.errors import InputError

Make = Callable[..., Path]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def test_a_sound_checkpoint_is_ok_and_summed_up(released: Path) -> None:
    report = validate(released)
    assert report.ok
    assert report.problems == []
    assert (report.layout, report.naming) == ("released", "original")
    assert report.tensors_present == report.tensors_expected == 77
    assert report.parameters * 2 == report.bytes == report.dtypes["BF16"].bytes
    assert len(report.shards) == 3
    assert report.components_missing == []
    assert report.nonfinite == []
    infos = open_checkpoint(released).tensors.values()
    assert report.tensors_sha256 == scan_tensors(infos).tensors_sha256
    assert report.as_dict()["dtypes"] == {"BF16": {"tensors": 77, "bytes": report.bytes}}


def test_missing_components_are_listed_but_no_problem(released: Path) -> None:
    (released / "vae").rename(released / "elsewhere")
    report = validate(released, scan=False)
    assert report.ok
    assert report.components_missing == ["vae"]
    assert report.nonfinite is None


def test_all_problems_are_listed_at_once(make_dit: Make, weights: dict) -> None:
    tensors = dict(weights)
    del tensors["x_embedder.proj.bias"]
    tensors["extra"] = torch.ones(1)
    tensors["final_layer.linear.bias"] = torch.ones(3)
    tensors["y_embedder.y_proj.0.bias"] = torch.ones(256, dtype=torch.float64)
    tensors["blocks.0.attn.proj.bias"] = torch.full((256,), torch.nan)
    report = validate(make_dit(tensors, config={"depth": 5}))
    text = "\n".join(report.problems)
    assert not report.ok
    for wanted in (
        "it says 5 blocks, the weights hold 3",
        "missing: x_embedder.proj.bias",
        "not LongCat-Video's: extra",
        "of another shape: final_layer.linear.bias",
        "unsupported dtype: y_embedder.y_proj.0.bias (F64, in diffusion_pytorch_model.safetensors)",
        "NaN or infinity in 1 of the DiT's tensors: blocks.0.attn.proj.bias",
    ):
        assert wanted in text
    assert report.nonfinite == ["blocks.0.attn.proj.bias"]


def test_a_wrong_total_size_is_a_problem(released: Path) -> None:
    path = released / "dit" / INDEX
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    (problem,) = validate(released, scan=False).problems
    assert "total_size" in problem


def test_broken_files_are_reported_together(released: Path) -> None:
    first, second, third = sorted((released / "dit").glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    report = validate(released)
    text = "\n".join(report.problems)
    assert not report.ok
    assert f"{first.name} is missing" in text
    assert f"{second.name} is truncated" in text
    assert "contradicts" not in text
    assert set(report.shards) == {second.name, third.name}


def test_nonsense_in_the_configuration_is_reported(make_dit: Make, weights: dict) -> None:
    report = validate(make_dit(weights, config={"depth": 10**9}), scan=False)
    assert not report.ok
    assert report.tensors_expected is None
    report = validate(make_dit(weights, config={"num_heads": 7}), scan=False)
    assert "hidden_size 256 is not a multiple" in report.problems[0]


def test_no_checkpoint_is_an_error_not_a_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hf download"):
        validate(tmp_path / "none")
