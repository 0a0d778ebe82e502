"""Latents to frames: Wan's normalisation, undone, and the Wan VAE's decoder.

B samples, T latent frames, H x W latents; F = 4 * (T - 1) + 1 frames of 8H x 8W pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcexport.configs import LATENT_CHANNELS
from lcexport.configs.errors import InputError, UsageError, VerificationError
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


class VideoDecoder:
    """The decoder of one bundle's `vae/`.

    Args:
        folder: holds `vae/`.
        dtype: what the decoder computes in; latents are rounded to it before denormalisation.
        device: where the decoder lives.

    Raises:
        InputError: a file is missing, or the weights do not fit the configuration.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model: AutoencoderKLWan | None = load_vae(Path(folder) / "vae", dtype, device)

    def decode(self, latents_B16THW: torch.Tensor) -> torch.Tensor:
        """Normalised latents to frames, float32 [B, F, 8H, 8W, 3] in 0..1, on the CPU.

        The network clamps to -1..1; x/2 + 1/2 is then taken in float32.

        Raises:
            VerificationError: the decoder left NaN in the frames.
        """
        model = self._opened()
        z_B16THW = latents_B16THW.to(model.device, model.dtype)
        mean, std = model.config["latents_mean"], model.config["latents_std"]
        with torch.no_grad():
            z_B16THW = denormalize(z_B16THW, mean, std)
            # One sample at a time: the caches of one already fill the memory.
            rows = [model.decode(z[None], return_dict=False)[0].cpu() for z in z_B16THW]
        pixels_BCFHW = torch.cat(rows).float().div(2).add(0.5).clamp(0, 1)
        if bad := pixels_BCFHW.numel() - int(torch.isfinite(pixels_BCFHW).sum()):
            raise VerificationError(
                "the VAE left frames that are not finite",
                got=f"{bad} of {pixels_BCFHW.numel()} values",
                do="Run `lcexport validate` on the checkpoint: it scans the VAE's weights.",
            )
        return pixels_BCFHW.permute(0, 2, 3, 4, 1).contiguous()

    def to(self, device: torch.device | str) -> "VideoDecoder":
        # the library's stubs take `Module.to` for a function without arguments
        torch.nn.Module.to(self._opened(), torch.device(device))
        return self

    def close(self) -> None:
        """Drop the weights. Harmless when called twice."""
        self._model = None

    def _opened(self) -> "AutoencoderKLWan":
        if self._model is None:
            raise UsageError("the video decoder is closed")
        return self._model


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
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]

    config = check_vae_config(folder)
    build: Any = AutoencoderKLWan.from_config
    with library_errors("VAE", folder), torch.device("meta"):
        weights = build(config).state_dict()
    return {name: tuple(value.shape) for name, value in weights.items()}


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
