"""How a node moves along the gradient of its energy, dF/dx_l = P_l e_l - feedback from its children.

A rule of dynamics is a function that writes the instructions moving one node; `own` tells whether its own
error can be other than zero by now, `children` are the layers whose errors have reached it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pctt.program import INFERENCE_RATE

if TYPE_CHECKING:
    from pctt.assemble import Assembler


def euler(at: Assembler, index: int, own: bool, children: list[int]) -> None:
    """x <- x - rate dF/dx"""
    deviation = at.node("deviation", index)
    if own:
        at.add(deviation, deviation, at.weighted_error(index), -1.0, INFERENCE_RATE)
    for child in children:
        at.net.layers[child - 1].feedback(at, child, deviation, 1.0, INFERENCE_RATE)


def momentum(at: Assembler, index: int, own: bool, children: list[int]) -> None:
    """u <- momentum u + dF/dx,  x <- x - rate u"""
    velocity, deviation = at.node("velocity", index), at.node("deviation", index)
    if own:
        at.add(velocity, at.weighted_error(index), velocity, at.inference.momentum)
    else:
        at.add(velocity, velocity, velocity, at.inference.momentum - 1.0)
    for child in children:
        at.net.layers[child - 1].feedback(at, child, velocity, -1.0, None)
    at.add(deviation, deviation, velocity, -1.0, INFERENCE_RATE)


@dataclass(frozen=True)
class Dynamics:
    """A rule of dynamics.

    move: writes the instructions that move one node.    state: roles of its tensors per node, zero at first.
    knobs: the fields of `Inference` that only some rules read, and this one does.
    """

    move: Callable[[Assembler, int, bool, list[int]], None]
    state: tuple[str, ...] = ()
    knobs: tuple[str, ...] = ()


DYNAMICS = {
    "euler": Dynamics(euler),
    "momentum": Dynamics(momentum, state=("velocity",), knobs=("momentum",)),
}
