"""Block-sparse attention in a graph: what it computes, what it never holds, what is checked."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_shapes

from lcexport.checkpoint import open_checkpoint, read_header
from lcexport.configs.errors import BuildError, UsageError
from lcexport.dit import Geometry, load_dit
from lcexport.dit.sparse import Sparsity, dense_reference
from lcexport.graph import GraphSpec, onnx_from_dit, prove_precision, save_graph
from lcexport.graph.check import check_graph
from lcexport.graph.parts import parts_of
from lcexport.graph.segments import segment_graph
from lcexport.graph.sparse import SIZES, opaque_node, sparse_functions

SMALL = Sparsity(0.5, None, (2, 2, 2), (2, 2, 2))
TYPES = {torch.float32: ir.DataType.FLOAT, torch.bfloat16: ir.DataType.BFLOAT16}


def one_call(shape_q, shape_k, grid_q, grid_k, sparsity, dtype=torch.float32):
    """A model of one call, as a trace would leave it: q, k, v -> out."""
    shapes = {"q": shape_q, "k": shape_k, "v": shape_k}
    inputs = [
        ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(TYPES[dtype]))
        for n, s in shapes.items()
    ]
    kept = sparsity.kept(math.prod(n // c for n, c in zip(grid_k, sparsity.chunk_k, strict=True)))
    sizes = zip(SIZES, (grid_q, grid_k, sparsity.chunk_q, sparsity.chunk_k), strict=True)
    attributes = [ir.AttrInt64s(name, size) for name, size in sizes]
    out = ir.Value(name="out", shape=ir.Shape(shape_q), type=inputs[0].type)
    node = ir.Node(
        "lcexport",
        "BlockSparseAttention",
        inputs,
        [*attributes, ir.AttrInt64("kept", kept)],
        outputs=[out],
    )
    graph = ir.Graph(inputs, [out], nodes=[node], opset_imports={"": 23, "lcexport": 1}, name="one")
    functions = sparse_functions(ir.Function("", "one", graph=graph, attributes=[]))
    return ir.to_proto(ir.Model(graph, ir_version=11, functions=functions))


def run(model, *tensors):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = dict(zip("qkv", (tensor.numpy() for tensor in tensors), strict=True))
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_functions_are_the_original(golden, name):
    case = golden("bsa_tiny")
    said = case.meta["cases"][name]
    q, k, v = (case[f"{name}.{x}"] for x in "qkv")
    chunk = tuple(said["c"])
    sparsity = Sparsity(said["sparsity"], None, chunk, chunk)
    model = one_call(tuple(q.shape), tuple(k.shape), said["sq"], said["sk"], sparsity)
    onnx.checker.check_model(model, full_check=True)
    out = run(model, q / math.sqrt(q.shape[-1]), k, v)
    torch.testing.assert_close(out, case[f"{name}.output"], atol=2e-5, rtol=0)


def test_nothing_kept_is_zero():
    shape, grid = (1, 2, 64, 8), (4, 4, 4)
    q, k, v = torch.randn(3, *shape)
    out = run(one_call(shape, shape, grid, grid, Sparsity(0.99)), q, k, v)
    assert torch.equal(out, torch.zeros(shape))


def test_bfloat16_rounds_where_the_definition_does():
    """ONNX Runtime has no bfloat16 on processors; ONNX's own evaluator has."""
    shape, grid = (1, 2, 128, 16), (4, 4, 8)
    sparsity = Sparsity(0.5, None, (2, 4, 4), (2, 4, 4))
    q, k, v = torch.randn(3, *shape).bfloat16()
    model = one_call(shape, shape, grid, grid, sparsity, torch.bfloat16)
    types = model.graph.input[0].type.tensor_type.elem_type
    numpy = onnx.helper.tensor_dtype_to_np_dtype(types)
    feeds = {n: x.float().numpy().astype(numpy) for n, x in zip("qkv", (q / 4, k, v), strict=True)}
    out = torch.from_numpy(
        np.asarray(next(iter(ReferenceEvaluator(model).run(None, feeds)))).astype(np.float32)
    )
    wanted = dense_reference(q / 4, k, v, grid, grid, sparsity)
    torch.testing.assert_close(out, wanted.float(), atol=3e-2, rtol=3e-2)


def volumes(graph: onnx.GraphProto):
    """Elements of every value, those of subgraphs too."""
    for value in [*graph.input, *graph.value_info, *graph.output]:
        yield math.prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from volumes(attribute.g)


def test_no_value_is_as_large_as_all_scores_nor_as_all_gathered_keys():
    """At 704x1280 with 48 latents, by the shapes of every value, the functions inlined."""
    heads, dim, grid = 32, 128, (48, 44, 80)
    tokens = math.prod(grid)
    shape = (1, heads, tokens, dim)
    model = one_call(shape, shape, grid, grid, Sparsity(), torch.bfloat16)
    flat = inline_local_functions(model)
    sizes = list(volumes(infer_shapes(flat, strict_mode=True, data_prop=True).graph))
    assert len(sizes) > 30
    assert 0 not in sizes
    step = heads * 165 * 64 * dim  # the keys of one query chunk, which every step gathers
    assert step in sizes
    largest = max(sizes)
    assert largest == heads * tokens * dim  # the queries themselves
    assert largest < tokens * tokens / 32
    assert largest < 2640 * step / 100


def graph_of(dit_folder, make_weights, bulk="fp32", cond=0, sparse=SMALL):
    config = open_checkpoint(dit_folder).config
    weights = make_weights(bulk)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[bulk]
    spec = GraphSpec(Geometry(2, 4, 4, 6, cond, sparse=sparse), 10, dtype)
    path = weights.with_name(f"sparse-{cond}.onnx")
    save_graph(onnx_from_dit(config, spec, read_header(weights).tensors, "0"), path)
    return path


@pytest.mark.parametrize("form", ["as exported", "fused"])
@pytest.mark.parametrize("cond", [0, 2])
def test_a_whole_sparse_dit(dit_folder, make_weights, fuse, cond, form):
    path = graph_of(dit_folder, make_weights, cond=cond)
    path = fuse(path) if form == "fused" else path
    dit = load_dit(dit_folder)
    latents = torch.randn(2, 16, 4, 8, 12)
    text = torch.randn(2, 1, 10, dit.config.caption_channels)
    timestep = torch.full((2, 4), 500.0)
    timestep[:, :cond] = 0
    mask = torch.ones(2, 10, dtype=torch.bool)
    names = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
    given = (latents, text, timestep, mask)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = dict(zip(names, (tensor.numpy() for tensor in given), strict=True))
    out = torch.from_numpy(session.run(None, feeds)[0])
    wanted = dit(*given, cond, sparse=SMALL)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=0)
    assert (wanted - dit(*given, cond)).abs().max() > 1e-2


def test_the_trace_leaves_one_node_and_one_function_for_each_kind_of_call(dit_folder, make_weights):
    model = ir.load(graph_of(dit_folder, make_weights, cond=2))
    block = next(f for f in model.functions.values() if f.name == "Block")
    calls = [node.op_type for node in block if node.domain == "lcexport"]
    assert calls == ["BlockSparseAttention_2", "BlockSparseAttention"]
    names = [function.name for function in model.functions.values()]
    assert names[:3] == ["KeptChunksAttention", "BlockSparseAttention", "BlockSparseAttention_2"]
    assert sum(node.op_type == "Attention" for node in block) == 1  # cross-attention


@pytest.mark.parametrize("cond", [0, 2])
def test_the_proof_counts_it(dit_folder, make_weights, cond):
    model = ir.load(graph_of(dit_folder, make_weights, "bf16", cond))
    calls = 2 if cond else 1
    proof = prove_precision(model, torch.bfloat16, attentions=calls + 1, sparse=calls)
    depth = proof["calls_of_block"]
    assert proof["attentions_bulk"] == depth
    assert proof["sparse_attentions_bulk"] == calls * depth
    with pytest.raises(BuildError, match="another number"):
        prove_precision(model, torch.bfloat16, attentions=calls + 1)


def changed(path, function, before, after):
    """The graph with one function written otherwise."""
    model = onnx.load(path, load_external_data=False)
    (old,) = (f for f in model.functions if f.name == function)
    text = onnx.printer.to_text(old)
    assert before in text
    old.CopyFrom(onnx.parser.parse_function(text.replace(before, after)))
    other = path.with_name("changed.onnx")
    onnx.save(model, other)
    return other


@pytest.mark.parametrize(
    ("function", "before", "after", "match"),
    [
        (
            "KeptChunksAttention",
            "chunk_wide = Cast <to: int = 1>",
            "chunk_wide = Identity",
            "contradict",
        ),
        ("BlockSparseAttention", "q_wide = Cast <to: int = 1>", "q_wide = Identity", "float32"),
        ("BlockSparseAttention", "gate = MatMul", "gate = Gemm", "contradict"),
    ],
)
def test_a_region_that_rounds_too_early_is_refused(
    dit_folder, make_weights, function, before, after, match
):
    path = changed(graph_of(dit_folder, make_weights, "bf16"), function, before, after)
    with pytest.raises(BuildError, match=match):
        prove_precision(ir.load(path), torch.bfloat16, sparse=1)
    assert check_graph(path, "tensorrt-rtx") != []


def test_a_call_without_its_function_is_refused(dit_folder, make_weights):
    path = graph_of(dit_folder, make_weights, "bf16")
    model = onnx.load(path, load_external_data=False)
    kept = [f for f in model.functions if f.name != "BlockSparseAttention"]
    del model.functions[:]
    model.functions.extend(kept)
    onnx.save(model, path.with_name("without.onnx"))
    found = check_graph(path.with_name("without.onnx"), "tensorrt-11")
    assert any("BlockSparseAttention" in str(violation) for violation in found)


@pytest.mark.parametrize("target", ["tensorrt-10", "tensorrt-11", "tensorrt-rtx"])
def test_targets_take_the_region(dit_folder, make_weights, target):
    assert check_graph(graph_of(dit_folder, make_weights, "bf16", 2), target) == []


def test_segments_and_parts_bring_the_functions_they_call(dit_folder, make_weights):
    model = ir.load(graph_of(dit_folder, make_weights))
    for segment in segment_graph(model, 2):
        names = {function.name for function in segment.model.functions.values()}
        assert names > {"Block", "BlockSparseAttention", "KeptChunksAttention"}
    parts, _ = parts_of(model)
    found = {part.name: {f.name for f in part.model.functions.values()} for part in parts}
    assert found["Embed"] == {"Embed"}
    assert found["Block"] == {"Block", "BlockSparseAttention", "KeptChunksAttention"}


def test_a_cdf_threshold_is_no_graph():
    grid, chunk = (4, 4, 4), (2, 2, 2)
    value = ir.Value(name="q")
    with pytest.raises(UsageError, match="cdf_threshold"):
        opaque_node(value, value, value, grid, grid, chunk, chunk, 0.5, 0.9)
