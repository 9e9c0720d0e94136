"""What a person chooses by name: networks, normalisations, losses, formats of results. Plain data, without torch.

An entry in one of these tables and what it names are all that another one takes, see CONTRIBUTING.md. What computes is
named, "module:name", and imported where it is used (`find`): settings and `--help` are there at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Network:
    """A network that MODEL chooses, see `segkit.networks` for what it has to have."""

    where: str  # its class, which takes in_channels, out_channels, features, and what follows
    title: str  # in the cards of shared models
    takes: tuple[str, ...] = ()  # settings that its class takes, too, by the names of their fields
    slabs: bool = False  # whether it labels PATCH_SLICES neighbouring slices at a time; its class takes them as depth
    needs_monai: bool = False
    least_levels: int = 1  # of FEATURES
    least_channels: int = 1  # of each level


MODELS: Mapping[str, Network] = {
    "unet": Network("segkit.unet:UNet2D", "2D U-Net", takes=("norm",)),
    "attention_unet": Network(
        "segkit.networks:AttentionUNet", "2D U-Net with attention gates", needs_monai=True,
        least_channels=2,  # its gates halve them
    ),
    "unet3d": Network("segkit.networks:UNet3D", "3D U-Net", slabs=True, needs_monai=True, least_levels=2),
}  # fmt: skip
"""What MODEL chooses among."""

NORMS: Mapping[str, str] = {"instance": "segkit.norms:InstanceNorm", "batch": "torch.nn:BatchNorm2d"}
"""What NORM chooses among. With the statistics of a batch, what a slice becomes depends on those beside it."""


@dataclass(frozen=True)
class Terms:
    """What a loss is made of: bce * cross-entropy + dice * (1 - soft Dice), the cross-entropy with `gamma` focal."""

    bce: float = 1.0
    gamma: float = 0.0
    dice: float = 0.0
    helped: bool = True  # by positive weights and by an output that starts at each structure's frequency


FOCAL_GAMMA = 2.0
"""Exponent of the focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002)."""

LOSSES: Mapping[str, Terms] = {
    "bce": Terms(),
    "bce_dice": Terms(dice=1.0),
    "dice": Terms(bce=0.0, dice=1.0),
    "focal": Terms(gamma=FOCAL_GAMMA),
    "textbook": Terms(helped=False),
}
"""What LOSS chooses among. "textbook" is cross-entropy as it stands in textbooks, to compare with."""


@dataclass(frozen=True)
class Format:
    """What a segmentation can be written as."""

    where: str  # the function that writes it, of a `segkit.exports.Job`
    text: str  # what it is, in a line
    of_series: bool = False  # whether only a DICOM series can have it, and the extra dicom is needed
    file_each: bool = False  # whether each structure has a file that is called after it


FORMATS: Mapping[str, Format] = {
    "nifti": Format("segkit.exports:as_nifti", "one NIfTI file, names and colours inside it and in a JSON file"),
    "masks": Format(
        "segkit.exports:as_masks", "a NIfTI mask a structure, with overlaps, as in the data set", file_each=True
    ),
    "slicer": Format("segkit.exports:as_slicer", "3D Slicer's .seg.nrrd, overlaps are kept, and a colour table"),
    "itksnap": Format("segkit.exports:as_itksnap", "the NIfTI file and ITK-SNAP's label description"),
    "dicom": Format("segkit.exports:as_dicom", "DICOM SEG that refers to the series of the scan", of_series=True),
    "stl": Format("segkit.exports:as_stl", "a surface a structure in stl/, mm, LPS", file_each=True),
    "ply": Format("segkit.exports:as_ply", "a coloured surface a structure in ply/, mm, LPS", file_each=True),
    "html": Format("segkit.exports:as_html", "a 3D page that opens in a browser without a network"),
    "csv": Format("segkit.exports:as_csv", "volume in ml, mean HU, bounding box of each structure"),
}
"""What a segmentation is written as."""


def find(where: str) -> Any:
    """The class or function "module:name" that an entry names; its module is imported."""
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)
