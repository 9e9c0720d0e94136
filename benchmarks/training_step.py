"""One training step beside the textbook's and nnU-Net's: seconds, memory, and how much of the machine it uses.

usage: python benchmarks/training_step.py [--size 256 256] [--batch 8] [--rounds 5] [--device cpu] [--threads N]
                                          [--data DATA_DIR] [--stage STAGE_DIR]

Batch 8 of 256 x 256, 117 structures, features 32-64-128-256 and a bottleneck of 512 for every side:

- segkit as it trains: the fast precision of the device, channels_last, the chunked head, fused Adam.
- textbook: float32, batch normalisation, a one-hot target made from the codes in each step, BCEWithLogitsLoss, Adam.
- nnU-Net: its PlainConvUNet with instance normalisation, leaky ReLU and deep supervision, and its default loss, soft
  Dice of the batch + cross-entropy over 118 labels at every resolution, halved from one to the next, with the lowest
  left out (Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z; the loss is written here from that
  description), SGD with Nesterov momentum 0.99 and gradients clipped to 12; float32 on a CPU, as it runs there, float16
  on CUDA. The network is `pip install --no-deps --target DIR dynamic-network-architectures`, with DIR in PYTHONPATH;
  without it this row is left out.

Sides take their steps in turns in one process, medians of ROUNDS. Memory is the peak of a process of its own (on CUDA
what torch allocated). GFLOP: what torch counts of convolutions and matrices of segkit's step; its share is of the rate
at which bfloat16 matrices of 2048 x 2048 are multiplied in the same turns. Then the step with the real loader, from
the store through augmentation, beside the same step on a fixed batch: on the subjects of DATA_DIR, staged in
STAGE_DIR, else on a phantom.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segkit import augment
from segkit.dataset import open_data
from segkit.devices import autocast, fast_dtype, pick_device
from segkit.losses import ModelWithLoss
from segkit.phantom import write_phantoms
from segkit.ranks import Ranks
from segkit.settings import TrainSettings
from segkit.slices import SliceDataset, Targets, batches, epoch_order
from segkit.steps import Learner
from segkit.unet import UNet2D

STRUCTURES = 117
FEATURES = (32, 64, 128, 256)
MATRIX = 2048

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--stage", type=Path)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = pick_device(chosen.device)
    if chosen.memory_of:
        print(peak_mb_of(SIDES[chosen.memory_of], chosen, device))
        return
    size = " x ".join(map(str, chosen.size))
    threads = torch.get_num_threads()
    print(f"{device}, {threads} threads, torch {torch.__version__}, batch {chosen.batch} of {size}\n", flush=True)
    compare_steps(chosen, device)
    compare_loader(chosen, device)


def compare_steps(chosen: argparse.Namespace, device: torch.device) -> None:
    """The table of the sides, and segkit's share of the rate of matrices."""
    sides = {}
    for name, make in SIDES.items():
        try:
            sides[name] = make(chosen, device)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}; see the top of this file for how to install it\n")
    with FlopCounterMode(display=False) as counter:
        sides["segkit"]()
    seconds = in_turns({**sides, "matrix": matrix_product(device)}, chosen.rounds, device)
    peaks = {name: peak_mb_in_new_process(name) for name in sides}
    print("| step | seconds | times segkit | slices/s | peak MB | segkit's part of it |\n|---|---|---|---|---|---|")
    for name in sides:
        ratio, part = seconds[name] / seconds["segkit"], peaks["segkit"] / peaks[name]
        print(
            f"| {name} | {seconds[name]:.3f} | {ratio:.2f} | {chosen.batch / seconds[name]:.2f} | {peaks[name]} | "
            f"{part:.2f} |"
        )
    rate, fastest = counter.get_total_flops() / seconds["segkit"], 2 * MATRIX**3 / seconds["matrix"]
    print(
        f"\nsegkit's step: {counter.get_total_flops() / 1e9:.0f} GFLOP, {rate / 1e9:.0f} GFLOP/s, {rate / fastest:.0%} "
        f"of the {fastest / 1e9:.0f} GFLOP/s of bfloat16 matrices\n"
    )


def in_turns(sides: dict[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each side, all run in turns after one round that warms up."""
    taken = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def matrix_product(device: torch.device) -> Step:
    a = torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    return lambda: a @ a


def random_batch(chosen: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, Targets]:
    """Images (B, 1, H, W) of noise; codes in squares of 8 x 8, of which 60 % are background and none overlap."""
    torch.manual_seed(0)
    rows, columns = (side // 8 for side in chosen.size)
    codes = torch.randint(1, STRUCTURES + 1, (chosen.batch, rows, columns))
    codes[torch.rand(codes.shape) < 0.6] = 0
    codes = codes.repeat_interleave(8, 1).repeat_interleave(8, 2)
    codebook = torch.cat([torch.zeros(1, STRUCTURES), torch.eye(STRUCTURES)]).bool().repeat(chosen.batch, 1, 1)
    annotated = torch.ones(chosen.batch, STRUCTURES, dtype=torch.bool)
    images = torch.randn(chosen.batch, 1, *chosen.size)
    return images.to(device), Targets(codes.to(device), codebook.to(device), annotated.to(device))


def segkit_step(chosen: argparse.Namespace, device: torch.device) -> Step:
    images, targets = random_batch(chosen, device)
    model = ModelWithLoss(UNet2D(1, STRUCTURES, FEATURES), torch.full((STRUCTURES,), 30.0))
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    return lambda: learn(model, optimizer, images, targets)


def learn(model: ModelWithLoss, optimizer: torch.optim.Optimizer, images: torch.Tensor, targets: Targets) -> float:
    """A step as segkit.training takes it, on a batch that is ready."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, fast_dtype(images.device)):
        loss = model(images.contiguous(memory_format=torch.channels_last), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def textbook_step(chosen: argparse.Namespace, device: torch.device) -> Step:
    images, targets = random_batch(chosen, device)
    network = UNet2D(1, STRUCTURES, FEATURES, norm="batch").to(device)
    criterion, optimizer = nn.BCEWithLogitsLoss(), torch.optim.Adam(network.parameters(), 1e-3)

    def step() -> float:
        one_hot = F.one_hot(targets.codes, STRUCTURES + 1)[..., 1:].movedim(-1, 1).float()
        loss = criterion(network(images), one_hot)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def nnunet_step(chosen: argparse.Namespace, device: torch.device) -> Step:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    images, targets = random_batch(chosen, device)
    widths = [*FEATURES, 2 * FEATURES[-1]]
    network = PlainConvUNet(
        1, len(widths), widths, nn.Conv2d, 3, [1, 2, 2, 2, 2], 2, STRUCTURES + 1, 2, conv_bias=True,
        norm_op=nn.InstanceNorm2d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            loss = deep_supervision(network(images), targets.codes)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def deep_supervision(outputs: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Loss over the resolutions, from the full one (B, 118, H, W) downwards: weights 1, 1/2, ..., the last one 0."""
    weights = [0.5**level for level in range(len(outputs) - 1)]
    losses = [
        weight / sum(weights) * dice_and_entropy(output, labels[:, :: 2**level, :: 2**level])
        for level, (weight, output) in enumerate(zip(weights, outputs, strict=False))
    ]
    return torch.stack(losses).sum()


def dice_and_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy - soft Dice of the batch, background left out of the latter. logits (B, L, H, W), labels int64."""
    p = torch.softmax(logits, 1)
    y = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter_(1, labels[:, None], True)
    both, predicted, reference = ((plane[:, 1:]).sum((0, 2, 3)) for plane in (p * y, p, y))
    dice = (2 * both + 1e-5) / (predicted + reference + 1e-5).clamp(min=1e-8)
    return F.cross_entropy(logits, labels) - dice.mean()


SIDES = {"segkit": segkit_step, "textbook": textbook_step, "nnU-Net": nnunet_step}


def peak_mb_of(make: Callable[..., Step], chosen: argparse.Namespace, device: torch.device) -> int:
    """Highest memory after three steps: resident, of this process (Linux), or allocated by torch on CUDA."""
    step = make(chosen, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def peak_mb_in_new_process(side: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def compare_loader(chosen: argparse.Namespace, device: torch.device) -> None:
    """A step that reads, resamples and augments its slices, beside the step on a batch made ready before."""
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = chosen.data or Path(scratch) / "phantom"
        if chosen.data is None:
            write_phantoms(data_dir, 1)
        data = open_data(data_dir, chosen.stage or Path(scratch) / "staged", progress=False)
        settings = TrainSettings(
            target_shape=tuple(chosen.size), batch_size=chosen.batch, features=FEATURES, device=chosen.device
        )
        learner = Learner(data, settings.checked(), Ranks(device))
        slices = SliceDataset(data.staged, data.split.train, data.label_map)
        order = epoch_order(len(slices), 0, 1, chosen.batch * (chosen.rounds + 2), slices.holds, settings.balance)
        loader = iter(batches(slices, order, chosen.batch, settings.workers))
        fixed = augment.to_network(next(loader).to(device), settings.target_shape)
        sides = {
            "read": lambda: learner.step(next(loader), 1, settings.learning_rate),
            "fixed": lambda: learn(learner.model, learner.optimizer, *fixed),
        }
        seconds = in_turns(sides, chosen.rounds, device)
    print(
        f"segkit's step on slices of {chosen.data or 'a phantom'} with {len(data.label_map)} structures, read and "
        f"augmented in this process: {seconds['read']:.3f} s; on a batch made ready before: {seconds['fixed']:.3f} s; "
        f"{seconds['read'] / seconds['fixed']:.2f} times as long"
    )


if __name__ == "__main__":
    main()
