"""Frames to latents and back: the Wan VAE, and Wan's normalisation of its latents.

B samples, T latent frames, H x W latents; F = 4 * (T - 1) + 1 frames of 8H x 8W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcexport.configs.errors import InputError, UsageError, VerificationError
from lcexport.configs.presets import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE
from lcexport.runtime.decoding import Packages, decoded
from lcexport.runtime.loading import (
    DOWNLOAD_AGAIN,
    is_finite_number,
    library_errors,
    read_config,
    refuse_missing,
)

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


def normalize(
    latents_B16THW: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """(z - mean) * (1 / std) per channel, wholly in the latents' dtype."""
    mean_C, inverse_C = constants(latents_B16THW, mean, std)
    return (latents_B16THW - mean_C) * inverse_C


def denormalize(
    latents_B16THW: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """z / (1 / std) + mean per channel, wholly in the latents' dtype."""
    mean_C, inverse_C = constants(latents_B16THW, mean, std)
    return latents_B16THW / inverse_C + mean_C


def constants(
    like: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and 1/std as [1, C, 1, 1, 1]. Rounded before the reciprocal: bfloat16 can tell."""
    mean_C = torch.tensor(mean, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
    std_C = torch.tensor(std, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
    return mean_C, 1.0 / std_C


class VideoVAE:
    """One bundle's `vae/`: its encoder and its decoder.

    Args:
        folder: holds `vae/`.
        dtype: what it computes in; pixels and latents are rounded to it first.
        device: where it lives.
        tiling: encode and decode pictures above 256 x 256 pixels in overlapping tiles, which are
            blended: less memory, more work, and frames that differ slightly.
        packages: compiled decoders; see `lcexport.runtime.decoding`.

    Raises:
        InputError: a file is missing, or the weights do not fit the configuration.
        IntegrityError: a package was compiled for other weights.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        tiling: bool = False,
        packages: Packages | None = None,
    ) -> None:
        self._packages: Packages = {}
        self._model: AutoencoderKLWan | None = load_vae(Path(folder) / "vae", dtype, device)
        if tiling:
            self._model.enable_tiling()
        self.use(packages or {})

    def encode(
        self,
        pixels_B3FHW: torch.Tensor,
        posterior_noise: torch.Tensor | torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Frames in -1..1 to normalised latents [B, 16, T, H/8, W/8], on the VAE's device.

        They are a sample of the VAE's posterior, mean + std * noise, taken in the VAE's dtype.
        F need not be 4k+1: the frames after the last whole group of four are not looked at.

        Args:
            pixels_B3FHW: H and W are multiples of 8.
            posterior_noise: standard normal, of the latents' shape; or the generator to draw it
                from, sample by sample, on the generator's device and in the VAE's dtype.
            dtype: what the sample is cast to before it is normalised, and the result's.

        Raises:
            UsageError: the pixels or the noise have another shape.
            VerificationError: the encoder left NaN in the latents.
        """
        model = self._opened()
        noises = noise_rows(posterior_noise, latent_shape(pixels_B3FHW.shape), model.dtype)
        rows = []
        with torch.no_grad():
            for pixels, noise in zip(pixels_B3FHW, noises, strict=True):
                posterior: Any = model.encode(
                    pixels[None].to(model.device, model.dtype), return_dict=False
                )[0]
                rows.append(posterior.mean + posterior.std * noise.to(model.device, model.dtype))
            mean, std = model.config["latents_mean"], model.config["latents_std"]
            latents = normalize(torch.cat(rows).to(dtype), mean, std)
        refuse_not_finite("latents", latents)
        return latents

    def decode(self, latents_B16THW: torch.Tensor) -> torch.Tensor:
        """Normalised latents to frames, float32 [B, F, 8H, 8W, 3] in 0..1, on the CPU.

        Raises:
            VerificationError: the decoder left NaN in the frames.
        """
        # One sample at a time: the caches of one already fill the memory.
        return torch.stack([torch.cat(list(self.frames(z))) for z in latents_B16THW])

    @torch.no_grad()
    def frames(self, latents_16THW: torch.Tensor) -> Iterator[torch.Tensor]:
        """One sample's frames as they are decoded: the first alone, then four at a time.

        Each is float32 [1 or 4, 8H, 8W, 3] in 0..1, on the CPU. What is held meanwhile does not
        grow with T: one group of frames, and the last two of every convolution's inputs. With
        tiling the tiles are decoded whole, so all frames come at the end.

        The network clamps to -1..1; x/2 + 1/2 is then taken in float32.

        Raises:
            VerificationError: the decoder left NaN in the frames.
        """
        model = self._opened()
        z_116THW = latents_16THW[None].to(model.device, model.dtype)
        mean, std = model.config["latents_mean"], model.config["latents_std"]
        for pixels_B3FHW in decoded(model, denormalize(z_116THW, mean, std), self._packages):
            pixels_FHW3 = pixels_B3FHW[0].cpu().float().div(2).add(0.5).clamp(0, 1)
            refuse_not_finite("frames", pixels_FHW3)
            yield pixels_FHW3.permute(1, 2, 3, 0).contiguous()

    def use(self, packages: Packages) -> None:
        """Decode with these packages from now on; with none, with the library's decoder.

        Raises:
            IntegrityError: one was compiled for other weights.
        """
        for package in chain(*packages.values()):
            package.check(self._opened())
        self._packages = packages

    def by(self, packages: Packages) -> "VideoVAE":
        """The same one, same weights, with other packages; as `use`."""
        other = copy(self)
        other.use(packages)
        return other

    def to(self, device: torch.device | str) -> "VideoVAE":
        # the library's stubs take `Module.to` for a function without arguments
        torch.nn.Module.to(self._opened(), torch.device(device))
        return self

    def close(self) -> None:
        """Drop the weights. Harmless when called twice."""
        self._model = None

    def _opened(self) -> "AutoencoderKLWan":
        if self._model is None:
            raise UsageError("the VAE is closed")
        return self._model


def latent_shape(pixels: Sequence[int]) -> tuple[int, int, int, int, int]:
    """[B, 16, T, H/8, W/8] of pixels [B, 3, F, H, W].

    Raises:
        UsageError: the VAE cannot take that shape.
    """
    if (
        len(pixels) != 5
        or pixels[1] != 3
        or 0 in pixels
        or any(n % SPATIAL_STRIDE for n in pixels[3:])
    ):
        raise UsageError(
            "the VAE cannot encode pixels of that shape", got=list(pixels),
            wanted="[B, 3, F, H, W], H and W multiples of 8",
        )  # fmt: skip
    samples, _, frames, height, width = pixels
    latents = 1 + (frames - 1) // TEMPORAL_STRIDE
    return samples, LATENT_CHANNELS, latents, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def noise_rows(
    source: torch.Tensor | torch.Generator, shape: Sequence[int], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """One [1, 16, T, H, W] per sample. Drawn one by one: the original asks once per sample."""
    if isinstance(source, torch.Generator):
        one = (1, *shape[1:])
        for _ in range(shape[0]):
            yield torch.randn(one, generator=source, device=source.device, dtype=dtype)
    elif list(source.shape) != list(shape):
        raise UsageError(
            "the posterior's noise does not fit", got=list(source.shape), wanted=list(shape)
        )
    else:
        yield from source.split(1)


def refuse_not_finite(what: str, values: torch.Tensor) -> None:
    if bad := values.numel() - int(torch.isfinite(values).sum()):
        raise VerificationError(
            f"the VAE left {what} that are not finite",
            got=f"{bad} of {values.numel()} values",
            do="Run `lcexport validate` on the checkpoint: it scans the VAE's weights.",
        )


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device | str) -> "AutoencoderKLWan":
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]

    check_vae_config(folder)
    read: Any = AutoencoderKLWan.from_pretrained
    with library_errors("VAE", folder):
        model, report = read(
            str(folder),
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # the other way needs one more library
            output_loading_info=True,
        )
    refuse_missing("VAE", folder, report["missing_keys"])
    return model.to(device).eval().requires_grad_(False)


def vae_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each weight that the VAE's `config.json` calls for. Reads no weight.

    Raises:
        InputError: the configuration is missing or no Wan VAE's.
    """
    with torch.device("meta"):
        weights = empty_vae(folder).state_dict()
    return {name: tuple(value.shape) for name, value in weights.items()}


def empty_vae(folder: Path) -> "AutoencoderKLWan":
    """The VAE of a `config.json`, its weights whatever the caller's device makes of them.

    Raises:
        InputError: as `vae_shapes`.
    """
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]

    config = check_vae_config(folder)
    build: Any = AutoencoderKLWan.from_config
    with library_errors("VAE", folder):
        return build(config)


def check_vae_config(folder: Path) -> dict[str, Any]:
    """The VAE's configuration, with one mean and one deviation per latent channel.

    The library has defaults for them; using those in silence would decode with another model's.
    """
    path = folder / "config.json"
    config = read_config(path)
    if (channels := config.get("z_dim")) != LATENT_CHANNELS:
        raise InputError(
            f"{path}: another number of latent channels", got=f"z_dim {channels}",
            wanted=LATENT_CHANNELS, do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    check_numbers(path, config, "latents_mean")
    if min(check_numbers(path, config, "latents_std")) <= 0:
        raise InputError(f"{path}: latents_std is not above 0 everywhere", do=DOWNLOAD_AGAIN)
    return config


def check_numbers(path: Path, config: Mapping[str, Any], key: str) -> Sequence[float]:
    """The list of one finite number per latent channel under `key`."""
    values = config.get(key)
    if (
        not isinstance(values, list)
        or len(values) != LATENT_CHANNELS
        or not all(map(is_finite_number, values))
    ):
        got = f"{len(values)} values" if isinstance(values, list) else repr(values)
        raise InputError(
            f"{path}: no usable {key}", got=got, wanted=f"{LATENT_CHANNELS} finite numbers",
            do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    return values
