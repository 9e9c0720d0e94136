"""Files of others, a reader or writer each. What is read is the same afterwards: label codes on a grid.

Each way in which people keep labels is a LabelSource: `mask_files.py` (a mask file a structure, as in the data sets of
TotalSegmentator) and `label_image.py` (one file in which each structure has a number); `nnunet.py` finds the cases of
nnU-Net's raw data folders. Scans come as NIfTI, as NRRD (`nrrd.py`) or as DICOM (`dicom.py` sorts the files into
series, `dicom_stack.py` makes a volume of one). All stand on `nifti.py`, and that on `gunzip.py`.

Segmentations leave as NIfTI (`nifti_writing.py`: masks, or one file with its names and tables, `label_writing.py`), for
3D Slicer (`segmentation_nrrd.py`), as DICOM SEG (`dicom_seg.py`) and as surfaces (`mesh_files.py`), in the codes of
`snomed.py` where these say what a structure is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from segkit.codes import CodeVolume
    from segkit.errors import Findings
    from segkit.formats.nifti import Grid


class LabelSource(Protocol):
    """The labels of one subject, wherever they are kept."""

    @property
    def structures(self) -> tuple[str, ...]:
        """The annotated structures, sorted; known without reading a volume. One not named was not annotated."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that `read` reads."""

    def read(self, grid: Grid, findings: Findings) -> CodeVolume:
        """Label codes on the file axes (i, j, k) of `grid`, the grid of the CT.

        What cannot be used or is doubtful goes into `findings`, all of it: nothing is raised for it. With an error
        among them the codes are not complete.
        """
