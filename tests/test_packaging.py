"""What is given away: a wheel with its data files and nothing else, one version, a citation that can be read."""

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from conftest import ROOT

import segkit

SOURCES = ("segkit", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without a network, from a copy: the build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / "source" / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", folder, folder / "source"],
        check=True, capture_output=True,
    )  # fmt: skip
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = f"segkit-{segkit.__version__}.dist-info"
    expected = {
        str(path.relative_to(ROOT)).replace(os.sep, "/")
        for path in (ROOT / "segkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"segkit/structures.csv", "segkit/formats/snomed.csv", "segkit/phantom/__init__.py"} < expected
    assert {name for name in names if not name.startswith(f"{info}/")} == expected
    assert {name.removeprefix(f"{info}/") for name in names - expected} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"
    }  # fmt: skip


def test_the_metadata_say_what_the_project_says(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        entry = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert (metadata["Name"], metadata["Version"]) == ("segkit", segkit.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert "not for diagnosis" in metadata.get_payload() and "segkit = segkit.__main__:main" in entry
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = [needed for needed in metadata.get_all("Requires-Dist") if "extra ==" not in needed]
    assert sorted(own) == sorted(project["dependencies"])
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])


def test_what_is_installed_from_the_wheel_works_anywhere(wheel, tmp_path):
    """The packages that segkit needs are those of this Python; segkit itself comes from the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import segkit.labels, segkit.formats.snomed as s, segkit.__main__; "
        "print(segkit.__file__, len(segkit.labels.official_names()), s.term_of('kidney_left').what.value)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    assert out == [str(tmp_path / "site" / "segkit" / "__init__.py"), "117", "64033007"]


def test_changelog_and_citation_are_of_this_version():
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert newest[1] == str(citation["version"]) == segkit.__version__
    assert {"cff-version", "message", "title", "authors"} < set(citation) and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "The segkit authors"}]
