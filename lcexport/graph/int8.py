"""Int8 weights in a graph: each of the bulk's matrices becomes integers and scales, multiplied out.

    weight_int8 [rows, columns] int8 ─┐
    weight_scale [rows] float32 ──────┴ DequantizeLinear(axis 0) ─ (Cast to bfloat16) ─ Gemm

The product is float32 and rounded once, whatever the bulk: no engine needs a bfloat16
DequantizeLinear, and eager torch computes with the same values. Integers and scales are inputs of
the function, as the weight was, so nothing can fold them into a float copy.
"""

from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from lcexport.checkpoint import int8_names, is_island
from lcexport.checkpoint.int8 import INT8
from lcexport.graph.policy import full_name
from lcexport.graph.trace import Part


def has_int8(names: Iterable[str]) -> bool:
    """Whether a weights file with tensors of these names holds its matrices as int8."""
    return any(name.endswith(INT8) for name in names)


def inline_for_parser(model: ir.Model) -> ir.Model:
    """`model` itself, and where it has int8 weights inside, without functions.

    The parser of TensorRT for RTX 1.7 names a Dequantize layer after its node and refuses a name
    twice, so it cannot take a function with one that is called twice. Nodes are named anew, tensors
    are not.
    """
    if has_int8(model.graph.initializers):
        InlinePass()(model)
    return model


def with_int8_weights(part: Part) -> Part:
    """The part with every matrix of the bulk as two parameters instead of one."""
    function, parameters = part.function, []
    values = list(function.inputs[len(part.activations) :])
    for name, value in zip(part.parameters, values, strict=True):
        if is_quantised(function, name, value):
            parameters += dequantise(function, name, value)
        else:
            parameters.append(name)
    return replace(part, parameters=tuple(parameters))


def is_quantised(function: ir.Function, name: str, value: ir.Value) -> bool:
    """Whether a parameter is a matrix of the bulk."""
    matrix = name.endswith(".weight") and value.shape is not None and len(value.shape) == 2
    return matrix and not is_island(full_name(function, name))


def dequantise(function: ir.Function, name: str, value: ir.Value) -> tuple[str, str]:
    """Put integers and scales in the place of one input; their names."""
    assert value.shape is not None
    ((user, _),) = value.uses()
    names = int8_names(name)
    rows = ir.Shape(value.shape[:1])
    integers = ir.Value(name=names[0], shape=value.shape, type=ir.TensorType(ir.DataType.INT8))
    scale = ir.Value(name=names[1], shape=rows, type=ir.TensorType(ir.DataType.FLOAT))
    nodes = [operation("DequantizeLinear", [integers, scale], [ir.AttrInt64("axis", 0)], name)]
    if value.dtype != ir.DataType.FLOAT:
        target = ir.AttrInt64("to", int(ir.DataType(value.dtype or 0)))
        nodes.append(operation("Cast", [nodes[0].outputs[0]], [target], name))
    last = nodes[-1].outputs[0]
    last.name, last.shape, last.type = value.name, value.shape, value.type
    value.replace_all_uses_with(last)
    for node in nodes:  # right before its use: an engine need hold one float weight at a time
        function.graph.insert_before(user, node)
    index = function.inputs.index(value)
    function.inputs[index : index + 1] = [integers, scale]
    return names


def operation(kind: str, inputs: list[ir.Value], attributes: list[ir.Attr], weight: str) -> ir.Node:
    """A node that says which weight it makes."""
    node = ir.Node("", kind, inputs, attributes, num_outputs=1, name=f"{kind}_{weight}")
    node.outputs[0].name = f"{weight}.{kind}"
    return node
