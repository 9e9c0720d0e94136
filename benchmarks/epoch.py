"""Steps of training from files, loader and augmentation included: what a training takes in the long run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import inputs, nnunet
from benchmarks.sides import Side
from benchmarks.tables import Table, floor_row, rows_of
from benchmarks.training_step import BATCH, FEATURES, pick

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment


def measure(bench: Bench) -> Table:
    size, steps = bench.sizes.steps[0], bench.sizes.epoch_steps
    common = {"size": size, "steps": steps, "device": bench.device}
    data = {"data_dir": str(bench.subject_dir), "stage_dir": str(bench.work / "staged")}
    sides = [Side("segkit: from its store", "benchmarks.epoch:segkit", {**common, **data})]
    notes = []
    if bench.peers:
        prepared = nnunet_of_the_subject(bench)
        sides += [
            Side("nnU-Net: its own trainer", "benchmarks.epoch:nnunet_trainer",
                 {"steps": steps, "device": bench.device, "environment": prepared.environment}, "peer",
                 rounds=2),
            Side("MONAI: CacheDataset, RandAffine, BasicUNet", "benchmarks.epoch:monai",
                 {**common, "folder": str(prepared.raw)}, "peer", rounds=2),
        ]  # fmt: skip
        seconds = bench.store.kept("nnunet_subject", nnunet.CODE)
        notes.append(f"nnU-Net's planning and preprocessing of this one subject took {seconds:.0f} s once, before.")
    else:
        notes.append("nnU-Net and MONAI are left out: there is no environment of the peers.")
    taken = bench.turns(sides)
    rows = rows_of(sides, taken)
    flops = taken[sides[0].name].found.get("flops_a_step")
    rate = bench.store.kept("machine")
    if flops and rate:
        rate = rate["rates"]["matrix_gflops"] * 1e9
        rows.append(floor_row("the convolutions' arithmetic", steps * flops / rate, rows))
    what = (
        f"{steps} steps of {BATCH} slices of {size[0]} x {size[1]} pixels from one subject of "
        f"{bench.scan_name(bench.sizes.subject)} voxels (made of {bench.data_name}), read, augmented and learned from; "
        f"117 structures, channels 32-64-128-256-512. nnU-Net's loader uses {bench.threads} processes beside its "
        "training, as it does by default; the others load in the training's own process."
    )
    return Table("epoch", "An epoch from files", what, rows, notes)


def nnunet_of_the_subject(bench: Bench) -> nnunet.NnUNet:
    """The subject, planned and preprocessed by nnU-Net, with the same channels and pixels as the others' networks."""
    prepared = nnunet.NnUNet(bench.work / "nnunet_subject", bench.peers, bench.threads, bench.device)
    size, widths = bench.sizes.steps[0], [*FEATURES, 2 * FEATURES[-1]]
    changes = {"batch_size": BATCH, "patch_size": list(size), "architecture": nnunet.network(widths)}

    def prepare() -> float:
        data = bench.open(bench.subject_dir)
        whole = tuple(type(part)(part.subject) for part in data.split.train)
        inputs.write_single_labels(data, prepared.raw, {"Tr": whole})
        return prepared.prepare(changes)

    bench.store.once("nnunet_subject", prepare, nnunet.CODE)
    return prepared


def segkit(size: Sequence[int], steps: int, device: str | None, data_dir: str, stage_dir: str) -> Callable[[], dict]:
    from torch.utils.flop_counter import FlopCounterMode

    from segkit.dataset import open_data
    from segkit.devices import pick_device
    from segkit.ranks import Ranks
    from segkit.settings import TrainSettings
    from segkit.slices import SliceDataset, batches
    from segkit.splits import Part
    from segkit.steps import Learner

    data = open_data(data_dir, stage_dir, progress=False)
    settings = TrainSettings(target_shape=tuple(size), batch_size=BATCH, features=FEATURES, device=device).checked()
    learner = Learner(data, settings, Ranks(pick_device(device)))
    slices = SliceDataset(data.staged, [Part(name) for name in data.staged], data.label_map)
    epoch = 0

    def learn(number: int) -> None:
        nonlocal epoch
        epoch += 1
        order = slices.order(0, epoch, BATCH * number, settings.balance)
        for batch in batches(slices, order, BATCH, settings.workers):
            learner.step(batch, epoch, settings.learning_rate)

    with FlopCounterMode(display=False) as counter:
        learn(1)

    def work() -> dict:
        learn(steps)
        return {"flops_a_step": counter.get_total_flops()}

    return work


def nnunet_trainer(steps: int, device: str, environment: Mapping[str, str]) -> Callable[[], None]:
    os.environ.update(environment)
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args("1", nnunet.CONFIGURATION, "all", nnunet.TRAINER, device=torch.device(device))
    trainer.num_iterations_per_epoch, trainer.num_epochs = steps, 1000
    trainer.on_train_start()

    def work() -> None:
        trainer.on_train_epoch_start()
        losses = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(steps)]
        trainer.on_train_epoch_end(losses)

    return work


def monai(size: Sequence[int], steps: int, device: str | None, folder: str) -> Callable[[], None]:
    """Slices cropped at random from the cached volume of CT and labels, one label a voxel as in nnU-Net's raw data."""
    from pathlib import Path

    from monai import transforms as t
    from monai.data import CacheDataset, DataLoader
    from monai.networks.nets import BasicUNet

    where, keys = pick(device), ["image", "label"]
    raw = Path(folder)
    [image] = (raw / "imagesTr").iterdir()
    [label] = (raw / "labelsTr").iterdir()
    transform = t.Compose(
        [
            t.LoadImaged(keys),
            t.EnsureChannelFirstd(keys),
            t.ScaleIntensityRanged("image", -1024, 1024, -1, 1, clip=True),
            t.RandSpatialCropd(keys, roi_size=(-1, -1, 1), random_size=False),
            t.SqueezeDimd(keys, dim=-1),
            t.RandAffined(
                keys, prob=1, rotate_range=0.26, scale_range=0.15, translate_range=10, mode=("bilinear", "nearest")
            ),
            t.Resized(keys, spatial_size=list(size), mode=("bilinear", "nearest")),
            t.RandGaussianNoised("image", prob=1, std=0.01),
        ]
    )
    data = CacheDataset(
        [{"image": image, "label": label}] * (BATCH * steps), transform, hash_as_key=True, progress=False
    )
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    network = BasicUNet(2, 1, 117, features=(*FEATURES, 2 * FEATURES[-1], FEATURES[0])).to(where)
    criterion, optimizer = nn.BCEWithLogitsLoss(), torch.optim.Adam(network.parameters(), 1e-3)

    def work() -> None:
        for batch in loader:
            images, labels = (batch[key].as_tensor().to(where) for key in keys)
            target = F.one_hot(labels[:, 0].long(), 118)[..., 1:].movedim(-1, 1).float()
            loss = criterion(network(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return work
