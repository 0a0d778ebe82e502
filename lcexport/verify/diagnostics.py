"""Six measurements that tell a right sampler from the usual wrong ones, on golden velocities.

Each is a number with a threshold it can miss. They follow the mistakes ports of this model make:
a dead output, text that is ignored, guidance without its scale, the sign of the velocity, a scale
that explodes, and arguments in the original's order instead of this one's.
"""

import math

import torch
from torch import Tensor

from lcexport.configs.errors import UsageError
from lcexport.engines import Engine, is_cached
from lcexport.runtime.guidance import cfg_zero, optimal_scale, plain_cfg
from lcexport.runtime.schedule import euler_step, schedule
from lcexport.verify.report import Check

GUIDANCE_SCALE = 4.0
RMS_RANGE = (1e-3, 1e2)  # x0 - noise of normalised latents: about 1 for a trained model
TEXT_EFFECT = 1e-5  # relative; the text of the two branches differs in every token
AGREEMENT = 0.1  # relative distance from eager's own value
CHANGE_SLACK = 0.02  # the effect of CFG-zero is (s - 1), a small difference of large numbers
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
    """The six diagnostics for one engine; `cond`, `uncond` [B, 16, T, H, W] are its velocities.

    Where a measure has a right value, it is the one that eager torch's stored velocities give: an
    engine may be `AGREEMENT` away from it.
    """
    found, wanted = measures(cond, uncond), measures(*golden_velocities(golden))
    aligned, opposed = negation(golden["hidden_states"], cond, golden["velocity_cond"])
    error = guidance_error(cond, uncond)
    refused = swapped_is_refused(engine, golden)
    low, high = RMS_RANGE

    def row(name: str, got: dict[str, float], wanted: str, ok: bool) -> Check:
        finite = all(math.isfinite(number) for number in got.values())
        return Check("step", resolution, engine.backend, name, got, wanted, ok and finite)

    def near(measure: str, slack: float = 0.0) -> bool:
        apart = abs(found[measure] - wanted[measure])
        return apart <= AGREEMENT * abs(wanted[measure]) + slack

    def like_eager(measure: str) -> str:
        return f"{wanted[measure]:.4g} +- {AGREEMENT:.0%}"

    rms, text, change, scale = (found[name] for name in ("rms", "text", "change", "scale"))
    return [
        row(
            "output magnitude",
            {"rms": rms},
            f"rms {like_eager('rms')}, in {low:g}..{high:g}",
            low < rms < high and near("rms"),
        ),
        row(
            "effect of the text",
            {"relative_l2": text},
            f"relative_l2 {like_eager('text')}, > {TEXT_EFFECT:g}",
            text > TEXT_EFFECT and near("text"),
        ),
        row(
            "CFG-zero against plain guidance",
            {"relative_change": change, "identity_error": error},
            f"relative_change {like_eager('change')} +- {CHANGE_SLACK}, "
            f"identity_error <= {IDENTITY:g}",
            error <= IDENTITY and near("change", CHANGE_SLACK),
        ),
        row(
            "effect of the negation",
            {"cosine": aligned, "cosine_without": opposed},
            f"cosine >= {ALIGNMENT}, cosine_without <= -{ALIGNMENT}",
            aligned >= ALIGNMENT and opposed <= -ALIGNMENT,
        ),
        row(
            "st_star",
            {"largest": scale},
            f"largest {like_eager('scale')}, < {SCALE_LIMIT:g}",
            scale < SCALE_LIMIT and near("scale"),
        ),
        row("swapped parameter order", {"refused": float(refused)}, "refused = 1", refused),
    ]


def golden_velocities(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return golden["velocity_cond"], golden["velocity_uncond"]


def measures(cond: Tensor, uncond: Tensor) -> dict[str, float]:
    """What is measured of a pair of velocities: size, effect of the text and of CFG-zero, scale."""
    plain = plain_cfg(cond, uncond, GUIDANCE_SCALE)
    guided = cfg_zero(cond, uncond, GUIDANCE_SCALE)
    return {
        "rms": cond.double().square().mean().sqrt().item(),
        "text": relative(cond, uncond),
        "change": relative(guided, plain),
        "scale": optimal_scale(cond, uncond).abs().max().item(),
    }


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).double().norm() / b.double().norm().clamp_min(1e-30)).item()


def guidance_error(cond: Tensor, uncond: Tensor) -> float:
    """How far CFG-zero minus plain guidance is from (s - 1)(1 - g)u, relative to plain guidance."""
    plain = plain_cfg(cond, uncond, GUIDANCE_SCALE)
    guided = cfg_zero(cond, uncond, GUIDANCE_SCALE)
    s = optimal_scale(cond, uncond).view(-1, *[1] * (cond.ndim - 1))
    return relative(guided, plain + (s - 1) * (1 - GUIDANCE_SCALE) * uncond)


def negation(latents: Tensor, velocity: Tensor, reference: Tensor) -> tuple[float, float]:
    """Cosine of the engine's Euler step with eager's velocity, and of the step not negated.

    The velocity is x0 - noise, so a step towards less noise goes along it: cosine +1. A sampler
    that forgets the minus sign, or an engine whose output has the other sign, goes the other way.
    """
    plan = schedule(2)
    sigmas = plan.sigmas[0], plan.sigmas[1]
    right = euler_step(latents, velocity, *sigmas) - latents
    wrong = euler_step(latents, -velocity, *sigmas) - latents
    return cosine(right, reference), cosine(wrong, reference)


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
    inputs |= {spec.name: golden[spec.name] for spec in engine.inputs if is_cached(spec.name)}
    spec = engine.outputs[0]
    output = torch.empty(spec.shape, dtype=spec.dtype, device=engine.device)
    try:
        engine.run({name: t.to(engine.device) for name, t in inputs.items()}, {spec.name: output})
    except UsageError:
        return True
    return False
