"""Compare the tensors found with the tensors the configuration calls for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lcexport.checkpoint.int8 import DTYPES, stored_tensors
from lcexport.checkpoint.names import Naming, depth_of
from lcexport.checkpoint.shards import some
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError
from lcexport.engines.header import TensorInfo

if TYPE_CHECKING:
    from lcexport.checkpoint.layout import Checkpoint

WEIGHT_DTYPES = ("F32", "BF16", "F16")
CONTRADICTION = "config.json contradicts the weights"


def check_tensors(checkpoint: "Checkpoint") -> None:
    """Require exactly the tensors, shapes and dtypes of the configuration's DiT.

    Raises:
        InputError: what is missing, extra, wrongly shaped or of an unsupported dtype.
    """
    if errors := problems(checkpoint):
        raise InputError(
            f"{checkpoint.dit_folder}: {'; '.join(errors)}",
            do="Download these files and config.json again; "
            f"`lcexport validate {checkpoint.folder}` lists everything.",
        )


def problems(checkpoint: "Checkpoint") -> list[str]:
    """All that is wrong with the names, shapes and dtypes; empty when nothing is."""
    return tensor_problems(
        checkpoint.dit_folder, checkpoint.config, checkpoint.naming, checkpoint.tensors
    )


def tensor_problems(
    folder: Path, config: DiTConfig, naming: Naming, tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """`problems` for tensors that are not in a Checkpoint: one sentence per kind of problem."""
    found = []
    depth = depth_of(list(tensors))
    if depth != config.depth:
        found.append(f"{CONTRADICTION}: it says {config.depth} blocks, the weights hold {depth}")
    # A claim of a billion blocks must not cost memory, nor a line per tensor of each
    shared = min(config.depth, depth, len(tensors))
    comparable = config.model_copy(update={"depth": max(shared, 1)})
    expected = stored_tensors(comparable, naming, tensors)
    present = {name for name in tensors if depth_of([name]) <= comparable.depth}
    found += missing_problems(folder, set(expected) - present)
    found += _extra_problems(tensors[name] for name in present - set(expected))
    found += shape_problems(expected, tensors)
    found += dtype_problems({name: tensors[name] for name in tensors if not _is_int8(name)})
    return found + _int8_problems(tensors)


def missing_problems(folder: Path, missing: set[str]) -> list[str]:
    """At most one sentence on names that no file of `folder` holds."""
    if not missing:
        return []
    return [f"{_tensors(len(missing))} missing: {some(missing)}, in no file of {folder.name}/"]


def _extra_problems(extra: Iterable[TensorInfo]) -> list[str]:
    found = [f"{info.name} (in {info.path.name})" for info in extra]
    return [f"{_tensors(len(found))} not LongCat-Video's: {some(found)}"] if found else []


def shape_problems(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """At most one sentence on tensors of another shape than expected."""
    wrong = [
        f"{name} (in {tensors[name].path.name}: got {list(tensors[name].shape)}, "
        f"wanted {list(shape)})"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if not wrong:
        return []
    return [f"{CONTRADICTION}: {_tensors(len(wrong))} of another shape: {some(wrong)}"]


def dtype_problems(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """At most one sentence on tensors of a dtype that is not read."""
    wrong = [
        f"{info.name} ({info.dtype}, in {info.path.name})"
        for info in tensors.values()
        if info.dtype not in WEIGHT_DTYPES
    ]
    if not wrong:
        return []
    wanted = ", ".join(WEIGHT_DTYPES)
    return [f"{_tensors(len(wrong))} of an unsupported dtype: {some(wrong)}; wanted {wanted}"]


def _is_int8(name: str) -> bool:
    return name.endswith(tuple(DTYPES))


def _int8_problems(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """At most one sentence on integers that are none, or scales that are no float32."""
    wrong = [
        f"{name} ({info.dtype}, in {info.path.name}; wanted {dtype})"
        for name, info in tensors.items()
        for ending, dtype in DTYPES.items()
        if name.endswith(ending) and info.dtype != dtype
    ]
    return [f"{_tensors(len(wrong))} of another dtype: {some(wrong)}"] if wrong else []


def _tensors(count: int) -> str:
    return f"{count} tensor is" if count == 1 else f"{count} tensors are"
