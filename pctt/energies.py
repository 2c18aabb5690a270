"""Energies of a node: what a prediction error costs.

    Gaussian     F = 1/2 (e' P e - log|P|),  e = x - mu      (Whittington & Bogacz 2017, eq. 2.5)
    Categorical  F = KL(x || mu) = sum_k x_k log(x_k / mu_k),  mu = softmax(z),  so that dF/dz = -(x - mu)

Energies are per sample, summed over units. Which reduction follows (the batch sum for inference, the batch
mean for learning) is decided in `program.py`, in one place, and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pctt._checks import require_between, require_finite_positive, require_one_of
from pctt.describe import Concise

VARIANCE_FLOOR = 1e-6
"""Least learned variance: of an error that is 0 in every sample it would be 0."""


@dataclass(frozen=True)
class Gaussian(Concise):
    """Squared error, weighted by a precision P (inverse variance).

    precision: one number above 0, one per unit, or a symmetric positive definite matrix [units][units].
    learned: None keeps it; "diagonal" learns a variance per unit, "scalar" one for all units. A learned
        variance stands beside the weights, as `variance` [units], and moves with every learning step towards
        the mean square of the errors, where dF/dvariance = 0: v <- v + adaptation (mean_B e^2 - v). It begins
        at 1 / precision.
    adaptation: in (0, 1], of learned variances.
    """

    precision: float | tuple[float, ...] | tuple[tuple[float, ...], ...] = 1.0
    learned: str | None = None
    adaptation: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.precision, list):  # as it comes out of TOML or JSON
            object.__setattr__(self, "precision", tuple(self.precision))
        if isinstance(self.precision, tuple):
            rows = tuple(tuple(row) if isinstance(row, list) else row for row in self.precision)
            object.__setattr__(self, "precision", rows)
        values = self.precision if isinstance(self.precision, tuple) else (self.precision,)
        if not values:
            raise ValueError("precision must be a number or one number per unit, got an empty tuple.")
        if self.learned is not None:
            require_one_of("learned", self.learned, ("scalar", "diagonal"))
        require_between("adaptation", self.adaptation, 0.0, 1.0 + 1e-12)
        if self.adaptation == 0.0:
            raise ValueError("adaptation must be above 0; leave `learned` out to keep the precision.")
        if self.is_full:
            self._check_matrix()
            return
        for value in values:
            require_finite_positive("precision", value)  # pyright: ignore[reportArgumentType]
        if self.learned == "scalar" and isinstance(self.precision, tuple):
            raise ValueError("learned='scalar' starts from one precision, got one per unit; give one number.")

    def _check_matrix(self) -> None:
        assert isinstance(self.precision, tuple)
        if self.learned is not None:
            raise ValueError("a full precision is not learned; use learned='diagonal' with numbers.")
        lengths = {len(row) if isinstance(row, tuple) else 0 for row in self.precision}
        if lengths != {len(self.precision)}:
            raise ValueError(
                f"a full precision must be a square matrix, got {len(self.precision)} rows of lengths "
                f"{sorted(lengths)}."
            )
        matrix = torch.tensor(self.precision, dtype=torch.float64)
        if not torch.equal(matrix, matrix.T) or torch.linalg.cholesky_ex(matrix).info:
            raise ValueError("a full precision must be symmetric and positive definite.")

    @property
    def is_unit(self) -> bool:
        """Whether the precision is 1 for every unit, for good."""
        return self.precision == 1.0 and self.learned is None

    @property
    def is_full(self) -> bool:
        """Whether the precision is a matrix that couples units."""
        return isinstance(self.precision, tuple) and any(isinstance(row, tuple) for row in self.precision)

    def check(self, units: int) -> None:
        """Raises ValueError where the precision is not one of a node of `units` units."""
        if isinstance(self.precision, tuple) and len(self.precision) != units:
            raise ValueError(
                f"precision must be one number or {units} (one per unit), got {len(self.precision)}."
            )

    def matrix(self, units: int) -> Tensor:
        """P at the start, float64: [units] where it is diagonal, else [units, units]."""
        values = torch.tensor(self.precision, dtype=torch.float64)
        return values if self.is_full else values.expand(units).clone()

    def log_determinant(self, units: int) -> float:
        """log|P| of a node of `units` units, at the start."""
        if self.is_full:
            return float(torch.linalg.slogdet(self.matrix(units)).logabsdet)
        if isinstance(self.precision, tuple):
            return float(self.matrix(units).log().sum())
        return units * math.log(self.precision)


@dataclass(frozen=True)
class Categorical(Concise):
    """Cross-entropy of a softmax node; its activity is a distribution over classes, one-hot or soft."""


Energy = Gaussian | Categorical


def constant(energy: Energy, units: int) -> float:
    """What does not depend on errors: -1/2 log|P| at the start, 0 of a cross-entropy."""
    return -0.5 * energy.log_determinant(units) if isinstance(energy, Gaussian) else 0.0


def from_sums(energy: Energy, square: float, other: float, constant: float) -> float:
    """A layer's energy, batch mean: F = 1/2 mean e'Pe + constant, or the mean cross-entropy.

    square, other: batch means of e'e, and of e'Pe or the cross-entropy.
    """
    if isinstance(energy, Categorical):
        return other
    return 0.5 * (square if energy.is_unit else other) + constant
