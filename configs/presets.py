"""Presets: what is generated, at which size, with which sampler defaults. Data, not code.

A preset is a TOML file beside this module, or a size written out: `480x832x93` is height x width
x frames. Sizes are in pixels and frames; the latent grid follows from the Wan VAE (8 x 8 pixels
and 4 frames to one latent) and the DiT's patch (1 x 2 x 2 latents to one token).
"""

import logging
import re
import tomllib
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lcexport.configs.errors import UsageError

log = logging.getLogger(__name__)

LATENT_CHANNELS = 16
SPATIAL_STRIDE = 8  # pixels per latent, along height and width
TEMPORAL_STRIDE = 4  # frames per latent, after the first frame
PATCH = 2  # latents per token, along height and width
PIXEL_MULTIPLE = SPATIAL_STRIDE * PATCH


class Preset(BaseModel):
    """One size to build for, and the sampler's defaults at that size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    height: int = Field(ge=PIXEL_MULTIPLE, le=4096)
    width: int = Field(ge=PIXEL_MULTIPLE, le=4096)
    frames: int = Field(ge=1, le=4096)
    fps: int = Field(default=15, ge=1, le=240)
    text_tokens: int = Field(default=512, ge=1, le=512)
    steps: int = Field(default=50, ge=1, le=1000)
    guidance_scale: float = Field(default=4.0, ge=1.0, le=100.0)

    @field_validator("height", "width")
    @classmethod
    def _whole_patches(cls, pixels: int) -> int:
        # Odd latent sizes crash the original: its grid is floor-divided before its padding.
        if pixels % PIXEL_MULTIPLE:
            raise ValueError(f"must be a multiple of {PIXEL_MULTIPLE}")
        return pixels

    @field_validator("frames")
    @classmethod
    def _whole_latents(cls, frames: int) -> int:
        used = round_frames(frames)
        if used != frames:
            log.warning("%d frames are not 4k+1: %d frames are used", frames, used)
        return used

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // TEMPORAL_STRIDE + 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(16, T, H, W) of one video's latents."""
        height, width = self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE
        return (LATENT_CHANNELS, self.latent_frames, height, width)

    @property
    def tokens(self) -> int:
        """N = T * h * w, the length of the DiT's sequence."""
        _, frames, height, width = self.latent_shape
        return frames * (height // PATCH) * (width // PATCH)


def round_frames(frames: int) -> int:
    """The number of frames the VAE can hold: 4k+1, rounded as the original pipeline does."""
    return frames // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    names = (entry.name for entry in files("lcexport.configs").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def preset_from(text: str) -> Preset:
    """The preset called `text`, or the size that `text` writes out as HEIGHTxWIDTHxFRAMES.

    Raises:
        UsageError: no such preset, or a size the model cannot take.
    """
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text)
    if size:
        height, width, frames = (int(number) for number in size.groups())
        fields: dict[str, object] = {"height": height, "width": width, "frames": frames}
        name = f"{height}x{width}x{round_frames(frames)}"
    elif text in preset_names():
        fields = tomllib.loads(
            files("lcexport.configs").joinpath(f"{text}.toml").read_text("utf-8")
        )
        name = text
    else:
        raise UsageError(
            "unknown resolution",
            got=repr(text[:80]),
            wanted=f"one of {', '.join(preset_names())}, or HEIGHTxWIDTHxFRAMES",
            do="For example --res 480p or --res 480x832x93.",
        )
    try:
        return Preset.model_validate({"name": name, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        raise UsageError(
            f"resolution {name}: {first['loc'][0]} {reason}",
            got=first["input"],
            do="Choose a size the model can take, for example 480x832x93.",
        ) from error
