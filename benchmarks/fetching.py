"""One random slice of a subject, CT and masks, as training asks for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.sides import Side
from benchmarks.staging import files_of
from benchmarks.tables import Table, rows_of

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment


def measure(bench: Bench) -> Table:
    data = bench.open(bench.subject_dir)
    [subject] = data.staged.values()
    store = {"folder": str(subject.folder)}
    plain = bench.scratch / "plain"
    plain.mkdir(exist_ok=True)
    np.save(plain / "ct.npy", subject.hu())
    np.save(plain / "codes.npy", subject.labels().codes)
    sides = [
        Side("segkit: HU and codes", "benchmarks.fetching:segkit", {**store, "items": 2000}),
        Side("segkit: the same, as batches of 8 through the loader", "benchmarks.fetching:loader",
             {**store, "items": 2000}),
        Side("nibabel: `dataobj[..., k]` of each .nii.gz", "benchmarks.fetching:nibabel",
             {"folder": str(bench.subject_dir), "items": 5}, "peer"),
        Side("memory-mapped .npy of HU and codes", "benchmarks.fetching:mapped",
             {"folder": str(plain), "items": 2000}, "floor"),
    ]  # fmt: skip
    if bench.peers:
        from benchmarks.epoch import nnunet_of_the_subject  # here: torch would count as memory of every side

        prepared = nnunet_of_the_subject(bench)
        folder = prepared.preprocessed / "nnUNetPlans_2d"
        parameters = {"folder": str(folder), "items": 200}
        sides.insert(3, Side("nnU-Net: its blosc2 data set", "benchmarks.fetching:nnunet", parameters, "peer"))
    taken = bench.turns(sides)
    what = (
        f"Milliseconds a slice of {bench.scan_name(subject.shape[1:])} pixels at random places of one subject with "
        f"{len(subject.structures)} masks, in one process."
    )
    notes = [
        "Memory-mapped files are not compressed: they take "
        f"{sum(path.stat().st_size for path in plain.iterdir()) / 1e6:.0f} MB, segkit's store "
        f"{sum(path.stat().st_size for path in subject.folder.iterdir()) / 1e6:.0f} MB."
    ]
    if not bench.peers:
        notes.append("nnU-Net's data set is left out: there is no environment of the peers.")
    return Table("fetching", "Fetch random slices", what, rows_of(sides, taken), notes, unit="ms")


def places(slices: int, items: int) -> Iterator[int]:
    """`items` slice numbers at random, the same for every side."""
    yield from random.Random(0).choices(range(slices), k=items)


def segkit(folder: str, items: int) -> Callable[[], dict]:
    subject = staged(folder)

    def work() -> dict:
        for z in places(subject.shape[0], items):
            subject.hu(z)
            subject.labels(z)
        return {"items": items}

    return work


def loader(folder: str, items: int) -> Callable[[], dict]:
    from segkit.slices import SliceDataset, batches
    from segkit.splits import Part

    subject = staged(folder)
    label_map = {name: channel for channel, name in enumerate(subject.structures)}
    data = SliceDataset({subject.name: subject}, [Part(subject.name)], label_map)

    def work() -> dict:
        for _ in batches(data, list(places(len(data), items)), 8):
            pass
        return {"items": items}

    return work


def staged(folder: str):
    """A subject of the store by its folder."""
    import json

    from segkit.staging import StagedSubject

    return StagedSubject(Path(folder), json.loads((Path(folder) / "subject.json").read_text()))


def nibabel(folder: str, items: int) -> Callable[[], dict]:
    import nibabel as nib

    def work() -> dict:
        files = [nib.load(path) for path in files_of(folder)]
        for z in places(files[0].shape[2], items):
            for image in files:
                np.asarray(image.dataobj[..., z])
        return {"items": items}

    return work


def nnunet(folder: str, items: int) -> Callable[[], dict]:
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    data = infer_dataset_class(folder)(folder)
    [case] = data.identifiers

    def work() -> dict:
        slices = data.load_case(case)[0].shape[1]
        for z in places(slices, items):
            image, labels, *_ = data.load_case(case)  # its loader does this for each sample of a batch
            np.asarray(image[:, z]), np.asarray(labels[:, z])
        return {"items": items}

    return work


def mapped(folder: str, items: int) -> Callable[[], dict]:
    arrays = [np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("ct", "codes")]

    def work() -> dict:
        for z in places(len(arrays[0]), items):
            for array in arrays:
                np.array(array[z])
        return {"items": items}

    return work
