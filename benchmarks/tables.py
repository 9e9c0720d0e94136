"""Rows and tables of results, and the folder that keeps them as they come, so that an interrupted run goes on."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.sides import FAILED, ROOT, Side, Taken
from segkit.runs import write_json


@dataclass
class Row:
    """What one side took for a work.

    kind: segkit, peer or floor. seconds: the median, times: as many times as segkit's, score: macro Dice, for works
    that are about quality.
    """

    side: str
    kind: str
    seconds: float | None = None
    times: float | None = None
    peak_mb: int | None = None
    device_mb: int | None = None
    score: float | None = None
    notes: str = ""


@dataclass
class Table:
    """One work with the rows of its sides. what: a sentence on what was done; notes: what else was seen; grid: a table
    of words, its head first."""

    name: str
    title: str
    what: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    unit: str = "s"
    grid: list[list[str]] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: Mapping) -> Table:
        return cls(**{**content, "rows": [Row(**row) for row in content["rows"]]})


def rows_of(sides: Sequence[Side], taken: Mapping[str, Taken], notes: Mapping[str, str] | None = None) -> list[Row]:
    """A row a side, in their order, with times segkit: the first side of that kind is what the others are beside.

    A side whose work says how many `items` it did is given in seconds an item. `notes` by side; problems come first.
    """
    seconds = {name: _seconds(side) for name, side in taken.items()}
    ours = next((seconds[side.name] for side in sides if side.kind == "segkit"), None)
    rows = []
    for side in sides:
        result, own = taken[side.name], seconds[side.name]
        words = "; ".join(filter(None, [result.problem, (notes or {}).get(side.name, "")]))
        times = own / ours if own is not None and ours else None
        rows.append(Row(side.name, side.kind, own, times, result.peak_mb, result.device_mb, notes=words))
    return rows


def _seconds(taken: Taken) -> float | None:
    return None if taken.median is None else taken.median / taken.found.get("items", 1)


def floor_row(name: str, seconds: float, rows: Sequence[Row], notes: str = "") -> Row:
    """A floor that is computed, beside segkit's row among `rows`."""
    ours = next((row.seconds for row in rows if row.kind == "segkit"), None)
    return Row(name, "floor", seconds, seconds / ours if ours else None, notes=notes)


class Store:
    """A folder with a JSON file a result. What it was measured under (`conditions`) lies beside each, and one that was
    measured under others is measured again."""

    def __init__(self, folder: Path, conditions: Mapping):
        self.folder, self.conditions = folder, json.loads(json.dumps(conditions))
        folder.mkdir(parents=True, exist_ok=True)

    def once(self, name: str, measure: Callable[[], object], sources: Sequence[Path] = ()) -> object:
        """What `measure` gave, plain types: from the folder where it is there, else measured and kept.

        sources: files and folders of code; a result of other code is not taken.
        """
        kept = self.kept(name, sources)
        if kept is not None:
            return kept
        result = measure()
        self._keep(name, result, sources)
        return result

    def _keep(self, name: str, result: object, sources: Sequence[Path]) -> None:
        content = {"conditions": self.conditions, "code": fingerprint(sources), "result": result}
        write_json(self.folder / f"{name}.json", content)

    def kept(self, name: str, sources: Sequence[Path] = ()) -> object | None:
        """The result of `name`, None where there is none, or one of other conditions or code."""
        try:
            content = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            same = content["conditions"] == self.conditions and content["code"] == fingerprint(sources)
            return content["result"] if same else None
        except (OSError, ValueError, KeyError):
            return None

    def table(self, name: str, measure: Callable[[], Table], sources: Sequence[Path] = ()) -> Table:
        """`once` for a table; where a side failed it is not kept, so that the next run tries again."""
        kept = self.kept(name, sources)
        if kept is not None:
            return Table.from_json(kept)
        table = measure()
        if not any(row.notes.startswith(FAILED) for row in table.rows):
            self._keep(name, asdict(table), sources)
        return table


def code_of(module: Path) -> list[Path]:
    """What a result of a module of benchmarks/ depends on: segkit, the module, and what it imports of benchmarks.

    And what nobody imports: the worker, and the trainer that is copied into nnU-Net.
    """
    found, rest = {ROOT / "benchmarks" / f"{name}.py" for name in ("worker", "nnunet_trainer")}, [module.resolve()]
    while rest:
        if (source := rest.pop()) in found:
            continue
        found.add(source)
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchmarks":
                names = [node.module.split(".")[1]] if "." in node.module else [name.name for name in node.names]
                rest += [ROOT / "benchmarks" / f"{name}.py" for name in names]
    return [ROOT / "segkit", *sorted(found)]


def fingerprint(sources: Sequence[Path]) -> str:
    """Of Python files, and of those in folders: other code, another fingerprint."""
    digest = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
