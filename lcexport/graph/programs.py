"""The graph's parts as torch programs whose weights are inputs, for compilers that take those.

A program takes a part's activations and then its weights, as the weights file has them. One
program of `Block` therefore serves every layer, as its ONNX function does, and no compiler can fold
a weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.func import functional_call

from lcexport.checkpoint.int8 import INT8, SCALE, WEIGHT, dequantised
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import BuildError
from lcexport.graph.exporter import quiet_exporter
from lcexport.graph.trace import (
    GraphSpec,
    Untraced,
    untraced_cache_parts,
    untraced_parts,
)


class Program(nn.Module):
    """A part as a function of its activations and its weights; its tables are its own.

    Args:
        weights: names in the weights file, without what a layer puts in front; int8 ones, which
            are two for one matrix, are multiplied out in float32 and rounded once to the bulk.
    """

    def __init__(self, part: Untraced, weights: Sequence[str], bulk: torch.dtype) -> None:
        super().__init__()
        self._part = (part.module,)  # in a tuple: its parameters are not this module's
        self._activations, self._bulk = len(part.inputs), bulk
        self._names = [part.prefix + name for name in weights]
        for name, table in part.tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, *tensors: Tensor) -> object:
        activations, weights = tensors[: self._activations], tensors[self._activations :]
        given = dict(zip(self._names, weights, strict=True))
        state = dict(dequantised(given, self._bulk)) | dict(self.named_buffers())
        return functional_call(self._part[0], state, activations, strict=True)


def export_program(
    config: DiTConfig,
    spec: GraphSpec,
    name: str,
    weights: Sequence[str],
    device: str = "cpu",
) -> ExportedProgram:
    """The program of the part `name` on fake tensors: no weight is read, nothing computed.

    Args:
        name: of the function in the ONNX graph: `Embed`, `CacheBlock`, ...
        weights: the function's weights in the order in which they are to be handed in.

    Raises:
        BuildError: these are not the part's weights.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    draw = untraced_cache_parts if name.startswith("Cache") else untraced_parts
    part = next(part for part in draw(config, spec, mode, device) if part.name == name)
    parameters = {n.removeprefix(part.prefix): p for n, p in part.module.named_parameters()}
    named = {weight.replace(INT8, WEIGHT) for weight in weights if not weight.endswith(SCALE)}
    if named != set(parameters):
        raise BuildError(
            f"the weights of {name} are not its parameters",
            got=sorted(named ^ set(parameters))[:5],
        )
    with mode, quiet_exporter():
        fakes = [fake_weight(weight, parameters) for weight in weights]
        program = Program(part, weights, spec.bulk)
        return torch.export.export(program, (*part.inputs.values(), *fakes), strict=False)


def fake_weight(name: str, parameters: dict[str, nn.Parameter]) -> Tensor:
    """A tensor like the weight of that name: a parameter, or one of the two that stand for it."""
    if name.endswith(INT8):
        return torch.empty_like(parameters[name.replace(INT8, WEIGHT)], dtype=torch.int8)
    if name.endswith(SCALE):
        parameter = parameters[name.replace(SCALE, WEIGHT)]
        return torch.empty_like(parameter[:, 0], dtype=torch.float32)
    return torch.empty_like(parameters[name], requires_grad=False)
