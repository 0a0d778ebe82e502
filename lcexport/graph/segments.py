"""Segments: consecutive runs of blocks, each a graph of its own over the same weights file.

A compiler then holds the weights of one segment at a time. The main graph is a list of calls, so a
segment is a slice of that list. It refers to the functions and to the byte ranges of the weights
file that the whole graph refers to: nothing is copied.

What flows from one segment to the next keeps its name: `x` is the previous segment's last block,
text, time and the RoPE tables are the first segment's, and go to every later one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from lcexport.configs.errors import BuildError, ResourceError, UsageError
from lcexport.engines.trt.compile import BYTES_PER_WEIGHT_BYTE, FIXED_BYTES, build_bytes
from lcexport.graph.inference import nested_functions

WHOLE = (("Embed", "Final"), ("CacheEmbed", "CacheLast"))  # first and last call of a whole graph


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that crosses a segment's border."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType


@dataclass(frozen=True)
class Segment:
    """Blocks `first_block` to `last_block`, both included, as a graph."""

    index: int
    first_block: int
    last_block: int
    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights_bytes: int


def segment_graph(model: ir.Model, count: int) -> list[Segment]:
    """Cut the graph into `count` segments that, run one after another, compute the same.

    The blocks are spread evenly, the longer runs first; what is before the blocks goes with the
    first segment, what is after them with the last. `model` stays as it is.

    Raises:
        UsageError: there are fewer blocks than segments, or no segment at all.
    """
    calls = list(model.graph)
    if (calls[0].op_type, calls[-1].op_type) not in WHOLE:
        raise BuildError("only a whole graph can be cut", got=f"{len(calls)} calls")
    depth = depth_of(model)
    require_segments(count, depth)
    bounds = [0]
    for index in range(count):
        bounds.append(bounds[-1] + depth // count + (index < depth % count))
    segments = []
    for index, (first, end) in enumerate(pairwise(bounds)):
        start = 0 if index == 0 else first + 1  # Embed is call 0
        stop = len(calls) if index == count - 1 else end + 1
        graph = sliced(model, calls[start:stop], index)
        cut = ir.Model(
            graph,
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
            functions=called_functions(model, graph),
        )
        segments.append(
            Segment(
                index=index,
                first_block=first,
                last_block=end - 1,
                model=cut,
                inputs=tuple(described(value) for value in graph.inputs),
                outputs=tuple(described(value) for value in graph.outputs),
                weights_bytes=weights_bytes(graph),
            )
        )
    return segments


def depth_of(model: ir.Model) -> int:
    """How many calls of the graph are layers."""
    return sum(str(node.name).startswith("blocks.") for node in model.graph)


def require_segments(count: int, depth: int) -> None:
    """UsageError where there are fewer blocks than segments, or no segment at all."""
    if not 1 <= count <= depth:
        raise UsageError("the number of segments is out of range", got=count, wanted=f"1..{depth}")


def sliced(model: ir.Model, calls: Sequence[ir.Node], index: int) -> ir.Graph:
    """A new graph of copies of these calls."""
    inside = set(calls)
    used = unique(value for node in calls for value in node.inputs if value is not None)
    weights = [value for value in used if value.is_initializer()]
    arriving = [v for v in used if not v.is_initializer() and v.producer() not in inside]
    leaving = [
        value
        for node in calls
        for value in node.outputs
        if value.is_graph_output() or any(user not in inside for user, _ in value.uses())
    ]
    copies = {value: copied(value) for value in [*arriving, *weights]}
    nodes = []
    for node in calls:
        outputs = [copied(value) for value in node.outputs]
        copies.update(zip(node.outputs, outputs, strict=True))
        inputs = [None if value is None else copies[value] for value in node.inputs]
        nodes.append(ir.Node(node.domain, node.op_type, inputs, outputs=outputs, name=node.name))
    return ir.Graph(
        [copies[value] for value in arriving],
        [copies[value] for value in leaving],
        nodes=nodes,
        initializers=[copies[value] for value in weights],
        opset_imports=dict(model.graph.opset_imports),
        name=f"{model.graph.name}_{index}",
    )


def called_functions(model: ir.Model, graph: ir.Graph) -> list[ir.Function]:
    """The functions the graph calls: copies, so that changing a segment changes no other."""
    return [f.clone() for f in nested_functions(model.functions, graph)]


def copied(value: ir.Value) -> ir.Value:
    """The same value for another graph; a weight stays the same bytes of the same file."""
    return ir.Value(
        name=value.name, shape=value.shape, type=value.type, const_value=value.const_value
    )


def unique(values: Iterable[ir.Value]) -> list[ir.Value]:
    """Each value once, in the order of its first use."""
    return list(dict.fromkeys(values))


def described(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise BuildError(f"{value.name} has no type or shape")
    shape = tuple(int(dim) for dim in value.shape.numpy())
    return TensorSpec(str(value.name), shape, value.dtype)


def weights_bytes(graph: ir.Graph) -> int:
    """Bytes of the initialisers, which is about the size of the plan."""
    constants = (value.const_value for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in constants if tensor is not None)


def propose_segments(weights_bytes_per_block: int, depth: int, host_memory_bytes: int) -> int:
    """The fewest segments of which one at a time can be built in this much host memory.

    Raises:
        ResourceError: not even one block fits.
    """
    blocks = int(
        (host_memory_bytes - FIXED_BYTES) / (BYTES_PER_WEIGHT_BYTE * weights_bytes_per_block)
    )
    if blocks < 1:
        needed = build_bytes(weights_bytes_per_block)
        raise ResourceError(
            "the memory does not hold the build of one block",
            got=f"{host_memory_bytes / 1e9:.1f} GB",
            wanted=f"{needed / 1e9:.1f} GB",
            do="Build on a machine with more memory.",
        )
    return -(-depth // min(blocks, depth))
