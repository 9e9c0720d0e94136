"""Files from outside: regular ones alone, and JSON of limited size that says nothing twice.

What anybody may have written must not make segkit wait for ever or fill the memory.
"""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

from segkit.errors import SegkitError, printable

MOST_JSON = 1 << 25
"""Bytes of a JSON file. The largest that segkit writes is split.json: 2.4 kB of checksums a subject and training."""


def check_file(path: Path) -> None:
    """OSError for what is there and no regular file: a pipe would be waited for, a device never ends."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is a folder, a pipe or a device, expected a file", str(path))


def read_file(path: Path) -> bytes:
    """What a regular file holds. OSError for anything else."""
    check_file(path)
    return path.read_bytes()


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file, UTF-8. Raises SegkitError that names it and ends with `remedy`.

    Refused are, besides what is no JSON: files above MOST_JSON, an object with the same name twice, NaN and numbers
    beyond float64, which are no JSON either but which Python accepts, and lists in lists without end.
    """
    try:
        if path.exists() and path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes, expected at most {MOST_JSON:,}")
        text = read_file(path).decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
    except OSError as error:
        raise SegkitError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise SegkitError(f"{path}: not readable as JSON ({printable(str(error))[:200]}); {remedy}") from error


def _object(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in content if names.count(name) > 1)[:60]!r} comes twice")
    return content


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no number")
    return number
