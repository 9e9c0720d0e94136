"""The work of the notebooks from a shell: segkit VERB, or python -m segkit VERB. Each calls what a notebook calls."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from segkit.choices import FORMATS
from segkit.errors import Finding, SegkitError, printable
from segkit.settings import NO_AUGMENTATION, Scoring, Segmenting, TrainSettings

OUTPUTS = Path("outputs")

NewFolder = Annotated[Path, Positional, arg(metavar="FOLDER")]
DataDir = Annotated[Path, Positional, arg(metavar="DATA_DIR")]
Names = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")]
FormatNames = Annotated[
    tuple[str, ...],
    arg(
        metavar="FORMAT [FORMAT ...]",
        help=f"one or more of {'; '.join(f'{name} ({entry.text})' for name, entry in FORMATS.items())}.",
    ),
]


def phantom(folder: NewFolder, subjects: int = 16, seed: int = 0, detail: float = 1.0, jobs: int = 1) -> None:
    """Write synthetic CT subjects with all 117 structures, in the dataset layout, with a meta.csv.

    Args:
        folder: where to; subject folders that exist are never overwritten.
        subjects: how many. From three on there are train, val and test subjects.
        seed: the same seed gives the same files.
        detail: below 1 makes larger voxels, for quick tries.
        jobs: subjects made at the same time.
    """
    from segkit.phantom import write_phantoms

    write_phantoms(
        folder, subjects, seed, detail=detail, jobs=jobs, progress=lambda done, of: print(f"{done}/{of}", flush=True)
    )
    print(f"{folder}: {subjects} subjects")


def download(folder: NewFolder, small: bool = False, full: bool = False, keep_archive: bool = False) -> None:
    """Fetch the public TotalSegmentator data set (CC BY 4.0) from Zenodo, check and unpack it.

    Interrupted, it goes on where it stopped when it is run again.

    Args:
        folder: where to; a folder of its own.
        small: 102 subjects, 3.2 GB to fetch.
        full: 1,228 subjects, 23.6 GB to fetch.
        keep_archive: keep the archive beside the subjects.
    """
    from segkit.download import RELEASES
    from segkit.download import download as fetch

    if small == full:
        raise SegkitError("choose one of --small (3.2 GB) and --full (23.6 GB)")
    release = RELEASES["small" if small else "full"]
    fetch(folder, release, keep_archive=keep_archive)
    print(f"{folder}: {release.note}")


def audit(data_dir: DataDir, output_dir: Path = OUTPUTS, jobs: int = 1) -> None:
    """Read everything in a data set and report what is wrong or doubtful, as a table and as CSV. Changes nothing.

    Exits with code 1 if a subject cannot be used.

    Args:
        data_dir: folder of subjects.
        output_dir: where the table goes as CSV, a row a finding.
        jobs: subjects read at the same time.
    """
    from segkit import audit as auditing
    from segkit.runs import make_folder, time_stamp

    table = auditing.audit(data_dir, jobs)
    path = auditing.write_audit(table, make_folder(output_dir) / f"audit_{time_stamp()}.csv")
    print(_said(auditing.as_text(table)))
    print(path)
    if (table["severity"] == "error").any():
        sys.exit(1)


def stage(
    data_dir: DataDir,
    stage_dir: Path = OUTPUTS / "staged",
    exclude: Names = (),
    max_subjects: int | None = None,
    jobs: int = 1,
    strict: bool = False,
) -> None:
    """Read a data set once into the store that training reads from. What is there and unchanged is not read again.

    Args:
        data_dir: folder of subjects, s0000/ct.nii.gz and s0000/segmentations/<structure>.nii.gz.
        stage_dir: the store; outside of the data.
        exclude: names of subjects to leave out.
        max_subjects: at most so many subjects.
        jobs: subjects staged at the same time; each needs the memory of its CT and one mask.
        strict: stop at the first subject that cannot be used, instead of naming it and going on.
    """
    from segkit.dataset import open_data

    data = open_data(data_dir, stage_dir, max_subjects, exclude, jobs=jobs, strict=strict)
    _report(data.problems)
    print(f"{len(data.staged)} subjects, {len(data.label_map)} structures in {stage_dir}")


def train(
    settings: TrainSettings,
    data_dir: Annotated[Path | None, Positional, arg(metavar="[DATA_DIR]")] = None,
    output_dir: Path = OUTPUTS,
    stage_dir: Path | None = None,
    structures: Annotated[tuple[str, ...] | None, arg(metavar="NAME [NAME ...]")] = None,
    exclude: Names = (),
    max_subjects: int | None = None,
    jobs: int = 1,
    augment: bool = True,
    members: int = 1,
    resume: bool = False,
) -> None:
    """Train a network on a folder of subjects, after staging what is not staged yet.

    Checkpoints and the history go to the output folder; segkit evaluate and segkit predict find them there.

    On several GPUs: accelerate launch --multi_gpu -m segkit train ...; each step's slices are shared out over them.

    Args:
        settings: what is learned, and how.
        data_dir: folder of subjects; without it a phantom data set is made in the output folder.
        output_dir: files of an older run in it are moved to its runs/.
        stage_dir: the store; OUTPUT_DIR/staged by default.
        structures: learn only these, by the names of their files; all that the data have by default.
        exclude: names of subjects to leave out.
        max_subjects: at most so many subjects.
        jobs: subjects staged at the same time.
        augment: whether training slices are varied, as the settings of the augmentation say.
        members: train an ensemble of so many, with the seeds SEED, SEED + 1, ..., into member_1/ and so on.
        resume: go on with the interrupted or killed training in the output folder.
    """
    from segkit import ensemble
    from segkit.dataset import open_data, phantoms_in
    from segkit.networks import check_installed
    from segkit.progress import Progress
    from segkit.ranks import join_ranks, leave_ranks

    settings = (settings if augment else replace(settings, augmentation=NO_AUGMENTATION)).checked()
    ranks = join_ranks(settings.device)
    check_installed(settings.model)
    with ranks.first_goes_first():  # the others find everything staged
        if data_dir is None:
            print("no DATA_DIR: training on phantoms")
            data_dir = phantoms_in(output_dir, seed=settings.seed, jobs=jobs)
        stage_dir = stage_dir or output_dir / "staged"
        data = open_data(data_dir, stage_dir, max_subjects, exclude, structures, settings.seed, jobs, ranks.first)
    if ranks.first:
        _report(data.problems)

    def watch(folder: Path) -> Progress:
        return Progress(data, folder, settings.device)

    history = ensemble.train_members(data, settings, output_dir, members, watch, resume=resume, ranks=ranks)[-1]
    leave_ranks(ranks)
    if history.interrupted:
        sys.exit(130)  # what a shell expects of an interrupted command: nothing that needs the model follows


def evaluate(
    scoring: Scoring,
    output_dir: Path = OUTPUTS,
    data_dir: Path | None = None,
    stage_dir: Path | None = None,
    checkpoint: Path | None = None,
    threshold: float | None = None,
    batch_size: int = 8,
    max_subjects: int | None = None,
    device: str | None = None,
) -> None:
    """Predict and score the test subjects of a training run: tables, figures, and one page that shows them all.

    Args:
        scoring: what counts as found, and how distances are measured.
        output_dir: the folder of the training run; results go there too.
        data_dir: another data set than the run's own.
        stage_dir: the store; OUTPUT_DIR/staged by default.
        checkpoint: a file, or the folder of a run or of a shared model; by default the one with the best validation
            Dice, of each member where several were trained.
        threshold: a structure is where its probability exceeds this; by default what validated best for each.
        batch_size: slices predicted at a time.
        max_subjects: at most so many of the test subjects.
        device: cpu, cuda, cuda:1 or mps; the best there is by default.
    """
    from segkit import evaluation, reliability, report
    from segkit.checkpoints import load_checkpoints
    from segkit.dataset import open_run
    from segkit.inference import Predictor

    loaded = load_checkpoints(checkpoint or output_dir)
    data = open_run(
        output_dir, stage_dir or output_dir / "staged", data_dir, max_subjects, scoring.jobs, model=loaded[0]
    )
    _report(data.problems)
    predictor = Predictor.of(loaded, threshold, batch_size, device)
    kept, parts, split = output_dir / "predictions", data.split.test, data.split.test_name
    evaluated = evaluation.evaluate(predictor, data.staged, parts, split, kept, scoring)
    through = evaluation.evaluate_round_trip(data.staged, parts, split, data.label_map, predictor.target_shape, scoring)
    results = report.Report(evaluated, data, output_dir, kept)
    said = reliability.measure_reliability(predictor, data.staged, parts, progress=True)
    files = results.everything(through, [one.path for one in loaded], said, threshold)
    print(*files, report.headline(results.outcome), sep="\n")


def compare(
    tables: Annotated[tuple[Path, ...], Positional, arg(metavar="TABLE TABLE [TABLE ...]")],
    names: Names = (),
    measure: str = "dice",
    output_dir: Path = OUTPUTS,
) -> None:
    """Compare models by their evaluations on the same subjects: paired differences from the first.

    Args:
        tables: evaluation_results_<stamp>.csv of each, as `evaluate` wrote them.
        names: what to call them; the folder and stamp of each by default.
        measure: a column of the tables: dice, iou, nsd (surface Dice), hd95_mm, assd_mm, ...
        output_dir: where the CSV and the figures go.
    """
    from segkit import comparison, report
    from segkit.evaluation import load_scores

    if names and len(names) != len(tables):
        raise SegkitError(f"{len(names)} names for {len(tables)} tables: expected one each")
    names = names or tuple(f"{path.resolve().parent.name}/{path.stem[-15:]}" for path in tables)
    if len(set(names)) < len(names):
        raise SegkitError(f"two tables are called the same ({', '.join(names)}): give each a name of its own, --names")
    loaded = {name: load_scores(path) for name, path in zip(names, tables, strict=True)}
    files = report.write_comparison(comparison.compare(loaded, measure), names[0], measure, output_dir)
    print(*files, sep="\n")


def predict(
    source: Annotated[Path, Positional, arg(metavar="SCAN")],
    segmenting: Segmenting,
    out: Path = OUTPUTS / "segmentations",
    checkpoint: Annotated[tuple[Path, ...], arg(metavar="PATH [PATH ...]")] = (OUTPUTS,),
    format: FormatNames = ("nifti",),
    series: str | None = None,
    resume: bool = False,
    threshold: float | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> None:
    """Segment scans of your own; results have each scan's grid and open in the usual viewers.

    For education and research, not for diagnosis.

    Args:
        source: a NIfTI or NRRD file, a folder of them, a folder of subjects, or a folder of DICOM files.
        segmenting: how the scans are segmented.
        out: where to, a folder a scan.
        checkpoint: files, or folders of runs or shared models; several are averaged.
        series: the series UID, or its end, where a DICOM folder holds several.
        resume: leave out scans whose folder is there already.
        threshold: a structure is where its probability exceeds this; by default what validated best for each.
        batch_size: slices predicted at a time.
        device: cpu, cuda, cuda:1 or mps; the best there is by default.
    """
    from segkit.checkpoints import load_checkpoints
    from segkit.inference import Predictor
    from segkit.predicting import predict_scans
    from segkit.scans import find_scans

    sources = find_scans(source, series)
    loaded = [each for place in checkpoint for each in load_checkpoints(place)]
    predictor = Predictor.of(loaded, threshold, batch_size, device)
    failed = 0
    for outcome in predict_scans(predictor, sources, out, format, segmenting, resume=resume):
        _report(outcome.findings)
        print(outcome, *outcome.written, sep="\n", flush=True)
        failed += outcome.scan is None
        del outcome  # and its volumes, before the next scan is read
    if failed:
        raise SegkitError(f"{failed} of {len(sources)} scans could not be done, see above")


def share(
    folder: NewFolder,
    data_licence: str,
    output_dir: Path = OUTPUTS,
    checkpoint: Path | None = None,
    description: str = "",
) -> None:
    """Write a trained model for others: weights as safetensors, and a model card.

    Others give the folder as --checkpoint. No path of this machine and no name of a subject goes into it.

    Args:
        folder: where to; a new folder or an empty one.
        data_licence: of the training data, like "CC BY 4.0"; the weights are shared under the same terms.
        output_dir: the folder of the training run.
        checkpoint: a file, or the folder of another run; by default the one with the best validation Dice, of each
            member where several were trained.
        description: Markdown for the head of the model card.
    """
    from segkit.sharing import export_model

    print(*export_model(checkpoint or output_dir, folder, data_licence, description), sep="\n")


def demo(
    output_dir: Path = OUTPUTS,
    epochs: int = 7,
    slices_per_epoch: int = 4000,
    target_shape: tuple[int, int] = (64, 96),
    features: tuple[int, ...] = (16, 32, 64, 128),
) -> None:
    """Run both notebooks on phantoms, from nothing to scores and pictures, and print a summary.

    Args:
        output_dir: where everything lands.
        epochs: of the training notebook.
        slices_per_epoch: of the training notebook; twice as many as there are: validation takes less of the time.
        target_shape: smaller than the notebook's own and as wide as bodies are, so that two cores do it in minutes.
        features: half as wide as the notebook's own: more steps in the same time.
    """
    from segkit.demo import run_demo

    run_demo(
        output_dir,
        {
            "EPOCHS": epochs,
            "SLICES_PER_EPOCH": slices_per_epoch,
            "TARGET_SHAPE": list(target_shape),
            "FEATURES": list(features),
        },
    )


def check() -> None:
    """Verify the installation: versions, device, what it is fast at, and a small training step."""
    from segkit.check import check_installation

    check_installation()


def _report(problems: list[Finding]) -> None:
    for problem in problems:
        print(f"{problem.severity}: {problem}", file=sys.stderr)


def _say_on_one_line(message: Warning | str, *_: object) -> None:
    print(f"warning: {printable(str(message))}", file=sys.stderr)


def _said(text: object) -> str:
    """A message of several lines for a terminal: names of files in it may hold what moves its cursor."""
    return "\n".join(map(printable, str(text).split("\n")))


def main() -> None:
    """Run a verb. What is wrong with input, files or disk is printed as one line, with exit code 1."""
    warnings.showwarning = _say_on_one_line  # type: ignore[assignment]  # a person who runs a verb has no use for the line of code
    verbs = (phantom, download, audit, stage, train, evaluate, compare, predict, share, demo, check)
    try:
        tyro.extras.subcommand_cli_from_dict(
            {verb.__name__: verb for verb in verbs},
            prog="segkit" if Path(sys.argv[0]).stem == "segkit" else "python -m segkit",
            description=__doc__,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except BrokenPipeError:  # whoever read along, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (SegkitError, OSError) as error:
        sys.exit(f"segkit: {_said(error)}")
    except KeyboardInterrupt:
        print("segkit: interrupted", file=sys.stderr)
        sys.exit(130)  # what a shell expects


if __name__ == "__main__":
    main()
