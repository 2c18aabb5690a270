"""The generative model of a controller, as settings and as graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pctt._checks import require_count, require_finite_positive
from pctt.describe import Concise
from pctt.energies import Gaussian
from pctt.inference import Inference
from pctt.layers.block import Block, Step
from pctt.layers.maps import Add, Concat, Function, Linear, Reshape, Scale, Slice
from pctt.network import Network, Weights
from pctt.wiring import graph

Precision = float | tuple[float, ...] | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ControlModel(Concise):
    """What an agent believes about the world, and what it wants.

    state, action, observation: units of each at one time. All are in the caller's units; a model that learns
        should see numbers of order 1.
    hidden: units of the hidden tanh layers of the transition; () is a linear transition.
    residual: the transition predicts the change of the state: x' = x + change net(x, a).
    change: the scale of that, so that the net learns numbers of order 1.
    observed: whether the observation is the state itself; else it is a learnt or given linear map of it.
    state_precision: P_x, of the transition. As it is finite, a plan may count on lucky deviations from the
        dynamics (see `Planning.corrections`).
    observation_precision: P_y in perception.
    goal_precision: P_y in a plan: how much it matters to observe the goal, at each time.
    final_precision: the same at the end of the horizon; None for that of the other times.
    effort: P_a, what an action costs: the precision of the belief that it is 0; None for no cost.
    bound: |a| <= bound, by a = bound tanh(u) with u what relaxes; None for no bound.

    A precision is a number, one per unit, or a symmetric positive definite matrix.
    Raises ValueError for values out of range.
    """

    state: int
    action: int
    observation: int
    hidden: tuple[int, ...] = ()
    residual: bool = False
    change: float = 1.0
    observed: bool = True
    state_precision: Precision = 1.0
    observation_precision: Precision = 1.0
    goal_precision: Precision = 1.0
    final_precision: Precision | None = None
    effort: Precision | None = 0.01
    bound: float | None = None

    def __post_init__(self) -> None:
        for name in ("state", "action", "observation"):
            require_count(name, getattr(self, name), least=1)
        for units in self.hidden:
            require_count("hidden", units, least=1)
        if self.observed and self.observation != self.state:
            raise ValueError(
                f"the observation is the state, so both must have the same units, got {self.observation} and "
                f"{self.state}; use observed=False for a linear map of the state."
            )
        require_finite_positive("change", self.change)
        if self.change != 1.0 and not self.residual:
            raise ValueError("change scales what a residual transition adds; set residual=True.")
        if self.bound is not None:
            require_finite_positive("bound", self.bound)
        for name, units in (
            ("state_precision", self.state),
            ("observation_precision", self.observation),
            ("goal_precision", self.observation),
            ("final_precision", self.observation),
            ("effort", self.action),
        ):
            if (value := getattr(self, name)) is not None:
                try:
                    Gaussian(value).check(units)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers of the transition; the last one predicts the state."""
        return (*(f"hidden{number}" for number in range(1, len(self.hidden) + 1)), "state")


def model_network(model: ControlModel) -> Network:
    """One transition, with every hidden layer a node of its own: what `PredictiveController.learn` learns by.

    Roots `previous` and `action`, layers `hidden1`, ..., `state` and, unless it is the state, `observation`.
    Precisions are 1 here: learning needs no other than those of its errors' units.
    """
    layers: dict[str, tuple[Any, ...]] = {}
    below: tuple[str, ...] = ("previous", "action")
    for name, units in zip(model.layers, model.hidden, strict=False):
        joined = [Concat()] if len(below) > 1 else []
        layers[name] = (Block([*joined, Linear(units), "tanh"]), *below)
        below = (name,)
    joined = [Concat()] if len(below) > 1 else []
    steps: list[Any] = [*joined, Linear(model.state)]
    if model.residual:
        # The previous state is the first source of a linear transition, else one that comes after the hidden.
        below = below if "previous" in below else (*below, "previous")
        previous, count = below.index("previous"), len(below)
        first = Step(joined[0], (0, 1)) if joined else Step(Scale(1.0), (0,))
        steps = [first, Step(Linear(model.state)), Step(Scale(model.change))]
        steps.append(Step(Add(), (previous, count + 2)))
    layers["state"] = (Block(steps, Gaussian(model.change**-2)), *below)
    if not model.observed:
        layers["observation"] = (Linear(model.observation), "state")
    return graph({"previous": model.state, "action": model.action}, layers)


def trajectory_network(
    model: ControlModel, horizon: int, planning: bool = True, corrected: bool = False
) -> Network:
    """The states of `horizon` steps as one node [H, state], predicted from itself one step earlier.

    Time is an axis of the nodes, so all steps relax at once and share their weights; each still hears only of
    the steps beside it. Roots: `start` [1, state], `action` [H, action], with `corrected` also `offset`
    [H, state], which is added to the predictions. Layers: `state`, `observation` [H, observation] and, in a
    plan with an effort, `effort` [H, action], predicted from the actions within their bound.
    planning: precisions and the bound of a plan; else the precision of perception, and actions as they are.
    """
    roots: dict[str, tuple[int, ...]] = {"start": (1, model.state), "action": (horizon, model.action)}
    sources = ["start", "action"]
    if corrected:
        roots["offset"] = (horizon, model.state)
        sources.append("offset")
    if horizon > 1:
        sources.append("state")
    squash: list[Any] = []
    if planning and model.bound is not None:
        squash = [Function("tanh"), Scale(model.bound)]

    steps: list[Step] = []
    count = len(sources)

    def step(map_: Any, *of: int, name: str = "") -> int:
        steps.append(Step(map_, of, name))
        return count + len(steps) - 1

    previous, action = 0, 1
    if horizon > 1:
        earlier = step(Slice(0, horizon - 1), sources.index("state"))
        previous = step(Concat(), 0, earlier)
    for map_ in squash:
        action = step(map_, action)
    value = step(Concat(axis=1), previous, action)
    for name, units in zip(model.layers, model.hidden, strict=False):
        value = step(Function("tanh"), step(Linear(units), value, name=name))
    value = step(Linear(model.state), value, name="state")
    if model.residual:
        value = step(Add(), previous, step(Scale(model.change), value))
    if corrected:
        value = step(Add(), value, sources.index("offset"))
    # The state is predicted from itself, so nothing but its layer says its shape.
    step(Reshape((horizon, model.state)), value)

    energy = Gaussian(_over_time(model.state_precision, None, model.state, horizon))
    layers: dict[str, tuple[Any, ...]] = {"state": (Block(steps, energy), *sources)}
    wanted, final = model.goal_precision, model.final_precision
    if not planning:
        wanted, final = model.observation_precision, None
    energy = Gaussian(_over_time(wanted, final, model.observation, horizon))
    map_ = Scale(1.0) if model.observed else Linear(model.observation)
    layers["observation"] = (Block([map_], energy), "state")
    if planning and model.effort is not None:
        energy = Gaussian(_over_time(model.effort, None, model.action, horizon))
        layers["effort"] = (Block(squash or [Scale(1.0)], energy), "action")
    return graph(roots, layers, output="observation")


def linear_weights(model: ControlModel, a: Tensor, b: Tensor, c: Tensor | None = None) -> Weights:
    """The weights of x' = a x + b u, y = c x: a [state, state], b [state, action], c [observation, state].

    For a `residual` model, which adds x, a is that of the whole transition all the same.
    Raises ValueError for a model with hidden layers, or for other shapes.
    """
    if model.hidden:
        raise ValueError("a linear transition has no hidden layers; use hidden=().")
    expected = {"a": (a, model.state, model.state), "b": (b, model.state, model.action)}
    if not model.observed:
        if c is None:
            raise ValueError("the observation is a map of the state; give c.")
        expected["c"] = (c, model.observation, model.state)
    for name, (matrix, rows, columns) in expected.items():
        if tuple(matrix.shape) != (rows, columns):
            raise ValueError(f"{name} must be [{rows}, {columns}], got {list(matrix.shape)}.")
    change = a - torch.eye(model.state, dtype=a.dtype) if model.residual else a
    weights = {
        "state": {
            "weight": torch.cat([change.T, b.T]) / model.change,
            "bias": torch.zeros(model.state, dtype=a.dtype),
        }
    }
    if c is not None and not model.observed:
        weights["observation"] = {
            "weight": c.T.contiguous(),
            "bias": torch.zeros(model.observation, dtype=a.dtype),
        }
    return weights


def trajectory_weights(model: ControlModel, weights: Weights) -> Weights:
    """Those of one transition, under the names they have in the block of a trajectory."""
    block = {f"{key}.{name}": values for name in model.layers for key, values in weights[name].items()}
    rest = {} if model.observed else {"observation": weights["observation"]}
    return {"state": block, **rest}


def _over_time(every: Precision, final: Precision | None, units: int, horizon: int) -> Precision:
    """The precision of a node [H, units] of those of one time; `final` is that of the last time."""
    parts = [every] * (horizon - 1) + [every if final is None else final]
    if not any(Gaussian(part).is_full for part in parts):
        if final is None and isinstance(every, (int, float)):
            return every
        return tuple(torch.cat([Gaussian(part).matrix(units) for part in parts]).tolist())
    blocks = [Gaussian(part).matrix(units) for part in parts]
    whole = torch.block_diag(*(block if block.dim() == 2 else block.diag() for block in blocks))
    return tuple(tuple(row) for row in whole.tolist())


def default_perception(model: ControlModel, weights: Weights) -> Inference:
    """Gradient descent at the rate 2 / (largest + smallest curvature), the best one, until 1e-6 of the way is
    left in the slowest direction, 500 steps at most. The curvature is P_x + C' P_y C; C as it is now.
    """
    prior = Gaussian(model.state_precision).matrix(model.state)
    likelihood = Gaussian(model.observation_precision).matrix(model.observation)
    prior, likelihood = (part if part.dim() == 2 else part.diag() for part in (prior, likelihood))
    c = torch.eye(model.state, dtype=torch.float64)
    if not model.observed:
        c = weights["observation"]["weight"].T.double()
    eigenvalues = torch.linalg.eigvalsh(prior + c.T @ likelihood @ c)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    shrink = (largest - smallest) / (largest + smallest)
    steps = 1 if shrink < 1e-6 else math.ceil(math.log(1e-6) / math.log(shrink))
    return Inference(num_steps=min(steps, 500), rate=2.0 / (largest + smallest))
