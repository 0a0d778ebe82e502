"""What the parts of the proof share: a parameter's native name, and the refusal."""

from collections.abc import Iterable

import onnx_ir as ir

from lcexport.configs.errors import BuildError

FLOAT = ir.DataType.FLOAT


def full_name(function: ir.Function, parameter: str) -> str:
    """Native name of a parameter; a block's are those of the first block."""
    prefixes = {"Block": "blocks.0.", "CacheBlock": "blocks.0.", "CacheLast": "blocks.0."}
    return {**prefixes, "Final": "final_layer."}.get(function.name, "") + parameter


def require(holds: bool, what: str, got: object) -> None:
    """Raise BuildError where the policy does not hold."""
    if not holds:
        values: Iterable[object] = got if isinstance(got, list) else [got]
        named = (ir.DataType, ir.Node)
        shown = ", ".join(str(v.name) if isinstance(v, named) else str(v) for v in values)
        raise BuildError(
            f"the graph breaks the precision policy: {what}",
            got=shown,
            do="This is a fault of the exporter, not of the checkpoint: please report it.",
        )
