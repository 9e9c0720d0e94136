"""The whole way, from whatever state an interrupted call left to the finished one, for one process at a time."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from segkit.errors import SegkitError, unwritable
from segkit.locks import alone
from segkit.runs import write_json
from segkit.untrusted import read_json

from .disk import WORK, md5
from .fetching import fetch
from .releases import RELEASES, Release
from .unpacking import unpack


def download(
    folder: str | Path,
    release: str | Release,
    *,
    keep_archive: bool = False,
    progress: bool = True,
    retries: int = 6,
    wait: float = 1.0,
    timeout: float = 60.0,
) -> Path:
    """Fetch a release (a name in RELEASES, or a Release), check it and unpack it; returns `folder`.

    `folder` then holds the subject folders and `meta.csv`; a folder around all of them in the archive is left out.
    Killed at any moment and called again, it goes on where it stopped; when all is done, it does nothing. Nothing that
    exists is overwritten. An archive that lies in `folder` under its published name is used instead of fetched, and
    stays; a fetched one stays, under that name, only with `keep_archive`.

    `retries`: failed attempts in a row, none of which brought a new byte, before it gives up; `wait`: seconds before
    the first of them, doubled each time; `timeout`: seconds after which a silent server counts as gone.

    Raises SegkitError if the archive cannot be fetched or is not the release, if an entry of it is unsafe or damaged,
    if the disk is too small, if `folder` holds other subjects or another release, and if another process is
    downloading into it.
    """
    if isinstance(release, str):
        if release not in RELEASES:
            raise SegkitError(f"no release {release!r}: expected {' or '.join(RELEASES)}")
        release = RELEASES[release]
    if urlsplit(release.url).scheme not in ("http", "https"):
        raise SegkitError(f"{release.url}: expected an address that starts with https:// or http://")
    folder = Path(folder)
    try:
        if not _is_finished(folder, release):
            (folder / WORK).mkdir(parents=True, exist_ok=True)
            taken = f"{folder}: another process is downloading into it; wait until it ends"
            with alone(folder / WORK / "lock", taken):
                _complete(folder, release, keep_archive, progress, (retries, wait, timeout))
        _clean(folder / WORK)
    except OSError as error:  # of files; those of the network became SegkitError where they happened
        raise unwritable(error.filename or folder, error, "it goes on where it stopped") from error
    return folder


def _complete(
    folder: Path, release: Release, keep_archive: bool, progress: bool, patience: tuple[int, float, float]
) -> None:
    """From any state to the finished one."""
    if _is_finished(folder, release):  # by another process, just before this one had the lock
        return
    state = _own_state(folder, release)
    published, archive = folder / release.archive, folder / WORK / release.archive
    if published.exists():
        archive = published
        if (found := md5(archive, progress).hexdigest()) != release.md5:
            raise SegkitError(
                f"{archive}: md5 {found}, expected {release.md5} of release {release.name}; "
                "move the file away and run it again"
            )
    elif not archive.exists():  # it gets this name when it is checked
        fetch(folder / WORK, release, state, progress, *patience)
    folders = unpack(archive, folder, progress)
    if keep_archive and archive != published:
        archive.rename(published)
    write_json(folder / WORK / "state.json", state | {"finished": True, "folders": folders})


def _read_state(folder: Path) -> dict:
    try:
        state = read_json(folder / WORK / "state.json", "remove it")
    except SegkitError:
        return {}
    whole = isinstance(state, dict) and isinstance(state.get("folders", []), list)
    return state if whole and all(isinstance(name, str) for name in state.get("folders", [])) else {}


def _own_state(folder: Path, release: Release) -> dict:
    """The state that an interrupted call left, or a new one. Raises SegkitError if `folder` has other content."""
    state = _read_state(folder)
    if state.get("md5", release.md5) != release.md5:
        raise SegkitError(
            f"{folder} holds release {state.get('release')} or a part of it, not {release.name}; choose another folder"
        )
    if not state or state.get("finished"):  # finished, but none of its subjects is left: all from the start
        for ct in folder.glob("*/ct.nii*"):
            raise SegkitError(
                f"{ct.parent} is a subject from elsewhere, data sets are not mixed; choose another folder"
            )
        state = {"release": release.name, "md5": release.md5, "url": release.url, "note": release.note}
        write_json(folder / WORK / "state.json", state)
    return state


def _is_finished(folder: Path, release: Release) -> bool:
    """Whether all was unpacked once. Subjects deleted since then stay away, unless all of them are gone."""
    state = _read_state(folder)
    unpacked = state.get("md5") == release.md5 and state.get("finished") is True
    return unpacked and any((folder / name).is_dir() for name in state.get("folders", ()))


def _clean(work: Path) -> None:
    """Remove what a finished download no longer needs; a folder that cannot be written to is left as it is."""
    with suppress(OSError):
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("state.json", "lock"):
                path.unlink(missing_ok=True)
