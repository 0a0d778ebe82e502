"""How far a compiler is, and how it is stopped.

TensorRT calls back into Python from C++, which swallows exceptions: what a callback raises is kept
here, and raised by whoever started the compiler when it has returned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcexport.configs.errors import Cancelled
from lcexport.engines.trt.product import Product

if TYPE_CHECKING:
    from lcexport.engines.trt.product import TensorRT

OnProgress = Callable[[float, str], None]
Cancel = Callable[[], bool]

SMALLEST_STEP = 0.001  # of the whole; smaller progress is not reported


@dataclass
class Phase:
    """One running phase of the builder."""

    name: str
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """The builder's nested phases as one rising fraction, and the way to stop it.

    A step of a phase is worth an equal part of it; a phase inside it fills its present step.
    """

    def __init__(self, on_progress: OnProgress | None, cancel: Cancel | None) -> None:
        self.stopped: BaseException | None = None
        self._on_progress = on_progress or (lambda fraction, phase: None)
        self._cancel = cancel or (lambda: False)
        self._phases: dict[str, Phase] = {}
        self._reported = (-1.0, "")
        self._lock = threading.RLock()  # phases may run, and report, on several threads

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = Phase(name, parent, max(steps, 1))
            self._report(name)

    def step(self, name: str, done: int) -> bool:
        """False where the build must stop."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = done + 1
            self._report(name)
            return self.stopped is None

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def _report(self, name: str) -> None:
        try:
            if self.stopped is None and self._cancel():
                self.stopped = Cancelled("the build was cancelled")
            fraction = max(self._fraction(name), self._reported[0], 0.0)
            if fraction - self._reported[0] >= SMALLEST_STEP or name != self._reported[1]:
                self._reported = (fraction, name)
                self._on_progress(fraction, name)
        except BaseException as error:  # C++ would swallow it
            self.stopped = self.stopped or error

    def _fraction(self, name: str) -> float:
        fraction, phase = 0.0, self._phases.get(name)
        while phase is not None:
            fraction = min((phase.done + fraction) / phase.steps, 1.0)
            phase = self._phases.get(phase.parent) if phase.parent else None
        return fraction


def monitor_for(product: Product, progress: Progress) -> TensorRT.IProgressMonitor:
    """A TensorRT progress monitor over `progress`."""
    trt = product.trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
