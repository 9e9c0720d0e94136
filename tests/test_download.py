"""The download against a server on this machine that misbehaves, against hostile archives, and against being killed."""

import errno
import hashlib
import http.client
import io
import json
import ntpath
import os
import posixpath
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from segkit.download import RELEASES, Release, check_entry_name, disk, download, fetching, unpacking
from segkit.errors import SegkitError

NAME = "dataset_v201.zip"
QUICK = {"progress": False, "wait": 0.01, "timeout": 5.0}


# --- the data set that the archives are made from


def make_tree(folder: Path, subjects: int = 4, seed: int = 0) -> Path:
    """A small data set on disk: bytes that do not compress, an empty file, and a meta.csv."""
    rng = random.Random(seed)
    for number in range(subjects):
        masks = folder / f"s{number:04d}" / "segmentations"
        masks.mkdir(parents=True)
        (masks.parent / "ct.nii.gz").write_bytes(rng.randbytes(60_000 + 1000 * number))
        for name in ("liver", "rib_left_1", "spleen"):
            (masks / f"{name}.nii.gz").write_bytes(rng.randbytes(rng.randrange(2_000, 12_000)))
        (masks / "colon.nii.gz").write_bytes(b"")
    (folder / "meta.csv").write_bytes(b"\xef\xbb\xbfimage_id;split\r\n" + b"s0000;train\r\n" * subjects)
    return folder


def zip_tree(folder: Path, top: str = "") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, top + path.relative_to(folder).as_posix())
    return content.getvalue()


def tree_of(folder: Path) -> dict[str, bytes | None]:
    """Every path that is not hidden: the bytes of a file, None for a folder."""
    paths = [path for path in folder.rglob("*") if not path.relative_to(folder).parts[0].startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def archive(source) -> bytes:
    return zip_tree(source)


def release_of(content: bytes, url: str = f"http://127.0.0.1:9/{NAME}", name: str = "tiny") -> Release:
    return Release(name, url, len(content), hashlib.md5(content).hexdigest())


# --- the server


class Server(ThreadingHTTPServer):
    """Serves `content` at any path. What goes wrong is set from outside; what was asked and sent is written down."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.modified = b"", '"one"', None
        self.ranges = True  # whether it honours them
        self.cut: list[int] = []  # for each coming answer: bytes after which the connection ends; then it holds
        self.stalls = False  # whether a cut connection stays open, silent
        self.refuse: list[tuple[int, dict]] = []  # for each coming request: status and headers of a refusal
        self.twist = lambda status, headers: (status, headers)  # last change of an answer's head
        self.pause = 0.0  # seconds after each block
        self.requests: list[dict] = []
        self.sent = 0
        self.over = threading.Event()

    def url(self, name: str = NAME) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/{name}?download=1"

    def release(self, **changes) -> Release:
        return release_of(**{"content": self.content, "url": self.url()} | changes)

    def handle_error(self, *_):
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers) | {"path": self.path})
        if server.refuse:
            status, headers = server.refuse.pop(0)
            self.head(status, {"Content-Length": "0"} | headers)
            return
        content, start, status = server.content, 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and server.ranges and self.headers.get("If-Range", server.etag) in (server.etag, server.modified):
            start, status = int(asked[1]), 206
        headers = {"Content-Length": len(content) - start, "ETag": server.etag, "Last-Modified": server.modified}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        status, headers = server.twist(status, headers)
        self.head(status, headers)
        self.body(content[start:], server.cut.pop(0) if server.cut else len(content))

    def head(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()

    def body(self, content: bytes, cut: int) -> None:
        for start in range(0, min(cut, len(content)), 8192):
            block = content[start : min(start + 8192, cut)]
            self.wfile.write(block)
            self.server.sent += len(block)
            if self.server.pause:
                time.sleep(self.server.pause)
        if cut < len(content) and self.server.stalls:
            self.server.over.wait()


@pytest.fixture
def server(archive, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.content = archive
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def ranges_of(server: Server) -> list[str | None]:
    return [request.get("Range") for request in server.requests]


# --- fetching


def test_the_releases_are_the_published_ones():
    for name, record in (("small", "10047263"), ("full", "10047292")):
        release = RELEASES[name]
        assert release.name == name and release.archive.startswith("Totalsegmentator_dataset_")
        assert release.archive.endswith("_v201.zip") and f"https://zenodo.org/records/{record}/files/" in release.url
        assert record in release.note and "CC BY 4.0" in release.note and re.fullmatch("[0-9a-f]{32}", release.md5)
    assert (RELEASES["small"].size, RELEASES["full"].size) == (3_244_617_817, 23_581_218_285)


def test_dropped_connections_resume_and_fetch_no_byte_twice(server, source, archive, tmp_path):
    server.cut = [50_000, 1, 0, 100_000, 65_536]
    assert download(tmp_path, server.release(), **QUICK) == tmp_path
    assert tree_of(tmp_path) == tree_of(source)
    assert server.sent == len(archive)
    offsets = [50_000, 50_001, 50_001, 150_001, 215_537]
    assert ranges_of(server) == [None, *(f"bytes={offset}-" for offset in offsets)]
    assert [request.get("If-Range") for request in server.requests] == [None] + ['"one"'] * 5
    sent = {key.lower() for request in server.requests for key in request}
    assert sent == {"accept-encoding", "host", "user-agent", "connection", "path", "range", "if-range"}


def test_when_it_is_done_nothing_is_fetched_and_nothing_comes_back(server, source, tmp_path):
    download(tmp_path, server.release(), **QUICK)
    assert sorted(path.name for path in (tmp_path / ".download").iterdir()) == ["lock", "state.json"]
    assert not (tmp_path / NAME).exists()
    (tmp_path / "s0001" / "ct.nii.gz").unlink()
    (tmp_path / "meta.csv").write_text("mine")
    before = tree_of(tmp_path)
    assert download(tmp_path, server.release(), **QUICK) == tmp_path
    assert len(server.requests) == 1 and tree_of(tmp_path) == before != tree_of(source)


def test_when_all_subjects_were_deleted_it_is_not_done(server, source, tmp_path):
    download(tmp_path, server.release(), **QUICK)
    for subject in tmp_path.glob("s*"):
        shutil.rmtree(subject)
    server.refuse = [(404, {})]
    with pytest.raises(SegkitError, match="404"):
        download(tmp_path, server.release(), **QUICK)
    shutil.copytree(source / "s0002", tmp_path / "s0002")  # as if killed after this one
    download(tmp_path, server.release(), **QUICK)
    assert tree_of(tmp_path) == tree_of(source)


def test_a_server_without_ranges_sends_all_again(server, source, tmp_path):
    server.ranges, server.cut = False, [70_000]
    download(tmp_path, server.release(), keep_archive=True, **QUICK)
    assert tree_of(tmp_path) == tree_of(source) | {NAME: server.content}
    assert server.sent == len(server.content) + 70_000


def test_a_server_without_ranges_that_always_drops_is_given_up(server, tmp_path):
    server.ranges, server.cut = False, [70_000, 80_000] * 50
    with pytest.raises(SegkitError, match=r"given up.*ended early.*run it again"):
        download(tmp_path, server.release(), retries=3, **QUICK)
    assert len(server.requests) == 5


@pytest.mark.parametrize("etag", ['"one"', 'W/"one"', None])
def test_a_file_that_changes_between_attempts_is_begun_again(server, source, archive, tmp_path, etag):
    other = zip_tree(make_tree(tmp_path / "other", seed=1))
    server.content = other[: len(archive)].ljust(len(archive), b"-")
    server.etag, server.modified, server.cut = etag, "Mon, 01 Jan 2024 00:00:00 GMT", [90_000]
    release = server.release(content=archive)
    with pytest.raises(SegkitError, match="given up"):
        server.refuse = []
        server.twist = lambda *head: server.refuse.extend([(503, {})] * 2) or head
        download(tmp_path / "data", release, retries=0, **QUICK)
    server.refuse, server.twist = [], lambda *head: head
    server.content, server.modified = archive, "Tue, 02 Jan 2024 00:00:00 GMT"
    server.etag = etag and etag.replace("one", "two")
    download(tmp_path / "data", release, **QUICK)
    assert tree_of(tmp_path / "data") == tree_of(source)
    assert ranges_of(server)[-1] == "bytes=90000-"
    assert server.requests[-1]["If-Range"] == ('"one"' if etag == '"one"' else "Mon, 01 Jan 2024 00:00:00 GMT")


def test_a_server_that_ignores_if_range_is_noticed_by_its_etag(server, source, archive, tmp_path):
    server.content, server.cut = bytes(len(archive)), [90_000]

    def change(status, headers):
        if len(server.requests) > 1:
            server.content = archive
            headers["ETag"] = '"two"'
            if "Range" in server.requests[-1]:
                status, headers["Content-Range"] = 206, f"bytes 90000-{len(archive) - 1}/{len(archive)}"
        return status, headers

    server.twist = change
    download(tmp_path, server.release(content=archive), **QUICK)
    assert tree_of(tmp_path) == tree_of(source)
    assert ranges_of(server) == [None, "bytes=90000-", None]


@pytest.mark.parametrize("answer", ["bytes 0-99/{size}", "bytes 50000-{last}/{size}", "nonsense", None])
def test_another_part_than_asked_for_begins_again(server, source, tmp_path, answer):
    size = len(server.content)
    server.cut = [90_000]

    def lie(status, headers):
        if status == 206:
            headers["Content-Range"] = answer and answer.format(size=size, last=size - 1)
        return status, headers

    server.twist = lie
    download(tmp_path, server.release(), **QUICK)
    assert tree_of(tmp_path) == tree_of(source)
    assert ranges_of(server) == [None, "bytes=90000-", None]


def test_416_begins_again(server, source, tmp_path):
    server.cut = [90_000]
    server.twist = lambda *head: (len(server.requests) == 1 and server.refuse.append((416, {}))) or head
    download(tmp_path, server.release(), **QUICK)
    assert tree_of(tmp_path) == tree_of(source)
    assert ranges_of(server) == [None, "bytes=90000-", None]


def test_a_part_that_is_too_long_is_fetched_anew(server, source, tmp_path):
    part = tmp_path / ".download" / f"{NAME}.part"
    part.parent.mkdir()
    part.write_bytes(server.content + b"more")
    download(tmp_path, server.release(), **QUICK)
    assert tree_of(tmp_path) == tree_of(source) and ranges_of(server) == [None]


def test_another_content_is_deleted_and_named(server, source, archive, tmp_path):
    damaged = bytearray(archive)
    damaged[len(damaged) // 2] ^= 1
    server.content = bytes(damaged)
    found, expected = hashlib.md5(damaged).hexdigest(), hashlib.md5(archive).hexdigest()
    with pytest.raises(SegkitError, match=rf"(?s){re.escape(server.url())}.*{found}.*{expected}.*deleted"):
        download(tmp_path, server.release(content=archive), **QUICK)
    assert tree_of(tmp_path) == {} and not list((tmp_path / ".download").glob("*.part"))
    server.content = archive
    download(tmp_path, server.release(), **QUICK)
    assert tree_of(tmp_path) == tree_of(source)


def test_another_size_is_refused_before_it_is_fetched(server, tmp_path):
    release = server.release()
    server.content += b"x" * 5_000_000
    with pytest.raises(SegkitError, match=rf"{len(server.content)} bytes, expected {release.size}"):
        download(tmp_path, release, **QUICK)
    assert (tmp_path / ".download" / f"{NAME}.part").stat().st_size == 0


def test_a_login_page_does_not_cost_what_is_there(server, source, tmp_path):
    server.cut = [90_000]
    server.twist = lambda status, headers: (
        (200, {"Content-Type": "text/html"}) if len(server.requests) == 2 else (status, headers)
    )
    with pytest.raises(SegkitError, match="text/html, not the archive"):
        download(tmp_path, server.release(), **QUICK)
    download(tmp_path, server.release(), **QUICK)
    assert ranges_of(server) == [None, "bytes=90000-", "bytes=90000-"] and tree_of(tmp_path) == tree_of(source)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_final_and_says_so(server, tmp_path, status):
    server.refuse = [(status, {})] * 9
    with pytest.raises(SegkitError, match=rf"(?s){re.escape(server.url())}.*{status}.*browser.*as {NAME}"):
        download(tmp_path, server.release(), **QUICK)
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again_when_it_says(server, source, tmp_path):
    server.refuse = [(503, {"Retry-After": "1"}), (429, {"Retry-After": "nonsense"}), (500, {})]
    started = time.monotonic()
    download(tmp_path, server.release(), **QUICK)
    assert 1.0 < time.monotonic() - started < 3.0
    assert tree_of(tmp_path) == tree_of(source) and len(server.requests) == 4


def test_waits_grow_and_begin_again_after_progress(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    server.refuse, server.cut = [(503, {})] * 3, [10_000]
    download(tmp_path, server.release(), progress=False, wait=1.0)
    assert waits == [2, 4, 8, 1]
    assert fetching._retry_after("Sat, 01 Jan 2000 00:00:00 GMT") < 0 == fetching._retry_after(None)
    assert fetching._retry_after("Fri, 01 Jan 2100 00:00:00 GMT") > 1e9


def test_a_server_that_falls_silent_is_given_up_and_the_next_call_goes_on(server, source, archive, tmp_path):
    server.stalls, server.cut = True, [100_000] + [0] * 9
    with pytest.raises(SegkitError, match=r"timed out.*100,000 of .* bytes are here, run it again and it goes on"):
        download(tmp_path, server.release(), progress=False, wait=0.01, timeout=0.2, retries=2)
    assert len(server.requests) == 4 and server.sent == 100_000
    server.cut = []
    download(tmp_path, server.release(), **QUICK)
    assert tree_of(tmp_path) == tree_of(source) and server.sent == len(archive)


def test_no_name_and_no_server_are_told(tmp_path, monkeypatch):
    release = release_of(b"x", "http://data.invalid/a.zip")
    with pytest.raises(SegkitError, match=r"127.0.0.1:9/.*refused"):
        download(tmp_path / "a", release_of(b"x"), retries=1, **QUICK)

    def nowhere(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(SegkitError, match=r"http://data.invalid/a.zip.*Name or service not known"):
        download(tmp_path / "b", release, retries=1, **QUICK)


def test_redirects_stay_on_the_web(server, source, tmp_path):
    server.refuse = [(302, {"Location": "/elsewhere"})]
    download(tmp_path / "a", server.release(), **QUICK)
    assert tree_of(tmp_path / "a") == tree_of(source) and server.requests[1]["path"] == "/elsewhere"
    for number, target in enumerate(("ftp://127.0.0.1/a.zip", f"file://{ROOT}/README.md", "data:,x")):
        server.refuse = [(302, {"Location": target})]
        with pytest.raises(SegkitError, match=re.escape(server.url())):
            download(tmp_path / f"b{number}", server.release(), **QUICK)
    assert len(server.requests) == 5
    with pytest.raises(SegkitError, match=r"redirects to http://b/"):
        fetching._Redirects().redirect_request(urllib.request.Request("https://a/"), None, 302, "", {}, "http://b/")
    for url in (f"file://{ROOT}/README.md", "ftp://127.0.0.1/a.zip", "C:/a.zip"):
        with pytest.raises(SegkitError, match="https://"):
            download(tmp_path / "c", release_of(b"x", url), **QUICK)


def test_another_address_of_the_same_archive_goes_on(server, source, archive, tmp_path):
    server.cut, server.refuse = [90_000], []
    server.twist = lambda *head: server.refuse.append((404, {})) or head
    with pytest.raises(SegkitError, match="404"):
        download(tmp_path, server.release(), **QUICK)
    server.twist, server.etag = lambda *head: head, '"other"'
    download(tmp_path, server.release(url=server.url("mirror/" + NAME)), **QUICK)
    assert tree_of(tmp_path) == tree_of(source) and server.sent == len(archive)
    assert ranges_of(server)[-1] == "bytes=90000-" and "If-Range" not in server.requests[-1]


def test_a_server_that_cannot_prove_its_name_is_asked_once(tmp_path, monkeypatch):
    asked = []

    def refuse(*_, **__):
        asked.append(1)
        raise ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", refuse)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(SegkitError, match=r"https://data.invalid/a.zip.*self-signed.*certificates of this machine"):
        download(tmp_path, release_of(b"x", "https://data.invalid/a.zip"), **QUICK)
    assert asked == [1]


# --- the folder


def test_an_archive_that_is_there_is_used_and_stays(source, archive, tmp_path):
    (tmp_path / NAME).write_bytes(archive)
    download(tmp_path, release_of(archive), **QUICK)
    assert tree_of(tmp_path) == tree_of(source) | {NAME: archive}


def test_another_archive_that_is_there_is_refused_and_stays(archive, tmp_path):
    (tmp_path / NAME).write_bytes(archive[:-1])
    with pytest.raises(SegkitError, match=rf"{NAME}: md5 .* expected .* move the file away"):
        download(tmp_path, release_of(archive), **QUICK)
    assert tree_of(tmp_path) == {NAME: archive[:-1]}


def test_keep_archive(server, source, archive, tmp_path):
    download(tmp_path, server.release(), keep_archive=True, **QUICK)
    assert tree_of(tmp_path) == tree_of(source) | {NAME: archive}


def test_a_top_folder_is_left_out_and_so_are_the_traces_of_macos(source, tmp_path):
    with zipfile.ZipFile(content := io.BytesIO(zip_tree(source, "Dataset_v300/")), "a") as writer:
        writer.writestr("Dataset_v300/s0000/._ct.nii.gz", b"x")
        writer.writestr("Dataset_v300/.DS_Store", b"x")
    (tmp_path / NAME).write_bytes(content.getvalue())
    download(tmp_path, release_of(content.getvalue()), **QUICK)
    (tmp_path / NAME).unlink()
    assert tree_of(tmp_path) == tree_of(source)


def test_a_subject_alone_is_not_taken_for_a_top_folder(tmp_path):
    content = zip_tree(make_tree(tmp_path / "source", subjects=1) / "s0000", "s0000/")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / NAME).write_bytes(content)
    download(tmp_path / "data", release_of(content), **QUICK)
    assert (tmp_path / "data" / "s0000" / "ct.nii.gz").is_file()


def test_folders_with_other_content_are_left_alone(server, source, archive, tmp_path):
    mine = tmp_path / "mine" / "s0099" / "ct.nii.gz"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(SegkitError, match=r"s0099 is a subject from elsewhere"):
        download(tmp_path / "mine", server.release(), **QUICK)
    download(tmp_path / "data", server.release(), **QUICK)
    other = server.release(content=archive + b"x", name="full")
    with pytest.raises(SegkitError, match=r"holds release tiny .* not full; choose another folder"):
        download(tmp_path / "data", other, **QUICK)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SegkitError, match=r"file.*(Not a directory|exists)"):
        download(tmp_path / "file", server.release(), **QUICK)
    assert len(server.requests) == 1 and tree_of(tmp_path / "data") == tree_of(source)
    assert tree_of(tmp_path / "mine") == {"s0099": None, "s0099/ct.nii.gz": b"mine"}
    with pytest.raises(SegkitError, match="'huge': expected small or full"):
        download(tmp_path / "data", "huge", **QUICK)


@pytest.mark.parametrize("path", ["s0002/ct.nii.gz", "s0002", "meta.csv"])
def test_what_exists_is_not_overwritten(server, archive, tmp_path, path):
    server.refuse = [(404, {})]
    with pytest.raises(SegkitError):
        download(tmp_path, server.release(), **QUICK)
    target = tmp_path / path
    target.parent.mkdir(exist_ok=True)
    if path == "meta.csv":  # of the same length
        with zipfile.ZipFile(io.BytesIO(archive)) as reader:
            target.write_bytes(bytes(len(reader.read("meta.csv"))))
    elif path == "s0002":
        target.mkdir()
    else:
        target.write_bytes(b"mine")
    before = tree_of(tmp_path)
    with pytest.raises(SegkitError, match=rf"{target.name}.*nothing is overwritten"):
        download(tmp_path, server.release(), **QUICK)
    assert tree_of(tmp_path) == before


def test_too_small_a_disk_is_told_before_anything_is_done(server, archive, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2 * len(archive)})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SegkitError, match=r"tiny.* needs 0.00 GB, 0.00 GB are free; make room"):
        download(tmp_path / "a", server.release(), **QUICK)
    assert server.requests == []
    usage.free = len(archive) // 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / NAME).write_bytes(archive)
    with pytest.raises(SegkitError, match=rf"unpacking {NAME} needs"):
        download(tmp_path / "b", server.release(), **QUICK)
    assert tree_of(tmp_path / "b") == {NAME: archive}


@pytest.mark.parametrize("full", [".part", "ct.nii.gz"])
def test_a_disk_that_fills_up_is_told_and_the_next_call_goes_on(server, source, archive, tmp_path, monkeypatch, full):
    def open_on_a_small_disk(path, *mode):
        file = open(path, *mode)  # noqa: SIM115 (handed on)
        if not str(path).endswith(full) or "r" in mode[0]:
            return file
        room = [30_000]

        class Small:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, block):
                file.write(block[: room[0]])
                room[0] -= len(block)
                if room[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")

        return Small()

    for module in (fetching, unpacking):
        monkeypatch.setattr(module, "open", open_on_a_small_disk, raising=False)
    with pytest.raises(SegkitError, match=r"the disk is full; make room and run it again, it goes on"):
        download(tmp_path, server.release(), **QUICK)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not list(tmp_path.glob("s*"))
    download(tmp_path, server.release(), **QUICK)
    assert tree_of(tmp_path) == tree_of(source)
    assert ranges_of(server) == ([None, "bytes=30000-"] if full == ".part" else [None])


def test_bars_show_bytes(server, tmp_path, capsys):
    server.ranges, server.cut = False, [90_000]  # the bar goes back with the bytes
    download(tmp_path, server.release(), wait=0.01)
    shown = capsys.readouterr().err
    assert f"fetching {NAME}: 100%" in shown and f"unpacking {NAME}: 100%" in shown and "ended early" in shown
    download(tmp_path, server.release(), progress=False)
    assert capsys.readouterr().err == ""


# --- being killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills with SIGKILL")
def test_killed_while_fetching_it_goes_on(server, source, archive, tmp_path):
    """From outside, at three lengths of the part; each call after asks for what is missing on disk, no more."""
    server.pause = 0.003
    release, part = server.release(), tmp_path / ".download" / f"{NAME}.part"
    code = "import sys; from segkit.download import *; download(sys.argv[1], Release('tiny', *eval(sys.argv[2])))"
    arguments = [str(tmp_path), repr((release.url, release.size, release.md5))]
    sizes = []
    for share in (0.1, 0.4, 0.8):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL, cwd=ROOT)
        while not (part.exists() and part.stat().st_size > share * len(archive)):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        sizes.append(part.stat().st_size)
        assert archive.startswith(part.read_bytes())
    download(tmp_path, release, **QUICK)
    assert tree_of(tmp_path) == tree_of(source)
    assert ranges_of(server) == [None, *(f"bytes={size}-" for size in sizes)]


# --- hostile archives


def entry(name: str, mode: int = 0o100644, **changes) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for key, value in changes.items():
        setattr(info, key, value)
    return info


def zip_of(*entries: tuple[zipfile.ZipInfo | str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """One good subject, then the entries."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that are there twice
        archive.writestr("s0000/ct.nii.gz", random.Random(0).randbytes(500))
        for name, data in entries:
            archive.writestr(name, data, compression)
    return content.getvalue()


def patch(content: bytes, name: bytes, offset: int, value: bytes, local: bool = False) -> bytes:
    """Change bytes of an entry's header in the directory (46 bytes before the name) or before the data (30 bytes)."""
    at = (content.find(name) if local else content.rfind(name)) - (30 if local else 46) + offset
    return content[:at] + value + content[at + len(value) :]


def hostile() -> dict[str, tuple[bytes, str]]:
    """What is wrong -> the archive, and what the message says."""
    evil, ct = b"evil" * 300, "s0001/ct.nii.gz"
    plain = zip_of((ct, evil))
    place = plain.find(evil)
    names = {
        "parent": "../evil.txt",
        "parent inside": "s0001/../../evil.txt",
        "parent at the end": "s0001/..",
        "absolute": "/tmp/segkit_evil.txt",
        "backslash": "..\\evil.txt",
        "backslash inside": "s0001\\ct.nii.gz",
        "drive": "C:/evil.txt",
        "drive without slash": "C:evil.txt",
        "stream": "s0001/ct.nii.gz:evil",
        "dot": "./s0001/ct.nii.gz",
        "double slash": "s0001//ct.nii.gz",
        "slash alone": "/",
        "empty": "",
        "device": "s0001/nul.nii.gz",
        "trailing dot": "s0001./ct.nii.gz",
        "trailing space": "s0001 /ct.nii.gz",
        "control character": "s0001/ct\n.nii.gz",
        "other alphabet": "s\uff10\uff11/ct.nii.gz",
        "hidden": ".download/state.json",
        "long": "s0001/" + "x" * 300,
        "deep": "/".join("abcdefghij"),
    }
    cases = {key: (zip_of((entry(name), evil)), "no plain relative name") for key, name in names.items()}
    first, second = zip_of(("s0001/a.nii.gz", evil)), struct.pack("<L", 0)
    return cases | {
        "nul": (zip_of(("s0001/aXb.nii.gz", evil)).replace(b"aXb", b"a\0b"), "no plain relative name"),
        "symlink": (zip_of((entry("s0001/ct.nii.gz", 0o120777), b"../../evil")), "link or a special file"),
        "symlink folder": (zip_of((entry("s0001", 0o120777), b"/tmp")), "link or a special file"),
        "fifo": (zip_of((entry(ct, 0o010644), b"")), "link or a special file"),
        "device node": (zip_of((entry(ct, 0o020644), b"")), "link or a special file"),
        "folder as file": (zip_of((entry("s0001", 0o040755), b"")), "link or a special file"),
        "bomb": (zip_of((ct, bytes(5_000_000)), compression=zipfile.ZIP_DEFLATED), "would grow to 5,000,500"),
        "twice": (zip_of((ct, evil), (ct, b"other")), "is there twice"),
        "case": (zip_of((ct, evil), ("s0001/CT.nii.gz", evil)), "differ only by case"),
        "case of a folder": (zip_of(("S0000/liver.nii.gz", evil)), "differ only by case"),
        "file and folder": (zip_of(("s0001", evil), (ct, evil)), "a file and a folder"),
        "encrypted": (patch(plain, ct.encode(), 8, b"\x01\x00"), "is encrypted"),
        "compression": (zip_of((ct, evil), compression=zipfile.ZIP_LZMA), "compression type 14"),
        "overlap": (patch(first, b"s0001/a.nii.gz", 42, second), "overlaps another entry"),
        "no subject": (zip_of().replace(b"ct.nii.gz", b"mr.nii.gz"), "no subject"),
        "truncated": (plain[:-40], "no readable zip archive"),
        "no zip": (b"x" * 1000, "no readable zip archive"),
        "empty file": (b"PK", "no readable zip archive"),
        "name not utf-8": (patch(plain, ct.encode(), 8, b"\x00\x08").replace(b"s0001", b"s\xff\xff\xff1"), "zip arch"),
        "crc": (plain[: place + 9] + b"X" + plain[place + 10 :], f"{ct} is damaged .*CRC"),
        "other name inside": (patch(plain, ct.encode(), 30, b"s0009", local=True), f"{ct} is damaged"),
        "declares less": (patch(plain, ct.encode(), 24, struct.pack("<L", 1000)), f"{ct} is damaged"),
        "declares more": (
            patch(plain, ct.encode(), 24, struct.pack("<L", 1300)),
            f"{ct} is damaged .*100 of its 1,300",
        ),
        "damaged deflate": (
            patch(zip_of((ct, evil), compression=zipfile.ZIP_DEFLATED), ct.encode(), 30 + len(ct), b"\xff" * 9, True),
            f"{ct} is damaged",
        ),
    }


HOSTILE = hostile()


@pytest.mark.parametrize("wrong", HOSTILE)
def test_a_hostile_archive_writes_nothing_outside_and_no_half_subject(tmp_path, wrong):
    content, message = HOSTILE[wrong]
    folder = tmp_path / "deep" / "data"
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(content)
    (tmp_path / "evil").write_bytes(b"")  # where the links lead
    with pytest.raises(SegkitError, match=rf"(?s){NAME}.*{message}"):
        download(folder, release_of(content), **QUICK)
    outside = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if folder not in path.parents}
    assert outside == {"deep", "deep/data", "evil"} and not Path("/tmp/segkit_evil.txt").exists()
    written = {path.name for path in folder.iterdir()} - {NAME, ".download"}
    # damage shows when the bytes are read: the good subject before it may be there, whole
    assert written <= ({"s0000"} if "damaged" in message else set())
    assert {path.name for path in (folder / ".download").iterdir()} == {"lock", "state.json"}
    assert json.loads((folder / ".download" / "state.json").read_text()).get("finished") is None


def test_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MAX_ENTRIES", 3)
    for count, accepted in ((2, True), (3, False)):
        folder = tmp_path / str(count)
        folder.mkdir()
        content = zip_of(*((f"s{number:04d}/ct.nii.gz", b"x") for number in range(1, count + 1)))
        (folder / NAME).write_bytes(content)
        if accepted:
            download(folder, release_of(content), **QUICK)
        else:
            with pytest.raises(SegkitError, match="4 entries, expected at most 3"):
                download(folder, release_of(content), **QUICK)
        assert (folder / "s0000").exists() == accepted


def test_an_entry_that_declares_less_is_never_written_further(tmp_path):
    """Its checksum is right for what it declares, so that nothing but the declared length stops it."""
    declared = b"a" * 100
    content = zip_of(("s0001/ct.nii.gz", declared + b"b" * 5000))
    content = patch(content, b"s0001/ct.nii.gz", 24, struct.pack("<L", 100))
    content = patch(content, b"s0001/ct.nii.gz", 16, struct.pack("<L", zipfile.crc32(declared)))
    (tmp_path / NAME).write_bytes(content)
    download(tmp_path, release_of(content), **QUICK)
    assert (tmp_path / "s0001" / "ct.nii.gz").read_bytes() == declared


PIECES = st.sampled_from(
    ["..", ".", "/", "\\", ":", "\0", "~", " ", "C:", "s0001", "ct.nii.gz", "nul", "._", "\u2025", "//?/"]
)


@given(st.text() | st.lists(PIECES | st.text(max_size=3), max_size=6).map("".join))
@example("s0001/segmentations/rib_left_1.nii.gz")
@example("/etc/passwd")
def test_any_name_is_refused_or_stays_inside(name):
    try:
        place = check_entry_name(name)
    except SegkitError:
        return
    assert place == name.removesuffix("/")
    # two other readers of paths agree on where it is, below the folder
    for paths, root in ((posixpath, "/data/set"), (ntpath, "D:\\data\\set")):
        found = paths.normpath(paths.join(root, name))
        assert found.startswith(root + paths.sep) and paths.relpath(found, root).split(paths.sep) == place.split("/")
        assert not paths.splitdrive(name)[0] and not paths.isabs(name)


@pytest.mark.parametrize(
    "name", ["meta.csv", "s0000/", "s1429/ct.nii.gz", "s0011/segmentations/vertebrae_T12.nii.gz", "A b (1)+c/x.txt"]
)
def test_names_of_the_data_set_are_accepted(name):
    assert check_entry_name(name) == name.removesuffix("/")
