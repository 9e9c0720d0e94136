"""One step of training on a batch that is ready: network, loss, gradient, optimiser.

Every side has 117 structures, channels 32-64-128-256 and 512 at the bottom. segkit as it trains: the fast precision of
the device, channels_last, the chunked head, BCE + soft Dice, fused Adam; and with BCE alone, the loss of the textbook.
The textbook: float32, batch normalisation, a one-hot target made from the codes in each step, BCEWithLogitsLoss, Adam.
MONAI: its BasicUNet, the same target, loss and optimiser. nnU-Net: its PlainConvUNet with deep supervision, its default
loss (soft Dice of the batch + cross-entropy at every resolution), SGD with Nesterov momentum and gradients clipped to
12, as its trainer builds them; float32 on a CPU, as it runs there, float16 and compiled on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.sides import Side
from benchmarks.tables import Table, floor_row, rows_of

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment

STRUCTURES = 117
FEATURES = (32, 64, 128, 256)
BATCH = 8
ALIKE = "segkit, BCE alone"
"""The side that has the loss of the textbook."""

Step = Callable[[], object]


def measure(bench: Bench, size: tuple[int, int]) -> Table:
    parameters = {"size": size, "device": bench.device}
    module = "benchmarks.training_step"
    slow = 1 if max(size) > 256 and not _on_gpu(bench) else None
    sides = [
        Side("segkit", f"{module}:segkit", parameters),
        Side(ALIKE, f"{module}:segkit", {**parameters, "loss": "bce"}),
        Side("textbook: float32, one-hot, BCEWithLogitsLoss", f"{module}:textbook", parameters, "peer", rounds=slow),
        Side("MONAI: BasicUNet, BCEWithLogitsLoss", f"{module}:monai", parameters, "peer", rounds=slow),
        Side("nnU-Net: PlainConvUNet, its loss", f"{module}:nnunet", parameters, "peer", rounds=slow),
        Side("matrices alone", f"{module}:matrices", {"device": bench.device}, "floor"),
    ]  # fmt: skip
    taken = bench.turns(sides)
    rows = rows_of(sides, taken)[:-1]
    ours, alike, matrices, notes = taken["segkit"], taken[ALIKE], taken["matrices alone"], []
    if ours.seconds and alike.seconds and matrices.seconds:
        # of the loss that needs no second sweep over the pixels: what is computed twice is no floor
        flops, rate = alike.found["flops"], max(matrices.found["flops"] / seconds for seconds in matrices.seconds)
        words = f"{flops / 1e9:.0f} GFLOP at the {rate / 1e9:.0f} GFLOP/s of matrices in {ours.found['dtype']}"
        rows.append(floor_row("the convolutions' arithmetic", flops / rate, rows, words))
        for side, seconds in (("segkit", ours.median), (ALIKE, alike.median)):
            share = flops / seconds / rate
            speed = f"{BATCH / seconds:.1f} slices a second, {share:.0%} of the rate of matrices in turns with it"
            notes.append(f"{side}: {speed}.")
    what = (
        f"Batch {BATCH} of {size[0]} x {size[1]}, {STRUCTURES} structures, channels 32-64-128-256-512 on every side, "
        "on a batch that is ready in memory."
    )
    return Table(f"step_{size[0]}", f"A training step, {BATCH} x {size[0]} x {size[1]}", what, rows, notes)


def _on_gpu(bench: Bench) -> bool:
    return bench.device.startswith("cuda")


def pick(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def random_batch(size: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, H, W) of noise; labels (B, H, W) int64 in squares of 8 x 8, of which 60 % are background."""
    torch.manual_seed(0)
    labels = torch.randint(1, STRUCTURES + 1, (BATCH, *(side // 8 for side in size)))
    labels[torch.rand(labels.shape) < 0.6] = 0
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.randn(BATCH, 1, *size).to(device), labels.to(device)


def segkit(size: Sequence[int], device: str | None, loss: str | None = None) -> Step:
    """A step as segkit.training takes it, with its own `loss` by default."""
    from torch.utils.flop_counter import FlopCounterMode

    from segkit.choices import LOSSES
    from segkit.devices import autocast, fast_dtype, pick_device
    from segkit.losses import ModelWithLoss
    from segkit.settings import TrainSettings
    from segkit.slices import Targets
    from segkit.unet import UNet2D

    where = pick_device(device)
    images, labels = random_batch(size, where)
    codebook = torch.cat([torch.zeros(1, STRUCTURES), torch.eye(STRUCTURES)]).bool().repeat(BATCH, 1, 1)
    targets = Targets(labels, codebook.to(where), torch.ones(BATCH, STRUCTURES, dtype=torch.bool, device=where))
    model = ModelWithLoss(
        UNet2D(1, STRUCTURES, FEATURES), torch.full((STRUCTURES,), 30.0), LOSSES[loss or TrainSettings().loss]
    )
    model.to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    images, dtype = images.contiguous(memory_format=torch.channels_last), fast_dtype(where)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(where, dtype):
            mean = model(images, targets)
        mean.backward()
        torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).isfinite().item()
        optimizer.step()
        return mean.item()

    with FlopCounterMode(display=False) as counter:
        step()
    found = {"flops": counter.get_total_flops(), "dtype": str(dtype).removeprefix("torch.")}
    return lambda: {**found, "loss": step()}


def textbook(size: Sequence[int], device: str | None) -> Step:
    def double(inside: int, out: int) -> nn.Sequential:
        layers = [
            layer
            for channels in (inside, out)
            for layer in (nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())
        ]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            widths = [*FEATURES, 2 * FEATURES[-1]]
            self.down = nn.ModuleList([double(a, b) for a, b in zip([1, *widths], widths, strict=False)])
            self.up = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, 2) for w in FEATURES[::-1]])
            self.joined = nn.ModuleList([double(2 * w, w) for w in FEATURES[::-1]])
            self.head = nn.Conv2d(FEATURES[0], STRUCTURES, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = []
            for level, block in enumerate(self.down):
                x = block(F.max_pool2d(x, 2) if level else x)
                kept.append(x)
            for up, block, skip in zip(self.up, self.joined, kept[-2::-1], strict=True):
                x = block(torch.cat([skip, up(x)], 1))
            return self.head(x)

    return one_hot_step(UNet(), size, device)


def monai(size: Sequence[int], device: str | None) -> Step:
    from monai.networks.nets import BasicUNet

    widths = (*FEATURES, 2 * FEATURES[-1], FEATURES[0])
    return one_hot_step(BasicUNet(2, 1, STRUCTURES, features=widths), size, device)


def one_hot_step(network: nn.Module, size: Sequence[int], device: str | None) -> Step:
    """What people write: all channels of logits and target in float32."""
    where = pick(device)
    images, labels = random_batch(size, where)
    network.to(where)
    criterion, optimizer = nn.BCEWithLogitsLoss(), torch.optim.Adam(network.parameters(), 1e-3)

    def step() -> None:
        target = F.one_hot(labels, STRUCTURES + 1)[..., 1:].movedim(-1, 1).float()
        loss = criterion(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def nnunet(size: Sequence[int], device: str | None) -> Step:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    where = pick(device)
    images, labels = random_batch(size, where)
    widths = [*FEATURES, 2 * FEATURES[-1]]
    network = PlainConvUNet(
        1, len(widths), widths, nn.Conv2d, 3, [1, 2, 2, 2, 2], 2, STRUCTURES + 1, 2, conv_bias=True,
        norm_op=nn.InstanceNorm2d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True,
    ).to(where)  # fmt: skip
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    weights = [1, 0.5, 0.25, 0]  # halved from one resolution to the next, the lowest left out
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    if where.type == "cuda":  # as nnUNetTrainer and run_training do there
        torch.backends.cudnn.benchmark = True
        network, loss.dc = torch.compile(network), torch.compile(loss.dc)
    loss_of = DeepSupervisionWrapper(loss, [w / sum(weights) for w in weights])
    targets = [labels[:, None, :: 2**level, :: 2**level].float() for level in range(len(weights))]
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    scaler = torch.amp.GradScaler(where.type, enabled=where.type == "cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(where.type, torch.float16, enabled=where.type == "cuda"):
            loss = loss_of(network(images), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return step


def matrices(device: str | None) -> Step:
    from segkit.devices import fast_dtype, pick_device

    where = pick_device(device)
    # about a second: one product alone would begin with cores that had slept while others took their turn
    side, times = (8192, 500) if where.type == "cuda" else (2048, 24)
    matrix = torch.randn(side, side, device=where, dtype=fast_dtype(where))

    def work() -> dict:
        for _ in range(times):
            matrix @ matrix
        return {"flops": times * 2 * side**3}

    return work
