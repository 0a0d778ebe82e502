"""The DiT traced as three parts, each once, on fake tensors: no weight is read, nothing computed.

Each part becomes an ONNX function whose inputs are its activations followed by its parameters, so
that one `Block` serves every layer and no optimiser can ever fold a weight.
"""

from dataclasses import dataclass, field
from typing import Self

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lcexport.configs.dit import DiTConfig
from lcexport.configs.tasks import Job
from lcexport.dit.layers import Geometry
from lcexport.dit.sparse import job_sparsity
from lcexport.engines.manifest import Precision
from lcexport.graph.exporter import known_operators, quiet_exporter
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

OPSET = 23  # the first with Attention; NVIDIA documents up to 25
DOMAIN = "lcexport"
BULK: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHED = ("cached_key", "cached_value")


@dataclass(frozen=True)
class GraphSpec:
    """Everything a graph depends on besides the model: its static sizes and its bulk dtype."""

    geometry: Geometry
    text_tokens: int
    bulk: torch.dtype

    @classmethod
    def from_job(cls, config: DiTConfig, job: Job, batch: int, precision: Precision) -> Self:
        """What a job's graph depends on."""
        _, frames, height, width = job.latent_shape
        clean, cached = job.num_cond_latents, job.cached_latents
        sparse = job_sparsity(config, job)
        geometry = Geometry(batch, frames, height // 2, width // 2, clean, cached, sparse)
        return cls(geometry, job.text_tokens, BULK[precision])

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


@dataclass(frozen=True)
class Untraced:
    """A part's module on fake parameters, its fake inputs, and what its trace is to be called.

    Attributes:
        prefix: what the module's path puts in front of a function's parameter names.
        tables: the part's buffers, which are real.
    """

    name: str
    module: nn.Module
    prefix: str
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    tables: dict[str, Tensor] = field(default_factory=dict)


Three = tuple[Untraced, Untraced, Untraced]


def untraced_cache_parts(
    config: DiTConfig, spec: GraphSpec, mode: FakeTensorMode, device: str = "cpu"
) -> Three:
    """The graph that makes a cache: embed, one block, and the last block."""
    geometry = spec.geometry
    tables = {name: table.to(device) for name, table in embed_tables(config, geometry).items()}
    with mode, torch.device(device):
        dit = fake_dit(config, spec.bulk)
        inputs, tokens = fake_inputs(config, spec)
    inputs = {name: inputs[name] for name in ("hidden_states", "timestep")}
    tokens = {name: tokens[name] for name in ("x", "time", "cos", "sin")}
    last = {name: tokens[name] for name in ("x", "time")}
    embed = CacheEmbedPart(embedders(dit, ("patch_embed", "time_embedder")), tables)
    outputs = ("x_next", "key", "value")
    block, last_block = CacheBlockPart(dit, geometry), CacheLastPart(dit, geometry)
    return (
        Untraced("CacheEmbed", embed, "dit.", inputs, tuple(tokens), tables),
        Untraced("CacheBlock", block, "block.", tokens, outputs),
        Untraced("CacheLast", last_block, "block.", last, outputs[1:]),
    )


def untraced_parts(
    config: DiTConfig, spec: GraphSpec, mode: FakeTensorMode, device: str = "cpu"
) -> Three:
    """Embed, one block, and the final layer at the sizes of `spec`."""
    geometry = spec.geometry
    tables = {name: table.to(device) for name, table in embed_tables(config, geometry).items()}
    with mode, torch.device(device):
        dit = fake_dit(config, spec.bulk)
        inputs, tokens = fake_inputs(config, spec)
    last = {name: tokens[name] for name in ("x", "time")}
    made = tuple(name for name in tokens if name not in CACHED)
    embed, block = EmbedPart(embedders(dit), tables), BlockPart(dit, geometry)
    return (
        Untraced("Embed", embed, "dit.", inputs, made, tables),
        Untraced("Block", block, "block.", tokens, ("x_next",)),
        Untraced("Final", FinalPart(dit, geometry), "final_layer.", last, ("velocity",)),
    )


def trace_cache_parts(config: DiTConfig, spec: GraphSpec) -> tuple[Part, Part, Part]:
    """Trace the graph that makes a cache."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    embed, block, last = untraced_cache_parts(config, spec, mode)
    return trace(embed, mode), trace(block, mode), trace(last, mode)


def trace_parts(config: DiTConfig, spec: GraphSpec) -> tuple[Part, Part, Part]:
    """Trace embed, one block, and the final layer at the sizes of `spec`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    embed, block, final = untraced_parts(config, spec, mode)
    return trace(embed, mode), trace(block, mode), trace(final, mode)


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


def trace(part: Untraced, mode: FakeTensorMode) -> Part:
    """torch.export, ONNX, and the clean-up passes for one part.

    The optimiser must not fold the tables any more than the weights, because the RoPE tables of a
    whole grid are a hundred times those of its axes.
    """
    module, tables = part.module, part.tables
    with mode, quiet_exporter(), known_operators():
        exported = torch.export.export(module, tuple(part.inputs.values()), strict=False)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            custom_translation_table=translation_table(),
        )
    assert program is not None, "torch.onnx.export returns a program when given no file"
    model = program.model
    parameters = [parameter for parameter, _ in module.named_parameters()]
    ParametersToInputs([*parameters, *tables])(model)
    onnxscript.optimizer.optimize_ir(model)
    InputsToConstants(tables)(model)
    for value in model.graph.inputs:
        value.name = str(value.name).removeprefix(part.prefix)
    clean_function(model)
    return Part(
        function=ir.Function(DOMAIN, part.name, graph=model.graph, attributes=[]),
        activations=tuple(part.inputs),
        parameters=tuple(parameter.removeprefix(part.prefix) for parameter in parameters),
        outputs=tuple(model.graph.outputs),
    )
