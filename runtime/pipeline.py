"""Prompt in, video out: text, then sampling, then decoding, on one bundle.

Not thread-safe: one pipeline, one thread; only a CancelToken may be used from another.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self, TypedDict, Unpack, overload

import torch

from lcexport.configs.errors import UsageError
from lcexport.configs.tasks import Task, job_name, task_from
from lcexport.engines import Engine
from lcexport.engines.bundle import WEIGHTS, Bundle, GraphRecord, open_bundle
from lcexport.runtime.cache import KeyValueCache, make_cache
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.components import Components
from lcexport.runtime.conditioning import (
    Given,
    ImageSource,
    Start,
    VideoSource,
    clean_latents,
    task_of,
)
from lcexport.runtime.denoiser import denoise
from lcexport.runtime.refining import RefineOptions, refine
from lcexport.runtime.request import (
    CONTINUATIONS,
    MAX_SEED,
    Prompt,
    Request,
    check_whole,
    initial_noise,
    request_from,
)
from lcexport.runtime.residency import Offload
from lcexport.runtime.sampler import OnStep
from lcexport.runtime.text import Text
from lcexport.runtime.video import Video

Output = Literal["video", "latents"]


class Options(TypedDict, total=False):
    """Keyword arguments of `Pipeline.generate`, which describes them."""

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


def load(
    bundle_dir: str | Path,
    resolution: str = "480p",
    backend: str = "onnxruntime",
    device: str = "cpu",
    *,
    tasks: Sequence[str] | None = None,
    offload: Offload = "keep",
    engine: Engine | None = None,
    engine_options: Mapping[str, object] | None = None,
    check_hashes: bool = False,
) -> "Pipeline":
    """Open a bundle for generation.

    Args:
        bundle_dir: the folder that `lcexport build` wrote.
        resolution: which of the bundle's sizes.
        backend: what runs the DiT.
        device: "cpu", "cuda" or "cuda:1"; for the DiT, the text encoder and the VAE alike.
        tasks: whose engines to open now, text-to-video's where None and the bundle has it. Others
            are opened when they are first used.
        offload: where the text encoder and the VAE wait: "keep" on the device, "cpu", or
            "release" to load them for each use.
        engine: use this open engine for text to video; it stays the caller's to close.
        engine_options: how the backend runs its engines; see `lcexport.engines.open_engine`.
        check_hashes: compare every file's SHA-256, the large ones included.

    Raises:
        UsageError: no such resolution, task, backend, device or policy.
        IntegrityError: no bundle there, or a file that is not the one its manifest names.
        IncompatibleError: the backend's library or the device is missing.
        InputError: the text encoder, tokenizer, VAE or scheduler file is unusable.
    """
    bundle = open_bundle(bundle_dir, every_hash=check_hashes)
    first = first_graph(bundle, resolution)
    names = [job_name(resolution, task_from(task)) for task in tasks or ()]
    graphs = [bundle.graph(name) for name in names]
    if tasks is None and first.job.task == "t2v":
        graphs = [first]
    tokens = first.preset.text_tokens
    components = Components(bundle, backend, device, offload, tokens, engine_options)
    try:
        if engine is not None:
            components.adopt(bundle.graph(resolution), engine)
        for graph in graphs:
            components.engine(graph)
    except BaseException:
        components.close()
        raise
    return Pipeline(components, resolution)


def first_graph(bundle: Bundle, resolution: str) -> GraphRecord:
    """Text-to-video's graph at a resolution, or another task's where there is none."""
    graphs = bundle.manifest.graphs.values()
    found = next((graph for graph in graphs if graph.preset.name == resolution), None)
    return found if found and resolution not in bundle.manifest.graphs else bundle.graph(resolution)


class Pipeline:
    """An opened bundle at one resolution; `load` makes it. Close it, or use it in a `with` block.

    Attributes:
        bundle, preset: what it makes videos of.
        components: the engines, the text encoder and the VAE.
    """

    def __init__(self, components: Components, resolution: str, *, owner: bool = True) -> None:
        self.components, self.bundle = components, components.bundle
        self._owner = owner
        self.resolution = resolution
        self.preset = first_graph(self.bundle, resolution).preset
        self._closed = False

    @property
    def engine(self) -> Engine:
        """Text-to-video's engine."""
        return self.components.engine(self.graph("t2v"))

    def graph(self, task: Task, part: str = "denoise") -> GraphRecord:
        """The bundle's graph for a task at this resolution; UsageError where it was not built."""
        return self.bundle.job_graph(self.resolution, task, part)

    @overload
    def generate(
        self,
        prompt: str,
        negative_prompt: str | Text | None = None,
        *,
        output: Literal["video"] = "video",
        **options: Unpack[Options],
    ) -> Video: ...
    @overload
    def generate(
        self,
        prompt: list[str] | Text,
        negative_prompt: Prompt | None = None,
        *,
        output: Literal["video"] = "video",
        **options: Unpack[Options],
    ) -> list[Video]: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None = None,
        *,
        output: Literal["latents"],
        **options: Unpack[Options],
    ) -> torch.Tensor: ...
    def generate(
        self,
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
        self._check_open()
        check_output(output)
        given = Given(image, video, cond_latents, posterior_noise)
        task = task or task_of(given, cache)
        request = request_from(
            self.preset,
            prompt,
            negative_prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            distill=distill,
            task=task,
            enhance_hf=enhance_hf,
        )
        graph, cancel = self.graph(task), cancel or CancelToken()
        generator = torch.Generator().manual_seed(request.seed)
        shape = (request.count, *self.preset.latent_shape)
        noise = initial_noise(latents, generator, shape)
        timings: dict[str, float] = {}
        with torch.no_grad():
            with timed(timings, "text"):
                texts = self._encode(request, cancel)
            start = Start()
            if graph.job.cond_frames or not given.nothing:
                with timed(timings, "condition"):
                    start = self._start(graph, given, cache, generator, cancel)
                    start = start.placed(self.components.device, offload_cache)
            with timed(timings, "denoise"):
                plan = request.schedule(self.components.shift)
                final = denoise(
                    self.components, graph, texts, request.guidance_scale, start, noise, plan,
                    on_step, cancel,
                )  # fmt: skip
            if output == "latents":
                return final
            with timed(timings, "decode"):
                frames = self.components.decode(final, cancel)
        drawn = seed if latents is None else None
        videos = [Video(f, self.preset.fps, dict(timings), drawn) for f in frames]
        return videos[0] if isinstance(prompt, str) else videos

    def encode(self, prompts: list[str]) -> Text:
        """Prompts for any number of generations: what the text encoder makes of them."""
        self._check_open()
        return self.components.encode_text(prompts, CancelToken())

    @overload
    def refine(
        self,
        video: VideoSource,
        prompt: str | Text = "",
        *,
        output: Literal["video"] = "video",
        **options: Unpack[RefineOptions],
    ) -> Video: ...
    @overload
    def refine(
        self,
        video: VideoSource,
        prompt: str | Text = "",
        *,
        output: Literal["latents"],
        **options: Unpack[RefineOptions],
    ) -> torch.Tensor: ...
    def refine(
        self,
        video: VideoSource,
        prompt: str | Text = "",
        *,
        output: Output = "video",
        **options: Unpack[RefineOptions],
    ) -> Video | torch.Tensor:
        """A generated video at a higher resolution; `lcexport.runtime.refining` says all of it."""
        self._check_open()
        check_output(output)
        return refine(self.components, self.resolution, video, prompt, output=output, **options)

    def make_cache(
        self,
        video: VideoSource | None = None,
        *,
        cond_latents: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
        seed: int = 0,
        cancel: CancelToken | None = None,
    ) -> KeyValueCache:
        """The keys and values of a video's last frames, for any number of continuations of it.

        The arguments are those of `generate`, as `generate(cache=...)` takes the result.

        Raises:
            UsageError: the bundle was not built for continuation, or the video is too short.
            InputError: the video cannot be read.
        """
        self._check_open()
        given = Given(None, video, cond_latents, posterior_noise)
        check_whole("seed", seed, 0, MAX_SEED)
        generator = torch.Generator().manual_seed(seed)
        # `generate` draws its noise first: the same seed then gives the same cache
        initial_noise(None, generator, (1, *self.preset.latent_shape))
        with torch.no_grad():
            start = self._start(self.graph("vc"), given, True, generator, cancel or CancelToken())
        assert start.cache is not None, "continuation starts from a cache"
        return start.cache

    def at(self, resolution: str) -> "Pipeline":
        """A pipeline for another of the bundle's resolutions, which is closed with this one.

        It uses this one's text encoder and VAE, and what memory the engines can share: with eager
        torch and with TensorRT plans built with `--weights shared`, that is the weights. The two
        must not run at the same time.

        Raises:
            UsageError, IntegrityError, IncompatibleError: as `load`.
        """
        self._check_open()
        graph = first_graph(self.bundle, resolution)
        if graph.preset.text_tokens != self.preset.text_tokens:
            raise UsageError(
                "the two resolutions were built for texts of other lengths",
                got=graph.preset.text_tokens,
                wanted=self.preset.text_tokens,
            )
        self.components.engine(graph)
        return Pipeline(self.components, resolution, owner=False)

    def close(self) -> None:
        """Give everything back, unless it came from `at`. Harmless when called twice."""
        self._closed = True
        if self._owner:
            self.components.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode(self, request: Request, cancel: CancelToken) -> tuple[Text, Text | None]:
        positive = self.components.encode_text(request.prompts, cancel)
        if request.negatives is None:
            return positive, None
        return positive, self.components.encode_text(request.negatives, cancel)

    def _start(
        self,
        graph: GraphRecord,
        given: Given,
        cache: KeyValueCache | bool,
        generator: torch.Generator,
        cancel: CancelToken,
    ) -> Start:
        """The clean frames of a generation, as latents and, for a graph that takes one, a cache."""
        encode, job = self.components.encode_frames, graph.job
        if cache is False if job.cached_latents else isinstance(cache, KeyValueCache):
            raise UsageError(
                f"task {job.task} {'goes through' if job.cached_latents else 'takes no'} a cache",
                do="Task vc is the cached continuation, vc-uncached the other.",
            )
        # Rounded as the original rounds it: to the DiT's precision for a continuation.
        dtype = self.components.dtype if job.task in CONTINUATIONS else torch.float32
        if not job.cached_latents:
            return Start(clean_latents(given, job, generator, encode, dtype))
        maker = self.graph(graph.job.task, "cache")
        source = (self.bundle.manifest.files[WEIGHTS].sha256, maker.name)
        if isinstance(cache, KeyValueCache):
            cache.check(source)
            return Start(cache.latents, cache)
        latents = clean_latents(given, maker.job, generator, encode, dtype)
        made = make_cache(self.components.engine(maker), latents, source, cancel)
        return Start(latents, made)

    def _check_open(self) -> None:
        if self._closed or self.components.closed:
            raise UsageError("the pipeline is closed", do="Load the bundle again.")


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Put the block's duration in seconds into `timings`."""
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started


def check_output(output: str) -> None:
    if output not in ("video", "latents"):
        raise UsageError("unknown output", got=repr(output), wanted="video or latents")
