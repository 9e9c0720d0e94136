"""Both notebooks on phantoms, headless, with a summary: what `make demo` runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from segkit.errors import SegkitError
from segkit.report import headline
from segkit.runs import make_folder, project_root

NOTEBOOKS = ("train_unet", "segmentation_detection_analysis")


def run_demo(output_dir: Path, training: Mapping[str, object]) -> None:
    """Execute both notebooks into `output_dir`/notebooks and print scores, files and the time of each stage.

    `training`: what the configuration cell of the training notebook gets.

    Raises SegkitError if the notebooks are not there (segkit was installed without them), and as `execute`.
    """
    started = time.time()
    root = project_root()
    output_dir = (root / output_dir).resolve()
    executed = make_folder(output_dir / "notebooks")
    seconds: dict[str, float] = {}
    for name, parameters in zip(NOTEBOOKS, (training, {}), strict=True):
        source = root / "notebooks" / f"{name}.ipynb"
        if not source.is_file():
            raise SegkitError(f"{source} is missing: run the demo from a clone of the project")
        parameters = {"OUTPUT_DIR": str(output_dir), **parameters}
        notebook = execute(source, executed / source.name, parameters)
        seconds |= stage_seconds(notebook)
    print_summary(output_dir, started, seconds)


def execute(source: Path, target: Path, parameters: Mapping) -> dict:
    """Run one notebook through papermill, its printed lines passed on; returns it as JSON.

    Raises SegkitError where papermill is missing, and for a cell that fails: `target` shows it.
    """
    try:
        import papermill  # takes a second to import and is needed nowhere else
    except ImportError as error:
        raise SegkitError("notebooks are run by papermill: pip install 'segkit[notebooks]'") from error

    print(f"\n=== {source.name}", flush=True)
    try:
        papermill.execute_notebook(
            str(source), str(target), dict(parameters), cwd=str(target.parent), kernel_name="python3",
            progress_bar=True, stdout_file=sys.stdout, stderr_file=sys.stderr, request_save_on_cell_execute=False,
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        raise SegkitError(f"{target}: cell {error.exec_count} failed: {error.ename}: {error.evalue}") from error
    return json.loads(target.read_text(encoding="utf-8"))


def stage_seconds(notebook: Mapping) -> dict[str, float]:
    """Seconds of each stage: the cells between two numbered headings, under the heading's words."""
    seconds: dict[str, float] = {}
    stage = "start"
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and text.startswith("## "):
            stage = text.splitlines()[0].removeprefix("## ")
        times = cell["metadata"].get("papermill", {})
        if times.get("duration"):
            seconds[stage] = seconds.get(stage, 0.0) + times["duration"]
    return seconds


def print_summary(output_dir: Path, started: float, seconds: Mapping[str, float]) -> None:
    """Scores on the unseen subjects, the files made since `started`, and where the time went."""
    files = sorted(path for path in output_dir.rglob("[!.]*") if path.is_file() and path.stat().st_mtime >= started)
    made_in = [(path, path.relative_to(output_dir).parts[0]) for path in files]
    own = [path for path, top in made_in if top not in ("staged", "runs") and not top.startswith("phantoms")]
    summary = json.loads(max(output_dir.glob("evaluation_summary_*.json")).read_text(encoding="utf-8"))
    print(f"\n=== demo, finished {datetime.now():%H:%M:%S}")
    print(headline(summary))
    print("\nfiles:")
    for path in own:
        print(f"  {path.relative_to(output_dir.parent)}  ({path.stat().st_size / 2**20:.1f} MiB)")
    print("\ntime of each stage, s:")
    for stage, value in seconds.items():
        if value >= 1:
            print(f"  {value:6.0f}  {stage}")
    print(f"  {time.time() - started:6.0f}  in all")
