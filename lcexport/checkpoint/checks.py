"""Compare the tensors found with the tensors the configuration calls for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lcexport.checkpoint.header import TensorInfo
from lcexport.checkpoint.names import Naming, depth_of, expected_tensors
from lcexport.checkpoint.shards import some
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError

if TYPE_CHECKING:
    from lcexport.checkpoint.layout import Checkpoint

WEIGHT_DTYPES = ("F32", "BF16", "F16")
CONTRADICTION = "config.json contradicts the weights"


def check_tensors(checkpoint: "Checkpoint") -> None:
    """Require exactly the tensors, shapes and dtypes of the configuration's DiT.

    Raises:
        InputError: what is missing, extra, wrongly shaped or of an unsupported dtype.
    """
    errors = problems(checkpoint)
    if len(errors) > 1:
        raise InputError(
            "; ".join(errors),
            do=f"`lcexport validate {checkpoint.folder}` lists everything.",
        )
    if errors:
        raise InputError(errors[0])


def problems(checkpoint: "Checkpoint") -> list[str]:
    """All that is wrong with the names, shapes and dtypes; empty when nothing is."""
    return tensor_problems(checkpoint.config, checkpoint.naming, checkpoint.tensors)


def tensor_problems(
    config: DiTConfig, naming: Naming, tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """`problems` for tensors that are not in a Checkpoint: one sentence per kind of problem."""
    found = []
    depth = depth_of(list(tensors))
    if depth != config.depth:
        found.append(f"{CONTRADICTION}: it says {config.depth} blocks, the weights hold {depth}")
    # A claim of a billion blocks must not cost memory, nor a line per tensor of each
    shared = min(config.depth, depth, len(tensors))
    comparable = config.model_copy(update={"depth": max(shared, 1)})
    expected = expected_tensors(comparable, naming)
    present = {name for name in tensors if depth_of([name]) <= comparable.depth}
    found += _name_problems(set(expected), present)
    found += _shape_problems(expected, tensors)
    return found + _dtype_problems(tensors)


def _name_problems(expected: set[str], present: set[str]) -> list[str]:
    missing, extra = expected - present, present - expected
    found = []
    if missing:
        found.append(f"{_tensors(len(missing))} missing: {some(missing)}")
    if extra:
        found.append(f"{_tensors(len(extra))} not LongCat-Video's: {some(extra)}")
    return found


def _shape_problems(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    wrong = [
        f"{name} (got {list(tensors[name].shape)}, wanted {list(shape)})"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if not wrong:
        return []
    return [f"{CONTRADICTION}: {_tensors(len(wrong))} of another shape: {some(wrong)}"]


def _dtype_problems(tensors: Mapping[str, TensorInfo]) -> list[str]:
    wrong = [f"{t.name} ({t.dtype})" for t in tensors.values() if t.dtype not in WEIGHT_DTYPES]
    if not wrong:
        return []
    wanted = ", ".join(WEIGHT_DTYPES)
    return [f"{_tensors(len(wrong))} of an unsupported dtype: {some(wrong)}; wanted {wanted}"]


def _tensors(count: int) -> str:
    return f"{count} tensor is" if count == 1 else f"{count} tensors are"
