"""Every task on the golden model, through the pipeline: eager torch and ONNX Runtime."""

import numpy as np
import pytest
import torch

from lcexport.configs.errors import InputError, UsageError
from lcexport.runtime import load
from lcexport.runtime.schedule import enhance_hf_schedule, schedule
from lcexport.runtime.text import Text

ATOL = 1e-4  # float32, several steps
SIZE = (13, 64, 96)
BACKENDS = ("eager", "onnxruntime")


@pytest.fixture(scope="module", params=BACKENDS)
def pipe(request, tiny):
    with load(tiny, "tiny", request.param) as pipe:
        yield pipe


@pytest.fixture
def clip():
    """Frames uint8 [13, 64, 96, 3]: a square that moves."""
    frames = np.zeros((*SIZE, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[20:40, 4 * number : 4 * number + 20] = (200, 120, 40)
    return frames


def close(found, wanted, atol=ATOL):
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=atol)


def texts(case):
    """The golden (positive, negative) embeddings."""
    embeds, mask = case["prompt_embeds_cat"], case["attention_mask_cat"].bool()
    return Text(embeds[1:], mask[1:]), Text(embeds[:1], mask[:1])


def test_image_to_video_is_the_originals_step_by_step(pipe, golden, recorded):
    case = golden("pipe_tiny_i2v")
    positive, negative = texts(case)
    final = pipe.generate(
        positive,
        negative,
        image=case["image_u8"].numpy(),
        latents=case["latents_init"],
        seed=11,
        steps=case.meta["args"]["num_inference_steps"],
        guidance_scale=case.meta["args"]["guidance_scale"],
        output="latents",
        on_step=recorded.add,
    )
    close(final[:, :, :1], case["latents_prepared"][:, :, :1])
    assert [event.timestep for event in recorded.events] == case["timesteps"].tolist()
    for number, event in enumerate(recorded.events):
        close(event.latents, case[f"noise_latents_after_{number}"])
    close(final, case["final"])


def test_the_finished_video_is_the_originals(pipe, golden):
    case = golden("pipe_tiny_i2v")
    clean = case["latents_prepared"][:, :, :1]
    positive, negative = texts(case)
    options = {"task": "i2v", "latents": case["latents_init"], "steps": 4, "guidance_scale": 4.0}
    (video,) = pipe.generate(positive, negative, cond_latents=clean, **options)
    close(video.frames, case["video_np"][0].float(), atol=2e-3)  # stored in half precision


def test_without_guidance_cached_and_uncached_continuation_agree(pipe, clip):
    made = [
        pipe.generate("a cat", video=clip, cache=cache, guidance_scale=1, output="latents")
        for cache in (True, False)
    ]
    assert made[0].shape == (1, 16, 4, 8, 12)
    close(made[0], made[1].cpu())


def test_with_guidance_they_differ_as_the_originals_do(pipe, clip):
    # the scale of CFG-zero is a sum over the clean frames as well, where they are there
    options = {"video": clip, "guidance_scale": 4, "output": "latents"}
    cached, uncached = (pipe.generate("a cat", cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached[:, :, :2], uncached[:, :, :2])
    assert (cached - uncached).abs().max() > 100 * ATOL


def test_a_continuation_starts_with_the_last_frames(pipe, clip):
    found = pipe.generate("a cat", video=clip, output="latents")
    again = pipe.generate("a cat", video=clip[-5:], output="latents")
    other = pipe.generate("a cat", video=clip[:-1], output="latents")
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


def test_a_cache_serves_many_continuations(pipe, clip):
    cache = pipe.make_cache(clip, seed=3)
    options = {"output": "latents", "seed": 3}
    wanted = pipe.generate("a cat", video=clip, **options)
    assert torch.equal(pipe.generate("a cat", cache=cache, **options), wanted)
    both = pipe.generate(["a cat", "a dog"], cache=cache, **options)
    assert len(both) == 2
    assert cache.nbytes == 3 * 2 * 2 * 48 * 128 * 4  # layers, k and v, heads, tokens, D, float32


def test_a_cache_may_wait_on_the_host(pipe, clip):
    options = {"video": clip, "output": "latents"}
    near = pipe.generate("a cat", **options)
    assert torch.equal(pipe.generate("a cat", offload_cache=True, **options), near)


def test_a_continuation_ends_in_uniform_steps(pipe, clip, recorded):
    pipe.generate("a cat", video=clip, steps=4, output="latents", on_step=recorded.add)
    assert [e.timestep for e in recorded.events] == enhance_hf_schedule(4).timesteps.tolist()
    recorded.events.clear()
    options = {"steps": 4, "output": "latents", "on_step": recorded.add}
    pipe.generate("a cat", video=clip, enhance_hf=False, **options)
    assert [e.timestep for e in recorded.events] == schedule(4).timesteps.tolist()


def test_a_distilled_continuation_has_its_own_schedule(pipe, clip, recorded):
    options = {"steps": 2, "distill": True, "output": "latents", "on_step": recorded.add}
    pipe.generate("a cat", video=clip, **options)
    assert [e.timestep for e in recorded.events] == schedule(2, distill=True).timesteps.tolist()


@pytest.mark.parametrize(("spatial", "frames", "fps"), [(False, 26, 30), (True, 13, 15)])
def test_refinement_enlarges_and_doubles(pipe, clip, recorded, spatial, frames, fps):
    video = pipe.refine(clip, spatial=spatial, steps=50, on_step=recorded.add)
    assert video.frames.shape == (frames, 64, 128, 3)
    assert video.fps == fps
    assert len(recorded.events) == 5
    assert recorded.events[0].timestep == 500


def test_a_refinement_repeats_with_its_seed(pipe, clip):
    first, again, other = (
        pipe.refine(clip, spatial=True, seed=seed, output="latents") for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_refinements_random_numbers_can_be_given(pipe, clip):
    shape = (1, 16, 4, 8, 16)
    generator = torch.Generator().manual_seed(5)
    posterior, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    drawn = pipe.refine(clip, spatial=True, seed=5, output="latents")
    given = pipe.refine(
        clip, spatial=True, posterior_noise=posterior, noise=noise, output="latents"
    )
    assert torch.equal(drawn, given)


@pytest.mark.parametrize("given", ["image", "cond_video"])
def test_a_refinement_goes_on_from_what_is_refined(pipe, clip, given):
    refined = np.repeat(clip[:, :, :1], 128, axis=2)  # of the refined size
    start = {"image": clip[0]} if given == "image" else {"cond_video": refined}
    found = pipe.refine(clip, **start)
    assert found.frames.shape == (26, 64, 128, 3)
    latents = pipe.refine(clip, output="latents", **start)
    clean = 4
    again = pipe.refine(clip, output="latents", cond_latents=latents[:, :, :clean], **start)
    assert torch.equal(latents[:, :, :clean].cpu(), again[:, :, :clean].cpu())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image": "no-such.png"}, InputError, "no-such.png is missing"),
        ({"video": "no-such.mp4"}, InputError, "no-such.mp4 is missing"),
        ({"video": np.zeros((4, 64, 96, 3), np.uint8)}, UsageError, "too short.*got 4 frames"),
        ({"image": np.zeros((4, 4), np.uint8)}, UsageError, "these are not frames"),
        ({"image": "x.png", "video": "x.mp4"}, UsageError, "an image and a video"),
        ({"task": "i2v"}, UsageError, "starts from an image"),
        ({"task": "i2v", "video": np.zeros((13, 64, 96, 3), np.uint8)}, UsageError, "an image"),
        ({"task": "vc-uncached", "image": np.zeros((4, 4, 3), np.uint8)}, UsageError, "a video"),
        (
            {"task": "vc", "cache": False, "video": np.zeros((13, 64, 96, 3), np.uint8)},
            UsageError,
            "goes through a cache",
        ),
        ({"image": torch.zeros(3, 4, 4)}, UsageError, "this is no image; got Tensor"),
        ({"video": 3}, UsageError, "this is no video; got int"),
        (
            {"image": np.zeros((4, 4, 3), np.uint8), "posterior_noise": torch.zeros(2)},
            UsageError,
            "posterior's noise do not fit",
        ),
        ({"task": "vc"}, UsageError, "starts from a video"),
        ({"cond_latents": torch.zeros(1, 16, 1, 8, 12)}, UsageError, "Give `task`"),
        (
            {"task": "i2v", "cond_latents": torch.zeros(1, 16, 2, 8, 12)},
            UsageError,
            "clean latents do not fit",
        ),
        ({"task": "t2v", "image": np.zeros((4, 4, 3), np.uint8)}, UsageError, "nothing but text"),
        ({"distill": True, "enhance_hf": True}, UsageError, "two schedules"),
        ({"enhance_hf": True}, UsageError, "for continuations"),
    ],
)
def test_what_does_not_go_together(pipe, options, error, message):
    with pytest.raises(error, match=message):
        pipe.generate("a cat", **options)


def test_a_cache_of_other_weights_or_sizes(pipe, clip):
    cache = pipe.make_cache(clip)
    for source in (("0" * 64, cache.source[1]), (cache.source[0], "480p.vc.cache")):
        with pytest.raises(UsageError, match="another resolution or model"):
            pipe.generate("a cat", cache=type(cache)(cache.latents, cache.samples, source))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 64, 96, 3), r"got 8 frames .*wanted 9 to 16 frames of 64 x 96.*--res 64x96x5 --task"),
        ((17, 64, 96, 3), "got 17 frames"),
        ((13, 64, 64, 3), "got 13 frames of 64 x 64"),
    ],
)
def test_a_refinement_of_something_else(pipe, shape, message):
    with pytest.raises(UsageError, match=f"not a video of the first stage; {message}"):
        pipe.refine(np.zeros(shape, np.uint8))


def test_a_task_the_bundle_lacks(pipe, clip):
    with pytest.raises(UsageError, match=r"tiny.spatial-i2v.*--task spatial-i2v .*--add"):
        pipe.refine(clip, image=clip[0], spatial=True)
