"""Attention: what of it is built.

The node leaves the exporter without TensorRT's `TRT_decomposable`: a compiler that has no fused
kernel fails, as RTX 1.7 does, instead of writing 167 GiB of scores at 480p. These rules say so
before it tries. The limits were found by building with TensorRT for RTX 1.7, but for the most keys
in float16. They are stricter of a single query, which that builds in some sizes.
"""

import onnx_ir as ir

from lcexport.graph.targets.rules import Reasons, Types, shape_of, type_of

HEAD_DIM = range(9, 257)
MAX_FP16_KEYS = 60_000  # NaN was reported at 65,536 (docs/tensorrt.md): a margin
MAX_MASK_RANK = 4
BULK = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
REFUSED_ATTRIBUTES = ("softcap", "softmax_precision", "qk_matmul_output_mode")


def attention_reasons(node: ir.Node, types: Types) -> Reasons:
    """The rules of an Attention node."""
    yield from interface_reasons(node)
    if len(node.inputs) < 3:
        return
    dtypes = [type_of(value, types) for value in node.inputs[:3]]
    shapes = [shape_of(value, types) for value in node.inputs[:3]]
    q, k, v = shapes
    if None in dtypes or q is None or k is None or v is None:
        return  # the inference has failed, and says where
    if len(set(dtypes)) > 1:
        names = ", ".join(dtype.name for dtype in dtypes if dtype is not None)
        yield "attention", f"queries, keys and values differ in type: {names}"
    elif dtypes[0] not in BULK:
        built = ", ".join(dtype.name for dtype in BULK)
        name = dtypes[0].name if dtypes[0] else None
        yield "attention", f"{name} is not one of the types that are built: {built}"
    if len({len(q), len(k), len(v)}) > 1:
        yield "attention", f"queries, keys and values differ in rank: {q}, {k}, {v}"
        return
    sizes = head_sizes(node, q, k, v)
    if sizes is None:
        yield "attention", "must have rank 4, or rank 3 and the numbers of heads"
        return
    q, k, v = sizes
    yield from shape_reasons(q, k, v)
    if dtypes[0] == ir.DataType.FLOAT16 and k[2] > MAX_FP16_KEYS:
        yield "attention", f"{k[2]} keys may overflow in float16: use bfloat16"
    yield from mask_reasons(node, types, (q[0], q[1], q[2], k[2]))


def interface_reasons(node: ir.Node) -> Reasons:
    """Inputs, outputs and attributes."""
    if len(node.outputs) > 1:
        yield "attention", "has more than one output"
    if any(value is not None for value in node.inputs[4:]):
        yield "attention", "has past keys and values"
    for name in REFUSED_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and (name == "softmax_precision" or attribute.value):
            yield "attention", f"sets {name}"
    if "TRT_decomposable" in node.attributes:
        yield "attention", "sets TRT_decomposable: unfused it needs the memory of all scores"


def head_sizes(node: ir.Node, *shapes: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """[B, heads, N, D] of queries, keys and values."""
    if len(shapes[0]) == 4:
        return list(shapes)
    heads = [node.attributes.get_int(f"{name}_num_heads", 0) for name in ("q", "kv", "kv")]
    if len(shapes[0]) != 3 or not all(heads):
        return None
    split = zip(shapes, heads, strict=True)
    return [(batch, count, tokens, size // count) for (batch, tokens, size), count in split]


def shape_reasons(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> Reasons:
    """Batches, heads and head dimensions fit, and are built."""
    if k != v:
        yield "attention", f"keys {list(k)} and values {list(v)} differ in shape"
    if q[0] != k[0] or q[1] % k[1] or q[3] != k[3]:
        yield "attention", f"queries {list(q)} do not fit keys {list(k)}"
    if q[3] not in HEAD_DIM:
        span = f"{HEAD_DIM.start} to {HEAD_DIM.stop - 1}"
        tried = "RTX 1.7 has kernels for all of them that were tried"
        yield "attention", f"a head dimension of {q[3]} is not built: {span} are ({tried})"
    if q[0] * q[1] < 2 or q[2] < 2:
        yield "attention", f"has one head or one query only: {list(q)} may have no fused kernel"


def mask_reasons(node: ir.Node, types: Types, scores: tuple[int, ...]) -> Reasons:
    """The mask is boolean, or added in the type of the queries, and spreads over the scores."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    dtype, shape = type_of(mask, types), shape_of(mask, types)
    if dtype is None or shape is None:
        return
    if dtype not in (ir.DataType.BOOL, type_of(node.inputs[0], types)):
        yield "attention", f"the mask is {dtype.name}: neither boolean nor the queries' type"
    spread = zip(reversed(shape), reversed(scores), strict=False)
    if len(shape) > MAX_MASK_RANK or any(size not in (1, wanted) for size, wanted in spread):
        yield "attention", f"the mask {list(shape)} does not spread over {list(scores)}"
