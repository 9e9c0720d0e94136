"""The public TotalSegmentator data set: fetched with interruptions, checked, unpacked a subject at a time.

What is not finished lies in the hidden folder `.download` of the data folder: the bytes fetched so far, the checked
archive, the subject being unpacked, and `state.json`, which says of which release they are and whether all is done.

The files follow the way of an archive: `releases` (what is published), `disk` (what the steps after it share),
`fetching` (from the network to a checked archive), `unpacking` (from there to subject folders), `downloading` (both in
turn, with the state that an interrupted call leaves, and the lock).
"""

from .downloading import download
from .releases import RELEASES, Release
from .unpacking import check_entry_name

__all__ = ["RELEASES", "Release", "check_entry_name", "download"]
