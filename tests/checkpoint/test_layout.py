"""Every layout opens; every broken one is refused with a message that says what and where."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcexport.checkpoint import check_tensors, convert, open_checkpoint, problems, read_tensor
from lcexport.configs.errors import InputError

Make = Callable[..., Path]
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_bare_folder_opens(dit_folder: Path) -> None:
    checkpoint = open_checkpoint(dit_folder)
    assert (checkpoint.layout, checkpoint.naming) == ("dit", "original")
    assert checkpoint.config.depth == 3
    assert len(checkpoint.tensors) == 77
    assert checkpoint.components == {}
    assert problems(checkpoint) == []


def test_the_released_layout_opens_with_shards_and_components(released: Path) -> None:
    checkpoint = open_checkpoint(released)
    assert (checkpoint.layout, checkpoint.naming) == ("released", "original")
    assert [path.name for path in checkpoint.files][1] == SHARD
    assert set(checkpoint.components) == {"text_encoder", "tokenizer", "vae", "scheduler"}
    check_tensors(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors"])
def test_a_single_file_may_have_any_name(make_dit: Make, weights: dict, name: str) -> None:
    folder = make_dit(weights)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / name)
    assert open_checkpoint(folder).files == [folder / name]


def test_native_pieces_are_the_thirds_and_halves_of_the_originals(
    make_dit: Make, weights: dict
) -> None:
    native = open_checkpoint(make_dit(weights, shards=2)).native()
    assert len(native) == 95
    for part, wanted in zip("qkv", weights["blocks.1.attn.qkv.weight"].chunk(3), strict=True):
        got = read_tensor(native[f"blocks.1.self_attn.to_{part}.weight"])
        assert torch.equal(got, wanted)
    halves = weights["blocks.2.cross_attn.kv_linear.bias"].chunk(2)
    for part, wanted in zip("kv", halves, strict=True):
        assert torch.equal(read_tensor(native[f"blocks.2.cross_attn.to_{part}.bias"]), wanted)
    patch = read_tensor(native["patch_embed.proj.weight"])
    assert torch.equal(patch, weights["x_embedder.proj.weight"])


@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_checkpoint_says_how_to_get_one(tmp_path: Path, empty: bool) -> None:
    folder = tmp_path if empty else tmp_path / "none"
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert "hf download meituan-longcat/LongCat-Video" in str(caught.value)
    assert "lcexport demo-checkpoint" in str(caught.value)


def test_two_layouts_at_once_are_refused(released: Path) -> None:
    (released / "transformer").mkdir()
    with pytest.raises(InputError, match="both dit/ and transformer/"):
        open_checkpoint(released)


def test_a_missing_shard_is_named(released: Path) -> None:
    (released / "dit" / SHARD).unlink()
    with pytest.raises(InputError, match=f"{SHARD} is missing"):
        open_checkpoint(released)


def test_a_truncated_shard_is_named(released: Path) -> None:
    path = released / "dit" / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{SHARD} is truncated"):
        open_checkpoint(released)


@pytest.mark.parametrize("shard", ["../dit/x.safetensors", "/etc/x.safetensors", "..", 3, "x.bin"])
def test_an_index_cannot_point_out_of_its_folder(released: Path, shard: object) -> None:
    edit_index(released / "dit", lambda names: names.update({"x_embedder.proj.bias": shard}))
    with pytest.raises(InputError, match=r"'x_embedder.proj.bias' is not a file name"):
        open_checkpoint(released)


def test_an_index_and_its_shards_must_agree_both_ways(released: Path) -> None:
    edit_index(released / "dit", lambda names: names.pop("final_layer.linear.bias"))
    with pytest.raises(InputError, match=r"does not list tensors.*final_layer.linear.bias"):
        open_checkpoint(released)
    edit_index(
        released / "dit",
        lambda names: names.update({"final_layer.linear.bias": SHARD, "ghost": SHARD}),
    )
    with pytest.raises(InputError, match=r"lists tensors that .* does not hold.*ghost"):
        open_checkpoint(released)


def test_a_tensor_in_two_shards_is_refused(make_dit: Make, weights: dict) -> None:
    folder = make_dit(weights, shards=3)
    extra = "diffusion_pytorch_model-00004-of-00004.safetensors"
    (folder / extra).write_bytes((folder / SHARD).read_bytes())
    edit_index(folder, lambda names: names.update({"ghost": extra}))
    with pytest.raises(InputError, match="is in both"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {}, "a": 1}'])
def test_an_unusable_index_is_an_input_error(released: Path, text: str) -> None:
    (released / "dit" / INDEX).write_text(text)
    with pytest.raises(InputError, match=r"index\.json"):
        open_checkpoint(released)


def test_several_files_without_an_index_are_ambiguous(released: Path) -> None:
    (released / "dit" / INDEX).unlink()
    with pytest.raises(InputError, match="several files"):
        open_checkpoint(released)


def test_a_broken_or_missing_configuration_is_refused(make_dit: Make, weights: dict) -> None:
    folder = make_dit(weights)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"config.json"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json is missing"):
        open_checkpoint(folder)


def test_a_misspelt_key_of_the_configuration_is_said(make_dit: Make, weights: dict, caplog) -> None:
    extra = {"text_token_zero_pad": True, "Depth": 3, "_diffusers_version": "0", "enable_x": True}
    open_checkpoint(make_dit(weights, config=extra))
    found = [record.message for record in caplog.records if record.name.startswith("lcexport")]
    assert len(found) == 2
    assert "'text_token_zero_pad' is not read; is 'text_tokens_zero_pad' meant?" in found[0]
    assert "'Depth' is not read; is 'depth' meant?" in found[1]


def test_the_known_configurations_raise_no_warning(released: Path, tmp_path: Path, caplog) -> None:
    convert(released, tmp_path / "native", to="native")
    open_checkpoint(tmp_path / "native")
    assert [record for record in caplog.records if record.name.startswith("lcexport")] == []


def test_a_model_of_another_kind_is_refused(make_dit: Make) -> None:
    with pytest.raises(InputError, match=r"no LongCat-Video DiT.*transformer.wte"):
        open_checkpoint(make_dit({"transformer.wte": torch.zeros(2)}))


def test_missing_and_extra_keys_are_named_and_counted(make_dit: Make, weights: dict) -> None:
    tensors = dict(weights)
    for index in range(3):
        del tensors[f"blocks.{index}.ffn.w1.weight"], tensors[f"blocks.{index}.ffn.w2.weight"]
    tensors["blocks.0.attn.rope"] = torch.zeros(2)
    with pytest.raises(InputError) as caught:
        check_tensors(open_checkpoint(make_dit(tensors)))
    assert "6 tensors are missing: blocks.0.ffn.w1.weight" in str(caught.value)
    assert "and 3 more" in str(caught.value)
    assert "1 tensor is not LongCat-Video's: blocks.0.attn.rope" in str(caught.value)


def test_a_wrong_shape_contradicts_the_configuration(make_dit: Make, weights: dict) -> None:
    tensors = weights | {"final_layer.linear.bias": torch.zeros(63)}
    with pytest.raises(InputError, match=r"contradicts.*final_layer.linear.bias.*\[63\].*\[64\]"):
        open_checkpoint(make_dit(tensors)).native()


@pytest.mark.parametrize("depth", [2, 4, 1_000_000_000])
def test_another_depth_contradicts_the_configuration(
    make_dit: Make, weights: dict, depth: int
) -> None:
    folder = make_dit(weights, config={"depth": depth})
    found = problems(open_checkpoint(folder))
    assert found == [f"config.json contradicts the weights: it says {depth} blocks, the weights "
                     "hold 3"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_dtype_that_is_not_for_weights_is_refused(
    make_dit: Make, weights: dict, dtype: torch.dtype
) -> None:
    tensors = weights | {"x_embedder.proj.bias": torch.zeros(256, dtype=dtype)}
    with pytest.raises(InputError, match=r"unsupported dtype: x_embedder.proj.bias"):
        check_tensors(open_checkpoint(make_dit(tensors)))
