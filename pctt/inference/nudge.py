"""Nudging: an output that is drawn towards its target, or pushed away from it, instead of held there."""

from __future__ import annotations

from dataclasses import dataclass

from pctt._checks import require_finite_positive, require_one_of
from pctt.describe import Concise


@dataclass(frozen=True)
class Nudge(Concise):
    """How the targets act on the output node; u is its prediction at the start, y the target, F the energy.

    style: "clamp" holds the output at u + b (y - u) (Pinchetti et al. 2025); "loss" leaves it free and adds
        b/2 |y - x_L|^2 to the energy that the activities descend (Scellier & Bengio 2017).
    sign: "positive" takes b = beta, "negative" b = -beta; the weight gradient is dF/dW / b. "centred" relaxes
        every batch twice, from the same start, and takes (dF/dW(beta) - dF/dW(-beta)) / (2 beta) (Laborieux
        et al. 2021).
    beta: strength, above 0; with the loss style and a negative b below 1, where the energy has its minimum.
    final_beta: strength at the end of training, reached linearly in learning steps; None keeps `beta`.
    """

    beta: float = 0.5
    sign: str = "positive"
    style: str = "clamp"
    final_beta: float | None = None

    def __post_init__(self) -> None:
        require_one_of("sign", self.sign, ("positive", "negative", "centred"))
        require_one_of("style", self.style, ("clamp", "loss"))
        for name, value in (("beta", self.beta), ("final_beta", self.final_beta)):
            if value is None:
                continue
            require_finite_positive(name, value)
            if self.style == "loss" and self.sign != "positive" and value >= 1.0:
                raise ValueError(
                    f"{name} must be below 1 where the loss pushes the output away, got {value}: the energy "
                    "has no minimum there; lower it, or use sign='positive'."
                )

    def at(self, fraction: float) -> float:
        """b after that fraction of all learning steps; of a centred pair the positive one."""
        final = self.beta if self.final_beta is None else self.final_beta
        strength = self.beta + fraction * (final - self.beta)
        return -strength if self.sign == "negative" else strength
