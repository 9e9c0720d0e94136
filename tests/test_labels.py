import csv
import json

import pytest
from conftest import REAL_DATA
from hypothesis import given
from hypothesis import strategies as st
from skimage.color import deltaE_ciede2000, rgb2lab

from segkit import labels
from segkit.errors import SegkitError


def test_every_release_has_its_number_of_structures_with_ids_from_one():
    assert {release: len(labels.official_names(release)) for release in labels.RELEASES} == {
        "v1": 104,
        "v2": 117,
        "v3": 117,
    }
    for release in labels.RELEASES:
        ids = sorted(s.ids[release] for s in labels.OFFICIAL.values() if release in s.ids)
        assert ids == list(range(1, len(ids) + 1))


def test_ids_equal_the_published_tables():
    path = REAL_DATA / "structures.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not at hand")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["structure"] for row in rows] == [name for name, known in labels.OFFICIAL.items() if known.ids]
    for row in rows:
        published = {release: int(row[f"id_{release}"]) for release in labels.RELEASES if row[f"id_{release}"]}
        assert labels.OFFICIAL[row["structure"]].ids == published


def test_known_places_of_the_tables():
    assert labels.official_names("v2")[:5] == ("spleen", "kidney_right", "kidney_left", "gallbladder", "liver")
    assert labels.official_names("v2")[25] == "vertebrae_S1"
    assert labels.official_names("v3")[25] == "vertebrae_L6"
    assert labels.official_names("v1")[-1] == "urinary_bladder"
    with pytest.raises(SegkitError, match="v4"):
        labels.official_names("v4")


# The pairs of ids of the v2 table, as published by the data set's authors.
PAIRS = [
    *[(2, 3), (8, 9), (10, 12), (11, 14), (23, 24), (55, 56), (57, 58), (59, 60), (65, 66), (67, 68), (69, 70)],
    *[(71, 72), (73, 74), (75, 76), (77, 78), (80, 81), (82, 83), (84, 85), (86, 87), (88, 89)],
    *[(rib, rib + 12) for rib in range(92, 104)],
]


def test_partners_are_the_published_pairs():
    names = labels.official_names("v2")
    by_name = {frozenset((name, labels.partner_of(name))) for name in names if labels.partner_of(name) in names}
    assert by_name == {frozenset((names[a - 1], names[b - 1])) for a, b in PAIRS}
    assert len(by_name) == 32
    unpaired = [n for n in names if labels.partner_of(n) is not None and labels.partner_of(n) not in names]
    assert unpaired == ["lung_middle_lobe_right", "atrial_appendage_left"]


@given(st.from_regex(r"[a-z]{1,8}(_(left|right|[a-z0-9]{1,5})){0,3}", fullmatch=True))
def test_the_partner_of_the_partner_is_the_structure(name):
    partner = labels.partner_of(name)
    assert partner is None or (partner != name and labels.partner_of(partner) == name)


def test_colours_are_distinct_and_neighbours_in_the_body_well_apart():
    names = list(labels.OFFICIAL)
    assert len({labels.color_of(name) for name in names}) == len(names)
    lab = rgb2lab([[[value / 255 for value in labels.rgb_of(name)] for name in names]])[0]
    # a difference of 2.3 is just noticeable (Mahy et al. 1994)
    assert min(deltaE_ciede2000(lab[i], lab[i + 1]) for i in range(len(names) - 1)) > 8
    assert labels.color_of("my_structure") == labels.color_of("my_structure") != labels.color_of("another")


def test_groups():
    assert labels.group_of("rib_left_3") == "ribs"
    assert labels.group_of("my_structure") == "other"
    assert {labels.group_of(name) for name in labels.OFFICIAL} == set(labels.GROUPS)


def test_label_map_follows_the_official_order_with_extras_sorted_behind():
    found = ["zebra", "liver", "aorta", "spleen", "apple", "face"]
    assert list(labels.make_label_map(found)) == ["spleen", "liver", "aorta", "face", "apple", "zebra"]
    assert labels.make_label_map(found, ["aorta", "zebra"]) == {"aorta": 0, "zebra": 1}
    with pytest.raises(SegkitError, match="pancreas"):
        labels.make_label_map(found, ["pancreas"])
    with pytest.raises(SegkitError, match="no structure"):
        labels.make_label_map([])


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "=cmd()", "<b>", "a" * 101, "-x", "name\n", "a b", 3])
def test_names_that_could_leave_a_folder_or_start_a_formula_are_refused(name):
    with pytest.raises(SegkitError):
        labels.check_name(name)


def test_label_map_file_round_trip_and_damage(tmp_path):
    path = tmp_path / "label_map.json"
    path.write_text(json.dumps({"liver": 1, "spleen": 0}))
    assert list(labels.load_label_map(path).items()) == [("spleen", 0), ("liver", 1)]
    for content in ("[]", '{"a": 1}', '{"a": 0, "b": 0}', '{"a": true}', '{"../a": 0}', "{", '{"a": "0"}'):
        path.write_text(content)
        with pytest.raises(SegkitError):
            labels.load_label_map(path)


def test_mirrored_channels():
    label_map = {"kidney_left": 0, "liver": 1, "kidney_right": 2, "atrial_appendage_left": 3}
    assert labels.mirrored_channels(label_map) == [2, 1, 0, None]
