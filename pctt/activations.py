"""The non-linearities, as data: what a backend must know about each, and nothing about how it computes it.

A local rule needs f(z) and the product J_f(z)' v, never J_f itself. Where the derivative is a function of the
value y = f(z) (tanh' = 1 - y^2) the drive z need not be kept, so a backend may overwrite it; `needs_drive`
marks the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    """One non-linearity.

    needs_drive: the derivative is computed from z, not from y = f(z).
    keeps_zero: f(0) = 0, so a card's padding stays empty.
    elementwise: the Jacobian is diagonal; softmax is the exception, and may stand only at the last layer.
    gain: what kaiming initialisation multiplies 1/sqrt(fan_in) by (He et al. 2015, eq. 10); 1 where the paper
        gives none, and that of relu for its smooth relatives.
    """

    name: str
    needs_drive: bool = False
    keeps_zero: bool = True
    elementwise: bool = True
    gain: float = 1.0


LEAKY_SLOPE = 0.01

ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("identity"),
        Activation("tanh"),
        Activation("relu", gain=math.sqrt(2.0)),
        Activation("leaky_relu", gain=math.sqrt(2.0 / (1.0 + LEAKY_SLOPE**2))),
        Activation("sigmoid", keeps_zero=False),
        Activation("gelu", needs_drive=True, gain=math.sqrt(2.0)),
        Activation("silu", needs_drive=True, gain=math.sqrt(2.0)),
        Activation("hard_tanh"),
        Activation("softmax", keeps_zero=False, elementwise=False),
    )
}


def activation(name: str) -> Activation:
    """The activation called `name`. Raises ValueError that lists the names there are."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}.") from None
