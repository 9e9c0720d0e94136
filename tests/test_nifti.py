import gzip
import io
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from conftest import write_nifti
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit.errors import SubjectError
from segkit.formats.gunzip import ERRORS, GzipReader, payload
from segkit.formats.nifti import Grid, read_header, read_volume


def random_grid(seed: int) -> tuple[np.ndarray, Grid]:
    """A volume on an affine with any axis order, flips, unequal spacing and a tilt of some degrees."""
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(2, 7, 3))
    axes = np.eye(3)[random.permutation(3)] * random.choice([-1, 1], 3)
    angle = np.deg2rad(random.uniform(-20, 20))
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes @ np.diag(random.uniform(0.5, 5, 3))
    affine[:3, 3] = random.uniform(-200, 200, 3)
    return random.integers(-1000, 1000, shape).astype(np.int16), Grid(shape, affine)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_canonical_agrees_with_nibabel_and_the_way_back_is_exact(seed):
    volume, grid = random_grid(seed)
    reference = nib.as_closest_canonical(nib.Nifti1Image(volume, grid.affine))
    canonical = grid.to_canonical(volume)
    assert np.array_equal(canonical, np.asarray(reference.dataobj).transpose(2, 1, 0))
    assert np.allclose(grid.canonical_affine, reference.affine)
    assert np.allclose(grid.spacing_mm, reference.header.get_zooms()[::-1], rtol=1e-5)
    assert np.array_equal(grid.from_canonical(canonical), volume)


ORIENTATIONS = ["".join(axes) for letters in permutations(("RL", "AP", "SI")) for axes in product(*letters)]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_each_of_the_48_orientations_comes_back(orientation):
    turn = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    ras = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([1.0, 2.0, 3.0, 1.0]))
    stored = ras.as_reoriented(nib.orientations.ornt_transform(*turn))
    grid = Grid(stored.shape, stored.affine)
    assert grid.orientation == orientation and grid.spacing_mm == (3, 2, 1)
    canonical = grid.to_canonical(np.asanyarray(stored.dataobj))
    assert np.array_equal(canonical, np.asanyarray(ras.dataobj).transpose(2, 1, 0))
    assert np.array_equal(grid.from_canonical(canonical), np.asanyarray(stored.dataobj))
    assert np.allclose(grid.canonical_affine, ras.affine)


def test_a_marked_voxel_is_found_at_its_place_in_the_body():
    # LPI file: the first axis grows to the left, the second to the back, the third to the feet
    volume = np.zeros((4, 5, 6), np.int16)
    volume[0, 0, 0] = 1  # the most right, most anterior, most superior voxel
    grid = Grid(volume.shape, np.diag([-2.0, -2.0, -3.0, 1.0]))
    assert grid.orientation == "LPI"
    assert np.argwhere(grid.to_canonical(volume)).tolist() == [[5, 4, 3]]  # head, front, right


def test_distance_between_grids_by_hand():
    grid = Grid((3, 3, 3), np.diag([1.0, 1.0, 2.0, 1.0]))
    moved = grid.affine.copy()
    moved[:3, 3] += [3, 0, 4]
    assert grid.distance_mm(Grid((3, 3, 3), moved)) == pytest.approx(5)
    wider = Grid((3, 3, 3), np.diag([1.0, 1.0, 2.5, 1.0]))
    assert grid.distance_mm(wider) == pytest.approx(1)  # two steps of 0.5 mm more
    assert grid.distance_mm(Grid((3, 3, 4), grid.affine)) == np.inf


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, ">i2", np.float64, np.int32])
def test_reads_what_nibabel_wrote(tmp_path, dtype):
    volume = np.arange(24).reshape(2, 3, 4).astype(dtype)
    path = write_nifti(tmp_path / "a.nii.gz", volume)
    read, grid = read_volume(path, "s1")
    assert np.array_equal(read, volume) and grid.shape == (2, 3, 4) and grid.spacing_mm == (3, 2, 2)


def test_reads_scaled_four_dimensional_nifti2_and_multi_member_files(tmp_path):
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    image = nib.Nifti2Image(volume, np.eye(4))
    image.header.set_slope_inter(2, -1000)
    nib.save(image, tmp_path / "a.nii.gz")
    read, _ = read_volume(tmp_path / "a.nii.gz", "s1")
    assert np.array_equal(read, np.asanyarray(nib.load(tmp_path / "a.nii.gz").dataobj)[..., 0])
    raw = write_nifti(tmp_path / "b.nii", np.ones((5, 6, 7), np.uint8)).read_bytes()
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(raw[:300]) + gzip.compress(raw[300:]))
    assert read_volume(tmp_path / "c.nii.gz", "s1")[0].sum() == 210


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 50_000), min_size=1, max_size=4), st.lists(st.integers(0, 60_000), max_size=6),
    st.integers(0, 40), st.integers(0, 2**32),
)  # fmt: skip
def test_gzip_of_any_members_is_read_as_python_reads_it(members, reads, padding, seed):
    random = np.random.default_rng(seed)
    pieces = [random.integers(0, 3, size).astype(np.uint8).tobytes() for size in members]
    packed = b"".join(gzip.compress(piece, int(random.integers(0, 10))) for piece in pieces) + bytes(padding)
    reader, reference = GzipReader(packed), io.BytesIO(gzip.decompress(packed))
    for size in reads:
        assert reader.read(size) == reference.read(size)
    assert reader.read(10**6) == reference.read() and reader.read(1) == b""


def test_a_gzip_file_with_a_wrong_checksum_or_a_missing_end_is_refused_when_finished():
    content = np.random.default_rng(0).integers(0, 3, 9000).astype(np.uint8).tobytes()
    packed = gzip.compress(content)
    damaged = [packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:], *(packed[:-cut] for cut in range(1, 60))]
    for number, bad in enumerate(damaged):
        reader = GzipReader(bad)
        with pytest.raises(ERRORS):
            reader.read(9000)
            reader.finish()
            pytest.fail(f"damage {number} passed")


def test_the_payload_leaves_out_names_and_times():
    packed = []
    for name, time in (("a.nii", 5), ("other.nii", 99), ("", 0)):
        target = io.BytesIO()
        with gzip.GzipFile(name, "wb", 6, target, mtime=time) as file:
            file.write(b"the same" * 100)
        packed.append(target.getvalue())
    assert len(set(packed)) == 3 and len({payload(content) for content in packed}) == 1
    assert payload(gzip.compress(b"another" * 100, 6)) != payload(packed[0])


@pytest.mark.parametrize("extension", [True, False])
def test_voxels_that_begin_after_extensions_or_a_gap(tmp_path, extension):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    if extension:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100))
    else:
        image.header["vox_offset"] = 1024
    nib.save(image, tmp_path / "a.nii.gz")
    read, _ = read_volume(tmp_path / "a.nii.gz", "s1")
    assert np.array_equal(read, np.asanyarray(nib.load(tmp_path / "a.nii.gz").dataobj))
    assert len(read_header(tmp_path / "a.nii.gz", "s1").extensions) == extension


def huge(path):
    raw = bytearray(write_nifti(path.parent / "small.nii", np.ones((4, 4, 4), np.int16)).read_bytes())
    raw[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()  # dim[1..3] of the header
    path.write_bytes(gzip.compress(bytes(raw)))


def singular(path):
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.int16), affine)
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    image.header["srow_x"] = 0
    path.write_bytes(gzip.compress(image.header.binaryblock + bytes(4) + bytes(128)))


DAMAGE = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "not gzip": lambda path: path.write_bytes(b"hello" * 100),
    "gzip of nonsense": lambda path: path.write_bytes(gzip.compress(b"hello" * 100)),
    "cut short": lambda path: (write_nifti(path, np.random.default_rng(0).integers(0, 99, (9, 9, 9)).astype(np.int16)),
                               path.write_bytes(path.read_bytes()[:-300])),
    "header without data": lambda path: path.write_bytes(
        gzip.compress(nib.Nifti1Image(np.ones((9, 9, 9), np.int16), np.eye(4)).to_bytes()[:352])),
    "a corrupt byte": lambda path: (write_nifti(path, np.random.default_rng(0).integers(0, 99, (9, 9, 9), np.int16)),
                                    path.write_bytes(flip(path.read_bytes()))),
    "huge dimensions": huge,
    "four dimensions": lambda path: write_nifti(path, np.ones((3, 3, 3, 2), np.int16)),
    "two dimensions": lambda path: write_nifti(path, np.ones((3, 3), np.int16)),
    "complex numbers": lambda path: write_nifti(path, np.ones((3, 3, 3), np.complex64)),
    "no place in space": singular,
}  # fmt: skip


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_with_their_subject(tmp_path, damage):
    path = tmp_path / "ct.nii.gz"
    DAMAGE[damage](path)
    with pytest.raises(SubjectError, match=r"subject s7: .*ct\.nii\.gz"):
        read_volume(path, "s7")
