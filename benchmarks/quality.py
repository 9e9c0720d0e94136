"""How good a model is after the same time, and after the same number of slices: unseen subjects, or slabs left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import nnunet as commands
from benchmarks.sides import ROOT, Side, Taken
from benchmarks.tables import Row, Table

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment
    from segkit.dataset import Data
    from segkit.settings import TrainSettings

SEGKIT, HERE = ROOT / "segkit", ROOT / "benchmarks"
BATCH = 8
ITERATIONS = 25
"""Of an epoch of nnU-Net's; its usual 250 would not end in time."""
FEATURES = (16, 32, 64, 128)
SHAPES = {"torso": (112, 128), "phantoms": (64, 96)}
STRONG = {
    "rotation_degrees": 20, "scale": 0.2, "elastic_mm": 8, "gamma": 0.3, "blur_pixels": 0.7, "intensity_scale": 0.15,
    "intensity_shift_hu": 30, "noise_hu": 25,
}  # fmt: skip
"""Augmentation where one scan is all there is: docs/learning.md."""


def measure(bench: Bench, name: str) -> Table:
    """name: torso or phantoms. Each training is kept by itself, so that an interrupted run goes on after it."""
    minutes = bench.sizes.minutes
    folder = bench.torso_dir if name == "torso" else bench.phantom_dir
    common = {"data_dir": str(folder), "stage_dir": str(bench.work / "staged"), "name": name, "device": bench.device}
    run = _Trainings(bench, name, {**common, "seconds": 60 * minutes})
    peer = run.peer() if bench.peers else Taken(problem="left out: there is no environment of the peers")
    slices = peer.found.get("slices")
    ours = run.segkit("time")
    textbook = run.segkit("textbook", slices=slices)
    rows = [
        _row(f"segkit, {minutes:g} minutes", "segkit", ours),
        _row(f"nnU-Net 2D, {minutes:g} minutes", "peer", peer),
        _row(f"textbook, {minutes:g} minutes", "peer", textbook),
    ]
    if slices:
        rows.append(_row(f"segkit, the slices that nnU-Net saw in {minutes:g} minutes", "segkit",
                         run.segkit("slices", slices=slices)))  # fmt: skip
        rows.append(_row("textbook, as many slices", "peer", replace_found(textbook, "earlier")))
    for voter, score in run.voters().items():
        rows.append(Row(voter, "peer", score=score))
    rows.append(Row("the reference itself through segkit's input size", "floor", score=run.ceiling()))
    title = "unseen phantoms" if name == "phantoms" else "slabs left out of one scan"
    return Table(f"quality_{name}", f"Quality, {title}", _what(bench, name), rows, _notes(bench, name, peer))


def _what(bench: Bench, name: str) -> str:
    s = bench.sizes
    data = (
        f"{s.phantoms} phantoms (detail {s.detail:g}), trained on as their meta.csv says, scored on the unseen ones"
        if name == "phantoms"
        else f"One scan ({bench.data_name}), trained on slabs of 8 slices in turn, scored on the slabs left out"
    )
    return (
        f"{data}. Macro Dice on the scans' own grids, counted by segkit for all sides against the same full masks. "
        f"Channels begin at {FEATURES[0]} and batches have {BATCH} slices on all sides. Seconds are of the training "
        "alone."
    )


def _notes(bench: Bench, name: str, peer: Taken) -> list[str]:
    notes = [
        "nnU-Net runs by nnUNetv2_plan_and_preprocess, nnUNetv2_train and nnUNetv2_predict. Its plan is its own but "
        f"for the batch of {BATCH} and channels that begin at {FEATURES[0]} (its own are larger: slower steps, and "
        f"nothing learned in this time). Epochs have {ITERATIONS} iterations instead of 250, so that its learning rate "
        "falls to zero in time; its trainer is the one without mirroring, since structures are left and right. Scores "
        "are of checkpoint_final.",
        "Textbook: plain BCE from default weights, batch normalisation, every slice equally "
        "often, no augmentation, a constant learning rate; segkit's engine, precision and thresholds, which help it.",
    ]
    if name == "phantoms":
        notes.append(
            "nnU-Net learns one label a voxel: where masks of phantoms overlap, the later class overwrites the earlier "
            "one in what it learns from, as in TotalSegmentator's own conversion."
        )
    else:
        notes.append("The masks of the torso do not overlap. nnU-Net gets each slab as a case of its own.")
    if peer.found:
        found = peer.found
        notes.append(
            f"nnU-Net: plan and preprocess {found['prepare_s']:.0f} s, its command for training "
            f"{found['train_s']:.0f} s in all, prediction {found['predict_s']:.0f} s; patches of {found['patch']} "
            f"pixels, {found['levels']} levels."
        )
    return notes


def _row(side: str, kind: str, taken: Taken) -> Row:
    found = taken.found
    words = [taken.problem] if taken.problem else []
    if found:
        words += [f"{found['slices']:,} slices seen", f"{found['above']} of {found['structures']} structures above 0.5"]
    return Row(side, kind, found.get("seconds"), None, taken.peak_mb, taken.device_mb, found.get("score"),
               "; ".join(words))  # fmt: skip


def replace_found(taken: Taken, key: str) -> Taken:
    """The same training at another of its checkpoints."""
    return replace(taken, found=taken.found.get(key) or {}, problem="" if taken.found.get(key) else "not reached")


class _Trainings:
    """The sides of one data set, each in a process of its own and kept when it is done."""

    def __init__(self, bench: Bench, name: str, parameters: Mapping):
        self.bench, self.name, self.parameters = bench, name, parameters

    def segkit(self, which: str, slices: int | None = None) -> Taken:
        return self._kept(which, "segkit", [SEGKIT], {**self.parameters, "which": which, "slices": slices,
                                            "run": str(self.bench.work / f"run_{self.name}_{which}")})  # fmt: skip

    def peer(self) -> Taken:
        bench = self.bench
        home = {"home": str(bench.work / f"nnunet_{self.name}"), "python": bench.peers, "threads": bench.threads}
        return self._kept("nnunet", "nnunet", commands.CODE, {**self.parameters, **home})

    def _kept(self, which: str, function: str, code: list[Path], parameters: Mapping) -> Taken:
        side = Side(which, f"benchmarks.quality:{function}", parameters, "peer", rounds=1, cold=True, at_home=True)

        def work() -> dict:
            taken = self.bench.turns([side], 1, seconds=7200)[which]
            if taken.problem:
                raise RuntimeError(taken.problem)
            return vars(taken)

        try:
            return Taken(**self.bench.store.once(f"quality_{self.name}_{which}", work, code))
        except RuntimeError as error:
            return Taken(problem=str(error))

    def voters(self) -> dict[str, float]:
        def work() -> dict[str, float]:
            from benchmarks.voting import FRAME, headline, voters

            data = self._data()
            # of a scan cut into slabs a cell has to hold slices of both kinds of them
            total = max(subject.shape[0] for subject in data.staged.values())
            frame = FRAME if self.name == "phantoms" else (max(1, total // 16), *FRAME[1:])
            return {name: headline(data, voter)["macro_dice"] for name, voter in voters(data, frame).items()}

        return self.bench.store.once(f"quality_{self.name}_voters", work, [SEGKIT, HERE / "voting.py"])

    def ceiling(self) -> float:
        def work() -> float:
            from segkit import evaluation, summaries

            data = self._data()
            table = evaluation.evaluate_round_trip(
                data.staged, data.split.test, data.split.test_name, data.label_map, SHAPES[self.name], progress=False
            )
            return summaries.summarize(table.scores)["macro_dice"]

        return self.bench.store.once(f"quality_{self.name}_ceiling", work, [SEGKIT])

    def _data(self) -> Data:
        return self.bench.open(Path(self.parameters["data_dir"]))


def settings_of(name: str, which: str, device: str | None) -> TrainSettings:
    """The recipe of docs/learning.md for one scan, that of make demo for phantoms, or the textbook's."""
    from segkit.settings import NO_AUGMENTATION, TrainSettings, make_augmentation

    base = TrainSettings(
        epochs=1, batch_size=BATCH, learning_rate=2e-3, target_shape=SHAPES[name], features=FEATURES, device=device,
        augmentation=make_augmentation(True, STRONG if name == "torso" else None), keep_checkpoints=None,
    )  # fmt: skip
    if which != "textbook":
        return base
    return replace(base, loss="textbook", norm="batch", balance=0.0, augmentation=NO_AUGMENTATION,
                   schedule="constant", learning_rate=1e-3, validation_slices=32)  # fmt: skip


def segkit(
    data_dir: str, stage_dir: str, name: str, which: str, run: str, seconds: float, slices: int | None,
    device: str | None,
) -> Callable[[], dict]:  # fmt: skip
    """Train for `seconds` (textbook, time) or on `slices` (slices), then score the unseen part."""
    from benchmarks.learning import seconds_a_step
    from segkit import training
    from segkit.dataset import open_data

    data = open_data(data_dir, stage_dir, progress=False)
    settings = settings_of(name, which, device)
    validating, validate = [], training.validate

    def timed(*arguments, **named):
        started = time.perf_counter()
        result = validate(*arguments, **named)
        validating.append(time.perf_counter() - started)
        return result

    training.validate = timed

    def training_seconds(rows: list[dict]) -> float:
        return sum(row["seconds"] for row in rows) - sum(validating[: len(rows)])

    def work() -> dict:
        wanted = slices if which == "slices" else BATCH * max(1, round(seconds / seconds_a_step(data, settings)))
        # of a constant learning rate the model on the way is the one of a shorter training
        part = slices if which == "textbook" and slices and slices < wanted else wanted
        quarter = max(BATCH, part // 4 // BATCH * BATCH) if part < wanted else wanted
        chosen = replace(settings, slices_per_epoch=quarter, epochs=max(1, round(wanted / quarter)))
        history = training.train(data, chosen, run, progress=False)
        found = {**scored(data, Path(run) / f"checkpoint_epoch{len(history)}.pth"), "slices": quarter * len(history)}
        if part < wanted and len(history) > 4:
            found["earlier"] = {**scored(data, Path(run) / "checkpoint_epoch4.pth"), "slices": 4 * quarter,
                                "seconds": training_seconds(history[:4])}  # fmt: skip
        return {**found, "seconds": training_seconds(history)}

    return work


def scored(data: Data, checkpoint: Path) -> dict:
    from segkit.checkpoints import load_checkpoints
    from segkit.inference import Predictor

    return score_of(data, Predictor.of(load_checkpoints(checkpoint)))


def score_of(data: Data, predictor) -> dict:
    """Macro Dice of the test part, and how many structures reach 0.5."""
    from segkit import evaluation, summaries

    evaluated = evaluation.evaluate(predictor, data.staged, data.split.test, data.split.test_name, progress=False)
    summary, table = summaries.summarize(evaluated.scores), summaries.per_structure(evaluated.scores)
    return {
        "score": summary["macro_dice"],
        "structures": summary["structures"],
        "above": int((table["dice"] > 0.5).sum()),
    }


def nnunet(
    data_dir: str, stage_dir: str, name: str, seconds: float, device: str | None, home: str, python: str, threads: int
) -> Callable[[], dict]:
    """nnU-Net's commands from raw data to a score. Its training lasts `seconds` by the time of its own epochs."""
    from benchmarks import inputs
    from benchmarks.nnunet import NnUNet
    from segkit.dataset import open_data

    data = open_data(data_dir, stage_dir, progress=False)
    prepared = NnUNet(Path(home), python, threads, device or "cpu")
    structures = inputs.write_single_labels(data, prepared.raw, {"Tr": data.split.train, "Ts": data.split.test})

    def work() -> dict:
        prepare_s = prepared.prepare({"batch_size": BATCH})
        plan = prepared.plan()
        levels = plan["architecture"]["arch_kwargs"]["n_stages"]
        plan["architecture"]["arch_kwargs"]["features_per_stage"] = [
            min(FEATURES[0] * 2**level, 2 * FEATURES[-1]) for level in range(levels)
        ]
        prepared.configure({"batch_size": BATCH, "architecture": plan["architecture"]})
        step = prepared.train(3, 5) / 6  # an epoch of it has a step of validation, too
        epochs = max(2, round(seconds / step / (ITERATIONS + 1)))
        started = time.perf_counter()
        epoch = prepared.train(epochs, ITERATIONS)
        train_s = time.perf_counter() - started
        predictions = Path(home) / "predictions"
        predict_s = prepared.predict(prepared.raw / "imagesTs", predictions)
        return {
            **score_of(data, Kept(data, predictions, structures)),
            "seconds": epoch * epochs, "slices": epochs * ITERATIONS * BATCH, "prepare_s": prepare_s,
            "train_s": train_s, "predict_s": predict_s, "levels": levels,
            "patch": " x ".join(map(str, plan["patch_size"])),
        }  # fmt: skip

    return work


class Kept:
    """nnU-Net's label files as predictions; `predict` as `inference.Predictor` has it."""

    def __init__(self, data: Data, folder: Path, structures: list[str]):
        self.parts = {part.subject: part for part in data.split.test}
        self.data, self.folder, self.structures = data, folder, structures

    def predict(self, subject):
        import nibabel as nib

        from benchmarks.inputs import cases_of
        from benchmarks.voting import single_labels

        codes = np.zeros(subject.shape, np.uint8)
        for case, (start, stop) in cases_of(self.data, self.parts[subject.name]).items():
            image = nib.load(self.folder / f"{case}.nii.gz")
            codes[start:stop] = np.asanyarray(image.dataobj).T
        return single_labels(codes, self.structures)
