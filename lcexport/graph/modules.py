"""What is traced: the DiT's parts as modules of their own, on fake parameters.

A part has the parameters it uses and no others, so that its trace lists exactly those.
"""

from copy import copy

import torch
from torch import Tensor, nn

from lcexport.checkpoint import is_island
from lcexport.configs.dit import DiTConfig
from lcexport.dit.blocks import Block
from lcexport.dit.layers import Geometry, rope_axes, rope_grid, timestep_frequencies
from lcexport.dit.model import LongCatDiT

EMBEDDERS = ("patch_embed", "time_embedder", "caption_embedder")


class Embedding(nn.Module):
    """The model's embedders, and `embed_tables` as buffers."""

    def __init__(self, dit: LongCatDiT, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.dit = dit
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def turns(self) -> tuple[Tensor, Tensor]:
        """RoPE's cos and sin, spread over the grid."""
        cos = rope_grid(*(self.get_buffer(f"cos_{i}") for i in range(3)))
        sin = rope_grid(*(self.get_buffer(f"sin_{i}") for i in range(3)))
        return cos, sin


class EmbedPart(Embedding):
    """Inputs of the DiT -> x, text, time, cos, sin (and the text mask where the model has one)."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        x, text, time = self.dit.embed(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask,
            self.get_buffer("frequencies"),
        )
        cos, sin = self.turns()
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
    """One layer of the DiT. `rest`: the text mask where the model has one, then cached keys and
    values where the geometry has them.
    """

    def __init__(self, dit: LongCatDiT, geometry: Geometry) -> None:
        super().__init__()
        self.block = dit.layers[0]
        self.geometry = geometry

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        time: Tensor,
        cos: Tensor,
        sin: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        *masks, key, value = rest if self.geometry.cached_latents else (*rest, None, None)
        mask = masks[0] if masks else None
        cache = None if key is None or value is None else (key, value)
        return self.block(x, text, time, cos, sin, mask, self.geometry, cache)


class CacheEmbedPart(Embedding):
    """Clean latents and their timesteps -> x, time, cos, sin."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        x, time = self.dit.embed_frames(hidden_states, timestep, self.get_buffer("frequencies"))
        return x, time, *self.turns()


class CacheBlockPart(nn.Module):
    """One layer over clean tokens -> their next x, their keys and their values."""

    def __init__(self, dit: LongCatDiT, geometry: Geometry) -> None:
        super().__init__()
        self.block = without_cross_attention(dit.layers[0])
        self.geometry = geometry

    def forward(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return self.block.caching(x, time, cos, sin, self.geometry)


class CacheLastPart(nn.Module):
    """The last layer's keys and values."""

    def __init__(self, dit: LongCatDiT, geometry: Geometry) -> None:
        super().__init__()
        self.block = keys_values_alone(dit.layers[0])
        self.geometry = geometry

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, ...]:
        return self.block.last_caching(x, time, self.geometry)


class FinalPart(nn.Module):
    """The last tokens -> the velocity."""

    def __init__(self, dit: LongCatDiT, geometry: Geometry) -> None:
        super().__init__()
        self.final_layer = dit.final_layer
        self.geometry = geometry

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.final_layer(x, time, self.geometry)


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


def embedders(dit: LongCatDiT, names: tuple[str, ...] = EMBEDDERS) -> LongCatDiT:
    """The same model without its layers, so that Embed's trace lists only what it uses."""
    with torch.device("meta"):
        bare = LongCatDiT(dit.config)
    for name in EMBEDDERS:
        if name in names:
            setattr(bare, name, getattr(dit, name))
        else:
            delattr(bare, name)
    bare.blocks = nn.ModuleList()
    del bare.final_layer
    return bare


def without_cross_attention(block: Block) -> Block:
    """The same layer without what clean tokens skip."""
    bare = copy(block)
    bare._modules = dict(block._modules)
    del bare.norm_cross, bare.cross_attn
    return bare


def keys_values_alone(block: Block) -> Block:
    """The same layer with nothing but what its keys and values need."""
    bare = without_cross_attention(block)
    attention = copy(block.self_attn)
    attention._modules = dict(block.self_attn._modules)
    del bare.ffn, attention.to_q, attention.to_out, attention.q_norm
    bare.self_attn = attention
    return bare
