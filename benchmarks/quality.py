"""How good a model is after the same time, and after the same number of slices: unseen subjects, or slabs left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.sides import ROOT, Side, Taken
from benchmarks.tables import Row, Table, code_of
from benchmarks.trainings import ADAM, BATCHES, FEATURES, ITERATIONS, SHAPES

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment
    from segkit.dataset import Data

SEGKIT, HERE = ROOT / "segkit", ROOT / "benchmarks"


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
    rows.append(_row(f"nnU-Net's network, loss and augmentation with Adam at {ADAM:g}, {minutes:g} minutes", "peer",
                     run.peer(ADAM) if bench.peers else peer))  # fmt: skip
    if slices:
        rows.append(_row(f"segkit, the slices that nnU-Net saw in {minutes:g} minutes", "segkit",
                         run.segkit("slices", slices=slices)))  # fmt: skip
        rows.append(_row("textbook, as many slices", "peer", earlier(textbook)))
    for voter, score in run.voters().items():
        rows.append(Row(voter, "peer", score=score))
    rows.append(Row("the reference, resampled to segkit's input size and back", "floor", score=run.resampled()))
    title = "unseen phantoms" if name == "phantoms" else "slabs left out of one scan"
    return Table(f"quality_{name}", f"Quality, {title}", _what(bench, name), rows, _notes(name, peer))


def _what(bench: Bench, name: str) -> str:
    s = bench.sizes
    data = (
        f"{s.phantoms} phantoms (detail {s.detail:g}), trained on as their meta.csv says, scored on the unseen ones"
        if name == "phantoms"
        else f"One scan ({bench.data_name}), trained on slabs of 8 slices in turn, scored on the slabs left out"
    )
    return (
        f"{data}. Macro Dice on the scans' own grids, counted by segkit for all sides against the same full masks. "
        f"Channels begin at {FEATURES[0]} and batches have {BATCHES[name]} slices on all sides. Seconds are of the "
        "training alone."
    )


def _notes(name: str, peer: Taken) -> list[str]:
    notes = [
        "nnU-Net runs by nnUNetv2_plan_and_preprocess, nnUNetv2_train and nnUNetv2_predict. Its plan is its own but "
        f"for the batch of {BATCHES[name]} and channels that begin at {FEATURES[0]} (its own are larger: slower "
        f"steps, and nothing learned in this time). Epochs have {ITERATIONS} iterations instead of 250, so that its "
        "learning rate falls to zero in time; its trainer is the one without mirroring, since structures are left and "
        "right. Scores are of checkpoint_final.",
        "Its score after so few minutes is real (the labels that it learns from, read back and counted alike, score "
        "1.000 where masks do not overlap, 0.992 on phantoms), and no judgement of nnU-Net: its SGD at 0.01 needs many "
        "thousand steps before it learns anything, and takes 250,000. "
        "The row with Adam has its network, loss and augmentation, on patches of half its size, and shows what these "
        "learn in this time.",
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
        if found["learnable"] < found["structures"]:
            words.append(f"{found['score_of_learnable']:.3f} over the {found['learnable']} that the slabs of both hold")
    return Row(side, kind, found.get("seconds"), None, taken.peak_mb, taken.device_mb, found.get("score"),
               "; ".join(words))  # fmt: skip


def earlier(taken: Taken) -> Taken:
    """The same training at its earlier checkpoint."""
    found = taken.found.get("earlier", {})
    return replace(taken, found=found, problem="" if found else "it did not see as many in its time")


class _Trainings:
    """The sides of one data set, each in a process of its own and kept when it is done."""

    def __init__(self, bench: Bench, name: str, parameters: Mapping):
        self.bench, self.name, self.parameters = bench, name, parameters

    def segkit(self, which: str, slices: int | None = None) -> Taken:
        return self._kept(which, "segkit", {**self.parameters, "which": which, "slices": slices,
                                            "run": str(self.bench.work / f"run_{self.name}_{which}")})  # fmt: skip

    def peer(self, adam: float | None = None) -> Taken:
        bench, which = self.bench, "nnunet" if adam is None else "nnunet_adam"
        home = {"home": str(bench.work / f"{which}_{self.name}"), "python": bench.peers, "threads": bench.threads}
        return self._kept(which, "nnunet", {**self.parameters, **home, "adam": adam})

    def _kept(self, which: str, function: str, parameters: Mapping) -> Taken:
        side = Side(which, f"benchmarks.trainings:{function}", parameters, "peer", rounds=1, cold=True, at_home=True)

        def work() -> dict:
            taken = self.bench.turns([side], 1, seconds=7200)[which]
            if taken.problem:
                raise RuntimeError(taken.problem)
            return vars(taken)

        # nnU-Net learns the same whatever segkit's code is, which only reads and scores for it
        code = [path for path in code_of(HERE / "trainings.py") if function == "segkit" or path != SEGKIT]
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

        return self.bench.store.once(f"quality_{self.name}_voters", work, code_of(HERE / "voting.py"))

    def resampled(self) -> float:
        def work() -> float:
            from segkit import evaluation, summaries

            data = self._data()
            table = evaluation.evaluate_round_trip(
                data.staged, data.split.test, data.split.test_name, data.label_map, SHAPES[self.name], progress=False
            )
            return summaries.summarize(table.scores)["macro_dice"]

        return self.bench.store.once(f"quality_{self.name}_resampled", work, [SEGKIT])

    def _data(self) -> Data:
        return self.bench.open(Path(self.parameters["data_dir"]))
