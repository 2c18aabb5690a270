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

from pctt import energies
from pctt.assemble import assemble
from pctt.backends import backend as open_backend
from pctt.backends.precision import PrecisionPolicy
from pctt.energies import Gaussian
from pctt.groups import Layout, is_row, weight_of
from pctt.inference import Inference
from pctt.inference.settings import noise_scale
from pctt.layers.block import Expression
from pctt.learning import Adam, AdamW, Learning
from pctt.network import Network, Rule, Weights, check_weights
from pctt.program import (
    BATCH,
    INFERENCE_RATE,
    INFERENCE_STEP,
    LEARNING_RATE,
    LEARNING_STEP,
    NOISE,
    NUDGE,
    PER_NUDGE,
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
        """Whether it ended as asked: COMPLETED or CONVERGED."""
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


@dataclass(frozen=True)
class _Home:
    """A layer and where it lives: layer `index` of the layout of its chain."""

    name: str
    layer: Rule
    where: Layout
    index: int


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
    sweep: Callable[[], None]
    keep: Callable[[], None]
    combine: Callable[[], None]
    relaxation: Callable[[], None]  # all of inference in one
    learning: Callable[[], None]  # gradients and update in one
    training: Callable[[], None]  # both in one


class Engine:
    """Runs `net` on a backend with one choice of clamped nodes.

    weights: initial ones, {layer: {key: tensor}}, of one dtype.    inference: how activities move.
    clamped: names of the nodes held at data.
    placed: names of free nodes that are given their initial activities.
    held: names of placed nodes of which some units stay at these, in every batch those that `relax` is told.
    learning: the rule applied by `update`.    grouped: stack equal layers (same numbers either way).
    precision: formats of the tensors on a card; not for the reference backend.
    batch_size: of the largest batches to come, for which a card backend plans its memory.
    fused: on a card, run in one program of our own (docs/kernels.md).    cores_per_layer: its cores for each
        layer, None for as few as memory allows.
    backend, device: as of `Trainer`.

    Buffers are reused between batches; what the caller gets is always a copy. Raises ValueError for what does
    not fit together or does not fit the chip, BackendUnavailable where the backend cannot run.
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
        held: Collection[str] = (),
        fused: bool = False,
        cores_per_layer: int | None = None,
    ) -> None:
        self.net = net
        self.inference = inference
        self.learning = learning
        self.dtype = check_weights(net, weights)
        self.clamped = tuple(clamped)
        self.placed = tuple(placed)
        self.held = tuple(held)
        self.backend = open_backend(backend, self.dtype, device, precision, fused, cores_per_layer)
        indices = [net.node_index(name) for name in self.clamped]
        placed_indices = [net.node_index(name) for name in self.placed]
        held_indices = [net.node_index(name) for name in self.held]

        def write(where: Layout) -> Program:
            return assemble(
                where, inference, indices, placed_indices, learning, self.backend.uniform, held_indices
            )

        self.layout, self.program = self.backend.compile(net, grouped, write, batch_size)
        self.scalars = {
            INFERENCE_RATE: inference.rate,
            INFERENCE_STEP: 0.0,
            NOISE: noise_scale(inference),
            NUDGE: 0.0,
            LEARNING_RATE: 0.0,
            LEARNING_STEP: 0.0,
            PER_SAMPLE: 1.0,
            PER_NUDGE: 1.0,
        }
        self._nudge = 1.0 if inference.nudge is None else inference.nudge.at(0.0)
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
        self._learning_steps_before = 0
        self._layers = [
            _Home(name, layer, where, index)
            for part, where in zip(net.chains, (self.layout, self.layout.backward), strict=False)
            if where is not None
            for index, name, layer in zip(part.indices, part.names, part.rules, strict=True)
        ]
        shapes = net.weight_shapes()
        self._owners = [home for home in self._layers if home.name in shapes]
        self._fixed_constants = [
            energies.constant(home.layer.energy, home.layer.units) for home in self._layers
        ]
        self.load_weights(weights)

    # --- weights and learning state -------------------------------------------------------------------------

    def load_weights(self, weights: Weights) -> None:
        """Replaces the weights. Raises ValueError for names, shapes or dtypes that are not this network's."""
        check_weights(self.net, weights)
        self._load(weights)
        self._load_masks()
        self._load_precisions(weights)
        self._refresh()

    def weights(self) -> Weights:
        """A copy of the weights, {layer: {key: tensor}}."""
        return {
            home.name: {key: self._read_layer(key, home) for key in home.layer.weight_shapes(1)}
            for home in self._owners
        }

    def gradients(self) -> Weights:
        """What `compute_gradients` left: dF/dW of the batch mean, to be descended. `update` may use their
        memory for other things.
        """
        return {
            home.name: {key: self._read_layer(f"{key}_gradient", home) for key in home.layer.trained}
            for home in self._owners
        }

    def load_gradients(self, gradients: Weights) -> None:
        """Gradients from elsewhere (the backprop twin), for `update` to apply."""
        self._load(gradients, "_gradient")

    def learning_state(self) -> dict[str, dict[str, Tensor]]:
        """The state of the learning rule: {layer: {"weight_first_moment": ..., ...}}, {} if it has none."""
        state = {
            home.name: {key: self._read_layer(key, home) for key in self._state_keys(home)}
            for home in self._owners
        }
        return {name: tensors for name, tensors in state.items() if tensors}

    def load_learning_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replaces what `learning_state` returns. Raises ValueError for that of another learning rule."""
        for home in self._owners:
            expected, found = set(self._state_keys(home)), set(state.get(home.name, {}))
            if found != expected:
                raise ValueError(
                    f"the learning state of layer {home.name!r} must hold {sorted(expected)}, got "
                    f"{sorted(found)}; it was written by another learning rule."
                )
        self._load(state)

    def _state_keys(self, home: _Home) -> list[str]:
        names = home.layer.trained
        if not names:
            return []
        place = home.where.layer(names[0], home.index)[1].name.partition("@")[2]
        roles = [name.partition("@")[0] for name in self._persistent if name.endswith(f"@{place}")]
        own, state = home.layer.weight_shapes(1), list[str]()
        for role in roles:
            name = max((name for name in names if role.startswith(f"{name}_")), key=len, default=None)
            if name is not None and role not in own and role != f"{name}_gradient":
                state.append(role)
        return state

    def _load(self, tree: Mapping[str, Mapping[str, Tensor]], suffix: str = "") -> None:
        for home in self._owners:
            for key, values in tree.get(home.name, {}).items():  # a rule without state has no entry
                slot, buffer = home.where.layer(key + suffix, home.index)
                values = values if values.dim() < 3 else values.flatten(1)
                self.backend.write(self._persistent[buffer.name], slot, values)

    def _read_layer(self, role: str, home: _Home) -> Tensor:
        slot, buffer = home.where.layer(role, home.index)
        values = self.backend.read(self._persistent[buffer.name], slot)[0]
        if home.where.net.wiring is not None:
            shapes = home.layer.weight_shapes(0)
            return values[: buffer.rows, : buffer.columns].reshape(shapes[weight_of(role, shapes)])
        fan_in, fan_out = home.where.net.widths[home.index - 1 : home.index + 1]
        return values[0, :fan_out] if is_row(role) else values[:fan_in, :fan_out]

    def _load_masks(self) -> None:
        for home in self._owners:
            for map_, key, shape in home.layer.masks if isinstance(home.layer, Expression) else ():
                slot, buffer = home.where.layer(f"mask of {key}", home.index)
                if buffer.name in self._persistent:
                    self.backend.write(self._persistent[buffer.name], slot, map_.drawn_mask(shape))

    def _load_precisions(self, weights: Weights) -> None:
        for home in self._layers:
            name, energy = f"precision@{home.where.tag}{home.index}", home.layer.energy
            if name not in self._persistent or not isinstance(energy, Gaussian):
                continue
            fixed = energy.matrix(home.layer.units).to(self.dtype)
            values = 1.0 / weights[home.name]["variance"] if home.layer.learns_variance else fixed
            self.backend.write(self._persistent[name], Slot(name, 0, 1), values)

    @property
    def _constants(self) -> list[float]:
        """-1/2 log|P| per layer."""
        return [
            0.5 * float(self._read_layer("variance", home).log().sum())
            if home.layer.learns_variance
            else constant
            for home, constant in zip(self._layers, self._fixed_constants, strict=True)
        ]

    # --- one batch ------------------------------------------------------------------------------------------

    def relax(
        self,
        activities: Mapping[str, Tensor],
        record: bool = False,
        upcoming: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        held: Mapping[str, Tensor] | None = None,
        learn: bool = False,
    ) -> Relaxation:
        """Runs inference on one batch.

        activities: {node: [B, units]} for every clamped and placed node; an input that is neither starts at
        zero.
        record: keep the energies of every inference step.
        upcoming: the activities of the next batch, the very tensors; they are sent while this one runs.
        seed: of the noise, where the dynamics have any.
        held: {node: bool [B, units]} of every held node, True where a unit stays.
        learn: go on with what `learn` does, by the rate and step of `set_learning`, in one sequence with
            inference; whether that has gone wrong is known after the weights have moved.

        With a centred nudge the batch relaxes twice, the second time to the positive side, and what is
        reported and read is of that. Where weights move with every inference step they have moved by the end
        of this call, by the rate and step of `set_learning`.
        """
        missing = [name for name in (*self.clamped, *self.placed) if name not in activities]
        if missing:
            raise ValueError(f"node {missing[0]!r} is clamped or placed, so relax needs its activities.")
        missing = [name for name in self.held if name not in (held or {})]
        if missing:
            raise ValueError(f"units of node {missing[0]!r} are held, so relax needs to know which.")
        batch = self._begin(activities)
        for name in self.held:
            slot, buffer = self.layout.node("movable", self.net.node_index(name))
            if buffer.name in batch.buffers:  # without an inference step nothing reads it
                assert held is not None
                self.backend.write(batch.buffers[buffer.name], slot, (~held[name]).to(self.dtype))
        if self.inference.is_random:
            self.backend.seed(seed)
        if self.program.keep:
            self._set_nudge(-self._nudge, 2.0)
            batch.relaxation()
            batch.gradients()
            batch.keep()
        self._set_nudge(self._nudge, 2.0 if self.program.keep else 1.0)
        tolerance, watched = self.inference.tolerance, record or self.inference.tolerance is not None
        if learn and watched:
            raise ValueError("a watched relaxation is judged before weights move; call learn after it.")
        if not watched:
            (batch.training if learn else batch.relaxation)()
            self._send_ahead(batch, upcoming)
            return self._outcome(batch, Status.COMPLETED, self.program.num_steps, None)
        batch.initialise()
        batch.measure_initial()
        history = [self._energies(batch, "initial_")[0]]
        status, steps = Status.COMPLETED, 0
        while steps < self.program.num_steps and status is Status.COMPLETED:
            batch.steps[steps]()
            steps += 1
            batch.measure()
            history.append(self._energies(batch)[0])
            if tolerance is not None and steps >= self._num_settling:
                before, after = sum(history[-2]), sum(history[-1])
                if abs(before - after) <= tolerance * abs(before):
                    status = Status.CONVERGED
        batch.finish()
        batch.measure()
        history[-1] = self._energies(batch)[0]  # an amortiser's are known only now
        return self._outcome(batch, status, steps, history if record else None)

    def set_nudge(self, fraction: float) -> None:
        """The strength of the nudge after that fraction of all learning steps."""
        if self.inference.nudge is not None:
            self._nudge = self.inference.nudge.at(fraction)

    def _set_nudge(self, nudge: float, count: float) -> None:
        self.scalars[NUDGE], self.scalars[PER_NUDGE] = nudge, self.scalars[PER_SAMPLE] / (count * nudge)

    def predict(self, inputs: Tensor) -> Tensor:
        """The output predicted from `inputs` [B, D] alone, [B, units]: one feedforward sweep.

        It counts as a batch whose free and clamped nodes are at their predictions.
        """
        return self.sweep({self.net.input_name: inputs})

    def sweep(self, roots: Mapping[str, Tensor]) -> Tensor:
        """The same from the activities of all nodes that nothing predicts, {node: [B, units]}.

        Raises ValueError for a graph with cycles, which no sweep goes through.
        """
        if self.net.sources_ahead:
            raise ValueError(
                "a graph with cycles has no feedforward sweep; clamp what is known and relax the rest."
            )
        batch = self._begin(roots)
        (batch.sweep if self.program.sweep else batch.initialise)()
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
        for name in set(self.net.nodes[: self.net.num_roots]) - set(activities):
            handle, slot = batch.given[name]  # a sweep may have left inputs there
            self.backend.write(
                handle, slot, torch.zeros(batch_size, self.net.widths[self.net.node_index(name)])
            )
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
        uniform = self.backend.uniform or self.inference.initial != "feedforward"
        return len(self.net.layers) if uniform else len(self.program.steps)

    def _outcome(
        self, batch: _Batch, status: Status, steps: int, trajectory: list[list[float]] | None
    ) -> Relaxation:
        first, _ = self._energies(batch, "initial_")
        last, squares = self._energies(batch)
        norms = [math.sqrt(square) for square in squares]
        judged = judge(status, first, last, sum(self._constants), self.inference)
        return Relaxation(judged, last, norms, steps, trajectory)

    def write_errors(self, errors: Mapping[str, Tensor]) -> None:
        """Replaces the errors of the last relaxed batch, [B, units] per predicted node."""
        assert self._batch is not None, "relax a batch first"
        for home in self._layers:
            slot, buffer = home.where.node("error", home.index)
            self.backend.write(self._batch.buffers[buffer.name], slot, errors[home.name])

    def compute_gradients(self) -> None:
        """dF/dW of the last relaxed batch, by the local rules."""
        assert self._batch is not None, "relax a batch first"
        self._batch.gradients()
        self._batch.combine()

    def update(self, learning_rate: float, step: int) -> None:
        """Applies the learning rule. step: number of this learning step, counted from 1."""
        self.set_learning(learning_rate, step)
        self._update()

    def learn(self, learning_rate: float, step: int) -> None:
        """`compute_gradients` and `update` in one. Where weights move with every inference step there is
        nothing left to do.
        """
        assert self._batch is not None, "relax a batch first"
        if self.inference.weights_at == "every_step":
            return
        self.set_learning(learning_rate, step)
        self._batch.learning()

    def set_learning(self, rate: float, step: int) -> None:
        """The learning rate of what comes next, and the number of its learning step, counted from 1.

        With weights that move at every inference step it is the number of the batch: the learning rule then
        counts num_steps of its own steps per batch.
        """
        self.scalars[LEARNING_RATE], self.scalars[LEARNING_STEP] = rate, float(step)
        self._learning_steps_before = (step - 1) * self.program.num_steps

    def read_node(self, role: str, name: str) -> Tensor:
        """A copy of one node's tensor of the last relaxed batch, [B, units]: "activity", "error", "anchor" or
        "initial".
        """
        index = self.net.node_index(name)
        return self._read_slot(self.layout.node(role, index)[0], self.net.widths[index])

    def read_error(self, layer: str) -> Tensor:
        """The error under the prediction of a layer, [B, units]."""
        (home,) = (home for home in self._layers if home.name == layer)
        return self._read_slot(home.where.node("error", home.index)[0], home.layer.units)

    def read_activity(self, name: str, initial: bool = False) -> Tensor:
        """The activity of a node after inference, or the one it started from, [B, units]."""
        slots = self.program.starts if initial else self.program.ends
        index = self.net.node_index(name)
        return self._read_slot(slots[index], self.net.widths[index])

    def _read_slot(self, slot: Slot, units: int) -> Tensor:
        assert self._batch is not None, "relax a batch first"
        return self.backend.read(self._batch.buffers[slot.buffer], slot)[0][: self.batch_size, :units]

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
            for name in {*self.net.nodes[: self.net.num_roots], *self.clamped, *self.placed}:
                is_target = self.inference.nudge is not None and name == self.net.output
                slot, buffer = self.layout.node(
                    "target" if is_target else "initial", self.net.node_index(name)
                )
                given[name] = buffers[buffer.name], slot

            def bind(section: str) -> Callable[[], None]:
                return self.backend.bind(getattr(self.program, section), buffers, self.scalars)

            names = ("initialise", "measure_initial", "finish", "measure", "gradients")
            initialise, measure_initial, finish, measure, gradients = map(bind, names)
            sweep, keep, combine = map(bind, ("sweep", "keep", "combine"))
            distinct = [self.backend.bind(code, buffers, self.scalars) for code in self.program.steps]
            steps = [
                self._counted(number, distinct[kind]) for number, kind in enumerate(self.program.walk, 1)
            ]
            inferring = [initialise, measure_initial, *steps, finish, measure]
            moving_weights = [gradients, combine, self._update]
            self._batches[batch_size] = _Batch(
                buffers,
                given,
                initialise,
                measure_initial,
                steps,
                finish,
                measure,
                gradients,
                sweep,
                keep,
                combine,
                self.backend.sequence(inferring),
                self.backend.sequence(moving_weights),
                self.backend.sequence([*inferring, *moving_weights]),
            )
        return self._batches[batch_size]

    def _counted(self, number: int, step: Callable[[], None]) -> Callable[[], None]:
        """Inference step `number`, with the counters set that its instructions read."""
        incremental = self.inference.weights_at == "every_step" and isinstance(self.learning, (Adam, AdamW))
        if self.inference.dynamics != "adam" and not incremental:
            return step

        def run() -> None:
            self.scalars[INFERENCE_STEP] = float(number)
            if incremental:
                self.scalars[LEARNING_STEP] = float(self._learning_steps_before + number)
            step()

        return run

    def _energies(self, batch: _Batch, when: str = "") -> tuple[list[float], list[float]]:
        """Energy and e'e per layer, batch mean."""
        squares = self._sums(batch, f"{when}square")
        weighted = self._sums(batch, f"{when}energy")
        parts = zip(self._layers, squares, weighted, self._constants, strict=True)
        return [energies.from_sums(home.layer.energy, *numbers) for home, *numbers in parts], squares

    def _sums(self, batch: _Batch, role: str) -> list[float]:
        """Per layer, batch mean; 0 where a layer's energy follows from its squares."""
        found: dict[str, list[float]] = {}
        sums: list[float] = []
        for home in self._layers:
            slot, buffer = home.where.sum(role, home.index)
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


def judge(
    status: Status, first: list[float], last: list[float], constant: float, inference: Inference
) -> Status:
    """`status`, unless the relaxation went wrong. first, last: energies per layer at its start and end.

    constant: what in their sums does not depend on errors.
    """
    if not math.isfinite(sum(last)):
        return Status.NON_FINITE
    before, after = sum(first) - constant, sum(last) - constant
    if inference.descends and after > DIVERGENCE_FACTOR * max(before, 1e-30):
        return Status.DIVERGED
    return status


def _is_persistent(buffer: Buffer) -> bool:
    """Whether a buffer is the same for every batch size: weights, gradients, learning state, numbers."""
    return BATCH not in (buffer.rows, buffer.columns)
