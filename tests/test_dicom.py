"""DICOM series in: the place and HU of each voxel, what is refused, and that no damage goes unnoticed."""

import io

import numpy as np
import pydicom
import pytest
from conftest import write_nifti
from dicom_files import RAS_TO_LPS, enhanced, make_series, numbers, save, store
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit.errors import Findings, SegkitError, SubjectError
from segkit.formats.dicom import find_series
from segkit.scans import Scan, find_scans, read_scan

SHAPE = (4, 5, 6)
SPACING = (1.0, 2.0, 2.5)  # along i, j, k
ACQUISITIONS = {"axial": "LPS", "axial from above": "LPI", "sagittal": "PIL", "sagittal from the left": "PIR",
                "coronal": "LIP", "coronal from behind": "LIA"}  # fmt: skip


def read(source) -> tuple[Scan, Findings]:
    [found] = find_scans(source)
    findings = Findings(found.name)
    return read_scan(found, findings), findings


def refused(source) -> str:
    """The message with which a scan is refused; it is among the findings, too."""
    [found] = find_scans(source)
    findings = Findings(found.name)
    with pytest.raises(SubjectError) as error:
        read_scan(found, findings)
    assert str(error.value).startswith(str(findings.errors[0])) and str(error.value).startswith(f"subject {found.name}")
    return str(error.value)


def affine_of(orientation: str, turned_degrees: float = 0) -> np.ndarray:
    """An affine whose axes i, j, k grow towards these letters, turned about an oblique axis."""
    axes = np.zeros((3, 3))
    for column, letter in enumerate(orientation):
        row, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[letter]
        axes[row, column] = sign
    affine = np.eye(4)
    affine[:3, :3] = rotation((1, 2, 3), turned_degrees) @ axes * SPACING
    affine[:3, 3] = (-12.5, 40, 7.25)
    return affine


def rotation(axis, degrees: float) -> np.ndarray:
    """Rodrigues' formula."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross, angle = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def world(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """RAS mm of each voxel (i, j, k), shape (*shape, 3)."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def gradient(affine: np.ndarray, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """HU that tell where a voxel is: they grow by 3, 7 and 11 a mm to the right, to the front and to the head."""
    return np.rint(world(affine, shape) @ (3, 7, 11)).astype(np.int16)


def a_series(**options) -> list:
    affine = affine_of("LPS")
    return make_series(gradient(affine), affine, **options)


def says_where_it_is(scan: Scan) -> bool:
    places = world(scan.grid.canonical_affine, scan.shape[::-1]).transpose(2, 1, 0, 3)
    return bool(abs(places @ (3, 7, 11) - scan.hu()).max() < 0.51)  # rounded when it was written


@pytest.mark.parametrize("turned", [0, 17])
@pytest.mark.parametrize("acquisition", ACQUISITIONS)
def test_a_series_is_the_same_scan_as_its_nifti(tmp_path, acquisition, turned):
    affine = affine_of(ACQUISITIONS[acquisition], turned)
    save(make_series(gradient(affine), affine), tmp_path / "a", seed=3)
    scan, findings = read(tmp_path / "a")
    same, _ = read(write_nifti(tmp_path / "a.nii.gz", gradient(affine), affine))
    assert [finding.severity for finding in findings] == ["warning"] and findings[0].kind == "no air"
    assert np.array_equal(scan.hu(), same.hu()) and scan.hu().dtype == np.int16
    assert np.allclose(scan.grid.canonical_affine, same.grid.canonical_affine, atol=1e-5)
    assert scan.spacing_mm == pytest.approx(same.spacing_mm) and scan.shape == same.shape
    assert says_where_it_is(scan)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_each_voxel_lies_where_the_standard_puts_it(tmp_path_factory, seed):
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]  # any direction of the axes, mirrored ones too
    shape = tuple(random.integers(1, 6, 3).tolist())
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * random.uniform(0.4, 5, 3), random.uniform(-100, 100, 3)
    signed = bool(random.integers(2))
    # slopes that lose nothing: what is stored is whole
    slope = random.choice([1.0, 0.5])
    series = make_series(gradient(affine, shape), affine, slope, 0 if signed else -8192, signed)
    if gradient(affine, shape).min() == gradient(affine, shape).max():
        return  # one value everywhere is refused
    scan, _ = read(save(series, tmp_path_factory.mktemp("series") / "a", seed))
    assert says_where_it_is(scan)
    by_k = sorted(series, key=lambda image: np.cross(*np.reshape(image.ImageOrientationPatient, (2, 3)).astype(float))
                  @ np.array(image.ImagePositionPatient, float))  # fmt: skip
    assert [pydicom.dcmread(path).SOPInstanceUID for path in scan.files] == [image.SOPInstanceUID for image in by_k]


@pytest.mark.parametrize("turned", [0, 17])
@pytest.mark.parametrize("acquisition", ACQUISITIONS)
def test_simpleitk_reads_the_same(tmp_path, acquisition, turned):
    sitk = pytest.importorskip("SimpleITK")
    affine = affine_of(ACQUISITIONS[acquisition], turned)
    folder = save(make_series(gradient(affine), affine), tmp_path / "a")
    scan, _ = read(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    theirs = sitk.GetArrayFromImage(image).transpose(2, 1, 0)  # (i, j, k)
    ours = scan.grid.from_canonical(scan.hu())
    # each voxel of theirs, by its place in the patient, in ours
    for index in np.ndindex(theirs.shape):
        point = RAS_TO_LPS[:3, :3] @ image.TransformIndexToPhysicalPoint(index)
        there = np.linalg.solve(scan.grid.affine, [*point, 1])[:3]
        nearest = np.rint(there).astype(int)
        assert np.linalg.norm(scan.grid.affine[:3, :3] @ (there - nearest)) < 0.01
        assert ours[tuple(nearest)] == theirs[index]


def test_slope_and_intercept_are_those_of_each_slice(tmp_path):
    series = a_series()
    for k, image in enumerate(series):
        stored = image.pixel_array.astype(float) - 1024  # HU, by hand
        image.RescaleSlope, image.RescaleIntercept = "0.5", str(-1500 - k)
        store(image, (stored + 1500 + k) * 2)
    scan, _ = read(save(series, tmp_path / "a"))
    assert says_where_it_is(scan)


def test_half_hu_are_rounded_and_what_int16_cannot_hold_is_cut(tmp_path):
    series = a_series()
    for image in series:
        image.RescaleSlope, image.RescaleIntercept = "1.4", "0"
    store(series[0], np.array([[0, 1, 2, 3], [40000, 50000, 0, 0]]))
    for image in series[1:]:
        store(image, np.zeros((2, 4)))
    scan, findings = read(save(series, tmp_path / "a"))
    values = scan.grid.from_canonical(scan.hu())[:, :, 0].T
    assert values.tolist() == [[0, 1, 3, 4], [32767, 32767, 0, 0]]
    assert [f.kind for f in findings] == ["HU range", "no air"] and "from 0 to 70000" in str(findings[0])


@pytest.mark.parametrize(
    ("signed", "padding", "limit", "stored", "hu"),
    [
        (True, -2000, None, [-2000, -1024, 0, 40], [-1024, -1024, 0, 40]),
        (True, 63536, None, [-2000, -1024, 0, 40], [-1024, -1024, 0, 40]),  # -2000 as an unsigned number
        (True, -3000, -2000, [-3000, -2500, -2000, 40], [-1024, -1024, -1024, 40]),
        (False, 0, None, [0, 24, 1024, 5000], [-1024, -1000, 0, 3976]),  # intercept -1024: padding is air already
        (True, 0, None, [0, -1000, 1, 40], [0, -1000, 1, 40]),  # tissue that is named as padding stays tissue
    ],
)
def test_padding_becomes_air(tmp_path, signed, padding, limit, stored, hu):
    series = a_series(intercept=0 if signed else -1024, signed=signed) if signed else a_series()
    for image in series:
        image.add_new("PixelPaddingValue", "US" if padding > 32767 or not signed else "SS", padding)
        if limit is not None:
            image.add_new("PixelPaddingRangeLimit", "SS", limit)
        store(image, np.array([stored, stored]))
    scan, findings = read(save(series, tmp_path / "a"))
    assert scan.grid.from_canonical(scan.hu())[:, 0, 0].tolist() == hu
    assert list(findings) == []


@pytest.mark.parametrize("name", ["RLELossless", "JPEGLSLossless"])
def test_compressed_slices_are_the_same(tmp_path, name):
    if name == "JPEGLSLossless":
        pytest.importorskip("jpeg_ls")
    series = a_series()
    for image in series:
        image.compress(getattr(pydicom.uid, name), generate_instance_uid=False)
    scan, _ = read(save(series, tmp_path / "a"))
    assert says_where_it_is(scan)


@pytest.mark.parametrize(
    ("syntax", "words"),
    [
        ("1.2.840.10008.1.2.4.70", ["JPEG Lossless", "pylibjpeg-libjpeg", "save the scan uncompressed"]),
        ("1.2.840.10008.1.2.4.106", ["which pydicom cannot decode", "save the scan uncompressed"]),  # video
    ],
)
def test_a_compression_that_nothing_here_decodes_is_named(tmp_path, syntax, words):
    if syntax.endswith(".70") and pydicom.pixels.get_decoder(pydicom.uid.UID(syntax)).is_available:
        pytest.skip("a decoder of JPEG Lossless is installed")
    series = a_series()
    for image in series:
        image.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        image.file_meta.TransferSyntaxUID = syntax
    message = refused(save(series, tmp_path / "a"))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("compressed", [False, True])
def test_a_multi_frame_image_is_the_same_as_its_slices(tmp_path, compressed):
    affine = affine_of("PIR", 17)  # counted against the normal: frames are turned round
    series = make_series(gradient(affine), affine)
    for k, image in enumerate(series):  # each frame has a scaling of its own
        image.RescaleIntercept = str(-1024 - k)
        store(image, image.pixel_array + k)
    whole = enhanced(series)
    if compressed:
        whole.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    scan, _ = read(save([whole], tmp_path / "a"))
    assert says_where_it_is(scan) and len(scan.files) == 1
    assert scan.grid.shape == SHAPE


def test_one_slice_is_as_thick_as_it_says(tmp_path):
    scan, findings = read(save(a_series(SliceThickness="7.5")[2:3], tmp_path / "a"))
    assert scan.spacing_mm == (7.5, 2, 1) and scan.shape == (1, 5, 4) and says_where_it_is(scan)
    assert findings[0].kind == "one slice" and findings[0].severity == "info"


def test_a_single_file_may_be_named_itself(tmp_path):
    folder = save(a_series(), tmp_path / "a")
    scan, _ = read(folder / "IM0002")
    assert scan.shape == (1, 5, 4) and scan.name == "IM0002"


# what is wrong with a series ------------------------------------------------------------------------------------------


def move(image, k_step: float = 0, **by) -> None:
    """Move an image by so many slice distances along k, and by mm along x, y (LPS)."""
    position = np.array(image.ImagePositionPatient, float) + (by.get("x", 0), by.get("y", 0), k_step * SPACING[2])
    image.ImagePositionPatient = numbers(position)


def copy_of(image):
    stream = io.BytesIO()
    image.save_as(stream, enforce_file_format=True)
    stream.seek(0)
    copied = pydicom.dcmread(stream)
    copied.SOPInstanceUID = pydicom.uid.generate_uid()
    return copied


def missing(series):
    return [image for k, image in enumerate(series) if k not in (2, 3)]


def doubled_unlike(series):
    other = copy_of(series[3])
    store(other, other.pixel_array + 5)
    return [*series, other]


def uneven(series):
    move(series[4], 0.4)
    return series


def gantry(series):
    for k, image in enumerate(series):
        move(image, y=k * 0.8)
    return series


def turned(series):
    series[1].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    return series


def other_size(series):
    store(series[5], np.zeros((4, 4)))
    return series


def other_spacing(series):
    series[5].PixelSpacing = [2, 1.5]
    return series


def other_frame_of_reference(series):
    series[5].FrameOfReferenceUID = "1.2.3"
    return series


def huge(series):
    for image in series:
        image.Rows = image.Columns = 60000
    return series


def without(name):
    def damage(series):
        delattr(series[3], name)
        return series

    return damage


def with_value(name, value):
    def damage(series):
        setattr(series[3], name, value)
        return series

    return damage


# names of files: see dicom_files.save; instance numbers run against k, from 6 down to 1
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, ["2 of 6 slices seem to be missing", "3 x 2.5 mm between", "instance 5", "instance 2"]),
        (doubled_unlike, ["different slices at one position", "instance 3"]),
        (uneven, ["not evenly spaced", "from 1.500 to 3.500 mm", "instance 2"]),
        (gantry, ["the gantry was tilted, by 17.7 degrees", "dcm2niix"]),
        (turned, ["expected orientation 1, 0, 0, 0, 1, 0 as in most slices", "instance 5"]),
        (other_size, ["expected rows and columns 5, 4", "found rows and columns 4, 4", "instance 1"]),
        (other_spacing, ["expected pixel spacing 2, 1", "found pixel spacing 2, 1.5", "instance 1"]),
        (other_frame_of_reference, ["another frame of reference", "instance 1"]),
        (without("PixelData"), ["IM000", "no pixels"]),
        (without("ImagePositionPatient"), ["has no ImagePositionPatient"]),
        (without("PixelSpacing"), ["has no PixelSpacing"]),
        (with_value("PixelSpacing", [0, 1]), ["PixelSpacing [0.0, 1.0]: expected two lengths"]),
        (with_value("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), ["expected two unit vectors"]),
        (with_value("SamplesPerPixel", 3), ["one number a pixel, found 5 x 4 x 3"]),
        (with_value("NumberOfFrames", 2), ["2 images in one file, and nothing says where each lies"]),
        (with_value("RescaleSlope", "1e300"), ["RescaleSlope"]),
        (with_value("Rows", 60000), ["found rows and columns 60000, 4", "instance 3"]),
        (huge, ["expected an image, one number a pixel, found 60000 x 60000 x 1"]),
        (with_value("PixelData", b"\0\0"), ["IM000", "DICOM"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_refused_with_the_slices_named(tmp_path, damage, words):
    message = refused(save(damage(a_series()), tmp_path / "a"))
    assert [word for word in words if word not in message] == []


def doubled_alike(series):
    return [*series, copy_of(series[3])]


def slightly_uneven(series):
    move(series[4], 0.04)
    return series


def no_ct(series):
    for image in series:
        image.Modality = "MR"
    return series


def stated_otherwise(series):
    for image in series:
        image.SpacingBetweenSlices = 1.25
    return series


def no_rescale(series):
    for image in series:
        store(image, image.pixel_array)
        del image.RescaleSlope, image.RescaleIntercept
    return series


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (doubled_alike, "doubled slices", ["the same slice twice", "instance 3"]),
        (slightly_uneven, "uneven slices", ["from 2.400 to 2.600 mm, 2.500 on average", "instance 2"]),
        (no_ct, "no CT", ["its modality is MR, expected CT"]),
        (stated_otherwise, "other spacing", ["SpacingBetweenSlices is 1.25 mm, but the slices lie 2.5 mm apart"]),
        (no_rescale, "no rescale", ["numbers are taken as HU as they are", "IM000"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_doubtful_is_reported_and_read(tmp_path, damage, kind, words):
    scan, findings = read(save(damage(a_series()), tmp_path / "a"))
    [finding] = [finding for finding in findings if finding.kind != "no air"]
    assert finding.kind == kind and finding.severity == "warning"
    assert [word for word in words if word not in str(finding)] == []
    assert scan.shape == SHAPE[::-1]
    if damage is not no_rescale:
        assert says_where_it_is(scan)


def test_a_slight_tilt_is_kept_in_the_affine(tmp_path):
    series = a_series()
    for k, image in enumerate(series):
        move(image, y=k * 0.05)  # 0.25 mm over all slices, half of the tolerance
    scan, _ = read(save(series, tmp_path / "a"))
    lps = RAS_TO_LPS @ scan.grid.affine
    assert lps[:3, 2] == pytest.approx([0, 0.05, 2.5])


def test_a_localizer_among_the_slices_is_left_out(tmp_path):
    series = a_series()
    scout = copy_of(series[0])
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    scan, findings = read(save([*series, scout], tmp_path / "a"))
    assert says_where_it_is(scan) and scan.shape == SHAPE[::-1]
    assert findings[0].severity == "info" and "localizers are left out: IM000" in str(findings[0])


def test_of_several_series_one_is_chosen(tmp_path):
    affine = affine_of("LPS")
    first = a_series()
    small = gradient(affine, (3, 3, 3))
    second = make_series(small, affine, uid="1.2.3.77", SeriesDescription="Bone\x1b[31m", Modality="MR")
    save(first, tmp_path / "a" / "one")
    save(second, tmp_path / "a" / "two" / "deeper")
    with pytest.raises(SegkitError) as error:
        find_scans(tmp_path / "a")
    lines = str(error.value).splitlines()
    assert "found 2 series, expected one; choose by the UID or the end of it" in lines[0]
    assert f"{first[0].SeriesInstanceUID}: Thorax (6 files, 6 slices, 4 x 5, 2.5 mm, CT)" in lines[1]
    assert "1.2.3.77: Bone?[31m (3 files, 3 slices, 3 x 3, 2.5 mm, MR)" in lines[2]
    for end in ("1.2.3.77", ".77"):
        [found] = find_scans(tmp_path / "a", end)
        assert found.series.uid == "1.2.3.77" and found.name == "a"
    for end in ("nothing", ""):
        with pytest.raises(SegkitError, match=f"found {2 if end == '' else 0} series whose UID ends in"):
            find_scans(tmp_path / "a", end)


def test_what_is_no_image_is_no_series(tmp_path):
    report = a_series()[0]
    report.Modality, report.SeriesInstanceUID = "SR", "1.2.3"
    save([report], tmp_path / "a" / "report")
    folder = save(a_series(), tmp_path / "a" / "scan").parent
    (folder / "notes").write_text("nothing")
    (folder / ".hidden").write_bytes(b"\0" * 128 + b"DICM")
    scan, _ = read(folder)
    assert says_where_it_is(scan)


def test_of_a_file_that_is_cut_in_its_header_the_name_is_told(tmp_path):
    folder = save(a_series(), tmp_path / "a")
    path = folder / "IM0003"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SegkitError, match="IM0003: damaged or cut short"):
        find_scans(folder)


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 300])
def test_what_is_no_dicom_is_said(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(SegkitError, match=r"nor DICOM by its content|damaged or cut short"):
        find_scans(tmp_path / "a")


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["slices", "compressed slices", "frames"]), st.booleans())
def test_a_damaged_file_gives_a_scan_or_an_error_of_segkit(tmp_path_factory, data, kind, cut):
    """Cut anywhere, or with other bytes anywhere: never another exception; and what is cut is never read."""
    series = [enhanced(a_series())] if kind == "frames" else a_series()
    if kind == "compressed slices":
        for image in series:
            image.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    folder = save(series, tmp_path_factory.mktemp("damaged") / "a")
    path = folder / "IM0000"
    content = path.read_bytes()
    place = data.draw(st.integers(128, len(content) - 1))
    other = b"" if cut else data.draw(st.binary(min_size=1, max_size=8)) + content[place + 8 :]
    path.write_bytes(content[:place] + other)
    try:
        scan, _ = read(folder)
    except SegkitError as error:
        assert str(folder) in str(error)
    else:
        assert isinstance(scan, Scan) and not (cut and kind != "compressed slices" and len(scan.hu()) == SHAPE[2])


def test_series_without_pydicom(tmp_path, monkeypatch):
    folder = save(a_series(), tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(SegkitError, match=r"pip install -e '\.\[dicom\]'"):
        find_series([folder / "IM0000"])
