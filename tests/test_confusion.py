import numpy as np
import pandas as pd
import pytest

from segkit.codes import encode
from segkit.confusion import COLUMNS, NOTHING, confused, relation, worst_pairs
from segkit.metrics import code_pairs


def volume_of(**masks):
    masks = {name: np.array(mask) for name, mask in masks.items()}
    return encode(masks.items(), next(iter(masks.values())).shape)


def as_dict(table):
    return {(row.reference, row.predicted): row.ml for row in table.itertuples()}


def test_what_was_called_what_by_hand():
    reference = volume_of(kidney_left=[1, 1, 1, 1, 0, 0], liver=[0, 0, 0, 1, 1, 0], mine=[1, 1, 1, 1, 1, 1])
    prediction = volume_of(kidney_left=[1, 0, 0, 0, 0, 1], kidney_right=[0, 1, 1, 0, 0, 0], liver=[0, 0, 0, 0, 1, 1])
    # kidney_right and `mine` are only in one of them: not compared, so voxels 1 and 2 were called nothing
    assert as_dict(confused("s0", code_pairs(reference, prediction), 2.0)) == {
        ("kidney_left", NOTHING): 3 * 2.0, ("liver", NOTHING): 1 * 2.0,
        (NOTHING, "kidney_left"): 1 * 2.0, (NOTHING, "liver"): 1 * 2.0,
    }  # fmt: skip


def test_a_voxel_counts_for_each_of_its_wrong_structures_and_a_right_overlap_for_none():
    reference = volume_of(a=[1, 1, 1], b=[1, 0, 1], c=[0, 0, 0], d=[0, 0, 1])
    prediction = volume_of(a=[1, 0, 0], b=[0, 0, 0], c=[0, 1, 1], d=[0, 0, 1])
    # voxel 0 lacks b; voxel 1 has c for a; voxel 2 has c for a and for b, and d rightly
    expected = {("b", NOTHING): 1, ("a", "c"): 2, ("b", "c"): 1}
    assert as_dict(confused("s0", code_pairs(reference, prediction), 1.0)) == expected


def test_what_is_lacking_adds_up_to_the_misses_where_structures_do_not_overlap():
    random = np.random.default_rng(0)
    names = ["liver", "spleen", "aorta"]
    reference, prediction = (
        encode([(name, labels == k) for k, name in enumerate(names, 1)], labels.shape)
        for labels in random.integers(0, 4, (2, 5, 6, 7))
    )
    pairs = code_pairs(reference, prediction)
    table = confused("s0", pairs, 1.0)
    assert table.groupby("reference")["ml"].sum()[names].tolist() == pairs.counts()["fn"].tolist()
    assert table.groupby("predicted")["ml"].sum()[names].tolist() == pairs.counts()["fp"].tolist()


def test_pairs_over_subjects_have_shares_of_the_reference():
    confusion = pd.DataFrame(
        [("s0", "rib_left_5", "rib_left_6", 2.0), ("s1", "rib_left_5", "rib_left_6", 1.0),
         ("s1", NOTHING, "liver", 9.0), ("s1", "liver", "spleen", 1.0)],
        columns=list(COLUMNS),
    )  # fmt: skip
    scores = pd.DataFrame(
        [("s0", "rib_left_5", 4.0), ("s1", "rib_left_5", 8.0), ("s0", "liver", 1000.0)],
        columns=["subject", "structure", "reference_ml"],
    )
    table = worst_pairs(confusion, scores)
    assert table["reference"].tolist() == ["rib_left_5", "liver", NOTHING]
    assert table.loc[0, ["ml", "share", "subjects", "relation"]].tolist() == [3.0, 0.25, 2, "neighbouring level"]
    assert table["share"][1] == pytest.approx(0.001) and np.isnan(table["share"][2])


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (("kidney_left", "kidney_right"), "other side"),
        (("rib_left_5", "rib_right_5"), "other side"),
        (("rib_left_5", "rib_left_4"), "neighbouring level"),
        (("rib_left_5", "rib_left_3"), "same group"),
        (("rib_left_5", "rib_right_6"), "same group"),
        (("vertebrae_T12", "vertebrae_L1"), "neighbouring level"),
        (("vertebrae_C7", "vertebrae_T1"), "neighbouring level"),
        (("vertebrae_L5", "vertebrae_S1"), "neighbouring level"),
        (("vertebrae_L6", "vertebrae_L5"), "neighbouring level"),
        (("vertebrae_L4", "vertebrae_L6"), "same group"),
        (("liver", "aorta"), "other"),
        (("liver", NOTHING), NOTHING),
        ((NOTHING, "liver"), NOTHING),
    ],
)
def test_how_structures_are_related(pair, expected):
    assert relation(*pair) == expected
