"""Which LoRA, how strongly: from the command line's words."""

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from lcexport.configs.errors import InputError, UsageError


class LoraChoice(BaseModel):
    """A LoRA's file and the factor on it: 1 is as it was trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    strength: float = Field(default=1.0, allow_inf_nan=False)


def choice_from(word: str, folder: Path | None = None) -> LoraChoice:
    """`LORA` or `LORA:strength`. A file that exists under the whole word is that file.

    Args:
        word: a file's path; or, with a folder, the name of one in it: `cfg_step` is
            cfg_step_lora.safetensors or cfg_step.safetensors.

    Raises:
        InputError: there is no such file.
        UsageError: the strength is not finite.
    """
    if found := find(word, folder):
        return LoraChoice(path=found)
    name, _, number = word.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        raise missing(word, folder) from None
    if not (found := find(name, folder)):
        raise missing(name or word, folder)
    if not math.isfinite(strength):
        raise UsageError("a LoRA's strength is a finite number", got=repr(word))
    return LoraChoice(path=found, strength=strength)


def find(name: str, folder: Path | None) -> Path | None:
    """The file of that path, or of that name in the folder."""
    candidates = [Path(name)]
    if folder:
        candidates += [folder / f"{name}{end}.safetensors" for end in ("_lora", "")]
    return next((path for path in candidates if name and path.is_file()), None)


def missing(name: str, folder: Path | None) -> InputError:
    if not folder:
        return InputError(f"there is no LoRA file {name}")
    there = ", ".join(sorted(path.stem for path in folder.glob("*.safetensors")))
    return InputError(
        f"there is no LoRA {name}: no such file, and none of that name in {folder}",
        got=f"in that folder: {there or 'none'}",
    )
