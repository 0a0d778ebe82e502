"""A graph parsed into a TensorRT network, and what the parser says where it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcexport.configs.errors import BuildError
from lcexport.engines.trt.product import MessageLog, Product

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT


@dataclass(frozen=True)
class Parsed:
    """A parsed network. The parser owns the weights, so it is kept as long as the network."""

    network: TensorRT.INetworkDefinition
    parser: TensorRT.OnnxParser


def parse_network(
    product: Product,
    builder: TensorRT.Builder,
    logger: TensorRT.ILogger,
    log: MessageLog,
    graph: bytes,
    path: Path,
) -> Parsed:
    """Parse `graph`; external data is looked for beside `path`, and mapped (seen with RTX 1.7.1).

    Raises:
        BuildError: TensorRT refuses the graph; names the node, the operator and the reason.
    """
    trt = product.trt
    # Required in 10; by its documentation the default, and ignored, in 11.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph, str(path.absolute())):
        raise parser_error(product, parser, log, path)
    if network.num_outputs == 0:  # the parser takes some files that are no graphs for empty ones
        raise BuildError(f"{path} is not an ONNX graph: it has no outputs", do="Export it again.")
    return Parsed(network, parser)


def parser_error(
    product: Product, parser: TensorRT.OnnxParser, log: MessageLog, path: Path
) -> BuildError:
    """What the parser says is wrong: the first error, and how many more there are."""
    count = parser.num_errors
    if count == 0:
        reason = log.errors[-1] if log.errors else "no reason given"
        return BuildError(f"{product} cannot parse {path}", got=reason, do="Export it again.")
    first = parser.get_error(0)
    stack = [*first.local_function_stack()]
    where = f"node {first.node_name()!r} ({first.node_operator()})" if first.node_name() else "file"
    inside = f" in {' in '.join(stack)}" if stack else ""
    more = f" (and {count - 1} more)" if count > 1 else ""
    # On a machine without a GPU, some errors are followed by another about the missing driver.
    lines = [line for line in first.desc().splitlines() if "catchCudaError" not in line]
    return BuildError(
        f"{product} cannot parse {path}: {where}{inside}",
        got=f"{' '.join(lines).strip()}{more}",
        do=parser_advice(first.desc()),
    )


def parser_advice(reason: str) -> str:
    """What to do about a parser's refusal."""
    if "Failed to import initializer" in reason or "external" in reason.lower():
        return "Its weights file is missing, too short or unreadable: it must lie beside the graph."
    if "Failed to parse the ONNX model" in reason:
        return "The file is damaged or cut short: export it again."
    if "same" in reason and "type" in reason:
        return "This operation does not mix types: the graph needs a Cast in front of this node."
    return "The graph needs another form of this operation."
