"""An ONNX model around compiled plans, so that ONNX Runtime can run them.

Each plan is one `EPContext` node (domain com.microsoft): no weights and no operations, but the
plan's path and the names of its inputs and outputs. The execution provider named in `source` takes
the node and deserialises the file. The attributes and what is checked of them are those of ONNX
Runtime 1.31 (core/graph/contrib_ops, core/providers/tensorrt/onnx_ctx_model_helper.cc) and of
NVIDIA's TensorRT-RTX-EP-ABI 0.5.
"""

from collections.abc import Iterable
from pathlib import PurePosixPath

import onnx_ir as ir

from lcexport.configs.errors import BuildError, UsageError
from lcexport.engines import PROVIDERS, TensorRT
from lcexport.engines.manifest import EngineRecord, GraphRecord, PlanRecord, TensorRecord
from lcexport.graph.assemble import IR_VERSION
from lcexport.graph.trace import OPSET

DOMAIN = "com.microsoft"
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "bool": ir.DataType.BOOL,
}


def wrap_plans(
    backend: TensorRT, engine: EngineRecord, graph: GraphRecord, producer_version: str
) -> ir.Model:
    """A model with the graph's inputs and outputs and one EPContext node per plan.

    It belongs in the folder that the plans' names are relative to: the bundle.

    Raises:
        UsageError: several plans for TensorRT's provider, which takes a model of one node.
        BuildError: a plan needs what no plan before it computes, or lies elsewhere.
    """
    if backend == "tensorrt" and len(engine.plans) != 1:
        raise UsageError(
            "ONNX Runtime's TensorRT provider runs one plan, not a row of them",
            got=f"{len(engine.plans)} plans",
            do="Build with --segments 1.",
        )
    inputs = [value_of(tensor) for tensor in graph.inputs]
    values = {str(value.name): value for value in inputs}
    nodes = []
    for index, plan in enumerate(engine.plans):
        name = f"lcexport_{backend}_{graph.name}_{index:02d}"
        node = plan_node(name, backend, engine, plan, graph.file, values)
        values.update({str(value.name): value for value in node.outputs})
        nodes.append(node)
    wrapped = ir.Graph(
        inputs,
        look_up(values, graph.outputs, "the graph"),
        nodes=nodes,
        opset_imports={"": OPSET, DOMAIN: 1},
        name=f"{graph.name}_{backend}",
    )
    return ir.Model(
        wrapped,
        ir_version=IR_VERSION,
        producer_name="lcexport",
        producer_version=producer_version,
    )


def plan_node(
    name: str,
    backend: TensorRT,
    engine: EngineRecord,
    plan: PlanRecord,
    graph_file: str,
    values: dict[str, ir.Value],
) -> ir.Node:
    """One plan as a node. `name` must be unlike any other: the plug-in names its cache after it."""
    if PurePosixPath(plan.file).is_absolute() or ".." in plan.file:
        raise BuildError("ONNX Runtime reads plans beside or below the model", got=plan.file)
    attributes: dict[str, int | str] = {
        "main_context": 1,
        "embed_mode": 0,  # a path: one protobuf message cannot hold a plan of over 2 GB
        "ep_cache_context": plan.file,
        "source": PROVIDERS[backend],
        "ep_sdk_version": engine.version,
        "hardware_architecture": architecture(engine),
        "partition_name": name,
        "onnx_model_filename": graph_file,
    }
    return ir.Node(
        DOMAIN,
        "EPContext",
        look_up(values, plan.inputs, plan.file),
        [attribute_of(key, value) for key, value in attributes.items() if value != ""],
        outputs=[value_of(tensor) for tensor in plan.outputs],
        name=name,
    )


def architecture(engine: EngineRecord) -> str:
    """What TensorRT's provider compares its GPU with, "90" or "80+"; for RTX, every target."""
    if engine.options.get("hardware_compatibility") == "ampere_plus":
        return "80+"
    return ",".join(target.removeprefix("sm") for target in engine.compute_capabilities)


def attribute_of(name: str, value: int | str) -> ir.Attr:
    return ir.AttrString(name, value) if isinstance(value, str) else ir.AttrInt64(name, value)


def look_up(
    values: dict[str, ir.Value], tensors: Iterable[TensorRecord], where: str
) -> list[ir.Value]:
    """The values of these names, shapes and dtypes."""
    found = []
    for tensor in tensors:
        value = values.get(tensor.name)
        if value is None or value.dtype != DTYPES[tensor.dtype] or value.shape != tensor.shape:
            raise BuildError(
                f"{where} needs {tensor.name}, which no plan before it computes so",
                got="nothing" if value is None else f"{value.dtype} {value.shape}",
                wanted=f"{tensor.dtype} {list(tensor.shape)}",
            )
        found.append(value)
    return found


def value_of(tensor: TensorRecord) -> ir.Value:
    dtype = ir.TensorType(DTYPES[tensor.dtype])
    return ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=dtype)
