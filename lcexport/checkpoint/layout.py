"""Find the DiT in a folder: which layout, which files, which naming, every tensor's place.

Three layouts are known: the released one (`dit/` beside text_encoder, tokenizer, vae, scheduler),
FastVideo's (`transformer/` and `model_index.json`), and a bare DiT folder (`config.json` and the
weights). Each may hold one file or shards with an index, under original or native names. Only
headers are read here; no weight is.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from lcexport.checkpoint.checks import check_tensors
from lcexport.checkpoint.int8 import int8_names
from lcexport.checkpoint.names import Naming, name_pairs, naming_of
from lcexport.checkpoint.shards import Weights, read_weights
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError
from lcexport.engines.header import TensorInfo, read_header
from lcexport.engines.manifest import COMPONENTS

log = logging.getLogger(__name__)

Layout = Literal["released", "fastvideo", "dit"]

DIT_FOLDERS: dict[Layout, str] = {"released": "dit", "fastvideo": "transformer"}
HOW_TO_GET_ONE = (
    "Get the released one with `hf download meituan-longcat/LongCat-Video --local-dir "
    "weights/LongCat-Video` and name its folder with --model or $LCEXPORT_MODEL, or make a small "
    "one: `lcexport demo-checkpoint DIR`, then `lcexport build --model DIR --res toy`."
)


@dataclass(frozen=True)
class Piece:
    """A tensor as a byte range of a source tensor: all of it, or one third or half of its rows.

    A quantised one has its rows' factors beside it, the piece `scale`: its values are integers
    times those.
    """

    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo
    start: int
    end: int
    scale: "Piece | None" = None

    def split(self, count: int) -> "list[Piece]":
        """Equal parts along the rows."""
        shape = (self.shape[0] // count, *self.shape[1:])
        size = (self.end - self.start) // count
        starts = [self.start + index * size for index in range(count)]
        scales = self.scale.split(count) if self.scale else [None] * count
        return [
            Piece(self.dtype, shape, self.source, start, start + size, scale)
            for start, scale in zip(starts, scales, strict=True)
        ]


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint. `tensors` is as found; `check_tensors` compares it to `config`."""

    folder: Path
    layout: Layout
    naming: Naming
    config: DiTConfig
    dit_folder: Path
    files: list[Path]
    tensors: dict[str, TensorInfo]
    components: dict[str, Path]

    def native(self) -> dict[str, Piece]:
        """Every native tensor, in canonical order, as a byte range of a source tensor.

        Raises:
            InputError: tensors are missing, unknown, or of another shape or dtype.
        """
        check_tensors(self)
        pieces = {}
        for pair in name_pairs(self.config):
            if self.naming == "native":
                pieces |= {name: self.piece(name) for name in pair.natives}
            else:
                parts = self.piece(pair.original).split(len(pair.natives))
                pieces |= zip(pair.natives, parts, strict=True)
        return pieces

    def piece(self, name: str) -> Piece:
        """One of `tensors` as a piece; a weight that is not there by itself is a quantised one."""
        if name in self.tensors:
            return whole(self.tensors[name])
        quantised, scale = (whole(self.tensors[part]) for part in int8_names(name))
        return replace(quantised, scale=scale)


@dataclass
class Survey:
    """What a folder holds, whether or not it is a sound checkpoint: `errors` says what is not.

    `warnings` are what may be a mistake and may be meant.
    """

    folder: Path
    layout: Layout
    dit_folder: Path
    components: dict[str, Path]
    weights: Weights = field(default_factory=Weights)
    config: DiTConfig | None = None
    naming: Naming | None = None
    errors: list[InputError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def whole(info: TensorInfo) -> Piece:
    """The piece that is a whole tensor."""
    return Piece(info.dtype, info.shape, info, info.start, info.end)


def native_checkpoint(config: Path, weights: Path) -> Checkpoint:
    """The DiT of a configuration and one weights file of native names, as a bundle holds them.

    Raises:
        InputError: the configuration or the weights' header is unusable.
    """
    return Checkpoint(
        folder=weights.parent,
        layout="fastvideo",
        naming="native",
        config=_read_config(config),
        dit_folder=config.parent,
        files=[weights],
        tensors=read_header(weights).tensors,
        components={},
    )


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint of any layout by reading its configuration and its headers.

    Raises:
        InputError: there is none (the message says how to get one), or its configuration, its
            index or a shard is unusable. Keys and shapes are `check_tensors`' business.
    """
    found = survey(folder)
    if found.errors:
        raise found.errors[0]
    for warning in found.warnings:
        log.warning(warning)
    assert found.config is not None
    assert found.naming is not None
    return Checkpoint(
        folder=found.folder,
        layout=found.layout,
        naming=found.naming,
        config=found.config,
        dit_folder=found.dit_folder,
        files=found.weights.files,
        tensors=found.weights.tensors,
        components=found.components,
    )


def survey(folder: str | Path) -> Survey:
    """Look at a folder and collect what is wrong instead of stopping at the first thing.

    Raises:
        InputError: there is no checkpoint at all.
    """
    folder = Path(folder)
    layout, dit_folder = _locate(folder)
    present = {name: folder / name for name in COMPONENTS} if layout != "dit" else {}
    components = {name: path for name, path in present.items() if path.is_dir()}
    found = Survey(folder, layout, dit_folder, components)
    try:
        found.config = _read_config(dit_folder / "config.json")
        found.warnings += misspelt_keys(dit_folder / "config.json")
    except InputError as error:
        found.errors.append(error)
    found.weights = read_weights(dit_folder, found.errors)
    found.naming = naming_of(list(found.weights.tensors))
    if found.naming is None and not found.errors:
        found.errors.append(_foreign(dit_folder, found.weights.tensors))
    return found


def _locate(folder: Path) -> tuple[Layout, Path]:
    if not folder.is_dir():
        raise InputError(f"there is no checkpoint at {folder}", do=HOW_TO_GET_ONE)
    inside: list[Layout] = [name for name, sub in DIT_FOLDERS.items() if (folder / sub).is_dir()]
    if len(inside) == 2:
        raise InputError(
            f"{folder} holds both dit/ and transformer/",
            do=f"Name the one you mean: {folder / 'dit'} or {folder / 'transformer'}.",
        )
    if inside:
        return inside[0], folder / DIT_FOLDERS[inside[0]]
    if (folder / "config.json").is_file() or any(folder.glob("*.safetensors*")):
        return "dit", folder
    raise InputError(
        f"there is no checkpoint in {folder}", wanted="dit/, transformer/ or config.json in it",
        do=HOW_TO_GET_ONE,
    )  # fmt: skip


def _read_config(path: Path) -> DiTConfig:
    try:
        return DiTConfig.from_json(path)
    except (OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def misspelt_keys(path: Path) -> list[str]:
    """One sentence for each key of a readable `config.json` that is nearly, but not, one of ours.

    Other unknown keys are the attention kernels' or another library's, and play no part.
    """
    known = DiTConfig.keys()
    found = []
    for key in json.loads(path.read_bytes()):
        if key not in known and (near := get_close_matches(key.lower(), known, n=1, cutoff=0.85)):
            found.append(f"{path}: the key {key!r} is not read; is {near[0]!r} meant?")
    return found


def _foreign(dit_folder: Path, tensors: Mapping[str, TensorInfo]) -> InputError:
    return InputError(
        f"{dit_folder} holds no LongCat-Video DiT: none of its tensors has a known name",
        got=", ".join(list(tensors)[:3]) or "no tensors at all",
        wanted="x_embedder.proj.weight or patch_embed.proj.weight, for one", do=HOW_TO_GET_ONE,
    )  # fmt: skip
