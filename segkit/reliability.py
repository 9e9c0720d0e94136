"""Whether a model's probabilities mean what they say: how often a pixel is inside where a probability is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from segkit.calibration import Reliability
from segkit.inference import Predictor
from segkit.segmenting import mean_of
from segkit.splits import Part
from segkit.staging import StagedSubject
from segkit.validation import TOGETHER

EDGES = np.linspace(0, 1, 11)
LEAST = 0.01
"""Pixels below this probability are left out: nearly all of a scan, and rightly said to be outside."""

MOST_SLICES = 200
"""Of all subjects together: some million pixels, which is more than enough."""


def measure_reliability(
    predictor: Predictor,
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    most_slices: int = MOST_SLICES,
    progress: bool = False,
) -> dict[str, Reliability]:
    """Compare what networks say with the reference, on the own pixels of evenly spaced slices of each part.

    Returns two over the same pairs of a pixel and a structure that its subject annotates: "output", by the sigmoid of
    the networks' logits, and "probability", by the calibrated one, which is LEAST or more in these pairs.
    """
    sums = {name: np.zeros((3, len(EDGES) - 1)) for name in ("output", "probability")}
    for part in parts:
        subject = staged[part.subject]
        own = part.slices(subject.shape[0])
        wanted = max(1, most_slices // len(parts))
        chosen = sorted({own[k] for k in np.linspace(0, len(own) - 1, min(wanted, len(own))).round().astype(int)})
        for place, members, way in predictor.slices(subject, chosen, progress=progress):
            volume = subject.labels(chosen[place])
            table, annotated = volume.on_channels(predictor.label_map)
            codes = torch.from_numpy(volume.codes.astype(np.int64)).to(predictor.device)
            # interpolation never rises above the highest value, and a probability rises with its logit
            highest = predictor.probabilities([logits.amax((1, 2)) for logits in members]).cpu().numpy()
            looked_at = np.flatnonzero(annotated & (highest >= LEAST))
            for some in np.array_split(looked_at, max(1, -(-looked_at.size * codes.numel() // TOGETHER))):
                inside = torch.from_numpy(table[:, some]).to(predictor.device).T[:, codes]
                planes = [way.planes(logits[some]) for logits in members]
                said = {"output": mean_of([torch.sigmoid(each) for each in planes])}
                said["probability"] = predictor.probabilities(planes, some)
                counted = said["probability"] >= LEAST
                for name, values in said.items():
                    sums[name] += _counted(values[counted], inside[counted])
    return {name: Reliability.of(each, EDGES) for name, each in sums.items()}


def _counted(said: torch.Tensor, inside: torch.Tensor) -> np.ndarray:
    """Of each bin the number of pairs, the sum of what was said of them, and how many are inside: float64 (3, bins)."""
    bins = len(EDGES) - 1
    values, hits = said.cpu().numpy().astype(float), inside.cpu().numpy()
    place = np.minimum((values * bins).astype(int), bins - 1)
    return np.stack([np.bincount(place, weights, bins) for weights in (None, values, hits)]).astype(float)
