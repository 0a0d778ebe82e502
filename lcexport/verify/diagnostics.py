"""Six measurements that tell a right sampler from the usual wrong ones, on golden velocities.

Each is a number with a threshold it can miss. They follow the mistakes ports of this model make:
a dead output, text that is ignored, guidance without its scale, the sign of the velocity, a scale
that explodes, and arguments in the original's order instead of this one's.
"""

import math

import torch
from torch import Tensor

from lcexport.configs.errors import UsageError
from lcexport.engines import Engine
from lcexport.runtime.guidance import cfg_zero, optimal_scale, plain_cfg
from lcexport.runtime.schedule import euler_step, schedule
from lcexport.verify.report import Check

GUIDANCE_SCALE = 4.0
RMS_RANGE = (1e-3, 1e2)  # x0 - noise of normalised latents: about 1 for a trained model
TEXT_EFFECT = 1e-5  # relative; the text of the two branches differs in every token
IDENTITY = 1e-3  # relative error allowed in the identity below
ALIGNMENT = 0.999
SCALE_LIMIT = 1e3


def diagnose(
    engine: Engine,
    golden: dict[str, Tensor],
    cond: Tensor,
    uncond: Tensor,
    resolution: str,
) -> list[Check]:
    """The six diagnostics for one engine; `cond`, `uncond` [B, 16, T, H, W] are its velocities."""

    def row(name: str, got: dict[str, float], wanted: str, ok: bool) -> Check:
        finite = all(math.isfinite(number) for number in got.values())
        return Check("step", resolution, engine.backend, name, got, wanted, ok and finite)

    rms = cond.double().square().mean().sqrt().item()
    effect = relative(cond, uncond)
    scale = optimal_scale(cond, uncond)
    largest = scale.abs().max().item()
    error, change = guidance_identity(cond, uncond, scale)
    aligned, opposed = negation(golden["hidden_states"], cond)
    refused = swapped_is_refused(engine, golden)
    low, high = RMS_RANGE
    return [
        row("output magnitude", {"rms": rms}, f"rms in {low:g}..{high:g}", low < rms < high),
        row(
            "effect of the text",
            {"relative_l2": effect},
            f"relative_l2 > {TEXT_EFFECT:g}",
            effect > TEXT_EFFECT,
        ),
        row(
            "CFG-zero against plain guidance",
            {"relative_change": change, "identity_error": error},
            f"identity_error <= {IDENTITY:g}",
            error <= IDENTITY,
        ),
        row(
            "effect of the negation",
            {"cosine": aligned, "cosine_without": opposed},
            f"cosine >= {ALIGNMENT}, cosine_without <= -{ALIGNMENT}",
            aligned >= ALIGNMENT and opposed <= -ALIGNMENT,
        ),
        row("st_star", {"largest": largest}, f"largest < {SCALE_LIMIT:g}", largest < SCALE_LIMIT),
        row(
            "swapped parameter order",
            {"refused": float(refused)},
            "refused = 1",
            refused,
        ),
    ]


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).double().norm() / b.double().norm().clamp_min(1e-30)).item()


def guidance_identity(cond: Tensor, uncond: Tensor, scale_B: Tensor) -> tuple[float, float]:
    """(error, change): CFG-zero minus plain guidance is (s - 1)(1 - g)u, by both definitions.

    `change` is the size of that difference relative to plain guidance; `error` how far the
    runtime's two functions are from the identity, relative to plain guidance as well.
    """
    plain = plain_cfg(cond, uncond, GUIDANCE_SCALE)
    guided = cfg_zero(cond, uncond, GUIDANCE_SCALE)
    s = scale_B.view(-1, *[1] * (cond.ndim - 1))
    predicted = plain + (s - 1) * (1 - GUIDANCE_SCALE) * uncond
    return relative(guided, predicted), relative(guided, plain)


def negation(latents: Tensor, velocity: Tensor) -> tuple[float, float]:
    """Cosine of one Euler step with the velocity, and of the step taken without the negation.

    The velocity is x0 - noise, so a step towards less noise goes along it: cosine +1. A sampler
    that forgets the minus sign goes the other way and adds noise.
    """
    plan = schedule(2)
    sigmas = plan.sigmas[0], plan.sigmas[1]
    right = euler_step(latents, velocity, *sigmas) - latents
    wrong = euler_step(latents, -velocity, *sigmas) - latents
    return cosine(right, velocity), cosine(wrong, velocity)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(
        a.double().flatten(), b.double().flatten(), dim=0
    ).item()


def swapped_is_refused(engine: Engine, golden: dict[str, Tensor]) -> bool:
    """Whether text handed over as the timestep, and the reverse, is an error and not a result."""
    inputs = {
        "hidden_states": golden["hidden_states"],
        "encoder_hidden_states": golden["timestep"],
        "timestep": golden["text_cond"],
        "encoder_attention_mask": golden["mask_cond"],
    }
    spec = engine.outputs[0]
    output = torch.empty(spec.shape, dtype=spec.dtype, device=engine.device)
    try:
        engine.run({name: t.to(engine.device) for name, t in inputs.items()}, {spec.name: output})
    except UsageError:
        return True
    return False
