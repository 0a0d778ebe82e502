"""What a build is asked to do: one frozen record, from the command line to the manifest."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import UsageError
from lcexport.configs.presets import PIXEL_MULTIPLE, Preset, preset_from
from lcexport.configs.tasks import COND_FRAMES, Job, Task, jobs_for, task_from
from lcexport.engines import COMPILED, TENSORRT, Compiled, TensorRT, backend_module
from lcexport.engines.manifest import Islands, Precision, WeightsDtype
from lcexport.engines.trt.options import TrtOptions
from lcexport.lora import LoraChoice, choice_from

BUNDLES = Path("bundles")
DEFAULT_MODEL = Path("weights/LongCat-Video")
MODEL_VARIABLE = "LCEXPORT_MODEL"
OPTIONS = {"presets": "res", "backends": "backend"}  # fields with another name than their option
TARGETS = "compute_capabilities"
Only = Literal["all", "compile", "export"]
Weights = Literal["inside", "shared"]  # of a compiled engine: in its plans, or handed in


class BuildOptions(BaseModel):
    """The effective configuration of a build, recorded in the manifest.

    Attributes:
        model: the checkpoint; not needed with `add`, which takes the bundle's weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path | None = None
    output: Path
    presets: tuple[Preset, ...] = Field(min_length=1)
    tasks: tuple[Task, ...] = Field(default=("t2v",), min_length=1)
    cond_frames: int = Field(default=COND_FRAMES, ge=1, le=4096)
    refine_size: tuple[int, int] | None = None
    refine_cond_frames: int | None = Field(default=None, ge=1, le=8192)
    dense: bool = False
    precision: Precision = "fp32"
    islands: Islands = "checkpoint"
    weights_dtype: WeightsDtype = "bulk"
    backends: tuple[str, ...] = ("onnxruntime",)
    batch: int = Field(default=1, ge=1, le=16)
    device: str = "cpu"
    only: Only = "all"
    weights: Weights = "inside"
    segments: int = Field(default=0, ge=0, le=1000)  # 0: as few as the memory allows
    trt: TrtOptions = TrtOptions()
    ep_context: bool = False
    compile_components: bool = False
    loras: tuple[LoraChoice, ...] = ()
    add: bool = False
    resume: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "fp32" and self.islands == "original":
            raise ValueError("islands 'original' round to bfloat16; that needs precision bf16")
        names = [preset.name for preset in self.presets]
        if len(set(names)) != len(names):
            raise ValueError(f"a resolution is named twice: {', '.join(names)}")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"a task is named twice: {', '.join(self.tasks)}")
        if self.model is None and not self.add:
            raise ValueError("a new bundle is made of a checkpoint: name one with --model")
        if self.add and self.resume:
            raise ValueError("an addition takes seconds: run --add again, without --resume")
        if self.add and self.loras:
            raise ValueError("--lora is for new weights: `lcexport lora bake` changes a bundle's")
        for backend in self.backends:
            backend_module(backend)
        self._consistent_plans()
        self._consistent_contexts()
        self._consistent_components()
        return self

    def _consistent_plans(self) -> None:
        """Refuse what is said of plans where there are none, or none of that kind."""
        trt = self.trt
        if self.weights_dtype == "int8" and (trt.strip_plan or trt.refit):
            raise ValueError("int8 weights in plans cannot be exchanged: add --weights shared")
        if self.weights == "shared":
            said = {
                "segments": self.segments,
                "weight_streaming": trt.weight_streaming,
                "strip_plan": trt.strip_plan,
                "refit": trt.refit,
                "EPContext model": self.ep_context,
            }
            if named := [name for name, value in said.items() if value]:
                raise ValueError(f"plans with shared weights have no {', '.join(named)}")
        said = self.segments or self.weights != "inside" or trt != TrtOptions()
        if said and not set(TENSORRT) & set(self.backends):
            raise ValueError("segments, weights and TensorRT's options need a TensorRT backend")

    def _consistent_contexts(self) -> None:
        """EPContext models wrap plans, and what runs them needs both."""
        if self.ep_context and self.only == "export":
            raise ValueError("--ep-context wraps plans, and --only export compiles none")
        if self.ep_context and not self.tensorrt:
            raise ValueError("--ep-context wraps plans: add --backend tensorrt or tensorrt-rtx")
        if self.ep_context and "tensorrt" in self.tensorrt and self.segments != 1:
            raise ValueError("ONNX Runtime's TensorRT provider runs one plan: add --segments 1")
        if self.ep_context and (self.trt.strip_plan or self.trt.version_compatible):
            raise ValueError(
                "lcexport has ONNX Runtime fill no stripped plan and run no plan's own code"
            )
        for compiled in TENSORRT:
            wrapped = self.ep_context and compiled in self.tensorrt
            if f"onnxruntime-{compiled}" in self.engines and not wrapped:
                raise ValueError(
                    f"onnxruntime-{compiled} runs the plans of {compiled}: add --ep-context and "
                    f"--backend {compiled},onnxruntime-{compiled}"
                )

    def _consistent_components(self) -> None:
        """Text encoder and VAE are compiled by the backend that runs them compiled."""
        if self.compile_components and "aotinductor" not in self.backends:
            raise UsageError(
                "--compile-components compiles with AOTInductor",
                got=f"--backend {','.join(self.backends)}",
                wanted="aotinductor among them",
                do="Add --backend aotinductor, or leave --compile-components out.",
            )
        if self.compile_components and self.only == "export":
            raise UsageError(
                "--compile-components compiles, and --only export stops before that",
                got="--only export",
                wanted="--only all or compile",
                do="Leave one of the two out.",
            )

    def fingerprint(self) -> dict[str, object]:
        """What must be equal for a build to be resumed: everything but `resume` itself.

        And but the LoRAs, which are told apart by their digests, not here.
        """
        return self.model_dump(mode="json", exclude={"resume", "loras"})

    def jobs(self, config: DiTConfig) -> tuple[Job, ...]:
        """The graphs to build for a model of this configuration.

        Refinement is block-sparse where the model was trained so, unless `dense`; the other tasks
        where its configuration says so.

        Raises:
            UsageError: a size or a number of frames that a task cannot take.
        """
        sparse = config.bsa_params is not None and not self.dense
        return tuple(
            job
            for preset in self.presets
            for task in self.tasks
            for job in jobs_for(
                preset,
                task,
                cond_frames=self.cond_frames,
                refine_size=self.refine_size,
                refine_cond_frames=self.refine_cond_frames,
                sparse=sparse,
                all_sparse=sparse and config.enable_bsa,
            )
        )

    @property
    def engines(self) -> tuple[str, ...]:
        """The backends that are run against eager torch: none without golden outputs.

        TensorRT's plans are run only on the kind of machine they are for.
        """
        if self.only != "all":
            return ()
        return tuple(b for b in self.backends if b not in TENSORRT or self.device != "cpu")

    @property
    def compiled(self) -> tuple[Compiled, ...]:
        """The backends that have plans to compile."""
        return () if self.only == "export" else tuple(b for b in COMPILED if b in self.backends)

    @property
    def tensorrt(self) -> tuple[TensorRT, ...]:
        """Those of them that are TensorRT's."""
        return tuple(b for b in TENSORRT if b in self.compiled)

    def effective(self) -> dict[str, object]:
        """What the manifest records: everything but where this machine keeps its folders."""
        places = {
            "resume": True, "add": True, "output": True, "loras": True, "trt": {"timing_cache"},
        }  # fmt: skip
        own = self.model_dump(mode="json", exclude=places)
        return {**own, "model": self.model.name if self.model else None}


def options_from(
    *,
    model: Path | None = None,
    res: str = "480p",
    task: str = "t2v",
    refine_size: str | None = None,
    output: Path | None = None,
    backends: str = "onnxruntime",
    targets: str | None = None,
    trt: Mapping[str, str] | None = None,
    loras: Iterable[str] = (),
    **fields: object,
) -> BuildOptions:
    """Options from the command line's words.

    Args:
        res, task, backends, targets: separated by commas.
        refine_size: HEIGHTxWIDTH of refined videos.
        trt: fields of `TrtOptions`; `targets` are its compute capabilities.
        loras: files, or names in the checkpoint's `lora/`, each perhaps with `:strength`.

    Raises:
        UsageError: an unknown resolution, backend or value, or options that contradict.
        InputError: no such LoRA.
    """
    checkpoint = model or default_model()
    presets = tuple(preset_from(name.strip()) for name in res.split(","))
    engines = tuple(name.strip() for name in backends.split(","))
    for name in engines:
        backend_module(name)
    label = str(fields.get("precision", "fp32"))
    label += "-int8" if fields.get("weights_dtype") == "int8" else ""
    output = output or default_output(checkpoint, presets, label)
    given = {
        "model": model if fields.get("add") else checkpoint,
        "output": output,
        "presets": presets,
        "backends": engines,
        **fields,
    }
    given["tasks"] = tuple(task_from(name.strip()) for name in task.split(","))
    given["refine_size"] = refine_size and size_from(refine_size)
    given["trt"] = trt_fields(trt or {}, targets)
    given["loras"] = tuple(choice_from(word, checkpoint / "lora") for word in loras)
    try:
        return BuildOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # options that contradict each other
            raise UsageError(message) from error
        option = option_of(first["loc"], targets)
        raise UsageError(f"{option}: {message}", got=repr(first["input"])) from error


def option_of(place: tuple[int | str, ...], targets: str | None) -> str:
    """What was typed on the command line for a field."""
    name, *below = map(str, place)
    if name == "trt" and below:
        return "--targets" if targets and below[0] == TARGETS else f"--trt {below[0]}"
    return f"--{OPTIONS.get(name, name).replace('_', '-')}"


def trt_fields(given: Mapping[str, str], targets: str | None) -> dict[str, object]:
    """The fields of TensorRT's options, not yet checked for their values."""
    for name in given:
        if name not in TrtOptions.model_fields:
            raise UsageError(
                "TensorRT has no such option here",
                got=repr(name),
                wanted=f"one of {', '.join(TrtOptions.model_fields)}",
            )
    fields: dict[str, object] = dict(given)
    if targets := targets or given.get(TARGETS):
        fields[TARGETS] = tuple(part.strip() for part in targets.split(","))
    return fields


def size_from(text: str) -> tuple[int, int]:
    """(height, width) of HEIGHTxWIDTH."""
    size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not size or int(size[1]) < PIXEL_MULTIPLE or int(size[2]) < PIXEL_MULTIPLE:
        raise UsageError(
            "not a size", got=repr(text[:80]), wanted="HEIGHTxWIDTH", do="For example 704x1280."
        )
    return int(size[1]), int(size[2])


def staging_folder(output: Path) -> Path:
    """Where a bundle grows before it has its name."""
    return output.with_name(f"{output.name}.building")


def default_model() -> Path:
    """$LCEXPORT_MODEL, or weights/LongCat-Video."""
    return Path(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)


def default_output(model: Path, presets: tuple[Preset, ...], precision: str) -> Path:
    """bundles/<model>-<resolutions>-<precision>."""
    sizes = "+".join(preset.name for preset in presets)
    return BUNDLES / f"{model.resolve().name}-{sizes}-{precision}"
