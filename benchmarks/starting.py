"""How long until something happens: imports, the first cell of the notebook, make demo on a fresh clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
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
    notes = []
    if bench.quick:
        notes.append("make demo on a fresh clone is left out of the quick form.")
    else:
        rows.append(Row(**bench.store.once("demo", lambda: vars(demo(bench.scratch / "clone")))))
    what = "Seconds of a fresh Python process each; files were read before."
    return Table("starting", "Start", what, rows, notes)


def first_cell() -> str:
    notebook = json.loads((ROOT / "notebooks" / "train_unet.ipynb").read_text(encoding="utf-8"))
    return "".join(next(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"))


def python(code: str) -> Callable[[], None]:
    def work() -> None:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_quiet())
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise (
                ModuleNotFoundError(name=lines[-1].split("'")[1])
                if "ModuleNotFoundError" in lines[-1]
                else (RuntimeError(lines[-1]))
            )

    return work


def _quiet() -> dict[str, str]:
    return {**os.environ, "MPLBACKEND": "Agg"}


def demo(clone: Path) -> Row:
    """make demo in a fresh clone: installation and all."""
    name = "segkit: `make demo` in a fresh clone, installation included"
    shutil.rmtree(clone, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    started = time.perf_counter()
    with open(clone.with_suffix(".log"), "w", encoding="utf-8") as log:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        code = subprocess.run(
            ["make", "demo", f"PYTHON={sys._base_executable}"], cwd=clone, env=environment, stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip
    seconds = time.perf_counter() - started
    summary = next((line for line in clone.with_suffix(".log").read_text().splitlines() if "macro Dice" in line), "")
    shutil.rmtree(clone)
    if code:
        return Row(name, "segkit", notes=f"stopped: make ended with {code}, see {clone.with_suffix('.log').name}")
    return Row(name, "segkit", seconds, notes=summary.strip())
