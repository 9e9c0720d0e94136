"""The archives that are published: where they lie, and which bytes they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Release:
    """One published archive. Nothing but exactly these bytes is unpacked."""

    name: str
    url: str  # http or https
    size: int  # bytes of the archive
    md5: str  # of the archive, hexadecimal
    note: str = ""  # licence and DOI

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return PurePosixPath(urlsplit(self.url).path).name


RELEASES = {
    "small": Release(
        "small",
        "https://zenodo.org/records/10047263/files/Totalsegmentator_dataset_small_v201.zip?download=1",
        3_244_617_817,
        "6b5524af4b15e6ba06ef2d700c0c73e0",
        "TotalSegmentator v2.0.1, 102 subjects, CC BY 4.0, doi:10.5281/zenodo.10047263",
    ),
    "full": Release(
        "full",
        "https://zenodo.org/records/10047292/files/Totalsegmentator_dataset_v201.zip?download=1",
        23_581_218_285,
        "fe250e5718e0a3b5df4c4ea9d58a62fe",
        "TotalSegmentator v2.0.1, 1,228 subjects, CC BY 4.0, doi:10.5281/zenodo.10047292",
    ),
}
