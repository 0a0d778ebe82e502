"""Clean-up of a traced function. Each pass is small and says what it requires and ensures."""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from lcexport.configs.errors import BuildError

SEQUENCE_OPS = frozenset(
    {
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceInsert",
        "SequenceLength",
        "SplitToSequence",
        "ConcatFromSequence",
    }
)


class ParametersToInputs(ir.passes.InPlacePass):
    """Turn the named initialisers into graph inputs, in order, after the present inputs.

    Requires: each name is an initialiser of the graph.
    Ensures: none of them is one any more, so a constant folder cannot see their values.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def requires(self, model: ir.Model) -> None:
        missing = [name for name in self.names if name not in model.graph.initializers]
        if missing:
            raise ir.passes.PreconditionError(f"parameters the trace does not use: {missing}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name in self.names:
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)
        return ir.passes.PassResult(model, modified=bool(self.names))

    def ensures(self, model: ir.Model) -> None:
        left = [name for name in self.names if name in model.graph.initializers]
        if left:
            raise ir.passes.PostconditionError(f"still initialisers: {left}")


class InputsToConstants(ir.passes.InPlacePass):
    """Bind graph inputs to tensors: the reverse of `ParametersToInputs`, for small tables.

    Requires: each name is an input of the graph.
    Ensures: none is any more; each became a Constant node.
    """

    def __init__(self, tables: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.tables = tables

    def requires(self, model: ir.Model) -> None:
        missing = set(self.tables) - {str(value.name) for value in model.graph.inputs}
        if missing:
            raise ir.passes.PreconditionError(f"not inputs: {sorted(missing)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in list(model.graph.inputs):
            name = str(value.name)
            if name in self.tables:
                model.graph.inputs.remove(value)
                tensor = ir.tensor(self.tables[name].numpy(), name=name)
                replace_by_constant(model.graph, value, tensor)
        return ir.passes.PassResult(model, modified=bool(self.tables))


class InitializersToConstants(ir.passes.InPlacePass):
    """Turn the initialisers into Constant nodes, because a function cannot have initialisers.

    Ensures: the graph has no initialiser, and each constant precedes its first use.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        constants = list(model.graph.initializers.values())
        for value in constants:
            assert value.const_value is not None
            del model.graph.initializers[str(value.name)]
            replace_by_constant(model.graph, value, value.const_value)
        return ir.passes.PassResult(model, modified=bool(constants))

    def ensures(self, model: ir.Model) -> None:
        if model.graph.initializers:
            raise ir.passes.PostconditionError("initialisers are left in a function")


def replace_by_constant(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Give every user of `value` a Constant node in front of the graph instead."""
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
    output = node.outputs[0]
    output.name, output.shape, output.type = value.name, value.shape, value.type
    value.replace_all_uses_with(output)
    graph.insert_before(graph[0], node)


class RefuseWhatEnginesRefuse(ir.passes.InPlacePass):
    """Change nothing; fail on sequence operations and on int64 values that are computed.

    Ensures: int64 occurs only in constants (shapes, axes, split sizes), so every engine can
    resolve it at build time.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            if node.op_type in SEQUENCE_OPS:
                raise BuildError(f"the trace left a sequence operation: {node.name}")
            computed = [o.name for o in node.outputs if o.dtype == ir.DataType.INT64]
            if computed and node.op_type != "Constant":
                raise BuildError(f"{node.op_type} {node.name} computes int64 values {computed}")
        return ir.passes.PassResult(model, modified=False)


def clean_function(model: ir.Model) -> None:
    """Make an optimised graph fit to be a function: no initialisers, no dead code, no surprises.

    The exporter's notes go too: they hold stack traces, with the paths of the building machine.
    """
    for step in (
        RemoveUnusedNodesPass(),
        InitializersToConstants(),
        ClearMetadataAndDocStringPass(),
        RefuseWhatEnginesRefuse(),
    ):
        step(model)
