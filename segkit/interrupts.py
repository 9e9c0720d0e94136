"""Ctrl-C and the stop button of a notebook, held back until a step is whole."""

from __future__ import annotations

import signal
import threading


class Interrupts:
    """Within `with`, an interrupt is noted (`asked`) instead of raised. A second one acts at once where `urgent`."""

    def __init__(self, urgent: bool = True):
        self.urgent = urgent
        self.asked = False

    def __enter__(self) -> Interrupts:
        # only the main thread may; elsewhere nobody can interrupt either
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        if self.asked and self.urgent:
            raise KeyboardInterrupt
        self.asked = True
