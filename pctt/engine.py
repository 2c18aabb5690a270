"""A network on a backend: buffers, the bound program, and the steps a caller drives.

The engine owns no loop over batches and decides nothing about stopping a run: it relaxes one batch, computes
its weight gradients, applies the learning rule, and tells what happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from pctt.assemble import assemble
from pctt.backends import backend as open_backend
from pctt.energies import Categorical, Gaussian
from pctt.groups import layout
from pctt.inference import Inference
from pctt.learning import Learning
from pctt.network import INPUT, Network, Weights, check_weights
from pctt.program import INFERENCE_RATE, LEARNING_RATE, LEARNING_STEP, PER_SAMPLE, Buffer, Slot

DIVERGENCE_FACTOR = 10.0
"""A relaxation that ends above this multiple of the energy it began with has diverged: a stable one only
descends.
"""


class Status(Enum):
    """How a relaxation or a whole fit ended."""

    COMPLETED = "all inference steps were run"
    CONVERGED = "the energy changed by less than the tolerance"
    DIVERGED = "the energy grew during inference"
    NON_FINITE = "an energy is NaN or infinite"
    STOPPED = "stopped on request"

    @property
    def ok(self) -> bool:
        return self in (Status.COMPLETED, Status.CONVERGED)


@dataclass(frozen=True)
class Relaxation:
    """What one relaxation did.

    energies: per layer at the end, batch mean.    error_norms: per layer, root of the batch mean of e'e.
    num_steps: inference steps run.
    trajectory: energies per layer at every step, [num_steps + 1][num_layers], or None.
    """

    status: Status
    energies: list[float]
    error_norms: list[float]
    num_steps: int
    trajectory: list[list[float]] | None = None


@dataclass
class _Batch:
    """Buffers and bound sections for one batch size."""

    buffers: dict[str, Any]
    given: dict[str, tuple[Any, Slot]]
    initialise: Callable[[], None]
    measure_initial: Callable[[], None]
    steps: list[Callable[[], None]]
    finish: Callable[[], None]
    measure: Callable[[], None]
    gradients: Callable[[], None]


class Engine:
    """Runs `net` on a backend with one choice of clamped nodes.

    clamped: names of the nodes held at data.
    placed: names of free nodes that are given their initial activities.
    learning: the rule applied by `update`.    grouped: stack equal layers (same numbers either way).
    Buffers are reused between batches; what the caller gets is always a copy.
    """

    def __init__(
        self,
        net: Network,
        weights: Weights,
        inference: Inference,
        clamped: Collection[str],
        placed: Collection[str] = (),
        learning: Learning | None = None,
        backend: str = "reference",
        device: str | int | None = None,
        grouped: bool = True,
    ) -> None:
        self.net = net
        self.inference = inference
        self.learning = learning
        self.dtype = check_weights(net, weights)
        self.clamped = tuple(clamped)
        self.placed = tuple(placed)
        self.layout = layout(net, grouped)
        self.backend = open_backend(backend, self.dtype, device)
        indices = [net.node_index(name) for name in self.clamped]
        self.program = assemble(
            self.layout, inference, indices, [net.node_index(name) for name in self.placed], learning
        )
        self.scalars = {
            INFERENCE_RATE: inference.rate,
            LEARNING_RATE: 0.0,
            LEARNING_STEP: 0.0,
            PER_SAMPLE: 1.0,
        }
        self._batches: dict[int, _Batch] = {}
        self._persistent = {
            name: self.backend.allocate(buffer, 1)
            for name, buffer in self.program.buffers.items()
            if _is_persistent(buffer)
        }
        self._update = self.backend.bind(self.program.update, self._persistent, self.scalars)
        self._batch: _Batch | None = None
        self._constants = [  # -1/2 log|P| per layer
            -0.5 * layer.energy.log_determinant(layer.units) if isinstance(layer.energy, Gaussian) else 0.0
            for layer in net.layers
        ]
        self._load_precisions()
        self.load_weights(weights)

    # --- weights and learning state -------------------------------------------------------------------------

    def load_weights(self, weights: Weights) -> None:
        check_weights(self.net, weights)
        self._load(weights)

    def weights(self) -> Weights:
        return self._read_tree("")

    def gradients(self) -> Weights:
        """What `compute_gradients` left: dF/dW of the batch mean, to be descended."""
        return self._read_tree("_gradient")

    def load_gradients(self, gradients: Weights) -> None:
        """Gradients from elsewhere (the backprop twin), for `update` to apply."""
        self._load(gradients, "_gradient")

    def learning_state(self) -> dict[str, dict[str, Tensor]]:
        """The state of the learning rule: {layer: {"weight_first_moment": ..., ...}}, {} if it has none."""
        state = {
            name: {key: self._read_layer(key, index) for key in self._state_keys(index)}
            for index, name in enumerate(self.net.names, start=1)
        }
        return {name: tensors for name, tensors in state.items() if tensors}

    def load_learning_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for index, name in enumerate(self.net.names, start=1):
            expected = set(self._state_keys(index))
            if set(state.get(name, {})) != expected:
                raise ValueError(
                    f"the learning state of layer {name!r} must hold {sorted(expected)}, got "
                    f"{sorted(state.get(name, {}))}; it was written by another learning rule."
                )
        self._load(state)

    def _state_keys(self, index: int) -> list[str]:
        names = ("weight", "bias") if self.net.layers[index - 1].bias else ("weight",)
        home = self.layout.layer("weight", index)[1].name.partition("@")[2]
        roles = [name.partition("@")[0] for name in self._persistent if name.endswith(f"@{home}")]
        return [
            role
            for role in roles
            for name in names
            if role.startswith(f"{name}_") and role != f"{name}_gradient"
        ]

    def _load(self, tree: Mapping[str, Mapping[str, Tensor]], suffix: str = "") -> None:
        for index, name in enumerate(self.net.names, start=1):
            for key, values in tree.get(name, {}).items():  # a rule without state has no entry
                slot, buffer = self.layout.layer(key + suffix, index)
                self.backend.write(self._persistent[buffer.name], slot, values)

    def _read_tree(self, suffix: str) -> Weights:
        return {
            name: {
                key: self._read_layer(key + suffix, index)
                for key in self.net.layers[index - 1].weight_shapes(1)
            }
            for index, name in enumerate(self.net.names, start=1)
        }

    def _read_layer(self, role: str, index: int) -> Tensor:
        slot, buffer = self.layout.layer(role, index)
        values = self.backend.read(self._persistent[buffer.name], slot)[0]
        return values[0] if role.startswith("bias") else values

    def _load_precisions(self) -> None:
        for index, layer in enumerate(self.net.layers, start=1):
            name = f"precision@{index}"
            if name in self._persistent and isinstance(layer.energy, Gaussian):
                values = torch.tensor(layer.energy.precision, dtype=self.dtype).expand(layer.units)
                self.backend.write(self._persistent[name], Slot(name, 0, 1), values)

    # --- one batch ------------------------------------------------------------------------------------------

    def relax(self, activities: Mapping[str, Tensor], record: bool = False) -> Relaxation:
        """Runs inference on one batch.

        activities: {node: [B, units]} for every clamped and placed node; an input that is neither starts at
        zero.
        record: keep the energies of every inference step.
        """
        missing = [name for name in (*self.clamped, *self.placed) if name not in activities]
        if missing:
            raise ValueError(f"node {missing[0]!r} is clamped or placed, so relax needs its activities.")
        batch_size = next(iter(activities.values())).shape[0]
        batch = self._batch = self._prepare(batch_size)
        self.scalars[PER_SAMPLE] = 1.0 / batch_size
        for name, values in activities.items():
            self.backend.write(*batch.given[name], values)
        batch.initialise()
        batch.measure_initial()
        tolerance, watched = self.inference.tolerance, record or self.inference.tolerance is not None
        history = [self._energies(batch, "initial_")[0]] if watched else []
        status, steps = Status.COMPLETED, 0
        while steps < self.inference.num_steps and status is Status.COMPLETED:
            batch.steps[min(steps, len(batch.steps) - 1)]()
            steps += 1
            if watched:
                batch.measure()
                history.append(self._energies(batch)[0])
                if tolerance is not None and steps >= len(batch.steps):
                    before, after = sum(history[-2]), sum(history[-1])
                    if abs(before - after) <= tolerance * abs(before):
                        status = Status.CONVERGED
        batch.finish()
        batch.measure()
        first, _ = self._energies(batch, "initial_")
        last, squares = self._energies(batch)
        norms = [math.sqrt(square) for square in squares]
        status = self._judge(status, first, last)
        return Relaxation(status, last, norms, steps, history if record else None)

    def write_errors(self, errors: Mapping[str, Tensor]) -> None:
        """Replaces the errors of the last relaxed batch, [B, units] per predicted node."""
        assert self._batch is not None, "relax a batch first"
        for name, values in errors.items():
            slot, buffer = self.layout.node("error", self.net.node_index(name))
            self.backend.write(self._batch.buffers[buffer.name], slot, values)

    def compute_gradients(self) -> None:
        """dF/dW of the last relaxed batch, by the local rules."""
        assert self._batch is not None, "relax a batch first"
        self._batch.gradients()

    def update(self, learning_rate: float, step: int) -> None:
        """Applies the learning rule. step: number of this learning step, counted from 1."""
        self.scalars[LEARNING_RATE], self.scalars[LEARNING_STEP] = learning_rate, float(step)
        self._update()

    def read_node(self, role: str, name: str) -> Tensor:
        """A copy of one node's tensor of the last relaxed batch, [B, units]: "activity", "error", "anchor" or
        "initial".
        """
        assert self._batch is not None, "relax a batch first"
        slot, buffer = self.layout.node(role, self.net.node_index(name))
        return self.backend.read(self._batch.buffers[buffer.name], slot)[0]

    def bytes_allocated(self) -> dict[str, int]:
        """Bytes per buffer role, over all batch sizes in use."""
        sizes: dict[str, int] = {}
        width = torch.empty((), dtype=self.dtype).element_size()
        for buffer in self.program.buffers.values():
            batch_sizes = [1] if _is_persistent(buffer) else list(self._batches)
            role = buffer.name.partition("@")[0]
            for batch_size in batch_sizes:
                count, rows, columns = buffer.shape(batch_size)
                sizes[role] = sizes.get(role, 0) + count * rows * columns * width
        return sizes

    def _prepare(self, batch_size: int) -> _Batch:
        if batch_size not in self._batches:
            buffers = dict(self._persistent)
            for name, buffer in self.program.buffers.items():
                if name not in buffers:
                    buffers[name] = self.backend.allocate(buffer, batch_size)

            given: dict[str, tuple[Any, Slot]] = {}
            for name in {INPUT, *self.clamped, *self.placed}:
                slot, buffer = self.layout.node("initial", self.net.node_index(name))
                given[name] = buffers[buffer.name], slot

            def bind(section: str) -> Callable[[], None]:
                return self.backend.bind(getattr(self.program, section), buffers, self.scalars)

            self._batches[batch_size] = _Batch(
                buffers,
                given,
                bind("initialise"),
                bind("measure_initial"),
                [self.backend.bind(code, buffers, self.scalars) for code in self.program.steps],
                bind("finish"),
                bind("measure"),
                bind("gradients"),
            )
        return self._batches[batch_size]

    def _energies(self, batch: _Batch, when: str = "") -> tuple[list[float], list[float]]:
        """Energy and e'e per layer, batch mean: F_l = 1/2 (mean e'Pe - log|P|), or the mean cross-entropy."""
        squares = self._sums(batch, f"{when}square")
        weighted = self._sums(batch, f"{when}energy")
        energies: list[float] = []
        for layer, square, other, constant in zip(
            self.net.layers, squares, weighted, self._constants, strict=True
        ):
            if isinstance(layer.energy, Categorical):
                energies.append(other)
            else:
                energies.append(0.5 * (square if layer.energy.is_unit else other) + constant)
        return energies, squares

    def _sums(self, batch: _Batch, role: str) -> list[float]:
        """Per layer, batch mean."""
        name, count = f"{role}@sums", len(self.net.layers)
        if name not in batch.buffers:  # every layer's energy follows from its squares
            return [0.0] * count
        sums = self.backend.read(batch.buffers[name], Slot(name, 0, count))
        return [value * self.scalars[PER_SAMPLE] for value in sums.view(-1).tolist()]

    def _judge(self, status: Status, first: list[float], last: list[float]) -> Status:
        if not math.isfinite(sum(last)):
            return Status.NON_FINITE
        constant = sum(self._constants)
        before, after = sum(first) - constant, sum(last) - constant
        if self.inference.prediction == "live" and after > DIVERGENCE_FACTOR * max(before, 1e-30):
            return Status.DIVERGED
        return status


def _is_persistent(buffer: Buffer) -> bool:
    """Whether a buffer outlives the batch: weights, gradients, learning state, precisions."""
    return "@layers" in buffer.name or buffer.name.startswith("precision@")
