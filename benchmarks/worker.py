"""One side of a comparison in a process of its own: python -m benchmarks.worker MODULE:FUNCTION PARAMETERS.

FUNCTION(**PARAMETERS), from JSON, makes the work ready and gives it as a callable. For each line on the standard input
the work is done once, and its seconds, memory and what it returns are answered as a line of JSON. What a side prints
goes to the standard error output.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from benchmarks.sides import FAILED


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        module, function = sys.argv[1].split(":")
        work = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
        print(json.dumps({"ready": True}), file=answers)
        for _ in sys.stdin:
            started = time.perf_counter()
            found = work()
            _wait_for_device()
            seconds = time.perf_counter() - started
            answer = {"seconds": seconds, "found": found if isinstance(found, dict) else {}, "peak_mb": peak_mb()}
            # a command says itself what it held on the GPU
            print(json.dumps({**answer, "device_mb": answer["found"].get("device_mb", device_mb())}), file=answers)
    except ModuleNotFoundError as error:
        print(json.dumps({"problem": f"left out: {error.name} is not installed there"}), file=answers)
    except Exception as error:  # noqa: BLE001 - whatever a side stops with is its result
        traceback.print_exc()
        print(json.dumps({"problem": f"{FAILED}{type(error).__name__}: {error}"[:300]}), file=answers)


def _end_with(parent: int) -> None:
    """End with all that was started when the run that asked for it is gone: nobody waits for the answer."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)  # of a session of its own, see turns.py


def peak_mb() -> int | None:
    """Highest resident memory of this process since its program started, or of one that it waited for, MiB.

    None where Linux does not tell it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    [line] = [line for line in lines if line.startswith("VmHWM")]
    import resource  # not on Windows, which has no /proc either

    return max(int(line.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024


def device_mb() -> int | None:
    """What torch had allocated on the GPU at most, MiB; None where this side uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated() // 2**20


def _wait_for_device() -> None:
    if device_mb() is not None:
        sys.modules["torch"].cuda.synchronize()


if __name__ == "__main__":
    main()
