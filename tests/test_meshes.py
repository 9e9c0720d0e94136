import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segkit import meshes
from segkit.codes import encode
from segkit.errors import SegkitError
from segkit.formats.nifti import Grid


def signed_volume(mesh) -> float:
    """Volume inside a closed surface, mm3 (divergence theorem); positive where the faces look outwards."""
    a, b, c = (mesh.vertices[mesh.faces[:, corner]].astype(float) for corner in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


def faces_of_edges(faces) -> set[int]:
    """How many faces the edges have: {2} for a closed mesh."""
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    return set(np.unique(edges, axis=0, return_counts=True)[1].tolist())


def ball(shape, centre, radius_mm, spacing=(1, 1, 1)):
    z, y, x = np.indices(shape)
    return sum(((axis - c) * s) ** 2 for axis, c, s in zip((z, y, x), centre, spacing, strict=True)) <= radius_mm**2


def blobs(seed, shape=(40, 36, 44), cut=0.5):
    """Smooth random shapes with thin bridges that run out of the volume on all sides."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 2.2)
    return noise > np.quantile(noise, cut)


@pytest.mark.parametrize("kept", [1.0, 0.15, None])
def test_a_ball_has_its_volume_and_its_place_in_mm(kept):
    spacing = (2.0, 1.0, 1.5)  # z, y, x
    mask = ball((40, 60, 50), (20, 25, 30), 15, spacing)
    affine = np.diag([1.5, 1.0, 2.0, 1.0])
    affine[:3, 3] = (-100, 50, 7)
    mesh = meshes.make_mesh(mask, affine, kept)
    assert signed_volume(mesh) == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.06)
    middle = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    assert np.allclose(middle, (-100 + 30 * 1.5, 50 + 25, 7 + 20 * 2), atol=0.5)
    assert np.allclose(np.ptp(mesh.vertices, axis=0), 30, atol=2)
    assert faces_of_edges(mesh.faces) == {2}


def test_a_left_handed_grid_does_not_turn_the_surface_inside_out():
    mask = ball((20, 20, 20), (10, 10, 10), 6)
    assert signed_volume(meshes.make_mesh(mask, np.diag([-1.0, 1, 1, 1]))) > 0


def test_a_single_voxel_and_a_thin_sheet_at_the_border_still_have_a_surface():
    mask = np.zeros((6, 6, 6), bool)
    assert meshes.make_mesh(mask, np.eye(4)) is None
    mask[0, 0, 0] = True
    assert signed_volume(meshes.make_mesh(mask, np.eye(4))) > 0
    mask[5] = True
    assert np.isclose(meshes.make_mesh(mask, np.eye(4)).vertices[:, 2].max(), 5, atol=0.7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.98), st.sampled_from([1.0, 0.3, 0.1]))
def test_noise_that_touches_all_borders_gives_closed_meshes(seed, density, kept):
    mask = np.random.default_rng(seed).random((9, 8, 10)) < density
    if mask.any():
        mesh = meshes.make_mesh(mask, np.eye(4), kept)
        assert faces_of_edges(mesh.faces) == {2} and signed_volume(mesh) > 0
        assert mesh.faces.max() < len(mesh.vertices) and mesh.faces.dtype == np.int32


@pytest.mark.parametrize(("seed", "cut"), [(0, 0.5), (1, 0.8), (2, 0.3)])
def test_a_simplified_mesh_is_closed_and_lies_within_a_voxel_of_the_full_detail(seed, cut):
    mask = blobs(seed, cut=cut)
    full, simple = (meshes.make_mesh(mask, np.eye(4), kept) for kept in (1, 0.1))
    assert faces_of_edges(full.faces) == faces_of_edges(simple.faces) == {2}
    assert len(simple.faces) < 0.13 * len(full.faces)
    assert meshes.distances_mm(simple.vertices, full).max() <= 1
    assert meshes.distances_mm(full.vertices, simple).max() <= 1.5  # no island and no tip is lost
    assert signed_volume(simple) == pytest.approx(signed_volume(full), rel=0.05)


@pytest.mark.parametrize(
    ("place", "held"),
    [
        ((slice(70, 72), slice(5, 7), 5), True),  # an island smaller than a voxel of that resolution
        ((slice(48, 60), slice(40, 60), 40), True),  # a sheet that stands out
        ((slice(45, 75), 40, 40), True),  # a tip
        ((slice(10, 30), slice(20, 60), 40), False),  # a crack inside
        ((slice(30, 60), 40, 40), False),  # a canal that comes out
        ((20, 40, 40), False),  # a hollow
        ((slice(0, 0),) * 3, True),
    ],
)
def test_a_thick_structure_is_made_from_half_the_resolution_where_that_loses_nothing(place, held):
    mask = ball((80, 80, 80), (20, 41, 40), 30)  # cut off by the border
    mask[place] = held
    full, simple = (meshes.make_mesh(mask, np.eye(4), kept) for kept in (1, None))
    assert faces_of_edges(simple.faces) == {2} and len(simple.faces) < 0.12 * len(full.faces)
    assert meshes.distances_mm(simple.vertices, full).max() <= 1
    assert meshes.distances_mm(full.vertices, simple).max() <= 1.5
    assert signed_volume(simple) == pytest.approx(signed_volume(full), rel=0.02)


def test_the_torso_keeps_closed_meshes_within_a_voxel(torso_dir, tmp_path):
    from segkit import dataset

    subject = dataset.open_data(torso_dir, tmp_path, progress=False).staged["s0000"]
    volume = subject.labels()
    made = meshes.make_meshes(volume, subject.grid)
    assert len(made) == 61 and {2} == set().union(*(faces_of_edges(mesh.faces) for mesh in made.values()))
    for name in ("colon", "rib_right_7", "hip_left", "urinary_bladder"):
        full = meshes.make_mesh(volume.mask(name), subject.grid.canonical_affine, 1)
        assert meshes.distances_mm(made[name].vertices, full).max() <= 3  # mm: its voxels


def test_meshes_from_crops_are_those_of_the_whole_volume():
    shape = (30, 40, 36)
    masks = {"liver": ball(shape, (10, 20, 8), 7), "spleen": ball(shape, (12, 24, 10), 6),  # they overlap
             "prostate": np.zeros(shape, bool), "aorta": ball(shape, (29, 0, 35), 4)}  # fmt: skip
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])
    volume, grid = encode(masks.items(), shape), Grid((40, 36, 30), affine)
    made = meshes.make_meshes(volume, grid)
    assert list(made) == ["liver", "spleen", "aorta"]
    for name, mesh in made.items():
        whole = meshes.make_mesh(masks[name], grid.canonical_affine)
        assert signed_volume(mesh) == pytest.approx(signed_volume(whole), rel=0.02)
        z, y, x = np.argwhere(masks[name]).mean(0)
        middle = grid.canonical_affine @ [x, y, z, 1]
        assert np.allclose(mesh.vertices.mean(0), middle[:3], atol=1.5)
    assert list(meshes.make_meshes(volume, grid, ["aorta", "prostate"])) == ["aorta"]
    with pytest.raises(SegkitError, match="'kidney_left' is not annotated"):
        meshes.make_meshes(volume, grid, ["kidney_left"])


CORNERS = np.array([[x, y, z] for x in (0, 4) for y in (0, 2) for z in (0, 1)], np.float32)
BOX = meshes.Mesh(CORNERS, np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
                                     [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]))  # fmt: skip


@given(st.lists(st.tuples(*[st.floats(-9, 9)] * 3), min_size=1, max_size=20))
def test_distances_to_a_box_are_those_of_its_formula(points):
    points = np.array(points)
    beyond = np.abs(points - [2, 1, 0.5]) - [2, 1, 0.5]
    expected = np.where((beyond <= 0).all(1), -beyond.max(1), np.linalg.norm(np.maximum(beyond, 0), axis=1))
    assert faces_of_edges(BOX.faces) == {2}
    assert np.allclose(meshes.distances_mm(points, BOX), expected, atol=1e-5)


def test_distances_to_a_mesh_of_uneven_triangles_are_those_to_the_nearest_of_all():
    mesh = meshes.make_mesh(blobs(5), np.diag([1.0, 2, 0.7, 1]), 0.05)
    points = np.random.default_rng(0).uniform(-20, 80, (300, 3))
    corners = mesh.vertices.astype(float)[mesh.faces]
    dense = np.array([[a, b, 11 - a - b] for a in range(12) for b in range(12 - a)]) / 11  # points on each triangle
    sampled = (dense @ corners).reshape(-1, 3)
    at_most = np.array([np.linalg.norm(sampled - point, axis=1).min() for point in points])
    found = meshes.distances_mm(points, mesh)
    assert (found <= at_most + 1e-4).all() and (found >= at_most - 0.3).all()
    assert meshes.distances_mm(mesh.vertices, mesh).max() < 1e-3


TETRAHEDRON = np.array([[0, 1, 2], [0, 3, 1], [1, 3, 2], [0, 2, 3]])


def test_two_solids_that_share_an_edge_are_cut_apart():
    both = np.concatenate([TETRAHEDRON, np.array([0, 1, 4, 5])[TETRAHEDRON]])
    places = np.arange(18.0).reshape(6, 3)
    assert faces_of_edges(both) == {2, 4}
    vertices, faces = meshes._cut_apart(places, both, 1)
    assert faces_of_edges(faces) == {2} and len(vertices) == 8
    assert np.array_equal(vertices[faces], places[both])


def test_a_fold_is_taken_away():
    fold = np.array([[2, 3, 9], [3, 2, 9]])
    left = meshes._without_folds(np.concatenate([TETRAHEDRON, fold]))
    assert sorted(map(tuple, left)) == sorted(map(tuple, TETRAHEDRON))
