"""Floating-point operations of one DiT forward pass. A multiply-add counts as two.

Norms, RoPE, softmax and other element-wise work are left out: at 480p they are under 0.1%.
"""

from dataclasses import dataclass

from lcexport.configs.dit import DiTConfig


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


def forward_flops(config: DiTConfig, frames: int, tokens: int, text_tokens: int) -> Flops:
    """Operations of one pass over one sample (batch 1, no conditioning latents).

    With N tokens, L text tokens, C = hidden size, F = SwiGLU width, per block:
    linear 2N(4C^2 + 2C^2 + 3CF), self-attention 4N^2 C, cross-attention 4NLC + 4LC^2 (its keys
    and values), and the modulation 12 T E C.
    """
    size, wide, depth = config.hidden_size, config.ffn_hidden, config.depth
    linear = 2 * tokens * (6 * size * size + 3 * size * wide)
    modulation = 2 * frames * config.adaln_tembed_dim * 6 * size
    self_attention = 4 * tokens * tokens * size
    cross_attention = 4 * tokens * text_tokens * size + 4 * text_tokens * size * size
    patches = 2 * tokens * config.patch_features * size
    captions = 2 * text_tokens * (config.caption_channels * size + size * size)
    final = 2 * tokens * size * config.out_channels * 4
    return Flops(
        linear=depth * (linear + modulation),
        self_attention=depth * self_attention,
        cross_attention=depth * cross_attention,
        embedding=patches + captions + final,
    )
