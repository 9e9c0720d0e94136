import pytest
import torch

from segkit.schedule import PLATEAU_EPOCHS, learning_rate, should_stop
from segkit.settings import TrainSettings


def history(*scores):
    return [{"val_dice": score} for score in scores]


def rates(settings, steps):
    return [learning_rate(settings, step, steps, []) for step in range(steps)]


def test_poly_and_cosine_agree_with_torch():
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    for name, make in (
        ("poly", lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 20, 0.9)),
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
    ):
        optimizer = torch.optim.SGD(parameter, 0.5)
        schedule, theirs = make(optimizer), []
        for _ in range(20):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates(TrainSettings(learning_rate=0.5, schedule=name), 20) == pytest.approx(theirs)


def test_warmup_rises_evenly_and_then_the_schedule_begins():
    found = rates(TrainSettings(learning_rate=1.0, schedule="cosine", warmup_steps=4), 14)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[9] == pytest.approx(0.5)  # half way through the ten steps after it


def test_plateau_agrees_with_torch():
    scores = [0.1, 0.2, 0.2, 0.15, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4, None, 0.2, 0.2, 0.2]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=PLATEAU_EPOCHS - 1, threshold=0
    )
    settings = TrainSettings(learning_rate=1.0, schedule="plateau")
    for number in range(len(scores)):
        assert learning_rate(settings, 0, 10, history(*scores[:number])) == optimizer.param_groups[0]["lr"]
        theirs.step(-1 if scores[number] is None else scores[number])


def test_early_stopping_by_hand():
    settings = TrainSettings(early_stopping=2)
    assert not should_stop(settings, history(0.1, 0.3))
    assert not should_stop(settings, history(0.1, 0.3, 0.2))
    assert should_stop(settings, history(0.1, 0.3, 0.2, 0.3))
    assert not should_stop(settings, history(0.3, 0.2, 0.31))
    assert not should_stop(TrainSettings(), history(*[0.1] * 50))
    assert should_stop(settings, history(None, None, None))
