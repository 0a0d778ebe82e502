"""What a built engine consists of, as its inspector tells: which kernels, in which precision.

TensorRT decides while it builds what it fuses, so this is where fused attention is known:
after its compiler, where `network` knows what its parser took. (By NVIDIA's documentation TensorRT
for RTX makes its kernels on the device; what it calls them is not known.) The answer is JSON of two
forms, by NVIDIA's migration page: no engine of ours was inspected. TensorRT 10 lists the inputs and
outputs as `Bindings`, and says a tensor's layout and type in one field, `Format/Datatype`; TensorRT
11 has `I/O Tensors`, and `Format` and `Datatype` apart. Engines built without detailed verbosity
only list names.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcexport.configs.errors import BuildError, IncompatibleError

# In a fused kernel's name, by an NVIDIA maintainer (NVIDIA/TensorRT#3243) and a user's plan (#4397:
# `_gemm_mha_v2_0x...`); no engine of ours was inspected. A layer's name is never asked: a model's
# own names may say mha, and stand in the name of the product in front of it.
FUSED_ATTENTION = re.compile("mha", re.IGNORECASE)
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# The first that fits: "BFloat16" contains "float16", and that contains "float".
DTYPES = (
    ("bfloat16", re.compile("bfloat16|bf16", re.IGNORECASE)),
    ("float16", re.compile("half|float16|fp16", re.IGNORECASE)),
    ("float32", re.compile("float|fp32", re.IGNORECASE)),
)
LOW = frozenset({"bfloat16", "float16"})


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine.

    Attributes:
        kernel: the tactic that computes it; empty where the inspector tells none.
        nodes: the ONNX nodes it was made of, as `node | call (Function)`.
        dtypes: the floating types of its inputs and outputs, those that are told.
    """

    name: str
    kind: str
    kernel: str
    nodes: tuple[str, ...]
    dtypes: frozenset[str]

    @property
    def fused_attention(self) -> bool:
        return FUSED_ATTENTION.search(self.kernel) is not None


@dataclass(frozen=True)
class EngineLayers:
    """What the inspector says of one plan: its layers, inputs and outputs."""

    layers: tuple[EngineLayer, ...]
    ports: tuple[str, ...]

    @property
    def detailed(self) -> bool:
        """Whether more than names is told."""
        return any(layer.kind for layer in self.layers)

    @property
    def fused_attentions(self) -> tuple[EngineLayer, ...]:
        return tuple(layer for layer in self.layers if layer.fused_attention)


def read_layers(text: str) -> EngineLayers:
    """Parse the JSON of `get_engine_information`.

    Raises:
        IncompatibleError: it has neither version's form.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IncompatibleError("the engine's inspector gave no JSON", got=error) from error
    if not isinstance(data, dict) or not isinstance(data.get("Layers"), list):
        raise IncompatibleError(
            "the engine's inspector gave no list of layers",
            got=sorted(data) if isinstance(data, dict) else type(data).__name__,
            wanted="`Layers`, as TensorRT 10 and 11 have it",
        )
    ports = data.get("I/O Tensors", data.get("Bindings", []))
    return EngineLayers(
        layers=tuple(map(layer_from, data["Layers"])),
        ports=tuple(port if isinstance(port, str) else str(port.get("Name")) for port in ports),
    )


def layer_from(entry: str | Mapping[str, Any]) -> EngineLayer:
    """One entry of `Layers`: an object, or a name alone."""
    if isinstance(entry, str):
        return EngineLayer(entry, "", "", (), frozenset())
    name = str(entry.get("Name", ""))
    tensors = [*entry.get("Inputs", ()), *entry.get("Outputs", ())]
    found = {dtype_from(tensor) for tensor in tensors if isinstance(tensor, Mapping)}
    return EngineLayer(
        name=name,
        kind=str(entry.get("LayerType", "")),
        kernel=str(entry.get("TacticName") or ""),
        nodes=tuple(ONNX_NODE.findall(str(entry.get("Metadata", "")))),
        dtypes=frozenset(dtype for dtype in found if dtype is not None),
    )


def dtype_from(tensor: Mapping[str, Any]) -> str | None:
    """torch's name of a tensor's floating type; None for another type, or where it is not told."""
    # The newer form has "DataType" where its documentation shows an example, and says "Datatype".
    fields = {str(key).lower(): str(value) for key, value in tensor.items()}
    known = (fields[key] for key in ("datatype", "format/datatype", "format") if key in fields)
    told = next(known, "")
    return next((name for name, pattern in DTYPES if pattern.search(told)), None)


def islands_of(layers: Iterable[EngineLayer], nodes: Collection[str]) -> list[EngineLayer]:
    """The layers that were made of these ONNX nodes and no others, and whose types are told."""
    return [
        layer
        for layer in layers
        if layer.nodes and layer.dtypes and all(node in nodes for node in layer.nodes)
    ]


def rounded(layers: Iterable[EngineLayer]) -> list[EngineLayer]:
    """Those that take or give a type lower than float32."""
    return [layer for layer in layers if layer.dtypes & LOW]


def require_fused(texts: Sequence[str], attentions: Sequence[int]) -> None:
    """Refuse an engine whose plans have fewer fused attentions than attentions.

    A plan that tells no more than names is passed.

    Args:
        texts: the inspector's JSON of each plan (`TrtEngine.inspect`).
        attentions: how many each plan must have.

    Raises:
        BuildError: names the plans by their index, with both numbers.
    """
    found = [read_layers(text) for text in texts]
    wrong = [
        f"plan {index}: {len(got.fused_attentions)} of {wanted}"
        for index, (got, wanted) in enumerate(zip(found, attentions, strict=True))
        if got.detailed and len(got.fused_attentions) < wanted
    ]
    if wrong:
        raise BuildError(
            "attention is not fused as it must be",
            got="; ".join(wrong),
            wanted="one fused kernel for each attention",
            do="Unfused attention may keep every score in memory: try another version of TensorRT.",
        )
