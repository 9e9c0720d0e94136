import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from conftest import write_subject
from hypothesis import given
from hypothesis import strategies as st
from test_training import SMALL

from segkit import dataset, runs
from segkit.errors import SegkitError, SubjectError
from segkit.locks import alone
from segkit.seen import Known, Learned, RunSplit, read_split, without_copies
from segkit.splits import Part, Split, make_split
from segkit.training import train

TINY = replace(SMALL, epochs=1)


def test_the_root_is_found_from_anywhere_inside(tmp_path, monkeypatch):
    for folder in ("notebooks", "segkit/formats"):
        (tmp_path / folder).mkdir(parents=True)
    assert runs.project_root(tmp_path / "notebooks") == runs.project_root(tmp_path / "segkit/formats") == tmp_path
    monkeypatch.chdir(tmp_path / "notebooks")
    assert runs.resolve("outputs") == tmp_path / "outputs" and runs.resolve("/abs") == runs.Path("/abs")


def test_a_new_run_moves_the_older_ones_files_and_keeps_what_runs_share(tmp_path):
    for name in ("checkpoint_epoch1.pth", "label_map.json", "3d_s0000_x.html", "staged/s0000/ct.b2nd",
                 "predictions/s0000.json", "phantoms_3_seed0/meta.csv", "mine.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    runs.start_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "phantoms_3_seed0", "runs", "staged"]
    [first] = (tmp_path / "runs").iterdir()
    assert sorted(p.name for p in first.iterdir()) == [
        "3d_s0000_x.html", "checkpoint_epoch1.pth", "label_map.json", "predictions"
    ]  # fmt: skip
    for _ in range(2):
        (tmp_path / "checkpoint_epoch1.pth").write_text("second")
        runs.start_run(tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 3
    runs.start_run(tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SegkitError, match="file"):
        runs.start_run(tmp_path / "file" / "out")


def test_written_whole_or_not_at_all(tmp_path):
    path = runs.write_json(
        tmp_path / "a.json", {"shape": [1, 2, 3], "text": "two  spaces [ ]", "nested": [[1], [2, 3]]}
    )
    assert json.loads(path.read_text()) == {"shape": [1, 2, 3], "text": "two  spaces [ ]", "nested": [[1], [2, 3]]}
    assert '"shape": [ 1, 2, 3 ]' in path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["shape"] == [1, 2, 3] and list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_swept_unless_somebody_may_be_writing(tmp_path):
    left = [tmp_path / ".123.segkit.a.json", tmp_path / ".9.segkit.folder"]
    kept = [tmp_path / name for name in (".12.segkit.", ".12.a", ".hidden", ".x.y", "123.a", ".lock")]

    def leave():
        left[0].write_text("{")
        (left[1] / "deep").mkdir(parents=True)
        (left[1] / "deep" / "file").touch()

    leave()
    for path in kept:
        path.touch()
    with alone(tmp_path / ".other.lock", "taken"):
        runs.sweep(tmp_path, tmp_path / ".other.lock")
    assert all(path.exists() for path in left)
    runs.sweep(tmp_path, tmp_path / ".other.lock")
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / ".other.lock"])
    leave()
    runs.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / ".other.lock"])


@pytest.mark.parametrize("moved", range(4))
def test_a_run_is_moved_whole_however_often_that_is_interrupted(tmp_path, monkeypatch, moved):
    names = ["checkpoint_epoch1.pth", "label_map.json", "last_state.pth"]
    for name in names:
        (tmp_path / name).write_text(name)
    original, done = runs.Path.rename, []

    def rename(path, target):
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(path)
        return original(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs.Path, "rename", rename)
        runs.start_run(tmp_path)
    assert runs.is_half_moved(tmp_path)
    runs.start_run(tmp_path)
    assert not runs.is_half_moved(tmp_path)
    [archive] = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in archive.iterdir()) == names


def test_phantoms_are_made_once_and_whole(tmp_path, monkeypatch):
    folder = dataset.phantoms_in(tmp_path, 2, seed=5, detail=0.3, progress=False)
    assert (folder / "meta.csv").is_file() and len(list(folder.glob("s*/ct.nii.gz"))) == 2
    monkeypatch.setattr(dataset, "write_phantoms", lambda *a, **k: pytest.fail("made again"))
    assert dataset.phantoms_in(tmp_path, 2, seed=5, detail=0.3, progress=False) == folder

    def interrupted(draft, *args, **kwargs):
        draft.mkdir(parents=True, exist_ok=True)
        (draft / "meta.csv").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "write_phantoms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset.phantoms_in(tmp_path, 3, seed=5, detail=0.3, progress=False)
    assert not (tmp_path / "phantoms_3_seed5_detail0.3").exists()


def test_open_data_discovers_what_is_there(phantom_data):
    assert len(phantom_data.label_map) == 117 and len(phantom_data.staged) == 5
    overview = phantom_data.overview()
    assert sorted(overview["split"]) == ["test", "train", "train", "train", "val"]
    assert (overview["annotated"] == 117).all() and (overview["slices"] > 10).all()
    first = phantom_data.split.test[0]
    assert phantom_data.test_part() == phantom_data.test_part(first.subject) == first
    with pytest.raises(SegkitError, match="no test subject"):
        phantom_data.test_part("nobody")


def run_of(data, folder):
    runs.write_json(folder / "label_map.json", data.label_map)
    runs.write_json(folder / "split.json", RunSplit(data.folder.resolve(), data.learned()).to_json())


def test_open_run_takes_the_split_that_training_wrote(phantom_data, tmp_path):
    run_of(phantom_data, tmp_path)
    data = dataset.open_run(tmp_path, tmp_path / "staged", progress=False)
    assert data.split == phantom_data.split and set(data.staged) == {part.subject for part in data.split.test}


def test_open_run_on_another_data_set_takes_all_of_it(phantom_data, tmp_path):
    run_of(phantom_data, tmp_path)
    for name in ("x1", "x2", "x3"):
        write_subject(tmp_path / "other" / name, {"liver": np.ones((3, 3, 3))})
    data = dataset.open_run(tmp_path, tmp_path / "staged", tmp_path / "other", max_subjects=2, progress=False)
    assert data.split.test == (Part("x1"), Part("x2")) and data.label_map == phantom_data.label_map


def test_training_subjects_stay_training_subjects_when_the_data_move(phantom_data, tmp_path):
    run_of(phantom_data, tmp_path)
    shutil.copytree(phantom_data.folder, tmp_path / "moved")
    data = dataset.open_run(tmp_path, tmp_path / "staged", tmp_path / "moved", progress=False)
    assert data.split == phantom_data.split and data.folder == tmp_path / "moved"


def test_what_no_training_subject_annotates_is_not_learned_and_named(tmp_path):
    full = np.ones((3, 3, 3))
    for name, masks in (("a", ["liver"]), ("b", ["liver", "aorta"]), ("c", ["liver", "spleen"])):
        write_subject(tmp_path / "data" / name, dict.fromkeys(masks, full))
    (tmp_path / "data" / "meta.csv").write_text("image_id;split\na;train\nb;val\nc;test\n")
    data = dataset.open_data(tmp_path / "data", tmp_path / "staged", progress=False)
    assert data.label_map == {"liver": 0}
    assert list(map(str, data.problems)) == ["no training subject annotates aorta, spleen: they cannot be learned"]
    with pytest.raises(SegkitError, match="spleen, which no training subject has"):
        dataset.open_data(tmp_path / "data", tmp_path / "staged", structures=["spleen"], progress=False)
    with pytest.raises(SegkitError, match="expected a list of names"):
        dataset.open_data(tmp_path / "data", tmp_path / "staged", structures="liver", progress=False)


def test_open_run_without_a_run_or_with_its_data_gone(phantom_data, tmp_path):
    with pytest.raises(SegkitError, match=r"split\.json is missing: no training run"):
        dataset.open_run(tmp_path, tmp_path / "staged")
    run_of(phantom_data, tmp_path)
    content = json.loads((tmp_path / "split.json").read_text())
    content["test"].append({"subject": "s9999", "slabs": None})
    runs.write_json(tmp_path / "split.json", content)
    with pytest.raises(SegkitError, match=r"split\.json are missing: s9999"):
        dataset.open_run(tmp_path, tmp_path / "staged", progress=False)
    with pytest.raises(SegkitError, match="MAX_SUBJECTS"):
        dataset.open_run(tmp_path, tmp_path / "staged", max_subjects=0)
    (tmp_path / "split.json").write_text("[]")
    with pytest.raises(SegkitError, match=r"split\.json: damaged"):
        dataset.open_run(tmp_path, tmp_path / "staged", progress=False)


def other_run(data, folder, **parts):
    """The folder of another run on these data, and a model of it."""
    folder.mkdir()
    run_of(replace(data, split=replace(data.split, **parts)), folder)
    return SimpleNamespace(path=folder / "checkpoint_epoch1.pth", label_map={"liver": 0})


def test_what_another_runs_model_was_trained_on_or_chosen_by_is_left_out(phantom_data, tmp_path):
    names = list(phantom_data.staged)
    mine, theirs = (tuple(map(Part, chosen)) for chosen in (names[:3], names[2:4]))
    (tmp_path / "mine").mkdir()
    run_of(replace(phantom_data, split=replace(phantom_data.split, train=(Part(names[4]),), val=(), test=mine)),
           tmp_path / "mine")  # fmt: skip
    for part, left in (("train", mine[:2]), ("val", mine[:2])):
        model = other_run(phantom_data, tmp_path / part, **{"train": (), "val": (), "test": mine, part: theirs})
        data = dataset.open_run(tmp_path / "mine", tmp_path / "staged", progress=False, model=model)
        assert data.split.test == left and data.label_map == {"liver": 0} and set(data.staged) == set(names[:2])
        [finding] = [finding for finding in data.problems if finding.kind == "seen in training"]
        assert f"1 of 3 test subjects ({names[2]}): they are left out" in str(finding)
    model = other_run(phantom_data, tmp_path / "all", train=mine)
    with pytest.raises(SegkitError, match=r"all/split\.json: the model was trained on, or chosen by, 3 of 3 test subj"):
        dataset.open_run(tmp_path / "mine", tmp_path / "staged", progress=False, model=model)


def test_what_the_weights_had_seen_that_a_training_started_from_is_left_out(phantom_data, tmp_path):
    a, b, c, d, e = map(Part, phantom_data.staged)
    sizes = phantom_data.learned().ct_bytes
    first = Learned(sizes, Split((a,), (b,), (c, d), "before everything"))
    moved = Learned({**sizes, d.subject: 1}, Split((d,), (d,), (d,), "another d"))
    own = Learned(sizes, Split((e,), (e,), (a, b, c, d), "by hand"))
    written = RunSplit(phantom_data.folder.resolve(), own, (moved, first, None))
    runs.write_json(tmp_path / "label_map.json", phantom_data.label_map)
    runs.write_json(tmp_path / "split.json", written.to_json())
    assert read_split(tmp_path / "split.json") == written
    data = dataset.open_run(tmp_path, tmp_path / "staged", progress=False)
    assert data.split.test == (c, d)  # b chose the weights; d is another scan of that name
    assert [finding.kind for finding in data.problems] == [
        "training not known",
        "seen in training",
        "names of training",
    ]


def test_a_training_says_what_of_its_test_the_weights_had_seen_that_it_starts_from(phantom_data, tmp_path, capsys):
    train(phantom_data, TINY, tmp_path / "first", progress=False)
    taken, *others = phantom_data.split.train
    tested = replace(phantom_data, split=replace(phantom_data.split, train=tuple(others), test=(taken,)))
    for folder, said in (
        ("first", "split.json: the model was trained on, or chosen by, 1 of 1 test subjects"),
        ("copied", "split.json is missing: nobody knows here what the model was trained on"),
    ):
        start = tmp_path / folder / "checkpoint_epoch1.pth"
        if folder == "copied":
            start.parent.mkdir()
            shutil.copy(tmp_path / "first" / start.name, start)
        train(tested, replace(TINY, init_checkpoint=str(start)), tmp_path / f"from {folder}", progress=False)
        said_so = capsys.readouterr().out
        assert f"INIT_CHECKPOINT = {start}: {start.parent / said}" in said_so
    assert read_split(tmp_path / "from copied" / "split.json").earlier == (None,)


def test_validation_subjects_stay_where_the_test_is_of_those_anyhow(phantom_data, tmp_path):
    first, *others = map(Part, phantom_data.staged)
    (tmp_path / "mine").mkdir()
    run_of(replace(phantom_data, split=replace(phantom_data.split, train=tuple(others), val=(first,), test=(first,))),
           tmp_path / "mine")  # fmt: skip
    model = other_run(phantom_data, tmp_path / "other", train=tuple(others), val=(first,), test=(first,))
    data = dataset.open_run(tmp_path / "mine", tmp_path / "staged", progress=False, model=model)
    assert data.split.test == (first,) and data.split.test_name == "val"
    assert not [finding for finding in data.problems if finding.kind == "seen in training"]


def test_a_model_that_says_nothing_of_its_training_is_judged_without_a_run(phantom_data, tmp_path):
    """As one that somebody shared: labelled scans of one's own are enough, and what cannot be known is said."""
    model = SimpleNamespace(path=tmp_path / "shared" / "model.safetensors", label_map={"liver": 0})
    (tmp_path / "outputs").mkdir()
    data = dataset.open_run(tmp_path / "outputs", tmp_path / "staged", phantom_data.folder, progress=False, model=model)
    assert data.label_map == {"liver": 0} and not data.split.train
    # the phantoms name their own test subjects
    assert data.split.test == phantom_data.split.test
    assert [finding.kind for finding in data.problems] == ["training not known"]
    with pytest.raises(
        SegkitError, match=r"split\.json is missing: no training run there; .* the DATA_DIR of labelled"
    ):
        dataset.open_run(tmp_path / "outputs", tmp_path / "staged", progress=False, model=model)


def copy_subject(source, target, slices=None):
    """A subject under another name; of its scan and masks only the given slices."""
    shutil.copytree(source, target)
    for path in target.rglob("*.nii.gz") if slices is not None else ():
        image = nib.load(path)
        nib.save(image.slicer[(slice(None),) * axis_of_slices(image) + (slices,)], path)


def axis_of_slices(image) -> int:
    return [code in "SI" for code in nib.aff2axcodes(image.affine)].index(True)


def test_scans_are_known_again_whatever_they_are_called(phantom_data, tmp_path):
    """Training scans elsewhere under other names, one of them cut to some of its slices, beside a scan never seen."""
    run_of(phantom_data, tmp_path)
    trained, *_ = (phantom_data.folder / part.subject for part in phantom_data.split.train)
    validated, tested = (
        phantom_data.folder / part[0].subject for part in (phantom_data.split.val, phantom_data.split.test)
    )
    for name, source, slices in (
        ("whole", trained, None),
        ("piece", trained, slice(10, 16)),
        ("other", validated, None),
    ):
        copy_subject(source, tmp_path / "renamed" / name, slices)
    with pytest.raises(
        SegkitError, match=r"3 of 3 test subjects \(other, there s\d+; piece, there s\d+; whole, there s\d+\)"
    ):
        dataset.open_run(tmp_path, tmp_path / "staged", tmp_path / "renamed", progress=False)
    copy_subject(tested, tmp_path / "renamed" / "unseen")
    data = dataset.open_run(tmp_path, tmp_path / "staged", tmp_path / "renamed", progress=False)
    assert data.split.test == (Part("unseen"),) and set(data.staged) == {"unseen"}
    [finding] = data.problems
    assert finding.kind == "seen in training" and "3 of 4 test subjects" in str(finding)
    one = dataset.open_run(tmp_path, tmp_path / "staged", tmp_path / "renamed", max_subjects=1, progress=False)
    assert one.split.test == (Part("unseen"),)  # the last one: those before it do not count


def test_scans_that_only_resemble_those_of_training_are_named(phantom_data, tmp_path):
    """The same names, each voxel one HU higher, as of data that were converted anew: nobody can know."""
    run_of(phantom_data, tmp_path)
    shutil.copytree(phantom_data.folder, tmp_path / "again", ignore=shutil.ignore_patterns("meta.csv"))
    for path in (tmp_path / "again").rglob("ct.nii.gz"):
        image = nib.load(path)
        changed = (np.asarray(image.dataobj) + 1).astype(image.get_data_dtype())
        nib.save(nib.Nifti1Image(changed, image.affine, image.header), path)
    data = dataset.open_run(tmp_path, tmp_path / "staged", tmp_path / "again", progress=False)
    [finding] = data.problems
    assert finding.kind == "names of training" and "another" in str(finding)


def test_copies_are_found_among_many_subjects_at_once():
    """600 subjects of 300 slices: one pass; looking at each pair takes minutes."""
    random = np.random.default_rng(0)
    checksums = {f"s{k:04d}": random.integers(0, 2**32, 300).tolist() for k in range(600)}
    checksums["s0599"][100:103] = checksums["s0000"][7:10]
    checksums["s0598"][100:102] = checksums["s0001"][7:9]  # two may be chance
    parts = tuple(map(Part, checksums))
    split, findings = without_copies(Split(parts[:500], parts[500:550], parts[550:], "by hand"), checksums)
    assert [part.subject for part in parts if part not in (*split.train, *split.val, *split.test)] == ["s0000"]
    assert [finding.subject for finding in findings] == ["s0000"]
    known = Known(checksums, parts[:10])
    assert known.same_as(Part("x"), {"x": [5, 5, 5, checksums["s0003"][0]]}) is None  # one slice of four


def test_checksums_of_trainings_on_the_same_scans_are_written_once(phantom_data, tmp_path):
    """Ten of them, as of somebody who goes on with their own model again and again; one on other scans, one old."""
    own = phantom_data.learned()
    [name, *_] = own.checksums
    other = replace(own, checksums={**own.checksums, name: [1, 2, 3]})
    older = replace(own, checksums={})
    alone = RunSplit(phantom_data.folder.resolve(), own)
    written = replace(alone, earlier=(*[own] * 10, other, older, None))
    for run, file in ((alone, "alone.json"), (written, "split.json")):
        runs.write_json(tmp_path / file, run.to_json())
        assert read_split(tmp_path / file) == run
    once, many = ((tmp_path / file).stat().st_size for file in ("alone.json", "split.json"))
    assert many < once + 12 * 3000  # names and sizes of files alone


@pytest.mark.parametrize("wrong", ["+000000a", "0x00000a", "00_00_0a", "0000000A", "123", {}, [1], None, 5])
def test_checksums_that_are_none_are_refused(phantom_data, tmp_path, wrong):
    content = RunSplit(phantom_data.folder.resolve(), phantom_data.learned()).to_json()
    content["checksums"] = {"s0000": wrong}
    runs.write_json(tmp_path / "split.json", content)
    with pytest.raises(
        SegkitError, match=r"split\.json: damaged \(checksums of s0000: expected eight hexadecimal digits"
    ):
        read_split(tmp_path / "split.json")


def test_a_scan_in_two_parts_of_one_data_set_is_in_the_one_that_judges(phantom_data, tmp_path):
    """Also where only a piece of it is; two that train count twice, and that is said."""
    first, second, third = (phantom_data.folder / name for name in list(phantom_data.staged)[:3])
    data_dir = tmp_path / "data"
    for name, source, slices in (
        ("a", first, None), ("b", second, None), ("c", third, None),
        ("copy of a", first, None), ("piece of b", second, slice(5, 9)), ("piece of c", third, slice(0, 8)),
    ):  # fmt: skip
        copy_subject(source, data_dir / name.replace(" ", "_"), slices)
    (data_dir / "meta.csv").write_text(
        "image_id;split\na;train\nb;train\nc;train\ncopy_of_a;train\npiece_of_b;val\npiece_of_c;test\n"
    )
    data = dataset.open_data(data_dir, tmp_path / "staged", progress=False)
    assert data.split.train == (Part("a"), Part("copy_of_a"))
    assert data.split.val == (Part("piece_of_b"),) and data.split.test == (Part("piece_of_c"),)
    assert [str(finding) for finding in data.problems if finding.kind == "same scan twice"] == [
        "subject b: the same scan as piece_of_b, or a piece of it: left out of training",
        "subject c: the same scan as piece_of_c, or a piece of it: left out of training",
        "subject copy_of_a: the same scan as a, or a piece of it: it counts twice in training",
    ]


def test_the_only_training_scan_stays_though_it_is_tested_too(tmp_path):
    """As of somebody who copies the only scan at hand for a first try: said, not refused."""
    for name in ("a", "b"):
        write_subject(
            tmp_path / "data" / name, {"liver": np.ones((4, 4, 9))}, ct=np.arange(144, dtype=np.int16).reshape(4, 4, 9)
        )
    data = dataset.open_data(tmp_path / "data", tmp_path / "staged", progress=False)
    assert len(data.split.train) == 1 and "nothing else is there for training, so it stays" in str(data.problems[0])


def test_empty_slices_do_not_make_two_scans_one(tmp_path):
    """What many scans have alike: slices without anything."""
    for name in ("a", "b", "c"):
        ct = np.random.default_rng(ord(name)).integers(-1000, 1000, (4, 4, 12)).astype(np.int16)
        ct[..., 4:], ct[..., 11] = -1024, -1000
        write_subject(tmp_path / "data" / name, {"liver": np.ones((4, 4, 12))}, ct=ct)
    assert not dataset.open_data(tmp_path / "data", tmp_path / "staged", progress=False).problems


def test_scans_that_are_called_like_training_subjects_are_named(phantom_data, tmp_path):
    """As of runs of older versions, which kept no checksums: the same data compressed again would be alike."""
    runs.write_json(tmp_path / "label_map.json", phantom_data.label_map)
    older = replace(phantom_data.learned(), checksums={})
    runs.write_json(tmp_path / "split.json", RunSplit(phantom_data.folder.resolve(), older).to_json())
    trained = phantom_data.split.train[0].subject
    for name in (trained, "x1"):
        write_subject(tmp_path / "other" / name, {"liver": np.ones((3, 3, 3))})
    data = dataset.open_run(tmp_path, tmp_path / "staged", tmp_path / "other", progress=False)
    [finding] = [finding for finding in data.problems if finding.kind == "names of training"]
    assert f"1 test subjects are called like training subjects, such as {trained}, with CT files of" in str(finding)
    assert data.split.test == (Part(trained), Part("x1"))


slabs = st.none() | st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=4).map(
    lambda pairs: tuple((start, start + length) for start, length in pairs)
)


@given(st.sampled_from("ab"), slabs, st.sampled_from("ab"), slabs)
def test_parts_meet_where_they_have_a_slice_in_common(one, slabs_of_one, other, slabs_of_other):
    first, second = Part(one, slabs_of_one), Part(other, slabs_of_other)
    common = one == other and bool({*first.slices(40)} & {*second.slices(40)})
    assert first.meets(second) == second.meets(first) == common


def test_a_data_set_without_a_training_subject_says_what_to_do():
    with pytest.raises(
        SegkitError, match=r"none of the 2 usable subjects to train, only to validate or test: have some"
    ):
        make_split({"a": 9, "b": 9}, {"a": "val", "b": "test"})


def test_temporary_files_of_other_programs_are_left_alone(tmp_path):
    """vim's swap file of 2024.csv, what rsync writes of 12.nii.gz, and what is ours."""
    for name in (".2024.csv.swp", ".12.nii.gz.Ab3dE9", ".123.segkit.report.html"):
        (tmp_path / name).write_text("")
    runs.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".12.nii.gz.Ab3dE9", ".2024.csv.swp"]


def test_two_stamps_in_one_second_differ():
    first, second = runs.time_stamp(), runs.time_stamp()
    assert first < second and len(first) == len(second) == len("20261123_184105")


def test_a_training_that_never_began_is_no_older_run(tmp_path):
    for name in ("label_map.json", "split.json", "settings.json"):
        (tmp_path / name).write_text("{}")
    runs.start_run(tmp_path)
    assert not (tmp_path / "runs").exists() and (tmp_path / "split.json").exists()
    (tmp_path / "last_state.pth").write_text("")
    runs.start_run(tmp_path)
    [archive] = (tmp_path / "runs").iterdir()
    assert len(list(archive.iterdir())) == 4 and list(tmp_path.iterdir()) == [tmp_path / "runs"]


def test_some_of_the_validation_subjects_are_still_called_so(phantom_data, tmp_path):
    """A data set without test subjects, as the small TotalSegmentator release."""
    held_out, rest = phantom_data.split.train[:2], phantom_data.split.train[2:]
    split = replace(phantom_data.split, train=rest, val=held_out, test=held_out)
    run_of(replace(phantom_data, split=split), tmp_path)
    data = dataset.open_run(tmp_path, tmp_path / "staged", max_subjects=1, progress=False)
    assert len(data.split.test) == 1 and data.split.test_name == "val"
    table = data.structures()  # of what is staged
    assert table["test_annotated"].max() == 1 and table["train_annotated"].max() == 0


def test_what_is_excluded_may_be_broken_and_a_warning_stops_nothing(tmp_path):
    for name in ("a", "b", "c"):
        write_subject(tmp_path / "data" / name, {"liver": np.ones((3, 3, 3))})
    (tmp_path / "data" / "c" / "ct.nii.gz").unlink()
    (tmp_path / "data" / "b" / "segmentations" / "Thumbs.db").touch()
    where = tmp_path / "data", tmp_path / "staged"
    with pytest.raises(SubjectError, match=r"subject c: .*ct\.nii\.gz is missing"):
        dataset.open_data(*where, strict=True, progress=False)
    data = dataset.open_data(*where, exclude=["c"], strict=True, progress=False)
    assert set(data.staged) == {"a", "b"} and [problem.subject for problem in data.problems] == ["b"]
    with pytest.raises(SegkitError, match="EXCLUDE names d, which"):
        dataset.open_data(*where, exclude=["c", "d"], progress=False)


def test_a_scan_that_lies_crooked_or_nobody_knows_how_is_told(tmp_path):
    """As of scans that are predicted: sheared axes are refused, an orientation that is guessed is a warning."""
    masks = {"liver": np.ones((12, 12, 12))}
    tilted = np.diag([2.0, 2.0, 3.0, 1.0])
    tilted[1, 2] = 0.5
    write_subject(tmp_path / "data" / "tilted", masks, affine=tilted)
    write_subject(tmp_path / "data" / "straight", masks)
    write_subject(tmp_path / "data" / "unknown", masks)
    for path in (tmp_path / "data" / "unknown").rglob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None), path)
    data = dataset.open_data(tmp_path / "data", tmp_path / "staged", progress=False)
    assert set(data.staged) == {"straight", "unknown"}
    [problem] = data.problems
    assert (problem.subject, problem.severity) == (
        "tilted",
        "error",
    ) and "axes are not perpendicular, by 9.5 degrees" in str(problem)
    assert "left and right, front and back are guessed" in data.overview().loc["unknown", "notes"]


def test_phantoms_that_another_process_makes_are_left_to_it(tmp_path):
    draft = tmp_path / ".123.segkit.phantoms_16_seed0"
    draft.mkdir()
    with alone(tmp_path / ".phantoms_16_seed0.lock", "taken"):
        runs.sweep(tmp_path)
        assert draft.is_dir()
    runs.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".phantoms_16_seed0.lock"]
