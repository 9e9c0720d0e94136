import itertools

import joblib
import numpy as np
import pandas as pd
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segkit import surface
from segkit.codes import CodeVolume, encode
from segkit.errors import Findings, SegkitError
from segkit.reading import read_ct, read_labels
from segkit.subjects import find_subjects
from segkit.surface import surface_scores

# surface-distance asks for scipy's functions where they used to be
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:surface_distance")
DISTANCES = ["hd95_mm", "hd_mm", "assd_mm"]


def scores_of(reference: np.ndarray, prediction: np.ndarray, spacing, tolerance: float = 3.0) -> pd.Series:
    volumes = [encode([("a", mask)], mask.shape) for mask in (reference, prediction)]
    return surface_scores(*volumes, spacing, tolerance).loc["a"]


def box(shape, *sides) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def blob(seed: int, shape=(14, 17, 12), share: float = 0.3) -> np.ndarray:
    """Smooth random pieces, holes and tips; they touch the border of the volume."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.2)
    return field > np.quantile(field, 1 - share)


def expected(reference: np.ndarray, prediction: np.ndarray, spacing, tolerance: float) -> dict[str, float]:
    """By other means: scipy's erosion and distance transform on padded volumes, and surface-distance."""
    masks = [np.pad(mask, 1) for mask in (reference, prediction)]
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    ways = [ndimage.distance_transform_edt(~b, spacing)[a] for a, b in (surfaces, surfaces[::-1])]
    elements = surface_distance.compute_surface_distances(reference, prediction, spacing)
    centres = [np.array(ndimage.center_of_mass(mask)) * spacing for mask in masks]
    return {
        # up to the rounding that surface_scores allows: 3 * 1.1 mm is more than 3.3 mm in floating point
        "nsd": surface_distance.compute_surface_dice_at_tolerance(elements, tolerance * (1 + 1e-6)),
        "hd95_mm": max(np.percentile(way, 95) for way in ways),
        "hd_mm": max(way.max() for way in ways),
        "assd_mm": np.concatenate(ways).mean(),
        "centroid_distance_mm": np.linalg.norm(centres[0] - centres[1]),
    }


def of_monai(reference: np.ndarray, prediction: np.ndarray, spacing) -> list[float]:
    """HD95, HD and ASSD."""
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    planes = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    settings = {"include_background": True, "spacing": [float(side) for side in spacing]}
    values = [compute_hausdorff_distance(*planes, percentile=percent, **settings) for percent in (95, None)]
    return [float(value) for value in (*values, compute_average_surface_distance(*planes, symmetric=True, **settings))]


@pytest.mark.parametrize("spacing", [(1, 1, 1), (5, 0.7, 0.7), (0.6, 1.3, 2.9), (2.5, 3, 0.4)])
def test_areas_of_all_256_neighbourhoods_are_those_of_surface_distance(spacing):
    table = surface_distance.lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    assert np.allclose(surface._areas(spacing), table, rtol=1e-9, atol=0)
    assert np.count_nonzero(table) == 254


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([0.002, 0.05, 0.4, 0.97]), st.sampled_from([0.002, 0.1, 0.5]),
    st.tuples(*[st.floats(0.31, 5)] * 3), st.floats(0.2, 12),
)  # fmt: skip
def test_random_blobs_have_the_values_of_other_libraries(seed, share, other_share, spacing, tolerance):
    reference, prediction = blob(seed, share=share), blob(seed + 1, share=other_share)
    wanted = expected(reference, prediction, spacing, tolerance)
    found = scores_of(reference, prediction, spacing, tolerance)
    assert found.to_dict() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (5, 0.7, 0.9)])
def test_monai_agrees(spacing):
    for seed in range(4):
        reference, prediction = blob(seed), blob(seed + 10)
        hd95, *others = of_monai(reference, prediction, spacing)
        found = scores_of(reference, prediction, spacing)
        assert found[["hd_mm", "assd_mm"]].tolist() == pytest.approx(others, rel=1e-6)
        # MONAI places its percentile with float32, some 1e-5 between two neighbouring distances
        assert found["hd95_mm"] == pytest.approx(hd95, rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_real_torso_against_a_shifted_copy(torso_dir):
    subject = find_subjects(torso_dir)[0][0]
    findings = Findings(subject.name)
    _, grid = read_ct(subject, findings)
    reference = read_labels(subject, grid, findings)
    prediction = reference.with_codes(shifted(reference.codes, (2, 1, 1)))
    found = surface_scores(reference, prediction, grid.spacing_mm, 3.0)
    assert len(found.dropna()) == len(found[found["nsd"] > 0]) == len(reference.boxes()) == 61
    for name in ("liver", "aorta", "colon", "adrenal_gland_left"):
        masks = [np.ascontiguousarray(volume.mask(name)) for volume in (reference, prediction)]
        assert found.loc[name].to_dict() == pytest.approx(expected(*masks, grid.spacing_mm, 3.0), rel=1e-9)
        assert found.loc[name, DISTANCES].tolist() == pytest.approx(of_monai(*masks, grid.spacing_mm), rel=1e-5)


def shifted(codes: np.ndarray, steps: tuple[int, int, int]) -> np.ndarray:
    """Moved up along each axis; what comes in is background."""
    whole = np.pad(codes, [(step, 0) for step in steps])
    return whole[tuple(slice(size) for size in codes.shape)]


def test_two_voxels_by_hand():
    # every distance is that of a (3, 4, 0) step of (1, 2, 5) mm voxels
    one, other = box((9, 9, 9), (1, 2), (1, 2), (1, 2)), box((9, 9, 9), (4, 5), (5, 6), (1, 2))
    apart = np.hypot(3 * 1, 4 * 2)
    found = scores_of(one, other, (1, 2, 5), tolerance=3)
    assert found.tolist() == pytest.approx([0, apart, apart, apart, apart])
    # the elements between voxels (1..2, 1..2) and (4..5, 5..6) are apart by at least (2, 3): hypot(2, 6) = 6.32 mm
    assert scores_of(one, other, (1, 2, 5), 6.32)["nsd"] == 0 < scores_of(one, other, (1, 2, 5), 6.33)["nsd"] < 1
    assert scores_of(one, other, (1, 2, 5), 9)["nsd"] == 1


def test_a_slab_that_grew_on_one_side_by_hand():
    # 10 slices against 12: the longer slab ends 2 slices of 1.5 mm further, all else is common
    short, long = box((20, 8, 8), (4, 14), (0, 8), (0, 8)), box((20, 8, 8), (4, 16), (0, 8), (0, 8))
    found = scores_of(short, long, (1.5, 1, 1))
    rim = 8 * 8 - 6 * 6
    of_short, of_long = 2 * 64 + 8 * rim, 2 * 64 + 10 * rim  # surface voxels
    # short's end: its 36 inner voxels are no surface of the longer slab, whose rim is 1, 2 or 3 mm away, ring by ring
    to_long = [1] * 20 + [2] * 12 + [3] * 4
    # the longer slab's last two slices: one rim a slice further, another at the end, whose inner voxels are 3 mm away
    to_short = [1.5] * rim + [3] * 64
    assert found["assd_mm"] == pytest.approx((sum(to_long) + sum(to_short)) / (of_short + of_long))
    assert found["hd_mm"] == 3 and found["hd95_mm"] == 3
    assert found["centroid_distance_mm"] == pytest.approx(1.5)
    assert found["nsd"] == 1 and scores_of(short, long, (1.5, 1, 1), 2.9)["nsd"] < 1


def test_spheres_by_formula():
    z, y, x = (np.arange(60) - 29.5) * np.array([[1.0], [0.8], [1.0]])
    radius = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)
    found = scores_of(radius < 15, radius < 20, (1, 0.8, 1))
    # two concentric spheres are 5 mm apart everywhere, up to a voxel
    assert found[DISTANCES].to_numpy() == pytest.approx([5, 5, 5], abs=0.9)
    assert found["nsd"] == 0 and scores_of(radius < 15, radius < 20, (1, 0.8, 1), 6)["nsd"] == 1
    assert found["centroid_distance_mm"] == pytest.approx(0, abs=1e-9)


def test_elements_add_up_to_the_area_of_a_sphere():
    # a surface in steps of half voxels is somewhat larger than the smooth one
    z, y, x = np.mgrid[-14:15, -14:15, -14:15] * 0.8
    areas = surface._areas((0.8, 0.8, 0.8))
    codes = surface._neighbourhoods(z**2 + y**2 + x**2 < 100)
    assert areas[codes].sum() == pytest.approx(4 * np.pi * 10**2, rel=0.1)


def test_a_box_moved_by_more_than_its_length_by_hand():
    first = box((50, 9, 9), (2, 12), (3, 6), (3, 6))
    found = scores_of(first, shifted(first, (25, 0, 0)), (2, 1, 1))
    assert found["hd_mm"] == 50 and found["centroid_distance_mm"] == pytest.approx(50) and found["nsd"] == 0
    # slice k is 50 - 2 k mm from the end of the other that faces it; between the ends the middle voxel is no surface
    per_slice = [9] + [8] * 8 + [9]
    assert found["assd_mm"] == pytest.approx(np.average([50 - 2 * k for k in range(10)], weights=per_slice))


def test_a_voxel_within_the_tolerance_up_to_rounding():
    first = box((8, 8, 8), (1, 7), (1, 7), (1, 3))
    spacing = (1.5, 1.5, np.float32(1.5000001))  # as a rotated affine has it
    assert scores_of(first, shifted(first, (0, 0, 2)), spacing, 3.0)["nsd"] == 1
    assert scores_of(first, shifted(first, (0, 0, 2)), spacing, 2.9999)["nsd"] < 1


def test_the_rule_for_empty_masks():
    held, empty = box((5, 5, 5), (1, 4), (1, 4), (1, 4)), np.zeros((5, 5, 5), bool)
    reference = encode([("both", held), ("missed", held), ("neither", empty), ("false alarm", empty)], held.shape)
    prediction = encode([("false alarm", held), ("neither", empty), ("missed", empty), ("both", held)], held.shape)
    found = surface_scores(reference, prediction, (1, 1, 1))
    assert found.index.tolist() == ["both", "missed", "neither", "false alarm"]
    assert found.columns.tolist() == ["nsd", *DISTANCES, "centroid_distance_mm"] and set(found.dtypes) == {
        np.dtype(float)
    }
    assert found.loc["both"].tolist() == [1, 0, 0, 0, 0] and found.loc["neither"].isna().all()
    for name in ("missed", "false alarm"):
        assert found.loc[name, "nsd"] == 0 and found.loc[name].isna().sum() == 4


def test_structures_that_only_one_side_looks_for_have_no_row():
    mask = box((4, 4, 4), (0, 4), (0, 4), (0, 4))
    both = encode([("a", mask), ("b", mask)], mask.shape), encode([("c", mask), ("b", mask)], mask.shape)
    assert surface_scores(*both, (1, 1, 1)).index.tolist() == ["b"]
    assert surface_scores(both[0], encode([("c", mask)], mask.shape), (1, 1, 1)).shape == (0, 5)


def overlapping(seed: int) -> CodeVolume:
    return encode([(name, blob(10 * seed + k)) for k, name in enumerate("abcdef")], (14, 17, 12))


def test_structures_that_overlap_score_as_alone():
    reference, prediction = overlapping(1), overlapping(2)
    found = surface_scores(reference, prediction, (2, 0.9, 1.1))
    for name in "abcdef":
        alone = scores_of(reference.mask(name), prediction.mask(name), (2, 0.9, 1.1))
        assert found.loc[name].tolist() == alone.tolist()


def test_threads_and_memory_layout_change_nothing():
    reference, prediction = overlapping(3), overlapping(4)
    found = surface_scores(reference, prediction, (2, 0.9, 1.1))
    pd.testing.assert_frame_equal(surface_scores(reference, prediction, (2, 0.9, 1.1), jobs=2), found, check_exact=True)
    turned = prediction.with_codes(np.asfortranarray(prediction.codes))
    with joblib.parallel_config(backend="loky"):
        pd.testing.assert_frame_equal(surface_scores(reference, turned, (2, 0.9, 1.1)), found, check_exact=True)


blobs = st.builds(blob, st.integers(0, 2**32), share=st.floats(0.005, 0.9))
sides = st.tuples(*[st.sampled_from([0.5, 0.8, 1.5, 3.0, 5.0])] * 3)


@settings(max_examples=40, deadline=None)
@given(blobs, blobs, sides, st.floats(0.3, 10))
def test_properties(reference, prediction, spacing, tolerance):
    found = scores_of(reference, prediction, spacing, tolerance)
    assert 0 <= found["nsd"] <= 1 and found["assd_mm"] <= found["hd_mm"] and found["hd95_mm"] <= found["hd_mm"]
    assert found["nsd"] <= scores_of(reference, prediction, spacing, 1.5 * tolerance)["nsd"]
    assert scores_of(reference, reference, spacing, tolerance).tolist() == [1, 0, 0, 0, 0]
    same = [scores_of(prediction, reference, spacing, tolerance)]
    pads = ((0, 3), (1, 0), (2, 5))
    same.append(scores_of(np.pad(reference, pads), np.pad(prediction, pads), spacing, tolerance))
    for axes in itertools.permutations(range(3)):
        turned = [mask.transpose(axes)[::-1, :, ::-1] for mask in (reference, prediction)]
        same.append(scores_of(*turned, [spacing[axis] for axis in axes], tolerance))
    for other in same:
        assert other.tolist() == pytest.approx(found.tolist(), rel=1e-9, abs=1e-9)


def test_surface_dice_is_the_same_seen_in_a_mirror():
    # a diagonal pair of voxels has two readings in marching cubes; no axis may be preferred
    pair = np.zeros((4, 4, 4), bool)
    pair[1, 1, 1] = pair[1, 2, 2] = True
    values = {round(surface._areas((1, 1, 1))[surface._neighbourhoods(np.flip(pair, k))].sum(), 9) for k in range(3)}
    assert len(values) == 1


@pytest.mark.parametrize("spacing", [(1, 1), (1, 0, 1), (1, -1, 1), (1, np.nan, 1), (1, 1, np.inf)])
def test_a_spacing_that_is_none_is_refused(spacing):
    with pytest.raises(SegkitError, match="positive and finite"):
        scores_of(np.ones((3, 3, 3), bool), np.ones((3, 3, 3), bool), spacing)


@pytest.mark.parametrize("tolerance", [0, -1, np.nan, np.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(SegkitError, match="tolerance"):
        scores_of(np.ones((3, 3, 3), bool), np.ones((3, 3, 3), bool), (1, 1, 1), tolerance)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        scores_of(np.ones((3, 3, 3), bool), np.ones((3, 3, 4), bool), (1, 1, 1))


def in_slices(reference, prediction, spacing, slices, tolerance=3.0):
    volumes = [encode([("a", mask)], mask.shape) for mask in (reference, prediction)]
    return surface_scores(*volumes, spacing, tolerance, slices=slices).loc["a"]


@given(st.integers(0, 10**6), st.sets(st.integers(0, 13), min_size=1))
@settings(max_examples=60, deadline=None)
def test_of_some_slices_distances_go_from_them_to_the_surface_anywhere(seed, chosen):
    """By scipy on whole masks: asked are the surface voxels in the slices alone."""
    reference, prediction = blob(seed), blob(seed + 1)
    found = in_slices(reference, prediction, (2, 0.9, 1.1), sorted(chosen))
    masks = [np.pad(mask, 1) for mask in (reference, prediction)]
    inside = np.zeros(len(masks[0]), bool)
    inside[[z + 1 for z in chosen]] = True
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    ways = [
        ndimage.distance_transform_edt(~other, (2, 0.9, 1.1))[own & inside[:, None, None]]
        for own, other in (surfaces, surfaces[::-1])
    ]
    if all(mask[inside].any() for mask in masks) and all(way.size for way in ways):
        assert found["hd_mm"] == pytest.approx(max(way.max() for way in ways))
        assert found["hd95_mm"] == pytest.approx(max(np.percentile(way, 95) for way in ways))
        assert found["assd_mm"] == pytest.approx(np.concatenate(ways).mean())
        itself = in_slices(reference, reference, (2, 0.9, 1.1), sorted(chosen))["nsd"]
        assert itself == 1 or not any(z + 1 in chosen or z in (0, 13) for z in chosen)


def test_all_slices_are_the_whole():
    reference, prediction = blob(3), blob(4)
    whole = scores_of(reference, prediction, (2, 0.9, 1.1))
    pd.testing.assert_series_equal(in_slices(reference, prediction, (2, 0.9, 1.1), range(14)), whole, check_exact=True)


def test_the_cut_of_a_slab_is_no_surface():
    """A cylinder of 30 mm found as one of 20 mm: everywhere 10 mm off, in every slab of 8 slices as in the whole."""
    y, x = np.mgrid[-35:36, -35:36]
    reference, prediction = (np.repeat((y**2 + x**2 <= radius**2)[None], 24, axis=0) for radius in (30, 20))
    for slices in (range(8, 16), [*range(7, 10), *range(14, 17)]):
        found = in_slices(reference, prediction, (1.5, 1, 1), slices)
        assert 9 <= found["assd_mm"] <= found["hd95_mm"] <= found["hd_mm"] <= 11 and found["centroid_distance_mm"] == 0
        assert found["nsd"] == 0
        assert in_slices(reference, prediction, (1.5, 1, 1), slices, tolerance=11)["nsd"] == 1


def test_a_mask_without_a_voxel_in_the_slices_is_empty_there():
    reference, prediction = box((9, 5, 5), (0, 4), (1, 4), (1, 4)), box((9, 5, 5), (2, 9), (1, 4), (1, 4))
    assert in_slices(reference, prediction, (1, 1, 1), [0, 1])["nsd"] == 0
    assert np.isnan(in_slices(reference, prediction, (1, 1, 1), [0, 1])["hd95_mm"])
    full = np.ones((9, 5, 5), bool)  # no surface inside but at the border of the scan
    assert in_slices(full, full, (1, 1, 1), [4, 5])[["nsd", "hd_mm"]].tolist() == [1, 0]
    assert np.isnan(in_slices(full, full, (1, 1, 1), [4])["nsd"])  # an element lies between two slices
