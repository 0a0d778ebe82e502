"""Prompt in, video out: text, then sampling, then decoding, on one bundle.

Not thread-safe: one pipeline, one thread; only a CancelToken may be used from another.
"""

from collections.abc import Iterator
from typing import Literal, Self, Unpack, overload

import torch

from lcexport.configs.errors import UsageError
from lcexport.configs.presets import LATENT_CHANNELS
from lcexport.configs.tasks import Task
from lcexport.engines import Engine
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.manifest import GraphRecord
from lcexport.runtime.cache import KeyValueCache
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.components import Components
from lcexport.runtime.conditioning import Given, VideoSource
from lcexport.runtime.generating import Options, Output, check_output, generate, start_from
from lcexport.runtime.refining import RefineOptions, refine
from lcexport.runtime.request import MAX_SEED, Prompt, check_whole, drawn_noise
from lcexport.runtime.text import Text
from lcexport.runtime.video import Video


class Pipeline:
    """An opened bundle at one resolution; `load` makes it. Close it, or use it in a `with` block.

    Attributes:
        preset: the size of its videos.
        components: the engines, the text encoder and the VAE.
    """

    def __init__(self, components: Components, resolution: str, *, owner: bool = True) -> None:
        self.components, self._owner = components, owner
        self.resolution = resolution
        self.preset = first_graph(self.bundle, resolution).preset
        self._closed = False

    @property
    def bundle(self) -> Bundle:
        """What it makes videos of, as it was when it was opened or its weights were reloaded."""
        return self.components.bundle

    @property
    def engine(self) -> Engine:
        """Text-to-video's engine. It may be closed when another is opened: see `keep_engines`."""
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
        output: Output = "video",
        **options: Unpack[Options],
    ) -> Video | list[Video] | torch.Tensor:
        """Make one video per prompt: from text alone, from an image, or going on from a video.

        `lcexport.runtime.generating` says all of it.
        """
        self._check_open()
        return generate(
            self.components, self.preset, prompt, negative_prompt, output=output, **options
        )

    def encode(self, prompts: list[str]) -> Text:
        """Prompts for any number of generations: what the text encoder makes of them.

        Raises:
            UsageError: no list of texts, or an empty list.
        """
        self._check_open()
        if not isinstance(prompts, list) or not prompts:
            raise UsageError(
                "these are no prompts", got=repr(prompts)[:60], wanted="a list of one or more"
            )
        return self.components.encode_text(prompts, CancelToken())

    def frames(
        self, latents: torch.Tensor, cancel: CancelToken | None = None
    ) -> Iterator[torch.Tensor]:
        """The frames of `generate(output="latents")`, as they are decoded, for `save_frames`.

        Groups of one and then four, float32 [1 or 4, H, W, 3] in 0..1, on the CPU.

        Args:
            latents: of one sample: [16, T, H/8, W/8], or with a batch of 1 in front.

        Raises:
            UsageError: several samples, or no latents.
            VerificationError: the decoder left NaN in the frames.
            Cancelled: the token was set.
        """
        self._check_open()
        latents_16THW = latents[0] if latents.dim() == 5 and len(latents) == 1 else latents
        if latents_16THW.dim() != 4 or len(latents_16THW) != LATENT_CHANNELS:
            raise UsageError(
                "these are not the latents of one video",
                got=list(latents.shape),
                wanted="[16, T, H/8, W/8]",
            )
        return self.components.frames(latents_16THW, cancel or CancelToken())

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
        shape = (1, *self.preset.latent_shape)
        generator, _ = drawn_noise(seed, shape, self.components.stored("vc"))
        with torch.no_grad():
            start = start_from(
                self.components, self.graph("vc"), given, True, generator, cancel or CancelToken()
            )
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
        self.components.prepare(resolution)
        self.components.engine(graph)
        return Pipeline(self.components, resolution, owner=False)

    def reload_weights(self, *, check_hashes: bool = False) -> None:
        """Go on with the weights that are in the bundle's folder now: other LoRAs were baked in.

        The engines are closed, and opened again when they are next used; text encoder and VAE
        stay. Pipelines from `at` change with this one. Caches that were made before are refused.

        Args:
            check_hashes: compare every file's SHA-256, the large ones included.

        Raises:
            IntegrityError: more than the weights differs, or the folder is between two states;
                the pipeline is as it was.
            UsageError: closed, or `load` was given an engine, which only its owner can change.
        """
        self._check_open()
        self.components.reload(open_bundle(self.bundle.folder, every_hash=check_hashes))

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

    def _check_open(self) -> None:
        if self._closed or self.components.closed:
            raise UsageError("the pipeline is closed", do="Load the bundle again.")


def first_graph(bundle: Bundle, resolution: str) -> GraphRecord:
    """Text-to-video's graph at a resolution, or another task's where there is none."""
    graphs = bundle.manifest.graphs.values()
    found = next((graph for graph in graphs if graph.preset.name == resolution), None)
    return found if found and resolution not in bundle.manifest.graphs else bundle.graph(resolution)
