"""The DiT's arithmetic, one idea per function or module. Written for export: static shapes only.

Shape letters, here and in every module of this package:

    B batch   T, H, W latent grid   h = H/2, w = W/2   N = T*h*w tokens   n0 conditioning tokens
    C hidden size   A attention heads   D head dimension   L text tokens   E time embedding size
    M cached conditioning tokens, of which attention sees keys and values

Tokens are kept flat, [B*N, C]: a Linear on a matrix becomes one `Gemm` that reads the weight as it
is stored, where a Linear on [B, N, C] would become a transposed copy of the weight.

Precision: "bulk" is the dtype of the large matrix products and of attention (float32 or bfloat16);
everything marked FP32 below is computed in float32 whatever the bulk dtype.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcexport.dit.sparse import Sparsity

NORM_EPS = 1e-6
ROPE_BASE = 10000.0
TIMESTEP_PERIOD = 10000.0


@dataclass(frozen=True)
class Geometry:
    """The static sizes of one forward pass, in latents and tokens."""

    batch: int
    frames: int  # T
    rows: int  # h
    columns: int  # w
    num_cond_latents: int = 0  # leading clean frames among these
    cached_latents: int = 0  # clean frames before these, of which only keys and values are given
    sparse: Sparsity | None = None  # block-sparse self-attention, where there are several frames

    @property
    def frame_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """N, tokens of one sample."""
        return self.frames * self.frame_tokens

    @property
    def cond_tokens(self) -> int:
        """n0: the clean frames come first, so they are the first tokens."""
        return self.num_cond_latents * self.frame_tokens

    @property
    def cached_tokens(self) -> int:
        """M, tokens of one sample that are keys and values only."""
        return self.cached_latents * self.frame_tokens


def timestep_frequencies(size: int) -> Tensor:
    """exp(-ln(10000) * i / (size/2)) for i < size/2, float32 [size/2]."""
    half = size // 2
    return torch.exp(-math.log(TIMESTEP_PERIOD) * torch.arange(half, dtype=torch.float32) / half)


def rope_axes(geometry: Geometry, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angles of the three axes: float32 [T, d_t/2], [h, d_h/2], [w, d_w/2].

    d_h = d_w = 2 * floor(D/6), d_t is the rest; angle = index * base^(-2j/d), per axis. Cached
    frames come first and count: T includes them here.
    """
    d_side = 2 * (head_dim // 6)
    sizes = (head_dim - 2 * d_side, d_side, d_side)
    lengths = (geometry.cached_latents + geometry.frames, geometry.rows, geometry.columns)
    axes = []
    for size, length in zip(sizes, lengths, strict=True):
        frequencies = 1.0 / ROPE_BASE ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        axes.append(torch.outer(torch.arange(length, dtype=torch.float32), frequencies))
    return axes[0], axes[1], axes[2]


def rope_grid(t_TK: Tensor, h_hK: Tensor, w_wK: Tensor) -> Tensor:
    """Spread three per-axis tables over the grid: [N, D/2], dimensions in the order t, h, w.

    The table of a whole grid is large (19 MB at 480p, 86 MB refined); those of its axes are not.
    """
    grid = (t_TK.shape[0], h_hK.shape[0], w_wK.shape[0])
    spread = torch.cat(
        [
            t_TK[:, None, None, :].expand(*grid, -1),
            h_hK[None, :, None, :].expand(*grid, -1),
            w_wK[None, None, :, :].expand(*grid, -1),
        ],
        dim=-1,
    )
    return spread.reshape(grid[0] * grid[1] * grid[2], -1)


def rotate(x_BAND: Tensor, cos_ND2: Tensor, sin_ND2: Tensor) -> Tensor:
    """Turn the adjacent pairs (2j, 2j+1) of each head. FP32 inside, the input's dtype outside."""
    batch, heads, tokens, dim = x_BAND.shape
    pairs = x_BAND.float().reshape(batch, heads, tokens, dim // 2, 2)
    even, odd = pairs.split([1, 1], dim=-1)
    cos, sin = cos_ND2.unsqueeze(-1), sin_ND2.unsqueeze(-1)
    turned = torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.reshape(batch, heads, tokens, dim).to(x_BAND.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LayerNorm over the last axis, FP32 in and out whatever the dtype of `x`."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, NORM_EPS)


def modulate(x_NC: Tensor, shift_FC: Tensor, scale_FC: Tensor, geometry: Geometry) -> Tensor:
    """LN(x) * (1 + scale) + shift with one (shift, scale) per frame. FP32 inside, bulk out.

    x [B*N, C]; shift and scale [B*T, C], float32.
    """
    frames = (geometry.batch * geometry.frames, geometry.frame_tokens, x_NC.shape[-1])
    normed = layer_norm(x_NC).reshape(frames)
    modulated = normed * (1 + scale_FC.unsqueeze(1)) + shift_FC.unsqueeze(1)
    return modulated.reshape(x_NC.shape).to(x_NC.dtype)


def gated_add(x_NC: Tensor, gate_FC: Tensor, out_NC: Tensor, geometry: Geometry) -> Tensor:
    """x + gate * out with one gate per frame. FP32 inside, bulk out."""
    frames = (geometry.batch * geometry.frames, geometry.frame_tokens, x_NC.shape[-1])
    gated = gate_FC.unsqueeze(1) * out_NC.float().reshape(frames)
    return (x_NC.float() + gated.reshape(x_NC.shape)).to(x_NC.dtype)


class HeadNorm(nn.Module):
    """RMS norm over the head dimension: FP32 inside, cast, then the weight in the bulk dtype.

    Args:
        squared_divisor: what comes out is divided by its root. Attention's 1/sqrt(D) is taken
            here, on the queries: an engine would apply it to them in the bulk dtype, and bfloat16
            has no sqrt(sqrt(128)) that is nearer than 0.15%.
    """

    def __init__(self, head_dim: int, squared_divisor: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.squared_divisor = squared_divisor

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        power = x32.pow(2).mean(-1, keepdim=True) + NORM_EPS
        if self.squared_divisor != 1:
            power = power * self.squared_divisor
        return (x32 * torch.rsqrt(power)).to(x.dtype) * self.weight


class AffineNorm(nn.Module):
    """LayerNorm with weight and bias, FP32 inside, the input's dtype outside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias).to(x.dtype)


class PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride, done as one product over patches.

    [B, 16, T, H, W] -> [B*N, C]; a patch's features are ordered channel, row, column.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, hidden, kernel_size=(1, 2, 2), stride=(1, 2, 2))

    def forward(self, latents_BCTHW: Tensor) -> Tensor:
        batch, channels, frames, height, width = latents_BCTHW.shape
        rows, columns = height // 2, width // 2
        patches = latents_BCTHW.reshape(batch, channels, frames, rows, 2, columns, 2)
        features = patches.permute(0, 2, 3, 5, 1, 4, 6)
        flat = features.reshape(batch * frames * rows * columns, channels * 4)
        weight = self.proj.weight
        return F.linear(flat, weight.reshape(weight.shape[0], channels * 4), self.proj.bias)


class TimeEmbedder(nn.Module):
    """Timesteps [B*T] on the 0..1000 scale -> [B*T, E]. FP32 throughout."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, timestep_F: Tensor, frequencies: Tensor) -> Tensor:
        angles = timestep_F.unsqueeze(-1) * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(features)))


class CaptionEmbedder(nn.Module):
    """UMT5 features -> text tokens [B*L, C], in the bulk dtype."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(size, hidden, bias=False)
        self.w2 = nn.Linear(hidden, size, bias=False)
        self.w3 = nn.Linear(size, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
