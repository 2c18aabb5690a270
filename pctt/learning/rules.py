"""How weights move: local learning rules whose state stands beside the weights of its own layer.

Each rule writes the `update` instructions of a program; the arithmetic is the backend's. `rate` is the
learning rate eta, `clip_norm` bounds the norm of each layer's own gradient (weight and bias together): a
bound on the whole network's would not be local.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pctt._checks import require_betas, require_between, require_finite_positive
from pctt.describe import Concise
from pctt.learning.schedules import Constant, Schedule, WarmupCosine
from pctt.program import LEARNING_RATE, Instruction, Slot

if TYPE_CHECKING:
    from pctt.state import AbstractState

STATE = ("momentum", "first_moment", "second_moment")
"""What rules keep beside each weight, by the names that their tensors' roles end in."""


def _check(rule: Learning) -> None:
    require_finite_positive("rate", rule.rate)
    require_between("weight_decay", rule.weight_decay, 0.0, math.inf)
    if not isinstance(rule.schedule, (Constant, WarmupCosine)):
        raise ValueError(f"schedule must be Constant() or WarmupCosine(...), got {rule.schedule!r}.")
    if rule.clip_norm is not None:
        require_finite_positive("clip_norm", rule.clip_norm)


def _write(at: AbstractState, op: str, state: tuple[str, ...], rule: Learning, **options: float) -> None:
    """For each layer: clip its gradient, then `op` on its weight and on its bias, each with tensors of its
    own for `state`.
    """
    assert set(state) <= set(STATE), state
    parameters = [(index, at.net.rule(index).trained) for index in at.net.owners]
    parameters = [(index, names) for index, names in parameters if names]
    if rule.clip_norm is not None:
        for index, names in parameters:
            gradients = tuple(at.layer(f"{name}_gradient", index) for name in names)
            at.code.append(Instruction("clip", gradients, scale=rule.clip_norm))
    for index, names in parameters:
        for name in names:
            out: tuple[Slot, ...] = (
                at.layer(name, index),
                *(at.layer(f"{name}_{kind}", index) for kind in state),
            )
            gradient = at.layer(f"{name}_gradient", index)
            at.code.append(
                Instruction(op, out, (gradient,), scalar=LEARNING_RATE, options=tuple(options.items()))
            )


@dataclass(frozen=True)
class SGD(Concise):
    """u <- momentum u + (g + weight_decay w),  w <- w - rate u   (as torch.optim.SGD, dampening 0).

    rate: the learning rate eta, above 0.    momentum: in [0, 1).    weight_decay: at least 0.
    clip_norm: the most that the norm of a layer's own gradient may be, weight and bias together; None: any.
    schedule: how the rate goes with the learning steps.

    Raises ValueError for values out of range.
    """

    rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        _check(self)
        require_between("momentum", self.momentum, 0.0, 1.0)

    def write(self, at: AbstractState) -> None:
        """Appends the rule's instructions to the program."""
        state = ("momentum",) if self.momentum else ()
        _write(at, "sgd", state, self, momentum=self.momentum, weight_decay=self.weight_decay)

    def change(self, name: str) -> str:
        """The role whose tensor times -rate a learning step has just added to `name`."""
        return f"{name}_momentum" if self.momentum else f"{name}_gradient"


@dataclass(frozen=True)
class Adam(Concise):
    """Kingma & Ba 2015, algorithm 1, weight decay added to the gradient (as torch.optim.Adam).

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  w <- w - rate m^ / (sqrt(v^) + epsilon),
    where ^ divides by 1 - beta^t.

    rate: above 0.    betas: in [0, 1).    epsilon: above 0, outside the root.
    weight_decay, clip_norm, schedule: as of `SGD`.

    Raises ValueError for values out of range.
    """

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        _check_adam(self)

    def write(self, at: AbstractState) -> None:
        """Appends the rule's instructions to the program."""
        _write_adam(at, "adam", self)


@dataclass(frozen=True)
class AdamW(Concise):
    """Adam with decoupled weight decay, w <- w - rate weight_decay w first (Loshchilov & Hutter 2019;
    torch.optim.AdamW).

    rate, betas, epsilon: as of `Adam`.    weight_decay, clip_norm, schedule: as of `SGD`.

    Raises ValueError for values out of range.
    """

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-2
    clip_norm: float | None = None
    schedule: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        _check_adam(self)

    def write(self, at: AbstractState) -> None:
        """Appends the rule's instructions to the program."""
        _write_adam(at, "adamw", self)


def _check_adam(rule: Adam | AdamW) -> None:
    _check(rule)
    require_betas(rule)
    require_finite_positive("epsilon", rule.epsilon)


def _write_adam(at: AbstractState, op: str, rule: Adam | AdamW) -> None:
    beta1, beta2 = rule.betas
    _write(
        at,
        op,
        ("first_moment", "second_moment"),
        rule,
        beta1=beta1,
        beta2=beta2,
        epsilon=rule.epsilon,
        weight_decay=rule.weight_decay,
    )


Learning = SGD | Adam | AdamW
