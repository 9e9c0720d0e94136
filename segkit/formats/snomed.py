"""What structures are called in SNOMED CT, which DICOM and 3D Slicer use.

Codes come from `snomed.csv`: of the DICOM standard's own tables (PS3.16) where these hold them, the others (ribs,
muscles and a few more) as in TotalSegmentator's public mapping. A structure that is not in it gets a code of segkit's
own scheme 99SEGKIT, which is its name, or where that is too long or of another script a digest of it.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SNOMED = "SCT"
OWN_SCHEME = "99SEGKIT"  # DICOM keeps names that begin with 99 free for everybody
ALTERED_STRUCTURES = ("kidney_cyst",)
LONGEST_CODE, LONGEST_MEANING = 16, 64  # DICOM PS3.5: value representations SH and LO


@dataclass(frozen=True)
class Code:
    """A code with the scheme that it is of and what it means there."""

    value: str
    meaning: str
    scheme: str = SNOMED


ANATOMY = Code("91723000", "Anatomical Structure")
ALTERED = Code("49755003", "Morphologically Abnormal Structure")
SIDES = {"left": Code("7771000", "Left"), "right": Code("24028007", "Right")}


@dataclass(frozen=True)
class Term:
    """What a structure is: its category, what of it, and the side where the code itself does not say it."""

    category: Code
    what: Code
    side: Code | None = None


def term_of(structure: str) -> Term:
    """The codes of a structure by its name; "left" and "right" in a name are its side."""
    table = _table()
    words = structure.split("_")
    side = next((word for word in words if word in SIDES), None)
    base = "_".join(word for word in words if word != side)
    category = ALTERED if base in ALTERED_STRUCTURES else ANATOMY
    if structure in table:
        return Term(category, table[structure])
    if base in table:
        return Term(category, table[base], SIDES.get(side) if side else None)
    return Term(category, Code(_own_code(structure), structure[:LONGEST_MEANING], OWN_SCHEME))


def _own_code(structure: str) -> str:
    """A code as long as codes may be, another one for each name: the name itself, or its beginning and a digest."""
    if len(structure) <= LONGEST_CODE and structure.isascii():
        return structure
    digest = hashlib.sha256(structure.encode()).hexdigest()[:8]
    return f"{structure.encode('ascii', 'ignore').decode()[: LONGEST_CODE - 9]}-{digest}"


@cache
def _table() -> dict[str, Code]:
    with open(Path(__file__).with_name("snomed.csv"), newline="", encoding="utf-8") as file:
        return {row["structure"]: Code(row["code"], row["meaning"]) for row in csv.DictReader(file)}
