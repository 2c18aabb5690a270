"""What the tests share: the tables of networks, settings and learning rules, and predictive coding once more.

A new network, setting or rule is tested by adding one row to its table.

`relax` is the oracle of one batch, `train` that of several learning steps. They are written from the
equations of docs/mathematics.md and share no code with pctt: activities are kept as they are, every
prediction is computed in full at every step, every derivative, with respect to activities, errors and
weights, is autograd's, of the summed energy, and what torch.optim can move it moves. Only the description of
the network (`Network`, `Dense`, `Gaussian`), of the settings (`Inference`, `Nudge`) and of the learning rules
is read from pctt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pctt import (
    SGD,
    Adam,
    AdamW,
    Categorical,
    Constant,
    Dense,
    Gaussian,
    Inference,
    Network,
    Nudge,
    WarmupCosine,
    chain,
)
from pctt.learning import Learning

Tensors = dict[str, Tensor]
Tree = dict[str, dict[str, Tensor]]

# --- tables -------------------------------------------------------------------------------------------------

HIDDEN_ACTIVATIONS = (
    "identity",
    "tanh",
    "relu",
    "leaky_relu",
    "sigmoid",
    "gelu",
    "silu",
    "hard_tanh",
)
PLACEMENTS = ("output", "input")


def _mlp(activation: str, placement: str) -> Network:
    """Unequal widths, then a run of equal layers, then a linear output: 5-7-6-6-6-4."""
    widths = (7, 6, 6, 6)
    hidden = [Dense(units, activation, activate=placement) for units in widths]
    return chain(5, [*hidden, Dense(4, "identity" if placement == "output" else activation, True, placement)])


NETWORKS: dict[str, Network] = {
    **{
        f"{activation} at the {placement}": _mlp(activation, placement)
        for activation in HIDDEN_ACTIVATIONS
        for placement in PLACEMENTS
    },
    "one layer": chain(5, [Dense(4, "tanh")]),
    "two layers": chain(5, [Dense(6, "tanh"), Dense(4)]),
    "widths of one": chain(1, [Dense(1, "tanh"), Dense(1, "tanh"), Dense(1)]),
    "equal throughout": chain(6, [Dense(6, "tanh")] * 5),
    "equal throughout, at the input": chain(6, [Dense(6, "tanh", activate="input")] * 5),
    "two groups": chain(5, [*[Dense(6, "tanh")] * 4, *[Dense(6, "silu")] * 3, Dense(4)]),
    "placements mixed": chain(
        5,
        [Dense(6, "tanh"), Dense(6, "gelu", activate="input"), Dense(6, "silu"), Dense(4, activate="input")],
    ),
    "no biases": chain(5, [*[Dense(6, "tanh", bias=False)] * 3, Dense(4, bias=False)]),
    "some biases": chain(5, [Dense(6, "tanh"), Dense(6, "tanh", bias=False), Dense(6, "tanh"), Dense(4)]),
    "nonlinear output": chain(5, [*[Dense(6, "gelu")] * 3, Dense(4, "sigmoid")]),
    "softmax, squared error": chain(5, [Dense(6, "tanh"), Dense(6, "tanh"), Dense(4, "softmax")]),
    "categorical": chain(5, [*[Dense(6, "tanh")] * 3, Dense(4, "softmax", energy=Categorical())]),
    "categorical at the input": chain(
        5,
        [
            *[Dense(6, "tanh", activate="input")] * 3,
            Dense(4, "tanh", activate="input", energy=Categorical()),
        ],
    ),
    "one precision": chain(
        5, [*[Dense(6, "tanh", energy=Gaussian(0.5))] * 3, Dense(4, energy=Gaussian(3.0))]
    ),
    "a precision per unit": chain(
        5,
        [
            *[Dense(4, "silu", energy=Gaussian((0.5, 1.0, 2.0, 3.0)))] * 3,
            Dense(4, "tanh", activate="input", energy=Gaussian((2.0, 0.25, 1.0, 1.5))),
        ],
    ),
    "precisions and a categorical output": chain(
        5,
        [
            Dense(6, "gelu", energy=Gaussian(2.0)),
            Dense(6, "gelu", energy=Gaussian(0.5)),
            Dense(4, "softmax", energy=Categorical()),
        ],
    ),
}

FULL = ((2.0, 0.5, 0.0, -0.25), (0.5, 1.0, 0.25, 0.0), (0.0, 0.25, 1.5, 0.5), (-0.25, 0.0, 0.5, 0.75))
"""A precision matrix: symmetric, and by Gershgorin's circles positive definite."""


def _residual(activation: str, depth: int, energy: Gaussian | None = None) -> list[Dense]:
    """Equal layers with skips and scales, as muPC has them."""
    energy = energy or Gaussian()
    return [Dense(6, activation, True, "input", energy, scale=0.6, skip=True) for _ in range(depth)]


VARIANT_NETWORKS: dict[str, Network] = {
    "scales": chain(
        5,
        [*[Dense(6, "tanh", scale=0.5)] * 3, Dense(6, "gelu", True, "input", scale=2.0), Dense(4, scale=0.7)],
    ),
    "skips": chain(
        5,
        [
            Dense(6, "identity", True, "input", scale=0.5),
            *_residual("tanh", 3),
            Dense(4, "tanh", False, "input", scale=0.3),
        ],
    ),
    "a skip over the identity": chain(6, [*_residual("identity", 2), Dense(6), *_residual("silu", 1)]),
    "a full precision": chain(
        5,
        [
            *[Dense(4, "tanh", energy=Gaussian(FULL))] * 2,
            Dense(4, "tanh", activate="input", energy=Gaussian(FULL)),
            Dense(4, "tanh", energy=Gaussian(FULL)),
        ],
    ),
    "learned variances": chain(
        5,
        [
            Dense(6, "tanh", energy=Gaussian(2.0, learned="diagonal", adaptation=0.1)),
            Dense(6, "tanh", energy=Gaussian(0.5, learned="scalar", adaptation=0.05)),
            Dense(6, "tanh"),
            Dense(4, "tanh", True, "input", Gaussian((1.0, 2.0, 0.5, 1.0), "diagonal", 0.1)),
        ],
    ),
    "skips and learned variances": chain(
        6, [*_residual("tanh", 3, Gaussian(1.0, "diagonal", 0.05)), Dense(4, energy=Gaussian(FULL))]
    ),
}
"""Networks of later features. They stand apart because their weights may hold a variance, which descends no
gradient.
"""

INFERENCES: dict[str, Inference] = {
    "no step": Inference(num_steps=0, rate=0.1),
    "one step": Inference(num_steps=1, rate=0.1),
    "live": Inference(num_steps=12, rate=0.1),
    "live, fast": Inference(num_steps=9, rate=0.3),
    "live, momentum": Inference(num_steps=12, rate=0.05, dynamics="momentum", momentum=0.7),
    "momentum of zero": Inference(num_steps=7, rate=0.1, dynamics="momentum"),
    "fixed": Inference(num_steps=12, rate=0.1, prediction="fixed"),
    "fixed, rate one": Inference(num_steps=6, rate=1.0, prediction="fixed"),
    "fixed, momentum": Inference(
        num_steps=12, rate=0.1, prediction="fixed", dynamics="momentum", momentum=0.5
    ),
    "in the errors": Inference(num_steps=6, rate=0.02, variables="errors"),
    "one after the other": Inference(num_steps=5, rate=0.2, sweep="gauss_seidel"),
}

_HEUN: dict[str, Any] = {"dynamics": "heun", "step_tolerance": 1e-3}
_LANGEVIN: dict[str, Any] = {"dynamics": "langevin", "temperature": 0.3, "burn_in": 2}
_ADAM: dict[str, Any] = {"dynamics": "adam", "betas": (0.8, 0.95)}
_MOMENTUM: dict[str, Any] = {"dynamics": "momentum", "momentum": 0.6}

VARIANT_INFERENCES: dict[str, Inference] = {
    "adam": Inference(8, 0.05, **_ADAM),
    "adam, fixed": Inference(8, 0.05, "fixed", **_ADAM),
    "heun": Inference(8, 0.3, **_HEUN),
    "heun, fixed": Inference(6, 0.3, "fixed", **_HEUN),
    "langevin": Inference(6, 0.02, **_LANGEVIN),
    "errors": Inference(7, 0.1, variables="errors"),
    "errors, momentum": Inference(7, 0.05, variables="errors", **_MOMENTUM),
    "errors, adam": Inference(7, 0.05, variables="errors", **_ADAM),
    "errors, heun": Inference(7, 0.3, variables="errors", **_HEUN),
    "errors, langevin": Inference(6, 0.02, variables="errors", **_LANGEVIN),
    "gauss-seidel": Inference(6, 0.2, sweep="gauss_seidel"),
    "gauss-seidel, fixed": Inference(4, 0.5, "fixed", sweep="gauss_seidel"),
    "gauss-seidel, momentum": Inference(6, 0.1, sweep="gauss_seidel", **_MOMENTUM),
    "gauss-seidel, adam": Inference(6, 0.05, sweep="gauss_seidel", **_ADAM),
    "exact": Inference(1, 1.0, "fixed", sweep="gauss_seidel"),
    "staircase": Inference(8, 1.0, weights_at="staircase"),
    "staircase, slow": Inference(9, 0.3, weights_at="staircase"),
    "boosted": Inference(8, 0.1, wave_boost=10.0),
    "boosted, momentum": Inference(8, 0.05, wave_boost=4.0, **_MOMENTUM),
    "boosted, adam": Inference(8, 0.02, wave_boost=3.0, **_ADAM),
    "boosted, fixed": Inference(8, 0.1, "fixed", wave_boost=10.0),
    "zeros": Inference(8, 0.1, initial="zeros"),
    "zeros, fixed": Inference(8, 0.1, "fixed", initial="zeros"),
    "zeros, errors": Inference(7, 0.1, variables="errors", initial="zeros"),
    "zeros, gauss-seidel": Inference(5, 0.2, sweep="gauss_seidel", initial="zeros"),
    "zeros, heun": Inference(7, 0.3, initial="zeros", **_HEUN),
    "nudged": Inference(8, 0.1, nudge=Nudge(0.4)),
    "nudged, fixed": Inference(8, 0.3, "fixed", nudge=Nudge(0.4)),
    "nudged, errors": Inference(7, 0.1, variables="errors", nudge=Nudge(0.4)),
    "nudged, staircase": Inference(8, 1.0, weights_at="staircase", nudge=Nudge(0.4)),
    "nudged, langevin": Inference(6, 0.02, nudge=Nudge(0.4), **_LANGEVIN),
    "nudged from zeros": Inference(8, 0.1, nudge=Nudge(0.4), initial="zeros"),
    "nudged away": Inference(8, 0.1, nudge=Nudge(0.4, "negative")),
    "nudged both ways": Inference(8, 0.1, nudge=Nudge(0.4, "centred")),
    "nudged by a loss": Inference(8, 0.1, nudge=Nudge(0.4, "positive", "loss")),
    "nudged by a loss, boosted": Inference(8, 0.1, wave_boost=5.0, nudge=Nudge(0.4, "positive", "loss")),
    "nudged by a loss, fixed": Inference(8, 0.2, "fixed", nudge=Nudge(0.4, "positive", "loss")),
    "nudged by a loss, errors": Inference(7, 0.1, variables="errors", nudge=Nudge(0.4, "centred", "loss")),
    "nudged by a loss, gauss-seidel": Inference(
        6, 0.2, sweep="gauss_seidel", nudge=Nudge(0.4, "negative", "loss")
    ),
    "nudged by a loss, heun": Inference(7, 0.3, nudge=Nudge(0.4, "centred", "loss"), **_HEUN),
    "nudged by a loss, adam": Inference(8, 0.05, nudge=Nudge(0.4, "positive", "loss"), **_ADAM),
}
"""Settings of the variants whose weights stand still during inference."""

INCREMENTAL: dict[str, Inference] = {
    "every step": Inference(6, 0.1, weights_at="every_step"),
    "every step, momentum": Inference(6, 0.05, weights_at="every_step", **_MOMENTUM),
    # From zeros: Adam makes of an error that is 1e-17 instead of 0 a step of 1e-9, and 1e8 more of the next.
    "every step, adam": Inference(6, 0.05, weights_at="every_step", initial="zeros", **_ADAM),
    "every step from zeros": Inference(6, 0.1, weights_at="every_step", initial="zeros"),
    "every step, nudged": Inference(6, 0.1, weights_at="every_step", nudge=Nudge(0.4)),
    "every step, nudged by a loss": Inference(
        6, 0.1, weights_at="every_step", nudge=Nudge(0.4, "positive", "loss")
    ),
}
"""Settings whose weights move with every inference step, so that `infer` has no use for them."""


def fits(net: Network, inference: Inference) -> bool:
    """Whether the settings are accepted for a network, the clamp of training given."""
    categorical, nudge = isinstance(net.layers[-1].energy, Categorical), inference.nudge
    deep_enough = inference.weights_at != "staircase" or inference.num_steps >= len(net.layers) - 1
    by_clamp = nudge is None or (nudge.style, nudge.sign) == ("clamp", "positive")
    return deep_enough and (by_clamp or not categorical)


LEARNINGS: dict[str, Learning] = {
    "sgd": SGD(0.1),
    "sgd, momentum": SGD(0.05, momentum=0.9),
    "sgd, decay": SGD(0.1, weight_decay=0.01),
    "sgd, all": SGD(0.05, momentum=0.8, weight_decay=0.02, schedule=WarmupCosine(0.2, 0.05)),
    "adam": Adam(1e-2),
    "adam, all": Adam(1e-2, (0.8, 0.99), 1e-6, weight_decay=0.02, schedule=WarmupCosine(0.3, 0.1)),
    "adamw": AdamW(1e-2),
    "adamw, all": AdamW(2e-2, (0.7, 0.95), 1e-7, weight_decay=0.1, schedule=WarmupCosine()),
}

SCHEDULES: dict[str, Constant | WarmupCosine] = {
    "constant": Constant(),
    "warm-up cosine": WarmupCosine(),
    "no warm-up": WarmupCosine(warmup=0.0, final=0.0),
    "half warm-up": WarmupCosine(warmup=0.5, final=0.25),
}


# --- data ---------------------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weights(
    net: Network, seed: int = 0, gain: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tree:
    """Normal weights of standard deviation gain / sqrt(fan_in); biases too, so that a lost bias shows."""
    source = generator(seed)
    return {
        name: {
            key: _drawn(key, torch.randn(*shape, generator=source, dtype=torch.float64), gain).to(dtype)
            for key, shape in shapes.items()
        }
        for name, shapes in net.weight_shapes().items()
    }


def _drawn(key: str, values: Tensor, gain: float) -> Tensor:
    if key == "variance":
        return (0.3 * values).exp()
    return values * (gain / len(values) ** 0.5 if values.dim() == 2 else 0.3)


def without_variances(tree: Tree) -> Tree:
    """The weights that descend a gradient."""
    return {
        name: {key: values for key, values in layer.items() if key != "variance"}
        for name, layer in tree.items()
    }


def random_nodes(net: Network, batch: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensors:
    """An activity for every node, [batch, units]; of a categorical node a soft distribution."""
    source = generator(seed)
    nodes = {
        name: torch.randn(batch, units, generator=source, dtype=torch.float64)
        for name, units in zip(net.nodes, net.widths, strict=True)
    }
    if isinstance(net.layers[-1].energy, Categorical):
        nodes[net.output] = torch.softmax(nodes[net.output], -1)
    return {name: values.to(dtype) for name, values in nodes.items()}


def supervised(net: Network, batch: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensors:
    """The clamp of training: input and output."""
    nodes = random_nodes(net, batch, seed, dtype)
    return {name: nodes[name] for name in ("input", net.output)}


# --- the oracle ---------------------------------------------------------------------------------------------

ORACLE_FUNCTIONS: dict[str, Any] = {
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "sigmoid": lambda z: z.sigmoid(),
    "gelu": lambda z: 0.5 * z * (1.0 + torch.erf(z / 2.0**0.5)),
    "silu": lambda z: z * z.sigmoid(),
    "hard_tanh": lambda z: z.clamp(-1.0, 1.0),
    "softmax": lambda z: z.softmax(-1),
}


@dataclass
class Relaxed:
    """What the oracle found; lists run over the steps 0..T, and inner ones over the layers 1..L.

    activities, errors: of every node of every step, by node name.    energies: batch means, [T + 1, L].
    gradients: what learning descends, tree like the weights without their variances: d mean_B F / dW at the
    end, for a nudge over its strength, for noise the mean over the samples, for a staircase each at its turn.
    squares: mean_B e^2 of every node at the end.
    weights: after inference; the ones before it unless they move with every step.
    """

    activities: list[Tensors]
    errors: list[Tensors]
    energies: Tensor
    gradients: Tree
    squares: Tensors
    weights: Tree


def predicted(net: Network, weights: Tree, index: int, source: Tensor) -> Tensor:
    """mu_l, or of a categorical layer its logits: what layer `index` (1..L) makes of x_{l-1}."""
    layer, parameters = net.layers[index - 1], weights[net.names[index - 1]]
    function = ORACLE_FUNCTIONS[layer.activation]
    drive = (function(source) if layer.activate == "input" else source) @ (layer.scale * parameters["weight"])
    drive = drive + parameters["bias"] if layer.bias else drive
    if layer.activate == "output" and not isinstance(layer.energy, Categorical):
        drive = function(drive)
    return drive + source if layer.skip else drive


def energy_of(
    net: Network, index: int, target: Tensor, prediction: Tensor, weights: Tree | None = None
) -> Tensor:
    """F_l per sample, [B]: of x_l = `target` under what `predicted` gave. weights: for learned variances."""
    energy = net.layers[index - 1].energy
    if isinstance(energy, Categorical):
        return torch.xlogy(target, target).sum(-1) - (target * torch.log_softmax(prediction, -1)).sum(-1)
    error = target - prediction
    precision = torch.as_tensor(energy.precision, dtype=target.dtype)
    if energy.learned is not None:
        assert weights is not None
        precision = 1.0 / weights[net.names[index - 1]]["variance"].detach()
    if precision.dim() == 2:
        return 0.5 * torch.einsum("bi,ij,bj->b", error, precision, error) - 0.5 * torch.logdet(precision)
    precision = precision.expand(target.shape[-1])
    return 0.5 * (error**2 * precision).sum(-1) - 0.5 * precision.log().sum()


def mean_of(net: Network, index: int, prediction: Tensor) -> Tensor:
    return prediction.softmax(-1) if isinstance(net.layers[index - 1].energy, Categorical) else prediction


def feedforward(net: Network, weights: Tree, given: Mapping[str, Tensor]) -> list[Tensor]:
    """x_0 .. x_L: given nodes as they are, the others at their predictions; an input not given at zero."""
    batch = next(iter(given.values()))
    nodes = [given.get("input", batch.new_zeros(len(batch), net.input))]
    for index, name in enumerate(net.names, start=1):
        nodes.append(given.get(name, mean_of(net, index, predicted(net, weights, index, nodes[-1]))))
    return nodes


def noise(seed: int, node: int, like: Tensor) -> Callable[[], Tensor]:
    """The stream of draws of one node of one relaxation, which `seed` and the node's number decide."""
    entropy = np.random.SeedSequence([seed, node]).generate_state(1, np.uint64)[0]
    source = torch.Generator().manual_seed(int(entropy >> np.uint64(1)))
    return lambda: torch.empty_like(like).normal_(generator=source)


def relax(
    net: Network,
    weights: Tree,
    clamp: Mapping[str, Tensor],
    inference: Inference,
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    strength: float | None = None,
    move_weights: Callable[[Tree, Tensors], Tree] | None = None,
) -> Relaxed:
    """Predictive coding with plain activities, in the dtype of `weights`.

    strength: of a nudge, b or for a centred pair its positive one, where it is not the nudge's own.
    move_weights: for weights that move with every inference step: from their gradients and the mean squares
    of the errors, both at the old activities, to the new weights.
    """
    nudge = inference.nudge
    if nudge is None:
        return _relax(net, weights, clamp, inference, initial or {}, seed, None, move_weights)
    one = nudge.beta if strength is None else abs(strength)
    if nudge.sign != "centred":
        one = -one if nudge.sign == "negative" else one
        found = _relax(net, weights, clamp, inference, initial or {}, seed, one, move_weights)
        return replace(found, gradients=_combined(found.gradients, 1.0 / one))
    below, above = (
        _relax(net, weights, clamp, inference, initial or {}, seed, b, move_weights) for b in (-one, one)
    )
    gradients = _combined(above.gradients, 0.5 / one, below.gradients, -0.5 / one)
    return replace(above, gradients=gradients)


def _combined(one: Tree, factor: float, other: Tree | None = None, other_factor: float = 0.0) -> Tree:
    other = one if other is None else other
    return {
        name: {key: factor * value + other_factor * other[name][key] for key, value in layer.items()}
        for name, layer in one.items()
    }


def _relax(
    net: Network,
    weights: Tree,
    clamp: Mapping[str, Tensor],
    inference: Inference,
    initial: Mapping[str, Tensor],
    seed: int,
    strength: float | None,
    move_weights: Callable[[Tree, Tensors], Tree] | None,
) -> Relaxed:
    """One relaxation; its gradients are those of F, whatever the nudge.

    Every free node descends the derivative of the batch sum of F (and of the nudge), from old values
    (Jacobi), or one after the other from the output down, each from the activities as they are then. For
    fixed predictions F is taken between the activities and the predictions of the initial activities: the
    node's own error moves with it, its child's derivative is taken at the initial activity (Millidge et al.
    2022). A free categorical node is always at its prediction. In the errors, F is a function of the errors
    of the free nodes, from which one forward pass makes the activities.
    """
    last, nudge = len(net.layers), inference.nudge
    fixed, in_errors = inference.prediction == "fixed", inference.variables == "errors"
    output_is_categorical = isinstance(net.layers[-1].energy, Categorical)
    held, goal = dict(clamp), torch.empty(0)
    if nudge is not None:
        goal = held.pop(net.output)
    floating = output_is_categorical and net.output not in clamp

    # Where the nodes start, and which are free.
    starts = {**held, **initial}
    if inference.initial == "zeros":
        rows = len(next(iter(clamp.values())))
        for name, units in zip(net.nodes, net.widths, strict=True):
            if name not in starts and not (floating and name == net.output):
                starts[name] = goal.new_zeros(rows, units).to(next(iter(clamp.values())).dtype)
    states = [values.clone() for values in feedforward(net, weights, starts)]
    if nudge is not None and nudge.style == "clamp":
        assert strength is not None
        ahead = mean_of(net, last, predicted(net, weights, last, states[last - 1]))
        states[last] = held[net.output] = ahead + strength * (goal - ahead)
    start = [values.clone() for values in states]
    free = [i for i, name in enumerate(net.nodes) if name not in held and not (floating and i == last)]

    def energies(nodes: list[Tensor], tree: Tree) -> list[Tensor]:
        sources = start if fixed else nodes
        predictions = [predicted(net, tree, i, sources[i - 1]) for i in range(1, last + 1)]
        return [energy_of(net, i, nodes[i], predictions[i - 1], tree) for i in range(1, last + 1)]

    def pulled(nodes: list[Tensor]) -> Any:
        if nudge is None or nudge.style == "clamp":
            return 0.0
        return 0.5 * strength * (goal - nodes[last]).square().sum()

    def slopes(nodes: list[Tensor], indices: Sequence[int]) -> list[Tensor]:
        """Of F and the nudge with respect to some activities."""
        leaves = [values.clone().requires_grad_() for values in nodes]
        own = _slopes(
            sum(energy.sum() for energy in energies(leaves, weights)) + pulled(leaves),
            [leaves[i] for i in indices],
        )
        if not fixed:
            return own
        sources = [values.clone().requires_grad_() for values in start]
        total: Any = 0.0
        for i in range(1, last + 1):
            target = nodes[i].detach()
            total = (
                total + energy_of(net, i, target, predicted(net, weights, i, sources[i - 1]), weights).sum()
            )
        through = _slopes(total, [sources[i] for i in indices])
        return [a + b for a, b in zip(own, through, strict=True)]

    def rebuilt(errors: Mapping[int, Tensor]) -> list[Tensor]:
        """The activities that belong to the errors of the free nodes."""
        nodes = [errors.get(0, start[0])]
        for i in range(1, last + 1):
            mean = mean_of(net, i, predicted(net, weights, i, nodes[-1]))
            nodes.append(mean + errors[i] if i in errors else mean if floating and i == last else start[i])
        return nodes

    def error_slopes(errors: Mapping[int, Tensor]) -> list[Tensor]:
        leaves = {i: values.clone().requires_grad_() for i, values in errors.items()}
        nodes = rebuilt(leaves)
        total = sum(energy.sum() for energy in energies(nodes, weights)) + pulled(nodes)
        return _slopes(total, [leaves[i] for i in free])

    def float_output() -> None:
        if floating:
            source = start if fixed else states
            states[last] = mean_of(net, last, predicted(net, weights, last, source[last - 1]))

    def slopes_at(values: list[Tensor]) -> list[Tensor]:
        """Of all free nodes, were they at these values."""
        nodes = list(states)
        for i, value in zip(free, values, strict=True):
            nodes[i] = value
        if floating and not fixed:
            nodes[last] = mean_of(net, last, predicted(net, weights, last, nodes[last - 1]))
        return slopes(nodes, free)

    def errors_now() -> Tensors:
        sources = start if fixed else states
        return {
            name: states[i] - mean_of(net, i, predicted(net, weights, i, sources[i - 1]))
            for i, name in enumerate(net.names, start=1)
        }

    def squares() -> Tensors:
        return {name: error.square().mean(0) for name, error in errors_now().items()}

    def snapshot() -> tuple[Tensors, Tensors, Tensor]:
        values = torch.stack([energy.mean() for energy in energies(states, weights)])
        return dict(zip(net.nodes, (s.clone() for s in states), strict=True)), errors_now(), values.detach()

    def gradients() -> Tree:
        leaves = {
            name: {key: value.clone().requires_grad_() for key, value in layer.items()}
            for name, layer in without_variances(weights).items()
        }
        tree = {name: {**weights[name], **layer} for name, layer in leaves.items()}
        mean = sum(energy.mean() for energy in energies(states, tree))
        found = iter(_slopes(mean, [value for layer in leaves.values() for value in layer.values()]))
        return {name: {key: next(found) for key in layer} for name, layer in leaves.items()}

    float_output()
    mover = _Mover(inference, [states[i] for i in free], [noise(seed, i, states[i]) for i in free])
    errors = {i: errors_now()[net.nodes[i]] if i else states[0] for i in free} if in_errors else {}
    history, samples = [snapshot()], []
    turns: dict[str, tuple[dict[str, Tensor], Tensor]] = {}
    num_steps = inference.num_steps
    if inference.weights_at == "staircase":
        num_steps = min(num_steps, last - 1)

    def take_turn(step: int) -> None:
        if inference.weights_at == "staircase" and step < last:
            name = net.names[last - step - 1]
            turns[name] = gradients()[name], squares()[name]

    for step in range(num_steps):
        take_turn(step)
        new_weights = None
        if move_weights is not None:
            factor = 1.0 if strength is None else 1.0 / strength
            new_weights = move_weights(_combined(gradients(), factor), squares())
        if in_errors:
            moved = mover.step(
                [errors[i] for i in free], lambda v: error_slopes(dict(zip(free, v, strict=True)))
            )
            errors = dict(zip(free, moved, strict=True))
            states = rebuilt(errors)
        elif inference.sweep == "gauss_seidel":
            for position in reversed(range(len(free))):
                i = free[position]
                (slope,) = slopes(states, [i])
                states[i] = mover.one(position, states[i], slope)
        else:
            for i, value in zip(free, mover.step([states[i] for i in free], slopes_at), strict=True):
                states[i] = value
        weights = weights if new_weights is None else new_weights
        float_output()
        history.append(snapshot())
        if inference.dynamics == "langevin" and step >= inference.burn_in:
            samples.append(gradients())
    take_turn(num_steps)

    found = gradients()
    if samples:
        found = {
            name: {key: torch.stack([s[name][key] for s in samples]).mean(0) for key in layer}
            for name, layer in found.items()
        }
    ends = squares()
    if turns:
        found, ends = ({name: turns[name][which] for name in net.names} for which in (0, 1))
    activities, all_errors, values = zip(*history, strict=True)
    return Relaxed(list(activities), list(all_errors), torch.stack(values), found, ends, weights)  # pyright: ignore


class _Mover:
    """Moves variables along their slopes by the rule of dynamics, with a state of its own."""

    def __init__(self, inference: Inference, values: list[Tensor], draws: list[Callable[[], Tensor]]) -> None:
        self.inference, self.draws = inference, draws
        self.velocity = [torch.zeros_like(value) for value in values]
        self.arrived = [False] * len(values)
        self.factor = torch.ones(len(values[0]) if values else 1, 1, dtype=torch.float64)
        self.leaves = [value.clone() for value in values]
        self.optimisers = [
            torch.optim.Adam([leaf], inference.rate, inference.betas, 1e-8, foreach=False)
            for leaf in self.leaves
        ]

    def step(self, values: list[Tensor], slopes: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """All of them at once."""
        if self.inference.dynamics == "heun":
            return self._heun(values, slopes)
        return [self.one(i, v, g) for i, (v, g) in enumerate(zip(values, slopes(values), strict=True))]

    def one(self, i: int, value: Tensor, slope: Tensor) -> Tensor:
        knobs = self.inference
        arrives = not self.arrived[i] and bool(slope.any())
        self.arrived[i] = self.arrived[i] or arrives
        rate = knobs.rate * (knobs.wave_boost if arrives else 1.0)
        if knobs.dynamics == "adam":
            self.leaves[i].copy_(value)
            self.leaves[i].grad = slope
            self.optimisers[i].param_groups[0]["lr"] = rate
            self.optimisers[i].step()
            return self.leaves[i].clone()
        self.velocity[i] = knobs.momentum * self.velocity[i] + slope
        moved = value - rate * self.velocity[i]
        if knobs.dynamics == "langevin":
            moved = moved + (2.0 * rate * knobs.temperature) ** 0.5 * self.draws[i]()
        return moved

    def _heun(self, values: list[Tensor], slopes: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """Trial by Euler, then the mean of both slopes; half their difference is the error of the step."""
        if not values:
            return []
        h = self.inference.rate * self.factor.to(values[0].dtype)
        first = slopes(values)
        second = slopes([v - h * g for v, g in zip(values, first, strict=True)])
        off = torch.cat([0.5 * h * (b - a) for a, b in zip(first, second, strict=True)], -1)
        excess = off.square().mean(-1, keepdim=True).sqrt() / self.inference.step_tolerance
        taken = (excess <= 1.0).to(h.dtype)
        moved = [v - taken * 0.5 * h * (a + b) for v, a, b in zip(values, first, second, strict=True)]
        self.factor = self.factor * (0.9 / excess.clamp_min(1e-30).sqrt()).clamp(0.2, 5.0)
        return moved


def optimiser_of(rule: Learning, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """torch's own optimiser of a learning rule."""
    if isinstance(rule, SGD):
        return torch.optim.SGD(
            parameters, lr=rule.rate, momentum=rule.momentum, weight_decay=rule.weight_decay, foreach=False
        )
    kind = torch.optim.AdamW if isinstance(rule, AdamW) else torch.optim.Adam
    return kind(
        parameters,
        lr=rule.rate,
        betas=rule.betas,
        eps=rule.epsilon,
        weight_decay=rule.weight_decay,
        foreach=False,
    )


def train(
    net: Network,
    weights: Tree,
    batches: Sequence[Mapping[str, Tensor]],
    inference: Inference,
    rule: Learning,
    seeds: Sequence[int] | None = None,
) -> list[tuple[Tree, Relaxed]]:
    """Learning steps on the batches: after each the weights, and the relaxation they came from.

    Weights move by torch.optim, at the rate of the rule's schedule; a learned variance moves by v <- v +
    adaptation (mean e^2 - v), the mean over the units too where it is one for all. A nudge grows to its final
    strength in equal parts. With `initial="carried"` a batch starts where the one before ended, the first
    one at its predictions.
    """
    tree = {name: {key: value.clone() for key, value in layer.items()} for name, layer in weights.items()}
    leaves = [value for layer in without_variances(tree).values() for value in layer.values()]
    optimiser = optimiser_of(rule, leaves)

    def learn(gradients: Tree, squares: Tensors) -> Tree:
        for name, layer in gradients.items():
            for key, gradient in layer.items():
                tree[name][key].grad = gradient.clone()
        optimiser.step()
        for name, layer in zip(net.names, net.layers, strict=True):
            if isinstance(layer.energy, Gaussian) and layer.energy.learned is not None:
                aim = squares[name].mean() if layer.energy.learned == "scalar" else squares[name]
                variance = tree[name]["variance"]
                variance.copy_((variance + layer.energy.adaptation * (aim - variance)).clamp_min(1e-6))
        return {name: {key: value.clone() for key, value in layer.items()} for name, layer in tree.items()}

    found: list[tuple[Tree, Relaxed]] = []
    carried: Tensors = {}
    plain = replace(inference, initial="feedforward") if inference.initial == "carried" else inference
    for number, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = rule.rate * rule.schedule.factor(number, len(batches))
        strength = None
        if inference.nudge is not None and inference.nudge.final_beta is not None:
            share = number / max(1, len(batches) - 1)
            strength = inference.nudge.beta + share * (inference.nudge.final_beta - inference.nudge.beta)
        now = {name: {key: value.clone() for key, value in layer.items()} for name, layer in tree.items()}
        mover = learn if inference.weights_at == "every_step" else None
        seed = seeds[number] if seeds else 0
        relaxed = relax(net, now, batch, plain, carried, seed, strength, mover)
        if mover is None:
            learn(relaxed.gradients, relaxed.squares)
        if inference.initial == "carried":
            free = [name for name in net.names if name not in batch]
            carried = {name: relaxed.activities[-1][name] for name in free}
        after = {name: {key: value.clone() for key, value in layer.items()} for name, layer in tree.items()}
        found.append((after, relaxed))
    return found


def _slopes(total: Any, leaves: list[Tensor]) -> list[Tensor]:
    if not leaves:
        return []
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, found, strict=True)
    ]


def backprop_oracle(
    net: Network, weights: Tree, inputs: Tensor, targets: Tensor
) -> tuple[Tree, list[Tensor]]:
    """Backpropagation: (d mean_B F_L / dW of the plain feedforward pass, [-dF_L/dmu_l per sample, l = 1..L]).

    The second, delta_l, is what the errors of E2 and E4 become; [B, units], of a categorical output the
    negative derivative with respect to its logits.
    """
    leaves = {
        name: {key: value.clone().requires_grad_() for key, value in layer.items()}
        for name, layer in weights.items()
    }
    nodes = [inputs]
    for index in range(1, len(net.layers) + 1):
        nodes.append(predicted(net, leaves, index, nodes[-1]))
        nodes[-1].retain_grad()
    energy_of(net, len(net.layers), targets, nodes[-1], leaves).mean().backward()
    gradients: Tree = {
        name: {key: _grad(value) for key, value in layer.items()}
        for name, layer in without_variances(leaves).items()
    }
    return gradients, [-_grad(node) * len(inputs) for node in nodes[1:]]


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


# --- comparisons --------------------------------------------------------------------------------------------


def assert_near(actual: Tensor, expected: Tensor, bound: float, what: str = "") -> None:
    """Largest absolute difference at most `bound`; finite, equal in shape and dtype."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
    difference = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert difference <= bound, f"{what}: differs by {difference:.3e}, allowed {bound:.3e}"


def assert_trees_near(actual: Tree, expected: Tree, bound: float, relative: bool = False) -> None:
    """Every tensor of two trees; with `relative` the bound is a multiple of its own largest entry."""
    assert {k: set(v) for k, v in actual.items()} == {k: set(v) for k, v in expected.items()}
    for name, layer in expected.items():
        for key, values in layer.items():
            scale = values.abs().max().item() if relative else 1.0
            assert_near(actual[name][key], values, bound * scale, f"{name}/{key}")


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit (as `torch.equal`, but telling -0 from 0)."""
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[a.dtype]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
