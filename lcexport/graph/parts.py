"""Parts: each function of the graph as a graph of its own, with its weights as inputs.

One compiled block then serves every layer of every request: the layers differ in their weights
alone, and those are handed in. Compiling takes the time and the memory of one block without
weights, and every resolution uses the same weights on the device.
"""

from dataclasses import dataclass

import onnx_ir as ir

from lcexport.configs.errors import BuildError
from lcexport.graph.segments import TensorSpec, called_functions, described


@dataclass(frozen=True)
class Part:
    """One function, called once. Its tensors carry the function's own names.

    Attributes:
        weights: the inputs that are weights; a call's prefix makes their names in the bundle.
    """

    name: str
    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class PartCall:
    """One call of a part in the whole graph.

    Attributes:
        part: index of the part.
        prefix: of its weights' names: `blocks.3.`
        tensors: the part's activations -> the graph's values.
    """

    part: int
    prefix: str
    tensors: dict[str, str]


def parts_of(model: ir.Model) -> tuple[list[Part], list[PartCall]]:
    """The graph's functions as graphs of their own, and its calls of them in order.

    Raises:
        BuildError: a function is called with tensors of other types or shapes than before, or
            with weights that are not named alike.
    """
    parts: dict[ir.OperatorIdentifier, Part] = {}
    calls = []
    for node in model.graph:
        function = model.functions[node.op_identifier()]
        part = part_from(model, function, node)
        known = parts.setdefault(node.op_identifier(), part)
        if (known.inputs, known.weights, known.outputs) != (
            part.inputs,
            part.weights,
            part.outputs,
        ):
            raise BuildError(
                f"the calls of {function.name} differ in types or shapes", got=node.name
            )
        index = list(parts).index(node.op_identifier())
        calls.append(PartCall(index, prefix_of(function, node), activations_of(function, node)))
    return list(parts.values()), calls


def part_from(model: ir.Model, function: ir.Function, node: ir.Node) -> Part:
    """`function` alone, typed as `node` calls it."""
    inputs = [renamed(value, formal) for formal, value in named_inputs(function, node)]
    outputs = [
        renamed(value, formal) for formal, value in zip(function.outputs, node.outputs, strict=True)
    ]
    call = ir.Node(node.domain, node.op_type, inputs, outputs=outputs, name=function.name)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=[call],
        opset_imports=dict(model.graph.opset_imports),
        name=function.name,
    )
    alone = ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=called_functions(model, graph),
    )
    weights = {str(f.name) for f, value in named_inputs(function, node) if value.is_initializer()}
    specs = [described(value) for value in inputs]
    return Part(
        name=function.name,
        model=alone,
        inputs=tuple(spec for spec in specs if spec.name not in weights),
        weights=tuple(spec for spec in specs if spec.name in weights),
        outputs=tuple(described(value) for value in outputs),
    )


def named_inputs(function: ir.Function, node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """(the function's input, what the call gives for it)."""
    given = [value for value in node.inputs if value is not None]
    return list(zip(function.inputs, given, strict=True))


def activations_of(function: ir.Function, node: ir.Node) -> dict[str, str]:
    """The function's names of what is no weight -> the graph's."""
    pairs = [(f, v) for f, v in named_inputs(function, node) if not v.is_initializer()]
    pairs += zip(function.outputs, node.outputs, strict=True)
    return {str(formal.name): str(value.name) for formal, value in pairs}


def prefix_of(function: ir.Function, node: ir.Node) -> str:
    """What the call's weights have in front of the function's own names."""
    pairs = [
        (str(formal.name), str(value.name))
        for formal, value in named_inputs(function, node)
        if value.is_initializer()
    ]
    prefixes = {name.removesuffix(formal) for formal, name in pairs}
    if len(prefixes) != 1 or not all(name.endswith(formal) for formal, name in pairs):
        raise BuildError(f"the weights of {node.name} are not named alike", got=sorted(prefixes))
    return prefixes.pop()


def renamed(value: ir.Value, formal: ir.Value) -> ir.Value:
    """The same type and shape under the function's name."""
    return ir.Value(name=formal.name, shape=value.shape, type=value.type)
