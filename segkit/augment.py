"""From slices on their own grids to network input: one resampling for fit-to-shape and augmentation, then intensity.

Fitting keeps the aspect ratio in mm, centres the slice and pads with air. Rotation, scale, shift and flip are composed
with it into a single sampling grid, so that every pixel is interpolated once. Image and codes are reduced over the same
area and by the same samples: where a slice shrinks, a pixel has several, so that nothing aliases; the image is the mean
of what is linearly interpolated at them, and of the codes that are nearest to them the one that most have is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from segkit.codes import CodeVolume
from segkit.labels import mirrored_channels
from segkit.settings import Augmentation
from segkit.slices import AIR_HU, SliceBatch, SliceDataset, Targets, collate

HU_RANGE = (-1000.0, 1500.0)
HU_MIDDLE, HU_UNIT = 40.0, 60.0
ELASTIC_POINTS = 6
"""Control points of the elastic deformation along each axis of the target, edge to edge."""


@dataclass(frozen=True)
class Variation:
    """What was drawn for each of B samples. Tensors of length B on the CPU, geometry as a 2 x 2 matrix and a shift."""

    matrix: torch.Tensor  # float32 (B, 2, 2), from target (y, x) in mm to source (y, x) in mm, about the centres
    shift: torch.Tensor  # float32 (B, 2), fraction of the target's larger side
    elastic_mm: torch.Tensor  # float32 (B, 2, ELASTIC_POINTS, ELASTIC_POINTS), where control points go to, (y, x)
    mirrored: torch.Tensor  # bool (B,)
    intensity: torch.Tensor  # float32 (B, 5): factor, shift in HU, standard deviation of the noise in HU, gamma, blur
    noise_seeds: tuple[int, ...]

    def at(self, places: Sequence[int]) -> Variation:
        """That of the samples at these places."""
        tensors = {f.name: getattr(self, f.name)[places] for f in fields(self) if f.name != "noise_seeds"}
        return Variation(**tensors, noise_seeds=tuple(self.noise_seeds[place] for place in places))


def draw(settings: Augmentation, seed: int, epoch: int, numbers: Sequence[int]) -> Variation:
    """Draw the variation of each sample from its own random stream (seed, epoch, number in the epoch)."""
    streams = [np.random.default_rng((seed, epoch, int(number))) for number in numbers]
    unit = np.array([stream.uniform(-1, 1, 11) for stream in streams]).T
    angle, scale = np.deg2rad(settings.rotation_degrees * unit[0]), 1 / (1 + settings.scale * unit[1])
    mirrored = (unit[2] > 0) & settings.flip_left_right
    across = np.where(mirrored, -1, 1)
    along = np.where((unit[8] > 0) & settings.flip_up_down, -1, 1)
    matrix = scale * np.array(
        [[np.cos(angle) * along, -np.sin(angle) * across], [np.sin(angle) * along, np.cos(angle) * across]]
    )
    intensity = [
        1 + settings.intensity_scale * unit[5],
        settings.intensity_shift_hu * unit[6],
        settings.noise_hu * np.abs(unit[7]),
        (1 + settings.gamma) ** unit[9],
        settings.blur_pixels * np.abs(unit[10]),
    ]
    elastic = [stream.normal(0, settings.elastic_mm, (2, ELASTIC_POINTS, ELASTIC_POINTS)) for stream in streams]
    return Variation(
        torch.from_numpy(matrix.transpose(2, 0, 1).astype(np.float32)),
        torch.from_numpy((settings.shift * unit[3:5].T).astype(np.float32)),
        torch.from_numpy(np.stack(elastic).astype(np.float32)),
        torch.from_numpy(mirrored),
        torch.from_numpy(np.stack(intensity, 1).astype(np.float32)),
        tuple(int(stream.integers(2**62)) for stream in streams),
    )


def to_network(
    batch: SliceBatch,
    target_shape: tuple[int, int],
    variation: Variation | None = None,
    partners: Sequence[int | None] | None = None,
) -> tuple[torch.Tensor, Targets]:
    """Images (B, P, H, W) float32 as the network takes them, and their Targets, on the batch's device.

    Without `variation` the slices are only fitted. All slices of a slab are sampled alike. `partners`
    (`segkit.labels.mirrored_channels`) is needed where slices are mirrored: partners swap, a channel without partner
    counts as not annotated in that sample.
    """
    hu, codes = _fitted(batch, target_shape, variation)
    codes = codes if batch.codes.ndim == 4 else codes[:, 0]
    codebook, annotated = batch.codebook, batch.annotated
    if variation is not None:
        hu = vary_intensity(hu, variation)
        codebook, annotated = mirror_targets(codebook, annotated, variation.mirrored, partners)
    return normalize(hu), Targets(codes, codebook, annotated, batch.counted)


def _fitted(
    batch: SliceBatch, target_shape: tuple[int, int], variation: Variation | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """HU of the pixels of `target_shape`, float32 (B, P, H, W), and their codes, int64 (B, D, H, W), D = 1 for slices.

    Of a slice the same whatever it shares a batch with.
    """
    factors = shrinking(batch, target_shape)
    codes = batch.codes if batch.codes.ndim == 4 else batch.codes[:, None]
    if len(set(factors)) > 1:
        hu = torch.empty(*batch.hu.shape[:2], *target_shape, device=batch.hu.device)
        codes = torch.empty(*codes.shape[:2], *target_shape, dtype=torch.int64, device=batch.hu.device)
        for factor in set(factors):
            places = [place for place, own in enumerate(factors) if own == factor]
            some = None if variation is None else variation.at(places)
            hu[places], codes[places] = _fitted(batch.at(places), target_shape, some)
        return hu, codes
    shrink = factors[0]
    fine = sampling_grid(batch, (target_shape[0] * shrink, target_shape[1] * shrink), variation)
    hu = _sample((batch.hu.float() - AIR_HU).clamp(min=0), fine, "bilinear")
    hu = (F.avg_pool2d(hu, shrink) if shrink > 1 else hu) + AIR_HU
    even = _chessboard(len(codes), target_shape, variation).to(fine.device)
    # off the exact middle between two source pixels, as `even` says; nowhere else does it change what is nearest
    aside = OFF_THE_MIDDLE * (2 * even.float() - 1)[..., None].repeat_interleave(shrink, 1).repeat_interleave(shrink, 2)
    nudged = fine + aside * (2 / torch.tensor(codes.shape[:-3:-1], device=fine.device))
    return hu, _majority(_sample(codes.float(), nudged, "nearest"), shrink, even)


OFF_THE_MIDDLE = 1e-3
"""Source pixels: more than floats are wrong by."""


def _sample(planes: torch.Tensor, grid: torch.Tensor, mode: str) -> torch.Tensor:
    return F.grid_sample(planes, grid, mode=mode, padding_mode="zeros", align_corners=False)


def _chessboard(samples: int, shape: tuple[int, int], variation: Variation | None) -> torch.Tensor:
    """How each pixel decides between two codes that are equally near or frequent, bool (B, H, W).

    Half of the pixels take the one, half the other, as on a chessboard, whose colours a variation may exchange: a rule
    that prefers one side, as rounding half to even does, moves or grows every mask that ends in the middle of a pixel,
    as half of them do where a slice shrinks by 2; and a pattern that never changes can be learned.
    """
    turn = torch.zeros(samples, dtype=torch.int64) if variation is None else torch.tensor(variation.noise_seeds)
    rows, columns = map(torch.arange, shape)
    return (rows[:, None] + columns + turn[:, None, None]) % 2 == 0


def _majority(samples: torch.Tensor, shrink: int, even: torch.Tensor) -> torch.Tensor:
    """The code that most of the samples of each pixel have: (B, D, s H, s W) float -> int64 (B, D, H, W).

    Of codes that are equally frequent the lowest where `even`, bool (B, H, W), else the highest.
    """
    if shrink == 1:
        return samples.long()
    highest, lowest = F.max_pool2d(samples, shrink), -F.max_pool2d(-samples, shrink)
    codes = highest.long()
    mixed = (highest != lowest).nonzero(as_tuple=True)  # most pixels lie in one structure
    even = even[mixed[0], mixed[2], mixed[3]]
    each = samples.view(*codes.shape[:3], shrink, codes.shape[3], shrink).transpose(3, 4)[mixed].flatten(1)
    ordered = each.sort(1).values
    frequency = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    most = (frequency == frequency.amax(1, keepdim=True)).int()
    place = torch.where(even, most.argmax(1), shrink**2 - 1 - most.flip(1).argmax(1))
    codes[mixed] = ordered.gather(1, place[:, None])[:, 0].long()
    return codes


def area_fractions(batch: SliceBatch, target_shape: tuple[int, int], sample: int) -> torch.Tensor:
    """Share of each pixel's area that each structure covers in slice `sample` of a batch: float32 (C, H, W), 0 to 1.

    Fitted without variation, as the image is; channels as in the batch's codebook.
    """
    of_slice = batch.at([sample])
    codes, codebook = of_slice.codes[0].long(), of_slice.codebook[0]
    grid, pixel = sampling_grid(of_slice, target_shape)[0], pixel_mm(of_slice, target_shape)[0]
    ways = []  # of each axis (target, source): what share of a target pixel a source pixel covers
    for axis, middles in enumerate((grid[:, 0, 1], grid[0, :, 0])):
        side, number = pixel / of_slice.spacing_mm[0, axis], codes.shape[axis]
        low = ((middles + 1) / 2 * number - side / 2)[:, None]
        pixels = torch.arange(number, device=codes.device)
        ways.append((torch.minimum(pixels + 1, low + side) - torch.maximum(pixels, low)).clamp(min=0) / side)
    fractions = torch.zeros(codebook.shape[1], *target_shape, device=codes.device)
    occurring = codebook[codes.unique()].any(0).nonzero().flatten()
    for channel in occurring.tolist():  # one at a time: few of a hundred structures are in a slice
        fractions[channel] = ways[0] @ codebook[:, channel].float()[codes] @ ways[1].T
    return fractions


def examples(
    data: SliceDataset, item: int, settings: Augmentation, target_shape: tuple[int, int], count: int = 4, seed: int = 0
) -> list[tuple[str, np.ndarray, CodeVolume, tuple[float, float]]]:
    """A slice as the network sees it, then varied `count` times: samples as `pictures.plot_slices` takes them."""
    batch = collate([(number, data[item]) for number in range(count)])
    names = tuple(sorted(data.label_map, key=data.label_map.__getitem__))
    middle = batch.hu.shape[1] // 2
    samples = []
    for title, variation in (("as it is", None), ("varied", draw(settings, seed, 1, range(count)))):
        images, targets = to_network(batch, target_shape, variation, mirrored_channels(data.label_map))
        hu = torch.sinh(images[:, middle]) * HU_UNIT + HU_MIDDLE
        for k in range(count if variation is not None else 1):
            volume = CodeVolume(targets.codes[k].numpy(), targets.codebook[k].numpy(), names)
            samples.append((title, hu[k].numpy(), volume, (1.0, 1.0)))
    return samples


def normalize(hu: torch.Tensor) -> torch.Tensor:
    """HU -> network input: arcsinh((HU - HU_MIDDLE) / HU_UNIT), clipped to HU_RANGE before; of any shape.

    Nearly linear over soft tissue, where some ten HU decide, and logarithmic towards air and bone: organs differ by
    about 1 and the whole range spans -3.5 to 3.9, in one channel and without losing what a window would cut off.
    """
    return torch.asinh((hu.clamp(*HU_RANGE) - HU_MIDDLE) / HU_UNIT)


def pixel_mm(batch: SliceBatch, target_shape: tuple[int, int]) -> torch.Tensor:
    """Side of a fitted pixel in mm, (B,): the smallest with which the whole slice is inside."""
    extent = batch.sizes * batch.spacing_mm
    return (extent / torch.tensor(target_shape, device=extent.device)).amax(1)


def shrinking(batch: SliceBatch, target_shape: tuple[int, int]) -> list[int]:
    """Of each slice, how many samples a side a target pixel needs to step over none of its source pixels (1 to 8)."""
    factor = pixel_mm(batch, target_shape) / batch.spacing_mm.amin(1)
    return (factor - 0.25).ceil().clamp(1, 8).int().tolist()


def sampling_grid(batch: SliceBatch, shape: tuple[int, int], variation: Variation | None = None) -> torch.Tensor:
    """For each pixel of `shape` where it lies in the padded slices: (B, H, W, 2) as `grid_sample` takes it, (x, y).

    `shape` covers the same area as the fitted target, whatever its resolution.
    """
    device, size = batch.hu.device, pixel_mm(batch, shape)[:, None]
    rows, columns = (torch.arange(n, device=device) + 0.5 - n / 2 for n in shape)  # pixels from the centre
    if variation is None:
        # each axis by itself: many times fewer numbers to compute, the same ones
        y, x = (
            2 * (axis * size / batch.spacing_mm[:, [k]] + batch.sizes[:, [k]] / 2) / batch.codes.shape[k - 2] - 1
            for k, axis in enumerate((rows, columns))
        )
        return torch.stack([x[:, None].expand(-1, shape[0], -1), y[:, :, None].expand(-1, -1, shape[1])], -1)
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)  # (y, x)
    place = (place + variation.shift.to(device)[:, None, None] * max(shape)) * size[:, :, None, None]
    if variation.elastic_mm.any():
        points = variation.elastic_mm.to(device)
        place = place + F.interpolate(points, shape, mode="bicubic", align_corners=True).movedim(1, -1)
    place = torch.einsum("bij,bhwj->bhwi", variation.matrix.to(device), place)
    place = place / batch.spacing_mm[:, None, None] + batch.sizes[:, None, None] / 2
    padded = torch.tensor(batch.codes.shape[-2:], device=device)
    return (2 * place / padded - 1).flip(-1)


def vary_intensity(hu: torch.Tensor, variation: Variation) -> torch.Tensor:
    """Blur, gamma, scale, shift and noise on HU (B, P, H, W); air stays what these make of it."""
    factor, offset, deviation, gamma, sigma = variation.intensity.to(hu.device).T[..., None, None, None]
    if variation.intensity[:, 4].any():
        hu = _blur(hu, sigma)
    if (variation.intensity[:, 3] != 1).any():
        low, high = HU_RANGE
        hu = ((hu - low) / (high - low)).clamp(0, 1) ** gamma * (high - low) + low
    # drawn where it is needed: a CPU takes longer to draw it than a GPU for the whole of the rest
    streams = [torch.Generator(hu.device).manual_seed(seed) for seed in variation.noise_seeds]
    noise = torch.stack([torch.randn(hu.shape[1:], generator=stream, device=hu.device) for stream in streams])
    return hu * factor + offset + deviation * noise


def _blur(hu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Each sample blurred with its own Gaussian of standard deviation `sigma` (B, 1, 1, 1) in pixels."""
    samples, planes, rows, columns = hu.shape
    reach = max(1, int(np.ceil(3 * float(sigma.max()))))
    steps = torch.arange(-reach, reach + 1, device=hu.device, dtype=hu.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma.flatten()[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(planes, 0)[:, None]
    flat = F.pad(hu.reshape(1, samples * planes, rows, columns), [reach] * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, :, None], groups=samples * planes)
    return F.conv2d(flat, kernel[:, :, None], groups=samples * planes).reshape(hu.shape)


def mirror_targets(
    codebook: torch.Tensor,
    annotated: torch.Tensor,
    mirrored: torch.Tensor,
    partners: Sequence[int | None] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codebooks (B, K, C) and annotated channels (B, C) of a batch in which samples `mirrored` (B,) are mirrored.

    partners: the channel that each becomes (`labels.mirrored_channels`). Raises ValueError where they are needed and
    not given.
    """
    if not bool(mirrored.any()):
        return codebook, annotated
    if partners is None:
        raise ValueError("mirrored slices need their partners")
    partner = torch.tensor([0 if p is None else p for p in partners], device=codebook.device)
    paired = torch.tensor([p is not None for p in partners], device=codebook.device)
    chosen = mirrored.to(codebook.device)
    swapped = codebook[:, :, partner] & paired
    return (
        torch.where(chosen[:, None, None], swapped, codebook),
        torch.where(chosen[:, None], annotated[:, partner] & paired, annotated),
    )
