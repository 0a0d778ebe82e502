"""The one table of tensor names: original LongCat-Video on the left, native on the right.

"Native" is the naming of FastVideo, where the fused projections are split: qkv into three, kv
into two equal parts along dimension 0, in the order q, k, v. Everything else is a renaming, so
each original tensor is the concatenation of its native ones, and byte ranges do for both ways.

C is the hidden size, F the width of the SwiGLU, E the width of the timestep embedding.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lcexport.configs.dit import DiTConfig

Naming = Literal["original", "native"]
Shape = tuple[int, ...]
Shapes = Callable[[DiTConfig], dict[str, Shape]]


@dataclass(frozen=True)
class Pair:
    """One original tensor and the native ones it is the concatenation of (along dimension 0)."""

    original: str
    shape: Shape
    natives: tuple[str, ...]
    of_linear: bool  # any Linear but the last, which no int8 checkpoint quantises

    @property
    def native_shape(self) -> Shape:
        """Shape of each native part."""
        return (self.shape[0] // len(self.natives), *self.shape[1:])

    @property
    def is_quantisable(self) -> bool:
        """Whether int8 checkpoints hold it quantised."""
        return self.of_linear and len(self.shape) == 2


@dataclass(frozen=True)
class _Module:
    """A module's name in both namings, and the shapes of its original parameters."""

    original: str
    natives: tuple[str, ...]
    shapes: Shapes


def _linear(rows: Callable[[DiTConfig], int], columns: Callable[[DiTConfig], int]) -> Shapes:
    return lambda c: {"weight": (rows(c), columns(c)), "bias": (rows(c),)}


def _matrix(rows: Callable[[DiTConfig], int], columns: Callable[[DiTConfig], int]) -> Shapes:
    return lambda c: {"weight": (rows(c), columns(c))}


def _c(config: DiTConfig) -> int:
    return config.hidden_size


def _f(config: DiTConfig) -> int:
    return config.ffn_hidden


def _e(config: DiTConfig) -> int:
    return config.adaln_tembed_dim


def _patch_conv(c: DiTConfig) -> dict[str, Shape]:
    weight = (c.hidden_size, c.in_channels, *c.patch_size)
    return {"weight": weight, "bias": (c.hidden_size,)}


def _head_norm(c: DiTConfig) -> dict[str, Shape]:
    return {"weight": (c.head_dim,)}


def _layer_norm(c: DiTConfig) -> dict[str, Shape]:
    return {"weight": (c.hidden_size,), "bias": (c.hidden_size,)}


def _out_features(c: DiTConfig) -> int:
    return c.out_channels * 4


_EMBEDDERS = (
    _Module("x_embedder.proj", ("patch_embed.proj",), _patch_conv),
    _Module(
        "t_embedder.mlp.0",
        ("time_embedder.linear_1",),
        _linear(_e, lambda c: c.frequency_embedding_size),
    ),
    _Module("t_embedder.mlp.2", ("time_embedder.linear_2",), _linear(_e, _e)),
    _Module(
        "y_embedder.y_proj.0",
        ("caption_embedder.linear_1",),
        _linear(_c, lambda c: c.caption_channels),
    ),
    _Module("y_embedder.y_proj.2", ("caption_embedder.linear_2",), _linear(_c, _c)),
)
_BLOCK = (
    _Module("adaLN_modulation.1", ("adaln_linear_1",), _linear(lambda c: 6 * _c(c), _e)),
    _Module(
        "attn.qkv",
        ("self_attn.to_q", "self_attn.to_k", "self_attn.to_v"),
        _linear(lambda c: 3 * _c(c), _c),
    ),
    _Module("attn.q_norm", ("self_attn.q_norm",), _head_norm),
    _Module("attn.k_norm", ("self_attn.k_norm",), _head_norm),
    _Module("attn.proj", ("self_attn.to_out",), _linear(_c, _c)),
    _Module("pre_crs_attn_norm", ("norm_cross",), _layer_norm),
    _Module("cross_attn.q_linear", ("cross_attn.to_q",), _linear(_c, _c)),
    _Module(
        "cross_attn.kv_linear",
        ("cross_attn.to_k", "cross_attn.to_v"),
        _linear(lambda c: 2 * _c(c), _c),
    ),
    _Module("cross_attn.q_norm", ("cross_attn.q_norm",), _head_norm),
    _Module("cross_attn.k_norm", ("cross_attn.k_norm",), _head_norm),
    _Module("cross_attn.proj", ("cross_attn.to_out",), _linear(_c, _c)),
    _Module("ffn.w1", ("ffn.w1",), _matrix(_f, _c)),
    _Module("ffn.w2", ("ffn.w2",), _matrix(_c, _f)),
    _Module("ffn.w3", ("ffn.w3",), _matrix(_f, _c)),
)
_FINAL = (
    _Module(
        "final_layer.adaLN_modulation.1",
        ("final_layer.adaln_linear",),
        _linear(lambda c: 2 * _c(c), _e),
    ),
    _Module("final_layer.linear", ("final_layer.proj",), _linear(_out_features, _c)),
)

_BLOCK_NAME = re.compile(r"blocks\.(\d{1,9})\.(.+)")
_NEVER_INT8 = "final_layer.linear"
_ISLANDS = ("time_embedder", "final_layer")
_BLOCK_ISLANDS = ("adaln_linear_1", "norm_cross")


def name_pairs(config: DiTConfig) -> list[Pair]:
    """Every tensor of a DiT of this size, in canonical order: embedders, blocks, final layer."""
    pairs = list(_pairs("", _EMBEDDERS, config))
    for index in range(config.depth):
        pairs += _pairs(f"blocks.{index}.", _BLOCK, config)
    return pairs + list(_pairs("", _FINAL, config))


def expected_tensors(config: DiTConfig, naming: Naming) -> dict[str, Shape]:
    """Name -> shape of every tensor, in canonical order: 1022 originals or 1310 natives if 48 deep.

    All parts of a native split are consecutive, so both orders run through the same bytes.
    """
    if naming == "original":
        return {pair.original: pair.shape for pair in name_pairs(config)}
    return {name: pair.native_shape for pair in name_pairs(config) for name in pair.natives}


def is_island(native_name: str) -> bool:
    """Whether the network computes with this tensor in FP32 whatever the precision of the bulk.

    The timestep embedder, the adaLN projections, the final layer and the affine LayerNorm.
    """
    match = _BLOCK_NAME.fullmatch(native_name)
    if match:
        return match[2].rpartition(".")[0] in _BLOCK_ISLANDS
    return native_name.partition(".")[0] in _ISLANDS


def naming_of(names: list[str]) -> Naming | None:
    """The naming these tensors follow, judged by the names only one of the two has.

    None when no such name is there. A mixture counts as the naming most of it follows; checking
    the names against `expected_tensors` then shows what is foreign.
    """
    modules = [_module_of(name) for name in names]
    original = sum(module in _ONLY_ORIGINAL for module in modules)
    native = sum(module in _ONLY_NATIVE for module in modules)
    if not original and not native:
        return None
    return "original" if original >= native else "native"


def depth_of(names: list[str]) -> int:
    """Number of blocks these names speak of: the highest index plus one, unknown names aside."""
    known = (name for name in names if _module_of(name) in _KNOWN)
    matches = (_BLOCK_NAME.fullmatch(name) for name in known)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _pairs(prefix: str, modules: tuple[_Module, ...], config: DiTConfig) -> Iterator[Pair]:
    for module in modules:
        shapes = module.shapes(config)
        of_linear = len(shapes["weight"]) == 2 and module.original != _NEVER_INT8
        for parameter, shape in shapes.items():
            natives = tuple(f"{prefix}{native}.{parameter}" for native in module.natives)
            yield Pair(f"{prefix}{module.original}.{parameter}", shape, natives, of_linear)


def _module_of(name: str) -> str:
    match = _BLOCK_NAME.fullmatch(name)
    inner = "*." + match[2] if match else name
    return inner.rpartition(".")[0]


def _all_modules() -> Iterator[tuple[str, _Module]]:
    yield from (("", module) for module in _EMBEDDERS + _FINAL)
    yield from (("*.", module) for module in _BLOCK)


_ORIGINAL = {prefix + module.original for prefix, module in _all_modules()}
_NATIVE = {prefix + native for prefix, module in _all_modules() for native in module.natives}
_KNOWN = _ORIGINAL | _NATIVE
_ONLY_ORIGINAL = _ORIGINAL - _NATIVE
_ONLY_NATIVE = _NATIVE - _ORIGINAL
