import numpy as np
import pandas as pd
import pytest

from segkit.comparison import ALL, compare
from segkit.errors import SegkitError


def table_of(values: dict, absent=()) -> pd.DataFrame:
    """{structure: Dice per subject}; NaN where the prediction has no value."""
    rows = [
        (f"s{k}", structure, dice, (structure, k) not in absent, "found", 100 + k)
        for structure, column in values.items()
        for k, dice in enumerate(column)
    ]
    return pd.DataFrame(rows, columns=["subject", "structure", "dice", "present", "detection", "reference_voxels"])


def test_differences_by_hand():
    first = table_of({"liver": [0.5, 0.7], "spleen": [0.2, 0.4], "aorta": [0.9, 0.9]}, absent={("aorta", 1)})
    second = table_of({"liver": [0.6, 0.8], "spleen": [0.2, 0.2], "aorta": [0.8, 0.1]}, absent={("aorta", 1)})
    table = compare({"a": first, "b": second}).set_index("structure")
    assert table.index[:2].tolist() == [ALL, "liver"] and set(table.index[2:]) == {"spleen", "aorta"}  # both -0.1
    assert table.loc["liver", ["first", "second", "difference", "n"]].tolist() == pytest.approx([0.6, 0.7, 0.1, 2])
    assert table.loc["spleen", "difference"] == pytest.approx(-0.1)
    assert table.loc["aorta", ["difference", "n"]].tolist() == pytest.approx([-0.1, 1])  # s1 does not hold one
    assert table.loc["aorta", ["low", "high"]].isna().all()  # of one subject nobody knows
    # all structures alike: (0.1 - 0.1 - 0.1) / 3
    assert table.loc[ALL, ["difference", "n"]].tolist() == pytest.approx([-0.1 / 3, 3])
    assert table.loc["liver", ["low", "high"]].tolist() == pytest.approx([0.1, 0.1])  # the same in both subjects
    # 0 and -0.2: a standard error of 0.1, and 12.7 of them to either side: two subjects say nothing
    assert table.loc["spleen", ["low", "high"]].tolist() == pytest.approx([-1, 1])


def test_rare_structures_do_not_move_the_interval_off_its_own_estimate():
    """Fifty structures that all of ten subjects hold, better by about 0.03; fifty that one holds each, worse by 0.05.

    The mean over all is -0.01. A bootstrap that draws subjects averages the common structures alone where the holders
    of rare ones are not drawn: it gave 0.001 to 0.024.
    """
    random, names = np.random.default_rng(3), [f"structure_{k}" for k in range(100)]
    first = {name: np.full(10, 0.5) for name in names}
    second = {name: np.full(10, 0.53) + 0.005 * random.normal(size=10) for name in names[:50]}
    second |= {name: np.full(10, 0.45) for name in names[50:]}
    absent = {(name, k) for name in names[50:] for k in range(10) if k != random.integers(10)}
    absent -= {(name, place % 10) for place, name in enumerate(names[50:])}
    tables = [table_of(values, absent) for values in (first, second)]
    row = compare(dict(zip("ab", tables, strict=True))).iloc[0]
    assert row["difference"] == pytest.approx(-0.01, abs=0.003) and row["low"] < row["difference"] < row["high"]
    assert row["low"] < -0.01 < row["high"]


def test_pairing_sees_what_two_intervals_beside_each_other_do_not():
    random = np.random.default_rng(0)
    difficulty = random.uniform(0.2, 0.9, 40)
    first, second = table_of({"liver": difficulty}), table_of({"liver": difficulty + random.uniform(0.01, 0.03, 40)})
    row = compare({"a": first, "b": second}).iloc[0]
    assert 0.01 < row["low"] < row["difference"] < row["high"] < 0.03


def test_a_model_is_not_better_than_itself_and_the_other_way_round_the_sign_changes():
    first, second = table_of({"liver": [0.5, 0.7, 0.1]}), table_of({"liver": [0.6, 0.5, 0.4]})
    same = compare({"a": first, "b": first.copy()})
    assert (same[["difference", "low", "high"]].abs() < 1e-12).all(axis=None)
    there, back = (compare(pair).iloc[0] for pair in ({"a": first, "b": second}, {"b": second, "a": first}))
    assert there["difference"] == pytest.approx(-back["difference"]) and there["low"] == pytest.approx(-back["high"])


def test_more_models_are_all_compared_with_the_first():
    tables = {name: table_of({"liver": [value, value]}) for name, value in (("a", 0.5), ("b", 0.6), ("c", 0.4))}
    table = compare(tables).query("structure == 'liver'").set_index("model")
    assert table["difference"].to_dict() == pytest.approx({"b": 0.1, "c": -0.1})


def test_what_cannot_be_compared_is_said():
    first = table_of({"liver": [0.5, 0.7]})
    with pytest.raises(SegkitError, match="two or more"):
        compare({"a": first})
    with pytest.raises(SegkitError, match="no subject and structure in common"):
        compare({"a": first, "b": table_of({"spleen": [0.5]})})
    other = first.assign(reference_voxels=[100, 7])
    with pytest.raises(SegkitError, match="different references: liver of s1 has 101 voxels in the one, 7 in the oth"):
        compare({"a": first, "b": other})
    with pytest.warns(UserWarning, match="1 cases that only one of a and b has"):
        table = compare({"a": first, "b": first.iloc[:1]})
    assert table["n"].tolist() == [1, 1]


def with_columns(table: pd.DataFrame, **columns) -> pd.DataFrame:
    return table.assign(**columns)


def test_of_errors_with_a_sign_the_smaller_one_is_better():
    """By hand: 5 ml too little and 5 too much on average, against 10 too little: 5 ml more wrong, not less."""
    first = with_columns(table_of({"liver": [0.5, 0.5]}), volume_error_ml=[-5.0, 5.0])
    second = with_columns(table_of({"liver": [0.5, 0.5]}), volume_error_ml=[-10.0, -10.0])
    row = compare({"a": first, "b": second}, "volume_error_ml").iloc[0]
    assert row[["first", "second", "difference", "low", "high"]].tolist() == [5, 10, 5, 5, 5]


def test_surface_dice_at_different_tolerances_is_not_compared():
    tables = {
        name: with_columns(table_of({"liver": [0.5, 0.5]}), nsd=[0.5, 0.6], nsd_tolerance_mm=tolerance)
        for name, tolerance in (("a", 3.0), ("b", 1.0))
    }
    with pytest.raises(SegkitError, match=r"surface Dice of a is at 3 mm, of b at 1 mm: evaluate both"):
        compare(tables, "nsd")
    assert compare(tables)["difference"].tolist() == [0, 0]  # that of others does not depend on it
    tables["b"] = with_columns(tables["b"], nsd_tolerance_mm=3.0)
    assert compare(tables, "nsd")["difference"].tolist() == [0, 0]


def test_missed_structures_have_no_distance_and_that_is_said():
    first = with_columns(table_of({"liver": [0.5, 0.5, 0.0]}), hd95_mm=[3.0, 4.0, np.nan])
    second = with_columns(table_of({"liver": [0.5, 0.0, 0.0]}), hd95_mm=[2.0, np.nan, np.nan])
    with pytest.warns(UserWarning, match=r"2 of 3 cases have no hd95_mm and are left out \(1 of a, 2 of b\)"):
        row = compare({"a": first, "b": second}, "hd95_mm").iloc[0]
    assert row["difference"] == -1
