"""A scan in, a segmentation of 117 structures out: from file to file, each side by its own command or recipe."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import nnunet as commands
from benchmarks.gpu_memory import watched
from benchmarks.sides import ROOT, Side, Taken
from benchmarks.tables import Table, code_of, floor_row, rows_of

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment

NETWORK_SHAPE = (256, 256)
NNUNET = "nnU-Net: `nnUNetv2_predict`"


def measure(bench: Bench, shape: tuple[int, int, int]) -> Table:
    from benchmarks.epoch import nnunet_of_the_subject  # here, since commands are measured in processes without torch

    scan, run = bench.scan(shape), trained(bench)
    out = bench.scratch / "predicted"
    common = {"scan": str(scan), "device": bench.device}
    sides = [
        Side(name, "benchmarks.predicting:segkit",
             {**common, "run": str(run), "members": members, "out": str(out / f"segkit_{members}")},
             rounds=min(2, bench.sizes.rounds), cold=True)
        for name, members in (("segkit: `python -m segkit predict`", 1), ("segkit, an ensemble of three", 3))
    ]  # fmt: skip
    notes = []
    if bench.peers:
        prepared = nnunet_of_the_subject(bench)
        trained_peer(bench)
        arguments = prepared.predict_arguments(out / "images", out / "nnunet")
        parameters = {"scan": str(scan), "images": str(out / "images"), "out": str(out / "nnunet"),
                      "command": arguments, "environment": prepared.environment,
                      "device": bench.device}  # fmt: skip
        sides.append(Side(NNUNET, "benchmarks.predicting:nnunet", parameters, "peer", 1, True))
    else:
        notes.append("nnU-Net is left out: there is no environment of the peers.")
    parameters = {**common, "out": str(out / "monai"), "spacing_mm": spacing_mm(bench)}
    name = "MONAI: Spacing, SliceInferer, AsDiscrete, Invert, SaveImage"
    sides.append(Side(name, "benchmarks.predicting:monai", parameters, "peer", rounds=1, cold=True))
    hopeless = too_large(bench, shape)
    taken = bench.turns([side for side in sides if side.name not in hopeless], seconds=900)
    rows = rows_of(sides, {**taken, **hopeless})
    machine = bench.store.kept("machine")
    if machine:
        flops, rate = forward_flops() * shape[2], machine["rates"]["matrix_gflops"] * 1e9
        rows.append(floor_row("the convolutions' arithmetic", flops / rate, rows, f"{flops / 1e12:.1f} TFLOP"))
    found = taken[sides[0].name].found
    notes.append(f"segkit, of which: {found.get('stages', 'not told')}. Its network sees slices at 256 x 256 pixels.")
    notes.append(
        "nnU-Net's network and MONAI's slide windows of 256 x 256 over slices at the training's spacing; MONAI's takes "
        "the best structure of each voxel there and brings labels back to the scan's grid, which takes less memory "
        "than bringing back all channels; nnU-Net brings back all of them, its own way. No side mirrors."
    )
    what = (
        f"A CT of {bench.scan_name(shape)} voxels (made of {bench.data_name}) from .nii.gz to .nii.gz, networks of "
        "32-64-128-256-512 channels and 117 structures, the whole process with its start."
    )
    return Table(name_of(shape), f"Predict and export {bench.scan_name(shape)}", what, rows, notes)


def too_large(bench: Bench, shape: tuple[int, int, int]) -> dict[str, Taken]:
    """The sides whose memory at a smaller scan says that they cannot end here.

    That is nnU-Net, which brings all channels back to the scan's grid: with as many voxels more, as much more. What the
    others hold grows with the slices alone; they try.
    """
    import psutil  # not in the peers' environment, which imports this file too

    smaller = bench.sizes.scans[0]
    kept = bench.store.kept(name_of(smaller), code_of(Path(__file__)))
    if shape == smaller or kept is None:
        return {}
    times, most = math.prod(shape) / math.prod(smaller), psutil.virtual_memory().total / 2**20
    words = (
        "left out: it needed {:.1f} GiB for " + bench.scan_name(smaller) + " voxels, and here are {:.0f} times as many"
    )
    return {
        row["side"]: Taken(problem=words.format(row["peak_mb"] / 1024, times))
        for row in kept["rows"]
        if row["side"] == NNUNET and row["peak_mb"] and row["peak_mb"] * times > 1.5 * most
    }


def name_of(shape: tuple[int, int, int]) -> str:
    return "predict_" + "_".join(map(str, shape))


def trained(bench: Bench) -> Path:
    """A run of segkit on the subject, long enough that what it finds looks like organs and not like noise."""
    from segkit.settings import TrainSettings
    from segkit.training import train

    run = bench.work / "predicting_run"

    def work() -> int:
        settings = TrainSettings(
            epochs=1, learning_rate=2e-3, slices_per_epoch=8 * bench.sizes.warm_steps, validation_slices=16,
            target_shape=NETWORK_SHAPE, device=bench.device,
        )  # fmt: skip
        return train(bench.open(bench.subject_dir), settings, run, progress=False)[0]["steps"]

    bench.store.once("predicting_run", work, [ROOT / "segkit"])
    return run


def trained_peer(bench: Bench) -> None:
    """nnU-Net's model on the same subject: its time to predict does not depend on what it learned."""
    from benchmarks.epoch import nnunet_of_the_subject

    bench.store.once("nnunet_predicting_run", lambda: nnunet_of_the_subject(bench).train(1, 2), commands.CODE)


def spacing_mm(bench: Bench) -> list[float]:
    """Of the subject that the networks are trained on, along the axes of its file."""
    [subject] = bench.open(bench.subject_dir).staged.values()
    return list(subject.spacing_mm[::-1])


def forward_flops() -> float:
    """Of segkit's default network on one slice."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.training_step import FEATURES
    from segkit.unet import UNet2D

    network = UNet2D(1, 117, FEATURES).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, *NETWORK_SHAPE, device="meta"))
    return counter.get_total_flops()


def segkit(scan: str, run: str, members: int, out: str, device: str) -> Callable[[], dict]:
    """The verb; an ensemble is the same network several times."""
    command = [sys.executable, "-m", "segkit", "predict", scan, "--checkpoint", *[run] * members, "--out", out]
    command, held = watched([*command, "--device", device], device, Path(f"{out}.gpu"))

    def work() -> dict:
        shutil.rmtree(out, ignore_errors=True)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return {"stages": done.stdout.splitlines()[0].split(": ", 1)[-1], **held()}

    return work


def nnunet(
    scan: str, images: str, out: str, command: Sequence[str], environment: Mapping[str, str], device: str
) -> Callable[[], dict]:
    command, held = watched(command, device, Path(f"{out}.gpu"))
    for folder in (images, out):
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(parents=True)
    (Path(images) / "scan_0000.nii.gz").symlink_to(scan)

    def work() -> dict:
        subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=sys.stderr)
        [written] = Path(out).glob("scan.nii.gz")
        return {"bytes": written.stat().st_size, **held()}

    return work


def monai(scan: str, out: str, device: str | None, spacing_mm: Sequence[float]) -> Callable[[], None]:
    def work() -> None:
        import torch
        from monai import transforms as t
        from monai.inferers import SliceInferer
        from monai.networks.nets import BasicUNet

        from benchmarks.training_step import FEATURES, pick

        where = pick(device)
        before = t.Compose(
            [
                t.LoadImaged("image"),
                t.EnsureChannelFirstd("image"),
                t.Spacingd("image", pixdim=[*spacing_mm[:2], -1], mode="bilinear"),
                t.ScaleIntensityRanged("image", -1024, 1024, -1, 1, clip=True),
            ]
        )
        after = t.Compose(
            [
                t.AsDiscreted("pred", argmax=True),
                t.Invertd("pred", transform=before, orig_keys="image", nearest_interp=True, to_tensor=True),
                t.SaveImaged("pred", output_dir=out, output_dtype="uint8", separate_folder=False, print_log=False),
            ]
        )
        network = BasicUNet(2, 1, 118, features=(*FEATURES, 2 * FEATURES[-1], FEATURES[0])).to(where).eval()
        inferer = SliceInferer(roi_size=NETWORK_SHAPE, sw_batch_size=8, spatial_dim=2)
        item = before({"image": scan})
        with torch.no_grad():
            item["pred"] = inferer(item["image"][None].to(where), network)[0]
        after(item)

    return work
