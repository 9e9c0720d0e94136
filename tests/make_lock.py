"""requirements.lock and docs/licences.md from what is installed: `make lock`, after requirements.txt has changed.

It stands among the tests because they hold both files to the same walk through the requirements (test_lock.py). What
was merely installed by hand is in neither.
"""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS, LOCK, LICENCES = ROOT / "requirements.txt", ROOT / "requirements.lock", ROOT / "docs" / "licences.md"
MADE_ON = f"Python {platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]} on {platform.system()}"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

LOCK_HEAD = f"""\
# Every package that `make` installs, direct and indirect, with the version that was tested ({MADE_ON}, without
# a GPU). pip takes it as constraints, pip install -r requirements.txt -c requirements.lock: what another platform needs
# besides (CUDA for torch, colorama on Windows) is installed, too, unpinned. Written by `make lock`.
"""

PERMISSIVE, BY_FILE, BY_LIBRARY = "permissive", "changes to its own files stay open", "changes to the library stay open"
KINDS = {
    **dict.fromkeys(
        ["0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "LLVM-exception",
         "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib"],
        PERMISSIVE,
    ),
    "MPL-2.0": BY_FILE,
    **dict.fromkeys(["LGPL-2.1-or-later", "LGPL-3.0-or-later", "LGPL-3.0-only", "LGPL-2.1-only"], BY_LIBRARY),
}  # fmt: skip
"""What a licence (SPDX, https://spdx.org/licenses) asks of those who use a package as it is. Others stop the script."""

STATED = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "bsd 3-clause license": "BSD-3-Clause",
    "isc license": "ISC",
    "mit license": "MIT",
    "mpl-2.0 and mit": "MPL-2.0 AND MIT",
}
"""What packages write in the field License, where it is no SPDX name but leaves no doubt."""

PHRASES = (
    ("Apache-2.0", r"Apache License,? Version 2\.0"),
    ("MPL-2.0", r"Mozilla Public License,? Version 2\.0"),
    ("BSD-3-Clause", r"Redistribution and use in source and binary forms.*(Neither the names? of|may not be used to)"),
    ("BSD-2-Clause", r"Redistribution and use in source and binary forms"),
    ("ISC", r"Permission to use, copy, modify, and(/or)? distribute this software"),
    ("MIT", r"Permission is hereby granted, free of charge, to any person obtaining a copy of this software and"),
    ("PSF-2.0", r"PSF LICENSE AGREEMENT|Python Software Foundation License Version 2"),
)
"""Sentences by which a licence's text is known; the first that is found."""

BY_HAND = {
    "blosc2": (
        "BSD-3-Clause AND LGPL-2.1-or-later",
        "License-Expression; LICENSE-LIBTCC: libtcc, a library of its own",
    ),
    "matplotlib": ("PSF-2.0", "classifier; LICENSE is PSF-2.0's with matplotlib's name"),
    "pyzmq": ("BSD-3-Clause AND MPL-2.0", "License-Expression; LICENSE.zeromq.txt: libzmq, which its wheels hold"),
    "setuptools": ("MIT AND LGPL-3.0-or-later", "License-Expression; autocommand, a module that it vendors"),
}
"""Licence and source of packages whose metadata say too little, or less than all that segkit's users install."""


def required() -> list[Requirement]:
    """What requirements.txt asks for, with segkit's own requirements in the place of `-e .`."""
    lines = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    named = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return named + [Requirement(text) for text in PROJECT["dependencies"]]


def graph(wanted: Iterable[Requirement], missing_ok: bool = False) -> dict[str, Distribution]:
    """All installed packages that `wanted` need here, by canonical name; markers and extras are evaluated.

    A package that is not installed ends the script, or is left out with `missing_ok`.
    """
    found: dict[str, Distribution] = {}
    extras_done: dict[str, set[str]] = {}
    waiting = list(wanted)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            found[name] = distribution(requirement.name)
        except PackageNotFoundError:
            if missing_ok:
                continue
            raise SystemExit(f"{requirement} is not installed: run make, or pip install -r requirements.txt") from None
        new = {"", *requirement.extras} - extras_done.setdefault(name, set())
        extras_done[name] |= new
        waiting += [
            needed
            for needed in map(Requirement, (found[name].requires or ()) if new else ())
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in new)
        ]
    return dict(sorted(found.items()))


def public(package: Distribution) -> str:
    """Its version without what says how it was built: "2.13.0" of "2.13.0+cpu"."""
    return Version(package.version).public


def lock_text(packages: dict[str, Distribution]) -> str:
    """The content of requirements.lock."""
    return LOCK_HEAD + "".join(f"{name}=={public(package)}\n" for name, package in packages.items())


def licence_of(package: Distribution) -> tuple[str, str]:
    """A package's licence as an SPDX expression, and where it is stated. Ends the script where nothing is certain."""
    data = package.metadata
    name = canonicalize_name(data["Name"])
    if name in BY_HAND:
        return BY_HAND[name]
    if data.get("License-Expression"):
        return data["License-Expression"], "License-Expression"
    stated = (data.get("License") or "").strip()
    if stated in KINDS or stated.lower() in STATED:
        return STATED.get(stated.lower(), stated), "License"
    own = [
        file
        for file in package.files or ()
        if re.fullmatch(r"(?i)[^/]+\.dist-info/(licenses/)?licen[cs]e[^/]*", str(file))
    ]
    for place, text in [
        ("License", stated),
        *((file.name, file.locate().read_text("utf-8", "replace")) for file in own),
    ]:
        for licence, phrase in PHRASES:
            if re.search(phrase, " ".join(text.split()), re.IGNORECASE):
                return licence, place
    raise SystemExit(f"{name}: which licence? License is {stated[:80]!r}, no known text: look, and add it to BY_HAND")


def kind_of(name: str, licence: str) -> str:
    """The strictest kind among the licences of an expression."""
    parts = re.findall(r"[\w.+-]+", re.sub(r"\b(AND|OR|WITH)\b", " ", licence))
    unknown = [part for part in parts if part not in KINDS]
    if unknown:
        raise SystemExit(f"{name}: licence {licence}: may everybody use it? Replace the package, or add it to KINDS")
    return max((KINDS[part] for part in parts), key=[PERMISSIVE, BY_FILE, BY_LIBRARY].index)


def licences_text(packages: dict[str, Distribution]) -> str:
    """The content of docs/licences.md: who needs a package first, segkit itself, then each extra, then the rest."""
    left = dict(packages)
    sections = []
    extras = {name: wanted for name, wanted in PROJECT["optional-dependencies"].items() if name != "dev"}
    for title, wanted in {"segkit itself": PROJECT["dependencies"], **extras}.items():
        own = {name: left.pop(name) for name in graph(map(Requirement, wanted), missing_ok=True) if name in left}
        sections.append((title if title == "segkit itself" else f"the extra `{title}`", own))
    sections.append(("the tests alone", left))
    return LICENCES_HEAD + "".join(_section(title, own) for title, own in sections if own)


def _section(title: str, packages: dict[str, Distribution]) -> str:
    rows = []
    for name, package in packages.items():
        licence, place = licence_of(package)
        rows.append((kind_of(name, licence), licence, name, public(package), place))
    lines = "".join(f"| {name} {version} | {licence} | {kind} | {place} |\n" for kind, licence, name, version, place
                    in sorted(rows, key=lambda row: (row[0] != PERMISSIVE, *row)))  # fmt: skip
    return f"\n## Needed by {title}\n\n| package | licence | kind | stated in |\n|---|---|---|---|\n{lines}"


LICENCES_HEAD = """\
# Licences

Of every package in `requirements.lock`, as its own metadata or licence file states it (SPDX names). Written by
`make lock`, which stops at a licence that it does not know to be usable by everybody, in research and in a company:
GPL and AGPL are not among them. segkit itself is under Apache-2.0.

- **permissive**: use it, change it, sell what contains it; the notices stay.
- **changes to its own files stay open** (MPL-2.0): the same, and who changes files of the package itself and passes
  them on publishes those files. segkit changes none.
- **changes to the library stay open** (LGPL): the same for the library as a whole. segkit changes none.

Packages of extras that `make` does not install are not listed: `viewer` brings ipyniivue (BSD-2-Clause), anywidget
(MIT) and psygnal (BSD-3-Clause).

Wheels also hold libraries of others. The text of the GPL is found in some of them and asks nothing of who uses them:
numpy and scipy hold GCC's runtime libraries, under GCC's runtime exception; pillow holds liblzma, of which only the
tools around it are under the GPL; playwright's driver (tests alone) names build scripts of ICU, with an exception for
what they build; torch lists it for the tests of cpr, a library far down among its sources, none of which is in torch's
own libraries. CUDA, which torch brings on machines with an Nvidia GPU, is under Nvidia's own terms: they allow use, but
not every way of passing it on. segkit passes on none of these.
"""


if __name__ == "__main__":
    installed = graph(required())
    texts = {LOCK: lock_text(installed), LICENCES: licences_text(installed)}  # both, before one is written
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(installed)} packages")
