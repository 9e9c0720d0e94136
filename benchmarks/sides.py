"""Who takes part in a comparison, and what it took. Needs nothing installed: the peers' environment imports it too."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAILED = "failed: "
"""Begins the problem of a side that may do better another time: an error, or an end from outside."""


@dataclass(frozen=True)
class Side:
    """Who does the work: `make`, "module:function" of `benchmarks.worker`, with `parameters`, in JSON types.

    kind: segkit, peer, or floor: what physics asks for. A peer runs in the peers' environment unless it is `at_home` in
    segkit's. rounds: fewer than the others, where a round takes long. cold: what a process does first is measured,
    without a round that warms up.
    """

    name: str
    make: str
    parameters: Mapping = field(default_factory=dict)
    kind: str = "segkit"
    rounds: int | None = None
    cold: bool = False
    at_home: bool = False


@dataclass
class Taken:
    """What a side took. seconds: of each round. peak_mb: of its process with those that it started. problem: why there
    is nothing. found: what the work gave, of its last round."""

    seconds: list[float] = field(default_factory=list)
    peak_mb: int | None = None
    device_mb: int | None = None
    found: dict = field(default_factory=dict)
    problem: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None
