"""What the engine inspector says, in the forms of TensorRT 10 and 11.

The samples have the structure, the fields and the spelling of published ones; no engine of this
project has been inspected on a GPU yet.
"""

import json

import pytest

from lcexport.configs.errors import BuildError, IncompatibleError, UsageError
from lcexport.engines.trt.inspector import (
    EngineLayer,
    dtype_from,
    islands_of,
    read_layers,
    require_fused,
    rounded,
)


def tensor(name: str, dtype: str, newer: bool) -> dict:
    place = {"Name": name, "Location": "Device", "Dimensions": [1, 32, 480, 128]}
    if newer:
        return {**place, "Format": f"Row major linear {dtype} format (kLINEAR)", "DataType": dtype}
    return {**place, "Format/Datatype": dtype}


def layer(name: str, tactic: str, nodes: list[str], dtype: str, newer: bool, kind="kgen") -> dict:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor("__mye1", dtype, newer)],
        "Outputs": [tensor("__mye2", dtype, newer)],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\u001e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def sample(newer: bool) -> str:
    """A block's attention, the product in front of it, its modulation, and a copy."""
    mha, gemm = "_gemm_mha_v2_0x957a2fe283f77dcf", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n"
    attention, linear = "node_scaled_dot_product_attention | blocks.0 (Block)", "node_linear"
    layers = [
        # A model's own names may say mha: the kernel does not.
        layer("blocks.0/mha/q_myl0_16", gemm, ["node_linear_1 | b"], "BFloat16", newer, "gemm"),
        layer("_gemm_mha_v2_myl0_17", mha, [attention], "BFloat16", newer),
        layer("node_linear_myl0_3", "sm90_sgemm", [linear], "Float", newer, "gemm"),
        # Nor does a layer whose kernel is not told.
        {"Name": "copy of mha", "LayerType": "Reformat", "Inputs": [], "Outputs": []},
    ]
    if newer:
        port = {"Name": "velocity", "IOMode": "Output", "DataType": "Float", "Location": "Device"}
        return json.dumps({"Layers": layers, "I/O Tensors": [port]})
    return json.dumps({"Layers": layers, "Bindings": ["velocity"]})


@pytest.mark.parametrize("newer", [False, True])
def test_both_forms_say_the_same(newer):
    found = read_layers(sample(newer))
    assert found.ports == ("velocity",)
    assert found.detailed
    assert [layer.name for layer in found.fused_attentions] == ["_gemm_mha_v2_myl0_17"]
    assert [layer.dtypes for layer in found.layers] == [
        {"bfloat16"}, {"bfloat16"}, {"float32"}, frozenset(),
    ]  # fmt: skip
    assert found.layers[1].nodes == ("node_scaled_dot_product_attention | blocks.0 (Block)",)


def test_names_alone_are_told_apart_from_details():
    found = read_layers(json.dumps({"Layers": ["{ForeignNode[a...b]}"], "Bindings": ["x"]}))
    assert not found.detailed
    assert found.fused_attentions == ()


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"Layer": []}', '{"Layers": 3}', "[" * 100_000])
def test_what_is_neither_form_is_refused(text):
    with pytest.raises(IncompatibleError, match="the engine's inspector gave no"):
        read_layers(text)


@pytest.mark.parametrize(
    ("told", "dtype"),
    [
        ({"Format/Datatype": "Half"}, "float16"),
        ({"Format/Datatype": "Row major linear FP16 format"}, "float16"),
        ({"Format/Datatype": "BFloat16"}, "bfloat16"),
        ({"Format/Datatype": "Row major linear BF16 format"}, "bfloat16"),
        ({"Format/Datatype": "Float"}, "float32"),
        ({"Format/Datatype": "Row major linear FP32"}, "float32"),
        ({"Format/Datatype": "Int64"}, None),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, None),
        ({"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "BFloat16"}, "bfloat16"),
        ({"Format": "Row major linear", "Datatype": "Float"}, "float32"),
        ({"Format": "Row major linear FP16 format (kLINEAR)"}, "float16"),
        ({}, None),
    ],
)
def test_types_as_the_versions_spell_them(told, dtype):
    assert dtype_from(told) == dtype


def test_only_layers_of_islands_alone_count_as_islands():
    def made(name: str, nodes: tuple[str, ...], *dtypes: str) -> EngineLayer:
        return EngineLayer(name, "kgen", name, nodes, frozenset(dtypes))

    layers = [
        made("alone", ("norm",), "float32"),
        made("low", ("norm", "gate"), "float32", "bfloat16"),
        made("fused with another", ("norm", "product"), "bfloat16"),
        made("of nothing", (), "bfloat16"),
        made("untold", ("norm",)),
    ]
    found = islands_of(layers, {"norm", "gate"})
    assert [layer.name for layer in found] == ["alone", "low"]
    assert [layer.name for layer in rounded(found)] == ["low"]


def test_a_build_with_unfused_attention_is_refused():
    require_fused([sample(False), sample(True)], [1, 1])
    with pytest.raises(BuildError, match=r"not fused as it must be; got plan 1: 1 of 2"):
        require_fused([sample(False), sample(True)], [1, 2])


@pytest.mark.parametrize("version", ["10.14.1", "11.4.0.106"])
def test_an_open_engine_tells_of_each_segment(open_engine, version):
    engine = open_engine(3, plan={"version": version})
    plans = [read_layers(text) for text in engine.inspect()]
    assert len(plans) == 3
    assert sum(len(plan.fused_attentions) for plan in plans) == 6  # three blocks
    assert plans[-1].ports[-1] == "velocity"
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.inspect()
