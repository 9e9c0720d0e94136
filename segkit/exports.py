"""A segmentation in the formats of `choices.FORMATS`, a function each, for the viewers that people use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from segkit import pages
from segkit.choices import FORMATS, find
from segkit.codes import CodeVolume
from segkit.errors import Findings, SegkitError
from segkit.formats import dicom_seg, label_writing, mesh_files
from segkit.formats.mask_files import write_mask_files
from segkit.formats.segmentation_nrrd import write_segmentation
from segkit.inference import Segmentation
from segkit.labels import check_name, rgb_of
from segkit.measuring import measure
from segkit.meshes import Mesh, make_meshes
from segkit.reading import refuse
from segkit.runs import write_csv, write_whole, write_whole_folder
from segkit.scans import Scan, ScanSource


@dataclass
class Job:
    """One scan, what was found in it, and where its files go; all are called after the scan."""

    scan: Scan
    segmentation: Segmentation
    folder: Path
    findings: Findings
    files: list[Path] = field(default_factory=list)  # written so far

    @property
    def codes(self) -> CodeVolume:
        """The sets of structures of each voxel, (z, y, x) on the canonical axes of the scan's grid."""
        return self.segmentation.codes

    @cached_property
    def meshes(self) -> dict[str, Mesh]:
        """Of the structures that occur."""
        return make_meshes(self.codes, self.scan.grid)

    def file(self, ending: str, write: Callable[[Path], object]) -> None:
        """Let `write` make the file `<scan><ending>`, whole or not at all, unless another format made it already."""
        path = self.folder / f"{self.scan.name}{ending}"
        if path not in self.files:
            self.files.append(write_whole(path, write))

    def files_in(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill the folder `name`, which is there with all of its files or not at all."""
        self.files += sorted(write_whole_folder(self.folder / name, write).iterdir())


def as_masks(job: Job) -> None:
    """`segmentations/<structure>.nii.gz`, a mask each."""
    job.files_in("segmentations", lambda folder: write_mask_files(folder, job.codes, job.scan.grid))


def as_nifti(job: Job) -> None:
    """`<scan>_labels.nii.gz`, a number a structure, and `<scan>_labels.json` with the names."""
    names, best = job.codes.structures, job.segmentation.best
    if not any(file.name.endswith("_labels.nii.gz") for file in job.files):
        _say_what_is_lost(job)
    job.file("_labels.nii.gz", lambda path: label_writing.write_label_image(path, best, names, job.scan.grid))
    job.file("_labels.json", lambda path: label_writing.write_names(path, names))


def _say_what_is_lost(job: Job) -> None:
    voxels, labels = label_writing.lost_labels(job.codes)
    if voxels:
        job.findings.add(
            "info", "overlap lost",
            f"{job.scan.name}_labels.nii.gz: in {voxels} voxels structures overlap; this file keeps the likeliest of "
            f"each and loses {labels} labels; the formats masks and slicer keep all",
            value=labels,
        )  # fmt: skip


def as_itksnap(job: Job) -> None:
    """The NIfTI file, and `<scan>_labels.txt`, which ITK-SNAP imports."""
    as_nifti(job)
    job.file("_labels.txt", lambda path: label_writing.write_itksnap_table(path, job.codes.structures))


def as_slicer(job: Job) -> None:
    """`<scan>.seg.nrrd`, and `<scan>_labels.ctbl`, a colour table for the label image."""
    job.file(".seg.nrrd", lambda path: write_segmentation(path, job.codes, job.scan.grid))
    title = f"{job.scan.name}_labels.ctbl"
    job.file("_labels.ctbl", lambda path: label_writing.write_slicer_table(path, job.codes.structures, title))


def as_dicom(job: Job) -> None:
    """`<scan>_seg.dcm`, and further ones where structures overlap. SegkitError for a series that cannot have it."""
    segmentations = dicom_seg.make_segmentations(job.codes, job.scan.grid, job.scan.files)
    for number, made in enumerate(segmentations, start=1):
        job.file("_seg.dcm" if number == 1 else f"_seg_{number}.dcm", made.save_as)
    if not any(file.suffix == ".dcm" for file in job.files):
        text = f"{job.scan.name}: no structure was found, and DICOM SEG allows no file without any"
        job.findings.add("warning", "nothing found", text)


def as_stl(job: Job) -> None:
    """`stl/<structure>.stl`, a surface each."""

    def write(folder: Path) -> None:
        for name, mesh in job.meshes.items():
            mesh_files.write_stl(folder / f"{name}.stl", mesh.vertices, mesh.faces, name)

    job.files_in("stl", write)


def as_ply(job: Job) -> None:
    """`ply/<structure>.ply`, a coloured surface each."""

    def write(folder: Path) -> None:
        for name, mesh in job.meshes.items():
            path = folder / f"{name}.ply"
            mesh_files.write_ply(path, mesh.vertices, mesh.faces, rgb_of(name), name)

    job.files_in("ply", write)


def as_html(job: Job) -> None:
    """`<scan>_3d.html`, all surfaces on one page."""
    figure = pages.mesh_figure(job.scan.name, {"segmentation": job.meshes})
    job.file("_3d.html", lambda path: pages.write_page(path, figure))


def as_csv(job: Job) -> None:
    """`<scan>_structures.csv`, the table of `measuring.measure`."""
    table = measure(job.codes, job.scan.hu_volume, job.scan.grid)
    job.file("_structures.csv", lambda path: write_csv(path, table, float_format="%.6g"))


def check_formats(formats: Sequence[str], sources: Sequence[ScanSource] = (), structures: Sequence[str] = ()) -> None:
    """Raise SegkitError for a format that there is not, whose packages are missing, or that is not possible.

    sources: the scans, which for DICOM must be series with a file a slice. structures: what may be found; where each
    has a file of its own, no two names may differ in case alone.
    """
    for name in formats:
        if name not in FORMATS:
            raise SegkitError(f"format {name!r}: expected one or more of {', '.join(FORMATS)}")
        if FORMATS[name].file_each:
            _check_files_of_their_own(structures)
        if FORMATS[name].of_series:
            dicom_seg.check_installed()
            for source in sources:
                _check_series(name, source)


def _check_files_of_their_own(structures: Sequence[str]) -> None:
    """SegkitError for two structures whose files would be one on Windows and macOS, where case does not count."""
    seen: dict[str, str] = {}
    for name in structures:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise SegkitError(
                f"structures {other} and {name} differ in case alone: on Windows and macOS one file would overwrite "
                "the other; rename one of them, or choose a format with one file for all"
            )


def _check_series(name: str, source: ScanSource) -> None:
    if source.series is None:
        raise SegkitError(
            f"{source.path}: format {name!r} refers to the images of a DICOM series, and this is none; choose 'nifti' "
            "or 'slicer', or give the series as input"
        )
    if len(source.series.files) < len(source.series.planes):
        raise SegkitError(
            f"{source.path}: format {name!r} refers to a file a slice, and this series has several slices in one "
            "(an enhanced image); choose 'nifti' or 'slicer'"
        )


def check_scan(formats: Sequence[str], scan: Scan, findings: Findings) -> None:
    """Raise SubjectError for a scan that cannot be written in one of `formats`, before anybody segments it.

    The reason goes into `findings`, too.
    """
    if any(FORMATS[name].of_series for name in formats):
        try:
            dicom_seg.check_series(scan.grid, scan.files)
        except SegkitError as error:
            findings.add("error", "format", error)
        refuse(findings)


def write(
    formats: Sequence[str], scan: Scan, segmentation: Segmentation, folder: str | Path, findings: Findings
) -> list[Path]:
    """Write a segmentation into `folder`, which exists, in each of `formats` (`choices.FORMATS`); returns the files.

    Shape, orientation and affine are those of the scan's file. What a format cannot hold goes into `findings`. Raises
    SegkitError as `check_formats`, and where a structure's name is not safe in a file.
    """
    check_formats(formats, structures=segmentation.codes.structures)
    for name in segmentation.codes.structures:
        check_name(name)
    job = Job(scan, segmentation, Path(folder), findings)
    for name in formats:
        find(FORMATS[name].where)(job)
    return job.files
