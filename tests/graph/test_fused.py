"""What the graph for ONNX Runtime on processors is made of.

That it computes the same is in test_outputs, test_cache_graphs, test_sparse_graph and
test_int8_graph, with the data that the graph it is made of is held against.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lcexport.configs.errors import BuildError
from lcexport.graph.fused import WRITTEN_OUT, fused_graph

DEPTH, HEADS = 3, 2
FRAMES, TOKENS = 64, 64 * 24  # more tokens than any layer is wide


@dataclass(frozen=True)
class Ran:
    """An operation that ONNX Runtime ran, with the shapes it had."""

    kind: str
    inputs: list[list[int]]
    outputs: list[list[int]]


@pytest.fixture(scope="module", params=[0, 1], ids=["all noise", "one clean frame"])
def ran(request, make_graph, fuse, tmp_path_factory) -> list[Ran]:
    """Every operation of one run of the fused graph, by ONNX Runtime's own profile."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path_factory.mktemp("profile") / "run")
    graph = fuse(make_graph(batch=1, frames=FRAMES, cond=request.param))
    session = ort.InferenceSession(str(graph), options)
    types = {"tensor(float)": np.float32, "tensor(bool)": np.bool_}
    session.run(None, {i.name: np.ones(i.shape, types[i.type]) for i in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    found = [event["args"] for event in events if event["name"].endswith("_kernel_time")]
    return [
        Ran(args["op_name"], *(shapes(args[f"{way}_type_shape"]) for way in ("input", "output")))
        for args in found
    ]


def shapes(described: list[dict[str, list[int]]]) -> list[list[int]]:
    return [shape for tensor in described for shape in tensor.values()]


def block_of(model: ir.Model) -> ir.Function:
    return next(f for f in model.functions.values() if f.name == "Block")


def test_no_tensor_is_as_large_as_the_scores(ran):
    sizes = [math.prod(shape) for node in ran for shape in node.outputs]
    assert len(sizes) > 25 * DEPTH
    assert max(sizes) < TOKENS * TOKENS


def test_attention_takes_rows_and_no_mask_so_it_keeps_a_tile_of_its_scores(ran):
    """By head, or with a mask, ONNX Runtime's operation keeps all scores as well."""
    attentions = [node for node in ran if node.kind == "MultiHeadAttention"]
    assert len(attentions) in (2 * DEPTH, 3 * DEPTH)
    for node in attentions:
        assert [len(shape) for shape in node.inputs] == [3, 3, 3]
    assert max(node.inputs[1][1] for node in attentions) == TOKENS


def test_norms_and_rope_are_one_operation_each(ran):
    kinds = Counter(node.kind for node in ran)
    assert not WRITTEN_OUT & set(kinds)
    assert kinds["RotaryEmbedding"] == 2 * DEPTH
    assert kinds["RMSNormalization"] == 4 * DEPTH


def test_neither_tokens_nor_weights_are_transposed(ran):
    kinds = Counter(node.kind for node in ran)
    assert kinds["Transpose"] == 2  # latents to patches, patches to latents
    assert kinds["Gemm"] == 12 * DEPTH + 7
    assert not kinds["MatMul"]


def test_attention_scales_nothing(make_graph, fuse):
    block = block_of(ir.load(fuse(make_graph())))
    scales = [n.attributes["scale"].as_float() for n in block if n.op_type == "MultiHeadAttention"]
    assert scales == [1.0, 1.0]


def test_a_mask_hides_keys_whatever_their_scores(make_graph, fuse):
    """ONNX Runtime's default is -10000: a key with a score above that would be seen again."""
    block = block_of(ir.load(fuse(make_graph(zero_pad=False))))
    cross = [node for node in block if node.op_type == "MultiHeadAttention"][1]
    assert cross.attributes["mask_filter_value"].as_float() < -3e38
    cast = cross.predecessors()[-1]
    assert [value.name for value in cast.inputs if value is not None] == ["text_mask"]


def test_the_weights_stay_in_the_one_file(make_graph, fuse):
    plain, fused = (ir.load(path) for path in (make_graph(), fuse(make_graph())))
    assert list(fused.graph.initializers) == list(plain.graph.initializers)
    for name, value in fused.graph.initializers.items():
        there, here = plain.graph.initializers[name].const_value, value.const_value
        assert isinstance(there, ir.ExternalTensor)
        assert isinstance(here, ir.ExternalTensor)
        wanted = (there.location, there.offset, there.length)
        assert (here.location, here.offset, here.length) == wanted


@pytest.mark.parametrize("kind", ["ReduceMean", "Sub", "Attention"])
def test_what_is_not_recognised_is_an_error(make_graph, kind):
    """A norm, a RoPE or an attention that is written otherwise than the exporter writes it."""
    model = ir.load(make_graph())
    block = block_of(model)
    node = next(node for node in block if node.op_type == kind)
    twice = ir.node("Identity", [node.outputs[0]], name="between")
    node.outputs[0].replace_all_uses_with(twice.outputs[0])
    twice.replace_input_with(0, node.outputs[0])
    block.insert_after(node, twice)
    with pytest.raises(BuildError, match="Block is not fused for ONNX Runtime; got "):
        fused_graph(model, HEADS)


@pytest.mark.parametrize(
    ("name", "value"), [("scale", 0.5), ("scale", None), ("is_causal", 1), ("softcap", 20.0)]
)
def test_an_attention_that_does_more_is_an_error(make_graph, name, value):
    """Its replacement would leave that out."""
    model = ir.load(make_graph())
    attributes = next(n for n in block_of(model) if n.op_type == "Attention").attributes
    del attributes[name]
    if value is not None:
        attributes.add(ir.convenience.convert_attribute(name, value))
    with pytest.raises(BuildError, match=r"Block is not fused for ONNX Runtime; got Attention "):
        fused_graph(model, HEADS)


def test_a_mask_that_is_not_the_texts_is_an_error(make_graph):
    model = ir.load(make_graph(zero_pad=False))
    block = block_of(model)
    node = [node for node in block if node.op_type == "Attention"][1]
    other = ir.node("Not", [node.inputs[3]], name="other")
    node.replace_input_with(3, other.outputs[0])
    block.insert_before(node, other)
    with pytest.raises(BuildError, match=r"Block is not fused for ONNX Runtime; got Attention "):
        fused_graph(model, HEADS)


def test_parts_put_together_otherwise_are_an_error(make_graph):
    """Only tokens are put one behind the other."""
    model = ir.load(make_graph(cond=1))
    node = next(
        n for n in block_of(model)
        if n.op_type == "Concat" and n.predecessors()[0].op_type == "Attention"
    )  # fmt: skip
    node.attributes["axis"] = ir.AttrInt64("axis", 3)
    with pytest.raises(BuildError, match=r"Block is not fused for ONNX Runtime; got Concat "):
        fused_graph(model, HEADS)


def test_a_bfloat16_graph_is_refused(make_graph):
    """Its casts are no part of what is recognised: nothing is fused across a rounding."""
    with pytest.raises(BuildError, match="not fused"):
        fused_graph(ir.load(make_graph("bf16")), HEADS)
