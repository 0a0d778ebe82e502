"""The whole DiT against the original's forward pass: outputs, and what lies in between."""

import pytest
import torch
from torch import Tensor

from lcexport.compare import difference
from lcexport.configs.errors import UsageError

ATOL = 2e-5  # float32, one forward pass


@pytest.fixture(scope="module")
def t2v(golden):
    return golden("dit_tiny_t2v")


@pytest.fixture(scope="module")
def i2v(golden):
    return golden("dit_tiny_i2v")


def forward(dit, case, mask: Tensor | None, timestep: str = "timestep", cond: int = 0) -> Tensor:
    features = case["encoder_hidden_states"]
    return dit(case["hidden_states"], features, case[timestep], mask, num_cond_latents=cond)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("zero_pad", "name"), [(True, "zero_pad"), (False, "compact")])
def test_text_to_video(make_dit_model, t2v, zero_pad, name):
    dit = make_dit_model(zero_pad=zero_pad)
    assert_close(forward(dit, t2v, t2v["encoder_attention_mask"]), t2v[f"output_{name}"])


@pytest.mark.parametrize("zero_pad", [True, False])
def test_without_a_mask_every_token_counts(make_dit_model, t2v, zero_pad):
    dit = make_dit_model(zero_pad=zero_pad)
    assert_close(forward(dit, t2v, None), t2v["output_mask_none"])
    ones = torch.ones_like(t2v["encoder_attention_mask"])
    assert_close(forward(dit, t2v, ones), t2v["output_mask_none"])


def test_every_module_in_between(dit, t2v):
    modules = {
        "x_embedder": dit.patch_embed,
        "t_embedder": dit.time_embedder,
        "y_embedder": dit.caption_embedder,
        "block0_attn": dit.blocks[0].self_attn,
        "block0_cross_attn": dit.blocks[0].cross_attn,
        "block0_ffn": dit.blocks[0].ffn,
        "block0": dit.blocks[0],
        "final_layer": dit.final_layer.proj,
    }
    assert {f"mid.{name}" for name in modules} == {n for n in t2v.tensors if n.startswith("mid.")}
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, given, out, name=name: seen.update({name: out}))
        for name, module in modules.items()
    ]
    try:
        forward(dit, t2v, t2v["encoder_attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    for name, out in seen.items():
        wanted = t2v[f"mid.{name}"]
        assert_close(out, wanted.reshape(-1, wanted.shape[-1]))


@pytest.mark.parametrize(
    ("zero_pad", "timestep", "cond", "name"),
    [
        (True, "timestep", 1, "output_zero_pad"),
        (False, "timestep", 1, "output_compact"),
        (True, "timestep_cond2", 2, "output_cond2_zero_pad"),
    ],
)
def test_conditioning_latents(make_dit_model, i2v, zero_pad, timestep, cond, name):
    dit = make_dit_model(zero_pad=zero_pad)
    got = forward(dit, i2v, i2v["encoder_attention_mask"], timestep, cond)
    assert_close(got, i2v[name])


def test_conditioning_frames_see_neither_noise_nor_text(dit, i2v):
    mask = i2v["encoder_attention_mask"]
    changed = dict(i2v.tensors)
    changed["hidden_states"] = i2v["hidden_states"].clone()
    changed["hidden_states"][:, :, 1:] += 1
    changed["encoder_hidden_states"] = -i2v["encoder_hidden_states"]
    before, after = (forward(dit, case, mask, cond=1) for case in (i2v, changed))
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert not torch.equal(before[:, :, 1:], after[:, :, 1:])


@pytest.mark.parametrize(("case", "cond", "low", "high"), [
    ("dit_tiny_t2v", 0, 1.5e-2, 2.5e-2),  # 437.5 is rounded, too
    ("dit_tiny_i2v", 1, 4e-3, 7e-3),  # timesteps exact in bfloat16
])  # fmt: skip
def test_bfloat16_is_as_far_from_float32_as_the_original(
    make_dit_model, golden, case, cond, low, high
):
    case = golden(case)
    got = forward(make_dit_model(torch.bfloat16), case, case["encoder_attention_mask"], cond=cond)
    assert low < difference(got, case["output_zero_pad"]).relative_l2 < high


def test_bfloat16_rounds_timesteps_on_entry(make_dit_model, t2v):
    mask = t2v["encoder_attention_mask"]
    cases = [{**t2v.tensors, "timestep": torch.full((2,), value)} for value in (437.5, 438.0)]
    first, second = (forward(make_dit_model(torch.bfloat16), case, mask) for case in cases)
    assert torch.equal(first, second)
    first, second = (forward(make_dit_model(), case, mask) for case in cases)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_velocity_is_float32(make_dit_model, t2v, dtype):
    assert forward(make_dit_model(dtype), t2v, None).dtype == torch.float32


def test_one_timestep_a_sample_is_that_timestep_on_every_frame(dit, t2v):
    spread = {**t2v.tensors, "timestep": t2v["timestep"][:, None].expand(-1, 3)}
    assert torch.equal(forward(dit, t2v, None), forward(dit, spread, None))


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2, 16, 3, 7, 12), "7 x 12"),
        ((2, 16, 3, 8, 11), "multiples of 16"),
        ((2, 4, 3, 8, 12), r"got \[2, 4, 3, 8, 12\]; wanted \[B, 16, T, H, W\]"),
        ((16, 3, 8, 12), "hidden_states has the wrong shape"),
    ],
)
def test_latents_of_a_shape_the_model_cannot_take(dit, t2v, shape, match):
    with pytest.raises(UsageError, match=match):
        dit(torch.zeros(shape), t2v["encoder_hidden_states"], torch.zeros(shape[0]))


@pytest.mark.parametrize("shape", [(1,), (2, 1), (2, 4), (3, 2), (2, 3, 1), ()])
def test_timesteps_of_a_wrong_shape(dit, t2v, shape):
    with pytest.raises(UsageError, match="timestep has the wrong shape"):
        dit(t2v["hidden_states"], t2v["encoder_hidden_states"], torch.zeros(shape))


def test_swapped_arguments_are_told_their_order(dit, t2v):
    with pytest.raises(UsageError, match="order is hidden_states, encoder_hidden_states, timestep"):
        dit(t2v["hidden_states"], t2v["timestep"], t2v["encoder_hidden_states"])


@pytest.mark.parametrize("cond", [-1, 3, 4])
def test_conditioning_must_leave_a_frame(dit, t2v, cond):
    with pytest.raises(UsageError, match=r"wanted 0\.\.2"):
        forward(dit, t2v, None, cond=cond)
