"""What a build and the bundle it makes will need, before a byte is written."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lcexport.builder.components import components_to_compile
from lcexport.builder.options import BuildOptions, staging_folder
from lcexport.checkpoint import Checkpoint, is_island
from lcexport.checkpoint.names import name_pairs
from lcexport.configs.components import Component
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import ResourceError
from lcexport.configs.tasks import Job, task_in
from lcexport.engines import TENSORRT
from lcexport.engines.host import available_memory_bytes
from lcexport.engines.manifest import read_manifest
from lcexport.engines.trt.compile import build_bytes
from lcexport.flops import job_flops, share_saved
from lcexport.graph.segments import propose_segments

GRAPH_BYTES = 2 << 20  # one graph, generously: 0.6 MB were seen for 48 blocks
EXPORT_BYTES = 800 << 20  # torch and the exporter themselves: 0.4 GB were seen
CONVERT_BYTES = 700 << 20
PLAN_CODE_BYTES = 8 << 20  # a plan without its weights; 3 MB were seen
PACKAGE_BYTES = 8 << 20  # AOTInductor's, of one part; 2 MB were seen
PACKAGE_BUILD_BYTES = 1 << 30  # torch, besides the exporter, and the C++ compiler
PARTS = 3  # functions of one graph
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class SizePlan:
    """One graph. Times are not estimated: they belong to a benchmark on your machine."""

    graph: str
    task: str
    height: int
    width: int
    frames: int
    latent_shape: tuple[int, ...]
    tokens: int
    flops_per_forward: int
    flops_per_step: int  # guidance runs the DiT twice; refinement has none, nor has a cache
    flops_saved: float  # the share that block-sparse attention leaves out; 0 where it is dense
    activation_bytes: int
    attention_scores_bytes: int  # to masked text, in ONNX Runtime on processors; 0 elsewhere
    cache_bytes: int  # keys and values of clean frames
    vae_decode_bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything `lcexport plan` prints."""

    model: str
    output: str
    stages: tuple[str, ...]
    weights_bytes: int
    components_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    build_memory_bytes: int
    memory_free_bytes: int
    plans_per_engine: int  # of each TensorRT engine; 0 where none is compiled
    sizes: tuple[SizePlan, ...]
    # Peak memory while generating the largest size, by what becomes of text encoder and VAE.
    runtime_bytes: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def make_plan(checkpoint: Checkpoint, options: BuildOptions) -> Plan:
    """Plan a build of `checkpoint`. Reads headers and file sizes only."""
    config = checkpoint.config
    jobs = options.jobs(config)
    weights = weights_bytes(config, options.precision, options.weights_dtype)
    components = {name: tree_bytes(path) for name, path in checkpoint.components.items()}
    sizes = tuple(size_plan(config, job, options) for job in jobs)
    golden = sum(golden_bytes(config, job, options.batch) for job in jobs)
    disk = GRAPH_BYTES * len(sizes)
    disk += 0 if options.add else weights + sum(components.values())
    plans = plans_per_engine(config, options, weights)
    inside = weights if options.weights == "inside" else 0
    disk += (inside + PLAN_CODE_BYTES * plans) * len(sizes) * len(options.tensorrt)
    packages = "aotinductor" in options.compiled
    disk += PACKAGE_BYTES * PARTS * len(sizes) * packages
    compiled = components_to_compile(options, jobs, compiled_before(options))
    disk += PACKAGE_BYTES * sum(len(component.parts) for component in compiled)
    disk += golden if options.only == "all" else 0
    if options.resume and (unfinished := staging_folder(options.output)).is_dir():
        disk = max(0, disk - tree_bytes(unfinished))  # what is there already was paid for
    largest = max(step_bytes(size) for size in sizes)
    memory = max(EXPORT_BYTES, CONVERT_BYTES)
    if options.only == "all":
        # Eager torch, which makes the reference outputs, multiplies int8 weights out.
        memory = max(memory, EXPORT_BYTES + weights_bytes(config, options.precision) + largest)
    if packages:
        memory = max(memory, EXPORT_BYTES + PACKAGE_BUILD_BYTES)
    if options.tensorrt:
        memory = max(memory, build_bytes(-(-inside // plans)))
    return Plan(
        model=str(checkpoint.folder),
        output=str(options.output),
        stages=tuple(stage_names(options, jobs, compiled)),
        weights_bytes=weights,
        components_bytes=sum(components.values()),
        disk_needed_bytes=disk,
        disk_free_bytes=shutil.disk_usage(existing_parent(options.output)).free,
        build_memory_bytes=memory,
        memory_free_bytes=available_memory_bytes(),
        plans_per_engine=plans,
        sizes=sizes,
        runtime_bytes=runtime_bytes(weights * copies(options, sizes), components, sizes),
    )


def plans_per_engine(config: DiTConfig, options: BuildOptions, weights: int) -> int:
    """How many plans each compiled engine has; as few as the memory allows, where it is not said.

    Raises:
        ResourceError: the memory does not hold the compilation of one block.
    """
    if not options.tensorrt:
        return 0
    if options.weights == "shared":
        return PARTS
    room = available_memory_bytes()
    return options.segments or propose_segments(-(-weights // config.depth), config.depth, room)


def refuse_shortage(plan: Plan) -> None:
    """ResourceError where the disk or the memory will not do."""
    if plan.disk_needed_bytes > plan.disk_free_bytes:
        raise ResourceError(
            f"the disk of {plan.output} is too full for this build",
            got=f"{gigabytes(plan.disk_free_bytes)} free",
            wanted=gigabytes(plan.disk_needed_bytes),
            do="Free some space, or choose another disk with -o.",
        )
    if plan.build_memory_bytes > plan.memory_free_bytes:
        raise ResourceError(
            "this machine's memory will not do for this build",
            got=f"{gigabytes(plan.memory_free_bytes)} available",
            wanted=gigabytes(plan.build_memory_bytes),
            do="The reference outputs need the whole model in memory. `--only export` writes "
            "weights and graphs in under 1 GB. TensorRT plans are compiled in less with more "
            "--segments, or with --weights shared.",
        )


def compiled_before(options: BuildOptions) -> Collection[str]:
    """The components that a bundle has compiled already, where one is added to."""
    return read_manifest(options.output).components if options.add else ()


def stage_names(
    options: BuildOptions, jobs: Iterable[Job], compiled: Iterable[Component] = ()
) -> list[str]:
    """The stages in order; `graph:480p` and so on once per graph.

    Args:
        compiled: the components that are compiled.
    """
    names = [] if options.add else ["weights", "components"]
    for job in jobs:
        names.append(f"graph:{job.name}")
        for backend in options.compiled:
            names.append(f"compile:{backend}:{job.name}")
            if options.ep_context and backend in TENSORRT:
                names.append(f"context:{backend}:{job.name}")
        if options.only == "all":
            names.append(f"golden:{job.name}")
            names += [f"engine:{backend}:{job.name}" for backend in options.engines]
    for component in compiled:
        names.append(f"compile:aotinductor:{component.name}")
        if options.only == "all":
            names.append(f"check:aotinductor:{component.name}")
    return names


def size_plan(config: DiTConfig, job: Job, options: BuildOptions) -> SizePlan:
    """Shapes, FLOPs and memory of one graph."""
    operations = job_flops(config, job)
    dense = job_flops(config, job.model_copy(update={"sparse": False}))
    flops = operations.total
    guided = job.part == "denoise" and job.refinement is None
    element = ELEMENT_BYTES[options.precision]
    # Alive at once in the feed-forward: residual and its float32 copy, input, two hidden maps.
    width = config.hidden_size * (2 * element + 4) + 2 * config.ffn_hidden * element
    on_cpu = "onnxruntime" in options.backends and options.device == "cpu"
    masked = on_cpu and job.part == "denoise" and not config.text_tokens_zero_pad
    scores = options.batch * config.num_heads * job.tokens * job.text_tokens * 4 if masked else 0
    # Two full-resolution frames of 96 channels in each of the decoder's last seven convolutions'
    # caches, and about as much again in flight, float32.
    decode = 2 * 7 * 2 * 96 * job.height * job.width * 4
    return SizePlan(
        graph=job.name,
        task=job.task,
        height=job.height,
        width=job.width,
        frames=job.frames,
        latent_shape=(options.batch, *job.latent_shape),
        tokens=job.tokens,
        flops_per_forward=flops,
        flops_per_step=(1 + guided) * flops,
        flops_saved=share_saved(dense, operations),
        activation_bytes=options.batch * job.tokens * width,
        attention_scores_bytes=scores,
        cache_bytes=options.batch * cache_bytes(config, job, element),
        vae_decode_bytes=decode + job.height * job.width * job.frames * 3 * 4,
    )


def cache_bytes(config: DiTConfig, job: Job, element: int) -> int:
    """Keys and values of every layer for one sample: made or used by the graph."""
    latents = job.latent_frames if job.part == "cache" else job.cached_latents
    return 2 * config.depth * latents * job.frame_tokens * config.hidden_size * element


def runtime_bytes(
    weights: int, components: dict[str, int], sizes: tuple[SizePlan, ...]
) -> dict[str, int]:
    """Peak memory on the engine's device for each `offload` of `lcexport.runtime.load`.

    weights: as often as they are held, see `copies`.
    """
    text, vae = components.get("text_encoder", 0), components.get("vae", 0)
    step = max(step_bytes(size) for size in sizes)
    decode = max(size.vae_decode_bytes for size in sizes)
    return {
        "keep": weights + text + vae + max(step, decode),
        "cpu": weights + max(text, step, vae + decode),
        "release": weights + max(text, step, vae + decode),
    }


def copies(options: BuildOptions, sizes: tuple[SizePlan, ...]) -> int:
    """How often a pipeline holds the weights when it has been asked for every task of a resolution.

    Eager torch, AOTInductor and plans with shared weights hold them once. The other backends hold
    them once for each open graph, unless `lcexport.runtime.load` is told to keep fewer open
    (`keep_engines`).
    """
    shared = {"eager", "aotinductor", *(TENSORRT if options.weights == "shared" else ())}
    if shared.issuperset(options.backends):
        return 1
    return max(Counter(task_in(size.graph)[0] for size in sizes).values())


def step_bytes(size: SizePlan) -> int:
    return size.activation_bytes + size.attention_scores_bytes + size.cache_bytes


def weights_bytes(config: DiTConfig, precision: str, weights_dtype: str = "bulk") -> int:
    """Size of the weights file without its header."""
    total = 0
    for pair in name_pairs(config):
        elements = math.prod(pair.shape)
        if is_island(pair.natives[0]):
            total += 4 * elements
        elif weights_dtype == "int8" and pair.is_quantisable:
            total += elements + 4 * pair.shape[0]
        else:
            total += ELEMENT_BYTES[precision] * elements
    return total


def golden_bytes(config: DiTConfig, job: Job, batch: int) -> int:
    """Three tensors of latents and two of text features, float32; of a cache, two layers."""
    latents = math.prod(job.latent_shape)
    if job.part == "cache":
        return batch * 4 * latents + 2 * cache_bytes(config, job, 4) // config.depth
    return batch * 4 * (3 * latents + 2 * job.text_tokens * config.caption_channels)


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below, links followed."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists, for asking its disk."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path if os.access(path, os.R_OK) else path.parent


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
