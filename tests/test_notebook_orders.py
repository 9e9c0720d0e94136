"""The cells of both notebooks as people run them: again, out of order, after a change, and after the stop button."""

import json

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SMALL = {
    "PHANTOM_SUBJECTS": 4, "PHANTOM_DETAIL": 0.35, "EPOCHS": 1, "TARGET_SHAPE": (32, 32), "FEATURES": (4, 8),
    "SLICES_PER_EPOCH": 16, "VALIDATION_SLICES": 8, "DEVICE": "cpu", "JOBS": 1,
}  # fmt: skip
PICTURES = "image/png"


class Opened(NotebookClient):
    """A notebook with a running kernel, whose cells are run by the words of their section."""

    def __init__(self, name: str, **settings):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        super().__init__(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}})
        self.settings, self.stop_at = settings, ""
        self.sections: dict[int, list[int]] = {}  # number of a section -> places of its code cells
        number = 0
        for place, cell in enumerate(notebook.cells):
            if cell.cell_type == "markdown" and cell.source.startswith("## "):
                number = int(cell.source.split()[1].rstrip("."))
            if cell.cell_type == "code":
                self.sections.setdefault(number, []).append(place)

    def run(self, *sections: int, stop_at: str = "") -> str:
        """Run sections one after the other, all by default, and return what they print.

        stop_at: at its first output of this kind the stop button is pressed.
        """
        self.stop_at, printed = stop_at, []
        for place in [place for section in sections or self.sections for place in self.sections[section]]:
            cell = self.execute_cell(self.nb.cells[place], place)
            printed += [output.text for output in cell.outputs if output.output_type == "stream"]
            if "parameters" in cell.metadata.get("tags", []):
                self.change()
        return "".join(printed)

    def change(self, **settings: object) -> None:
        """Other values in the configuration cell, and that cell run; the cells after it do not run."""
        self.settings |= settings
        lines = [f"{name} = {value!r}" for name, value in self.settings.items()]
        self.execute_cell(nbformat.v4.new_code_cell("\n".join(lines)), 0)

    def pictures(self, section: int) -> int:
        """How many pictures the outputs of a section hold."""
        outputs = [output for place in self.sections[section] for output in self.nb.cells[place].outputs]
        return sum(PICTURES in output.get("data", {}) for output in outputs)

    def process_message(self, message, cell, cell_index):
        if self.stop_at and message["msg_type"] == self.stop_at:
            self.stop_at = ""
            self.km.provisioner.process.send_signal(2)  # SIGINT, as the stop button
        return super().process_message(message, cell, cell_index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def training(folder):
    """The training notebook after a run from top to bottom."""
    notebook = Opened("train_unet", OUTPUT_DIR=str(folder), **SMALL)
    with notebook.setup_kernel():
        notebook.run()
        yield notebook


def stored(folder, name: str):
    return json.loads((folder / name).read_text())


def test_a_changed_setting_counts_without_the_cells_between(training, folder):
    training.change(EPOCHS=2, BATCH_SIZE=4)
    assert "epoch 2/2: loss" in training.run(9)
    assert stored(folder, "settings.json")["batch_size"] == 4
    assert len(stored(folder, "training_history.json")["epochs"]) == 2
    training.change(EPOCHS=1, AUGMENT=False)
    training.run(8, 9, 10, 11)
    assert stored(folder, "settings.json")["augmentation"]["rotation_degrees"] == 0
    assert training.pictures(9) == 2 and training.pictures(11) == 1
    training.change(AUGMENT=True)


def test_training_on_data_that_the_settings_no_longer_name_is_refused(training, folder):
    before = stored(folder, "split.json")
    left_out = before["train"][0]["subject"]
    training.change(EXCLUDE=[left_out])
    with pytest.raises(CellExecutionError, match=r"changed since section 7 was run: EXCLUDE = \['s0.*it was \[\]"):
        training.run(9)
    assert stored(folder, "split.json") == before  # the run that was there is still there
    training.run(7, 8, 9)
    assert left_out not in str(stored(folder, "split.json")["train"])
    training.change(EXCLUDE=[])
    training.run(7)


def test_another_output_folder_needs_nothing_else(training, folder, tmp_path):
    history = stored(folder, "training_history.json")
    training.change(OUTPUT_DIR=str(tmp_path / "other"))
    training.run(9, 11)
    assert (tmp_path / "other" / "checkpoint_epoch1.pth").is_file()
    assert stored(folder, "training_history.json") == history
    training.change(OUTPUT_DIR=str(folder))


@pytest.mark.parametrize("moment", ["display_data", "update_display_data"])
def test_after_the_stop_button_one_goes_on(training, folder, moment):
    """Stopped while its first bar is shown, in epoch 1; and when the figure of epoch 2 is drawn."""
    training.change(EPOCHS=500, RESUME=False)
    assert "what was learned is kept, RESUME = True goes on" in training.run(9, stop_at=moment)
    training.run(10, 11)
    assert training.pictures(11) == 1
    kept = stored(folder, "training_history.json")["epochs"]
    whole = [row for row in kept if not row.get("interrupted")]
    training.change(EPOCHS=len(whole) + 1, RESUME=True)
    assert f"epoch {len(whole) + 1}/{len(whole) + 1}: loss" in training.run(9)
    after = stored(folder, "training_history.json")["epochs"]
    assert after[: len(whole)] == whole and len(after) == len(whole) + 1
    assert "nothing to go on with" in training.run(9)
    assert stored(folder, "training_history.json")["epochs"] == after
    training.run(10, 11)
    training.change(EPOCHS=1, RESUME=False)


def test_the_analysis_runs_again_backwards_and_after_changes(training, folder):
    training.run(6, 7, 9)
    with (
        notebook := Opened("segmentation_detection_analysis", OUTPUT_DIR=str(folder), DEVICE="cpu", JOBS=1)
    ).setup_kernel():
        notebook.run()
        for section in (17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4):
            notebook.run(section)
        [first] = folder.glob("report_*.html")
        printed = notebook.run(18).splitlines()
        assert len(printed) == len(set(printed)) + 1  # the report, and then all files once
        assert first.read_text().count("<h2>Structure ranking</h2>") == 1
        # what the notebook says is of one evaluation: the scores and the pictures below follow a new one
        notebook.change(DETECTED_DICE=0.9)
        notebook.run(3, 5, 8, 18)
        newest = max(folder.glob("evaluation_results_*.csv"))
        assert set(pd.read_csv(newest)["found_at_dice"]) == {0.9}
        scan = next(folder.glob("phantoms_*/s*/ct.nii.gz"))
        notebook.change(OWN_SCAN=str(scan), FORMATS=("csv",))
        for _ in range(2):
            assert f"{scan.parent.name}_structures.csv" in notebook.run(19)
        training.run(9)
        with pytest.raises(CellExecutionError, match=r"changed since section 2 was run: .*split.json was written anew"):
            notebook.run(3)
        notebook.run(2, 3, 4, 14)
