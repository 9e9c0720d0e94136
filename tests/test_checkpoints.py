import pickle

import pytest
import torch

from segkit.checkpoints import best_checkpoint, load_checkpoint, save_checkpoint
from segkit.errors import SegkitError
from segkit.runs import write_json
from segkit.unet import UNet2D

NETWORK = {"in_channels": 1, "out_channels": 2, "features": [4, 8]}
LABELS = {"liver": 0, "spleen": 1}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = UNet2D(**NETWORK).to(memory_format=torch.channels_last)
    path = save_checkpoint(
        tmp_path / "checkpoint_epoch3.pth", model, NETWORK, LABELS, {"target_shape": [32, 32]}, 3, {"val_dice": 0.5},
        {"data": "abc"},
    )  # fmt: skip
    return path, model


def test_what_is_saved_comes_back_and_nothing_else_is_left(saved):
    path, model = saved
    loaded = load_checkpoint(path, LABELS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert (loaded.epoch, loaded.label_map, loaded.target_shape) == (3, LABELS, (32, 32))
    assert loaded.scores == {"val_dice": 0.5} and loaded.record == {"data": "abc"} and not loaded.model.training
    image = torch.randn(1, 1, 32, 32)
    assert torch.equal(loaded.model(image), model.eval()(image))


def test_it_opens_with_torch_alone_as_data(saved):
    content = torch.load(saved[0], weights_only=True)
    assert content["label_map"] == LABELS and content["settings"] == {"target_shape": [32, 32]}


def test_another_label_map_is_refused_with_the_difference(saved):
    with pytest.raises(SegkitError, match=r"checkpoint_epoch3\.pth: trained with another label map.*spleen.*aorta"):
        load_checkpoint(saved[0], {"liver": 0, "aorta": 1})
    with pytest.raises(SegkitError, match="on other channels"):
        load_checkpoint(saved[0], {"liver": 1, "spleen": 0})


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_payload_is_not_executed(tmp_path):
    for name, write in (("a.pth", torch.save), ("b.pth", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        write({"format": 2, "weights": Payload(tmp_path / "executed")}, tmp_path / name)
        with pytest.raises(SegkitError, match=name.replace(".", r"\.")):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def change(path, **values):
    content = torch.load(path, weights_only=True)
    for name, value in values.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    torch.save(content, path)


@pytest.mark.parametrize(
    "values",
    [
        {"format": 99},
        {"weights": None},
        {"label_map": {"liver": 0}},
        {"label_map": {"liver": 0, "../spleen": 1}},
        {"network": {"in_channels": 1, "out_channels": 2, "features": [4, 16]}},
        {"network": {"in_channels": 1, "out_channels": 2, "features": [10**6, 10**6]}},  # allocates nothing
        {"network": {"layers": 4}},
        {"epoch": "three"},
        {"weights": {"head.weight": 3}},
    ],
)
def test_a_damaged_content_is_named(saved, values):
    change(saved[0], **values)
    with pytest.raises(SegkitError, match=r"checkpoint_epoch3\.pth"):
        load_checkpoint(saved[0])


def test_a_damaged_file_is_named(saved):
    path, _ = saved
    content = path.read_bytes()
    for damaged in (b"", b"nonsense", content[: len(content) // 2], content[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(SegkitError, match=r"checkpoint_epoch3\.pth: no readable checkpoint"):
            load_checkpoint(path)
    with pytest.raises(SegkitError, match="no such checkpoint"):
        load_checkpoint(path.parent / "none.pth")
    with pytest.raises(SegkitError):
        load_checkpoint(path.parent)


def test_a_failed_write_leaves_the_older_checkpoint(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SegkitError, match=rf"{path}: the disk is full"):
        save_checkpoint(path, model, NETWORK, LABELS, {}, 4, {}, {})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_best_checkpoint_is_the_one_that_validated_best_and_is_there(tmp_path):
    with pytest.raises(SegkitError, match=r"no training_history\.json"):
        best_checkpoint(tmp_path)
    rows = [{"epoch": e, "val_dice": d} for e, d in ((1, 0.1), (2, 0.5), (3, None), (4, 0.4))]
    write_json(tmp_path / "training_history.json", {"epochs": rows})
    with pytest.raises(SegkitError, match="no checkpoint"):
        best_checkpoint(tmp_path)
    for epoch in (1, 3, 4):
        (tmp_path / f"checkpoint_epoch{epoch}.pth").touch()
    assert best_checkpoint(tmp_path).name == "checkpoint_epoch4.pth"
    (tmp_path / "training_history.json").write_text("[]")
    with pytest.raises(SegkitError, match="not a training history"):
        best_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": torch.tensor([2, 2])}, "no checkpoint of this segkit"),
        ({"format": 1}, "expected format 2, found 1"),
        ({"settings": {}}, "TARGET_SHAPE"),
        ({"scores": {"thresholds": 3.0}}, "a threshold for each of 2 structures"),
    ],
)
def test_a_field_that_is_not_what_it_should_be_is_named(saved, change, says):
    content = torch.load(saved[0], weights_only=True)
    torch.save({**content, **change}, saved[0])
    with pytest.raises(SegkitError, match=rf"checkpoint_epoch3\.pth: .*{says}"):
        load_checkpoint(saved[0])


def test_weights_of_another_type_are_refused(saved):
    content = torch.load(saved[0], weights_only=True)
    content["weights"] = {name: tensor.double() for name, tensor in content["weights"].items()}
    torch.save(content, saved[0])
    with pytest.raises(SegkitError, match="weights of another type"):
        load_checkpoint(saved[0])


def test_another_normalisation_is_another_network(saved):
    loaded = load_checkpoint(saved[0])
    with pytest.raises(SegkitError, match="NORM"):
        loaded.start_network(UNet2D(**NETWORK, norm="batch"), LABELS)
