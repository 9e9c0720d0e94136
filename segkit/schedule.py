"""The learning rate of each step, and when training ends early: functions of the settings and the history alone.

Nothing here has a state of its own, so that a resumed training goes on as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from segkit.settings import TrainSettings

PLATEAU_EPOCHS = 3
"""Epochs without a better validation Dice after which the plateau schedule halves the learning rate."""


def learning_rate(settings: TrainSettings, step: int, steps: int, history: Sequence[Mapping]) -> float:
    """The learning rate of step number `step` (from 0) of `steps` in all, after the epochs in `history`."""
    rate = settings.learning_rate * min(1.0, (step + 1) / (settings.warmup_steps + 1))
    progress = min(max(step - settings.warmup_steps, 0) / max(steps - settings.warmup_steps, 1), 1.0)
    if settings.schedule == "poly":
        return rate * (1 - progress) ** 0.9
    if settings.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "plateau":
        return rate * 0.5 ** _plateaus(history)
    return rate


def should_stop(settings: TrainSettings, history: Sequence[Mapping]) -> bool:
    """Whether the last EARLY_STOPPING epochs have not brought a better validation Dice than those before."""
    patience = settings.early_stopping
    if patience is None or len(history) <= patience:
        return False
    scores = _scores(history)
    return max(scores[-patience:]) <= max(scores[:-patience])


def _plateaus(history: Sequence[Mapping]) -> int:
    """How often PLATEAU_EPOCHS epochs in a row were no better than the best before them."""
    best, waited, plateaus = -math.inf, 0, 0
    for score in _scores(history):
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited == PLATEAU_EPOCHS:
            plateaus, waited = plateaus + 1, 0
    return plateaus


def _scores(history: Sequence[Mapping]) -> list[float]:
    return [-math.inf if row["val_dice"] is None else row["val_dice"] for row in history]
