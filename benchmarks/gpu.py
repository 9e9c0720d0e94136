"""Training and prediction on a GPU: python -m benchmarks.gpu [--device cuda]. One command; prints a table.

Slices a second, peak memory on the device, and the share of the rate at which it multiplies matrices. Needs torch 2.9
or later with segkit's requirements; peers that are not installed are left out. `--small` shows on any machine, with
`--device cpu`, that it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

from benchmarks import machine, page, predicting, training_step
from benchmarks.__main__ import Work, measure_all, open_bench
from benchmarks.bench import QUICK, Bench, Sizes
from benchmarks.sides import ROOT
from benchmarks.tables import Row, Table

FULL = Sizes(rounds=10, steps=((256, 256), (512, 512)), scans=((512, 512, 280),))
SMALL = replace(QUICK, steps=((64, 64),), scans=((64, 64, 32),), subject=(61, 50, 56), warm_steps=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="measure these tables alone")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmarks" / "gpu")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="a Markdown file for the page; else it is printed")
    chosen = parser.parse_args()
    chosen.quick = chosen.small
    bench = open_bench(chosen, SMALL if chosen.small else FULL)
    described = bench.store.once("machine", lambda: machine.describe(bench.threads, bench.device, bench.peers))
    tables, failed = measure_all(bench, works(bench), chosen.only)
    for table in tables:
        table.rows = [with_rates(table, row) for row in table.rows]
    run = {"date": f"{date.today():%Y-%m-%d}", "command": "python -m benchmarks.gpu", "quick": chosen.small}
    text = "\n".join(
        [f"{run['command']}, {run['date']}\n", *map(page.section, tables), page.machine_section(described)]
    )
    if chosen.out:
        chosen.out.write_text(text, encoding="utf-8")
    print(text)
    if failed:
        sys.exit("\n".join(f"{name}: {why}" for name, why in failed.items()))


def works(bench: Bench) -> list[Work]:
    steps = [Work.of(f"step_{size[0]}", training_step.measure, bench, size) for size in bench.sizes.steps]
    scans = [Work.of(predicting.name_of(shape), predicting.measure, bench, shape) for shape in bench.sizes.scans]
    return [*steps, *scans]


def with_rates(table: Table, row: Row) -> Row:
    """A row with slices a second; its share of the roofline is that of the floor, the arithmetic at the most."""
    if not row.seconds or row.kind == "floor":
        return row
    slices = training_step.BATCH if table.name.startswith("step") else int(table.name.rsplit("_", 1)[1])
    words = [f"{slices / row.seconds:.1f} slices/s"]
    floor = next((other.seconds for other in table.rows if other.kind == "floor" and other.seconds), None)
    if floor and row.kind == "segkit" and "ensemble" not in row.side:  # which computes it once a network
        words.append(f"{floor / row.seconds:.0%} of the roofline")
    return replace(row, notes="; ".join([*words, *filter(None, [row.notes])]))


if __name__ == "__main__":
    main()
