"""A LoRA file of the original's format, understood whole or refused.

Below `lora___lorahyphen___` and a module's path, whose dots are written `___lorahyphen___` too:

    .lora_down.weight            [n*r, in]
    .lora_up.weight              [out, r], or n of .lora_up.blocks.<j>.weight [out/n, r]
    .alpha_scale                 []

The change to the module's weight is strength * alpha_scale * concat_j(up_j @ down_j), where down_j
is the j-th r rows of `lora_down`. Modules are named as in the original, before q, k, v are split.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lcexport.checkpoint import TensorInfo, read_header, read_tensor, scan_tensors
from lcexport.checkpoint.checks import WEIGHT_DTYPES
from lcexport.checkpoint.layout import whole
from lcexport.checkpoint.names import Pair, name_pairs
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError

DOT = "___lorahyphen___"
PREFIX = "lora" + DOT
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha_scale"
BLOCK = re.compile(r"lora_up\.blocks\.(0|[1-9]\d{0,3})\.weight")


@dataclass(frozen=True)
class LoraModule:
    """The change to one module's weight [out_features, in_features]; not yet read but for alpha."""

    module: str
    down: TensorInfo
    ups: tuple[TensorInfo, ...]
    alpha_scale: float

    @property
    def rank(self) -> int:
        return self.ups[0].shape[1]

    @property
    def out_features(self) -> int:
        return len(self.ups) * self.ups[0].shape[0]

    @property
    def in_features(self) -> int:
        return self.down.shape[1]


@dataclass(frozen=True)
class LoraFile:
    """A file of the right form; `check_fits` compares it to a model, `check_values` reads it."""

    path: Path
    bytes: int
    modules: dict[str, LoraModule]


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA's header and its alpha scales.

    Raises:
        InputError: no safetensors file, an unknown key, or a module that is incomplete or whose
            shapes contradict each other; names the module.
    """
    header = read_header(path)
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, info in header.tensors.items():
        module, parameter = split_key(header.path, key)
        found.setdefault(module, {})[parameter] = info
    if not found:
        raise InputError(f"{path} holds no LoRA: it has no tensors")
    modules = {name: module_from(header.path, name, parts) for name, parts in found.items()}
    return LoraFile(header.path, header.file_bytes, modules)


def split_key(path: Path, key: str) -> tuple[str, str]:
    """The module's path and what follows it. InputError where the key is not of this format."""
    name, _, parameter = key.removeprefix(PREFIX).partition(".")
    known = parameter in (DOWN, UP, ALPHA) or BLOCK.fullmatch(parameter)
    if not key.startswith(PREFIX) or not name or not known:
        raise InputError(
            f"{path}: the key {key!r} is not of a LongCat-Video LoRA",
            wanted=f"{PREFIX}<module>.{DOWN}, .{UP}, .lora_up.blocks.<j>.weight or .{ALPHA}",
        )
    return name.replace(DOT, "."), parameter


def module_from(path: Path, module: str, parts: dict[str, TensorInfo]) -> LoraModule:
    """One module of its tensors, all there and of shapes that go together.

    Raises:
        InputError: names the module.
    """
    blocks = {int(match[1]): parts[match[0]] for match in map(BLOCK.fullmatch, parts) if match}
    lacking = [name for name in (DOWN, ALPHA) if name not in parts]
    if UP not in parts and not blocks:
        lacking.append("lora_up")
    if lacking:
        refuse(path, module, f"has no {', '.join(lacking)}")
    if UP in parts and blocks:
        refuse(path, module, "has both lora_up.weight and lora_up.blocks")
    if blocks and sorted(blocks) != list(range(len(blocks))):
        refuse(path, module, "lacks a block of lora_up", got=sorted(blocks))
    for info in parts.values():
        if info.dtype not in WEIGHT_DTYPES:
            wanted = ", ".join(WEIGHT_DTYPES)
            refuse(path, module, "has an unsupported dtype", got=info.dtype, wanted=wanted)
    ups = tuple(blocks[j] for j in sorted(blocks)) or (parts[UP],)
    check_shapes(path, module, parts[DOWN], ups)
    return LoraModule(module, parts[DOWN], ups, read_alpha(path, module, parts[ALPHA]))


def check_shapes(path: Path, module: str, down: TensorInfo, ups: tuple[TensorInfo, ...]) -> None:
    """Require n blocks of one shape [out/n, r] over a `lora_down` of [n*r, in], none of them 0."""
    shapes = {up.shape for up in ups}
    if len(shapes) > 1 or any(len(s) != 2 or 0 in s for s in (*shapes, down.shape)):
        got = ", ".join(str(list(info.shape)) for info in (down, *ups))
        refuse(path, module, "is not made of matrices that go together", got=got)
    count, rank = len(ups), ups[0].shape[1]
    if down.shape[0] != count * rank:
        refuse(
            path,
            module,
            "has lora_down and lora_up of different ranks",
            got=f"{down.shape[0]} rows of lora_down",
            wanted=f"{count} x {rank}, as the {count} of lora_up say",
        )


def read_alpha(path: Path, module: str, info: TensorInfo) -> float:
    """The one finite number in `alpha_scale`."""
    if info.shape not in ((), (1,)):
        refuse(path, module, "has an alpha_scale that is not one number", got=list(info.shape))
    alpha = float(read_tensor(whole(info)).item())
    if not math.isfinite(alpha):
        refuse(path, module, "has an alpha_scale that is not finite", got=alpha)
    return alpha


def linears(config: DiTConfig) -> dict[str, Pair]:
    """Every Linear of a DiT of this size by its original path: the pair of its weight."""
    weights = (pair for pair in name_pairs(config) if pair.original.endswith(".weight"))
    return {p.original.removesuffix(".weight"): p for p in weights if len(p.shape) == 2}


def check_fits(lora: LoraFile, config: DiTConfig) -> None:
    """Require that every module of the file is a Linear of this DiT, and has its shape.

    Raises:
        InputError: names the first module that does not fit.
    """
    known = linears(config)
    for name, module in lora.modules.items():
        if name not in known:
            wanted = (
                f"an original module of a DiT of {config.depth} blocks, such as blocks.0.ffn.w1"
            )
            refuse(lora.path, name, "is no Linear layer of this model", wanted=wanted)
        shape = (module.out_features, module.in_features)
        if shape != known[name].shape:
            wanted = list(known[name].shape)
            refuse(lora.path, name, "has another shape", got=list(shape), wanted=wanted)


def check_values(lora: LoraFile) -> None:
    """Read the whole file once and require finite numbers.

    Raises:
        InputError: names the module that holds NaN or infinity.
    """
    if bad := scan_tensors(tensors_of(lora.modules.values())).nonfinite:
        module, parameter = split_key(lora.path, bad[0])
        refuse(lora.path, module, f"holds NaN or infinity in {parameter}")


def tensors_of(modules: Iterable[LoraModule]) -> list[TensorInfo]:
    """The matrices of these modules."""
    return [info for module in modules for info in (module.down, *module.ups)]


def refuse(
    path: Path, module: str, what: str, *, got: object = None, wanted: object = None
) -> NoReturn:
    """An InputError about one module of a LoRA."""
    raise InputError(f"{path}: the module {module} {what}", got=got, wanted=wanted)
