"""Operations of one forward pass, against counts made by hand."""

import pytest

from lcexport.configs.dit import DiTConfig
from lcexport.configs.presets import preset_from
from lcexport.dit.sparse import Sparsity
from lcexport.flops import forward_flops, share_saved, sparse_flops


def test_the_released_model_at_480p():
    preset = preset_from("480p")
    flops = forward_flops(DiTConfig(), preset.latent_frames, preset.tokens, preset.text_tokens)
    assert flops.total == pytest.approx(1.967e15, rel=1e-3)
    assert flops.linear == pytest.approx(0.848e15, rel=1e-3)
    assert flops.self_attention == pytest.approx(1.102e15, rel=1e-3)
    assert flops.cross_attention == pytest.approx(0.017e15, rel=5e-2)
    assert flops.embedding < 1e-3 * flops.total


def test_a_model_small_enough_to_count():
    config = DiTConfig(hidden_size=4, depth=1, num_heads=1, caption_channels=3, adaln_tembed_dim=2)
    assert config.ffn_hidden == 256
    flops = forward_flops(config, frames=2, tokens=8, text_tokens=5)
    # six C x C projections and three C x F, for each token; the modulation, for each frame
    assert flops.linear == 2 * 8 * (6 * 16 + 3 * 4 * 256) + 2 * 2 * 2 * 24
    assert flops.self_attention == 4 * 8 * 8 * 4
    assert flops.cross_attention == 4 * 8 * 5 * 4 + 2 * 2 * 5 * 16
    assert flops.embedding == 2 * 8 * 64 * 4 + 2 * 5 * (12 + 16) + 2 * 8 * 4 * 64
    assert flops.total == (
        flops.linear + flops.self_attention + flops.cross_attention + flops.embedding
    )


def test_attention_grows_with_the_square_of_the_tokens():
    small, large = (forward_flops(DiTConfig(), 1, tokens, 512) for tokens in (1000, 2000))
    assert large.self_attention == 4 * small.self_attention


def test_a_sparse_pass_at_704x1280():
    grid, config = (48, 44, 80), DiTConfig()
    dense = forward_flops(config, 48, 48 * 44 * 80, 512)
    sparse = sparse_flops(config, grid, 512, Sparsity())
    gate = config.depth * 2 * 2640 * 2640 * config.hidden_size
    assert sparse.self_attention == dense.self_attention // 16 + gate
    assert sparse.linear == dense.linear
    assert 0.7 < share_saved(dense, sparse) < 0.9


def test_conditioning_frames_attend_among_themselves():
    config, grid, everything = DiTConfig(), (12, 8, 8), Sparsity(0.0)
    whole = sparse_flops(config, grid, 512, everything)
    split = sparse_flops(config, grid, 512, everything, cond_frames=4)
    # a third of the queries see a third of the keys
    assert split.self_attention / whole.self_attention == pytest.approx(2 / 3 + 1 / 9)


def test_a_single_frame_is_dense():
    dense = forward_flops(DiTConfig(), 1, 64, 512)
    assert sparse_flops(DiTConfig(), (1, 8, 8), 512, Sparsity()) == dense
