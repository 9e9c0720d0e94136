"""A scan segmented on its own grid: codes, best structure, uncertainty, mirrored passes and largest pieces."""

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

from segkit import augment
from segkit.cleaning import IN_PIECES, keep_largest
from segkit.codes import CodeVolume, encode
from segkit.formats.nifti import Grid
from segkit.inference import Predictor
from segkit.labels import OFFICIAL
from segkit.segmenting import Collector, WayBack, entropy_bits
from segkit.slices import collate
from segkit.unet import UNet2D


@dataclass(frozen=True)
class MadeScan:
    """What segmenting asks of a scan: HU (z, y, x) on the canonical grid, without labels."""

    hu_volume: np.ndarray
    grid: Grid
    name: str = "made"

    @property
    def shape(self):
        return self.hu_volume.shape

    @property
    def spacing_mm(self):
        return self.grid.spacing_mm

    @property
    def codebook(self):
        return CodeVolume(np.zeros(0, np.uint8), np.zeros((1, 0), bool), ())

    def hu(self, z=slice(None)):
        return np.ascontiguousarray(self.hu_volume[z])

    def labels(self, z=slice(None)):
        return self.codebook.with_codes(np.zeros(self.hu_volume[z].shape, np.uint8))


def scan_of(file_volume: np.ndarray, affine: np.ndarray) -> MadeScan:
    grid = Grid(file_volume.shape, affine)
    return MadeScan(grid.to_canonical(file_volume).astype(np.int16), grid)


def plain_scan(shape=(3, 16, 16), spacing=(3.0, 2.0, 2.0), seed=0) -> MadeScan:
    hu = np.random.default_rng(seed).integers(-900, 900, shape)
    return scan_of(hu.transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0]))


class Says(nn.Module):
    """Gives back what a function makes of images (B, P, H, W)."""

    in_channels = 1

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def constants(*logits):
    """Networks that say the same of every pixel, a channel a number."""
    return Says(lambda images: torch.tensor(logits)[:, None, None].expand(len(images), -1, *images.shape[2:]))


BONE = Says(lambda images: torch.cat([images - augment.normalize(torch.tensor(200.0)), images - 9], 1))
LABELS = {"bone": 0, "nothing": 1}

ORIENTATIONS = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]


@pytest.mark.parametrize("turn_degrees", [0, 20])
def test_every_orientation_gives_the_voxels_of_the_file(turn_degrees):
    """48 ways in which a file can lie, upright and oblique: what is bright in it is found there and only there."""
    bright = np.random.default_rng(3).random((12, 12, 12)) < 0.3
    c, s = np.cos(np.deg2rad(turn_degrees)), np.sin(np.deg2rad(turn_degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    predictor = Predictor(BONE, LABELS, (12, 12), batch_size=5, device="cpu")
    assert len(ORIENTATIONS) == 48
    for axes, signs in ORIENTATIONS:
        affine = np.eye(4)
        affine[:3, :3] = turn @ (np.eye(3)[list(axes)] * signs) * 1.5
        affine[:3, 3] = 10, -20, 30
        scan = scan_of(np.where(bright, 300, 100), affine)
        found = predictor.segment(scan)
        assert found.codes.codes.shape == found.best.shape == scan.shape
        assert np.array_equal(scan.grid.from_canonical(found.codes.mask("bone")), bright)
        assert np.array_equal(scan.grid.from_canonical(found.best) == 1, bright)


@pytest.mark.parametrize("shape", [(1, 40, 30), (1500, 8, 9), (4, 1, 7)])
def test_unequal_spacing_and_scans_of_one_and_of_many_slices(shape):
    """A half of the slice that is bright comes back as such, but for a column in its middle and those at the edge.

    There the network sees a pixel that is partly outside of the slice, in air.
    """
    hu = np.full(shape, -500)
    hu[:, :, : shape[2] // 2] = 500
    scan = scan_of(hu.transpose(2, 1, 0), np.diag([-0.8, 1.7, 5.0, 1]))
    assert scan.spacing_mm == (5.0, 1.7, 0.8)
    found = Predictor(BONE, LABELS, (64, 64), device="cpu").segment(scan)
    wrong = found.codes.mask("bone") != (scan.hu() > 0)
    assert found.codes.codes.shape == shape and found.codes.mask("bone").any()
    assert wrong[:, :, 1:-1].any((0, 1)).sum() <= 1


def test_any_batch_size_and_predict_give_the_same():
    torch.manual_seed(0)
    scan = plain_scan((7, 30, 40))
    labels = {name: channel for channel, name in enumerate(("liver", "spleen", "aorta", "mine"))}
    model = UNet2D(3, 4, (8, 16))
    for member in (model, [model, UNet2D(1, 4, (8, 16))]):
        whole, *others = (
            Predictor(member, labels, (32, 32), batch_size=size, device="cpu").segment(scan) for size in (1, 3, 8)
        )
        assert whole.codes.codebook.sum() > 4  # it finds something, also overlaps
        for other in others:
            assert np.array_equal(whole.codes.codes, other.codes.codes) and np.array_equal(whole.best, other.best)
        predicted = Predictor(member, labels, (32, 32), batch_size=2, device="cpu").predict(scan)
        assert np.array_equal(predicted.codes, whole.codes.codes)
        assert np.array_equal(predicted.codebook, whole.codes.codebook)


sides, spacings = st.integers(1, 40), st.floats(0.4, 5)


@settings(max_examples=60, deadline=None)
@given(sides, sides, spacings, spacings, st.sampled_from([(16, 16), (16, 48), (64, 32)]), st.integers(0, 2**31))
def test_codes_and_best_are_those_of_whole_planes_by_brute_force(rows, columns, y_mm, x_mm, target, seed):
    """Against torch's grid_sample of all planes, which knows nothing of crops; where rounding cannot decide."""
    random = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(random.normal(size=(5, *target)), (0, 2, 2)) * 10 - random.uniform(0, 4)
    planes = torch.from_numpy(smooth.astype(np.float32))
    limits = torch.tensor([0.0, 0.5, -0.5, 1, 0])
    codebook, annotated = torch.zeros(1, 5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    item = {"hu": torch.zeros(1, rows, columns, dtype=torch.int16), "codes": torch.zeros(rows, columns).int(),
            "spacing_mm": (y_mm, x_mm), "codebook": codebook, "annotated": annotated}  # fmt: skip
    batch, names = collate([(0, item)]), tuple("abcde")
    collector = Collector(names, (1, rows, columns), best=True)
    collector.add(0, planes, limits, WayBack(batch, target))
    volume, best = collector.finish()

    pixel = max(rows * y_mm / target[0], columns * x_mm / target[1])
    y = (torch.arange(rows) + 0.5 - rows / 2) * y_mm / pixel * 2 / target[0]
    x = (torch.arange(columns) + 0.5 - columns / 2) * x_mm / pixel * 2 / target[1]
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
    above = F.grid_sample(
        (planes - limits[:, None, None])[None], grid, mode="bilinear", padding_mode="border", align_corners=False
    )[0].numpy()
    found = np.stack([volume.mask(name)[0] for name in names])
    assert ((found == (above > 0)) | (np.abs(above) < 1e-4)).all()
    first, second = np.sort(above, 0)[[-1, -2]]
    clear = (np.abs(first) > 1e-4) & (first - second > 1e-4)
    assert np.array_equal(best[0][clear], np.where(first > 0, above.argmax(0) + 1, 0)[clear])
    assert_best_is_held(volume, best)


def assert_best_is_held(volume, best):
    held = volume.codebook[volume.codes.ravel(), best.astype(int).ravel() - 1]
    assert np.array_equal(best > 0, volume.codes > 0) and held[best.ravel() > 0].all()


def test_the_best_of_more_structures_than_a_byte_counts_is_told_apart():
    logits = [-1.0] * 300
    logits[299], logits[7] = 2.0, 1.0
    labels = {f"s{channel}": channel for channel in range(300)}
    found = Predictor(constants(*logits), labels, (16, 16), device="cpu").segment(plain_scan())
    assert found.best.dtype == np.uint16 and (found.best == 300).all()
    assert found.codes.mask("s7").all() and found.codes.codes.dtype == np.uint8


def test_the_best_is_the_one_farthest_above_its_own_threshold():
    predictor = Predictor(constants(2.0, 1.0), {"a": 0, "b": 1}, (16, 16), threshold=[0.85, 0.5], device="cpu")
    assert (predictor.segment(plain_scan()).best == 2).all()  # 2 - logit(0.85) = 0.27 is less than 1
    equal = Predictor(constants(1.0, 1.0), {"a": 0, "b": 1}, (16, 16), device="cpu")
    assert (equal.segment(plain_scan()).best == 1).all()


def test_the_mean_of_an_ensembles_logits_is_what_thresholds_are_for():
    pair = [constants(3.0), constants(1.0)]  # 2 is a probability of 0.88
    for threshold, there in ((0.87, True), (0.89, False)):
        found = Predictor(pair, {"a": 0}, (16, 16), threshold, device="cpu").segment(plain_scan())
        assert (found.codes.mask("a") == there).all() and (found.best == there).all()


SIDED = {"kidney_left": 0, "kidney_right": 1, "liver": 2, "lung_middle_lobe_right": 3}


def halves(images):
    """A network that mirrors with the body: what is bright, each kidney in its half, the liver on both sides."""
    right = torch.arange(images.shape[-1]) >= images.shape[-1] // 2
    return torch.cat([images.where(~right, -3.0), images.where(right, -3.0), images + 0.5, images - 1], 1)


@pytest.mark.parametrize("width", [16, 20])
def test_a_network_that_mirrors_with_the_body_says_the_same_of_the_mirrored_slice(width):
    scan = plain_scan((2, 16, width))
    predictor = Predictor(Says(halves), SIDED, (32, 32), device="cpu")
    plain, mirrored = predictor.segment(scan, uncertainty=True), predictor.segment(scan, mirror=True, uncertainty=True)
    assert plain.codes.mask("kidney_left").any() and plain.codes.mask("lung_middle_lobe_right").any()
    differ = sum((plain.codes.mask(name) != mirrored.codes.mask(name)).sum() for name in SIDED)
    assert differ <= 2  # the image of the mirrored slice is rounded otherwise
    assert np.abs(plain.uncertainty.astype(float) - mirrored.uncertainty).max() < 0.01


def test_partner_channels_are_swapped_and_averaged_by_hand():
    def found(left, right, liver_on_the_left, liver_on_the_right, lobe):
        def says(images):
            on_right = torch.arange(images.shape[-1]) >= images.shape[-1] // 2
            liver = torch.where(on_right, liver_on_the_right, liver_on_the_left).expand_as(images)
            other = [torch.full_like(images, value) for value in (left, right, lobe)]
            return torch.cat([*other[:2], liver, other[2]], 1)

        segmented = Predictor(Says(says), SIDED, (16, 16), device="cpu").segment(plain_scan(), mirror=True)
        return [bool(segmented.codes.mask(name).any()) for name in SIDED]

    # both kidneys get the mean of the two, the liver of its sides; the lobe has no partner and keeps its own
    assert found(3.0, -1.0, 3.0, -1.0, 1.0) == [True, True, True, True]
    assert found(1.0, -3.0, 1.0, -3.0, -1.0) == [False, False, False, False]


def test_a_network_of_slabs_is_mirrored_too():
    def column(images):  # (B, D, H, W) -> (B, C, D, H, W)
        return halves(images.flatten(0, 1)[:, None]).unflatten(0, images.shape[:2]).movedim(2, 1)

    slabs = Says(column)
    slabs.depth = 4
    scan = plain_scan((9, 16, 16))
    one, other = (
        Predictor(model, SIDED, (16, 16), batch_size=3, device="cpu").segment(scan, mirror=True)
        for model in (Says(halves), slabs)
    )
    assert sum((one.codes.mask(name) != other.codes.mask(name)).sum() for name in SIDED) <= 2


def test_entropy_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.0, 1.0, 0.9], [1.0, 0.01, 1.0, 0.0, 0.2]])
    # -0.25 log2 0.25 - 0.75 log2 0.75 = 0.8113; of 0.2: 0.7219
    assert entropy_bits(p).tolist() == pytest.approx([1, 0.8113, 0, 0, 0.7219], abs=1e-4)


def test_uncertainty_is_that_of_the_mean_probability():
    labels = {"a": 0, "b": 1}
    sure, against = constants(6.0, -9.0), constants(-6.0, -9.0)

    def uncertainty(*models):
        segmented = Predictor(models, labels, (16, 16), device="cpu").segment(plain_scan(), uncertainty=True)
        assert segmented.uncertainty.dtype == np.float16 and segmented.uncertainty.shape == (3, 16, 16)
        return np.unique(segmented.uncertainty).tolist()

    p = 1 / (1 + np.exp(-6))
    alone = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    assert uncertainty(sure) == pytest.approx([alone], abs=1e-3)
    assert uncertainty(constants(60.0, -60.0)) == [0] and uncertainty(constants(0.0, -9.0)) == [1]
    assert uncertainty(sure, against) == [1]  # they contradict each other
    p = (p + 0.5) / 2
    alone = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    assert uncertainty(sure, constants(0.0, -9.0)) == pytest.approx([alone], abs=1e-3)
    assert uncertainty(sure, sure, sure) == uncertainty(sure)
    assert Predictor(sure, labels, (16, 16), device="cpu").segment(plain_scan()).uncertainty is None


def test_an_ensemble_of_the_same_network_is_that_network():
    torch.manual_seed(1)
    scan, model = plain_scan((3, 30, 40)), UNet2D(1, 4, (8, 16))
    one, three = (
        Predictor(models, SIDED, (32, 32), device="cpu").segment(scan, uncertainty=True)
        for models in (model, [model] * 3)
    )
    assert np.array_equal(one.codes.codes, three.codes.codes) and np.array_equal(one.best, three.best)
    assert np.abs(one.uncertainty.astype(float) - three.uncertainty).max() < 2e-3


def volume_of(**masks):
    return encode(masks.items(), next(iter(masks.values())).shape)


def blobs(*boxes):
    mask = np.zeros((12, 12, 12), bool)
    for box in boxes:
        mask[tuple(slice(*side) for side in box)] = True
    return mask


LARGE, SMALL = ((2, 6), (2, 6), (2, 6)), ((8, 10), (8, 10), (8, 10))
AT_BORDER, AT_CORNER = ((11, 12), (9, 10), (2, 4)), ((6, 7), (6, 7), (6, 7))


def cleaned(volume, best=None):
    best = np.array([0, *volume.codebook[1:].argmax(1) + 1])[volume.codes] if best is None else best
    codes, best = keep_largest(volume, best.astype(np.uint8))
    assert_best_is_held(codes, best)
    return codes, best


def test_the_largest_piece_stays_by_hand():
    masks = {
        "liver": blobs(LARGE, SMALL),
        "spleen": blobs(LARGE, AT_CORNER),  # touches by a corner: one piece
        "stomach": blobs(SMALL, LARGE, AT_BORDER),  # cut by the field of view: stays
        "rib_left_4": blobs(LARGE, SMALL),
        "colon": blobs(LARGE, SMALL),
        "mine": blobs(LARGE, SMALL),
    }
    volume = volume_of(**masks)
    codes, _ = cleaned(volume)
    expected = masks | {"liver": blobs(LARGE), "stomach": blobs(LARGE, AT_BORDER)}
    for name, mask in expected.items():
        assert np.array_equal(codes.mask(name), mask), name
    assert np.array_equal(volume.mask("liver"), masks["liver"])  # what came in is as it was


def test_the_largest_piece_is_that_of_most_voxels():
    rod, pillar = blobs(((2, 3), (2, 3), (2, 9))), blobs(((5, 10), (5, 6), (5, 6)))  # 7 voxels and 5
    codes, _ = cleaned(volume_of(liver=rod | pillar, mine=blobs(((2, 3), (2, 3), (4, 5)))))
    assert np.array_equal(codes.mask("liver"), rod)


def test_where_the_best_structure_goes_another_that_is_there_takes_its_place():
    volume = volume_of(liver=blobs(LARGE, SMALL), mine=blobs(SMALL), spleen=blobs(((8, 9), (2, 4), (2, 4))))
    best = np.zeros((12, 12, 12), np.uint8)
    best[volume.mask("liver")], best[volume.mask("spleen")] = 1, 3
    _, best = cleaned(volume, best)
    assert (best[blobs(SMALL)] == 2).all() and (best[blobs(LARGE)] == 1).all() and best[8, 2, 2] == 3
    alone, best = cleaned(volume_of(liver=blobs(LARGE, SMALL)))
    assert not best[blobs(SMALL)].any() and alone.voxels() == {"liver": 64}


def test_nothing_to_clean():
    empty = CodeVolume(np.zeros((2, 3, 4), np.uint8), np.zeros((1, 1), bool), ("liver",))
    codes, best = cleaned(empty, np.zeros((2, 3, 4), np.uint8))
    assert not codes.codes.any() and not best.any()
    assert set(IN_PIECES) < set(OFFICIAL) and not {"liver", "heart", "trachea", "brain"} & set(IN_PIECES)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 2**31), st.floats(0.05, 0.6))
def test_pieces_are_those_of_scipy(shape, seed, share):
    random = np.random.default_rng(seed)
    masks = {name: random.random(shape) < share for name in ("liver", "spleen", "brain", "colon", "mine")}
    codes, _ = cleaned(volume_of(**masks))
    for name in ("liver", "spleen", "brain"):
        pieces, count = ndimage.label(masks[name], np.ones((3, 3, 3)))
        inner = np.zeros(shape, bool)
        inner[1:-1, 1:-1, 1:-1] = True
        stay = set(np.unique(pieces[~inner])) | {np.bincount(pieces.ravel())[1:].argmax() + 1 if count else 0}
        assert np.array_equal(codes.mask(name), np.isin(pieces, list(stay - {0})))
    for name in ("colon", "mine"):
        assert np.array_equal(codes.mask(name), masks[name])


def test_segment_cleans_where_it_is_asked_to():
    hu = np.full((12, 12, 12), -500)
    hu[blobs(LARGE, SMALL)] = 500
    scan = scan_of(hu.transpose(2, 1, 0), np.diag([2.0, 2, 2, 1]))
    predictor = Predictor(BONE, {"liver": 0, "colon": 1}, (12, 12), device="cpu")
    assert predictor.segment(scan).codes.voxels()["liver"] == 72
    found = predictor.segment(scan, largest=True)
    assert found.codes.voxels()["liver"] == 64 == (found.best == 1).sum()
