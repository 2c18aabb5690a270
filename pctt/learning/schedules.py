"""How the learning rate goes with the number of learning steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pctt._checks import require_between
from pctt.describe import Concise


@dataclass(frozen=True)
class Constant(Concise):
    """The rate as given."""

    def factor(self, step: int, total_steps: int) -> float:
        """1, at every step."""
        del step, total_steps
        return 1.0


@dataclass(frozen=True)
class WarmupCosine(Concise):
    """Linear from 0 to the rate over `warmup` of all steps, then half a cosine down to `final` of it
    (Loshchilov & Hutter 2017).

    warmup, final: fractions in [0, 1).
    """

    warmup: float = 0.1
    final: float = 0.1

    def __post_init__(self) -> None:
        require_between("warmup", self.warmup, 0.0, 1.0)
        require_between("final", self.final, 0.0, 1.0)

    def factor(self, step: int, total_steps: int) -> float:
        """The factor of learning step `step`, counted from 0, of `total_steps`; past the end it stays at
        `final`.
        """
        warmup_steps = self.warmup * total_steps
        if step < warmup_steps:
            return (step + 1) / (math.floor(warmup_steps) + 1)
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps)) if total_steps else 1.0
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


Schedule = Constant | WarmupCosine
