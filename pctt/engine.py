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
from pctt.backends.precision import PrecisionPolicy
from pctt.energies import Categorical, Gaussian
from pctt.groups import Layout
from pctt.inference import Inference
from pctt.learning import Learning
from pctt.network import INPUT, Network, Weights, check_weights
from pctt.program import (
    BATCH,
    INFERENCE_RATE,
    LEARNING_RATE,
    LEARNING_STEP,
    PER_SAMPLE,
    Buffer,
    Program,
    Slot,
)

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
    DEVICE_LOST = "the device failed"

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
    relaxation: Callable[[], None]  # all of inference in one
    learning: Callable[[], None]  # gradients and update in one


class Engine:
    """Runs `net` on a backend with one choice of clamped nodes.

    clamped: names of the nodes held at data.
    placed: names of free nodes that are given their initial activities.
    learning: the rule applied by `update`.    grouped: stack equal layers (same numbers either way).
    precision: formats of the tensors on a card; not for the reference backend.
    batch_size: of the largest batches to come, for which a card backend plans its memory.
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
        precision: PrecisionPolicy | None = None,
        batch_size: int = 32,
    ) -> None:
        self.net = net
        self.inference = inference
        self.learning = learning
        self.dtype = check_weights(net, weights)
        self.clamped = tuple(clamped)
        self.placed = tuple(placed)
        self.backend = open_backend(backend, self.dtype, device, precision)
        indices = [net.node_index(name) for name in self.clamped]
        placed_indices = [net.node_index(name) for name in self.placed]

        def write(where: Layout) -> Program:
            return assemble(where, inference, indices, placed_indices, learning, self.backend.uniform)

        self.layout, self.program = self.backend.compile(net, grouped, write, batch_size)
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
        self._refresh = self.backend.bind(self.program.refresh, self._persistent, self.scalars)
        self._batch: _Batch | None = None
        self._sent_ahead: dict[str, tuple[Tensor, Callable[[], None]]] = {}
        self.batch_size = 0  # of the batch last relaxed
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
        self._refresh()

    def weights(self) -> Weights:
        return self._read_tree("")

    def gradients(self) -> Weights:
        """What `compute_gradients` left: dF/dW of the batch mean, to be descended. `update` may use their
        memory for other things.
        """
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
        fan_in, fan_out = self.net.widths[index - 1 : index + 1]
        return values[0, :fan_out] if role.startswith("bias") else values[:fan_in, :fan_out]

    def _load_precisions(self) -> None:
        for index, layer in enumerate(self.net.layers, start=1):
            name = f"precision@{index}"
            if name in self._persistent and isinstance(layer.energy, Gaussian):
                values = torch.tensor(layer.energy.precision, dtype=self.dtype).expand(layer.units)
                self.backend.write(self._persistent[name], Slot(name, 0, 1), values)

    # --- one batch ------------------------------------------------------------------------------------------

    def relax(
        self,
        activities: Mapping[str, Tensor],
        record: bool = False,
        upcoming: Mapping[str, Tensor] | None = None,
    ) -> Relaxation:
        """Runs inference on one batch.

        activities: {node: [B, units]} for every clamped and placed node; an input that is neither starts at
        zero.
        record: keep the energies of every inference step.
        upcoming: the activities of the next batch, the very tensors; they are sent while this one runs.
        """
        missing = [name for name in (*self.clamped, *self.placed) if name not in activities]
        if missing:
            raise ValueError(f"node {missing[0]!r} is clamped or placed, so relax needs its activities.")
        batch = self._begin(activities)
        tolerance, watched = self.inference.tolerance, record or self.inference.tolerance is not None
        if not watched:
            batch.relaxation()
            self._send_ahead(batch, upcoming)
            return self._outcome(batch, Status.COMPLETED, self.inference.num_steps, None)
        batch.initialise()
        batch.measure_initial()
        history = [self._energies(batch, "initial_")[0]]
        status, steps = Status.COMPLETED, 0
        while steps < self.inference.num_steps and status is Status.COMPLETED:
            batch.steps[min(steps, len(batch.steps) - 1)]()
            steps += 1
            batch.measure()
            history.append(self._energies(batch)[0])
            if tolerance is not None and steps >= self._num_settling:
                before, after = sum(history[-2]), sum(history[-1])
                if abs(before - after) <= tolerance * abs(before):
                    status = Status.CONVERGED
        batch.finish()
        batch.measure()
        return self._outcome(batch, status, steps, history if record else None)

    def predict(self, inputs: Tensor) -> Tensor:
        """The output predicted from `inputs` [B, D] alone, [B, units]: one feedforward sweep.

        It counts as a batch whose free and clamped nodes are at their predictions.
        """
        self._begin({INPUT: inputs}).initialise()
        return self.read_node("anchor", self.net.output)

    def _begin(self, activities: Mapping[str, Tensor]) -> _Batch:
        batch_size = next(iter(activities.values())).shape[0]
        batch = self._batch = self._prepare(self.backend.rows(batch_size))
        self.batch_size, self.scalars[PER_SAMPLE] = batch_size, 1.0 / batch_size
        self.backend.begin(batch.buffers, batch_size)
        for name, values in activities.items():
            sent, arrive = self._sent_ahead.pop(name, (None, None))
            if arrive is not None and sent is values:
                arrive()
            else:
                self.backend.write(*batch.given[name], values)
        self._sent_ahead.clear()
        return batch

    def _send_ahead(self, batch: _Batch, upcoming: Mapping[str, Tensor] | None) -> None:
        sizes = {len(values) for values in (upcoming or {}).values()}
        if any(self.backend.rows(size) != self.backend.rows(self.batch_size) for size in sizes):
            return  # its buffers will be others
        for name, values in (upcoming or {}).items():
            self._sent_ahead[name] = values, self.backend.send_ahead(*batch.given[name], values)

    @property
    def _num_settling(self) -> int:
        """Inference steps until the errors have had time to reach every node."""
        return len(self.net.layers) if self.backend.uniform else len(self.program.steps)

    def _outcome(
        self, batch: _Batch, status: Status, steps: int, trajectory: list[list[float]] | None
    ) -> Relaxation:
        first, _ = self._energies(batch, "initial_")
        last, squares = self._energies(batch)
        norms = [math.sqrt(square) for square in squares]
        return Relaxation(self._judge(status, first, last), last, norms, steps, trajectory)

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
        self._set_learning(learning_rate, step)
        self._update()

    def learn(self, learning_rate: float, step: int) -> None:
        """`compute_gradients` and `update` in one."""
        assert self._batch is not None, "relax a batch first"
        self._set_learning(learning_rate, step)
        self._batch.learning()

    def _set_learning(self, rate: float, step: int) -> None:
        self.scalars[LEARNING_RATE], self.scalars[LEARNING_STEP] = rate, float(step)

    def read_node(self, role: str, name: str) -> Tensor:
        """A copy of one node's tensor of the last relaxed batch, [B, units]: "activity", "error", "anchor" or
        "initial".
        """
        assert self._batch is not None, "relax a batch first"
        index = self.net.node_index(name)
        slot, buffer = self.layout.node(role, index)
        values = self.backend.read(self._batch.buffers[buffer.name], slot)[0]
        return values[: self.batch_size, : self.net.widths[index]]

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
            if self.backend.planned_rows is not None:
                self._batches.clear()  # its memory is scarce, and smaller batches are padded from now on
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

            names = ("initialise", "measure_initial", "finish", "measure", "gradients")
            initialise, measure_initial, finish, measure, gradients = map(bind, names)
            steps = [self.backend.bind(code, buffers, self.scalars) for code in self.program.steps]
            walk = [steps[min(number, len(steps) - 1)] for number in range(self.program.num_steps)]
            relaxation = [initialise, measure_initial, *walk, finish, measure]
            self._batches[batch_size] = _Batch(
                buffers,
                given,
                initialise,
                measure_initial,
                steps,
                finish,
                measure,
                gradients,
                self.backend.sequence(relaxation),
                self.backend.sequence([gradients, self._update]),
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
        """Per layer, batch mean; 0 where a layer's energy follows from its squares."""
        found: dict[str, list[float]] = {}
        sums: list[float] = []
        for index in range(1, len(self.net.layers) + 1):
            slot, buffer = self.layout.sum(role, index)
            if buffer.name not in found:
                whole = Slot(buffer.name, 0, buffer.count)
                there = buffer.name in batch.buffers
                found[buffer.name] = (
                    self.backend.read(batch.buffers[buffer.name], whole).view(-1).tolist()
                    if there
                    else [0.0] * buffer.count
                )
            sums.append(found[buffer.name][slot.start] * self.scalars[PER_SAMPLE])
        return sums

    def _judge(self, status: Status, first: list[float], last: list[float]) -> Status:
        if not math.isfinite(sum(last)):
            return Status.NON_FINITE
        constant = sum(self._constants)
        before, after = sum(first) - constant, sum(last) - constant
        if self.inference.prediction == "live" and after > DIVERGENCE_FACTOR * max(before, 1e-30):
            return Status.DIVERGED
        return status


def _is_persistent(buffer: Buffer) -> bool:
    """Whether a buffer is the same for every batch size: weights, gradients, learning state, numbers."""
    return BATCH not in (buffer.rows, buffer.columns)
