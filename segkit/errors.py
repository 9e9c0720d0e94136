"""What segkit raises, and what it reports, when something from outside is not as it should be.

Messages name the subject and the file, what was expected, what was found and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import errorcode

SEVERITIES = ("error", "warning", "info")
"""error: the subject cannot be used; warning: it is used, look at it; info: as it should be, good to know."""


class SegkitError(ValueError):
    """Bad input, a bad setting or a damaged file. The message says what was expected, what was found and what to do."""


class DivergedError(SegkitError):
    """A loss or a gradient that is no number any more: nothing can be learned from it."""


class UnwritableError(SegkitError):
    """A file or folder cannot be written: no room, or no right to."""


class SubjectError(SegkitError):
    """One subject cannot be used. Work on many subjects reports it and goes on with the others."""


_NO_ROOM = {
    "ENOSPC": "the disk is full; make room",
    "EDQUOT": "the quota of this disk is used up; make room",
    "EFBIG": "a file would be larger than is allowed here (ulimit -f); allow that",
}


def unwritable(path: object, error: OSError, then: str = "what was there before is unchanged") -> UnwritableError:
    """What to raise where `path` cannot be written. `then`: what comes of running it again, or has become of it."""
    reason = _NO_ROOM.get(errorcode.get(error.errno or 0, ""), f"{error.strerror or error}; put that right")
    return UnwritableError(f"{path}: {reason} and run it again, {then}")


def printable(text: str) -> str:
    """`text` in one line for a terminal: what would move its cursor, end the line or change colours becomes `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


@dataclass(frozen=True)
class Finding:
    """One thing found in the files of a subject. As text: its message, `printable`, which names subject and file."""

    subject: str
    severity: str  # one of SEVERITIES
    kind: str  # a few words that are the same for all findings of the kind, for tables
    message: str
    structure: str = ""  # where it is about one structure; "a + b" where about two
    value: float | None = None  # the number that the message is about, where there is one

    def __str__(self) -> str:
        return printable(self.message)


class Findings(list[Finding]):
    """What reading one subject found, in the order in which it was found."""

    def __init__(self, subject: str):
        super().__init__()
        self.subject = subject

    def add(self, severity: str, kind: str, message: object, structure: str = "", value: float | None = None) -> None:
        """Put one more on the list; `message` starts with the file, the subject is put before it."""
        text = str(message)
        named = text if text.startswith(f"subject {self.subject}:") else f"subject {self.subject}: {text}"
        self.append(Finding(self.subject, severity, kind, named, structure, value))

    @property
    def errors(self) -> list[Finding]:
        """Those for which the subject cannot be used."""
        return [finding for finding in self if finding.severity == "error"]
