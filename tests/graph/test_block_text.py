"""The bfloat16 block as text: a reader sees where it is float32, and a change shows as a diff.

After a change that is meant, write the text anew and read the difference:

    WRITE_GOLDEN_TEXT=1 python -m pytest tests/graph/test_block_text.py
"""

import difflib
import os
from pathlib import Path

import onnx_ir as ir
import pytest

from lcexport.graph.inference import inferred_types
from lcexport.graph.precision import described

TEXT = Path(__file__).parents[1] / "golden_text" / "block_bf16.txt"
WRITE = "WRITE_GOLDEN_TEXT"
SHORT = {"FLOAT": "f32", "BFLOAT16": "bf16", "INT64": "i64", "BOOL": "bool"}
HEADING = """\
# One block of the DiT, bfloat16, at the golden sizes: 2 x 72 tokens, 2 heads of 128, 10 of text.
# Types are inferred, not declared. What is f32 here is computed in float32 by every engine.
"""


def block_text(model: ir.Model) -> str:
    """The block as its first call sees it: a line a node, types in front."""
    call = next(node for node in model.graph if node.op_type == "Block")
    function = model.functions[call.op_identifier()]
    signature = tuple(described(value) for value in call.inputs if value is not None)
    types = inferred_types(function, signature)

    def typed(value: ir.Value | None) -> str:
        assert value is not None
        dtype, shape = types[str(value.name)]
        return f"{SHORT[dtype.name]}{list(shape)}".replace(" ", "")

    lines = [HEADING, "inputs"]
    lines += [f"  {typed(value):<16} {value.name}" for value in function.inputs]
    lines += ["", "nodes"]
    for node in function:
        outputs = ", ".join(str(value.name) for value in node.outputs)
        arguments = ", ".join(
            f"{value.name}:{SHORT[types[str(value.name)][0].name]}"
            for value in node.inputs
            if value is not None
        )
        text = f"{outputs} = {node.op_type}{attributes(node)}({arguments})"
        lines.append(f"  {typed(node.outputs[0]):<16} {text}")
    lines += ["", "outputs", *(f"  {typed(value):<16} {value.name}" for value in function.outputs)]
    return "\n".join(lines) + "\n"


def attributes(node: ir.Node) -> str:
    """Attributes by name; of a constant, its values where they are few."""
    shown = []
    for name, attribute in sorted(node.attributes.items()):
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            flat = attribute.as_tensor().numpy().ravel()
            alike = len(flat) > 8 and (flat == flat[0]).all()
            value = f"all {flat[0]}" if alike else flat.tolist()
        elif name == "to":
            value = SHORT[ir.DataType(attribute.as_int()).name]
        shown.append(f"{name}={value}")
    return f"<{', '.join(shown)}>" if shown else ""


@pytest.fixture
def model(make_graph) -> ir.Model:
    return ir.load(make_graph("bf16"))


def test_the_block_is_as_written(model):
    found = block_text(model)
    if os.environ.get(WRITE):
        TEXT.parent.mkdir(exist_ok=True)
        TEXT.write_text(found, encoding="utf-8")
    wanted = TEXT.read_text(encoding="utf-8")
    difference = "".join(difflib.unified_diff(wanted.splitlines(True), found.splitlines(True)))
    assert found == wanted, f"the block has changed; if it is meant: {WRITE}=1\n{difference}"


def test_the_text_shows_the_islands():
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    for kind in ("LayerNormalization<", "Pow(", "ReduceMean<", "Sqrt(", "Reciprocal(", "Sub("):
        found = [line for line in lines if f"= {kind}" in line]
        assert found
        assert all(line.startswith("  f32[") and ":bf16" not in line for line in found), kind
    assert sum("= Attention<" in line and line.startswith("  bf16[") for line in lines) == 2


@pytest.mark.parametrize("kind", ["LayerNormalization", "Sqrt", "Mul", "Sub"])
def test_an_island_in_bfloat16_shows(model, kind):
    """One float32 node is made to compute in bfloat16, between Casts."""
    block = model.functions["lcexport", "Block", ""]
    node = [node for node in block if node.op_type == kind][0 if kind != "Mul" else 1]
    users = list(node.outputs[0].uses())
    for index, value in enumerate(node.inputs):
        low = ir.node("Cast", [value], {"to": int(ir.DataType.BFLOAT16)}, name=f"low_{index}")
        low.outputs[0].name = f"low_{index}"
        block.insert_before(node, low)
        node.replace_input_with(index, low.outputs[0])
    high = ir.node("Cast", [node.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name="high")
    high.outputs[0].name = "high"
    block.insert_after(node, high)
    for user, index in users:
        user.replace_input_with(index, high.outputs[0])
    wanted = TEXT.read_text(encoding="utf-8").splitlines()
    found = block_text(model).splitlines()
    line = next(line for line in found if f" {node.outputs[0].name} = {kind}" in line)
    assert line.startswith("  bf16[")
    before = next(line for line in wanted if f" {node.outputs[0].name} = {kind}" in line)
    assert before.startswith("  f32[")
