"""One layer of the DiT, and the last one. Shape letters: see `lcexport.dit.layers`."""

import torch.nn.functional as F
from torch import Tensor, nn

from lcexport.configs.dit import DiTConfig
from lcexport.dit.attention import CrossAttention, KeyValue, SelfAttention
from lcexport.dit.layers import AffineNorm, FeedForward, Geometry, gated_add, modulate


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
        cache: KeyValue | None = None,
    ) -> Tensor:
        """The next layer's x [B*N, C].

        x [B*N, C], text [B*L, C], time [B*T, E] float32, cos and sin [M+N, D/2]; cache [B, A, M, D]
        twice, the keys and values of M tokens before these.
        """
        shift_a, scale_a, gate_a, *feed_forward = self.modulation(time, x.shape[-1])
        normed = modulate(x, shift_a, scale_a, geometry)
        attended = self.self_attn(normed, cos, sin, geometry, cache)
        x = gated_add(x, gate_a, attended, geometry)
        x = x + self.cross_attn(self.norm_cross(x), text, text_mask, geometry)
        return self.feed_forward(x, feed_forward, geometry)

    def caching(
        self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` for clean frames alone: no text. Also their keys and values [B, A, N, D]."""
        shift_a, scale_a, gate_a, *feed_forward = self.modulation(time, x.shape[-1])
        normed = modulate(x, shift_a, scale_a, geometry)
        attended, k, v = self.self_attn.caching(normed, cos, sin, geometry)
        x = gated_add(x, gate_a, attended, geometry)
        return self.feed_forward(x, feed_forward, geometry), k, v

    def last_caching(self, x: Tensor, time: Tensor, geometry: Geometry) -> KeyValue:
        """`caching` for the last layer, whose x nobody needs."""
        size = x.shape[-1]
        modulation = self.adaln_linear_1(F.silu(time))
        shift_a, scale_a = modulation[:, : 2 * size].split([size] * 2, dim=-1)
        return self.self_attn.keys_values(modulate(x, shift_a, scale_a, geometry), geometry)

    def modulation(self, time: Tensor, size: int) -> list[Tensor]:
        """shift, scale and gate for attention, then for the feed-forward: each [B*T, C] float32."""
        return list(self.adaln_linear_1(F.silu(time)).split([size] * 6, dim=-1))

    def feed_forward(self, x: Tensor, modulation: list[Tensor], geometry: Geometry) -> Tensor:
        shift_f, scale_f, gate_f = modulation
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
