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

from lcexport.checkpoint import is_island
from lcexport.configs.dit import DiTConfig
from lcexport.dit.layers import Geometry, rope_axes, rope_grid, timestep_frequencies
from lcexport.dit.model import LongCatDiT
from lcexport.graph.passes import InputsToConstants, ParametersToInputs, clean_function

OPSET = 23  # the first with Attention; 26 and later are refused by TensorRT's parser
DOMAIN = "lcexport"


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


class EmbedPart(nn.Module):
    """Inputs of the DiT -> x, text, time, cos, sin (and the text mask where the model has one)."""

    def __init__(self, dit: LongCatDiT, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.dit = dit
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        table = self.get_buffer
        x, text, time = self.dit.embed(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask,
            table("frequencies"),
        )
        cos = rope_grid(*(table(f"cos_{i}") for i in range(3)))
        sin = rope_grid(*(table(f"sin_{i}") for i in range(3)))
        mask = self.dit.text_mask(encoder_attention_mask)
        # A mask handed through untouched would make one value both input and output.
        return (x, text, time, cos, sin) + (() if mask is None else (mask.clone(),))


def embed_tables(config: DiTConfig, geometry: Geometry) -> dict[str, Tensor]:
    """What depends on the shape alone: real tensors, made by torch rather than by each engine.

    RoPE's are kept per axis (`cos_0` is time's, [T, d_t/2]) and spread in the graph.
    """
    axes = rope_axes(geometry, config.head_dim)
    tables = {f"cos_{i}": axis.cos() for i, axis in enumerate(axes)}
    tables |= {f"sin_{i}": axis.sin() for i, axis in enumerate(axes)}
    return tables | {"frequencies": timestep_frequencies(config.frequency_embedding_size)}


class BlockPart(nn.Module):
    """One layer of the DiT; the text mask is an input only where the model has one."""

    def __init__(self, dit: LongCatDiT, geometry: Geometry) -> None:
        super().__init__()
        self.block = dit.blocks[0]
        self.geometry = geometry

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        time: Tensor,
        cos: Tensor,
        sin: Tensor,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        return self.block(x, text, time, cos, sin, text_mask, self.geometry)


class FinalPart(nn.Module):
    """The last tokens -> the velocity."""

    def __init__(self, dit: LongCatDiT, geometry: Geometry) -> None:
        super().__init__()
        self.final_layer = dit.final_layer
        self.geometry = geometry

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.final_layer(x, time, self.geometry)


def trace_parts(config: DiTConfig, spec: GraphSpec) -> tuple[Part, Part, Part]:
    """Trace embed, one block, and the final layer at the sizes of `spec`."""
    geometry = spec.geometry
    tables = embed_tables(config, geometry)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        dit = fake_dit(config, spec.bulk)
        inputs, tokens = fake_inputs(config, spec)
    last = {name: tokens[name] for name in ("x", "time")}
    embed_part = EmbedPart(embedders(dit), tables)
    embed = trace("Embed", embed_part, "dit.", inputs, tuple(tokens), mode, tables)
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
    between = {
        "x": torch.empty(batch * tokens, config.hidden_size, dtype=spec.bulk),
        "text": torch.empty(batch * length, config.hidden_size, dtype=spec.bulk),
        "time": torch.empty(batch * frames, config.adaln_tembed_dim),
        "cos": torch.empty(tokens, config.head_dim // 2),
        "sin": torch.empty(tokens, config.head_dim // 2),
    }
    if not config.text_tokens_zero_pad:
        between["text_mask"] = torch.empty(batch, length, dtype=torch.bool)
    return inputs, between


def fake_dit(config: DiTConfig, bulk: torch.dtype) -> LongCatDiT:
    """A DiT of one block whose parameters are fake: their shapes and dtypes, no storage."""
    with torch.device("meta"):
        dit = LongCatDiT(config.model_copy(update={"depth": 1}))
    parameters = {
        name: torch.empty(parameter.shape, dtype=torch.float32 if is_island(name) else bulk)
        for name, parameter in dit.named_parameters()
    }
    dit.load_state_dict(parameters, assign=True)
    return dit.requires_grad_(False).eval()


def embedders(dit: LongCatDiT) -> LongCatDiT:
    """The same model without its layers, so that Embed's trace lists only what it uses."""
    with torch.device("meta"):
        bare = LongCatDiT(dit.config)
    for name in ("patch_embed", "time_embedder", "caption_embedder"):
        setattr(bare, name, getattr(dit, name))
    bare.blocks = nn.ModuleList()
    del bare.final_layer
    return bare


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
