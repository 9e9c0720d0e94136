"""From a network's outputs to probabilities that mean what they say.

Positive weights in the loss and the Dice term push outputs up: where the sigmoid says 0.95, perhaps 60 % is inside. A
calibrated probability is sigmoid(slope * distance + offset), with the distance of a logit from the threshold above
which its structure is (Platt 1999, Probabilistic outputs for support vector machines). The threshold of each structure,
chosen on validation subjects, already holds what its weight in the loss adds to its logits; slope and offset are fitted
on the same subjects, one pair a group of structures, because a structure alone is often in one or two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

NEAR = 4.0
"""Fitted are pixels whose logit lies above the threshold less this. Far below it lie nearly all pixels of a scan: they
would decide the fit, and where a structure was missed they follow another law."""

PRIOR_PIXELS = 100.0
"""As how many pixels the fit over all groups counts in that of one: few pixels do not make a law of their own."""

MOST = 50.0
"""Largest slope, and offset to either side, that a file may hold; fitted ones are near 1."""


@dataclass(frozen=True)
class Calibration:
    """Slope and offset of each channel, as the probability that a pixel is inside follows from its logit."""

    slope: tuple[float, ...]
    offset: tuple[float, ...]

    def to_json(self) -> dict:
        """Plain types for a checkpoint."""
        return {"slope": list(self.slope), "offset": list(self.offset)}

    @classmethod
    def from_json(cls, content: object, channels: int) -> Calibration:
        """Read what `to_json` gave. Raises ValueError for anything else, also for slopes that do not rise."""
        if not isinstance(content, dict) or content.keys() != {"slope", "offset"}:
            raise ValueError("expected slope and offset of each structure")
        lists = content["slope"], content["offset"]
        for values, least in zip(lists, (1e-3, -MOST), strict=True):
            numbers = isinstance(values, list) and all(type(value) is float for value in values)
            if not numbers or len(values) != channels or not all(least <= value <= MOST for value in values):
                raise ValueError(f"expected {channels} numbers from {least:g} to {MOST:g}")
        return cls(*map(tuple, lists))


def fit_calibration(
    inside: np.ndarray, outside: np.ndarray, distance: np.ndarray, groups: Sequence[str]
) -> Calibration:
    """Fit slope and offset of each group by the likelihood of pixels whose logits are counted in bins.

    Args:
        inside: int (C, bins), pixels of each channel inside of its structure, by the bin of their logit.
        outside: int (C, bins), those outside.
        distance: float (C, bins), logit in the middle of a bin less the channel's threshold.
        groups: of each channel; a group without a pixel inside gets what fits all of them.

    Returns:
        A pair for each channel, the same within a group; slope 1 and offset 0 where no structure has a pixel inside.
    """
    near = distance > -NEAR
    inside, outside = inside * near, outside * near
    if not inside.any() or not outside.any():
        return Calibration((1.0,) * len(groups), (0.0,) * len(groups))
    common = _fit(inside, outside, distance, np.zeros(2), 1e-3)
    fitted = {}
    for group in dict.fromkeys(groups):
        own = np.array([name == group for name in groups])
        held = inside[own].any()
        fitted[group] = _fit(inside[own], outside[own], distance[own], common, PRIOR_PIXELS) if held else common
    slope, offset = np.array([fitted[group] for group in groups]).T
    return Calibration(tuple(np.exp(slope).tolist()), tuple(offset.tolist()))


def _fit(inside: np.ndarray, outside: np.ndarray, distance: np.ndarray, prior: np.ndarray, weight: float) -> np.ndarray:
    """Logarithm of the slope, and offset: the most likely ones, drawn to `prior` as by `weight` pixels."""
    there = inside + outside > 0
    inside, outside, distance = inside[there], outside[there], distance[there]

    def cost(parameters: np.ndarray) -> float:
        logit = np.exp(parameters[0]) * distance + parameters[1]
        loss = np.logaddexp(0, logit) * outside + np.logaddexp(0, -logit) * inside
        return float((loss.sum() + weight * ((parameters - prior) ** 2).sum()) / (inside.sum() + weight))

    bounds = [(np.log(0.02), np.log(20)), (-20, 20)]
    return minimize(cost, prior, method="L-BFGS-B", bounds=bounds).x


@dataclass(frozen=True)
class Reliability:
    """How often a pixel is inside where a model says with which probability it is.

    Arrays over bins of the said probability (`edges`, one more): number of (pixel, structure), the mean of what was
    said, and the share that is inside; NaN in a bin without any.
    """

    edges: np.ndarray
    number: np.ndarray
    said: np.ndarray
    inside: np.ndarray

    @classmethod
    def of(cls, sums: np.ndarray, edges: np.ndarray) -> Reliability:
        """From sums over each bin, (3, bins): pixels, probabilities, pixels inside."""
        number, said, inside = sums
        with np.errstate(invalid="ignore", divide="ignore"):
            return cls(edges, number, said / number, inside / number)

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean of |said - inside| over pixels; NaN without one.

        Naeini et al. 2015, https://doi.org/10.1609/aaai.v29i1.9602.
        """
        if not self.number.sum():
            return float("nan")
        return float(np.nansum(np.abs(self.said - self.inside) * self.number) / self.number.sum())
