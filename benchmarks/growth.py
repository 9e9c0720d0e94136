"""How cost grows with subjects and workers, and what all tables say about the full data set."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.predicting import name_of
from benchmarks.sides import ROOT, Side
from benchmarks.tables import Row, Table, code_of
from benchmarks.training_step import BATCH

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment
    from segkit.dataset import Data
    from segkit.staging import StagedSubject

HERE = ROOT / "benchmarks"
FULL, FULL_TRAIN, FULL_TEST = 1228, 1082, 89
"""Subjects of TotalSegmentator 2.0.1, of its training and its test split."""
WORKERS = (1, 2)
PREDICTING_STEPS = 10
"""Of the network that predicts: one that learned longer finds more, and what it finds takes time."""
STAGES = ("staging", "epoch", "prediction", "scoring")


def measure(bench: Bench) -> Table:
    sides = {(n, jobs): _side(bench, n, jobs) for n in bench.sizes.growth for jobs in WORKERS}
    taken = {}
    for key, side in sides.items():  # one after the other: workers of several would share the cores
        taken[key] = bench.turns([side], 1)[side.name]
    rows = []
    for key, side in sides.items():
        result = taken[key]
        words = ", ".join(f"{stage} {result.found[stage]:.2f} s" for stage in STAGES if stage in result.found)
        rows.append(Row(side.name, "segkit", result.median, None, result.peak_mb, notes=result.problem or words))
    notes = [text for jobs in WORKERS for text in trend({n: taken[n, jobs].found for n in bench.sizes.growth}, jobs)]
    what = (
        "Phantoms of half the demo's detail, of four that are copied: staged; an epoch of all their slices at 32 x 48 "
        "pixels with a network of 8-16-32-64 channels; predicted; scored. Workers stage, read slices ahead and score."
    )
    return Table("growth", "How cost grows", what, rows, notes)


def project(bench: Bench) -> Table | None:
    """The full data set, from the tables before; None while one of them is missing."""
    full, grown = costs_of_a_subject(bench), bench.store.kept("growth", code_of(HERE / "growth.py"))
    if full is None or grown is None:
        return None
    peaks = [row["peak_mb"] for row in grown["rows"] if row["side"].endswith(", 1 worker")]
    slope = slope_of({n: peak for n, peak in zip(bench.sizes.growth, peaks, strict=True) if peak})
    what = (
        "What one subject of full size cost in the tables above on this machine, with one worker, times the subjects "
        "of TotalSegmentator 2.0.1: files are in memory, the disk takes no part; a prediction is a command of its own, "
        "with its start, and grows with the slices. Memory is the peak of that subject and what each further one "
        "added above."
    )
    return Table("projection", "The full data set, projected", what, [], grid=projection(full, max(0.0, slope)))


def _side(bench: Bench, subjects: int, jobs: int) -> Side:
    name = f"{subjects} subject{'s' * (subjects > 1)}, {jobs} worker{'s' * (jobs > 1)}"
    parameters = {"made": str(bench.growth_dir), "scratch": str(bench.scratch / "growth"), "subjects": subjects,
                  "jobs": jobs, "device": bench.device}  # fmt: skip
    return Side(name, "benchmarks.growth:segkit", parameters, rounds=1, cold=True)


def segkit(made: str, scratch: str, subjects: int, jobs: int, device: str | None) -> Callable[[], dict]:
    from segkit import evaluation
    from segkit.devices import pick_device
    from segkit.inference import Predictor, round_trip
    from segkit.ranks import Ranks
    from segkit.settings import Scoring, TrainSettings
    from segkit.slices import SliceDataset, batches
    from segkit.staging import stage
    from segkit.steps import Learner
    from segkit.subjects import find_subjects

    shutil.rmtree(scratch, ignore_errors=True)
    sources = sorted(path for path in Path(made).iterdir() if path.is_dir())
    for number in range(subjects):
        shutil.copytree(sources[number % len(sources)], Path(scratch) / "data" / f"s{number:04d}")
    found, _ = find_subjects(Path(scratch) / "data")
    settings = TrainSettings(target_shape=(32, 48), features=(8, 16, 32, 64), device=device).checked()

    def work() -> dict:
        clock = Clock()
        staged, _ = stage(found, Path(scratch) / "store", jobs, progress=False)
        clock.stage("staging")
        data = _all_train(Path(scratch) / "data", staged)
        learner = Learner(data, settings, Ranks(pick_device(device)))
        slices, network = SliceDataset(data.staged, data.split.train, data.label_map), learner.network
        for step, batch in enumerate(batches(slices, range(len(slices)), BATCH, jobs - 1)):  # one reads in this process
            learner.step(batch, 1, settings.learning_rate)
            if step + 1 == PREDICTING_STEPS:
                network = copy.deepcopy(learner.network)
        clock.stage("epoch")
        predictor = Predictor(network, data.label_map, settings.target_shape, device=device)
        for subject in staged:
            predictor.predict(subject)
        clock.stage("prediction")
        for subject in staged:
            # what is scored is no prediction of an untrained network, but the masks as they come back from its grid
            prediction = round_trip(subject, predictor.structures, settings.target_shape)
            clock.stage("")
            reference = subject.labels()
            evaluation.score_subject(subject.name, "", reference, prediction, subject.spacing_mm, Scoring(jobs=jobs))
            clock.stage("scoring")
        return {**clock.seconds, "slices": len(slices)}

    return work


def _all_train(folder: Path, staged: list[StagedSubject]) -> Data:
    """All subjects for training: only how cost grows is asked."""
    from segkit.dataset import Data
    from segkit.labels import make_label_map
    from segkit.splits import Part, Split
    from segkit.staging import structures_in

    split = Split(tuple(Part(subject.name) for subject in staged), (), (), "all")
    by_name = {subject.name: subject for subject in staged}
    return Data(folder, by_name, split, make_label_map(structures_in(staged), None), [])


class Clock:
    """Seconds of one stage after the other; a stage that comes again adds up."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stage(self, name: str) -> None:
        """What ends now; without a name it does not count."""
        now = time.perf_counter()
        if name:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def slope_of(values: Mapping[int, float]) -> float:
    """By how much a value grows with each subject more, between the fewest and the most; 0 of one point."""
    least, most = min(values, default=0), max(values, default=0)
    return (values[most] - values[least]) / (most - least) if most > least else 0.0


def trend(found: Mapping[int, Mapping[str, float]], jobs: int) -> list[str]:
    """What the line through all but the largest number of subjects says of the largest one, beside what was seen."""
    numbers = sorted(n for n, of in found.items() if of)
    if len(numbers) < 3:
        return []
    *fewer, largest = numbers
    words = []
    for stage in STAGES:
        a_subject = slope_of({n: found[n][stage] for n in fewer})
        said = found[fewer[-1]][stage] + a_subject * (largest - fewer[-1])
        words.append(f"{stage} {found[largest][stage] / said:.2f}")
    text = (
        f"{largest} subjects with {jobs} worker{'s' * (jobs > 1)} took, as a part of what the line through fewer says: "
    )
    return [text + ", ".join(words) + "."]


def costs_of_a_subject(bench: Bench) -> dict | None:
    """Of one subject of full size, from the tables before: seconds of each stage, MB of disk and memory."""
    tables = {name: bench.store.kept(name, code_of(HERE / f"{name}.py")) for name in ("staging", "epoch", "scoring")}
    size = bench.sizes.scans[0]
    tables["predict"] = bench.store.kept(name_of(size), code_of(HERE / "predicting.py"))
    if not all(tables.values()):
        return None
    ours = {name: table["rows"][0] for name, table in tables.items()}
    if not all(row["seconds"] for row in ours.values()):
        return None
    slices = bench.sizes.subject[2]
    [subject] = bench.open(bench.subject_dir).staged.values()
    return {
        "staging": ours["staging"]["seconds"],
        "epoch": ours["epoch"]["seconds"] / (bench.sizes.epoch_steps * BATCH) * slices,
        "prediction": ours["predict"]["seconds"] / size[2] * slices,
        "scoring": ours["scoring"]["seconds"],
        "disk_mb": sum(path.stat().st_size for path in subject.folder.iterdir()) / 1e6,
        "peak_mb": max(row["peak_mb"] or 0 for row in ours.values()),
    }


def projection(of_one: Mapping[str, float], mb_a_subject: float) -> list[list[str]]:
    """The full data set in hours, GB of memory and of disk, from the costs of one of its subjects: a table."""
    numbers = {"staging": FULL, "epoch": FULL_TRAIN, "prediction": FULL_TEST, "scoring": FULL_TEST}
    texts = {"staging": "stage", "epoch": "an epoch of all slices", "prediction": "predict", "scoring": "score"}
    rows = [["", "subjects", "of one", "in all"]]
    for stage, number in numbers.items():
        seconds = of_one[stage]
        rows.append([texts[stage], f"{number:,}", f"{seconds:.2f} s", f"{seconds * number / 3600:.2f} h"])
    rows.append(
        ["store on disk", f"{FULL:,}", f"{of_one['disk_mb']:.1f} MB", f"{of_one['disk_mb'] * FULL / 1e3:.1f} GB"]
    )
    memory = of_one["peak_mb"] + mb_a_subject * (FULL - 1)
    rows.append(["memory at most", f"{FULL:,}", f"{of_one['peak_mb'] / 1024:.1f} GiB", f"{memory / 1024:.1f} GiB"])
    return rows
