"""Sides that tests/test_benchmarks.py lets take turns: what they do is known."""

import os
import subprocess
import sys
import time
from pathlib import Path


def note(path, word):
    calls = 0

    def work():
        nonlocal calls
        calls += 1
        with Path(path).open("a") as file:
            print(word, file=file)
        return {"calls": calls}

    return work


def hold(mb, seconds):
    def work():
        held = bytearray(mb * 2**20)
        held[::4096] = b"x" * len(held[::4096])  # so that it is resident
        time.sleep(seconds)

    return work


def child_holds(mb):
    code = f"held = b'x' * {mb * 2**20}; import time; time.sleep(1.2)"
    return lambda: subprocess.run([sys.executable, "-c", code], check=True) and None


def missing():
    import no_such_peer  # noqa: F401


def broken():
    raise ValueError("what went wrong")


def mark_and_wait(path):
    def work():
        Path(path).write_text(str(os.getpid()))
        time.sleep(600)

    return work
