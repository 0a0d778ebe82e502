"""Where the text encoder and the VAE live while they are not at work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Literal, Protocol, TypeVar, get_args

import torch

from lcexport.configs.errors import UsageError

Offload = Literal["keep", "cpu", "release"]


class Component(Protocol):
    """Something with weights: it can move, and it can be dropped."""

    def to(self, device: torch.device | str) -> object: ...
    def close(self) -> None: ...


C = TypeVar("C", bound=Component)


class Resident(Generic[C]):
    """One component under an offload policy; it may be lent several times at once.

    `keep`: loaded now, stays on the device. `cpu`: loaded now, waits on the CPU. `release`:
    loaded for each use and dropped after it; slowest, least memory.

    Args:
        load: makes the component on the device it is given.
    """

    def __init__(
        self, load: Callable[[torch.device], C], device: torch.device, offload: Offload
    ) -> None:
        self._load, self._device, self._offload = load, device, offload
        home = device if offload == "keep" else torch.device("cpu")
        self._component = None if offload == "release" else load(home)
        self._lent: C | None = None
        self._uses = 0

    @property
    def loaded(self) -> C | None:
        """The component, wherever it is; None where it is loaded for each use and not in use."""
        return self._lent or self._component

    @contextmanager
    def on_device(self) -> Iterator[C]:
        """Lend the component out, on the device; it goes back when its last user is done."""
        component = self.loaded or self._load(self._device)
        self._lent, self._uses = component, self._uses + 1
        try:
            if self._offload == "cpu" and self._uses == 1:
                component.to(self._device)
            yield component
        finally:
            self._uses -= 1
            if not self._uses:
                self._take_back()

    def _take_back(self) -> None:
        component, self._lent = self._lent, None
        if component is None:  # closed meanwhile
            return
        if self._offload == "cpu":
            component.to("cpu")
        if self._offload == "release":
            component.close()
        if self._offload != "keep":
            free_cache(self._device)

    def close(self) -> None:
        """Drop the weights, lent or not. Harmless when called twice."""
        for component in (self._lent, self._component):
            if component is not None:
                component.close()
        self._lent = self._component = None


def check_offload(offload: str) -> None:
    if offload not in get_args(Offload):
        raise UsageError(
            "unknown offload policy",
            got=repr(offload),
            wanted=f"one of {', '.join(get_args(Offload))}",
        )


def free_cache(device: torch.device) -> None:
    """Hand memory that torch holds back but does not use to others, the engine among them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
