"""Energies of a node: what a prediction error costs.

    Gaussian     F = 1/2 (e' P e - log|P|),  e = x - mu      (Whittington & Bogacz 2017, eq. 2.5)
    Categorical  F = KL(x || mu) = sum_k x_k log(x_k / mu_k),  mu = softmax(z),  so that dF/dz = -(x - mu)

Energies are per sample, summed over units. Which reduction follows (the batch sum for inference, the batch
mean for learning) is decided in `program.py`, in one place, and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pctt._checks import require_finite_positive


@dataclass(frozen=True)
class Gaussian:
    """Squared error with a fixed precision (inverse variance, above 0): one number, or one per unit."""

    precision: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.precision, list):  # as it comes out of TOML or JSON
            object.__setattr__(self, "precision", tuple(self.precision))
        values = self.precision if isinstance(self.precision, tuple) else (self.precision,)
        if not values:
            raise ValueError("precision must be a number or one number per unit, got an empty tuple.")
        for value in values:
            require_finite_positive("precision", value)

    @property
    def is_unit(self) -> bool:
        return self.precision == 1.0

    def log_determinant(self, units: int) -> float:
        """log|P| of a node of `units` units."""
        if isinstance(self.precision, tuple):
            return sum(math.log(value) for value in self.precision)
        return units * math.log(self.precision)


@dataclass(frozen=True)
class Categorical:
    """Cross-entropy of a softmax node; its activity is a distribution over classes, one-hot or soft."""


Energy = Gaussian | Categorical
