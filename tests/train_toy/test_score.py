"""The scorer reads every attribute of an ideal clip, also of a noisy one, and nothing of none."""

import dataclasses

import pytest
import torch

from tools.train_toy.score import accuracy, read
from tools.train_toy.training import generator_at
from tools.train_toy.world import Clip, Scene, full_caption, placed, render, scenes

EVERY = [*scenes(held=True), *scenes(held=False)][::29]


def frames_of(shown: Scene | Clip) -> torch.Tensor:
    """[F, H, W, 3] in 0..1."""
    clip = shown if isinstance(shown, Clip) else placed(shown, generator_at(0))
    return render([clip])[0].permute(1, 2, 3, 0) / 2 + 0.5


@pytest.mark.parametrize("scene", EVERY, ids=full_caption)
def test_an_ideal_clip_is_read_as_its_scene(scene):
    reading = read(frames_of(scene))
    assert all(reading.agrees(scene).values()), reading
    assert reading.fit > 0.95


@pytest.mark.parametrize("scene", EVERY[::4], ids=full_caption)
def test_noise_does_not_change_the_reading(scene):
    frames = frames_of(scene)
    noisy = frames + 0.05 * torch.randn(frames.shape, generator=generator_at(1))
    assert all(read(noisy).agrees(scene).values())


def test_nothing_is_read_from_a_plain_picture():
    reading = read(torch.full((17, 64, 64, 3), 0.45))
    assert (reading.colour, reading.shape, reading.direction) == (None, None, None)
    assert reading.background == "gray"


def test_no_shape_is_read_from_noise():
    reading = read(torch.rand((17, 64, 64, 3), generator=generator_at(2)))
    assert (reading.shape, reading.size) == (None, None)


def test_what_stands_still_has_no_direction_and_no_speed():
    reading = read(frames_of(EVERY[0])[:1].expand(17, -1, -1, -1))
    assert (reading.direction, reading.speed) == (None, None)
    assert (reading.shape, reading.size) == (EVERY[0].shape, EVERY[0].size)


@pytest.mark.parametrize(("down", "direction"), [(1, None), (0.6, None), (0.4, "right")])
def test_what_moves_aslant_has_no_direction(down, direction):
    clip = Clip(Scene("blue", "circle", "right", "slowly", "small", "black"), 12.0, 24.0)
    aslant = [frame.roll(round(down * n), 0) for n, frame in enumerate(frames_of(clip))]
    assert read(torch.stack(aslant)).direction == direction


def test_a_clip_played_backwards_moves_the_other_way():
    scene = Scene("blue", "circle", "left", "slowly", "large", "black")
    reading = read(frames_of(scene).flip(0))
    assert reading.agrees(dataclasses.replace(scene, direction="right"))["direction"]


def test_accuracy_is_a_share_of_the_clips_for_each_attribute():
    scene = Scene("red", "circle", "up", "slowly", "large", "gray")
    other = dataclasses.replace(scene, colour="blue", size="small")
    reading = read(frames_of(scene))
    found = accuracy([(scene, reading), (other, reading)])
    assert (found["colour"], found["size"]) == (0.5, 0.5)
    assert (found["shape"], found["direction"], found["background"]) == (1, 1, 1)
