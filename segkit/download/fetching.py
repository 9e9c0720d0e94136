"""From the network to a checked archive, in attempts that go on where the one before stopped."""

from __future__ import annotations

import hashlib
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from os import fsync
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from segkit.errors import SegkitError
from segkit.runs import write_json

from .disk import BLOCK, md5, need_space, progress_bar
from .releases import Release

LONGEST_WAIT = 300.0  # seconds between two attempts, whatever the server asks for
UNPACKED = 1.25  # size of the files per size of the archive, roughly: to see early whether the disk has room for them

_BUSY = (408, 425, 429, 500, 502, 503, 504)  # the answers after which a later attempt may succeed


class _DroppedError(Exception):
    """This attempt failed, another one may not. `wait`: seconds that the server asks for."""

    def __init__(self, reason: object, wait: float = 0.0) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.wait = wait


class _Part:
    """The bytes fetched so far, on disk, and their hash."""

    def __init__(self, path: Path, release: Release, state: dict, progress: bool) -> None:
        self.path, self.release, self.state = path, release, state
        self.begun = 0  # how often all bytes were forgotten
        if path.exists() and path.stat().st_size > release.size:
            path.unlink()
        self.file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        self.size = path.stat().st_size
        self.digest = md5(path, progress and self.size > 0)
        self.bar = progress_bar(f"fetching {release.archive}", release.size, progress)
        self.bar.update(self.size)

    def close(self) -> None:
        self.bar.close()
        self.file.close()

    @property
    def validator(self) -> str | None:
        """The ETag or date that this address gave to the file that the bytes are of."""
        return self.state.get("validator") if self.state.get("url") == self.release.url else None

    def begin(self, validator: str | None) -> None:
        """Forget all bytes. Those to come are of the file with this validator."""
        self.begun += 1
        self.file.truncate(0)
        self.bar.update(-self.size)
        self.digest, self.size = hashlib.md5(usedforsecurity=False), 0
        self.state |= {"url": self.release.url, "validator": validator}
        write_json(self.path.with_name("state.json"), self.state)

    def add(self, block: bytes) -> None:
        self.file.write(block)
        self.digest.update(block)
        self.size += len(block)
        self.bar.update(len(block))


def fetch(work: Path, release: Release, state: dict, progress: bool, retries: int, wait: float, timeout: float) -> None:
    """Fetch what is missing of the archive and give it its name in `work` if it is the release.

    Raises SegkitError for too little room, for a server that gives up, and for an archive of another md5, which is
    deleted.
    """
    path = work / f"{release.archive}.part"
    with closing(_Part(path, release, state, progress)) as part:
        needed = release.size * (1 + UNPACKED) - part.size
        need_space(work.parent, needed, f"release {release.name}, archive and files,")
        _keep_trying(part, retries, wait, timeout)
        part.file.flush()
        fsync(part.file.fileno())
    if (found := part.digest.hexdigest()) != release.md5:
        path.unlink()
        raise SegkitError(
            f"{release.url}: what was fetched has md5 {found}, expected {release.md5}; it was deleted, "
            "run it again to fetch it anew"
        )
    path.rename(work / release.archive)


def _keep_trying(part: _Part, retries: int, wait: float, timeout: float) -> None:
    release, failures = part.release, 0
    while part.size < release.size:
        size = part.size
        try:
            with closing(_answer(part, timeout)) as response:
                _accept(response, part)
                _receive(response, part)
        except _DroppedError as dropped:
            failures = 0 if part.size > size else failures + 1
            if failures > retries or part.begun > retries + 1:
                raise SegkitError(
                    f"{release.url}: given up, the last failure: {dropped}; {part.size:,} of "
                    f"{release.size:,} bytes are here, run it again and it goes on where it stopped"
                ) from dropped
            seconds = min(LONGEST_WAIT, max(dropped.wait, wait * 2**failures))
            part.bar.set_postfix_str(f"{dropped}; again in {seconds:.0f} s")
            time.sleep(seconds)
            part.bar.set_postfix_str("")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects over http and https, and never from https back to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme not in ("https", urlsplit(req.full_url).scheme):
            raise SegkitError(f"{req.full_url}: redirects to {newurl}, expected https; not fetched")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _answer(part: _Part, timeout: float) -> http.client.HTTPResponse:
    """Ask for the bytes that are missing."""
    url, headers = part.release.url, {"User-Agent": "segkit"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
        if part.validator:
            headers["If-Range"] = part.validator
    try:
        opener = urllib.request.build_opener(_Redirects)
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} ({' '.join(str(error.reason).split())})"
        if error.code == 416 and part.size:  # the file there ends before the bytes asked for
            part.begin(None)
            raise _DroppedError(answer) from error
        if error.code in _BUSY:
            raise _DroppedError(answer, _retry_after(error.headers.get("Retry-After"))) from error
        raise SegkitError(
            f"{url}: {answer}; run it again later, or get the file with a browser, put it into "
            f"{part.path.parents[1]} as {part.release.archive} and run it again"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise SegkitError(f"{url}: {reason}; check the clock and the certificates of this machine") from error
        raise _DroppedError(reason) from error


def _retry_after(text: Any) -> float:
    """Seconds that a Retry-After header asks for, in either of its forms: seconds or a date."""
    try:
        return float(text) if text.isdecimal() else (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (AttributeError, TypeError, ValueError):
        return 0.0


def _accept(response: http.client.HTTPResponse, part: _Part) -> None:
    """Make the part ready for this answer: to go on, or to begin again where the whole file comes."""
    url, headers, size = part.release.url, response.headers, part.release.size
    kind = headers.get_content_type()
    if response.status not in (200, 206) or kind == "text/html":  # a page: what a network that wants a login sends
        raise SegkitError(f"{url}: the answer is {response.status} {kind}, not the archive; open it in a browser")
    tag = headers.get("ETag", "")
    validator = tag if tag.startswith('"') else headers.get("Last-Modified")  # weak tags are no use for ranges
    length = headers.get("Content-Length", "*")
    if response.status == 206:
        sent = headers.get("Content-Range")
        found = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", sent or "")
        changed = validator and part.validator and validator != part.validator
        if not found or int(found[1]) != part.size or changed:
            part.begin(None)
            raise _DroppedError(f"the server sends another part than asked for, {sent}")
        length = found[2]
    if length.isdecimal() and length != str(size):
        raise SegkitError(f"{url}: the file there has {length} bytes, expected {size} of release {part.release.name}")
    if response.status == 200:
        part.begin(validator)


def _receive(response: http.client.HTTPResponse, part: _Part) -> None:
    while part.size < part.release.size:
        try:
            # read1 hands out what came so far, so that a lost connection loses nothing
            block = response.read1(min(BLOCK, part.release.size - part.size))
        except (OSError, http.client.HTTPException) as error:
            raise _DroppedError(error) from error
        if not block:
            raise _DroppedError("the connection ended early")
        part.add(block)
