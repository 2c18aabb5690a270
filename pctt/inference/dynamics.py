"""How a node moves along the gradient of its energy, dF/dv = own - pulls.

v is the node's variable: its activity (as deviation) or, in error space, its error. `own` is P e, or None
where that cannot be other than zero yet; the pulls are what its children and a nudge draw it with. A rule of
dynamics is a sequence of stages; a stage is a function that writes the instructions moving one node, after
which all errors are computed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pctt.program import INFERENCE_RATE, INFERENCE_STEP, NOISE, Instruction, Slot

if TYPE_CHECKING:
    from pctt.state import AbstractState

Pull = Callable[[Slot, "Slot | None", float, "str | None"], object]
"""pull(into, addend, scale, scalar) writes into = addend + scale scalars[scalar] pull; no addend is 0."""

Stage = Callable[["AbstractState", int, "Slot | None", list[Pull]], None]


def euler(at: AbstractState, index: int, own: Slot | None, pulls: list[Pull]) -> None:
    """v <- v - rate dF/dv"""
    variable, boost = at.variable(index), at.boost(index)
    # They read the activity itself, that of the output through the nudge. In error space `own` is the
    # variable.
    pulls_first = own != variable and (at.incremental or index == at.last)
    if own is not None and not pulls_first:
        at.add(variable, variable, own, -boost, INFERENCE_RATE)
    for pull in pulls:
        pull(variable, variable, boost, INFERENCE_RATE)
    if own is not None and pulls_first:
        at.add(variable, variable, own, -boost, INFERENCE_RATE)


def momentum(at: AbstractState, index: int, own: Slot | None, pulls: list[Pull]) -> None:
    """u <- momentum u + dF/dv,  v <- v - rate u"""
    velocity, variable = at.node("velocity", index), at.variable(index)
    if own is not None:
        at.add(velocity, own, velocity, at.inference.momentum)
    else:
        at.add(velocity, velocity, velocity, at.inference.momentum - 1.0)
    for pull in pulls:
        pull(velocity, velocity, -1.0, None)
    at.add(variable, variable, velocity, -at.boost(index), INFERENCE_RATE)


def adam(at: AbstractState, index: int, own: Slot | None, pulls: list[Pull]) -> None:
    """v <- v - rate m^ / (sqrt(s^) + 1e-8), m and s moments of dF/dv over the steps (Kingma & Ba 2015)"""
    slope = slope_of(at, "slope", index, own, pulls)
    state = (at.node("first_moment", index), at.node("second_moment", index))
    beta1, beta2 = at.inference.betas
    options = {"beta1": beta1, "beta2": beta2, "epsilon": 1e-8, "weight_decay": 0.0, "step": INFERENCE_STEP}
    at.code.append(
        Instruction(
            "adam",
            (at.variable(index), *state),
            (slope,),
            at.boost(index),
            INFERENCE_RATE,
            None,
            tuple(options.items()),
        )
    )


def langevin(at: AbstractState, index: int, own: Slot | None, pulls: list[Pull]) -> None:
    """v <- v - rate dF/dv + sqrt(2 rate temperature) noise (Oliviers, Bogacz & Meulemans 2024)"""
    euler(at, index, own, pulls)
    # The node keeps its draws apart from the others', so that they do not depend on how layers are grouped.
    variable, held = at.variable(index), index in at.held
    onto = at.emit("fill", at.node("draws", index), scale=0.0) if held else variable
    at.code.append(Instruction("noise", (onto,), (onto,), 1.0, NOISE, None, (("node", index),)))
    if held:
        at.add(variable, variable, at.released(index, onto))


def heun_trial(at: AbstractState, index: int, own: Slot | None, pulls: list[Pull]) -> None:
    """v' = v - h g(v), h = rate times the sample's own factor"""
    variable = at.variable(index)
    slope = slope_of(at, "slope", index, own, pulls)
    at.copy(at.node("start", index), variable)
    at.emit("multiply", at.node("trial", index), slope, at.sample("step_factor"))
    at.add(variable, variable, at.node("trial", index), -1.0, INFERENCE_RATE)


def heun_correction(at: AbstractState, index: int, own: Slot | None, pulls: list[Pull]) -> None:
    """v'' = v - h/2 (g(v) + g(v')), and the error of the step, h/2 (g(v') - g(v))"""
    variable, slope, start = at.variable(index), at.node("slope", index), at.node("start", index)
    second = slope_of(at, "second_slope", index, own, pulls)
    estimate = at.add(at.node("estimate", index), second, slope, -1.0)
    at.emit("multiply", estimate, estimate, at.sample("step_factor"))
    at.add(slope, slope, second)
    at.emit("multiply", slope, slope, at.sample("step_factor"))
    at.add(variable, start, slope, -0.5, INFERENCE_RATE)


def heun_acceptance(at: AbstractState, indices: list[int]) -> None:
    """Takes the step in the samples whose error is within the tolerance, and adapts every sample's factor:
    factor <- factor min(5, max(1/5, 0.9 (tolerance / error)^(1/2))) (Hairer, Norsett & Wanner 1993, II.4).
    """
    if not indices:
        return
    factor, accepted = at.sample("step_factor"), at.sample("accepted")
    estimates = tuple(at.node("estimate", index) for index in indices)
    options = (("tolerance", at.inference.step_tolerance),)
    at.code.append(
        Instruction("step_control", (factor, accepted), estimates, 0.5, INFERENCE_RATE, None, options)
    )
    for index in indices:
        variable, start = at.variable(index), at.node("start", index)
        taken = at.add(at.node("trial", index), variable, start, -1.0)
        at.emit("multiply", taken, taken, accepted)
        at.add(variable, start, taken)


def slope_of(at: AbstractState, role: str, index: int, own: Slot | None, pulls: list[Pull]) -> Slot:
    """dF/dv of one node."""
    slope = at.node(role, index)
    if own is not None:
        at.copy(slope, own)
    elif not pulls:
        at.emit("fill", slope, scale=0.0)
    addend = None if own is None else slope
    for pull in pulls:
        pull(slope, addend, -1.0, None)
        addend = slope
    return slope


@dataclass(frozen=True)
class Dynamics:
    """A rule of dynamics.

    stages: what moves one node, in order.    accept: what follows the last stage, over all nodes.
    state: roles of its tensors per node, zero at first.    samples: of its numbers per sample, one at first.
    knobs: the fields of `Inference` that only some rules read, and this one does.
    everywhere: every step serves every node, also those no error has reached.
    """

    stages: tuple[Stage, ...]
    accept: Callable[[AbstractState, list[int]], None] | None = None
    state: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()
    knobs: tuple[str, ...] = ()
    everywhere: bool = False


DYNAMICS = {
    "euler": Dynamics((euler,)),
    "momentum": Dynamics((momentum,), state=("velocity",), knobs=("momentum",)),
    "adam": Dynamics((adam,), state=("first_moment", "second_moment"), knobs=("betas",)),
    "heun": Dynamics(
        (heun_trial, heun_correction),
        heun_acceptance,
        samples=("step_factor", "accepted"),
        knobs=("step_tolerance",),
        everywhere=True,
    ),
    "langevin": Dynamics((langevin,), knobs=("temperature", "burn_in"), everywhere=True),
}
