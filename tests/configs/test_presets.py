"""Every shipped preset loads, sizes written out are checked, and rounding is said aloud."""

import logging

import pytest

from lcexport.configs.errors import UsageError
from lcexport.configs.presets import Preset, preset_from, preset_names, round_frames


@pytest.mark.parametrize("name", preset_names())
def test_a_shipped_preset_loads_without_a_word(name, caplog):
    preset = preset_from(name)
    assert preset.name == name
    channels, frames, height, width = preset.latent_shape
    assert (channels, frames) == (16, preset.latent_frames)
    assert (height * 8, width * 8) == (preset.height, preset.width)
    assert preset.tokens == frames * height * width // 4
    assert caplog.records == []
    written_out = preset_from(f"{preset.height}x{preset.width}x{preset.frames}")
    assert written_out.latent_shape == preset.latent_shape


def test_the_shipped_presets():
    assert {"480p", "480p-portrait", "720p", "demo"} <= set(preset_names())


@pytest.mark.parametrize(
    ("name", "latents", "tokens"),
    [
        ("480p", (16, 24, 60, 104), 37_440),
        ("480p-portrait", (16, 24, 104, 60), 37_440),
        ("720p", (16, 24, 88, 160), 84_480),
        ("demo", (16, 5, 16, 24), 480),
    ],
)
def test_latents_and_tokens(name, latents, tokens):
    preset = preset_from(name)
    assert preset.latent_shape == latents
    assert preset.tokens == tokens


def test_the_released_samplers_defaults():
    preset = preset_from("480p")
    assert (preset.steps, preset.guidance_scale, preset.fps, preset.text_tokens) == (50, 4, 15, 512)


def test_a_size_written_out():
    preset = preset_from("64x96x9")
    assert (preset.name, preset.height, preset.width, preset.frames) == ("64x96x9", 64, 96, 9)


@pytest.mark.parametrize(
    ("asked", "used"), [(1, 1), (2, 1), (4, 5), (5, 5), (8, 9), (92, 93), (93, 93), (96, 97)]
)
def test_frames_are_rounded_to_4k_plus_1_and_it_is_logged(asked, used, caplog):
    assert round_frames(asked) == used
    with caplog.at_level(logging.WARNING):
        preset = preset_from(f"64x96x{asked}")
    assert preset.frames == used
    assert preset.name == f"64x96x{used}"
    told = [record.getMessage() for record in caplog.records]
    wanted = f"{asked} frames are not 4k+1: {used} frames are used"
    assert told == ([] if asked == used else [wanted])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("480x830x93", "width must be a multiple of 16; got 830"),
        ("72x96x9", "height must be a multiple of 16; got 72"),
        ("0x96x9", "height should be greater than or equal to 16; got 0"),
        ("64x8192x9", "width should be less than or equal to 4096; got 8192"),
        ("64x96x0", "frames should be greater than or equal to 1; got 0"),
        ("64x96x99999", "frames should be less than or equal to 4096"),
    ],
)
def test_sizes_the_model_cannot_take(text, match):
    with pytest.raises(UsageError, match=match) as caught:
        preset_from(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    ["", "481p", "480P", "480x832", "480x832x93x1", "-64x96x9", "64×96×9", "../480p", "x" * 99],
)
def test_an_unknown_name_is_told_the_known_ones(text):
    with pytest.raises(UsageError, match=r"480p, 480p-portrait, 720p.*HEIGHTxWIDTHxFRAMES"):
        preset_from(text)


def test_a_preset_has_no_unknown_fields():
    with pytest.raises(ValueError, match="Extra inputs"):
        Preset.model_validate({"name": "a", "height": 64, "width": 96, "frames": 9, "hight": 1})
