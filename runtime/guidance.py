"""Classifier-free guidance over velocities [B, ...]; everything in float32.

c is the velocity under the prompt, u the one under the negative prompt, g the guidance scale.
Scales up to 1 mean "no guidance": the caller then computes c alone and does not come here.

Given buffers to work in, nothing is allocated and the numbers are the same, bit for bit.
"""

from dataclasses import dataclass
from typing import Self

import torch

EPSILON = 1e-8  # keeps a velocity of zero from dividing by zero


@dataclass(frozen=True)
class Scratch:
    """What guidance of B velocities works in: float32 `product_BX` of X values each, `dots_2B`."""

    product_BX: torch.Tensor
    dots_2B: torch.Tensor

    @classmethod
    def like(cls, velocity: torch.Tensor) -> Self:
        """Buffers for velocities of this shape, on their device."""
        place = {"device": velocity.device, "dtype": torch.float32}
        samples = len(velocity)
        product = torch.empty(samples, velocity[0].numel(), **place)
        return cls(product, torch.empty(2, samples, **place))


def optimal_scale(
    cond: torch.Tensor, uncond: torch.Tensor, scratch: Scratch | None = None
) -> torch.Tensor:
    """[B] scales s = <c, u> / (<u, u> + 1e-8) that bring u nearest to c, sample by sample.

    The sums run over every dimension but the batch's, clean conditioning frames included.
    Unbounded: a tiny u gives a large s. From CFG-Zero* (https://arxiv.org/abs/2503.18886).
    """
    scratch = scratch or Scratch.like(cond)
    c_BX, u_BX = cond.float().flatten(1), uncond.float().flatten(1)
    dots = []
    for left_BX, dot_B in zip((c_BX, u_BX), scratch.dots_2B, strict=True):
        torch.mul(left_BX, u_BX, out=scratch.product_BX)
        dots.append(torch.sum(scratch.product_BX, 1, out=dot_B))
    return dots[0].div_(dots[1].add_(EPSILON))


def cfg_zero(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    scale: float,
    scratch: Scratch | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The guided velocity s*u + g * (c - s*u), s from `optimal_scale`; float32, shape of c.

    `out` may be c itself.
    """
    scratch = scratch or Scratch.like(cond)
    s_B = optimal_scale(cond, uncond, scratch)
    s_B111 = s_B.view(-1, *[1] * (cond.dim() - 1))
    scaled = torch.mul(uncond.float(), s_B111, out=scratch.product_BX.view(cond.shape))
    return plain_cfg(cond, scaled, scale, out)


def plain_cfg(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Ordinary guidance u + g * (c - u). For comparing with `cfg_zero`; no sampler uses it."""
    uncond = uncond.float()
    return torch.sub(cond.float(), uncond, out=out).mul_(scale).add_(uncond)
