"""Scores during training: loss, macro Dice on the network's grid, and the thresholds at which it is highest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.special import expit, logit
from tqdm.auto import tqdm

from segkit import augment, losses, metrics
from segkit.chunks import code_members
from segkit.devices import autocast
from segkit.errors import DivergedError
from segkit.losses import ModelWithLoss
from segkit.memory import in_parts
from segkit.ranks import Ranks
from segkit.slices import SliceBatch, SliceDataset, Targets, batches

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Validation:
    """loss as in training; dice at the probability `threshold` that gave the highest, NaN if nothing is annotated."""

    loss: float
    dice: float
    structures: int  # that a validation subject holds: what `dice` is the mean of
    threshold: float
    thresholds: tuple[float, ...]  # of each channel, see `choose_thresholds`
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
    counts = torch.zeros(len(THRESHOLDS), len(subjects), 3, len(data.label_map), dtype=torch.int64, device=device)
    wrong = torch.zeros(len(order), dtype=torch.int64)  # where in `order` the loss was no number
    loss = torch.zeros(2, dtype=torch.float64)  # summed over annotated (sample, channel, pixel), and their number
    model.eval()
    loader = batches(data, order, max(1, batch_size // data.depth), workers, share=ranks.share_whole, device=device)
    parts = 1  # of a batch, more once memory ran out
    for batch in tqdm(loader, desc="validation", leave=False, disable=not progress):
        scored, parts = in_parts(partial(_score, model, target_shape, dtype), batch, parts)
        for part, mean, size, of_slices in scored:
            loss += torch.tensor([mean * size, size], dtype=torch.float64)
            wrong[part.numbers] = int(not np.isfinite(mean))
            positions = part.numbers.repeat_interleave(part.counted.sum(1)).tolist()
            for position, of_slice in zip(positions, of_slices, strict=True):
                counts[:, subjects[data.where[order[position]][0]]] += of_slice
    table, (loss, number) = ranks.sum(counts).cpu().numpy(), ranks.sum(loss).tolist()
    unusable = ranks.sum(wrong).nonzero().flatten().tolist()
    if unusable:
        raise DivergedError(f"the validation loss is {loss} at the slices {data.named(order[i] for i in unusable)}")
    best, thresholds = choose_thresholds(table)
    return Validation(
        loss / max(number, 1),
        *macro_dice(table[best]),
        THRESHOLDS[best],
        thresholds,
        tuple(dice_of(table[best]).tolist()),
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
    return batch, float(mean), int(losses.annotated_number(targets)), count_slices(logits, targets)


def choose_thresholds(counts: np.ndarray) -> tuple[int, tuple[float, ...]]:
    """From counts (T, subjects, 3, C): which threshold gives the highest macro Dice, and a threshold for each channel.

    A channel's own best threshold rests on the few subjects that hold the structure; so it is taken half of the way
    from the common one, in logits. A channel that no subject holds gets the common one.
    """
    per_channel = np.nan_to_num([dice_of(at) for at in counts])
    means = np.nan_to_num([macro_dice(at)[0] for at in counts])
    best = int(np.argmax(means)) if means.any() else THRESHOLDS.index(0.5)
    logits = logit(THRESHOLDS)
    own = logits[np.where(per_channel.any(0), per_channel.argmax(0), best)]
    return best, tuple(expit((own + logits[best]) / 2).tolist())


def count_slices(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """TP, FP and FN of each slice, threshold and channel from logits (B, C, H, W): int64 (B, T, 3, C).

    0 where the channel is not annotated.
    """
    counts = [_count_slice(*sample) for sample in zip(logits, targets.codes, targets.codebook, strict=True)]
    return torch.stack(counts) * targets.annotated[:, None, None]


def _count_slice(logits: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Of one slice: (T, 3, C). Looks only at the members of each pixel's code and at channels that rise far enough."""
    z, channels_in_all = logits.flatten(1).T, len(logits)
    channels, counts = code_members(codebook)
    members, present = channels[codes.flatten()], counts[codes.flatten()]
    of_members = z.gather(1, members)
    held = torch.bincount(members[present], minlength=channels_in_all)
    limits = logit(THRESHOLDS).tolist()
    rising = (z.amax(0) > limits[0]).nonzero().flatten()
    z, one = z[:, rising], z.new_ones(1, len(z))
    rows = []
    for limit in limits:
        both = torch.bincount(members[present & (of_members > limit)], minlength=channels_in_all)
        predicted = torch.zeros_like(both)
        # a product with ones counts faster than a sum of bools, and exactly up to 2 ** 24 pixels
        predicted[rising] = (one @ (z > limit).to(z.dtype))[0].long()
        rows.append(torch.stack([both, predicted - both, held - both]))
    return torch.stack(rows)


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
