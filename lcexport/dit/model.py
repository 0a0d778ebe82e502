"""LongCat-Video's diffusion transformer. Shape letters: see `lcexport.dit.layers`.

The module boundaries below are the boundaries of the exported graph: `embed`, one `Block`, and
`FinalLayer` are each traced once. Parameters carry FastVideo's native names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import UsageError
from lcexport.dit.layers import (
    AffineNorm,
    CaptionEmbedder,
    FeedForward,
    Geometry,
    HeadNorm,
    PatchEmbed,
    TimeEmbedder,
    gated_add,
    modulate,
    rope_axes,
    rope_grid,
    rotate,
    timestep_frequencies,
)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T) v: each [B, A, tokens, D]; q is scaled already."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


class Attention(nn.Module):
    """Projections and head norms shared by self- and cross-attention."""

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(size, size)
        self.to_k = nn.Linear(size, size)
        self.to_v = nn.Linear(size, size)
        self.to_out = nn.Linear(size, size)
        self.q_norm = HeadNorm(head_dim, squared_divisor=head_dim)
        self.k_norm = HeadNorm(head_dim)

    def heads(self, x: Tensor, batch: int) -> Tensor:
        """[B*N, C] -> [B, N, A, D]."""
        return x.reshape(batch, x.shape[0] // batch, -1, self.head_dim)

    def merge(self, x_BAND: Tensor) -> Tensor:
        """[B, A, N, D] -> [B*N, C]."""
        batch, heads, tokens, dim = x_BAND.shape
        return x_BAND.transpose(1, 2).reshape(batch * tokens, heads * dim)

    def project(self, x: Tensor, source: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, keys and values of `source`: each [B, A, tokens, D], q and k normed.

        The queries carry attention's 1/sqrt(D) already.
        """
        q = self.q_norm(self.heads(self.to_q(x), batch)).transpose(1, 2)
        k = self.k_norm(self.heads(self.to_k(source), batch)).transpose(1, 2)
        v = self.heads(self.to_v(source), batch).transpose(1, 2)
        return q, k, v


class SelfAttention(Attention):
    """Attention among all tokens; conditioning tokens see only each other."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, geometry: Geometry) -> Tensor:
        q, k, v = self.project(x, x, geometry.batch)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        n0 = geometry.cond_tokens
        if n0 == 0:
            out = attend(q, k, v)
        else:
            cond = attend(q[:, :, :n0], k[:, :, :n0], v[:, :, :n0])
            noise = attend(q[:, :, n0:], k, v)
            out = torch.cat([cond, noise], dim=2)
        return self.to_out(self.merge(out))


class CrossAttention(Attention):
    """Attention of the noise tokens to the text; conditioning tokens get exactly zero."""

    def forward(
        self, x: Tensor, text: Tensor, text_mask: Tensor | None, geometry: Geometry
    ) -> Tensor:
        batch, n0, size = geometry.batch, geometry.cond_tokens, x.shape[-1]
        noise = x.reshape(batch, geometry.tokens, size)[:, n0:].reshape(-1, size) if n0 else x
        q, k, v = self.project(noise, text, batch)
        keys = None
        if text_mask is not None:
            # Spread over the queries: ONNX Runtime's Attention does not broadcast there.
            keys = text_mask[:, None, None, :].expand(batch, 1, q.shape[2], -1)
        out = self.to_out(self.merge(attend(q, k, v, keys)))
        if n0 == 0:
            return out
        # Zero, not the projection of zero: the bias is not added either.
        zeros = torch.zeros(batch, n0, size, dtype=out.dtype, device=out.device)
        return torch.cat([zeros, out.reshape(batch, -1, size)], dim=1).reshape(x.shape)


class Block(nn.Module):
    """One of the 48 layers: modulated self-attention, cross-attention, modulated SwiGLU."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.adaln_linear_1 = nn.Linear(config.adaln_tembed_dim, 6 * size)
        self.self_attn = SelfAttention(size, config.head_dim)
        self.norm_cross = AffineNorm(size)
        self.cross_attn = CrossAttention(size, config.head_dim)
        self.ffn = FeedForward(size, config.ffn_hidden)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        time: Tensor,
        cos: Tensor,
        sin: Tensor,
        text_mask: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        """x [B*N, C], text [B*L, C], time [B*T, E] float32, cos and sin [N, D/2] -> [B*N, C]."""
        modulation = self.adaln_linear_1(F.silu(time)).split([x.shape[-1]] * 6, dim=-1)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation
        attended = self.self_attn(modulate(x, shift_a, scale_a, geometry), cos, sin, geometry)
        x = gated_add(x, gate_a, attended, geometry)
        x = x + self.cross_attn(self.norm_cross(x), text, text_mask, geometry)
        fed = self.ffn(modulate(x, shift_f, scale_f, geometry))
        return gated_add(x, gate_f, fed, geometry)


class FinalLayer(nn.Module):
    """Modulated projection to patches, and patches back to the latent grid; float32 out."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.channels = config.out_channels
        self.adaln_linear = nn.Linear(config.adaln_tembed_dim, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.out_channels * 4)

    def forward(self, x: Tensor, time: Tensor, geometry: Geometry) -> Tensor:
        """x [B*N, C], time [B*T, E] -> [B, 16, T, H, W] float32."""
        shift, scale = self.adaln_linear(F.silu(time)).split([x.shape[-1]] * 2, dim=-1)
        # The modulated tokens pass through the bulk dtype before the FP32 product.
        patches = self.proj(modulate(x, shift, scale, geometry).float())
        g = geometry
        # Channels are fastest here, slowest in PatchEmbed.
        grid = patches.reshape(g.batch, g.frames, g.rows, g.columns, 2, 2, self.channels)
        video = grid.permute(0, 6, 1, 2, 4, 3, 5)
        return video.reshape(g.batch, self.channels, g.frames, 2 * g.rows, 2 * g.columns)


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
        x = self.patch_embed(hidden_states.to(self.dtype))
        # The original casts timesteps to the bulk dtype on entry: in bfloat16 998.3 becomes 1000.
        rounded = timestep.to(self.dtype).float()
        time = self.time_embedder(rounded.reshape(-1), frequencies)
        features = encoder_hidden_states.to(self.dtype)
        text = self.caption_embedder(features.reshape(-1, features.shape[-1]))
        if encoder_attention_mask is not None and self.config.text_tokens_zero_pad:
            # Padding is zeroed, not dropped: its keys and values stay in the softmax.
            text = text * encoder_attention_mask.reshape(-1, 1).to(text.dtype)
        return x, text, time

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
    ) -> Tensor:
        """The velocity x0 - noise, float32 [B, 16, T, H, W].

        Args:
            hidden_states: latents [B, 16, T, H, W]; H and W even.
            encoder_hidden_states: UMT5 output [B, 1, L, C_text], padding included.
            timestep: [B], or [B, T] for one timestep per latent frame, on the 0..1000 scale.
            encoder_attention_mask: [B, L], non-zero where a token is not padding; None uses all.
            num_cond_latents: how many leading latent frames are clean conditioning.

        Raises:
            UsageError: a shape the model cannot take.
        """
        geometry = self.geometry(hidden_states, timestep, num_cond_latents)
        self.check_text(encoder_hidden_states, encoder_attention_mask, geometry.batch)
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1).expand(-1, geometry.frames)
        device = hidden_states.device
        frequencies = timestep_frequencies(self.config.frequency_embedding_size).to(device)
        axes = rope_axes(geometry, self.config.head_dim)
        cos = rope_grid(*(axis.cos().to(device) for axis in axes))
        sin = rope_grid(*(axis.sin().to(device) for axis in axes))
        x, text, time = self.embed(
            hidden_states, encoder_hidden_states, timestep, encoder_attention_mask, frequencies
        )
        text_mask = self.text_mask(encoder_attention_mask)
        for block in self.blocks:
            x = block(x, text, time, cos, sin, text_mask, geometry)
        return self.final_layer(x, time, geometry)

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

    def geometry(self, hidden_states: Tensor, timestep: Tensor, num_cond_latents: int) -> Geometry:
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
        return Geometry(batch, frames, height // 2, width // 2, num_cond_latents)
