"""Refinement through the pipeline: what it takes, how it is padded, how long it took."""

import numpy as np
import pytest
import torch

from lcexport.configs.errors import UsageError
from lcexport.configs.presets import preset_from
from lcexport.configs.tasks import jobs_for
from lcexport.runtime import load
from lcexport.runtime.refining import buildable_length, fits

FAST = {"steps": 1, "t_thresh": 0.5}


@pytest.fixture(scope="module")
def pipe(tiny):
    with load(tiny, "tiny", "eager", tasks=()) as pipe:
        yield pipe


@pytest.fixture
def encoded(pipe, monkeypatch):
    """The pixels that the VAE was given, call by call."""
    seen, encode = [], pipe.components.encode_frames

    def watched(pixels, *words):
        seen.append(pixels)
        return encode(pixels, *words)

    monkeypatch.setattr(pipe.components, "encode_frames", watched)
    return seen


def grey_levels(count):
    """Frames uint8 [F, 64, 96, 3], each of one grey."""
    levels = np.linspace(0, 255, count).astype(np.uint8)
    return np.repeat(levels, 64 * 96 * 3).reshape(count, 64, 96, 3)


@pytest.mark.parametrize(
    ("task", "least", "most"),
    [("refine", 89, 96), ("spatial", 81, 96), ("refine-vc", 86, 93), ("spatial-vc", 78, 93)],
)
def test_which_lengths_the_released_graphs_take(task, least, most):
    (job,) = jobs_for(preset_from("480p"), task)
    assert [count for count in range(200) if fits(job, count)] == [*range(least, most + 1)]


@pytest.mark.parametrize("task", ["refine", "refine-i2v", "refine-vc", "spatial", "spatial-vc"])
def test_a_graph_of_the_length_that_is_advised_takes_the_video(task):
    (job,) = jobs_for(preset_from("480p"), task)
    advised = 0
    for count in range(30, 160):
        length = buildable_length(job, count)
        if length is None:
            continue
        advised += 1
        preset = preset_from(f"480x832x{length}")
        assert preset.frames == length, "it is not rounded"
        (built,) = jobs_for(preset, task)
        assert fits(built, count)
    assert advised > 100


@pytest.mark.parametrize(
    ("count", "padded", "kept"),
    [(13, 32, 26), (14, 32, 28), (15, 32, 29), (16, 32, 29), (9, 32, 18)],
)
def test_a_video_of_another_length_is_padded_with_its_last_frame(
    pipe, encoded, count, padded, kept
):
    video = pipe.refine(grey_levels(count), **FAST)
    (pixels,) = encoded
    assert pixels.shape == (1, 3, padded, 64, 128)
    new = 2 * count
    levels = pixels[0, 0, :, 0, 0]
    assert torch.equal(levels[new:], levels[new - 1].expand(padded - new))
    assert (levels[1:new] > levels[: new - 1]).all()
    assert video.frames.shape == (kept, 64, 128, 3)  # the encoder leaves out three of the 32


def test_behind_refined_frames_both_ends_are_padded(pipe, encoded):
    before = np.zeros((26, 64, 128, 3), np.uint8)
    video = pipe.refine(grey_levels(12), cond_video=before, **FAST)
    pixels, condition = encoded
    assert pixels.shape[2] == condition.shape[2] + 16  # four latents and four
    assert torch.equal(pixels[0, 0, -3:, 0, 0], torch.ones(3))
    assert video.frames.shape == (24, 64, 128, 3)


def test_every_stage_is_timed(pipe):
    video = pipe.refine(grey_levels(13), **FAST)
    assert list(video.timings) == ["text", "encode", "denoise", "decode"]
    before = np.zeros((26, 64, 128, 3), np.uint8)
    video = pipe.refine(grey_levels(13), cond_video=before, **FAST)
    assert list(video.timings) == ["text", "encode", "condition", "denoise", "decode"]
    assert all(seconds > 0 for seconds in video.timings.values())


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, float("nan")])
def test_a_threshold_that_leaves_nothing_to_do_or_is_none(pipe, threshold):
    with pytest.raises(UsageError, match=r"out of range.*wanted above 0 and at most 1"):
        pipe.refine(grey_levels(13), t_thresh=threshold)


def test_a_picture_and_a_video_are_too_much(pipe):
    with pytest.raises(UsageError, match="an image and a video were given"):
        pipe.refine(grey_levels(13), image="a.png", cond_video="b.mp4")
