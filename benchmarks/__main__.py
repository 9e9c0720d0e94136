"""segkit beside its peers: python -m benchmarks [--quick] [--only NAME ...], what `make bench` runs.

Every table is kept in the work folder when it is done: a run that was interrupted goes on with what is missing. Other
sizes, threads, versions, code of segkit or of a table measure it anew; `--fresh` measures everything anew.
"""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from benchmarks import (
    chart,
    epoch,
    fetching,
    growth,
    machine,
    meshing,
    page,
    predicting,
    quality,
    scoring,
    staging,
    starting,
    training_step,
)  # fmt: skip
from benchmarks.bench import QUICK, Bench, Sizes
from benchmarks.sides import ROOT
from benchmarks.tables import Table, code_of
from segkit.devices import pick_device
from segkit.runs import write_whole


@dataclass(frozen=True)
class Work:
    """A table of the page: what measures it, in which module.

    kept: whether its result is kept, or made each time of the others (None while one is missing).
    """

    name: str
    measure: Callable[[], Table | None]
    source: Path
    kept: bool = True

    @classmethod
    def of(cls, name: str, measure: Callable, *arguments: object) -> Work:
        return cls(name, lambda: measure(*arguments), Path(inspect.getsourcefile(measure)).resolve())


def works(bench: Bench) -> list[Work]:
    """All of them, in the order of the page; the projection builds on those before it."""
    sizes = bench.sizes
    steps = [Work.of(f"step_{size[0]}", training_step.measure, bench, size) for size in sizes.steps]
    scans = [Work.of(predicting.name_of(shape), predicting.measure, bench, shape) for shape in sizes.scans]
    of_quality = ("torso", "phantoms") if sizes.whole else ("torso",)
    return [
        Work.of("staging", staging.measure, bench),
        Work.of("fetching", fetching.measure, bench),
        *steps,
        Work.of("epoch", epoch.measure, bench),
        *scans,
        Work.of("scoring", scoring.measure, bench),
        Work.of("meshing", meshing.measure, bench),
        Work.of("starting", starting.measure, bench),
        *(Work.of(f"quality_{name}", quality.measure, bench, name) for name in of_quality),
        Work.of("growth", growth.measure, bench),
        replace(Work.of("projection", growth.project, bench), kept=False),
        *([Work.of("demo", starting.demo, bench)] if sizes.whole else []),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, trainings of seconds: 5 minutes")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="measure these alone; without a name none")
    parser.add_argument("--fresh", action="store_true", help="measure anew what the work folder holds")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmarks", help="data and results")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python",
                        help="interpreter of the peers' environment")  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page; its figure beside")
    chosen = parser.parse_args()
    bench = open_bench(chosen)
    run = {
        "quick": bench.quick,
        "date": f"{date.today():%Y-%m-%d}",
        "command": "make bench QUICK=1" if bench.quick else "make bench",
    }
    if chosen.fresh:
        shutil.rmtree(bench.work / "results", ignore_errors=True)
    described = bench.store.once("machine", lambda: machine.describe(bench.threads, bench.device, bench.peers))
    described["git"] = machine.commit()  # a run that goes on may do so at a later one that changes nothing measured
    wanted = works(bench)
    usual = [work.name for work in wanted if not (bench.quick and work.name.startswith("quality"))]
    tables, failed = measure_all(bench, wanted, usual if chosen.only is None else chosen.only)
    there = {table.name for table in tables} | failed.keys()
    run["left_out"] = [] if bench.quick else [work.name for work in wanted if work.name not in there]
    publish(chosen.out, tables, failed, described, run)


def open_bench(chosen: argparse.Namespace, sizes: Sizes | None = None) -> Bench:
    """The run that the command line asks for; threads are set for this process and what it starts."""
    import torch

    torch.set_num_threads(chosen.threads)
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    sizes = sizes or (QUICK if chosen.quick else Sizes())
    if not chosen.peers.is_file():
        print(f"no {chosen.peers}: what is not installed here is left out, and the page says so", file=sys.stderr)
    # not resolved: the link is what makes an interpreter that of its environment
    peers = str(chosen.peers.absolute()) if chosen.peers.is_file() else None
    work = chosen.work.resolve() / ("quick" if chosen.quick else "full")
    # named to every side: nnU-Net's commands would take another one by themselves
    device = getattr(chosen, "device", None) or pick_device().type
    return Bench(work, sizes, peers, chosen.threads, device)


def measure_all(
    bench: Bench, wanted: Sequence[Work], only: Sequence[str] | None = None
) -> tuple[list[Table], dict[str, str]]:
    """The tables of all works that are measured or kept, and why others failed; a work that fails stops no other."""
    unknown = sorted(set(only or ()) - {work.name for work in wanted})
    if unknown:
        sys.exit(f"no table {', '.join(unknown)}: there are {', '.join(work.name for work in wanted)}")
    tables, failed = [], {}
    for work in wanted:
        sources = code_of(work.source)
        if not work.kept:
            tables += filter(None, [work.measure()])
            continue
        if only is not None and work.name not in only:
            kept = bench.store.kept(work.name, sources)
            if kept:
                tables.append(Table.from_json(kept))
            continue
        started = time.monotonic()
        try:
            tables.append(bench.store.table(work.name, work.measure, sources))
        except Exception as error:  # noqa: BLE001 - the others are worth having; it is tried again the next time
            failed[work.name] = f"{type(error).__name__}: {error}"
        print(f"{work.name}: {failed.get(work.name, 'done')}, {time.monotonic() - started:.0f} s", flush=True)
    return tables, failed


def publish(out: Path, tables: Sequence[Table], failed: Mapping[str, str], described: Mapping, run: Mapping) -> None:
    """The page and its figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    chart.draw(tables, out.parent / "images" / "benchmarks.png")
    text = page.render(tables, failed, described, run)
    write_whole(out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(out)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
