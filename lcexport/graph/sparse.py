"""Block-sparse attention in a graph: one node, and functions of standard operators that define it.

The trace leaves one opaque node, `lcexport.BlockSparseAttention`. Its function regroups the tokens
into chunks, computes the gate and calls `lcexport.KeptChunksAttention`, whose body is a Scan over
the query chunks: each step gathers the kept key chunks of every head. So at no time are there N x N
scores, nor all the gathered keys: the largest values are the gate's scores, a 4096th of N x N with
chunks of 64, and one step's keys, the kept share of all keys.

`KeptChunksAttention` is what a TensorRT plugin replaces (`lcexport.engines.trt.sparse_plugin`):
its inputs say everything, so it has no attributes but the plugin's namespace, without which newer
parsers prefer the function. Graphs are static: sizes are constants of the functions, and there is
one function for each kind of call (with conditioning latents a block has two).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from lcexport.configs.errors import BuildError, UsageError
from lcexport.dit.sparse import Sparsity, cuts

DOMAIN = "lcexport"
SPARSE = "BlockSparseAttention"
KEPT_CHUNKS = "KeptChunksAttention"
PLUGIN_NAMESPACE = DOMAIN
SIZES = ("grid_q", "grid_k", "chunk_q", "chunk_k")
ONNX_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.BFLOAT16: "bfloat16"}
SCHEMA = OpSchema(
    SPARSE,
    DOMAIN,
    1,
    inputs=[OpSchema.FormalParameter(name, "T") for name in ("q", "k", "v")],
    outputs=[OpSchema.FormalParameter("out", "T")],
    type_constraints=[("T", [f"tensor({name})" for name in ONNX_NAMES.values()], "")],
    attributes=[
        *(OpSchema.Attribute(name, OpSchema.AttrType.INTS) for name in SIZES),
        OpSchema.Attribute("kept", OpSchema.AttrType.INT),
    ],
)
OPAQUE = Op(Opset(DOMAIN, 1), SPARSE, SCHEMA)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export`: the custom operation becomes one opaque node."""
    return {torch.ops.lcexport.block_sparse_attention.default: opaque_node}


def opaque_node(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    grid_q: Sequence[int],
    grid_k: Sequence[int],
    chunk_q: Sequence[int],
    chunk_k: Sequence[int],
    sparsity: float | None,
    cdf_threshold: float | None,
) -> ir.Value:
    """A node that says in attributes what `sparse_functions` will make its function of."""
    if cdf_threshold is not None:
        raise UsageError(
            "a graph cannot have a cdf_threshold",
            got=cdf_threshold,
            wanted="a sparsity alone: a static graph keeps as many chunks everywhere",
        )
    kept = Sparsity(sparsity).kept(math.prod(cuts(grid_k, chunk_k)))
    sizes = map(list, (grid_q, grid_k, chunk_q, chunk_k))
    made = OPAQUE(q, k, v, kept=kept, **dict(zip(SIZES, sizes, strict=True)))
    return cast("ir.Value", made)


@dataclass(frozen=True)
class Call:
    """Everything a function of one kind of call depends on. `shape` is [B, A, Nq, D]."""

    shape: tuple[int, ...]
    dtype: ir.DataType
    grid_q: tuple[int, ...]
    grid_k: tuple[int, ...]
    chunk_q: tuple[int, ...]
    chunk_k: tuple[int, ...]
    kept: int


def is_sparse(node: ir.Node) -> bool:
    """Whether a node is block-sparse attention, of whichever kind of call."""
    return node.domain == DOMAIN and node.op_type.startswith(SPARSE)


def sparse_functions(function: ir.Function) -> list[ir.Function]:
    """The functions that the opaque nodes of a traced function need, innermost first.

    The nodes lose their attributes: they are constants of the functions now. Of several kinds of
    call the last, which is that of the noise, keeps the name; the others are numbered.
    """
    calls = {node: call_of(node) for node in function if is_sparse(node)}
    if not calls:
        return []
    kinds = list(dict.fromkeys(reversed(calls.values())))
    names = [SPARSE, *(f"{SPARSE}_{i}" for i in range(2, len(kinds) + 1))]
    for node, call in calls.items():
        node.op_type = names[kinds.index(call)]
        node.attributes.clear()
    function.opset_imports[DOMAIN] = 1
    made = [attention_text(name, call) for name, call in zip(names, kinds, strict=True)]
    dim, dtype = kinds[0].shape[-1], kinds[0].dtype
    texts = [kept_chunks_text(dim, dtype), *made] if any(c.kept for c in kinds) else made
    return [ir.from_proto(onnx.parser.parse_function(text)) for text in texts]


def call_of(node: ir.Node) -> Call:
    """What an opaque node says, with its queries' type and shape."""
    q = node.inputs[0]
    if q is None or q.shape is None or q.dtype is None:
        raise BuildError(f"the trace left no type at {node.name}")
    sizes = (tuple(node.attributes[name].as_ints()) for name in SIZES)
    shape = tuple(int(size) for size in q.shape.numpy())
    return Call(shape, q.dtype, *sizes, kept=node.attributes["kept"].as_int())


HEADER = '<opset_import: ["": 23, "lcexport": 1], domain: "lcexport">'


def casts(dtype: ir.DataType) -> tuple[str, str]:
    """The operations to float32 and back; none are needed where all is float32."""
    same = dtype == ir.DataType.FLOAT
    return ("Identity", "Identity") if same else ("Cast <to = 1>", f"Cast <to = {int(dtype)}>")


def chunks_text(name: str, heads: int, dim: int, grid: Sequence[int], chunk: Sequence[int]) -> str:
    """`name` [B, A, N, D] -> `name`_chunks [BA, chunks, tokens, D]."""
    (T, H, W), (t, h, w) = cuts(grid, chunk), chunk
    return f"""
  {name}_cuts = Constant <value_ints = {[heads, T, t, H, h, W, w, dim]}> ()
  {name}_cut = Reshape ({name}, {name}_cuts)
  {name}_order = Transpose <perm = [0, 1, 3, 5, 2, 4, 6, 7]> ({name}_cut)
  {name}_sizes = Constant <value_ints = {[heads, T * H * W, t * h * w, dim]}> ()
  {name}_chunks = Reshape ({name}_order, {name}_sizes)"""


def means_text(name: str, up: str, down: str) -> str:
    """`name`_chunks -> `name`_mean [BA, chunks, D], rounded once, as torch's is."""
    return f"""
  {name}_wide = {up} ({name}_chunks)
  {name}_mean_wide = ReduceMean <keepdims = 0> ({name}_wide, tokens)
  {name}_mean = {down} ({name}_mean_wide)"""


def attention_text(name: str, call: Call) -> str:
    """The function of one kind of call: regroup, gate, attend, put back in order."""
    if call.kept == 0:
        return zeros_text(name, call)
    heads, dim = call.shape[0] * call.shape[1], call.shape[3]
    up, down = casts(call.dtype)
    back = [heads, *cuts(call.grid_q, call.chunk_q), *call.chunk_q, dim]
    grids = {"q": (call.grid_q, call.chunk_q)} | dict.fromkeys("kv", (call.grid_k, call.chunk_k))
    regroup = "".join(chunks_text(x, heads, dim, *sizes) for x, sizes in grids.items())
    # TopK takes bfloat16 only from opset 24.
    return f"""{HEADER}
{name} (q, k, v) => (out)
{{{regroup}
  tokens = Constant <value_ints = [2]> (){means_text("q", up, down)}{means_text("k", up, down)}
  k_turned = Transpose <perm = [0, 2, 1]> (k_mean)
  gate = MatMul (q_mean, k_turned)
  gate_wide = {up} (gate)
  n = Constant <value_ints = {[call.kept]}> ()
  best, best_index = TopK <axis = -1> (gate_wide, n)
  kept = Cast <to = 6> (best_index)
  attended = lcexport.{KEPT_CHUNKS} <plugin_namespace = "{PLUGIN_NAMESPACE}"> (
    q_chunks, k_chunks, v_chunks, kept)
  back = Constant <value_ints = {back}> ()
  out_cut = Reshape (attended, back)
  out_order = Transpose <perm = [0, 1, 4, 2, 5, 3, 6, 7]> (out_cut)
  shape = Constant <value_ints = {list(call.shape)}> ()
  out = Reshape (out_order, shape)
}}"""


def zeros_text(name: str, call: Call) -> str:
    """The function of a call that keeps nothing."""
    return f"""{HEADER}
{name} (q, k, v) => (out)
{{
  zero = Constant <value_float = 0.0> ()
  zero_cast = Cast <to = {int(call.dtype)}> (zero)
  shape = Constant <value_ints = {list(call.shape)}> ()
  out = Expand (zero_cast, shape)
}}"""


def kept_chunks_text(dim: int, dtype: ir.DataType) -> str:
    """Attention of chunks [BA, P, p, D] to those [BA, K, c, D] that int32 [BA, P, n] lists.

    Scores and softmax are float32; the probabilities are cast to the values' type. The shapes come
    from the inputs, so all kinds of call share the function. The state carries nothing: TensorRT's
    parser refuses a Scan without one.
    """
    name, (up, down) = ONNX_NAMES[dtype], casts(dtype)
    return f"""{HEADER}
{KEPT_CHUNKS} <plugin_namespace> (q, k, v, kept) => (out)
{{
  last = Constant <value_ints = [-1]> ()
  kept_long = Cast <to = 7> (kept)
  kept_index = Unsqueeze (kept_long, last)
  steps_q = Transpose <perm = [1, 0, 2, 3]> (q)
  steps_index = Transpose <perm = [1, 0, 2, 3]> (kept_index)
  state = Constant <value_floats = [0.0]> ()
  state_end, steps_out = Scan <num_scan_inputs = 2, body = attend_chunk (
    float[one] carried, {name}[heads, queries, dim] chunk, int64[heads, n, one] index
  ) => (float[one] carried_on, {name}[heads, queries, dim] chunk_out)
  {{
    carried_on = Identity (carried)
    flat = Constant <value_ints = [0, -1, {dim}]> ()
    chunks_k = GatherND <batch_dims = 1> (k, index)
    keys = Reshape (chunks_k, flat)
    keys_turned = Transpose <perm = [0, 2, 1]> (keys)
    keys_wide = {up} (keys_turned)
    chunk_wide = {up} (chunk)
    scores = MatMul (chunk_wide, keys_wide)
    weights = Softmax <axis = -1> (scores)
    weights_cast = {down} (weights)
    chunks_v = GatherND <batch_dims = 1> (v, index)
    values = Reshape (chunks_v, flat)
    chunk_out = MatMul (weights_cast, values)
  }}> (state, steps_q, steps_index)
  out = Transpose <perm = [1, 0, 2, 3]> (steps_out)
}}"""
