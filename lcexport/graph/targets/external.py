"""Weights beside the graph: byte ranges of regular files in the bundle, and whole."""

import stat
from collections.abc import Iterator
from pathlib import Path, PurePath

import onnx_ir as ir

RULE = "external-data"


def external_faults(graph: ir.Graph) -> Iterator[tuple[str, str, str]]:
    """(initialiser, rule, reason) of each initialiser that cannot be read from the bundle."""
    files: dict[tuple[str, str], int | str] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        key = (str(tensor.base_dir), str(tensor.location))
        if key not in files:
            files[key] = size_or_fault(*key)
        size = files[key]
        reason = size if isinstance(size, str) else range_fault(tensor, size)
        if reason:
            yield name, RULE, reason


def size_or_fault(base: str, location: str) -> int | str:
    """Bytes of the file, or why it may not be read."""
    parts = PurePath(location).parts
    if not parts or PurePath(location).is_absolute() or ".." in parts:
        return f"its data are outside the bundle: {location!r}"
    path = Path(base)
    try:
        for part in parts:
            path = path / part
            if path.is_symlink():
                return f"its data are behind a link: {location}"
        status = path.stat()
    except OSError as error:
        return f"its data cannot be read: {location}: {error.strerror}"
    return status.st_size if stat.S_ISREG(status.st_mode) else f"{location} is not a file"


def range_fault(tensor: ir.ExternalTensor, size: int) -> str | None:
    """What is wrong with a tensor's byte range of a file of `size` bytes."""
    if tensor.offset is None or tensor.length is None:
        return "its byte range is not given"
    if tensor.length != tensor.nbytes:
        return f"its range has {tensor.length} bytes, the tensor {tensor.nbytes}"
    if tensor.offset < 0 or tensor.offset + tensor.length > size:
        return f"its bytes end after {tensor.location}: {tensor.offset} + {tensor.length} > {size}"
    return None
