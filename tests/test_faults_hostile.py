"""Faults: files made to harm. No code in them runs, and none asks for more than the file itself is worth.

Archives with `../`, links and bombs: `test_download.py`, whose cases are counted here and not written twice.
"""

import builtins
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from damage import watched
from dicom_files import make_series, save
from pydicom.uid import DeflatedExplicitVRLittleEndian
from test_download import HOSTILE as ARCHIVES
from test_download import test_a_hostile_archive_writes_nothing_outside_and_no_half_subject as unpack_hostile
from test_faults_damaged import NETWORK, a_subject, save_network
from test_faults_damaged_scans import AFFINE, HU, nrrd_header, read_one

from segkit import labels, untrusted
from segkit.checkpoints import load_checkpoint, load_checkpoints
from segkit.errors import SegkitError
from segkit.formats.label_image import embedded_names, read_names
from segkit.seen import read_split
from segkit.subjects import read_meta_split
from segkit.training_state import load_state

# --- code


class Payload:
    """Unpickled, it calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(marker: Path) -> dict[str, Payload]:
    """Ways to make the file `marker`."""
    text = f"open({str(marker)!r}, 'w')"
    return {
        "open": Payload(open, str(marker), "w"),
        "eval": Payload(builtins.eval, text),
        "exec": Payload(builtins.exec, text),
        "system": Payload(os.system, f"touch '{marker}'"),
        "popen": Payload(subprocess.Popen, ["touch", str(marker)]),
        "touch": Payload(Path.touch, marker),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "numpy": Payload(np.memmap, str(marker), "uint8", "w+", 0, (1,)),
        "torch": Payload(torch.save, {"x": 1}, str(marker)),
        "partial": Payload(map, open, [str(marker)]),
    }


def containers(content: object, folder: Path) -> dict[str, bytes]:
    """The same content in every kind of file that torch or numpy reads."""
    files = {f"pickle {protocol}": pickle.dumps(content, protocol) for protocol in range(6)}
    for protocol in (2, 3, 4, 5):
        torch.save(content, folder / "made", pickle_protocol=protocol)
        files[f"torch {protocol}"] = (folder / "made").read_bytes()
    torch.save(content, folder / "made", _use_new_zipfile_serialization=False)
    files["torch, older"] = (folder / "made").read_bytes()
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/constants.pkl", pickle.dumps(content, 2))
        files[f"zip {compression}"] = packed.getvalue()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("pickle", "storages", "tensors", "sys_info"):
            inside = pickle.dumps(content, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(inside)
            archive.addfile(entry, io.BytesIO(inside))
    files["tar"] = packed.getvalue()
    packed = io.BytesIO()
    np.save(packed, np.array([content], object), allow_pickle=True)
    files["npy"] = packed.getvalue()
    packed = io.BytesIO()
    np.savez(packed, np.array([content], object))
    files["npz"] = packed.getvalue()
    return files


def test_code_in_a_file_does_not_run(tmp_path, fault):
    row = fault(
        "a pickle that calls open, eval, system, ..., in each kind of file of torch and numpy, as checkpoint, state, "
        "shared model, compressed voxels and JSON",
        "refused by name, and nothing was called",
    )
    marker = tmp_path / "called"
    subject = a_subject(tmp_path)
    for call in payloads(marker).values():
        for content in (call, {"format": 2, "weights": call, "epoch": 1}, [call]):
            made = containers(content, tmp_path)
            marker.unlink(missing_ok=True)  # torch.save(call) calls nothing, but be sure
            for packed in made.values():
                for name, read in (
                    ("checkpoint_epoch1.pth", load_checkpoint),
                    ("last_state.pth", load_state),
                    ("model.safetensors", load_checkpoint),
                    ("label_map.json", labels.load_label_map),
                ):
                    path = tmp_path / name
                    path.write_bytes(packed)
                    with pytest.raises(SegkitError, match=name):
                        read(path)
                    row.times += 1
                [store] = subject.folder.glob("codes-*.b2nd")
                whole = store.read_bytes()
                store.unlink()
                store.write_bytes(packed)
                with pytest.raises(SegkitError, match=r"codes-\w+\.b2nd"):
                    type(subject)(subject.folder, subject.info).labels()
                store.unlink()
                store.write_bytes(whole)
                row.times += 1
    assert not marker.exists()
    pickle.loads(pickle.dumps(payloads(marker)["open"]))  # these payloads do work where somebody reads a pickle
    assert marker.exists()


def test_the_source_runs_no_code_from_files_and_no_shell(fault):
    """What would is not there to be reached. `git` is asked with a list of words, never through a shell."""
    import ast

    row = fault("eval, exec, pickle, a shell, allow_pickle, yaml in segkit's source (calls looked at)", "none of them")
    for path in sorted((ROOT / "segkit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"pickle", "marshal", "shelve", "dill", "yaml"}, path
                assert "subprocess" not in modules or path.name == "record.py", path
            elif isinstance(node, ast.Call):
                row.times += 1
                plain = getattr(node.func, "id", "")  # `model.eval()` is another one
                method = getattr(node.func, "attr", "")
                assert plain not in ("eval", "exec", "compile", "__import__"), (path, node.lineno)
                shell = method in ("system", "popen", "Popen", "spawnl", "spawnv")
                assert not shell or ast.unparse(node.func) == "platform.system", (path, node.lineno)
                given = {word.arg: word.value for word in node.keywords}
                for word, harmless in (("shell", False), ("allow_pickle", False), ("weights_only", True)):
                    assert word not in given or given[word].value is harmless, (path, node.lineno)
                is_torch = method == "load" and getattr(node.func.value, "id", "") == "torch"
                assert not is_torch or "weights_only" in given, (path, node.lineno)


# --- claims and bombs


def label_table(content: bytes, folder: Path) -> Path:
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, content))
    nib.save(image, folder / "labels.nii")
    return folder / "labels.nii"


def laughs(names: int = 12) -> bytes:
    """An entity that stands for ten of another, which stands for ten of another, ..."""
    entities = "".join(f'<!ENTITY n{n} "{f"&n{n - 1};" * 10}">' for n in range(1, names))
    start = '<?xml version="1.0"?><!DOCTYPE LabelTable [<!ENTITY n0 "haha">'
    return f'{start}{entities}]><LabelTable><Label Key="1">&n{names - 1};</Label></LabelTable>'.encode()


def bombs(folder: Path):
    """What is done -> its file, and what reads it. Each is small, and would take a GB or a day."""

    def scan(name: str, content: bytes):
        (folder / name).write_bytes(content)
        return folder / name, read_one

    def header(shape, dtype=np.int16, offset: float = 352) -> bytes:
        made = nib.Nifti1Header()
        made.set_data_dtype(dtype)
        made.set_data_shape(shape)
        made["vox_offset"], made["magic"], made["sform_code"] = offset, b"n+1", 1
        made.set_sform(AFFINE)
        return made.binaryblock

    packed = gzip.compress(bytes(1 << 27), 9)  # 128 MiB in 130 kB
    extension = b"\1\0\0\0" + struct.pack("<ii", (1 << 27) - 16, 6)
    for shape in ((32767, 32767, 32767), (2000, 2000, 2000), (1, 1, 32767), (32767, 1, 1)):
        yield f"NIfTI of {shape}", *scan(f"a{len(str(shape))}{shape[0]}.nii", header(shape) + bytes(500))
        yield (
            f"NIfTI.gz of {shape}",
            *scan(f"b{len(str(shape))}{shape[0]}.nii.gz", gzip.compress(header(shape) + bytes(500))),
        )
    yield (
        "an extension of 128 MiB",
        *scan("ext.nii.gz", gzip.compress(header((9, 9, 9), offset=1 << 27) + extension) + packed),
    )
    small = struct.pack("<ii", 16, 6) + bytes(8)
    many_small = gzip.compress(header((9, 9, 9), offset=1 << 27) + b"\1\0\0\0" + small * (1 << 20))
    yield "a million extensions", *scan("exts.nii.gz", many_small)
    yield (
        "voxels behind 128 MiB of nothing",
        *scan("off.nii.gz", gzip.compress(header((9, 9, 9), offset=1 << 27)) + packed),
    )
    yield "a NRRD of 10^18 voxels", *scan("a.nrrd", nrrd_header("gzip").replace(b"12 10 8", b"1000000 1000000 1000000"))
    slow = nrrd_header("raw").replace(b"(-2,0,0) (0,1.5,0) (0,0,3)", b"(" * 900_000)
    yield "a NRRD header of open brackets", *scan("b.nrrd", slow + HU.tobytes())
    slow = nrrd_header("raw").replace(b"12 10 8", b"1 " * 400_000)
    yield "a NRRD of 400,000 dimensions", *scan("c.nrrd", slow + HU.tobytes())

    def words(name: str, content: bytes, read):
        (folder / name).write_bytes(content)
        return folder / name, read

    readers = (("labels.json", read_names), ("label_map.json", labels.load_label_map), ("split.json", read_split))
    for name, read in readers:
        yield f"lists in lists ({name})", *words(f"deep {name}", b"[" * 1_000_000, read)
        yield f"objects in objects ({name})", *words(f"deeper {name}", b'{"a":' * 200_000 + b"1" + b"}" * 200_000, read)
        yield (
            f"a number of a million digits ({name})",
            *words(f"digits {name}", b'{"liver": ' + b"9" * 1_000_000 + b"}", read),
        )
        yield f"infinity ({name})", *words(f"inf {name}", b'{"liver": 1e999}', read)
        yield f"NaN ({name})", *words(f"nan {name}", b'{"liver": NaN}', read)
        yield f"40 MB of lists ({name})", *words(f"large {name}", b"[" + b"[]," * 14_000_000 + b"[]]", read)
    slabs = [{"subject": "s0", "slabs": [[-(10**12), 5]]}]
    text = {"data_dir": "x", "ct_bytes": {}, "source": "x", "train": slabs, "val": slabs, "test": slabs}
    yield "a slab of 10^12 slices", *words("slab split.json", json.dumps(text).encode(), read_split)
    yield (
        "a cell of 10 MB",
        *words("meta.csv", b"image_id;split\n" + b"a" * 10_000_000, lambda path: read_meta_split(path.parent)),
    )
    yield (
        "an entity that stands for 10^11 others",
        label_table(laughs(), folder),
        lambda path: embedded_names(path, "s0"),
    )


def test_claims_and_bombs(tmp_path, fault):
    row = fault(
        "small files that claim or hold too much: dimensions, extensions, brackets, nesting, digits, entities",
        "refused by name in 64 MiB",
    )
    for what, path, read in bombs(tmp_path):
        with watched(), pytest.raises(SegkitError) as error:
            read(path)
        assert path.name in str(error.value), what
        row.times += 1


def deflated(folder: Path) -> Path:
    """A DICOM series deflated as a whole, one behind a meta group that a quick look does not pass."""
    series = make_series(HU[..., :2], AFFINE)
    for image in series:
        image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    series[1].file_meta.PrivateInformationCreatorUID = "1.2"
    series[1].file_meta.PrivateInformation = bytes(100_000)
    return save(series, folder)


def test_deflated_dicom_is_not_inflated(tmp_path, fault):
    row = fault("a DICOM file deflated as a whole (128 MiB in 130 kB)", "refused by name in 64 MiB")
    for path in sorted(deflated(tmp_path / "series").iterdir()):
        content = path.read_bytes()
        # the data set, deflated without a header, begins where the meta group ends
        begin = 132 + 12 + int.from_bytes(content[140:144], "little")
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        bomb = packer.compress(bytes(1 << 27)) + packer.flush()
        path.write_bytes(content[:begin] + bomb)
        with watched(), pytest.raises(SegkitError, match=f"{path.name}: is deflated as a whole"):
            read_one(path)
        row.times += 1


def test_checkpoints_that_claim_more_than_they_hold(tmp_path, fault):
    row = fault("checkpoints whose tensors repeat, grow or pack what the file holds", "refused by name in 64 MiB")
    path = save_network(tmp_path / "checkpoint_epoch1.pth")
    content = torch.load(path, weights_only=True)
    wide = {"in_channels": 1, "out_channels": 2, "features": [20_000, 20_000]}
    shapes = {name: tensor.shape for name, tensor in _meta(wide).state_dict().items()}
    repeated = {name: torch.zeros(1).expand(shape) if shape else torch.zeros(()) for name, shape in shapes.items()}
    for changed in (
        {"network": wide, "weights": repeated},
        {"scores": {"x": torch.zeros(1).expand(10**6, 10**6)}},
        {"record": {"x": [torch.zeros(1).expand(10**9)] * 3}},
        {"weights": {**content["weights"], "x": torch.zeros(2, 2).to_sparse()}},
        {"network": {**NETWORK, "features": [10**9, 10**9]}},
        {"network": {**NETWORK, "features": [4] * 100_000}},
        {"network": {**NETWORK, "in_channels": 10**12}},
        {"settings": {"target_shape": [float("inf"), 32]}},
        {"settings": {"target_shape": [2**40, 2**40]}},
    ):
        torch.save({**content, **changed}, path)
        _refused(path, row)
    torch.save(content, path)
    for name in ("packed", "larger"):
        with (
            zipfile.ZipFile(save_network(tmp_path / "checkpoint_epoch2.pth")) as whole,
            zipfile.ZipFile(path, "w") as bad,
        ):
            for entry in whole.infolist():
                inside = whole.read(entry)
                if entry.filename.endswith("/data/0"):
                    inside = bytes(1 << 27)
                packed = (
                    zipfile.ZIP_DEFLATED if name == "packed" or entry.filename.endswith("/0") else zipfile.ZIP_STORED
                )
                bad.writestr(entry.filename, inside, packed)
        assert path.stat().st_size < 1 << 20
        _refused(path, row)
    shared = save_network(tmp_path / "model.safetensors").read_bytes()
    for length in (0, 1, 2**31, 2**32, 2**62, 2**64 - 1, len(shared), len(shared) - 8):
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length) + shared[8:])
        _refused(path, row)
    for header in (
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        {
            "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"__metadata__": {"segkit": "[" * 100_000}},
        {"__metadata__": {"segkit": json.dumps({"format": 2, "sha256": "0" * 64})}},
    ):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        _refused(path, row)


def _meta(network: dict) -> torch.nn.Module:
    from segkit.networks import build_network

    with torch.device("meta"):
        return build_network(**network)


def _refused(path: Path, row) -> None:
    with watched(), pytest.raises(SegkitError, match=path.name.replace(".", r"\.")):
        load_checkpoint(path)
    row.times += 1


def test_a_history_names_no_file_elsewhere(tmp_path, fault):
    row = fault("training_history.json whose epoch is a path", "refused by name")
    elsewhere = save_network(tmp_path / "elsewhere.pth")
    run = tmp_path / "run"
    (run / "checkpoint_epoch1").mkdir(parents=True)
    for epoch in ("1/../../elsewhere", f"/../..{elsewhere.with_suffix('')}", ["1"], {"a": 1}, 1.0, True, None, "1"):
        (run / "training_history.json").write_text(json.dumps({"epochs": [{"epoch": epoch, "val_dice": 0.5}]}))
        with pytest.raises(SegkitError, match=r"training_history\.json"):
            load_checkpoints(run)
        row.times += 1


def test_hostile_archives(tmp_path, fault):
    row = fault(
        "archives with ../, links, devices, bombs, doubled names, ... (test_download.py)",
        "nothing outside, nothing half",
    )
    for number, wrong in enumerate(ARCHIVES):
        (tmp_path / str(number)).mkdir()
        unpack_hostile(tmp_path / str(number), wrong)
        row.times += 1


def test_a_json_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    """The limit is one of bytes on the disk: what lies beyond is not looked at."""
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    monkeypatch.setattr(untrusted, "MOST_JSON", 50)
    with pytest.raises(
        SegkitError, match=r"large\.json: not readable as JSON \(\d+ bytes, expected at most 50\); again"
    ):
        untrusted.read_json(path, "again")
