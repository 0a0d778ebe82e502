"""The flow-match Euler sampler's noise levels, and one step of it. Pure functions over float32.

A noise level sigma runs from 1 (pure noise) to 0 (the video); the network sees it as a timestep
on a 0..1000 scale. S is the number of steps.
"""

import math
from dataclasses import dataclass

import torch

from lcexport.configs.errors import UsageError

MAX_STEPS = 1000
TRAIN_TIMESTEPS = 1000  # timestep = 1000 * sigma
SIGMA_MIN = 0.001  # last level of the standard grid, before the shift
DISTILL_GRID = 50  # the distilled model was trained on 1.00, 0.98, ... 0.02
HF_THRESHOLD = 500.0  # timestep under which `enhance_hf_schedule` steps uniformly
HF_STEPS = 10


@dataclass(frozen=True)
class Schedule:
    """Timesteps [S] on the 0..1000 scale and sigmas [S+1], the last one 0. Both float32, CPU.

    `stored` is what latents are rounded to after every step.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor
    stored: torch.dtype = torch.float32

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def drops(self) -> torch.Tensor:
        """[S] by how much each step lowers sigma, float32."""
        return self.sigmas[:-1] - self.sigmas[1:]


def schedule(steps: int, shift: float = 12.0, distill: bool = False) -> Schedule:
    """The standard schedule, or the distilled model's coarser grid.

    Standard: s = linspace(1, 0.001, S). Distilled: S of the 50 values 1.00, 0.98, ... 0.02.
    Then sigma = shift * s / (1 + (shift - 1) * s), as flow-match samplers shift towards noise.

    Raises:
        UsageError: steps outside 1..1000 (1..50 when distilled), or shift not positive.
    """
    check_schedule(steps, shift, DISTILL_GRID if distill else MAX_STEPS)
    s_S = distilled_grid(steps) if distill else torch.linspace(1, SIGMA_MIN, steps)
    sigmas_S = shift * s_S / (1 + (shift - 1) * s_S)
    return Schedule(sigmas_S * TRAIN_TIMESTEPS, with_zero(sigmas_S))


def refine_schedule(steps: int, t_thresh: float = 0.5, shift: float = 12.0) -> Schedule:
    """Start at sigma `t_thresh`, then the standard timesteps strictly below it.

    Fewer calls than `steps`: 5 for 50 steps at threshold 0.5 and shift 12.

    Raises:
        UsageError: as `schedule`, or a threshold that is not above 0 and at most 1: at 0 nothing
            would be left to refine.
    """
    if not 0 < t_thresh <= 1:
        raise UsageError(
            "the refinement's threshold is out of range",
            got=t_thresh,
            wanted="above 0 and at most 1",
        )
    start = TRAIN_TIMESTEPS * t_thresh
    timesteps = schedule(steps, shift).timesteps
    return from_timesteps(torch.cat([torch.tensor([start]), timesteps[timesteps < start]]))


def enhance_hf_schedule(steps: int, shift: float = 12.0) -> Schedule:
    """The standard timesteps above 500, then ten uniform steps 500, 450, ... 50.

    More calls than `steps`: 56 for 50 steps at shift 12. Made for continuation, where the uniform
    tail brings back detail; it does not combine with the distilled grid.
    """
    timesteps = schedule(steps, shift).timesteps
    tail = torch.linspace(HF_THRESHOLD, HF_THRESHOLD / HF_STEPS, HF_STEPS)
    return from_timesteps(torch.cat([timesteps[timesteps > HF_THRESHOLD], tail]))


def euler_step(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    stored: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One Euler step from `sigma` to `sigma_next`: new float32 latents of the same shape.

    `stored` is what they are rounded to, if that is coarser. The sigmas are 0-dimensional float32
    tensors, so that their difference is rounded as float32.
    """
    start = latents.to(torch.float32, copy=True)
    rounded = torch.empty_like(start, dtype=stored)
    return euler_step_(start, velocity.float(), sigma - sigma_next, rounded=rounded)


def euler_step_(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    drop: torch.Tensor,
    product: torch.Tensor | None = None,
    rounded: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in place, over float32: `drop` is sigma - sigma_next, 0-dimensional, on the CPU.

    With x = (1 - sigma) * x0 + sigma * noise the slope dx/dsigma is noise - x0. The network
    predicts x0 - noise: hence sigma - sigma_next and not the reverse, the only negation in this
    project. `product` and `rounded` are buffers of the latents' shape, for no allocation; `rounded`
    is of the dtype that they are rounded to.
    """
    # not add_(alpha=...): a fused multiply-add rounds once where the original rounds twice
    latents.add_(torch.mul(velocity, drop, out=product))
    if rounded is not None:
        latents.copy_(rounded.copy_(latents))
    return latents


def distilled_grid(steps: int) -> torch.Tensor:
    """[S] values of the distilled grid, unshifted: (50 - floor(50 * i / S)) * 20 / 1000."""
    index_S = DISTILL_GRID * torch.arange(steps) // steps
    return (DISTILL_GRID - index_S).float() * 20 / 1000


def from_timesteps(timesteps_S: torch.Tensor) -> Schedule:
    return Schedule(timesteps_S, with_zero(timesteps_S / TRAIN_TIMESTEPS))


def with_zero(sigmas_S: torch.Tensor) -> torch.Tensor:
    return torch.cat([sigmas_S, torch.zeros(1)])


def check_schedule(steps: int, shift: float, most: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise UsageError("the number of steps is out of range", got=steps, wanted=f"1..{most}")
    if not (math.isfinite(shift) and shift > 0):
        raise UsageError("the schedule's shift is out of range", got=shift, wanted="above 0")
