"""How long until something happens: imports, the first cell of the notebook, make demo on a fresh clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.sides import ROOT, Side
from benchmarks.tables import Row, Table, rows_of

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment


def measure(bench: Bench) -> Table:
    def side(name: str, code: str, kind: str = "peer") -> Side:
        return Side(name, "benchmarks.starting:python", {"code": code}, kind)

    sides = [
        side("segkit: the first cell of the training notebook, imports included", first_cell(), "segkit"),
        side("segkit: import of what reads and stages data", "import segkit.staging, segkit.audit", "segkit"),
        side("MONAI: `import monai`", "import monai"),
        side("nnU-Net: import of its training", "import nnunetv2.run.run_training"),
        side("Python with torch and pandas imported", "import torch, pandas, matplotlib.pyplot", "floor"),
        side("Python alone", "pass", "floor"),
    ]
    rows = rows_of(sides, bench.turns(sides))
    what = "Seconds of a fresh Python process each; files were read before."
    return Table("starting", "Start", what, rows)


def first_cell() -> str:
    notebook = json.loads((ROOT / "notebooks" / "train_unet.ipynb").read_text(encoding="utf-8"))
    return "".join(next(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"))


def python(code: str) -> Callable[[], None]:
    def work() -> None:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_quiet(), check=False)
        *_, last = ["", *done.stderr.strip().splitlines()]
        if last.startswith("ModuleNotFoundError"):
            raise ModuleNotFoundError(last, name=last.split("'")[1])
        if done.returncode:
            raise RuntimeError(last)

    return work


def _quiet() -> dict[str, str]:
    return {**os.environ, "MPLBACKEND": "Agg"}


def demo(bench: Bench) -> Table:
    """make demo in a fresh clone: installation and all."""
    clone, name = bench.scratch / "clone", "segkit: `make demo` in a fresh clone, installation included"
    shutil.rmtree(clone, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    log, started = clone.with_suffix(".log"), time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = ["make", "demo", f"PYTHON={sys._base_executable}"]
        said = {"stdout": file, "stderr": subprocess.STDOUT}
        code = subprocess.run(command, cwd=clone, env=environment, check=False, **said).returncode
    seconds = time.perf_counter() - started
    shutil.rmtree(clone / ".venv", ignore_errors=True)  # gigabytes; what the demo made stays to be looked at
    if code:
        raise RuntimeError(f"make demo ended with {code}, see {log}")
    summary = next((line.strip() for line in log.read_text().splitlines() if "macro Dice" in line), "")
    what = "Both notebooks on phantoms, from a clone of the last commit to scores and pages."
    return Table("demo", "make demo on a fresh machine", what, [Row(name, "segkit", seconds, notes=summary)])
