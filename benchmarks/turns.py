"""Sides that do the same work in turns, each in a process of its own: medians of their seconds, peaks of their memory.

In turns, so that whatever else the machine does meets all sides alike. In processes, so that each side has its own
environment, and memory that is the side's alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.sides import FAILED, ROOT, Side, Taken

LOOK_SECONDS = 0.25
"""How often the memory of a side that is at work is looked at."""


@dataclass(frozen=True)
class Limits:
    """When a side is stopped: above so much memory (MiB), after so many seconds of one round."""

    mb: float = field(default_factory=lambda: psutil.virtual_memory().available * 0.92 / 2**20)
    seconds: float = 3600.0


def take_turns(
    sides: Sequence[Side],
    rounds: int,
    peers: str,
    logs: Path,
    threads: int | None = None,
    limits: Limits | None = None,
) -> dict[str, Taken]:
    """Each side's work, `rounds` times in turns after a round that warms up.

    peers: the interpreter of the peers' environment. logs: a folder for what they print. A side that is not installed,
    stops or goes beyond `limits` is a Taken with its problem, and the others go on.
    """
    limits = limits or Limits()
    taken = {side.name: Taken() for side in sides}
    workers = {}
    try:
        for side in sides:
            python = peers if side.kind == "peer" and not side.at_home else sys.executable
            workers[side.name] = _Worker(side, python, logs, threads, taken[side.name])
            workers[side.name].answer(limits)
        for turn in range(rounds + 1):
            for side in sides:
                first, last = (1, side.rounds or rounds) if not side.cold else (0, (side.rounds or rounds) - 1)
                if turn <= last:
                    workers[side.name].turn(limits, counts=turn >= first)
    finally:
        for worker in workers.values():
            worker.stop()
    return taken


class _Worker:
    def __init__(self, side: Side, python: str, logs: Path, threads: int | None, taken: Taken):
        self.taken = taken
        logs.mkdir(parents=True, exist_ok=True)
        name = "".join(letter if letter.isalnum() else "_" for letter in f"{side.make} {side.name}")
        self.log = (logs / f"{name}.log").open("a", encoding="utf-8")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1"}
        if threads:
            environment |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", side.make, json.dumps(side.parameters)],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            start_new_session=True, text=True, bufsize=1,
        )  # fmt: skip

    def turn(self, limits: Limits, counts: bool) -> None:
        if self.taken.problem:
            return
        try:
            print("go", file=self.process.stdin, flush=True)
        except OSError:
            self.taken.problem = f"{FAILED}its process ended"
            return
        answer = self.answer(limits)
        if "seconds" in answer:
            if counts:
                self.taken.seconds.append(answer["seconds"])
            self.taken.found, self.taken.device_mb = answer["found"], answer["device_mb"]
            self.taken.peak_mb = max(self.taken.peak_mb or 0, answer["peak_mb"] or 0) or None

    def answer(self, limits: Limits) -> dict:
        """The next line of the worker, {} if none comes; memory and time are watched meanwhile."""
        started = time.monotonic()
        while not select.select([self.process.stdout], [], [], LOOK_SECONDS)[0]:
            used = tree_mb(self.process.pid)
            self.taken.peak_mb = max(self.taken.peak_mb or 0, round(used))
            if used > limits.mb:
                return self._give_up(f"stopped: needs more than {limits.mb / 1024:.0f} GiB, which this machine lacks")
            if time.monotonic() - started > limits.seconds:
                return self._give_up(f"stopped after {limits.seconds:.0f} s without an end")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"problem": f"{FAILED}its process was ended from outside"}
        self.taken.problem = answer.get("problem", "")
        return answer

    def _give_up(self, problem: str) -> dict:
        self.taken.problem = problem
        self.stop()
        return {}

    def stop(self) -> None:
        """End the process with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()


def tree_mb(pid: int) -> float:
    """Resident memory of a process and all that it started, MiB; files that the latter share are left out."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:  # it ended meanwhile
        return 0.0
    total = 0
    for process in processes:
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        total += memory.rss - (0 if process.pid == pid else getattr(memory, "shared", 0))
    return total / 2**20
