"""Compiling a graph's parts with AOTInductor, each a stage of its own and in a process of its own.

The packages' inputs, weights, outputs and uses are those of the ONNX graph's functions, so that the
manifest describes them as it does TensorRT's plans with shared weights.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from lcexport.builder.compile import call_records, part_units, plans_folder
from lcexport.builder.options import BuildOptions
from lcexport.builder.stages import file_record
from lcexport.builder.staging import DoneStage, StageOutput
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import IncompatibleError
from lcexport.configs.tasks import Job
from lcexport.engines.aoti_target import BACKEND, compute_capability, cpu_features
from lcexport.engines.files import publish, resource_errors, sync_folder
from lcexport.engines.manifest import DIT_CONFIG, EngineRecord, GraphRecord, PlanRecord
from lcexport.engines.trt.memory import gpu_of
from lcexport.engines.trt.reader import this_platform
from lcexport.engines.trt.worker import child, child_environment, converse, private_folder
from lcexport.graph.parts import parts_of

Stage = Callable[[str, Callable[[], StageOutput]], DoneStage]
COMMAND = (sys.executable, "-P", "-c", "from lcexport.builder.aoti_worker import main; main()")
SUFFIX = ".pt2"
ADVICE = (
    "Free some memory: a part needs 1 to 2 GB, whatever the size of the model.",
    "Try another version of torch or of the C++ compiler.",
)


def require_packages(jobs: Iterable[Job]) -> None:
    """Refuse now what compiling would refuse after the weights.

    Raises:
        IncompatibleError: no C++ compiler, or a graph with block-sparse attention.
    """
    cxx()
    if sparse := [job.name for job in jobs if job.sparse]:
        raise IncompatibleError(
            f"{BACKEND} has no block-sparse attention",
            got=", ".join(sparse),
            do="Build with --dense, or use --backend onnxruntime or tensorrt.",
        )


def cxx() -> str:
    """The C++ compiler that torch will use. IncompatibleError: there is none."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise IncompatibleError(
            f"{BACKEND} compiles C++, and there is no compiler",
            got=f"no {name} on the PATH",
            do="Install one (apt-get install g++, or dnf install gcc-c++), or name yours in $CXX.",
        )
    return path


def compile_packages(
    stage: Stage, folder: Path, graph: GraphRecord, options: BuildOptions
) -> tuple[EngineRecord, list[DoneStage]]:
    """Compile every part of `graph`; the record, and the stages it took."""
    parts, uses = parts_of(ir.load(folder / graph.file))
    place = plans_folder(BACKEND, graph.name)
    units = list(part_units(place, parts, uses, SUFFIX))
    done = []
    for number, (part, unit) in enumerate(zip(parts, units, strict=True), start=1):
        name = f"compile:{BACKEND}:{graph.name}:{number}/{len(units)}"
        work = partial(compile_part, folder, graph, part.name, unit.record, options)
        done.append(stage(name, work))
    plans = tuple(PlanRecord.model_validate(stage.output.facts["plan"]) for stage in done)
    record = EngineRecord(plans=plans, calls=call_records(uses), **compiled_for(options))
    return record, done


def compiled_for(options: BuildOptions) -> dict[str, Any]:
    """What the manifest says of packages compiled now: by what, and for what."""
    device = torch.device(options.device)
    return {
        "product": BACKEND,
        "version": str(torch.__version__),
        "platform": this_platform(),
        "compute_capabilities": compute_capability(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": None,
        "options": {"device": device.type, "cpu_features": cpu_features()},
        "verified": False,
    }


def compile_part(
    folder: Path, graph: GraphRecord, name: str, record: PlanRecord, options: BuildOptions
) -> StageOutput:
    """One package of the DiT."""
    request = {
        "config": DiTConfig.from_json(folder / DIT_CONFIG).model_dump(mode="json"),
        "job": graph.job.model_dump(mode="json"),
        "batch": graph.batch,
        "precision": options.precision,
        "part": name,
        "weights": [tensor.name for tensor in record.weights],
    }
    made = make_package(folder / record.file, request, options)
    record = record.model_copy(update={"attentions": made["attentions"]})
    return package_output(folder, record, made)


def make_package(path: Path, request: dict[str, Any], options: BuildOptions) -> dict[str, Any]:
    """One package, compiled in a process of its own; what that process reports."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # what a killed stage left under its final name
    device = torch.device(options.device)
    with private_folder(path) as place, tempfile.TemporaryFile() as stderr:
        request = {**request, "device": device.type, "folder": str(place), "graph_bytes": 0}
        with child(stderr, COMMAND, child_environment(gpu_of(device))) as process:
            made = converse(process, stderr, request, b"", None, None, ADVICE)
        assert isinstance(made, dict)
        with resource_errors(path):
            publish(Path(made["package"]), path)
            sync_folder(path.parent)
    return made


def package_output(folder: Path, record: PlanRecord, made: dict[str, Any]) -> StageOutput:
    """The stage's file, record and cost."""
    return StageOutput(
        files={record.file: file_record(folder / record.file)},
        facts={"plan": record.model_dump(mode="json")},
        child_peak_rss_bytes=made["peak_rss_bytes"],
    )
