"""How often a 95 % interval of macro Dice holds the truth, by simulation.

usage: python -m benchmarks.coverage [--draws 2000]

Populations of 117 structures with true means, of which subjects are drawn: which structures a subject holds is of its
field of view, or of each structure by itself; cases of a subject are alike; with outliers, a tenth of the subjects is
worse in all that it holds and a twentieth of the cases is missed, as real tables of scores have it. The truth is the
mean over the structures that the drawn subjects hold, of their true means.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from segkit.intervals import macro_interval

STRUCTURES = 117
SUBJECTS = (4, 6, 10, 20, 89)


class Population:
    """Subjects that are drawn: whose structures are `fields_of_view` or independent, with `outliers` or normal."""

    def __init__(self, fields_of_view: bool, outliers: bool):
        self.fields_of_view, self.outliers = fields_of_view, outliers
        fixed = np.random.default_rng(5)
        self.frequency = fixed.uniform(0.05, 1, STRUCTURES)  # of TotalSegmentator's: from a few per cent to nearly all
        self.height = fixed.beta(1.6, 1.6, STRUCTURES)  # in the body, 0 to 1
        self.typical = np.clip(fixed.beta(6, 2, STRUCTURES), 0.05, 0.98)
        self.truth = self._dice(np.random.default_rng(9), 40_000).mean(0)

    def draws(self, subjects: int, number: int, seed: int) -> Iterator[tuple[np.ndarray, float]]:
        """Tables (subjects, structures) with NaN where one is not held, each with the true mean of its structures."""
        random = np.random.default_rng(seed)
        for _ in range(number):
            values = np.where(self._held(random, subjects), self._dice(random, subjects), np.nan)
            yield values, float(self.truth[~np.isnan(values).all(0)].mean())

    def _held(self, random: np.random.Generator, subjects: int) -> np.ndarray:
        if not self.fields_of_view:
            return random.random((subjects, STRUCTURES)) < self.frequency
        middle, length = random.beta(2.2, 2.2, (subjects, 1)), random.gamma(4, 0.09, (subjects, 1))
        return np.abs(self.height - middle) <= length / 2

    def _dice(self, random: np.random.Generator, subjects: int) -> np.ndarray:
        shape = (subjects, STRUCTURES)
        of_subject = random.normal(size=(subjects, 1))
        if not self.outliers:
            return np.clip(self.typical + 0.1 * random.normal(size=shape) + 0.05 * of_subject, 0, 1)
        worse = 0.25 * (random.random((subjects, 1)) < 0.1)
        dice = np.clip(self.typical + 0.08 * random.normal(size=shape) + 0.03 * of_subject - worse, 0, 1)
        return np.where(random.random(shape) < 0.05, 0, dice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    print("| structures held | scores | subjects | holds the truth | truth below | truth above | mean width |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for fields_of_view in (False, True):
        for outliers in (False, True):
            population = Population(fields_of_view, outliers)
            for subjects in SUBJECTS:
                rows = [(*macro_interval(values)[1:], truth) for values, truth in population.draws(subjects, draws, 1)]
                low, high, truth = np.array(rows).T
                print(
                    f"| {'by field of view' if fields_of_view else 'each by itself'} "
                    f"| {'with outliers' if outliers else 'normal'} | {subjects} "
                    f"| {np.mean((low <= truth) & (truth <= high)):.1%} | {np.mean(truth < low):.1%} "
                    f"| {np.mean(truth > high):.1%} | {np.mean(high - low):.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
