"""The stages of a build, each a function from what exists to the files it adds."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import save

from lcexport.builder.options import BuildOptions
from lcexport.builder.staging import StageOutput
from lcexport.checkpoint import (
    Checkpoint,
    TensorInfo,
    check_tensors,
    copy_folder,
    native_checkpoint,
    open_checkpoint,
    read_header,
    write_native,
)
from lcexport.compare import STEP_TOLERANCE, difference
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import BuildError
from lcexport.configs.tasks import Job
from lcexport.eager import DitEngine, dit_from_files
from lcexport.engines import Engine, backend_module, open_engine
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.files import sha256_of, write_bytes
from lcexport.engines.manifest import (
    COMPONENTS,
    DIT_CONFIG,
    WEIGHTS,
    AddedRecord,
    FileRecord,
    GraphRecord,
    SourceRecord,
    TensorRecord,
)
from lcexport.engines.trt.inspector import require_fused
from lcexport.engines.trt.runtime import TrtEngine
from lcexport.golden import against_golden, make_golden, read_golden
from lcexport.graph import (
    GraphSpec,
    onnx_from_cache,
    onnx_from_dit,
    prove_precision,
    save_graph,
)
from lcexport.graph.fused import fused_graph
from lcexport.graph.segments import depth_of
from lcexport.lora import open_merge, shares_of

Progress = Callable[[int, int], None]


def weights_stage(
    checkpoint: Checkpoint, options: BuildOptions, folder: Path, on_progress: Progress | None
) -> StageOutput:
    """The one weights file: native names, aligned, in the bundle's precision; and the config."""
    path = folder / WEIGHTS
    merge = open_merge(options.loras, checkpoint.config)
    report = write_native(
        checkpoint,
        path,
        bulk=options.precision,
        islands=options.islands,
        weights=options.weights_dtype,
        deltas=merge if options.loras else None,
        on_progress=on_progress,
    )
    config = folder / DIT_CONFIG
    config.parent.mkdir(exist_ok=True)
    write_bytes(config, (checkpoint.config.model_dump_json(indent=2) + "\n").encode())
    source = SourceRecord(
        layout=f"{checkpoint.layout}, {checkpoint.naming} names",
        dtype="+".join(sorted({info.dtype for info in checkpoint.tensors.values()})),
        tensors=len(checkpoint.tensors),
        tensors_sha256=report.tensors_sha256,
    )
    files = {
        WEIGHTS: FileRecord(bytes=report.bytes, sha256=report.sha256),
        DIT_CONFIG: file_record(config),
    }
    loras = [record.model_dump() for record in merge.records]
    return StageOutput(files=files, facts={"source": source.model_dump(), "loras": loras})


def components_stage(checkpoint: Checkpoint, folder: Path) -> StageOutput:
    """Text encoder, tokenizer, VAE and scheduler, copied and digested in one pass."""
    files = {
        f"{component}/{name}": record
        for component, source in checkpoint.components.items()
        for name, record in copy_folder(source, folder / component).items()
    }
    return StageOutput(files=files)


def open_source(options: BuildOptions) -> Checkpoint:
    """What the build starts from: the checkpoint, or with `add` the bundle and nothing else.

    A bundle holds a checkpoint of native names. Its own weights are what an added graph refers to
    and what its golden outputs are computed with, so no other checkpoint is asked for.

    Raises:
        InputError: no checkpoint there, or its tensors are not its configuration's.
        IntegrityError: with `add`, no bundle there, or a damaged one.
    """
    if options.add:
        checkpoint = open_added(options.output)
    else:
        assert options.model is not None, "BuildOptions has a model where it does not add"
        checkpoint = open_checkpoint(options.model)
    check_tensors(checkpoint)
    shares_of(options.loras, checkpoint.config)  # do the LoRAs fit? Their values come later
    return checkpoint


def open_added(folder: Path) -> Checkpoint:
    """The weights, configuration and components of a bundle, as a checkpoint."""
    bundle = open_bundle(folder)
    components = {name: folder / name for name in COMPONENTS if (folder / name).is_dir()}
    found = native_checkpoint(bundle.path(DIT_CONFIG), bundle.path(WEIGHTS))
    return replace(found, components=components)


def graph_stage(job: Job, options: BuildOptions, folder: Path) -> StageOutput:
    """Trace, assemble, save, read back, and prove the precision of what was read back.

    In float32, also the graph as ONNX Runtime wants it on processors.
    """
    config = DiTConfig.from_json(folder / DIT_CONFIG)
    spec = GraphSpec.from_job(config, job, options.batch, options.precision)
    assemble = onnx_from_cache if job.part == "cache" else onnx_from_dit
    model = assemble(config, spec, weights_in(folder), version("lcexport"))
    path = folder / graph_name(job)
    save_graph(model, path)
    saved = ir.load(path)
    proof = prove_precision(
        saved, spec.bulk, attentions=job.attentions, sparse=job.sparse_attentions
    )
    if (layers := depth_of(saved)) != config.depth:
        raise BuildError("the graph has another depth", got=layers, wanted=config.depth)
    record = GraphRecord(
        file=path.name,
        job=job,
        batch=options.batch,
        inputs=tuple(tensor_record(value) for value in saved.graph.inputs),
        outputs=tuple(tensor_record(value) for value in saved.graph.outputs),
        precision_proof=proof,
        fused=fused_name(job) if spec.bulk == torch.float32 else None,
        added=added_record(options) if options.add else None,
    )
    if record.fused:
        save_graph(fused_graph(saved, config.num_heads), folder / record.fused)
    files = {name: file_record(folder / name) for name in (record.file, record.fused) if name}
    return StageOutput(files=files, facts={"graph": record.model_dump(mode="json")})


def golden_stage(record: GraphRecord, options: BuildOptions, folder: Path) -> StageOutput:
    """Inputs from a seed, and what the eager DiT makes of them."""
    dit = dit_from_files(folder / DIT_CONFIG, folder / WEIGHTS, options.device)
    with DitEngine(dit, record, torch.device(options.device)) as engine:
        tensors = make_golden(engine, record.job.num_cond_latents)
    path = folder / golden_name(record.job)
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, save(tensors), replace=True)
    return StageOutput(files={golden_name(record.job): file_record(path)})


def engine_stage(backend: str, bundle: Bundle, job: Job, options: BuildOptions) -> StageOutput:
    """Open the backend's engine and run it once on the golden inputs against eager's outputs."""
    golden = read_golden(bundle, job.name)
    with open_engine(backend, bundle, job.name, options.device) as engine:
        # Of RTX no kernel's name is known; its compiler refuses attention that it does not fuse.
        if backend == "tensorrt" and isinstance(engine, TrtEngine):
            plans = bundle.manifest.engines[backend][job.name].plans
            require_fused(engine.inspect(), [plan.attentions for plan in plans])
        facts = check_engine(engine, golden, options)
    return StageOutput(files={}, facts=facts)


def check_engine(
    engine: Engine, golden: dict[str, torch.Tensor], options: BuildOptions
) -> dict[str, object]:
    """One call per branch; BuildError where the engine is further from eager than it may be."""
    facts: dict[str, object] = {}
    for name, made, wanted in against_golden(engine, golden):
        found = difference(made, wanted)
        facts[name] = found.as_dict()
        if not STEP_TOLERANCE[options.precision].holds(found):
            raise BuildError(
                f"the {engine.backend} engine disagrees with eager torch ({name})",
                got=found,
                wanted=STEP_TOLERANCE[options.precision],
            )
    return facts


def source_identity(checkpoint: Checkpoint) -> str:
    """A digest of headers, sizes and modification times: has this checkpoint changed since?"""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.files):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.start}\n".encode())
    digest.update(checkpoint.config.model_dump_json().encode())
    return digest.hexdigest()


def weights_in(folder: Path) -> dict[str, TensorInfo]:
    """Where each tensor lies in the bundle's weights file."""
    return read_header(folder / WEIGHTS).tensors


def added_record(options: BuildOptions) -> AddedRecord:
    """Now, with these libraries and these options. The checkpoint was the bundle itself."""
    effective = {key: value for key, value in options.effective().items() if key != "model"}
    return AddedRecord(
        created=now(),
        versions=versions(options.backends),
        device=options.device,
        effective=effective,
    )


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def file_record(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))


def tensor_record(value: ir.Value) -> TensorRecord:
    """An input or output of the saved graph, in torch's words."""
    assert value.shape is not None
    assert value.dtype is not None
    dtype = {"FLOAT": "float32", "BFLOAT16": "bfloat16", "BOOL": "bool"}[value.dtype.name]
    shape = tuple(int(dim) for dim in value.shape.numpy())
    return TensorRecord(name=str(value.name), shape=shape, dtype=dtype)


def graph_name(job: Job) -> str:
    return f"dit.{job.name}.onnx"


def fused_name(job: Job) -> str:
    return f"dit.{job.name}.ort.onnx"


def golden_name(job: Job) -> str:
    return f"golden/{job.name}.safetensors"


def versions(backends: tuple[str, ...]) -> dict[str, str]:
    """Versions of this tool and of the libraries that shaped the bundle."""
    names = ["lcexport", "torch", "onnx", "onnx-ir", "onnxscript", "safetensors"]
    found = {name: version(name) for name in names}
    if any(backend_module(backend).endswith(".ort") for backend in backends):
        import onnxruntime  # the module's own word: two distributions carry it

        found["onnxruntime"] = onnxruntime.__version__
    return found
