"""What stands around the weights in a checkpoint folder: configurations and copied components."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lcexport.checkpoint.header import strict_json
from lcexport.checkpoint.names import Naming
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError
from lcexport.engines.files import resource_errors, sync_folder, write_bytes

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


def copy_folder(source: Path, target: Path) -> int:
    """Copy a folder's files; links are followed, since a download cache is made of links.

    Returns:
        the bytes copied.

    Raises:
        InputError: something in the source cannot be read or is not a file.
        ResourceError: the disk is full.
    """
    copied = 0
    for folder, _, names in os.walk(source, followlinks=True, onerror=_unreadable):
        into = target / Path(folder).relative_to(source)
        with resource_errors(into):
            into.mkdir()
        for name in sorted(names):
            copied += _copy_file(Path(folder) / name, into / name)
        sync_folder(into)
    return copied


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below, links followed; what cannot be seen counts nothing."""
    paths = (Path(top) / name for top, _, names in os.walk(folder, followlinks=True)
             for name in names)  # fmt: skip
    return sum(path.stat().st_size for path in paths if path.is_file())


def _copy_file(source: Path, target: Path) -> int:
    if not source.is_file():  # a broken link, a socket
        raise InputError(f"{source} cannot be copied: it is no file", do="Download it again.")
    try:
        reader = source.open("rb")
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error
    with reader, resource_errors(target), target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 8 << 20)
        writer.flush()
        os.fsync(writer.fileno())
        return writer.tell()


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
