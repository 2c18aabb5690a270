"""Whether a contender has done the same work: its numbers after one training batch, beside float64.

pctt in float64 is the measure, and pctt in float32 says how far a right program of that precision is from it.
Two right ones round in other orders and have other tanh functions, whose errors are 1 to 5 units in the last
place, so their mean distances are within a factor of a few of each other. FACTOR leaves room for that, while
a missing inference step, another rate or another placement of tanh is thousands of times as far away.

An error is the difference of two activities, each rounded. Far from the output errors are small, so that
rounding is a large part of them and of the weight gradients, which Adam does not scale away. What weights may
differ by is therefore also found by a learning step from float64 errors that are shaken as much.

Distances are mean absolute ones. Adam first moves a weight by g / (|g| + 1e-8), so the few weights with
nearly no gradient move by anything between the ends in float32, which a mean does not see and a root of mean
squares does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pctt.bench import work
from pctt.bench.work import Case, Problem, Settings

FACTOR = 8.0
EPSILON = torch.finfo(torch.float32).eps
CORRECTION = EPSILON / (2 * (1 - 0.999))
"""Of a step of Adam: float32 knows 1 - 0.999, which optax corrects its second moment by, to EPSILON /
0.001 of itself, and its root to half of that. Torch has it in float64.
"""

Numbers = list[Tensor]


@dataclass(frozen=True)
class Sameness:
    """activities, weights: the largest distance of a tensor, as a multiple of what float32 explains; up to
    1 it is the same work.
    """

    activities: float
    weights: float

    @property
    def ok(self) -> bool:
        return self.activities <= 1.0 and self.weights <= 1.0

    def __str__(self) -> str:
        if self.ok:
            return "same"
        worst = {"activities": self.activities, "weights": self.weights}
        return "; ".join(f"{name} {_times(times)} too far" for name, times in worst.items() if not times <= 1)


def _times(times: float) -> str:
    return f"{times:.3g}x"


class Measure:
    """What a case must come to, in either placement of tanh."""

    def __init__(self, case: Case, problem: Problem, settings: Settings) -> None:
        self.case, self.problem, self.settings = case, problem, settings
        self._known: dict[str, tuple[list[Numbers], list[list[float]]]] = {}

    def compare(
        self, activities: Sequence[Tensor], weights: Sequence[Sequence[Tensor]], activate: str = "output"
    ) -> Sameness:
        """activities: of the hidden nodes after T inference steps.    weights: of the layers after learning.

        Raises ValueError where they have other shapes than the case.
        """
        if activate not in self._known:
            exact = self._run(torch.float64, activate)
            self._known[activate] = exact, self._limits(exact, activate)
        exact, limits = self._known[activate]
        found = [list(activities), [tensor for layer in weights for tensor in layer]]
        times: list[float] = []
        for ours, wanted, limit in zip(found, exact, limits, strict=True):
            shapes = [tuple(each.shape) for each in wanted]
            if [tuple(each.shape) for each in ours] != shapes:
                raise ValueError(f"shapes {[tuple(each.shape) for each in ours]} are not {shapes}")
            times.append(max(map(_times_the_limit, ours, wanted, limit), default=0.0))
        return Sameness(*times)

    def _limits(self, exact: list[Numbers], activate: str) -> list[list[float]]:
        """How far each tensor of activities and of weights may be from `exact`."""
        rounded = self._run(torch.float32, activate)
        shaken = self._run(torch.float64, activate, shake=True)[1]
        activities = [
            FACTOR * max(_mean(close - right), EPSILON * _mean(right))
            for close, right in zip(rounded[0], exact[0], strict=True)
        ]
        begun = [tensor for layer in self.problem.weights for tensor in layer]
        weights = [
            FACTOR * max(_mean(close - right), _mean(other - right), EPSILON * _mean(right))
            + CORRECTION * _mean(right - before)
            for close, other, right, before in zip(rounded[1], shaken, exact[1], begun, strict=True)
        ]
        return [activities, weights]

    def _run(self, dtype: torch.dtype, activate: str, shake: bool = False) -> list[Numbers]:
        """Activities and weights after one training batch. shake: learn from errors as float32 knows them."""
        inference, rate = work.inference(self.case.algorithm, self.settings), work.RATES[self.case.algorithm]
        engine = work.engine(self.problem, self.case.widths, inference, activate, dtype)
        work.relax(engine, self.problem, rate, 1)
        if shake:
            generator, errors = torch.Generator().manual_seed(0), dict[str, Tensor]()
            for name in engine.net.nodes[1:]:
                error, activity = engine.read_error(name), engine.read_activity(name)
                noise = 2 * torch.rand(error.shape, generator=generator, dtype=dtype) - 1
                errors[name] = error + EPSILON * activity.abs() * noise
            engine.write_errors(errors)
        engine.learn(rate, 1)
        weights = engine.weights().values()
        return [
            [engine.read_activity(name) for name in engine.net.nodes[1:-1]],
            [tensor for layer in weights for tensor in (layer["weight"], layer["bias"])],
        ]


def _times_the_limit(found: Tensor, exact: Tensor, limit: float) -> float:
    """The distance over what it may be; of what is no number, infinite."""
    distance = _mean(found - exact)
    if not limit:
        return 0.0 if distance == 0 else math.inf
    return distance / limit if math.isfinite(distance) else math.inf


def _mean(values: Tensor) -> float:
    return float(values.double().abs().mean())
