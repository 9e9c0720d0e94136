"""What all rows share: sizes, folders, interpreters, and the data that they work on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmarks import inputs, machine
from benchmarks.sides import ROOT, Side, Taken
from benchmarks.tables import Store, fingerprint
from benchmarks.turns import Limits, take_turns
from segkit.dataset import Data, open_data
from segkit.phantom import write_phantoms

SEGKIT = ROOT / "segkit"


@dataclass(frozen=True)
class Sizes:
    """How large the works are. Shapes are (i, j, k) of a file, or rows and columns of a slice."""

    rounds: int = 3
    subject: tuple[int, int, int] = (244, 202, 224)  # a usual subject of TotalSegmentator at 1.5 mm
    scans: tuple[tuple[int, int, int], ...] = ((256, 256, 140), (512, 512, 280))
    steps: tuple[tuple[int, int], ...] = ((256, 256), (512, 512))  # pixels of a training step
    epoch_steps: int = 10
    warm_steps: int = 90  # of the network whose predictions are timed
    minutes: float = 10.0  # of each training whose quality is compared
    phantoms: int = 16
    detail: float = 1.0
    growth: tuple[int, ...] = (1, 4, 16, 64)
    whole: bool = True  # the phantoms' quality and make demo, too


QUICK = Sizes(
    rounds=1, subject=(98, 81, 90), scans=((128, 128, 32),), steps=((96, 96),), epoch_steps=2, warm_steps=6,
    minutes=0.25, phantoms=6, detail=0.5, growth=(1, 4), whole=False,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """One run of the benchmarks. work: the folder of its data and results. peers: the interpreter of the peers'
    environment; None where there is none. device: of all sides, as torch calls it.
    """

    work: Path
    sizes: Sizes = field(default_factory=Sizes)
    peers: str | None = None
    threads: int = os.cpu_count() or 1
    device: str = "cpu"

    @cached_property
    def store(self) -> Store:
        conditions = {
            "sizes": {name: str(value) for name, value in vars(self.sizes).items()},
            "threads": self.threads,
            "device": self.device,
            "data": self.data_name,
            "versions": machine.versions(self.peers),
        }
        return Store(self.work / "results", conditions)

    @property
    def quick(self) -> bool:
        return not self.sizes.whole

    @property
    def data_name(self) -> str:
        return "the real torso" if inputs.real_torso() else "a phantom (no real torso was at hand: SEGKIT_REAL_DATA)"

    @property
    def scratch(self) -> Path:
        """For what a work writes; may go at any time."""
        return inputs.folder(self.work / "scratch")

    def turns(self, sides: Sequence[Side], rounds: int | None = None, seconds: float = 1200) -> dict[str, Taken]:
        """`take_turns` of these sides, in this run's environments."""
        peers = self.peers or sys.executable
        limits = Limits(seconds=seconds)
        return take_turns(sides, rounds or self.sizes.rounds, peers, self.work / "logs", self.threads, limits)

    @cached_property
    def subject_dir(self) -> Path:
        """A data folder of one subject, s0000, as large as `sizes.subject`, masks that do not overlap."""
        return self._made("subject", lambda to: inputs.enlarge(self._source(), to / "s0000", self.sizes.subject))

    @cached_property
    def overlapping_dir(self) -> Path:
        """The same subject with masks that reach into others."""
        return self._made("overlapping", lambda to: inputs.plant_overlaps(self.subject_dir / "s0000", to / "s0000"))

    def scan(self, shape: tuple[int, int, int]) -> Path:
        """A CT of `shape` voxels, as a folder with `ct.nii.gz`."""
        name = "scan_" + "_".join(map(str, shape))
        return self._made(name, lambda to: inputs.enlarge_ct(self._source(), to / "ct.nii.gz", shape)) / "ct.nii.gz"

    def scan_name(self, shape: Sequence[int]) -> str:
        return " x ".join(map(str, shape))

    @cached_property
    def torso_dir(self) -> Path:
        """A data folder of one small subject: the real torso at its 3 mm, or a phantom."""
        return self._source().parent

    @cached_property
    def phantom_dir(self) -> Path:
        """The phantoms of the demo: train, validate and test subjects."""
        s = self.sizes
        name = f"phantoms_{s.phantoms}_{s.detail:g}"
        return self._made(name, lambda to: write_phantoms(to, s.phantoms, detail=s.detail, jobs=self.threads))

    @cached_property
    def growth_dir(self) -> Path:
        """Four small phantoms, to be copied."""
        return self._made("growth", lambda to: write_phantoms(to, 4, detail=0.5, jobs=self.threads))

    def open(self, data_dir: Path) -> Data:
        """Staged, with split and label map."""
        return open_data(data_dir, self.work / "staged", progress=False)

    def _source(self) -> Path:
        real = inputs.real_torso()
        return real or self._made("phantom_1", lambda to: write_phantoms(to, 1)) / "s0000"

    def _made(self, name: str, make) -> Path:
        """A folder of data, made whole if it is not there; other sizes or code of phantoms make another one."""
        of_phantoms = name.startswith(("phantom", "growth")) or not inputs.real_torso()
        kind = fingerprint([SEGKIT / "phantom"])[:8] if of_phantoms else "real"
        size = "_".join(map(str, self.sizes.subject)) if name in ("subject", "overlapping") else ""
        return inputs.made_whole(self.work / "data" / f"{name}{size}_{kind}", make)
