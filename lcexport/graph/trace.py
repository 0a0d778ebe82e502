"""The DiT traced as three parts, each once, on fake tensors: no weight is read, nothing computed.

Each part becomes an ONNX function whose inputs are its activations followed by its parameters, so
that one `Block` serves every layer and no optimiser can ever fold a weight.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lcexport.configs.dit import DiTConfig
from lcexport.dit.layers import Geometry
from lcexport.graph.modules import (
    BlockPart,
    CacheBlockPart,
    CacheEmbedPart,
    CacheLastPart,
    EmbedPart,
    FinalPart,
    embed_tables,
    embedders,
    fake_dit,
)
from lcexport.graph.passes import InputsToConstants, ParametersToInputs, clean_function
from lcexport.graph.sparse import translation_table

OPSET = 23  # the first with Attention; 26 and later are refused by TensorRT's parser
DOMAIN = "lcexport"
CACHED = ("cached_key", "cached_value")


@dataclass(frozen=True)
class GraphSpec:
    """Everything a graph depends on besides the model: its static sizes and its bulk dtype."""

    geometry: Geometry
    text_tokens: int
    bulk: torch.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(B, T, H, W) in latents."""
        g = self.geometry
        return (g.batch, g.frames, 2 * g.rows, 2 * g.columns)


@dataclass(frozen=True)
class Part:
    """One traced function. A Block's or Final's `parameters` are relative to that module."""

    function: ir.Function
    activations: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[ir.Value, ...]


def trace_cache_parts(config: DiTConfig, spec: GraphSpec) -> tuple[Part, Part, Part]:
    """Trace the graph that makes a cache: embed, one block, and the last block."""
    geometry = spec.geometry
    tables = embed_tables(config, geometry)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        dit = fake_dit(config, spec.bulk)
        inputs, tokens = fake_inputs(config, spec)
    inputs = {name: inputs[name] for name in ("hidden_states", "timestep")}
    tokens = {name: tokens[name] for name in ("x", "time", "cos", "sin")}
    last = {name: tokens[name] for name in ("x", "time")}
    embed_part = CacheEmbedPart(embedders(dit, ("patch_embed", "time_embedder")), tables)
    embed = trace("CacheEmbed", embed_part, "dit.", inputs, tuple(tokens), mode, tables)
    outputs = ("x_next", "key", "value")
    block = trace("CacheBlock", CacheBlockPart(dit, geometry), "block.", tokens, outputs, mode)
    last_part = CacheLastPart(dit, geometry)
    return embed, block, trace("CacheLast", last_part, "block.", last, outputs[1:], mode)


def trace_parts(config: DiTConfig, spec: GraphSpec) -> tuple[Part, Part, Part]:
    """Trace embed, one block, and the final layer at the sizes of `spec`."""
    geometry = spec.geometry
    tables = embed_tables(config, geometry)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        dit = fake_dit(config, spec.bulk)
        inputs, tokens = fake_inputs(config, spec)
    last = {name: tokens[name] for name in ("x", "time")}
    made = tuple(name for name in tokens if name not in CACHED)
    embed = trace("Embed", EmbedPart(embedders(dit), tables), "dit.", inputs, made, mode, tables)
    block = trace("Block", BlockPart(dit, geometry), "block.", tokens, ("x_next",), mode)
    final_part = FinalPart(dit, geometry)
    final = trace("Final", final_part, "final_layer.", last, ("velocity",), mode)
    return embed, block, final


def fake_inputs(config: DiTConfig, spec: GraphSpec) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of Embed and inputs of Block, by name; to be called under a fake tensor mode."""
    batch, frames, height, width = spec.latent_shape
    tokens, length = spec.geometry.tokens, spec.text_tokens
    inputs = {
        "hidden_states": torch.empty(batch, config.in_channels, frames, height, width),
        "encoder_hidden_states": torch.empty(batch, 1, length, config.caption_channels),
        "timestep": torch.empty(batch, frames),
        "encoder_attention_mask": torch.empty(batch, length, dtype=torch.bool),
    }
    heads, dim = config.num_heads, config.head_dim
    past = spec.geometry.cached_tokens
    between = {
        "x": torch.empty(batch * tokens, config.hidden_size, dtype=spec.bulk),
        "text": torch.empty(batch * length, config.hidden_size, dtype=spec.bulk),
        "time": torch.empty(batch * frames, config.adaln_tembed_dim),
        "cos": torch.empty(past + tokens, dim // 2),
        "sin": torch.empty(past + tokens, dim // 2),
    }
    if not config.text_tokens_zero_pad:
        between["text_mask"] = torch.empty(batch, length, dtype=torch.bool)
    if past:
        for name in CACHED:
            between[name] = torch.empty(batch, heads, past, dim, dtype=spec.bulk)
    return inputs, between


def trace(
    name: str,
    module: nn.Module,
    prefix: str,
    inputs: dict[str, Tensor],
    outputs: tuple[str, ...],
    mode: FakeTensorMode,
    tables: dict[str, Tensor] | None = None,
) -> Part:
    """torch.export, ONNX, and the clean-up passes for one part.

    Args:
        prefix: what the part's module path puts in front of a function's parameter names.
        tables: the part's buffers; the optimiser must not fold them any more than weights,
            because the RoPE tables of a whole grid are a hundred times those of its axes.
    """
    tables = tables or {}
    with mode, quiet_exporter():
        exported = torch.export.export(module, tuple(inputs.values()), strict=False)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table=translation_table(),
        )
    assert program is not None, "torch.onnx.export returns a program when given no file"
    model = program.model
    parameters = [parameter for parameter, _ in module.named_parameters()]
    ParametersToInputs([*parameters, *tables])(model)
    onnxscript.optimizer.optimize_ir(model)
    InputsToConstants(tables)(model)
    for value in model.graph.inputs:
        value.name = str(value.name).removeprefix(prefix)
    clean_function(model)
    return Part(
        function=ir.Function(DOMAIN, name, graph=model.graph, attributes=[]),
        activations=tuple(inputs),
        parameters=tuple(parameter.removeprefix(prefix) for parameter in parameters),
        outputs=tuple(model.graph.outputs),
    )


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep torch's own deprecations and its notes about torchvision from a user's terminal."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        registration.setLevel(level)
