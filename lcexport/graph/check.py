"""Does a graph keep our rules for TensorRT? Answered in milliseconds, without TensorRT.

Strong typing leaves no room for interpretation: what a graph says is what is asked for. So ONNX's
own type inference, started anew from the inputs and the weights of every call, tells what the
parser will meet, and the rules of `lcexport.graph.targets` tell what TensorRT for RTX 1.7 was seen
to take. Where a rule is stricter than that, the parser accepts something that is not what the graph
says (float64 is read as float32), that is not documented or proven, or that other engines refuse.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import onnx_ir as ir

from lcexport.configs.errors import BuildError, InputError, UsageError
from lcexport.graph.inference import Functions, Signature, inferred_types
from lcexport.graph.region import call_faults, region_check
from lcexport.graph.sparse import is_sparse
from lcexport.graph.targets.attention import attention_reasons
from lcexport.graph.targets.external import external_faults
from lcexport.graph.targets.rules import (
    UNDEFINED,
    Reasons,
    Types,
    Violation,
    dequantize_reasons,
    node_name,
    operator_reasons,
    shape_reasons,
    type_reasons,
    value_reasons,
)
from lcexport.graph.targets.tables import TARGETS, Limits, Target

__all__ = ["Target", "Violation", "check_graph"]

MAIN = ""  # the main graph, as a violation's function
INFERENCE_ERROR = re.compile(r"\(op_type:(\w+)(?:, node name: ([^)]*))?\): ([^\n]*)")


def check_graph(graph: str | Path | ir.Model, target: Target) -> list[Violation]:
    """Every breach of our rules for `target`, in the order of the graph; nothing where it is fit.

    Args:
        graph: a graph file, or a model that knows where its weights lie.

    Raises:
        InputError: the file cannot be read, or is not ONNX.
        UsageError: no such target.
    """
    if target not in TARGETS:
        wanted = ", ".join(get_args(Target))
        raise UsageError("unknown target", got=target, wanted=wanted)
    model = graph if isinstance(graph, ir.Model) else read_graph(Path(graph))
    limits = TARGETS[target]
    found = [*opset_violations(model, limits), *input_violations(model.graph)]
    for name, rule, reason in external_faults(model.graph):
        found.append(Violation(name, MAIN, rule, reason))
    if any(node.op_identifier() in model.functions for node in model.graph):
        return list(dict.fromkeys([*found, *call_violations(model, limits)]))
    main = ir.Function("", model.graph.name or "main", graph=model.graph, attributes=[])
    signature = tuple(described(value) for value in model.graph.inputs)
    violations, types = body_violations(main, signature, limits, MAIN, model.functions)
    found.extend(violations)
    found.extend(output_violations(model.graph.outputs, types))
    return list(dict.fromkeys(found))


def read_graph(path: Path) -> ir.Model:
    """The graph without its weights."""
    try:
        model = ir.load(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's and onnx_ir's errors share no base
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"{path} is not an ONNX graph: {reason}") from error
    if not model.graph.outputs:
        raise InputError(f"{path} is not an ONNX graph: it computes nothing")
    return model


def opset_violations(model: ir.Model, limits: Limits) -> Iterator[Violation]:
    """The graph and its functions are of one opset, and the target reads it."""
    opset = model.graph.opset_imports.get("")
    if opset is None or opset not in limits.opsets:
        span = f"{limits.opsets.start} to {limits.opsets.stop - 1}"
        yield Violation(str(model.graph.name), MAIN, "opset", f"opset {opset}; our rule is {span}")
    for function in model.functions.values():
        own = function.opset_imports.get("", opset)
        if own != opset:
            reason = f"opset {own} in a graph of opset {opset}"
            yield Violation(function.name, function.name, "opset", reason)


def input_violations(graph: ir.Graph) -> Iterator[Violation]:
    """Inputs and initialisers have a type, and a static shape."""
    values = [*graph.inputs, *graph.initializers.values()]
    types = {str(value.name): described(value) for value in values}
    for value in values:
        for rule, reason in value_reasons(value, types):
            yield Violation(str(value.name), MAIN, rule, reason)


def call_violations(model: ir.Model, limits: Limits) -> Iterator[Violation]:
    """A main graph of calls: each function is checked once for each set of types it is given."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    known = {str(value.name): described(value) for value in values}
    checked: dict[tuple[ir.OperatorIdentifier, Signature], Types] = {}
    for node in model.graph:
        function = model.functions.get(node.op_identifier())
        if function is None:
            reason = f"{node.op_type} stands beside calls: put it in a function"
            yield Violation(node_name(node), MAIN, "structure", reason)
            continue
        signature = signature_of(node, known)
        if signature is None or len(signature) != len(function.inputs):
            reason = f"does not give {function.name} what it takes"
            yield Violation(node_name(node), MAIN, "structure", reason)
            continue
        key = (node.op_identifier(), signature)
        if key not in checked:
            violations, checked[key] = body_violations(
                function, signature, limits, function.name, model.functions
            )
            again = sum(identifier == key[0] for identifier, _ in checked) > 1
            note = f" (as {node_name(node)} calls it)" if again else ""
            for found in violations:
                yield Violation(found.node, found.function, found.rule, found.reason + note)
        for output, inner in zip(node.outputs, function.outputs, strict=True):
            if str(inner.name) in checked[key]:
                known[str(output.name)] = checked[key][str(inner.name)]
        yield from output_violations(node.outputs, known)


def signature_of(node: ir.Node, known: Types) -> Signature | None:
    """Types of a call's inputs; None where one is missing."""
    types = [known.get(str(value.name)) for value in node.inputs if value is not None]
    if len(types) < len(node.inputs):
        return None
    found = tuple(described for described in types if described is not None)
    return found if len(found) == len(types) else None


def body_violations(
    function: ir.Function, signature: Signature, limits: Limits, name: str, functions: Functions
) -> tuple[list[Violation], Types]:
    """Check a function given inputs of these types; also the types it has inside."""
    found = []
    types = {key: described(value) for key, value in function.graph.initializers.items()}
    try:
        types |= inferred_types(function, signature, functions)
    except BuildError as error:
        found.extend(inference_violations(str(error.__cause__), name))
    for node in function:
        sparse = is_sparse(node) and node.op_identifier() in functions
        reasons = list(
            sparse_reasons(node, functions, types) if sparse else operator_reasons(node, limits)
        )
        if not reasons and not sparse:
            reasons.extend(type_reasons(node, types))
            reasons.extend(shape_reasons(node, types))
            for value in node.outputs:
                reasons.extend(value_reasons(value, types))
            if node.op_type == "Attention":
                reasons.extend(attention_reasons(node, types))
            if node.op_type == "DequantizeLinear":
                reasons.extend(dequantize_reasons(node, types))
        found.extend(Violation(node_name(node), name, rule, reason) for rule, reason in reasons)
    return found, types


def sparse_reasons(node: ir.Node, functions: Functions, types: Types) -> Reasons:
    """The rules of block-sparse attention: control flow and computed indices belong to it."""
    known = [types.get(str(value.name)) for value in node.inputs if value is not None]
    given = tuple(described for described in known if described is not None)
    for reason in call_faults(node, functions, types):
        yield "sparse", reason
    if len(given) == len(node.inputs):
        inner = functions[node.op_identifier()]
        for name, faults in region_check(inner, given, given[0][0], functions):
            yield from (("sparse", f"{name}: {fault}") for fault in faults)


def inference_violations(message: str, name: str) -> Iterator[Violation]:
    """What ONNX's inference refused: it names operator and node."""
    matches = list(INFERENCE_ERROR.finditer(message))
    for operator, node, reason in (match.groups() for match in matches):
        yield Violation(node or operator, name, "typing", f"{operator}: {reason.strip()}")
    if not matches:
        yield Violation(name or "the graph", name, "typing", message.strip())


def output_violations(values: Iterable[ir.Value], types: Types) -> Iterator[Violation]:
    """What the graph declares of its outputs is what it computes."""
    for value in values:
        inferred = types.get(str(value.name))
        declared = described(value)
        if inferred is None or inferred[0] == UNDEFINED or declared[0] == UNDEFINED:
            continue
        if inferred != declared:
            reason = f"{value.name} is declared {shown(declared)} and is {shown(inferred)}"
            yield Violation(str(value.name), MAIN, "declared", reason)


def described(value: ir.Value) -> tuple[ir.DataType, tuple[int, ...]]:
    """Type and shape as the graph declares them; 0 for a dimension that is not static."""
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        return UNDEFINED, ()
    return value.type.dtype, tuple(dim if isinstance(dim, int) else 0 for dim in value.shape)


def shown(described: tuple[ir.DataType, tuple[int, ...]]) -> str:
    return f"{described[0].name} {list(described[1])}"
