"""Files damaged on purpose: what goes wrong, tried many times, and that no case hangs or fills the memory."""

from __future__ import annotations

import json
import signal
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_table import Fault
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from segkit.errors import SegkitError

MOST_BYTES = 64 << 20
"""What a case may take, whatever a file of some kilobytes claims: it is far less than what any of the claims asks."""
MOST_SECONDS = 60
"""Of the processor, for a case: what takes as long with a file of some kilobytes has no end. Usual are some ms."""

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class TakesTooLongError(BaseException):
    """No Exception: readers make errors of their own of these."""


@contextmanager
def watched(most_bytes: int = MOST_BYTES) -> Iterator[None]:
    """Fail where what runs inside asks for more memory, touches more of it, or takes longer than MOST_SECONDS.

    Asked for is what Python and numpy allocate; touched, what the whole process holds (torch, blosc2 and others too).
    """

    def stop(*_: object) -> None:
        raise TakesTooLongError(f"more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    tracemalloc.start()
    started = _reset_peak()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        asked, touched = tracemalloc.get_traced_memory()[1], _kilobytes("VmHWM") * 1024 - started
        tracemalloc.stop()
    assert asked < most_bytes and touched < most_bytes, f"asked for {asked:,} bytes, touched {touched:,}"


def _reset_peak() -> int:
    """Let the process's peak begin anew; the bytes that it holds now."""
    if _RESET.exists():  # https://docs.kernel.org/filesystems/proc.html: 5 resets VmHWM
        _RESET.write_text("5")
    return _kilobytes("VmRSS") * 1024


def _kilobytes(name: str) -> int:
    if not _STATUS.exists():
        return 0
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))


def try_all(
    row: Fault,
    cases: int,
    damaged: st.SearchStrategy,
    read: Callable[[object], object],
    check: Callable[[object], object],
    names: str,
) -> None:
    """Let `read` read `cases` damaged contents: each gives what `check` finds right, or SegkitError with `names` in it.

    The same cases each time. `row` gets how many were tried and what came of them.
    """
    seen = Counter()

    @settings(
        max_examples=cases, derandomize=True, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damaged)
    def try_one(content: object) -> None:
        seen["tried"] += 1
        try:
            with watched():
                result = read(content)
        except SegkitError as error:
            assert names in str(error), f"{names} is not named: {error}"
            seen["refused"] += 1
        else:
            check(result)
            seen["read"] += 1

    try_one()
    assert seen["refused"], "nothing of it was refused: nothing was tried"
    row.times += seen["tried"]
    row.seen = f"{seen['refused']:,} refused by name, {seen['read']:,} read, and right"


NUMBERS = [
    struct.pack(order + code, value)
    for order in "<>"
    for code, values in (
        ("h", (-1, 0, 1, 2**15 - 1, -(2**15))),
        ("i", (-1, 0, 2**31 - 1, -(2**31))),
        ("q", (-1, 2**63 - 1, -(2**63))),
        ("f", (float("nan"), float("inf"), -1.0, 1e38, 1e-38)),
    )
    for value in values
]
"""What a header does not expect."""


def damaged(content: bytes, header: int = 400) -> st.SearchStrategy[bytes]:
    """The content cut short, with bytes or numbers changed, put in or taken out, mostly in its header; or anything."""
    ends = [len(content) - 1, min(header, len(content)) - 1]
    places = st.sampled_from(ends).flatmap(lambda end: st.integers(0, end))

    def put(at: int, length: int, new: bytes) -> bytes:
        return content[:at] + new + content[at + length :]

    def flipped(flips: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for at, bits in flips:
            changed[at] ^= bits
        return bytes(changed)

    return st.one_of(
        places.map(lambda at: content[:at]),
        st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=8).map(flipped),
        st.builds(lambda at, number: put(at, len(number), number), places, st.sampled_from(NUMBERS)),
        st.builds(lambda at, new: put(at, 0, new), places, st.binary(min_size=1, max_size=40)),
        st.builds(lambda at, length: put(at, length, b""), places, st.integers(1, 200)),
        st.binary(min_size=1, max_size=60).map(lambda tail: content + tail),
        st.binary(max_size=200),
    )


RAW = {
    "~nan": "NaN", "~infinity": "-Infinity", "~overflow": "1e999", "~digits": "9" * 5000, "~deep": "[" * 5000,
    "~nested": "[" * 5000 + "]" * 5000, "~surrogate": '"\\ud800"', "~nothing": "",
}  # fmt: skip
"""What stands in the place of a value as it is: what json writes for these texts is replaced."""

VALUES = [
    None, True, False, -1, 0, 1, 7, 10**30, 0.5, -1.5, 1e300, "", "x", "1", "../../x", "/etc/passwd", "<b>x</b>",
    "=1+1", "a\0b", [], [[]], [1, 2], ["liver"], {}, {"x": 1}, "x" * 5000, *RAW,
]  # fmt: skip


def with_pieces(content: bytes, pieces: list[bytes]) -> st.SearchStrategy[bytes]:
    """The content with one of `pieces` put in somewhere, over what was there or between."""
    places, lengths = st.integers(0, len(content)), st.sampled_from([0, 1, 5])
    return st.builds(
        lambda at, new, length: content[:at] + new + content[at + length :], places, st.sampled_from(pieces), lengths
    )


def changed(content: object, values: list = VALUES) -> st.SearchStrategy:
    """The content, dictionaries and lists, with up to two of its values replaced, left out or doubled."""
    places, values = list(_places(content)), [*values, LEFT_OUT, DOUBLED]

    def make(changes: list[tuple[int, int]]) -> object:
        new = _copy(content)
        for place, value in changes:
            new = _replaced(new, places[place], values[value])
        return new

    # numbers, not the things themselves, which would make pages of a message
    change = st.tuples(st.integers(0, len(places) - 1), st.integers(0, len(values) - 1))
    return st.lists(change, min_size=1, max_size=2).map(make)


def damaged_json(content: object) -> st.SearchStrategy[bytes]:
    """The content as JSON with other values in it, or with damaged bytes."""

    def as_text(content: object) -> bytes:
        text = json.dumps(content)
        for mark, raw in RAW.items():
            text = text.replace(json.dumps(mark), raw)
        return text.encode()

    whole = as_text(content)
    return changed(content).map(as_text) | damaged(whole, len(whole))


LEFT_OUT, DOUBLED = object(), object()


def _places(content: object, place: tuple = ()) -> Iterator[tuple]:
    yield place
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from _places(value, (*place, key))


def _copy(content: object) -> object:
    """Dictionaries and lists anew; what else there is, as it is."""
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return [_copy(value) for value in content] if isinstance(content, list) else content


def _replaced(content: object, place: tuple, value: object) -> object:
    """The content with another value at a place; as it is where the place is gone."""
    if not place:
        return None if value is LEFT_OUT or value is DOUBLED else value
    key, *rest = place
    in_list = isinstance(content, list) and isinstance(key, int) and key < len(content)
    if not in_list and not (isinstance(content, dict) and key in content):
        return content
    if rest:
        content[key] = _replaced(content[key], tuple(rest), value)
    elif value is LEFT_OUT:
        content.pop(key)
    elif value is DOUBLED:
        content.update({f"{key}_2": content[key]}) if isinstance(content, dict) else content.append(content[key])
    else:
        content[key] = _copy(value)
    return content
