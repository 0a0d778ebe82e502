"""The arithmetic against a whole-matrix evaluation, and one rounding however many LoRAs."""

import pytest
import torch
from lora_files import lora_tensors
from safetensors.torch import load_file

from lcexport.checkpoint import open_checkpoint, reading, write_native
from lcexport.configs.errors import InputError
from lcexport.demo import CONFIG
from lcexport.lora import LoraChoice, open_merge, read_lora, swapped
from lcexport.lora import merge as merging
from lcexport.lora.file import linears

SMALL = CONFIG.model_copy(update={"hidden_size": 128, "num_heads": 1, "depth": 2})


def whole_delta(path, name: str) -> torch.Tensor:
    """alpha_scale * concat_j(up_j @ down_j) of one module, in float64."""
    module = read_lora(path).modules[name]
    tensors = {key: value.double() for key, value in load_file(path).items()}
    downs = tensors[module.down.name].split(module.rank)
    ups = [tensors[up.name] for up in module.ups]
    product = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)])
    return module.alpha_scale * product


@pytest.fixture
def two(make_lora):
    """Two LoRAs over every Linear, the second at strength -0.5."""
    first, second = (make_lora(name=f"l{seed}", seed=seed, config=SMALL) for seed in (1, 2))
    return [LoraChoice(path=first), LoraChoice(path=second, strength=-0.5)]


@pytest.fixture(params=[50_000, 1 << 21], ids=["small chunks", "whole tensors"])
def _chunks(request, monkeypatch):
    """Chunks that begin and end in the middle of rows, and chunks larger than any tensor here."""
    for module in (merging, reading):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_gets_its_share(two, dtype):
    base = {
        name: torch.randn(pair.native_shape).to(dtype)
        for pair in linears(SMALL).values()
        for name in pair.natives
    }
    copies = {name: tensor.clone() for name, tensor in base.items()}
    found = swapped(base, open_merge(two, SMALL))
    assert found.keys() == base.keys()
    assert all(torch.equal(base[name], copies[name]) for name in base)
    for module, pair in linears(SMALL).items():
        delta = whole_delta(two[0].path, module) - 0.5 * whole_delta(two[1].path, module)
        wanted = torch.cat([copies[name] for name in pair.natives]).double() + delta
        got = torch.cat([found[name] for name in pair.natives])
        assert got.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6)
        else:  # rounded once: half a unit in the last of 8 places, and no more
            limit = wanted.abs().log2().floor().exp2() * 2**-8
            assert ((got.double() - wanted).abs() <= limit * (1 + 1e-3) + 2e-6).all()


def test_what_no_lora_names_is_handed_through(make_lora):
    path = make_lora(modules=("blocks.1.attn.qkv",))
    merge = open_merge([LoraChoice(path=path)], CONFIG)
    names = [f"blocks.1.self_attn.to_{part}.weight" for part in "qkv"]
    base = {name: torch.randn(256, 256) for name in [*names, "blocks.0.ffn.w1.weight"]}
    found = swapped(base, merge)
    assert [name for name in base if found[name] is not base[name]] == names


def test_a_joint_projection_with_one_block_is_split_as_the_weight_is(make_lora):
    """qkv as one matrix: nothing in the format says that it has three blocks."""
    tensors = lora_tensors(modules=("blocks.0.ffn.w1",))
    # w1 is 768 x 256, as qkv is
    path = make_lora({key.replace("ffn", "attn").replace("w1", "qkv"): value
                      for key, value in tensors.items()})  # fmt: skip
    delta = whole_delta(path, "blocks.0.attn.qkv").float()
    zero = {f"blocks.0.self_attn.to_{p}.weight": torch.zeros(256, 256) for p in "qkv"}
    found = swapped(zero, open_merge([LoraChoice(path=path)], CONFIG))
    torch.testing.assert_close(torch.cat(list(found.values())), delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("bulk", "islands"), [("fp32", "checkpoint"), ("bf16", "checkpoint"), ("bf16", "original")]
)
@pytest.mark.usefixtures("_chunks")
def test_the_stream_writes_the_same_bits(make_lora, demo_checkpoint, tmp_path, bulk, islands):
    checkpoint = open_checkpoint(demo_checkpoint)
    strengths = {make_lora(name=f"l{seed}", seed=seed): 1 - seed for seed in (0, 3)}
    choices = [LoraChoice(path=path, strength=value) for path, value in strengths.items()]
    merge = open_merge(choices, CONFIG)
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    choice = {"bulk": bulk, "islands": islands}
    plain = write_native(checkpoint, base, **choice)
    report = write_native(checkpoint, merged, deltas=merge, **choice)
    wanted, found = swapped(load_file(base), merge), load_file(merged)
    assert report.tensors_sha256 == plain.tensors_sha256  # of the source
    assert [(t.start, t.end) for t in report.tensors.values()] == [
        (t.start, t.end) for t in plain.tensors.values()
    ]
    same = [name for name in wanted if name.endswith("weight") and name in merge]
    assert len(same) == 4 * 12 + 6
    for name in wanted:
        # From a float32 checkpoint the bulk is rounded once; over a bundle, of a rounded base.
        if bulk == "fp32" or name not in merge or wanted[name].dtype == torch.float32:
            assert torch.equal(found[name], wanted[name]), name
        else:
            difference = (found[name].float() - wanted[name].float()).abs().max()
            assert 0 < difference < 0.05


def test_a_sum_that_does_not_fit_the_dtype(make_lora, demo_checkpoint, tmp_path):
    tensors = lora_tensors(modules=("blocks.2.ffn.w1",))
    strong = LoraChoice(path=make_lora(tensors), strength=3e38)
    merge = open_merge([strong] * 9, CONFIG)
    with pytest.raises(InputError, match=r"blocks\.2\.ffn\.w1\.weight does not fit .*strength"):
        write_native(open_checkpoint(demo_checkpoint), tmp_path / "x", bulk="bf16", deltas=merge)
    assert list(tmp_path.glob("x*")) == []
