"""The sampling loop: the only one. What the network is asked, and of what, is the caller's.

After the first step nothing is allocated, and the host never waits for the device unless the caller
asks for progress: then it waits once a step, for the step's time and latents to be true.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lcexport.configs.errors import VerificationError
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.schedule import Schedule, euler_step_


@dataclass(frozen=True)
class StepEvent:
    """What a progress callback is told after each step.

    step counts from 1 to steps; timestep (0..1000) and sigma are those the step started from;
    seconds is what the step took; latents [B, 16, T, H, W] is a copy of the result, the callback's
    to keep.
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

    `velocity(latents, timestep)` gives x0 - noise, guidance included; timestep is float32 [B], on
    the latents' device. The latents it is given are changed in place after it has returned.

    Raises:
        VerificationError: a step left numbers that are not finite; names the step. At that step
            on a processor or with `on_step`, after the last one otherwise.
        Cancelled: the token was set.
    """
    cancel = cancel or CancelToken()
    latents = latents.to(torch.float32, copy=True)
    device = latents.device
    product = torch.empty_like(latents)
    coarse = schedule.stored != torch.float32
    rounded = torch.empty_like(latents, dtype=schedule.stored) if coarse else None
    drops = schedule.drops
    timesteps = schedule.timesteps.to(device)  # once: a copy from the host each step would wait
    extremes = torch.empty(schedule.steps, 2, device=device)
    for i in range(schedule.steps):
        cancel.check()
        started = time.perf_counter()
        v = velocity(latents, timesteps[i].expand(len(latents)))
        euler_step_(latents, v, drops[i], product, rounded)
        torch.aminmax(latents, out=(extremes[i, 0], extremes[i, 1]))  # NaN goes through
        if on_step or reading_is_free(device):
            check_finite(extremes[i], i + 1, schedule)
        if on_step:
            seconds = time.perf_counter() - started
            timestep, sigma = schedule.timesteps[i].item(), schedule.sigmas[i].item()
            event = StepEvent(i + 1, schedule.steps, timestep, sigma, seconds, latents.clone())
            on_step(event)
    for i, found in enumerate(extremes.cpu()):
        check_finite(found, i + 1, schedule)
    return latents


def reading_is_free(device: torch.device) -> bool:
    """Whether a number can be looked at without waiting for the device."""
    return device.type == "cpu"


def check_finite(extremes_2: torch.Tensor, step: int, schedule: Schedule) -> None:
    """Raise VerificationError unless a step's least and largest latent are finite.

    Nothing sensible follows from NaN or infinity.
    """
    least, most = extremes_2.tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        timestep = schedule.timesteps[step - 1].item()
        raise VerificationError(
            f"step {step} of {schedule.steps} (timestep {timestep:.1f}) left latents that are not "
            "finite",
            got=f"values from {least:g} to {most:g}",
            do="Run `lcexport verify` on the bundle; lower the guidance scale if it passes.",
        )
