"""nnU-Net by its own commands: raw data, plan and preprocess, train, predict.

What differs from its defaults is written into its plans file, as its documentation says
(https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/explanation_plans_files.md): a configuration CONFIGURATION
that inherits from 2d.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sides import ROOT

CONFIGURATION = "bench"
TRAINER = "nnUNetTrainerShort"
CODE = [ROOT / "benchmarks" / "nnunet.py", ROOT / "benchmarks" / "nnunet_trainer.py"]
"""What a result of nnU-Net's depends on."""


class CommandError(Exception):
    """A command that did not end well; the message says where its output lies."""


@dataclass(frozen=True)
class NnUNet:
    """One data set of nnU-Net's, in a folder of its own. python: the interpreter of its environment."""

    home: Path
    python: str
    threads: int
    device: str = "cpu"
    number: int = 1

    @property
    def dataset(self) -> str:
        return f"Dataset{self.number:03d}_bench"

    @property
    def raw(self) -> Path:
        return self.home / "raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        return self.home / "preprocessed" / self.dataset

    @property
    def environment(self) -> dict[str, str]:
        """What nnU-Net reads: its folders, where to find the trainer, how many processes."""
        return {
            "nnUNet_raw": str(self.home / "raw"),
            "nnUNet_preprocessed": str(self.home / "preprocessed"),
            "nnUNet_results": str(self.home / "results"),
            "nnUNet_n_proc_DA": str(self.threads),
            "nnUNet_def_n_proc": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
        }

    def prepare(self, changes: Mapping) -> float:
        """nnUNetv2_plan_and_preprocess of the raw data; `changes` are what the configuration has instead of 2d's.

        The trainer is put into its environment, as nnU-Net's documentation says. Not by nnUNet_extTrainer: before it
        looks there it imports all of its own trainers, of which some need a torchvision that fits the build of torch.
        Returns the seconds.
        """
        code = "import nnunetv2; print(nnunetv2.__path__[0])"
        package = subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        shutil.copy(
            ROOT / "benchmarks" / "nnunet_trainer.py", Path(package) / "training/nnUNetTrainer" / f"{TRAINER}.py"
        )
        shutil.rmtree(self.preprocessed, ignore_errors=True)
        seconds = self.run(
            "nnUNetv2_plan_and_preprocess", "-d", self.number, "-c", "2d", "-np", self.threads, "-npfp", self.threads,
            "--verify_dataset_integrity",
        )  # fmt: skip
        self.configure(changes)
        return seconds

    def configure(self, changes: Mapping) -> None:
        """What CONFIGURATION has instead of 2d's, written into the plans file."""
        path = self.preprocessed / "nnUNetPlans.json"
        plans = json.loads(path.read_text())
        plans["configurations"][CONFIGURATION] = {"inherits_from": "2d", **changes}
        path.write_text(json.dumps(plans, indent=1))

    def plan(self) -> dict:
        """What nnU-Net planned for 2d: patch_size, batch_size, spacing, architecture."""
        return json.loads((self.preprocessed / "nnUNetPlans.json").read_text())["configurations"]["2d"]

    def train(self, epochs: int, iterations: int, adam: float | None = None) -> list[float]:
        """nnUNetv2_train with short epochs on all cases, with its SGD or with Adam at a learning rate.

        Returns the seconds of each epoch by its own log.
        """
        shutil.rmtree(self.results, ignore_errors=True)
        self.run(
            "nnUNetv2_train", self.number, CONFIGURATION, "all", "-tr", TRAINER, "-device", self.device,
            BENCH_EPOCHS=str(epochs), BENCH_ITERATIONS=str(iterations), BENCH_ADAM=str(adam or ""),
        )  # fmt: skip
        return epoch_seconds(self.results)

    @property
    def results(self) -> Path:
        return self.home / "results" / self.dataset / f"{TRAINER}__nnUNetPlans__{CONFIGURATION}" / "fold_all"

    def predict_arguments(self, images: Path, out: Path) -> list[str]:
        """The command that predicts a folder of images, with the interpreter."""
        return self._command(
            "nnUNetv2_predict", "-i", images, "-o", out, "-d", self.number, "-c", CONFIGURATION, "-f", "all",
            "-tr", TRAINER, "-device", self.device, "-npp", 1, "-nps", 1,
        )  # fmt: skip

    def predict(self, images: Path, out: Path) -> float:
        """nnUNetv2_predict of a folder of images. Returns the seconds of the whole command."""
        return self._run(self.predict_arguments(images, out))

    def run(self, command: str, *arguments: object, **environment: str) -> float:
        return self._run(self._command(command, *arguments), environment)

    def _command(self, command: str, *arguments: object) -> list[str]:
        return [self.python, str(Path(self.python).parent / command), *map(str, arguments)]

    def _run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
        self.home.mkdir(parents=True, exist_ok=True)
        log, started = self.home / "commands.log", time.perf_counter()
        with open(log, "a", encoding="utf-8") as file:
            print(f"\n$ {' '.join(command)}", file=file, flush=True)
            whole = {**os.environ, **self.environment, **(environment or {})}
            code = subprocess.run(command, env=whole, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise CommandError(f"{Path(command[1]).name} ended with {code}, see {log}")
        return time.perf_counter() - started


def epoch_seconds(results: Path) -> list[float]:
    """Seconds of each epoch by nnU-Net's own log."""
    lines = max(results.glob("training_log_*.txt")).read_text().splitlines()
    return [float(match[1]) for line in lines if (match := re.search(r"Epoch time: ([\d.]+) s", line))]


def network(features: Sequence[int]) -> dict:
    """A plain U-Net of nnU-Net's with these channels, an entry a level, as its plans file describes it."""
    levels = len(features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": list(features),
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": [[3, 3]] * levels,
            "strides": [[1, 1], *[[2, 2]] * (levels - 1)],
            "n_conv_per_stage": [2] * levels,
            "n_conv_per_stage_decoder": [2] * (levels - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
