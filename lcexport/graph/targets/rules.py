"""The rules of one node, given the inferred types of the values around it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lcexport.graph.targets.tables import (
    CONTROL_FLOW,
    DATA,
    DATA_INPUT,
    MAX_RANK,
    MAX_VOLUME,
    OPERATORS,
    SAME_TYPES,
    STORED,
    Limits,
)

INT64, UNDEFINED = ir.DataType.INT64, ir.DataType.UNDEFINED
FLOAT = ir.DataType.FLOAT
Types = Mapping[str, tuple[ir.DataType, tuple[int, ...]]]
Reasons = Iterator[tuple[str, str]]  # (rule, reason)


@dataclass(frozen=True)
class Violation:
    """One breach of our rules: what a target may refuse, or compile into what is not meant.

    `node` is a node of `function`, or of the main graph where that is empty; it is the name of
    the value where the fault is an input's, an output's or an initialiser's.
    """

    node: str
    function: str
    rule: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.function}: {self.node}" if self.function else self.node
        return f"{where}: {self.reason} [{self.rule}]"


def node_name(node: ir.Node) -> str:
    """A node's name, or what finds it where it has none."""
    return node.name or f"{node.op_type} of {', '.join(str(v.name) for v in node.outputs)}"


def operator_reasons(node: ir.Node, limits: Limits) -> Reasons:
    """Whether the target has the operator at all."""
    if node.op_type in CONTROL_FLOW and not node.domain:
        yield "control-flow", f"the types inside the branches of {node.op_type} are not proven"
        if any(inner.op_type == "Attention" for inner in nodes_inside(node)):
            yield "attention", f"Attention inside {node.op_type} was seen not to build"
    elif node.domain not in ("", "ai.onnx"):
        yield "operator", f"{node.domain}.{node.op_type} would need a plugin"
    elif node.op_type in limits.missing:
        yield "operator", f"{node.op_type} is missing from early versions of the target"
    elif node.op_type not in OPERATORS and node.op_type != "Constant":
        yield "operator", f"{node.op_type} is not an operator known to parse and build"


def nodes_inside(node: ir.Node) -> Iterator[ir.Node]:
    """Every node of a node's subgraphs, at any depth."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield inner
                yield from nodes_inside(inner)


def type_reasons(node: ir.Node, types: Types) -> Reasons:
    """The operator takes the type of its data, and no types are mixed where ONNX allows it."""
    index = DATA_INPUT.get(node.op_type, 0)
    data = node.inputs[index] if index < len(node.inputs) else None
    found = type_of(data, types)
    allowed = OPERATORS.get(node.op_type, frozenset())
    if found is not None and found in DATA | STORED and found not in allowed:
        yield "type", f"{found.name} is not among the types our rules allow for {node.op_type}"
    if node.op_type in SAME_TYPES:
        used = {t for value in node.inputs if (t := type_of(value, types)) is not None}
        if len(used) > 1:
            names = ", ".join(sorted(dtype.name for dtype in used))
            yield "typing", f"{node.op_type} mixes {names}: add the Cast"


def shape_reasons(node: ir.Node, types: Types) -> Reasons:
    """What ONNX's inference lets pass: volumes of a Reshape, lengths of a Slice's inputs."""
    if node.op_type == "Slice":
        lengths = {shape for value in node.inputs[1:] if (shape := shape_of(value, types))}
        if len(lengths) > 1:
            yield "shape", "Slice has starts, ends, axes or steps of different lengths"
    if node.op_type != "Reshape":
        return
    before, after = shape_of(node.inputs[0], types), shape_of(node.outputs[0], types)
    if before is not None and after is not None and math.prod(before) != math.prod(after):
        yield "shape", f"Reshape of {list(before)} to {list(after)} changes the volume"


def value_reasons(value: ir.Value, types: Types) -> Reasons:
    """The rules of a value: its type is one the target computes with, its shape is static."""
    if str(value.name) not in types:
        return
    dtype, shape = types[str(value.name)]
    if dtype == UNDEFINED:
        yield "type", f"{value.name} has no tensor type: a sequence, or unknown at this opset"
        return
    if dtype == INT64 and not is_constant(value):
        yield "int64", f"{value.name} is computed int64: sizes and axes must be constants"
    elif dtype not in DATA and dtype != INT64 and not (dtype in STORED and is_given(value)):
        yield "type", f"{value.name} is {dtype.name}"
    if any(size < 1 for size in shape):
        yield "static", f"{value.name} has a dimension that is empty or not known: {list(shape)}"
    if len(shape) > MAX_RANK:
        yield "shape", f"{value.name} has rank {len(shape)}; {MAX_RANK} is the most"
    if math.prod(shape) >= MAX_VOLUME:
        yield "volume", f"{value.name} {list(shape)} has 2^31 elements or more"


def dequantize_reasons(node: ir.Node, types: Types) -> Reasons:
    """Weights are given as integers of one scale a row; the result has the scales' type."""
    data, scale = (shape_of(value, types) for value in node.inputs[:2])
    if len(node.inputs) > 2:
        yield "int8", "has zero points: weights are symmetric"
    if more := set(node.attributes) - {"axis"}:
        yield "int8", f"sets {', '.join(sorted(more))}"
    if node.inputs[0] is not None and not is_given(node.inputs[0]):
        yield "int8", "multiplies out what was computed: only weights are int8"
    rows = data is not None and len(data) == 2 and scale == data[:1]
    if data is not None and not (rows and node.attributes.get_int("axis", 1) == 0):
        yield "int8", f"scales {list(scale or ())} are not one for each row of {list(data)}"
    if type_of(node.inputs[1], types) not in (None, FLOAT):
        yield "int8", "the scales are not float32"


def is_given(value: ir.Value) -> bool:
    """Whether nothing computes the value: an input, an initialiser."""
    return value.producer() is None


def is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() or (node is not None and node.op_type == "Constant")


def type_of(value: ir.Value | None, types: Types) -> ir.DataType | None:
    """Inferred type of a value, or None where there is none."""
    return None if value is None or str(value.name) not in types else types[str(value.name)][0]


def shape_of(value: ir.Value | None, types: Types) -> tuple[int, ...] | None:
    """Inferred shape of a value, or None where there is none."""
    return None if value is None or str(value.name) not in types else types[str(value.name)][1]
