"""Temporal predictive coding: filtering a sequence of observations, one at a time.

Of every moment the graph below is relaxed, with what came before fixed at its estimate (Millidge, Tang,
Osanlouy, Harper & Bogacz 2024):

    previous, control -> state -> observation
    F_t = 1/2 |x_t - A f(x_{t-1}) - B u_t|^2_P + 1/2 |y_t - C f(x_t)|^2_R

P and R are precisions, inverse variances. Of linear layers the minimum is (P + C' R C)^-1 (P (A x_{t-1} + B
u_t) + C' R y_t): the update of a Kalman filter whose predicted covariance is the inverse of P. A Kalman
filter computes that covariance anew at every moment; here it stays what it is.

Learning changes A, B and C after every moment by what stands at their two ends, with no way back in time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pctt._checks import require_count
from pctt.energies import Categorical
from pctt.engine import Engine
from pctt.inference import Inference
from pctt.initialisers import init
from pctt.layers.block import Block, Step
from pctt.layers.dense import Dense
from pctt.layers.maps import Add, Function, Linear
from pctt.learning import Adam, Learning
from pctt.network import Network, Weights
from pctt.queries import InferenceDiverged
from pctt.wiring import graph

GAIN = 0.5
"""Of initial weights: a transition that is drawn at full scale often lets states grow without bound."""


class TemporalFilter:
    """A model of how a hidden state moves and is seen, which it filters and learns.

    transition: predicts a state from the one before. In `Dense(n, f, activate="input", bias=False)`, energy
        `Gaussian(P)`, f(x) A is added to u B; with activate="output" it is f(x A + u B). Or a block of the
        sources previous and control.
    observation: predicts what is seen from the state; `Dense(m, ...)` or a block.
    controls: units of u, 0 for none.    states: units of the state, where the transition is a block.
    inference: how a state is found, default 50 steps of rate 0.1.    learning: how weights move.
    weights: {"state": {"weight": [n, n]} (with controls "weight.previous" and "weight.control"),
        "observation": {"weight": [n, m]}} and biases, [in, out] each; else `init` with the seed.
    backend, device: as of `pctt.Trainer`.

    Raises ValueError for layers that do not fit together.

    >>> model = TemporalFilter(Dense(2, bias=False), Dense(3, bias=False))
    >>> model.filter(torch.zeros(10, 1, 3)).shape
    torch.Size([10, 1, 2])
    """

    def __init__(
        self,
        transition: Dense | Block,
        observation: Dense | Block,
        controls: int = 0,
        states: int | None = None,
        inference: Inference | None = None,
        learning: Learning | None = None,
        *,
        weights: Weights | None = None,
        seed: int = 0,
        backend: str = "reference",
        device: str | int | None = None,
    ) -> None:
        require_count("controls", controls)
        self.net = _model(transition, observation, controls, states)
        self.controls = controls
        self.learning = learning or Adam()
        self.steps = 0  # learning steps done
        self._roots = self.net.nodes[: self.net.num_roots]
        self._engine = Engine(
            self.net,
            weights if weights is not None else init(self.net, seed, gain=GAIN),
            inference or Inference(num_steps=50, rate=0.1),
            (*self._roots, "observation"),
            learning=self.learning,
            backend=backend,
            device=device,
        )

    @property
    def weights(self) -> Weights:
        """A copy of the weights."""
        return self._engine.weights()

    def filter(
        self, observations: Tensor, controls: Tensor | None = None, initial: Tensor | None = None
    ) -> Tensor:
        """The states [T, B, n] after observations [T, B, m], each estimated from what was seen up to then.

        controls: [T, B, k], u_t that acts on the way to x_t.    initial: the state before the first, [B, n],
        default 0.
        Raises ValueError for other shapes, InferenceDiverged where inference does.
        """
        states, _ = self._run(observations, controls, initial, None)
        return states

    def forecast(
        self, observations: Tensor, controls: Tensor | None = None, initial: Tensor | None = None
    ) -> Tensor:
        """What is predicted of each observation from those before it, [T, B, m], while filtering."""
        _, predictions = self._run(observations, controls, initial, None)
        return predictions

    def learn(
        self,
        observations: Tensor,
        controls: Tensor | None = None,
        epochs: int = 1,
        initial: Tensor | None = None,
    ) -> list[float]:
        """Filters the sequences `epochs` times and learns after every observation.

        Returns of each time the mean square of the errors of `forecast` on the way, per unit.
        """
        require_count("epochs", epochs)
        total, errors = epochs * len(observations), list[float]()
        begun = self.steps

        def step() -> None:
            rate = self.learning.rate * self.learning.schedule.factor(self.steps - begun, total)
            self.steps += 1
            self._engine.learn(rate, self.steps)

        for _ in range(epochs):
            _, predictions = self._run(observations, controls, initial, step)
            errors.append(float((observations.to(predictions) - predictions).square().mean()))
        return errors

    def _run(
        self,
        observations: Tensor,
        controls: Tensor | None,
        initial: Tensor | None,
        after: Callable[[], None] | None,
    ) -> tuple[Tensor, Tensor]:
        dtype, shapes = self._engine.dtype, dict(zip(self.net.nodes, self.net.widths, strict=True))
        length, batch_size = _checked("observations", observations, shapes["observation"])
        if (controls is None) == bool(self.controls):
            needs = f"controls [T, B, {self.controls}]" if self.controls else "no controls"
            raise ValueError(f"this filter takes {needs}, got {'none' if controls is None else 'some'}.")
        if controls is not None and _checked("controls", controls, self.controls) != (length, batch_size):
            raise ValueError(
                f"controls must be as many as observations, [{length}, {batch_size}, {self.controls}], got "
                f"{list(controls.shape)}."
            )
        state = torch.zeros(batch_size, shapes["state"]) if initial is None else initial
        if list(state.shape) != [batch_size, shapes["state"]]:
            raise ValueError(f"initial must be [{batch_size}, {shapes['state']}], got {list(state.shape)}.")
        state = state.to(dtype)
        states: list[Tensor] = []
        predictions: list[Tensor] = []
        for moment in range(length):
            given = {"previous": state, "observation": observations[moment].to(dtype)}
            if controls is not None:
                given["control"] = controls[moment].to(dtype)
            relaxation = self._engine.relax(given)
            if not relaxation.status.ok:
                rate = self._engine.inference.rate
                raise InferenceDiverged(
                    f"moment {moment + 1}: {relaxation.status.value}; lower the rate of inference ({rate:g})."
                )
            state = self._engine.read_activity("state")
            states.append(state)
            predictions.append(self._engine.read_node("anchor", "observation"))
            if after is not None:
                after()
        return torch.stack(states), torch.stack(predictions)


def _checked(name: str, values: Tensor, units: int) -> tuple[int, int]:
    """(T, B)"""
    if not isinstance(values, Tensor) or values.dim() != 3 or values.shape[2] != units or not values.numel():
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must be a tensor [T, B, {units}], got {got}.")
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} hold NaN or infinite values; clean the data first.")
    return values.shape[0], values.shape[1]


def _model(
    transition: Dense | Block, observation: Dense | Block, controls: int, states: int | None
) -> Network:
    for name, layer in (("transition", transition), ("observation", observation)):
        if not isinstance(layer, (Dense, Block)):
            raise ValueError(f"{name} must be Dense(...) or Block([...]), got {layer!r}.")
    if isinstance(transition.energy, Categorical):
        raise ValueError("a state is read by the observation, so its energy must be Gaussian(...).")
    if isinstance(transition, Dense):
        if states not in (None, transition.units):
            raise ValueError(
                f"states={states}, but the transition predicts {transition.units} units; drop it."
            )
        states = transition.units
        layer = _with_controls(transition) if controls else transition
    else:
        if states is None:
            raise ValueError(
                "a transition that is a block does not say how many states there are; give states."
            )
        layer = transition
    require_count("states", states, least=1)
    roots = {"previous": states, **({"control": controls} if controls else {})}
    net = graph(roots, {"state": (layer, *roots), "observation": (observation, "state")})
    if net.widths[net.node_index("state")] != states:
        raise ValueError(
            f"the transition predicts {net.widths[net.node_index('state')]} units from {states}; a state has "
            "as many as the one before."
        )
    return net


def _with_controls(layer: Dense) -> Block:
    """f_out(f_in(x) A + u B + b)"""
    if layer.scale != 1.0 or layer.skip:
        raise ValueError("scale and skip do not go with controls; use a Block.")
    steps: list[Step] = []
    if layer.input_function != "identity":
        steps.append(Step(Function(layer.input_function), (0,)))
    last = 1 + len(steps) if steps else 0
    steps.append(Step(Linear(layer.units, layer.bias), (last,), "previous"))
    steps.append(Step(Linear(layer.units, bias=False), (1,), "control"))
    steps.append(Step(Add(), (-2, -1)))
    if layer.output_function != "identity":
        steps.append(Step(Function(layer.output_function)))
    return Block(steps, layer.energy)
