"""What an inference step writes: who moves, in which order, and what follows from it."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from pctt.inference.dynamics import Pull, Stage
from pctt.layers.dense import Dense
from pctt.learning.rules import SGD
from pctt.program import LEARNING_RATE, NUDGE, Slot
from pctt.state import AbstractState, Reach

# --- stages: all nodes move once ----------------------------------------------------------------------------


def jacobi(at: AbstractState, stage: Stage, moving: list[int]) -> None:
    charged = at.reach.charged
    reached = [index for index in moving if _move(at, stage, index, charged)]
    if not at.incremental:
        at.reach_out(reached)


def gauss_seidel(at: AbstractState, stage: Stage, moving: list[int]) -> None:
    charged, reached = set(at.reach.charged), set[int]()
    waiting = set(moving)
    for index in reversed(moving):
        waiting.discard(index)
        deviation = at.node("deviation", index)
        if index in charged or pulls_on(at, index, charged):
            prior = at.copy(at.node("prior", index), deviation)
            _move(at, stage, index, charged)
            reached.add(index)
            if index in at.indices:  # its prediction stands still, so its error changes by as much
                at.add(prior, deviation, prior, -1.0)
                error = at.node("error", index)
                at.set_error(index, at.add(error, error, prior))
                charged.add(index)
            if at.inference.prediction == "live":
                charged |= _predict_again(at, index, waiting)
    moved = at.reach.moved | reached
    if at.inference.prediction == "live":
        charged |= _children_of(at, moved)
    at.reach = Reach(moved, frozenset(charged))


def _predict_again(at: AbstractState, index: int, waiting: Collection[int]) -> set[int]:
    """After node `index` has moved: those of its children whose errors a waiting node moves by, predicted
    anew. In a chain there is none.
    """
    read = [
        child
        for child in at.net.children(index)
        if not at.floats(child) and not {child, *at.net.sources(child)}.isdisjoint(waiting)
    ]
    for child in read:
        at.reach = Reach(at.reach.moved | {index}, at.reach.charged)
        error = at.node("error", child)
        at.net.rule(child).predict(at, child, error, at.node("deviation", child), -1.0)
        at.set_error(child, error)
    return set(read)


def in_errors(at: AbstractState, stage: Stage, moving: list[int]) -> None:
    """dE/dx_l of a free node, negative, goes into `adjoint`: what it is pulled by, and what its own layer
    sends down.
    """
    charged = at.reach.charged
    senders = {index for index in charged if index in at.clamped}
    drawn: dict[int, list[Pull]] = {}
    for index in reversed(moving):
        drawn[index], adjoint = [], at.node("adjoint", index)
        for number, pull in enumerate(pulls_on(at, index, senders)):
            pull(adjoint, adjoint if number else None, 1.0, None)
            drawn[index] = [partial(at.add_scaled, adjoint)]
            senders.add(index)
    reached = {index for index in moving if drawn[index] or index in charged}
    for index in sorted(reached):
        stage(at, index, at.weighted_error(index) if index in charged else None, drawn[index])
    moved = at.reach.moved | {index for index in moving if reached and index >= min(reached)}
    charged = charged | (reached - at.roots) | _children_of(at, moved)
    at.visited |= reached
    at.reach = Reach(moved, charged)


def _children_of(at: AbstractState, moved: Collection[int]) -> set[int]:
    """Nodes whose errors those have changed by moving."""
    return {child for index in moved for child in at.net.children(index) if not at.floats(child)}


def _move(at: AbstractState, stage: Stage, index: int, charged: Collection[int]) -> bool:
    """Moves one node; whether anything can have moved it."""
    pulls = pulls_on(at, index, charged)
    own = at.weighted_error(index) if index in charged else None
    if own is None and not pulls:
        return False
    if index in at.held:
        slope = at.node("held_slope", index)
        start = at.copy(slope, own) if own is not None else at.emit("fill", slope, scale=0.0)
        for pull in pulls:
            pull(slope, start, -1.0, None)
        own, pulls = at.released(index, slope), []
    stage(at, index, own, pulls)
    at.visited.add(index)
    return True


SWEEPS = {"jacobi": jacobi, "gauss_seidel": gauss_seidel}

# --- what draws a node --------------------------------------------------------------------------------------


def pulls_on(at: AbstractState, index: int, charged: Collection[int] | None = None) -> list[Pull]:
    """What the layer above draws a node with, and the nudge.

    charged: nodes whose errors count, else all that errors have reached.
    """
    charged = at.reach.charged if charged is None else charged
    pulls: list[Pull] = []
    if index == at.last and index in at.free and at.nudge is not None:
        # First, since it reads the activity, which pulls may move at once.
        pulls.append(partial(_nudge_pull, at))
    for child in at.net.children(index):
        if child in charged:
            signal = None
            if at.inference.variables == "errors" and child in at.free:
                signal = at.node("adjoint", child)
            pulls.append(partial(_child_pull, at, child, index, signal))
    return pulls


def _child_pull(
    at: AbstractState,
    child: int,
    index: int,
    signal: Slot | None,
    into: Slot,
    addend: Slot | None,
    scale: float,
    scalar: str | None,
) -> None:
    at.net.rule(child).feedback(at, child, index, into, addend, scale, scalar, signal)


def _nudge_pull(at: AbstractState, into: Slot, addend: Slot | None, scale: float, scalar: str | None) -> None:
    """b (y - x_L)"""
    pull = at.node("pull_now", at.last)
    if at.incremental:
        at.add(pull, at.node("target", at.last), at.node("initial", at.last), -1.0)
    else:
        at.add(pull, at.node("pull", at.last), at.node("deviation", at.last), -1.0)
    at.add_scaled(at.copy(pull, pull, 1.0, NUDGE), into, addend, scale, scalar)


# --- what follows -------------------------------------------------------------------------------------------


def follow(at: AbstractState, moving: Collection[int]) -> None:
    """After the variables have moved: whatever follows from them."""
    if at.inference.variables == "states":
        predict(at)
        return
    for index in at.indices:
        deviation, error, layer = at.node("deviation", index), at.node("error", index), at.net.rule(index)
        if at.floats(index):
            continue
        if index in moving and index in at.reach.moved:
            if at.recomputed(index):
                layer.predict(at, index, deviation, error, 1.0)
            else:
                at.copy(deviation, error)
        elif at.recomputed(index):
            layer.predict(at, index, error, deviation, -1.0)
        if index in at.reach.charged:
            at.set_error(index, error)


def predict(at: AbstractState) -> None:
    """The errors that belong to the deviations as they are now."""
    for index in at.indices:
        error, deviation = at.node("error", index), at.node("deviation", index)
        if at.recomputed(index) and not at.floats(index):
            at.net.rule(index).predict(at, index, error, deviation, -1.0)
            at.set_error(index, error)
        elif index in at.reach.moved:
            at.set_error(index, at.copy(error, deviation))


def take_up_drift(at: AbstractState) -> None:
    """q_l += s x0_{l-1} dW + db"""
    assert isinstance(at.learning, SGD)
    for index in at.indices:
        drift, layer = at.drift(index), at.net.rule(index)
        assert isinstance(layer, Dense)
        _, source = at.initial_activity_and_source(index - 1)
        weight, *bias = (at.layer(at.learning.change(name), index) for name in layer.trained)
        at.product(drift, source, weight, drift, -layer.scale, LEARNING_RATE)
        for change in bias:
            at.add(drift, drift, change, -1.0, LEARNING_RATE)


def anchor_anew(at: AbstractState) -> None:
    """Anchors and errors of the weights and activities as they are now."""
    for index in at.indices:
        at.net.rule(index).anchor(at, index)
    anchor_errors(at)


def anchor_errors(at: AbstractState) -> None:
    """e = x0 - p"""
    for index in at.indices:
        error = at.node("error", index)
        if at.floats(index):
            at.set_error(index, at.emit("fill", error, scale=0.0))
        else:
            at.set_error(index, at.add(error, at.node("initial", index), at.anchor(index), -1.0))


def finish(at: AbstractState) -> None:
    """The activities of the free nodes, for whoever reads the state and for the gradients."""
    for index in sorted(at.free):
        if not at.floats(index):
            activity = at.node("activity", index)
            if at.incremental:
                at.copy(activity, at.initial_activity(index))
            else:
                at.add(activity, at.anchor(index), at.node("deviation", index))
    for index in (index for index in at.indices if at.floats(index)):
        error, deviation = at.node("error", index), at.node("deviation", index)
        recomputed, layer = at.recomputed(index), at.net.rule(index)
        prediction = layer.predict(at, index, error, deviation, -1.0) if recomputed else at.anchor(index)
        at.copy(at.node("activity", index), prediction)
