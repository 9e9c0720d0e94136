import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_subject
from hypothesis import given
from hypothesis import strategies as st

from segkit.errors import SegkitError
from segkit.splits import SLAB_SLICES, Part, Split, make_split
from segkit.subjects import Subject, find_subjects, read_meta_split, select_subjects

MASK = {"liver": np.ones((3, 3, 3))}


def test_finds_subjects_and_names_what_is_left_out(tmp_path):
    write_subject(tmp_path / "s0001", {**MASK, "aorta": np.zeros((3, 3, 3))})
    write_subject(tmp_path / "s0000", MASK)
    write_subject(tmp_path / "no_ct", MASK)
    (tmp_path / "no_ct" / "ct.nii.gz").unlink()
    (tmp_path / "no_masks").mkdir()
    (tmp_path / "no_masks" / "ct.nii.gz").touch()
    write_subject(tmp_path / "bad name", MASK)
    write_subject(tmp_path / "bad_mask", {"=cmd": MASK["liver"]})
    (tmp_path / "notes").mkdir()
    (tmp_path / "s0000" / "segmentations" / "._liver.nii.gz").touch()  # macOS leaves such files in archives
    (tmp_path / "s0001" / "segmentations" / "colon.nrrd").touch()
    subjects, problems = find_subjects(tmp_path)
    assert [subject.name for subject in subjects] == ["s0000", "s0001"]
    assert subjects[1].structures == ("aorta", "liver") and subjects[0].structures == ("liver",)
    assert len(problems) == 5 and any("colon.nrrd: is no NIfTI" in str(problem) for problem in problems)
    assert any(problem.subject == "no_ct" and "ct.nii.gz is missing" in problem.message for problem in problems)
    assert {problem.subject: problem.severity for problem in problems} == {
        "no_ct": "error", "no_masks": "error", "bad name": "error", "bad_mask": "error", "s0001": "warning"
    }  # fmt: skip


def test_a_path_without_subjects_says_what_was_expected_and_found(tmp_path):
    with pytest.raises(SegkitError, match=r"nowhere: no such folder"):
        find_subjects(tmp_path / "nowhere")
    with pytest.raises(SegkitError, match=r"no subjects: expected folders like s0000/"):
        find_subjects(tmp_path)
    write_subject(tmp_path / "top" / "s0000", MASK)
    with pytest.raises(SegkitError, match=r"one level down: give .*top"):
        find_subjects(tmp_path)
    with pytest.raises(SegkitError, match=r"give its parent folder, .*top"):
        find_subjects(tmp_path / "top" / "s0000")


def test_meta_csv_of_the_data_set_with_byte_order_mark(tmp_path):
    assert read_meta_split(tmp_path) == {}
    path = tmp_path / "meta.csv"
    path.write_bytes("\ufeffimage_id;age;split\r\ns0000;50;train\r\n s0001 ;;Val\r\ns0002;3;\r\n".encode())
    assert read_meta_split(tmp_path) == {"s0000": "train", "s0001": "val"}
    path.write_text("image_id;split\ns0000;validation\n")
    with pytest.raises(SegkitError, match=r"meta\.csv: expected the splits train, val, test or none, found validation"):
        read_meta_split(tmp_path)
    path.write_text("image_id,split\ns0000,train\n")
    with pytest.raises(SegkitError, match=r"meta\.csv: expected columns image_id and split"):
        read_meta_split(tmp_path)


def names(parts):
    return [part.subject for part in parts]


def test_meta_csv_decides_and_who_is_not_in_it_trains():
    split = make_split(dict.fromkeys("abcd", 10), {"b": "val", "c": "test"})
    assert (names(split.train), names(split.val), names(split.test)) == (["a", "d"], ["b"], ["c"])


def test_without_validation_a_seeded_share_of_train_and_without_test_the_validation():
    slices = {f"s{i:02d}": 5 for i in range(20)}
    split = make_split(slices, {}, seed=3)
    assert (
        split.test_name == "val" and make_split({"a": 1, "b": 1, "c": 1}, {"b": "val", "c": "test"}).test_name == "test"
    )
    assert len(split.val) == 2 and split.test == split.val and len(split.train) == 18
    assert not set(names(split.train)) & set(names(split.val))
    assert make_split(slices, {}, seed=3) == split != make_split(slices, {}, seed=4)
    assert "seed 3" in split.source and "no test subjects" in split.source


def test_one_subject_is_split_into_slabs_in_turn():
    split = make_split({"a": 20}, {})
    assert split.train == (Part("a", ((0, 8), (16, 20))),) and split.val == split.test == (Part("a", ((8, 16),)),)
    assert SLAB_SLICES == 8
    with pytest.raises(SegkitError, match=r"a is the only one and has 8 slices"):
        make_split({"a": 8}, {})


@given(st.integers(9, 400))
def test_slabs_share_no_slice_and_leave_none_out(total):
    split = make_split({"a": total}, {})
    train, test = split.train[0].slices(total), split.test[0].slices(total)
    assert sorted(train + test) == list(range(total))


@given(st.integers(1, 30), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5))
def test_a_split_never_puts_a_subject_on_both_sides(train, val, test, seed):
    meta = {f"t{i}": "train" for i in range(train)}
    meta |= {f"v{i}": "val" for i in range(val)} | {f"e{i}": "test" for i in range(test)}
    if len(meta) == 1:
        return
    split = make_split(dict.fromkeys(meta, 4), meta, seed)
    assert split.train and split.val and split.test
    assert not set(names(split.train)) & (set(names(split.val)) | set(names(split.test)))
    assert Split.from_json(json.loads(json.dumps(split.to_json())), "x") == split


def test_a_damaged_split_is_named():
    for content in ({}, {"train": 3}, {"source": "", "train": [{"subject": "../x", "slabs": None}]}, []):
        with pytest.raises(SegkitError, match=r"split\.json"):
            Split.from_json(content, "split.json")


def subjects_named(*all_names, split=lambda number: None):
    return [Subject(name, None, None, None, split(number)) for number, name in enumerate(all_names)]


def test_select_keeps_a_share_of_each_split():
    everyone = subjects_named(
        *[f"s{i:03d}" for i in range(100)], split=lambda i: "test" if i % 10 == 0 else "val" if i % 10 == 1 else "train"
    )
    for maximum, expected in ((3, (1, 1, 1)), (20, (16, 2, 2)), (100, (80, 10, 10))):
        chosen = select_subjects(everyone, max_subjects=maximum)
        counted = tuple(sum(s.split == split for s in chosen) for split in ("train", "val", "test"))
        assert counted == expected
    assert select_subjects(everyone, max_subjects=20) == select_subjects(everyone, max_subjects=20)


def test_select_excludes_and_refuses_what_makes_no_sense():
    three = subjects_named("a", "b", "c")
    assert [s.name for s in select_subjects(three, exclude=["b"])] == ["a", "c"]
    for bad in ({"exclude": ["z"]}, {"exclude": ["a", "b", "c"]}, {"max_subjects": 0}):
        with pytest.raises(SegkitError):
            select_subjects(three, **bad)


def test_some_of_the_validation_subjects_are_no_test():
    split = make_split(dict.fromkeys("abcdefghij", 9), {}, 0)
    assert split.test_name == "val"
    split = make_split(dict.fromkeys("abcdefghij", 9), {"a": "val", "b": "val", "c": "val"}, 0)
    assert replace(split, test=split.test[:1]).test_name == "val"
    given = make_split(dict.fromkeys("abcdefghij", 9), {"a": "val", "b": "test", "c": "test"}, 0)
    assert replace(given, test=given.test[:1]).test_name == "test"


def test_a_folder_that_may_not_be_looked_into_is_named_and_the_others_are_used(tmp_path, monkeypatch):
    for name in ("s0", "s1"):
        write_subject(tmp_path / name, {"liver": np.ones((3, 3, 3))})
    closed, iterdir, is_file = tmp_path / "s1", Path.iterdir, Path.is_file

    def refusing(original, place):  # as the system answers; root may look everywhere
        def look(path):
            if place(path) == closed:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return original(path)

        return look

    monkeypatch.setattr(Path, "iterdir", refusing(iterdir, lambda path: path))
    monkeypatch.setattr(Path, "is_file", refusing(is_file, lambda path: path.parent))
    [subject], [problem] = find_subjects(tmp_path)
    assert subject.name == "s0"
    assert str(problem) == f"subject s1: {closed / 'ct.nii.gz'}: cannot be read (Permission denied)"
