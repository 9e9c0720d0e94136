"""What a segmentation is written as: a format's name -> its files, for the viewers that people use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from segkit import pages
from segkit.codes import CodeVolume
from segkit.errors import Findings, SegkitError
from segkit.formats import dicom_seg, label_writing, mesh_files
from segkit.formats.mask_files import write_mask_files
from segkit.formats.segmentation_nrrd import write_segmentation
from segkit.inference import Segmentation
from segkit.labels import check_name, rgb_of
from segkit.measuring import measure
from segkit.meshes import Mesh, make_meshes
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


def _masks(job: Job) -> None:
    job.files_in("segmentations", lambda folder: write_mask_files(folder, job.codes, job.scan.grid))


def _label_image(job: Job) -> None:
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


def _itksnap(job: Job) -> None:
    _label_image(job)
    job.file("_labels.txt", lambda path: label_writing.write_itksnap_table(path, job.codes.structures))


def _slicer(job: Job) -> None:
    job.file(".seg.nrrd", lambda path: write_segmentation(path, job.codes, job.scan.grid))
    title = f"{job.scan.name}_labels.ctbl"
    job.file("_labels.ctbl", lambda path: label_writing.write_slicer_table(path, job.codes.structures, title))


def _dicom(job: Job) -> None:
    segmentations = dicom_seg.make_segmentations(job.codes, job.scan.grid, job.scan.files)
    for number, made in enumerate(segmentations, start=1):
        job.file("_seg.dcm" if number == 1 else f"_seg_{number}.dcm", made.save_as)
    if not any(file.suffix == ".dcm" for file in job.files):
        text = f"{job.scan.name}: no structure was found, and DICOM SEG allows no file without any"
        job.findings.add("warning", "nothing found", text)


def _stl(job: Job) -> None:
    def write(folder: Path) -> None:
        for name, mesh in job.meshes.items():
            mesh_files.write_stl(folder / f"{name}.stl", mesh.vertices, mesh.faces, name)

    job.files_in("stl", write)


def _ply(job: Job) -> None:
    def write(folder: Path) -> None:
        for name, mesh in job.meshes.items():
            path = folder / f"{name}.ply"
            mesh_files.write_ply(path, mesh.vertices, mesh.faces, rgb_of(name), name)

    job.files_in("ply", write)


def _html(job: Job) -> None:
    figure = pages.mesh_figure(job.scan.name, {"segmentation": job.meshes})
    job.file("_3d.html", lambda path: pages.write_page(path, figure))


def _csv(job: Job) -> None:
    table = measure(job.codes, job.scan.hu_volume, job.scan.grid)
    job.file("_structures.csv", lambda path: write_csv(path, table, float_format="%.6g"))


_WRITERS: Mapping[str, tuple[Callable[[Job], None], str]] = {
    "nifti": (_label_image, "one NIfTI file, a number a structure, names and colours inside it and in a JSON file"),
    "masks": (_masks, "a NIfTI mask a structure in segmentations/, as the data set has them; overlaps are kept"),
    "slicer": (_slicer, "3D Slicer's .seg.nrrd, overlaps are kept, and a colour table"),
    "itksnap": (_itksnap, "the NIfTI file and ITK-SNAP's label description"),
    "dicom": (_dicom, "DICOM SEG that refers to the series of the scan; needs the extra dicom"),
    "stl": (_stl, "a surface a structure in stl/, mm, LPS"),
    "ply": (_ply, "a coloured surface a structure in ply/, mm, LPS"),
    "html": (_html, "a 3D page that opens in a browser without a network"),
    "csv": (_csv, "volume in ml, mean HU, bounding box of each structure"),
}

FORMATS: Mapping[str, str] = {name: text for name, (_, text) in _WRITERS.items()}
"""The formats, a line each."""


def check_formats(formats: Sequence[str], sources: Sequence[ScanSource] = ()) -> None:
    """Raise SegkitError for a format that there is not, whose packages are missing, or that a source cannot have."""
    for name in formats:
        if name not in FORMATS:
            known = "\n".join(f"  {known}: {text}" for known, text in FORMATS.items())
            raise SegkitError(f"format {name!r}: expected one or more of\n{known}")
    if "dicom" in formats:
        dicom_seg.check_installed()
        for source in sources:
            if source.series is None:
                raise SegkitError(
                    f"{source.path}: format 'dicom' refers to the images of a DICOM series, and this is none; choose "
                    "'nifti' or 'slicer', or give the series as input"
                )


def write(
    formats: Sequence[str], scan: Scan, segmentation: Segmentation, folder: str | Path, findings: Findings
) -> list[Path]:
    """Write a segmentation into `folder`, which exists, in each of `formats` (`FORMATS`); returns the files.

    Shape, orientation and affine are those of the scan's file. What a format cannot hold goes into `findings`. Raises
    SegkitError as `check_formats`, and where a structure's name is not safe in a file.
    """
    check_formats(formats)
    for name in segmentation.codes.structures:
        check_name(name)
    job = Job(scan, segmentation, Path(folder), findings)
    for name in formats:
        writer, _ = _WRITERS[name]
        writer(job)
    return job.files
