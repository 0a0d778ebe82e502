"""Proof that a finished graph computes what must be float32 in float32, in every layer.

The graph's dtypes alone decide what an engine computes (strong typing), so the proof is about
dtypes. They are inferred anew by ONNX's own type inference, from the inputs and the initialisers
of each call; what the exporter wrote down is not believed. Then, per function:

1. Flow: whatever the timestep, the modulation or the RoPE tables reach is float32, and is used, up
   to the Cast that leaves the island; what it rounds is a finished sum or a turned pair. A gate's
   sum, for one, cannot be bfloat16. The timestep itself is rounded before anything else.
2. Norms: every normalisation and every root, power, mean, sine or cosine is float32 inside.
3. Products: a product with an island's weight is float32; every other product, and attention, is
   in the bulk dtype. Attention scales nothing: that was done to the queries, in float32.
4. Weights are used as they are stored: never cast, transposed or copied. Int8 ones, of which there
   are all or none, are multiplied with their row's scale in float32, and rounded once.
5. Block-sparse attention is a region of its own, whose functions are checked the same way: bulk
   in and out, the gate's means, the scores and the softmax in float32, the rest in the bulk dtype.
6. Counts: the roundings, the islands' exits and the products are as many as the model has, so
   nothing is rounded twice and nothing that should have been checked is missing.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from lcexport.checkpoint import is_island
from lcexport.configs.errors import BuildError
from lcexport.graph.inference import Functions, Signature, Types, inferred_types
from lcexport.graph.int8_proof import check_int8
from lcexport.graph.policy import FLOAT, full_name, require
from lcexport.graph.region import call_faults, keeps_chunks, region_check
from lcexport.graph.sparse import is_sparse

BULK = {torch.float32: FLOAT, torch.bfloat16: ir.DataType.BFLOAT16}
FLOATING = frozenset({FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
# What may be rounded to the bulk dtype: what leaves an island, and what leaves a norm.
SUMS = frozenset({"Add", "Concat"})
NORM_RESULTS = frozenset({"LayerNormalization", "Mul"})
NORM_OPS = frozenset(
    {"LayerNormalization", "ReduceMean", "Pow", "Sqrt", "Reciprocal", "Cos", "Sin", "Exp"}
)
ROUNDED = NORM_RESULTS | SUMS
PRODUCTS = frozenset({"Gemm", "MatMul", "Conv"})
WEIGHT_USERS = frozenset({"Gemm", "LayerNormalization", "Mul", "Reshape"})
ISLAND_INPUTS = ("time", "cos", "sin")
FUNCTIONS = ("Embed", "Block", "Final", "CacheEmbed", "CacheBlock", "CacheLast")

Dtypes = Mapping[str, ir.DataType]


@dataclass
class Finding:
    """What was checked in one function, as counts."""

    counts: Counter[str] = field(default_factory=Counter)
    outputs: Signature = ()


def prove_precision(
    model: ir.Model, bulk: torch.dtype, *, attentions: int = 2, sparse: int = 0
) -> dict[str, int]:
    """Check the whole graph and return what was proved, as totals over all layers.

    Args:
        model: a graph made by `onnx_from_dit`, as saved.
        bulk: the dtype of attention and of the large products.
        attentions: attention layers per block: 2, or 3 with conditioning latents; 1 in the graph
            that makes a cache.
        sparse: how many of these are block-sparse.

    Raises:
        BuildError: an operation breaks the policy; the message names function and node.
    """
    known: dict[str, tuple[ir.DataType, tuple[int, ...]]] = {}
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        known[str(value.name)] = described(value)
    proved: dict[tuple[str, Signature], Finding] = {}
    totals: Counter[str] = Counter()
    for node in model.graph:
        function = model.functions.get(node.op_identifier())
        if function is None or node.op_type not in FUNCTIONS:
            raise BuildError(f"the main graph may only call {FUNCTIONS}: {node.op_type}")
        signature = tuple(known[str(value.name)] for value in node.inputs if value is not None)
        key = (node.op_type, signature)
        if key not in proved:
            kinds = (attentions - sparse, sparse)
            proved[key] = check_function(function, signature, BULK[bulk], kinds, model.functions)
        finding = proved[key]
        totals.update(finding.counts)
        totals[f"calls_of_{node.op_type.lower()}"] += 1
        known.update(zip((str(o.name) for o in node.outputs), finding.outputs, strict=True))
    if totals["calls_of_final"]:  # a segment before the last has no velocity, nor has a cache
        found = known[str(model.graph.outputs[0].name)][0]
        require(found == FLOAT, "the velocity is not float32", found)
    return dict(sorted(totals.items()))


def check_function(
    function: ir.Function,
    signature: Signature,
    bulk: ir.DataType,
    attentions: tuple[int, int],
    functions: Functions,
) -> Finding:
    """Apply the rules to one function called with inputs of these types.

    `attentions` says how many are wanted in a block, dense and block-sparse.
    """
    types = inferred_types(function, signature, functions)
    dtypes = {name: dtype for name, (dtype, _) in types.items()}
    finding = Finding(outputs=tuple(types[str(output.name)] for output in function.outputs))
    check_weights(function)
    check_int8(function, bulk, finding.counts)
    starts = island_starts(function, dtypes, bulk)
    finding.counts["island_exits"] = follow_islands(function, starts, dtypes)
    for node in function:
        check_norm(function, node, dtypes, finding.counts)
        check_product(function, node, dtypes, bulk, finding.counts)
        if is_sparse(node):
            check_sparse(function, node, types, bulk, functions)
            finding.counts["sparse_attentions_bulk"] += keeps_chunks(functions, node)
            finding.counts["sparse_calls"] += 1
    for node in function:
        check_rounding(function, node, dtypes, finding.counts)
    check_counts(function, finding.counts, bulk, attentions)
    del finding.counts["sparse_calls"]
    return finding


def check_sparse(
    function: ir.Function, node: ir.Node, types: Types, bulk: ir.DataType, functions: Functions
) -> None:
    """A call of block-sparse attention is in the bulk dtype, and its region keeps its rules."""
    faults = list(call_faults(node, functions, types))
    used = [types[str(value.name)] for value in node.inputs if value is not None]
    require(not faults, f"{function.name}: {node.name}", faults)
    require(used[0][0] == bulk, f"{function.name}: {node.name}", used[0][0])
    inner, signature = functions[node.op_identifier()], tuple(used)
    for name, faults in region_check(inner, signature, bulk, functions):
        require(not faults, f"{function.name}: {node.name}: {name}", faults)


def island_starts(function: ir.Function, dtypes: Dtypes, bulk: ir.DataType) -> list[ir.Value]:
    """The values whose consequences must be float32: time and RoPE tables, or the timestep."""
    starts = [value for value in function.inputs if value.name in ISLAND_INPUTS]
    for value in function.inputs:
        if value.name == "timestep":
            starts.append(value if bulk == FLOAT else rounded_timestep(function, value, dtypes))
    for value in starts:
        require(dtypes[str(value.name)] == FLOAT, f"{function.name}: {value.name}", value.name)
    return starts


def rounded_timestep(function: ir.Function, value: ir.Value, dtypes: Dtypes) -> ir.Value:
    """The timestep after its rounding: to the bulk dtype and back, before anything is computed."""
    rounded = False
    while not rounded or dtypes[str(value.name)] != FLOAT:
        node = only_user(function, value)
        fit = node.op_type in ("Cast", "Reshape")
        require(fit, f"{function.name}: {node.name} precedes the timestep's rounding", node.op_type)
        value = node.outputs[0]
        rounded = rounded or dtypes[str(value.name)] != FLOAT
    return value


def follow_islands(function: ir.Function, starts: list[ir.Value], dtypes: Dtypes) -> int:
    """Walk forward from `starts`; count the Casts that leave the islands. All else is float32."""
    exits, seen, pending = 0, set(starts), list(starts)
    while pending:
        value = pending.pop()
        used = bool(value.uses()) or value.is_graph_output()
        require(used, f"{function.name}: {value.name} is computed and not used", "no user")
        for node, _ in value.uses():
            results = [dtypes[str(output.name)] for output in node.outputs]
            if node.op_type == "Cast" and results[0] != FLOAT:
                source = origin(node.inputs[0])
                fit = source is None or source.op_type in SUMS
                require(fit, f"{function.name}: {node.name} leaves an island early", source)
                exits += 1
                continue
            named = [dtypes[str(v.name)] for v in node.inputs if v is not None]
            low = [dtype for dtype in [*named, *results] if dtype in FLOATING and dtype != FLOAT]
            require(not low, f"{function.name}: {node.op_type} {node.name} is in an island", low)
            fresh = [output for output in node.outputs if output not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return exits


def check_norm(function: ir.Function, node: ir.Node, dtypes: Dtypes, counts: Counter[str]) -> None:
    """Normalisations and the functions they are made of are float32 in and out."""
    if node.op_type not in NORM_OPS:
        return
    used = [dtypes[str(value.name)] for value in [*node.inputs, *node.outputs] if value is not None]
    low = [dtype for dtype in used if dtype in FLOATING and dtype != FLOAT]
    require(not low, f"{function.name}: {node.op_type} {node.name} is not float32", low)
    if node.op_type == "LayerNormalization":
        stash = node.attributes.get_int("stash_type", 1)
        require(stash == 1, f"{function.name}: {node.name} keeps its moments in", stash)
        counts["layer_norms_fp32"] += 1
    if node.op_type == "ReduceMean":
        counts["rms_norms_fp32"] += 1


def check_product(
    function: ir.Function,
    node: ir.Node,
    dtypes: Dtypes,
    bulk: ir.DataType,
    counts: Counter[str],
) -> None:
    """Attention is in the bulk dtype; a Gemm's dtype is its weight's, by the policy."""
    if node.op_type == "Attention":
        used = {dtypes[str(value.name)] for value in node.inputs[:3] if value is not None}
        require(used == {bulk}, f"{function.name}: attention {node.name}", sorted(used))
        # Any other scale would be multiplied in by the engine, in the bulk dtype.
        scale = node.attributes.get_float("scale", 0.0)
        require(scale == 1.0, f"{function.name}: attention {node.name} is scaled by", scale)
        counts["attentions_bulk"] += 1
    elif node.op_type in PRODUCTS:
        require(node.op_type == "Gemm", f"{function.name}: a product is not a Gemm", node.name)
        weight = stored_name(node.inputs[1])
        wanted = FLOAT if is_island(full_name(function, weight)) else bulk
        used = {dtypes[str(value.name)] for value in node.inputs if value is not None}
        require(used == {wanted}, f"{function.name}: the product with {weight}", sorted(used))
        island = is_island(full_name(function, weight))
        counts["products_fp32" if island else "products_bulk"] += 1


def check_rounding(
    function: ir.Function, node: ir.Node, dtypes: Dtypes, counts: Counter[str]
) -> None:
    """What is rounded from float32 is an input, a finished sum, a turned pair or a normed value."""
    types = [dtypes[str(value.name)] for value in [*node.inputs, *node.outputs] if value]
    if node.op_type != "Cast" or types[0] != FLOAT or types[1] == FLOAT:
        return
    source = origin(node.inputs[0])
    if source is not None and source.op_type == "DequantizeLinear":
        return  # a weight, not a value: see `check_int8`
    fit = source is None or source.op_type in ROUNDED
    require(fit, f"{function.name}: {node.name} rounds too early", source)
    counts["roundings"] += 1


def check_weights(function: ir.Function) -> None:
    """Every parameter goes straight into the operation that uses its bytes as stored."""
    for value in function.inputs:
        if value.name is None or not value.name.endswith((".weight", ".bias")):
            continue
        users = [node for node, _ in value.uses()]
        require(bool(users), f"{function.name}: the weight {value.name} is unused", None)
        for node in users:
            require(
                node.op_type in WEIGHT_USERS,
                f"{function.name}: the weight {value.name} is changed before its use",
                node.op_type,
            )
            if node.op_type == "Gemm" and node.inputs[1] is value:
                as_stored = node.attributes.get_int("transB", 0) == 1
                require(as_stored, f"{function.name}: {value.name} is not used as stored", "transB")


def check_counts(
    function: ir.Function, counts: Counter[str], bulk: ir.DataType, attentions: tuple[int, int]
) -> None:
    """The function holds as many islands, norms and products as the model has there."""
    expected = {
        # latents, text features and the timestep
        "Embed": {"products_bulk": 3, "products_fp32": 2, "roundings": 3, "island_exits": 0},
        "Block": {
            "products_bulk": 11,
            "products_fp32": 1,
            "attentions_bulk": attentions[0],
            "sparse_calls": attentions[1],
            "layer_norms_fp32": 3,
            "rms_norms_fp32": 4,
            # two modulations, two gates, and RoPE on q and on k
            "island_exits": 6,
            # the same, four head norms and the norm before cross-attention
            "roundings": 11,
        },
        "Final": {"products_fp32": 2, "layer_norms_fp32": 1, "island_exits": 1, "roundings": 1},
        "CacheEmbed": {"products_bulk": 1, "products_fp32": 2, "roundings": 2, "island_exits": 0},
        # a Block without cross-attention: four products, two head norms and a norm fewer
        "CacheBlock": {
            "products_bulk": 7,
            "products_fp32": 1,
            "attentions_bulk": attentions[0],
            "layer_norms_fp32": 2,
            "rms_norms_fp32": 2,
            "island_exits": 6,
            "roundings": 8,
        },
        # keys and values alone: one modulation, one head norm
        "CacheLast": {
            "products_bulk": 2,
            "products_fp32": 1,
            "attentions_bulk": 0,
            "layer_norms_fp32": 1,
            "rms_norms_fp32": 1,
            "island_exits": 1,
            "roundings": 2,
        },
    }[function.name]
    if bulk == FLOAT:
        expected |= {"island_exits": 0, "roundings": 0}  # one dtype throughout
    found = {name: counts[name] for name in expected}
    require(found == expected, f"{function.name}: another number of checked operations", found)


def described(value: ir.Value) -> tuple[ir.DataType, tuple[int, ...]]:
    """Dtype and shape of an input or initialiser of the main graph."""
    if value.dtype is None or value.shape is None:
        raise BuildError(f"{value.name} has no type or shape")
    return value.dtype, tuple(int(dim) for dim in value.shape.numpy())


def only_user(function: ir.Function, value: ir.Value) -> ir.Node:
    """The single node that uses `value`, the timestep on its way to be rounded."""
    users = [node for node, _ in value.uses()]
    what = f"{function.name}: {value.name} is used before the timestep's rounding is done"
    require(len(users) == 1, what, users)
    return users[0]


def origin(value: ir.Value | None) -> ir.Node | None:
    """The node that computed `value`, looking through Reshape; None for an input."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Reshape":
        return origin(node.inputs[0])
    return node


def stored_name(value: ir.Value | None) -> str:
    """Name of the parameter behind a Gemm's weight, looking through what `check_weights` allows."""
    assert value is not None
    node = value.producer()
    if node is not None and node.op_type in ("Reshape", "Cast", "DequantizeLinear"):
        return stored_name(node.inputs[0])
    return str(value.name)
