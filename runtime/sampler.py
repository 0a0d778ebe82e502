"""The sampling loop: the only one. What the network is asked, and of what, is the caller's."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lcexport.configs.errors import VerificationError
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.schedule import Schedule, euler_step


@dataclass(frozen=True)
class StepEvent:
    """What a progress callback is told after each step.

    step counts from 1 to steps; timestep (0..1000) and sigma are those the step started from;
    seconds is what the step took; latents [B, 16, T, H, W] is the result, not a copy: the
    sampler does not write to it again, and neither should the callback.
    """

    step: int
    steps: int
    timestep: float
    sigma: float
    seconds: float
    latents: torch.Tensor


OnStep = Callable[[StepEvent], object]
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sample(
    velocity: Velocity,
    latents: torch.Tensor,
    schedule: Schedule,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
) -> torch.Tensor:
    """Walk `latents` [B, 16, T, H, W] from noise to video along `schedule`; float32.

    `velocity(latents, timestep)` gives x0 - noise, guidance included; timestep is float32 [B].

    Raises:
        VerificationError: a step left numbers that are not finite; names the step.
        Cancelled: the token was set.
    """
    cancel = cancel or CancelToken()
    for i, timestep in enumerate(schedule.timesteps):
        cancel.check()
        started = time.perf_counter()
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        v = velocity(latents, timestep.expand(len(latents)))
        latents = euler_step(latents, v, sigma, sigma_next, schedule.stored)
        check_finite(latents, i + 1, schedule.steps, timestep.item())
        if on_step:
            seconds = time.perf_counter() - started
            on_step(
                StepEvent(i + 1, schedule.steps, timestep.item(), sigma.item(), seconds, latents)
            )
    return latents


def check_finite(latents: torch.Tensor, step: int, steps: int, timestep: float) -> None:
    """Raise VerificationError on NaN or infinity: nothing sensible follows from them."""
    bad = latents.numel() - int(torch.isfinite(latents).sum())
    if bad:
        raise VerificationError(
            f"step {step} of {steps} (timestep {timestep:.1f}) left latents that are not finite",
            got=f"{bad} of {latents.numel()} values",
            do="Run `lcexport verify` on the bundle; lower the guidance scale if it passes.",
        )
