"""What was tried against segkit, counted: `make faults` writes the table of docs/reliability.md.

A plain `pytest` runs the same tests with fewer cases. With SEGKIT_FAULTS set to a Markdown file they run with all of
them, and the file's table is written anew, a row a fault, failed ones included.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

TABLE = os.environ.get("SEGKIT_FAULTS")
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
HEAD = "| what was done | times | expected | seen | test |\n|---|---|---|---|---|"


@dataclass
class Fault:
    """A row of the table; `times` and `seen` are filled in by the test, `test` and `failed` by what runs it."""

    done: str
    expected: str
    test: str
    times: int = 0
    seen: str = "as expected"
    failed: bool = True

    def __str__(self) -> str:
        seen = "**FAILED**" if self.failed else self.seen
        cells = (self.done, f"{self.times:,}", self.expected, seen, f"`{self.test}`")
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


ROWS: list[Fault] = []


@pytest.fixture
def fault(request):
    """`fault(done, expected)` begins a row of the table: what was done, and what has to come of it."""
    begun = []

    def begin(done: str, expected: str) -> Fault:
        begun.append(Fault(done, expected, f"{request.node.path.stem}.py::{request.node.originalname}"))
        return begun[-1]

    request.node.faults = begun
    return begin


@pytest.fixture(scope="session")
def many():
    """`many(few, all)`: how often to try; `all` when the table is made."""
    return lambda few, everything: everything if TABLE else few


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        for row in getattr(item, "faults", ()):
            row.failed = not report.passed or row.times == 0  # a fault that was never tried was not withstood
            ROWS.append(row)
    return report


def pytest_sessionfinish():
    if TABLE and ROWS:
        path = Path(TABLE)
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        table = "\n".join([HEAD, *map(str, ROWS)])
        path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
