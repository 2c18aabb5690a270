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
are left out: their update is exactly zero. The other kinds of step differ in what moves and in which order:

    gauss_seidel   nodes move from the output down, each from errors that its children's moves have changed
    errors         one sweep down carries dE/dx, each e_l moves along dE/de_l = P e_l - that, one sweep up
                   gives the deviations d_l = e_l + r_l
    every_step     activities and weights move from the same errors; then all anchors are computed anew, from
                   the activities as they are now, so that e_l = x_l - p_l. In a uniform program anchors stay,
                   and the drives take up what the weights' change makes of them, q_l += x0_{l-1} dW + db: a
                   product more, but none that mixes small with large
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from pctt.energies import Categorical, Gaussian
from pctt.groups import Layout
from pctt.inference import steps
from pctt.inference.dynamics import DYNAMICS
from pctt.inference.settings import Inference
from pctt.learning import gradients as learning_steps
from pctt.learning.rules import SGD, Learning
from pctt.program import NUDGE, Instruction, Program, coalesce, without_repeats
from pctt.state import AbstractState


def assemble(
    layout: Layout,
    inference: Inference,
    clamped: Collection[int],
    placed: Collection[int] = (),
    learning: Learning | None = None,
    uniform: bool = False,
    held: Collection[int] = (),
) -> Program:
    """The program for one choice of clamped nodes.

    clamped: indices of nodes held at data; with a nudge the output's data are its target.
    placed: indices of free nodes that start at given activities instead of at their predictions.
    learning: the rule that `update` applies; without one `update` is empty.
    uniform: every inference step serves every layer, also those no error has reached yet, whose update is
        zero. For machines on which all layers run at once and a second kind of step costs more than it saves.
    held: indices of placed nodes of which some units stay where they are; `movable` says which do not.

    Raises ValueError where the settings do not fit the network or the clamped nodes.
    """
    if layout.backward is not None:
        from pctt.bidirectional import assemble_pair  # which is made of the assemblers of this module

        return assemble_pair(
            layout, inference, frozenset(clamped), frozenset(placed), learning, frozenset(held)
        )
    return Assembler(
        layout, inference, frozenset(clamped), frozenset(placed), uniform, frozenset(held)
    ).program(learning)


class Assembler(AbstractState):
    """Collects instructions; the rules of layers, dynamics and learning write theirs through it."""

    # --- the program ----------------------------------------------------------------------------------------

    def program(self, learning: Learning | None) -> Program:
        if self.inference.weights_at == "every_step" and learning is None:
            raise ValueError(
                "weights_at='every_step' changes weights during inference, so it needs a learning rule; "
                "use a Trainer, or weights_at='end'."
            )
        if self.drifting and not isinstance(learning, SGD):
            raise ValueError(
                "weights_at='every_step' with Adam is not run by the card backends, which would need a "
                "number that changes at every inference step; use SGD, or backend='reference'."
            )
        self.learning = learning
        initialise = self._section(self.write_initialise)
        measure_initial = self._section(lambda: self.write_measure("initial_"))
        distinct, walk = self._walk()
        finish = self._section(lambda: steps.finish(self))
        measure = self._section(self.write_measure)
        gradients = self._section(self._final_gradients)
        pair = self.nudge is not None and self.nudge.sign == "centred"
        keep = self._section(lambda: learning_steps.keep(self)) if pair else ()
        combine = self._section(lambda: learning_steps.combine(self)) if pair else ()
        learns_at_end = learning is not None and self.inference.weights_at != "every_step"
        update = self._section(lambda: learning_steps.update(self)) if learns_at_end else ()
        elsewhere = self.inference.initial != "feedforward" or self.net.wiring is not None
        sweep = self._section(self.write_sweep) if elsewhere and not self.net.sources_ahead else ()
        return Program(
            self.buffers,
            initialise,
            measure_initial,
            distinct,
            finish,
            measure,
            gradients,
            update,
            walk,
            self.starts,
            self.ends,
            sweep=sweep,
            keep=keep,
            combine=combine,
        )

    def _section(self, write: Callable[[], None]) -> tuple[Instruction, ...]:
        self.code = []
        write()
        code = without_repeats(self.code)
        stacked = self.net.wiring is None  # a graph has no stacks whose entries one instruction could serve
        return coalesce(code) if stacked else tuple(code)

    def _walk(self) -> tuple[tuple[tuple[Instruction, ...], ...], tuple[int, ...]]:
        """The inference steps that differ, and which of them each one is."""
        distinct: list[tuple[Instruction, ...]] = []
        walk: list[int] = []
        settled = False  # whether every later step is this one
        num_steps = self.inference.num_steps
        if self.inference.weights_at == "staircase":
            num_steps = min(num_steps, self.last - 1)  # by then all gradients are taken
        for self.time in range(num_steps):
            before = self.reach, frozenset(self.visited)
            if not settled:
                step = self._section(self._step)
                if not distinct or step != distinct[-1]:
                    distinct.append(step)
            walk.append(len(distinct) - 1)
            to_come = {"staircase": self.last}.get(self.inference.weights_at, 0)
            to_come = max(to_come, self.inference.burn_in)
            settled = before == (self.reach, frozenset(self.visited)) and self.time >= to_come
        self.time = num_steps
        return tuple(distinct), tuple(walk)

    def write_initialise(self) -> None:
        for root in sorted(self.roots & self.free - self.placed):
            start = self.initial_activity(root)
            if self.incremental or self.net.wiring is not None:
                self.emit("fill", start, scale=0.0)  # the batch before has moved it, or a sweep given it
        initial, cyclic = self.inference.initial, self.net.sources_ahead
        for index in sorted(self.started):
            if initial == "carried":
                self.copy(self.node("initial", index), self.node("activity", index))
            elif initial == "zeros" or index in cyclic:
                self.emit("fill", self.node("initial", index), scale=0.0)
        for index in self.indices:
            self.net.rule(index).anchor(self, index)
            if index in self.started - cyclic and initial == "feedforward":
                self.copy(self.node("initial", index), self.anchor(index))
            if self.nudge is not None and index == self.last:
                pull = self.add(
                    self.node("pull", index), self.node("target", index), self.anchor(index), -1.0
                )
                if index in self.clamped:
                    self.add(self.node("initial", index), self.anchor(index), pull, 1.0, NUDGE)
        if self.incremental:
            steps.anchor_errors(self)
        if self.drifting:
            for index in self.indices:
                if self.drift(index) != self.node("anchor_drive", index):
                    self.emit("fill", self.drift(index), scale=0.0)
        for index in range(len(self.net.nodes)):
            if not self.incremental:
                self._begin_node(index)
            for role in DYNAMICS[self.inference.dynamics].state:
                self.emit("fill", self.node(role, index), scale=0.0)
        for role in DYNAMICS[self.inference.dynamics].samples:
            self.emit("fill", self.sample(role), scale=1.0)
        if self.inference.is_random:
            learning_steps.begin_samples(self)
        if self.uniform and not self.incremental:
            steps.predict(self)  # the first step, too, then finds drives and sources where the later ones do

    def write_sweep(self) -> None:
        """Predictions from the input alone."""
        plain = Assembler(self.layout, Inference(num_steps=0), self.roots, frozenset())
        plain.buffers, plain.code = self.buffers, self.code
        for index in self.indices:
            self.net.rule(index).anchor(plain, index)

    def _begin_node(self, index: int) -> None:
        deviation = self.node("deviation", index)
        if index in self.given and index in self.indices:
            self.add(deviation, self.initial_activity(index), self.anchor(index), scale=-1.0)
            self.set_error(index, self.copy(self.node("error", index), deviation))
        else:
            self.emit("fill", deviation, scale=0.0)
            if index in self.indices:
                self.set_error(index, self.emit("fill", self.node("error", index), scale=0.0))

    # --- inference steps ------------------------------------------------------------------------------------

    def _step(self) -> None:
        if self.inference.weights_at == "staircase" and self.time < self.last:
            learning_steps.gradient_at_anchor(self, self.last - self.time)
        if self.drifting:
            steps.finish(self)
        if self.drifting or self.incremental:
            learning_steps.gradients(self)
        rule, moving = DYNAMICS[self.inference.dynamics], self.moving()
        in_errors = self.inference.variables == "errors"
        move = steps.in_errors if in_errors else steps.SWEEPS[self.inference.sweep]
        for stage in rule.stages:
            move(self, stage, moving)
            if stage is rule.stages[-1] and rule.accept is not None:
                rule.accept(self, moving)
            if self.drifting or self.incremental:
                learning_steps.update(self)
            if self.incremental:
                steps.anchor_anew(self)
                continue
            if self.drifting:
                steps.take_up_drift(self)
            steps.follow(self, moving)
        if self.inference.is_random and self.time >= self.inference.burn_in:
            steps.finish(self)
            learning_steps.add_sample(self)

    def write_measure(self, when: str = "") -> None:
        """Sums over batch and units: e'e, and the data-dependent part of the energy where that is another
        sum, per layer.
        """
        for index in self.indices:
            energy, error = self.net.layer(index).energy, self.node("error", index)
            square, charged = self.sum(f"{when}square", index), index in self.reach.charged
            if charged:
                self.emit("inner", square, error, error)
            else:
                self.emit("fill", square, scale=0.0)
            if isinstance(energy, Gaussian) and energy.is_unit:
                continue
            own = self.sum(f"{when}energy", index)
            if not charged:
                self.emit("fill", own, scale=0.0)
            elif isinstance(energy, Categorical):
                last, logits = self.net.shapes[index][-1], self.net.rule(index).logits(self, index)
                options = (("last", last),) if last != self.net.widths[index] else ()
                operands = self.final_activity(index), logits
                self.code.append(Instruction("cross_entropy", (own,), operands, options=options))
            else:
                self.emit("inner", own, error, self.weighted_error(index))

    # --- weight gradients -----------------------------------------------------------------------------------

    def _final_gradients(self) -> None:
        """What the gradients are after the last inference step."""
        if self.incremental or self.drifting:
            return  # the weights have moved already
        if self.inference.is_random and self.time > self.inference.burn_in:
            learning_steps.end_samples(self)
            return
        if self.inference.weights_at != "staircase":
            learning_steps.gradients(self)
        elif self.time < self.last:
            learning_steps.gradient_at_anchor(self, self.last - self.time)
