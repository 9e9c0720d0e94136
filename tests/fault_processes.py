"""Processes to kill, to starve and to race: one that has segkit loaded forks a child for each try.

A child costs a fork instead of seconds of imports, so that many moments can be tried. What it runs is a function of a
test module, with arguments that JSON holds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import pytest

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, or -9 where it was killed, what it printed, how long it took, how many changes."""

    code: int
    out: str
    err: str
    seconds: float
    changes: int  # of files, counted as `kill_before` does; 0 where it was killed

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Forks:
    """`with Forks(folder) as forks: forks.run("test_x:function", ...)`; children work in `folder`."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=folder,
        )  # fmt: skip

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def start(
        self,
        function: str,
        *arguments: object,
        kill_after: float | None = None,  # seconds
        kill_before: int | None = None,  # the change of a file, from 1
        largest_file: int | None = None,  # bytes that a file may have: a disk without room for more
    ) -> None:
        """Let a child run `function`; `wait` for it before the next one."""
        job = {"function": function, "arguments": [str(a) if isinstance(a, Path) else a for a in arguments],
               "kill_after": kill_after, "kill_before": kill_before, "largest_file": largest_file}  # fmt: skip
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.child = int(self.process.stdout.readline())

    def kill(self) -> None:
        """Kill what `start` began; `wait` then says so."""
        os.kill(self.child, signal.SIGKILL)

    def wait(self) -> Ended:
        return Ended(**json.loads(self.process.stdout.readline()))

    def run(self, function: str, *arguments: object, **how: object) -> Ended:
        self.start(function, *arguments, **how)
        return self.wait()


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    """A process that forks; `second` is another one, for what runs beside it."""
    yield from _started(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="session")
def second(tmp_path_factory):
    yield from _started(tmp_path_factory.mktemp("second"))


def _started(folder: Path) -> Iterator[Forks]:
    if sys.platform != "linux":
        pytest.skip("forks, limits and pipes of Linux")
    with Forks(folder) as forks:
        yield forks


def shell(*arguments: str) -> None:
    """`python -m segkit ...`, as a function."""
    from segkit.__main__ import main

    sys.argv = ["segkit", *map(str, arguments)]
    main()


def _serve() -> None:
    import segkit.__main__
    import segkit.predicting
    import segkit.report
    import segkit.training  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        import_module(job["function"].split(":")[0])  # once, for this child and those to come
        started = time.perf_counter()
        pipes = [_pipe() for _ in range(3)]
        child = os.fork()
        if not child:
            _child(job, *(into for _, into in pipes))
        print(child, flush=True)
        status = None
        while job["kill_after"] is not None and status is None:
            if time.perf_counter() - started >= job["kill_after"]:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.0005)
            done, found = os.waitpid(child, os.WNOHANG)
            status = found if done else None
        if status is None:
            _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - started
        out, err, changes = (_drained(*pipe) for pipe in pipes)
        ended = Ended(os.waitstatus_to_exitcode(status), out, err, seconds, int(changes or 0))
        print(json.dumps(asdict(ended)), flush=True)


def _pipe() -> tuple[int, int]:
    """What a child prints goes into a pipe: a file would be too large where files have no room."""
    out_of, into = os.pipe()
    import fcntl

    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 1 << 20)
    return out_of, into


def _drained(out_of: int, into: int) -> str:
    os.close(into)
    os.set_blocking(out_of, False)  # a child of the child may still have the other end
    with open(out_of, "rb") as file:
        return (file.read() or b"").decode()


def _child(job: dict, out: int, err: int, result: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    seen, code = 0, 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in CHANGES:
            return
        seen += 1
        if seen == job["kill_before"]:
            os.kill(os.getpid(), signal.SIGKILL)

    if job["largest_file"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], resource.RLIM_INFINITY))
    try:
        module, name = job["function"].split(":")
        run = getattr(import_module(module), name)
        sys.addaudithook(count)
        run(*job["arguments"])
    except SystemExit as error:  # as Python itself ends with it
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001, as Python itself ends
        traceback.print_exc()
        code = 1
    os.write(result, str(seen).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def files_of(folder: Path, hidden: bool = False) -> dict[str, bytes]:
    """Every file below a folder by its path; hidden ones, and those in hidden folders, only where asked for."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if hidden or not any(part.startswith(".") for part in name.split("/"))
    }


def left_over(folder: Path) -> list[str]:
    """Hidden files and folders but locks: what may be there while a process runs, and not after the next one."""
    return sorted(path.name for path in folder.rglob(".*") if path.name != ".lock" and path.suffix != ".lock")


if __name__ == "__main__":
    _serve()
