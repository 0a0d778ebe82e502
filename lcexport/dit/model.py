"""LongCat-Video's diffusion transformer. Shape letters: see `lcexport.dit.layers`.

The module boundaries are the boundaries of the exported graphs: `embed`, one `Block`, and
`FinalLayer` are each traced once. Parameters carry FastVideo's native names.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import UsageError
from lcexport.dit.attention import KeyValue
from lcexport.dit.blocks import Block, FinalLayer
from lcexport.dit.layers import (
    CaptionEmbedder,
    Geometry,
    PatchEmbed,
    TimeEmbedder,
    rope_axes,
    rope_grid,
    timestep_frequencies,
)
from lcexport.dit.sparse import Sparsity


class LongCatDiT(nn.Module):
    """The whole transformer. Build it with `lcexport.dit.load_dit`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.in_channels, config.hidden_size)
        self.time_embedder = TimeEmbedder(config.frequency_embedding_size, config.adaln_tembed_dim)
        self.caption_embedder = CaptionEmbedder(config.caption_channels, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    @property
    def dtype(self) -> torch.dtype:
        """The bulk dtype."""
        return self.patch_embed.proj.weight.dtype

    @property
    def layers(self) -> list[Block]:
        """The blocks; a ModuleList does not say what it holds."""
        return cast("list[Block]", list(self.blocks))

    def embed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None,
        frequencies: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Everything before the first block: x [B*N, C], text [B*L, C], time [B*T, E] float32.

        hidden_states [B, 16, T, H, W], encoder_hidden_states [B, 1, L, C_text], timestep [B, T],
        encoder_attention_mask [B, L] (non-zero where a token counts) or None.
        """
        x, time = self.embed_frames(hidden_states, timestep, frequencies)
        features = encoder_hidden_states.to(self.dtype)
        text = self.caption_embedder(features.reshape(-1, features.shape[-1]))
        if encoder_attention_mask is not None and self.config.text_tokens_zero_pad:
            # Padding is zeroed, not dropped: its keys and values stay in the softmax.
            text = text * encoder_attention_mask.reshape(-1, 1).to(text.dtype)
        return x, text, time

    def embed_frames(
        self, hidden_states: Tensor, timestep: Tensor, frequencies: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The part of `embed` that is not the text: x [B*N, C] and time [B*T, E] float32."""
        x = self.patch_embed(hidden_states.to(self.dtype))
        # The original casts timesteps to the bulk dtype on entry: in bfloat16 998.3 becomes 1000.
        rounded = timestep.to(self.dtype).float()
        return x, self.time_embedder(rounded.reshape(-1), frequencies)

    def text_mask(self, encoder_attention_mask: Tensor | None) -> Tensor | None:
        """Keys cross-attention may see, bool [B, L]; None where padding is zeroed or unknown."""
        if encoder_attention_mask is None or self.config.text_tokens_zero_pad:
            return None
        return encoder_attention_mask.to(torch.bool)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        num_cond_latents: int = 0,
        cache: Sequence[KeyValue] | None = None,
        sparse: Sparsity | None = None,
    ) -> Tensor:
        """The velocity x0 - noise, float32 [B, 16, T, H, W].

        Args:
            hidden_states: latents [B, 16, T, H, W]; H and W even.
            encoder_hidden_states: UMT5 output [B, 1, L, C_text], padding included.
            timestep: [B], or [B, T] for one timestep per latent frame, on the 0..1000 scale.
            encoder_attention_mask: [B, L], non-zero where a token is not padding; None uses all.
            num_cond_latents: how many leading latent frames are clean conditioning.
            cache: what `cache` made of the clean frames before these; then none are among these.
                One sample's serves the whole batch.
            sparse: block-sparse self-attention instead of dense.

        Raises:
            UsageError: a shape the model cannot take.
        """
        geometry = self.geometry(hidden_states, timestep, num_cond_latents, cache)
        geometry = replace(geometry, sparse=sparse)
        self.check_text(encoder_hidden_states, encoder_attention_mask, geometry.batch)
        cos, sin, frequencies = self.tables(geometry, hidden_states.device)
        x, text, time = self.embed(
            hidden_states,
            encoder_hidden_states,
            per_frame(timestep, geometry),
            encoder_attention_mask,
            frequencies,
        )
        text_mask = self.text_mask(encoder_attention_mask)
        for i, block in enumerate(self.layers):
            past = None if cache is None else batched(cache[i], geometry.batch)
            x = block(x, text, time, cos, sin, text_mask, geometry, past)
        return self.final_layer(x, time, geometry)

    def cache(self, hidden_states: Tensor, timestep: Tensor | None = None) -> list[KeyValue]:
        """Keys and values of clean frames, layer by layer, for any number of later `forward`s.

        hidden_states: the clean latents [B, 16, T, H, W]; timestep [B] or [B, T], 0 where None.
        They attend among themselves, and to no text. Each tensor is [B, A, T*h*w, D] in the bulk
        dtype, the keys after their norm and before RoPE.
        """
        if timestep is None:
            timestep = torch.zeros(len(hidden_states), device=hidden_states.device)
        geometry = self.geometry(hidden_states, timestep, 0)
        cos, sin, frequencies = self.tables(geometry, hidden_states.device)
        x, time = self.embed_frames(hidden_states, per_frame(timestep, geometry), frequencies)
        made = []
        for block in self.layers[:-1]:
            x, k, v = block.caching(x, time, cos, sin, geometry)
            made.append((k, v))
        return [*made, self.layers[-1].last_caching(x, time, geometry)]

    def tables(self, geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin [M+N, D/2] of RoPE, and the timestep's frequencies."""
        axes = rope_axes(geometry, self.config.head_dim)
        cos = rope_grid(*(axis.cos().to(device) for axis in axes))
        sin = rope_grid(*(axis.sin().to(device) for axis in axes))
        return cos, sin, timestep_frequencies(self.config.frequency_embedding_size).to(device)

    def check_text(self, text: Tensor, mask: Tensor | None, batch: int) -> None:
        """UsageError unless text is [B, 1, L, C_text] and the mask [B, L]: both would broadcast."""
        channels = self.config.caption_channels
        if text.ndim != 4 or (text.shape[0], text.shape[1], text.shape[3]) != (batch, 1, channels):
            raise UsageError(
                "encoder_hidden_states has the wrong shape",
                got=list(text.shape),
                wanted=f"[{batch}, 1, L, {channels}]",
                do="The order is hidden_states, encoder_hidden_states, timestep.",
            )
        if mask is not None and tuple(mask.shape) != (batch, text.shape[2]):
            raise UsageError(
                "encoder_attention_mask has the wrong shape",
                got=list(mask.shape),
                wanted=[batch, text.shape[2]],
            )

    def geometry(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        num_cond_latents: int,
        cache: Sequence[KeyValue] | None = None,
    ) -> Geometry:
        """Sizes of this call, or UsageError where the model cannot take them."""
        if hidden_states.ndim != 5 or hidden_states.shape[1] != self.config.in_channels:
            raise UsageError(
                "hidden_states has the wrong shape",
                got=list(hidden_states.shape),
                wanted=f"[B, {self.config.in_channels}, T, H, W]",
            )
        batch, _, frames, height, width = hidden_states.shape
        if height % 2 or width % 2:
            raise UsageError(
                "the latent height and width must be even",
                got=f"{height} x {width}",
                do="Use pixel sizes that are multiples of 16.",
            )
        if tuple(timestep.shape) not in ((batch,), (batch, frames)):
            raise UsageError(
                "timestep has the wrong shape",
                got=list(timestep.shape),
                wanted=f"[{batch}] or [{batch}, {frames}]",
                do="The order is hidden_states, encoder_hidden_states, timestep.",
            )
        if not 0 <= num_cond_latents < frames:
            raise UsageError(
                "num_cond_latents out of range", got=num_cond_latents, wanted=f"0..{frames - 1}"
            )
        geometry = Geometry(batch, frames, height // 2, width // 2, num_cond_latents)
        if cache is None:
            return geometry
        if num_cond_latents:
            raise UsageError("conditioning latents are in the cache or in front, not in both")
        return replace(geometry, cached_latents=self.cached_latents(cache, geometry))

    def cached_latents(self, cache: Sequence[KeyValue], geometry: Geometry) -> int:
        """Frames in the cache; UsageError where it is another model's or another grid's."""
        heads, dim = self.config.num_heads, self.config.head_dim
        shapes = {tuple(tensor.shape) for layer in cache for tensor in layer}
        batch, *rest = next(iter(shapes), (0,))
        tokens = rest[1] if len(rest) == 3 else 0
        fits = len(shapes) == 1 and len(cache) == self.config.depth and tokens
        wanted = [heads, tokens - tokens % geometry.frame_tokens, dim]
        if not fits or rest != wanted or batch not in (1, geometry.batch):
            raise UsageError(
                "the key/value cache is of another model or resolution",
                got=f"{len(cache)} layers of {sorted(shapes)}",
                wanted=f"{self.config.depth} layers of [1 or {geometry.batch}, {heads}, a multiple "
                f"of {geometry.frame_tokens}, {dim}]",
            )
        return tokens // geometry.frame_tokens


def per_frame(timestep: Tensor, geometry: Geometry) -> Tensor:
    """[B, T] of a timestep [B] or [B, T]."""
    return timestep[:, None].expand(-1, geometry.frames) if timestep.ndim == 1 else timestep


def batched(cache: KeyValue, batch: int) -> KeyValue:
    """One sample's keys and values for every sample of a batch."""
    k, v = cache
    return k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
