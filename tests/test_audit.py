"""Each kind of defect is planted where the answer is known, and is found with nothing else; good data are quiet."""

import csv
import os
import shutil
from itertools import combinations
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import write_nifti, write_subject
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit import audit as module
from segkit.audit import Row, audit, summary, write_audit
from segkit.errors import SegkitError
from segkit.labels import OFFICIAL

SHAPE = (64, 48, 40)  # x to the right, y to the front, z up, 3 mm each
RAS_3MM = np.diag([3.0, 3.0, 3.0, 1.0])
BOXES = {
    "kidney_left": np.s_[16:20, 12:18, 6:12],
    "kidney_right": np.s_[44:48, 12:18, 6:12],
    "liver": np.s_[36:46, 22:32, 10:18],
    "lung_left": np.s_[16:28, 18:30, 22:40],
    "lung_right": np.s_[36:48, 18:30, 22:40],
    "spleen": np.s_[14:18, 20:26, 12:18],
    "trachea": np.s_[30:34, 22:26, 24:40],
    "vertebrae_L1": np.s_[29:35, 10:16, 14:19],
    "vertebrae_L2": np.s_[29:35, 10:16, 8:13],
    "vertebrae_L3": np.s_[29:35, 10:16, 2:7],
}


def box(where) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[where] = True
    return mask


def patient(seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """CT and masks: an oval trunk in air, both with noise, that the image cuts at both ends. Nothing is exactly 0."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    inside = ((x - 31.5) / 24) ** 2 + ((y - 23.5) / 17) ** 2 <= 1
    ct = np.where(inside, rng.integers(20, 60, SHAPE), rng.integers(-1020, -980, SHAPE)).astype(np.int16)
    for name, low, high in (("lung_left", -900, -800), ("lung_right", -900, -800), ("trachea", -1000, -999)):
        ct[BOXES[name]] = rng.integers(low, high, ct[BOXES[name]].shape)
    return ct, {name: box(where) for name, where in BOXES.items()}


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


def write_patient(folder: Path, ct=None, affine=RAS_3MM, seed: int = 0, **changes: np.ndarray | None) -> Path:
    """The patient with another CT, with other masks, and without those that are None."""
    good_ct, masks = patient(seed)
    masks = {name: mask for name, mask in {**masks, **changes}.items() if mask is not None}
    return write_subject(folder, masks, good_ct if ct is None else ct, affine)


def found(data_dir: Path, **options) -> list[tuple]:
    """(subject, severity, kind, structure, value) of every row."""
    table = audit(data_dir, progress=False, **options)
    assert list(table.columns) == list(Row._fields)
    return [
        (row.subject, row.severity, row.kind, row.structure, None if np.isnan(row.value) else row.value)
        for row in table.itertuples()
    ]


def messages(data_dir: Path) -> list[str]:
    table = audit(data_dir, progress=False)
    assert all(message.startswith(f"subject {s}: ") for s, message in zip(table.subject, table.message, strict=True))
    return table.message.tolist()


# good data are quiet


def test_phantoms_are_quiet_and_their_overlaps_are_counted(phantom_dir):
    table = audit(phantom_dir, progress=False)
    assert set(table.severity) == {"info"} and set(table.kind) == {"overlap"}
    [name] = table.subject[:1]
    masks = {
        path.name.removesuffix(".nii.gz"): np.asanyarray(nib.load(path).dataobj).ravel() > 0
        for path in sorted((phantom_dir / name / "segmentations").iterdir())
    }
    there = [structure for structure, mask in masks.items() if mask.any()]
    shared = {f"{a} + {b}": np.count_nonzero(masks[a] & masks[b]) for a, b in combinations(there, 2)}
    rows = table[table.subject == name]
    assert dict(zip(rows.structure, rows.value, strict=True)) == {pair: n for pair, n in shared.items() if n}


def test_a_real_torso_is_quiet(torso_dir):
    assert found(torso_dir) == []


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR"])
def test_the_patient_is_quiet_however_it_is_stored(data, orientation):
    write_patient(data / "s1")
    turn_files(data / "s1", orientation)
    assert found(data) == []


def turn_files(folder: Path, orientation: str) -> None:
    """Store the same voxels along other axes, with the affine that goes with it."""
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
        )
        nib.save(image.as_reoriented(turn), path)


@pytest.mark.parametrize("lowest", [-1000, -950, -500])
def test_air_cut_to_one_value_is_quiet_in_lungs_and_an_open_mouth(data, phantom_dir, lowest):
    ct = np.maximum(patient()[0], lowest)
    ct[30:34, 22:48, 24:30] = lowest  # from the trachea to the air in front
    write_patient(data / "s1", ct)
    shutil.copytree(phantom_dir / "s0000", data / "s2")  # has a head
    image = nib.load(data / "s2" / "ct.nii.gz")
    write_nifti(data / "s2" / "ct.nii.gz", np.maximum(np.asanyarray(image.dataobj), lowest), image.affine)
    assert {row[1:3] for row in found(data) if row[2] != "missing structures"} <= {("info", "overlap")}


@pytest.mark.parametrize(
    "cut", [np.s_[16:40, 16:32, 20:], np.s_[18:26, 20:48, 25:35], np.s_[:26, 24:, 22:30], np.s_[20:44, 20:28, 24:25]]
)
def test_lungs_cut_by_the_image_are_quiet(data, cut):
    ct, masks = patient()
    kept = {name: masks[name][cut] for name in ("lung_left", "lung_right", "trachea")}
    write_subject(data / "s1", kept, ct[cut], RAS_3MM)
    assert found(data) == []


def test_crops_of_a_real_torso_are_quiet(data, torso_dir):
    source = torso_dir / "s0000"
    names = ("colon", "stomach", "lung_lower_lobe_left", "lung_lower_lobe_right", "liver", "hip_left", "hip_right")
    masks = {n: np.asanyarray(nib.load(source / "segmentations" / f"{n}.nii.gz").dataobj) for n in names}
    image = nib.load(source / "ct.nii.gz")
    ct, rng = np.asanyarray(image.dataobj), np.random.default_rng(0)
    for number in range(8):
        size = rng.integers(20, 70, 3)
        start = rng.integers(0, np.array(ct.shape) - size)
        cut = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        cropped = np.maximum(ct[cut], -1000 if number % 2 else -3000)
        write_subject(data / f"s{number}", {n: mask[cut] for n, mask in masks.items()}, cropped, image.affine)
    assert {row[2] for row in found(data)} <= {"no air", "no label"}  # a crop may hold neither


@pytest.mark.parametrize("shape", [(3, 3, 3), (9, 8, 1), (1, 12, 9), (1, 1, 2), (2, 1, 1)])
def test_tiny_volumes_and_empty_masks(data, shape):
    ct = np.full(shape, 40, np.int16)
    ct.ravel()[-1] = -900
    full, empty = np.ones(shape), np.zeros(shape)
    write_subject(data / "s1", {"kidney_left": full, "kidney_right": empty, "liver": empty, "spleen": full * 0}, ct)
    assert found(data) == []
    write_subject(data / "s2", {"kidney_left": empty, "kidney_right": empty, "liver": empty, "spleen": empty}, ct + 1)
    assert found(data) == [("s2", "warning", "no label", "", None)]


# one subject


def test_structures_on_blank_slices(data):
    for blank in (4, 3):  # no multiple of the blocks
        ct, _ = patient()
        ct[:, :, :blank] = -1024
        write_patient(data / "s1", ct)
        assert found(data) == [("s1", "warning", "on padding", "vertebrae_L3", 6 * 6 * (blank - 2))]
    assert "vertebrae_L3: 36 of 180 voxels (20%) lie on padding" in messages(data)[0]


def test_structures_outside_the_circle_of_the_reconstruction(data):
    ct, masks = patient()
    x, y, _ = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    beyond = np.broadcast_to((x - 31.5) ** 2 + (y - 23.5) ** 2 > 15**2, SHAPE)
    write_patient(data / "s1", np.where(beyond, np.int16(-2048), ct))
    counts = {name: np.count_nonzero(mask & beyond) for name, mask in masks.items()}
    expected = [
        ("s1", "warning", "on padding", n, count) for n, count in counts.items() if count >= 0.1 * masks[n].sum()
    ]
    assert found(data) == expected and len(expected) == 5 < sum(count > 0 for count in counts.values())


def test_structures_where_a_tool_filled_with_water(data):
    ct, _ = patient()
    ct[:18] = 0
    write_patient(data / "s1", ct)
    values = {"kidney_left": 2 * 6 * 6, "lung_left": 2 * 12 * 18, "spleen": 4 * 6 * 6}
    assert found(data) == [("s1", "warning", "on padding", name, value) for name, value in values.items()]


def test_structures_outside_the_body(data):
    corner, above, rim = (
        box(np.s_[:5, :5, :6]),
        box(np.s_[28:36, 17:21, :]) | box(np.s_[:4, 46:, :]),
        box(np.s_[4:6, 20:28, 4:8]),
    )
    write_patient(data / "s1", stomach=corner, aorta=above, colon=rim)
    stray = 4 * 2 * 40  # 20 %
    assert found(data) == [
        ("s1", "warning", "outside the body", "aorta", stray),
        ("s1", "warning", "outside the body", "stomach", 150),
    ]  # the colon is within the margin
    assert "stomach: 150 of 150 voxels (100%) lie more than 10 mm outside the body" in messages(data)[1]
    write_patient(data / "s1", stomach=box(np.s_[:5, :5, :6]) | masks_of("liver"), aorta=None, colon=None)
    (data / "s1" / "segmentations" / "aorta.nii.gz").unlink()
    (data / "s1" / "segmentations" / "colon.nii.gz").unlink()
    assert [row[2:4] for row in found(data)] == [("outside the body", "stomach"), ("overlap", "liver + stomach")]


def masks_of(*names: str) -> np.ndarray:
    return np.any([box(BOXES[name]) for name in names], axis=0)


def test_a_structure_in_slices_without_a_body(data):
    ct, _ = patient()
    ct[:, :, 22:] = np.random.default_rng(1).integers(-1020, -980, ct[:, :, 22:].shape)
    write_patient(data / "s1", ct)
    sizes = {"lung_left": 12 * 12 * 18, "lung_right": 12 * 12 * 18, "trachea": 4 * 4 * 16}
    assert found(data) == [("s1", "warning", "outside the body", name, size) for name, size in sizes.items()]


def test_a_pair_with_exchanged_names(data):
    write_patient(data / "s1", kidney_left=masks_of("kidney_right"), kidney_right=masks_of("kidney_left"))
    apart_mm = (45.5 - 17.5) * 3
    assert found(data) == [("s1", "warning", "swapped sides", "kidney_left + kidney_right", apart_mm)]
    assert "kidney_left lies 84 mm to the right of kidney_right" in messages(data)[0]
    near = {"kidney_left": np.s_[31:35, 12:18, 6:12], "kidney_right": np.s_[28:32, 12:18, 6:12]}  # 9 mm apart
    write_patient(data / "s1", **{name: box(where) for name, where in near.items()})
    assert "swapped sides" not in [row[2] for row in found(data)]


@pytest.mark.parametrize(
    ("signs", "kind", "value", "says"),
    [
        ((-3, 3, 3), "swapped sides", 84, "seems mirrored: check the affine; 3 of 3 pairs lie wrong"),
        ((3, 3, -3), "vertebra order", 18, "seems upside down: check the affine; 2 of 2 pairs lie wrong"),
    ],
)
def test_a_mirrored_scan_gives_one_finding(data, signs, kind, value, says):
    write_patient(data / "s1", affine=np.diag([*map(float, signs), 1.0]))
    assert found(data) == [("s1", "warning", kind, "", value)]
    assert says in messages(data)[0]


def test_a_mirrored_patient_whose_sides_were_named_in_the_mirror(data):
    names = {"kidney_left": "kidney_right", "lung_left": "lung_right"}
    swapped = {a: masks_of(b) for pair in names.items() for a, b in (pair, pair[::-1])}
    write_patient(data / "s1", affine=np.diag([-3.0, 3.0, 3.0, 1.0]), **swapped)
    assert found(data) == [("s1", "warning", "swapped sides", "spleen + liver", (40.5 - 15.5) * 3)]


def test_vertebrae_in_the_wrong_order(data):
    assert {name for name in OFFICIAL if name.startswith("vertebrae_")} == set(module.VERTEBRAE)
    write_patient(data / "s1", vertebrae_L1=masks_of("vertebrae_L2"), vertebrae_L2=masks_of("vertebrae_L1"))
    assert found(data) == [("s1", "warning", "vertebra order", "vertebrae_L2 + vertebrae_L1", 18)]


def test_a_mask_saved_under_two_names(data):
    write_patient(data / "s1", kidney_left=masks_of("kidney_right"), stomach=masks_of("liver") | masks_of("spleen"))
    assert found(data) == [
        ("s1", "warning", "same mask", "kidney_left + kidney_right", 4 * 6 * 6),
        ("s1", "info", "overlap", "liver + stomach", 10 * 10 * 8),
        ("s1", "info", "overlap", "spleen + stomach", 4 * 6 * 6),
    ]


def test_regions_of_a_label_image_are_no_copies(data):
    folder = data / "s1"
    write_patient(folder)
    shutil.rmtree(folder / "segmentations")
    write_nifti(folder / "labels.nii.gz", masks_of("liver").astype(np.uint8), RAS_3MM)
    (folder / "labels.json").write_text('{"whole": [1, 2], "core": 1}')
    assert found(data) == [("s1", "info", "overlap", "core + whole", 800)]


@pytest.mark.parametrize(
    ("low", "high", "out", "says"),
    [
        (-160, 240, lambda hu: hu, "from -160 to 240, none below -200: a window of HU"),
        (-160, 240, lambda hu: (hu + 160) * 255 // 400, "from 0 to 255, none below -200: an 8-bit image"),
        (-1024, 3000, lambda hu: hu + 1024, "none below -200: HU + 1024, a window of HU"),
    ],
)
def test_a_ct_without_air(data, low, high, out, says):
    ct = patient()[0]
    ct[0, 0, 0], ct[31, 23, 20] = low, high
    ct = out(np.clip(ct, low, high).astype(int)).astype(np.int16)
    write_patient(data / "s1", ct)
    assert found(data) == [("s1", "warning", "no air", "", ct.min())]
    assert says in messages(data)[0]


# what reading reports arrives in the table


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (cut_short, "unreadable"),
        (lambda path: write_nifti(path, np.where(patient()[0] == 30, np.nan, patient()[0]), RAS_3MM), "NaN"),
        (lambda path: write_nifti(path, np.full(SHAPE, -1000, np.int16), RAS_3MM), "empty CT"),
        (lambda path: write_nifti(path, patient()[0] / 1024, RAS_3MM), "scaled CT"),
    ],
)
def test_a_ct_that_cannot_be_used_is_one_error(data, damage, kind):
    write_patient(data / "s1", kidney_left=masks_of("kidney_right"))
    damage(data / "s1" / "ct.nii.gz")
    write_patient(data / "s2", seed=2)
    assert found(data) == [("s1", "error", kind, "", int((patient()[0] == 30).sum()) if kind == "NaN" else None)]


def test_all_unusable_masks_are_errors_and_the_others_are_judged(data):
    folder = write_patient(data / "s1", stomach=masks_of("liver"), aorta=box(np.s_[:5, :5, :6])) / "segmentations"
    cut_short(folder / "spleen.nii.gz")
    write_nifti(folder / "kidney_left.nii.gz", np.ones((4, 4, 4), np.uint8), RAS_3MM)
    write_nifti(folder / "trachea.nii.gz", np.where(masks_of("trachea"), np.nan, 0), RAS_3MM)
    beside = RAS_3MM.copy()
    beside[0, 3] = 0.21
    write_nifti(folder / "lung_left.nii.gz", masks_of("lung_left").astype(np.uint8), beside)
    write_nifti(folder / "lung_right.nii.gz", 4 * masks_of("lung_right").astype(np.uint8), RAS_3MM)
    assert found(data) == [
        ("s1", "error", "other grid", "kidney_left", None),
        ("s1", "error", "unreadable", "spleen", None),
        ("s1", "error", "NaN", "trachea", masks_of("trachea").sum()),
        ("s1", "warning", "not binary", "lung_right", None),
        ("s1", "warning", "offset", "lung_left", pytest.approx(0.21)),
        ("s1", "warning", "outside the body", "aorta", 150),
        ("s1", "warning", "same mask", "liver + stomach", 800),
    ]
    for path in folder.iterdir():
        cut_short(path)
    errors = [row[2:4] for row in found(data) if row[1] == "error"]
    assert errors == [("unreadable", path.name.removesuffix(".nii.gz")) for path in sorted(folder.iterdir())]
    assert {row[2] for row in found(data)} == {"unreadable"}


def test_implausible_hu_are_a_warning(data):
    ct = patient()[0]
    ct[31, 23, 3] = -9758
    write_patient(data / "s0864", ct)
    assert found(data) == [("s0864", "warning", "HU range", "", None)]


# subjects among each other


def test_missing_structures(data):
    for number in range(5):
        write_patient(data / f"s{number}", seed=number, stomach=None if number else masks_of("liver"))
    segmentations = data / "s3" / "segmentations"
    for name in ("liver", "spleen", "trachea"):
        (segmentations / f"{name}.nii.gz").rename(segmentations / f"{name}s.nii.gz")
    (data / "s4" / "segmentations" / "liver.nii.gz").unlink()
    rows = [row for row in found(data) if row[2] != "same mask"]
    assert rows == [
        ("s3", "warning", "missing structures", "", 3),
        ("s4", "warning", "missing structures", "liver", 1),
    ]
    [text] = [message for message in messages(data) if "subject s3" in message]
    assert (
        "no mask of 3 structures that at least half of the other subjects annotate: liver, spleen, trachea;" in text
        and "misspelled? livers for liver" in text
    )


@pytest.mark.parametrize(("have", "warned"), [(2, True), (1, False)])  # of four others
def test_missing_means_that_half_of_the_others_annotate_it(data, have, warned):
    for number in range(5):
        write_patient(data / f"s{number}", seed=number, colon=box(np.s_[20:24, 12:16, 0:6]) if number < have else None)
    missing = [(f"s{number}", "warning", "missing structures", "colon", 1) for number in range(have, 5)]
    assert found(data) == (missing if warned else [])


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ("s1;train\ns2;test", "they are in different splits (test, train), so test scores would be too good"),
        ("s1;test", "they are in different splits (test, train)"),  # who is not named trains
        ("s1;train\ns2;train", "split apart"),
    ],
)
def test_the_same_scan_in_two_subjects(data, splits, says):
    for name, seed in (("s1", 0), ("s2", 0), ("s3", 3)):
        write_patient(data / name, seed=seed)
    turn_files(data / "s2", "LPS")
    (data / "meta.csv").write_text(f"image_id;split\n{splits}\n", encoding="utf-8-sig")
    assert found(data) == [(name, "warning", "same scan", "", 1) for name in ("s1", "s2")]
    assert [f"the same CT as {other}; {says}" in text for other, text in zip(("s2", "s1"), messages(data), strict=True)]


# the table


def test_jobs_do_not_change_the_table(data):
    for number in range(3):
        write_patient(data / f"s{number}", seed=number % 2, stomach=masks_of("liver", "spleen"))
    cut_short(data / "s1" / "ct.nii.gz")
    one = audit(data, progress=False)
    assert one.severity.tolist() == ["error", "warning", "warning", "info", "info", "info", "info"]
    assert one.subject.tolist() == ["s1", "s0", "s2", "s0", "s0", "s2", "s2"]
    pd.testing.assert_frame_equal(one, audit(data, jobs=2, progress=True))
    with joblib.parallel_config(backend="threading", n_jobs=2):
        pd.testing.assert_frame_equal(one, audit(data, jobs=None, progress=False))


def test_what_cannot_be_audited(tmp_path):
    for jobs in (0, 1.5):
        with pytest.raises(SegkitError, match="JOBS"):
            audit(tmp_path, jobs=jobs)
    with pytest.raises(SegkitError, match="no subjects"):
        audit(tmp_path)
    with pytest.raises(SegkitError, match="no such folder"):
        audit(tmp_path / "nowhere")


def test_the_summary_counts_findings_and_subjects(data):
    for number in range(2):
        write_patient(data / f"s{number}", seed=number, stomach=masks_of("liver", "spleen"), aorta=box(np.s_[:4, :4]))
    cut_short(data / "s1" / "segmentations" / "liver.nii.gz")
    table = summary(audit(data, progress=False))
    assert table.drop(columns="example").to_numpy().tolist() == [
        ["error", "unreadable", 1, 1],
        ["warning", "outside the body", 2, 2],
        ["info", "overlap", 3, 2],
    ]
    assert table.example[1].startswith("subject s0: aorta: 640 of 640 voxels")


def test_nothing_found_is_an_empty_table(data, tmp_path):
    write_patient(data / "s1")
    table = audit(data, progress=False)
    assert table.empty and table.value.dtype == float
    assert list(summary(table)) == ["severity", "kind", "findings", "subjects", "example"] and summary(table).empty
    assert read_csv(write_audit(table, tmp_path / "audit.csv")) == []


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == list(Row._fields)
    return rows


def test_hostile_names_on_disk_reach_the_csv_as_text(data, tmp_path):
    folder = write_patient(data / "s1")
    names = ['=HYPERLINK("x")', "+1", "-1", "@SUM(A1)", "\tx", "\rx", 'a,"b\nc']
    for name in names:
        (folder / "segmentations" / name).write_text("")
    try:
        (data / "=1+1").mkdir()
        shutil.copytree(folder / "segmentations", data / "=1+1" / "segmentations")
        (folder / "segmentations" / os.fsdecode(b"\xff")).write_text("")  # no UTF-8
    except OSError:
        pytest.skip("the file system does not take such names")
    rows = read_csv(write_audit(audit(data, progress=False), tmp_path / "audit.csv"))
    assert len(rows) == 1 + len(names) + 1
    assert rows[0][:3] == ["'=1+1", "error", "layout"]
    assert {row[3] for row in rows[1:]} == {f"'{name}" for name in names[:-1]} | {names[-1], r"\udcff"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"))] * 3, st.floats()), max_size=4))
def test_the_csv_holds_every_text_and_no_formula(tmp_path_factory, cells):
    table = pd.DataFrame([Row(a, "info", "overlap", b, c, v) for a, b, c, v in cells], columns=Row._fields)
    path = write_audit(table, tmp_path_factory.mktemp("csv") / "audit.csv")
    rows = read_csv(path)
    assert len(rows) == len(cells)
    for row, (subject, structure, message, value) in zip(rows, cells, strict=True):
        for cell, text in zip((row[0], row[3], row[4]), (subject, structure, message), strict=True):
            assert cell == (f"'{text}" if text[:1] in set("=+-@\t\r\n") else text)
        assert np.isnan(value) if row[5] == "" else float(row[5]) == value
    assert [other.name for other in path.parent.iterdir()] == ["audit.csv"]


def test_one_subject_is_judged_without_a_mask_in_full_size(data, monkeypatch):
    """Memory: the checks ask for no mask of a single structure."""
    write_patient(data / "s1")
    monkeypatch.setattr(module.CodeVolume, "mask", lambda *_: pytest.fail("made a full mask"))
    assert found(data) == []
