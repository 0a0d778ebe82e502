"""The stages of a build, each a function from what exists to the files it adds."""

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import save

from lcexport.builder.options import BuildOptions
from lcexport.builder.staging import StageOutput
from lcexport.checkpoint import Checkpoint, TensorInfo, read_header, write_native
from lcexport.compare import STEP_TOLERANCE, difference
from lcexport.configs import Preset
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import BuildError, InputError
from lcexport.dit import Geometry
from lcexport.eager import DitEngine, dit_from_files
from lcexport.engines import Engine, backend_module, open_engine
from lcexport.engines.bundle import (
    COMPONENTS,
    DIT_CONFIG,
    WEIGHTS,
    Bundle,
    FileRecord,
    GraphRecord,
    SourceRecord,
    TensorRecord,
)
from lcexport.engines.files import CHUNK_BYTES, new_file, sha256_of, write_bytes
from lcexport.golden import make_golden, read_golden, run_branch
from lcexport.graph import GraphSpec, onnx_from_dit, prove_precision, save_graph

# Component -> its configuration, and whether it has weights.
COMPONENT_FILES = {
    "text_encoder": ("config.json", True),
    "tokenizer": ("tokenizer_config.json", False),
    "vae": ("config.json", True),
    "scheduler": ("scheduler_config.json", False),
}
BULK = {"fp32": torch.float32, "bf16": torch.bfloat16}
Progress = Callable[[int, int], None]


def weights_stage(
    checkpoint: Checkpoint, options: BuildOptions, folder: Path, on_progress: Progress | None
) -> StageOutput:
    """The one weights file: native names, aligned, in the bundle's precision; and the config."""
    path = folder / WEIGHTS
    report = write_native(
        checkpoint,
        path,
        bulk=options.precision,
        islands=options.islands,
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
    return StageOutput(files=files, facts={"source": source.model_dump()})


def components_stage(checkpoint: Checkpoint, folder: Path) -> StageOutput:
    """Text encoder, tokenizer, VAE and scheduler, copied and digested in one pass."""
    files: dict[str, FileRecord] = {}
    for component, source in checkpoint.components.items():
        for path in sorted(source.rglob("*")):
            relative = Path(component) / path.relative_to(source)
            if path.is_symlink() and not path.exists():
                raise InputError(f"{path} is a link to nothing", do="Complete the download.")
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                files[relative.as_posix()] = copy_hashed(path, folder / relative)
    return StageOutput(files=files)


def require_components(checkpoint: Checkpoint) -> None:
    """A bundle that generates needs more than the DiT, and needs it whole.

    Raises:
        InputError: a component is missing, has no configuration or no weights, or a weight file
            is damaged; names it.
    """
    missing = [name for name in COMPONENTS if name not in checkpoint.components]
    if missing:
        raise InputError(
            f"the checkpoint {checkpoint.folder} has no {', '.join(missing)}",
            wanted=f"folders {', '.join(COMPONENTS)} beside the DiT",
            do="Complete the download, or export the DiT alone with --only export.",
        )
    for source in checkpoint.components.values():
        for path in source.rglob("*"):
            if path.is_symlink() and not path.exists():
                raise InputError(f"{path} is a link to nothing", do="Download it again.")
    for component, (config, weighty) in COMPONENT_FILES.items():
        folder = checkpoint.components[component]
        weights = sorted(folder.glob("*.safetensors"))
        wanted = config if (folder / config).is_file() else None
        if wanted is None or (weighty and not weights):
            raise InputError(
                f"{folder} is incomplete",
                wanted=config if wanted is None else "weights in a .safetensors file",
                do="Download it again.",
            )
        for path in weights:
            read_header(path)


def graph_stage(preset: Preset, options: BuildOptions, folder: Path) -> StageOutput:
    """Trace, assemble, save, read back, and prove the precision of what was read back."""
    config = DiTConfig.from_json(folder / DIT_CONFIG)
    _, frames, height, width = preset.latent_shape
    geometry = Geometry(options.batch, frames, height // 2, width // 2)
    spec = GraphSpec(geometry, preset.text_tokens, BULK[options.precision])
    model = onnx_from_dit(config, spec, weights_in(folder), version("lcexport"))
    path = folder / graph_name(preset)
    save_graph(model, path)
    saved = ir.load(path)
    proof = prove_precision(saved, spec.bulk)
    if proof["calls_of_block"] != config.depth:
        raise BuildError("the graph has another depth", got=proof["calls_of_block"])
    record = GraphRecord(
        file=path.name,
        preset=preset,
        batch=options.batch,
        num_cond_latents=geometry.num_cond_latents,
        inputs=tuple(tensor_record(value) for value in saved.graph.inputs),
        outputs=tuple(tensor_record(value) for value in saved.graph.outputs),
        precision_proof=proof,
    )
    files = {path.name: file_record(path)}
    return StageOutput(files=files, facts={"graph": record.model_dump(mode="json")})


def golden_stage(
    preset: Preset, record: GraphRecord, options: BuildOptions, folder: Path
) -> StageOutput:
    """Inputs from a seed, and what the eager DiT makes of them."""
    dit = dit_from_files(folder / DIT_CONFIG, folder / WEIGHTS, options.device)
    with DitEngine(dit, record, torch.device(options.device)) as engine:
        tensors = make_golden(engine)
    path = folder / golden_name(preset)
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, save(tensors), replace=True)
    return StageOutput(files={golden_name(preset): file_record(path)})


def engine_stage(
    backend: str, bundle: Bundle, preset: Preset, options: BuildOptions
) -> StageOutput:
    """Open the backend's engine and run it once on the golden inputs against eager's outputs."""
    golden = read_golden(bundle, preset.name)
    with open_engine(backend, bundle, preset.name, options.device) as engine:
        facts = check_engine(engine, golden, options)
    return StageOutput(files={}, facts=facts)


def check_engine(
    engine: Engine, golden: dict[str, torch.Tensor], options: BuildOptions
) -> dict[str, object]:
    """One call per branch; BuildError where the engine is further from eager than it may be."""
    facts: dict[str, object] = {}
    for branch in ("cond", "uncond"):
        found = difference(run_branch(engine, golden, branch), golden[f"velocity_{branch}"])
        facts[branch] = found.as_dict()
        if not STEP_TOLERANCE[options.precision].holds(found):
            raise BuildError(
                f"the {engine.backend} engine disagrees with eager torch ({branch})",
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


def copy_hashed(source: Path, target: Path) -> FileRecord:
    """Copy a file, following links, and digest it on the way."""
    digest, size = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        reader = source.open("rb")
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error
    with reader, new_file(target) as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            size += writer.write(chunk)
    shutil.copymode(source, target)
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def file_record(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))


def tensor_record(value: ir.Value) -> TensorRecord:
    """An input or output of the saved graph, in torch's words."""
    assert value.shape is not None
    assert value.dtype is not None
    dtype = {"FLOAT": "float32", "BOOL": "bool"}[value.dtype.name]
    shape = tuple(int(dim) for dim in value.shape.numpy())
    return TensorRecord(name=str(value.name), shape=shape, dtype=dtype)


def graph_name(preset: Preset) -> str:
    return f"dit.{preset.name}.onnx"


def golden_name(preset: Preset) -> str:
    return f"golden/{preset.name}.safetensors"


def versions(backends: tuple[str, ...]) -> dict[str, str]:
    """Versions of this tool and of the libraries that shaped the bundle."""
    names = ["lcexport", "torch", "onnx", "onnx-ir", "onnxscript", "safetensors"]
    found = {name: version(name) for name in names}
    if any(backend_module(backend).endswith(".ort") for backend in backends):
        import onnxruntime  # the module's own word: two distributions carry it

        found["onnxruntime"] = onnxruntime.__version__
    return found
