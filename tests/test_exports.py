"""Segmentations written for viewers, read back with the libraries of others."""

import csv
import re
import struct

import highdicom
import matplotlib.colors
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import slicerio
from dicom_files import enhanced, make_series, save
from scipy.spatial import cKDTree
from test_segmenting import ORIENTATIONS

from segkit import choices, exports, measuring
from segkit.codes import CodeVolume, encode
from segkit.errors import Findings, SegkitError, SubjectError
from segkit.formats.label_image import embedded_names, find_label_image
from segkit.formats.label_writing import number_structures
from segkit.formats.mask_files import find_mask_files
from segkit.formats.nifti import Grid
from segkit.formats.snomed import OWN_SCHEME, term_of
from segkit.inference import Segmentation
from segkit.labels import OFFICIAL, color_of, official_names, rgb_of
from segkit.meshes import is_closed
from segkit.scans import Scan, find_scans, read_scan

NAMES = ("aorta", "kidney_cyst_left", "liver", "my_lesion", "spleen", "tumour")
FLAT = np.diag([-1.5, 1.5, 4.0, 1.0])


def grid_of(axes, signs, turn_degrees=0, shape=(9, 7, 6)):
    c, s = np.cos(np.deg2rad(turn_degrees)), np.sin(np.deg2rad(turn_degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ (np.eye(3)[list(axes)] * signs) @ np.diag([0.7, 1.1, 2.5])
    affine[:3, 3] = 10.25, -20, 30
    return Grid(shape, affine)


def found_in(grid: Grid, overlap=True, seed=0, names=NAMES) -> tuple[dict, Segmentation]:
    """Masks on the file's axes (i, j, k) and the segmentation of them; the last structure is absent."""
    random = np.random.default_rng(seed)
    owner = random.integers(0, len(names) + 2, grid.shape)
    masks = {name: owner == number for number, name in enumerate(names[:-1])} | {names[-1]: np.zeros(grid.shape, bool)}
    if overlap:
        masks[names[0]] = masks[names[0]] | (owner == 1) & (random.random(grid.shape) < 0.5)
    codes = encode([(name, grid.to_canonical(mask)) for name, mask in masks.items()], grid.to_canonical(owner).shape)
    best = np.zeros(codes.codes.shape, np.uint8)
    for number, name in reversed(list(enumerate(names, 1))):
        best[codes.mask(name)] = number
    return masks, Segmentation(codes, best)


def scan_on(grid: Grid, files=()) -> Scan:
    hu = np.random.default_rng(1).integers(-900, 900, grid.to_canonical(np.empty(grid.shape, np.uint8)).shape)
    return Scan("case", hu.astype(np.int16), grid, tuple(files))


def export(grid, found, folder, *formats):
    findings = Findings("case")
    return exports.write(formats, scan_on(grid), found, folder, findings), findings


@pytest.mark.parametrize("turn_degrees", [0, 25])
def test_label_images_lie_on_the_scan_in_every_orientation(turn_degrees, tmp_path):
    assert len(ORIENTATIONS) == 48
    for number, (axes, signs) in enumerate(ORIENTATIONS):
        grid = grid_of(axes, signs, turn_degrees)
        masks, found = found_in(grid, overlap=False, seed=number)
        folder = tmp_path / str(number)
        folder.mkdir()
        export(grid, found, folder, "nifti")
        image = nib.load(folder / "case_labels.nii.gz")
        values = np.asarray(image.dataobj)
        assert image.shape == grid.shape and np.allclose(image.affine, grid.affine, atol=1e-5)
        assert np.allclose(image.header.get_qform(), grid.affine, atol=1e-4)
        itk = SimpleITK.ReadImage(str(folder / "case_labels.nii.gz"))
        for name, value in number_structures(NAMES).items():
            assert np.array_equal(values == value, masks[name])
            if masks[name].any():
                place = np.argwhere(masks[name]).mean(0)
                ours = nib.affines.apply_affine(grid.affine, place)
                seen = np.argwhere(SimpleITK.GetArrayViewFromImage(itk) == value)[:, ::-1].mean(0)
                theirs = np.array(itk.TransformContinuousIndexToPhysicalPoint(seen.tolist())) * [-1, -1, 1]
                assert np.allclose(ours, theirs, atol=0.01)


def placed(path, sform, qform, sform_code, qform_code):
    """A scan whose header has two affines."""
    image = nib.Nifti1Image(np.random.default_rng(0).integers(-900, 900, (9, 7, 6)).astype(np.int16), sform)
    image.header.set_sform(sform, sform_code)
    image.header.set_qform(qform, qform_code)
    header = image.header
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes(order="F"))
    return path


ELSEWHERE = np.array([[0, -1.5, 0, 40], [1.5, 0, 0, -7], [0, 0, 4.0, 12], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("sform", "codes"), [(FLAT, (0, 0)), (ELSEWHERE, (2, 1)), (ELSEWHERE, (1, 1)), (FLAT, (0, 1)), (FLAT, (4, 0))]
)
def test_results_lie_on_their_scan_whichever_affine_a_viewer_takes(sform, codes, tmp_path):
    """ITK takes the sform with code 1 alone, else the qform; nibabel the sform with any code; without codes each makes
    another place up. Where both say the same of scan and result, they lie on each other.
    """
    path = placed(tmp_path / "case.nii", sform, FLAT, *codes)
    findings = Findings("case")
    scan = read_scan(find_scans(path)[0], findings)
    _, found = found_in(scan.grid)
    exports.write(("nifti", "masks"), scan, found, tmp_path, findings)
    source, source_itk = nib.load(path), SimpleITK.ReadImage(str(path))
    for name in ("case_labels.nii.gz", "segmentations/liver.nii.gz"):
        image, itk = nib.load(tmp_path / name), SimpleITK.ReadImage(str(tmp_path / name))
        assert np.array_equal(image.affine, source.affine) and image.header.get_zooms() == source.header.get_zooms()
        for get in ("GetOrigin", "GetDirection", "GetSpacing"):
            assert getattr(itk, get)() == getattr(source_itk, get)(), get
    two = [finding.kind for finding in findings if finding.kind == "two places"]
    assert two == (["two places"] if sform is ELSEWHERE else [])


def test_a_result_without_a_nifti_source_opens_in_itk_also_where_the_grid_is_sheared_a_little(tmp_path):
    affine = np.diag([0.7, 0.7, 1.0, 1.0])
    affine[0, 2] = 8e-4  # of 300 slices: a third of a voxel at the last one
    grid = Grid((20, 20, 300), affine)
    _, found = found_in(grid)
    export(grid, found, tmp_path, "nifti")
    itk = SimpleITK.ReadImage(str(tmp_path / "case_labels.nii.gz"))
    corner = np.array(itk.TransformIndexToPhysicalPoint((19, 19, 299))) * [-1, -1, 1]
    assert np.linalg.norm(corner - nib.affines.apply_affine(affine, (19, 19, 299))) < 0.35
    assert np.allclose(nib.load(tmp_path / "case_labels.nii.gz").affine, affine)


@pytest.mark.parametrize(("release", "structure", "number"), [("v3", "vertebrae_L5", 27), ("v1", "pancreas", 10)])
def test_a_model_of_another_release_has_its_numbers(release, structure, number):
    """Numbers by hand from the public class tables of that release."""
    numbers = number_structures(sorted(official_names(release)))
    assert numbers[structure] == number and numbers == {name: OFFICIAL[name].ids[release] for name in numbers}
    assert number_structures(["spleen", "liver"]) == {"spleen": 1, "liver": 5}  # v2 where all agree or know it
    assert number_structures(["spleen", "mine"]) == {"spleen": 1, "mine": 2}


def test_masks_are_a_subject_again_with_every_structure_that_was_looked_for(tmp_path):
    grid = grid_of((2, 0, 1), (1, -1, -1), 10)
    masks, found = found_in(grid)
    files, findings = export(grid, found, tmp_path, "masks")
    assert sorted(path.name for path in files) == sorted(f"{name}.nii.gz" for name in NAMES) and not findings
    for name in NAMES:
        image = nib.load(tmp_path / "segmentations" / f"{name}.nii.gz")
        assert np.array_equal(np.asarray(image.dataobj), masks[name]) and image.get_data_dtype() == np.uint8
        assert np.allclose(image.affine, grid.affine, atol=1e-5)
    again = find_mask_files(tmp_path / "segmentations", "case").read(grid, Findings("case"))
    assert all(np.array_equal(again.mask(name), masks[name]) for name in NAMES)


def test_numbers_names_and_colours_are_inside_and_in_every_table(tmp_path):
    names = official_names("v2")
    grid = Grid((20, 20, 20), FLAT)
    _, found = found_in(grid, names=names)
    export(grid, found, tmp_path, "itksnap", "slicer", "nifti")
    ids = {name: OFFICIAL[name].ids["v2"] for name in names}
    assert embedded_names(tmp_path / "case_labels.nii.gz", "case") == ids and len(ids) == 117
    header = nib.load(tmp_path / "case_labels.nii.gz").header
    text = header.extensions[0].get_content().decode()
    assert header.extensions[0].get_code() == 0 and "<VolumeType><![CDATA[Label]]></VolumeType>" in text
    for key, red, green, blue, name in re.findall(
        r'Key="(\d+)" Red="([\d.]+)" Green="([\d.]+)" Blue="([\d.]+)" Alpha="1"><!\[CDATA\[(\w+)\]\]>', text
    ):
        assert ids.pop(name) == int(key)
        assert matplotlib.colors.to_hex([float(red), float(green), float(blue)]) == color_of(name).lower()
    assert not ids
    snap = (tmp_path / "case_labels.txt").read_bytes().decode()
    rows = [line.split(None, 7) for line in snap.splitlines() if not line.startswith("#")]
    assert "ITK-SnAP Label Description File" in snap.split("\n")[1] and "\r" not in snap
    assert rows[0] == ["0", "0", "0", "0", "0", "0", "0", '"Clear Label"']
    assert {row[7]: row[:7] for row in rows[1:]} == {
        f'"{name}"': [*map(str, (OFFICIAL[name].ids["v2"], *rgb_of(name))), "1", "1", "1"] for name in names
    }
    table = (tmp_path / "case_labels.ctbl").read_text().splitlines()
    assert table[0] == "# Color table file case_labels.ctbl" and table[1] == "# 118 values"
    assert table[2] == "0 background 0 0 0 0"
    assert set(table[3:]) == {
        f"{OFFICIAL[name].ids['v2']} {name} {' '.join(map(str, rgb_of(name)))} 255" for name in names
    }


def test_a_label_image_is_read_back_as_labels_and_says_what_it_could_not_hold(tmp_path):
    grid = Grid((20, 20, 20), FLAT)
    masks, found = found_in(grid)
    _, findings = export(grid, found, tmp_path, "nifti")
    both = masks["aorta"] & masks["kidney_cyst_left"]
    [finding] = findings
    assert finding.kind == "overlap lost" and finding.value == both.sum() > 0
    assert str(both.sum()) in str(finding) and "masks and slicer" in str(finding)
    (tmp_path / "ct.nii.gz").touch()
    read = find_label_image(tmp_path, tmp_path / "ct.nii.gz", "case", tmp_path / "none.json").read(grid, findings)
    assert read.structures == NAMES
    for name in NAMES:  # the likelier of two is the one that the file holds
        assert np.array_equal(read.mask(name), masks[name] & ~(both if name == "kidney_cyst_left" else False))


@pytest.mark.parametrize("overlap", [True, False])
def test_slicers_segmentation_holds_all(overlap, tmp_path):
    grid = grid_of((1, 2, 0), (-1, 1, 1), 15)
    masks, found = found_in(grid, overlap)
    export(grid, found, tmp_path, "slicer")
    read = slicerio.read_segmentation(str(tmp_path / "case.seg.nrrd"))
    assert read["voxels"].ndim == (4 if overlap else 3)
    assert [segment["name"] for segment in read["segments"]] == sorted(NAMES[:-1], key=NAMES.index) or overlap
    for segment in read["segments"]:
        name = segment["name"]
        layer = read["voxels"][segment["layer"]] if overlap else read["voxels"]
        mask = masks.pop(name)
        assert np.array_equal(layer == segment["labelValue"], mask)
        places = np.argwhere(mask)
        assert segment["extent"] == np.stack([places.min(0), places.max(0)], 1).ravel().tolist()
        assert np.allclose(segment["color"], np.array(rgb_of(name)) / 255, atol=1e-5)
        assert segment["labelValue"] == number_structures(NAMES)[name]
        assert segment["terminology"]["type"][1] == term_of(name).what.value
    assert set(masks) == {NAMES[-1]}  # what was not found is no segment
    assert np.allclose(read["ijkToLPS"], np.diag([-1, -1, 1, 1]) @ grid.affine)
    if not overlap:  # ITK reads layers as a fourth axis without their place
        image = SimpleITK.ReadImage(str(tmp_path / "case.seg.nrrd"))
        corner = image.TransformIndexToPhysicalPoint((8, 6, 5))
        assert np.allclose(np.array(corner) * [-1, -1, 1], nib.affines.apply_affine(grid.affine, (8, 6, 5)), atol=1e-6)


@pytest.mark.parametrize(("axes", "signs"), [ORIENTATIONS[0], ORIENTATIONS[21], ORIENTATIONS[42]])
def test_dicom_seg_lies_on_its_series(axes, signs, tmp_path):
    grid = grid_of(axes, signs, 12)
    hu = np.random.default_rng(0).integers(-900, 900, grid.shape)
    series = make_series(hu, grid.affine)
    [source] = find_scans(save(series, tmp_path / "series"))
    findings = Findings("case")
    scan = read_scan(source, findings)
    masks, found = found_in(scan.grid)  # on the axes on which the series was read
    files = exports.write(("dicom",), scan, found, tmp_path, findings)
    assert [path.name for path in files] == [f"{scan.name}_seg.dcm", f"{scan.name}_seg_2.dcm"]
    images = {image.SOPInstanceUID for image in series}
    for path in files:
        read = highdicom.seg.segread(path)
        assert read.SeriesInstanceUID == highdicom.seg.segread(files[0]).SeriesInstanceUID
        assert {uid for *_, uid in read.get_source_image_uids()} <= images
        for number in read.segment_numbers:
            name = read.get_segment_description(number).segment_label
            volume = read.get_volume(segment_numbers=[number], combine_segments=True)
            there = volume.map_indices_to_reference(np.argwhere(volume.array))  # mm, LPS
            voxels = nib.affines.apply_affine(scan.grid.affine, np.argwhere(masks.pop(name))) * [-1, -1, 1]
            assert len(there) == len(voxels)
            assert cKDTree(there).query(voxels)[0].max() < 0.01 and cKDTree(voxels).query(there)[0].max() < 0.01
    assert set(masks) == {NAMES[-1]}


def test_dicom_seg_says_what_structures_are():
    for name, code, side in (("liver", "10200004", None), ("kidney_left", "64033007", "7771000")):
        term = term_of(name)
        assert (term.what.scheme, term.what.value) == ("SCT", code) and (term.side and term.side.value) == side
    assert term_of("rib_right_3").side.meaning == "Right" and term_of("lung_middle_lobe_right").side is None
    assert term_of("kidney_cyst_left").category.meaning == "Morphologically Abnormal Structure"
    own = term_of("a_lesion_with_a_very_long_name_" + "x" * 50).what
    assert own.scheme == OWN_SCHEME and len(own.value) <= 16 and len(own.meaning) <= 64
    others = (
        "metastasis_liver_left",
        "metastasis_liver_right",
        "my_lesion_segment_1",
        "my_lesion_segment_2",
        "肝臓",
        "胆嚢",
    )
    codes = {term_of(name).what.value for name in others}
    assert len(codes) == len(others) and all(code.isascii() and 0 < len(code) <= 16 for code in codes)
    assert term_of("my_lesion").what.value == "my_lesion"


def seg_of(series, folder, names=NAMES):
    """The files of DICOM SEG of something in a series, and what was found in it."""
    [source] = find_scans(save(series, folder / "series"))
    findings = Findings("case")
    scan = read_scan(source, findings)
    masks, found = found_in(scan.grid, overlap=False, names=names)
    folder.mkdir(exist_ok=True)
    return exports.write(("dicom",), scan, found, folder, findings), masks, scan


def flat_series(**attributes):
    hu = np.random.default_rng(0).integers(-900, 900, (9, 7, 6))
    return make_series(hu, FLAT, **attributes)


def test_dicom_seg_says_how_far_apart_slices_are_not_what_the_series_says(tmp_path):
    """A series of which every second slice was kept still says the old distance."""
    [path], masks, scan = seg_of(flat_series(SpacingBetweenSlices="2.0"), tmp_path)
    read = highdicom.seg.segread(path)
    volume = read.get_volume(combine_segments=True)
    assert volume.spacing[0] == pytest.approx(4) and volume.array.shape[0] == len(
        {k for name in NAMES for k in np.argwhere(masks[name])[:, 2]}
    )
    assert scan.spacing_mm[0] == 4


def test_dicom_seg_of_a_series_whose_headers_are_careless(tmp_path):
    """As of those who make scans anonymous: no birth date but zeros, a sex that there is not, no thickness."""
    series = flat_series(PatientSex="X", PatientBirthDate="00000000", StudyDate="", StudyTime="noon")
    for place, image in enumerate(series):
        del image.SliceThickness
        image.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0" if place else "0.0001"]
    [path], *_ = seg_of(series, tmp_path)
    read = highdicom.seg.segread(path)
    assert read.PatientSex == "" and read.PatientBirthDate == ""
    measures = read.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (measures.SliceThickness, measures.SpacingBetweenSlices) == (4, 4)


def test_names_of_any_script_stay_what_they_are_in_dicom(tmp_path):
    [path], *_ = seg_of(flat_series(SpecificCharacterSet="ISO_IR 100"), tmp_path, ("肝臓", "胆嚢", "spleen"))
    labels = [description.segment_label for description in highdicom.seg.segread(path).SegmentSequence]
    assert labels == ["肝臓", "胆嚢"]


def test_what_a_series_cannot_have_is_said_before_anything_is_segmented(tmp_path):
    whole = enhanced(flat_series())
    with pytest.raises(
        SegkitError, match=r"format 'dicom' refers to a file a slice, and this series has several slices"
    ):
        exports.check_formats(("dicom",), find_scans(save([whole], tmp_path / "frames")))
    [source] = find_scans(save(flat_series(FrameOfReferenceUID=""), tmp_path / "nowhere"))
    findings = Findings("case")
    scan = read_scan(source, findings)
    exports.check_scan(("nifti", "slicer"), scan, findings)
    with pytest.raises(SubjectError, match=r"IM\d+: the series names no frame of reference, .*choose 'nifti'"):
        exports.check_scan(("nifti", "dicom"), scan, findings)
    series = flat_series()
    for image in series:
        del image.StudyInstanceUID
    scan = read_scan(find_scans(save(series, tmp_path / "no study"))[0], Findings("case"))
    with pytest.raises(SubjectError, match=r"IM\d+: the series lacks what a segmentation repeats .*choose 'nifti'"):
        exports.check_scan(("dicom",), scan, Findings("case"))
    assert [finding.severity for finding in findings.errors] == ["error"]
    with pytest.raises(SegkitError, match="structures Liver and liver differ in case alone"):
        exports.check_formats(("nifti", "stl"), (), ("Liver", "spleen", "liver"))
    exports.check_formats(("nifti",), (), ("Liver", "spleen", "liver"))


def test_dicom_needs_a_series(tmp_path):
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), FLAT), path)
    with pytest.raises(SegkitError, match=r"a\.nii\.gz: format 'dicom' refers to the images of a DICOM series"):
        exports.check_formats(("dicom",), find_scans(path))
    grid = Grid((9, 7, 6), FLAT)
    with pytest.raises(SegkitError, match="expected a DICOM file for each of 6 slices, found 1 files"):
        exports.write(("dicom",), scan_on(grid, [path]), found_in(grid)[1], tmp_path, Findings("case"))
    with pytest.raises(SegkitError, match="'gif': expected one or more of nifti, masks"):
        exports.check_formats(("nifti", "gif"))


def ball(grid: Grid) -> Segmentation:
    """A ball of 12 mm around a place in the world, and another structure that is not there."""
    world = nib.affines.apply_affine(grid.affine, np.moveaxis(np.indices(grid.shape), 0, -1))
    mask = grid.to_canonical(np.linalg.norm(world - (20, 30, 60), axis=-1) < 12)
    codes = encode([("liver", mask), ("spleen", np.zeros_like(mask))], mask.shape)
    return Segmentation(codes, codes.mask("liver").astype(np.uint8))


def test_surfaces_lie_where_the_structure_is_and_face_outwards(tmp_path):
    grid = Grid((40, 40, 40), np.array([[0, 1.5, 0, 0], [-1.5, 0, 0, 60], [0, 0, 2.0, 20], [0, 0, 0, 1]]))
    files, _ = export(grid, ball(grid), tmp_path, "stl", "ply", "html")
    assert [path.relative_to(tmp_path).as_posix() for path in files] == [
        "stl/liver.stl",
        "ply/liver.ply",
        "case_3d.html",
    ]
    content = files[0].read_bytes()
    [count] = struct.unpack("<I", content[80:84])
    assert len(content) == 84 + 50 * count and b"SPACE=LPS" in content[:80] and not content.startswith(b"solid")
    table = np.frombuffer(content[84:], np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("a", "<u2")]))
    corners = table["corners"].astype(float)
    signed = np.einsum("ti,ti->t", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert signed == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.06)  # mm3, positive: normals look outwards
    assert np.allclose(corners.reshape(-1, 3).mean(0), (-20, -30, 60), atol=1)  # LPS
    outward = corners.mean(1) - (-20, -30, 60)
    assert (np.einsum("ti,ti->t", outward, table["normal"]) > 0).mean() > 0.98
    assert np.allclose(np.linalg.norm(table["normal"], axis=1), 1, atol=1e-5)
    head, body = files[1].read_bytes().split(b"end_header\n", 1)
    vertices, faces = (int(n) for n in re.findall(rb"element \w+ (\d+)", head))
    points = np.frombuffer(body[: 15 * vertices], np.dtype([("place", "<f4", 3), ("color", "u1", 3)]))
    sides = np.frombuffer(body[15 * vertices :], np.dtype([("n", "u1"), ("v", "<i4", 3)]))
    assert (
        faces == len(sides) == count
        and set(sides["n"]) == {3}
        and set(map(tuple, points["color"])) == {rgb_of("liver")}
    )
    assert np.allclose(points["place"][sides["v"]], table["corners"], atol=1e-5)
    assert is_closed(sides["v"])
    assert "liver" in files[2].read_text()


def test_the_table_by_hand(tmp_path):
    grid = Grid((4, 3, 2), np.diag([-2.0, 2.0, 5.0, 1.0]))  # 20 mm3 a voxel
    mask = np.zeros(grid.shape, bool)
    mask[1:3, 1, 0] = True
    hu = np.zeros(grid.shape, np.int16)
    hu[1, 1, 0], hu[2, 1, 0] = 10, 40
    shape = grid.to_canonical(mask).shape
    codes = encode([("liver", grid.to_canonical(mask)), ("spleen", np.zeros(shape, bool))], shape)
    table = measuring.measure(codes, grid.to_canonical(hu), grid).set_index("structure")
    liver = table.loc["liver"].to_dict()
    assert liver["voxels"] == 2 and liver["volume_ml"] == pytest.approx(0.04)
    assert (liver["mean_hu"], liver["sd_hu"]) == (25, 15) and liver["touches_border"]
    assert [liver[f"{axis}_{end}"] for axis in "ijk" for end in ("first", "last")] == [1, 2, 1, 1, 0, 0]
    assert table.loc["spleen", "voxels"] == 0 and table.loc["spleen", "mean_hu":].isna().all()
    found = Segmentation(codes, codes.mask("liver").astype(np.uint8))
    [path], _ = export(grid, found, tmp_path, "csv")
    own = scan_on(grid).hu_volume[codes.mask("liver")]  # that scan holds other HU
    row = f"liver,organs,0.04,2,{own.mean():.6g},{own.std():.6g},1,2,1,1,0,0,True"
    with open(path, newline="") as file:
        assert list(csv.reader(file))[1] == row.split(",")


@pytest.mark.parametrize("name", ["../liver", "a/b", 'x"y', "=cmd", "a b", ""])
def test_hostile_names_write_nothing(name, tmp_path):
    grid = Grid((4, 3, 2), FLAT)
    codes = CodeVolume(np.ones((2, 3, 4), np.uint8), np.array([[False], [True]]), (name,))
    inside = tmp_path / "inside"
    inside.mkdir()
    for each in choices.FORMATS:
        with pytest.raises(SegkitError):
            export(grid, Segmentation(codes, codes.codes), inside, each)
    assert not list(inside.iterdir()) and [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize("each", ["nifti", "masks", "slicer", "itksnap", "stl", "ply", "html", "csv"])
def test_nothing_found_is_written_as_such(each, tmp_path):
    grid = Grid((5, 4, 3), FLAT)
    codes = encode([("liver", np.zeros((3, 4, 5), bool))], (3, 4, 5))
    files, _ = export(grid, Segmentation(codes, codes.codes), tmp_path, each)
    assert all(path.stat().st_size for path in files)
    if each == "slicer":
        assert slicerio.read_segmentation(str(tmp_path / "case.seg.nrrd"))["segments"] == []


@pytest.mark.parametrize("each", choices.FORMATS)
def test_a_writer_that_fails_leaves_nothing_half(each, tmp_path, monkeypatch):
    grid = Grid((5, 4, 3), FLAT)
    _, found = found_in(grid)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for where in (
        "segkit.formats.nifti_writing.isal_zlib.compressobj", "pathlib.Path.write_text", "pathlib.Path.write_bytes",
        "pandas.DataFrame.to_csv", "segkit.formats.dicom_seg.make_segmentations",
    ):  # fmt: skip
        monkeypatch.setattr(where, full)
    # of DICOM SEG the making fails here, before anything is written; of the others the writing, named by its file
    error, message = (
        (OSError, "No space") if each == "dicom" else (SegkitError, rf"{tmp_path}/\w[^:]*: the disk is full")
    )
    with pytest.raises(error, match=message):
        export(grid, found, tmp_path, each)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
