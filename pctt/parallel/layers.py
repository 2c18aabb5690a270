"""Layer parallel: every rank has some of the layers, and all of them work on the same batch at once.

In predictive coding a layer needs of the others only what its two neighbours send, in every inference step,
so the ranks wait for nobody else: there is no sweep back through all layers as in backpropagation. The first
sweep, from which inference starts, goes through all of them in turn. See cut.py for what is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise

import torch
from torch import Tensor

from pctt import energies
from pctt.assemble import assemble
from pctt.backends.operations import one_after_the_other
from pctt.backends.reference import Reference
from pctt.energies import Gaussian
from pctt.engine import Relaxation, Status, judge
from pctt.groups import layout
from pctt.inference import Inference
from pctt.initialisers import init
from pctt.layers.dense import Dense
from pctt.learning import Learning
from pctt.network import Network, Weights, check_weights
from pctt.parallel.cut import Cut, Message, Section, Task, balanced, loads
from pctt.parallel.group import Group
from pctt.program import (
    BATCH,
    INFERENCE_RATE,
    INFERENCE_STEP,
    LEARNING_RATE,
    LEARNING_STEP,
    PER_SAMPLE,
    Buffer,
    Slot,
)

Call = Callable[[], object]


class LayerParallel:
    """A chain of dense layers, split over the ranks of `group`, on the reference backend.

    net, inference, learning: as of `Trainer`, the same on every rank.
    weights: initial ones, the same on every rank, of which it keeps those of its layers; else
        `init(net, seed)`.
    ranks: the rank of each layer, from the input on, consecutive; by default such that the largest share of
        the matrix products is as small as can be.

    Strict and fixed predictions, both placements of the activation, any dynamics but those with noise or a
    step size per sample, and weights that move with every inference step. Raises ValueError for the rest, by
    name.
    """

    def __init__(
        self,
        net: Network,
        inference: Inference,
        learning: Learning,
        group: Group,
        weights: Weights | None = None,
        seed: int = 0,
        ranks: tuple[int, ...] | None = None,
    ) -> None:
        _refuse(net, inference)
        weights = weights if weights is not None else init(net, seed)
        self.net = net
        self.inference = inference
        self.learning = learning
        self.group = group
        self.dtype = check_weights(net, weights)
        self.step = 0  # learning steps done
        self._layout = layout(net, grouped=False)
        last = len(net.layers)
        self._program = assemble(self._layout, inference, (0, last), learning=learning)
        costs = loads(self._layout, self._program)
        self.ranks = balanced(costs, group.size) if ranks is None else ranks
        _check_ranks(self.ranks, net, group.size)
        self._cut = Cut(self._layout, self._program, self.ranks)
        self._backend = Reference(self.dtype, str(group.device))
        self._scalars = {
            INFERENCE_RATE: inference.rate,
            INFERENCE_STEP: 0.0,
            LEARNING_RATE: 0.0,
            LEARNING_STEP: 0.0,
            PER_SAMPLE: 1.0,
        }
        self._own = [index for index, rank in enumerate(self.ranks, start=1) if rank == group.rank]
        self._persistent = {
            name: self._backend.allocate(buffer, 1)
            for name, buffer in self._buffers().items()
            if BATCH not in (buffer.rows, buffer.columns)
        }
        self._batches: dict[int, _Batch] = {}
        group.agree("network and settings", net, inference, learning, self.ranks)
        group.agree("weights", *(tensor for tree in weights.values() for tensor in tree.values()))
        self._load(weights)

    # --- weights --------------------------------------------------------------------------------------------

    def weights(self) -> Weights:
        """Of this rank's layers."""
        return {
            self.net.nodes[index]: {key: self._read(key, index) for key in self._rule(index).trained}
            for index in self._own
        }

    def gather_weights(self) -> Weights:
        """Of all layers, on every rank; one all_reduce of their size. For the end of a run."""
        shapes = self.net.weight_shapes()
        own = self.weights()
        flat = torch.cat(
            [
                own[name][key].flatten() if name in own else torch.zeros(math.prod(shape), dtype=self.dtype)
                for name, tree in shapes.items()
                for key, shape in tree.items()
            ]
        ).to(self.group.device)
        self.group.all_reduce(flat)
        parts = iter(flat.cpu().split([math.prod(s) for tree in shapes.values() for s in tree.values()]))
        return {
            name: {key: next(parts).view(shape) for key, shape in tree.items()}
            for name, tree in shapes.items()
        }

    def bytes_allocated(self) -> int:
        """On this rank: weights, gradients, learning state, and what it has for every batch size so far."""
        places = [self._persistent, *(batch.buffers for batch in self._batches.values())]
        tensors = {id(tensor): tensor for place in places for tensor in place.values()}
        return sum(tensor.nbytes for tensor in tensors.values())

    def _load(self, weights: Weights) -> None:
        for index in self._own:
            for key, values in weights[self.net.nodes[index]].items():
                slot, buffer = self._layout.layer(key, index)
                if buffer.name in self._persistent:
                    self._backend.write(self._persistent[buffer.name], slot, values)
            energy, name = self._rule(index).energy, f"precision@{index}"
            if name in self._persistent and isinstance(energy, Gaussian):
                precision = energy.matrix(self.net.widths[index]).to(self.dtype)
                self._backend.write(self._persistent[name], Slot(name, 0, 1), precision)

    def _read(self, key: str, index: int) -> Tensor:
        slot, buffer = self._layout.layer(key, index)
        values = self._backend.read(self._persistent[buffer.name], slot)[0]
        return values[0] if key == "bias" else values

    def _rule(self, index: int) -> Dense:
        rule = self.net.rule(index)
        assert isinstance(rule, Dense)
        return rule

    # --- one batch ------------------------------------------------------------------------------------------

    def train_batch(self, batch: Mapping[str, Tensor], rate: float | None = None) -> Relaxation:
        """One learning step: inference, energies told to all ranks, and unless it went wrong, learning.

        batch: {"input": [B, units], output: [B, units]}, whole on every rank; each uses what belongs to its
            nodes.
        rate: the learning rate, by default that of the learning rule.

        Returns energies and error norms of all layers, the same on every rank. With weights that move at
        every inference step they have moved whatever the status says.
        """
        bound = self._prepare(len(batch[self.net.output]))
        self._scalars[PER_SAMPLE] = 1.0 / bound.size
        self._scalars[LEARNING_RATE] = self.learning.rate if rate is None else rate
        for name, values in batch.items():
            slot, buffer = self._layout.node("initial", self.net.node_index(name))
            if self._cut.home(slot) == self.group.rank:
                self._backend.write(bound.buffers[buffer.name], slot, values)
        moving = self.inference.weights_at == "every_step"
        last = len(bound.inference) - 1
        bound.inference[0].expect()
        for number, section in enumerate(bound.inference):  # the first sweep, the steps, what ends inference
            if number < last:
                bound.inference[number + 1].expect()
            self._scalars[INFERENCE_STEP] = number
            self._scalars[LEARNING_STEP] = self.step * (last - 1) + number
            section.run()
        relaxation = self._relaxation(bound)
        if relaxation.status.ok or moving:
            self.step += 1
            self._scalars[LEARNING_STEP] = self.step
            bound.learning.expect()
            bound.learning.run()
        return relaxation

    def _relaxation(self, bound: _Batch) -> Relaxation:
        """Sums of e'e and energies, before and after, of the rank's layers; one all_reduce tells all."""
        sums = torch.zeros(4, len(self.net.layers), dtype=torch.float64)
        roles = ("initial_square", "initial_energy", "square", "energy")
        for row, role in enumerate(roles):
            for index in self._own:
                slot, buffer = self._layout.sum(role, index)
                if buffer.name in bound.buffers:
                    sums[row, index - 1] = float(self._backend.read(bound.buffers[buffer.name], slot))
        sums = sums.to(self.group.device)
        self.group.all_reduce(sums)
        before, before_energy, after, after_energy = (sums.cpu() / bound.size).tolist()
        first, last = (
            [self._energy(*entry) for entry in enumerate(zip(*pair, strict=True), start=1)]
            for pair in ((before, before_energy), (after, after_energy))
        )
        constant = sum(self._constant(index) for index in self.net.indices)
        status = judge(Status.COMPLETED, first, last, constant, self.inference)
        return Relaxation(status, last, [math.sqrt(square) for square in after], self._program.num_steps)

    def _energy(self, index: int, sums: tuple[float, float]) -> float:
        return energies.from_sums(self._rule(index).energy, *sums, self._constant(index))

    def _constant(self, index: int) -> float:
        return energies.constant(self._rule(index).energy, self.net.widths[index])

    # --- this rank's part of the program --------------------------------------------------------------------

    def _buffers(self) -> dict[str, Buffer]:
        """Those that this rank's instructions and messages name."""
        cut, rank = self._cut, self.group.rank
        sections = (cut.initialise, *cut.steps, cut.finish, cut.learn)
        slots = [slot for section in sections for task in section for slot in task.slots(rank)]
        return {slot.buffer: self._program.buffers[slot.buffer] for slot in slots}

    def _prepare(self, size: int) -> _Batch:
        if size not in self._batches:
            buffers = dict(self._persistent)
            for name, buffer in self._buffers().items():
                if name not in buffers:
                    buffers[name] = self._backend.allocate(buffer, size)
            cut, bind = self._cut, partial(self._bind, buffers)
            inference = [bind(section) for section in (cut.initialise, *cut.steps, cut.finish)]
            self._batches[size] = _Batch(size, buffers, inference, bind(cut.learn))
        return self._batches[size]

    def _bind(self, buffers: Mapping[str, Tensor], section: Section) -> _Bound:
        """This rank's part of a section: runs of instructions, and messages between them."""
        rank, calls, expected = self.group.rank, list[Call](), list[Call]()
        mine = [task for task in section if task.slots(rank)]
        for computes, run in groupby(mine, key=lambda task: isinstance(task, Task)):
            if computes:
                code = [task.instruction for task in run if isinstance(task, Task)]
                calls.append(self._backend.bind(code, buffers, self._scalars))
                continue
            for message in (task for task in run if isinstance(task, Message)):
                tensor = buffers[message.slot.buffer][message.slot.start]
                if message.source == rank:
                    calls.append(partial(self.group.send, tensor, message.target, message))
                else:
                    calls.append(partial(self.group.receive, tensor, message.source))
                    expected.append(partial(self.group.expect, tensor, message.source))
        return _Bound(one_after_the_other(expected), one_after_the_other(calls))


@dataclass(frozen=True)
class _Bound:
    """This rank's part of a section. expect: says which messages it will receive; a section ahead, so that
    none has to ask first.
    """

    expect: Callable[[], None]
    run: Callable[[], None]


@dataclass(frozen=True)
class _Batch:
    """Buffers and bound sections for one batch size."""

    size: int
    buffers: dict[str, Tensor]
    inference: list[_Bound]
    learning: _Bound


def _refuse(net: Network, inference: Inference) -> None:
    reasons = {
        "a graph": net.wiring is not None and "only chains of dense layers are cut",
        "backward layers": net.backward is not None and "only one chain is cut",
        "variables='errors'": inference.variables == "errors"
        and "each of its steps sweeps through all layers in turn, so ranks would wait for each other",
        "sweep='gauss_seidel'": inference.sweep == "gauss_seidel"
        and "each of its steps goes through all layers in turn, so ranks would wait for each other",
        f"dynamics={inference.dynamics!r}": inference.dynamics in ("heun", "langevin")
        and "its steps need numbers of all layers, or noise that was not compared; use 'euler'",
        "a nudge": inference.nudge is not None and "it was not tried; clamp the output",
        f"initial={inference.initial!r}": inference.initial not in ("feedforward", "zeros")
        and "it was not tried; use 'feedforward'",
        "tolerance": inference.tolerance is not None
        and "when to stop depends on the energy of all layers in every step; leave it out",
        "a learned variance": any(rule.learns_variance for rule in net.rules)
        and "it was not tried; give its layer a precision",
    }
    for what, reason in reasons.items():
        if reason:
            raise ValueError(f"layer parallel training does not take {what}: {reason}.")


def _check_ranks(ranks: tuple[int, ...], net: Network, size: int) -> None:
    steps = [after - before for before, after in pairwise((0, *ranks))]
    if len(ranks) != len(net.layers) or not set(steps) <= {0, 1} or set(ranks) != set(range(size)):
        raise ValueError(
            f"ranks must name a rank for each of {len(net.layers)} layers, from 0 to {size - 1} in order, "
            f"each at least once; got {ranks}."
        )
