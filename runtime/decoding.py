"""Latents to frames, latent frame by latent frame: by the library's decoder or a compiled one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lcexport.configs.components import Component, vae_decoder
from lcexport.configs.presets import SPATIAL_STRIDE

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


class Package(Protocol):
    """A compiled function of a component; see `lcexport.engines.aoti_components`."""

    def check(self, model: torch.nn.Module) -> None: ...

    def __call__(
        self, model: torch.nn.Module, *tensors: torch.Tensor
    ) -> Sequence[torch.Tensor]: ...

    def close(self) -> None: ...


# By the names of components: their packages, in order.
Packages = Mapping[str, Sequence[Package]]


def decoded(
    model: "AutoencoderKLWan", z_116THW: torch.Tensor, compiled: Packages
) -> Iterator[torch.Tensor]:
    """Frames in -1..1, [1, 3, 1 or 4, 8H, 8W] for each latent frame; with tiling all at once.

    By the compiled decoder of this size; where there is none, and with tiling, by the library's.
    """
    packages = compiled.get(decoder_of(z_116THW).name)
    if packages and goes_by_frames(model):
        return decoded_by_packages(model, z_116THW, *packages)
    return decoded_by_library(model, z_116THW)


def decoder_of(latents: torch.Tensor) -> Component:
    """The decoder, were it compiled, that latents [..., H, W] call for."""
    height, width = (side * SPATIAL_STRIDE for side in latents.shape[-2:])
    return vae_decoder(height, width)


def decoded_by_library(model: "AutoencoderKLWan", z_B16THW: torch.Tensor) -> Iterator[torch.Tensor]:
    """The library's `decode` does the same, but keeps every frame until the last is there, and
    copies all of them for each that comes.
    """
    if not goes_by_frames(model):
        yield model.decode(z_B16THW, return_dict=False)[0]
        return
    for frames in unclamped(model, z_B16THW):
        yield frames.clamp(-1, 1)


def unclamped(model: "AutoencoderKLWan", z_B16THW: torch.Tensor) -> Iterator[torch.Tensor]:
    """What the decoder makes of each latent frame, where it goes by frames."""
    x_B16THW = model.post_quant_conv(z_B16THW)
    past = empty_past(model.decoder)
    for t in range(x_B16THW.shape[2]):
        yield model.decoder(
            x_B16THW[:, :, t : t + 1], feat_cache=past, feat_idx=[0], first_chunk=t == 0
        )


def decoded_by_packages(
    model: "AutoencoderKLWan", z_116THW: torch.Tensor, first: Package, later: Package
) -> Iterator[torch.Tensor]:
    """The first latent frame's package, then the later ones' with what the call before kept."""
    past: Sequence[torch.Tensor] = ()
    for t in range(z_116THW.shape[2]):
        package = later if t else first
        pixels, *past = package(model, z_116THW[:, :, t : t + 1].contiguous(), *past)
        yield pixels


def goes_by_frames(model: "AutoencoderKLWan") -> bool:
    """Whether `model` can be decoded frame by frame: not in tiles, and not in patches of pixels."""
    return not model.use_tiling and model.config["patch_size"] is None


def empty_past(decoder: torch.nn.Module) -> list[Any]:
    """Nothing kept yet: at least one place for each causal convolution's past.

    Ours and not the library's, so that two videos can be decoded by turns.
    """
    return [None] * len(list(decoder.modules()))
