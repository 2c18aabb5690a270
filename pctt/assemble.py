"""Writes the program of a network: which local operations one batch takes, and in which order.

The state is kept as *deviations*. From the initial activities x0 (clamped nodes at their data, the others at
their predictions) one sweep computes the anchors p_l = mu_l(x0_{l-1}); from then on a node is x_l = p_l +
d_l, and

    d_l = x0_l - p_l  at the start: 0 at a free node, the constant x_l - p_l at a clamped one,
    e_l = d_l - r_l,  r_l = mu_l(x_{l-1}) - p_l,  the change of the prediction, which layers compute from the
    change of their source.

This is strict predictive coding exactly (equality E17), but no product ever mixes a small change with a large
activity, so low precision costs no layer its gradient. Where the parent has not moved r_l = 0: the prediction
of a clamped input is computed once.

An inference step updates every free node from the errors of the step before (Jacobi), then recomputes the
errors, so that errors always belong to the activities they stand beside. Nodes that no error has reached yet
are left out: their update is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from pctt.activations import activation
from pctt.energies import Categorical, Gaussian
from pctt.groups import Layout
from pctt.inference.dynamics import DYNAMICS
from pctt.inference.settings import Inference
from pctt.learning.rules import Learning
from pctt.network import Network
from pctt.program import Buffer, Instruction, Program, Slot, coalesce


def assemble(
    layout: Layout,
    inference: Inference,
    clamped: Collection[int],
    placed: Collection[int] = (),
    learning: Learning | None = None,
    uniform: bool = False,
) -> Program:
    """The program for one choice of clamped nodes.

    clamped: indices of nodes held at data.
    placed: indices of free nodes that start at given activities instead of at their predictions.
    learning: the rule that `update` applies; without one `update` is empty.
    uniform: every inference step serves every layer, also those no error has reached yet, whose update is
        zero. For machines on which all layers run at once and a second kind of step costs more than it saves.
    """
    uniform = uniform and inference.num_steps > 0
    return Assembler(layout, inference, frozenset(clamped), frozenset(placed), uniform).program(learning)


@dataclass
class _Reach:
    """What the errors have reached: nodes that have left their anchors, nodes whose error may differ from
    zero.
    """

    moved: frozenset[int]
    charged: frozenset[int]


class Assembler:
    """Collects instructions; the rules of layers, dynamics and learning write theirs through it."""

    def __init__(
        self,
        layout: Layout,
        inference: Inference,
        clamped: frozenset[int],
        placed: frozenset[int],
        uniform: bool = False,
    ) -> None:
        self.layout = layout
        self.net: Network = layout.net
        self.inference = inference
        self.clamped = clamped
        self.given = clamped | placed | {0}
        self.free = frozenset(range(len(self.net.nodes))) - clamped
        self.buffers: dict[str, Buffer] = {}
        self.code: list[Instruction] = []
        self.uniform = uniform
        self.reach = _Reach(frozenset(), frozenset(i for i in self.given if i and not self.floats(i)))
        if uniform:
            sinks = [i for i in range(1, len(self.net.nodes)) if not self.floats(i)]
            self.reach = _Reach(frozenset(i for i in self.free if not self.floats(i)), frozenset(sinks))

    # --- the program ----------------------------------------------------------------------------------------

    def program(self, learning: Learning | None) -> Program:
        initialise = self._section(self._initialise)
        measure_initial = self._section(lambda: self._measure("initial_"))
        steps: list[tuple[Instruction, ...]] = []
        for _ in range(self.inference.num_steps):
            before = self.reach
            steps.append(self._section(self._step))
            if self.reach == before:  # every later step is this one
                break
        finish = self._section(self._finish)
        measure = self._section(self._measure)
        gradients = self._section(self._gradients)
        update = self._section(lambda: learning.write(self) if learning else None)
        return Program(
            self.buffers,
            initialise,
            measure_initial,
            tuple(steps),
            finish,
            measure,
            gradients,
            update,
            self.inference.num_steps,
        )

    def _section(self, write: Callable[[], None]) -> tuple[Instruction, ...]:
        self.code = []
        write()
        return coalesce(self.code)

    def _initialise(self) -> None:
        self.initial_activity(0)
        for index in self._layers():
            self.net.layers[index - 1].anchor(self, index)
        for index in range(len(self.net.nodes)):
            deviation = self.node("deviation", index)
            if index in self.given and index >= 1:
                self.add(deviation, self.initial_activity(index), self.anchor(index), scale=-1.0)
                self._set_error(index, self.copy(self.node("error", index), deviation))
            else:
                self.emit("fill", deviation, scale=0.0)
                if index >= 1:
                    self._set_error(index, self.emit("fill", self.node("error", index), scale=0.0))
            for role in DYNAMICS[self.inference.dynamics].state:
                self.emit("fill", self.node(role, index), scale=0.0)
        if self.uniform:  # the first step, too, then finds drives and sources where the later ones do
            self._predict()

    def _step(self) -> None:
        moved, charged = self.reach.moved, self.reach.charged
        move = DYNAMICS[self.inference.dynamics].move
        reached: set[int] = set()
        for index in sorted(self.free):
            children = [child for child in (index + 1,) if child in charged]
            if not self.floats(index) and (index in charged or children):
                move(self, index, index in charged, children)
                reached.add(index)
        moved = moved | reached
        predicted = {index + 1 for index in moved} if self.inference.prediction == "live" else set()
        charged = charged | {
            index for index in reached | predicted if index in self._layers() and not self.floats(index)
        }
        self.reach = _Reach(moved, charged)
        self._predict()

    def _predict(self) -> None:
        """The errors that belong to the deviations as they are now."""
        for index in self._layers():
            if self._recomputed(index) and not self.floats(index):
                self.net.layers[index - 1].predict(self, index)
                self._set_error(index, self.node("error", index))
            elif index in self.reach.moved:
                self._set_error(index, self.copy(self.node("error", index), self.node("deviation", index)))

    def _finish(self) -> None:
        """The activities of the free nodes, for whoever reads the state and for the gradients."""
        for index in sorted(self.free):
            if not self.floats(index):
                self.add(self.node("activity", index), self.anchor(index), self.node("deviation", index))
        last = len(self.net.layers)
        if self.floats(last):
            recomputed = self._recomputed(last)
            prediction = self.net.layers[-1].predict(self, last) if recomputed else self.anchor(last)
            self.copy(self.node("activity", last), prediction)

    def _measure(self, when: str = "") -> None:
        """Sums over batch and units: e'e, and the data-dependent part of the energy where that is another
        sum, per layer.
        """
        for index in self._layers():
            energy, error = self.net.layers[index - 1].energy, self.node("error", index)
            square, charged = self._sum(f"{when}square", index), index in self.reach.charged
            if charged:
                self.emit("inner", square, error, error)
            else:
                self.emit("fill", square, scale=0.0)
            if isinstance(energy, Gaussian) and energy.is_unit:
                continue
            own = self._sum(f"{when}energy", index)
            if not charged:
                self.emit("fill", own, scale=0.0)
            elif isinstance(energy, Categorical):
                drive, _ = self.drive_and_prediction(index)
                self.emit("cross_entropy", own, self.final_activity(index), drive)
            else:
                self.emit("inner", own, error, self.weighted_error(index))

    def _gradients(self) -> None:
        for index in self._layers():
            layer = self.net.layers[index - 1]
            if index in self.reach.charged:
                self._set_error(index, self.node("error", index))  # they may have been written from outside
                layer.gradient(self, index)
            else:
                self.emit("fill", self.layer("weight_gradient", index), scale=0.0)
                if layer.bias:
                    self.emit("fill", self.layer("bias_gradient", index), scale=0.0)

    def _layers(self) -> range:
        return range(1, len(self.net.layers) + 1)

    def _recomputed(self, index: int) -> bool:
        """Whether the prediction of layer `index` differs from its anchor."""
        return (
            self.inference.prediction == "live" and index in self._layers() and index - 1 in self.reach.moved
        )

    def _set_error(self, index: int, error: Slot) -> None:
        """Called wherever an error has been written: its weighted form follows it."""
        energy = self.net.layers[index - 1].energy
        if isinstance(energy, Gaussian) and not energy.is_unit:
            self.emit("multiply", self.node("weighted_error", index), error, self._precision(index))

    # --- slots ----------------------------------------------------------------------------------------------

    def node(self, role: str, index: int) -> Slot:
        """A tensor of node `index`, [batch, units]."""
        slot, buffer = self.layout.node(role, index)
        self.buffers[buffer.name] = buffer
        return slot

    def layer(self, role: str, index: int) -> Slot:
        """A tensor of layer `index`, [in, out] or for a bias [out]."""
        slot, buffer = self.layout.layer(role, index)
        self.buffers[buffer.name] = buffer
        return slot

    def _sum(self, role: str, index: int) -> Slot:
        slot, buffer = self.layout.sum(role, index)
        self.buffers[buffer.name] = buffer
        return slot

    def _precision(self, index: int) -> Slot:
        name = f"precision@{index}"
        self.buffers[name] = Buffer(name, 1, 1, self.net.widths[index])
        return Slot(name, 0, 1)

    def floats(self, index: int) -> bool:
        """A free categorical node follows its prediction, the minimiser of KL(x || mu) over distributions:
        its error is 0.
        """
        return (
            index in self.free and index >= 1 and isinstance(self.net.layers[index - 1].energy, Categorical)
        )

    def initial_activity(self, index: int) -> Slot:
        return self.node("initial", index) if index in self.given else self.anchor(index)

    def anchor(self, index: int) -> Slot:
        """The prediction from the initial activities; node 0, which nothing predicts, is its own."""
        return self.node("anchor", index) if index else self.node("initial", 0)

    def change(self, index: int) -> Slot:
        """x - x0 of node `index`: its deviation, unless it is free and started elsewhere than at p."""
        if index not in self.given or index == 0:
            return self.node("deviation", index)
        activity = self.add(self.node("activity", index), self.anchor(index), self.node("deviation", index))
        return self.add(self.node("change", index), activity, self.initial_activity(index), scale=-1.0)

    def prediction(self, index: int) -> Slot:
        """f_out(z), in the place of z where nothing needs z any more."""
        function = activation(self.net.layers[index - 1].output_function)
        needs_drive = function.needs_drive or isinstance(self.net.layers[index - 1].energy, Categorical)
        return self.node("prediction" if needs_drive else "drive", index)

    def final_activity(self, index: int) -> Slot:
        """What the weight gradients see: for fixed predictions the activities these were computed from."""
        if index in self.clamped or self.inference.prediction == "fixed":
            return self.initial_activity(index)
        return self.node("activity", index)

    def weighted_error(self, index: int) -> Slot:
        energy = self.net.layers[index - 1].energy
        weighted = isinstance(energy, Gaussian) and not energy.is_unit
        return self.node("weighted_error" if weighted else "error", index)

    def drive_and_prediction(self, index: int) -> tuple[Slot, Slot]:
        """z and mu of layer `index`, wherever their current values stand."""
        if self._recomputed(index):
            return self.node("drive", index), self.prediction(index)
        return self.node("anchor_drive", index), self.anchor(index)

    def activity_and_source(self, index: int) -> tuple[Slot, Slot]:
        """x and f_in(x) of node `index` as the source of the layer above, wherever their current values
        stand.
        """
        if self._recomputed(index + 1):
            return self.node("activity", index), self.node("source", index)
        return self.initial_activity(index), self.node("anchor_source", index)

    # --- instructions ---------------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        out: Slot,
        *inputs: Slot,
        scale: float = 1.0,
        scalar: str | None = None,
        function: str | None = None,
    ) -> Slot:
        self.code.append(Instruction(op, (out,), inputs, scale, scalar, function))
        return out

    def copy(self, out: Slot, a: Slot) -> Slot:
        return self.emit("copy", out, a)

    def add(self, out: Slot, a: Slot, b: Slot, scale: float = 1.0, scalar: str | None = None) -> Slot:
        return self.emit("add", out, a, b, scale=scale, scalar=scalar)

    def activate(self, out: Slot, a: Slot, function: str) -> Slot:
        return self.emit("activate", out, a, function=function)

    def derivative(self, out: Slot, v: Slot, drive: Slot, value: Slot, function: str) -> Slot:
        return self.emit("derivative", out, v, drive, value, function=function)

    def product(
        self,
        out: Slot,
        a: Slot,
        weight: Slot,
        addend: Slot | None,
        scale: float = 1.0,
        scalar: str | None = None,
    ) -> Slot:
        addends = () if addend is None else (addend,)
        return self.emit("product", out, a, weight, *addends, scale=scale, scalar=scalar)

    def product_transposed(
        self,
        out: Slot,
        a: Slot,
        weight: Slot,
        addend: Slot | None = None,
        scale: float = 1.0,
        scalar: str | None = None,
    ) -> Slot:
        addends = () if addend is None else (addend,)
        return self.emit("product_transposed", out, a, weight, *addends, scale=scale, scalar=scalar)

    def outer(self, out: Slot, a: Slot, b: Slot, scale: float, scalar: str) -> Slot:
        return self.emit("outer", out, a, b, scale=scale, scalar=scalar)

    def column_sum(self, out: Slot, a: Slot, scale: float, scalar: str) -> Slot:
        return self.emit("column_sum", out, a, scale=scale, scalar=scalar)
