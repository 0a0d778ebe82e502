"""The small DiT, by flow matching with the release's conventions.

With x = (1 - sigma) * x0 + sigma * noise the network sees 1000 * sigma and predicts x0 - noise.
Three steps of four start from noise alone; the others are given the first latent frame, as
image-to-video is, or the first two, as a continuation is: clean, at timestep 0, not in the loss.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcexport.checkpoint import expected_tensors
from lcexport.configs.dit import DiTConfig
from lcexport.demo import random_weight
from lcexport.dit.load import dit_from_tensors
from lcexport.dit.model import LongCatDiT
from lcexport.runtime.vae import normalize
from tools.train_toy.latents import Statistics, clip_at
from tools.train_toy.text import TextReader
from tools.train_toy.training import Plan, Training, generator_at
from tools.train_toy.world import GRID, caption

CONFIG = DiTConfig(
    hidden_size=192,
    depth=6,
    num_heads=3,
    caption_channels=128,
    adaln_tembed_dim=128,
    text_tokens_zero_pad=True,
)
SEED = 4
PLAN = Plan(steps=3000, rate=2e-3, warmup=100, average=0.999)
BATCH = 64
TRAINING_SHIFT = 5.0  # towards noise, as the sampler's 12, but less: each level is to be learnt
# From this step on given frames are trained at the sampler's levels, where the others' noise does
# not tell how they go on.
SAMPLED_FROM, SAMPLING_SHIFT = 1500, 12.0
TEXT_DROPOUT = 0.1  # of the captions are empty, for guidance
# Leading clean latent frames, step by step in turn. They show the shape themselves, so most steps
# have none: from those it is learnt what captions say.
CONDITIONED = (0, 0, 0, 1, 0, 0, 0, 2)


def new_dit() -> LongCatDiT:
    """The same first weights every time.

    What a block adds is small at first, and its modulation and the output begin at zero. The
    linear maps of attention and feed-forward compute in bfloat16; modulation, the residual and all
    before and after the blocks in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        names = expected_tensors(CONFIG, "native")
        tensors = {name: random_weight(name, shape) for name, shape in names.items()}
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith(".weight"):
            tensor.fill_(1)
        elif "adaln" in name or name.startswith("final_layer.proj") or tensor.ndim == 1:
            tensor.zero_()
    dit = dit_from_tensors(CONFIG, tensors).requires_grad_(True).train()
    for block in dit.layers:
        for bulk in (block.self_attn, block.cross_attn, block.ffn):
            # the backward of fused attention alone would take a quarter of a step
            unfused = sdpa_kernel(SDPBackend.MATH)(bulk.forward)
            bulk.forward = torch.autocast("cpu", torch.bfloat16)(unfused)
    return dit


@dataclass(frozen=True)
class Batch:
    """What the DiT is given: x [B, 16, T, H, W], text [B, 1, L, C], timestep [B, T], mask [B, L];
    and the velocity [B, 16, T, H, W] that it is to predict.
    """

    x: Tensor
    text: Tensor
    timestep_BT: Tensor
    mask: Tensor
    velocity: Tensor


class Batches:
    """What each step is trained on.

    Args:
        latents: [N, 16, T, H, W] float16 of the clips 0 .. N-1, not normalised.
        statistics: of their channels.
        reader: tokenizer and encoder of the captions.
    """

    def __init__(self, latents: Tensor, statistics: Statistics, reader: TextReader) -> None:
        self.latents, self.statistics, self.reader = latents, statistics, reader
        self.scenes = [clip_at(number)[0].scene for number in range(len(latents))]

    def noised(self, sigma_B: Tensor, given: int, generator: torch.Generator) -> Batch:
        """As many clips at these noise levels, the first `given` latent frames of each clean."""
        chosen = torch.randint(len(self.latents), (len(sigma_B),), generator=generator)
        x0 = normalize(self.latents[chosen].float(), self.statistics.mean, self.statistics.std)
        text, mask = self.reader.encode([self.caption(int(n), generator) for n in chosen])
        noise = torch.randn(x0.shape, generator=generator)
        x = torch.lerp(x0, noise, sigma_B.view(-1, 1, 1, 1, 1))
        x[:, :, :given] = x0[:, :, :given]
        timestep_BT = (1000 * sigma_B)[:, None].repeat(1, x0.shape[2])
        timestep_BT[:, :given] = 0
        return Batch(x, text.unsqueeze(1), timestep_BT, mask, x0 - noise)

    def loss_at(self, dit: LongCatDiT, step: int) -> dict[str, Tensor]:
        """Squared error of the velocity over the frames that are not given."""
        generator = generator_at(SEED, step)
        given = CONDITIONED[step % len(CONDITIONED)]
        shift = SAMPLING_SHIFT if given and step >= SAMPLED_FROM else TRAINING_SHIFT
        sigma_B = shifted(torch.rand(BATCH, generator=generator), shift)
        batch = self.noised(sigma_B, given, generator)
        velocity = dit(batch.x, batch.text, batch.timestep_BT, batch.mask, given)
        error = (velocity - batch.velocity)[:, :, given:]
        return {"velocity": error.square().mean()}

    def caption(self, number: int, generator: torch.Generator) -> str:
        dropped = float(torch.rand((), generator=generator)) < TEXT_DROPOUT
        return "" if dropped else caption(self.scenes[number], generator)


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels from numbers in 0..1, more of them near 1."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def train_dit(folder: Path, batches: Batches, plan: Plan = PLAN) -> LongCatDiT:
    """Train, or go on training, in `folder`; the finished DiT, its weights averaged."""
    dit = new_dit()
    recipe = f"{GRID=} {BATCH=} {TRAINING_SHIFT=} {SAMPLED_FROM=} {SAMPLING_SHIFT=} {CONDITIONED=}"
    training = Training(dit, plan, folder, "dit", recipe)
    training.run(lambda step: batches.loss_at(dit, step))
    training.assign(training.averaged)
    return dit.requires_grad_(False).eval()
