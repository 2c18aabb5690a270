"""Bidirectional predictive coding: a chain up and a chain down that predict the same nodes.

    F = sum_l 1/2 e_l' P_l e_l + sum_l 1/2 b_l' Q_l b_l
    e_l = x_l - mu_l(x_{l-1}),  b_l = x_l - nu_l(x_{l+1})

(Oliviers, Tang & Bogacz 2025; the precisions P and Q are the weights alpha of the paper). Each chain is an
assembler of its own, with its own anchors, deviations and errors. Both see the same activities: the slopes of
both energies are summed, and both deviations move by the sum. Activities start at the sweep of the chain up.

With initial="amortised" the chain down is no part of the energy but an amortiser: activities start at its
sweep from the output, inference is that of the chain up alone, and the chain down learns to predict what it
ends in (hybrid predictive coding, Tschantz et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from pctt.assemble import Assembler
from pctt.groups import Layout
from pctt.inference import steps
from pctt.inference.dynamics import DYNAMICS, Pull, slope_of
from pctt.inference.settings import Inference
from pctt.learning import gradients as learning_steps
from pctt.learning.rules import Learning
from pctt.program import Instruction, Program, Slot, coalesce, without_repeats


def assemble_pair(
    layout: Layout,
    inference: Inference,
    clamped: frozenset[int],
    placed: frozenset[int],
    learning: Learning | None,
    held: frozenset[int] = frozenset(),
) -> Program:
    """The program of a network with a backward chain. Raises ValueError for settings it has none for."""
    _check(inference)
    return _Pair(layout, inference, clamped, placed, learning, held).program()


def _check(inference: Inference) -> None:
    wanted = {
        "variables": ("states",),
        "sweep": ("jacobi",),
        "weights_at": ("end",),
        "prediction": ("live",),
        "nudge": (None,),
        "dynamics": ("euler", "momentum", "adam"),
        "initial": ("feedforward", "amortised"),
    }
    for name, values in wanted.items():
        if getattr(inference, name) not in values:
            raise ValueError(
                f"a bidirectional network takes {name} {' or '.join(map(repr, values))}, got "
                f"{getattr(inference, name)!r}; change it, or drop the backward layers."
            )


class _Pair:
    """The assemblers of both chains, writing into one program."""

    def __init__(
        self,
        layout: Layout,
        inference: Inference,
        clamped: frozenset[int],
        placed: frozenset[int],
        learning: Learning | None,
        held: frozenset[int],
    ) -> None:
        assert layout.backward is not None
        self.inference = inference
        self.last = len(layout.net.layers)
        self.amortised = inference.initial == "amortised"
        if self.amortised and (self.last not in clamped or placed):
            raise ValueError(
                f"initial='amortised' starts from the output, {layout.net.output!r}; clamp it, and give no "
                "other initial activities."
            )
        free = frozenset(range(self.last + 1)) - clamped
        placed = free if self.amortised else placed
        self.up = Assembler(layout, inference, clamped, placed, held=held)
        self.down = Assembler(
            layout.backward,
            inference,
            frozenset(self.last - index for index in clamped),
            frozenset(self.last - index for index in self.up.free),
        )
        self.down.buffers = self.up.buffers
        self.down.at_anchor = self.amortised  # it is anchored at the activities that inference ends in
        self.up.learning = self.down.learning = learning

    def program(self) -> Program:
        up, down = self.up, self.down
        initialise = self._section(self._initialise)
        measure_initial = self._section(lambda: self._both(lambda chain: chain.write_measure("initial_")))
        distinct: list[tuple[Instruction, ...]] = []
        walk: list[int] = []
        for _ in range(self.inference.num_steps):
            step = self._section(self._step)
            if not distinct or step != distinct[-1]:
                distinct.append(step)
            walk.append(len(distinct) - 1)
        finish = self._section(self._finish)
        measure = self._section(lambda: self._both(lambda chain: chain.write_measure()))
        up.time = down.time = self.inference.num_steps
        gradients = self._section(lambda: self._both(learning_steps.gradients))
        update = self._section(lambda: self._both(learning_steps.update)) if up.learning else ()
        sweep = self._section(up.write_sweep) if self.amortised else ()
        return Program(
            up.buffers,
            initialise,
            measure_initial,
            tuple(distinct),
            finish,
            measure,
            gradients,
            update,
            tuple(walk),
            up.starts,
            up.ends,
            sweep=sweep,
        )

    def _section(self, write: Callable[[], None]) -> tuple[Instruction, ...]:
        self.up.code = self.down.code = []
        write()
        return coalesce(without_repeats(self.up.code))

    def _both(self, write: Callable[[Assembler], None]) -> None:
        for chain in (self.up, self.down):
            write(chain)

    def _initialise(self) -> None:
        if self.amortised:
            self._sweep_down()
            self.up.write_initialise()
            steps.anchor_anew(self.down)
            return
        self.up.write_initialise()
        self._show_down(initial=True)
        self.down.write_initialise()

    def _sweep_down(self) -> None:
        """Free nodes start where the chain down puts them."""
        up, down = self.up, self.down
        down.copy(down.initial_activity(0), up.initial_activity(self.last))
        for node in range(1, self.last + 1):
            index = self.last - node
            down.net.rule(node).anchor(down, node)
            if index in up.free:
                up.copy(up.initial_activity(index), down.anchor(node))
            down.copy(down.initial_activity(node), up.initial_activity(index))

    def _show_down(self, initial: bool) -> None:
        """The activities, as those that the chain down is anchored at."""
        up, down = self.up, self.down
        for index in range(self.last + 1):
            moved = not initial and index in up.free
            activity = up.node("activity", index) if moved else up.initial_activity(index)
            down.copy(down.initial_activity(self.last - index), activity)

    def _finish(self) -> None:
        if not self.amortised:
            self._both(steps.finish)
            return
        steps.finish(self.up)
        self._show_down(initial=False)
        steps.anchor_anew(self.down)

    def _step(self) -> None:
        """Slopes from the errors before; then both chains move and follow."""
        (stage,) = DYNAMICS[self.inference.dynamics].stages
        slopes: dict[int, Slot] = {}
        for index in sorted(self.up.free):
            own, pulls = self._forces(index)
            slope = slope_of(self.up, "slope", index, own, pulls)
            slopes[index] = self.up.released(index, slope) if index in self.up.held else slope
        for index, slope in slopes.items():
            stage(self.up, index, slope, [])
            if not self.amortised:
                stage(self.down, self.last - index, slope, [])
        self._follow(self.up, set(slopes))
        if not self.amortised:
            self._follow(self.down, {self.last - index for index in slopes})

    def _follow(self, chain: Assembler, reached: Collection[int]) -> None:
        chain.reach_out(reached)
        steps.predict(chain)

    def _forces(self, index: int) -> tuple[Slot | None, list[Pull]]:
        """What moves a node: the error under the chain up, and as pulls all else."""
        pulls, mirrored = steps.pulls_on(self.up, index), self.last - index
        if not self.amortised:
            pulls += steps.pulls_on(self.down, mirrored)
            if mirrored in self.down.reach.charged:
                pulls.append(partial(self._opposed, self.down.weighted_error(mirrored)))
        own = self.up.weighted_error(index) if index in self.up.reach.charged else None
        return own, pulls

    def _opposed(
        self, error: Slot, into: Slot, addend: Slot | None, scale: float, scalar: str | None
    ) -> None:
        """An error as a pull, which stands with the opposite sign."""
        self.up.add_scaled(error, into, addend, -scale, scalar)
