"""Imports run in one direction, the order of the tour in `segkit/__init__.py`; slow packages are imported late."""

import ast
import inspect
import re
import subprocess
import sys

from conftest import ROOT

import segkit

PACKAGE = ROOT / "segkit"


def tour() -> list[str]:
    """The rooms in the order of the tour: module and package names."""
    return [name.removesuffix(".py") for name in re.findall(r"^    (\w+(?:\.py)?)/?  ", segkit.__doc__, re.MULTILINE)]


def room_of(path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path) -> set[str]:
    """Rooms of segkit that a file imports at any depth, its own package's siblings left out."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(PACKAGE).parts[: -node.level]
            if not package:
                rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "segkit":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segkit."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("segkit.")}
    return rooms - {room_of(path)}


def test_the_tour_names_every_room():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert set(tour()) == rooms and len(tour()) == len(rooms)


def test_the_readme_shows_the_tour():
    start, end = "What all of them share\n", "\n\nFor education"
    text = inspect.getdoc(segkit)
    assert text[text.index(start) : text.index(end)] in (ROOT / "README.md").read_text()


def test_a_room_imports_only_from_rooms_above_it():
    order = {name: place for place, name in enumerate(tour())}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
        for room in imported_rooms(path)
        if order[room] >= order[room_of(path)]
    ]
    assert wrong == []


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_data_rooms_do_without_torch_and_nothing_imports_monai():
    assert not {"torch", "monai", "matplotlib"} & modules_after(
        "import segkit, segkit.labels, segkit.codes, segkit.staging"
    )
    everything = "import " + ", ".join(f"segkit.{room}" for room in tour() if room not in ("formats", "__main__"))
    assert not {"monai", "papermill"} & modules_after(everything)
