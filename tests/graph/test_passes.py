"""Each pass on a graph of a few lines: what it needs, what it does, what it refuses."""

import onnx_ir as ir
import pytest
import torch

from lcexport.configs.errors import BuildError
from lcexport.graph.passes import (
    InitializersToConstants,
    InputsToConstants,
    ParametersToInputs,
    RefuseWhatEnginesRefuse,
    clean_function,
)

PRODUCT = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[2] x) => (float[2] y)
  <float[2] w = {1, 2}, float[2] b = {3, 4}>
{
  scaled = Mul(x, w)
  y = Add(scaled, b)
}
"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_onnx_text(PRODUCT)


def names(values) -> list[str]:
    return [value.name for value in values]


def test_parameters_become_inputs_in_the_order_asked_for(model):
    result = ParametersToInputs(["b", "w"])(model)
    assert result.modified
    assert names(model.graph.inputs) == ["x", "b", "w"]
    assert not model.graph.initializers
    assert all(value.const_value is None for value in model.graph.inputs)


def test_a_parameter_the_trace_does_not_use_is_named(model):
    with pytest.raises(ir.passes.PreconditionError, match="missing_one"):
        ParametersToInputs(["w", "missing_one"])(model)
    assert set(model.graph.initializers) == {"w", "b"}


def test_inputs_become_constants_again(model):
    ParametersToInputs(["w"])(model)
    table = torch.tensor([5.0, 6.0])
    assert InputsToConstants({"w": table})(model).modified
    assert names(model.graph.inputs) == ["x"]
    constant = model.graph[0]
    assert constant.op_type == "Constant"
    assert constant.attributes["value"].as_tensor().numpy().tolist() == [5.0, 6.0]
    assert (
        next(node for node in model.graph if node.op_type == "Mul").inputs[1]
        is (constant.outputs[0])
    )


def test_a_table_that_is_no_input_is_named(model):
    with pytest.raises(ir.passes.PreconditionError, match="cosines"):
        InputsToConstants({"cosines": torch.zeros(2)})(model)


def test_initialisers_become_constants_before_their_use(model):
    assert InitializersToConstants()(model).modified
    assert not model.graph.initializers
    assert [node.op_type for node in model.graph] == ["Constant", "Constant", "Mul", "Add"]
    assert not InitializersToConstants()(model).modified


def test_a_sequence_operation_is_refused():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[2] x) => (float[2] y)
        {
          parts = SequenceConstruct(x, x)
          y = ConcatFromSequence<axis = 0>(parts)
        }
    """)
    with pytest.raises(BuildError, match="sequence operation"):
        RefuseWhatEnginesRefuse()(model)


def test_a_computed_int64_is_refused_and_a_constant_one_is_not():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[2, 3] x) => (float[6] y)
        {
          wanted = Constant<value = int64[1] {6}>()
          y = Reshape(x, wanted)
        }
    """)
    assert not RefuseWhatEnginesRefuse()(model).modified
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[2, 3] x) => (float[2, 3] y) <int64[2] found>
        {
          found = Shape(x)
          y = Reshape(x, found)
        }
    """)
    with pytest.raises(BuildError, match=r"Shape .* computes int64 values \['found'\]"):
        RefuseWhatEnginesRefuse()(model)


def test_cleaning_drops_dead_code_and_the_exporters_notes(model):
    dead = ir.node("Neg", [model.graph.inputs[0]])
    model.graph.append(dead)
    model.graph[0].metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/someone/model.py"
    model.graph[0].doc_string = "from /home/someone"
    clean_function(model)
    assert [node.op_type for node in model.graph] == ["Constant", "Constant", "Mul", "Add"]
    assert not any(node.metadata_props or node.doc_string for node in model.graph)
