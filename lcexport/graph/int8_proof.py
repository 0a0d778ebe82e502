"""The proof's rule for int8 weights: the pattern of `lcexport.graph.int8`, and nothing looser."""

from collections import Counter

import onnx_ir as ir

from lcexport.checkpoint import is_island
from lcexport.graph.policy import FLOAT, full_name, require

# the matrices of the bulk
INT8_WEIGHTS = {
    "Embed": 2,
    "Block": 11,
    "Final": 0,
    "CacheEmbed": 0,
    "CacheBlock": 7,
    "CacheLast": 2,
}


def check_int8(function: ir.Function, bulk: ir.DataType, counts: Counter[str]) -> None:
    """Integers and scales meet in one DequantizeLinear and nowhere else; that feeds a Gemm."""
    for value in function.inputs:
        if str(value.name).endswith((".weight_int8", ".weight_scale")):
            users = [node.op_type for node, _ in value.uses()]
            fit = users == ["DequantizeLinear"]
            require(fit, f"{function.name}: {value.name} is not multiplied out alone", users)
    for node in function:
        if node.op_type != "DequantizeLinear":
            continue
        what = f"{function.name}: {node.name} is not integers times the scales of their rows"
        weight = str(node.inputs[0] and node.inputs[0].name).removesuffix("_int8")
        named = [str(value and value.name) for value in node.inputs]
        inputs = node.inputs[0] in function.inputs and node.inputs[1] in function.inputs
        require(inputs and named == [f"{weight}_int8", f"{weight}_scale"], what, named)
        rows = set(node.attributes) == {"axis"} and node.attributes.get_int("axis", 1) == 0
        require(rows, what, list(node.attributes))
        island = is_island(full_name(function, weight))
        require(not island, f"{function.name}: the island's {weight} is int8", weight)
        check_dequantised(function, node, bulk)
        counts["weights_int8"] += 1
    found, full = counts["weights_int8"], INT8_WEIGHTS[function.name]
    require(found in (0, full), f"{function.name}: some weights are int8 and some are not", found)


def check_dequantised(function: ir.Function, node: ir.Node, bulk: ir.DataType) -> None:
    """What was multiplied out is rounded to the bulk dtype, where that is another, for one Gemm."""
    steps = ["Gemm"] if bulk == FLOAT else ["Cast", "Gemm"]
    for wanted in steps:
        what = f"{function.name}: {node.name} is not used as a weight"
        uses = list(node.outputs[0].uses())
        require(len(uses) == 1, what, [user for user, _ in uses])
        user, index = uses[0]
        require(user.op_type == wanted, what, user.op_type)
        if wanted == "Cast":
            node = user
            continue
        as_stored = index == 1 and user.attributes.get_int("transB", 0) == 1
        require(as_stored, what, f"input {index}")
