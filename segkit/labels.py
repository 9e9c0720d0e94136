"""Structures, their channels, groups, colours and left/right partners. Pure data and names, no torch.

The table `structures.csv` holds every structure of TotalSegmentator v1 (104), v2 (117) and v3 (117) with its id in
each release (public class tables, https://github.com/wasserth/TotalSegmentator), an anatomical group and a colour.
A model's channels do not come from this table but from the names in the data: see `make_label_map`.
"""

from __future__ import annotations

import colorsys
import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from segkit.errors import SegkitError
from segkit.untrusted import read_json

RELEASES = ("v1", "v2", "v3")

MOST_NAME_BYTES = 200  # file systems take 255, and endings, numbers of processes and stamps come to a name
_SAFE_NAME = re.compile(r"[^\W_][\w.+-]{0,99}")
_SIDES = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Structure:
    """One structure of an official class table."""

    name: str
    ids: Mapping[str, int]  # release ("v1", "v2", "v3") -> class id there; a release that lacks it is absent
    group: str
    color: str  # "#rrggbb"


def _read_table() -> dict[str, Structure]:
    with open(Path(__file__).with_name("structures.csv"), newline="", encoding="utf-8") as file:
        return {
            row["structure"]: Structure(
                row["structure"],
                {release: int(row[f"id_{release}"]) for release in RELEASES if row[f"id_{release}"]},
                row["group"],
                row["color"],
            )
            for row in csv.DictReader(file)
        }


OFFICIAL: Mapping[str, Structure] = _read_table()
"""Every official structure by name, in the official order (the ids of v2, then what only v3 or v1 has)."""

GROUPS: tuple[str, ...] = tuple(dict.fromkeys(structure.group for structure in OFFICIAL.values()))
"""The anatomical groups, in the order in which figures show them; names outside the table belong to "other"."""


def official_names(release: str = "v2") -> tuple[str, ...]:
    """Names of a release ("v1": 104, "v2": 117, "v3": 117) in the order of its ids. SegkitError for another one."""
    if release not in RELEASES:
        raise SegkitError(f"no structure table for release {release!r}: choose one of {', '.join(RELEASES)}")
    held = [structure for structure in OFFICIAL.values() if release in structure.ids]
    return tuple(structure.name for structure in sorted(held, key=lambda structure: structure.ids[release]))


def group_of(name: str) -> str:
    """The anatomical group of a structure; "other" for names outside the official tables."""
    return OFFICIAL[name].group if name in OFFICIAL else "other"


def color_of(name: str) -> str:
    """The structure's colour as "#rrggbb", the same in every figure; other names get one from their spelling."""
    if name in OFFICIAL:
        return OFFICIAL[name].color
    digest = hashlib.sha256(name.encode()).digest()
    rgb = colorsys.hls_to_rgb(digest[0] / 256, 0.4 + digest[1] / 850, 0.5 + digest[2] / 640)
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def rgb_of(name: str) -> tuple[int, int, int]:
    """The structure's colour as (red, green, blue), 0 to 255."""
    red, green, blue = bytes.fromhex(color_of(name)[1:])
    return red, green, blue


def partner_of(name: str) -> str | None:
    """The name of the same structure on the other side ("kidney_left" -> "kidney_right"); None for one without a side.

    The partner is a name only: `lung_middle_lobe_right` has `lung_middle_lobe_left`, which no data set holds.
    """
    words = name.split("_")
    if not any(word in _SIDES for word in words):
        return None
    return "_".join(_SIDES.get(word, word) for word in words)


def check_name(name: str) -> str:
    """Return a structure or subject name that is safe as a file name, or raise SegkitError.

    Letters, digits and `_ . + -`, not starting with a sign, at most 100 characters and MOST_NAME_BYTES as UTF-8: it
    cannot leave a folder, start a spreadsheet formula or carry markup.
    """
    fits = isinstance(name, str) and _SAFE_NAME.fullmatch(name) and len(name.encode()) <= MOST_NAME_BYTES
    if not fits:
        raise SegkitError(
            f"{str(name)[:120]!r} cannot be used as a name: use letters, digits and '_ . + -', starting with a letter "
            f"or digit, at most 100 characters ({MOST_NAME_BYTES} bytes)"
        )
    return name


def safe_name(text: str) -> str:
    """`text` as a name: what a file name should not hold becomes `_`. Raises SegkitError where nothing is left."""
    return check_name(re.sub(r"[^\w.+-]+", "_", text).strip("_"))


def make_label_map(names: Iterable[str], only: Sequence[str] | None = None) -> dict[str, int]:
    """Structure -> channel for the names found in the data: official names in the official order, others sorted after.

    `only` keeps the named ones; SegkitError if one of them is not in the data or if nothing is left.
    """
    found = {check_name(name) for name in names}
    if isinstance(only, str):
        raise SegkitError(f"STRUCTURES = {only!r}: expected a list of names")
    if only is not None:
        missing = sorted(set(only) - found)
        if missing:
            raise SegkitError(
                f"STRUCTURES asks for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}, "
                f"which no training subject has; they have {len(found)} structures: {', '.join(sorted(found)[:8])} ..."
            )
        found &= set(only)
    if not found:
        raise SegkitError("no structure to learn: no subject has a file under segmentations/")
    ordered = [name for name in OFFICIAL if name in found] + sorted(found - set(OFFICIAL))
    return {name: channel for channel, name in enumerate(ordered)}


def check_label_map(label_map: object, source: str) -> dict[str, int]:
    """Return `label_map` if it maps names to the channels 0..n-1, else raise SegkitError that names `source`."""
    if not isinstance(label_map, dict) or not label_map:
        raise SegkitError(
            f"{source}: expected an object of structure names and channels, found {type(label_map).__name__}"
        )
    channels = list(label_map.values())
    if any(type(channel) is not int for channel in channels) or sorted(channels) != list(range(len(channels))):
        raise SegkitError(
            f"{source}: expected the channels 0 to {len(channels) - 1}, each once, found {channels[:8]} ..."
        )
    try:
        return {check_name(name): channel for name, channel in sorted(label_map.items(), key=lambda item: item[1])}
    except SegkitError as error:
        raise SegkitError(f"{source}: {error}") from error


def load_label_map(path: str | Path) -> dict[str, int]:
    """Read a `label_map.json`. Raises SegkitError that names it if it is no label map or not there."""
    return check_label_map(read_json(Path(path), "train again to have it written"), str(path))


def mirrored_channels(label_map: Mapping[str, int]) -> list[int | None]:
    """For each channel the channel that it becomes in a mirrored body; None where the partner is not in the map.

    A structure without a side keeps its channel.
    """
    return [
        channel if (partner := partner_of(name)) is None else label_map.get(partner)
        for name, channel in sorted(label_map.items(), key=lambda item: item[1])
    ]
