"""Data parallel: every rank has the whole network and a share of each batch.

A sample relaxes as if it were alone, so inference needs no communication. The weight gradient is that of the
batch mean, and the mean over the batch is that of the ranks' means, weighted by their numbers of samples:

    g = sum_r B_r g_r / sum_r B_r

One all_reduce per learning step adds up B_r g_r, B_r, the energies and whether any rank has gone wrong, so
that all ranks know the same and go on, or end, together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pctt._checks import require_count
from pctt.engine import Relaxation, Status
from pctt.feed import Reader, batch_order
from pctt.layers.block import ties_samples
from pctt.network import Weights
from pctt.parallel.group import Group
from pctt.run import Callback, FitResult, Trainer

FAILURES = (Status.NON_FINITE, Status.DIVERGED)  # the worse one first


class DataParallel:
    """A trainer whose batches are shared out over the ranks. Its numbers are those of one process that is
    given the whole batches, but for rounding.

    trainer: the same on every rank: settings, weights, progress. Its engine does the work; its checkpoints
        are those of one process, so a run can go on with any number of ranks.
    group: all ranks, from `connect`.

    Each rank judges the relaxation of its own share, and divergence on one rank ends the run on all.

    Raises ValueError for what is not the same with shared batches: by name, with the reason; and where the
    ranks' trainers differ.
    """

    def __init__(self, trainer: Trainer, group: Group) -> None:
        _refuse(trainer)
        self.trainer = trainer
        self.group = group
        self.engine = trainer.engine
        self._gradients = [
            (name, key, values.shape)
            for name, tree in self.engine.gradients().items()
            for key, values in tree.items()
        ]
        self._head_size = 1 + len(FAILURES) + 2 * len(trainer.net.layer_names)
        settings = (trainer.net, trainer.inference, trainer.learning, trainer.batch_size, trainer.seed)
        group.agree("network, settings and progress", *settings, trainer.progress, trainer.clamped)
        self.agree_on_weights()

    def agree_on_weights(self) -> None:
        """Raises ValueError unless weights and learning state are the same on all ranks, to the bit."""
        trees = self.engine.weights(), self.engine.learning_state()
        flat = [(name, key, tree[name][key]) for tree in trees for name in tree for key in tree[name]]
        self.group.agree("weights and learning state", *(part for entry in flat for part in entry))

    def share(self, rows: Tensor) -> Tensor:
        """The part of the rows of a batch that is this rank's: as equal as they can be, none where there are
        fewer rows than ranks.
        """
        return rows.tensor_split(self.group.size)[self.group.rank]

    def train_batch(self, share: Mapping[str, Tensor], rate: float | None = None) -> Relaxation:
        """One learning step of all ranks.

        share: {node: [B_r, units]} of the clamped nodes, this rank's samples, as many as it likes.
        rate: the learning rate, by default that of the learning rule.

        Returns energies and error norms of the whole batch, the same on all ranks. If any rank has diverged
        the status says so and no weight has moved.
        """
        count = len(next(iter(share.values())))
        own = self.engine.relax(share) if count else None
        if own is not None:
            self.engine.compute_gradients()
        flat = self._contribution(own, count).to(self.group.device)
        self.group.all_reduce(flat)
        head, gradients = flat.cpu().split([self._head_size, len(flat) - self._head_size])
        total = float(head[0])
        if not total:
            raise ValueError("no rank has a sample of this batch; leave the batch out.")
        failed, means = head[1 : 1 + len(FAILURES)].tolist(), (head[1 + len(FAILURES) :] / total).tolist()
        status = next((kind for kind, n in zip(FAILURES, failed, strict=True) if n), Status.COMPLETED)
        if status.ok:
            self._load_gradients(gradients / total)
            self.trainer.progress.step += 1
            rate = self.trainer.learning.rate if rate is None else rate
            self.engine.update(rate, self.trainer.progress.step)
        energies, squares = means[: len(means) // 2], means[len(means) // 2 :]
        norms = [math.sqrt(square) for square in squares]
        return Relaxation(status, energies, norms, self.engine.program.num_steps)

    def _contribution(self, own: Relaxation | None, count: int) -> Tensor:
        """What this rank adds: its number of samples, whether it has gone wrong, and times that number
        energies, squares of errors and gradients. Zeros of a rank without samples.
        """
        if own is None:
            numbers = sum(math.prod(shape) for _, _, shape in self._gradients)
            return torch.zeros(self._head_size + numbers, dtype=self.engine.dtype)
        gradients = self.engine.gradients()
        failed = [float(own.status is failure) for failure in FAILURES]
        means = [*own.energies, *(norm * norm for norm in own.error_norms)]
        head = torch.tensor([1.0, *means], dtype=torch.float64) * count
        head = torch.cat([head[:1], torch.tensor(failed), head[1:]]).to(self.engine.dtype)
        parts = [gradients[name][key].flatten() for name, key, _ in self._gradients]
        flat = torch.cat([head, *parts])
        flat[self._head_size :] *= count
        return flat

    def _load_gradients(self, flat: Tensor) -> None:
        parts = flat.split([math.prod(shape) for _, _, shape in self._gradients])
        tree: Weights = {name: {} for name, _, _ in self._gradients}
        for (name, key, shape), part in zip(self._gradients, parts, strict=True):
            tree[name][key] = part.view(shape)
        self.engine.load_gradients(tree)

    def fit(
        self,
        data: Mapping[str, Tensor] | tuple[Tensor, Tensor],
        epochs: int,
        validation: tuple[Tensor, Tensor] | None = None,
        callbacks: Sequence[Callback] = (),
        save_to: str | Path | None = None,
    ) -> FitResult:
        """Trains until `epochs` epochs are done in all, in the order of batches of `Trainer.fit`.

        data: {node: [N, units]} of the clamped nodes, or (inputs, labels or targets); whole on every rank.
        validation: (inputs, labels), whose accuracy rank 0 computes.
        callbacks, save_to: on rank 0 only, the records "batch" and "epoch", and a checkpoint after every
            epoch.
        """
        require_count("epochs", epochs)
        trainer, progress, first = self.trainer, self.trainer.progress, self.group.rank == 0
        nodes = Reader(trainer.net, trainer.clamped, self.engine.dtype)(data).nodes
        num_samples = len(next(iter(nodes.values())))
        num_batches = math.ceil(num_samples / trainer.batch_size)
        self.group.agree("epochs and data", epochs, *(part for entry in nodes.items() for part in entry))
        callbacks = callbacks if first else ()
        accuracy = None

        def emit(kind: str, **fields: Any) -> None:
            for callback in callbacks:
                callback(kind, fields)

        while progress.epoch < epochs:
            started = time.perf_counter()
            order = batch_order(trainer.seed, progress.epoch, num_samples)
            for rows in order.split(trainer.batch_size)[progress.batch :]:
                factor = trainer.learning.schedule.factor(progress.step, epochs * num_batches)
                self.engine.set_nudge(progress.step / max(1, epochs * num_batches - 1))
                own = self.share(rows)
                relaxation = self.train_batch(
                    {name: values[own] for name, values in nodes.items()}, trainer.learning.rate * factor
                )
                if not relaxation.status.ok:
                    return self._failed(relaxation)
                progress.batch += 1
                progress.energy += sum(relaxation.energies) * len(rows)
                progress.samples += len(rows)
                emit(
                    "batch",
                    step=progress.step,
                    epoch=progress.epoch + 1,
                    energies=dict(zip(trainer.net.layer_names, relaxation.energies, strict=True)),
                    error_norms=dict(zip(trainer.net.layer_names, relaxation.error_norms, strict=True)),
                    inference_steps=relaxation.num_steps,
                    learning_rate=trainer.learning.rate * factor,
                )
            energy = progress.energy / progress.samples
            progress.epoch, progress.batch, progress.energy, progress.samples = progress.epoch + 1, 0, 0.0, 0
            self.agree_on_weights()
            if first:
                accuracy = trainer.evaluate(validation) if validation is not None else None
                emit(
                    "epoch",
                    epoch=progress.epoch,
                    step=progress.step,
                    train_energy=energy,
                    validation_accuracy=accuracy,
                    seconds=time.perf_counter() - started,
                )
                if save_to is not None:
                    trainer.save(save_to)
        message = f"{progress.epoch} epochs done"
        return FitResult(Status.COMPLETED, message, progress.epoch, progress.step, accuracy)

    def _failed(self, relaxation: Relaxation) -> FitResult:
        progress = self.trainer.progress
        message = (
            f"batch {progress.step + 1}: {relaxation.status.value}, so all {self.group.size} ranks end; the "
            "weights are those before this batch; lower inference.rate (now "
            f"{self.trainer.inference.rate:g}) or learning.rate (now {self.trainer.learning.rate:g})."
        )
        return FitResult(relaxation.status, message, progress.epoch, progress.step, None)


def _refuse(trainer: Trainer) -> None:
    inference, net = trainer.inference, trainer.net
    rules = [rule for part in net.chains for rule in part.rules]
    reasons = {
        "algorithm='backprop'": trainer.algorithm == "backprop" and "only predictive coding is shared out",
        "weights_at='every_step'": inference.weights_at == "every_step"
        and "it would take an all_reduce in every inference step; use LayerParallel, or weights_at='end'",
        "tolerance": inference.tolerance is not None
        and "when to stop depends on the energy of the whole batch in every step; leave it out",
        f"dynamics={inference.dynamics!r}": inference.is_random
        and "each rank would draw other noise than one process; use one process",
        "a learned variance": any(rule.learns_variance for rule in rules)
        and "its target is no gradient, and Engine.gradients does not tell it; give a precision",
        "NormaliseBatch": ties_samples(rules) and "it ties the samples of a batch together; use Normalise",
        f"backend={trainer.engine.backend.name!r}": trainer.engine.backend.name != "reference"
        and "it was not tried with shared batches; use backend='reference'",
    }
    for what, reason in reasons.items():
        if reason:
            raise ValueError(f"data parallel training does not take {what}: {reason}.")
