"""nnU-Net's trainer with short epochs, to be put among nnU-Net's own.

Its usual epoch of 250 iterations, of which it takes 1,000, would not end in minutes on a CPU. How many of how many
iterations comes from BENCH_EPOCHS and BENCH_ITERATIONS. Where BENCH_ADAM gives a learning rate, Adam takes the place of
its SGD at 0.01, which needs many thousand steps. Its parent is the trainer without mirroring, which is for
structures that come in left and right. The prediction of all training cases at the end is left out.
"""

import os

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring


class nnUNetTrainerShort(nnUNetTrainerNoMirroring):  # noqa: N801  as nnU-Net's are called
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  as in its parent
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ.get("BENCH_EPOCHS", "1"))
        self.num_iterations_per_epoch = int(os.environ.get("BENCH_ITERATIONS", "10"))
        self.num_val_iterations_per_epoch = 1

    def configure_optimizers(self) -> tuple:
        """Its own, or Adam with the same fall of the learning rate."""
        rate = os.environ.get("BENCH_ADAM")
        if not rate:
            return super().configure_optimizers()
        self.initial_lr = float(rate)
        optimizer = torch.optim.Adam(self.network.parameters(), self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing: what is scored is predicted by nnUNetv2_predict."""
