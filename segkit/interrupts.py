"""Ctrl-C and the stop button of a notebook, held back where something must become whole first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupts:
    """Within `with`, an interrupt is noted (`asked`) instead of raised: always, or only inside of `held()`.

    Where it is not always held, a second interrupt acts at once.
    """

    def __init__(self, always: bool = False):
        self.always, self.holding, self.asked = always, always, False

    def __enter__(self) -> Interrupts:
        # only the main thread may; elsewhere nobody can interrupt either
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold interrupts back in the block; who runs it looks at `asked` where everything is whole."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = self.always

    def _note(self, *_: object) -> None:
        if not self.holding or (self.asked and not self.always):
            raise KeyboardInterrupt
        self.asked = True
