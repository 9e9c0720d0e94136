"""Scores during training: loss, macro Dice on the scans' own grids, and the thresholds and probabilities that follow.

Scores, thresholds and probabilities are of what a prediction is judged by: logits brought back to a slice's own pixels,
against its own labels. On the network's grid, against labels that were reduced to it, they would be of another task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.special import expit, logit
from tqdm.auto import tqdm

from segkit import augment, losses, metrics
from segkit.calibration import Calibration, fit_calibration
from segkit.devices import autocast
from segkit.errors import DivergedError
from segkit.labels import group_of
from segkit.losses import ModelWithLoss
from segkit.memory import in_parts
from segkit.ranks import Ranks
from segkit.segmenting import WayBack
from segkit.slices import SliceBatch, SliceDataset, batches

STEP = 0.25
LEVELS = np.arange(-8, 8 + STEP, STEP)
"""Logits between which pixels are counted, int64 counts a subject and structure."""

LOWEST, HIGHEST = -4.0, 4.0
"""Logits of the thresholds that are tried, every STEP: outputs of 0.018 and 0.982. Without positive weights the best
lies far below 0.5, with them above it."""

THRESHOLDS = tuple(expit(LEVELS[(LEVELS >= LOWEST) & (LEVELS <= HIGHEST)]).tolist())

OTHERS = 4.0
"""As how many subjects a group counts in the threshold of a structure, and as how many structures all in a group's."""

TOGETHER = 1 << 23
"""Logits on a slice's own pixels that are counted at a time; all of a hundred structures would fill a GiB."""

FEW_PIXELS = 100.0
"""A structure of so many pixels in all validation slices has half of the say that its subjects would give it."""


@dataclass(frozen=True)
class Validation:
    """Loss as in training; dice at the `threshold` that gave the highest, NaN if nothing is annotated.

    Thresholds are of the network's own output, the sigmoid of a logit, which is no calibrated probability.
    """

    loss: float
    dice: float
    structures: int  # that a validation subject holds: what `dice` is the mean of
    threshold: float
    thresholds: tuple[float, ...]  # of each channel, see `choose_thresholds`
    calibration: Calibration
    dice_of: tuple[float, ...]  # of each channel, at `threshold`; NaN where no validation subject holds it


@torch.no_grad()
def validate(
    model: ModelWithLoss,
    data: SliceDataset,
    target_shape: tuple[int, int],
    dtype: torch.dtype,
    batch_size: int,
    slices: int | None = None,
    workers: int = 0,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Validation:
    """Score `slices` evenly spaced items of `data` (all by default): slices, or slabs that tile them.

    `batch_size` slices at a time, of slabs at least one: their logits take more room than what is learned from.
    Several `ranks` share them and put their counts together: each gets what one process would get.
    Positive weights raise a model's probabilities, by how much depends on how far it has learned; so the threshold is
    not assumed but chosen here, on validation subjects. Counts are summed per subject and structure before any ratio.
    Raises DivergedError, which names the slices, where the loss is no number: on all ranks, whichever of them met it.
    """
    device = next(model.parameters()).device
    order = np.linspace(0, len(data) - 1, min(slices or len(data), len(data))).round().astype(int).tolist()
    ranks = ranks or Ranks(device)
    subjects = {subject: place for place, subject in enumerate(dict.fromkeys(data.where[i][0] for i in order))}
    counts = torch.zeros(len(LEVELS), len(subjects), 3, len(data.label_map), dtype=torch.int64, device=device)
    wrong = torch.zeros(len(order), dtype=torch.int64)  # where in `order` the loss was no number
    annotated = torch.zeros(len(data.label_map), dtype=torch.int64)  # pixels
    loss = torch.zeros(2, dtype=torch.float64)  # summed over annotated (sample, channel, pixel), and their number
    model.eval()
    loader = batches(data, order, max(1, batch_size // data.depth), workers, share=ranks.share_whole, device=device)
    parts = 1  # of a batch, more once memory ran out
    for batch in tqdm(loader, desc="validation", leave=False, disable=not progress):
        scored, parts = in_parts(partial(_score, model, target_shape, dtype), batch, parts)
        for part, mean, size, of_slices in scored:
            loss += torch.tensor([mean * size, size], dtype=torch.float64)
            wrong[part.numbers] = int(not np.isfinite(mean))
            pixels = part.counted.sum(1) * part.sizes.prod(1).long()
            annotated += (part.annotated * pixels[:, None]).sum(0)
            positions = part.numbers.repeat_interleave(part.counted.sum(1)).tolist()
            for position, of_slice in zip(positions, of_slices, strict=True):
                counts[:, subjects[data.where[order[position]][0]]] += of_slice
    table, (loss, number) = ranks.sum(counts).cpu().numpy(), ranks.sum(loss).tolist()
    unusable = ranks.sum(wrong).nonzero().flatten().tolist()
    if unusable:
        raise DivergedError(f"the validation loss is {loss} at the slices {data.named(order[i] for i in unusable)}")
    groups = [group_of(name) for name in sorted(data.label_map, key=data.label_map.__getitem__)]
    tried = table[(LEVELS >= LOWEST) & (LEVELS <= HIGHEST)]
    best, thresholds = choose_thresholds(tried, groups)
    return Validation(
        loss / max(number, 1),
        *macro_dice(tried[best]),
        THRESHOLDS[best],
        thresholds,
        calibrate(table.sum(1), thresholds, groups, ranks.sum(annotated).cpu().numpy()),
        tuple(dice_of(tried[best]).tolist()),
    )


def _score(
    model: ModelWithLoss, target_shape: tuple[int, int], dtype: torch.dtype, batch: SliceBatch
) -> tuple[SliceBatch, float, int, torch.Tensor]:
    """A batch, its mean loss over so many annotated (sample, channel, pixel), and the counts of its slices."""
    device = next(model.parameters()).device
    images, targets = augment.to_network(batch.to(device), target_shape)
    with autocast(device, dtype):
        features = model.network.decode(images.contiguous(memory_format=torch.channels_last))
        logits = model.network.head(features).float()
    targets, features, logits = targets.by_slice(features, logits)
    mean = losses.head_loss(features, model.network.head, targets, model.pos_weight, model.terms)
    return batch, float(mean), int(losses.annotated_number(targets)), count_slices(logits, batch)


def choose_thresholds(counts: np.ndarray, groups: Sequence[str]) -> tuple[int, tuple[float, ...]]:
    """Choose the threshold that gives the highest macro Dice, and one for each channel.

    A channel's own best threshold rests on the few subjects that hold the structure, and in them on a few pixels where
    it is small; so it is drawn, in logits, towards that of its group, which in turn is drawn towards what is best for
    all. The group counts like OTHERS subjects; subjects that hold FEW_PIXELS together like half as many. A channel that
    no subject holds, or that was never found, gets the threshold of its group.

    Args:
        counts: (T, subjects, 3, C), TP, FP and FN at each of THRESHOLDS.
        groups: of each channel.

    Returns:
        The place in THRESHOLDS of the best common one, 0.5 where nothing is scored, and the thresholds (C,).
    """
    per_channel = np.array([dice_of(at) for at in counts])  # (T, C)
    means = np.nan_to_num([macro_dice(at)[0] for at in counts])
    if not means.any():
        return THRESHOLDS.index(0.5), (0.5,) * len(groups)
    best, held, logits = int(_where_highest(means[:, None])[0]), ~np.isnan(per_channel[0]), logit(THRESHOLDS)
    pixels = counts[0, :, 0] + counts[0, :, 2]  # (subjects, C)
    subjects, told = (pixels > 0).sum(0), pixels.sum(0) / (pixels.sum(0) + FEW_PIXELS)
    of_group = np.zeros(len(groups))
    for group in dict.fromkeys(groups):
        own = np.array([name == group for name in groups])
        curve = per_channel[:, own & held] @ told[own & held] + OTHERS * means
        of_group[own] = logits[_where_highest(curve[:, None])[0]]
    learned = np.nan_to_num(per_channel).any(0)  # else no threshold is better than another
    of_channel = np.where(learned, logits[_where_highest(np.nan_to_num(per_channel))], of_group)
    chosen = (subjects * told * of_channel + OTHERS * of_group) / (subjects * told + OTHERS)
    return best, tuple(expit(chosen).tolist())


def _where_highest(curves: np.ndarray) -> np.ndarray:
    """Where each curve (T, n) is highest, in the middle of the longest stretch over which it is: places, int64 (n,)."""
    places = []
    for curve in curves.T:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], curve >= curve.max() - 1e-12, [0]])))
        start, stop = max(edges.reshape(-1, 2), key=lambda stretch: stretch[1] - stretch[0])
        places.append((start + stop - 1) // 2)
    return np.array(places, np.int64)


def calibrate(
    counts: np.ndarray, thresholds: Sequence[float], groups: Sequence[str], annotated: np.ndarray
) -> Calibration:
    """Fit the probabilities of `segkit.calibration` to counts (L, 3, C) at LEVELS of `annotated` pixels each (C,)."""
    above_inside, above_outside, below_inside = counts.transpose(1, 2, 0)  # (C, L) each
    all_inside = above_inside[:, :1] + below_inside[:, :1]
    inside = -np.diff(above_inside, prepend=all_inside, append=0)
    outside = -np.diff(above_outside, prepend=annotated[:, None] - all_inside, append=0)
    middle = np.concatenate([[LEVELS[0] - STEP], (LEVELS[1:] + LEVELS[:-1]) / 2, [LEVELS[-1] + STEP]])
    return fit_calibration(inside, outside, middle - logit(thresholds)[:, None], groups)


def count_slices(logits: torch.Tensor, batch: SliceBatch) -> torch.Tensor:
    """TP, FP and FN of each slice that counts, level and channel, on its own pixels: int64 (N, L, 3, C), L of LEVELS.

    logits: (N, C, H, W) of these slices on the network's grid. 0 where a channel is not annotated.
    """
    samples = batch.counted.nonzero()[:, 0].tolist()
    codes = (batch.codes if batch.codes.ndim == 4 else batch.codes[:, None])[batch.counted]
    rows = []
    for of_slice, own, sample in zip(logits, codes, samples, strict=True):
        part = batch.at([sample])
        y, x = part.sizes[0].int().tolist()
        counts = _count_slice(of_slice, own[:y, :x].to(logits.device), part, WayBack(part, of_slice.shape[1:]))
        rows.append(counts * part.annotated[0].to(logits.device))
    return torch.stack(rows)


def _count_slice(logits: torch.Tensor, codes: torch.Tensor, part: SliceBatch, way: WayBack) -> torch.Tensor:
    """Of one slice, logits (C, H, W) and codes (Y, X): (L, 3, C). Looks only at channels that rise far enough."""
    codebook, channels_in_all = part.codebook[0].to(logits.device), len(logits)
    held = (torch.bincount(codes.flatten(), minlength=len(codebook))[:, None] * codebook).sum(0)
    # interpolation never rises above the highest value
    counted = (logits.amax((1, 2)) > LEVELS[0]).nonzero().flatten()
    predicted, both = torch.zeros(2, len(LEVELS), channels_in_all, dtype=torch.int64, device=logits.device)
    for some in counted.split(max(1, TOGETHER // codes.numel())):
        planes = way.planes(logits[some]).flatten(1)
        channel, pixel = (planes > LEVELS[0]).nonzero(as_tuple=True)  # of a trained network few
        values, inside = planes[channel, pixel], codebook[codes.flatten()[pixel].long(), some[channel]]
        predicted[:, some] = _above(values, channel, len(some))
        both[:, some] = _above(values[inside], channel[inside], len(some))
    return torch.stack([both, predicted - both, held - both], 1)


def _above(logits: torch.Tensor, channels: torch.Tensor, channels_in_all: int) -> torch.Tensor:
    """How many logits (n,), each of a channel (n,) and above the lowest of LEVELS, lie above each: int64 (L, C)."""
    gap = ((logits - LEVELS[0]) / STEP).ceil_().clamp_(1, len(LEVELS)).long() - 1  # after which level
    number = torch.bincount(gap + channels * len(LEVELS), minlength=channels_in_all * len(LEVELS))
    return number.view(channels_in_all, len(LEVELS)).flip(1).cumsum(1).flip(1).T


def macro_dice(counts: np.ndarray) -> tuple[float, int]:
    """From counts (subjects, 3, C): the mean over structures of the mean over subjects whose reference holds it."""
    mean, number = metrics.nan_mean(dice_of(counts))
    return float(mean), int(number)


def dice_of(counts: np.ndarray) -> np.ndarray:
    """From counts (subjects, 3, C): the mean over subjects whose reference holds a structure, float (C,) with NaN."""
    tp, fp, fn = counts.transpose(1, 0, 2)
    return metrics.nan_mean(np.where(tp + fn > 0, metrics.dice(tp, fp, fn), np.nan), axis=0)[0]


def as_row(validation: Validation, label_map: Mapping[str, int]) -> dict:
    """The columns of the history; None instead of NaN, which JSON lacks."""
    return {
        "val_loss": validation.loss,
        "val_dice": None if np.isnan(validation.dice) else validation.dice,
        "val_structures": validation.structures,
        "val_threshold": validation.threshold,
        "val_dice_of": {
            name: round(validation.dice_of[channel], 4)
            for name, channel in label_map.items()
            if not np.isnan(validation.dice_of[channel])
        },
    }
