"""The graph as ONNX Runtime wants it on processors: the same calls and weights, fused operations.

                 the graph, for TensorRT and CUDA    here
    head norm    8 operations on [B, N, A, D]        RMSNormalization
    RoPE         9 operations on [B, A, N, D]        com.microsoft.RotaryEmbedding
    attention    Attention on [B, A, N, D]           com.microsoft.MultiHeadAttention on [B, N, A*D]

On processors ONNX Runtime's `Attention` keeps all N x N scores. `MultiHeadAttention` keeps a tile
of them, and is faster; but what it is given by head, as [B, A, N, D], it computes with all scores
too. So tokens stay in rows here, and nothing is transposed but a cache's keys and values, and what
goes into and comes out of block-sparse attention.

For float32 alone: then no rounding can move. On CUDA, `Attention` is fused by ONNX Runtime itself,
and it has no bfloat16 arithmetic on processors.
"""

import math
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import pattern

from lcexport.configs.errors import BuildError
from lcexport.graph.sparse import is_sparse

MICROSOFT = "com.microsoft"
BY_HEAD = [0, 2, 1, 3]  # between [B, N, A, D] and [B, A, N, D], both ways
# What must be gone afterwards: attention with all its scores, and parts of norms and RoPE.
WRITTEN_OUT = frozenset({"Attention", "Pow", "ReduceMean", "Reciprocal", "Sqrt", "Sub"})
LOWEST = -3.4e38  # what a masked key's scores sink by; ONNX Runtime's own -10000 is not below all


def fused_graph(model: ir.Model, heads: int) -> ir.Model:
    """A float32 graph of `onnx_from_dit` or `onnx_from_cache`, as saved, changed in place.

    Args:
        heads: A, attention heads.

    Raises:
        BuildError: an attention, a norm or a RoPE was not recognised.
    """
    rules = [
        pattern.RewriteRule(norm, fused_norm),
        pattern.RewriteRule(scaled_norm, fused_scaled_norm),
        pattern.RewriteRule(rope, fused_rope),
    ]
    pattern.RewriteRuleSet(rules).apply_to_model(model)
    model.graph.opset_imports[MICROSOFT] = 1
    called = [model.functions[name] for name in {node.op_identifier() for node in model.graph}]
    for function in called:
        function.opset_imports[MICROSOFT] = 1
        Rows(function, heads).fuse_attention()
    RemoveUnusedNodesPass()(model)
    for function in called:
        refuse_written_out(function)
    return model


def refuse_written_out(function: ir.Function) -> None:
    """BuildError where a pattern was not recognised: the graph would be right, and slow."""
    left = [node for node in function if node.op_type in WRITTEN_OUT]
    if left:
        raise unknown(function, left)


def unknown(function: ir.Function, nodes: list[ir.Node]) -> BuildError:
    """What to raise where the exporter wrote something otherwise than it used to."""
    return BuildError(
        f"{function.name} is not fused for ONNX Runtime",
        got=", ".join(f"{node.op_type} {node.name}" for node in nodes),
        do="This is a fault of the exporter, not of the checkpoint: please report it.",
    )


def norm(op: Any, x: ir.Value, epsilon: ir.Value, weight: ir.Value) -> Any:
    """A head norm, as `lcexport.dit.layers.HeadNorm` is traced."""
    power = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
    return op.Mul(op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(power, epsilon)))), weight)


def fused_norm(op: Any, x: ir.Value, epsilon: ir.Value, weight: ir.Value) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=constant(epsilon))


def scaled_norm(
    op: Any, x: ir.Value, epsilon: ir.Value, divisor: ir.Value, weight: ir.Value
) -> Any:
    """The queries' norm, which divides by the root of `divisor` too."""
    power = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
    scaled = op.Mul(op.Add(power, epsilon), divisor)
    return op.Mul(op.Mul(x, op.Reciprocal(op.Sqrt(scaled))), weight)


def fused_scaled_norm(
    op: Any, x: ir.Value, epsilon: ir.Value, divisor: ir.Value, weight: ir.Value
) -> Any:
    """The root is taken of the weight, [D], which ONNX Runtime does once, on opening."""
    root = ir.tensor(1 / math.sqrt(constant(divisor)), dtype=ir.DataType.FLOAT)
    scaled = op.Mul(weight, op.Constant(value=root))
    return op.RMSNormalization(x, scaled, axis=-1, epsilon=constant(epsilon))


def rope(
    op: Any,
    x: ir.Value,
    pairs: ir.Value,
    halves: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    whole: ir.Value,
) -> Any:
    """`lcexport.dit.layers.rotate` as it is traced: x [B, A, N, D], cos and sin [N, D/2, 1]."""
    even, odd = op.Split(op.Reshape(x, pairs), halves, axis=4, _outputs=2)
    first = op.Sub(op.Mul(even, cos), op.Mul(odd, sin))
    second = op.Add(op.Mul(odd, cos), op.Mul(even, sin))
    return op.Reshape(op.Concat(first, second, axis=-1), whole)


def fused_rope(op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: ir.Value) -> Any:
    """Positions count from the first row of the tables: of any number of tokens, in any batch."""
    flat = op.Constant(value_ints=[-1])
    tables = [op.Squeeze(table, flat) for table in (cos, sin)]
    first = op.Constant(value_ints=[0])
    return op.RotaryEmbedding(x, first, *tables, interleaved=1, _domain=MICROSOFT)


def constant(value: ir.Value) -> float:
    """The one number in a constant."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise BuildError(f"{value.name} is not a constant")
    return float(tensor.numpy().item())


class Rows:
    """Attention of one function on tokens in rows: values [B, A, N, D] made anew as [B, N, A*D]."""

    def __init__(self, function: ir.Function, heads: int) -> None:
        self.function, self.heads = function, heads
        self.made: dict[ir.Value, ir.Value] = {}

    def fuse_attention(self) -> None:
        """Replace every dense attention, with what leads to it and what puts its heads together."""
        for node in list(self.function):
            if is_transpose(node) and gathers_heads(node.inputs[0]):
                rows = self.rows(node.inputs[0])
                split = self.op("Reshape", [rows, self.ints([0, 0, self.heads, -1])])
                node.outputs[0].replace_all_uses_with(split)
        if self.made:
            self.function.sort()  # what was made stands at the end

    def rows(self, value: ir.Value | None) -> ir.Value:
        """[B, N, A*D] of a value [B, A, N, D], made once."""
        assert value is not None
        if value not in self.made:
            self.made[value] = self.made_rows(value)
        return self.made[value]

    def made_rows(self, value: ir.Value) -> ir.Value:
        """The operation that makes `value`, on rows; or `value` transposed."""
        node = value.producer()
        kind = "" if node is None else node.op_type
        if node is None or is_sparse(node):
            return self.joined(self.op("Transpose", [value], perm=BY_HEAD))
        if is_transpose(node):
            return self.joined(node.inputs[0])
        first, *others = node.inputs
        if kind == "RotaryEmbedding":
            return self.op(kind, [self.rows(first), *others], MICROSOFT, interleaved=1)
        if kind == "Concat" and node.attributes["axis"].as_int() == 2:
            return self.op(kind, [self.rows(part) for part in node.inputs], axis=1)
        if kind == "Slice" and len(others) > 2 and others[2] and constant(others[2]) == 2:
            start, stop, _, *step = others
            return self.op(kind, [self.rows(first), start, stop, self.ints([1]), *step])
        if kind == "Attention":
            return self.attention(node)
        raise unknown(self.function, [node])

    def attention(self, node: ir.Node) -> ir.Value:
        """MultiHeadAttention of the same queries, keys, values and mask; it scales nothing either.

        A mask is there where the model masks text: True for keys [B, L] that count.
        """
        if not is_plain(node):
            raise unknown(self.function, [node])
        query, key, value, *masks = node.inputs
        inputs: list[ir.Value | None] = [self.rows(part) for part in (query, key, value)]
        if masks:
            counted = next(v for v in self.function.inputs if v.name == "text_mask")
            inputs += [None, self.op("Cast", [counted], to=int(ir.DataType.INT32))]
        return self.op(
            "MultiHeadAttention",
            inputs,
            MICROSOFT,
            num_heads=self.heads,
            scale=1.0,
            mask_filter_value=LOWEST,
        )

    def joined(self, value: ir.Value | None) -> ir.Value:
        """[B, N, A, D] as [B, N, A*D]."""
        return self.op("Reshape", [value, self.ints([0, 0, -1])])

    def ints(self, values: list[int]) -> ir.Value:
        return self.op("Constant", [], value_ints=values)

    def op(
        self, kind: str, inputs: list[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A new node's output; the nodes are put in order at the end."""
        node = ir.node(kind, inputs, attributes, domain=domain)
        number = len(self.function)
        node.name, node.outputs[0].name = f"fused_{kind}_{number}", f"fused_{number}"
        self.function.append(node)
        return node.outputs[0]


def is_plain(node: ir.Node) -> bool:
    """Whether an Attention scales nothing and does nothing more than attend, by the text's mask."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    _, _, _, *masks = node.inputs
    return (
        given.pop("scale", None) == 1.0
        and not any(given.values())  # the exporter writes others too, as zeros
        and len(node.outputs) == 1
        and (not masks or (len(masks) == 1 and is_text_mask(masks[0])))
    )


def is_text_mask(value: ir.Value | None) -> bool:
    """Whether a mask is `text_mask` [B, L], spread over heads and queries."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Expand", "Unsqueeze"):
            return False
        value = node.inputs[0]
    return value is not None and value.name == "text_mask"


def is_transpose(node: ir.Node) -> bool:
    """Whether a node exchanges tokens and heads."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == BY_HEAD


def gathers_heads(value: ir.Value | None) -> bool:
    """Whether a value is what attention has made, for all tokens or part by part."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    parts = node.inputs if node.op_type == "Concat" else node.outputs
    makers = [part.producer() for part in parts if part is not None]
    return any(maker is not None and maker.op_type == "Attention" for maker in makers)
