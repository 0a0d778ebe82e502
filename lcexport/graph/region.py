"""The region of block-sparse attention in a graph: which functions it is, and that it is right.

The rules for the rest of the graph do not fit here: there is control flow, there are computed
indices, and attention is in pieces. So the region is named, and has rules of its own: only known
operators, means and softmax in float32, the other products in the bulk dtype.
"""

from collections.abc import Iterator

import onnx_ir as ir

from lcexport.graph.inference import (
    Functions,
    Signature,
    Types,
    every_node,
    inferred_types,
    nested_functions,
)
from lcexport.graph.sparse import DOMAIN, KEPT_CHUNKS

OPERATORS = frozenset(
    {
        *("Cast", "Constant", "Expand", "GatherND", "Identity", "MatMul", "ReduceMean"),
        *("Reshape", "Scan", "Softmax", "TopK", "Transpose", "Unsqueeze"),
    }
)
FLOAT = ir.DataType.FLOAT


def keeps_chunks(functions: Functions, node: ir.Node) -> bool:
    """Whether the call attends to anything: with n = 0 its function makes zeros."""
    return any(function.name == KEPT_CHUNKS for function in nested_functions(functions, [node]))


def call_faults(node: ir.Node, functions: Functions, types: Types) -> Iterator[str]:
    """What is wrong with a sparse node itself: its function, or the types around it."""
    if not nested_functions(functions, [node]):
        yield f"{node.op_type} has no function"
    values = [*node.inputs, *node.outputs]
    used = {types[str(v.name)][0].name for v in values if v is not None and str(v.name) in types}
    if len(used) != 1:
        yield f"{node.op_type} mixes {', '.join(sorted(used))}"


def region_check(
    function: ir.Function, signature: Signature, bulk: ir.DataType, functions: Functions
) -> Iterator[tuple[str, list[str]]]:
    """(function, its faults) for a function of the region and those it calls, called like this."""
    types = inferred_types(function, signature, functions)
    yield function.name, list(region_faults(function, types, bulk))
    for node in function:
        if node.op_identifier() in functions:
            given = tuple(types[str(value.name)] for value in node.inputs if value is not None)
            yield from region_check(functions[node.op_identifier()], given, bulk, functions)


def region_faults(function: ir.Function, types: Types, bulk: ir.DataType) -> Iterator[str]:
    """What is wrong inside one function of the region, given its values' types."""
    softmaxes = 0
    for node in every_node(function.graph):
        dtypes = [types[str(v.name)][0] for v in (*node.inputs, *node.outputs) if v is not None]
        if node.domain == DOMAIN:
            continue
        if node.op_type not in OPERATORS:
            yield f"{node.op_type} is not part of block-sparse attention"
        if node.op_type == "Softmax":
            softmaxes += 1
        if node.op_type in ("Softmax", "ReduceMean") and (dtypes[0], dtypes[-1]) != (FLOAT, FLOAT):
            yield f"{node.op_type} {node.name} is not float32"
        if node.op_type == "MatMul":
            scores = any(user.op_type == "Softmax" for user in users(node))
            wanted = FLOAT if scores else bulk
            if set(dtypes) != {wanted}:
                yield f"the product {node.name} is not {wanted.name}"
    if function.name == KEPT_CHUNKS and softmaxes != 1:
        yield f"{KEPT_CHUNKS} has {softmaxes} softmaxes"


def users(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes that use a node's outputs."""
    return (user for output in node.outputs for user, _ in output.uses())
