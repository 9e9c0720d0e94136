from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.utils.data import DataLoader

from segkit import augment
from segkit.augment import draw, normalize, to_network
from segkit.errors import SegkitError
from segkit.segmenting import WayBack
from segkit.settings import NO_AUGMENTATION, Augmentation, check_target_shape
from segkit.slices import AIR_HU, SliceBatch, SliceDataset, batches, collate, epoch_order
from segkit.splits import Part
from segkit.staging import StagedSubject


def one_batch(hu: np.ndarray, codes: np.ndarray | None = None, spacing=(1.0, 1.0), codebook=None) -> SliceBatch:
    """A batch of one slice (y, x)."""
    codebook = torch.tensor([[0], [1]], dtype=torch.bool) if codebook is None else codebook
    item = {
        "hu": torch.from_numpy(hu.astype(np.int16))[None],
        "codes": torch.from_numpy((np.zeros(hu.shape) if codes is None else codes).astype(np.int32)),
        "spacing_mm": spacing,
        "codebook": codebook,
        "annotated": torch.ones(codebook.shape[1], dtype=torch.bool),
    }
    return collate([(0, item)])


def in_hu(image: torch.Tensor) -> torch.Tensor:
    """The network's input back in HU."""
    return torch.sinh(image) * 60 + 40


def test_batches_hold_the_slices_of_their_subjects_padded_with_air(phantom_data):
    data = SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map)
    order = data.order(seed=0, epoch=1)[:7]
    batch = next(iter(batches(data, order, 7)))
    assert batch.hu.dtype == torch.int16 and len({tuple(size) for size in batch.sizes.tolist()}) > 1
    for place, index in enumerate(order):
        name, z = data.where[index]
        subject = phantom_data.staged[name]
        y, x = subject.shape[1:]
        assert np.array_equal(batch.hu[place, 0, :y, :x], subject.hu(z))
        assert (batch.hu[place, 0, y:] == AIR_HU).all() and (batch.codes[place, :, x:] == 0).all()
        planes = batch.codebook[place][batch.codes[place, :y, :x].long()]
        for structure in ("liver", "vertebrae_L1", "lung_upper_lobe_left"):
            expected = subject.labels(z).mask(structure)
            assert np.array_equal(planes[..., phantom_data.label_map[structure]], expected)


def test_workers_read_the_same_batches(phantom_data):
    data = SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map)
    here, there = ([batch.codes for batch in batches(data, [3, 50, 20, 7], 2, workers)] for workers in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_dataset_travels_to_a_spawned_worker(phantom_data):
    # spawn is how workers start on Windows and macOS; the open store must stay behind
    data = SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map)
    here = [data[number] for number in (3, 50)]
    loader = DataLoader(data, batch_size=None, sampler=[3, 50], num_workers=1, multiprocessing_context="spawn")
    for mine, theirs in zip(here, loader, strict=True):
        assert torch.equal(mine["hu"], theirs["hu"]) and torch.equal(mine["codes"], theirs["codes"])


def test_context_brings_the_neighbours_and_repeats_the_ends(phantom_data):
    part = phantom_data.split.train[0]
    subject = phantom_data.staged[part.subject]
    last = subject.shape[0] - 1
    data = SliceDataset(phantom_data.staged, [part], phantom_data.label_map, context=2)
    for z, expected in ((0, [0, 0, 0, 1, 2]), (7, [5, 6, 7, 8, 9]), (last, [last - 2, last - 1, last, last, last])):
        assert np.array_equal(data[z]["hu"], subject.hu()[expected])
        assert np.array_equal(data[z]["codes"], subject.labels(z).codes)
    batch = next(iter(batches(data, [0, 7], 2)))
    images, _ = to_network(batch, (64, 64), draw(Augmentation(noise_hu=0, intensity_shift_hu=0), 0, 0, [0, 1]))
    assert images.shape == (2, 5, 64, 64)
    assert torch.equal(images[0, 0], images[0, 2]) and not torch.equal(images[1, 0], images[1, 2])


def test_a_slab_sees_its_neighbours_in_the_scan(phantom_data):
    name = next(iter(phantom_data.staged))
    data = SliceDataset(phantom_data.staged, [Part(name, ((8, 10),))], phantom_data.label_map, context=1)
    assert np.array_equal(data[0]["hu"], phantom_data.staged[name].hu()[7:10])


def test_the_index_says_what_the_volumes_hold_without_reading_them(phantom_data, monkeypatch):
    parts = [*phantom_data.split.train, Part(phantom_data.split.test[0].subject, ((3, 9), (20, 22)))]
    data = SliceDataset(phantom_data.staged, parts, phantom_data.label_map)
    with monkeypatch.context() as nothing_read:
        nothing_read.setattr(StagedSubject, "hu", None)
        nothing_read.setattr(StagedSubject, "labels", None)
        holds = data.holds
    names = sorted(phantom_data.label_map, key=phantom_data.label_map.get)
    for place in range(0, len(data), 11):
        name, z = data.where[place]
        volume = phantom_data.staged[name].labels(z)
        assert holds[place].tolist() == [bool(volume.mask(structure).any()) for structure in names]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.integers(1, 300), st.sampled_from([0.0, 0.3, 1.0]))
def test_balanced_orders_are_repeatable_and_as_long_as_asked(seed, slices, wanted, balance):
    holds = np.random.default_rng(seed).random((slices, 5)) < 0.1
    order = epoch_order(slices, seed, 3, wanted, holds, balance)
    assert len(order) == wanted and all(0 <= place < slices for place in order)
    assert order == epoch_order(slices, seed, 3, wanted, holds, balance)
    reasons = np.concatenate([holds, ~holds.any(1, keepdims=True)], 1)
    if balance == 1 and holds.any():  # each reason, and that a slice holds none is one, has its turns
        turns = wanted // reasons.any(0).sum()
        assert all(sum(reasons[place, reason] for place in order) >= turns for reason in np.flatnonzero(reasons.any(0)))


def test_balance_gives_a_rare_structure_its_turns():
    # 1000 slices: one structure in 500 of them, one in 10
    holds = np.zeros((1000, 2), bool)
    holds[:500, 0] = holds[990:, 1] = True
    rare = lambda balance: sum(place >= 990 for place in epoch_order(1000, 0, 1, 400, holds, balance))  # noqa: E731
    assert 133 <= rare(1.0) <= 134  # every third turn: two structures, and none of them
    assert 66 <= rare(0.5) <= 67 + 10  # and at most once each in the shuffled pass
    assert rare(0.0) <= 10
    once = epoch_order(1000, 0, 1, 30, holds, 1.0)
    assert sorted(place for place in once if place >= 990) == list(range(990, 1000))  # each of its slices once


def test_a_structure_that_few_annotate_has_more_turns(phantom_data):
    # 2 and 1 of four turns, and one for slices that hold nothing; each structure has 40 slices of its own
    holds = np.zeros((120, 2), bool)
    holds[:40, 0] = holds[40:80, 1] = True
    order = np.array(epoch_order(120, 0, 1, 400, holds, 1.0, np.array([2.0, 1.0])))
    assert [((order >= start) & (order < start + 40)).sum() for start in (0, 40, 80)] == [200, 100, 100]

    all_annotate, few_annotate, one_annotates = (
        SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map) for _ in range(3)
    )
    assert (all_annotate.turns == 1).all()
    subjects = list(few_annotate.subjects)
    assert len(subjects) >= 3
    for data, lacking in ((few_annotate, subjects[:1]), (one_annotates, subjects[1:])):
        data.tables = {name: (table, known.clone()) for name, (table, known) in data.tables.items()}
        for name in lacking:
            data.tables[name][1][5] = False
    slices = sum(name == subjects[0] for name, _ in few_annotate.where)
    assert few_annotate.turns[5] == pytest.approx(len(few_annotate) / (len(few_annotate) - slices))
    assert one_annotates.turns[5] == pytest.approx(min(len(one_annotates) / slices, 4))
    assert np.delete(few_annotate.turns, 5).tolist() == [1] * (len(few_annotate.label_map) - 1)


def test_of_one_structure_every_second_slice_holds_it_and_the_others_are_seen():
    holds = (np.arange(300) < 12)[:, None]
    order = epoch_order(300, 0, 1, 200, holds, 1.0)
    assert sum(place < 12 for place in order) == 100 and len({place for place in order if place >= 12}) == 100
    assert sorted(epoch_order(300, 0, 1, 300, np.ones((300, 1), bool), 1.0)) == list(range(300))  # all hold it


def test_a_slice_is_sampled_alike_whatever_it_shares_a_batch_with():
    """Of 40, 100 and 200 pixels at 32 x 32: one, three and six samples a side."""
    random = np.random.default_rng(0)
    hus = [random.integers(-900, 900, (size, size)) for size in (40, 100, 200)]
    alone = [one_batch(hu, hu > 0) for hu in hus]
    items = [{"hu": each.hu[0], "codes": each.codes[0], "spacing_mm": (1.0, 1.0), "codebook": each.codebook[0],
              "annotated": each.annotated[0]} for each in alone]  # fmt: skip
    together = collate(list(enumerate(items)))
    assert augment.shrinking(together, (32, 32)) == [1, 3, 6]
    assert [augment.shrinking(each, (32, 32)) for each in alone] == [[1], [3], [6]]
    settings = Augmentation(flip_left_right=True, elastic_mm=2)
    for variation in (None, augment.draw(settings, 0, 1, range(3))):
        images, targets = to_network(together, (32, 32), variation, [0])
        for place, each in enumerate(alone):
            own = None if variation is None else variation.at([place])
            image, target = to_network(each, (32, 32), own, [0])
            assert torch.allclose(images[place], image[0], atol=1e-3) and torch.equal(
                targets.codes[place], target.codes[0]
            )


def test_batches_lie_where_a_gpu_reads_them_only_for_a_gpu(phantom_data):
    data = SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map)
    assert [batches(data, [0], 1, device=torch.device(name)).pin_memory for name in ("cpu", "cuda")] == [False, True]
    assert not batches(data, [0], 1).pin_memory


def test_an_interrupted_epoch_goes_on_where_it_stopped(phantom_data):
    data = SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map)
    order = data.order(0, 1, 20, 0.5)
    whole = list(batches(data, order, 4))
    rest = list(batches(data, order, 4, start=12))
    assert len(rest) == 2
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.hu, b.hu) and torch.equal(a.numbers, b.numbers)


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    assert sorted(epoch_order(10, 0, 1)) == list(range(10))
    assert epoch_order(50, 0, 1) == epoch_order(50, 0, 1) != epoch_order(50, 0, 2)
    assert len(set(epoch_order(50, 0, 1, 20))) == 20
    twice = epoch_order(5, 1, 1, 13)
    assert len(twice) == 13 and sorted(twice[:5]) == sorted(twice[5:10]) == list(range(5))


def test_not_annotated_channels_are_known_to_the_batch(phantom_data):
    label_map = {"liver": 0, "my_own": 1}
    data = SliceDataset(phantom_data.staged, phantom_data.split.train, label_map)
    batch = collate([(0, data[30])])
    assert batch.annotated.tolist() == [[True, False]] and not batch.codebook[0, :, 1].any()


def test_a_slice_of_the_target_shape_passes_unchanged():
    hu = np.random.default_rng(0).integers(-900, 900, (32, 48))
    codes = np.random.default_rng(1).integers(0, 2, (32, 48))
    image, targets = to_network(one_batch(hu, codes, (2.0, 2.0)), (32, 48))
    assert torch.allclose(in_hu(image)[0, 0], torch.from_numpy(hu).float(), atol=0.1)
    assert torch.equal(targets.codes[0], torch.from_numpy(codes))


def test_fitting_keeps_the_aspect_ratio_in_mm_and_pads_with_air():
    # 20 rows of 3 mm by 30 columns of 1 mm: 60 x 30 mm, into 64 x 64: the pixel is 60 / 64 mm, 32 columns wide
    codes = np.ones((20, 30))
    image, targets = to_network(one_batch(np.zeros((20, 30)), codes, (3.0, 1.0)), (64, 64))
    inside = targets.codes[0] == 1
    assert inside.sum(0).max() == 64 and inside.sum(1).max() == 32
    assert inside[:, 16:48].all() and not inside[:, :16].any() and not inside[:, 48:].any()
    assert torch.allclose(in_hu(image)[0, 0, :, 0], torch.tensor(-1000.0))  # air, at the end of the network's range
    assert torch.allclose(in_hu(image)[0, 0, 32, 32], torch.tensor(0.0), atol=0.01)


def test_shrinking_averages_instead_of_stepping_over():
    # a checkerboard of single pixels has the mean 0 everywhere, whatever pixel is taken alone
    checkerboard = np.where(np.indices((128, 128)).sum(0) % 2, 200, -200)
    image, _ = to_network(one_batch(checkerboard), (32, 32))
    assert in_hu(image).abs().max() < 1


def discs(shape, spacing, random: np.random.Generator) -> np.ndarray:
    """25 discs that do not touch, each anywhere in its own cell of a 5 x 5 grid, bool (y, x)."""
    y, x = (np.arange(side) * step for side, step in zip(shape, spacing, strict=True))
    cell = np.array([y[-1], x[-1]]) / 5
    mask = np.zeros(shape, bool)
    for place in np.ndindex(5, 5):
        radius = random.uniform(0.2, 0.3) * cell.min()
        cy, cx = cell * place + random.uniform(1.4 * radius, cell - 1.4 * radius)
        mask |= ((y - cy)[:, None] ** 2 + (x - cx)[None] ** 2) <= radius**2
    return mask


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(512, 512), (512, 401), (401, 512), (256, 201), (300, 280)]),
    st.sampled_from([1.0, 4 / 3, 1.5, 2.0, 2.7, 4.0]),
    st.sampled_from([(1.0, 1.0), (0.742188, 0.742188), (0.9, 0.7), (1.5, 1.0)]),
    st.sampled_from([(1, 1), (-1, 1), (1, -1), (-1, -1)]),
    st.integers(0, 2**31),
)
def test_a_mask_and_its_image_keep_the_same_place(shape, factor, spacing, turn, seed):
    """Discs at many phases of the grid: neither labels nor image are displaced, and neither grows.

    Hard labels of a slice that hardly shrinks are off by up to a quarter of a pixel, here to one side and there to the
    other, so what must agree is the mean of a hundred of them.
    """
    random = np.random.default_rng(seed)
    target = tuple(max(160, round(side * step / max(spacing) / factor / 16) * 16) for side, step in
                   zip(shape, spacing, strict=True))  # fmt: skip
    differences, areas = [], np.zeros(2)
    for _ in range(4):
        mask = discs(shape, spacing, random)[:: turn[0], :: turn[1]]
        image, targets = to_network(one_batch(np.where(mask, 1000, -1000), mask, spacing), target)
        hard, soft = targets.codes[0].numpy(), (in_hu(image)[0, 0].numpy() + 1000) / 2000
        pieces, number = ndimage.label((soft > 0.01) | (hard > 0))
        assert number == 25
        areas += [hard.sum(), soft.sum()]
        differences.append(
            np.subtract(*(ndimage.center_of_mass(each, pieces, range(1, 26)) for each in (hard, soft))).mean(0)
        )
    assert np.abs(np.mean(differences, 0)).max() < 0.05
    assert areas[0] == pytest.approx(areas[1], rel=0.03)


@pytest.mark.parametrize(("size", "target"), [(512, 256), (256, 128), (512, 128), (401, 256), (384, 288), (201, 208)])
def test_labels_come_from_where_the_image_comes_from(size, target):
    """A ramp: the columns that a label is of, and the one that the image shows; half a column off is what is mended."""
    ramp = np.tile(np.arange(size), (size, 1))
    codebook = torch.zeros(size, 1, dtype=torch.bool)
    for turned in (ramp, ramp.T):
        image, targets = to_network(one_batch(turned, turned, codebook=codebook), (target, target))
        inner = (slice(4, -4), slice(4, -4))
        off = (targets.codes[0].double() - in_hu(image.double())[0, 0])[inner]
        assert abs(off.mean()) < 0.02
        assert off.abs().max() <= (max(1, size / target) + 1) / 2  # half of the area, half of a source pixel


def test_the_majority_of_an_area_by_hand():
    # blocks of 2 x 2 at a factor of 2: three of one, an overlap's own code, ties that take turns
    codes = np.zeros((64, 64), int)
    codes[:2, :2] = [[1, 1], [1, 2]]
    codes[:2, 2:4] = [[3, 3], [1, 2]]
    codes[4::2] = 1  # every second row: from there on two of four are 1, two are 0
    table = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    _, targets = to_network(one_batch(codes, codes, codebook=table), (32, 32))
    assert targets.codes[0, 0, :2].tolist() == [1, 3] and not targets.codes[0, 1].any()
    tied = targets.codes[0, 2:].numpy()
    assert np.array_equal(tied, np.indices((32, 32)).sum(0)[2:] % 2)


def test_the_share_of_an_area_by_hand():
    codes = np.zeros((64, 64), int)
    codes[:2, :2], codes[:2, 2:4] = [[1, 3], [0, 2]], [[1, 0], [0, 0]]
    table = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    shares = augment.area_fractions(one_batch(codes, codes, codebook=table), (32, 32), 0)
    assert shares.shape == (3, 32, 32) and shares[:, 0, :3].tolist() == [[0.5, 0.25, 0], [0.5, 0, 0], [0, 0, 0]]
    assert shares.sum() == 1.25


def test_padding_of_the_batch_does_not_move_a_slice():
    hu = np.random.default_rng(0).integers(-900, 900, (40, 30))
    small = one_batch(hu, hu > 0, (1.5, 2.5))
    item = {
        "hu": small.hu[0],
        "codes": small.codes[0],
        "spacing_mm": (1.5, 2.5),
        "codebook": small.codebook[0],
        "annotated": small.annotated[0],
    }
    other = {**item, "hu": torch.zeros(1, 60, 40, dtype=torch.int16), "codes": torch.zeros(60, 40, dtype=torch.int32)}
    alone, alone_targets = to_network(small, (64, 64))
    padded, padded_targets = to_network(collate([(0, item), (1, other)]), (64, 64))
    assert torch.allclose(alone[0], padded[0], atol=1e-4)
    assert torch.equal(alone_targets.codes[0], padded_targets.codes[0])


def test_rotation_by_hand():
    # rotated by 90 degrees: what lay in front (low row) of the centre comes to a side, the corner pattern turns once
    codes = np.zeros((32, 32))
    codes[4:8, 14:18] = 1
    variation = draw(NO_AUGMENTATION, 0, 0, [0])
    turned = augment.Variation(
        torch.tensor([[[0.0, -1.0], [1.0, 0.0]]]),
        variation.shift,
        variation.elastic_mm,
        variation.mirrored,
        variation.intensity,
        (0,),
    )
    _, targets = to_network(one_batch(codes, codes), (32, 32), turned)
    # target (y, x) samples source (-x, y): the block at source rows -12..-8, columns -2..2 appears at columns 8..12
    assert np.argwhere(targets.codes[0].numpy()).min(0).tolist() == [14, 24]
    assert np.argwhere(targets.codes[0].numpy()).max(0).tolist() == [17, 27]


def test_mirroring_moves_the_image_and_swaps_partners():
    table = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    codes = np.zeros((32, 32))
    codes[10:20, 2:6], codes[10:20, 14:18], codes[0:3, 20:22] = 1, 2, 3
    batch = one_batch(codes * 100, codes, codebook=table)
    flips = replace(NO_AUGMENTATION, flip_left_right=True)
    number = next(n for n in range(50) if bool(draw(flips, 0, 0, [n]).mirrored[0]))
    partners = [1, 0, 2, None]  # left, right, middle, a side without its partner
    image, targets = to_network(batch, (32, 32), draw(flips, 0, 0, [number]), partners)
    planes = targets.dense()[0]
    assert torch.equal(planes[1], torch.from_numpy(codes == 1).flip(1)) and not planes[0].any()
    assert torch.equal(planes[2], torch.from_numpy(codes == 2).flip(1))
    assert targets.annotated.tolist() == [[True, True, True, False]] and not planes[3].any()
    plain, _ = to_network(batch, (32, 32))
    assert torch.allclose(image, plain.flip(3), atol=1e-5)
    kept, kept_targets = to_network(batch, (32, 32), draw(NO_AUGMENTATION, 0, 0, [number]), partners)
    assert torch.allclose(kept, plain, atol=1e-4) and torch.equal(kept_targets.codebook, batch.codebook)


def test_augmentation_repeats_for_a_seed_whatever_the_batch():
    numbers = [4, 9, 2]
    together = draw(Augmentation(), 7, 3, numbers)
    alone = draw(Augmentation(), 7, 3, [9])
    assert torch.equal(together.matrix[1], alone.matrix[0]) and together.noise_seeds[1] == alone.noise_seeds[0]
    assert torch.equal(together.intensity[1], alone.intensity[0])
    assert not torch.equal(draw(Augmentation(), 7, 4, [9]).matrix, alone.matrix)
    assert not torch.equal(draw(Augmentation(), 8, 3, [9]).matrix, alone.matrix)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_augmentation_stays_within_its_settings(seed):
    s = Augmentation()
    variation = draw(s, seed, 0, range(20))
    size = variation.matrix.square().sum((1, 2)).div(2).sqrt()
    assert (1 / size - 1).abs().max() <= s.scale + 1e-5
    turn = torch.rad2deg(torch.atan2(variation.matrix[:, 1, 0], variation.matrix[:, 0, 0])).abs()
    assert turn.max() <= s.rotation_degrees + 1e-3 and variation.shift.abs().max() <= s.shift
    assert not variation.mirrored.any() and (variation.intensity[:, 2] <= s.noise_hu).all()


def test_normalize_by_hand():
    # arcsinh(x) = ln(x + sqrt(x^2 + 1)) of -1040 / 60, 0, 1 and 1460 / 60
    values = normalize(torch.tensor([-3000.0, -1000, 40, 100, 5000])).tolist()
    assert values == pytest.approx([-3.5463, -3.5463, 0, 0.8814, 3.8851], abs=1e-3)


@pytest.mark.parametrize("shape", [(100, 128), (0, 16), "big", 128, (128,), (16, 16, 16), None])
def test_target_shapes_that_the_network_cannot_halve_are_refused(shape):
    with pytest.raises(SegkitError, match="TARGET_SHAPE"):
        check_target_shape(shape)


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 70), st.integers(20, 70), st.floats(0.7, 5), st.floats(0.7, 5))
def test_there_and_back_finds_every_pixel_at_its_place(rows, columns, y_mm, x_mm):
    # a smooth plane through an upsampling grid and back is the plane again
    y, x = np.mgrid[:rows, :columns]
    plane = 10 * y - 7 * x
    batch = one_batch(plane, spacing=(y_mm, x_mm))
    image, _ = to_network(batch, (512, 512))
    back = WayBack(batch, (512, 512)).whole(in_hu(image)[0, 0].numpy())
    inner = (slice(2, -2), slice(2, -2))
    assert back.shape == (rows, columns)
    assert np.abs(back - plane)[inner].max() < 4


def test_single_slice_parts(phantom_data):
    name = phantom_data.split.train[0].subject
    data = SliceDataset(phantom_data.staged, [Part(name, ((3, 5), (9, 10)))], phantom_data.label_map)
    assert data.where == [(name, 3), (name, 4), (name, 9)]


def varied(hu, seed=0, **settings):
    """A slice with only the named variations, in HU."""
    variation = draw(replace(NO_AUGMENTATION, **settings), seed, 0, [0])
    image, targets = to_network(one_batch(hu, hu > 0), hu.shape, variation)
    return in_hu(image)[0, 0].numpy(), targets.codes[0].numpy()


def test_elastic_deformation_moves_image_and_codes_together_and_no_further_than_it_says():
    rows, columns = np.indices((64, 64))
    disc = np.where(((rows - 31.5) ** 2 + (columns - 31.5) ** 2) < 20**2, 100, -100)
    moved, codes = varied(disc, elastic_mm=2.0)
    assert (codes != (disc > 0)).any() and np.isin(codes, (0, 1)).all()
    assert ((moved > 0) == (codes == 1)).mean() > 0.99
    distance = np.hypot(rows - 31.5, columns - 31.5)
    assert codes[distance < 12].all() and not codes[distance > 28].any()  # four deviations of the control points
    still, same = varied(disc, elastic_mm=0.0)
    assert np.allclose(still, disc, atol=0.5) and np.array_equal(same, disc > 0)


def test_gamma_bends_between_ends_that_stay():
    hu = np.array([[-1000, 0], [250, 1500]]).repeat(16, 0).repeat(16, 1)
    bent, _ = varied(hu, gamma=0.5)
    unit = np.random.default_rng((0, 0, 0)).uniform(-1, 1, 11)
    expected = ((hu + 1000) / 2500) ** (1.5 ** unit[9]) * 2500 - 1000
    assert np.allclose(bent, expected, atol=1)
    assert np.allclose(bent[[0, -1], [0, -1]], [-1000, 1500], atol=1) and abs(bent[0, -1]) > 5


def test_blur_agrees_with_scipy():
    hu = np.random.default_rng(0).integers(-300, 300, (48, 48))
    blurred, _ = varied(hu, blur_pixels=1.5)
    sigma = 1.5 * abs(np.random.default_rng((0, 0, 0)).uniform(-1, 1, 11)[10])
    expected = ndimage.gaussian_filter(hu.astype(float), sigma, mode="nearest", radius=int(np.ceil(3 * sigma)))
    assert np.allclose(blurred, expected, atol=1) and sigma > 0.2


def test_flipping_up_and_down_keeps_the_sides():
    hu = np.random.default_rng(1).integers(-300, 300, (32, 32))
    flipped = {seed: np.allclose(varied(hu, seed, flip_up_down=True)[0], hu[::-1], atol=0.5) for seed in range(12)}
    kept = {seed: np.allclose(varied(hu, seed, flip_up_down=True)[0], hu, atol=0.5) for seed in range(12)}
    assert all(flipped[seed] != kept[seed] for seed in range(12)) and any(flipped.values()) and any(kept.values())
