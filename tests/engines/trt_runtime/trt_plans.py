"""The TensorRT double, and plans for it: of a graph, in pieces, or for a bundle's graphs."""

import hashlib
import importlib.util
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from lcexport.builder.compile import call_records, part_units, plans_folder, segment_unit
from lcexport.engines.bundle import Bundle
from lcexport.engines.files import write_bytes
from lcexport.engines.manifest import (
    MANIFEST,
    EngineRecord,
    FileRecord,
    manifest_json,
    read_manifest,
)
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.reader import Here, PlanFile, this_platform
from lcexport.graph.parts import parts_of
from lcexport.graph.segments import segment_graph

DOUBLE = Path(__file__).parents[2] / "doubles" / "fake_tensorrt.py"
ATTENTIONS_PER_BLOCK = 2


def load_double() -> Any:
    """The module of that file, once."""
    if "fake_tensorrt" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fake_tensorrt", DOUBLE)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["fake_tensorrt"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["fake_tensorrt"]


def split(model: onnx.ModelProto, parts: int) -> list[onnx.ModelProto]:
    """The graph's calls in `parts` consecutive runs; what one makes for another is in and out."""
    graph = model.graph
    known = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = list(graph.node)
    bounds = [round(part * len(nodes) / parts) for part in range(parts + 1)]
    final = {value.name for value in graph.output}
    models = []
    for first, last in itertools.pairwise(bounds):
        own, later = nodes[first:last], nodes[last:]
        made = [name for node in own for name in node.output]
        used = dict.fromkeys(name for node in own for name in node.input)
        wanted = final | {name for node in later for name in node.input}
        inputs = [known[name] for name in used if name not in weights and name not in made]
        outputs = [known[name] for name in made if name in wanted]
        kept = [weights[name] for name in used if name in weights]
        piece = onnx.helper.make_graph(own, f"segment-{first}", inputs, outputs, kept)
        part = onnx.helper.make_model(piece, opset_imports=model.opset_import)
        part.ir_version = model.ir_version
        part.functions.extend(model.functions)
        models.append(part)
    return models


def plan_file(path: Path) -> PlanFile:
    """What a manifest would say of a plan."""
    data = path.read_bytes()
    return PlanFile(path, len(data), hashlib.sha256(data).hexdigest())


def write_plans(graph: Path, folder: Path, segments: int, **settings: Any) -> list[PlanFile]:
    """A graph's plans; `settings` are those of the double's `plan_bytes`."""
    files = []
    for number, piece in enumerate(split(onnx.load(graph), segments)):
        path = folder / f"segment-{number}.plan"
        path.write_bytes(load_double().plan_bytes(piece, **settings))
        files.append(plan_file(path))
    return files


HERE = Here("tensorrt", load_double().__version__, this_platform(), "sm90", "a double", "13.0")


def with_plans(source: Path, folder: Path, segments: int, **settings: Any) -> Bundle:
    """A copy of a bundle in a new folder, with an engine for each graph: see `add_engine`."""
    shutil.copytree(source, folder)
    for name in read_manifest(folder).graphs:
        add_engine(folder, name, segments, **settings)
    return Bundle(folder, read_manifest(folder))


def add_engine(folder: Path, name: str, segments: int, **settings: Any) -> None:
    """Put an engine for a graph into a bundle; `settings` are those of `plan_bytes`.

    No segments: its weights are shared, with one plan for each function.
    """
    manifest = read_manifest(folder)
    place, model = plans_folder("tensorrt", name), ir.load(folder / manifest.graphs[name].file)
    parts, uses = parts_of(model)
    if segments:
        units = [segment_unit(place, segment) for segment in segment_graph(model, segments)]
    else:
        units = list(part_units(place, parts, uses))
    plans, files = [], dict(manifest.files)
    for unit in units:
        path = folder / unit.record.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_plan(ir.to_proto(unit.model).SerializeToString(), folder, path, **settings)
        made = plan_file(path)
        files[unit.record.file] = FileRecord(bytes=made.bytes, sha256=made.sha256)
        blocks = sum(node.op_type == "Block" for node in unit.model.graph)
        plans.append(unit.record.model_copy(update={"attentions": blocks * ATTENTIONS_PER_BLOCK}))
    record = EngineRecord(
        plans=tuple(plans),
        calls=() if segments else call_records(uses),
        product="tensorrt",
        version=HERE.version,
        platform=HERE.platform,
        compute_capabilities=(HERE.compute_capability,),
        gpu=HERE.gpu,
        driver=HERE.driver,
        options=TrtOptions(refit=bool(settings.get("refittable"))).model_dump(mode="json"),
        verified=False,
    )
    engines = {"tensorrt": {**manifest.engines.get("tensorrt", {}), name: record}}
    changed = manifest.model_copy(update={"files": files, "engines": engines})
    write_bytes(folder / MANIFEST, manifest_json(changed), replace=True)


def write_plan(graph: bytes, weights: Path, path: Path, **settings: Any) -> None:
    """The plan of a graph whose weights lie in a folder."""
    model = onnx.load_from_string(graph)
    onnx.load_external_data_for_model(model, str(weights))
    path.write_bytes(load_double().plan_bytes(model, **settings))
