"""Stopping a generation from another thread."""

import threading

from lcexport.configs.errors import Cancelled


class CancelToken:
    """Set once by any thread; the generation that was given it stops before its next step."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the generation to stop. Harmless when called twice."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled if `cancel` was called."""
        if self.cancelled:
            raise Cancelled("the generation was cancelled")
