"""Faults: damaged files of data sets and runs: JSON, CSV, stores, checkpoints, states.

Each is read right, or refused with its file named; nothing hangs or fills memory. What has a checksum (stores, kept
predictions, checkpoints, shared models) is as it was written or refused.
"""

import contextlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_nifti, write_subject
from damage import VALUES, changed, damaged, damaged_json, try_all, with_pieces
from hypothesis import strategies as st

from segkit import comparison, evaluation, labels, staging
from segkit.checkpoints import best_checkpoint, load_checkpoint, save_checkpoint
from segkit.codes import CodeVolume, encode
from segkit.download import downloading
from segkit.errors import SegkitError
from segkit.formats.label_image import read_names
from segkit.formats.nnunet import find_cases
from segkit.ranks import join_ranks
from segkit.runs import write_json
from segkit.seen import read_split
from segkit.settings import NO_AUGMENTATION, TrainSettings
from segkit.sharing import _scores_of
from segkit.splits import SPLITS
from segkit.subjects import find_subjects, read_meta_split
from segkit.trainer import Trainer
from segkit.training import train
from segkit.training_state import load_state
from segkit.unet import UNet2D

NETWORK = {"in_channels": 1, "out_channels": 2, "features": [4, 8]}
LABELS = {"liver": 0, "spleen": 1}
SHAPE = (5, 6, 7)
SAFE = re.compile(r"[^\W_][\w.+-]*")


def save_network(path: Path) -> Path:
    torch.manual_seed(0)
    model = UNet2D(**NETWORK)
    settings = {**asdict(TrainSettings(target_shape=(32, 32), features=(4, 8))), "augmentation": {}}
    scores = {"val_dice": 0.5, "val_structures": 2, "thresholds": [0.5, 0.25]}
    return save_checkpoint(path, model, NETWORK, LABELS, settings, 1, scores, {"data": "a" * 64})


def a_subject(folder: Path, name: str = "s0") -> staging.StagedSubject:
    masks = {structure: np.random.default_rng(n).random(SHAPE) < 0.3 for n, structure in enumerate(LABELS)}
    write_subject(folder / "data" / name, masks)
    [subject] = [each for each in find_subjects(folder / "data")[0] if each.name == name]
    return staging.stage_subject(subject, folder / "staged")


def check_names(names) -> None:
    assert all(SAFE.fullmatch(name) and len(name) <= 100 for name in names) and len(set(names)) == len(names)


# --- JSON: what is damaged, where it lies, its content; how it is read, and what has to be of the result


def label_map(folder: Path):
    def check(channels):
        check_names(channels)
        assert list(channels.values()) == list(range(len(channels)))

    return folder / "label_map.json", LABELS, labels.load_label_map, check


def names_of_labels(folder: Path):
    def check(numbers):
        check_names(numbers)
        assert all(values and all(type(n) is int and n != 0 for n in values) for values in numbers.values())

    content = {"labels": {"background": 0, "liver": 1, "both lungs": [2, 3], "spleen": "4"}}
    return folder / "labels.json", content, read_names, check


def nnunet(folder: Path):
    write_nifti(folder / "imagesTr" / "case_0000.nii.gz", np.zeros(SHAPE, np.int16))
    write_nifti(folder / "labelsTr" / "case.nii.gz", np.zeros(SHAPE, np.uint8))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "ignore": 2}, "numTraining": 1,
               "file_ending": ".nii.gz"}  # fmt: skip

    def check(cases):
        for case in cases:
            check_names([case.name, *case.labels.structures])
            assert case.ct.parent == folder / "imagesTr" and case.labels.path.parent == folder / "labelsTr"
            assert case.labels.ignored is None or type(case.labels.ignored) is int

    return folder / "dataset.json", content, lambda path: list(find_cases(path.parent)), check


def split(folder: Path):
    parts = {name: [{"subject": f"s{n}", "slabs": None}] for n, name in enumerate(SPLITS)}
    parts["val"][0]["slabs"] = [[0, 8], [16, 24]]
    own = {"ct_bytes": {"s0": 5}, "source": "by hand", **parts}
    content = {"data_dir": "/data", **own, "earlier": [own, None]}

    def check(read):
        assert isinstance(read.data_dir, Path) and read.own.split.test
        for learned in filter(None, (read.own, *read.earlier)):
            assert isinstance(learned.ct_bytes, dict)
            for part in (part for name in SPLITS for part in getattr(learned.split, name)):
                check_names([part.subject])
                assert set(part.slices(40)) <= set(range(40))

    return folder / "split.json", content, read_split, check


def history(folder: Path):
    content = {"epochs": [{"epoch": n, "val_dice": d, "val": {"liver": d}} for n, d in ((1, 0.2), (2, None), (3, 0.7))]}
    for number in (1, 2, 3, 7):
        (folder / f"checkpoint_epoch{number}.pth").touch()

    def check(path):
        assert path.parent == folder and path.is_file()

    return folder / "training_history.json", content, lambda path: best_checkpoint(path.parent), check


def staged(folder: Path):
    subject = a_subject(folder)
    volume = subject.labels()
    [source], _ = find_subjects(folder / "data")

    def read(path):
        found = staging._load(path.parent, subject.info["fingerprint"])
        if found is None:  # then it is made again: the same as before
            again = staging.stage_subject(source, folder / "staged")
            assert again.info == subject.info
            raise SegkitError(f"{path}: made again")
        return found

    def check(found):
        assert found.info == subject.info and np.array_equal(found.labels().codes, volume.codes)

    return subject.folder / "subject.json", subject.info, read, check


def prediction(folder: Path):
    subject = a_subject(folder)
    volume = subject.labels()
    evaluation.save_prediction(folder / "predictions", subject, volume)
    path = folder / "predictions" / "s0.json"

    def check(found):
        assert same_codes(found, volume)

    return (
        path,
        json.loads(path.read_text()),
        lambda _: evaluation.load_prediction(folder / "predictions", subject),
        check,
    )


def same_codes(a: CodeVolume, b: CodeVolume) -> bool:
    alike = a.structures == b.structures and np.array_equal(a.codebook, b.codebook)
    return alike and np.array_equal(a.codes, b.codes)


def summary(folder: Path):
    checkpoint = load_checkpoint(save_network(folder / "checkpoint_epoch1.pth"))
    means = [{"measure": "dice", "over": over, "mean": 0.5, "low": 0.4, "high": 0.6, "n": 2, "cases": 4}
             for over in ("structures", "organs", "cases")]  # fmt: skip
    scores = {"macro_dice": 0.5, "macro_dice_low": 0.4, "macro_dice_high": 0.6, "structures": 2, "subjects": 2,
              "found": 1, "missed": 1, "false_alarms": 0, "correctly_absent": 1}  # fmt: skip
    content = {
        "checkpoints": [str(checkpoint.path)], "split": "test", "prediction": scores, "data": "a" * 64,
        "reference_through_target_shape": scores, "means": {"segkit": means}, "found_at_dice": 0.1,
        "nsd_tolerance_mm": 3.0, "threshold": None,
    }  # fmt: skip

    def check(card):
        assert "<b>" not in card and "=1+1" not in card and "../" not in card and "x" * 100 not in card

    path = folder / "evaluation_summary_20260101_000000.json"
    return path, content, lambda path: _scores_of(path.parent, [checkpoint]), check


JSON_FILES = (label_map, names_of_labels, nnunet, split, history, staged, prediction, summary)


@pytest.mark.parametrize("made", JSON_FILES, ids=lambda made: made.__name__)
def test_damaged_json(tmp_path, fault, many, made, capsys):
    path, content, read, check = made(tmp_path)
    row = fault(
        f"{path.name} damaged: {made.__name__}", "refused by name (or made again), or names and numbers that fit"
    )

    def read_it(text: bytes):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(text)
        return read(path)

    check(read_it(json.dumps(content).encode()))
    try_all(row, many(40, 250), damaged_json(content), read_it, check, path.name)


def test_the_state_of_a_download_damaged(tmp_path, fault, many):
    """It is made by the download itself; a damaged one counts as none."""
    row = fault(".download/state.json damaged", "what it says, or as if there were none")
    content = {"md5": "a", "release": "small", "finished": True, "folders": ["s0000", "s0001"], "url": "https://x"}
    (tmp_path / downloading.WORK).mkdir()

    def read(text: bytes) -> dict:
        (tmp_path / downloading.WORK / "state.json").write_bytes(text)
        state = downloading._read_state(tmp_path)
        if not state:
            raise SegkitError("as if there were none: state.json")
        return state

    def check(state):
        assert all(isinstance(name, str) for name in state.get("folders", []))

    try_all(row, many(30, 150), damaged_json(content), read, check, "state.json")


TWICE = {
    "label_map.json": ('{"liver": 0, "liver": 0}', labels.load_label_map),
    "labels.json": ('{"1": "liver", "1": "spleen"}', read_names),
    "same name.json": ('{"1": "liver", "2": "liver"}', read_names),
    "same number.json": ('{"liver": [], "spleen": 1}', read_names),
    "same safe name.json": ('{"a b": 1, "a_b": 2}', read_names),
}


def test_json_that_says_a_thing_twice(tmp_path, fault):
    row = fault("JSON with the same name twice, or one without a number", "refused by name, not the last one taken")
    for name, (text, read) in TWICE.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(SegkitError, match=name):
            read(tmp_path / name)
        row.times += 1


# --- CSV

META = (
    "\ufeffimage_id;age;gender;split\r\n" + "".join(f"s{n:04};5{n};m;{split}\r\n" for n, split in enumerate(SPLITS * 4))
).encode()  # fmt: skip


def test_damaged_meta_csv(tmp_path, fault, many):
    row = fault("meta.csv damaged", "refused by name, or subjects with one split each")

    def read(content: bytes) -> dict:
        (tmp_path / "meta.csv").write_bytes(content)
        return read_meta_split(tmp_path)

    def check(given):
        assert all(isinstance(name, str) and split in SPLITS for name, split in given.items())

    assert len(read(META)) == 12
    cells = [b";", b"\r\n", b'"', b"\0", b"train", b"\xff", b"a" * 200_000, b"s0000;1;m;val\r\n"]
    contents = damaged(META, len(META)) | with_pieces(META, cells)
    try_all(row, many(60, 300), contents, read, check, "meta.csv")


def scores_table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    tables = []
    for subject in ("s0", "s1"):
        volumes = [encode([(n, rng.random(SHAPE) < 0.3) for n in LABELS], SHAPE) for _ in range(2)]
        tables.append(evaluation.score_subject(subject, "test", *volumes, (1, 1, 1)).scores)
    return pd.concat(tables, ignore_index=True)


def test_damaged_scores(tmp_path, fault, many, recwarn):
    row = fault(
        "evaluation_results_<stamp>.csv damaged, then compared", "refused by name, or scores that their counts give"
    )
    path, whole = tmp_path / "evaluation_results_20260101_000000.csv", scores_table()
    text = whole.to_csv(index=False).encode()

    def read(content: bytes) -> pd.DataFrame:
        path.write_bytes(content)
        table = evaluation.load_scores(path)
        with contextlib.suppress(SegkitError):  # no case in common with the other table, for example
            comparison.compare({"a": whole, "b": table})
            comparison.compare({"a": table, "b": table}, "hd95_mm")
        return table

    def check(table):
        check_names({*table["subject"]} | {*table["structure"]})
        tp, fp, fn = (table[name].to_numpy(float) for name in ("tp", "fp", "fn"))
        with np.errstate(invalid="ignore"):
            assert np.allclose(table["dice"], 2 * tp / (2 * tp + fp + fn), equal_nan=True)
        assert ((tp + fn > 0) == table["present"]).all() and (table["reference_voxels"] == tp + fn).all()

    pd.testing.assert_frame_equal(read(text), whole)
    cells = [b",", b"\n", b'"', b"nan", b"inf", b"-1", b"=1+1", b"\0", b"True", b"1e400", b"9" * 400, b"liver", b"\xff"]
    contents = damaged(text, len(text)) | with_pieces(text, cells)
    try_all(row, many(60, 300), contents, read, check, path.name)


# --- stores


@pytest.mark.parametrize("name", ["ct", "codes", "prediction"])
def test_damaged_stores(tmp_path, fault, many, name):
    row = fault(
        f"compressed voxels of a store damaged ({name}.b2nd)", "refused by name, or bit for bit what was written"
    )
    subject = a_subject(tmp_path)
    hu, volume = subject.hu(), subject.labels()
    if name == "prediction":
        evaluation.save_prediction(tmp_path / "kept", subject, volume)
    [path] = [tmp_path / "kept" / "s0.b2nd"] if name == "prediction" else subject.folder.glob(f"{name}-*.b2nd")

    def read(content: bytes):
        path.unlink()
        path.write_bytes(content)
        if name == "prediction":
            return None, [evaluation.load_prediction(tmp_path / "kept", subject)]
        opened = staging.StagedSubject(subject.folder, subject.info)
        return opened.hu(), [opened.labels(), *(opened.labels(z) for z in range(SHAPE[2]))]

    def check(found):
        read_hu, read_labels = found
        assert read_hu is None or np.array_equal(read_hu, hu)
        assert same_codes(read_labels[0], volume)
        assert all(np.array_equal(plane.codes, volume.codes[z]) for z, plane in enumerate(read_labels[1:]))

    try_all(row, many(50, 300), damaged(path.read_bytes(), 200), read, check, path.name)


def test_a_store_that_was_cut_short_is_made_again(tmp_path, fault, many):
    row = fault("a file of a store cut short, or gone", "the subject is staged again, to the same")
    subject = a_subject(tmp_path)
    [source], _ = find_subjects(tmp_path / "data")
    hu, volume = subject.hu(), subject.labels()
    names = sorted(path.name for path in subject.folder.iterdir())
    assert len(names) == 3
    for name in names:
        content = (subject.folder / name).read_bytes()
        for end in [None, 0, *range(1, len(content), max(1, len(content) // many(4, 30)))]:
            (subject.folder / name).unlink()
            if end is not None:
                (subject.folder / name).write_bytes(content[:end])
            again = staging.stage_subject(source, tmp_path / "staged")
            assert np.array_equal(again.hu(), hu) and same_codes(again.labels(), volume)
            row.times += 1


# --- checkpoints


def same_network(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["checkpoint_epoch1.pth", "model.safetensors"])
def test_damaged_checkpoints(tmp_path, fault, many, name):
    row = fault(
        f"a checkpoint damaged ({Path(name).suffix})", "refused by name, or every weight and setting as written"
    )
    path = save_network(tmp_path / name)
    whole = load_checkpoint(path)

    def read(content: bytes):
        path.write_bytes(content)
        return load_checkpoint(path)

    def check(found):
        assert same_network(found.model, whole.model) and (found.label_map, found.epoch) == (LABELS, 1)
        assert (found.settings, found.scores, found.record) == (whole.settings, whole.scores, whole.record)

    try_all(row, many(50, 300), damaged(path.read_bytes(), 1500), read, check, name)


WEIGHTS = (torch.zeros(3), torch.tensor(float("nan")), torch.zeros(4, 1, 3, 3).to_sparse(), {"x": torch.zeros(1)}, "w")


def other_content(content: dict) -> st.SearchStrategy:
    """What torch.save can write: the content with other values, tensors among them."""
    return changed(content, [*VALUES, *WEIGHTS, float("nan"), float("inf"), (1, 2), {1: 2}])


def test_checkpoints_with_other_content(tmp_path, fault, many):
    row = fault("a checkpoint of whole bytes with other content", "refused by name, or a network that predicts")
    path = save_network(tmp_path / "checkpoint_epoch1.pth")
    content = torch.load(path, weights_only=True)

    def read(changed):
        torch.save(changed, path)
        return load_checkpoint(path)

    def check(found):
        check_names(found.label_map)
        assert len(found.thresholds) == len(found.label_map) and all(0 < t < 1 for t in found.thresholds)
        with torch.no_grad():
            logits = found.model(torch.zeros(1, 1, *found.target_shape))
        assert logits.shape == (1, len(found.label_map), *found.target_shape) and logits.isfinite().all()

    try_all(row, many(40, 300), other_content(content), read, check, path.name)


@pytest.fixture(scope="module")
def stopped(phantom_data, tmp_path_factory):
    """The folder of a training of one epoch, and a trainer of the same that has not begun."""
    settings = TrainSettings(
        epochs=2, batch_size=4, target_shape=(32, 32), features=(4, 8), slices_per_epoch=8, validation_slices=2,
        device="cpu", augmentation=NO_AUGMENTATION, balance=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("stopped")
    train(phantom_data, settings, folder, progress=False, on_epoch=_stop)
    return folder / "last_state.pth", Trainer(phantom_data, settings.checked(), join_ranks("cpu"), folder)


def _stop(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["bytes", "content"])
def test_damaged_states(stopped, tmp_path, fault, many, kind):
    row = fault(f"last_state.pth damaged: {kind}", "refused by name, or a training that can go on")
    saved, trainer = stopped
    path = tmp_path / saved.name
    shutil.copy(saved, path)
    content = torch.load(path, weights_only=True)
    contents = damaged(path.read_bytes(), 1500) if kind == "bytes" else other_content(content)

    def read(changed):
        path.write_bytes(changed) if kind == "bytes" else torch.save(changed, path)
        trainer.restore(load_state(path), path)
        return trainer

    def check(found):
        assert all(tensor.isfinite().all() for tensor in found.learner.network.state_dict().values())
        assert [row["epoch"] for row in found.history] == list(range(1, len(found.history) + 1))
        write_json(tmp_path / "history.json", found.history)  # as the next epoch would

    read(path.read_bytes() if kind == "bytes" else content)
    try_all(row, many(30, 200), contents, read, check, path.name)
