"""Means over subjects with their 95 % confidence intervals.

What is drawn from a population are subjects, not cases: the standard error of a mean is the delete-one jackknife over
subjects (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11), and the interval reaches as many of
them to either side as Student's t with one degree of freedom less than there are subjects asks for. Of a plain mean
that is the usual t interval. Which structures a mean is over is fixed: a mean over others is another quantity. Where
one subject alone has a value nobody knows how far others scatter, and the ends are NaN.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import stats

Interval = tuple[Any, Any, Any]
"""A mean with the ends of its 95 % interval: numbers, or arrays of one shape."""


def mean_interval(values: np.ndarray) -> Interval:
    """Average each column over the subjects that have a value: (subjects, S) with NaN for none -> three (S,)."""
    number = (~np.isnan(values)).sum(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of no value and of one the mean or its error is NaN
        mean = np.nanmean(values, axis=0)
        error = np.nanstd(values, axis=0, ddof=1) / np.sqrt(number)
    return _ends(mean, error, number)


def macro_interval(values: np.ndarray) -> Interval:
    """Average each structure over the subjects that hold it, then over structures: three numbers.

    values: (subjects, structures), NaN for none; a structure that nobody holds is left out. The ends are NaN where no
    structure is held by two subjects.
    """
    there = ~np.isnan(values)
    held = there.sum(0)
    values, there, held = values[:, held > 0], there[:, held > 0], held[held > 0]
    if not held.size:
        return np.nan, np.nan, np.nan
    means = np.nansum(values, 0) / held
    number, several = there.any(1).sum(), held > 1
    if not several.any():
        return means.mean(), np.nan, np.nan
    residual = np.where(there & several, values - means, 0.0)
    # by how much the sum of the structures' means changes without each subject
    change = (residual / np.maximum(held - 1, 1)).sum(1)
    variance = (number - 1) / number * (change**2).sum() + _variance_of_singles(residual, there, held)
    return _ends(means.mean(), np.sqrt(variance) / held.size, number)


def _variance_of_singles(residual: np.ndarray, there: np.ndarray, held: np.ndarray) -> float:
    """Estimate what structures that one subject alone holds add to the variance of the sum of all structures' means.

    Their own scatter cannot be seen, so the one of the others stands for it: the variance of a case about the mean of
    its structure, and the covariance of two cases of a subject. Without it a mean over many rare structures would seem
    surer than it is: its intervals held the truth in 76 instead of 91 % of simulated draws of 4 subjects.
    """
    several, singles = there & (held > 1), (there & (held == 1)).sum(1)
    scaled = residual * np.sqrt(held / np.maximum(held - 1, 1))  # n / (n - 1): a mean lies nearer to its own values
    variance = (scaled**2).sum() / several.sum()
    cases = several.sum(1)
    pairs = (cases * (cases - 1)).sum()
    covariance = max(0.0, (scaled.sum(1) ** 2 - (scaled**2).sum(1)).sum() / max(pairs, 1))
    shares = (several / held).sum(1)  # of each subject in the means of the other structures
    return float((singles * variance + singles * (singles - 1 + 2 * shares) * covariance).sum())


def cases_interval(values: np.ndarray) -> Interval:
    """Average over all cases alike, those of a subject drawn together: (subjects, structures) -> three numbers."""
    there = ~np.isnan(values)
    sums, numbers = np.nansum(values, 1), there.sum(1)
    subjects, cases = (numbers > 0).sum(), numbers.sum()
    mean = sums.sum() / cases if cases else np.nan
    if subjects < 2:
        return mean, np.nan, np.nan
    without = (sums.sum() - sums) / (cases - numbers)
    return _ends(mean, np.sqrt((subjects - 1) / subjects * ((without - mean) ** 2).sum()), subjects)


def subjects_interval(values: np.ndarray) -> Interval:
    """Average over the structures of each subject, then over subjects: (subjects, structures) -> three numbers."""
    there = ~np.isnan(values)
    number = there.sum(1)
    means = np.where(number > 0, np.nansum(values, 1) / np.maximum(number, 1), np.nan)
    mean, low, high = mean_interval(means[:, None])
    return mean[0], low[0], high[0]


def _ends(mean: Any, error: Any, number: Any) -> Interval:
    """A mean over `number` subjects with the ends of its interval, from its standard error."""
    reach = stats.t.ppf(0.975, np.maximum(number - 1, 1)) * error
    return mean, np.where(number > 1, mean - reach, np.nan)[()], np.where(number > 1, mean + reach, np.nan)[()]
