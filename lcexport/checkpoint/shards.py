"""The weight files of one folder: a single file, or shards tied together by an index."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcexport.configs.errors import InputError
from lcexport.engines.header import MAX_HEADER_BYTES, TensorInfo, read_header, strict_json

INDEX_ENDING = ".safetensors.index.json"
# when a folder holds several sets of weights
PREFERRED = ("diffusion_pytorch_model", "model", "transformer")
DOWNLOAD_SHARD = "Download it again: `hf download` fetches only what is missing."


@dataclass
class Weights:
    """The files and every tensor in them; `total_size` is the index's claim in bytes, if any."""

    files: list[Path] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    index: Path | None = None
    total_size: int | None = None


def read_weights(folder: Path, errors: list[InputError], stem: str | None = None) -> Weights:
    """Read the headers of a folder's weights; what is wrong is appended to `errors`.

    `stem` is the only file name to look for, without its ending; None takes what is there.
    """
    try:
        index = _choose(folder, INDEX_ENDING, stem)
        single = None if index else _choose(folder, ".safetensors", stem)
    except InputError as error:
        errors.append(error)
        return Weights()
    if index:
        return _read_sharded(folder, index, errors)
    if single is None:
        wanted = (
            f"{stem}.safetensors, or shards with their index" if stem else "a .safetensors file"
        )
        errors.append(InputError(f"{folder} holds no weights", wanted=wanted, do=DOWNLOAD_SHARD))
        return Weights()
    weights = Weights([single])
    _add_file(weights, single, errors)
    return weights


def _choose(folder: Path, ending: str, only: str | None) -> Path | None:
    """The file with this ending: a usual name if there is one, or the only one."""
    for stem in (only,) if only else PREFERRED:
        if (folder / (stem + ending)).is_file():
            return folder / (stem + ending)
    if only:
        return None
    # Python's glob shows dot files too: an unfinished download is not a set of weights
    found = sorted(p for p in folder.glob(f"*{ending}") if not p.name.startswith("."))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise InputError(
            f"{folder} holds several files ending in {ending}", got=names,
            wanted="one, or shards with their index", do="Restore the index file.",
        )  # fmt: skip
    return found[0] if found else None


def _read_sharded(folder: Path, index: Path, errors: list[InputError]) -> Weights:
    weights = Weights(index=index)
    try:
        weight_map, weights.total_size = _read_index(index)
    except InputError as error:
        errors.append(error)
        return weights
    weights.files = [folder / shard for shard in sorted(set(weight_map.values()))]
    for path in weights.files:
        if not path.is_file():
            errors.append(
                InputError(f"the shard {path.name} is missing from {folder}", do=DOWNLOAD_SHARD)
            )
            continue
        listed = {name for name, shard in weight_map.items() if shard == path.name}
        _check_listing(index, path.name, listed, _add_file(weights, path, errors), errors)
    return weights


def _read_index(index: Path) -> tuple[dict[str, str], int | None]:
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise InputError(f"{index} is too large for an index", wanted=MAX_HEADER_BYTES)
        content = strict_json(index.read_bytes())
    except OSError as error:
        raise InputError(f"{index} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{index} is not usable JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    for name, shard in weight_map.items():
        if not _is_file_name(shard):
            raise InputError(
                f"{index}: the shard of tensor {name!r} is not a file name in this folder",
                got=repr(shard)[:80],
            )
    return weight_map, _total_size(content.get("metadata"))


def _is_file_name(shard: Any) -> bool:
    """No separator of any system, no parent folder: the path cannot leave the index's folder."""
    if not isinstance(shard, str) or not shard.endswith(".safetensors") or len(shard) > 255:
        return False
    return not any(character in shard for character in "/\\\0:") and shard.isprintable()


def _total_size(metadata: Any) -> int | None:
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    # some tools write it as a float; a boolean, an infinity or a nonsense size is no claim
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < 2**63:
        return None
    return int(size)


def _add_file(weights: Weights, path: Path, errors: list[InputError]) -> set[str] | None:
    """Add a file's tensors; their names, or None when the file is unusable."""
    try:
        tensors: Mapping[str, TensorInfo] = read_header(path).tensors
    except InputError as error:
        errors.append(error)
        return None
    for name, info in tensors.items():
        if name in weights.tensors:
            first = weights.tensors[name].path.name
            errors.append(InputError(f"tensor {name!r} is in both {first} and {path.name}"))
        weights.tensors.setdefault(name, info)
    return set(tensors)


def _check_listing(
    index: Path, shard: str, listed: set[str], held: set[str] | None, errors: list[InputError]
) -> None:
    """The index and the shard name the same tensors."""
    if held is None or listed == held:
        return
    for names, what in (
        (listed - held, f"lists tensors that {shard} does not hold"),
        (held - listed, f"does not list tensors that {shard} holds"),
    ):
        if names:
            errors.append(
                InputError(f"{index} {what}", got=some(names), do="Download both files again.")
            )


def some(names: set[str] | list[str], *, limit: int = 3) -> str:
    """The first few of many names, and how many there are."""
    first = ", ".join(sorted(names)[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"
