"""What stands around the weights in a checkpoint folder: configurations and copied components."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcexport.checkpoint.layout import whole
from lcexport.checkpoint.names import Naming
from lcexport.checkpoint.reading import TORCH_DTYPES, one_thread, read_chunks
from lcexport.checkpoint.scan import check_finite
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError
from lcexport.engines.disk import LARGE_BYTES, chunks_of, read_ahead
from lcexport.engines.files import new_file, resource_errors, write_bytes
from lcexport.engines.header import read_header, strict_json
from lcexport.engines.manifest import FileRecord

CLASS_NAMES: dict[Naming, str] = {
    "original": "LongCatVideoTransformer3DModel",
    "native": "LongCatTransformer3DModel",
}
# library and class of each component, as FastVideo's loader looks them up
MODEL_INDEX = {
    "tokenizer": ["transformers", "AutoTokenizer"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
INDEX_VERSION = "0.32.0"  # of diffusers, as in FastVideo's own files; it is not compared
NATIVE_ONLY_KEYS = ("num_attention_heads", "attention_head_dim", "num_channels_latents")


def translated_config(path: Path, config: DiTConfig, to: Naming) -> dict[str, Any]:
    """The `config.json` at `path` with the keys and the class name the other naming's code reads.

    Keys without a counterpart (attention kernels, block-sparse parameters) are carried over.
    """
    try:
        content = strict_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    content["_class_name"] = CLASS_NAMES[to]
    for key in ("num_heads", "num_layers", *NATIVE_ONLY_KEYS):
        content.pop(key, None)
    content["depth"] = config.depth
    if to == "original":
        content["num_heads"] = config.num_heads
    else:
        content["num_attention_heads"] = config.num_heads
        content["attention_head_dim"] = config.head_dim
        content["num_channels_latents"] = config.in_channels
    return content


def model_index(components: list[str]) -> dict[str, Any]:
    """FastVideo's `model_index.json` for the components that are there."""
    present = {name: entry for name, entry in MODEL_INDEX.items() if name in components}
    return {
        "_class_name": "LongCatPipeline",
        "_diffusers_version": INDEX_VERSION,
        "workload_type": "video-generation",
        **present,
        "transformer": ["diffusers", CLASS_NAMES["native"]],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file for people and programs."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


@one_thread()
def copy_folder(source: Path, target: Path) -> dict[str, FileRecord]:
    """Copy a component's files, digest them and look for NaN in its weights, all in one pass.

    Links are followed, since a download cache is made of links; hidden files are left behind.

    Returns:
        size and digest by path relative to `target`.

    Raises:
        InputError: something cannot be read, or a weight is NaN or infinite.
        ResourceError: the disk is full.
    """
    records = {}
    for path in component_files(source):
        name = path.relative_to(source)
        with resource_errors(target):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        records[name.as_posix()] = _copy_file(path, target / name)
    return records


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below that `copy_folder` copies."""
    return sum(path.stat().st_size for path in component_files(folder))


def component_files(folder: Path) -> list[Path]:
    """Every file below, links followed; hidden ones are a download's own notes and left out.

    Raises:
        InputError: a link leads nowhere, or something is neither file nor folder.
    """
    files = []
    for top, folders, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in sorted(Path(top) / name for name in names if not name.startswith(".")):
            if path.is_symlink() and not path.exists():
                raise InputError(f"{path} is a link to nothing", do="Download it again.")
            if not path.is_file():  # a socket, a pipe
                raise InputError(f"{path} cannot be copied: it is no file", do="Remove it.")
            files.append(path)
    return files


def _copy_file(source: Path, target: Path) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with new_file(target, large=source.stat().st_size >= LARGE_BYTES) as writer:
        for data in _content(source):
            digest.update(data)
            size += writer.write(data)
    shutil.copymode(source, target)
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def _content(path: Path) -> Iterator[bytes | memoryview]:
    """A file's bytes in order, each valid until the next; weights are looked at on the way."""
    weights = read_header(path) if path.suffix == ".safetensors" else None
    try:
        if weights is None:
            yield from read_ahead(chunks_of(path))
            return
        with path.open("rb") as file:
            yield file.read(weights.data_start)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    # The header was checked: the tensors tile the rest of the file without a gap.
    for chunk in read_chunks(map(whole, weights.tensors.values())):
        if len(chunk.data) and chunk.source.dtype in TORCH_DTYPES:
            check_finite(chunk.values(), chunk.source, TORCH_DTYPES[chunk.source.dtype])
        yield chunk.data


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
