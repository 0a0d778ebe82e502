"""The network as the real parser makes it: right ones pass, each mistake is named."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from lcexport.checkpoint import open_checkpoint, read_header
from lcexport.configs.errors import BuildError
from lcexport.dit import Geometry
from lcexport.dit.sparse import Sparsity
from lcexport.engines.trt.compile import compile_plan
from lcexport.engines.trt.network import (
    COUNTED,
    Expectations,
    NetworkSummary,
    check_network,
)
from lcexport.engines.trt.options import TrtOptions
from lcexport.engines.trt.parsing import parse_network
from lcexport.engines.trt.product import MessageLog, Product, builder_for, logger_for
from lcexport.graph import GraphSpec, onnx_from_dit, prove_precision, save_graph

NO_ATTENTION = Expectations(attentions=0)


@pytest.fixture
def check(rtx: Product):
    """`check(bytes, path, expectations)` parses and checks; nothing is compiled."""

    def run(graph: bytes, path: Path, expectations: Expectations) -> NetworkSummary:
        log = MessageLog()
        logger = logger_for(rtx, log)
        builder = builder_for(rtx, logger)
        parsed = parse_network(rtx, builder, logger, log, graph, path)
        return check_network(rtx, parsed.network, expectations, path)

    return run


@pytest.fixture
def check_text(check, graph_from: Callable[[str], bytes], tmp_path: Path):
    def run(text: str, expectations: Expectations = NO_ATTENTION) -> NetworkSummary:
        return check(graph_from(text), tmp_path / "text.onnx", expectations)

    return run


def test_block_sparse_attention_parses_as_its_functions(
    check, rtx, dit_folder, make_weights, tmp_path
):
    """No plugin is registered: the parser takes the function inside the function, and its Scan."""
    sparse = Sparsity(0.5, None, (2, 2, 2), (2, 2, 2))
    weights = make_weights("bf16")
    spec = GraphSpec(Geometry(1, 4, 4, 6, 2, sparse=sparse), 10, torch.bfloat16)
    config = open_checkpoint(dit_folder).config
    path = weights.with_name("sparse-trt.onnx")
    save_graph(onnx_from_dit(config, spec, read_header(weights).tensors, "0"), path)
    proof = prove_precision(ir.load(path), torch.bfloat16, attentions=3, sparse=2)
    summary = check(path.read_bytes(), path, Expectations.from_proof(proof))
    assert summary.sparse_attentions == 2 * summary.attentions == 2 * config.depth
    wanted = Expectations.from_proof(proof).model_copy(update={"sparse_plugin": True})
    with pytest.raises(BuildError, match="of the function that the plugin should have replaced"):
        check(path.read_bytes(), path, wanted)
    expectations = Expectations.from_proof(proof)
    plan = tmp_path / "sparse.plan"
    made = compile_plan(rtx, path.read_bytes(), path, TrtOptions(), plan, expectations)
    assert made.bytes == plan.stat().st_size > 0


def test_a_plugin_of_the_kind_that_is_compiled_ahead_is_refused_by_the_parser(rtx, check_text):
    class Creator(rtx.trt.IPluginCreatorV3Quick):
        def __init__(self) -> None:
            rtx.trt.IPluginCreatorV3Quick.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = "Quick", "lcexport", "1"
            self.field_names = rtx.trt.PluginFieldCollection([])

    creator, registry = Creator(), rtx.trt.get_plugin_registry()
    assert registry.register_creator(creator, "lcexport")
    node = 'y = lcexport.Quick <plugin_namespace = "lcexport", plugin_version = "1"> (x)'
    try:
        with pytest.raises(BuildError, match="with an IPluginCreatorV3One creator only"):
            check_text(f"g (float[4] x) => (float[4] y) {{ {node} }}")
    finally:
        registry.deregister_creator(creator)


@pytest.mark.parametrize(
    ("variant", "attentions"),
    [({}, 6), ({"zero_pad": False}, 6), ({"cond": 1}, 9)],
)
def test_tensorrt_finds_what_the_exporter_proved(
    check, make_graph: Callable[..., Path], variant, attentions
):
    path = make_graph("bf16", **{"batch": 1, "frames": 3, **variant})
    proof = prove_precision(ir.load(path), torch.bfloat16, attentions=attentions // 3)
    found = check(path.read_bytes(), path, Expectations.from_proof(proof))
    assert found.attentions == attentions
    assert found.products_fp32 == 7
    assert found.weights_bytes >= 0.99 * (path.parent / "dit.safetensors").stat().st_size
    assert {record.name: record.dtype for record in (*found.inputs, *found.outputs)} == {
        "hidden_states": "float32",
        "encoder_hidden_states": "float32",
        "timestep": "float32",
        "encoder_attention_mask": "bool",
        "velocity": "float32",
    }


def test_float32_attention_is_refused_with_its_layer(check, make_graph: Callable[..., Path]):
    path = make_graph("fp32", batch=1, frames=3)
    with pytest.raises(BuildError, match=r"node_scaled_dot_product_attention.*blocks\.0") as caught:
        check(path.read_bytes(), path, Expectations(attentions=6))
    assert "--precision bf16" in str(caught.value)


def test_another_number_of_attentions_is_refused(check, dit_graph: Path):
    with pytest.raises(BuildError, match=r"number of attentions; got 6, among them .*wanted 8"):
        check(dit_graph.read_bytes(), dit_graph, Expectations(attentions=8))


DECOMPOSED = """g (bfloat16[1,2,8,16] q, bfloat16[1,2,16,8] k, bfloat16[1,2,8,16] v)
    => (bfloat16[1,2,8,16] y) {
    s = MatMul (q, k)
    [soft] p = Softmax <axis = -1> (s)
    y = MatMul (p, v)
}"""


def test_attention_in_pieces_is_refused_with_its_layer(check_text):
    with pytest.raises(BuildError, match=r"'soft' .* is attention in pieces"):
        check_text(DECOMPOSED)


def attention_text(dtype: str = "bfloat16", keys: int = 8, more: str = "scale = 1.0") -> str:
    q, kv = f"{dtype}[1,2,8,16]", f"{dtype}[1,2,{keys},16]"
    return f"g ({q} q, {kv} k, {kv} v) => ({q} y) {{ [att] y = Attention <{more}> (q, k, v) }}"


def test_attention_that_may_be_decomposed_is_refused(check_text):
    text = attention_text(more="scale = 1.0, TRT_decomposable = 1")
    with pytest.raises(BuildError, match=r"att.* may be taken apart.*TRT_decomposable"):
        check_text(text, Expectations(attentions=1))


@pytest.mark.parametrize(
    "scale", ["is_causal = 0", "scale = 0.0883883476"], ids=["default", "named"]
)
def test_attention_that_would_be_scaled_in_bfloat16_is_refused(check_text, scale):
    with pytest.raises(BuildError, match=r"is not float32; got bfloat16|leaves float32 too early"):
        check_text(attention_text(more=scale), Expectations(attentions=1))


def test_float16_attention_is_refused_where_it_may_overflow(check_text):
    one = Expectations(attentions=1)
    assert check_text(attention_text("float16", 60_000), one).attentions == 1
    assert check_text(attention_text("bfloat16", 92_160), one).attentions == 1
    with pytest.raises(BuildError, match=r"att.* may overflow in float16; got 60016 keys"):
        check_text(attention_text("float16", 60_016), one)


ISLAND = """g (bfloat16[4,16] x, bfloat16[16] w, bfloat16[16] b) => (bfloat16[4,16] y) {
    [norm] y = LayerNormalization (x, w, b)
}"""
SQUARE = """g (bfloat16[4,16] x) => (bfloat16[4,16] y) {
    two = Constant <value = bfloat16 {2}> ()
    [square] y = Pow (x, two)
}"""
ROOT = "g (bfloat16[4,16] x) => (bfloat16[4,16] y) { [root] y = Sqrt (x) }"
MEAN = """g (bfloat16[4,16] x) => (bfloat16[4,1] y) {
    axes = Constant <value_ints = [-1]> ()
    [mean] y = ReduceMean <keepdims = 1> (x, axes)
}"""


@pytest.mark.parametrize(
    ("text", "name"), [(ISLAND, "norm"), (SQUARE, "square"), (ROOT, "root"), (MEAN, "mean")]
)
def test_an_island_in_bfloat16_is_refused_with_its_layer(check_text, text, name):
    with pytest.raises(BuildError, match=f"'{name}.* is not float32; got bfloat16"):
        check_text(text)


def test_modulation_that_is_rounded_early_is_refused_with_its_block(check, dit_graph: Path):
    """The adaLN product's result goes through bfloat16, in every block; all else is right."""
    model = onnx.load(dit_graph, load_external_data=False)
    block = next(function for function in model.functions if function.name == "Block")
    split = next(node for node in block.node if node.op_type == "Split" and len(node.output) == 6)
    low = onnx.helper.make_node("Cast", [split.input[0]], ["low"], "early", to=16)
    high = onnx.helper.make_node("Cast", ["low"], ["high"], "back", to=1)
    split.input[0] = "high"
    at = list(block.node).index(split)
    block.node.insert(at, low)
    block.node.insert(at + 1, high)
    with pytest.raises(BuildError, match=r"'early'.*blocks\.0.* leaves float32 too early"):
        check(model.SerializeToString(), dit_graph, Expectations(attentions=6))


def test_an_islands_product_in_bfloat16_is_refused_with_its_weight(check_text):
    text = """g (bfloat16[4,16] x) => (bfloat16[4,16] y)
        <bfloat16[16,16] adaln = {%s}> { [modulate] y = MatMul (x, adaln) }"""
    text %= ", ".join(["0"] * 256)
    islands = Expectations(attentions=0, products_bulk=1, islands=frozenset({"adaln"}))
    with pytest.raises(BuildError, match=r"'modulate' .* with adaln is not float32; got bfloat16"):
        check_text(text, islands)
    check_text(text, islands.model_copy(update={"islands": frozenset({"other"})}))


def test_the_islands_of_the_dit_are_products_with_their_weights(check, dit_graph, expected):
    islands = frozenset({"blocks.2.adaln_linear_1.weight", "final_layer.linear.weight"})
    known = expected.model_copy(update={"islands": islands})
    assert check(dit_graph.read_bytes(), dit_graph, known).products_fp32 == 7
    wrong = frozenset({"blocks.1.self_attn.to_q.weight"})
    with pytest.raises(BuildError, match=r"blocks\.1 .* with blocks\.1\.self_attn\.to_q\.weight"):
        check(dit_graph.read_bytes(), dit_graph, expected.model_copy(update={"islands": wrong}))


def test_an_islands_weight_that_is_handed_in_is_known_by_its_name(check_text):
    text = """g (bfloat16[4,16] x, bfloat16[8,16] island) => (bfloat16[4,8] y) {
        [product] y = Gemm <transB = 1> (x, island)
    }"""
    assert check_text(text).products_bulk == 1
    with pytest.raises(BuildError, match=r"product.* with island is not float32"):
        check_text(text, Expectations(attentions=0, islands=frozenset({"island"})))


@pytest.mark.parametrize("kind", COUNTED)
def test_every_count_is_held_against_the_network(check, dit_graph: Path, expected, kind):
    off = expected.model_copy(update={kind: getattr(expected, kind) + 1})
    with pytest.raises(BuildError, match=f"another number of {kind.replace('_', ' ')}; got"):
        check(dit_graph.read_bytes(), dit_graph, off)


def test_a_missing_cast_is_the_parsers_error_with_its_node(check_text):
    text = """g (bfloat16[4] x, float[4] w) => (bfloat16[4] y) { [gate] y = Mul (x, w) }"""
    with pytest.raises(BuildError, match=r"node 'gate' \(Mul\); got .*needs a Cast"):
        check_text(text)


def test_an_unknown_operation_is_the_parsers_error(check_text):
    with pytest.raises(BuildError, match=r"node 'odd' \(Frobnicate\)"):
        check_text("g (float[4] x) => (float[4] y) { [odd] y = Frobnicate (x) }")


def test_a_dynamic_shape_is_refused_with_its_tensor(check_text):
    with pytest.raises(BuildError, match="tensor x has no static shape"):
        check_text("g (float[N] x) => (float[N] y) { y = Abs (x) }")


@pytest.mark.parametrize("graph", [b"", b"hello world", b"\xff" * 64])
def test_what_is_no_graph_is_refused(check, tmp_path: Path, graph):
    with pytest.raises(BuildError, match=r"(not an ONNX graph|cannot parse)"):
        check(graph, tmp_path / "no.onnx", NO_ATTENTION)


def test_a_truncated_graph_is_refused(check, dit_graph: Path, expected):
    graph = dit_graph.read_bytes()
    with pytest.raises(BuildError, match="damaged or cut short"):
        check(graph[: len(graph) // 2], dit_graph, expected)


def test_missing_weights_are_refused(check, dit_graph: Path, tmp_path: Path, expected):
    with pytest.raises(BuildError, match="must lie beside the graph"):
        check(dit_graph.read_bytes(), tmp_path / dit_graph.name, expected)


def test_truncated_weights_are_refused(check, dit_graph: Path, tmp_path: Path, expected):
    weights = (dit_graph.parent / "dit.safetensors").read_bytes()
    (tmp_path / "dit.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BuildError, match="must lie beside the graph"):
        check(dit_graph.read_bytes(), tmp_path / dit_graph.name, expected)
