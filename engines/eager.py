"""A torch module as an engine: the truth the compiled engines are compared with.

The module is handed in; nothing here knows how the DiT is made.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch

from lcexport.configs.errors import UsageError
from lcexport.engines import TensorSpec

Forward = Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]


class EagerEngine:
    """Calls `forward` with the named inputs and stores what it returns. See `Engine`.

    Args:
        forward: gives one tensor per output, in the outputs' order.
    """

    backend = "eager"

    def __init__(
        self,
        forward: Forward,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        device: torch.device,
    ) -> None:
        self._forward: Forward | None = forward
        self.inputs = inputs
        self.outputs = outputs
        self.device = device

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `lcexport.engines.Engine.run`."""
        if self._forward is None:
            raise UsageError("the engine is closed")
        for spec in self.inputs:
            spec.check(inputs[spec.name], self.device)
        for spec in self.outputs:  # copy_ would broadcast and convert in silence
            spec.check(outputs[spec.name], self.device)
        with torch.inference_mode():
            for spec, made in zip(self.outputs, self._forward(inputs), strict=True):
                outputs[spec.name].copy_(made)

    def close(self) -> None:
        """Release the module."""
        self._forward = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
