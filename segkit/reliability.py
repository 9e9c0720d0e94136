"""Whether a model's probabilities mean what they say: how often a pixel is inside where a probability is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from segkit import augment
from segkit.calibration import Reliability
from segkit.inference import Predictor
from segkit.segmenting import mean_of
from segkit.slices import SliceBatch, SliceDataset, batches
from segkit.splits import Part
from segkit.staging import StagedSubject

EDGES = np.linspace(0, 1, 11)
LEAST = 0.01
"""Pixels below this probability are left out: nearly all of a scan, and rightly said to be outside."""

MOST_SLICES = 400
"""Of all subjects together: some million pixels, which is more than enough."""


def measure_reliability(
    predictor: Predictor,
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    most_slices: int = MOST_SLICES,
    progress: bool = False,
) -> dict[str, Reliability]:
    """Compare what networks say with the reference, on the network's grid and evenly spaced slices of each part.

    Returns two over the same pairs of a pixel and a structure that its subject annotates: "output", by the sigmoid of
    the networks' logits, and "probability", by the calibrated one, which is LEAST or more in these pairs.
    """
    sums = {name: np.zeros((3, len(EDGES) - 1)) for name in ("output", "probability")}
    for part in parts:
        subject = staged[part.subject]
        own = part.slices(subject.shape[0])
        wanted = max(1, most_slices // len(parts))
        chosen = sorted({own[k] for k in np.linspace(0, len(own) - 1, min(wanted, len(own))).round().astype(int)})
        only = Part(subject.name, tuple((z, z + 1) for z in chosen))
        data = SliceDataset({subject.name: subject}, [only], predictor.label_map)
        of_slices = (_inside(batch, predictor.target_shape) for batch in batches(data, range(len(data)), 1))
        said = predictor.slices(subject, chosen, progress=progress)
        for (_, members, _), (inside, annotated) in zip(said, of_slices, strict=True):
            inside, annotated = inside.to(predictor.device), annotated.to(predictor.device)
            outputs = mean_of([torch.sigmoid(logits.float()) for logits in members])
            probabilities = predictor.probabilities(members)
            chosen = (probabilities >= LEAST) & annotated[:, None, None]
            for name, said_of in (("output", outputs), ("probability", probabilities)):
                sums[name] += _counted(said_of[chosen], inside[chosen])
    return {name: Reliability.of(each, EDGES) for name, each in sums.items()}


def _inside(batch: SliceBatch, target_shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch of one slice: where each structure is, bool (C, H, W), and which are annotated, bool (C,)."""
    _, targets = augment.to_network(batch, target_shape)
    return targets.dense()[0], targets.annotated[0]


def _counted(said: torch.Tensor, inside: torch.Tensor) -> np.ndarray:
    """Of each bin the number of pairs, the sum of what was said of them, and how many are inside: float64 (3, bins)."""
    bins = len(EDGES) - 1
    said, place = said.double(), (said * bins).long().clamp(max=bins - 1)
    sums = [torch.bincount(place, weights, bins) for weights in (None, said, inside.double())]
    return torch.stack([each.double() for each in sums]).cpu().numpy()
