"""What a pipeline runs besides the DiT, and which of it can be compiled, at which sizes."""

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from lcexport.configs.tasks import Job

TEXT_ENCODER, VAE_DECODER = "text_encoder", "vae_decoder"
# The functions that each becomes: of the decoder, the first latent frame's and all the others'.
PARTS = {TEXT_ENCODER: ("encoder",), VAE_DECODER: ("first", "later")}
SIZES = {TEXT_ENCODER: 1, VAE_DECODER: 2}  # how many numbers a component's size has


class Component(BaseModel):
    """One component at one size: (tokens,) of the text encoder, pixels (H, W) of the decoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["text_encoder", "vae_decoder"]
    size: tuple[PositiveInt, ...]

    @model_validator(mode="after")
    def _is_its_kinds_size(self) -> Self:
        if len(self.size) != SIZES[self.kind]:
            raise ValueError(f"the size of a {self.kind} is {SIZES[self.kind]} numbers")
        return self

    @property
    def name(self) -> str:
        """`text_encoder.512`, `vae_decoder.480x832`: its key in the manifest, and its folder's."""
        return f"{self.kind}.{'x'.join(map(str, self.size))}"

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[self.kind]


def text_encoder(tokens: int) -> Component:
    """For prompts of so many tokens, padding included."""
    return Component(kind="text_encoder", size=(tokens,))


def vae_decoder(height: int, width: int) -> Component:
    """For frames of so many pixels; their number does not matter, it goes frame by frame."""
    return Component(kind="vae_decoder", size=(height, width))


def components_of(jobs: Iterable[Job]) -> tuple[Component, ...]:
    """What these graphs' videos need, each once: the text encoders first."""
    jobs = tuple(jobs)
    texts = [text_encoder(job.text_tokens) for job in jobs]
    decoders = [vae_decoder(job.height, job.width) for job in jobs]
    return tuple(dict.fromkeys([*texts, *decoders]))
