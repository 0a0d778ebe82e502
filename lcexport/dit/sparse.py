"""Block-sparse attention: each chunk of queries attends to the few chunks of keys it matches best.

Tokens arrive in the order T, h, w and are regrouped into chunks of a few frames, rows and columns.
A gate scores each pair of chunks by the product of their means; per batch, head and query chunk
the best n = int((1 - sparsity) * key chunks) are kept (its own chunk is not forced in), and
attention is the exact softmax over all tokens of these. `dense_reference` is the definition,
`block_sparse_attention` the operation: one node of an exported graph, on the CPU a loop over the
query chunks, on CUDA a Triton kernel. No form of it holds the N x N scores, but the reference.

The queries carry 1/sqrt(D) already (`HeadNorm.squared_divisor`), so the softmax scale is 1 and the
gate scores the scaled queries. That divides all scores of a gate alike: the selection is that of
unscaled queries, up to rounding. Between equal scores, which bfloat16 has, each library chooses.

    BA = B * A batches times heads   P query chunks   K key chunks   n kept   p, c tokens of a chunk
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lcexport.configs.dit import BlockSparseParams, DiTConfig
from lcexport.configs.errors import UsageError
from lcexport.configs.tasks import Job

Grid = tuple[int, int, int]
# Values of gathered keys that the loop on the CPU holds at once: 64 MB in float32.
GATHERED = 2**24


@dataclass(frozen=True)
class Sparsity:
    """How much is left out, and in which chunks (frames, rows, columns).

    Attributes:
        sparsity: the share of key chunks left out; None leaves the choice to `cdf_threshold`.
        cdf_threshold: where given, as many of the best chunks as together have at most this share
            of the gate's softmax, and no fewer than `sparsity` keeps. The released model has none.
    """

    sparsity: float | None = 0.9375
    cdf_threshold: float | None = None
    chunk_q: Grid = (4, 4, 4)
    chunk_k: Grid = (4, 4, 4)

    @classmethod
    def from_params(cls, params: BlockSparseParams) -> Self:
        """What a checkpoint's `bsa_params` ask for."""
        return cls(
            params.sparsity,
            params.cdf_threshold,
            params.chunk_3d_shape_q,
            params.chunk_3d_shape_k,
        )

    def kept(self, key_chunks: int) -> int:
        """n, how many of so many key chunks `sparsity` keeps; 0 is possible."""
        return 0 if self.sparsity is None else int((1 - self.sparsity) * key_chunks)


def job_sparsity(config: DiTConfig, job: Job) -> Sparsity | None:
    """What the self-attention of a graph leaves out; None where it is dense."""
    if not job.sparse:
        return None
    if config.bsa_params is None:
        raise UsageError("the model says nothing of block-sparse attention", do="Use --dense.")
    return Sparsity.from_params(config.bsa_params)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, grid_q: Grid, grid_k: Grid, sparsity: Sparsity
) -> Tensor:
    """Attention of scaled queries [B, A, Nq, D] to the best chunks of keys: [B, A, Nq, D].

    k and v are [B, A, Nk, D]; a grid is the (T, h, w) of its tokens. Query chunks that keep no key
    chunk become zero.

    Raises:
        UsageError: a grid cannot be cut into chunks, or is not that of its tokens.
        IncompatibleError: the tensors are on CUDA, and there is no Triton.
    """
    check_grid("queries", q, grid_q, sparsity.chunk_q)
    check_grid("keys", k, grid_k, sparsity.chunk_k)
    return _operation(
        q,
        k,
        v,
        grid_q,
        grid_k,
        sparsity.chunk_q,
        sparsity.chunk_k,
        sparsity.sparsity,
        sparsity.cdf_threshold,
    )


@torch.library.custom_op("lcexport::block_sparse_attention", mutates_args=())
def _operation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Sequence[int],
    grid_k: Sequence[int],
    chunk_q: Sequence[int],
    chunk_k: Sequence[int],
    sparsity: float | None,
    cdf_threshold: float | None,
) -> Tensor:
    setting = Sparsity(sparsity, cdf_threshold)
    queries = to_chunks(q, grid_q, chunk_q)
    keys, values = to_chunks(k, grid_k, chunk_k), to_chunks(v, grid_k, chunk_k)
    kept, counts = gate(queries, keys, setting)
    if q.is_cuda:
        from lcexport.dit.sparse_triton import attend_kept_triton

        out = attend_kept_triton(queries, keys, values, kept, counts)
    else:
        out = attend_kept(queries, keys, values, kept, counts)
    return from_chunks(out, q.shape, grid_q, chunk_q)


@_operation.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def check_grid(name: str, x: Tensor, grid: Grid, chunk: Grid) -> None:
    """UsageError unless the grid is that of the tokens and can be cut into whole chunks."""
    if math.prod(grid) != x.shape[2]:
        raise UsageError(f"the grid is not that of the {name}", got=grid, wanted=x.shape[2])
    if any(size % part for size, part in zip(grid, chunk, strict=True)):
        raise UsageError(
            f"block-sparse attention cannot cut the {name} into chunks",
            got=" x ".join(map(str, grid)),
            wanted=f"multiples of {' x '.join(map(str, chunk))} (frames, rows, columns)",
            do="Use pixel sizes that are multiples of 64 and multiples of 4 latent frames,"
            " conditioning and noise each, or leave block-sparse attention off.",
        )


def cuts(grid: Sequence[int], chunk: Sequence[int]) -> list[int]:
    """How many chunks along each axis."""
    return [size // part for size, part in zip(grid, chunk, strict=True)]


def to_chunks(x_BAND: Tensor, grid: Sequence[int], chunk: Sequence[int]) -> Tensor:
    """[B, A, N, D] in the order T, h, w -> [BA, chunks, tokens of a chunk, D], contiguous."""
    (T, H, W), (t, h, w) = cuts(grid, chunk), chunk
    dim = x_BAND.shape[-1]
    cut = x_BAND.reshape(-1, T, t, H, h, W, w, dim).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return cut.reshape(-1, T * H * W, t * h * w, dim).contiguous()


def from_chunks(
    x: Tensor, shape: Sequence[int], grid: Sequence[int], chunk: Sequence[int]
) -> Tensor:
    """The reverse of `to_chunks`: [BA, chunks, tokens of a chunk, D] -> `shape`, [B, A, N, D]."""
    cut = x.reshape(-1, *cuts(grid, chunk), *chunk, x.shape[-1])
    return cut.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(*shape).contiguous()


def gate(queries: Tensor, keys: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """Which key chunks each query chunk keeps, best first, and how many of these count.

    In the tensors' dtype, as the original. [BA, P, p, D] and [BA, K, c, D] -> int64 [BA, P, most]
    and int64 [BA, P].
    """
    scores = queries.mean(2) @ keys.mean(2).transpose(1, 2)
    n = sparsity.kept(keys.shape[1])
    if sparsity.cdf_threshold is None:
        counts = torch.full(scores.shape[:2], n, device=scores.device)
        return scores.topk(n, dim=-1).indices, counts
    weights, order = scores.softmax(-1).sort(dim=-1, descending=True)
    counts = (weights.cumsum(-1) <= sparsity.cdf_threshold).sum(-1).clamp(min=n)
    return order[..., : int(counts.max())], counts


def attend_kept(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor) -> Tensor:
    """Attention over the kept chunks, a group of query chunks at a time: [BA, P, p, D].

    Scores and softmax in float32; the probabilities are cast to the dtype of `v`.
    """
    batch, chunks = q.shape[:2]
    tokens, dim = k.shape[2:]
    heads = torch.arange(batch)[:, None, None]
    most = kept.shape[-1]
    unkept = torch.arange(most) >= counts[..., None]
    group = max(1, GATHERED // max(1, batch * most * tokens * dim))
    out = torch.empty_like(q)
    for first in range(0, chunks, group):
        here = slice(first, first + group)
        index = kept[:, here]
        found = (*index.shape[:2], most * tokens, dim)
        scores = q[:, here].float() @ k[heads, index].reshape(found).float().transpose(-1, -2)
        hidden = unkept[:, here, None, :].repeat_interleave(tokens, dim=-1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        weights = weights.masked_fill(hidden, 0.0)  # not a number where nothing is kept
        out[:, here] = weights.to(v.dtype) @ v[heads, index].reshape(found)
    return out


def block_mask(q: Tensor, k: Tensor, grid_q: Grid, grid_k: Grid, sparsity: Sparsity) -> Tensor:
    """Which key chunks each query chunk sees: bool [B, A, P, K]."""
    queries = to_chunks(q, grid_q, sparsity.chunk_q)
    keys = to_chunks(k, grid_k, sparsity.chunk_k)
    kept, counts = gate(queries, keys, sparsity)
    counted = torch.arange(kept.shape[-1], device=kept.device) < counts[..., None]
    mask = torch.zeros(*kept.shape[:2], keys.shape[1], dtype=torch.int64, device=q.device)
    return mask.scatter_add(2, kept, counted.long()).bool().reshape(*q.shape[:2], *mask.shape[1:])


def dense_reference(
    q: Tensor, k: Tensor, v: Tensor, grid_q: Grid, grid_k: Grid, sparsity: Sparsity
) -> Tensor:
    """The definition: dense attention under a mask, with all N x N scores. For small sizes."""
    chunk_q, chunk_k = sparsity.chunk_q, sparsity.chunk_k
    seen = block_mask(q, k, grid_q, grid_k, sparsity)
    mask = seen.repeat_interleave(math.prod(chunk_q), 2).repeat_interleave(math.prod(chunk_k), 3)
    mask = mask.reshape(-1, *mask.shape[2:])
    queries = to_chunks(q, grid_q, chunk_q).flatten(1, 2)
    keys, values = (to_chunks(x, grid_k, chunk_k).flatten(1, 2) for x in (k, v))
    scores = queries.float() @ keys.float().transpose(1, 2)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)
    return from_chunks(weights.to(v.dtype) @ values, q.shape, grid_q, chunk_q)
