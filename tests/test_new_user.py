"""What somebody meets who mistypes a path, a name or a number in a shell: a line that says what to do."""

import shutil
import sys

import nbformat
import pytest

import segkit.__main__
from segkit.demo import execute
from segkit.errors import SegkitError
from segkit.settings import TrainSettings
from segkit.training import train


@pytest.fixture(scope="module")
def place(phantom_dir, phantom_data, tmp_path_factory):
    """A working folder: data, a run in outputs/, an empty folder, a file, and a scan that is none."""
    folder = tmp_path_factory.mktemp("somewhere")
    shutil.copytree(phantom_dir, folder / "data")
    settings = TrainSettings(
        epochs=1, target_shape=(32, 32), features=(4, 8), slices_per_epoch=8, validation_slices=4, device="cpu"
    )
    train(phantom_data, settings, folder / "outputs", progress=False)
    (folder / "empty").mkdir()
    (folder / "afile").write_text("hello")
    (folder / "notes.nii.gz").write_text("hello")
    return folder


def said(monkeypatch, capsys, place, line):
    """The exit code of a command line, and what was printed; it ran in `place`."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["segkit", *line.split()])
    monkeypatch.setattr("warnings.showwarning", lambda *_: None)  # put back afterwards
    with pytest.raises(SystemExit) as stopped:
        segkit.__main__.main()
    code = stopped.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)


SCAN = "data/s0000/ct.nii.gz"
MISTAKES = {
    "train dta": "dta: no such folder",
    "train data/s0000": "found one subject itself: give its parent folder",
    "train afile": "afile: is a file",
    "train empty": "no subjects: expected folders like s0000/",
    "train data --epochs 0": "EPOCHS = 0: expected a whole number of 1 or more",
    "train data --target-shape 100 100": "give two multiples of 16",
    "train data --features 4 8 --structures livr": "STRUCTURES asks for livr",
    "train data --exclude s9999": "EXCLUDE names s9999",
    "train data --device gpu": "give cpu, cuda, cuda:1 or mps",
    "train data --init-checkpoint nothing.pth --features 4 8": "nothing.pth: no such checkpoint",
    "train data --stage-dir data/stage": "choose a folder outside",
    "train data --output-dir afile": "choose another",
    "train data --model unet3d --context 1": "set CONTEXT = 0",
    "stage data/s0000/ct.nii.gz": "is a file",
    "stage data --exclude s0000 s0001 s0002 s0003 s0004": "EXCLUDE leaves no subject",
    "audit data/s0000": "give its parent folder",
    "audit data --jobs 0": "JOBS = 0",
    "evaluate --output-dir empty": "no training run there; train first",
    "evaluate --output-dir afile": "afile: no readable checkpoint",
    "evaluate --checkpoint nothing.pth": "no such checkpoint",
    "evaluate --checkpoint afile": "afile: no readable checkpoint",
    "evaluate --threshold 2": "THRESHOLD = 2.0: expected a probability",
    "evaluate --data-dir nowhere": "nowhere: no such folder",
    "compare": "expected two or more tables",
    "compare no.csv other.csv": "no.csv: expected a table of scores",
    "compare afile afile --names one two": "expected the columns of evaluation_results_<stamp>.csv",
    "predict nothing.nii.gz": "no such file or folder; expected a .nii.gz",
    "predict afile": "neither NIfTI nor NRRD",
    "predict empty": "holds no scan",
    "predict notes.nii.gz --out o1": "1 of 1 scans could not be done",
    f"predict {SCAN} --format gif": "expected one or more of nifti, masks",
    f"predict {SCAN} --format dicom": "refers to the images of a DICOM series",
    f"predict {SCAN} --checkpoint nothing": "no such checkpoint",
    f"predict {SCAN} --checkpoint empty": "no training_history.json",
    f"predict {SCAN} --series 1.2": "chooses among DICOM series",
    f"predict {SCAN} --out afile": "afile: cannot be made a folder",
    f"predict {SCAN} --batch-size 0": "BATCH_SIZE = 0",
    "share shared --data-licence CC0-1.0 --output-dir empty": "no training_history.json",
    "share data --data-licence CC0-1.0": "give a new or an empty folder",
    "phantom afile": "afile: cannot be made a folder",
    "phantom p --subjects 0": "need 1 or more",
    "phantom p --seed -1": "a seed of 0 or more",
    "phantom p --jobs 0": "one job or more",
    "download d": "choose one of --small",
    "demo": "run the demo from a clone",
}


@pytest.mark.parametrize(("line", "expected"), MISTAKES.items())
def test_a_mistake_is_one_line_that_says_what_to_do(line, expected, place, monkeypatch, capsys):
    code, message = said(monkeypatch, capsys, place, line)
    assert code == 1 and message.startswith("segkit: ") and "\n" not in message, message
    assert expected in message, message
    assert not (place / "p").exists() and not (place / "shared").exists()


MISTYPED = {
    "": "Expected one of",
    "trian data": "Available subcommands",
    "train data --model Unet": "'attention_unet'",
    "train data --loss dcie": "'bce_dice'",
    "train data --epochs many": "--epochs",
    "train data --epoch 3": "--epochs INT",
    "train data --target-shape 128": "Expected 2 values",
    "predict": "SCAN",
    "share shared": "--data-licence",
}


@pytest.mark.parametrize(("line", "expected"), MISTYPED.items())
def test_a_mistyped_command_shows_what_there_is(line, expected, place, monkeypatch, capsys):
    code, message = said(monkeypatch, capsys, place, line)
    assert code == 2 and expected in " ".join(message.split()) and "Traceback" not in message, message


def test_a_missing_papermill_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(SegkitError, match=r"pip install 'segkit\[notebooks\]'"):
        execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {})


def test_a_cell_that_fails_is_one_line_that_names_the_notebook(tmp_path):
    cell = nbformat.v4.new_code_cell("print('before')\nraise OSError('no such scan')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    with pytest.raises(SegkitError, match=r"b\.ipynb: cell 1 failed: OSError: no such scan") as caught:
        execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {})
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line(place, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "outputs/x")

    monkeypatch.setattr("segkit.dataset.open_data", full)
    assert said(monkeypatch, capsys, place, "stage data") == (
        1,
        "segkit: [Errno 28] No space left on device: 'outputs/x'",
    )


def test_an_interrupt_ends_as_a_shell_expects(place, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("segkit.dataset.open_data", interrupted)
    assert said(monkeypatch, capsys, place, "stage data") == (130, "segkit: interrupted\n")
