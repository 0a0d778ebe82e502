"""A bundle's working parts on one device: engines, text encoder, VAE. Opened once, shared by all.

Engines are opened when they are first asked for, and share what memory their backend lets them.
Where only so many may stay open, the one that was used longest ago is closed before another opens.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain

import torch

from lcexport.configs.components import VAE_DECODER, components_of, text_encoder
from lcexport.configs.errors import IntegrityError, UsageError
from lcexport.configs.presets import SPATIAL_STRIDE, Preset
from lcexport.configs.tasks import CONTINUATIONS, Task
from lcexport.engines import Engine, open_engine
from lcexport.engines.bundle import Bundle
from lcexport.engines.files import identity
from lcexport.engines.manifest import WEIGHTS, GraphRecord
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.checks import (
    SCHEDULER_CONFIG,
    check_device,
    check_engine,
    check_only_weights_differ,
    read_shift,
)
from lcexport.runtime.decoding import Packages, decoder_of
from lcexport.runtime.residency import Offload, Resident, check_offload, free_cache
from lcexport.runtime.text import Text, TextCache, TextEncoder
from lcexport.runtime.vae import VideoVAE

log = logging.getLogger(__name__)


class Components:
    """Everything that computes. Close it.

    Args:
        preset: L, the length of encoded prompts, is its; so are the compiled decoders that are
            opened now, others when they are asked for.
        engine_options: see `lcexport.engines.open_engine`.
        vae_tiling: see `VideoVAE`.
        compiled: whether to use the components that the bundle has compiled, with the backend that
            compiled them.
        keep_engines: how many engines may be open at once, the caller's own not counted; None for
            all.

    Raises:
        UsageError, IncompatibleError, InputError: see `lcexport.runtime.load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        device: str,
        offload: Offload,
        preset: Preset,
        engine_options: Mapping[str, object] | None = None,
        keep_engines: int | None = None,
        vae_tiling: bool = False,
        compiled: bool = True,
    ) -> None:
        check_offload(offload)
        if keep_engines is not None and keep_engines < 1:
            raise UsageError("no engine may stay open", got=keep_engines, wanted="1 or more")
        self.bundle, self.backend, self.text_tokens = bundle, backend, preset.text_tokens
        self.device = check_device(device)
        self.shift = read_shift(bundle.path(SCHEDULER_CONFIG))
        # The encoder and the VAE compute in the DiT's precision, as the released pipeline does.
        bf16 = bundle.manifest.precision == "bf16"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self._device_name, self._engine_options = device, engine_options
        self._keep_engines = keep_engines
        self._engines: dict[str, Engine] = {}  # the one used last is the last one
        self._adopted: set[str] = set()
        self._warned: set[str] = set()
        self._texts = TextCache()
        self.closed = False
        self._resources = ExitStack()
        self._tiling = vae_tiling
        used = compiled and backend == "aotinductor"
        self._compiled = bundle.manifest.components if used else {}
        self._decoders: Packages = {}
        with ExitStack() as self._resources:
            load_text = self._text_loader()
            self._decoders = self._packages(self._decoders_of(preset.name))
            # Weights are read last: what does not fit this machine has been said by then.
            self._text = Resident(load_text, self.device, offload)
            self._resources.callback(self._text.close)
            self._vae = Resident(self._load_vae, self.device, offload)
            self._resources.callback(self._vae.close)
            self._resources = self._resources.pop_all()

    def _text_loader(self) -> Callable[[torch.device], TextEncoder]:
        """Makes the text encoder, with the compiled one of this length where there is one."""
        name = text_encoder(self.text_tokens).name
        package = self._packages([name]).get(name, (None,))[0]
        if self._compiled and package is None:
            why = "the text encoder was not compiled for %d tokens: the library's is used"
            self._warn_once(name, why, self.text_tokens)
        return partial(
            TextEncoder, self.bundle.folder, self.text_tokens, self.dtype, package=package
        )

    def _load_vae(self, device: torch.device) -> VideoVAE:
        return VideoVAE(
            self.bundle.folder, self.dtype, device, tiling=self._tiling, packages=self._decoders
        )

    def _packages(self, names: Iterable[str]) -> Packages:
        """Those of these components which are compiled, opened; they are closed with the rest."""
        names = [name for name in names if name in self._compiled]
        if not names:
            return {}
        from lcexport.engines.aoti_components import open_components

        packages = open_components(self.bundle, names, self.device)
        for package in chain(*packages.values()):
            self._resources.callback(package.close)
        log.info("compiled besides the DiT: %s", ", ".join(packages))
        return packages

    def _decoders_of(self, resolution: str) -> list[str]:
        """The decoders that a resolution's graphs have use for; none for tiles."""
        graphs = self.bundle.manifest.graphs.values()
        needed = components_of(graph.job for graph in graphs if graph.preset.name == resolution)
        found = [component.name for component in needed if component.kind == VAE_DECODER]
        return [] if self._tiling else found

    def prepare(self, resolution: str) -> None:
        """Open the compiled decoders of another resolution: what does not fit is said now.

        Raises:
            IncompatibleError, IntegrityError: as `lcexport.runtime.load`.
        """
        self._open_decoders(self._decoders_of(resolution))

    def _open_decoders(self, names: Iterable[str]) -> None:
        """Open the compiled ones among these that are not open yet."""
        packages = self._packages(name for name in names if name not in self._decoders)
        decoders = {**self._decoders, **packages}
        if packages and (vae := self._vae.loaded):
            vae.use(decoders)
        self._decoders = decoders

    def _choose_decoder(self, latents_16THW: torch.Tensor) -> None:
        """Open the compiled decoder of these latents, or warn that they go without."""
        name = decoder_of(latents_16THW).name
        if self._compiled and (self._tiling or name not in self._compiled):
            why = "in tiles" if self._tiling else "of a size that was not compiled"
            height, width = (side * SPATIAL_STRIDE for side in latents_16THW.shape[-2:])
            said = "frames of %d x %d, %s: decoded by the library"
            self._warn_once(f"{name} {why}", said, height, width, why)
        elif name not in self._decoders:
            self._open_decoders([name])

    def stored(self, task: Task) -> torch.dtype:
        """What the original keeps a task's latents in: the DiT's precision for a continuation."""
        return self.dtype if task in CONTINUATIONS else torch.float32

    def engine(self, graph: GraphRecord) -> Engine:
        """The engine of a graph, until another graph's is asked for: it may be closed then.

        Raises:
            IncompatibleError: the backend's library, its device or its plans are missing.
            IntegrityError: the bundle's weights are not those that were there when it was opened.
        """
        found = self._engines.pop(graph.name, None)
        self._engines[graph.name] = found or self._opened(graph)
        return self._engines[graph.name]

    def _opened(self, graph: GraphRecord) -> Engine:
        self._check_weights()
        if self._keep_engines is not None:
            self._close_engines(self._keep_engines - 1)
        like = next(iter(self._engines.values()), None)
        where = self._device_name if like is None else str(like.device)
        opened = open_engine(
            self.backend, self.bundle, graph.name, where, like, self._engine_options
        )
        try:
            self._check_weights()
            check_engine(opened, graph)
        except BaseException:
            opened.close()
            raise
        return opened

    def _close_engines(self, keep: int = 0) -> None:
        """Close those that were used longest ago, but for `keep` of them."""
        own = [name for name in self._engines if name not in self._adopted]
        for name in own[: max(0, len(own) - keep)]:
            self._engines.pop(name).close()
        free_cache(self.device)

    def adopt(self, graph: GraphRecord, engine: Engine) -> None:
        """Use an open engine for a graph; it stays its owner's to close."""
        check_engine(engine, graph)
        self._engines[graph.name] = engine
        self._adopted.add(graph.name)

    def reload(self, bundle: Bundle) -> None:
        """Go on with other weights: `bundle` is the same one, opened again.

        Raises:
            UsageError: an engine is the caller's, who alone can exchange its weights.
            IntegrityError: the bundle differs in more than its weights.
        """
        if self._adopted:
            raise UsageError(
                "an engine in use was handed in, and has the old weights",
                got=", ".join(sorted(self._adopted)),
                do="Close the pipeline and load the bundle again.",
            )
        check_only_weights_differ(self.bundle, bundle)
        self._close_engines()
        self.bundle = bundle
        self._warned.clear()

    def expect_lora(self, name: str, use: str) -> None:
        """Warn, once, where the weights were not made with a LoRA of that name.

        Only warn: weights may have been merged with it before the bundle was built.
        """
        there = [record.name for record in self.bundle.manifest.loras]
        if any(name in other for other in there):
            return
        self._warn_once(
            name,
            "%s needs the LoRA %s in the weights; the bundle names %s: unless it was merged before "
            "the build, the result will be poor (lcexport lora bake, or build --lora)",
            use,
            name,
            ", ".join(there) or "none",
        )

    def _warn_once(self, key: str, message: str, *values: object) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning(message, *values)

    def encode_text(self, prompts: list[str] | Text, cancel: CancelToken) -> Text:
        """One row per prompt. What is encoded already stays as it is."""
        cancel.check()
        return prompts if isinstance(prompts, Text) else self._texts.rows(prompts, self._encode)

    def _encode(self, prompts: list[str]) -> Text:
        with self._text.on_device() as encoder:
            return encoder.encode(prompts)

    def encode_frames(
        self,
        pixels_B3FHW: torch.Tensor,
        posterior_noise: torch.Tensor | torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Frames in -1..1 to latents [B, 16, T, H/8, W/8], normalised in `dtype`."""
        with self._vae.on_device() as vae:
            return vae.encode(pixels_B3FHW, posterior_noise, dtype)

    def decode(self, latents_B16THW: torch.Tensor, cancel: CancelToken) -> list[torch.Tensor]:
        """One [F, H, W, 3] per sample, decoded one by one."""
        with self._vae.on_device():  # once for all
            return [torch.cat(list(self.frames(latents, cancel))) for latents in latents_B16THW]

    def frames(self, latents_16THW: torch.Tensor, cancel: CancelToken) -> Iterator[torch.Tensor]:
        """One sample's frames as they are decoded; the token is looked at before each group."""
        cancel.check()
        with self._vae.on_device() as vae:
            self._choose_decoder(latents_16THW)
            for frames_FHW3 in vae.frames(latents_16THW):
                yield frames_FHW3
                cancel.check()

    def _check_weights(self) -> None:
        """Baking LoRAs exchanges the weights; engines with old and new ones must not be mixed."""
        if identity(self.bundle.folder / WEIGHTS) != self.bundle.weights:
            raise IntegrityError(
                f"the weights of {self.bundle.folder} were exchanged since it was opened",
                do="Call the pipeline's `reload_weights`, or load the bundle again.",
            )

    def close(self) -> None:
        """Give everything back. Harmless when called twice."""
        self.closed = True
        try:
            self._close_engines()
        finally:
            self._engines.clear()
            self._resources.close()
