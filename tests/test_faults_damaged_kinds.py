"""Faults: what lies in the place of a file: nothing, a folder, a pipe, a device, a link, a file of another user."""

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import write_nifti
from damage import watched
from dicom_files import make_series, save
from test_faults_damaged import a_subject, save_network, scores_table
from test_faults_damaged_scans import AFFINE, HU, nrrd_header, read_one

from segkit import evaluation, labels, staging
from segkit.checkpoints import best_checkpoint, load_checkpoint
from segkit.errors import Findings, SegkitError
from segkit.formats.label_image import read_names
from segkit.reading import read_ct, read_labels, refuse
from segkit.seen import read_split
from segkit.subjects import find_subjects
from segkit.training_state import load_state

NOBODY = 65534


def read_subject(path: Path) -> None:
    """The subject that a file belongs to, as the audit reads it."""
    data_dir = next(folder for folder in path.parents if folder.name == "data")
    subjects, problems = find_subjects(data_dir)
    if problems:
        raise SegkitError(problems[0])
    findings = Findings(subjects[0].name)
    read = read_ct(subjects[0], findings)
    refuse(findings)
    read_labels(subjects[0], read[1], findings)
    refuse(findings)


def readers(folder: Path) -> dict[Path, Callable[[Path], object]]:
    """Files that can be read, and what reads each."""
    subject = a_subject(folder)
    evaluation.save_prediction(folder / "predictions", subject, subject.labels())
    write_nifti(folder / "scan.nii.gz", HU, AFFINE)
    (folder / "scan.nrrd").write_bytes(nrrd_header("raw") + HU.tobytes(order="F"))
    dicom = min(save(make_series(HU[..., :1], AFFINE), folder / "series").iterdir())
    (folder / "data" / "meta.csv").write_text("image_id;split\ns0;train\n")
    (folder / "labels.json").write_text('{"liver": 1}')
    (folder / "label_map.json").write_text('{"liver": 0}')
    parts = [{"subject": "s0", "slabs": None}]
    split = {"data_dir": "x", "ct_bytes": {}, "source": "x", "train": parts, "val": parts, "test": parts}
    (folder / "split.json").write_text(json.dumps(split))
    (folder / "training_history.json").write_text('{"epochs": [{"epoch": 1, "val_dice": 0.5}]}')
    (folder / "scores.csv").write_text(scores_table().to_csv(index=False))

    def read_store(_):
        opened = staging.StagedSubject(subject.folder, subject.info)
        return opened.hu(), opened.labels()

    def read_prediction(_):
        return evaluation.load_prediction(folder / "predictions", subject)

    return {
        folder / "data" / "s0" / "ct.nii.gz": read_subject,
        folder / "data" / "s0" / "segmentations" / "liver.nii.gz": read_subject,
        folder / "data" / "meta.csv": read_subject,
        folder / "scan.nii.gz": read_one,
        folder / "scan.nrrd": read_one,
        dicom: read_one,
        folder / "labels.json": read_names,
        folder / "label_map.json": labels.load_label_map,
        folder / "split.json": read_split,
        folder / "training_history.json": lambda path: best_checkpoint(path.parent),
        save_network(folder / "checkpoint_epoch1.pth"): load_checkpoint,
        save_network(folder / "model.safetensors"): load_checkpoint,
        folder / "scores.csv": evaluation.load_scores,
        **dict.fromkeys(sorted(subject.folder.glob("*.b2nd")), read_store),
        folder / "predictions" / "s0.json": read_prediction,
        folder / "predictions" / "s0.b2nd": read_prediction,
    }


KINDS = {
    "an empty file": lambda path: path.touch(),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}


@contextmanager
def no_waiting(seconds: int = 600):
    """A pipe that is opened waits for ever, and takes no time of the processor."""

    def stop(*_: object) -> None:
        raise BaseException(f"waited for {seconds} s")  # no Exception: readers catch these

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file(tmp_path, fault, kind):
    row = fault(f"{kind} in the place of a file of each kind that is read", "refused by name")
    refused = []
    for path, read in readers(tmp_path).items():
        read(path)  # as it is it can be read
        path.rename(path.with_name("moved"))
        KINDS[kind](path)
        if kind == "nothing" and path.name == "meta.csv":  # a data set need not have one
            read(path)
        else:
            with watched(), no_waiting(), pytest.raises(SegkitError) as error:
                read(path)
            refused.append(path)
            assert path.name in str(error.value) or f"{path.parent}" in str(error.value)
        if path.is_symlink() or path.exists():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.with_name("moved").rename(path)
        row.times += 1
    assert len(refused) >= 16


@contextmanager
def as_nobody():
    """As a user to whom the permissions of files apply: to root they do not. Not in a fork: there are threads."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def open_folder():
    """A folder that every user can look into; those of pytest are its user's own."""
    folder = Path(tempfile.mkdtemp(prefix="segkit_faults_"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_files_that_may_not_be_read(open_folder, fault):
    row = fault(
        "a file, or the folder that it lies in, that may not be read (as another user than root)", "refused by name"
    )
    for path, read in readers(open_folder).items():
        read(path)  # once as oneself: what is imported late need not lie where others may look
        for closed in {path, path.parent} - {open_folder}:
            with as_nobody():
                read(path)
            mode = closed.stat().st_mode
            closed.chmod(0)
            with as_nobody(), pytest.raises(SegkitError) as error:
                read(path)
            closed.chmod(mode)
            assert path.parent.name in str(error.value), (path, closed)
            row.times += 1
    assert row.times >= 24


def test_a_state_that_is_none(tmp_path, fault):
    row = fault("something else in the place of last_state.pth", "refused by name")
    path = tmp_path / "last_state.pth"
    for make in (path.mkdir, path.touch, lambda: os.mkfifo(path), lambda: np.savez(path.open("wb"), a=np.zeros(3))):
        make()
        with watched(), no_waiting(), pytest.raises(SegkitError, match=r"last_state\.pth"):
            load_state(path)
        path.rmdir() if path.is_dir() else path.unlink()
        row.times += 1
