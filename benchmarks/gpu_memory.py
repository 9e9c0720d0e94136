"""A command of Python that says at its end what it held on the GPU: python -m benchmarks.gpu_memory FILE WHAT ...

WHAT is a module, run as by `python -m`, or the path of a script. MiB that torch had allocated at most go into FILE.
Needs nothing but torch: the peers' environment runs it, too.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main() -> None:
    file, what, *arguments = sys.argv[1:]
    sys.argv = [what, *arguments]
    try:
        if Path(what).is_file():
            runpy.run_path(what, run_name="__main__")
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    finally:
        import torch

        if torch.cuda.is_initialized():
            Path(file).write_text(str(torch.cuda.max_memory_allocated() // 2**20))


def watched(command: Sequence[str], device: str, file: Path) -> tuple[list[str], Callable[[], dict]]:
    """A command of Python (interpreter, then script or `-m` and module) that is watched where `device` is a GPU.

    And what to call after it for what it held: {"device_mb": MiB}, {} without a GPU.
    """
    if not device.startswith("cuda"):
        return list(command), dict
    python, *rest = command
    rest = rest[1:] if rest[0] == "-m" else rest
    file.unlink(missing_ok=True)
    wrapped = [python, "-m", "benchmarks.gpu_memory", str(file), *rest]
    return wrapped, lambda: {"device_mb": int(file.read_text())} if file.is_file() else {}


if __name__ == "__main__":
    main()
