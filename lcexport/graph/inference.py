"""Types and shapes by ONNX's own inference, and which functions a function calls."""

from collections.abc import Iterable, Iterator, Mapping

import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_shapes

from lcexport.configs.errors import BuildError

Signature = tuple[tuple[ir.DataType, tuple[int, ...]], ...]
Types = Mapping[str, tuple[ir.DataType, tuple[int, ...]]]
Functions = Mapping[ir.OperatorIdentifier, ir.Function]


def inferred_types(
    function: ir.Function, signature: Signature, functions: Functions | None = None
) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
    """Type and shape of every value, inferred by ONNX from the inputs' alone.

    `functions` are those that the function may call. Values of subgraphs are among the types.
    """
    inner = nested_functions(functions or {}, function)
    proto = ir.to_proto(ir.Model(function.graph, ir_version=11, functions=inner))
    del proto.graph.value_info[:]
    for value, (dtype, shape) in zip(proto.graph.input, signature, strict=True):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, int(dtype), shape))
    for value in proto.graph.output:
        value.ClearField("type")
    try:
        inferred = infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise BuildError(f"{function.name}: its types contradict each other: {error}") from error
    return proto_types(inferred)


def proto_types(graph: onnx.GraphProto) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
    """What inference wrote into a graph and its subgraphs."""
    types = {}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in tensor.shape.dim)
        types[value.name] = (ir.DataType(tensor.elem_type), shape)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.type == onnx.AttributeProto.GRAPH:
            types |= proto_types(attribute.g)
    return types


def nested_functions(functions: Functions, nodes: Iterable[ir.Node]) -> list[ir.Function]:
    """The functions that these nodes call, and those that these call: innermost first."""
    found: dict[ir.OperatorIdentifier, ir.Function] = {}
    for node in nodes:
        if node.op_identifier() in functions:
            function = functions[node.op_identifier()]
            for inner in nested_functions(functions, every_node(function.graph)):
                found.setdefault(inner.identifier(), inner)
            found.setdefault(function.identifier(), function)
    return list(found.values())


def every_node(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from every_node(attribute.as_graph())
