"""Read a gzip file from its start, no further than needed, several members or one, with its checksums.

isal decompresses two to five times faster than zlib. A decompressor that is told how much is wanted fills one buffer of
that size; asking for everything at once makes it grow and copy (measured: half of the time).
"""

from __future__ import annotations

import zlib
from typing import Any

from isal import igzip_lib, isal_zlib

ERRORS: tuple[Any, ...] = (EOFError, zlib.error, isal_zlib.error, igzip_lib.IsalError)
"""What damaged or short files raise here."""

LARGEST_RATIO = 1032
"""A deflate stream cannot grow by more (https://zlib.net/zlib_tech.html): a bound before anything is allocated."""

_GZIP = 31  # zlib's wbits for a gzip header and checksum
_WINDOW = 1 << 20  # what is handed over at a time: the decompressor copies what it leaves, at the end of each member
_DRAIN = 1 << 20


def payload(content: bytes) -> bytes:
    """What follows the header of a gzip file: compressed data and checksums. Files with the same hold the same.

    Header: https://www.rfc-editor.org/rfc/rfc1952 (2.3); one with rare optional fields counts as payload.
    """
    start = content[:4]  # two bytes that mark gzip, one for deflate, one with flags
    if start == b"\x1f\x8b\x08\x08":  # a file name follows, up to a zero
        return content[content.find(b"\0", 10) + 1 :]
    return content[10:] if start == b"\x1f\x8b\x08\x00" else content


class GzipReader:
    """The decompressed bytes of a gzip file's content, in order."""

    def __init__(self, content: bytes | memoryview):
        self._content = memoryview(content)
        self._place = 0
        self._stream = isal_zlib.decompressobj(_GZIP)

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end. Raises one of ERRORS where the file is damaged or cut short."""
        pieces = []
        while size > 0 and not (self._stream.eof and not self._next_member()):
            window = self._content[self._place : self._place + _WINDOW]
            piece = self._stream.decompress(window, size)
            left = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            self._place += len(window) - len(left)
            if not window and not piece and not self._stream.eof:
                raise EOFError("the file ends before its compressed data do")
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def finish(self) -> None:
        """Read what is left, keeping nothing, so that the checksums of all members are verified."""
        while self.read(_DRAIN):
            pass

    def _next_member(self) -> bool:
        # gzip allows zeros after a member, and several members in a row
        while self._place < len(self._content) and self._content[self._place] == 0:
            self._place += 1
        if self._place == len(self._content):
            return False
        self._stream = isal_zlib.decompressobj(_GZIP)
        return True
