import fnmatch
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from segkit import evaluation, summaries
from segkit.calibration import Reliability
from segkit.codes import encode
from segkit.dataset import Data
from segkit.errors import SegkitError
from segkit.pictures import occurring
from segkit.report import Report, headline, means_table
from segkit.report_page import Section, write_report_page
from segkit.runs import RUN_FILES
from segkit.splits import Part, Split


@pytest.fixture(scope="module")
def reported(phantom_data, tmp_path_factory):
    """Two phantoms whose prediction is the reference, a structure moved, one missed and one falsely found."""
    folder = tmp_path_factory.mktemp("report")
    names = list(phantom_data.staged)[:2]
    results = []
    for name in names:
        subject = phantom_data.staged[name]
        labels = subject.labels()
        masks = {structure: labels.mask(structure) for structure in ("liver", "spleen", "aorta", "prostate")}
        masks["liver"] = np.roll(masks["liver"], 1, axis=2)
        masks["spleen"] = np.zeros_like(masks["spleen"])
        masks["prostate"] = masks["prostate"] if masks["prostate"].any() else masks["aorta"]
        prediction = encode(masks.items(), subject.shape)
        evaluation.save_prediction(folder / "predictions", subject, prediction)
        results.append(evaluation.score_subject(name, "test", labels, prediction, subject.spacing_mm))
    evaluated = evaluation.Evaluation(
        pd.concat([each.scores for each in results], ignore_index=True),
        pd.concat([each.confusion for each in results], ignore_index=True),
    )
    split = Split((), (), tuple(Part(name) for name in names), "made for this test")
    data = Data(folder, phantom_data.staged, split, {"liver": 0}, [])
    report = Report(evaluated, data, folder, folder / "predictions")
    said = Reliability.of(np.array([[9.0, 3.0], [2.7, 2.4], [1.0, 2.0]]), np.array([0, 0.5, 1]))
    report.everything(evaluated, [folder / "checkpoint_epoch1.pth"], {"output": said, "probability": said})
    yield report
    plt.close("all")


def test_every_file_is_there_and_belongs_to_the_run(reported):
    assert len(reported.files) == len(set(reported.files)) == 15
    for path in reported.files:
        assert path.stat().st_size > 1000 or path.suffix == ".csv"
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in RUN_FILES), path.name  # moved with the run
        assert reported.stamp in path.name


def test_the_summary_is_json_without_nan_and_holds_the_means_of_all_protocols(reported):
    [path] = reported.output_dir.glob("evaluation_summary_*.json")
    summary = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert summary == reported.outcome
    means = {row["over"]: row for row in summary["means"]["segkit"] if row["measure"] == "dice"}
    assert means["structures"]["mean"] == summary["prediction"]["macro_dice"]
    assert summary["found_at_dice"] == 0.1 and summary["nsd_tolerance_mm"] == 3.0
    assert f"macro Dice {summary['prediction']['macro_dice']:.3f} (95 % interval" in headline(summary)


def test_the_report_shows_all_figures_and_tables_and_needs_no_other_file(reported):
    page = next(reported.output_dir.glob("report_*.html")).read_text()
    pictures = [path for path in reported.files if path.suffix == ".png"]
    assert page.count('src="data:image/png;base64,') == len(pictures) == 10
    assert headline(reported.outcome)[:40] in page and "not for diagnosis" in page
    assert page.count("<table>") == 5 and ">liver<" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_a_figure_that_is_drawn_again_stands_in_the_report_once(reported):
    before = list(reported.files)
    reported.ranking()
    reported.page()
    reported.report()
    assert reported.files == before
    page = next(reported.output_dir.glob("report_*.html")).read_text()
    assert page.count("<h2>Structure ranking</h2>") == 1


def test_the_report_has_the_thresholds_and_the_protocol_that_it_is_asked_for(reported):
    page = reported.report((0.123, 0.6), "nnunet").read_text()
    assert ">0.123</th>" in page and ">0.9</th>" not in page and "<h2>Means, protocol nnunet</h2>" in page
    page = reported.report().read_text()
    assert ">0.9</th>" in page and "<h2>Means, protocol segkit</h2>" in page


def test_of_the_ground_truth_no_more_is_shown_than_the_model_knows(reported, monkeypatch):
    """The label map of this run has the liver alone; the phantoms hold more than a hundred structures."""
    subject = next(iter(reported.data.staged.values()))
    truth = reported.layers(subject.name)["ground truth"]
    assert occurring(truth) == ["liver"] and np.array_equal(truth.mask("liver"), subject.labels().mask("liver"))
    drawn = []
    monkeypatch.setattr("segkit.pages.write_page", lambda path, figure: drawn.append(figure) or path)
    reported.page()
    assert [trace.name for trace in drawn[0].data if trace.legend == "legend"] == ["liver"]


def test_slices_that_trained_are_named_where_a_whole_subject_is_shown(reported):
    assert reported.whole(Part("s0")) == " (test split)"
    assert reported.whole(Part("s0", ((0, 8),))) == " (test split and the slices between, which trained)"
    assert "(test split)" in next(reported.output_dir.glob("3d_*.html")).read_text()


def test_a_report_that_is_mailed_tells_no_folders(reported):
    page = next(reported.output_dir.glob("report_*.html")).read_text()
    assert "Model: checkpoint_epoch1.pth." in page and str(reported.output_dir) not in page
    assert reported._name("/models/torso/weights.safetensors") == "torso/weights.safetensors"


def test_means_in_words(reported):
    table = means_table(reported.evaluated.scores).set_index("over")
    [row] = summaries.aggregate(reported.evaluated.scores, ["nsd"]).query("over == 'structures'").itertuples()
    assert table.loc["structures", "surface Dice"] == f"{row.mean:.3f} ({row.low:.3f} to {row.high:.3f})"
    far = table.loc["structures", "Hausdorff distance (mm)"].split()[0]  # tens of mm need no third decimal
    assert len(far.partition(".")[2]) == (1 if float(far) >= 10 else 3)
    free = means_table(reported.evaluated.scores, "totalsegmentator").set_index("over")
    assert free.loc["cases", "Dice"] != table.loc["cases", "Dice"]  # there a false alarm costs nothing
    assert list(table.index)[:3] == ["structures", "cases", "subjects"] and table.loc["subjects", "n"] == 2
    one = reported.evaluated.scores.query("subject == subject.iloc[0]")
    assert means_table(one).set_index("over").loc["structures", "Dice"].count("(") == 0  # one subject: no interval


def test_a_test_set_that_holds_nothing_has_no_score_and_says_so(phantom_data, tmp_path):
    empty = encode([("prostate", np.zeros((1, 1, 2)))], (1, 1, 2))
    alarm = encode([("prostate", np.array([[[0, 1]]]))], (1, 1, 2))
    evaluated = evaluation.score_subject("s0", "test", empty, alarm, (1, 1, 1))
    summary = Report(evaluated, phantom_data, tmp_path, tmp_path).summary(evaluated, [tmp_path / "x.pth"])
    assert summary["prediction"]["macro_dice"] is None and "macro Dice no score over" in headline(summary)


HOSTILE = "<img src=x onerror=document.title='taken'></td><script>document.title='taken'</script>"


def test_words_stay_words_in_a_browser_without_network_or_console_errors(reported, tab, tmp_path):
    table = pd.DataFrame({"structure": [HOSTILE], HOSTILE: [0.5], "none": [np.nan]})
    hostile = write_report_page(tmp_path / "a.html", HOSTILE, [HOSTILE], [Section(HOSTILE, HOSTILE, table=table)])
    for page, pictures in ((next(reported.output_dir.glob("report_*.html")), 10), (hostile, 0)):
        tab.goto(page.as_uri())
        tab.wait_for_timeout(300)
        assert tab.evaluate("[...document.images].filter(image => image.naturalWidth > 0).length") == pictures
    assert tab.title() == HOSTILE and tab.inner_text("td.text") == HOSTILE
    assert tab.evaluate("document.images.length + document.scripts.length") == 0


def test_a_subject_that_was_not_tested_is_refused(reported):
    with pytest.raises(SegkitError, match="SHOW_SUBJECT = 's9'"):
        reported.visualization("s9")
