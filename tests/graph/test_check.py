"""The checker refuses what TensorRT for RTX refuses, and where it refuses more, why."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from lcexport.configs.errors import InputError, UsageError
from lcexport.graph.check import Violation, check_graph
from lcexport.graph.segments import segment_graph

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
ALL = ("tensorrt-10", "tensorrt-11", "tensorrt-rtx")
Verdict = Callable[..., str]

# --- the real thing


@pytest.fixture(scope="session")
def rtx() -> Verdict:
    """`rtx(model, path)` is "" where TensorRT for RTX parses and builds, or what it says."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

    class Errors(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(msg)

    logger = Errors()
    builder = trt.Builder(logger)

    def verdict(model: ir.Model | onnx.ModelProto, beside: Path | None = None) -> str:
        logger.messages.clear()
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
        data = proto.SerializeToString()
        where = () if beside is None else (str(beside),)
        if not parser.parse(data, *where):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            return "; ".join(errors or logger.messages) or "not parsed"
        config = builder.create_builder_config()
        if builder.build_serialized_network(network, config) is None:
            return "; ".join(logger.messages) or "not built"
        return ""

    return verdict


# --- graphs as text


def text(body: str, inputs: str, output: str, opset: int = 23) -> str:
    header = f'<ir_version: 11, opset_import: ["" : {opset}]>'
    return f"{header} main ({inputs}) => ({output} y) {{ {body} }}"


def attention(
    dtype: str = "bfloat16",
    q: str = "1,2,16,64",
    k: str = "1,2,16,64",
    v: str = "",
    call: str = "y = Attention(q, k, v)",
    more: str = "",
    v_dtype: str = "",
) -> str:
    inputs = f"{dtype}[{q}] q, {dtype}[{k}] k, {v_dtype or dtype}[{v or k}] v{more}"
    output = f"{dtype}[{q.rpartition(',')[0]},{(v or k).rpartition(',')[2]}]"
    return text(call, inputs, output)


def sized(dim: int) -> str:
    return attention(q=f"1,2,16,{dim}", k=f"1,2,16,{dim}")


def masked(mask: str) -> str:
    return attention(call="y = Attention(q, k, v, m)", more=f", {mask} m")


def mixed(call: str, shape: str = "4,4", output: str = "float[4,4]") -> str:
    return text(f"[mix] y = {call}", f"bfloat16[{shape}] x, float[{shape}] z", output)


ADD = "y = Add(x, x)"
BRANCH = "bfloat16[1,2,16,64] {0}) {{ {0} = {1} }}"
IF = (
    "y = If(c) <then_branch = a () => ("
    + BRANCH
    + ", else_branch = b () => ("
    + BRANCH.replace("{0}", "{2}").replace("{1}", "{3}")
    + ">"
)
BRANCHES = "bool c, bfloat16[1,2,16,64] q", "bfloat16[1,2,16,64]"
LOOP = (
    "n = Constant<value = int64 {{3}}>() y = Loop<body = "
    "b (int64 i, bool d, bfloat16[1,2,16,64] u) => (bool e, bfloat16[1,2,16,64] v) "
    "{{ e = Identity(d) v = {0} }}>(n, c, q)"
)
SCAN = (
    "t, y = Scan<num_scan_inputs = 1, body = "
    "b (bfloat16[1] u, bfloat16[1,2,16,64] a) => (bfloat16[1] w, bfloat16[1,2,16,64] r) "
    "{{ w = Identity(u) r = {0} }}>(s, x)"
)
SCANNED = "bfloat16[1] s, bfloat16[3,1,2,16,64] x", "bfloat16[3,1,2,16,64]"
EXPAND = "s = Constant<value = int64[2] {{{0}, {0}}}>() e = Expand(x, s) y = ReduceMax(e)"

WIDTHS = (9, 10, 11, 12, 16, 17, 24, 33, 48, 63, 65, 72, 100, 120, 127, 129, 200, 255, 256)

GOOD = {
    "add": text(ADD, "bfloat16[4] x", "bfloat16[4]"),
    "add, opset 9": text(ADD, "float[4] x", "float[4]", 9),
    "add, opset 25": text(ADD, "float[4] x", "float[4]", 25),
    "rank 8": text(ADD, "float[1,1,1,1,1,1,1,2] x", "float[1,1,1,1,1,1,1,2]"),
    "int32": text(ADD, "int32[4] x", "int32[4]"),
    "mixed, cast": text(
        "w = Cast<to = 1>(x) y = Mul(w, z)", "bfloat16[4] x, float[4] z", "float[4]"
    ),
    "bfloat16 convolution": text(
        "y = Conv(x, z)", "bfloat16[1,4,4,4] x, bfloat16[4,4,1,1] z", "bfloat16[1,4,4,4]"
    ),
    "attention": attention(),
    "attention, float16": attention("float16"),
    "attention, rank 3": attention(
        q="1,16,128", k="1,16,128", call="y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)"
    ),
    "attention, shared keys": attention(q="1,4,16,64"),
    "attention, one head, two batches": attention(q="2,1,16,64", k="2,1,16,64"),
    **{f"attention, head of {width}": sized(width) for width in WIDTHS},
    "attention, 92,160 keys": attention(k="1,2,92160,64"),
    "attention, boolean mask": masked("bool[1,1,16,16]"),
    "attention, mask of keys": masked("bool[1,1,1,16]"),
    "attention, mask of 480p": attention(
        q="1,2,37440,64",
        k="1,2,37440,64",
        call="y = Attention(q, k, v, m)",
        more=", bool[1,1,37440,37440] m",
    ),
    "attention, added mask": masked("bfloat16[16,16]"),
}

# name -> (graph, what the checker says): the parser or the compiler refuses these too
BAD = {
    "mixed product": (mixed("Mul(x, z)"), r"mix: Mul: B has inconsistent type .* \[typing\]"),
    "mixed sum": (mixed("Add(x, z)"), "typing"),
    "mixed gemm": (mixed("Gemm(x, z)"), "typing"),
    "mixed matmul": (mixed("MatMul(x, z)"), "typing"),
    "mixed concat": (mixed("Concat<axis = 0>(x, z)", output="float[8,4]"), "typing"),
    "mixed norm": (
        text("y = LayerNormalization(x, z)", "bfloat16[2,4] x, float[4] z", "bfloat16[2,4]"),
        "typing",
    ),
    "condition that is no boolean": (
        text("y = Where(c, x, x)", "float[4] c, float[4] x", "float[4]"),
        "typing",
    ),
    "sizes that do not fit": (
        text("y = Add(x, z)", "float[4] x, float[5] z", "float[4]"),
        "Incomp",
    ),
    "reshape to another volume": (
        text("s = Constant<value = int64[1] {5}>() y = Reshape(x, s)", "float[4] x", "float[5]"),
        r"Reshape of \[4\] to \[5\]",
    ),
    "rank 9": (text(ADD, "float[1,1,1,1,1,1,1,1,2] x", "float[1,1,1,1,1,1,1,1,2]"), "rank 9"),
    "sequence": (
        text(
            "s = SequenceConstruct(x, x) y = ConcatFromSequence<axis = 0>(s)",
            "float[4] x",
            "float[8]",
        ),
        "SequenceConstruct is not an operator",
    ),
    "string": (
        text('s = Constant<value_string = "a">() ' + ADD, "float[4] x", "float[4]"),
        "STRING",
    ),
    "uint32": (text(ADD, "uint32[4] x", "uint32[4]"), "x is UINT32"),
    "int32 Relu": (
        text("y = Relu(x)", "int32[4] x", "int32[4]"),
        "INT32 is not among the types our rules allow for Relu",
    ),
    "bfloat16 Mish": (text("y = Mish(x)", "bfloat16[4] x", "bfloat16[4]"), "BFLOAT16 is not among"),
    "unknown operator": (text("y = Foo(x)", "float[4] x", "float[4]"), "Foo is not an operator"),
    "bitwise": (text("y = BitwiseNot(x)", "int32[4] x", "int32[4]"), "BitwiseNot"),
    "dynamic": (text(ADD, "float[N] x", "float[N]"), r"not known: \[0\]"),
    "size from the data": (text("y = NonZero(x)", "float[4] x", "int64[1,N]"), "NonZero"),
    "attention, float32": (attention("float"), "FLOAT is not one of the types that are built"),
    "attention, head of 8": (sized(8), "head dimension of 8 is not built: 9 to 256 are"),
    "attention, head of 257": (sized(257), "head dimension of 257"),
    "attention, head of 384": (sized(384), "head dimension of 384"),
    "attention, ranks differ": (
        attention(
            k="1,16,128", q="1,2,16,64", call="y = Attention<q_num_heads=2, kv_num_heads=2>(q,k,v)"
        ),
        "differ in rank|typing",
    ),
    "attention, rank 3 without heads": (attention(q="3,16,64", k="3,16,64"), "rank 4|typing"),
    "attention, 4 heads and 3": (attention(q="1,4,16,64", k="1,3,16,64"), "do not fit"),
    "attention, batches differ": (attention(q="2,2,16,64"), "do not fit"),
    "attention, head dims differ": (attention(k="1,2,16,32"), "do not fit"),
    "attention, smaller values": (attention(v="1,2,16,32"), "differ in shape"),
    "attention, values of another type": (attention(v_dtype="float"), "differ in type"),
    "attention, one head": (attention(q="1,1,16,64", k="1,1,16,64"), "one head"),
    "attention, one query": (attention(q="1,2,1,64", k="1,2,16,64"), "one query"),
    "attention, one query, three heads": (attention(q="1,3,1,64", k="1,3,16,64"), "one query"),
    "attention, one head, one query": (attention(q="2,1,1,64", k="2,1,16,64"), "one query"),
    "attention, past": (
        attention(
            call="y = Attention(q, k, v, , a, b)",
            more=", bfloat16[1,2,8,64] a, bfloat16[1,2,8,64] b",
        ),
        "past keys",
    ),
    "attention, present": (attention(call="y, a, b = Attention(q, k, v)"), "more than one output"),
    "attention, softcap": (attention(call="y = Attention<softcap = 30.0>(q, k, v)"), "softcap"),
    "attention, softmax precision": (
        attention(call="y = Attention<softmax_precision = 1>(q, k, v)"),
        "softmax_precision",
    ),
    "attention, mask in float32": (masked("float[16,16]"), "the mask is FLOAT"),
    "attention, mask of integers": (masked("int32[16,16]"), "the mask is INT32"),
    "attention, mask of rank 5": (masked("bool[2,1,1,16,16]"), "does not spread"),
    "attention, mask too small": (masked("bool[16,8]"), "does not spread"),
    "attention in a branch": (
        text(IF.format("t", "Attention(q, q, q)", "e", "Identity(q)"), *BRANCHES),
        "Attention inside If was seen not to build",
    ),
    "attention in a loop": (
        text(LOOP.format("Attention(u, u, u)"), *BRANCHES),
        "Attention inside Loop was seen not to build",
    ),
    "attention in a scan": (
        text(SCAN.format("Attention(a, a, a)"), *SCANNED),
        "Attention inside Scan was seen not to build",
    ),
    "scan without a state": (
        text(
            "y = Scan<num_scan_inputs = 1, body = b (float[4] a) => (float[4] r) {r = Relu(a)}>(x)",
            "float[3,4] x",
            "float[3,4]",
        ),
        "inside the branches of Scan",
    ),
}

# name -> (graph, what the checker says, why it is stricter than the parser of TensorRT for RTX)
STRICTER = {
    "opset 26": (
        text(ADD, "float[4] x", "float[4]", 26),
        "opset 26; our rule is 9 to 25",
        "documented to 25; a newer one is read as far as it is understood",
    ),
    "opset 8": (text(ADD, "float[4] x", "float[4]", 8), "opset 8", "documented from 9"),
    "float64": (
        text("a = Cast<to = 11>(x) b = Sin(a) y = Cast<to = 1>(b)", "float[4] x", "float[4]"),
        "a is DOUBLE",
        "computed in float32, without a word",
    ),
    "computed int64": (
        text("a = Cast<to = 7>(x) b = Add(a, a) y = Cast<to = 1>(b)", "float[4] x", "float[4]"),
        "a is computed int64",
        "sizes must be known when the graph is built",
    ),
    "int64 input": (text(ADD, "int64[4] x", "int64[4]"), "computed int64", "the same"),
    "int8": (
        text(ADD, "int8[4] x", "int8[4]"),
        "INT8 is not among the types our rules allow for Add",
        "weights alone are int8",
    ),
    "uint8": (text("y = Cast<to = 1>(x)", "uint8[4] x", "float[4]"), "UINT8", "only to be cast"),
    "mixed power": (
        mixed("Pow(x, z)", output="bfloat16[4,4]"),
        "Pow mixes BFLOAT16, FLOAT",
        "ONNX allows it and the parser converts: types must say what is computed",
    ),
    "output declared as another type": (
        text(ADD, "bfloat16[4] x", "float[4]"),
        r"y is declared FLOAT \[4\] and is BFLOAT16",
        "the engine's output is not the graph's",
    ),
    "output declared in another shape": (
        text(ADD, "bfloat16[4] x", "bfloat16[5]"),
        "is declared",
        "the same",
    ),
    "volume": (
        text(EXPAND.format(46341), "bfloat16[1,1] x", "bfloat16[1,1]"),
        "2.31 elements",
        "the documented limit",
    ),
    "empty": (text(ADD, "float[0,4] x", "float[0,4]"), "empty", "an empty tensor is a mistake"),
    "float16 with many keys": (
        attention("float16", k="1,2,60001,64"),
        "60001 keys may overflow",
        "NaN was reported of 65,536 keys, more than float16's largest number: a margin",
    ),
    "one query, two batches": (
        attention(q="2,2,1,64", k="2,2,16,64"),
        "one query",
        "it builds in some sizes only: too few were tried",
    ),
    "one query, four heads": (attention(q="1,4,1,64", k="1,4,16,64"), "one query", "the same"),
    "decomposable attention": (
        attention(call="y = Attention<TRT_decomposable = 1>(q, k, v)"),
        "TRT_decomposable",
        "unfused, it would write all scores; ONNX Runtime refuses the attribute",
    ),
    "scores of an earlier stage": (
        attention(call="y = Attention<qk_matmul_output_mode = 1>(q, k, v)"),
        "qk_matmul_output_mode",
        "about an output that may not be there",
    ),
    "branches": (
        text(IF.format("t", "Add(q, q)", "e", "Identity(q)"), *BRANCHES),
        "inside the branches of If",
        "their types are not proven",
    ),
    "loop": (text(LOOP.format("Add(u, u)"), *BRANCHES), "branches of Loop", "the same"),
    "scan": (text(SCAN.format("Add(a, a)"), *SCANNED), "branches of Scan", "the same"),
    "random": (
        text("r = RandomNormalLike(x) y = Add(x, r)", "float[4] x", "float[4]"),
        "RandomNormalLike",
        "not tried, and engines would differ",
    ),
    "bfloat16 convolution, opset 21": (
        text("y = Conv(x, z)", "bfloat16[1,4,4,4] x, bfloat16[4,4,1,1] z", "bfloat16[1,4,4,4]", 21),
        "unsupported type",
        "not ONNX: the operator took bfloat16 in opset 22",
    ),
}


def model_of(graph: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(graph))


def said(violations: list[Violation]) -> str:
    return "\n".join(str(found) for found in violations)


@pytest.mark.parametrize("name", GOOD)
def test_good_graphs(name, rtx):
    model = model_of(GOOD[name])
    assert check_graph(model, "tensorrt-rtx") == []
    assert rtx(model) == ""


@pytest.mark.parametrize("name", BAD)
def test_bad_graphs(name, rtx):
    graph, match = BAD[name]
    model = model_of(graph)
    assert re.search(match, said(check_graph(model, "tensorrt-rtx")))
    assert rtx(model)


@pytest.mark.parametrize("name", STRICTER)
def test_where_the_checker_is_stricter(name, rtx):
    graph, match, reason = STRICTER[name]
    assert reason
    model = model_of(graph)
    assert re.search(match, said(check_graph(model, "tensorrt-rtx")))
    assert rtx(model) == "", "no longer stricter: move it to BAD"


# --- the DiT's own graphs


@pytest.mark.parametrize(
    "sizes", [{}, {"zero_pad": False}, {"frames": 4, "cond": 2}], ids=["t2v", "mask", "i2v"]
)
def test_the_exporters_graphs(make_graph, rtx, sizes):
    path = make_graph("bf16", **sizes)
    for target in ALL:
        assert check_graph(path, target) == []
    assert rtx(ir.load(path), path) == ""


@pytest.mark.parametrize("count", [2, 3])
def test_their_segments(make_graph, rtx, count):
    """Parsed from memory: the whole graph's path tells where the weights are."""
    path = make_graph("bf16", zero_pad=False)
    for segment in segment_graph(ir.load(path), count):
        assert check_graph(segment.model, "tensorrt-rtx") == []
        assert rtx(segment.model, path) == ""


def one_block(path: Path) -> tuple[ir.Model, ir.Function]:
    """The middle block of three as a graph: small, and it holds every kind of mistake."""
    model = segment_graph(ir.load(path), 3)[1].model
    return model, model.functions["lcexport", "Block", ""]


def first(block: ir.Function, op: str) -> ir.Node:
    return next(node for node in block if node.op_type == op)


def cast(block: ir.Function, node: ir.Node, index: int, dtype: ir.DataType) -> None:
    new = ir.node("Cast", [node.inputs[index]], {"to": int(dtype)}, name=f"new_{index}")
    new.outputs[0].name = f"{node.name}_new_{index}"
    block.insert_before(node, new)
    node.replace_input_with(index, new.outputs[0])


def cast_result(block: ir.Function, node: ir.Node, dtype: ir.DataType) -> None:
    uses = list(node.outputs[0].uses())
    new = ir.node("Cast", [node.outputs[0]], {"to": int(dtype)}, name="new_result")
    new.outputs[0].name = f"{node.name}_new_result"
    block.insert_after(node, new)
    for user, index in uses:
        user.replace_input_with(index, new.outputs[0])


def without_a_cast(model: ir.Model, block: ir.Function) -> None:
    gone = first(block, "Cast")
    source = gone.inputs[0]
    assert source is not None
    gone.outputs[0].replace_all_uses_with(source)


def attention_in_float32(model: ir.Model, block: ir.Function) -> None:
    node = first(block, "Attention")
    for index in range(3):
        cast(block, node, index, FLOAT)
    cast_result(block, node, BFLOAT16)


def values_in_float32(model: ir.Model, block: ir.Function) -> None:
    cast(block, first(block, "Attention"), 2, FLOAT)


def queries_of_another_rank(model: ir.Model, block: ir.Function) -> None:
    node = first(block, "Attention")
    shape = ir.node("Constant", [], {"value": ir.tensor([2, 72, 256], name="s")}, name="new_shape")
    flat = ir.node("Reshape", [node.inputs[0], shape.outputs[0]], name="new_rank")
    block.insert_before(node, [shape, flat])
    node.replace_input_with(0, flat.outputs[0])


def weight_in_float32(model: ir.Model, block: ir.Function) -> None:
    name = "blocks.1.ffn.w1.weight"
    value = model.graph.initializers[name]
    value.const_value = ir.tensor([[0.0] * 256] * 768, dtype=FLOAT, name=name)
    value.type = ir.TensorType(FLOAT)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (without_a_cast, r"Block: node_\w+: \w+: .*type"),
        (values_in_float32, "differ in type: BFLOAT16, BFLOAT16, FLOAT"),
        (queries_of_another_rank, "Block: node_scaled_dot_product_attention: .*rank|typing"),
        (weight_in_float32, r"Block: node_linear_9: Gemm: .*\[typing\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_block(make_graph, rtx, spoil, match):
    path = make_graph("bf16")
    model, block = one_block(path)
    spoil(model, block)
    found = check_graph(model, "tensorrt-rtx")
    assert re.search(match, said(found))
    assert rtx(model, path)


def test_casts_up_to_float32_around_attention_are_folded_by_the_compiler(make_graph, rtx):
    """Stricter: it builds, because the compiler sees bfloat16 behind the Casts. Not all may."""
    path = make_graph("bf16")
    model, block = one_block(path)
    attention_in_float32(model, block)
    match = (
        r"Block: node_scaled_dot_product_attention: FLOAT is not one of the types that are built"
    )
    assert re.search(match, said(check_graph(model, "tensorrt-rtx")))
    assert rtx(model, path) == ""


def test_float32_graphs_are_for_other_engines(make_graph, rtx):
    path = make_graph("fp32")
    found = check_graph(path, "tensorrt-rtx")
    assert len(found) == 2
    assert {(v.function, v.rule) for v in found} == {("Block", "attention")}
    assert "dedicated kernel" in rtx(one_block(path)[0], path)


def test_a_call_with_other_types_is_named(make_graph):
    model = ir.load(make_graph("bf16"))
    model.graph.initializers["blocks.2.ffn.w1.weight"].dtype = FLOAT
    found = check_graph(model, "tensorrt-11")
    assert any("(as blocks.2 calls it)" in v.reason and v.node == "node_linear_9" for v in found)


# --- structure and targets


def test_what_the_targets_lack():
    swish = model_of(text("y = Swish(x)", "float[4] x", "float[4]", 24))
    rms = model_of(text("y = RMSNormalization(x, z)", "float[2,4] x, float[4] z", "float[2,4]"))
    assert check_graph(swish, "tensorrt-11") == []
    assert {v.rule for v in check_graph(swish, "tensorrt-10")} == {"opset", "operator"}
    assert check_graph(rms, "tensorrt-rtx") == []
    assert "early versions" in said(check_graph(rms, "tensorrt-10"))


CALLS = """<ir_version: 11, opset_import: ["" : 23, "l" : 1]>
main (float[4] x, int64[4] i) => (float[4] y) {{ {main} }}
<domain: "l", opset_import: ["" : {opset}, "l" : 1]> F (a) => (b) {{ {body} }}"""


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"main": "z = l.F(x) y = Add(z, z)"}, "Add of y: Add stands beside calls"),
        ({"main": "z = l.F(x) y = l.Missing(z)"}, "Missing of y: Missing stands beside calls"),
        ({"main": "y = l.F(x, x)"}, "F of y: does not give F what it takes"),
        ({"opset": 18}, "F: F: opset 18 in a graph of opset 23"),
        ({"body": "b = l.G(a)"}, r"F: G of b: l\.G would need a plugin"),
    ],
)
def test_calls(parts, match):
    graph = CALLS.format_map({"main": "y = l.F(x)", "body": "b = Relu(a)", "opset": 23} | parts)
    assert re.search(match, said(check_graph(model_of(graph), "tensorrt-rtx")))


def test_an_unknown_target():
    with pytest.raises(UsageError, match="unknown target; got tensorrt-9; wanted tensorrt-10,"):
        check_graph(model_of(GOOD["add"]), "tensorrt-9")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("content", [None, b"", b"not a graph", b"\x08\x0b\x3a\xff"])
def test_a_file_that_is_no_graph(tmp_path, content):
    path = tmp_path / "g.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"g\.onnx (cannot be read|is not an ONNX graph)"):
        check_graph(path, "tensorrt-rtx")


# --- weights beside the graph


def with_weights(location: str, offset: int | None, length: int | None) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text("y = Add(x, w)", "float[4] x", "float[4]"))
    tensor = proto.graph.initializer.add(name="w", data_type=1, dims=[4], data_location=1)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return proto


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with 64 bytes of weights, links, and weights outside."""
    folder = tmp_path / "bundle"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "w.bin", folder / "sub" / "w.bin", tmp_path / "w.bin"):
        path.write_bytes(bytes(64))
    (folder / "link.bin").symlink_to("w.bin")
    (folder / "out.bin").symlink_to("../w.bin")
    (folder / "folder").symlink_to("sub")
    return folder


@pytest.mark.parametrize(
    ("location", "offset", "length", "match", "refused"),
    [
        ("w.bin", 0, 16, "", False),
        ("w.bin", 48, 16, "", False),
        ("sub/w.bin", 0, 16, "", False),
        ("w.bin", 52, 16, "end after w.bin: 52 + 16 > 64", True),
        ("w.bin", 0, 8, "8 bytes, the tensor 16", True),
        ("w.bin", 0, 32, "32 bytes, the tensor 16", True),
        ("none.bin", 0, 16, "none.bin: No such file", True),
        ("../w.bin", 0, 16, "outside the bundle", True),
        ("{bundle}/w.bin", 0, 16, "outside the bundle", True),
        ("", 0, 16, "outside the bundle", True),
        ("sub", 0, 16, "is not a file", True),
        ("w.bin", None, None, "byte range is not given", True),
        # stricter: what a bundle holds is what its manifest digests
        ("sub/../w.bin", 0, 16, "outside the bundle", False),
        ("link.bin", 0, 16, "behind a link", False),
        ("out.bin", 0, 16, "behind a link", False),
        ("folder/w.bin", 0, 16, "behind a link", False),
    ],
)
def test_weights_beside_the_graph(rtx, bundle, location, offset, length, match, refused):
    path = bundle / "g.onnx"
    proto = with_weights(location.format(bundle=bundle), offset, length)
    path.write_bytes(proto.SerializeToString())
    found = check_graph(path, "tensorrt-rtx")
    assert [(v.node, v.rule) for v in found] == ([("w", "external-data")] if match else [])
    assert match in said(found)
    assert bool(rtx(proto, path)) == refused


# --- every operator, every type

TYPES = ("float", "bfloat16", "float16", "double", "int32", "int64", "bool", "int8", "uint8")
ONE = """
Acos Acosh Asin Asinh Atan Atanh Cos Cosh Sin Sinh Tan Tanh Ceil Elu Erf Exp Floor Gelu HardSigmoid
LeakyRelu Log Reciprocal Relu Round Selu Sigmoid Softplus Softsign Sqrt ThresholdedRelu Softmax
LogSoftmax HardSwish Mish Abs Clip Neg Sign Identity Not
"""
TWO = """
Add Sub Mul Div Pow Max Min Mean Sum PRelu And Or Xor MatMul Gemm
"""


@pytest.mark.parametrize("operator", [*ONE.split(), *TWO.split()])
def test_nothing_passes_that_the_parser_refuses(rtx, operator):
    """One node of each type: the table of operators says nothing better than the truth."""
    arguments = "x, z" if operator in TWO.split() else "x"
    accepted = 0
    for dtype in TYPES:
        inputs = ", ".join(f"{dtype}[4,4] {name}" for name in arguments.split(", "))
        model = model_of(text(f"y = {operator}({arguments})", inputs, f"{dtype}[4,4]"))
        if not check_graph(model, "tensorrt-rtx"):
            accepted += 1
            assert rtx(model) == "", dtype
    assert accepted
