"""From an engine of a fixed batch to the guided velocity of any number of samples.

B samples, R rows (one per sample and branch), E the engine's batch, T latent frames to denoise,
K clean ones before them.
"""

import torch

from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.engines import Engine, TensorSpec, is_cached, same_device
from lcexport.engines.manifest import GraphRecord
from lcexport.runtime.cache import KeyValueCache, Tensors
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.components import Components
from lcexport.runtime.conditioning import Start
from lcexport.runtime.guidance import Scratch, cfg_zero
from lcexport.runtime.sampler import OnStep, sample
from lcexport.runtime.schedule import Schedule
from lcexport.runtime.text import Text


class Denoiser:
    """Computes velocities for one prompt (or one batch of prompts) on one engine.

    Rows are ordered [negative, positive] sample by sample and fed E at a time; where the last
    call would be partly empty its row is repeated. Without guidance there is no negative row.
    An engine of batch 2 thus computes both branches of a sample in one call.

    Everything is allocated here: a velocity is computed in the same buffers each time. What does
    not change from step to step (text, clean frames) is copied only when a slot of the engine's
    batch gets another row: never again, where one call takes all rows.

    Args:
        engine: not owned, not closed.
        positive: B encoded prompts.
        negative: B encoded negative prompts; needed when `scale` exceeds 1.
        scale: guidance scale, at least 1; at exactly 1 one branch is computed.
        clean: float32 [B, 16, K, H, W], put in front of the latents at timestep 0. They are part
            of the engine's input and of what guidance is scaled by, not of what comes out.
        cache: the clean frames as keys and values, for an engine that takes those. One sample's
            serves all.
        cancel: looked at before every call of the engine.

    Raises:
        UsageError: the text does not fit the engine, or guidance without negative prompts.
    """

    def __init__(
        self,
        engine: Engine,
        positive: Text,
        negative: Text | None = None,
        scale: float = 1.0,
        cancel: CancelToken | None = None,
        *,
        clean: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> None:
        if scale > 1 and negative is None:
            raise UsageError("guidance needs a negative prompt, even an empty one", got=scale)
        branches = [negative, positive] if negative is not None and scale > 1 else [positive]
        self._engine, self._scale = engine, scale
        self._cancel = cancel or CancelToken()
        self._branches, self._samples = len(branches), len(positive.embeds)
        self._text = interleave([text.to(engine.device) for text in branches])
        check_text(engine, self._text)
        # One set of buffers for every call: the engine may keep their addresses.
        own = [spec for spec in engine.inputs if not is_cached(spec.name)]
        self._inputs = {spec.name: buffer(spec, engine.device) for spec in own}
        self._clean = None if clean is None else clean.to(engine.device)
        self._past = CachedRows(engine, cache) if cache is not None else None
        if (self._past is None) == any(is_cached(spec.name) for spec in engine.inputs):
            raise UsageError("a cache was given to an engine without one, or the reverse")
        self._calls = calls(self._samples * self._branches, len(self._inputs["hidden_states"]))
        self._loaded: list[int | None] = [None] * len(self._calls[0])
        self._outputs = {spec.name: buffer(spec, engine.device) for spec in engine.outputs}
        made = self._outputs["velocity"]
        rows = self._samples * self._branches
        # Where one call makes exactly the rows, it writes them where they are needed.
        self._velocity = made if len(made) == rows else made.new_empty(rows, *made.shape[1:])
        self._scratch = Scratch.like(self._velocity[: self._samples])

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The guided velocity x0 - noise, float32 [B, 16, T, H, W], on the engine's device.

        Args:
            latents: float32 [B, 16, T, H, W].
            timestep: [B], or [B, T] where frames differ; on the 0..1000 scale.

        The result is overwritten by the next call.

        Raises:
            UsageError: the latents do not fit the engine.
            Cancelled: the token was set.
        """
        self._check_latents(latents)
        present: tuple[int, ...] = ()
        for rows in self._calls:
            self._cancel.check()
            self._load(rows)
            samples = tuple(row // self._branches for row in rows)
            if samples != present:  # the branches of one sample have the same latents
                self._place(latents, timestep, samples)
                present = samples
            past = self._past.rows(samples) if self._past else {}
            self._engine.run({**self._inputs, **past}, self._outputs)
            if self._outputs["velocity"] is not self._velocity:
                part = self._velocity[rows[0] : rows[0] + len(rows)]
                part.copy_(self._outputs["velocity"][: len(part)])
        made = self._velocity
        if self._branches == 2:
            cond, uncond = made[1::2], made[0::2]
            made = cfg_zero(cond, uncond, self._scale, self._scratch, out=cond)
        return made[:, :, self._clean_frames :]

    @property
    def _clean_frames(self) -> int:
        return 0 if self._clean is None else self._clean.shape[2]

    def _load(self, rows: tuple[int, ...]) -> None:
        """Put these rows' text and clean frames into the engine's inputs, unless they are there."""
        for slot, row in enumerate(rows):
            if self._loaded[slot] == row:
                continue
            self._inputs["encoder_hidden_states"][slot].copy_(self._text.embeds[row])
            self._inputs["encoder_attention_mask"][slot].copy_(self._text.mask[row])
            if self._clean is not None:
                clean = self._clean[row // self._branches]
                self._inputs["hidden_states"][slot, :, : self._clean_frames].copy_(clean)
                self._inputs["timestep"][slot, : self._clean_frames].zero_()
            self._loaded[slot] = row

    def _place(
        self, latents: torch.Tensor, timestep: torch.Tensor, samples: tuple[int, ...]
    ) -> None:
        """Put these samples' latents and timesteps into the engine's inputs."""
        clean = self._clean_frames
        for slot, of in enumerate(samples):
            self._inputs["hidden_states"][slot, :, clean:].copy_(latents[of])
            self._inputs["timestep"][slot, clean:].copy_(timestep[of])

    def _check_latents(self, latents: torch.Tensor) -> None:
        # copy_ would broadcast a wrong shape in silence
        channels, frames, *size = self._inputs["hidden_states"].shape[1:]
        wanted = [self._samples, channels, frames - self._clean_frames, *size]
        if list(latents.shape) != wanted:
            raise UsageError(
                "the latents do not fit the engine", got=list(latents.shape), wanted=wanted
            )


def calls(rows: int, engine_batch: int) -> list[tuple[int, ...]]:
    """Which rows each call of the engine computes; the last one is repeated to fill it."""
    return [
        tuple(min(row, rows - 1) for row in range(first, first + engine_batch))
        for first in range(0, rows, engine_batch)
    ]


def denoise(
    components: Components,
    graph: GraphRecord,
    texts: tuple[Text, Text | None],
    guidance_scale: float,
    start: Start,
    noise_B16THW: torch.Tensor,
    schedule: Schedule,
    on_step: OnStep | None,
    cancel: CancelToken,
) -> torch.Tensor:
    """Sample one graph: normalised latents float32 [B, 16, T, H, W], the clean frames in front.

    noise: of all T frames; what stands where the clean ones go is not looked at.
    """
    engine = components.engine(graph)
    if start.frames != graph.job.num_cond_latents + graph.job.cached_latents:
        raise UsageError(
            f"{graph.name} starts from other clean frames",
            got=f"{start.frames} latent frames",
            wanted=graph.job.num_cond_latents + graph.job.cached_latents,
        )
    clean = start.for_samples(len(noise_B16THW))
    in_front = clean if start.cache is None else None
    denoiser = Denoiser(engine, *texts, guidance_scale, cancel, clean=in_front, cache=start.cache)
    noise = noise_B16THW[:, :, start.frames :].to(engine.device)
    made = sample(denoiser.velocity, noise, schedule, on_step, cancel)
    return made if clean is None else torch.cat([clean.to(made.device), made], dim=2)


class CachedRows:
    """A cache as an engine's inputs: bound where it lies, or copied into one set of buffers.

    It is copied where it lies on the host, and where a call has several rows; again only when the
    next call is of other samples.
    """

    def __init__(self, engine: Engine, cache: KeyValueCache) -> None:
        self._cache = cache
        self._loaded: tuple[int, ...] = ()
        here = next(iter(cache.samples[0].values())).device
        specs = [spec for spec in engine.inputs if is_cached(spec.name)]
        for spec in specs:
            given = cache.samples[0].get(spec.name)
            if given is None or given.shape[1:] != spec.shape[1:] or given.dtype != spec.dtype:
                raise UsageError(
                    "the cache does not fit the engine",
                    got="nothing" if given is None else f"{given.dtype} {list(given.shape)}",
                    wanted=f"{spec.name}: {spec.dtype} {list(spec.shape)}",
                )
        copied = not same_device(here, engine.device) or specs[0].shape[0] > 1
        self._buffers = {spec.name: buffer(spec, engine.device) for spec in specs} if copied else {}

    def rows(self, samples: tuple[int, ...]) -> Tensors:
        """The inputs for a call whose rows are of these samples."""
        if len(self._cache.samples) == 1:
            samples = (0,) * len(samples)
        if not self._buffers:
            return self._cache.samples[samples[0]]
        if samples != self._loaded:
            for slot, sample in enumerate(samples):
                for name, tensor in self._cache.samples[sample].items():
                    self._buffers[name][slot].copy_(tensor[0])
            self._loaded = samples
        return self._buffers


def interleave(branches: list[Text]) -> Text:
    """Rows sample by sample: [negative 0, positive 0, negative 1, positive 1, ...]."""
    embeds = torch.stack([text.embeds for text in branches], 1).flatten(0, 1)
    mask = torch.stack([text.mask for text in branches], 1).flatten(0, 1)
    return Text(embeds, mask)


def buffer(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)


def input_spec(engine: Engine, name: str) -> TensorSpec:
    """The engine's input of that name; IncompatibleError where it has none."""
    for spec in engine.inputs:
        if spec.name == name:
            return spec
    raise IncompatibleError(
        f"the engine has no input {name}", got=[spec.name for spec in engine.inputs]
    )


def check_text(engine: Engine, text: Text) -> None:
    """Raise UsageError unless rows of `text` fit the engine's text inputs."""
    if text.embeds.dtype != torch.float32 or not torch.isfinite(text.embeds).all():
        raise UsageError("the text is not finite float32", got=text.embeds.dtype)
    for name, rows in (
        ("encoder_hidden_states", text.embeds),
        ("encoder_attention_mask", text.mask),
    ):
        wanted = input_spec(engine, name).shape[1:]
        if tuple(rows.shape[1:]) != wanted:
            raise UsageError(
                f"the text does not fit the engine's {name}",
                got=list(rows.shape[1:]),
                wanted=list(wanted),
            )
