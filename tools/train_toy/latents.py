"""Clips of the training data as latents, made once.

N clips of T x H x W latents. A sample of the VAE's posterior each, as the pipeline takes one of a
given picture, in float16.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcexport.configs.presets import TEMPORAL_STRIDE
from tools.train_toy.training import alone, generator_at, refuse_other
from tools.train_toy.world import Clip, choose, placed, render, scenes

SEED = 3
CLIPS = 6000
SHARD = 500


@dataclass(frozen=True)
class Statistics:
    """Of each latent channel: what the VAE's configuration holds."""

    mean: list[float]
    std: list[float]


def clip_at(number: int) -> tuple[Clip, torch.Generator]:
    """A clip of the training data by its number, and the generator that goes on from it."""
    generator = generator_at(SEED, number)
    options = scenes(held=False)
    return placed(options[choose(options, generator)], generator), generator


def encode_clips(vae: AutoencoderKLWan, folder: Path, count: int = CLIPS) -> Tensor:
    """[N, 16, T, H, W] float16 of the clips 0 .. N-1, not normalised; what is there is kept.

    Raises:
        UsageError: a file that is there holds another number of clips.
    """
    with alone(folder / "latents"):
        return torch.cat(list(shards(vae, folder, count)))


@torch.no_grad()
def shards(vae: AutoencoderKLWan, folder: Path, count: int) -> Iterator[Tensor]:
    for first in range(0, count, SHARD):
        path = folder / f"latents-{first:05d}.safetensors"
        numbers = range(first, min(first + SHARD, count))
        if not path.exists():
            temporary = path.with_suffix(".part")
            rows = torch.cat([encode_one(vae, number) for number in numbers])
            save_file({"latents": rows}, temporary)
            temporary.rename(path)
        latents = load_file(path)["latents"]
        refuse_other(path, f"{len(latents)} clips", f"{len(numbers)} clips")
        yield latents


def encode_one(vae: AutoencoderKLWan, number: int) -> Tensor:
    """[1, 16, T, H, W]. The encoder sees only the last frame of each four: see `vae.inflate`."""
    clip, generator = clip_at(number)
    pictures = render([clip])[0, :, ::TEMPORAL_STRIDE].transpose(0, 1).unsqueeze(2)
    posterior = vae.encode(pictures, return_dict=False)[0]
    noise = torch.randn(posterior.mean.shape, generator=generator)
    return (posterior.mean + posterior.std * noise).transpose(0, 2).half()


def statistics(latents: Tensor) -> Statistics:
    values = latents.float()
    return Statistics(values.mean((0, 2, 3, 4)).tolist(), values.std((0, 2, 3, 4)).tolist())
