"""What a network learns lies where it is in the scan: discs of known places, learned and predicted at several sizes."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_subject
from scipy import ndimage

from segkit.checkpoints import load_checkpoints
from segkit.dataset import open_data
from segkit.evaluation import evaluate
from segkit.inference import Predictor
from segkit.settings import TrainSettings
from segkit.summaries import summarize
from segkit.training import train

SIDE, SLICES = 96, 16
IN_PLANE = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))])


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """Six subjects of 16 slices with six bright discs each, of 4 to 9 pixels radius: four train, one each judges."""
    folder, random = tmp_path_factory.mktemp("discs"), np.random.default_rng(0)
    x, y = np.mgrid[:SIDE, :SIDE]
    body = (x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2 < (0.45 * SIDE) ** 2
    for number in range(6):
        mask = np.zeros((SIDE, SIDE, SLICES), bool)
        for z in range(SLICES):
            for _ in range(6):
                middle, radius = random.uniform(0.25 * SIDE, 0.75 * SIDE, 2), random.uniform(4, 9)
                mask[..., z] |= (x - middle[0]) ** 2 + (y - middle[1]) ** 2 <= radius**2
        hu = np.where(mask, 200, np.where(body, 0, -1000)[..., None]) + random.normal(0, 15, mask.shape)
        write_subject(folder / "data" / f"s{number}", {"disc": mask}, hu.astype(np.int16), np.diag([1.0, 1, 3, 1]))
    split = {4: "val", 5: "test"}
    rows = "".join(f"s{number};{split.get(number, 'train')}\n" for number in range(6))
    (folder / "data" / "meta.csv").write_text("image_id;split\n" + rows)
    return open_data(folder / "data", folder / "staged", progress=False)


@pytest.mark.parametrize("target", [96, 64, 48, 24])
def test_a_prediction_lies_where_the_scan_is_and_scores_what_validation_said(discs, tmp_path, target):
    """By factors of 1, 1.5, 2 and 4. Labels that lay half a pixel beside the image displaced it by 0.45 voxels, and
    validation, against such labels, said 0.99 of what was 0.94.
    """
    chosen = TrainSettings(
        epochs=2, target_shape=(target, target), features=(8, 16), slices_per_epoch=800, device="cpu"
    )
    history = train(discs, chosen, tmp_path, progress=False)
    predictor = Predictor.of(load_checkpoints(tmp_path))
    scores = evaluate(predictor, discs.staged, discs.split.test, "test", progress=False).scores
    assert summarize(scores)["macro_dice"] == pytest.approx(history[-1]["val_dice"], abs=0.01)
    displaced = np.concatenate([displacements(predictor, discs.staged[name]) for name in ("s4", "s5")])
    error = displaced.std(0).max() / np.sqrt(len(displaced))
    assert np.abs(displaced.mean(0)).max() < 0.05 + 2 * error, displaced.mean(0)


def displacements(predictor, subject) -> np.ndarray:
    """Of each disc of a subject how far its predicted centre of mass lies from its own, voxels (n, 2)."""
    reference, predicted = subject.labels().mask("disc"), predictor.predict(subject).mask("disc")
    discs, number = ndimage.label(reference, IN_PLANE)
    distance, nearest = ndimage.distance_transform_edt(~reference, (1000, 1, 1), return_indices=True)
    owner = np.where(predicted & (distance < 4), discs[tuple(nearest)], 0)
    found = [index for index in range(1, number + 1) if (owner == index).any()]
    centres = (np.array(ndimage.center_of_mass(of > 0, of, found)) for of in (owner, discs))
    return np.subtract(*centres)[:, 1:]
