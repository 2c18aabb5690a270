"""The state of a relaxation as it is being written: what moves, what the errors have reached, and where the
current value of everything stands.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pctt.activations import activation
from pctt.energies import Categorical, Gaussian
from pctt.groups import Layout
from pctt.inference.dynamics import DYNAMICS
from pctt.inference.settings import Inference
from pctt.layers.dense import Dense
from pctt.learning.rules import Learning
from pctt.program import PER_NUDGE, PER_SAMPLE, Slot
from pctt.writer import AbstractWriter


@dataclass
class Reach:
    """What the errors have reached: nodes that have left their anchors, nodes whose error may differ from
    zero.
    """

    moved: frozenset[int]
    charged: frozenset[int]


class AbstractState(AbstractWriter):
    """One choice of settings and clamped nodes, at some point of its program."""

    def __init__(
        self,
        layout: Layout,
        inference: Inference,
        clamped: frozenset[int],
        placed: frozenset[int],
        uniform: bool = False,
        held: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(layout)
        self.inference = inference
        self.held = held
        self.last = self.net.output_index
        self.nudge = inference.nudge
        pulled = {self.last} if self.nudge is not None and self.nudge.style == "loss" else set[int]()
        self.clamped = clamped - pulled
        self.placed = placed
        self.free = frozenset(range(len(self.net.nodes))) - self.clamped
        self._check(clamped)
        self._check_held()
        every_step = inference.weights_at == "every_step" and inference.num_steps > 0
        self.drifting = every_step and uniform
        self.incremental = every_step and not uniform
        started = set(self.net.sources_ahead & self.free)
        if inference.initial in ("zeros", "carried") or self.incremental:
            started |= {index for index in self.free if index in self.indices and not self.floats(index)}
        self.started = frozenset(started - placed)
        self.given = self.clamped | placed | self.started | self.roots
        rule = DYNAMICS[inference.dynamics]
        self.uniform = (
            (uniform or rule.everywhere) and inference.num_steps > 0 and inference.wave_boost == 1.0
        )
        self.reach = Reach(
            frozenset(), frozenset(i for i in self.given if i in self.indices and not self.floats(i))
        )
        if self.uniform or self.incremental:
            sinks = frozenset(i for i in self.indices if not self.floats(i))
            moved = frozenset() if self.incremental else frozenset(i for i in self.free if not self.floats(i))
            self.reach = Reach(moved, sinks)
        self.at_anchor = self.incremental
        self.visited: set[int] = set()
        self.time = 0  # inference steps written
        self.learning: Learning | None = None
        self.written: set[Slot] = set()  # weight gradients that have a first term

    def _check(self, clamped: frozenset[int]) -> None:
        self.inference.refuse_unless_it_fits(len(self.net.layers))
        if self.net.wiring is not None:
            self._check_graph()
        if self.inference.initial == "amortised" and self.layout.backward is None and not self.layout.tag:
            raise ValueError(
                "initial='amortised' starts at the sweep of the backward layers, which this network lacks; "
                "add them, or use another initial."
            )
        if self.nudge is None:
            return
        output, energy = self.net.output, self.net.layer(self.last).energy
        strongest = max(self.nudge.beta, self.nudge.final_beta or 0.0)
        if isinstance(energy, Categorical) and strongest > 1.0:
            raise ValueError(
                f"{output!r} is categorical, so nudge must not be stronger than 1, got {strongest:g}: beyond "
                "its target its activity would leave 0 to 1."
            )
        if self.last not in clamped:
            raise ValueError(f"nudge acts on the output, {output!r}, by its targets; clamp it to them.")
        if isinstance(energy, Categorical) and (self.nudge.style, self.nudge.sign) != ("clamp", "positive"):
            why = (
                "free, it follows its prediction"
                if self.nudge.style == "loss"
                else "its activity would leave 0 to 1"
            )
            raise ValueError(
                f"{output!r} is categorical, so nudge must have style='clamp' and sign='positive': otherwise "
                f"{why}; or use a Gaussian energy."
            )

    def _check_held(self) -> None:
        for index in sorted(self.held):
            name = self.net.nodes[index]
            if index not in self.placed or self.floats(index):
                raise ValueError(
                    f"units of {name!r} are held, so the node must be free, have a Gaussian energy if it is "
                    "predicted, and be given its initial activity."
                )
        if self.held and (self.inference.variables == "errors" or self.inference.weights_at != "end"):
            raise ValueError(
                "units are held at their activities while the others move, and weights at the end; use "
                "variables='states' and weights_at='end'."
            )

    def _check_graph(self) -> None:
        inference, net = self.inference, self.net
        if inference.weights_at == "staircase":
            raise ValueError(
                "weights_at='staircase' counts the layers of a chain of dense layers up from the output; in "
                "a "
                "graph use prediction='fixed' with sweep='gauss_seidel' for the gradients of backpropagation."
            )
        if net.sources_ahead and inference.variables == "errors":
            raise ValueError(
                "variables='errors' takes a graph without cycles, along which activities follow from the "
                "errors; use variables='states'."
            )
        if self.nudge is not None and self.nudge.style == "clamp" and self.last in net.sources_ahead:
            raise ValueError(
                f"nudge acts on an output in a cycle: {net.output!r} is held near its prediction, which is "
                "not known before the nodes that it is predicted from; use style='loss'."
            )

    # --- what there is, and how far errors have come --------------------------------------------------------

    @property
    def indices(self) -> range:
        return self.net.indices

    @property
    def roots(self) -> frozenset[int]:
        return frozenset(range(self.net.num_roots))

    @property
    def starts(self) -> tuple[Slot, ...]:
        """Where the activity of each node stands that inference starts from."""
        return tuple(self.initial_activity(index) for index in range(len(self.net.nodes)))

    @property
    def ends(self) -> tuple[Slot, ...]:
        """Where the one stands that it ends in."""
        return tuple(
            self.node("activity", index) if index in self.free else self.initial_activity(index)
            for index in range(len(self.net.nodes))
        )

    def moving(self) -> list[int]:
        """The free nodes that inference moves."""
        return [index for index in sorted(self.free) if not self.floats(index)]

    def recomputed(self, index: int) -> bool:
        """Whether the prediction of layer `index` differs from its anchor."""
        return (
            not self.at_anchor
            and self.inference.prediction == "live"
            and index in self.indices
            and (self.drifting or not self.reach.moved.isdisjoint(self.net.sources(index)))
        )

    def reach_out(self, reached: Collection[int]) -> None:
        """Notes which nodes have moved, and whose errors can have changed by that."""
        moved = self.reach.moved | frozenset(reached)
        live = self.inference.prediction == "live"
        predicted = {child for index in moved for child in self.net.children(index)} if live else set[int]()
        charged = self.reach.charged | {
            index for index in moved | predicted if index in self.indices and not self.floats(index)
        }
        self.reach = Reach(moved, charged)

    def has_moved(self, index: int) -> bool:
        """Whether node `index` can have left the activity that inference started from."""
        return index in self.reach.moved

    def floats(self, index: int) -> bool:
        """A free categorical node follows its prediction, the minimiser of KL(x || mu) over distributions:
        its error is 0.
        """
        return (
            index in self.free
            and index in self.indices
            and isinstance(self.net.layer(index).energy, Categorical)
        )

    def released(self, index: int, slope: Slot) -> Slot:
        """Sets a slope, or noise, to 0 at the units of a node that are held."""
        return self.emit("multiply", slope, slope, self.node("movable", index))

    # --- where its values stand -----------------------------------------------------------------------------

    def variable(self, index: int) -> Slot:
        """What inference moves."""
        if self.incremental:
            return self.initial_activity(index)
        in_errors = self.inference.variables == "errors" and index in self.indices
        return self.node("error" if in_errors else "deviation", index)

    def boost(self, index: int) -> float:
        """The factor on the rate of node `index` in this step."""
        return self.inference.wave_boost if index not in self.visited else 1.0

    def gradient(self, key: str, index: int) -> tuple[Slot, Slot | None]:
        """Where the gradient of a weight goes, and what it is added to: itself, where layers share the weight
        and another one has written its term.
        """
        slot = self.layer(f"{key}_gradient", index)
        addend = slot if slot in self.written else None
        self.written.add(slot)
        return slot, addend

    @property
    def gradient_scalar(self) -> str:
        return PER_SAMPLE if self.nudge is None else PER_NUDGE

    def initial_activity(self, index: int) -> Slot:
        return self.node("initial", index) if index in self.given else self.anchor(index)

    def anchor(self, index: int) -> Slot:
        """The prediction from the initial activities; a node that nothing predicts is its own."""
        return self.node("anchor" if index in self.indices else "initial", index)

    def drift(self, index: int) -> Slot:
        """What carries the drive's change by weights that have moved."""
        activated = self.net.rule(index).output_function != "identity"
        return self.node("anchor_drive" if activated else "drift", index)

    def change(self, index: int) -> Slot:
        """x - x0 of node `index`: its deviation, unless it is free and started elsewhere than at p."""
        return self._shift("change", index)

    def shift(self, index: int) -> Slot:
        """The same beside the change of a function of x."""
        return self._shift("shift", index)

    def _shift(self, role: str, index: int) -> Slot:
        if index not in self.given or index not in self.indices:
            return self.node("deviation", index)
        activity = self.add(self.node("activity", index), self.anchor(index), self.node("deviation", index))
        return self.add(self.node(role, index), activity, self.initial_activity(index), scale=-1.0)

    def prediction(self, index: int) -> Slot:
        """f_out(z), in the place of z where nothing needs z any more."""
        function = activation(self.net.rule(index).output_function)
        needs_drive = function.needs_drive or isinstance(self.net.layer(index).energy, Categorical)
        return self.node("prediction" if needs_drive else "drive", index)

    def final_activity(self, index: int) -> Slot:
        """What the weight gradients see: for fixed predictions the activities these were computed from."""
        if index in self.clamped or self.inference.prediction == "fixed" or self.at_anchor:
            return self.initial_activity(index)
        return self.node("activity", index)

    def weighted_error(self, index: int) -> Slot:
        energy = self.net.layer(index).energy
        weighted = isinstance(energy, Gaussian) and not energy.is_unit
        return self.node("weighted_error" if weighted else "error", index)

    def drive_and_prediction(self, index: int) -> tuple[Slot, Slot]:
        """z and mu of layer `index`, wherever their current values stand."""
        if not self.recomputed(index):
            return self.node("anchor_drive", index), self.anchor(index)
        drive = self.node("drive" if self.has_moved(index - 1) else "anchor_drive", index)
        return drive, self.prediction(index)

    def activity_and_source(self, index: int) -> tuple[Slot, Slot]:
        """x and f_in(x) of node `index` as the source of the layer above, wherever their current values
        stand.
        """
        if self.recomputed(index + 1) and self.has_moved(index):
            return self.node("activity", index), self.node("source", index)
        return self.initial_activity_and_source(index)

    def initial_activity_and_source(self, index: int) -> tuple[Slot, Slot]:
        """x0 and f_in(x0) of node `index` as the source of the layer above."""
        activity = self.initial_activity(index)
        layer = self.net.rule(index + 1)
        assert isinstance(layer, Dense)
        activated = layer.input_function != "identity"
        return activity, self.node("anchor_source", index) if activated else activity

    def set_error(self, index: int, error: Slot) -> None:
        """Called wherever an error has been written: its weighted form follows it."""
        energy = self.net.layer(index).energy
        if not isinstance(energy, Gaussian) or energy.is_unit:
            return
        if energy.is_full:
            self.product(self.node("weighted_error", index), error, self.precision(index), None)
        else:
            self.emit("multiply", self.node("weighted_error", index), error, self.precision(index))
