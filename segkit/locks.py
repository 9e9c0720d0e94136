"""One process at a time: a lock that the system takes back from a process that ends, however it ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from segkit.errors import SegkitError

POLL_SECONDS = 0.2  # how often who waits looks again


@contextmanager
def alone(lock: Path, taken: str, wait: bool = False) -> Iterator[None]:
    """Keep every other process, and every other thread, out of blocks with the same `lock`, a file in a folder that is.

    Where it is held already: SegkitError that says `taken`, or with `wait` that is printed and waited for. The empty
    file stays: to remove it would let in two of those who wait. Some network file systems have no locks: a warning.
    """
    held = FileLock(lock, fallback_to_soft=False, poll_interval=POLL_SECONDS)  # a soft one would outlive a kill
    try:
        held.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise SegkitError(taken) from None
        print(taken, flush=True)
        held.acquire()
    except OSError as error:
        warnings.warn(f"{lock}: cannot be locked ({error}); start nothing else into this folder", stacklevel=3)
    try:
        yield
    finally:
        held.release()
