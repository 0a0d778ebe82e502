"""A bundle with a `tensorrt` engine of the test double, and what makes lcexport open it.

Nothing here is TensorRT: plans are ONNX models, run on the host. What is tested is the machinery
around them.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

import lcexport.engines.trt.backend as trt_backend
from lcexport.builder.compile import call_records, part_units, plans_folder, segment_unit
from lcexport.engines.bundle import (
    MANIFEST,
    Bundle,
    EngineRecord,
    FileRecord,
    read_manifest,
)
from lcexport.engines.files import sha256_of
from lcexport.engines.trt.memory import Workspace
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.product import Product, version_from
from lcexport.engines.trt.reader import Here, this_platform
from lcexport.engines.trt.runtime import TrtEngine
from lcexport.graph.parts import parts_of
from lcexport.graph.segments import segment_graph
from lcexport.qualify import environment, marked, run

sys.path.append(str(Path(__file__).parents[1] / "engines" / "trt_runtime"))
load_double = importlib.import_module("trt_plans").load_double
ATTENTIONS_PER_BLOCK = 2
HERE = Here("tensorrt", load_double().__version__, this_platform(), "sm90", "a double", "13.0")


def product(name: str = "tensorrt") -> Product:
    double = load_double()
    return Product("tensorrt", double, version_from(double.__version__))


def add_engine(folder: Path, resolution: str, segments: int, **settings: Any) -> None:
    """Put an engine of the double into a bundle; `settings` are those of its plans.

    No segments: its weights are shared, with one plan for each function.
    """
    manifest = read_manifest(folder)
    graph = manifest.graphs[resolution]
    place, model = plans_folder("tensorrt", resolution), ir.load(folder / graph.file)
    parts, uses = parts_of(model)
    if segments:
        units = [segment_unit(place, segment) for segment in segment_graph(model, segments)]
    else:
        units = list(part_units(place, parts, uses))
    plans, files = [], dict(manifest.files)
    for unit in units:
        name, blocks = unit.record.file, calls_of_block(unit.model)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_plan(ir.to_proto(unit.model).SerializeToString(), folder, path, **settings)
        files[name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        plans.append(unit.record.model_copy(update={"attentions": blocks * ATTENTIONS_PER_BLOCK}))
    record = EngineRecord(
        plans=tuple(plans),
        calls=() if segments else call_records(uses),
        product="tensorrt",
        version=HERE.version,
        platform=HERE.platform,
        compute_capabilities=(),
        gpu=None,
        driver=None,
        options=TrtOptions(refit=bool(settings.get("refittable"))).model_dump(mode="json"),
        verified=False,
    )
    engines = {"tensorrt": {resolution: record}}
    changed = manifest.model_copy(update={"files": files, "engines": engines})
    (folder / MANIFEST).write_text(json.dumps(changed.model_dump(mode="json")), "utf-8")


def write_plan(graph: bytes, weights: Path, path: Path, **settings: Any) -> None:
    """The double's plan of a graph whose weights lie in a folder."""
    model = onnx.load_from_string(graph)
    onnx.load_external_data_for_model(model, str(weights))
    path.write_bytes(load_double().plan_bytes(model, **settings))


def calls_of_block(model: ir.Model) -> int:
    return sum(node.op_type == "Block" for node in model.graph)


def open_engine(
    backend: str, bundle: Bundle, resolution: str, device: str, like: object = None
) -> TrtEngine:
    workspace = Workspace(load_double().HostOps())
    return trt_backend.engine_from(product(), HERE, bundle, resolution, workspace)


def compile_graph(
    name: str, graph: bytes, graph_path: Path, output: Path, *rest: object, gpu: str | None
) -> None:
    write_plan(graph, graph_path.parent, output)


def install(set_attribute: Callable[[object, str, object], None]) -> None:
    """Make the `tensorrt` backend the double, through a function like `setattr`."""
    set_attribute(trt_backend, "open_engine", open_engine)
    set_attribute(trt_backend, "require", lambda backend, precision, device: None)
    set_attribute(run, "require_gpu", lambda backend, device: None)
    set_attribute(environment, "open_product", product)
    set_attribute(marked, "open_product", product)
    set_attribute(marked, "expected", lambda segment, bulk: None)  # a proof is of bf16 graphs
    set_attribute(marked, "compile_graph", compile_graph)
    set_attribute(marked, "CudaOps", lambda device: load_double().HostOps())
