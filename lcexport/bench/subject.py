"""What is measured: contestants that do the same work, each a backend of a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lcexport.bench.compiled import COMPILE, compiled
from lcexport.builder.plan import weights_bytes
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import IncompatibleError, UsageError
from lcexport.configs.tasks import Job, job_name, task_from
from lcexport.engines import BACKENDS, COMPILED, Engine, open_engine
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import DIT_CONFIG, WEIGHTS, GraphRecord, read_manifest
from lcexport.engines.ort import graph_file
from lcexport.engines.ort_providers import plans_model
from lcexport.flops import Flops, job_flops, share_saved
from lcexport.qualify.run import require

EAGER = "eager"


@dataclass(frozen=True)
class Contestant:
    """A backend that runs one graph of one bundle. `name` is unique in a run."""

    name: str
    backend: str
    bundle: Bundle
    graph: GraphRecord

    @property
    def runs(self) -> str:
        """The backend by its name in `BACKENDS`."""
        return EAGER if self.backend == COMPILE else self.backend

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the large products."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.bundle.manifest.precision]

    @property
    def weights_bytes(self) -> int:
        return self.bundle.manifest.files[WEIGHTS].bytes

    def held_bytes(self, config: DiTConfig, device: torch.device) -> int:
        """The weights as its engine holds them, open on `device`; an estimate."""
        if self.runs == EAGER:  # int8 is multiplied out
            return weights_bytes(config, self.bundle.manifest.precision)
        # On processors ONNX Runtime repacks the weights beside the mapped file.
        repacks = self.backend == "onnxruntime" and device.type == "cpu"
        return (1 + repacks) * self.weights_bytes

    def open(self, device: torch.device, like: Engine | None = None) -> Engine:
        """Open its engine; `like` is an eager one of the same bundle, to share weights with."""
        like = like if self.runs == EAGER else None
        engine = open_engine(self.runs, self.bundle, self.graph.name, str(device), like)
        return compiled(engine, self.graph) if self.backend == COMPILE else engine

    def facts(self) -> dict[str, object]:
        """What makes two contestants of two runs the same."""
        manifest = self.bundle.manifest
        return {
            "name": self.name,
            "backend": self.backend,
            "batch": self.graph.batch,
            "precision": manifest.precision,
            "weights_dtype": manifest.weights_dtype,
        }

    def files(self, device: torch.device) -> dict[str, int]:
        """Bytes on the disk: its weights, graph and plans, the other components, all of these.

        The graph is the one that the backend opens on `device`; 0 where it opens none.
        """
        files = self.bundle.manifest.files
        product = self.backend.removeprefix("onnxruntime-")
        record = self.bundle.manifest.engines.get(product, {}).get(self.graph.name)
        plans = {plan.file for plan in record.plans} if record else set()
        graph = record.ep_context if record and product != self.backend else None
        if self.backend == "onnxruntime":
            graph = graph_file(self.graph, device)
        components = ("text_encoder/", "tokenizer/", "vae/")
        sizes = {
            "weights_bytes": files[WEIGHTS].bytes,
            "graph_bytes": files[graph].bytes if graph else 0,
            "plans_bytes": sum(files[name].bytes for name in plans),
            "components_bytes": sum(
                record.bytes for name, record in files.items() if name.startswith(components)
            ),
        }
        return {**sizes, "total_bytes": sum(sizes.values())}


@dataclass(frozen=True)
class Subject:
    """Contestants that compute the same job of the same model on the same device."""

    contestants: tuple[Contestant, ...]
    device: torch.device
    config: DiTConfig
    job: Job

    @property
    def branches(self) -> int:
        """Passes of a guided step: a refinement has no guidance."""
        return 1 if self.job.refinement else 2

    @property
    def guidance_scale(self) -> float:
        return 1.0 if self.branches == 1 else self.job.preset.guidance_scale

    @property
    def flops(self) -> Flops:
        """Operations of one pass over one sample."""
        return job_flops(self.config, self.job)

    @property
    def flops_saved(self) -> float | None:
        """The share that block-sparse attention leaves out; None where attention is dense."""
        if not self.job.sparse:
            return None
        dense = job_flops(self.config, self.job.model_copy(update={"sparse": False}))
        return share_saved(dense, self.flops)

    def facts(self) -> dict[str, object]:
        """What makes the figures of two runs comparable, beside the device and the contestants."""
        job, model = self.job, self.config
        return {
            "task": job.task,
            "latent_shape": list(job.latent_shape),
            "clean_latents": job.num_cond_latents + job.cached_latents,
            "tokens": job.tokens,
            "text_tokens": job.text_tokens,
            "sparse": job.sparse,
            "hidden_size": model.hidden_size,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "passes_per_step": self.branches,
        }


def subject_from(
    folders: Sequence[Path],
    device: str,
    backends: Sequence[str] | None = None,
    resolution: str | None = None,
    task: str = "t2v",
) -> Subject:
    """Every backend of every bundle, checked as far as that goes without opening an engine.

    Args:
        backends: of `BACKENDS`, or `compile`; by default the bundle's first and eager torch.
        resolution: the first bundle's first by default.

    Raises:
        UsageError: an unknown or repeated backend, or one that a bundle has no engine for; no such
            graph; bundles that do not do the same work.
        IncompatibleError: a backend or the device is not to be had here.
        IntegrityError: no bundle, or a damaged one.
    """
    check_names(backends or ())
    bundles = [Bundle(folder, read_manifest(folder)) for folder in folders]
    resolution = resolution or next(iter(bundles[0].manifest.graphs.values())).preset.name
    graph = job_name(resolution, task_from(task))
    contestants = []
    for bundle in bundles:
        bundle.check_files()
        record = bundle.graph(graph)
        for backend in backends or default_backends(bundle):
            name = backend if len(bundles) == 1 else f"{bundle.folder.name}:{backend}"
            contestants.append(Contestant(name, backend, bundle, record))
    for contestant in contestants:
        require_contestant(contestant, device)
    check_alike(contestants)
    first = contestants[0]
    config = DiTConfig.from_json(first.bundle.path(DIT_CONFIG))
    return Subject(tuple(contestants), torch.device(device), config, first.graph.job)


def default_backends(bundle: Bundle) -> tuple[str, ...]:
    """The bundle's first compiled engine, else ONNX Runtime; and eager torch beside it."""
    manifest = bundle.manifest
    own = next(iter(manifest.engines), None) or next(iter(manifest.backends), "onnxruntime")
    return tuple(dict.fromkeys((own, EAGER)))


def check_names(backends: Sequence[str]) -> None:
    """Refuse unknown and repeated backends."""
    known = (*BACKENDS, COMPILE)
    for backend in backends:
        if backend not in known:
            raise UsageError(
                "unknown backend", got=repr(backend), wanted=f"one of {', '.join(known)}"
            )
    if len(set(backends)) != len(backends):
        raise UsageError("a backend is named twice", got=", ".join(backends))


def require_contestant(contestant: Contestant, device: str) -> None:
    """Refuse a backend that cannot run here, or that the bundle has nothing for."""
    require(contestant.bundle, contestant.runs, contestant.graph.name, device, buildable=False)
    if contestant.runs.removeprefix("onnxruntime-") in COMPILED and contestant.runs not in COMPILED:
        plans_model(contestant.bundle, contestant.runs, contestant.graph.name)


def check_alike(contestants: Sequence[Contestant]) -> None:
    """Refuse contestants of one name, and bundles that do not do the same work."""
    names = [contestant.name for contestant in contestants]
    if len(set(names)) != len(names):
        raise UsageError("two bundles have one name", got=", ".join(names), do="Rename a folder.")
    first = contestants[0]
    for other in contestants:
        if other.graph.job != first.graph.job:
            raise UsageError(
                f"{first.name} and {other.name} do not do the same work",
                got=f"latents {list(other.graph.job.latent_shape)}",
                wanted=f"latents {list(first.graph.job.latent_shape)}, made alike",
            )
        ours, theirs = (DiTConfig.from_json(c.bundle.path(DIT_CONFIG)) for c in (first, other))
        if ours != theirs:
            raise IncompatibleError(f"{first.name} and {other.name} are of different models")
