"""The main graph: one call of Embed, one of Block per layer, one of Final.

Every initialiser is a byte range of the bundle's one weights file. Nothing is copied, so a graph
file holds a few hundred kilobytes whatever the size of the model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from lcexport.checkpoint import is_island
from lcexport.checkpoint.header import TensorInfo
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import BuildError
from lcexport.engines.files import write_bytes
from lcexport.graph.trace import DOMAIN, OPSET, GraphSpec, Part, trace_parts

IR_VERSION = 11  # the one that belongs to opset 23
IR_DTYPES = {"F32": ir.DataType.FLOAT, "BF16": ir.DataType.BFLOAT16}
TORCH_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.bfloat16: ir.DataType.BFLOAT16}


def onnx_from_dit(
    config: DiTConfig, spec: GraphSpec, weights: Mapping[str, TensorInfo], producer_version: str
) -> ir.Model:
    """Trace the DiT at `spec` and assemble its graph over the file that holds `weights`.

    Args:
        weights: native name -> where the tensor lies in the weights file.

    Raises:
        BuildError: the weights file lacks a tensor, or holds it in another dtype or shape.
    """
    embed, block, final = trace_parts(config, spec)
    initializers = {name: external_tensor(info) for name, info in weights.items()}
    check_initializers(initializers, (embed, block, final), config, spec)
    values = {
        name: ir.Value(
            name=name,
            shape=tensor.shape,
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        for name, tensor in initializers.items()
    }
    inputs = [graph_input(value) for value in embed.function.inputs[: len(embed.activations)]]
    nodes = [call(embed, "embed", inputs, (values[name] for name in embed.parameters))]
    x, text, time, cos, sin, *mask = nodes[0].outputs
    for layer in range(config.depth):
        parameters = (values[f"blocks.{layer}.{name}"] for name in block.parameters)
        node = call(block, f"blocks.{layer}", [x, text, time, cos, sin, *mask], parameters)
        x = node.outputs[0]
        nodes.append(node)
    parameters = (values[f"final_layer.{name}"] for name in final.parameters)
    nodes.append(call(final, "final_layer", [x, time], parameters))
    velocity = nodes[-1].outputs[0]
    velocity.name = "velocity"
    graph = ir.Graph(
        inputs,
        [velocity],
        nodes=nodes,
        initializers=list(values.values()),
        opset_imports={"": OPSET, DOMAIN: 1},
        name="LongCatDiT",
    )
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="lcexport",
        producer_version=producer_version,
        functions=[part.function for part in (embed, block, final)],
    )


def external_tensor(info: TensorInfo) -> ir.ExternalTensor:
    """An initialiser that is a byte range of the weights file."""
    return ir.ExternalTensor(
        location=info.path.name,
        offset=info.start,
        length=info.end - info.start,
        dtype=IR_DTYPES[info.dtype],
        shape=ir.Shape(info.shape),
        name=info.name,
        base_dir=str(info.path.parent),
    )


def graph_input(value: ir.Value) -> ir.Value:
    """An input of the main graph with the name, shape and type of a function's input."""
    return ir.Value(name=value.name, shape=value.shape, type=value.type)


def call(
    part: Part, name: str, activations: Iterable[ir.Value], parameters: Iterable[ir.Value]
) -> ir.Node:
    """A node that calls the part's function, with typed and named outputs."""
    outputs = [
        ir.Value(name=f"{name}.{output.name}", shape=output.shape, type=output.type)
        for output in part.outputs
    ]
    return ir.Node(
        DOMAIN,
        part.function.name,
        [*activations, *parameters],
        outputs=outputs,
        name=name,
    )


def check_initializers(
    initializers: Mapping[str, ir.ExternalTensor],
    parts: tuple[Part, Part, Part],
    config: DiTConfig,
    spec: GraphSpec,
) -> None:
    """Every parameter of every call is in the file with the traced shape and the policy's dtype."""
    embed, block, final = parts
    wanted = dict(parameters_of(embed))
    wanted |= {f"final_layer.{name}": value for name, value in parameters_of(final)}
    for layer in range(config.depth):
        wanted |= {f"blocks.{layer}.{name}": value for name, value in parameters_of(block)}
    for name, value in wanted.items():
        tensor = initializers.get(name)
        dtype = ir.DataType.FLOAT if is_island(name) else TORCH_DTYPES[spec.bulk]
        if tensor is None or tensor.shape != value.shape or tensor.dtype != dtype:
            raise BuildError(
                f"the weights file does not fit the graph: {name}",
                got="nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}",
                wanted=f"{dtype} {value.shape}",
            )
    if left := sorted(set(initializers) - set(wanted)):
        raise BuildError("the weights file holds tensors no graph uses", got=left[:5])


def parameters_of(part: Part) -> Iterable[tuple[str, ir.Value]]:
    """(name, typed value) of a function's parameters."""
    return zip(part.parameters, part.function.inputs[len(part.activations) :], strict=True)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph, whole or not at all; the weights it refers to stay where they are."""
    write_bytes(path, ir.to_proto(model).SerializeToString(deterministic=True), replace=True)
