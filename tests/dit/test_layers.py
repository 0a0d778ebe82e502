"""The layers' arithmetic against the original modules'."""

import pytest
import torch
from torch import Tensor

from lcexport.configs.dit import DiTConfig
from lcexport.dit.layers import (
    Geometry,
    HeadNorm,
    TimeEmbedder,
    gated_add,
    layer_norm,
    modulate,
    rope_axes,
    rope_grid,
    rotate,
    timestep_frequencies,
)


@pytest.fixture(scope="module")
def parts(golden):
    return golden("dit_parts")


def angles(geometry: Geometry, head_dim: int) -> Tensor:
    """Angles as the original keeps them: each one twice, for the two members of its pair."""
    return rope_grid(*rope_axes(geometry, head_dim)).repeat_interleave(2, dim=-1)


def test_timestep_features_are_cosines_then_sines(parts):
    features: list[Tensor] = []
    embedder = TimeEmbedder(256, 64)
    embedder.linear_1.register_forward_pre_hook(lambda module, given: features.append(given[0]))
    embedder(parts["t"], timestep_frequencies(256))
    # processors differ in the last bit of a frequency: 6e-8, and a thousand times that as an angle
    torch.testing.assert_close(features[0], parts["t_freq"], rtol=0, atol=6e-5)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_rope_angles_of_every_head_dimension(parts, head_dim):
    got = angles(Geometry(1, 2, 3, 2), head_dim)
    assert torch.equal(got, parts[f"rope_angles_hd{head_dim}"])


def test_rope_turns_adjacent_pairs_in_the_order_time_row_column(parts):
    geometry = Geometry(1, 3, 4, 6)
    table = rope_grid(*rope_axes(geometry, 128))
    assert torch.equal(angles(geometry, 128), parts["rope_angles"])
    for name in ("rope_q", "rope_k"):
        got = rotate(parts[name], table.cos(), table.sin())
        torch.testing.assert_close(got, parts[f"{name}_out"], rtol=0, atol=1e-6)


def test_rope_spread_in_cosines_equals_cosines_of_the_spread():
    axes = rope_axes(Geometry(1, 3, 4, 6), 128)
    spread = rope_grid(*(axis.cos() for axis in axes))
    assert torch.equal(spread, rope_grid(*axes).cos())


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "rms_out"), (torch.bfloat16, "rms_out_bf16")]
)
def test_head_norm_is_exact_in_both_precisions(parts, dtype, name):
    norm = HeadNorm(128).requires_grad_(False)
    norm.weight = torch.nn.Parameter(parts["rms_w"].to(dtype), requires_grad=False)
    got = norm(parts["rms_x"].to(dtype))
    assert got.dtype == parts[name].dtype
    assert torch.equal(got, parts[name])


def test_swiglu_widths(parts):
    for size, hidden in parts["swiglu_hidden_dims"].tolist():
        assert DiTConfig(hidden_size=size, num_heads=1).ffn_hidden == hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulation_and_gate_are_per_frame_and_float32_inside(dtype):
    geometry = Geometry(2, 3, 2, 2)
    x, out = torch.randn(24, 8).to(dtype), torch.randn(24, 8).to(dtype)
    shift, scale, gate = torch.randn(3, 6, 8)
    frame = torch.arange(24) // geometry.frame_tokens
    wanted = layer_norm(x) * (1 + scale[frame]) + shift[frame]
    assert torch.equal(modulate(x, shift, scale, geometry), wanted.to(dtype))
    wanted = x.float() + gate[frame] * out.float()
    assert torch.equal(gated_add(x, gate, out, geometry), wanted.to(dtype))


def test_geometry_counts_tokens():
    geometry = Geometry(2, 24, 30, 52, num_cond_latents=4)
    assert (geometry.frame_tokens, geometry.tokens, geometry.cond_tokens) == (1560, 37_440, 6_240)
