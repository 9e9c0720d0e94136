"""Supply: what is installed is pinned, indirectly too, and everybody may use it."""

import re
import tomllib
from importlib.metadata import distribution

import make_lock
import pytest
import torch
from make_lock import LICENCES, LOCK, REQUIREMENTS, ROOT, graph, kind_of, licence_of, lock_text, required
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_lock_is_exact_sorted_and_says_nothing_of_builds(pins):
    assert list(pins) == sorted(pins) and len(pins) > 100
    assert all(name == canonicalize_name(name) for name in pins)
    assert all(re.fullmatch(r"\d[\w.!]*", version) for version in pins.values())  # no 2.13.0+cpu, no ranges


def test_the_lock_agrees_with_requirements(pins):
    named = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    direct = dict(line.split("==") for line in named if line and not line.startswith("-"))
    assert len(direct) > 25 and {name: pins.get(canonicalize_name(name)) for name in direct} == direct
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [Requirement(text) for text in (*project["project"]["dependencies"], *project["build-system"]["requires"])]
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert [str(requirement.specifier) for requirement in wanted[-1:]] == [f"=={pins['setuptools']}"]
    assert "-r requirements.txt -c requirements.lock" in (ROOT / "Makefile").read_text()


def test_the_lock_holds_all_that_is_needed_here_and_no_more(pins):
    packages = graph(required())
    if make_lock.MADE_ON not in LOCK.read_text() or torch.version.cuda is not None:
        pytest.skip(f"the lock was made elsewhere, here is {make_lock.MADE_ON}")
    assert LOCK.read_text() == lock_text(packages), "run make lock"


def test_each_pin_is_what_every_other_package_asks_for(pins):
    """All of Requires-Dist, of packages that are installed as they are pinned; without the walk that made the lock."""
    asked = 0
    for name, version in pins.items():
        package = distribution(name)
        assert package.version.split("+")[0] == version
        for text in package.requires or ():
            requirement = Requirement(text)
            needed = canonicalize_name(requirement.name)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert needed in pins, f"{name} needs {requirement}"
                assert requirement.specifier.contains(pins[needed], prereleases=True), f"{name} needs {requirement}"
                asked += 1
    assert asked > 200


def test_licences_name_each_pinned_package_once(pins):
    rows = re.findall(r"^\| (\S+) (\S+) \| (.+?) \| (.+?) \|", LICENCES.read_text(), re.MULTILINE)
    assert sorted((name, version) for name, version, *_ in rows) == list(pins.items())
    for name, _, licence, kind in rows:
        assert kind == kind_of(name, licence)
    by_name = {name: licence for name, _, licence, _ in rows}
    # read on the pages of the projects
    known = {"torch": "BSD-3-Clause", "nibabel": "MIT", "tqdm": "MPL-2.0", "certifi": "MPL-2.0", "pexpect": "ISC",
             "isoduration": "ISC", "bleach": "Apache-2.0", "terminado": "BSD-2-Clause", "jinja2": "BSD-3-Clause",
             "scipy": "BSD-3-Clause", "blosc2": "LGPL", "safetensors": "Apache-2.0", "greenlet": "PSF-2.0"}  # fmt: skip
    assert all(licence in by_name[name] for name, licence in known.items())


def put(folder, name, requires=(), licence="", text=None, extras=(), version="1.0"):
    """A package as pip leaves it, without any code."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}", *([licence] if licence else [])]
    lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {each}" for each in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    if text is not None:
        (info / "LICENSE").write_text(text)
        (info / "RECORD").write_text(f"{info.name}/LICENSE,,\n")


def test_the_walk_through_requirements_by_hand(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    put(tmp_path, "sk-a", ["Sk.B[fast]", "sk-old; python_version < '3'", "sk-c"])
    put(
        tmp_path, "sk-b", ["sk-d; extra == 'fast'", "sk-e; extra == 'slow'"], extras=("fast", "slow"), version="2.0+cpu"
    )
    put(tmp_path, "sk-c", ["sk-b", "sk-a"])  # round and round
    put(tmp_path, "sk-d")
    packages = graph([Requirement("sk-a")])
    assert list(packages) == ["sk-a", "sk-b", "sk-c", "sk-d"]
    assert lock_text(packages).endswith("sk-a==1.0\nsk-b==2.0\nsk-c==1.0\nsk-d==1.0\n")
    with pytest.raises(SystemExit, match="sk-e"):
        graph([Requirement("sk-b[slow]")])
    assert list(graph([Requirement("sk-b[slow]")], missing_ok=True)) == ["sk-b"]


@pytest.mark.parametrize(
    ("licence", "text", "expected"),
    [
        ("License-Expression: MIT AND LGPL-3.0-or-later", None, "MIT AND LGPL-3.0-or-later"),
        ("License: BSD-3-Clause", None, "BSD-3-Clause"),
        ("License: Apache License 2.0", None, "Apache-2.0"),
        ("License: BSD", "Redistribution and use in source and binary forms ... Neither the name of X", "BSD-3-Clause"),
        ("", "Redistribution and use in\nsource and binary forms, with or without", "BSD-2-Clause"),
        ("License: BSD", None, SystemExit),  # of which kind?
        ("License: UNKNOWN", "do what you like", SystemExit),
        ("License-Expression: MIT AND GPL-3.0-only", None, SystemExit),
        ("License-Expression: AGPL-3.0-or-later", None, SystemExit),
        ("License-Expression: LicenseRef-Proprietary", None, SystemExit),
    ],
)
def test_licences_by_hand(tmp_path, monkeypatch, licence, text, expected):
    monkeypatch.syspath_prepend(tmp_path)
    put(tmp_path, "sk-x", licence=licence, text=text)
    if expected is SystemExit:
        with pytest.raises(SystemExit, match="sk-x"):
            kind_of("sk-x", licence_of(distribution("sk-x"))[0])
    else:
        assert licence_of(distribution("sk-x"))[0] == expected and kind_of("sk-x", expected)
