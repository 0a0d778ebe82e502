"""What a bundle's `manifest.json` says, as types, and reading it. See `lcexport.engines.bundle`."""

import json
from pathlib import Path, PurePosixPath
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lcexport.configs.components import Component
from lcexport.configs.errors import IncompatibleError, IntegrityError, UsageError
from lcexport.configs.presets import Preset
from lcexport.configs.tasks import Job

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "dit.safetensors"
DIT_CONFIG = "transformer/config.json"
LORA_BASE = "lora/base"
UNFINISHED = "lora/next"

Precision = Literal["fp32", "bf16"]
Islands = Literal["checkpoint", "original"]
WeightsDtype = Literal["bulk", "int8"]  # of the bulk's matrices: as it computes, or with scales
COMPONENTS = ("text_encoder", "tokenizer", "vae", "scheduler")
# Options of a build that change no graph, but what else it makes: fields and their defaults.
STAGE_OPTIONS: dict[str, tuple[str, object]] = {
    "--backend": ("backends", ["onnxruntime"]),
    "--device": ("device", "cpu"),
    "--only": ("only", "all"),
    "--weights": ("weights", "inside"),
    "--compile-components": ("compile_components", False),
}


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Frozen):
    """Size and digest of one file of the bundle, by its path relative to the bundle."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TensorRecord(Frozen):
    """An engine's input or output. `dtype` is torch's name without the prefix: `float32`."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class AddedRecord(Frozen):
    """How a graph came into a finished bundle; without one, as the manifest's own fields say."""

    created: str
    versions: dict[str, str]
    device: str
    effective: dict[str, object]


class GraphRecord(Frozen):
    """One graph: what it computes, its file, and the proof that it keeps the precision.

    `fused` is the same graph for ONNX Runtime on processors; graphs in float32 alone have one.
    """

    file: str
    fused: str | None = None
    job: Job
    batch: int = Field(ge=1)
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    precision_proof: dict[str, int]
    golden: str | None = None
    added: AddedRecord | None = None

    @property
    def name(self) -> str:
        """The graph's key in the manifest."""
        return self.job.name

    @property
    def preset(self) -> Preset:
        return self.job.preset


class PlanRecord(Frozen):
    """One compiled plan: a run of blocks whose tensors carry the names of the graph; or one of the
    graph's functions, with names of its own, whose `weights` are handed in.
    """

    file: str
    first_block: int | None = Field(ge=0)  # None: a function, whatever the block
    last_block: int | None = Field(ge=0)
    inputs: tuple[TensorRecord, ...]
    weights: tuple[TensorRecord, ...] = ()
    outputs: tuple[TensorRecord, ...]
    attentions: int = Field(ge=0)


class CallRecord(Frozen):
    """One use of a plan that takes its weights from outside.

    `tensors` gives the graph's name for each of the plan's inputs and outputs; `prefix` makes a
    weight's name in the bundle's weights file.
    """

    plan: int = Field(ge=0)
    prefix: str
    tensors: dict[str, str]


class EngineRecord(Frozen):
    """A compiled engine: its plans, their uses in order, and what they were compiled by and for.

    `compute_capabilities`, `gpu` and `driver` are empty where the compiler chose its targets and
    no GPU was there. `verified` is whether the engine was run against eager torch where it was
    built: one for another machine's GPU cannot be. `ep_context` is the ONNX model that wraps the
    plans for ONNX Runtime, where one was asked for.
    """

    plans: tuple[PlanRecord, ...]
    calls: tuple[CallRecord, ...] = ()  # none: each plan once, in order
    product: str
    version: str
    platform: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    driver: str | None
    options: dict[str, object]
    verified: bool
    ep_context: str | None = None

    @property
    def takes_weights(self) -> bool:
        """Whether the engine has the bundle's weights when it is opened, or can be given them."""
        exchanged = self.options.get("strip_plan") or self.options.get("refit")
        return bool(self.calls or exchanged) and self.ep_context is None


class ComponentRecord(EngineRecord):
    """The text encoder or the VAE's decoder, compiled: one plan for each of its parts.

    The plans' weights are those of the library's model, by its names. `errors` has the difference
    from the library's outputs, by what was computed, in the measures of `lcexport.compare`; none
    where it was not run where it was built.
    """

    component: Component
    errors: dict[str, dict[str, float]] = {}

    @model_validator(mode="after")
    def _has_a_plan_for_each_part(self) -> Self:
        if len(self.plans) != len(self.component.parts):
            raise ValueError(
                f"{self.component.name} has {len(self.plans)} plans, not one for each of "
                f"{', '.join(self.component.parts)}"
            )
        return self


class StageRecord(Frozen):
    """What one stage of the build cost."""

    name: str
    seconds: float
    peak_rss_bytes: int


class SourceRecord(Frozen):
    """Which checkpoint went in: its layout, and a digest over every tensor's name and bytes."""

    layout: str
    dtype: str
    tensors: int
    tensors_sha256: str


class LoraRecord(Frozen):
    """A LoRA in the bundle's weights. Baked into the finished bundle it can be removed again;
    otherwise it went in when the weights were first written.
    """

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    strength: float = Field(allow_inf_nan=False)
    baked: bool = False


class Manifest(Frozen):
    """Everything `inspect` shows. The schema is closed: an unknown field is an error."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: str
    source: SourceRecord
    precision: Precision
    islands: Islands
    weights_dtype: WeightsDtype = "bulk"
    backends: tuple[str, ...]
    graphs: dict[str, GraphRecord]
    # Compiled engines by backend and resolution; ONNX Runtime and eager torch need none.
    engines: dict[str, dict[str, EngineRecord]] = {}
    # The text encoder and the VAE's decoders by `Component.name`, where these were compiled.
    components: dict[str, ComponentRecord] = {}
    files: dict[str, FileRecord]
    versions: dict[str, str]
    device: str
    effective: dict[str, object]
    stages: tuple[StageRecord, ...]
    loras: tuple[LoraRecord, ...] = ()

    @field_validator("components")
    @classmethod
    def _components_have_their_names(
        cls, components: dict[str, ComponentRecord]
    ) -> dict[str, ComponentRecord]:
        for name, record in components.items():
            if name != record.component.name:
                raise ValueError(f"{record.component.name} goes by the name {name}")
        return components

    @property
    def baked(self) -> bool:
        """Whether the weights are not the ones the bundle was built with."""
        return any(record.baked for record in self.loras)

    def options_for(self, resolution: str, task: str) -> dict[str, object]:
        """Options of a build for a task's graphs, whether the bundle has them or not.

        They are those of that graph, else of one that differs in size or task alone.
        """
        graph = min(
            self.graphs.values(),
            key=lambda graph: (graph.job.task != task, graph.preset.name != resolution),
        )
        effective = graph.added.effective if graph.added else self.effective
        # A size of its own is no other graph's: what was asked for made that.
        own = graph.job.options if (graph.preset.name, graph.job.task) == (resolution, task) else {}
        return {
            **effective,
            "precision": self.precision,
            "islands": self.islands,
            "weights_dtype": self.weights_dtype,
            "batch": graph.batch,
            **own,
        }

    @property
    def default_backend(self) -> str:
        """The first engine the bundle was built with; UsageError where it has none."""
        if not self.backends and self.engines:
            backend, engines = next(iter(self.engines.items()))
            device = next(iter(engines.values())).options.get("device", "cuda")
            raise UsageError(
                "the bundle's engines were compiled and not run where it was built",
                do=f"Name one: --backend {backend} --device {device}.",
            )
        if not self.backends:
            raise UsageError(
                "the bundle was exported without engines", do="Name one: --backend onnxruntime."
            )
        return self.backends[0]


def read_manifest(folder: Path) -> Manifest:
    """Parse and validate `manifest.json`; no other file is touched.

    Raises:
        IntegrityError: there is none, it is damaged, or the files are between two states.
        IncompatibleError: it has another schema version.
    """
    if (folder / UNFINISHED).exists():
        raise IntegrityError(
            f"the weights of {folder} are being exchanged, or were when that was interrupted",
            do="Run `lcexport lora bake` or `lora remove` again: it finishes what was begun.",
        )
    return parse_manifest(folder / MANIFEST)


def manifest_json(manifest: Manifest) -> bytes:
    """The text of `manifest.json`."""
    return (manifest.model_dump_json(indent=1) + "\n").encode()


def parse_manifest(path: Path) -> Manifest:
    """A manifest of its file; see `read_manifest`."""
    if not path.is_file():
        raise IntegrityError(
            "not a bundle",
            got=f"no {path}",
            do="Build one with `lcexport build --res 480p`.",
        )
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}", do="Rebuild the bundle.") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise IncompatibleError(
            f"{path} has another schema version",
            got=version,
            wanted=SCHEMA_VERSION,
            do="Rebuild the bundle with this lcexport, or use the lcexport that built it.",
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{path}: {where}: {first['msg']}", do="Rebuild it.") from error
    if not manifest.graphs:
        raise IntegrityError(f"{path} names no graph", do="Rebuild it.")
    for name in manifest.files:
        check_name(name, path)
    return manifest


def check_name(name: str, manifest: Path) -> None:
    """Refuse a file name that leads out of the bundle."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or any(p in ("..", ".") for p in parts):
        raise IntegrityError(f"{manifest} names a file outside the bundle", got=repr(name))
