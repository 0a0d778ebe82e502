"""A parsed network held against what it must be.

By NVIDIA's documentation strong typing keeps the network's types, so this is where precision is
asked for: after TensorRT's parser, before its compiler. (RTX 1.7.1 was seen to fold Casts around an
attention; what an engine computes in, `lcexport verify` measures.) Checked are attention (all of it
layers that may not be decomposed, none in float32), the norms and roots (float32), every rounding
to a lower precision (only of what `check_rounding` names) and the number of each. Block-sparse
attention is layers of a function of that name, with or without a plugin: it has rules of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from pydantic import BaseModel, ConfigDict

from lcexport.configs.errors import BuildError
from lcexport.engines.manifest import TensorRecord
from lcexport.engines.trt.layers import (
    LOW,
    Layer,
    bytes_of,
    dtype_of,
    inputs_of,
    layers_of,
    outputs_of,
    seen_as,
)
from lcexport.engines.trt.product import Product

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

# Fused float16 attention was reported to give NaN at 65,536 keys (docs/tensorrt.md): a margin.
MOST_FP16_KEYS = 60_000
PRODUCTS = frozenset({"MATRIX_MULTIPLY", "CONVOLUTION", "EINSUM"})
COUNTED = (
    "attentions",
    "sparse_attentions",
    "products_fp32",
    "products_bulk",
    "layer_norms",
    "rms_norms",
    "roundings",
    "weights_int8",
)
NORMS = frozenset({"NORMALIZATION", "REDUCE", "UNARY"})
SPARSE = "(BlockSparseAttention"  # in the place of a layer: a call of that function, or within it
MOVES = frozenset({"SHUFFLE", "SLICE", "UNSQUEEZE", "SQUEEZE"})


class Expectations(BaseModel):
    """How many of each kind the network must have; None where it does not matter.

    Attributes:
        islands: names of weights, inside or handed in, whose products must be float32.
        sparse_plugin: block-sparse attention must be the plugin, not the function in its place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attentions: int
    sparse_attentions: int | None = None
    products_fp32: int | None = None
    products_bulk: int | None = None
    layer_norms: int | None = None
    rms_norms: int | None = None
    roundings: int | None = None
    weights_int8: int | None = None
    islands: frozenset[str] = frozenset()
    sparse_plugin: bool = False

    @classmethod
    def from_proof(cls, proof: Mapping[str, int], islands: Iterable[str] = ()) -> Self:
        """The counts that the graph's own proof of precision found."""
        return cls(
            islands=frozenset(islands),
            attentions=proof.get("attentions_bulk", 0),
            sparse_attentions=proof.get("sparse_attentions_bulk", 0),
            products_fp32=proof.get("products_fp32", 0),
            products_bulk=proof.get("products_bulk", 0),
            layer_norms=proof.get("layer_norms_fp32", 0),
            rms_norms=proof.get("rms_norms_fp32", 0),
            roundings=proof.get("roundings", 0),
            weights_int8=proof.get("weights_int8", 0),
        )


class NetworkSummary(BaseModel):
    """What was found in a network that passed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int
    attentions: int
    sparse_attentions: int = 0
    products_fp32: int
    products_bulk: int
    layer_norms: int
    rms_norms: int
    roundings: int
    weights_int8: int
    weights_bytes: int
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]


def check_network(
    product: Product, network: TensorRT.INetworkDefinition, expectations: Expectations, path: Path
) -> NetworkSummary:
    """Walk the network and hold it against `expectations`.

    Raises:
        BuildError: an attention, a norm, a product or a rounding is not what it must be.
    """
    return NetworkCheck(product, network, path).check(expectations)


class NetworkCheck:
    """One walk over one network."""

    def __init__(self, product: Product, network: TensorRT.INetworkDefinition, path: Path) -> None:
        self.product, self.trt, self.network, self.path = product, product.trt, network, path
        self.layers = list(layers_of(network))
        self.makers = {tensor.name: layer for layer in self.layers for tensor in layer.outputs}
        self.found: dict[str, list[Layer]] = {}
        self.weights_bytes = 0

    def check(self, expectations: Expectations) -> NetworkSummary:
        """See `check_network`."""
        inputs = tuple(map(self.record, inputs_of(self.network)))
        outputs = tuple(map(self.record, outputs_of(self.network)))
        for layer in self.layers:
            self.check_layer(layer, expectations)
        counts = Counter({kind: len(layers) for kind, layers in self.found.items()})
        for kind in COUNTED:
            wanted = getattr(expectations, kind)
            if wanted is not None and counts[kind] != wanted:
                self.wrong_count(kind, wanted)
        return NetworkSummary(
            layers=len(self.layers),
            weights_bytes=self.weights_bytes,
            inputs=inputs,
            outputs=outputs,
            **{kind: counts[kind] for kind in COUNTED},
        )

    def check_layer(self, layer: Layer, expectations: Expectations) -> None:
        """Apply the rule for this kind of layer, and count it."""
        if layer.kind == "CONSTANT":
            self.weights_bytes += sum(map(bytes_of, layer.outputs))
        elif SPARSE in layer.place:
            self.check_sparse(layer, expectations.sparse_plugin)
        elif layer.kind == "ATTENTION_INPUT":
            self.check_attention(layer)
        elif layer.kind == "SOFTMAX":
            self.refuse(
                f"{layer} is attention in pieces, which may keep every score in memory",
                do="Attention must reach TensorRT as ONNX Attention, which it may not decompose.",
            )
        elif layer.kind in PRODUCTS:
            self.check_product(layer, expectations.islands)
        elif layer.kind in NORMS:
            self.check_norm(layer)
        elif layer.kind == "ELEMENTWISE":
            self.check_power(layer)
        elif layer.kind == "CAST":
            self.check_rounding(layer)
        elif layer.kind == "DEQUANTIZE":
            self.check_dequantised(layer)

    def check_attention(self, layer: Layer) -> None:
        """One attention: not to be decomposed, and in a type that is built."""
        attention = seen_as(self.trt.IAttentionInputLayer, layer.raw).attention
        if attention.decomposable:
            self.refuse(
                f"{layer} may be taken apart, which may keep every score in memory",
                do="Remove the attribute TRT_decomposable from the graph.",
            )
        query, key, value = (attention.get_input(index) for index in range(3))
        dtypes = {dtype_of(tensor) for tensor in (query, key, value)}
        if not dtypes <= LOW or len(dtypes) != 1:
            self.refuse(
                f"{layer} is not in one of the types that are built",
                got=", ".join(sorted(dtypes)),
                wanted=f"{' or '.join(sorted(LOW))} queries, keys and values",
                do="Build the bundle with --precision bf16.",
            )
        keys = key.shape[-2]
        if dtypes == {"float16"} and keys > MOST_FP16_KEYS:
            self.refuse(
                f"{layer} may overflow in float16",
                got=f"{keys} keys",
                wanted=f"at most {MOST_FP16_KEYS}, or bfloat16",
                do="Build the bundle with --precision bf16.",
            )
        self.count("attentions", layer)

    def check_sparse(self, layer: Layer, plugin: bool) -> None:
        """A layer of block-sparse attention: means float32, and softmax float32 or in a plugin."""
        if layer.kind == "SOFTMAX" and plugin:
            self.refuse(f"{layer} is of the function that the plugin should have replaced")
        if layer.kind in ("SOFTMAX", "REDUCE") and layer.dtypes & LOW:
            self.refuse(f"{layer} is not float32", got=", ".join(sorted(layer.dtypes)))
        if layer.kind == "PLUGIN_V3" and len(layer.dtypes) != 1:
            self.refuse(f"{layer} mixes types", got=", ".join(sorted(layer.dtypes)))
        if layer.kind in ("SOFTMAX", "PLUGIN_V3"):
            self.count("sparse_attentions", layer)

    def check_product(self, layer: Layer, islands: frozenset[str]) -> None:
        """A product with an island's weight is float32."""
        bulk = bool(layer.dtypes & LOW)
        if bulk and (sensitive := self.weights_of(layer) & islands):
            low = ", ".join(sorted(layer.dtypes))
            self.refuse(f"{layer} with {', '.join(sorted(sensitive))} is not float32", got=low)
        self.count("products_bulk" if bulk else "products_fp32", layer)

    def weights_of(self, layer: Layer) -> set[str]:
        """Names of the constants, and of the network's inputs, that go into a layer."""
        names = set()
        for tensor in map(self.root, layer.inputs):
            maker = self.makers.get(tensor.name)
            if maker is None:
                names.add(str(tensor.name))
            elif maker.kind == "CONSTANT":
                names.add(str(maker.raw.name))
        return names

    def check_norm(self, layer: Layer) -> None:
        """Norms, means, roots, sines: float32 in and out."""
        if low := layer.dtypes & LOW:
            self.refuse(f"{layer} is not float32", got=", ".join(sorted(low)))
        if layer.kind == "NORMALIZATION":
            self.count("layer_norms", layer)
        elif layer.kind == "REDUCE":
            self.count("rms_norms", layer)

    def check_power(self, layer: Layer) -> None:
        """A square is the beginning of an RMS norm."""
        if self.operation(layer) == self.trt.ElementWiseOperation.POW and layer.dtypes & LOW:
            self.refuse(f"{layer} is not float32", got=", ".join(sorted(layer.dtypes)))

    def check_rounding(self, layer: Layer) -> None:
        """Only inputs, stored weights, norms, turned pairs, finished sums and 1 may be rounded."""
        if dtype_of(layer.inputs[0]) != "float32" or dtype_of(layer.outputs[0]) not in LOW:
            return
        source = self.origin(layer.inputs[0])
        if source is not None and source.kind == "CONSTANT" and self.is_one(source):
            return  # attention's scale, with which the parser multiplies whatever it is
        if source is not None and source.kind == "DEQUANTIZE":
            return  # a weight, not a value: see `check_dequantised`
        self.count("roundings", layer)
        if source is None or source.kind == "NORMALIZATION":
            return
        if source.kind == "CONCATENATION":  # a turned pair: of sums, not of tables
            parts = [self.origin(tensor) for tensor in source.inputs]
            fit = all(part is not None and part.kind == "ELEMENTWISE" for part in parts)
        elif source.kind == "ELEMENTWISE":
            makers = [self.origin(tensor) for tensor in source.inputs]
            kinds = {maker.kind for maker in makers if maker is not None}
            if self.operation(source) == self.trt.ElementWiseOperation.SUM:
                fit = not kinds & PRODUCTS  # a product and its bias is no finished sum
            else:
                fit = "UNARY" in kinds  # RMS norm: what is normed, times its reciprocal root
        else:
            fit = False
        if not fit:
            self.refuse(
                f"{layer} leaves float32 too early", got=f"{dtype_of(layer.outputs[0])} of {source}"
            )

    def check_dequantised(self, layer: Layer) -> None:
        """Int8 is how weights are stored: given, and multiplied out in float32."""
        integers, scale = layer.inputs[:2]
        maker = self.makers.get(integers.name)
        given = maker is None or maker.kind == "CONSTANT"
        types = dtype_of(integers), dtype_of(scale), dtype_of(layer.outputs[0])
        if not given or types != ("int8", "float32", "float32"):
            got = f"{' x '.join(types[:2])} -> {types[2]}"
            self.refuse(f"{layer} is not a stored weight multiplied out in float32", got=got)
        self.count("weights_int8", layer)

    def origin(self, tensor: TensorRT.ITensor) -> Layer | None:
        """The layer that computed a tensor, looking through what only moves; None for an input."""
        return self.makers.get(self.root(tensor).name)

    def root(self, tensor: TensorRT.ITensor) -> TensorRT.ITensor:
        """The tensor that was moved about until it became this one."""
        while (layer := self.makers.get(tensor.name)) is not None and layer.kind in MOVES:
            tensor = layer.inputs[0]
        return tensor

    def is_one(self, layer: Layer) -> bool:
        """Whether a constant is the one number 1."""
        weights = seen_as(self.trt.IConstantLayer, layer.raw).weights
        return weights.size == 1 and bool(weights.flat[0] == 1)

    def operation(self, layer: Layer) -> TensorRT.ElementWiseOperation:
        return seen_as(self.trt.IElementWiseLayer, layer.raw).op

    def count(self, kind: str, layer: Layer) -> None:
        self.found.setdefault(kind, []).append(layer)

    def wrong_count(self, kind: str, wanted: int) -> NoReturn:
        found = self.found.get(kind, [])
        shown = "; ".join(str(layer) for layer in found[:4])
        self.refuse(
            f"the network has another number of {kind.replace('_', ' ')}",
            got=f"{len(found)}" + (f", among them {shown}" if shown else ""),
            wanted=str(wanted),
        )

    def record(self, tensor: TensorRT.ITensor) -> TensorRecord:
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape):
            self.refuse(f"the tensor {tensor.name} has no static shape", got=list(shape))
        return TensorRecord(name=tensor.name, shape=shape, dtype=dtype_of(tensor))

    def refuse(
        self, what: str, *, got: object = None, wanted: object = None, do: str | None = None
    ) -> NoReturn:
        raise BuildError(
            f"{self.path.name} as {self.product} reads it: {what}", got=got, wanted=wanted, do=do
        )
