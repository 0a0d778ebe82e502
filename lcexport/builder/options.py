"""What a build is asked to do: one frozen record, from the command line to the manifest."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lcexport.configs import Preset, preset_from
from lcexport.configs.errors import UsageError
from lcexport.engines import COMPILED, Compiled, backend_module
from lcexport.engines.bundle import Islands, Precision

DEFAULT_MODEL = Path("weights/LongCat-Video")
MODEL_VARIABLE = "LCEXPORT_MODEL"
Only = Literal["all", "compile", "export"]


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
    segments: int = Field(default=0, ge=0, le=1000)  # 0: as few as the memory allows
    compute_capabilities: tuple[str, ...] = ()
    add: bool = False
    resume: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "fp32" and self.islands == "original":
            raise ValueError("islands 'original' round to bfloat16; that needs precision bf16")
        names = [preset.name for preset in self.presets]
        if len(set(names)) != len(names):
            raise ValueError(f"a resolution is named twice: {', '.join(names)}")
        if self.add and self.resume:
            raise ValueError("an addition takes seconds: run --add again, without --resume")
        for backend in self.backends:
            backend_module(backend)
        return self

    def fingerprint(self) -> dict[str, object]:
        """What must be equal for a build to be resumed: everything but `resume` itself."""
        return self.model_dump(mode="json", exclude={"resume"})

    @property
    def engines(self) -> tuple[str, ...]:
        """The backends that are run against eager torch: none without golden outputs.

        A compiled engine is run only on the kind of machine it is for.
        """
        if self.only != "all":
            return ()
        return tuple(b for b in self.backends if b not in COMPILED or self.device != "cpu")

    @property
    def compiled(self) -> tuple[Compiled, ...]:
        """The backends that have plans to compile."""
        return () if self.only == "export" else tuple(b for b in COMPILED if b in self.backends)

    def effective(self) -> dict[str, object]:
        """What the manifest records: everything but where this machine keeps its folders."""
        own = self.model_dump(mode="json", exclude={"resume", "add", "output"})
        return {**own, "model": self.model.name}


def options_from(
    *,
    model: Path | None = None,
    res: str = "480p",
    output: Path | None = None,
    backends: str = "onnxruntime",
    **fields: object,
) -> BuildOptions:
    """Options from the command line's words; `res` and `backends` are separated by commas.

    Raises:
        UsageError: an unknown resolution, backend or value, or options that contradict.
    """
    model = model or default_model()
    presets = tuple(preset_from(name.strip()) for name in res.split(","))
    engines = tuple(name.strip() for name in backends.split(","))
    for name in engines:
        backend_module(name)
    output = output or default_output(model, presets, str(fields.get("precision", "fp32")))
    given = {"model": model, "output": output, "presets": presets, "backends": engines, **fields}
    try:
        return BuildOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {message}" if where else message) from error


def staging_folder(output: Path) -> Path:
    """Where a bundle grows before it has its name."""
    return output.with_name(f"{output.name}.building")


def default_model() -> Path:
    """$LCEXPORT_MODEL, or weights/LongCat-Video."""
    return Path(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)


def default_output(model: Path, presets: tuple[Preset, ...], precision: str) -> Path:
    """bundles/<model>-<resolutions>-<precision>."""
    sizes = "+".join(preset.name for preset in presets)
    return Path("bundles") / f"{model.resolve().name}-{sizes}-{precision}"
