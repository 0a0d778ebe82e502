"""Prompt in, video out: text, then sampling, then decoding, on one bundle.

Not thread-safe: one pipeline, one thread; only a CancelToken may be used from another.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Self, TypedDict, Unpack, overload

import torch

from lcexport.configs.errors import UsageError
from lcexport.engines import Engine, open_engine
from lcexport.engines.bundle import Bundle, GraphRecord, open_bundle
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.checks import SCHEDULER_CONFIG, check_device, check_engine, read_shift
from lcexport.runtime.denoiser import Denoiser
from lcexport.runtime.request import Request, initial_noise, request_from
from lcexport.runtime.residency import Offload, Resident, check_offload
from lcexport.runtime.sampler import OnStep, sample
from lcexport.runtime.schedule import schedule
from lcexport.runtime.text import Text, TextEncoder
from lcexport.runtime.vae import VideoDecoder
from lcexport.runtime.video import Video

Output = Literal["video", "latents"]


class Options(TypedDict, total=False):
    """Keyword arguments of `Pipeline.generate`, which describes them."""

    seed: int
    steps: int | None
    guidance_scale: float | None
    latents: torch.Tensor | None
    distill: bool
    on_step: OnStep | None
    cancel: CancelToken | None


def load(
    bundle_dir: str | Path,
    resolution: str = "480p",
    backend: str = "onnxruntime",
    device: str = "cpu",
    *,
    offload: Offload = "keep",
    engine: Engine | None = None,
    engine_options: Mapping[str, object] | None = None,
    check_hashes: bool = False,
) -> "Pipeline":
    """Open a bundle for generation.

    Args:
        bundle_dir: the folder that `lcexport build` wrote.
        resolution: which of the bundle's graphs.
        backend: what runs the DiT.
        device: "cpu", "cuda" or "cuda:1"; for the DiT, the text encoder and the VAE alike.
        offload: where the text encoder and the VAE wait: "keep" on the device, "cpu", or
            "release" to load them for each use.
        engine: use this open engine instead of opening one; it stays the caller's to close.
        engine_options: how the backend runs its engine; see `lcexport.engines.open_engine`.
        check_hashes: compare every file's SHA-256, the large ones included.

    Raises:
        UsageError: no such resolution, backend, device or policy.
        IntegrityError: no bundle there, or a file that is not the one its manifest names.
        IncompatibleError: the backend's library or the device is missing.
        InputError: the text encoder, tokenizer, VAE or scheduler file is unusable.
    """
    check_offload(offload)
    where = check_device(device)
    bundle = open_bundle(bundle_dir, every_hash=check_hashes)
    graph = bundle.graph(resolution)
    shift = read_shift(bundle.path(SCHEDULER_CONFIG))
    # The encoder and the VAE compute in the DiT's precision, as the released pipeline does.
    dtype = torch.bfloat16 if bundle.manifest.precision == "bf16" else torch.float32
    with ExitStack() as stack:
        if engine is None:
            opened = open_engine(backend, bundle, resolution, device, None, engine_options)
            engine = stack.enter_context(opened)
        check_engine(engine, graph)
        make_text = partial(TextEncoder, bundle.folder, graph.preset.text_tokens, dtype)
        text = Resident(make_text, where, offload)
        stack.callback(text.close)
        decoder = Resident(partial(VideoDecoder, bundle.folder, dtype), where, offload)
        stack.callback(decoder.close)
        parts = (engine, text, decoder, shift)
        return Pipeline(bundle, graph, *parts, stack.pop_all(), engine_options)


class Pipeline:
    """An opened bundle; `load` makes it. Close it, or use it in a `with` block."""

    def __init__(
        self,
        bundle: Bundle,
        graph: GraphRecord,
        engine: Engine,
        text: Resident[TextEncoder],
        decoder: Resident[VideoDecoder],
        shift: float,
        resources: ExitStack,
        engine_options: Mapping[str, object] | None = None,
    ) -> None:
        self.bundle, self.preset, self.engine, self.shift = bundle, graph.preset, engine, shift
        self._text, self._decoder = text, decoder
        self._resources, self._engine_options = resources, engine_options
        self._closed = False

    @overload
    def generate(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        *,
        output: Literal["video"] = "video",
        **options: Unpack[Options],
    ) -> Video: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        negative_prompt: str | list[str] | None = None,
        *,
        output: Literal["video"] = "video",
        **options: Unpack[Options],
    ) -> list[Video]: ...
    @overload
    def generate(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        *,
        output: Literal["latents"],
        **options: Unpack[Options],
    ) -> torch.Tensor: ...
    def generate(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        latents: torch.Tensor | None = None,
        distill: bool = False,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        output: Output = "video",
    ) -> Video | list[Video] | torch.Tensor:
        """Make one video per prompt.

        Args:
            prompt: one prompt, or a list of B.
            negative_prompt: what to steer away from; None means "", one str serves all.
            seed: of the initial noise, 0..2**63-1; one draw for the whole batch.
            steps: None for the preset's (16 when distilled).
            guidance_scale: 1 for no guidance; None for the preset's (1 when distilled).
            latents: initial noise float32 [B, 16, T, H, W] in place of the seed's.
            distill: use the distilled model's schedule; the bundle must hold that model.
            on_step: called after each step with a StepEvent.
            cancel: stops the generation before its next call of the engine.
            output: "video", or "latents" for the normalised float32 [B, 16, T, H, W].

        Raises:
            UsageError: an argument is out of range; nothing was computed.
            VerificationError: a step left numbers that are not finite.
            Cancelled: the token was set.
        """
        self._check_open()
        check_output(output)
        request = request_from(
            self.preset,
            prompt,
            negative_prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            distill=distill,
        )
        shape = (len(request.prompts), *self.preset.latent_shape)
        noise = initial_noise(latents, request.seed, shape)
        cancel = cancel or CancelToken()
        timings: dict[str, float] = {}
        with torch.no_grad():
            with timed(timings, "text"):
                positive, negative = self._encode(request, cancel)
            with timed(timings, "denoise"):
                denoiser = Denoiser(self.engine, positive, negative, request.guidance_scale, cancel)
                plan = schedule(request.steps, self.shift, request.distill)
                noise = noise.to(self.engine.device)
                final = sample(denoiser.velocity, noise, plan, on_step, cancel)
            if output == "latents":
                return final
            with timed(timings, "decode"):
                frames = self._decode(final, cancel)
        drawn = seed if latents is None else None
        videos = [Video(f, self.preset.fps, dict(timings), drawn) for f in frames]
        return videos[0] if isinstance(prompt, str) else videos

    def at(self, resolution: str) -> "Pipeline":
        """A pipeline for another of the bundle's resolutions, closed with this one.

        It uses this one's text encoder and VAE, and what memory the two engines can share: with
        eager torch and with TensorRT plans built with `--weights shared`, that is the weights. The
        two must not run at the same time.

        Raises:
            UsageError, IntegrityError, IncompatibleError: as `load`.
        """
        self._check_open()
        graph = self.bundle.graph(resolution)
        if graph.preset.text_tokens != self.preset.text_tokens:
            raise UsageError(
                "the two resolutions were built for texts of other lengths",
                got=graph.preset.text_tokens,
                wanted=self.preset.text_tokens,
            )
        own = self.engine
        with ExitStack() as stack:
            where, how = str(own.device), self._engine_options
            engine = open_engine(own.backend, self.bundle, resolution, where, own, how)
            stack.enter_context(engine)
            check_engine(engine, graph)
            parts = (engine, self._text, self._decoder, self.shift)
            other = Pipeline(self.bundle, graph, *parts, stack.pop_all(), how)
        self._resources.callback(other.close)
        return other

    def close(self) -> None:
        """Give everything back. Harmless when called twice."""
        self._closed = True
        self._resources.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode(self, request: Request, cancel: CancelToken) -> tuple[Text, Text | None]:
        cancel.check()
        with self._text.on_device() as encoder:
            positive = encoder.encode(request.prompts)
            cancel.check()
            negative = encoder.encode(request.negatives) if request.negatives else None
        return positive, negative

    def _decode(self, latents_B16THW: torch.Tensor, cancel: CancelToken) -> list[torch.Tensor]:
        """One [F, H, W, 3] per sample, decoded one by one."""
        cancel.check()
        frames = []
        with self._decoder.on_device() as decoder:
            for latents in latents_B16THW:
                cancel.check()
                frames.append(decoder.decode(latents[None])[0])
        return frames

    def _check_open(self) -> None:
        if self._closed:
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
