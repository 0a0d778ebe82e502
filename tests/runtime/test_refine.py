"""Where a refinement starts: counts, padding, enlarging, noise."""

import numpy as np
import pytest
import torch

from lcexport.configs.errors import UsageError
from lcexport.runtime.refine import (
    RefineShape,
    condition_pixels,
    noised,
    pad_stage_one,
    stage_one_pixels,
)

# stage one, condition, spatial only -> new frames, latents of condition and noise,
# frames added in front and at the end, frames that the VAE is given and that it encodes
TABLE = [
    ((93, 0, False), (186, 0, 48, 0, 6, 192, 189)),
    ((93, 26, False), (186, 8, 40, 3, 0, 189, 189)),
    ((93, 1, False), (186, 4, 48, 12, 7, 205, 205)),
    ((93, 0, True), (93, 0, 24, 0, 3, 96, 93)),
    ((93, 13, True), (93, 4, 20, 0, 0, 93, 93)),
    ((93, 1, True), (93, 4, 24, 12, 4, 109, 109)),
    ((96, 0, False), (192, 0, 48, 0, 0, 192, 189)),
    ((1, 0, True), (1, 0, 4, 0, 15, 16, 13)),
]
SHAPES = [
    RefineShape(stage_one, cond, spatial)
    for spatial in (False, True)
    for stage_one in (1, 9, 13, 93, 96)
    for cond in (0, 1, 4, 5, 13, 26)
    if cond < stage_one * (1 if spatial else 2)
]


@pytest.mark.parametrize(("arguments", "expected"), TABLE)
def test_counts(arguments, expected):
    shape = RefineShape(*arguments)
    assert expected == (
        shape.new_frames,
        shape.cond_latents,
        shape.noise_latents,
        shape.added_in_front,
        shape.added_at_end,
        shape.padded_frames,
        shape.encoded_frames,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_parts_are_whole_groups_and_nothing_else_is_added(shape):
    assert shape.cond_latents % 4 == shape.noise_latents % 4 == 0
    assert shape.latents == 1 + (shape.padded_frames - 1) // 4
    assert 0 <= shape.added_in_front <= 15
    assert 0 <= shape.added_at_end <= 15
    if shape.cond_frames:
        assert shape.padded_frames == shape.encoded_frames
        # the condition alone, padded, encodes to exactly its latents
        assert shape.added_in_front + shape.cond_frames == 4 * (shape.cond_latents - 1) + 1
    else:
        assert shape.padded_frames - shape.encoded_frames == 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cut_takes_the_padding_off_again(shape):
    kept = pad_stage_one(numbered(shape.new_frames), shape)[:, :, : shape.encoded_frames]
    kept = kept[0, 0, shape.kept, 0, 0]
    missing = max(0, 3 - shape.added_at_end) if not shape.cond_frames else 0
    assert kept.tolist() == list(range(shape.new_frames - missing))


def test_up_to_three_frames_are_lost_without_a_condition():
    assert RefineShape(96).kept == slice(0, 189)
    assert RefineShape(95).kept == slice(0, 189)
    assert RefineShape(93).kept == slice(0, 186)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (5, -1), (5, 10), (5, 5, True), (1, 1, True)])
def test_nothing_to_refine_is_refused(arguments):
    with pytest.raises(UsageError, match="no frame"):
        RefineShape(*arguments)


def numbered(frames: int) -> torch.Tensor:
    """Pixels [1, 3, F, 2, 2] whose value is their frame's number."""
    return torch.arange(frames).float().view(1, 1, -1, 1, 1).expand(1, 3, -1, 2, 2)


def test_the_ends_are_repeated():
    shape = RefineShape(9, 5)  # 5 of 18 given: 4 latents of 13 frames, 4 of 16
    padded = pad_stage_one(numbered(18), shape)
    assert padded.shape == (1, 3, 29, 2, 2)
    assert padded[0, 0, :, 0, 0].tolist() == [0] * 8 + list(range(18)) + [17] * 3


def test_another_number_of_frames_is_refused():
    with pytest.raises(UsageError, match="got 17; wanted 18"):
        pad_stage_one(numbered(17), RefineShape(9))


def test_the_condition_is_the_end_of_the_given_frames():
    condition = condition_pixels(numbered(40), RefineShape(93, 26))
    assert condition[0, 0, :, 0, 0].tolist() == [14] * 3 + list(range(14, 40))
    picture = condition_pixels(numbered(1), RefineShape(93, 1))
    assert picture[0, 0, :, 0, 0].tolist() == [0] * 13


@pytest.mark.parametrize(("given", "cond"), [(25, 26), (5, 0)])
def test_too_few_given_frames(given, cond):
    with pytest.raises(UsageError, match=f"got {given}; wanted at least .* of {cond}"):
        condition_pixels(numbered(given), RefineShape(93, cond))


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unenlarged_frames_only_change_their_range(frames, dtype):
    pixels = stage_one_pixels(frames, (6, 8), 5, dtype)
    assert pixels.dtype == dtype
    expected = torch.from_numpy(frames).to(dtype).permute(3, 0, 1, 2)[None] / 255 * 2 - 1
    assert torch.equal(pixels, expected)


def test_enlarging_is_linear_between_corners(frames):
    pixels = stage_one_pixels(frames, (11, 15), 9, torch.float32)
    assert pixels.shape == (1, 3, 9, 11, 15)
    small = torch.from_numpy(frames).float().permute(3, 0, 1, 2)[None] / 255 * 2 - 1
    # every second sample along time, height and width is an old one, the others are means
    torch.testing.assert_close(pixels[:, :, ::2, ::2, ::2], small, rtol=0, atol=1e-6)
    between = (small[:, :, 1:] + small[:, :, :-1]) / 2
    torch.testing.assert_close(pixels[:, :, 1::2, ::2, ::2], between, rtol=0, atol=1e-6)
    across = (small[..., 1:] + small[..., :-1]) / 2
    torch.testing.assert_close(pixels[:, :, ::2, ::2, 1::2], across, rtol=0, atol=1e-6)


def test_bfloat16_is_what_is_computed_in(frames):
    wide, narrow = (
        stage_one_pixels(frames, (11, 15), 9, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert (wide - narrow).abs().max() < 0.05
    assert not torch.equal(wide.bfloat16(), narrow)  # rounded on the way, not only at the end


def test_an_empty_target_is_refused(frames):
    with pytest.raises(UsageError, match="enlarge to nothing"):
        stage_one_pixels(frames, (0, 8), 5, torch.float32)
    with pytest.raises(UsageError, match="not frames"):
        stage_one_pixels(frames[:0], (6, 8), 5, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_goes_in_part_of_the_way(dtype):
    latents, noise = torch.randn(2, 1, 16, 4, 2, 2).to(dtype)
    assert torch.equal(noised(latents, noise, 0), latents)
    assert torch.equal(noised(latents, noise, 1), noise)
    mixed = noised(latents, noise, 0.25)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, latents * 0.75 + noise * 0.25)


def test_noise_that_does_not_fit_is_refused():
    latents = torch.zeros(1, 16, 4, 2, 2)
    with pytest.raises(UsageError, match="out of range"):
        noised(latents, latents, 1.5)
    with pytest.raises(UsageError, match="does not fit the latents"):
        noised(latents, latents[:, :, :1], 0.5)
    with pytest.raises(UsageError, match="does not fit the latents"):
        noised(latents, latents.bfloat16(), 0.5)
