"""Faults: names made to harm, from every kind of file, on their way into folders, tables, pages, shells and terminals.

A name is refused, with its file named, or changed into one that is harmless everywhere; what is accepted is written in
every format and looked at: no file outside, no formula in a table, no script in a page, nothing fetched.
"""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT, write_nifti, write_subject
from damage import try_all
from dicom_files import make_series, save
from hypothesis import strategies as st
from nbconvert import HTMLExporter
from test_faults_damaged import LABELS, SHAPE, a_subject, save_network, scores_table
from test_faults_damaged_scans import AFFINE, HU
from test_faults_hostile import label_table
from test_notebooks import QUICK

from segkit import evaluation, exports, labels, report, staging
from segkit.__main__ import main
from segkit.audit import audit, write_audit
from segkit.checkpoints import load_checkpoint
from segkit.codes import CodeVolume
from segkit.errors import Findings, SegkitError
from segkit.formats.label_image import embedded_names, read_names
from segkit.formats.mask_files import find_mask_files
from segkit.formats.nnunet import find_cases
from segkit.inference import Segmentation
from segkit.runs import write_csv
from segkit.scans import find_scans, read_scan
from segkit.seen import read_split
from segkit.stores import sealed

MARK = "segkit_was_here"
SCRIPT = f"<script>document.title='{MARK}'</script>"
NAMES = (
    "..", ".", "", "../x", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:\\x", "~/x", "a\0b",
    "liver/../x", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=HYPERLINK(\"http://x\")",
    "=cmd|' /C calc'!A0", "'=1", SCRIPT, f"</script>{SCRIPT}", f"<img src=x onerror=\"document.title='{MARK}'\">",
    "<b>x</b>", "&lt;b&gt;", "\"><x>", "javascript:alert(1)", "' onload='x", f"$(touch {MARK})", f"`touch {MARK}`",
    f"; touch {MARK}", f"| touch {MARK}", f"&& touch {MARK}", "-rf", "--help", "*", "?", "$HOME", "%PATH%", "\x1b[2J",
    "\x1b]0;x\x07", "\x08x", "\x7f", "\u202egnp", "\u200b", "\ufeff", "\u2028", "\ud800", "x" * 101, "x" * 300,
    "肝" * 90, "_x", " ", "\u00a0", "{{x}}", "${x}", "%s%n", "#x", ";", ",", "a;b", "a,b", "a\"b", "a'b", "a\nb",
    "```", "# x", "[x](http://x)", "![x](http://x)", "$\\frac$", "|x|",
)  # fmt: skip
ACCEPTED = ("liver", "a+b", "a-b", "a.b", "1", "é", "肝臓", "Ñandú_1", "a..b", "e1", "1e5", "NaN", "null", "True")


def harmless(name: str) -> bool:
    """Whether a name is harmless as a file, a cell, markup, a shell's word; written anew, without segkit's own rule."""
    first_and_rest = name[:1].isalnum() and all(letter.isalnum() or letter in "_.+-" for letter in name)
    # letters of scripts that write vowels as marks
    first_and_rest = first_and_rest or bool(re.fullmatch(r"[^\W_][\w.+-]*", name))
    return first_and_rest and len(name) <= 100 and len(name.encode()) <= 200 and name.isprintable()


# --- from every kind of file: what makes a file with the name in it, and reads the names back


def in_mask_files(folder: Path, name: str):
    path = folder / f"{name}.nii.gz"
    path.touch()
    return path.name, list(find_mask_files(folder, "s0").masks)


def in_scan_files(folder: Path, name: str):
    path = folder / f"{name}.nii.gz"
    path.touch()
    return path.name, [source.name for source in find_scans(path)]


def in_dicom_folders(folder: Path, name: str):
    save(make_series(HU[..., :1], AFFINE), folder / name)
    return name, [source.name for source in find_scans(folder / name)]


def in_label_tables(folder: Path, name: str):
    from xml.sax.saxutils import escape

    path = label_table(
        f'<LabelTable><Label Key="1">{escape(name)}</Label></LabelTable>'.encode(errors="surrogatepass"), folder
    )
    from segkit.formats.label_image import numbers_of

    return path.name, list(numbers_of(embedded_names(path, "s0").items(), str(path)))


def in_labels_json(folder: Path, name: str):
    (folder / "labels.json").write_text(json.dumps({name: 1}))
    return "labels.json", list(read_names(folder / "labels.json"))


def in_nnunet(folder: Path, name: str):
    write_nifti(folder / "imagesTr" / "case_0000.nii.gz", np.zeros(SHAPE, np.int16))
    write_nifti(folder / "labelsTr" / "case.nii.gz", np.zeros(SHAPE, np.uint8))
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {name: 1}}))
    return "dataset.json", [name for case in find_cases(folder) for name in case.labels.structures]


def in_label_map(folder: Path, name: str):
    (folder / "label_map.json").write_text(json.dumps({name: 0}))
    return "label_map.json", list(labels.load_label_map(folder / "label_map.json"))


def in_split(folder: Path, name: str):
    parts = [{"subject": name, "slabs": None}]
    content = {"data_dir": "x", "ct_bytes": {}, "source": "x", "train": parts, "val": parts, "test": parts}
    (folder / "split.json").write_text(json.dumps(content))
    return "split.json", [part.subject for part in read_split(folder / "split.json").own.split.test]


def in_checkpoint(folder: Path, name: str):
    path = save_network(folder / "checkpoint_epoch1.pth")
    content = torch.load(path, weights_only=True)
    torch.save({**content, "label_map": {"spleen": 0, name: 1}}, path)
    return path.name, list(load_checkpoint(path).label_map)


def in_shared_model(folder: Path, name: str):
    from segkit.weights_file import read_weights_file, write_weights_file

    path = save_network(folder / "model.safetensors")
    write_weights_file(path, {**read_weights_file(path), "label_map": {"spleen": 0, name: 1}})
    return path.name, list(load_checkpoint(path).label_map)


def in_store(folder: Path, name: str):
    subject = a_subject(folder)
    info = sealed(
        {key: value for key, value in {**subject.info, "structures": [name, "spleen"]}.items() if key != "checksum"}
    )
    return "subject.json", list(staging.StagedSubject(subject.folder, info).labels().structures)


def in_prediction(folder: Path, name: str):
    subject = a_subject(folder)
    evaluation.save_prediction(folder / "kept", subject, subject.labels())
    path = folder / "kept" / "s0.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    path.write_text(json.dumps(sealed({**content, "structures": [name, "spleen"]})))
    return path.name, list(evaluation.load_prediction(folder / "kept", subject).structures)


def in_scores(folder: Path, name: str):
    table = scores_table()
    table.loc[0, "structure"], table.loc[0, "group"] = name, labels.group_of(name)
    table.loc[1, "subject"] = name
    table.to_csv(folder / "scores.csv", index=False, errors="surrogatepass")
    read = evaluation.load_scores(folder / "scores.csv")
    return "scores.csv", [*read["structure"], *read["subject"]]


PLACES = (
    in_mask_files, in_scan_files, in_dicom_folders, in_label_tables, in_labels_json, in_nnunet, in_label_map, in_split,
    in_checkpoint, in_shared_model, in_store, in_prediction, in_scores,
)  # fmt: skip
FILE_NAMES = (in_mask_files, in_scan_files, in_dicom_folders)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_names(tmp_path, fault, place):
    row = fault(f"hostile names {place.__name__.replace('_', ' ')}", "refused, or changed into a harmless one")
    refused = changed = 0
    for number, name in enumerate((*NAMES, *ACCEPTED)):
        folder = tmp_path / str(number)
        folder.mkdir()
        if place in FILE_NAMES and not _can_be_a_file(name):
            continue
        try:
            _, names = place(folder, name)
        except SegkitError as error:
            assert name not in ACCEPTED and "\x1b" not in str(error).replace(str(folder), "").replace(name, ""), name
            refused += 1
        else:
            assert names and all(map(harmless, names)), (name, names)
            changed += name not in ACCEPTED
        row.times += 1
    assert refused > 5
    row.seen = f"{refused} refused, {changed} changed, {len(ACCEPTED)} ordinary ones accepted"


def _can_be_a_file(name: str) -> bool:
    """Whether a system lets a file be called so."""
    in_bytes = len(name.encode(errors="surrogatepass"))
    return name not in ("", ".", "..") and not {"/", "\0", "\ud800"} & set(name) and in_bytes < 240


def test_any_text_is_no_name_or_harmless(fault, many):
    row = fault("any text as a name (generated)", "refused, or a harmless name")
    pieces = st.sampled_from([*NAMES, *ACCEPTED])

    def read(text: str) -> tuple[str, str]:
        try:
            return labels.safe_name(text), text
        except SegkitError as error:
            raise SegkitError(f"the text: {error}") from error

    def check(read) -> None:
        name, text = read
        assert harmless(name), text

    try_all(row, many(100, 1000), st.text() | st.lists(pieces, max_size=3).map("".join), read, check, "the text")


# --- into tables, terminals and shells


def no_formula(path: Path) -> int:
    """Every cell of a table is none that a spreadsheet computes; how many there are."""
    with open(path, newline="", encoding="utf-8") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    for cell in cells:
        number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", cell)
        assert number or not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")), cell
    return len(cells)


def hostile_data(folder: Path) -> Path:
    """Subjects, and files among their masks, with every name that a system allows; a good subject beside them."""
    write_subject(folder / "s0", {name: np.random.default_rng(0).random((6, 6, 6)) < 0.3 for name in LABELS})
    for number, name in enumerate(filter(_can_be_a_file, NAMES)):
        if number % 2:
            shutil.copytree(folder / "s0", folder / name)
        else:
            (folder / "s0" / "segmentations" / f"{name}.txt").touch()
    shutil.copytree(
        folder / "s0", Path(f"{folder}/\udcff".encode(errors="surrogateescape").decode("utf-8", "surrogateescape"))
    )
    return folder


def test_tables(tmp_path, fault):
    row = fault(
        "hostile names of folders and files, and of models, in the CSV of audit and compare", "no cell is a formula"
    )
    data = hostile_data(tmp_path / "data")
    row.times += no_formula(write_audit(audit(data, progress=False), tmp_path / "audit.csv"))
    table = pd.DataFrame({"model": NAMES, "n": range(len(NAMES)), "value": np.linspace(-1, 1, len(NAMES))})
    row.times += no_formula(write_csv(tmp_path / "all.csv", table))
    kept = pd.read_csv(tmp_path / "all.csv", keep_default_na=False)
    assert kept["value"].min() == -1 and len(kept) == len(NAMES)
    for first in ("=1+1", "$\\frac$", "@x", "a$b$c"):
        values = {"first": 0.5, "second": 0.4, "difference": -0.1, "low": -0.2, "high": 0.1, "n": 2}
        rows = {"structure": ["all structures", "liver"], "group": ["all", "organs"]}
        compared = pd.DataFrame({"model": first, **rows, **values})
        files = report.write_comparison(compared, first, "dice", tmp_path / "compared")
        row.times += no_formula(files[0])


def run_main(*words: str, monkeypatch, capsys) -> str:
    """What `python -m segkit WORDS` prints, whether it ends well or not."""
    monkeypatch.setattr(sys, "argv", ["segkit", *words])
    ended = ""
    try:
        main()
    except SystemExit as stop:
        ended = str(stop.code or "")
    printed = capsys.readouterr()
    return printed.out + printed.err + ended


def test_terminals_and_shells(tmp_path, fault, monkeypatch, capsys):
    row = fault(
        "files and folders with hostile names through audit, stage and predict", "no command runs, no terminal is moved"
    )
    monkeypatch.chdir(tmp_path)
    checkpoint = save_network(tmp_path / "checkpoint_epoch1.pth")
    data = hostile_data(tmp_path / "data")
    printed = [run_main("audit", str(data), "--output-dir", "out", monkeypatch=monkeypatch, capsys=capsys)]
    printed += [run_main("stage", str(data), "--stage-dir", "stage", monkeypatch=monkeypatch, capsys=capsys)]
    (tmp_path / "scans").mkdir()
    for name in filter(_can_be_a_file, (*NAMES, *ACCEPTED)):
        path = tmp_path / "scans" / f"{name}.nii.gz"
        write_nifti(path, HU, AFFINE)
        words = ("predict", str(path), "--checkpoint", str(checkpoint), "--out", "found", "--device", "cpu")
        printed.append(run_main(*words, "--format", "csv", monkeypatch=monkeypatch, capsys=capsys))
        row.times += 1
    for text in printed:
        assert not set(text) & set("\x1b\x07\x08\x7f\u202e\0"), text
    assert not list(tmp_path.rglob(MARK)) and not list(ROOT.glob(MARK))
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint_epoch1.pth", "data", "out", "stage", "scans", "found",
    }  # fmt: skip
    assert all(harmless(path.name) for path in (tmp_path / "found").iterdir())
    assert len(list((tmp_path / "found").iterdir())) > len(ACCEPTED)


# --- into files of viewers and pages


def found(names) -> Segmentation:
    codebook = np.vstack([np.zeros(len(names), bool), np.eye(len(names), dtype=bool)])
    codes = np.arange(HU.size).reshape(HU.shape[::-1]) * (len(names) + 1) // HU.size
    volume = CodeVolume(codes.astype(np.uint8), codebook, tuple(names))
    return Segmentation(volume, codes.astype(np.uint8), None)


def test_every_format_with_unusual_names(tmp_path, fault, tab):
    row = fault(
        "unusual names in every format that is written; the 3D page in a browser",
        "files inside, tables and page as text",
    )
    [series] = find_scans(save(make_series(HU, AFFINE), tmp_path / "series"))
    scan = replace(read_scan(series, Findings("series")), name="肝臓+1")
    files = exports.write([*exports.FORMATS], scan, found(ACCEPTED), tmp_path, Findings(scan.name))
    for path in files:
        assert tmp_path in path.resolve().parents and harmless(path.name)
        if path.suffix == ".csv":
            no_formula(path)
        row.times += 1
    assert set(read_names(tmp_path / "肝臓+1_labels.json")) == set(ACCEPTED)
    assert {path.name for path in (tmp_path / "segmentations").iterdir()} == {f"{name}.nii.gz" for name in ACCEPTED}
    tab.context.set_offline(True)
    tab.goto((tmp_path / "肝臓+1_3d.html").as_uri())
    tab.wait_for_selector(".legendtoggle")
    assert all(tab.get_by_text(name, exact=True).count() >= 1 for name in ACCEPTED)
    for name in NAMES:
        with pytest.raises(SegkitError):
            exports.write(["csv"], scan, found((name, "liver")), tmp_path, Findings(scan.name))
        row.times += 1


CELLS = """\
from pathlib import Path
import numpy as np
import pandas as pd
from IPython.display import display
from segkit import interactive
from segkit.codes import CodeVolume
from segkit.errors import Finding
hostile = {names!r}
print(*[Finding("s0", "error", "x", f"subject s0: {{name}}") for name in hostile], sep="\\n")
display(pd.DataFrame({{"name": hostile, "value": 0.5}}))
hu = np.random.default_rng(0).integers(-1000, 1000, (4, 20, 20)).astype(np.int16)
codes = CodeVolume(np.ones((4, 20, 20), np.uint8), np.array([[False], [True]]), ("liver",))
display(interactive.slice_browser(hostile[-1], hu, {{"prediction": codes}}, (1, 1, 1)))
display(interactive.show_page(Path({page!r})))"""


def as_page(notebook: Path) -> Path:
    """An executed notebook as JupyterLab shows it, beside it. JupyterLab brings its scripts itself: none are named.

    Its widgets are there as data; what draws them is one of these scripts.
    """
    urls = ("require_js", "mathjax", "mermaid_js", "mermaid_layout_elk_js", "jquery", "widget_renderer")
    own = {f"{name}_url": "" for name in urls}
    own["jupyter_widgets_base_url"] = "data:text/javascript,//"  # a comment
    page, _ = HTMLExporter(template_name="lab", **own).from_filename(str(notebook))
    target = notebook.with_suffix(".html")
    target.write_text(page, encoding="utf-8")
    return target


def test_a_notebook_shows_names_as_text(tmp_path, fault, many):
    """Executed before the browser starts: its loop and the kernel's cannot run in one thread."""
    row = fault("a notebook that shows hostile names in tables, messages, widgets and a page", "it can be exported")
    (tmp_path / "inside.html").write_text("<title>inside</title>")
    shown = [name for name in NAMES if "\ud800" not in name and "\0" not in name]
    cells = CELLS.format(names=shown, page=str(tmp_path / "inside.html"))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cells)]), tmp_path / "made.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "made.ipynb"), str(tmp_path / "done.ipynb"), cwd=str(tmp_path), kernel_name="python3",
        progress_bar=False,
    )  # fmt: skip
    PAGES.append((as_page(tmp_path / "done.ipynb"), shown))
    row.times += len(shown)
    for name in many((), ("train_unet", "segmentation_detection_analysis")):
        parameters = dict(QUICK, PHANTOM_SUBJECTS=3, PHANTOM_DETAIL=0.35) if name == "train_unet" else {"DEVICE": "cpu"}
        papermill.execute_notebook(
            str(ROOT / "notebooks" / f"{name}.ipynb"), str(tmp_path / f"{name}.ipynb"),
            {"OUTPUT_DIR": str(tmp_path / "out"), **parameters}, cwd=str(tmp_path), kernel_name="python3",
            progress_bar=False,
        )  # fmt: skip
        PAGES.append((as_page(tmp_path / f"{name}.ipynb"), ()))
        row.times += 1


PAGES: list[tuple[Path, tuple[str, ...]]] = []
"""Pages of notebooks, and the names that each shows."""


def test_pages_load_nothing_and_run_no_script_of_names(fault, tab):
    row = fault("pages of executed notebooks, opened with the network cut", "nothing is fetched, names are text")
    tab.context.set_offline(True)
    assert PAGES
    for page, names in PAGES:
        tab.goto(page.as_uri())
        tab.wait_for_timeout(1500)
        assert tab.title() == page.stem and MARK not in tab.title()
        text = tab.inner_text("body")
        assert not names or all(name in text for name in (SCRIPT, "<b>x</b>", "=1+1"))
        row.times += 1
