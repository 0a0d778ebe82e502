"""The safetensors header, read and checked before a byte of the data is touched.

A downloaded file is untrusted and often cut short, so everything the format promises is checked
here: sizes, names, types, and that the tensors tile the data without gap or overlap. What comes
out may be read by offset without further care. Offsets are bytes from the start of the file.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcexport.configs.errors import InputError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
MAX_RANK = 16
MAX_SIZE = 2**63 - 1  # a dimension or an offset beyond this is no real file's
LENGTH_BYTES = 8  # the header's length, little endian, opens the file

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

DOWNLOAD_AGAIN = "Download the file again."


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: the bytes `start:end` of the file `path`.

    `dtype` is the safetensors name: "F32", "BF16", "F16", ...
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes of the data."""
        return self.end - self.start

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A file's tensors in the order of their bytes, and its free-form metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def read_header(path: str | Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        InputError: the file is missing, cut short, or is not a safetensors file in some way;
            the message names the file and, where it is about one, the tensor.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            raw = file.read(LENGTH_BYTES)
            header_bytes = _header_bytes(path, raw, file_bytes)
            text = file.read(header_bytes)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", do=DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    entries = _entries(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    data_start = LENGTH_BYTES + header_bytes
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_tiling(path, tensors, data_start, file_bytes)
    return Header(path, {t.name: t for t in tensors}, metadata, data_start, file_bytes)


def strict_json(text: bytes, *, max_objects: int = MAX_TENSORS + 2) -> Any:
    """Parse JSON that comes from outside: no key twice, no endless nesting, no flood of objects.

    Raises:
        ValueError: it is not JSON, or breaks one of these rules.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_pairs_hook(max_objects))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _pairs_hook(max_objects: int) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    seen = 0

    def pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        if seen > max_objects:  # here, not afterwards: the memory is spent while parsing
            raise ValueError(f"it has more than {max_objects} objects")
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in result if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} is there twice")
        return result

    return pairs_to_dict


def _header_bytes(path: Path, raw: bytes, file_bytes: int) -> int:
    if len(raw) < LENGTH_BYTES:
        raise InputError(
            f"{path} is truncated or no safetensors file", got=f"{file_bytes} bytes",
            wanted="at least 8", do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    header_bytes = int.from_bytes(raw, "little")
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise InputError(
            f"{path} is no safetensors file: its header length is out of range",
            got=header_bytes, wanted=f"2..{MAX_HEADER_BYTES} bytes", do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    if LENGTH_BYTES + header_bytes > file_bytes:
        raise InputError(
            f"{path} is truncated within its header", got=f"{file_bytes} bytes",
            wanted=f"at least {LENGTH_BYTES + header_bytes}", do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    return header_bytes


def _entries(path: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = strict_json(text)
    except ValueError as error:
        raise InputError(f"{path}: the header is not usable JSON: {error}") from error
    if not text.startswith(b"{") or not isinstance(entries, dict):
        raise InputError(f"{path}: the header is not a JSON object")
    if len(entries) > MAX_TENSORS:
        raise InputError(f"{path} has too many tensors", got=len(entries), wanted=MAX_TENSORS)
    return entries


def _metadata(path: Path, entry: Any) -> dict[str, str]:
    if isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values()):
        return entry
    raise InputError(f"{path}: the header's __metadata__ is not a map from text to text")


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: the entry is not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{where}: unknown dtype", got=repr(dtype)[:80])
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise InputError(f"{where}: the shape is not a list of sizes", got=repr(shape)[:80])
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: data_offsets are not [begin, end]", got=repr(offsets)[:80])
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise InputError(
            f"{where}: the data is not as long as dtype and shape say",
            got=f"{offsets[1] - offsets[0]} bytes", wanted=f"{needed} for {dtype} {shape}",
        )  # fmt: skip
    start, end = (data_start + offset for offset in offsets)
    return TensorInfo(path, name, dtype, tuple(shape), start, end)


def _are_sizes(values: Any) -> bool:
    # type(), not isinstance(): JSON's true is a Python int too
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= MAX_SIZE for value in values
    )


def _check_tiling(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the one before it" if tensor.start < position else "follows a gap"
            raise InputError(
                f"{path}: tensor {tensor.name!r} {kind}", got=f"byte {tensor.start}",
                wanted=f"byte {position}",
            )  # fmt: skip
        position = tensor.end
    if file_bytes < position:
        cut = next(tensor for tensor in tensors if tensor.end > file_bytes)
        raise InputError(
            f"{path} is truncated: it ends within or before tensor {cut.name!r}",
            got=f"{file_bytes} bytes", wanted=position, do=DOWNLOAD_AGAIN,
        )  # fmt: skip
    if file_bytes > position:
        raise InputError(
            f"{path} goes on after its last tensor", got=f"{file_bytes} bytes", wanted=position,
            do=DOWNLOAD_AGAIN,
        )  # fmt: skip
