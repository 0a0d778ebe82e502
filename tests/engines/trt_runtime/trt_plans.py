"""The TensorRT double, and plans for it made of a graph, in one piece or in several."""

import hashlib
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import onnx

from lcexport.engines.trt.reader import PlanFile

DOUBLE = Path(__file__).parents[2] / "doubles" / "fake_tensorrt.py"


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
