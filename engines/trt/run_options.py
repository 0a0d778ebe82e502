"""How an engine is run, and the memory that its streamed weights may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lcexport.configs.errors import ResourceError, UsageError
from lcexport.engines.trt.memory import gib

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT


@dataclass(frozen=True)
class RunOptions:
    """How an engine is run.

    Attributes:
        weight_budget: bytes of streamable weights that may stay on the device, over all
            plans; "auto" lets TensorRT choose, for one plan: see `set_weight_budget`; None keeps
            them all there.
        cuda_graph: record the work the second time the same tensors come, then replay it; while
            it is recorded the host waits for the device.
        weights: refit every plan from these before the first run; stripped plans need it.
    """

    weight_budget: int | Literal["auto"] | None = None
    cuda_graph: bool = False
    weights: Mapping[str, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight_budget, int) and self.weight_budget < 0:
            raise UsageError("the weight budget is negative", got=self.weight_budget)
        if self.cuda_graph and self.weight_budget is not None:
            raise UsageError(
                "a CUDA graph and a weight budget exclude each other",
                do="No CUDA graph is recorded of an engine with a weight budget: leave one out.",
            )


def set_weight_budget(engines: Sequence[TensorRT.ICudaEngine], options: RunOptions) -> None:
    """Share the budget out in proportion to the segments' weights.

    What TensorRT chooses is an answer for one plan, "based on available device memory" by its
    documentation; we read it as if the others did not exist. The largest answer is therefore the
    budget of them all. With several plans that may be less than there is room for, which only a
    number of bytes can use. No engine was asked.

    Raises:
        UsageError: the plans were built without weight streaming.
        ResourceError: TensorRT did not take the budget.
    """
    if options.weight_budget is None:
        return  # the default: everything stays on the device
    sizes = [engine.streamable_weights_size for engine in engines]
    if not sum(sizes):
        raise UsageError(
            "the plans cannot stream weights",
            got=f"a weight budget of {options.weight_budget}",
            do="Build them with weight streaming.",
        )
    total = options.weight_budget
    if total == "auto":
        total = max(engine.get_weight_streaming_automatic_budget() for engine in engines)
    for engine, size in zip(engines, sizes, strict=True):
        if not size:
            continue
        budget = min(size, total * size // sum(sizes))
        engine.weight_streaming_budget_v2 = budget
        if engine.weight_streaming_budget_v2 != budget:  # the setter does not say
            raise ResourceError(
                "TensorRT did not take the weight-streaming budget",
                got=gib(engine.weight_streaming_budget_v2),
                wanted=gib(budget),
            )
