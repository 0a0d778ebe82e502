"""A generation: from text alone, from an image, or going on from a video."""

from dataclasses import replace
from typing import Literal, TypedDict

import torch

from lcexport.configs.errors import UsageError
from lcexport.configs.presets import Preset
from lcexport.configs.tasks import Task
from lcexport.engines.manifest import WEIGHTS, GraphRecord
from lcexport.runtime.cache import KeyValueCache, make_cache
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.components import Components
from lcexport.runtime.conditioning import (
    Given,
    ImageSource,
    Start,
    VideoSource,
    clean_latents,
    task_for,
)
from lcexport.runtime.denoiser import denoise
from lcexport.runtime.request import (
    Prompt,
    Request,
    drawn_noise,
    request_from,
)
from lcexport.runtime.sampler import OnStep
from lcexport.runtime.text import Text
from lcexport.runtime.timing import timed
from lcexport.runtime.video import Video

Output = Literal["video", "latents"]


class Options(TypedDict, total=False):
    """Keyword arguments of `generate`, which describes them."""

    task: Task | None
    image: ImageSource | None
    video: VideoSource | None
    cond_latents: torch.Tensor | None
    posterior_noise: torch.Tensor | None
    cache: KeyValueCache | bool
    offload_cache: bool
    seed: int
    steps: int | None
    guidance_scale: float | None
    latents: torch.Tensor | None
    distill: bool
    enhance_hf: bool | None
    on_step: OnStep | None
    cancel: CancelToken | None


def generate(
    components: Components,
    preset: Preset,
    prompt: Prompt,
    negative_prompt: Prompt | None = None,
    *,
    task: Task | None = None,
    image: ImageSource | None = None,
    video: VideoSource | None = None,
    cond_latents: torch.Tensor | None = None,
    posterior_noise: torch.Tensor | None = None,
    cache: KeyValueCache | bool = True,
    offload_cache: bool = False,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    latents: torch.Tensor | None = None,
    distill: bool = False,
    enhance_hf: bool | None = None,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
    output: Output = "video",
) -> Video | list[Video] | torch.Tensor:
    """Make one video per prompt: from text alone, from an image, or going on from a video.

    Random numbers come from the seed in this order: the initial noise of the whole video, then
    the sample of the VAE's posterior.

    Args:
        prompt: one prompt, a list of B, or what `encode` made of them.
        negative_prompt: what to steer away from; None means "", one str serves all.
        task: None for the one that fits: "i2v" with an image, "vc" with a video, else "t2v".
        image: a file, uint8 [H, W, 3] or a PIL image; the first frame of every video.
        video: a file, uint8 [F, H, W, 3] or a `Video`; its last frames are the first ones.
        cond_latents: the clean frames' normalised latents float32 [1 or B, 16, T, H, W], in
            place of what the VAE makes of the image or the video.
        posterior_noise: standard normal, of those latents' shape, in place of the seed's.
        cache: of a continuation, whether its clean frames are keys and values made once (True)
            or go through the DiT at every step (False); or what `make_cache` made of them.
        offload_cache: keep the cache on the host and copy it for each call of the engine.
        seed: of the noise, 0..2**63-1; one draw for the whole batch.
        steps: None for the preset's (16 when distilled).
        guidance_scale: 1 for no guidance; None for the preset's (1 when distilled).
        latents: initial noise float32 [B, 16, T, H, W] in place of the seed's; of the whole
            video, though its clean frames are not looked at.
        distill: use the distilled model's schedule; the bundle must hold that model.
        enhance_hf: end in ten uniform steps, for detail; a continuation's default.
        on_step: called after each step with a StepEvent, whose latents lack the clean frames.
        cancel: stops the generation before its next call of the engine.
        output: "video", or "latents" for the normalised float32 [B, 16, T, H, W].

    Raises:
        UsageError: an argument is out of range, or the bundle was not built for the task.
        InputError: the image or video cannot be read.
        VerificationError: a step left numbers that are not finite.
        Cancelled: the token was set.
    """
    check_output(output)
    given = Given(image, video, cond_latents, posterior_noise)
    task = task_for(task, given, cache)
    request = request_from(
        preset,
        prompt,
        negative_prompt,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        distill=distill,
        task=task,
        enhance_hf=enhance_hf,
    )
    graph, cancel = components.bundle.job_graph(preset.name, task), cancel or CancelToken()
    if distill:
        components.expect_lora("cfg_step", "the distilled schedule")
    stored = components.stored(task)
    shape = (request.count, *preset.latent_shape)
    generator, noise = drawn_noise(request.seed, shape, stored, latents)
    timings: dict[str, float] = {}
    with torch.no_grad():
        with timed(timings, "text"):
            texts = encoded(components, request, cancel)
        start = Start()
        if graph.job.cond_frames or not given.nothing:
            with timed(timings, "condition"):
                start = start_from(components, graph, given, cache, generator, cancel)
                start = start.placed(components.device, offload_cache)
        with timed(timings, "denoise"):
            plan = request.schedule(components.shift)
            if graph.job.num_cond_latents:  # the original writes each step into its first tensor
                plan = replace(plan, stored=stored)
            final = denoise(
                components, graph, texts, request.guidance_scale, start, noise, plan,
                on_step, cancel,
            )  # fmt: skip
        if output == "latents":
            return final
        with timed(timings, "decode"):
            frames = components.decode(final, cancel)
    drawn = seed if latents is None else None
    videos = [Video(f, preset.fps, dict(timings), drawn) for f in frames]
    return videos[0] if isinstance(prompt, str) else videos


def encoded(
    components: Components, request: Request, cancel: CancelToken
) -> tuple[Text, Text | None]:
    """The prompts and, where there is guidance, the negative ones."""
    positive = components.encode_text(request.prompts, cancel)
    if request.negatives is None:
        return positive, None
    return positive, components.encode_text(request.negatives, cancel)


def start_from(
    components: Components,
    graph: GraphRecord,
    given: Given,
    cache: KeyValueCache | bool,
    generator: torch.Generator,
    cancel: CancelToken,
) -> Start:
    """The clean frames of a generation, as latents and, for a graph that takes one, a cache."""
    bundle, encode, job = components.bundle, components.encode_frames, graph.job
    if cache is False if job.cached_latents else isinstance(cache, KeyValueCache):
        raise UsageError(
            f"task {job.task} {'goes through' if job.cached_latents else 'takes no'} a cache",
            do="Task vc is the cached continuation, vc-uncached the other.",
        )
    dtype = components.stored(job.task)
    if not job.cached_latents:
        return Start(clean_latents(given, job, generator, encode, dtype))
    maker = bundle.job_graph(graph.preset.name, job.task, "cache")
    source = (bundle.manifest.files[WEIGHTS].sha256, maker.name)
    if isinstance(cache, KeyValueCache):
        cache.check(source)
        return Start(cache.latents, cache)
    latents = clean_latents(given, maker.job, generator, encode, dtype)
    made = make_cache(components.engine(maker), latents, source, cancel)
    return Start(latents, made)


def check_output(output: str) -> None:
    if output not in ("video", "latents"):
        raise UsageError("unknown output", got=repr(output), wanted="video or latents")
