"""What a caller asked for, checked and completed with the preset's defaults."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lcexport.configs.errors import UsageError
from lcexport.configs.presets import Preset
from lcexport.configs.tasks import CONTINUATIONS, Task
from lcexport.runtime.conditioning import check_latents
from lcexport.runtime.schedule import (
    DISTILL_GRID,
    MAX_STEPS,
    Schedule,
    enhance_hf_schedule,
    schedule,
)
from lcexport.runtime.text import Text, clean_prompt

log = logging.getLogger(__name__)

Prompt = str | list[str] | Text

MAX_SEED = 2**63 - 1
DISTILL_STEPS = 16  # the distilled model's own defaults: few steps, guidance built in
DISTILL_GUIDANCE = 1.0


@dataclass(frozen=True)
class Request:
    """B prompts and their sampling. `negatives` is None where there is no guidance."""

    prompts: list[str] | Text
    negatives: list[str] | Text | None
    seed: int
    steps: int
    guidance_scale: float
    distill: bool
    enhance_hf: bool = False

    @property
    def count(self) -> int:
        """B."""
        return rows_of(self.prompts)

    def schedule(self, shift: float) -> Schedule:
        """The noise levels of this request."""
        if self.enhance_hf:
            return enhance_hf_schedule(self.steps, shift)
        return schedule(self.steps, shift, self.distill)


def request_from(
    preset: Preset,
    prompt: Prompt,
    negative_prompt: Prompt | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    distill: bool = False,
    task: Task = "t2v",
    enhance_hf: bool | None = None,
) -> Request:
    """Check every argument of `Pipeline.generate` and fill in defaults.

    Raises:
        UsageError: an argument is out of range, or prompt and negative prompt do not match.
    """
    if steps is None:
        steps = DISTILL_STEPS if distill else preset.steps
    if guidance_scale is None:
        guidance_scale = DISTILL_GUIDANCE if distill else preset.guidance_scale
    check_whole("seed", seed, 0, MAX_SEED)
    check_whole("steps", steps, 1, DISTILL_GRID if distill else MAX_STEPS)
    check_guidance(guidance_scale)
    enhance_hf = check_enhance_hf(enhance_hf, distill, task)
    prompts = check_prompts(prompt)
    negatives = check_negatives(prompt, negative_prompt, rows_of(prompts))
    if guidance_scale == 1:
        if negative_prompt is not None and negative_prompt != "":
            log.warning("guidance scale 1 means no guidance: the negative prompt is not used")
        negatives = None
    return Request(prompts, negatives, seed, steps, float(guidance_scale), distill, enhance_hf)


def check_enhance_hf(enhance_hf: bool | None, distill: bool, task: Task) -> bool:
    """Whether to end in uniform steps: a continuation's default, unless it is distilled."""
    if enhance_hf is None:
        return task in CONTINUATIONS and not distill
    if enhance_hf and distill:
        raise UsageError("enhance_hf and distill are two schedules", do="Leave one of them out.")
    if enhance_hf and task not in CONTINUATIONS:
        raise UsageError("enhance_hf is for continuations", got=task)
    return enhance_hf


def rows_of(prompts: list[str] | Text) -> int:
    """How many prompts these are."""
    return len(prompts.embeds if isinstance(prompts, Text) else prompts)


def check_prompts(prompt: Prompt) -> list[str] | Text:
    """One or more prompts, none of them empty once cleaned; encoded ones are taken as they are."""
    if isinstance(prompt, Text):
        return prompt
    if not isinstance(prompt, str | list):
        raise UsageError("the prompt is not text", got=type(prompt).__name__, wanted="str or list")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        raise UsageError("no prompt was given", got="an empty list")
    for number, text in enumerate(prompts, 1):
        if not clean_prompt(text):
            which = f" {number} of {len(prompts)}" if len(prompts) > 1 else ""
            raise UsageError(f"prompt{which} is empty", do="Describe the video in a sentence.")
    return prompts


def check_negatives(prompt: Prompt, negative: Prompt | None, count: int) -> list[str] | Text:
    """One negative prompt per prompt: None means empty, a str is repeated."""
    if isinstance(negative, Text):
        negatives = negative
    elif negative is None or isinstance(negative, str):
        negatives = [negative or ""] * count
    elif isinstance(prompt, str) or not isinstance(negative, list):
        raise UsageError(
            "prompt and negative prompt do not match",
            got=f"{type(prompt).__name__} and {type(negative).__name__}",
            wanted="the same kind, or one negative str for all",
        )
    else:
        negatives = negative
    if rows_of(negatives) != count:
        raise UsageError(
            "prompts and negative prompts differ in number",
            got=f"{count} and {rows_of(negatives)}",
        )
    if not isinstance(negatives, Text):
        for text in negatives:
            clean_prompt(text)
    return negatives


def check_whole(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{name} is out of range", got=repr(value), wanted=f"{least}..{most}")


def check_guidance(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UsageError("guidance_scale is not a finite number", got=repr(scale))
    if scale < 0:
        raise UsageError("negative guidance", got=scale, wanted="1 (no guidance) or more")
    if scale < 1:
        raise UsageError(
            "guidance_scale is out of range", got=scale, wanted="1 (no guidance) or more"
        )


def drawn_noise(
    seed: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    latents: torch.Tensor | None = None,
) -> tuple[torch.Generator, torch.Tensor]:
    """A generation's generator and its initial noise, which is the first that is drawn.

    What goes on from clean frames draws their posterior's sample next: whoever makes them apart
    begins here too, so that a seed means the same.
    """
    generator = torch.Generator().manual_seed(seed)
    return generator, initial_noise(latents, generator, shape, dtype)


def initial_noise(
    latents: torch.Tensor | None,
    generator: torch.Generator,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Noise float32 [B, 16, T, H, W]: the caller's, or drawn once for the batch.

    Drawn on the CPU: the same seed then gives the same noise whatever the device.

    Args:
        dtype: what it is drawn in, or rounded to.

    Raises:
        UsageError: the caller's noise has another shape or dtype, or is not finite.
    """
    if latents is None:
        return torch.randn(tuple(shape), generator=generator, dtype=dtype).float()
    check_latents("initial latents", latents, tuple(shape[1:]))
    if len(latents) != shape[0]:
        raise UsageError("the initial latents do not fit", got=len(latents), wanted=shape[0])
    return latents.to(dtype).float()
