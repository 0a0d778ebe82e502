"""The toy's world: clips are what their scenes say, and some combinations are not trained on."""

import itertools
from dataclasses import replace

import pytest
import torch

from lcexport.configs.presets import TEMPORAL_STRIDE
from tools.train_toy.training import generator_at
from tools.train_toy.world import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    GRID,
    HEIGHT,
    HELD,
    SHAPES,
    SIZES,
    SPEEDS,
    WIDTH,
    Clip,
    Scene,
    caption,
    free_start,
    full_caption,
    placed,
    render,
    scenes,
)

SCENE = Scene("red", "square", "right", "quickly", "small", "black")


def test_a_clip_follows_from_the_seed():
    one, other = (placed(SCENE, generator_at(3, 5)) for _ in range(2))
    assert one == other
    assert one != placed(SCENE, generator_at(3, 6))
    torch.testing.assert_close(render([one]), render([other]), rtol=0, atol=0)


def test_held_combinations_leave_every_colour_shape_and_direction_to_be_seen():
    seen = {(s.colour, s.shape, s.direction) for s in scenes(held=False)}
    assert len(HELD) == 12
    assert seen.isdisjoint(HELD)
    assert {one[0] for one in seen} == set(COLOURS)
    assert {one[1] for one in seen} == set(SHAPES)
    assert {one[2] for one in seen} == set(DIRECTIONS)
    assert len(scenes(held=True)) + len(scenes(held=False)) == 6 * 3 * 4 * 2 * 2 * 3


@pytest.mark.parametrize("scene", scenes(held=True)[::7], ids=full_caption)
def test_the_shape_stays_in_the_picture(scene):
    clip = placed(scene, generator_at(0))
    radius, (across, along) = SIZES[scene.size], scene.travel
    for start, travel, length in ((clip.x, across, WIDTH), (clip.y, along, HEIGHT)):
        assert radius <= min(start, start + travel)
        assert max(start, start + travel) <= length - radius


@pytest.mark.parametrize("speed", SPEEDS)
def test_latents_see_shapes_in_few_places(speed):
    scene = replace(SCENE, speed=speed)
    clips = [placed(scene, generator_at(0, n)) for n in range(40)]
    seen = {clip.centre(frame) for clip in clips for frame in range(0, FRAMES, TEMPORAL_STRIDE)}
    assert all(x % GRID == y % GRID == 0 for x, y in seen)
    assert {y for _, y in seen} == set(range(12, 53, 4))


@pytest.mark.parametrize("radius", SIZES.values())
@pytest.mark.parametrize("travel", [-32.0, -16.0, 0.0, 16.0, 32.0])
def test_the_first_and_the_last_place_leave_room(radius, travel):
    for share in (0.0, 1 - 2**-24):
        start = free_start(WIDTH, radius, travel, share)
        assert radius <= min(start, start + travel)
        assert max(start, start + travel) <= WIDTH - radius
    assert free_start(WIDTH, radius, travel, 0.0) - GRID < radius + max(0.0, -travel)
    assert free_start(WIDTH, radius, travel, 1 - 2**-24) + GRID > WIDTH - radius - max(0.0, travel)


def test_the_shape_moves_two_pixels_a_frame_when_it_moves_quickly():
    video = render([Clip(SCENE, 16.0, 32.0)])
    assert video.shape == (1, 3, FRAMES, HEIGHT, WIDTH)
    red = video[0, 0]
    torch.testing.assert_close(red[1, :, 2:], red[0, :, :-2], rtol=0, atol=1e-6)


def test_the_shape_and_the_background_have_their_colours():
    frame = render([Clip(SCENE, 32.0, 32.0)], frames=1)[0, :, 0]
    inside = ((frame[:, 32, 32] + 1) * 127.5).round().tolist()
    outside = ((frame[:, 2, 2] + 1) * 127.5).round().tolist()
    assert (inside, outside) == ([220, 45, 45], [18, 18, 22])


def test_a_caption_always_names_colour_shape_and_direction_and_leaves_the_rest_open():
    captions = {caption(SCENE, generator_at(0, n)) for n in range(60)}
    assert len(captions) == 8
    for text in captions:
        assert {"red", "square", "right"} <= set(text.split())
    assert full_caption(SCENE) in captions
    assert "a red square moves right" in captions


def test_no_two_scenes_have_one_full_caption():
    everything = list(itertools.chain(scenes(held=True), scenes(held=False)))
    assert len({full_caption(scene) for scene in everything}) == len(everything)
