"""NRRD in: the same scan as SimpleITK and pynrrd write it, and nothing read that the file does not hold."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit.errors import SubjectError
from segkit.formats.nrrd import read_volume

VOXELS = np.arange(-30, 30, dtype=np.int16).reshape(3, 4, 5)
HEADER = """NRRD0004
# a comment
type: short
dimension: 3
space: left-posterior-superior
sizes: 3 4 5
space directions: (2,0,0) (0,3,0) (0,0,-4)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (10,20,30)
key:=of somebody's own
"""


STORED = VOXELS.astype("<i2").tobytes(order="F")


def write(path, header: str = HEADER, content: bytes = STORED):
    path.write_bytes(header.encode() + b"\n" + content)
    return path


def replaced(line: str, by: str) -> str:
    [old] = [each for each in HEADER.splitlines() if each.startswith(line)]
    return HEADER.replace(f"{old}\n", f"{by}\n" if by else "")


def test_a_header_worked_out_by_hand(tmp_path):
    volume, grid = read_volume(write(tmp_path / "a.nrrd"), "a")
    assert np.array_equal(volume, VOXELS) and volume.dtype == np.int16
    assert grid.affine.tolist() == [[-2, 0, 0, -10], [0, -3, 0, -20], [0, 0, -4, 30], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("space", "first", "second"),
    [("right-anterior-superior", 2, 3), ("RAS", 2, 3), ("left-anterior-superior", -2, 3), ("LPS", -2, -3)],
)
def test_each_space_by_hand(tmp_path, space, first, second):
    _, grid = read_volume(write(tmp_path / "a.nrrd", replaced("space:", f"space: {space}")), "a")
    assert np.diag(grid.affine).tolist() == [first, second, -4, 1]
    assert grid.affine[:3, 3].tolist() == [5 * first, 20 / 3 * second, 30]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_what_simpleitk_writes(tmp_path, dtype, compressed):
    sitk = pytest.importorskip("SimpleITK")
    volume = np.arange(60).reshape(5, 4, 3).astype(dtype)
    image = sitk.GetImageFromArray(volume)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn[:, 0] *= np.sign(np.linalg.det(turn))  # ITK takes no mirrored axes here
    image.SetDirection(turn.ravel())
    image.SetSpacing((0.7, 1.5, 3))
    image.SetOrigin((-10.5, 20, 300.25))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"), compressed)
    read, grid = read_volume(tmp_path / "a.nrrd", "a")
    assert read.dtype == dtype and np.array_equal(read, volume.transpose(2, 1, 0))
    for index in ((0, 0, 0), (2, 0, 0), (0, 3, 0), (2, 3, 4)):
        point = image.TransformIndexToPhysicalPoint(index) * np.array([-1, -1, 1])
        assert grid.affine @ [*index, 1] == pytest.approx([*point, 1], abs=1e-6)


@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_what_pynrrd_writes(tmp_path, encoding, endian):
    nrrd = pytest.importorskip("nrrd")
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag([2, 3, 4]),
        "space origin": [1, 2, 3],
        "encoding": encoding,
    }
    nrrd.write(str(tmp_path / "a.nrrd"), VOXELS.astype("<i2" if endian == "little" else ">i2"), header)
    volume, grid = read_volume(tmp_path / "a.nrrd", "a")
    assert np.array_equal(volume, VOXELS)
    assert grid.affine[:3, 3].tolist() == [-1, -2, 3]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (replaced("encoding", "encoding: raw\ndata file: ../secret.raw"), "keeps its voxels in other files"),
        (replaced("encoding", "encoding: raw\ndatafile: LIST"), "keeps its voxels in other files"),
        (replaced("encoding", "encoding: raw\nData File: /etc/passwd"), "keeps its voxels in other files"),
        (replaced("encoding", "encoding: bzip2"), "the encoding 'bzip2' is not supported"),
        (replaced("encoding", "encoding: raw\nbyte skip: -1"), "byte skip -1 is not supported"),
        (replaced("space:", ""), "does not say space"),
        (replaced("space:", "space: scanner-xyz"), "expected the space right-anterior-superior"),
        (replaced("space directions", ""), "does not say space directions"),
        (replaced("space directions", "space directions: none (1,0,0) (0,1,0)"), "expected three space directions"),
        (replaced("space directions", "space directions: (1,0,0) (2,0,0) (0,0,1)"), "affine does not place"),
        (replaced("space directions", "space directions: (1,0,0) (0,nan,0) (0,0,1)"), "affine does not place"),
        (replaced("space origin", "space origin: (1,2)"), "expected three numbers"),
        (replaced("space origin", 'space origin: (1,2,3)\nspace units: "m" "m" "m"'), "expected mm, found"),
        (replaced("type", "type: block"), "expected one number a voxel"),
        (replaced("sizes", "sizes: 3 4"), "expected one 3-D volume"),
        (replaced("sizes", "sizes: 3 4 0"), "expected one 3-D volume"),
        (replaced("sizes", "sizes: 300000 400000 500000"), "more than the file can hold"),
        (replaced("sizes", "sizes: three"), "no readable NRRD file"),
        (replaced("dimension", "dimension: 4"), "expected one 3-D volume"),
        (replaced("endian", ""), "does not say endian"),
        (replaced("endian", "endian: little\nendian: big"), "comes twice"),
        (replaced("endian", "nonsense"), "no field"),
        (replaced("key", "Segment0_ID:=liver"), "holds a segmentation, expected a scan"),
        (replaced("NRRD", "NIFTI"), "expected a NRRD file"),
        ("NRRD0004\ntype: short", "expected one 3-D volume|does not say|has no end"),
    ],
)
def test_what_is_not_read_is_refused_in_words(tmp_path, header, words):
    with pytest.raises(SubjectError, match=words) as error:
        read_volume(write(tmp_path / "a.nrrd", header), "s1")
    assert str(error.value).startswith(f"subject s1: {tmp_path / 'a.nrrd'}")


def test_a_file_that_is_not_there_or_damaged(tmp_path):
    with pytest.raises(SubjectError, match="cannot be read"):
        read_volume(tmp_path / "a.nrrd", "s1")
    packed = bytearray(gzip.compress(STORED))
    packed[-6] ^= 1  # the checksum
    with pytest.raises(SubjectError, match="damaged or cut short"):
        read_volume(write(tmp_path / "a.nrrd", replaced("encoding", "encoding: gzip"), bytes(packed)), "s1")


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans(), st.booleans())
def test_a_damaged_file_gives_the_volume_or_an_error_of_segkit(tmp_path_factory, data, packed, cut):
    header = replaced("encoding", "encoding: gzip") if packed else HEADER
    content = header.encode() + b"\n" + (gzip.compress(STORED, mtime=0) if packed else STORED)
    place = data.draw(st.integers(0, len(content) - 1))
    other = b"" if cut else data.draw(st.binary(min_size=1, max_size=8)) + content[place + 8 :]
    path = tmp_path_factory.mktemp("damaged") / "a.nrrd"
    path.write_bytes(content[:place] + other)
    try:
        volume, grid = read_volume(path, "s1")
    except SubjectError as error:
        assert str(error).startswith(f"subject s1: {path}")
    else:
        assert not cut and volume.shape == grid.shape
