"""From any checkpoint layout to the same model; float32 islands; configurations that do not do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.checkpoint import convert, is_island
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError, UsageError
from lcexport.dit import LongCatDiT, load_dit

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def fine_folder(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden DiT with float32 weights that bfloat16 cannot hold, in two shards."""
    folder = tmp_path_factory.mktemp("fine")
    (folder / "config.json").write_bytes((dit_folder / "config.json").read_bytes())
    tensors = {n: v.float() * (1 + 1e-4) for n, v in load_file(dit_folder / WEIGHTS).items()}
    names, weight_map = sorted(tensors), {}
    for shard in range(2):
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[shard::2]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::2], file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_same(got: LongCatDiT, wanted: LongCatDiT) -> None:
    mine, other = got.state_dict(), wanted.state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name].dtype == other[name].dtype
        assert torch.equal(mine[name], other[name]), name


def test_original_and_converted_checkpoints_give_the_same_model(dit_folder, fine_folder, tmp_path):
    for i, source in enumerate((dit_folder, fine_folder)):
        convert(source, tmp_path / f"{i}", to="native")
        assert_same(load_dit(tmp_path / f"{i}"), load_dit(source))


def test_shards_give_the_values_that_are_in_them(dit_folder, fine_folder):
    fine, coarse = load_dit(fine_folder).state_dict(), load_dit(dit_folder).state_dict()
    for name, value in fine.items():
        assert torch.equal(value, coarse[name] * (1 + 1e-4)), name


def test_islands_stay_float32_in_a_bfloat16_model(fine_folder):
    whole, bulk = load_dit(fine_folder), load_dit(fine_folder, torch.bfloat16)
    assert bulk.dtype == torch.bfloat16
    kept = 0
    for name, value in bulk.state_dict().items():
        exact = whole.state_dict()[name]
        assert torch.equal(value, exact if is_island(name) else exact.bfloat16()), name
        kept += is_island(name)
    # per block: adaLN and the norm before cross-attention; the time embedder; the final layer
    assert kept == 3 * 4 + 4 + 4


def test_original_islands_are_rounded_and_float32(fine_folder):
    whole = load_dit(fine_folder).state_dict()
    rounded = load_dit(fine_folder, torch.bfloat16, islands="original").state_dict()
    for name, value in rounded.items():
        if is_island(name):
            assert value.dtype == torch.float32
            assert torch.equal(value, whole[name].bfloat16().float()), name
            assert name.endswith("bias") or not torch.equal(value, whole[name]), name


def test_a_loaded_model_is_frozen(dit_folder):
    dit = load_dit(dit_folder)
    assert not dit.training
    assert not any(parameter.requires_grad for parameter in dit.parameters())


def test_choices_that_do_not_exist(dit_folder):
    with pytest.raises(UsageError, match="bulk dtype"):
        load_dit(dit_folder, torch.float16)
    with pytest.raises(UsageError, match="islands"):
        load_dit(dit_folder, islands="rounded")


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_dit(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\xff\xfe", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "valid dictionary"),
        ('{"hidden_size": 0}', "hidden_size: .*greater than or equal to 1"),
        ('{"hidden_size": "wide"}', "hidden_size: .*valid integer"),
        ('{"depth": null}', "depth: .*valid integer"),
        ('{"hidden_size": 100, "num_heads": 3}', "not a multiple of num_heads"),
        ('{"hidden_size": 9, "num_heads": 3}', "head dimension 3 is odd"),
        ('{"patch_size": [2, 2, 2]}', r"patch_size \(2, 2, 2\) is not"),
    ],
)
def test_configurations_that_do_not_do(tmp_path, text, match):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=match) as caught:
        DiTConfig.from_json(tmp_path / "config.json")
    assert "config.json" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_missing_configuration(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        DiTConfig.from_json(tmp_path / "config.json")


def test_both_namings_of_a_configuration(tmp_path):
    for heads, layers in (("num_heads", "depth"), ("num_attention_heads", "num_layers")):
        (tmp_path / "config.json").write_text(json.dumps({heads: 16, layers: 7, "enable_bsa": 1}))
        config = DiTConfig.from_json(tmp_path / "config.json")
        assert (config.num_heads, config.depth, config.head_dim) == (16, 7, 256)
