"""The small Wan VAE: a VAE of pictures, whose decoder then learns the frames in between.

The released strides and latent channels, 16 base channels. Trained on pictures first; then the
convolutions in time, which pictures do not touch, are set so that a latent is the picture of the
last frame of its four. Thus the encoder stays, and the decoder is trained on clips to place the
three frames between one latent and the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
)
from torch import Tensor

from lcexport.configs.presets import SPATIAL_STRIDE, TEMPORAL_STRIDE
from lcexport.runtime.decoding import unclamped
from tools.train_toy.training import Plan, Training, generator_at
from tools.train_toy.world import FRAMES, GRID, choose, placed, render, scenes

CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
SEED = 1


@dataclass(frozen=True)
class Stage:
    """A part of the training: square crops of `size` pixels and `frames` frames, so many a step.

    kl is the weight of the latents' pull to a normal, in nats for each number; noise the most that
    is added to them, in deviations of each channel over the step's crops.
    """

    name: str
    plan: Plan
    crops: int
    size: int
    frames: int
    kl: float
    noise: float = 0.0


PICTURES = Stage("vae-pictures", Plan(steps=1200, rate=5e-4), crops=32, size=32, frames=1, kl=2e-4)
# As many frames as the clips have: what the convolutions keep of the past drifts beyond the
# length they are trained at. Faster, what is already sharp is unlearnt before the rest is learnt.
CLIPS = Stage(
    "vae-clips",
    Plan(steps=900, rate=1e-3, average=0.99, full_rate="time_conv", slower=0.02),
    crops=4, size=32, frames=17, kl=0.0, noise=0.4,
)  # fmt: skip
# Crops are near the shape: what is far from it, whole frames show. Without them the decoder puts
# clouds there.
WHOLE = Stage(
    "vae-whole",
    Plan(steps=200, rate=3e-4, average=0.99, full_rate="time_conv", slower=0.2),
    crops=2, size=64, frames=17, kl=0.0, noise=0.4,
)  # fmt: skip


def new_vae() -> AutoencoderKLWan:
    """The same first weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return AutoencoderKLWan(**CONFIG)


def train_encoder(folder: Path) -> AutoencoderKLWan:
    """Train, or go on training, in `folder`; a VAE whose encoder is finished."""
    vae = new_vae()
    train_stage(vae, folder, PICTURES)
    inflate(vae)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def train_decoder(vae: AutoencoderKLWan, folder: Path) -> AutoencoderKLWan:
    """The same for what `train_encoder` gave; the finished VAE."""
    train_stage(vae, folder, CLIPS)
    train_stage(vae, folder, WHOLE)
    return vae.requires_grad_(False).eval()


def train_stage(vae: AutoencoderKLWan, folder: Path, stage: Stage) -> None:
    training = Training(vae, stage.plan, folder, stage.name, f"{stage} {GRID=}")
    training.run(partial(loss_at, vae, stage))
    training.assign(training.averaged)


def inflate(vae: AutoencoderKLWan) -> None:
    """From a VAE of pictures to one of clips that are still pictures, one for each latent.

    A picture goes through the last tap of each convolution in time alone. The others, and the
    convolutions that halve and double the frames, would begin as noise: they begin as zero and as
    "take the last one" and "twice the same".
    """
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, WanCausalConv3d) or module.weight.shape[2] == 1:
                continue
            module.weight[:, :, :-1] = 0
            if name.endswith("time_conv"):
                outputs, inputs = module.weight.shape[:2]
                same = torch.eye(inputs).repeat(outputs // inputs, 1)
                module.weight[:, :, -1] = same[..., None, None]
                cast(Tensor, module.bias).zero_()


def loss_at(vae: AutoencoderKLWan, stage: Stage, step: int) -> dict[str, Tensor]:
    """Absolute and squared error of the pixels, and the pull of the latents to a normal."""
    generator = generator_at(SEED, stage.frames, step)
    pixels = crops(stage.crops, stage.size, stage.frames, generator)
    posterior = cast(Any, vae.encode(pixels)).latent_dist
    mean, variance = posterior.mean, posterior.var
    latents = mean + posterior.std * torch.randn(mean.shape, generator=generator)
    if stage.noise:
        latents = disturbed(latents, stage.noise, generator)
    # not clamped to -1..1, where no gradient would come back
    error = torch.cat(list(unclamped(vae, latents)), 2) - pixels
    return {
        "absolute": error.abs().mean(),
        "squared": error.square().mean(),
        "kl": stage.kl * 0.5 * (mean.square() + variance - 1 - posterior.logvar).mean(),
    }


def disturbed(latents: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """With noise of up to so many deviations: what a DiT paints is not quite what pictures give."""
    level = most * torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
    deviation = latents.std((0, 2, 3, 4), keepdim=True)
    return latents + level * deviation * torch.randn(latents.shape, generator=generator)


def crops(count: int, size: int, frames: int, generator: torch.Generator) -> Tensor:
    """[count, 3, frames, size, size] of different clips: the shape's edges, as a rule."""
    options = scenes(held=False)
    rows = []
    for _ in range(count):
        clip = placed(options[choose(options, generator)], generator)
        latest = (FRAMES - frames) // TEMPORAL_STRIDE
        start = TEMPORAL_STRIDE * int(torch.randint(latest + 1, (), generator=generator))
        video = render([clip], start + frames)[0, :, start:]
        x, y = clip.centre(start + frames // 2)
        rows.append(cropped(video, (y, x), size, generator))
    return torch.stack(rows)


def cropped(video: Tensor, near: Sequence[float], size: int, generator: torch.Generator) -> Tensor:
    """A square of `video` that begins at a latent's edge.

    Its centre is up to 16 pixels after `near` along each axis, or up to 23 before it.
    """
    offsets = torch.randint(-16, 17, (2,), generator=generator).tolist()
    top, left = (
        min(max(latents_edge(int(middle) + offset - size // 2), 0), length - size)
        for middle, offset, length in zip(near, offsets, video.shape[-2:], strict=True)
    )
    return video[..., top : top + size, left : left + size]


def latents_edge(pixel: int) -> int:
    """The last one up to `pixel`."""
    return pixel // SPATIAL_STRIDE * SPATIAL_STRIDE
