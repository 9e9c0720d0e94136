"""From the archive to subject folders: all entries are looked at before one is written, and nothing is overwritten."""

from __future__ import annotations

import re
import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from tqdm.auto import tqdm

from segkit.errors import SegkitError

from .disk import BLOCK, WORK, need_space, progress_bar

MAX_GROWTH = 10  # larger files than this many times the archive are refused: .nii.gz hardly shrinks when zipped
MAX_ENTRIES = 500_000  # the full release has about 147,000

_BAD_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, UnicodeError, OverflowError)
# one part of an entry's name: plain ASCII, hidden only where macOS made it
_PART_OF_NAME = re.compile(r"(\._)?[A-Za-z0-9_][A-Za-z0-9_.+() -]{0,199}|\.DS_Store")
_DEVICES = {"CON", "PRN", "AUX", "NUL"} | {f"{port}{number}" for port in ("COM", "LPT") for number in range(10)}


def unpack(path: Path, folder: Path, progress: bool) -> list[str]:
    """Unpack what is not there yet, a top-level file or folder at a time; returns the names of the folders.

    Each is written in a hidden folder and renamed when it is complete. Raises SegkitError for what is no zip archive,
    for one that would write elsewhere or unpack to far more than it says, and for too little room.
    """
    drafts = folder / WORK / "unpacking"
    try:
        archive = zipfile.ZipFile(path)
    except (*_BAD_ZIP, ValueError) as error:
        raise SegkitError(f"{path}: no readable zip archive ({error}); delete it and run it again") from error
    with archive:
        try:
            plan = _plan(archive.infolist(), path.stat().st_size)
        except SegkitError as error:
            raise SegkitError(f"{path}: not unpacked, {error}; do not use this archive") from None
        missing = {name: files for name, files in plan.items() if not _is_there(folder, name, files)}
        size = sum(info.file_size for files in missing.values() for info in files.values())
        need_space(folder, size, f"unpacking {path.name}")
        shutil.rmtree(drafts, ignore_errors=True)
        try:
            with progress_bar(f"unpacking {path.name}", size, progress) as bar:
                for name, files in missing.items():
                    for place, info in files.items():
                        _unpack_file(archive, info, drafts / place, bar)
                    (drafts / name).rename(folder / name)
        finally:
            shutil.rmtree(drafts, ignore_errors=True)
    return [name for name, files in plan.items() if name not in files]


def _unpack_file(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, bar: tqdm) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = info.file_size
    try:
        with archive.open(info) as source, open(target, "xb") as file:
            while left and (block := source.read(min(BLOCK, left))):
                file.write(block)
                left -= len(block)
                bar.update(len(block))
        if left:
            raise zipfile.BadZipFile(f"{left:,} of its {info.file_size:,} bytes are missing")
    except _BAD_ZIP as error:
        raise SegkitError(
            f"{archive.filename}: {info.filename} is damaged ({error}); delete the archive and run it again"
        ) from error


def _is_there(folder: Path, name: str, files: dict[str, zipfile.ZipInfo]) -> bool:
    """Whether a top-level file or folder is there, whole. Raises SegkitError if something else has its name."""
    target = folder / name
    if not target.exists() and not target.is_symlink():
        return False
    for path, info in ((folder / place, info) for place, info in files.items()):
        same = path.is_file() and path.stat().st_size == info.file_size
        if same and path == target:  # the meta.csv of two releases may have one size; it is quickly read
            same = zlib.crc32(path.read_bytes()) == info.CRC
        if not same:
            raise SegkitError(f"{path} is not what the archive holds and nothing is overwritten; move {target} away")
    return True


def _plan(infos: list[zipfile.ZipInfo], size: int) -> dict[str, dict[str, zipfile.ZipInfo]]:
    """What to write: top-level name -> its files by their place in the data folder; the top-level files first.

    Looks at all entries of an archive of `size` bytes and raises SegkitError if one of them is unsafe.
    """
    if len(infos) > MAX_ENTRIES:
        raise SegkitError(f"it has {len(infos):,} entries, expected at most {MAX_ENTRIES:,}")
    if (total := sum(info.file_size for info in infos)) > MAX_GROWTH * size:
        raise SegkitError(f"its {size:,} bytes would grow to {total:,}, expected at most {MAX_GROWTH} times as many")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise SegkitError(f"{info.orig_filename!r} overlaps another entry")
        end = info.header_offset + 30 + info.compress_size  # a header has 30 bytes and the name
    places = _checked_places(infos)
    tops = {place.split("/")[0] for place in places}
    if len(tops) == 1 and not places.keys() & {*tops, *(f"{top}/ct.nii.gz" for top in tops)}:
        places = {place.partition("/")[2]: info for place, info in places.items()}
    if not any(re.fullmatch(r"[^/]+/ct\.nii\.gz", place) for place in places):
        raise SegkitError("it has no subject, like s0000/ct.nii.gz")
    plan: dict[str, dict[str, zipfile.ZipInfo]] = {}
    for place in sorted(places, key=lambda place: ("/" in place, place)):
        plan.setdefault(place.split("/")[0], {})[place] = places[place]
    return plan


def _checked_places(infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The files among the entries by their paths, without those that macOS adds."""
    kinds: dict[str, bool] = {}  # path -> whether it is a folder, for the entries and all that they lie in
    spelled: dict[str, str] = {}
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        place = _check_entry(info)
        if place in entries:
            raise SegkitError(f"{info.orig_filename!r} is there twice")
        entries[place] = info
        path = ""
        for part in place.split("/"):
            path = f"{path}/{part}" if path else part
            folder = path != place or info.orig_filename.endswith("/")
            if kinds.setdefault(path, folder) != folder:
                raise SegkitError(f"{path!r} is a file and a folder")
            if (other := spelled.setdefault(path.lower(), path)) != path:
                raise SegkitError(f"{other!r} and {path!r} differ only by case")
    return {
        place: info
        for place, info in entries.items()
        if not kinds[place] and not re.search(r"(^|/)(__MACOSX/|\._|\.DS_Store)", place)
    }


def _check_entry(info: zipfile.ZipInfo) -> str:
    name = info.orig_filename  # `filename` ends at a NUL
    place = check_entry_name(name)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFDIR if name.endswith("/") else stat.S_IFREG):
        raise SegkitError(f"{name!r} is a link or a special file")
    if info.flag_bits & 0x2041:
        raise SegkitError(f"{name!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SegkitError(f"{name!r} has compression type {info.compress_type}, expected deflate or none")
    return place


def check_entry_name(name: str) -> str:
    """The relative path that an entry of an archive names. Raises SegkitError if any system would read another."""
    place = name.removesuffix("/")
    parts = place.split("/")
    for part in parts:
        device = part.split(".")[0].rstrip().upper() in _DEVICES
        if not _PART_OF_NAME.fullmatch(part) or part[-1] in ". " or device or len(parts) > 8:
            raise SegkitError(f"{name!r} is no plain relative name")
    return place
