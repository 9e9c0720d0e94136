"""A model that leaves its machine: the same when it is opened elsewhere, nothing private in it, damage is named."""

import json
import os
import pickle
import shutil
import struct
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit import sharing
from segkit.checkpoints import load_checkpoint, load_checkpoints, save_checkpoint
from segkit.errors import SegkitError
from segkit.inference import Predictor
from segkit.networks import build_network
from segkit.runs import write_json
from segkit.settings import TrainSettings
from segkit.sharing import export_model
from segkit.splits import Part
from segkit.weights_file import read_weights_file, write_weights_file

LABELS = {"liver": 0, "spleen": 1, "my_lesion": 2}
NETWORK = {"model": "unet", "in_channels": 1, "out_channels": 3, "features": [4, 8], "norm": "instance"}
THRESHOLDS = [0.5, 0.47, 0.1 + 0.2]
LICENCE = "CC BY 4.0"


def stored(path, network=NETWORK, seed=0, **settings):
    """A checkpoint as a training writes it."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = asdict(replace(TrainSettings(target_shape=(32, 32), features=(4, 8)), **settings))
    scores = {"val_dice": 0.625, "val_structures": 3, "val_dice_of": {"liver": 0.6}, "thresholds": THRESHOLDS}
    record = {"versions": {"torch": "2"}, "data": "ab" * 32, "data_dir": "/home/anna/scans"}
    return save_checkpoint(path, build_network(**network), network, LABELS, trained, 3, scores, record)


def run_of(folder, members=1):
    """The folder of a training of one network, or of an ensemble."""
    for number in range(1, members + 1):
        own = folder / f"member_{number}" if members > 1 else folder
        stored(own / "checkpoint_epoch3.pth", seed=number)
        write_json(own / "training_history.json", {"epochs": [{"epoch": 3, "val_dice": 0.625}]})
    return folder


def alike(a, b):
    """Whether two checkpoints hold the same, weights bit for bit."""
    own, other = a.model.state_dict(), b.model.state_dict()
    same = own.keys() == other.keys() and all(
        own[name].dtype == other[name].dtype and own[name].numpy().tobytes() == other[name].numpy().tobytes()
        for name in own
    )
    parts = ("epoch", "network", "label_map", "target_shape", "scores", "thresholds")
    return same and all(getattr(a, name) == getattr(b, name) for name in parts)


@pytest.mark.parametrize(
    "network",
    [
        NETWORK,
        {**NETWORK, "norm": "batch", "in_channels": 3},
        {"model": "attention_unet", "in_channels": 1, "out_channels": 3, "features": [4, 8]},
        {"model": "unet3d", "in_channels": 1, "out_channels": 3, "features": [4, 8], "depth": 4},
    ],
    ids=lambda network: f"{network['model']} {network.get('norm', '')}",
)
def test_a_shared_model_is_the_same_bit_for_bit_and_predicts_the_same(network, phantom_data, tmp_path):
    path = stored(tmp_path / "run" / "checkpoint_epoch3.pth", network)
    files = export_model(path, tmp_path / "shared", LICENCE)
    assert [file.name for file in files] == ["model.safetensors", "README.md"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "run", tmp_path / "shared"]  # no draft is left
    [before], [after], [of_file] = map(load_checkpoints, (path, tmp_path / "shared", files[0]))
    assert alike(before, after) and alike(before, of_file) and not after.model.training
    subject = next(iter(phantom_data.staged.values()))
    part = Part(subject.name, ((10, 16),))
    one, other = (Predictor.of([each], device="cpu").predict(subject, part) for each in (before, after))
    assert one.codes.any() and np.array_equal(one.codes, other.codes) and np.array_equal(one.codebook, other.codebook)


def test_extreme_weights_come_back_bit_for_bit(tmp_path):
    path = stored(tmp_path / "checkpoint_epoch3.pth")
    loaded = load_checkpoint(path)
    extremes = torch.tensor([-0.0, 1e-45, torch.finfo(torch.float32).max])
    loaded.model.head.bias.data = extremes
    save_checkpoint(path, loaded.model, loaded.network, LABELS, loaded.settings, 3, loaded.scores, {})
    export_model(path, tmp_path / "shared", LICENCE)
    [after] = load_checkpoints(tmp_path / "shared")
    assert after.model.head.bias.detach().numpy().tobytes() == extremes.numpy().tobytes()


def test_the_loaded_weights_do_not_hang_on_the_file(tmp_path):
    export_model(stored(tmp_path / "checkpoint_epoch3.pth"), tmp_path / "shared", LICENCE)
    [loaded] = load_checkpoints(tmp_path / "shared")
    before = loaded.model.head.weight.detach().clone()
    with open(loaded.path, "r+b") as file:  # in place, as a careless download does
        file.write(bytes(loaded.path.stat().st_size))
    assert before.any() and torch.equal(loaded.model.head.weight, before)


def test_others_read_it_without_segkit(tmp_path):
    from safetensors.torch import load_file

    path = stored(tmp_path / "checkpoint_epoch3.pth")
    [file, _] = export_model(path, tmp_path / "shared", LICENCE)
    weights = torch.load(path, weights_only=True)["weights"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(file).items())
    # by hand: 8 bytes of length, then JSON
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header["head.bias"]["shape"] == [3] and header.keys() == {"__metadata__", *weights}
    readable = json.loads(header["__metadata__"]["segkit"])
    assert readable["label_map"] == LABELS and readable["scores"]["thresholds"] == THRESHOLDS
    assert readable["settings"]["target_shape"] == [32, 32] and readable["record"]["data_licence"] == LICENCE


def test_an_ensemble_is_shared_whole(phantom_data, tmp_path):
    run = run_of(tmp_path / "run", members=3)
    files = export_model(run, tmp_path / "shared", LICENCE)
    names = [f"member_{number}_of_3.safetensors" for number in (1, 2, 3)]
    assert [file.name for file in files] == [*names, "README.md"]
    before, after = load_checkpoints(run), load_checkpoints(tmp_path / "shared")
    assert len(after) == 3 and all(map(alike, before, after)) and not alike(after[0], after[1])
    assert "3 networks" in files[-1].read_text()
    subject = next(iter(phantom_data.staged.values()))
    part = Part(subject.name, ((10, 16),))
    one, other = (Predictor.of(each, device="cpu").predict(subject, part) for each in (before, after))
    assert np.array_equal(one.codes, other.codes)
    files[1].rename(tmp_path / "elsewhere")
    with pytest.raises(SegkitError, match=r"shared: no whole model: missing member_2_of_3"):
        load_checkpoints(tmp_path / "shared")
    shutil.copy(files[0], files[0].with_name("member_2_of_3.safetensors"))
    shutil.copy(files[0], files[0].with_name("model.safetensors"))
    with pytest.raises(SegkitError, match=r"not of it model\.safetensors"):
        load_checkpoints(tmp_path / "shared")


def test_a_run_that_holds_other_tensors_is_still_a_run(tmp_path):
    run = run_of(tmp_path / "run")
    (run / "backup.safetensors").write_bytes(b"something of somebody")
    assert load_checkpoints(run)[0].path.name == "checkpoint_epoch3.pth"


def test_nothing_of_the_machine_or_of_patients_is_shared(tmp_path):
    path = stored(
        tmp_path / "run" / "checkpoint_epoch3.pth",
        init_checkpoint="/home/anna/other_run/checkpoint_epoch9.pth", device="cuda:1", workers=7,
    )  # fmt: skip
    parts = {name: [{"subject": f"mueller_{name}", "slabs": None}] for name in ("train", "val", "test")}
    write_json(path.parent / "split.json", {"source": "/home/anna/meta.csv", "data_dir": "/home/anna", **parts})
    write_summary(path.parent, [str(path)])
    files = export_model(path, tmp_path / "shared", LICENCE)
    for file in files:
        content = file.read_bytes()
        for private in ("anna", "mueller", "cuda:1", '"workers"', str(tmp_path), str(Path.home())):
            assert private.encode() not in content, (file.name, private)
    card = files[-1].read_text()
    assert "Subjects: 1 to train, 1 to validate, 1 to test." in card
    assert "started from the weights of another model" in card
    again = export_model(tmp_path / "shared", tmp_path / "again", LICENCE)  # that stays true when it is passed on
    assert "started from the weights of another model" in again[-1].read_text()


def test_every_setting_that_may_name_a_path_was_thought_of():
    words = {"schedule": "Schedule", "model": "Model", "norm": "Norm", "loss": "Loss"}  # checked against a list
    assert {f.name: f.type for f in fields(TrainSettings) if f.type in words.values()} == words
    named = {f.name for f in fields(TrainSettings) if "str" in f.type or "Path" in f.type}
    assert named == {"init_checkpoint", "device"} and named <= set(sharing.OF_THE_MACHINE)


def summary_of(checkpoints, macro_dice=0.5, **others):
    scores = {
        "macro_dice": macro_dice, "macro_dice_low": 0.25, "macro_dice_high": 0.75, "structures": 3, "subjects": 4,
        "found": 9, "missed": 2, "false_alarms": 1, "correctly_absent": 0,
    }  # fmt: skip
    row = {"measure": "dice", "over": "structures", "mean": 0.5, "low": 0.25, "high": 0.75, "n": 3, "cases": 11}
    rows = [
        row, {**row, "over": "cases", "mean": 0.9875}, {**row, "over": "organs", "low": None, "high": None},
        {**row, "measure": "hd95_mm", "mean": 12.5, "cases": 9}, {**row, "measure": "nsd", "mean": None},
    ]  # fmt: skip
    return {
        "split": "test", "own_data": True, "checkpoints": list(map(str, checkpoints)), "threshold": None,
        "found_at_dice": 0.1, "nsd_tolerance_mm": 3.0,
        "prediction": scores, "reference_through_target_shape": {**scores, "macro_dice": 0.875},
        "means": {"segkit": rows}, **others,
    }  # fmt: skip


def write_summary(run, checkpoints, stamp="20260101_000000", **values):
    return write_json(run / f"evaluation_summary_{stamp}.json", summary_of(checkpoints, **values))


def test_the_card_tells_scores_with_split_number_and_interval(tmp_path):
    run = run_of(tmp_path / "run")
    write_summary(run, [run / "checkpoint_epoch3.pth"])
    card = export_model(run, tmp_path / "shared", LICENCE, "For **my** course.")[-1].read_text()
    assert "macro Dice 0.500 (95 % interval 0.250 to 0.750) over 3 structures of 4 subjects (test split)" in card
    assert "resampled to TARGET_SHAPE and back: 0.875" in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert "| Dice | all | 0.500 | 0.250 to 0.750 | 3 | 11 |" in rows
    assert "| HD95 (mm) | all | 12.500 | 0.250 to 0.750 | 3 | 9 |" in rows
    assert not any("0.9875" in row or "surface" in row for row in rows)
    assert "epoch 3: mean Dice 0.625 over 3 structures" in card
    for said in (
        "For **my** course.", "Education and research. **Not for diagnosis**", "training data: CC BY 4.0",
        "ab" * 32, "32 x 32 pixels", "`liver`, `spleen`, `my_lesion`", "--checkpoint FOLDER",
    ):  # fmt: skip
        assert said in card


def test_only_an_evaluation_of_these_checkpoints_as_they_are_is_told(tmp_path, capsys):
    run = run_of(tmp_path / "run")
    path = run / "checkpoint_epoch3.pth"
    twin = shutil.copytree(run, tmp_path / "other" / "run") / path.name

    def told():
        shutil.rmtree(tmp_path / "shared", ignore_errors=True)
        card = export_model(run, tmp_path / "shared", LICENCE)[-1].read_text()
        assert ("no evaluation of this model" in capsys.readouterr().out) == ("No evaluation came" in card)
        return card.split("macro Dice ")[1][:5] if "macro Dice" in card else None

    assert told() is None
    for number, others in enumerate(([twin], [path, twin], ["elsewhere/checkpoint_epoch3.pth"], ["run/x.pth"], [3])):
        write_summary(run, others, f"20260301_00000{number}")
    assert told() is None
    write_summary(run, [path], "20260101_000000", macro_dice=0.1)
    assert told() == "0.100"
    write_summary(run, ["/cluster/of/anna/run/checkpoint_epoch3.pth"], "20260102_000000", macro_dice=0.2)  # moved since
    assert told() == "0.200"
    later = path.stat().st_mtime + 1000
    os.utime(path, (later, later))  # trained on
    assert told() is None


def test_scores_of_other_data_or_at_another_threshold_say_so(tmp_path):
    run = run_of(tmp_path / "run")
    checkpoint = run / "checkpoint_epoch3.pth"
    write_summary(run, [checkpoint])
    usual = export_model(run, tmp_path / "usual", LICENCE)[-1].read_text()
    write_summary(run, [checkpoint], own_data=False, threshold=0.25)
    told = export_model(run, tmp_path / "told", LICENCE)[-1].read_text()
    for said in ("of another data set than the fingerprint above.", "at a probability of 0.25, not their own."):
        assert said in told and said not in usual


@pytest.mark.parametrize(
    "change",
    [
        {"split": "<script>"},
        {"threshold": "<script>"},
        {"prediction": {"macro_dice": "<script>"}},
        {"means": {"segkit": [{"measure": "<script>", "over": "structures", "mean": 1, "low": 0, "high": 1}]}},
        {"means": 3},
        {"found_at_dice": None},
    ],
)
def test_a_summary_that_is_none_is_named(change, tmp_path):
    run = run_of(tmp_path / "run")
    summary = summary_of([run / "checkpoint_epoch3.pth"]) | change
    write_json(run / "evaluation_summary_20260101_000000.json", summary)
    with pytest.raises(SegkitError, match=r"evaluation_summary_20260101_000000\.json: no summary"):
        export_model(run, tmp_path / "shared", LICENCE)
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("licence", "identifier", "name"),
    [
        ("CC BY 4.0", "cc-by-4.0", None),
        ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", None),
        ("cc0-1.0", "cc0-1.0", None),
        ("Hospital X: research use (no. 12)", "other", "hospital-x-research-use-no.-12"),
        ("МИТ", "other", "other"),
    ],
)
def test_the_front_matter_is_what_hubs_read(licence, identifier, name, tmp_path):
    yaml = pytest.importorskip("yaml")
    card = export_model(stored(tmp_path / "checkpoint_epoch3.pth"), tmp_path / "shared", licence)[-1].read_text()
    _, front, body = card.split("---\n", 2)
    content = yaml.safe_load(front)
    assert content["license"] == identifier and content.get("license_name") == name
    assert content["library_name"] == "segkit" and content["pipeline_tag"] == "image-segmentation"
    assert "ct" in content["tags"] and all(isinstance(tag, str) for tag in content["tags"])
    assert body.startswith("\n# CT segmentation, 3 structures\n") and licence in body


@pytest.mark.parametrize("licence", ["", "  ", "-", "a\nb", "<b>x</b>", "[x](y)", "x" * 201, None, "a|b"])
def test_a_licence_that_is_none_is_refused(licence, tmp_path):
    with pytest.raises(SegkitError, match="DATA_LICENCE"):
        export_model(stored(tmp_path / "checkpoint_epoch3.pth"), tmp_path / "shared", licence)
    assert not (tmp_path / "shared").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    path = stored(tmp_path / "run" / "checkpoint_epoch3.pth")
    for name in ("mine", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("mine", "file"):
        with pytest.raises(SegkitError, match=rf"{taken}: holds something already"):
            export_model(path, tmp_path / taken, LICENCE)
    assert (tmp_path / "mine" / "README.md").read_text() == (tmp_path / "file").read_text() == "mine"
    export_model(path, tmp_path / "there", LICENCE)  # an empty one is taken
    with pytest.raises(SegkitError, match="holds something already"):
        export_model(path, tmp_path / "there", LICENCE)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    path = stored(tmp_path / "run" / "checkpoint_epoch3.pth")
    (tmp_path / "there").mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharing, "model_card", full)
    for folder in ("new", "there"):
        with pytest.raises(SegkitError, match=rf"{folder}: the disk is full; make room"):
            export_model(path, tmp_path / folder, LICENCE)
    assert {each.name for each in tmp_path.iterdir()} == {"run", "there"} and not list((tmp_path / "there").iterdir())


@pytest.fixture(scope="module")
def shared_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    path = export_model(stored(folder / "checkpoint_epoch3.pth"), folder / "shared", LICENCE)[0]
    return path.read_bytes(), load_checkpoint(path), tmp_path_factory.mktemp("damaged") / "model.safetensors"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_or_longer_is_named(shared_bytes, data):
    content, _, path = shared_bytes
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content) - 1))]
        if data.draw(st.booleans())
        else content + data.draw(st.binary(min_size=1, max_size=9))
    )
    with pytest.raises(SegkitError, match=r"model\.safetensors: no readable checkpoint"):
        load_checkpoints(path.parent)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_are_named_or_change_nothing(shared_bytes, data):
    content, sound, path = shared_bytes
    header = 8 + struct.unpack("<Q", content[:8])[0]
    end = data.draw(st.sampled_from([8, header, len(content)]))  # the header is small: look there as often
    place, mask = data.draw(st.integers(0, end - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
    try:
        loaded = load_checkpoint(path)
    except SegkitError as error:
        assert "model.safetensors" in str(error)
    else:
        assert place < header and alike(loaded, sound)  # white space after or within the JSON


@settings(max_examples=60, deadline=None)
@given(header=st.binary(max_size=200), length=st.none() | st.integers(0, 2**64 - 1), rest=st.binary(max_size=50))
def test_a_file_of_anything_is_named(shared_bytes, header, length, rest):
    path = shared_bytes[2]
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + rest)
    with pytest.raises(SegkitError, match=r"model\.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 99}, "expected format 2, found 99"),
        ({"label_map": {"liver": 0, "<b>": 1, "x": 2}}, "cannot be used as a name"),
        ({"label_map": {"liver": 0}}, "threshold for each"),
        ({"scores": {"thresholds": [0.5, 0.5]}}, "threshold for each"),
        ({"network": {**NETWORK, "features": [10**6, 10**6]}}, "do not fit"),
        ({"network": {**NETWORK, "features": [10**30, 8]}}, "do not fit"),
        ({"network": {**NETWORK, "features": [4] * 10**6}}, "do not fit"),
        ({"network": {**NETWORK, "features": [0, 0]}}, "expected 1 or more"),
        ({"network": {**NETWORK, "features": "48"}}, "do not fit"),
        ({"network": {**NETWORK, "model": ["unet"]}}, "do not fit"),
        ({"network": {**NETWORK, "surprise": 1}}, "do not fit"),
        ({"network": {**NETWORK, "in_channels": 10**9}}, "do not fit"),
        ({"settings": {"target_shape": [0, 0]}}, "TARGET_SHAPE"),
        ({"settings": {"target_shape": [2**40, 2**40]}}, "TARGET_SHAPE"),
        ({"settings": []}, "settings is list"),
        ({"record": ["x"]}, "record is list"),
        ({"epoch": "three"}, "epoch is str"),
        ({"weights": {"head.bias": torch.zeros(3)}}, "do not fit"),
    ],
)
def test_hostile_content_with_a_right_checksum_is_named(change, says, shared_bytes, tmp_path):
    shutil.copy(shared_bytes[1].path, tmp_path / "model.safetensors")
    content = read_weights_file(tmp_path / "model.safetensors") | change
    write_weights_file(tmp_path / "model.safetensors", content)
    with pytest.raises(SegkitError, match=rf"model\.safetensors.*{says}") as caught:
        load_checkpoint(tmp_path / "model.safetensors")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (lambda tensor: tensor.clone().fill_(torch.nan), "not finite"),
        (lambda tensor: tensor.clone().fill_(torch.inf), "not finite"),
        (lambda tensor: tensor[..., :-1].contiguous(), "do not fit"),
        (lambda tensor: torch.zeros(0), "do not fit"),
    ],
)
def test_weights_that_are_none_are_named(weights, says, shared_bytes, tmp_path):
    content = read_weights_file(shared_bytes[1].path)
    content["weights"]["head.weight"] = weights(content["weights"]["head.weight"].squeeze())
    if says == "not finite":
        content["weights"]["head.weight"] = content["weights"]["head.weight"][..., None, None].contiguous()
    write_weights_file(tmp_path / "model.safetensors", content)
    with pytest.raises(SegkitError, match=rf"model\.safetensors: damaged checkpoint: .*{says}"):
        load_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("metadata", "kind", "says"),
    [
        (None, torch.float32, "no checkpoint of segkit"),
        ({"format": "pt"}, torch.float32, "no checkpoint of segkit"),
        ({"segkit": "{"}, torch.float32, "no readable checkpoint"),
        ({"segkit": "[1]"}, torch.float32, "no checkpoint of segkit"),
        ({"segkit": "{}"}, torch.float32, "SHA-256"),
        ({"segkit": '{"sha256": 3}'}, torch.float32, "SHA-256"),
        ({"segkit": '{"settings": {"target_shape": [1e999, NaN]}}'}, torch.float32, "damaged"),
        ({"segkit": "[" * 100_000}, torch.float32, "no readable checkpoint"),
        ({"segkit": '{"a": ' * 900 + "1" + "}" * 900}, torch.float32, "SHA-256"),
        ({"segkit": "1" * 10_000}, torch.float32, "no readable checkpoint"),
        ({"segkit": "{}"}, torch.float64, "another type than float32"),
        ({"segkit": "{}"}, torch.bfloat16, "another type than float32"),
        ({"segkit": "{}"}, torch.complex64, "another type than float32"),
    ],
)
def test_files_of_others_are_named(metadata, kind, says, tmp_path):
    from safetensors.torch import save_file

    save_file({"head.bias": torch.zeros(3, dtype=kind)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(SegkitError, match=rf"model\.safetensors: .*{says}"):
        load_checkpoint(tmp_path / "model.safetensors")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_neither_read_nor_executed(tmp_path):
    for name, write in (("a", torch.save), ("b", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        path = tmp_path / f"{name}.safetensors"
        write({"format": 2, "weights": Payload(tmp_path / "executed")}, path)
        with pytest.raises(SegkitError, match=rf"{name}\.safetensors: no readable checkpoint"):
            load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(SegkitError, match=r"none\.safetensors: no such checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(SegkitError, match=r"model\.safetensors: no readable checkpoint"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_without_the_library_one_is_told_what_to_install(tmp_path, monkeypatch):
    path = stored(tmp_path / "checkpoint_epoch3.pth")
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SegkitError, match=r"\.\[share\]"):
        export_model(path, tmp_path / "shared", LICENCE)
    with pytest.raises(SegkitError, match=r"\.\[share\]"):
        load_checkpoint(tmp_path / "model.safetensors")
    assert not (tmp_path / "shared").exists() and load_checkpoint(path).epoch == 3
