"""One step of training: a batch in, gradients from all its parts and ranks, the optimiser moved once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from segkit import augment, losses, memory
from segkit.checkpoints import load_only_checkpoint
from segkit.choices import LOSSES
from segkit.chunks import unshared
from segkit.dataset import Data
from segkit.devices import autocast
from segkit.errors import DivergedError
from segkit.labels import mirrored_channels
from segkit.networks import build_network, network_arguments, on_device, precision
from segkit.ranks import Ranks
from segkit.settings import TrainSettings
from segkit.slices import SliceBatch

LEAST_SCALE = 1.0
"""Of float16 gradients, which start with their loss scaled by 65,536: what overflows even unscaled has diverged."""


class Learner:
    """A network with its loss and optimiser: what a step changes.

    network: the network alone, `shape_of_network` its arguments. model: network and loss, the same on every rank.
    parts: in how many parts a rank's share of a batch is computed, more than ACCUMULATE where memory asks for it.
    """

    def __init__(self, data: Data, settings: TrainSettings, ranks: Ranks, fresh: bool = True):
        self.settings, self.ranks, self.label_map = settings, ranks, data.label_map
        self.partners = mirrored_channels(data.label_map)
        terms = LOSSES[settings.loss]
        frequencies = losses.structure_frequencies(train_voxels(data), data.label_map)
        weights = losses.positive_weights(frequencies, settings.positive_weight_cap if terms.helped else 1.0)
        self.shape_of_network = network_arguments(settings, len(data.label_map))
        torch.manual_seed(settings.seed)
        self.network = build_network(**self.shape_of_network)
        self.dtype = precision(self.network, ranks.device)
        if terms.helped:
            losses.start_bias(self.network.head, frequencies, weights)
        if fresh and settings.init_checkpoint is not None:
            new = load_only_checkpoint(settings.init_checkpoint).start_network(self.network, self.label_map)
            if new and ranks.first:
                print(f"{settings.init_checkpoint} lacks {len(new)} structures, which start anew: {', '.join(new[:8])}")
        model = losses.ModelWithLoss(self.network, weights.float(), terms)
        self.model = on_device(model, ranks.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.learning_rate, fused=True)
        # gradients of float16 would vanish without; in the other precisions it does nothing
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)
        self.parts = settings.accumulate
        self.joined: Any = self.model
        self.prepared = False

    def state(self) -> dict:
        """All that is needed to go on, see `training_state.TrainingState`."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "parts": self.parts,
        }

    def restore(self, model: dict, optimizer: dict, scaler: dict, parts: int) -> None:
        """Go on from a `state`. ValueError, or what else torch raises, for one that is not of this network."""
        self.network.load_state_dict(model)
        # how the optimiser works is of these settings; the state has what it remembers of each weight
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": optimizer["state"]})
        for weight, remembered in self.optimizer.state.items():
            shapes = {name: value.shape for name, value in remembered.items()}
            if shapes != {"step": torch.Size(), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}:
                raise ValueError(f"the optimiser remembers {shapes} of a weight {tuple(weight.shape)}")
        if scaler:  # none where another device computed in another precision
            self.scaler.load_state_dict(scaler)
        self.parts = max(parts, self.settings.accumulate)

    def prepare(self, batch: SliceBatch) -> None:
        """Find out with a rank's first batch in how many parts it fits into memory; then join the ranks."""
        slices, device = len(batch), self.ranks.device
        needed = self._parts_on_cpu(batch) if device.type == "cpu" else self._parts_on_device(batch)
        needed = self.ranks.largest(needed)
        if needed > self.parts:
            self.parts = needed
            if self.ranks.first:
                print(self._message(slices, needed, "more than the memory holds"))
        self.joined = self.ranks.joined(self.model)
        self.prepared = True

    def _parts_on_cpu(self, batch: SliceBatch) -> int:
        one, *_ = batch.parts(len(batch))
        self.model.eval()  # batch statistics stay as they are
        slice_bytes = memory.step_bytes(lambda: self._loss(self.model, one, 0))
        self.model.train()
        # processes that were launched together share the machine
        return memory.parts_that_fit(len(batch), slice_bytes, memory.free_bytes() // self.ranks.world, self.parts)

    def _parts_on_device(self, batch: SliceBatch) -> int:
        def learn(model: torch.nn.Module, parts: int) -> None:
            for part in batch.parts(min(parts, len(batch))):
                self.scaler.scale(self._loss(model, part, 0)).backward()

        return memory.probe(self.model, learn, len(batch), self.parts)

    def _message(self, slices: int, parts: int, why: str) -> str:
        partly = []
        if any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in self.model.modules()):
            partly.append("batch normalisation")
        if self.model.terms.dice:
            partly.append("the Dice term")
        return memory.message(self.settings.batch_size, slices, parts, why, partly)

    def step(self, batch: SliceBatch, epoch: int, learning_rate: float) -> float:
        """One step of the optimiser on a batch of which this is the rank's share; the loss of the whole batch.

        Raises DivergedError where the loss or the gradient is no number; the weights are then as they were before. A
        float16 gradient may overflow: that step is left out and the next ones are scaled less, down to LEAST_SCALE.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self.ranks.mine(batch.numbers.tolist(), self.settings.batch_size):
            batch.annotated.zero_()
        number = self.ranks.sum(self._annotated(batch, epoch))
        total = 0.0

        def learn(parts: int) -> None:
            nonlocal total
            self.optimizer.zero_grad(set_to_none=True)
            total = self._accumulate(batch.parts(min(parts, len(batch))), epoch, number)

        if self.ranks.world == 1:
            parts = memory.halve_until_it_fits(learn, len(batch), self.parts)
            if parts > self.parts:
                print(self._message(len(batch), parts, "the memory ran out"))
                self.parts = parts
        else:
            with memory.no_second_try(self.parts):
                learn(self.parts)
        total = float(self.ranks.sum(torch.tensor(total, dtype=torch.float64)))
        if not np.isfinite(total):
            raise DivergedError(f"the loss is {total}")
        self._move()
        return total

    def _move(self) -> None:
        """Move the weights by the gradients of the whole batch."""
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not self.scaler.is_enabled() and not norm.isfinite():
            raise DivergedError(f"the gradient is {norm.item()}")
        if self.settings.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.gradient_clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise DivergedError("the gradient overflows float16 however little it is scaled")

    def _accumulate(self, parts: list[SliceBatch], epoch: int, number: torch.Tensor) -> float:
        """The gradients of all parts, added up; the sum of their losses."""
        total = 0.0
        # ranks may have another number of parts each: only a batch that is computed at once is one to the Dice term
        together = self.ranks.sum if self.parts == 1 else unshared
        for place, part in enumerate(parts):
            # ranks average their gradients, and only once a step; the loss is divided by `number` over all ranks
            later = self.ranks.world > 1 and place < len(parts) - 1
            with self.joined.no_sync() if later else nullcontext():
                loss = self._loss(self.joined, part, epoch, number, together)
                self.scaler.scale(loss * self.ranks.world).backward()
            total += loss.item()
        return total

    def _loss(self, model: torch.nn.Module, part: SliceBatch, epoch: int, *of_batch: Any) -> torch.Tensor:
        """The loss of a part; `of_batch`: what `ModelWithLoss` needs to know of the whole."""
        s = self.settings
        variation = augment.draw(s.augmentation, s.seed, epoch, part.numbers.tolist())
        images, targets = augment.to_network(part.to(self.ranks.device), s.target_shape, variation, self.partners)
        with autocast(self.ranks.device, self.dtype):
            return model(images.contiguous(memory_format=torch.channels_last), targets, *of_batch)

    def _annotated(self, batch: SliceBatch, epoch: int) -> torch.Tensor:
        """How many (slice that counts, channel, pixel) of a batch are annotated, after mirroring; on the device."""
        s, annotated = self.settings, batch.annotated
        if s.augmentation.flip_left_right:
            drawn = augment.draw(s.augmentation, s.seed, epoch, batch.numbers.tolist())
            _, annotated = augment.mirror_targets(batch.codebook, annotated, drawn.mirrored, self.partners)
        slices = (annotated * batch.counted.sum(1, keepdim=True)).sum()
        return slices.to(self.ranks.device) * s.target_shape[0] * s.target_shape[1]


def train_voxels(data: Data) -> Iterator[tuple[Mapping[str, int], int]]:
    """Voxels of each structure and of the whole, of what the training part takes of each subject."""
    for part in data.split.train:
        subject = data.staged[part.subject]
        if part.slabs is None:
            yield subject.voxels, int(np.prod(subject.shape))
        else:
            zs = part.slices(subject.shape[0])
            volume = subject.labels()
            yield volume.at(zs).voxels(), len(zs) * int(np.prod(subject.shape[1:]))
