"""Data of known size: the real torso or a phantom, brought to the voxels of a usual subject or of a large scan."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from scipy import ndimage

from benchmarks.sides import ROOT

if TYPE_CHECKING:
    from segkit.dataset import Data
    from segkit.splits import Part

OVERLAPS = 20
NOISE_HU = 15


def real_torso() -> Path | None:
    """The subject folder of the real torso, None where it is not at hand."""
    data = Path(os.environ.get("SEGKIT_REAL_DATA", ROOT.parent / "shared" / "data"))
    folder = data / "torso" / "s0000"
    return folder.resolve() if (folder / "ct.nii.gz").is_file() else None


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def made_whole(target: Path, make: Callable[[Path], object]) -> Path:
    """`target` as `make` fills it, whole or not there; as it is where it is there."""
    if not target.is_dir():
        draft = target.with_name(f".{target.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        make(draft)
        draft.rename(target)
    return target


def enlarge(source: Path, target: Path, shape: tuple[int, int, int]) -> None:
    """A subject at `shape` voxels (i, j, k): its CT with noise, its masks by the nearest voxel."""
    (target / "segmentations").mkdir(parents=True)
    affine = enlarge_ct(source, target / "ct.nii.gz", shape, NOISE_HU)
    for path in sorted((source / "segmentations").glob("*.nii.gz")):
        mask = np.asanyarray(nib.load(path).dataobj)
        places = [(np.arange(n) * size) // n for n, size in zip(shape, mask.shape, strict=True)]
        nib.save(nib.Nifti1Image(mask[np.ix_(*places)].astype(np.uint8), affine), target / "segmentations" / path.name)


def enlarge_ct(source: Path, path: Path, shape: tuple[int, int, int], noise_hu: float = 0.0) -> np.ndarray:
    """The CT of a subject at `shape` voxels, linearly interpolated; returns its affine."""
    image = nib.load(source / "ct.nii.gz")
    factors = np.array(shape) / image.shape
    hu = ndimage.zoom(np.asarray(image.dataobj, np.float32), factors, order=1, grid_mode=True, mode="nearest")
    if noise_hu:  # what is interpolated alone would compress better than what a scanner gives
        hu += np.random.default_rng(0).normal(0, noise_hu, shape).astype(np.float32)
    affine = image.affine @ np.diag([*1 / factors, 1])
    affine[:3, 3] -= image.affine[:3, :3] @ ((1 - 1 / factors) / 2)  # the outer faces stay in place
    nib.save(nib.Nifti1Image(np.rint(hu).astype(np.int16), affine), path)
    return affine


def plant_overlaps(source: Path, target: Path) -> None:
    """A copy of a subject in which OVERLAPS masks reach into the next one."""
    shutil.copytree(source, target)
    files = sorted((target / "segmentations").iterdir())
    images = {path: nib.load(path) for path in files}
    masks = {path: np.asanyarray(image.dataobj).copy() for path, image in images.items()}
    held = [path for path in files if masks[path].any()][: OVERLAPS + 1]
    for first, second in pairwise(held):
        places = np.argwhere(masks[second])[::7]
        masks[first][tuple(places.T)] = 1
        nib.save(nib.Nifti1Image(masks[first], images[first].affine, images[first].header), first)


def cases_of(data: Data, part: Part) -> dict[str, tuple[int, int]]:
    """The pieces of a part that are scans by themselves: case name -> slices [start, stop)."""
    total = data.staged[part.subject].shape[0]
    slabs = part.slabs or ((0, total),)
    return {f"{part.subject}_{start:04d}": (start, min(stop, total)) for start, stop in slabs}


def write_single_labels(data: Data, folder: Path, parts: dict[str, tuple[Part, ...]]) -> list[str]:
    """Raw data as nnU-Net wants it, on the canonical grid: one label a voxel, where masks overlap the later class.

    parts: for "Tr" and "Ts" what goes into imagesTr with labelsTr, and into imagesTs. Returns the structures in the
    order of their labels, 1, 2, ...
    """
    structures = sorted(data.label_map, key=data.label_map.get)
    numbers = {name: number for number, name in enumerate(structures, 1)}
    for kind, chosen in parts.items():
        for name in ("images", "labels"):
            (folder / f"{name}{kind}").mkdir(parents=True, exist_ok=True)
        for part in chosen:
            subject = data.staged[part.subject]
            volume = subject.labels()
            table = volume.lookup({name: numbers[name] for name in volume.structures if name in numbers})
            for case, (start, stop) in cases_of(data, part).items():
                affine = subject.grid.canonical_affine.copy()
                affine[:3, 3] += affine[:3, 2] * start
                for image, path in (
                    (subject.hu(slice(start, stop)), folder / f"images{kind}" / f"{case}_0000.nii.gz"),
                    (table[volume.codes[start:stop]], folder / f"labels{kind}" / f"{case}.nii.gz"),
                ):
                    nib.save(nib.Nifti1Image(np.ascontiguousarray(image.T), affine), path)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **numbers},
        "numTraining": len(list((folder / "imagesTr").iterdir())),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))
    return structures
