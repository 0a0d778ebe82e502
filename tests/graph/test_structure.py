"""What a graph file is made of: three functions, and initialisers that stay where they are."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

from lcexport.checkpoint import open_checkpoint, read_header
from lcexport.configs.errors import BuildError
from lcexport.dit import Geometry
from lcexport.graph import GraphSpec, assemble, onnx_from_dit, save_graph
from lcexport.graph.passes import SEQUENCE_OPS
from lcexport.graph.trace import trace_parts

DEPTH = 3
SPEC = GraphSpec(Geometry(2, 3, 4, 6), 10, torch.float32)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def graph(request: pytest.FixtureRequest, make_graph) -> Path:
    return make_graph(request.param)


@pytest.fixture(scope="module")
def model(graph: Path) -> onnx.ModelProto:
    return onnx.load(graph, load_external_data=False)


def test_onnx_accepts_it_in_full(graph):
    onnx.checker.check_model(graph, full_check=True)


def test_opset_and_functions(model):
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 23, "lcexport": 1}
    assert [function.name for function in model.functions] == ["Embed", "Block", "Final"]
    for function in model.functions:
        assert {entry.version for entry in function.opset_import if not entry.domain} == {23}


def test_the_main_graph_only_calls_functions(model):
    calls = [(node.domain, node.op_type) for node in model.graph.node]
    assert calls == [("lcexport", name) for name in ("Embed", *["Block"] * DEPTH, "Final")]


def test_inputs_and_output_are_an_engines(model):
    def described(values):
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                [dim.dim_value for dim in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    assert described(model.graph.input) == {
        "hidden_states": (onnx.TensorProto.FLOAT, [2, 16, 3, 8, 12]),
        "encoder_hidden_states": (onnx.TensorProto.FLOAT, [2, 1, 10, 64]),
        "timestep": (onnx.TensorProto.FLOAT, [2, 3]),
        "encoder_attention_mask": (onnx.TensorProto.BOOL, [2, 10]),
    }
    assert described(model.graph.output) == {
        "velocity": (onnx.TensorProto.FLOAT, [2, 16, 3, 8, 12])
    }


def test_every_initialiser_is_a_byte_range_of_the_weights_file(graph, model):
    weights = graph.with_name("dit.safetensors")
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    names = [tensor.name for tensor in model.graph.initializer]
    assert sorted(names) == sorted(header)
    for tensor in model.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.EXTERNAL
        assert not tensor.raw_data
        info = ExternalDataInfo(tensor)
        start, end = header[tensor.name]["data_offsets"]
        assert info.location == weights.name
        assert (info.offset, info.length) == (8 + length + start, end - start)
        assert list(tensor.dims) == header[tensor.name]["shape"]


def test_the_file_is_small_and_tells_nothing_of_the_machine(graph):
    data = graph.read_bytes()
    assert len(data) < 1 << 20
    repository = Path(__file__).parents[2]
    for path in (repository, graph.parent, Path.home()):
        assert f"{path}/".encode() not in data
    for trace in (b"/lib/python", b"site-packages", b".py"):
        assert trace not in data


def test_no_sequences_and_every_weight_is_read_as_stored(model):
    for function in model.functions:
        kinds = {node.op_type for node in function.node}
        assert not kinds & SEQUENCE_OPS
        assert not kinds & {"MatMul", "Conv"}
        for node in function.node:
            if node.op_type == "Gemm":
                values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                assert values["transB"] == 1
                assert values["transA"] == 0


def test_tables_are_kept_per_axis(model):
    """What a function embeds are norms' unit weights, and RoPE of each axis: never of the grid."""
    for function in model.functions:
        for node in function.node:
            if node.op_type == "Constant":
                assert len(onnx.helper.get_attribute_value(node.attribute[0]).raw_data) <= 256 * 4


@pytest.fixture(scope="module")
def traced_again(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The parts of the default graph, traced anew in another working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        return trace_parts(open_checkpoint(dit_folder).config, SPEC)


@pytest.fixture
def assembled(dit_folder: Path, traced_again, monkeypatch: pytest.MonkeyPatch):
    """`assembled(weights)` is `onnx_from_dit` with `traced_again` for its trace."""
    monkeypatch.setattr(assemble, "trace_parts", lambda config, spec: traced_again)
    config = open_checkpoint(dit_folder).config
    return lambda weights: onnx_from_dit(config, SPEC, weights, "0")


def test_tracing_again_elsewhere_gives_the_same_bytes(
    make_graph, make_weights, assembled, tmp_path
):
    model = assembled(read_header(make_weights("fp32")).tensors)
    save_graph(model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == make_graph().read_bytes()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"proj.bias": None}, r"final_layer\.proj\.bias; got nothing"),
        ({"proj.bias": {"shape": (65,)}}, r"final_layer\.proj\.bias; got FLOAT \[65\]"),
        ({"proj.bias": {"dtype": "BF16"}}, "got BFLOAT16 .* wanted FLOAT "),
        ({"extra": {}}, r"no graph uses; got \['final_layer\.extra'\]"),
    ],
)
def test_a_weights_file_that_does_not_fit(make_weights, assembled, change, match):
    weights = read_header(make_weights("fp32")).tensors
    bias = weights["final_layer.proj.bias"]
    for name, fields in change.items():
        if fields is None:
            del weights[f"final_layer.{name}"]
        else:
            weights[f"final_layer.{name}"] = replace(bias, name=f"final_layer.{name}", **fields)
    with pytest.raises(BuildError, match=match):
        assembled(weights)
