"""Phantoms on disk, in the dataset layout of TotalSegmentator v2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from joblib import Parallel, delayed

from segkit.errors import SegkitError
from segkit.runs import write_whole, write_whole_folder

from .subject import NAMES, Phantom, Traits, make_phantom, traits_of

META_COLUMNS = (
    "image_id;age;gender;institute;study_type;split;manufacturer;scanner_model;kvp;pathology;pathology_location"
)


class PhantomError(SegkitError):
    """Phantoms that cannot be written as asked; the message says why."""


def write_phantoms(
    folder: str | Path,
    subjects: int = 16,
    seed: int = 0,
    *,
    detail: float = 1.0,
    progress: Callable[[int, int], object] | None = None,
    jobs: int = 1,
) -> list[Path]:
    """Write synthetic subjects `s0000`, `s0001`, ... with all 117 structures and `meta.csv` into a folder.

    Each subject has `ct.nii.gz` (int16, HU) and 117 files `segmentations/<structure>.nii.gz` (uint8, 0 or 1, empty
    where the structure is absent or less than 30 voxels of it lie in the field of view). The same seed gives the same
    bytes; subject k depends on the seed and k alone, only the split in `meta.csv` depends on the number of subjects.
    `detail` below 1 divides the voxel sizes (about 3 x 3 x 4.5 mm) by it, for quick tests. `progress(done, subjects)`
    is called after each subject; `jobs` processes work in parallel. Returns the subject folders.

    Raises PhantomError, before anything is written, if a number is no use or a subject's folder exists.
    """
    if subjects < 1 or not 0 < detail <= 1:
        raise PhantomError(f"cannot make {subjects} phantoms at detail {detail}: need 1 or more, detail in (0, 1]")
    if seed < 0 or jobs < 1:
        raise PhantomError(f"SEED = {seed}, JOBS = {jobs}: expected a seed of 0 or more, one job or more")
    folder = Path(folder)
    targets = [folder / f"s{number:04d}" for number in range(subjects)]
    for target in targets:
        if target.exists():
            raise PhantomError(f"{target} exists already: phantoms never overwrite a subject, choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PhantomError(f"{folder}: cannot be made a folder ({error.strerror}); choose another one") from error
    work = (delayed(_write_subject)(target, seed, number, detail) for number, target in enumerate(targets))
    for done, _ in enumerate(Parallel(n_jobs=jobs, return_as="generator")(work), 1):
        if progress is not None:
            progress(done, subjects)
    _write_meta(folder, targets, seed)
    return targets


def _write_subject(target: Path, seed: int, number: int, detail: float) -> None:
    phantom = make_phantom(seed, number, detail)
    write_whole_folder(target, lambda draft: _write_files(phantom, draft))


def _write_files(phantom: Phantom, folder: Path) -> None:
    (folder / "segmentations").mkdir()
    codes = nib.orientations.axcodes2ornt(phantom.traits.orientation)
    # From the stored axes to x, y, z: a view of the stored array that the masks are put into.
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), codes)
    shape = np.empty(3, int)
    shape[turn[:, 0].astype(int)] = phantom.ct.shape
    affine = phantom.affine @ nib.orientations.inv_ornt_aff(turn, phantom.ct.shape)
    back = nib.orientations.ornt_transform(codes, nib.orientations.axcodes2ornt("RAS"))

    def packed(box: tuple[slice, ...], values: np.ndarray | np.uint8, dtype: type) -> bytes:
        stored = np.zeros(tuple(shape), dtype, order="F")
        nib.orientations.apply_orientation(stored, back)[box] = values
        content = _header(tuple(shape), dtype, affine) + stored.tobytes(order="F")
        return igzip.compress(content, 1, mtime=0)

    everywhere = (slice(None),) * 3
    (folder / "ct.nii.gz").write_bytes(packed(everywhere, phantom.ct, np.int16))
    empty = packed(everywhere, np.uint8(0), np.uint8)
    for name in NAMES:
        mask = phantom.masks.get(name)
        content = empty if mask is None else packed(*mask, np.uint8)
        (folder / "segmentations" / f"{name}.nii.gz").write_bytes(content)


def _header(shape: tuple[int, ...], dtype: type, affine: np.ndarray) -> bytes:
    """A NIfTI-1 header up to where the data starts, with the sform alone: no rounding of quaternions."""
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_zooms(np.round(np.sqrt((affine[:3, :3] ** 2).sum(0)), 4))
    header.set_sform(affine, code="scanner")
    header.set_slope_inter(1, 0)
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    return header.binaryblock + bytes(4)


def splits_of(subjects: int, seed: int) -> list[str]:
    """The split of each subject: about 1/4 test, 1/8 val, the rest train; all train below three subjects."""
    tests, vals = (max(1, round(subjects / 4)), max(1, round(subjects / 8))) if subjects >= 3 else (0, 0)
    names = ["test"] * tests + ["val"] * vals + ["train"] * (subjects - tests - vals)
    order = np.random.default_rng([seed, subjects, 3]).permutation(subjects)
    return [names[place] for place in order]


def _write_meta(folder: Path, targets: list[Path], seed: int) -> None:
    rows = [META_COLUMNS]
    for number, (target, split) in enumerate(zip(targets, splits_of(len(targets), seed), strict=True)):
        rows.append(_meta_row(target.name, split, traits_of(seed, number)))
    text = "\n".join(rows) + "\n"
    write_whole(folder / "meta.csv", lambda draft: draft.write_text(text, encoding="utf-8-sig", newline="\n"))


def _meta_row(name: str, split: str, traits: Traits) -> str:
    studies = {
        "whole": "ct whole body",
        "no head": "ct neck-thorax-abdomen-pelvis",
        "no legs": "ct head-thorax-abdomen",
    }
    pathology = ("other", "abdomen") if any(traits.build.cysts) else ("no_pathology", "")
    cells = [
        name,
        traits.age,
        "m" if traits.build.male else "f",
        "phantom",
        studies.get(traits.view, "ct thorax-abdomen-pelvis"),
    ]
    return ";".join(map(str, [*cells, split, "segkit", "phantom", 120, *pathology]))
