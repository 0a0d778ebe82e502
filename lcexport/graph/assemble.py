"""The main graph: one call of Embed, one of Block per layer, one of Final; or of their namesakes
that make a cache.

Every initialiser is a byte range of the bundle's one weights file. Nothing is copied, so a graph
file holds a few hundred kilobytes whatever the size of the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from lcexport.checkpoint import is_island
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import BuildError
from lcexport.engines import cache_names
from lcexport.engines.files import write_bytes
from lcexport.engines.header import TensorInfo
from lcexport.graph.int8 import has_int8, with_int8_weights
from lcexport.graph.sparse import sparse_functions
from lcexport.graph.trace import (
    DOMAIN,
    OPSET,
    GraphSpec,
    Part,
    trace_cache_parts,
    trace_parts,
)

IR_VERSION = 11  # the one that belongs to opset 23
IR_DTYPES = {"F32": ir.DataType.FLOAT, "BF16": ir.DataType.BFLOAT16, "I8": ir.DataType.INT8}
Parts = tuple[Part, Part, Part]
INT8_DTYPES = {"weight_int8": ir.DataType.INT8, "weight_scale": ir.DataType.FLOAT}
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
    parts = as_stored(trace_parts(config, spec), weights)
    values = initializers(weights, wanted_weights(parts, config, ""), spec)
    if left := sorted(set(weights) - set(values)):
        raise BuildError("the weights file holds tensors no graph uses", got=left[:5])
    embed, block, final = parts
    inputs = [graph_input(value) for value in embed.function.inputs[: len(embed.activations)]]
    nodes = [call(embed, "embed", inputs, (values[name] for name in embed.parameters))]
    x, text, time, cos, sin, *mask = nodes[0].outputs
    for layer in range(config.depth):
        past = cached_inputs(block, layer) if spec.geometry.cached_latents else []
        inputs += past
        arguments = [x, text, time, cos, sin, *mask, *past]
        nodes.append(call_layer(block, layer, arguments, values))
        x = nodes[-1].outputs[0]
    parameters = (values[f"final_layer.{name}"] for name in final.parameters)
    nodes.append(call(final, "final_layer", [x, time], parameters))
    velocity = nodes[-1].outputs[0]
    velocity.name = "velocity"
    return model_of(inputs, [velocity], nodes, values, parts, producer_version)


def onnx_from_cache(
    config: DiTConfig, spec: GraphSpec, weights: Mapping[str, TensorInfo], producer_version: str
) -> ir.Model:
    """The graph that makes the key/value cache of clean frames; otherwise as `onnx_from_dit`."""
    parts = as_stored(trace_cache_parts(config, spec), weights)
    last_layer = f"blocks.{config.depth - 1}."
    values = initializers(weights, wanted_weights(parts, config, last_layer), spec)
    embed, block, last = parts
    inputs = [graph_input(value) for value in embed.function.inputs[: len(embed.activations)]]
    nodes = [call(embed, "embed", inputs, (values[name] for name in embed.parameters))]
    x, time, cos, sin = nodes[0].outputs
    outputs = []
    for layer in range(config.depth):
        part, arguments = (block, [x, time, cos, sin])
        if layer == config.depth - 1:
            part, arguments = (last, [x, time])
        nodes.append(call_layer(part, layer, arguments, values))
        x, *made = nodes[-1].outputs if part is block else (x, *nodes[-1].outputs)
        for value, name in zip(made, cache_names(layer), strict=True):
            value.name = name
        outputs += made
    used = parts if config.depth > 1 else (embed, last)
    return model_of(inputs, outputs, nodes, values, used, producer_version)


def as_stored(parts: Parts, weights: Iterable[str]) -> Parts:
    """The parts with parameters as the weights file has them: of int8 matrices, two for one."""
    if not has_int8(weights):
        return parts
    first, block, last = map(with_int8_weights, parts)
    return first, block, last


def model_of(
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    values: Mapping[str, ir.Value],
    parts: Iterable[Part],
    producer_version: str,
) -> ir.Model:
    """The calls as a model."""
    graph = ir.Graph(
        inputs,
        outputs,
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
        functions=[
            *(f for part in parts for f in sparse_functions(part.function)),
            *(part.function for part in parts),
        ],
    )


def cached_inputs(block: Part, layer: int) -> list[ir.Value]:
    """The graph's inputs for one layer's keys and values, typed as the function's."""
    formal = block.function.inputs[: len(block.activations)]
    return [
        ir.Value(name=name, shape=value.shape, type=value.type)
        for name, value in zip(cache_names(layer), formal[-2:], strict=True)
    ]


def call_layer(
    part: Part, layer: int, arguments: Iterable[ir.Value], values: Mapping[str, ir.Value]
) -> ir.Node:
    parameters = (values[f"blocks.{layer}.{name}"] for name in part.parameters)
    return call(part, f"blocks.{layer}", arguments, parameters)


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


def wanted_weights(parts: Parts, config: DiTConfig, last_layer: str) -> dict[str, ir.Value]:
    """Native name -> the traced parameter, for every call.

    `last_layer` is the prefix of the last part's weights where that part is a layer.
    """
    first, block, last = parts
    layers = config.depth - bool(last_layer)
    wanted = dict(parameters_of(first))
    for layer in range(layers):
        wanted |= {f"blocks.{layer}.{name}": value for name, value in parameters_of(block)}
    prefix = last_layer or "final_layer."
    return wanted | {f"{prefix}{name}": value for name, value in parameters_of(last)}


def initializers(
    weights: Mapping[str, TensorInfo], wanted: Mapping[str, ir.Value], spec: GraphSpec
) -> dict[str, ir.Value]:
    """The wanted parameters as values that are byte ranges of the weights file.

    Raises:
        BuildError: one is not in the file with the traced shape and the policy's dtype.
    """
    values = {}
    for name, value in wanted.items():
        tensor = external_tensor(weights[name]) if name in weights else None
        dtype = INT8_DTYPES.get(name.rpartition(".")[2]) or (
            ir.DataType.FLOAT if is_island(name) else TORCH_DTYPES[spec.bulk]
        )
        if tensor is None or tensor.shape != value.shape or tensor.dtype != dtype:
            raise BuildError(
                f"the weights file does not fit the graph: {name}",
                got="nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}",
                wanted=f"{dtype} {value.shape}",
            )
        values[name] = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return values


def parameters_of(part: Part) -> Iterable[tuple[str, ir.Value]]:
    """(name, typed value) of a function's parameters."""
    return zip(part.parameters, part.function.inputs[len(part.activations) :], strict=True)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the graph, whole or not at all; the weights it refers to stay where they are."""
    write_bytes(path, ir.to_proto(model).SerializeToString(deterministic=True), replace=True)
