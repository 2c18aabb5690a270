"""How activities move: the knobs of inference, as frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pctt._checks import (
    require_betas,
    require_between,
    require_count,
    require_finite_positive,
    require_one_of,
)
from pctt.describe import Concise
from pctt.inference.dynamics import DYNAMICS
from pctt.inference.nudge import Nudge


@dataclass(frozen=True)
class Inference(Concise):
    """Settings of the relaxation of the free activities. docs/variants.md says what each is for.

    num_steps: number of inference steps T, at least 0.
    rate: step size gamma, dimensionless; the same for every sample whatever the batch size.
    prediction: "live" recomputes predictions at every step (strict predictive coding), "fixed" keeps those of
        the initial activities (Millidge et al. 2022: converges to the gradients of backpropagation).
    dynamics: "euler", x <- x - rate dF/dx; "momentum" (Polyak 1964); "adam" (Kingma & Ba 2015); "heun",
        second order with a step size per sample, which begins at `rate` and adapts; "langevin", which adds
        noise and samples instead of minimising.
    momentum: of "momentum", in [0, 1).
    betas: of "adam", each in [0, 1).
    step_tolerance: of "heun", root mean square error of one step, in units of activity, above 0.
    temperature: of "langevin", above 0; 1 samples the posterior.
    burn_in: of "langevin", steps before the weight gradients are averaged over the steps; below num_steps.
    variables: "states" descends in the activities, "errors" in the prediction errors, from which the
        activities follow by one sweep (ePC): same energy, same equilibrium.
    sweep: "jacobi" moves all nodes from old values, "gauss_seidel" one after the other from the output down,
        each from the newest errors.
    weights_at: "end", one learning step after inference; "every_step", one with every inference step
        (incremental PC); "staircase", the gradient of layer l is taken after L - l steps (Z-IL: with rate 1
        that of backpropagation), and inference ends when all are.
    nudge: how the targets act on the output; None holds it at them.
    wave_boost: factor on a node's step when the errors first reach it; 1/rate balances the errors over depth
        (Qi et al. 2025).
    initial: free nodes start at their predictions ("feedforward"), at 0 ("zeros"), where the batch before
        left them ("carried"), or at the sweep of the backward layers from the output ("amortised": hybrid
        predictive coding, Tschantz et al. 2023), which then learn from what inference ends in and do not take
        part in it. The first batch of an engine is carried on from 0.
    tolerance: stop when the energy changed by less than this fraction of itself in one step; None runs all
        steps. The rule is not applied before the errors have had time to reach every node.

    Raises ValueError for values out of range, for a knob without effect, and for two that contradict.
    """

    num_steps: int = 20
    rate: float = 0.1
    prediction: str = "live"
    dynamics: str = "euler"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    step_tolerance: float = 1e-2
    temperature: float = 1.0
    burn_in: int = 0
    variables: str = "states"
    sweep: str = "jacobi"
    weights_at: str = "end"
    nudge: Nudge | None = None
    wave_boost: float = 1.0
    initial: str = "feedforward"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps)
        require_finite_positive("rate", self.rate)
        for name, choices in {**CHOICES, "dynamics": tuple(DYNAMICS)}.items():
            require_one_of(name, getattr(self, name), choices)
        require_between("momentum", self.momentum, 0.0, 1.0)
        require_betas(self)
        require_finite_positive("step_tolerance", self.step_tolerance)
        require_finite_positive("temperature", self.temperature)
        require_finite_positive("wave_boost", self.wave_boost)
        require_count("burn_in", self.burn_in)
        if self.nudge is not None and not isinstance(self.nudge, Nudge):
            raise ValueError(f"nudge must be Nudge(...) or None, got {self.nudge!r}.")
        if self.tolerance is not None:
            require_finite_positive("tolerance", self.tolerance)
        self._refuse_knobs_without_effect()
        for one, other, why in CONTRADICTIONS:
            if _holds(self, one) and _holds(self, other):
                raise ValueError(f"{_said(self, one)} and {_said(self, other)} contradict each other: {why}.")
        if self.weights_at == "every_step" and self.num_steps == 0:
            raise ValueError(
                "weights_at='every_step' moves weights with each inference step, and num_steps=0 has none; "
                "take at least one, or weights_at='end'."
            )
        if self.burn_in and self.burn_in >= self.num_steps:
            raise ValueError(
                f"burn_in={self.burn_in} leaves no sample of num_steps={self.num_steps}; lower one or raise "
                "the other."
            )

    def _refuse_knobs_without_effect(self) -> None:
        used = DYNAMICS[self.dynamics].knobs
        for name in (name for entry in DYNAMICS.values() for name in entry.knobs if name not in used):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                (rule, *_) = (rule for rule, entry in DYNAMICS.items() if name in entry.knobs)
                raise ValueError(
                    f"{name}={value} has no effect with dynamics={self.dynamics!r}; use dynamics={rule!r} or "
                    f"leave {name} out."
                )

    def refuse_unless_it_fits(self, num_layers: int) -> None:
        """Raises ValueError where a network of `num_layers` layers asks for other settings."""
        if self.weights_at == "staircase" and self.num_steps < num_layers - 1:
            raise ValueError(
                f"weights_at='staircase' takes {num_layers - 1} inference steps or more with {num_layers} "
                f"layers, got num_steps={self.num_steps}: the first layer's turn would not come."
            )

    @property
    def is_random(self) -> bool:
        """Whether inference draws noise, so that its end depends on a seed."""
        return self.dynamics == "langevin"

    @property
    def descends(self) -> bool:
        """Whether the energy that is reported can only fall at small rates."""
        pulled = self.nudge is not None and self.nudge.style == "loss"
        waves = self.weights_at == "staircase"  # of any rate, and over before the energy tells
        return self.prediction == "live" and not self.is_random and not pulled and not waves

    @property
    def gradient_is_of_the_end(self) -> bool:
        """Whether the weight gradients belong to the state that inference ends in."""
        return self.weights_at == "end" and self.nudge is None and not self.is_random


CHOICES = {
    "prediction": ("live", "fixed"),
    "variables": ("states", "errors"),
    "sweep": ("jacobi", "gauss_seidel"),
    "weights_at": ("end", "every_step", "staircase"),
    "initial": ("feedforward", "zeros", "carried", "amortised"),
}

Condition = tuple[str, object]
"""A knob and a value of it, or ... for any value but the default. A knob may be one of the nudge's."""

_WAVE = "it counts on errors that travel one layer per step"
CONTRADICTIONS: tuple[tuple[Condition, Condition, str], ...] = (
    (
        ("variables", "errors"),
        ("prediction", "fixed"),
        "an activity is its prediction plus its error, anew each step",
    ),
    (
        ("variables", "errors"),
        ("sweep", "gauss_seidel"),
        "a step in the errors goes through all layers already",
    ),
    (("variables", "errors"), ("weights_at", ...), "weights move at the end of a relaxation in the errors"),
    (("variables", "errors"), ("wave_boost", ...), _WAVE + ", and in the errors all come at once"),
    (("weights_at", "every_step"), ("prediction", "fixed"), "predictions change with the weights"),
    (("weights_at", "every_step"), ("dynamics", "heun"), "its step is tried before it is taken"),
    (
        ("weights_at", "every_step"),
        ("dynamics", "langevin"),
        "gradients are averaged over the samples at the end",
    ),
    (
        ("weights_at", "every_step"),
        ("sweep", "gauss_seidel"),
        "activities and weights move from the same errors",
    ),
    (("weights_at", "every_step"), ("wave_boost", ...), _WAVE + ", and changed weights charge all layers"),
    (("weights_at", "staircase"), ("prediction", "fixed"), _WAVE),
    (("weights_at", "staircase"), ("dynamics", ...), _WAVE + " of dynamics='euler'"),
    (("weights_at", "staircase"), ("sweep", "gauss_seidel"), _WAVE),
    (("weights_at", "staircase"), ("initial", ...), _WAVE + " from a feedforward start"),
    (("weights_at", "staircase"), ("tolerance", ...), "the turn of the first layers might not come"),
    (("wave_boost", ...), ("sweep", "gauss_seidel"), _WAVE),
    (("wave_boost", ...), ("dynamics", "heun"), "it sets the size of a step itself"),
    (("wave_boost", ...), ("initial", ...), _WAVE + " from a feedforward start"),
    (("dynamics", "heun"), ("tolerance", ...), "a step that is not taken would count as settled"),
    (("dynamics", "heun"), ("sweep", "gauss_seidel"), "it needs the slopes of all nodes at one time"),
    (("dynamics", "langevin"), ("sweep", "gauss_seidel"), "one sweep would draw from another distribution"),
    (("dynamics", "langevin"), ("prediction", "fixed"), "there is no energy to sample from"),
    (("dynamics", "langevin"), ("tolerance", ...), "its energy never settles"),
    (
        ("nudge.style", "loss"),
        ("weights_at", "staircase"),
        "the output would have no error yet when its turn comes",
    ),
    (
        ("nudge.sign", "centred"),
        ("weights_at", "every_step"),
        "the second relaxation would begin with other weights",
    ),
    (
        ("nudge.sign", "centred"),
        ("initial", "carried"),
        "the second relaxation would begin where the first ended",
    ),
)


def _holds(knobs: Inference, condition: Condition) -> bool:
    name, value = condition
    if value is not ...:
        return _value(knobs, name) == value
    return _value(knobs, name) != Inference.__dataclass_fields__[name].default


def _said(knobs: Inference, condition: Condition) -> str:
    return f"{condition[0]}={_value(knobs, condition[0])!r}"


def _value(knobs: Inference, name: str) -> object:
    owner, _, attribute = name.rpartition(".")
    return getattr(getattr(knobs, owner) if owner else knobs, attribute, None)


def noise_scale(knobs: Inference) -> float:
    """Standard deviation of the noise of one step of Langevin dynamics, sqrt(2 rate temperature)."""
    return math.sqrt(2.0 * knobs.rate * knobs.temperature)
