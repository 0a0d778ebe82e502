"""The proof holds for what the exporter makes, and for nothing that was tampered with."""

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch

from lcexport.configs.errors import BuildError
from lcexport.graph import prove_precision

DEPTH = 3
FLOAT, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16
TOTALS = {
    "attentions_bulk": 2 * DEPTH,
    "calls_of_block": DEPTH,
    "calls_of_embed": 1,
    "calls_of_final": 1,
    "layer_norms_fp32": 3 * DEPTH + 1,
    "products_bulk": 11 * DEPTH + 3,
    "products_fp32": DEPTH + 4,
    "rms_norms_fp32": 4 * DEPTH,
}
Mutation = Callable[[ir.Model], None]


def test_what_is_proved_in_bfloat16(make_graph):
    proved = prove_precision(ir.load(make_graph("bf16")), torch.bfloat16)
    assert proved == TOTALS | {"island_exits": 6 * DEPTH + 1, "roundings": 11 * DEPTH + 4}


def test_what_is_proved_in_float32(make_graph):
    proved = prove_precision(ir.load(make_graph()), torch.float32)
    assert {name: count for name, count in proved.items() if count} == TOTALS


def test_conditioning_adds_an_attention_a_block(make_graph):
    model = ir.load(make_graph(frames=4, cond=2))
    proved = prove_precision(model, torch.float32, attentions=3)
    assert proved["attentions_bulk"] == 3 * DEPTH
    with pytest.raises(BuildError, match="Block: another number"):
        prove_precision(model, torch.float32, attentions=2)


@pytest.mark.parametrize(("made", "claimed"), [("fp32", torch.bfloat16), ("bf16", torch.float32)])
def test_a_graph_of_the_other_precision(make_graph, made, claimed):
    with pytest.raises(BuildError, match="Embed: "):
        prove_precision(ir.load(make_graph(made)), claimed)


# --- tampering: each takes the saved graph and makes one thing less precise, or wrong


def function(model: ir.Model, name: str) -> ir.Function:
    return model.functions["lcexport", name, ""]


def parameter(of: ir.Function, name: str) -> ir.Value:
    return next(value for value in of.inputs if value.name == name)


def user(value: ir.Value, *ops: str) -> ir.Node:
    """The last node reached from `value` along users of these kinds; a Cast may be missing."""
    reached = None
    for op in ops:
        node = next((node for node, _ in value.uses() if node.op_type == op), None)
        if node is not None:
            reached, value = node, node.outputs[0]
        else:
            assert op == "Cast", f"{value.name} has no user {op}"
    assert reached is not None
    return reached


def first(of: ir.Function, op: str) -> ir.Node:
    return next(node for node in of if node.op_type == op)


def cast(of: ir.Function, node: ir.Node, index: int, dtype: ir.DataType) -> None:
    """Put a Cast before one input of `node`."""
    new = ir.node("Cast", [node.inputs[index]], {"to": int(dtype)}, name=f"new_{index}")
    new.outputs[0].name = f"{node.name}_new_{index}"
    of.insert_before(node, new)
    node.replace_input_with(index, new.outputs[0])


def cast_result(of: ir.Function, node: ir.Node, dtype: ir.DataType) -> None:
    """Put a Cast between `node` and those who use it."""
    value = node.outputs[0]
    uses = list(value.uses())
    new = ir.node("Cast", [value], {"to": int(dtype)}, name="new_result")
    new.outputs[0].name = f"{node.name}_new_result"
    of.insert_after(node, new)
    for by, index in uses:
        by.replace_input_with(index, new.outputs[0])
    for index, output in enumerate(of.outputs):
        if output is value:
            of.outputs[index] = new.outputs[0]


def low_and_back(of: ir.Function, node: ir.Node, inputs: tuple[int, ...] = (0, 1)) -> None:
    """Make one node compute in bfloat16 amid float32."""
    for index in inputs:
        cast(of, node, index, BFLOAT16)
    cast_result(of, node, FLOAT)


def add_gate_in_bfloat16(model: ir.Model) -> None:
    block = function(model, "Block")
    product = user(parameter(block, "self_attn.to_out.weight"), "Gemm").outputs[0]
    add = user(product, "Cast", "Reshape", "Mul", "Reshape", "Add")
    cast(block, add, 0, BFLOAT16)
    cast(block, add, 1, BFLOAT16)


def gate_in_bfloat16(model: ir.Model) -> None:
    block = function(model, "Block")
    product = user(parameter(block, "ffn.w2.weight"), "Gemm").outputs[0]
    low_and_back(block, user(product, "Cast", "Reshape", "Mul"))


def layer_norm_in_bfloat16(model: ir.Model) -> None:
    block = function(model, "Block")
    low_and_back(block, first(block, "LayerNormalization"))


def final_layer_norm_in_bfloat16(model: ir.Model) -> None:
    final = function(model, "Final")
    low_and_back(final, first(final, "LayerNormalization"))


def moments_in_bfloat16(model: ir.Model) -> None:
    node = first(function(model, "Final"), "LayerNormalization")
    node.attributes["stash_type"] = ir.AttrInt64("stash_type", int(BFLOAT16))


def layer_norm_rounded_before_modulation(model: ir.Model) -> None:
    block = function(model, "Block")
    norm = first(block, "LayerNormalization")
    cast_result(block, norm, BFLOAT16)
    cast_result(block, user(norm.outputs[0], "Cast"), FLOAT)


def scale_in_bfloat16(model: ir.Model) -> None:
    block = function(model, "Block")
    norm = first(block, "LayerNormalization").outputs[0]
    low_and_back(block, user(norm, "Reshape", "Mul"))


def rms_in_bfloat16(model: ir.Model) -> None:
    block = function(model, "Block")
    cast(block, first(block, "Pow"), 0, BFLOAT16)
    cast_result(block, first(block, "ReduceMean"), FLOAT)


def rms_applied_in_bfloat16(model: ir.Model) -> None:
    block = function(model, "Block")
    multiply = user(first(block, "Reciprocal").outputs[0], "Mul")
    cast(block, multiply, 0, BFLOAT16)
    cast(block, multiply, 1, BFLOAT16)


def rope_in_bfloat16(model: ir.Model) -> None:
    block = function(model, "Block")
    low_and_back(block, user(parameter(block, "cos"), "Unsqueeze", "Mul"))


def rope_tables_in_bfloat16(model: ir.Model) -> None:
    embed = function(model, "Embed")
    cast(embed, first(embed, "Cos"), 0, BFLOAT16)
    cast_result(embed, first(embed, "Cos"), FLOAT)


def adaln_weight_cast(model: ir.Model) -> None:
    block = function(model, "Block")
    low_and_back(block, user(parameter(block, "adaln_linear_1.weight"), "Gemm"), (0, 1, 2))


def adaln_weight_stored_in_bfloat16(model: ir.Model) -> None:
    model.graph.initializers["blocks.1.adaln_linear_1.weight"].dtype = BFLOAT16


def final_projection_in_bfloat16(model: ir.Model) -> None:
    for name in ("weight", "bias"):
        model.graph.initializers[f"final_layer.proj.{name}"].dtype = BFLOAT16
    final = function(model, "Final")
    product = user(parameter(final, "proj.weight"), "Gemm")
    widened = product.inputs[0]
    assert widened is not None
    product.replace_input_with(0, widened.producer().inputs[0])  # pyright: ignore[reportOptionalMemberAccess]
    cast_result(final, product, FLOAT)


def attention_in_float32(model: ir.Model) -> None:
    block = function(model, "Block")
    attention = first(block, "Attention")
    for index in range(3):
        cast(block, attention, index, FLOAT)
    cast_result(block, attention, BFLOAT16)


def residual_in_float32(model: ir.Model) -> None:
    block = function(model, "Block")
    add = user(user(parameter(block, "cross_attn.to_out.weight"), "Gemm").outputs[0], "Add")
    cast(block, add, 0, FLOAT)
    cast(block, add, 1, FLOAT)
    cast_result(block, add, BFLOAT16)


def weight_transposed(model: ir.Model) -> None:
    block = function(model, "Block")
    product = user(parameter(block, "ffn.w1.weight"), "Gemm")
    new = ir.node("Transpose", [product.inputs[1]], {"perm": [1, 0]}, name="new_transpose")
    block.insert_before(product, new)
    product.replace_input_with(1, new.outputs[0])
    product.attributes["transB"] = ir.AttrInt64("transB", 0)


def weight_used_the_other_way(model: ir.Model) -> None:
    block = function(model, "Block")
    product = user(parameter(block, "cross_attn.to_q.weight"), "Gemm")
    product.attributes["transB"] = ir.AttrInt64("transB", 0)


def weight_embedded(model: ir.Model) -> None:
    block = function(model, "Block")
    weight = parameter(block, "self_attn.q_norm.weight")
    values = ir.tensor([1.0] * 128, dtype=BFLOAT16, name="embedded")
    new = ir.node("Constant", [], {"value": values}, name="new_constant")
    block.insert_before(block[0], new)
    weight.replace_all_uses_with(new.outputs[0])


def weight_cast(model: ir.Model) -> None:
    block = function(model, "Block")
    product = user(parameter(block, "cross_attn.to_v.weight"), "Gemm")
    for index in range(3):
        cast(block, product, index, FLOAT)
    cast_result(block, product, BFLOAT16)


def attention_that_scales(model: ir.Model) -> None:
    attention = first(function(model, "Block"), "Attention")
    attention.attributes["scale"] = ir.AttrFloat32("scale", 128**-0.5)


def attention_with_the_scale_left_out(model: ir.Model) -> None:
    del first(function(model, "Block"), "Attention").attributes["scale"]


def without_a_scale(model: ir.Model) -> None:
    block = function(model, "Block")
    norm = first(block, "LayerNormalization").outputs[0]
    multiply = user(norm, "Reshape", "Mul")
    multiply.outputs[0].replace_all_uses_with(user(norm, "Reshape").outputs[0])


def without_a_gate(model: ir.Model) -> None:
    block = function(model, "Block")
    product = user(parameter(block, "self_attn.to_out.weight"), "Gemm").outputs[0]
    before = user(product, "Cast", "Reshape").outputs[0]
    user(before, "Mul").outputs[0].replace_all_uses_with(before)


def without_modulation(model: ir.Model) -> None:
    block = function(model, "Block")
    norm = first(block, "LayerNormalization").outputs[0]
    shifted = user(norm, "Reshape", "Mul", "Add")
    shifted.outputs[0].replace_all_uses_with(user(norm, "Reshape").outputs[0])


def velocity_in_bfloat16(model: ir.Model) -> None:
    final = function(model, "Final")
    cast_result(final, final[-1], BFLOAT16)


def timestep_scaled_before_it_is_rounded(model: ir.Model) -> None:
    embed = function(model, "Embed")
    rounding = user(parameter(embed, "timestep"), "Cast")
    half = ir.node("Constant", [], {"value": ir.tensor(0.5)}, name="new_half")
    scaled = ir.node("Mul", [rounding.inputs[0], half.outputs[0]], name="new_scale")
    embed.insert_before(rounding, [half, scaled])
    rounding.replace_input_with(0, scaled.outputs[0])


def timestep_scaled_while_rounded(model: ir.Model) -> None:
    embed = function(model, "Embed")
    widening = user(parameter(embed, "timestep"), "Cast", "Cast")
    twice = ir.node("Add", [widening.inputs[0], widening.inputs[0]], name="new_twice")
    embed.insert_before(widening, twice)
    widening.replace_input_with(0, twice.outputs[0])


def timestep_not_rounded(model: ir.Model) -> None:
    embed = function(model, "Embed")
    timestep = parameter(embed, "timestep")
    widening = user(timestep, "Cast", "Cast")
    for node, index in list(widening.outputs[0].uses()):
        node.replace_input_with(index, timestep)
    embed.remove([user(timestep, "Cast"), widening][::-1], safe=True)


def sum_in_the_main_graph(model: ir.Model) -> None:
    last = model.graph[-1]
    new = ir.node("Add", [last.outputs[0], last.outputs[0]], name="new_sum")
    model.graph.append(new)


@pytest.mark.parametrize(
    ("mutate", "match"),
    [
        (add_gate_in_bfloat16, "Block: new_1 leaves an island early; got node_"),
        (gate_in_bfloat16, "Block: new_0 leaves an island early"),
        (layer_norm_in_bfloat16, "Block: LayerNormalization node_layer_norm is not float32"),
        (final_layer_norm_in_bfloat16, "Final: LayerNormalization node_layer_norm is not float32"),
        (moments_in_bfloat16, "Final: node_layer_norm keeps its moments in"),
        (layer_norm_rounded_before_modulation, "Block: another number .*'roundings': 12"),
        (scale_in_bfloat16, "Block: another number .*'roundings': 13"),
        (rms_in_bfloat16, "Block: Pow node_pow_1 is not float32"),
        (rms_applied_in_bfloat16, "Block: new_. rounds too early; got node_"),
        (rope_in_bfloat16, "Block: new_1 leaves an island early"),
        (rope_tables_in_bfloat16, "Embed: new_0 leaves an island early"),
        (adaln_weight_cast, r"Block: the weight adaln_linear_1\.weight is changed"),
        (adaln_weight_stored_in_bfloat16, "Block: its types contradict each other: .*Gemm"),
        (final_projection_in_bfloat16, r"Final: the product with proj\.weight; got BFLOAT16"),
        (attention_that_scales, "Block: attention .* is scaled by; got 0.088"),
        (attention_with_the_scale_left_out, "Block: attention .* is scaled by"),
        (attention_in_float32, "Block: attention node_scaled_dot_product_attention; got FLOAT"),
        (residual_in_float32, "Block: another number"),
        (weight_transposed, r"Block: the weight ffn\.w1\.weight is changed .* got Transpose"),
        (weight_used_the_other_way, r"Block: cross_attn\.to_q\.weight is not used as stored"),
        (weight_embedded, r"Block: the weight self_attn\.q_norm\.weight is unused"),
        (weight_cast, r"Block: the weight cross_attn\.to_v\.weight is changed .* got Cast"),
        (without_a_scale, "Block: mul is computed and not used"),
        (without_a_gate, "Block: mul_14 is computed and not used"),
        (without_modulation, "Block: add_1 is computed and not used"),
        (velocity_in_bfloat16, "Final: new_result rounds too early; got node_permute"),
        (timestep_scaled_before_it_is_rounded, "Embed: new_scale precedes the timestep's rounding"),
        (timestep_scaled_while_rounded, "Embed: _to_copy_1 is used before the timestep's rounding"),
        (timestep_not_rounded, "Embed: node_unsqueeze precedes the timestep's rounding"),
        (sum_in_the_main_graph, "the main graph may only call"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tampering_is_named(make_graph, mutate: Mutation, match: str):
    model = ir.load(make_graph("bf16"))
    mutate(model)
    with pytest.raises(BuildError, match=match) as caught:
        prove_precision(model, torch.bfloat16)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("mutate", "match"),
    [
        (gate_in_bfloat16, "Block: new_. leaves an island early"),
        (add_gate_in_bfloat16, "Block: its types contradict each other"),
        (layer_norm_in_bfloat16, "Block: LayerNormalization node_layer_norm is not float32"),
        (weight_transposed, r"ffn\.w1\.weight is changed"),
        (without_a_gate, "is computed and not used"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tampering_with_a_float32_graph_is_named(make_graph, mutate: Mutation, match: str):
    model = ir.load(make_graph())
    mutate(model)
    with pytest.raises(BuildError, match=match):
        prove_precision(model, torch.float32)
