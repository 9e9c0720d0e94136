"""Reading one subject of 117 masks into a form to learn from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.inputs import OVERLAPS
from benchmarks.sides import Side
from benchmarks.tables import Table, rows_of

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment


def measure(bench: Bench) -> Table:
    folder = {"folder": str(bench.overlapping_dir)}
    sides = [
        Side("segkit: read, checked, coded, stored", "benchmarks.staging:segkit",
             {**folder, "scratch": str(bench.scratch / "staging")}),
        Side("nibabel: `get_fdata() > 0` of each file, nothing kept", "benchmarks.staging:get_fdata", folder, "peer"),
        Side("MONAI: `LoadImaged`, masks stacked", "benchmarks.staging:monai", folder, "peer", rounds=1),
        Side("decompression of each different file alone (isal)", "benchmarks.staging:gunzip", folder, "floor"),
    ]  # fmt: skip
    taken = bench.turns(sides)
    found = taken[sides[0].name].found
    notes = [
        f"In segkit's store the subject takes {found['store_mb']:.1f} MB, {found['store_mb'] / found['ct_mb']:.2f} "
        "times its compressed CT alone."
    ]
    what = (
        f"One subject of {bench.scan_name(bench.sizes.subject)} voxels with {found['masks']} masks, of which "
        f"{found['held']} hold something, made of {bench.data_name}, {OVERLAPS} pairs of masks overlapping. All files "
        "were read before: the disk takes no part."
    )
    return Table("staging", "Stage one subject", what, rows_of(sides, taken), notes)


def segkit(folder: str, scratch: str) -> Callable[[], dict]:
    from segkit.staging import stage_subject
    from segkit.subjects import find_subjects

    [subject], _ = find_subjects(folder)

    def work() -> dict:
        shutil.rmtree(scratch, ignore_errors=True)
        staged = stage_subject(subject, Path(scratch))
        size = sum(path.stat().st_size for path in staged.folder.iterdir())
        masks, held = len(staged.structures), sum(voxels > 0 for voxels in staged.voxels.values())
        return {"store_mb": size / 1e6, "ct_mb": staged.info["ct_bytes"] / 1e6, "masks": masks, "held": held}

    return work


def get_fdata(folder: str) -> Callable[[], None]:
    import nibabel as nib

    def work() -> None:
        for path in files_of(folder):
            nib.load(path).get_fdata() > 0  # noqa: B015  the peer's work, its result is not needed

    return work


def monai(folder: str) -> Callable[[], None]:
    from monai.transforms import Compose, ConcatItemsd, EnsureChannelFirstd, LoadImaged

    ct, *masks = files_of(folder)
    names = [path.name for path in masks]
    steps = Compose(
        [
            LoadImaged(keys=["image", *names]),
            EnsureChannelFirstd(keys=["image", *names]),
            ConcatItemsd(keys=names, name="label"),
        ]
    )

    def work() -> None:
        steps({"image": ct, **dict(zip(names, masks, strict=True))})

    return work


def gunzip(folder: str) -> Callable[[], None]:
    from isal import igzip

    def work() -> None:
        unpacked = set()
        for path in files_of(folder):
            content = path.read_bytes()
            packed = content[10:]  # behind the header, which may hold a time: masks without a voxel are the same
            if packed not in unpacked:
                igzip.decompress(content)
                unpacked.add(packed)

    return work


def files_of(folder: str) -> list[Path]:
    """The CT of the one subject in a data folder, then its masks."""
    [ct] = Path(folder).glob("*/ct.nii.gz")
    return [ct, *sorted((ct.parent / "segmentations").iterdir())]
