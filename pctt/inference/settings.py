"""How activities move: the knobs of inference, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from pctt._checks import require_between, require_count, require_finite_positive, require_one_of
from pctt.inference.dynamics import DYNAMICS


@dataclass(frozen=True)
class Inference:
    """Settings of the relaxation of the free activities.

    num_steps: number of inference steps T, at least 0.
    rate: step size gamma, dimensionless; the same for every sample whatever the batch size.
    prediction: "live" recomputes predictions at every step (strict predictive coding), "fixed" keeps those of
    the initial activities (Millidge et al. 2022: converges to the gradients of backpropagation).
    dynamics: "euler", x <- x - rate dF/dx, or "momentum", u <- momentum u + dF/dx, x <- x - rate u (heavy
    ball, Polyak 1964).
    momentum: in [0, 1), 0 unless dynamics="momentum".
    initial: "feedforward", each free node starts at its prediction.
    tolerance: stop when the energy changed by less than this fraction of itself in one step; None runs all
    steps. The rule is not applied before the errors have had time to reach every node.
    """

    num_steps: int = 20
    rate: float = 0.1
    prediction: str = "live"
    dynamics: str = "euler"
    momentum: float = 0.0
    initial: str = "feedforward"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps)
        require_finite_positive("rate", self.rate)
        require_one_of("prediction", self.prediction, ("live", "fixed"))
        require_one_of("dynamics", self.dynamics, tuple(DYNAMICS))
        require_between("momentum", self.momentum, 0.0, 1.0)
        require_one_of("initial", self.initial, ("feedforward",))
        if self.momentum and "momentum" not in DYNAMICS[self.dynamics].knobs:
            raise ValueError(
                f"momentum={self.momentum} has no effect with dynamics={self.dynamics!r}; "
                "use dynamics='momentum' or momentum=0."
            )
        if self.tolerance is not None:
            require_finite_positive("tolerance", self.tolerance)
