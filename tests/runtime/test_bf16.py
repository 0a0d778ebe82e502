"""What a continuation's latents are rounded to in a bfloat16 bundle, as the original keeps them."""

import numpy as np
import pytest
import torch

from lcexport.builder import BuildOptions, build
from lcexport.configs.presets import Preset
from lcexport.runtime import generating, load

SHAPE = (1, 16, 4, 8, 12)
OPTIONS = {"seed": 5, "steps": 2, "guidance_scale": 1, "enhance_hf": False, "output": "latents"}


@pytest.fixture(scope="module")
def pipe(checkpoint, tmp_path_factory):
    preset = Preset(name="tiny", frames=13, height=64, width=96, text_tokens=12, steps=2)
    options = BuildOptions(
        model=checkpoint,
        output=tmp_path_factory.mktemp("bf16") / "tiny",
        presets=(preset,),
        tasks=("t2v", "vc", "vc-uncached"),
        cond_frames=5,
        precision="bf16",
        only="export",
    )
    with load(build(options).folder, "tiny", "eager", tasks=()) as pipe:
        yield pipe


@pytest.fixture
def noises(monkeypatch):
    """The noise that every generation starts from."""
    seen, denoise = [], generating.denoise

    def watched(components, graph, texts, scale, start, noise, *words):
        seen.append(noise)
        return denoise(components, graph, texts, scale, start, noise, *words)

    monkeypatch.setattr(generating, "denoise", watched)
    return seen


@pytest.fixture
def clip():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 96, 3), np.uint8)


def is_rounded(latents):
    return torch.equal(latents, latents.bfloat16().float())


@pytest.mark.parametrize("cache", [True, False])
def test_a_continuations_noise_is_drawn_in_bfloat16(pipe, noises, clip, cache):
    pipe.generate("a cat", video=clip, cache=cache, **OPTIONS)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(SHAPE, generator=generator, dtype=torch.bfloat16)
    assert torch.equal(noises[0], drawn.float())


def test_an_uncached_continuation_is_rounded_after_every_step(pipe, clip, recorded):
    final = pipe.generate("a cat", video=clip, cache=False, on_step=recorded.add, **OPTIONS)
    assert [is_rounded(event.latents) for event in recorded.events] == [True, True]
    assert is_rounded(final)


def test_a_cached_one_is_float32_after_its_first_step(pipe, clip, recorded):
    final = pipe.generate("a cat", video=clip, on_step=recorded.add, **OPTIONS)
    assert [is_rounded(event.latents) for event in recorded.events] == [False, False]
    assert is_rounded(final[:, :, :2])  # the clean ones


def test_what_is_given_is_rounded_as_what_is_drawn(pipe, noises, clip):
    noise, clean = torch.randn(SHAPE), torch.randn(1, 16, 2, 8, 12)
    options = {**OPTIONS, "task": "vc", "latents": noise, "cond_latents": clean}
    final = pipe.generate("a cat", **options)
    assert torch.equal(noises[0], noise.bfloat16().float())
    assert torch.equal(final[:, :, :2], clean.bfloat16().float())


def test_a_cache_is_made_with_the_numbers_of_the_generation(pipe, clip):
    wanted = pipe.generate("a cat", video=clip, **OPTIONS)
    cache = pipe.make_cache(clip, seed=5)
    assert torch.equal(pipe.generate("a cat", cache=cache, **OPTIONS), wanted)


def test_text_to_video_is_float32(pipe, noises, recorded):
    options = {key: value for key, value in OPTIONS.items() if key != "enhance_hf"}
    pipe.generate("a cat", on_step=recorded.add, **options)
    assert torch.equal(noises[0], torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)))
    assert not is_rounded(recorded.events[0].latents)
