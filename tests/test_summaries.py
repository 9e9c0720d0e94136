import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit import summaries
from segkit.errors import SegkitError
from segkit.labels import group_of
from segkit.metrics import MEASURES

WORDS = {"+": "found", "-": "missed", "!": "false alarm", "0": "correctly absent"}


def table_of(*cases) -> pd.DataFrame:
    """(subject, structure, sign of WORDS, Dice): NaN where both are empty; all 0..1 measures alike, distances 1 mm."""
    rows = []
    for subject, structure, sign, dice in cases:
        row = dict.fromkeys(MEASURES, dice)
        row |= {measure: 1.0 if sign == "+" else np.nan for measure in MEASURES if measure.endswith("_mm")}
        rows.append(
            {**row, "subject": subject, "structure": structure, "group": group_of(structure), "present": sign in "+-",
             "detection": WORDS[sign], "reference_ml": 10.0 if sign in "+-" else 0.0}
        )  # fmt: skip
    return pd.DataFrame(rows)


EXAMPLE = table_of(
    ("s0", "liver", "+", 1.0), ("s0", "spleen", "-", 0.0), ("s0", "aorta", "!", 0.0), ("s0", "brain", "0", np.nan),
    ("s1", "liver", "+", 0.5), ("s1", "spleen", "+", 0.8), ("s1", "aorta", "0", np.nan), ("s1", "brain", "0", np.nan),
    ("s2", "liver", "!", 0.0), ("s2", "spleen", "0", np.nan), ("s2", "aorta", "+", 0.6), ("s2", "brain", "0", np.nan),
)  # fmt: skip


def means(protocol, measure="dice"):
    table = summaries.aggregate(EXAMPLE, [measure], protocol).set_index("over")
    return {over: (row["mean"], row["n"], row["cases"]) for over, row in table.iterrows()}


def test_means_by_hand_say_what_they_are_over():
    # per structure: liver (1 + 0.5) / 2, spleen (0 + 0.8) / 2, aorta 0.6; nobody holds a brain
    ours = means("segkit")
    assert ours["structures"] == (pytest.approx((0.75 + 0.4 + 0.6) / 3), 3, 5)
    assert ours["cases"] == (pytest.approx(2.9 / 7), 7, 7)  # the two false alarms count 0
    assert ours["subjects"] == (pytest.approx((0.5 + 0.65 + 0.6) / 3), 3, 5)
    assert ours["organs"] == (pytest.approx((0.75 + 0.4) / 2), 2, 4)
    assert [*ours][:3] == ["structures", "cases", "subjects"]


def test_the_means_of_others_can_be_put_beside_theirs():
    theirs = means("totalsegmentator")  # false positives are free
    assert theirs["cases"] == (pytest.approx(2.9 / 5), 5, 5) and theirs["structures"] == means("segkit")["structures"]
    nnunet = means("nnunet")  # a false alarm is 0 everywhere, and a structure without a case makes the mean NaN
    assert np.isnan(nnunet["structures"][0])
    assert nnunet["organs"] == (pytest.approx((1.5 / 3 + 0.8 / 2) / 2), 2, 5)
    without = EXAMPLE[EXAMPLE["structure"] != "brain"]
    row = summaries.aggregate(without, ["dice"], "nnunet").iloc[0]
    assert row["mean"] == pytest.approx((1.5 / 3 + 0.8 / 2 + 0.6 / 2) / 3)
    with pytest.raises(SegkitError, match=r"PROTOCOL = 'mine'.*totalsegmentator"):
        summaries.aggregate(EXAMPLE, ["dice"], "mine")
    with pytest.raises(SegkitError, match="no measure 'colour'"):
        summaries.aggregate(EXAMPLE, ["colour"])


def test_distances_are_means_over_what_was_found_and_say_so():
    distances = means("segkit", "hd95_mm")
    assert distances["structures"] == (1.0, 3, 4)  # the missed spleen of s0 has no distance
    assert summaries.summarize(EXAMPLE)["missed"] == 1


def test_tables_by_hand():
    table = summaries.per_structure(EXAMPLE).set_index("structure")
    assert list(table.index) == ["liver", "aorta", "spleen", "brain"]
    assert table["dice"].tolist()[:3] == pytest.approx([0.75, 0.6, 0.4]) and table["n"].tolist() == [2, 1, 2, 0]
    spleen = table.loc["spleen", ["found", "missed", "false_alarms", "correctly_absent"]]
    assert spleen.tolist() == [1, 1, 0, 1] and table.loc["spleen", "sensitivity"] == 0.5
    assert table.loc["aorta", "specificity"] == 0.5 and np.isnan(table.loc["brain", "sensitivity"])
    subjects = summaries.per_subject(EXAMPLE).set_index("subject")
    assert subjects["dice"].to_dict() == pytest.approx({"s0": 0.5, "s1": 0.65, "s2": 0.6})
    assert subjects.loc["s2", ["n", "found", "missed", "false_alarms", "correctly_absent"]].tolist() == [1, 1, 0, 1, 2]
    rates = summaries.success_rates(EXAMPLE, (0.5, 0.7))
    assert rates.loc["organs"].tolist() == [3 / 4, 2 / 4, 4] and rates.loc["all"].tolist() == [4 / 5, 2 / 5, 5]
    summary = summaries.summarize(EXAMPLE)
    assert summary["macro_dice"] == pytest.approx(1.75 / 3) and summary["structures"] == 3 and summary["subjects"] == 3
    assert [summary[word] for word in ("found", "missed", "false_alarms", "correctly_absent")] == [4, 1, 2, 5]


def test_without_a_case_there_is_no_mean_and_with_one_subject_no_interval():
    empty = summaries.summarize(table_of(("s0", "liver", "0", np.nan), ("s1", "liver", "!", 0.0)))
    assert empty["macro_dice"] is None and empty["structures"] == 0
    one = summaries.summarize(table_of(("s0", "liver", "+", 0.5)))
    assert one["macro_dice"] == 0.5 and one["macro_dice_low"] is None and one["macro_dice_high"] is None


def test_what_one_of_several_subjects_holds_has_no_interval_either():
    table = summaries.per_structure(EXAMPLE).set_index("structure")
    assert table.loc["aorta", "dice"] == 0.6 and table.loc["aorta", ["dice_low", "dice_high"]].isna().all()
    assert table.loc["liver", ["dice_low", "dice_high"]].tolist() == [0, 1]  # two subjects say next to nothing
    groups = summaries.aggregate(EXAMPLE, ["dice"]).set_index("over")
    vessels = group_of("aorta")
    assert groups.loc[vessels, "mean"] == 0.6 and groups.loc[vessels, ["low", "high"]].isna().all()
    assert groups.loc["structures", ["low", "high"]].notna().all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(1, 6))
def test_means_lie_in_their_intervals_and_order_does_not_matter(seed, subjects, structures):
    random = np.random.default_rng(seed)
    names = ["liver", "spleen", "aorta", "brain", "rib_left_1", "mine"][:structures]
    cases = []
    for subject in range(subjects):
        for name in names:
            sign = "+-!0"[random.integers(4)]
            dice = {"+": random.random(), "0": np.nan}.get(sign, 0.0)
            cases.append((f"s{subject}", name, sign, dice))
    scores = table_of(*cases)
    table = summaries.aggregate(scores, ["dice", "hd95_mm"])
    known = table.dropna()
    held = table[table["mean"].notna() & ((table["over"] == "subjects") & (table["n"] > 1))]
    assert held["low"].notna().all() and held["high"].notna().all()
    assert (known["low"] <= known["mean"] + 1e-12).all() and (known["mean"] <= known["high"] + 1e-12).all()
    assert (table["mean"].isna() == (table["cases"] == 0)).all()
    shuffled = summaries.aggregate(scores.sample(frac=1, random_state=0), ["dice", "hd95_mm"])
    both = table.merge(shuffled, on=["measure", "over"])
    assert len(both) == len(table) and np.allclose(both["mean_x"], both["mean_y"], equal_nan=True)
    headline = summaries.summarize(scores)["macro_dice"]
    held = scores[scores["present"]]
    expected = held.groupby("structure")["dice"].mean().mean() if len(held) else None
    assert headline == (None if expected is None else pytest.approx(expected))
