"""Classifier-free guidance as pure functions over velocities [B, ...]; everything in float32.

c is the velocity under the prompt, u the one under the negative prompt, g the guidance scale.
Scales up to 1 mean "no guidance": the caller then computes c alone and does not come here.
"""

import torch

EPSILON = 1e-8  # keeps a velocity of zero from dividing by zero


def optimal_scale(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """[B] scales s = <c, u> / (<u, u> + 1e-8) that bring u nearest to c, sample by sample.

    The sums run over every dimension but the batch's, clean conditioning frames included.
    Unbounded: a tiny u gives a large s. From CFG-Zero* (https://arxiv.org/abs/2503.18886).
    """
    c_BX, u_BX = cond.float().flatten(1), uncond.float().flatten(1)
    return (c_BX * u_BX).sum(1) / ((u_BX * u_BX).sum(1) + EPSILON)


def cfg_zero(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """The guided velocity s*u + g * (c - s*u), s from `optimal_scale`; float32, shape of c."""
    s_B = optimal_scale(cond, uncond)
    s_B111 = s_B.view(-1, *[1] * (cond.dim() - 1))
    return plain_cfg(cond, uncond.float() * s_B111, scale)


def plain_cfg(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Ordinary guidance u + g * (c - u). For comparing with `cfg_zero`; no sampler uses it."""
    cond, uncond = cond.float(), uncond.float()
    return uncond + scale * (cond - uncond)
