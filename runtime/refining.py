"""Refinement: a finished video again, larger and with twice its frames, from half-noised latents.

Five model calls (of the fifty-step schedule, those below the threshold) and no guidance. It needs
the refinement's LoRA in the bundle's weights. All random numbers are the request's: the original
draws its own from torch's global generator.
"""

from dataclasses import replace
from typing import Literal, TypedDict

import torch

from lcexport.configs.errors import UsageError
from lcexport.configs.presets import TEMPORAL_STRIDE
from lcexport.configs.refinement import GROUP, RefineShape
from lcexport.configs.tasks import Job, Task, refine_task
from lcexport.engines.bundle import Bundle
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.components import Components
from lcexport.runtime.conditioning import (
    ImageSource,
    Start,
    VideoSource,
    check_latents,
    image_pixels,
    refuse_both,
    video_pixels,
)
from lcexport.runtime.denoiser import denoise
from lcexport.runtime.media import CONTINUATION_FPS, REFINED_FPS, Pixels, resize_video
from lcexport.runtime.refine import condition_pixels, noised, pad_stage_one, stage_one_pixels
from lcexport.runtime.request import MAX_SEED, check_whole
from lcexport.runtime.sampler import OnStep
from lcexport.runtime.schedule import MAX_STEPS, refine_schedule
from lcexport.runtime.text import Text
from lcexport.runtime.timing import timed
from lcexport.runtime.video import Video

STEPS = 50
THRESHOLD = 0.5


class RefineOptions(TypedDict, total=False):
    """Keyword arguments of `refine`, which describes them."""

    image: ImageSource | None
    cond_video: VideoSource | None
    spatial: bool
    seed: int
    steps: int
    t_thresh: float
    posterior_noise: torch.Tensor | None
    noise: torch.Tensor | None
    latents: torch.Tensor | None
    cond_latents: torch.Tensor | None
    cond_posterior_noise: torch.Tensor | None
    on_step: OnStep | None
    cancel: CancelToken | None


def refine(
    components: Components,
    resolution: str,
    video: VideoSource,
    prompt: str | Text = "",
    *,
    image: ImageSource | None = None,
    cond_video: VideoSource | None = None,
    spatial: bool = False,
    seed: int = 0,
    steps: int = STEPS,
    t_thresh: float = THRESHOLD,
    posterior_noise: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
    cond_latents: torch.Tensor | None = None,
    cond_posterior_noise: torch.Tensor | None = None,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
    output: Literal["video", "latents"] = "video",
) -> Video | torch.Tensor:
    """Refine one video. F its frames, T the padded latent frames, K the clean ones among them.

    Random numbers come from the seed in this order: the VAE's sample of the video, the noise, the
    VAE's sample of the condition.

    Args:
        video: what was generated at `resolution`: a file, uint8 [F, H, W, 3] or a `Video`. F may
            be any number that is padded to as many latents as the resolution's own.
        image: of an image-to-video generation, its image, the first refined frame.
        cond_video: refined frames before these; the task's last ones are used. Of a file, every so
            many, for about 30 per second, 15 where `spatial`.
        spatial: keep the number of frames; otherwise it doubles.
        steps: of the schedule that the threshold cuts: 50 make 5 calls.
        t_thresh: how much of the start is noise, above 0 and at most 1.
        posterior_noise: float32 [1, 16, T, H, W] in place of the seed's.
        noise: the same, for the start.
        latents: the start itself, half noise, normalised.
        cond_latents: the condition's normalised latents float32 [1, 16, K, H, W].
        cond_posterior_noise: of their shape, in place of the seed's.
        on_step, cancel, output: as in `Pipeline.generate`.

    Raises:
        UsageError: not a video of this resolution's first stage, an argument out of range, or a
            task that the bundle was not built for.
        InputError: a file cannot be read.
        VerificationError: a step left numbers that are not finite.
    """
    check_whole("seed", seed, 0, MAX_SEED)
    check_whole("steps", steps, 1, MAX_STEPS)
    if isinstance(t_thresh, bool) or not isinstance(t_thresh, int | float):
        raise UsageError("the threshold is not a number", got=repr(t_thresh))
    task = refinement_task(image, cond_video, spatial)
    graph = components.bundle.job_graph(resolution, task)
    job = graph.job
    plan = refine_schedule(steps, t_thresh, components.shift)
    frames = stage_one_frames(video, job, components.bundle)
    shape = refinement_of(job, len(frames))
    if not shape.cond_frames and (cond_latents is not None or cond_posterior_noise is not None):
        raise UsageError("this refinement goes on from nothing", do="Give no condition's latents.")
    components.expect_lora("refinement", "refinement")
    cancel = cancel or CancelToken()
    draw = Draws(components, torch.Generator().manual_seed(seed))
    timings: dict[str, float] = {}
    with torch.no_grad():
        with timed(timings, "text"):
            encoded = prompt if isinstance(prompt, Text) else [prompt]
            text = components.encode_text(encoded, cancel)
        given = latents is not None or noise is not None
        if latents is None:
            with timed(timings, "encode"):
                latents = half_noised(frames, job, draw, t_thresh, posterior_noise, noise)
        check_latents("refinement's latents", latents, job.latent_shape)
        if len(text.embeds) != 1 or len(latents) != 1:
            raise UsageError(
                "one video is refined at a time", got=f"{len(text.embeds)} and {len(latents)}"
            )
        start = Start()
        if shape.cond_frames:
            with timed(timings, "condition"):
                start = condition(job, image, cond_video, cond_latents, cond_posterior_noise, draw)
        with timed(timings, "denoise"):
            texts = (text, None)
            final = denoise(components, graph, texts, 1.0, start, latents, plan, on_step, cancel)
        if output == "latents":
            return final
        with timed(timings, "decode"):
            made = components.decode(final, cancel)[0][shape.kept]
    return Video(made, job.preset.fps * (1 if spatial else 2), timings, None if given else seed)


def half_noised(
    frames: Pixels,
    job: Job,
    draw: "Draws",
    t_thresh: float,
    posterior_noise: torch.Tensor | None,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Where the sampler starts, float32 [1, 16, T, H, W]; the enlarged video is let go."""
    shape, size = refinement_of(job, len(frames)), (job.height, job.width)
    dtype, device = draw.components.dtype, draw.components.device
    pixels = stage_one_pixels(frames, size, shape.new_frames, dtype, device)
    # mixed in the VAE's precision, as the original does
    z = draw.encoded(pad_stage_one(pixels, shape), posterior_noise, job.latent_shape, dtype)
    return noised(z, draw.noise(noise, z), t_thresh).float()


class Draws:
    """The request's random numbers, or the caller's in their place."""

    def __init__(self, components: Components, generator: torch.Generator) -> None:
        self.components, self._generator = components, generator

    def encoded(
        self,
        pixels: torch.Tensor,
        given: torch.Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Latents [1, *shape] of a sample of the VAE's posterior, normalised in `dtype`."""
        if given is not None:
            check_latents("posterior's noise", given, shape)
        noise = self._generator if given is None else given
        return self.components.encode_frames(pixels, noise, dtype)

    def noise(self, given: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Standard normal, of the shape and dtype of `like`, on its device."""
        if given is not None:
            check_latents("noise", given, tuple(like.shape[1:]))
            return given.to(like.device, like.dtype)
        drawn = torch.randn(like.shape, generator=self._generator, dtype=self.components.dtype)
        return drawn.to(like.device, like.dtype)


def refinement_task(
    image: ImageSource | None, cond_video: VideoSource | None, spatial: bool
) -> Task:
    """The task for this kind of refinement; UsageError where it would go on from two things."""
    refuse_both(image, cond_video)
    if image is not None:
        return refine_task(spatial, "i2v")
    return refine_task(spatial, "vc" if cond_video is not None else "")


def refinement_of(job: Job, frames: int | None = None) -> RefineShape:
    """How a graph's videos are padded, or one of so many frames, which `fits` it."""
    shape = job.refinement
    assert shape is not None, f"{job.task} is a refinement"
    return shape if frames is None else replace(shape, stage_one_frames=frames)


def fits(job: Job, frames: int) -> bool:
    """Whether a video of so many frames is padded to the graph's latents."""
    own = refinement_of(job)
    if frames * (1 if own.spatial_only else 2) <= own.cond_frames:
        return False  # nothing would be left to refine
    return refinement_of(job, frames).latents == own.latents


def stage_one_frames(video: VideoSource, job: Job, bundle: Bundle) -> Pixels:
    """The video's frames; UsageError where they are not of the size, or are padded otherwise."""
    frames = video_pixels(video, None)
    preset = job.preset
    count, height, width, _ = frames.shape
    same_size = (height, width) == (preset.height, preset.width)
    if same_size and fits(job, count):
        return frames
    near = range(1, preset.frames + GROUP * TEMPORAL_STRIDE)
    taken = [number for number in near if fits(job, number)]
    do = f"Refine what was generated at {preset.name}."
    if same_size and (length := buildable_length(job, count)):
        do = f"Build for this length: {bundle.adding(f'{height}x{width}x{length}', job.task)}"
    raise UsageError(
        "this is not a video of the first stage",
        got=f"{count} frames of {height} x {width} pixels",
        wanted=f"{taken[0]} to {taken[-1]} frames of {preset.height} x {preset.width}",
        do=do,
    )


def buildable_length(job: Job, frames: int) -> int | None:
    """The longest that a graph can be built for, 4k+1, and that is padded as `frames` are."""
    shape = refinement_of(job)
    if frames * (1 if shape.spatial_only else 2) <= shape.cond_frames:
        return None
    latents = refinement_of(job, frames).latents
    for length in reversed(range(1, frames + GROUP * TEMPORAL_STRIDE, TEMPORAL_STRIDE)):
        long_enough = length * (1 if shape.spatial_only else 2) > shape.cond_frames
        if long_enough and refinement_of(job, length).latents == latents:
            return length
    return None


def condition(
    job: Job,
    image: ImageSource | None,
    cond_video: VideoSource | None,
    latents: torch.Tensor | None,
    posterior_noise: torch.Tensor | None,
    draw: Draws,
) -> Start:
    """The clean frames in front, padded as the original pads them."""
    channels, _, height, width = job.latent_shape
    wanted = (channels, job.num_cond_latents, height, width)
    if latents is None:
        if image is not None:
            given = image_pixels(image)[None]
        else:
            assert cond_video is not None, "one of them is there"
            fps = CONTINUATION_FPS if refinement_of(job).spatial_only else REFINED_FPS
            given = video_pixels(cond_video, fps, job.cond_frames)
        pixels = resize_video(given[-job.cond_frames :], job.height, job.width)
        padded = condition_pixels(pixels, refinement_of(job))
        latents = draw.encoded(padded, posterior_noise, wanted)
    check_latents("clean latents", latents, wanted)
    return Start(latents)
