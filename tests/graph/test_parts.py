"""Each function alone, its weights handed in: called in order, they compute what the whole does."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from lcexport.checkpoint import is_island
from lcexport.configs.errors import BuildError
from lcexport.graph import prove_precision
from lcexport.graph.check import check_graph
from lcexport.graph.parts import parts_of
from lcexport.graph.segments import weights_bytes


@pytest.fixture
def inputs() -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, :7] = mask[1, :2] = True
    tensors = {
        "hidden_states": torch.randn(2, 16, 3, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, 1, 10, 64, generator=generator),
        "timestep": torch.full((2, 3), 752.0),
        "encoder_attention_mask": mask,
    }
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def test_parts_called_in_order_equal_the_whole_graph(make_graph, inputs):
    path = make_graph("fp32")
    whole = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = np.asarray(whole.run(["velocity"], inputs)[0])
    parts, calls = parts_of(ir.load(path))
    weights = {k: v.numpy() for k, v in load_file(path.with_name("dit.safetensors")).items()}
    sessions = [
        ort.InferenceSession(
            ir.to_proto(part.model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for part in parts
    ]
    values = dict(inputs)
    for call in calls:
        part = parts[call.part]
        feeds = {spec.name: values[call.tensors[spec.name]] for spec in part.inputs}
        feeds |= {spec.name: weights[call.prefix + spec.name] for spec in part.weights}
        names = [spec.name for spec in part.outputs]
        for name, array in zip(names, sessions[call.part].run(names, feeds), strict=True):
            assert isinstance(array, np.ndarray)
            values[call.tensors[name]] = array
    np.testing.assert_allclose(values["velocity"], wanted, rtol=0, atol=2e-5)


def test_there_is_one_part_for_all_blocks_and_none_holds_a_weight(make_graph):
    parts, calls = parts_of(ir.load(make_graph("bf16")))
    assert [part.name for part in parts] == ["Embed", "Block", "Final"]
    blocks = [f"blocks.{index}." for index in range(len(calls) - 2)]
    assert [call.prefix for call in calls] == ["", *blocks, "final_layer."]
    for part in parts:
        onnx.checker.check_model(ir.to_proto(part.model), full_check=True)
        assert weights_bytes(part.model.graph) == 0
        assert check_graph(part.model, "tensorrt-11") == []


def test_every_weight_of_the_file_is_handed_in_once(make_graph):
    path = make_graph("bf16")
    parts, calls = parts_of(ir.load(path))
    taken = [call.prefix + spec.name for call in calls for spec in parts[call.part].weights]
    assert sorted(taken) == sorted(load_file(path.with_name("dit.safetensors")))


def test_each_part_proves_its_precision(make_graph):
    path = make_graph("bf16")
    whole = prove_precision(ir.load(path), torch.bfloat16)
    parts, calls = parts_of(ir.load(path))
    proofs = [prove_precision(part.model, torch.bfloat16) for part in parts]
    total = sum(proofs[call.part].get("roundings", 0) for call in calls)
    assert total == whole["roundings"]
    stored = {spec.name: spec.dtype.name for spec in parts[1].weights}
    for name, dtype in stored.items():
        assert dtype == ("FLOAT" if is_island(f"blocks.0.{name}") else "BFLOAT16")


def test_calls_that_differ_are_refused(make_graph):
    model = ir.load(make_graph("bf16"))
    model.graph.initializers["blocks.1.ffn.w1.weight"].dtype = ir.DataType.FLOAT
    with pytest.raises(BuildError, match=r"the calls of Block differ .*blocks\.1"):
        parts_of(model)


def test_weights_of_two_blocks_in_one_call_are_refused(make_graph):
    model = ir.load(make_graph("bf16"))
    call = next(node for node in model.graph if node.name == "blocks.1")
    index = next(
        i for i, value in enumerate(call.inputs) if value and value.name == "blocks.1.ffn.w1.weight"
    )
    call.replace_input_with(index, model.graph.initializers["blocks.0.ffn.w1.weight"])
    with pytest.raises(BuildError, match=r"weights of blocks\.1 are not named alike"):
        parts_of(model)
