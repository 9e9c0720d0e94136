"""CONTRIBUTING.md holds true: its examples are put into a copy of the package, and their own tests run there."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^`([\w./]+)`(?:, in `(\w+)`|, (at its end))?:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def put(folder, name, table, at_end, text):
    """Do with one example what the line before it says."""
    path = folder / name
    if table:
        content = path.read_text(encoding="utf-8")
        start = re.search(rf"^{table}\b.*\{{$", content, re.MULTILINE).end()
        end = content.index("\n}", start) + 1
        path.write_text(content[:end] + text + content[end:], encoding="utf-8")
    elif at_end:
        between = "\n\n" if path.suffix == ".py" else ""
        path.write_text(path.read_text(encoding="utf-8") + between + text, encoding="utf-8")
    else:
        assert not path.exists()
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the package and of what its tests share, with all examples in it."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "segkit", folder / "segkit", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    shared = [path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")]
    for path in (ROOT / "pyproject.toml", ROOT / "README.md", *shared):
        shutil.copy(path, folder / path.relative_to(ROOT))
    for example in EXAMPLE.findall(PAGE):
        put(folder, *example)
    return folder


def test_each_of_the_five_takes_few_places_and_one_test():
    sections = {part.splitlines()[0]: EXAMPLE.findall(part) for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)}
    places = {title: [name for name, *_ in examples] for title, examples in sections.items() if examples}
    assert list(places) == ["A structure", "A model", "A loss", "A metric", "A viewer's format"]
    for names in places.values():
        assert [name.startswith("tests/") for name in names] in ([False, True], [False, False, True])
    assert PAGE.count("```python") + PAGE.count("```csv") == sum(map(len, places.values()))


def test_the_examples_do_what_their_tests_say(changed):
    tests = [name for name, *_ in EXAMPLE.findall(PAGE) if name.startswith("tests/")]
    written = sum(len(re.findall(r"^def test_", (changed / name).read_text(), re.MULTILINE)) for name in tests)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        cwd=changed, env={**os.environ, "PYTHONPATH": str(changed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and f"{written} passed" in done.stdout, done.stdout + done.stderr


def test_the_examples_are_written_as_the_rest(changed):
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."], cwd=changed, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_can_be_chosen_is_what_the_shell_offers(changed):
    environment = {**os.environ, "PYTHONPATH": str(changed)}
    for verb, name in (("train", "dilated"), ("train", "focal_dice"), ("predict", "obj")):
        text = subprocess.run(
            [sys.executable, "-m", "segkit", verb, "--help"],
            cwd=changed,
            env=environment,
            capture_output=True,
            text=True,
        ).stdout
        assert re.search(rf"\b{name}\b", text)
