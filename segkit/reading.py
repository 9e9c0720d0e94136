"""A subject's files, checked: HU and label codes as its files hold them, and everything that is found on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segkit.codes import CodeVolume
from segkit.errors import Findings, SubjectError
from segkit.formats.nifti import Grid, read_volume
from segkit.subjects import Subject

HU_MIN, HU_MAX = np.iinfo(np.int16).min, np.iinfo(np.int16).max
HU_PLAUSIBLE = (-3100, 31_000)
"""HU that scanners write: padding down to -3024, metal up to 30,710 on an extended scale."""
SCALED_RANGE = 16
"""CT values spread over less than this many HU were scaled to a unit range or are no scan."""
AIR_IN_A_CT_HU = -200
"""The CT of a patient holds voxels below: air around or inside, or lungs."""
SHEARED_SHARE = 0.5
"""Of the smallest voxel side: so far may a voxel lie from where it would lie on perpendicular axes."""


def read_ct(subject: Subject, findings: Findings) -> tuple[np.ndarray, Grid] | None:
    """HU (i, j, k) as int16 on the file's axes, and its grid; None where the CT cannot be used.

    Values are rounded, and clipped where the file holds more than int16 can. Reported are: an unreadable file, axes
    that are not perpendicular, NaN, one value everywhere, values that were scaled to a unit range (errors); a header
    without orientation, HU beyond HU_PLAUSIBLE, and no HU below AIR_IN_A_CT_HU (warnings).
    """
    try:
        volume, grid = read_volume(subject.ct, subject.name, findings)
    except SubjectError as error:
        findings.add("error", "unreadable", error)
        return None
    if not is_perpendicular(grid, subject.ct, findings):
        return None
    hu = as_hu(volume, subject.ct, findings)
    return None if hu is None else (hu, grid)


def is_perpendicular(grid: Grid, path: Path, findings: Findings, why: str = "its axes are not perpendicular") -> bool:
    """Whether the axes of a grid are perpendicular, up to SHEARED_SHARE; else an error, which says `why`.

    Slices of a tilted gantry lie beside each other: as a box of voxels they are deformed, and mm and ml are wrong.
    """
    lengths = np.linalg.norm(grid.affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(grid.affine[:3, :3] / lengths)
    straight = grid.affine.copy()
    straight[:3, :3] = left @ right * lengths  # the nearest perpendicular axes, as long
    apart, tolerance = grid.distance_mm(Grid(grid.shape, straight)), SHEARED_SHARE * lengths.min()
    if apart <= tolerance:
        return True
    cosines = abs(grid.affine[:3, :3].T @ grid.affine[:3, :3] / np.outer(lengths, lengths))
    angle = np.rad2deg(np.arcsin(min(1.0, np.triu(cosines, 1).max())))
    findings.add(
        "error", "sheared grid",
        f"{path}: {why}, by {angle:.1f} degrees, so that voxels lie up to {apart:.1f} mm beside a regular grid (at "
        f"most {tolerance:.2f}); resample it, for example with 3D Slicer's 'Resample Image' or dcm2niix, and take "
        "that file",
        value=angle,
    )  # fmt: skip
    return False


def as_hu(volume: np.ndarray, path: Path, findings: Findings, scaled: str = "error") -> np.ndarray | None:
    """The values of a file as int16; None where they cannot be HU. See `read_ct` for what is reported."""
    wrong = 0 if volume.dtype.kind in "bui" else int(np.count_nonzero(~np.isfinite(volume)))
    if wrong:
        findings.add(
            "error", "NaN",
            f"{path}: {wrong} voxels are NaN or infinite, expected HU; repair the file or leave the scan out",
            value=wrong,
        )  # fmt: skip
        return None
    lowest, highest = volume.min(), volume.max()
    if not plausible(float(lowest), float(highest), path, findings, scaled):
        return None
    if volume.dtype == np.int16:
        return volume
    if lowest < HU_MIN or highest > HU_MAX:
        volume = np.clip(volume, HU_MIN, HU_MAX)
    return (volume if volume.dtype.kind in "bui" else np.rint(volume)).astype(np.int16)


def plausible(lowest: float, highest: float, path: Path, findings: Findings, scaled: str = "error") -> bool:
    """Whether values in this range can be HU. Reports what `read_ct` does; `scaled`: how severe a scaled scan is."""
    found = f"its values go from {lowest:g} to {highest:g}"
    if round(lowest) == round(highest):  # also a scan in thousandths: as HU it is one value
        holds = f"holds {lowest:g} everywhere" if lowest == highest else f"{found}, one value when rounded"
        findings.add("error", "empty CT", f"{path}: {holds}, expected a scan in HU")
        return False
    if highest - lowest < SCALED_RANGE:
        findings.add(scaled, "scaled CT", f"{path}: {found}, expected HU; undo the scaling or take the original scan")
        return scaled != "error"
    if lowest < HU_PLAUSIBLE[0] or highest > HU_PLAUSIBLE[1]:
        clipped = "; what int16 cannot hold was clipped" if lowest < HU_MIN or highest > HU_MAX else ""
        findings.add(
            "warning", "HU range",
            f"{path}: {found}, expected HU from {HU_PLAUSIBLE[0]} to {HU_PLAUSIBLE[1]}{clipped}",
        )  # fmt: skip
    if lowest >= AIR_IN_A_CT_HU:
        findings.add(
            "warning", "no air",
            f"{path}: {found}, none below {AIR_IN_A_CT_HU}: {_without_air(lowest, highest)}; take the original "
            "scan",
            value=lowest,
        )  # fmt: skip
    return True


def _without_air(lowest: float, highest: float) -> str:
    if lowest < 0:
        return "a window of HU, or values that are not HU"
    return "an 8-bit image" if highest <= 255 else "HU + 1024, a window of HU, or values that are not HU"


def read_labels(subject: Subject, grid: Grid, findings: Findings) -> CodeVolume:
    """Label codes (i, j, k) on the file axes of the CT's grid; not complete if there are errors in `findings` then."""
    volume = subject.labels.read(grid, findings)
    if not findings.errors and not (volume.codebook.any() and volume.codes.any()):
        findings.add("warning", "no label", f"{subject.ct.parent}: no voxel belongs to any structure")
    return volume


def refuse(findings: Findings) -> None:
    """Raise SubjectError if there is an error among the findings: the first one, and how many more there are."""
    errors = findings.errors
    if errors:
        more = f" (and {len(errors) - 1} more errors in this subject)" if len(errors) > 1 else ""
        raise SubjectError(f"{errors[0]}{more}")
