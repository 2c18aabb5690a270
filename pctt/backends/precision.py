"""Which tensor a card keeps in which format, per role."""

from __future__ import annotations

from dataclasses import dataclass

from pctt._checks import require_one_of
from pctt.describe import Concise
from pctt.learning.rules import STATE

FORMATS = ("float32", "bfloat16")
FIDELITIES = ("LoFi", "HiFi2", "HiFi3", "HiFi4")

BYTES = {"float32": 4, "bfloat16": 2}

_ROLES = {
    "states": ("deviation", "velocity", "prior", "step", "held_slope"),
    "anchors": (
        *("initial", "anchor", "anchor_drive", "anchor_source", "activity", "source", "drive", "prediction"),
        *("transposed_activity", "product", "square", "mask", "scratch", "drift", "shifted"),
        *("base", "value", "movable"),
    ),
    "operands": (
        *("error", "weighted_error", "gated", "feedback", "adjoint", "change", "sent", "ones"),
        *("pulled", "slope", "spread", "attended"),
    ),
    "weights": ("operand", "transposed", "changed"),
    "masters": (
        *("weight", "bias", "precision"),
        *(f"{key}_{name}" for key in ("weight", "bias") for name in ("gradient", *STATE)),
    ),
}
_FIELD = {role: field for field, roles in _ROLES.items() for role in roles}


@dataclass(frozen=True)
class PrecisionPolicy(Concise):
    """float32 or bfloat16 for each kind of tensor; docs/numerics.md has the measurements behind the defaults.

    states: deviations and what is added to them. They sum many small steps, which bfloat16 would round away.
    anchors: initial predictions, drives, sources, activities, values within a block. A deviation is the
        difference of two of them.
    operands: what matrix products read and write: errors, gated errors, feedback, changes, what is pulled
        down within a block. They are small and need relative precision only, so bfloat16 costs 2^-9 of each.
    weights: the copies of the weights that products read.
    masters: the weights that learning changes, their gradients and the state of the learning rule.
    fidelity: of the matrix unit: LoFi, HiFi2, HiFi3 or HiFi4; None takes the chip's default.
    """

    states: str = "float32"
    anchors: str = "float32"
    operands: str = "bfloat16"
    weights: str = "bfloat16"
    masters: str = "float32"
    fidelity: str | None = None

    def __post_init__(self) -> None:
        for field in _ROLES:
            require_one_of(field, getattr(self, field), FORMATS)
        if self.fidelity is not None:
            require_one_of("fidelity", self.fidelity, FIDELITIES)

    def format(self, role: str) -> str:
        """The format of the tensors of `role`."""
        return getattr(self, _FIELD[role.removesuffix("^")])


POLICIES = {
    "mixed": PrecisionPolicy(),
    "float32": PrecisionPolicy(operands="float32", weights="float32"),
    "bfloat16": PrecisionPolicy(*["bfloat16"] * 5),
    "bfloat16 states": PrecisionPolicy(states="bfloat16"),
    "bfloat16 anchors": PrecisionPolicy(anchors="bfloat16"),
}
"""Policies that docs/numerics.md compares; "mixed" is the default."""
