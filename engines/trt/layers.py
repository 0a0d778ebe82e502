"""The layers of a TensorRT network, with everything that is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

L = TypeVar("L", bound="TensorRT.ILayer")

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
}
ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "bool": 1,
    "int32": 4,
    "int64": 8,
    "int8": 1,
    "uint8": 1,
}
LOW = frozenset({"float16", "bfloat16"})
FLOATING = LOW | {"float32"}


@dataclass(frozen=True)
class Layer:
    """One layer, with everything the checks ask of it."""

    index: int
    kind: str
    raw: TensorRT.ILayer
    place: str
    inputs: tuple[TensorRT.ITensor, ...]
    outputs: tuple[TensorRT.ITensor, ...]

    def __str__(self) -> str:
        return f"layer {self.index} {self.raw.name!r} ({self.kind}, {self.place})"

    @property
    def dtypes(self) -> set[str]:
        """The floating types that go in or come out."""
        found = {dtype_of(tensor) for tensor in (*self.inputs, *self.outputs)}
        return found & FLOATING


def seen_as(kind: type[L], raw: TensorRT.ILayer) -> L:
    """A layer as what it is: the bindings hand out each one as the base class."""
    raw.__class__ = kind
    return cast("L", raw)


def layers_of(network: TensorRT.INetworkDefinition) -> Iterator[Layer]:
    """The network's layers in order, each with the ONNX function call it came from.

    Where none is told, that of the layer before.
    """
    place = ""
    for index in range(network.num_layers):
        raw = network.get_layer(index)
        # "[ONNX Layer: node_linear | blocks.0 (Block)]"; empty for what the parser adds itself.
        place = raw.metadata.strip("[]").removeprefix("ONNX Layer: ") or place
        inputs = (raw.get_input(i) for i in range(raw.num_inputs))
        yield Layer(
            index=index,
            kind=raw.type.name,
            raw=raw,
            place=place,
            inputs=tuple(tensor for tensor in inputs if tensor is not None),
            outputs=tuple(raw.get_output(i) for i in range(raw.num_outputs)),
        )


def inputs_of(network: TensorRT.INetworkDefinition) -> Iterator[TensorRT.ITensor]:
    return (network.get_input(index) for index in range(network.num_inputs))


def outputs_of(network: TensorRT.INetworkDefinition) -> Iterator[TensorRT.ITensor]:
    return (network.get_output(index) for index in range(network.num_outputs))


def attention_kinds(network: TensorRT.INetworkDefinition) -> str:
    """The attention layers' types and sizes, for an error that cannot say which one is meant."""
    kinds: dict[str, list[str]] = {}
    for layer in layers_of(network):
        if layer.kind == "ATTENTION_INPUT":
            query, key = layer.inputs[:2]
            kind = f"{dtype_of(query)} {list(query.shape)} x {list(key.shape)}"
            kinds.setdefault(kind, []).append(layer.raw.name)
    return "; ".join(f"{names[0]} and alike ({len(names)}): {k}" for k, names in kinds.items())


def dtype_of(tensor: TensorRT.ITensor) -> str:
    """torch's name for a tensor's type; TensorRT's own for types torch has under another."""
    name = str(tensor.dtype.name)
    return DTYPES.get(name, name)


def bytes_of(tensor: TensorRT.ITensor) -> int:
    size = ITEM_BYTES.get(dtype_of(tensor), 1)
    for extent in tensor.shape:
        size *= extent
    return size
