"""What the tests share: the tables of networks, settings and learning rules, and predictive coding once more.

A new network, setting or rule is tested by adding one row to its table.

`relax` is the oracle. It is written from the equations of docs/mathematics.md and shares no code with pctt:
activities are kept as they are, every prediction is computed in full at every step, and every derivative,
with respect to activities and to weights, is autograd's, of the summed energy. Only the description of the
network (`Network`, `Dense`, `Gaussian`) and of the settings (`Inference`) is read from pctt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    WarmupCosine,
    chain,
)

Tensors = dict[str, Tensor]
Tree = dict[str, dict[str, Tensor]]

# --- tables -------------------------------------------------------------------------------------------------

HIDDEN_ACTIVATIONS = ("identity", "tanh", "relu", "leaky_relu", "sigmoid", "gelu", "silu", "hard_tanh")
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
}

LEARNINGS: dict[str, SGD | Adam | AdamW] = {
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
            key: (torch.randn(*shape, generator=source, dtype=torch.float64) * _deviation(shape, gain)).to(
                dtype
            )
            for key, shape in shapes.items()
        }
        for name, shapes in net.weight_shapes().items()
    }


def _deviation(shape: tuple[int, ...], gain: float) -> float:
    return gain / shape[0] ** 0.5 if len(shape) == 2 else 0.3


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
    gradients: d mean_B F / dW at the end, tree like the weights.
    """

    activities: list[Tensors]
    errors: list[Tensors]
    energies: Tensor
    gradients: Tree


def predicted(net: Network, weights: Tree, index: int, source: Tensor) -> Tensor:
    """mu_l, or of a categorical layer its logits: what layer `index` (1..L) makes of x_{l-1}."""
    layer, parameters = net.layers[index - 1], weights[net.names[index - 1]]
    function = ORACLE_FUNCTIONS[layer.activation]
    if layer.activate == "input":
        drive = function(source) @ parameters["weight"]
        return drive + parameters["bias"] if layer.bias else drive
    drive = source @ parameters["weight"]
    drive = drive + parameters["bias"] if layer.bias else drive
    return drive if isinstance(layer.energy, Categorical) else function(drive)


def energy_of(net: Network, index: int, target: Tensor, prediction: Tensor) -> Tensor:
    """F_l per sample, [B]: of x_l = `target` under what `predicted` gave."""
    energy = net.layers[index - 1].energy
    if isinstance(energy, Categorical):
        return torch.xlogy(target, target).sum(-1) - (target * torch.log_softmax(prediction, -1)).sum(-1)
    precision = torch.as_tensor(energy.precision, dtype=target.dtype).expand(target.shape[-1])
    return 0.5 * ((target - prediction) ** 2 * precision).sum(-1) - 0.5 * precision.log().sum()


def mean_of(net: Network, index: int, prediction: Tensor) -> Tensor:
    return prediction.softmax(-1) if isinstance(net.layers[index - 1].energy, Categorical) else prediction


def feedforward(net: Network, weights: Tree, given: Mapping[str, Tensor]) -> list[Tensor]:
    """x_0 .. x_L: given nodes as they are, the others at their predictions; an input not given at zero."""
    batch = next(iter(given.values()))
    nodes = [given.get("input", batch.new_zeros(len(batch), net.input))]
    for index, name in enumerate(net.names, start=1):
        nodes.append(given.get(name, mean_of(net, index, predicted(net, weights, index, nodes[-1]))))
    return nodes


def relax(
    net: Network,
    weights: Tree,
    clamp: Mapping[str, Tensor],
    inference: Inference,
    initial: Mapping[str, Tensor] | None = None,
) -> Relaxed:
    """Predictive coding with plain activities, in the dtype of `weights`.

    Every free node descends the derivative of the batch sum of F, from old values (Jacobi). For fixed
    predictions F is taken between the activities and the predictions of the initial activities: the node's
    own error moves with it, its child's derivative is taken at the initial activity (Millidge et al. 2022). A
    free categorical node is always at its prediction.
    """
    last = len(net.layers)
    states = [values.clone() for values in feedforward(net, weights, {**clamp, **(initial or {})})]
    start = [values.clone() for values in states]
    fixed = inference.prediction == "fixed"
    floating = isinstance(net.layers[-1].energy, Categorical) and net.output not in clamp
    free = [i for i, name in enumerate(net.nodes) if name not in clamp and not (floating and i == last)]
    velocity = [torch.zeros_like(values) for values in states]

    def energies(nodes: list[Tensor], sources: list[Tensor], tree: Tree) -> list[Tensor]:
        predictions = [predicted(net, tree, i, sources[i - 1]) for i in range(1, last + 1)]
        return [energy_of(net, i, nodes[i], predictions[i - 1]) for i in range(1, last + 1)]

    def float_output() -> None:
        if floating:
            source = start if fixed else states
            states[last] = mean_of(net, last, predicted(net, weights, last, source[last - 1]))

    def snapshot() -> tuple[Tensors, Tensors, Tensor]:
        sources = start if fixed else states
        errors = {
            name: states[i] - mean_of(net, i, predicted(net, weights, i, sources[i - 1]))
            for i, name in enumerate(net.names, start=1)
        }
        values = torch.stack([energy.mean() for energy in energies(states, sources, weights)])
        return dict(zip(net.nodes, (s.clone() for s in states), strict=True)), errors, values

    float_output()
    history = [snapshot()]
    for _ in range(inference.num_steps):
        nodes = [values.clone().requires_grad_() for values in states]
        sources = [values.clone().requires_grad_() for values in start] if fixed else nodes
        total = sum(energy.sum() for energy in energies(nodes, sources, weights))
        slopes = _slopes(total, [nodes[i] for i in free])
        if fixed:
            through = _slopes(total, [sources[i] for i in free])
            slopes = [own + child for own, child in zip(slopes, through, strict=True)]
        for i, slope in zip(free, slopes, strict=True):
            velocity[i] = inference.momentum * velocity[i] + slope
            states[i] = states[i] - inference.rate * velocity[i]
        float_output()
        history.append(snapshot())

    leaves = {
        name: {key: value.clone().requires_grad_() for key, value in layer.items()}
        for name, layer in weights.items()
    }
    mean = sum(energy.mean() for energy in energies(states, start if fixed else states, leaves))
    flat = [value for layer in leaves.values() for value in layer.values()]
    found = iter(_slopes(mean, flat))
    gradients = {name: {key: next(found) for key in layer} for name, layer in leaves.items()}
    activities, errors, values = zip(*history, strict=True)
    return Relaxed(list(activities), list(errors), torch.stack(values), gradients)


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
    energy_of(net, len(net.layers), targets, nodes[-1]).mean().backward()
    gradients: Tree = {
        name: {key: _grad(value) for key, value in layer.items()} for name, layer in leaves.items()
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
