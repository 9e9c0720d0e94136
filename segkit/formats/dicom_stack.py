"""A DICOM series as one volume: its slices in their order in the patient, on one regular grid, in HU.

pydicom decodes the pixels, an image at a time, because slope, intercept and padding may differ from slice to slice and
a damaged slice is to be named. SimpleITK gives the same numbers (the tests compare), but is silent about a missing one.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segkit.errors import Findings, SubjectError
from segkit.formats.dicom import Plane, Series, require_pydicom
from segkit.formats.nifti import Grid, explained, usable_grid

SAME_MM = 0.01
"""Slices closer than this lie at the same position."""
EVEN, UNEVEN = 0.01, 0.25
"""Deviation from even positions, in slice distances: below is nothing to tell, beyond no grid describes the scan."""
NOT_MEASURED_HU = -1024
"""What padding becomes where its own value is none that a body has."""
MEASURED_HU = (-1024, 3071)
"""Padding in this range stays as it is: some programs name a value as padding that tissue has, too."""

_INT16 = np.iinfo(np.int16)
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts to the left and to the back


@dataclass(frozen=True)
class Stack:
    """The volume of a series."""

    hu: np.ndarray  # int16 (z, y, x) on the canonical grid
    grid: Grid  # i along the columns, j along the rows, k from slice to slice
    files: tuple[Path, ...]  # of the slices, in the order of k
    range: tuple[float, float]  # the lowest and the highest value, before it was cut to what int16 holds


def read_stack(series: Series, findings: Findings) -> Stack | None:
    """The slices of a series as one volume; None where there is an error among the findings.

    Errors: images that cannot be used, slices of unequal size, pixel spacing, orientation or frame of reference,
    missing slices, two different slices at one position, uneven positions, compression that nothing here decodes.
    Warnings: the same slice twice, slightly uneven positions, an image that is no CT. The affine runs from the first to
    the last slice: it is exact where positions are even, for slices that a tilted gantry took as well.

    Memory: the volume once as int16, and one image.
    """
    errors = len(findings.errors)
    for number, fault in enumerate(series.faults):
        if number < 5:
            findings.add("error", "unusable slice", fault)
    _report_localizers(series, findings)
    if not series.planes and not series.faults:
        findings.add("error", "no slices", f"{_folder(series)}: holds no slices, only localizers: {series}")
    if len(findings.errors) > errors:
        return None
    _check_alike(series, findings)
    _check_syntax(series.planes, findings)
    if len(findings.errors) > errors:
        return None
    levels = _levels(series.planes)
    grid = _grid([level[0] for level in levels], findings)
    if grid is None:
        return None
    try:
        hu, lowest, highest = _fill(grid, levels, findings)
    except SubjectError as error:
        findings.add("error", "unreadable", error)
        return None
    if len(findings.errors) > errors:
        return None
    _report_values(series, findings)
    return Stack(hu, grid, tuple(dict.fromkeys(level[0].path for level in levels)), (lowest, highest))


def _report_localizers(series: Series, findings: Findings) -> None:
    if series.localizers and series.planes:
        names = _few(path.name for path in series.localizers)
        findings.add("info", "localizers", f"{_folder(series)}: localizers are left out: {names}")


def _report_values(series: Series, findings: Findings) -> None:
    where = f"{_folder(series)}: series {series.uid}"
    units = {plane.units for plane in series.planes} - {"", "HU", "US"}  # US: unspecified
    if series.modality != "CT":
        modality = series.modality or "unknown"
        findings.add("warning", "no CT", f"{where}: its modality is {modality}, expected CT: do not trust the result")
    elif units:
        text = f"{where}: its values are {', '.join(sorted(units))}, expected HU: do not trust the result"
        findings.add("warning", "no HU", text)
    without = [plane for plane in series.planes if plane.rescale is None]
    if without and series.modality == "CT":
        names = _few(plane.path.name for plane in without)
        findings.add("warning", "no rescale", f"{where}: no RescaleSlope, numbers are taken as HU as they are: {names}")


def _check_alike(series: Series, findings: Findings) -> None:
    """An error for each property in which a slice differs from most others."""
    checks: tuple[tuple[str, Callable[[Plane], object], float], ...] = (
        ("rows and columns", lambda plane: plane.size, 1e-4),
        ("pixel spacing", lambda plane: plane.spacing_mm, 1e-4),
        ("orientation", lambda plane: plane.axes.ravel(), 1e-3),
    )
    planes = series.planes
    for what, value, tolerance in checks:
        values = np.array([value(plane) for plane in planes], float)
        rounded = list(map(tuple, values.round(3).tolist()))
        usual = values[rounded.index(Counter(rounded).most_common(1)[0][0])]
        odd = np.flatnonzero(abs(values - usual).max(1) > tolerance)
        if len(odd):
            expected, found = (
                f"{what} {', '.join(f'{number:g}' for number in row)}" for row in (usual, values[odd[0]])
            )
            text = f"expected {expected} as in most slices, found {found} in {_few(planes[n] for n in odd)}"
            findings.add("error", f"mixed {what}", f"{_folder(series)}: {text}")
    [(usual, _), *others] = Counter(plane.frame_of_reference for plane in planes).most_common()
    if others:
        names = _few(plane for plane in planes if plane.frame_of_reference != usual)
        text = "slices of another frame of reference, whose positions cannot be compared"
        findings.add("error", "mixed frames of reference", f"{_folder(series)}: {text}: {names}")


def _check_syntax(planes: Sequence[Plane], findings: Findings) -> None:
    for syntax in {plane.syntax: plane for plane in planes}.values():
        with warnings.catch_warnings(action="ignore"):  # about a UID that is none
            name, needed = _decoded_by(syntax.syntax)
        if needed:
            text = f"{syntax.path}: compressed as {name}: {needed}; install that, or save the scan uncompressed"
            findings.add("error", "compression", text)


def _decoded_by(syntax: str) -> tuple[str, str | None]:
    """The name of a transfer syntax, and what is missing to decode it; None where nothing is."""
    pydicom = require_pydicom()
    from pydicom.pixels import get_decoder

    uid = pydicom.uid.UID(syntax)
    try:
        decoder = get_decoder(uid)
        packages = "; ".join(decoder.missing_dependencies)
        return uid.name, None if decoder.is_available else f"pydicom decodes it only with one of: {packages}"
    except NotImplementedError:
        return uid.name or "nothing that it says", "which pydicom cannot decode"


def _levels(planes: Sequence[Plane]) -> list[list[Plane]]:
    """The slices at each position, from the lowest along the normal of the images to the highest."""
    normal = np.cross(*planes[0].axes)
    heights = np.array([plane.position @ normal for plane in planes])
    levels: list[list[Plane]] = []
    top = -np.inf
    for n in np.argsort(heights, kind="stable"):
        if heights[n] - top > SAME_MM:
            levels.append([])
            top = heights[n]
        levels[-1].append(planes[n])
    return levels


def _grid(planes: Sequence[Plane], findings: Findings) -> Grid | None:
    """The grid of slices in their order; None, and an error among the findings, where no regular grid holds them."""
    first = planes[0]
    normal = np.cross(*first.axes)
    if len(planes) == 1:
        thickness = first.thickness_mm or first.between_mm
        if thickness is None:
            findings.add("error", "no thickness", f"{first.path}: one slice, and nothing says how thick it is")
            return None
        text = f"{first.path}: one slice, {thickness:g} mm thick; for a whole series give its folder"
        findings.add("info", "one slice", text, value=thickness)
        step = normal * thickness
    else:
        step = (planes[-1].position - first.position) / (len(planes) - 1)
        if not _evenly_spaced(planes, normal, step, findings):
            return None
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * first.spacing_mm[1]
    affine[:3, 1] = first.axes[1] * first.spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    shape = (first.size[1], first.size[0], len(planes))
    try:
        return usable_grid(shape, _TO_RAS @ affine, str(first.path))
    except SubjectError as error:
        findings.add("error", "no grid", error)
        return None


def _evenly_spaced(planes: Sequence[Plane], normal: np.ndarray, step: np.ndarray, findings: Findings) -> bool:
    """Whether one step leads from each slice to the next, which is `step` on average. Reports what deviates."""
    folder = planes[0].path.parent
    positions = np.array([plane.position for plane in planes])
    gaps = np.diff(positions @ normal)
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    in_steps = gaps / usual
    missing = np.flatnonzero(in_steps > 2 - UNEVEN).tolist()
    if missing:
        count = int((np.rint(in_steps[missing]) - 1).sum())
        names = _few(f"{in_steps[n]:.3g} x {usual:g} mm between {planes[n]} and {planes[n + 1]}" for n in missing)
        text = f"{folder}: {count} of {len(planes) + count} slices seem to be missing: {names}; export the series again"
        findings.add("error", "missing slices", text, value=count)
        return False
    # along the normal in slice distances, across it in pixels
    residuals = positions - positions[0] - np.arange(len(planes))[:, None] * step
    along = abs(residuals @ normal) / float(step @ normal)
    across = np.linalg.norm(residuals - np.outer(residuals @ normal, normal), axis=1) / min(planes[0].spacing_mm)
    uneven = np.concatenate([[0], abs(in_steps - 1)])  # of the slice above the gap
    worst = np.maximum(np.maximum(along, uneven), across)
    stated = planes[0].between_mm
    if stated is not None and abs(float(step @ normal) / stated - 1) > UNEVEN:
        text = f"{folder}: SpacingBetweenSlices is {stated:g} mm, but the slices lie {step @ normal:g} mm apart (taken)"
        findings.add("warning", "other spacing", f"{text}; some may be missing", value=stated)
    if worst.max() <= EVEN:
        return True
    found = f"distances from {gaps.min():.3f} to {gaps.max():.3f} mm, {step @ normal:.3f} on average"
    found += f"; up to {across.max():.2f} pixels to the side" if across.max() > EVEN else ""
    names = _few(planes[n] for n in np.argsort(-worst, kind="stable") if worst[n] > EVEN)
    if worst.max() > UNEVEN:
        text = f"{folder}: the slices are not evenly spaced ({found}): {names}; resample the scan to an even distance"
        findings.add("error", "uneven slices", text, value=worst.max())
        return False
    text = f"{folder}: the slices are not quite evenly spaced ({found}; taken as even): {names}"
    findings.add("warning", "uneven slices", text, value=worst.max())
    return True


def _fill(grid: Grid, levels: Sequence[Sequence[Plane]], findings: Findings) -> tuple[np.ndarray, float, float]:
    """HU (z, y, x) canonical, and their lowest and highest value. Raises SubjectError for pixels that cannot be had."""
    shape = grid.to_canonical(np.broadcast_to(np.int16(0), grid.shape)).shape
    with explained(f"subject {findings.subject}: {levels[0][0].path.parent}", "DICOM"):
        volume = np.empty(shape, np.int16)  # contiguous as it is read later; each slice goes to its place in it
    by_slice = np.moveaxis(grid.from_canonical(volume), 2, 0)
    filled = np.zeros(len(levels), bool)
    same: list[Plane] = []
    other: list[Plane] = []
    lowest, highest = np.inf, -np.inf
    by_file: dict[Path, list[tuple[int, Plane]]] = {}
    for k, level in enumerate(levels):
        for plane in level:
            by_file.setdefault(plane.path, []).append((k, plane))
    for path, places in by_file.items():
        with explained(f"subject {findings.subject}: {path}", "DICOM"):
            for (k, plane), hu in zip(places, _images([plane for _, plane in places]), strict=True):
                lowest, highest = min(lowest, float(hu.min())), max(highest, float(hu.max()))
                hu = np.clip(np.rint(hu), _INT16.min, _INT16.max).astype(np.int16).T
                if filled[k]:
                    (same if np.array_equal(by_slice[k], hu) else other).append(plane)
                by_slice[k] = hu if not filled[k] else by_slice[k]
                filled[k] = True
    folder = levels[0][0].path.parent
    if other:
        text = "different slices at one position (several phases or reconstructions in one series?)"
        findings.add("error", "doubled slices", f"{folder}: {text}: {_few(other)}; keep one of each", value=len(other))
    if same:
        text = f"{folder}: the same slice twice, one of each is taken: {_few(same)}"
        findings.add("warning", "doubled slices", text, value=len(same))
    return volume, lowest, highest


def _images(planes: Sequence[Plane]) -> Iterator[np.ndarray]:
    """The HU of slices of one file, float64 (rows, columns), in the order asked for."""
    from pydicom.pixels import iter_pixels

    path = planes[0].path
    with warnings.catch_warnings(action="ignore"):  # what matters raises
        try:
            images = iter_pixels(path, indices=[plane.frame for plane in planes], raw=True)
            for plane, image in zip(planes, images, strict=True):
                if image.shape != plane.size or image.dtype.kind not in "bui":
                    raise EOFError(f"expected an image of {plane.size} whole numbers, found {image.shape}")
                yield _hu(image, plane)
        except AttributeError as error:  # an attribute that is not there
            raise EOFError(f"no pixels, or nothing that says how they are stored: {error}") from error


def _hu(image: np.ndarray, plane: Plane) -> np.ndarray:
    slope, intercept = plane.rescale or (1.0, 0.0)
    hu = image * slope + intercept
    if plane.padding is not None:
        low, high = plane.padding
        padded = (image >= low) & (image <= high) & ((hu < MEASURED_HU[0]) | (hu > MEASURED_HU[1]))
        hu[padded] = NOT_MEASURED_HU
    return hu


def _folder(series: Series) -> Path:
    return [*(plane.path for plane in series.planes), *series.localizers][0].parent


def _few(items: Iterable[object], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
