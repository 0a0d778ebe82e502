"""Floating-point operations of one DiT forward pass. A multiply-add counts as two.

Norms, RoPE, softmax and other element-wise work are left out: at 480p they are under 0.1%.
"""

import math
from dataclasses import dataclass, replace

from lcexport.configs.dit import DiTConfig
from lcexport.configs.presets import PATCH
from lcexport.configs.tasks import Job
from lcexport.dit.sparse import Grid, Sparsity, cuts, job_sparsity


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass, by kind."""

    linear: int
    self_attention: int
    cross_attention: int
    embedding: int

    @property
    def total(self) -> int:
        return self.linear + self.self_attention + self.cross_attention + self.embedding


def forward_flops(
    config: DiTConfig,
    frames: int,
    tokens: int,
    text_tokens: int,
    *,
    cond_tokens: int = 0,
    cached_tokens: int = 0,
) -> Flops:
    """Operations of one pass over one sample.

    With N tokens, n0 of them clean, M cached, L text tokens, C = hidden size, F = SwiGLU width, per
    block: linear 2N(4C^2 + 3CF) + 4(N - n0)C^2, self-attention 4C(n0^2 + (N - n0)(N + M)),
    cross-attention 4(N - n0)LC + 4LC^2 (its keys and values), and the modulation 12 T E C.
    """
    size, wide, depth = config.hidden_size, config.ffn_hidden, config.depth
    noise = tokens - cond_tokens
    linear = 2 * tokens * (4 * size * size + 3 * size * wide) + 2 * noise * 2 * size * size
    modulation = 2 * frames * config.adaln_tembed_dim * 6 * size
    self_attention = 4 * size * (cond_tokens**2 + noise * (tokens + cached_tokens))
    cross_attention = 4 * noise * text_tokens * size + 4 * text_tokens * size * size
    patches = 2 * tokens * config.patch_features * size
    captions = 2 * text_tokens * (config.caption_channels * size + size * size)
    final = 2 * tokens * size * config.out_channels * 4
    return Flops(
        linear=depth * (linear + modulation),
        self_attention=depth * self_attention,
        cross_attention=depth * cross_attention,
        embedding=patches + captions + final,
    )


def cache_flops(config: DiTConfig, frames: int, tokens: int) -> Flops:
    """Operations of making the key/value cache of clean frames: no text, and no last layer but its
    keys and values.
    """
    size, wide, layers = config.hidden_size, config.ffn_hidden, config.depth - 1
    linear = 2 * tokens * (4 * size * size + 3 * size * wide)
    modulation = 2 * frames * config.adaln_tembed_dim * 6 * size
    return Flops(
        linear=layers * linear + config.depth * modulation + 2 * tokens * 2 * size * size,
        self_attention=layers * 4 * size * tokens**2,
        cross_attention=0,
        embedding=2 * tokens * config.patch_features * size,
    )


def job_flops(config: DiTConfig, job: Job) -> Flops:
    """Operations of one pass of a graph over one sample."""
    if job.part == "cache":
        return cache_flops(config, job.latent_frames, job.tokens)
    sparsity = job_sparsity(config, job)
    if sparsity is not None:
        _, frames, height, width = job.latent_shape
        grid = (frames, height // PATCH, width // PATCH)
        return sparse_flops(config, grid, job.text_tokens, sparsity, job.num_cond_latents)
    return forward_flops(
        config,
        job.latent_frames,
        job.tokens,
        job.text_tokens,
        cond_tokens=job.num_cond_latents * job.frame_tokens,
        cached_tokens=job.cached_latents * job.frame_tokens,
    )


def sparse_flops(
    config: DiTConfig, grid: Grid, text_tokens: int, sparsity: Sparsity, cond_frames: int = 0
) -> Flops:
    """Operations of one pass with block-sparse self-attention, its gate included.

    `grid` is (T, h, w) in tokens. With n of K key chunks of c tokens kept, N queries cost 4NncC;
    the gate costs 2PKC for P query chunks. Conditioning frames attend among themselves. The
    sparsity alone counts: what a `cdf_threshold` keeps depends on the data.
    """
    frames, rows, columns = grid
    cond_tokens = cond_frames * rows * columns
    dense = forward_flops(config, frames, math.prod(grid), text_tokens, cond_tokens=cond_tokens)
    if frames == 1:  # dense, as in the model
        return dense
    noise = (frames - cond_frames, rows, columns)
    calls = [(noise, grid)]
    if cond_frames:
        cond = (cond_frames, rows, columns)
        calls.append((cond, cond))
    operations = 0
    for queries, keys in calls:
        query_chunks = math.prod(cuts(queries, sparsity.chunk_q))
        key_chunks = math.prod(cuts(keys, sparsity.chunk_k))
        kept_tokens = sparsity.kept(key_chunks) * math.prod(sparsity.chunk_k)
        operations += 4 * math.prod(queries) * kept_tokens + 2 * query_chunks * key_chunks
    return replace(dense, self_attention=config.depth * operations * config.hidden_size)


def share_saved(dense: Flops, sparse: Flops) -> float:
    """The share of a dense pass's operations that the sparse pass leaves out."""
    return 1 - sparse.total / dense.total
