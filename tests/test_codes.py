import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit.codes import (
    CodeVolume,
    CodeWriter,
    codebook_from_json,
    codebook_to_json,
    encode,
    places_inside,
    smallest_dtype,
)
from segkit.errors import SegkitError


def test_codes_worked_out_by_hand():
    a, b = np.array([1, 1, 0, 0]), np.array([0, 4, 4, 0])
    volume = encode([("a", a), ("b", b), ("absent", np.zeros(4))], (4,))
    # 0 background, 1 {a}, 2 {b}, 3 {a, b}: single structures first, in the order of the columns
    assert volume.codes.tolist() == [1, 3, 2, 0] and volume.codes.dtype == np.uint8
    assert volume.codebook.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert volume.voxels() == {"a": 2, "b": 2, "absent": 0}
    assert volume.at(slice(1, 3)).codes.tolist() == [3, 2] and volume.at(1).mask("b").tolist() is True


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12), st.floats(0, 1), st.sampled_from("CF"))
def test_every_mask_comes_back_bit_for_bit(seed, structures, density, order):
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(1, 6, 3))
    masks = {f"s{i}": np.asarray(random.random(shape) < density, order=order) for i in range(structures)}
    volume = encode(masks.items(), shape, order)
    assert volume.codes.shape == shape and not volume.codebook[0].any()
    assert len(np.unique(volume.codebook, axis=0)) == len(volume.codebook)
    assert set(np.unique(volume.codes)) | {0} == set(range(len(volume.codebook)))
    for name, mask in masks.items():
        assert np.array_equal(volume.mask(name), mask)
        assert volume.voxels()[name] == mask.sum()
        box = volume.boxes().get(name)
        assert (box is None) == (not mask.any())
        if box is not None:  # the smallest box that holds every voxel
            places = np.argwhere(mask)
            assert [(s.start, s.stop) for s in box] == list(zip(places.min(0), places.max(0) + 1, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 9), st.floats(0, 0.6))
def test_layers_hold_every_structure_once_and_no_overlap(seed, structures, density):
    masks = {f"s{i}": np.random.default_rng((seed, i)).random((3, 4, 5)) < density for i in range(structures)}
    volume = encode(masks.items(), (3, 4, 5))
    layers = volume.layers()
    assert sorted(name for layer in layers for name in layer) == sorted(masks)
    for layer in layers:
        assert sum((masks[name].astype(int) for name in layer), np.zeros((3, 4, 5), int)).max() <= 1
        numbers = {name: place for place, name in enumerate(layer, start=3)}
        written = volume.lookup(numbers)[volume.codes]
        for name, number in numbers.items():
            assert np.array_equal(written == number, masks[name])
    overlaps = any((masks[a] & masks[b]).any() for a in masks for b in masks if a < b)
    assert (len(layers) > 1) == overlaps


def test_more_sets_than_a_byte_or_two_bytes_hold():
    numbers = np.arange(70_000)
    masks = [(f"bit{i}", (numbers >> i) & 1) for i in range(17)]
    volume = encode(masks, (70_000,))
    assert volume.codes.dtype == np.uint32 and len(volume.codebook) == 70_000
    assert all(np.array_equal(volume.mask(name), mask > 0) for name, mask in masks)
    assert encode([(n, m[:300]) for n, m in masks], (300,)).codes.dtype == np.uint16
    assert [smallest_dtype(n) for n in (256, 257, 65536, 65537)] == [np.uint8, np.uint16, np.uint16, np.uint32]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([200, 300, 3_000, 66_000]))
def test_any_number_of_overlaps_comes_back(seed, sets):
    """Voxel k belongs to the structures of a random set, as many different sets as asked, past one and two bytes."""
    random = np.random.default_rng(seed)
    members = np.unpackbits(random.permutation(2**17)[:sets].astype("<u4").view(np.uint8).reshape(-1, 4), axis=1)
    members = members[:, random.permutation(32)].astype(bool)
    members = members[random.integers(0, sets, sets + 999)]
    names = [f"s{i:02d}" for i in range(32)]
    volume = encode(((name, members[:, i]) for i, name in enumerate(names)), (len(members),))
    assert np.array_equal(volume.codebook[volume.codes], members)
    different = len(np.unique(np.vstack([members, np.zeros((1, 32), bool)]), axis=0))
    assert len(volume.codebook) == different and volume.codes.dtype == smallest_dtype(different)
    assert list(volume.voxels().values()) == members.sum(0).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 40_000),
    st.sampled_from([0.0, 1e-4, 0.01, 0.9]),
    st.sampled_from([bool, np.uint8, np.int8, np.int16, ">i2", np.float32]),
)
def test_places_inside_are_those_above_zero(seed, size, density, dtype):
    random = np.random.default_rng(seed)
    mask = (
        (random.random(size) < density) * random.integers(-3 if np.dtype(dtype).kind in "if" else 0, 4, size)
    ).astype(dtype)
    assert np.array_equal(places_inside(mask), np.flatnonzero(mask > 0))


def test_masks_of_another_shape_and_doubled_names_are_refused():
    with pytest.raises(SegkitError, match="'b'"):
        encode([("a", np.zeros((2, 2))), ("b", np.zeros((2, 3)))], (2, 2))
    with pytest.raises(SegkitError, match="'a'"):
        encode([("a", np.zeros(2)), ("a", np.zeros(2))], (2,))


def test_pieces_put_together_equal_the_whole():
    random = np.random.default_rng(3)
    names = ("a", "b", "c")
    masks = random.random((3, 6, 5)) < 0.4
    writer = CodeWriter(names)
    pieces = []
    for row in range(6):
        there = [i for i in range(3) if masks[i, row].any()]
        pieces.append(writer.add(encode([(names[i], masks[i, row]) for i in there], (5,))))
    whole = writer.finish(np.stack(pieces))
    direct = encode(zip(names, masks, strict=True), (6, 5))
    assert np.array_equal(whole.codes, direct.codes) and np.array_equal(whole.codebook, direct.codebook)


def test_on_channels_maps_names_and_says_what_is_annotated():
    volume = CodeVolume(np.array([1]), np.array([[0, 0], [1, 1]], bool), ("liver", "mine"))
    table, annotated = volume.on_channels({"spleen": 0, "liver": 1})
    assert table.tolist() == [[False, False], [False, True]] and annotated.tolist() == [False, True]
    with pytest.raises(SegkitError, match="spleen"):
        volume.mask("spleen")


def test_codebook_through_json():
    volume = encode([("a", np.array([1, 1, 0])), ("b", np.array([0, 1, 0]))], (3,))
    content = json.loads(json.dumps(codebook_to_json(volume)))
    back = codebook_from_json(content, volume.codes, "here")
    assert back.structures == volume.structures and np.array_equal(back.codebook, volume.codebook)
    for damaged in ({}, {"structures": ["a"], "codebook": [[], [5]]}, {"structures": 3, "codebook": []}):
        with pytest.raises(SegkitError, match="here"):
            codebook_from_json(damaged, volume.codes, "here")
