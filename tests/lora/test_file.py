"""A LoRA is understood whole or refused in one sentence that names the module."""

import pytest
import torch
from lora_files import LORA_A, LORA_B, key_of, lora_tensors

from lcexport.configs.errors import InputError
from lcexport.demo import CONFIG
from lcexport.lora import check_fits, check_values, open_merge, read_lora
from lcexport.lora.choice import LoraChoice

QKV, W1 = "blocks.0.attn.qkv", "blocks.0.ffn.w1"
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha_scale"
FIRST, SECOND = "lora_up.blocks.0.weight", "lora_up.blocks.1.weight"


def test_the_originals_own_files_are_read():
    a, b = read_lora(LORA_A), read_lora(LORA_B)
    assert len(a.modules) == 3 * 9 + 2
    assert set(b.modules) == {f"blocks.{i}.{m}" for i in range(3) for m in ("attn.qkv", "ffn.w2")}
    qkv = a.modules[QKV]
    assert (qkv.rank, len(qkv.ups), qkv.out_features, qkv.in_features) == (8, 3, 768, 256)
    assert (qkv.alpha_scale, b.modules[QKV].alpha_scale) == (0.5, 0.75)
    check_values(a)


def without(module: str, parameter: str):
    return lambda tensors: tensors.pop(key_of(module, parameter))


def instead(module: str, parameter: str, value: torch.Tensor):
    return lambda tensors: tensors.update({key_of(module, parameter): value})


def moved(module: str, parameter: str, to: str):
    return lambda tensors: tensors.update({to: tensors.pop(key_of(module, parameter))})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(W1, ALPHA), f"{W1} has no alpha_scale"),
        (without(W1, DOWN), f"{W1} has no lora_down"),
        (without(W1, UP), f"{W1} has no lora_up"),
        (without(QKV, FIRST), rf"{QKV} lacks a block of lora_up; got \[1, 2\]"),
        (instead(QKV, UP, torch.ones(768, 4)), f"{QKV} has both"),
        (instead(W1, ALPHA, torch.ones(2)), rf"{W1} .*not one number; got \[2\]"),
        (instead(W1, ALPHA, torch.tensor(torch.inf)), f"{W1} .*alpha_scale that is not finite"),
        (instead(W1, UP, torch.ones(768, 3)), f"{W1} .*different ranks; got 4 rows.*wanted 1 x 3"),
        (instead(QKV, DOWN, torch.ones(4, 256)), f"{QKV} .*got 4 rows .*wanted 3 x 4"),
        (instead(QKV, SECOND, torch.ones(128, 4)), f"{QKV} is not made of matrices that go"),
        (instead(W1, UP, torch.ones(768)), f"{W1} is not made of matrices"),
        (instead(W1, UP, torch.ones(768, 0)), f"{W1} is not made of matrices"),
        (instead(W1, UP, torch.ones(768, 4).long()), f"{W1} has an unsupported dtype; got I64"),
        (moved(W1, UP, key_of(W1, "lora_mid.weight")), "lora_mid.weight' is not of a LongCat"),
        (moved(W1, UP, key_of(W1, "lora_up.blocks.x.weight")), "blocks.x.weight' is not of a"),
        (moved(W1, UP, "blocks.0.ffn.w1.lora_B.weight"), "lora_B.weight' is not of a LongCat"),
    ],
)
def test_what_is_wrong_in_itself(make_lora, change, said):
    tensors = lora_tensors(modules=(QKV, W1))
    change(tensors)
    with pytest.raises(InputError, match=said):
        read_lora(make_lora(tensors))


def test_a_file_without_tensors_is_no_lora(make_lora):
    with pytest.raises(InputError, match="holds no LoRA"):
        read_lora(make_lora({}))


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [
        ("blocks.4.ffn.w1", (768, 256), r"blocks\.4\.ffn\.w1 is no Linear.*DiT of 4 blocks"),
        ("blocks.0.ffn.w4", (768, 256), r"blocks\.0\.ffn\.w4 is no Linear"),
        ("blocks.0.attn.q_norm", (128, 1), r"q_norm is no Linear"),
        ("x_embedder.proj", (256, 64), r"x_embedder\.proj is no Linear"),
        ("blocks.0.self_attn.to_q", (256, 256), r"to_q is no Linear"),
        (W1, (768, 128), r"w1 has another shape; got \[768, 128\]; wanted \[768, 256\]"),
        (QKV, (256, 256), r"qkv has another shape; got \[256, 256\]; wanted \[768, 256\]"),
    ],
)
def test_what_does_not_fit_the_model(make_lora, module, shape, said):
    out, width = shape
    tensors = {
        key_of(module, DOWN): torch.ones(2, width),
        key_of(module, UP): torch.ones(out, 2),
        key_of(module, ALPHA): torch.tensor(1.0),
    }
    lora = read_lora(make_lora(tensors))
    with pytest.raises(InputError, match=said):
        check_fits(lora, CONFIG)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(make_lora, bad):
    tensors = lora_tensors(modules=(QKV, W1))
    tensors[key_of(QKV, SECOND)][5, 1] = bad
    path = make_lora(tensors)
    with pytest.raises(InputError, match=rf"{QKV} holds NaN or infinity in {SECOND}"):
        check_values(read_lora(path))
    with pytest.raises(InputError, match=f"{QKV} holds NaN"):
        open_merge([LoraChoice(path=path)], CONFIG)


def test_every_header_is_checked_before_any_value(make_lora):
    tensors = lora_tensors(modules=(W1,))
    tensors[key_of(W1, DOWN)][0, 0] = torch.nan
    not_finite = make_lora(tensors, "first")
    foreign = make_lora({key_of("nothing", ALPHA): torch.tensor(1.0)}, "second")
    with pytest.raises(InputError, match=r"nothing has no lora_down\.weight, lora_up"):
        open_merge([LoraChoice(path=not_finite), LoraChoice(path=foreign)], CONFIG)
