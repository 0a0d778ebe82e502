"""A bundle with a `tensorrt` engine of the test double, and what makes lcexport open it.

Nothing here is TensorRT: plans are ONNX models, run on the host. What is tested is the machinery
around them.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import lcexport.engines.trt.backend as trt_backend
from lcexport import machine
from lcexport.engines.bundle import Bundle
from lcexport.engines.trt.memory import Workspace
from lcexport.engines.trt.product import Product, version_from
from lcexport.engines.trt.runtime import TrtEngine
from lcexport.qualify import marked, run

sys.path.append(str(Path(__file__).parents[1] / "engines" / "trt_runtime"))
trt_plans = importlib.import_module("trt_plans")
load_double, add_engine = trt_plans.load_double, trt_plans.add_engine


def product(name: str = "tensorrt") -> Product:
    double = load_double()
    return Product("tensorrt", double, version_from(double.__version__))


def open_engine(
    backend: str, bundle: Bundle, resolution: str, device: str, like: object = None
) -> TrtEngine:
    workspace = Workspace(load_double().HostOps())
    return trt_backend.engine_from(product(), trt_plans.HERE, bundle, resolution, workspace)


def compile_graph(
    name: str, graph: bytes, graph_path: Path, output: Path, *rest: object, gpu: str | None
) -> None:
    trt_plans.write_plan(graph, graph_path.parent, output)


def install(set_attribute: Callable[[object, str, object], None]) -> None:
    """Make the `tensorrt` backend the double, through a function like `setattr`."""
    set_attribute(trt_backend, "open_engine", open_engine)
    set_attribute(trt_backend, "require", lambda backend, precision, device: None)
    set_attribute(run, "require_gpu", lambda backend, device: None)
    set_attribute(machine, "open_product", product)
    set_attribute(marked, "open_product", product)
    set_attribute(marked, "expected", lambda segment, bulk, job: None)  # a proof is of bf16 graphs
    set_attribute(marked, "compile_graph", compile_graph)
    set_attribute(marked, "CudaOps", lambda device: load_double().HostOps())
