"""What a build is asked to do: one frozen record, from the command line to the manifest."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lcexport.configs import Preset
from lcexport.engines import BACKENDS
from lcexport.engines.bundle import Islands, Precision

DEFAULT_MODEL = Path("weights/LongCat-Video")
MODEL_VARIABLE = "LCEXPORT_MODEL"
Only = Literal["all", "export"]


class BuildOptions(BaseModel):
    """The effective configuration of a build, recorded in the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    output: Path
    presets: tuple[Preset, ...] = Field(min_length=1)
    precision: Precision = "fp32"
    islands: Islands = "checkpoint"
    backends: tuple[str, ...] = ("onnxruntime",)
    batch: int = Field(default=1, ge=1, le=16)
    device: str = "cpu"
    only: Only = "all"
    add: bool = False
    resume: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "fp32" and self.islands == "original":
            raise ValueError("islands 'original' round to bfloat16; that needs precision bf16")
        names = [preset.name for preset in self.presets]
        if len(set(names)) != len(names):
            raise ValueError(f"a resolution is named twice: {', '.join(names)}")
        unknown = [name for name in self.backends if name not in BACKENDS]
        if unknown:
            raise ValueError(f"unknown backend {unknown[0]!r}; known: {', '.join(BACKENDS)}")
        return self

    def fingerprint(self) -> dict[str, object]:
        """What must be equal for a build to be resumed: everything but `resume` itself."""
        return self.model_dump(mode="json", exclude={"resume"})


def default_model() -> Path:
    """$LCEXPORT_MODEL, or weights/LongCat-Video."""
    return Path(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)


def default_output(model: Path, presets: tuple[Preset, ...], precision: Precision) -> Path:
    """bundles/<model>-<resolutions>-<precision>."""
    sizes = "+".join(preset.name for preset in presets)
    return Path("bundles") / f"{model.resolve().name}-{sizes}-{precision}"
