"""Self- and cross-attention. Shape letters: see `lcexport.dit.layers`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcexport.dit.layers import Geometry, HeadNorm, rotate
from lcexport.dit.sparse import block_sparse_attention

KeyValue = tuple[Tensor, Tensor]  # one layer's keys and values, each [B, A, tokens, D]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T) v: each [B, A, tokens, D]; q is scaled already."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def attend_frames(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """Self-attention of whole frames to whole frames, block-sparse where the geometry says so."""
    if geometry.sparse is None or geometry.frames == 1:
        return attend(q, k, v)
    frames_q, frames_k = (x.shape[2] // geometry.frame_tokens for x in (q, k))
    grid_q = (frames_q, geometry.rows, geometry.columns)
    grid_k = (frames_k, geometry.rows, geometry.columns)
    return block_sparse_attention(q, k, v, grid_q, grid_k, geometry.sparse)


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

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        geometry: Geometry,
        cache: KeyValue | None = None,
    ) -> Tensor:
        """x [B*N, C], cos and sin [M+N, D/2] -> [B*N, C].

        cache: keys and values [B, A, M, D] of the frames before these. Keys are cached after their
        norm and before RoPE, so that their positions are those of the grid they are used in.
        """
        q, k, v = self.project(x, x, geometry.batch)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        return self.attended(q, k, v, cos, sin, geometry)

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, geometry: Geometry
    ) -> Tensor:
        """RoPE, attention and the output projection of q [B, A, N, D], k and v [B, A, M+N, D]."""
        past = geometry.cached_tokens
        q = rotate(q, cos[past:], sin[past:]) if past else rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        n0 = geometry.cond_tokens
        if n0 == 0:
            out = attend_frames(q, k, v, geometry)
        else:
            cond = attend_frames(q[:, :, :n0], k[:, :, :n0], v[:, :, :n0], geometry)
            noise = attend_frames(q[:, :, n0:], k, v, geometry)
            out = torch.cat([cond, noise], dim=2)
        return self.to_out(self.merge(out))

    def caching(
        self, x: Tensor, cos: Tensor, sin: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward`, and the tokens' own keys and values."""
        q, k, v = self.project(x, x, geometry.batch)
        return self.attended(q, k, v, cos, sin, geometry), k, v

    def keys_values(self, x: Tensor, geometry: Geometry) -> KeyValue:
        """What `forward` would cache, without attention."""
        k = self.k_norm(self.heads(self.to_k(x), geometry.batch)).transpose(1, 2)
        v = self.heads(self.to_v(x), geometry.batch).transpose(1, 2)
        return k, v


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
