"""Networks of any wiring for the tests, and predictive coding on them once more.

`GRAPHS` is a table of networks; beside each layer stands what it computes, as a function written with torch
alone. `relax` and `train` are the oracles: they keep plain activities, compute every prediction in full at
every step by those functions, and take every derivative by autograd of the summed energy. From pctt they read
descriptions only: shapes, the order of the nodes, energies and settings.

A new kind of wiring is tested by adding one row to the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from helpers import (
    FULL,
    ORACLE_FUNCTIONS,
    Relaxed,
    Tensors,
    Tree,
    _combined,
    _Mover,
    _slopes,
    generator,
    noise,
    optimiser_of,
)
from torch import Tensor
from torch.nn import functional

from pctt import (
    Add,
    Affine,
    Attend,
    AvgPool2d,
    Bias,
    Block,
    Categorical,
    Concat,
    Conv2d,
    ConvTranspose2d,
    Dense,
    Embedding,
    Flatten,
    Gaussian,
    Inference,
    MaxPool2d,
    Multiply,
    Network,
    Normalise,
    NormaliseBatch,
    Reshape,
    Scale,
    Shift,
    Slice,
    Standardise,
    Step,
    graph,
)
from pctt.layers.maps import Function, Linear
from pctt.learning import Learning

Compute = Callable[..., Tensor]
"""(weights of the layer, *sources [B, *shape]) -> its prediction, or the logits of a categorical one"""


@dataclass(frozen=True, eq=False)
class Graph:
    """A network and what it computes.

    compute: per layer.    sources: per layer, what it reads.    shared: layers that use others' weights.
    numbers: roots that hold whole numbers below that.    clamped: what training holds at data.
    """

    net: Network
    compute: Mapping[str, Compute]
    sources: Mapping[str, tuple[str, ...]]
    shared: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    clamped: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.net.nodes, self.net.shapes, strict=True))

    def energy(self, name: str) -> Gaussian | Categorical:
        return self.net.layers[self.net.names.index(name)].energy

    @property
    def ahead(self) -> set[str]:
        """Nodes that close a cycle: some node no later than they are is predicted from them."""
        place = {name: number for number, name in enumerate(self.net.nodes)}
        return {s for name, sources in self.sources.items() for s in sources if place[s] >= place[name]}


def build(
    inputs: Mapping[str, Any],
    layers: Mapping[str, tuple[Any, ...]],
    numbers: Mapping[str, int] | None = None,
    clamped: Sequence[str] | None = None,
    **options: Any,
) -> Graph:
    """layers: {name: (layer, what it computes, *sources)}; of a Dense layer None, which says it itself."""
    net = graph(inputs, {name: (layer, *sources) for name, (layer, _, *sources) in layers.items()}, **options)
    compute = {
        name: function or dense(layer, sources) for name, (layer, function, *sources) in layers.items()
    }
    sources = {name: tuple(rest) for name, (_, _, *rest) in layers.items()}
    held = tuple(clamped) if clamped is not None else (*inputs, net.output)
    return Graph(net, compute, sources, options.get("shared", {}), numbers or {}, held)


def dense(layer: Dense, sources: Sequence[str]) -> Compute:
    """mu = f_out(s sum over sources of f_in(x) W + b) + x, every source flat."""
    function = ORACLE_FUNCTIONS[layer.activation]

    def compute(weights: Tensors, *nodes: Tensor) -> Tensor:
        drive = torch.zeros((), dtype=nodes[0].dtype)
        for name, node in zip(sources, nodes, strict=True):
            flat = node.reshape(len(node), -1)
            flat = function(flat) if layer.activate == "input" else flat
            drive = drive + layer.scale * (
                flat @ weights["weight" if len(sources) == 1 else f"weight.{name}"]
            )
        drive = drive + weights["bias"] if layer.bias else drive
        if layer.activate == "output" and not isinstance(layer.energy, Categorical):
            drive = function(drive)
        return drive + nodes[0] if layer.skip else drive

    return compute


def as_graph(net: Network) -> Network:
    """A chain of dense layers, wired as a graph."""
    below = ("input", *net.names[:-1])
    return graph(
        {"input": net.input},
        {n: (layer, b) for n, layer, b in zip(net.names, net.layers, below, strict=True)},
    )


# --- the table ----------------------------------------------------------------------------------------------


def _residual(w: Tensors, x: Tensor) -> Tensor:
    return x + torch.tanh(x @ w["weight.up"] + w["bias.up"]) @ w["weight.down"]


def _image(w: Tensors, x: Tensor) -> Tensor:
    drive = functional.conv2d(x, w["weight"], w["bias"], (2, 1), 1)
    return functional.max_pool2d(torch.tanh(drive), 2, 1)


def _decoder(w: Tensors, h: Tensor) -> Tensor:
    images = torch.tanh(h @ w["weight.linear1"] + w["bias.linear1"]).view(-1, 2, 2, 2)
    return functional.conv_transpose2d(
        images, w["weight.conv_transpose2d1"], w["bias.conv_transpose2d1"], 2, 1, 1
    )


def _tokens(w: Tensors, x: Tensor) -> Tensor:
    return w["weight"][x.long()] + w["bias"]


def _attention(w: Tensors, x: Tensor) -> Tensor:
    y = functional.layer_norm(x, x.shape[-1:]) * w["weight.norm"] + w["bias.norm"]
    heads = [(y @ w[f"weight.{n}"]).unflatten(2, (2, 2)).transpose(1, 2) for n in "qkv"]
    mixed = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    return x + mixed @ w["weight.o"]


ATTENTION = Block(
    [
        Normalise(),
        Step(Affine(), name="norm"),
        *(Step(Linear(4, bias=False), (2,), name) for name in "qkv"),
        Step(Attend(2, causal=True), (3, 4, 5)),
        Step(Linear(4, bias=False), name="o"),
        Step(Add(), (0, 7)),
    ]
)


def _gated(w: Tensors, cell: Tensor, h: Tensor, x: Tensor) -> Tensor:
    both = torch.cat([h, x], 1)
    gate = (both @ w["weight.gate"] + w["bias.gate"]).sigmoid()
    return gate * cell + (1 - gate) * torch.tanh(both @ w["weight.new"] + w["bias.new"])


GATED = Block(
    [
        Step(Concat(), (1, 2)),  # 3
        Step(Linear(3), (3,), "gate"),
        "sigmoid",  # 5
        Step(Multiply(), (5, 0)),
        Step(Scale(-1.0), (5,)),
        Shift(1.0),  # 8
        Step(Linear(3), (3,), "new"),
        "tanh",  # 10
        Step(Multiply(), (8, 10)),
        Step(Add(), (6, 11)),
    ]
)


def _lateral(w: Tensors, x: Tensor, h: Tensor) -> Tensor:
    return x @ w["weight.up"] + w["bias.up"] + torch.tanh(h) @ w["weight.lateral"]


def _channels(w: Tensors, x: Tensor) -> Tensor:
    mean, var = (w[f"running_{key}"].view(-1, 1, 1) for key in ("mean", "var"))
    y = (x - mean) / (var + 1e-5).sqrt() * w["weight.affine1"].view(-1, 1, 1)
    y = functional.conv2d(y, w["weight.conv2d1"], None, groups=2)
    return functional.avg_pool2d(functional.silu(y), 2, 1, 1)[:, 1:3]


def _batch_norm(w: Tensors, x: Tensor) -> Tensor:
    return torch.tanh(functional.batch_norm(x, None, None, w["weight"], w["bias"], True))


def _recurrent(w: Tensors, h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(h @ w["weight.h"] + x @ w["weight.x"] + w["bias"])


CELL = Block(
    [
        Step(Linear(4, bias=False), (0,), "h"),
        Step(Linear(4, bias=False), (1,), "x"),
        Step(Add(), (2, 3)),
        Bias(),
        "tanh",
    ]
)

GRAPHS: dict[str, Graph] = {
    "diamond": build(
        {"x": 4},
        {
            "a": (Dense(5, "tanh"), None, "x"),
            "b": (Dense(3, "gelu", activate="input"), None, "x"),
            "c": (Dense(4, "silu"), None, "a", "b"),
            "y": (Dense(3), None, "a", "c"),
        },
    ),
    # A node that the output is predicted from at two distances, a skip, an input that reaches the end.
    "shortcuts": build(
        {"x": 4},
        {
            "y": (Dense(3, "tanh"), None, "b", "x"),
            "b": (Dense(4, "tanh", activate="input", scale=0.5, skip=True), None, "a"),
            "a": (Dense(4, "sigmoid", scale=1.5), None, "x"),
        },
        output="y",
    ),
    "two roots, three leaves": build(
        {"x": 3, "z": 2},
        {
            "h": (Dense(4, "tanh"), None, "x", "z"),
            "y": (Dense(3), None, "h"),
            "side": (Dense(2, "tanh", activate="input"), None, "h", "z"),
            "label": (Dense(3, "softmax", energy=Categorical()), None, "h"),
        },
        clamped=("x", "y", "label"),
        output="y",
    ),
    "leaves without data": build(
        {"x": 3},
        {
            "h": (Dense(4, "tanh"), None, "x"),
            "g": (Dense(4, "tanh"), None, "h"),
            "free": (Dense(2, "silu"), None, "h", "g"),
            "floating": (Dense(3, "softmax", energy=Categorical()), None, "h", "g"),
            "y": (Dense(3), None, "g"),
        },
    ),
    "an output that others are predicted from": build(
        {"x": 3},
        {
            "h": (Dense(4, "tanh"), None, "x"),
            "y": (Dense(3, "tanh"), None, "h"),
            "z": (Dense(2, "gelu", activate="input"), None, "y", "h"),
            "v": (Dense(2), None, "y"),
        },
        clamped=("x", "y", "z"),
        output="y",
    ),
    "precisions": build(
        {"x": 3},
        {
            "a": (Dense(4, "tanh", energy=Gaussian(2.0)), None, "x"),
            "b": (Dense(4, "tanh", energy=Gaussian((0.5, 1.0, 2.0, 3.0))), None, "x", "a"),
            "c": (Dense(4, "gelu", activate="input", energy=Gaussian(FULL)), None, "a", "b"),
            "y": (Dense(3, energy=Gaussian((2.0, 0.25, 1.0))), None, "c", "a"),
        },
    ),
    "learned variances": build(
        {"x": 3},
        {
            "a": (Dense(4, "tanh", energy=Gaussian(2.0, "diagonal", 0.1)), None, "x"),
            "b": (
                Block([Linear(4), "gelu"], Gaussian(0.5, "scalar", 0.05)),
                lambda w, x: functional.gelu(x @ w["weight"] + w["bias"]),
                "a",
            ),
            "y": (Dense(3, energy=Gaussian((1.0, 2.0, 0.5), "diagonal", 0.1)), None, "b", "a"),
        },
    ),
    "residual blocks": build(
        {"x": 4},
        {
            "a": (
                Block(
                    [
                        Step(Linear(5), name="up"),
                        "tanh",
                        Step(Linear(4, bias=False), name="down"),
                        Step(Add(), (0, 3)),
                    ]
                ),
                _residual,
                "x",
            ),
            "b": (
                Block(
                    [
                        Step(Linear(5), name="up"),
                        "tanh",
                        Step(Linear(4, bias=False), name="down"),
                        Step(Add(), (0, 3)),
                    ]
                ),
                _residual,
                "a",
            ),
            "y": (Block([Slice(1, 4), "tanh"]), lambda w, x: torch.tanh(x[:, 1:4]), "b"),
        },
    ),
    "gates": build(
        {"cell": 3, "x": 2},
        {
            "h": (Dense(3, "tanh"), None, "x"),
            "c": (GATED, _gated, "cell", "h", "x"),
            "squared": (Block(Step(Multiply(), (0, 0))), lambda w, x: x * x, "c"),
            "y": (
                Block(Step(Add((1, -1)))),
                lambda w, a, b: a - b,
                "squared",
                "c",
            ),
        },
    ),
    "images": build(
        {"x": (1, 5, 4)},
        {
            "a": (Block([Conv2d(2, 3, (2, 1), 1), "tanh", MaxPool2d(2, 1)]), _image, "x"),
            "h": (Dense(4, "tanh"), None, "a"),
            "y": (
                Block(
                    [Linear(8), "tanh", Reshape((2, 2, 2)), ConvTranspose2d(1, 3, 2, 1, 1)],
                ),
                _decoder,
                "h",
            ),
        },
    ),
    "channels": build(
        {"x": (2, 3, 4)},
        {
            "a": (
                Block(
                    [
                        Standardise(),
                        Affine(0, bias=False),
                        Conv2d(4, 1, groups=2, bias=False),
                        "silu",
                        AvgPool2d(2, 1, 1),
                        Slice(1, 3),
                    ]
                ),
                _channels,
                "x",
            ),
            "b": (Block([Flatten(), Linear(3)]), lambda w, x: x.flatten(1) @ w["weight"] + w["bias"], "a"),
            "y": (Block([Normalise(), "tanh"]), lambda w, x: torch.tanh(functional.layer_norm(x, (3,))), "b"),
        },
    ),
    "batch normalisation": build(
        {"x": (2, 2, 3)},
        {
            "a": (Block([Conv2d(3, 2)]), lambda w, x: functional.conv2d(x, w["weight"], w["bias"]), "x"),
            "b": (Block([NormaliseBatch(), Affine(0), "tanh"]), _batch_norm, "a"),
            "y": (Dense(2), None, "b"),
        },
    ),
    "tokens": build(
        {"x": 3},
        {
            "e": (Block([Embedding(7, 4), Bias(2)]), _tokens, "x"),
            "m": (ATTENTION, _attention, "e"),
            "y": (
                Block([Linear(7), "softmax"], Categorical()),
                lambda w, x: x @ w["weight"] + w["bias"],
                "m",
            ),
        },
        numbers={"x": 7},
    ),
    "logits that are a node": build(
        {"x": 3},
        {
            "a": (Dense(4, "tanh"), None, "x"),
            "z": (Dense(3), None, "a"),
            "y": (Block(["softmax"], Categorical()), lambda w, z: z, "z"),
        },
    ),
    "a softmax within": build(
        {"x": 3},
        {
            "a": (Dense(4, "softmax"), None, "x"),
            "y": (Dense(3, "tanh"), None, "a"),
        },
    ),
    "a recurrent network unrolled": build(
        {"h0": 4, "x1": 2, "x2": 2, "x3": 2},
        {
            "h1": (CELL, _recurrent, "h0", "x1"),
            "h2": (CELL, _recurrent, "h1", "x2"),
            "h3": (CELL, _recurrent, "h2", "x3"),
            "y1": (Dense(2), None, "h1"),
            "y3": (Dense(2), None, "h3"),
        },
        shared={"h2": "h1", "h3": "h1", "y3": "y1"},
        clamped=("h0", "x1", "x2", "x3", "y1", "y3"),
    ),
    "a cycle": build(
        {"x": 3},
        {
            "a": (Dense(4, "tanh"), None, "x", "b"),
            "b": (Dense(4, "tanh", activate="input"), None, "a", "c"),
            "c": (Dense(3, "silu"), None, "b"),
            "y": (Dense(2), None, "c"),
        },
    ),
    "lateral": build(
        {"x": 3},
        {
            "h": (
                Block(
                    [
                        Step(Linear(4), (0,), "up"),
                        Step(Function("tanh"), (1,)),
                        Step(Linear(4, False, "off_diagonal"), name="lateral"),
                        Step(Add(), (2, 4)),
                    ]
                ),
                _lateral,
                "x",
                "h",
            ),
            "y": (Dense(2), None, "h"),
        },
    ),
    "a node predicted from itself": build(
        {"x": 3}, {"h": (Dense(4, "tanh"), None, "x", "h"), "y": (Dense(2), None, "h")}
    ),
    "all to all, without roots": build(
        {},
        {
            "a": (Dense(3, "tanh", activate="input"), None, "b", "c"),
            "b": (Dense(2, "tanh", activate="input"), None, "c", "a"),
            "c": (Dense(4, "tanh", activate="input"), None, "a", "b"),
        },
        clamped=("b", "c"),
    ),
    "drawn connections": build(
        {"x": 5},
        {
            "h": (
                Block([Linear(6, mask=0.4, seed=3), "tanh"]),
                lambda w, x: torch.tanh(x @ w["weight"] + w["bias"]),
                "x",
            ),
            "y": (Dense(2), None, "h"),
        },
    ),
}

ACYCLIC = {name: case for name, case in GRAPHS.items() if not case.ahead}


def accepts(case: Graph, inference: Inference) -> bool:
    """Whether a graph takes the settings, with its own clamp."""
    nudge, output = inference.nudge, case.net.output
    if inference.weights_at == "staircase" or (case.ahead and inference.variables == "errors"):
        return False
    if nudge is None:
        return True
    by_clamp = (nudge.style, nudge.sign) == ("clamp", "positive")
    if output in case.ahead and nudge.style == "clamp":
        return False
    return output in case.clamped and (by_clamp or not isinstance(case.energy(output), Categorical))


# --- data ---------------------------------------------------------------------------------------------------


def graph_weights(net: Network, seed: int = 0, gain: float = 1.0) -> Tree:
    """Normal weights of standard deviation gain / sqrt(numbers read); biases too. Masks are as drawn."""
    source = generator(seed)

    def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(*shape, generator=source, dtype=torch.float64)
        if key.startswith(("variance", "running_var")):
            return (0.3 * values).exp()
        if key.startswith("weight") and len(shape) > 1:
            return values * gain / (shape[0] if len(shape) == 2 else prod(shape[1:])) ** 0.5
        return 1.0 + 0.3 * values if key.startswith("weight") else 0.3 * values

    weights = {
        name: {key: drawn(key, shape) for key, shape in shapes.items()}
        for name, shapes in net.weight_shapes().items()
    }
    for name, layer in zip(net.names, net.layers, strict=True):
        for step in layer.steps if isinstance(layer, Block) else ():
            if isinstance(step.map, Linear) and step.map.mask is not None and name in weights:
                key = f"weight.{step.name}" if step.name else "weight"
                weights[name][key] *= mask_of(step.map, weights[name][key].shape)
    return weights


def mask_of(entry: Linear, shape: Sequence[int]) -> Tensor:
    if entry.mask == "off_diagonal":
        return torch.tensor([[float(i != j) for j in range(shape[1])] for i in range(shape[0])]).double()
    draws = torch.rand(*shape, generator=generator(entry.seed), dtype=torch.float64)
    return torch.where(draws < entry.mask, 1.0, 0.0).double()


def graph_values(case: Graph, batch: int = 3, seed: int = 1) -> Tensors:
    """An activity for every node, [batch, *shape]; of a categorical one soft distributions."""
    source, values = generator(seed), Tensors()
    for name, shape in case.shapes.items():
        values[name] = torch.randn(batch, *shape, generator=source, dtype=torch.float64)
        if name in case.numbers:
            values[name] = torch.randint(case.numbers[name], (batch, *shape), generator=source).double()
        if name in case.net.names and isinstance(case.energy(name), Categorical):
            values[name] = values[name].softmax(-1)
    return values


def held(case: Graph, batch: int = 3, seed: int = 1) -> Tensors:
    """The clamp of training."""
    values = graph_values(case, batch, seed)
    return {name: values[name] for name in case.clamped}


def trained(case: Graph, weights: Tree) -> Tree:
    """The weights that descend a gradient."""
    still = ("variance", "running_mean", "running_var")
    return {
        name: {key: values for key, values in layer.items() if not key.startswith(still)}
        for name, layer in weights.items()
    }


# --- the oracle ---------------------------------------------------------------------------------------------


def predicted(case: Graph, weights: Tree, name: str, nodes: Mapping[str, Tensor]) -> Tensor:
    """mu of a layer, or of a categorical one its logits, [B, units]; nodes [B, units] too."""
    shapes = case.shapes
    sources = [nodes[source].view(-1, *shapes[source]) for source in case.sources[name]]
    parameters = weights.get(case.shared.get(name, name), {})
    return case.compute[name](parameters, *sources).flatten(1)


def mean_of(case: Graph, name: str, prediction: Tensor) -> Tensor:
    if not isinstance(case.energy(name), Categorical):
        return prediction
    return prediction.unflatten(1, case.shapes[name]).softmax(-1).flatten(1)


def energy_of(case: Graph, name: str, target: Tensor, prediction: Tensor, weights: Tree) -> Tensor:
    """F of one node per sample, [B]."""
    energy = case.energy(name)
    if isinstance(energy, Categorical):
        logs = prediction.unflatten(1, case.shapes[name]).log_softmax(-1).flatten(1)
        return (torch.xlogy(target, target) - target * logs).sum(-1)
    error = target - prediction
    precision = torch.as_tensor(energy.precision, dtype=target.dtype)
    if energy.learned is not None:
        precision = 1.0 / weights[name]["variance"].detach()
    if precision.dim() == 2:
        return 0.5 * torch.einsum("bi,ij,bj->b", error, precision, error) - 0.5 * torch.logdet(precision)
    precision = precision.expand(target.shape[-1])
    return 0.5 * (error**2 * precision).sum(-1) - 0.5 * precision.log().sum()


def total_energy(case: Graph, weights: Tree, nodes: Mapping[str, Tensor]) -> Tensor:
    """F per sample, [B], of activities [B, *shape]."""
    flat = {name: values.flatten(1) for name, values in nodes.items()}
    terms = [energy_of(case, n, flat[n], predicted(case, weights, n, flat), weights) for n in case.net.names]
    return torch.stack(terms).sum(0)


def relax(
    case: Graph,
    weights: Tree,
    clamp: Mapping[str, Tensor],
    inference: Inference,
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    strength: float | None = None,
    move_weights: Callable[[Tree, Tensors], Tree] | None = None,
) -> Relaxed:
    """Predictive coding with plain activities; as `helpers.relax`, on any wiring."""
    nudge = inference.nudge
    if nudge is None:
        return _relax(case, weights, clamp, inference, initial or {}, seed, None, move_weights)
    one = nudge.beta if strength is None else abs(strength)
    signs = {"positive": (1.0,), "negative": (-1.0,), "centred": (1.0, -1.0)}[nudge.sign]
    found = [
        _relax(case, weights, clamp, inference, initial or {}, seed, sign * one, move_weights)
        for sign in signs
    ]
    gradients = _combined(found[0].gradients, signs[0] / one)
    if len(signs) == 2:
        gradients = _combined(found[0].gradients, 0.5 / one, found[1].gradients, -0.5 / one)
    return replace(found[0], gradients=gradients)


def _relax(
    case: Graph,
    weights: Tree,
    clamp: Mapping[str, Tensor],
    inference: Inference,
    initial: Mapping[str, Tensor],
    seed: int,
    strength: float | None,
    move_weights: Callable[[Tree, Tensors], Tree] | None,
) -> Relaxed:
    net, output, nudge = case.net, case.net.output, inference.nudge
    fixed, in_errors = inference.prediction == "fixed", inference.variables == "errors"
    fixed_data = {name: values.flatten(1) for name, values in clamp.items()}
    goal = fixed_data.pop(output) if nudge is not None else torch.empty(0)
    rows = len(next(iter({**clamp, **initial}.values())))
    floating = [
        name for name in net.names if name not in clamp and isinstance(case.energy(name), Categorical)
    ]

    # Where the nodes start, and which are free.
    given = {**fixed_data, **{name: values.flatten(1) for name, values in initial.items()}}
    states = Tensors()
    for name, units in zip(net.nodes, net.widths, strict=True):
        at_zero = name not in net.names or name in case.ahead or inference.initial == "zeros"
        if name in given:
            states[name] = given[name].clone()
        elif at_zero and name not in floating:
            states[name] = torch.zeros(rows, units, dtype=torch.float64)
    for name in net.names:
        held_by_nudge = nudge is not None and nudge.style == "clamp" and name == output
        if name in states and not held_by_nudge:
            continue
        states[name] = mean_of(case, name, predicted(case, weights, name, states))
        if held_by_nudge:
            assert strength is not None
            states[name] = fixed_data[name] = states[name] + strength * (goal - states[name])
    states = {name: states[name] for name in net.nodes}
    start = {name: values.clone() for name, values in states.items()}
    free = [name for name in net.nodes if name not in fixed_data and name not in floating]

    # Those of floating nodes are 0, their slopes a rounding of it, which Adam would make a step of.
    counted = [name for name in net.names if name not in floating]

    def energies(nodes: Tensors, tree: Tree, names: Sequence[str] = counted) -> list[Tensor]:
        sources = start if fixed else nodes
        return [energy_of(case, n, nodes[n], predicted(case, tree, n, sources), tree) for n in names]

    def pulled(nodes: Tensors) -> Tensor:
        if nudge is None or nudge.style != "loss":
            return torch.zeros((), dtype=torch.float64)
        assert strength is not None
        return 0.5 * strength * (goal - nodes[output]).square().sum()

    def float_leaves(nodes: Tensors) -> None:
        sources = start if fixed else nodes
        for name in floating:
            nodes[name] = mean_of(case, name, predicted(case, weights, name, sources)).detach()

    def slopes(nodes: Tensors, names: Sequence[str]) -> list[Tensor]:
        """dF/dx of those nodes."""
        nodes = dict(nodes)
        float_leaves(nodes)
        leaves = {name: values.clone().requires_grad_() for name, values in nodes.items()}
        total: Any = sum(energy.sum() for energy in energies(leaves, weights)) + pulled(leaves)
        own = _slopes(total, [leaves[name] for name in names])
        if not fixed:
            return own
        sources = {name: values.clone().requires_grad_() for name, values in start.items()}
        total = sum(
            energy_of(case, n, nodes[n], predicted(case, weights, n, sources), weights).sum() for n in counted
        )
        through = _slopes(total, [sources[name] for name in names])
        return [a + b for a, b in zip(own, through, strict=True)]

    def rebuilt(errors: Mapping[str, Tensor]) -> Tensors:
        """The activities that belong to the errors of the free nodes."""
        nodes = Tensors()
        for name in net.nodes:
            if name in net.names and name not in fixed_data:
                mean = mean_of(case, name, predicted(case, weights, name, nodes))
                nodes[name] = mean if name in floating else mean + errors[name]
            else:
                nodes[name] = errors.get(name, start[name])
        return nodes

    def error_slopes(values: list[Tensor]) -> list[Tensor]:
        leaves = {n: value.clone().requires_grad_() for n, value in zip(free, values, strict=True)}
        nodes = rebuilt(leaves)
        total: Any = sum(energy.sum() for energy in energies(nodes, weights)) + pulled(nodes)
        return _slopes(total, list(leaves.values()))

    def errors_now() -> Tensors:
        sources = start if fixed else states
        return {n: states[n] - mean_of(case, n, predicted(case, weights, n, sources)) for n in net.names}

    def snapshot() -> tuple[Tensors, Tensors, Tensor]:
        shapes = case.shapes
        values = torch.stack([energy.mean() for energy in energies(states, weights, net.names)]).detach()
        shaped = [
            {name: tensor.detach().clone().view(-1, *shapes[name]) for name, tensor in tensors.items()}
            for tensors in (states, errors_now())
        ]
        return shaped[0], shaped[1], values

    def gradients() -> Tree:
        leaves = {
            name: {key: value.clone().requires_grad_() for key, value in layer.items()}
            for name, layer in trained(case, weights).items()
        }
        tree = {name: {**weights[name], **layer} for name, layer in leaves.items()}
        mean: Any = sum(energy.mean() for energy in energies(states, tree))
        found = iter(_slopes(mean, [value for layer in leaves.values() for value in layer.values()]))
        tree = {name: {key: next(found) for key in layer} for name, layer in leaves.items()}
        for name, layer in zip(net.names, net.layers, strict=True):
            for step in layer.steps if isinstance(layer, Block) else ():
                if isinstance(step.map, Linear) and step.map.mask is not None and name in tree:
                    key = f"weight.{step.name}" if step.name else "weight"
                    tree[name][key] = tree[name][key] * mask_of(step.map, tree[name][key].shape)
        return tree

    def squares() -> Tensors:
        return {name: error.square().mean(0) for name, error in errors_now().items()}

    float_leaves(states)
    places = {name: number for number, name in enumerate(net.nodes)}
    mover = _Mover(inference, [states[n] for n in free], [noise(seed, places[n], states[n]) for n in free])
    variables = [errors_now()[n] if n in net.names else states[n] for n in free] if in_errors else []
    history, samples = [snapshot()], []
    for step in range(inference.num_steps):
        new_weights = None
        if move_weights is not None:
            factor = 1.0 if strength is None else 1.0 / strength
            new_weights = move_weights(_combined(gradients(), factor), squares())
        if in_errors:
            variables = mover.step(variables, error_slopes)
            states = rebuilt(dict(zip(free, variables, strict=True)))
        elif inference.sweep == "gauss_seidel":
            for number in reversed(range(len(free))):
                (slope,) = slopes(states, [free[number]])
                states[free[number]] = mover.one(number, states[free[number]], slope)
        else:
            before = states
            moved = mover.step(
                [before[n] for n in free],
                lambda v, before=before: slopes({**before, **dict(zip(free, v, strict=True))}, free),
            )
            states = {**states, **dict(zip(free, moved, strict=True))}
        weights = weights if new_weights is None else new_weights
        float_leaves(states)
        history.append(snapshot())
        if inference.dynamics == "langevin" and step >= inference.burn_in:
            samples.append(gradients())
    found = gradients()
    if samples:
        found = {
            name: {key: torch.stack([s[name][key] for s in samples]).mean(0) for key in layer}
            for name, layer in found.items()
        }
    activities, errors, values = (list(part) for part in zip(*history, strict=True))
    return Relaxed(activities, errors, torch.stack(values), found, squares(), weights)


def train(
    case: Graph,
    weights: Tree,
    batches: Sequence[Mapping[str, Tensor]],
    inference: Inference,
    rule: Learning,
) -> list[tuple[Tree, Relaxed]]:
    """Learning steps on the batches by torch.optim: after each the weights, and the relaxation before it."""
    tree = {name: {key: value.clone() for key, value in layer.items()} for name, layer in weights.items()}
    leaves = [value for layer in trained(case, tree).values() for value in layer.values()]
    optimiser = optimiser_of(rule, leaves)

    def copied() -> Tree:
        return {name: {key: value.clone() for key, value in layer.items()} for name, layer in tree.items()}

    def learn(gradients: Tree, squares: Tensors) -> Tree:
        for name, layer in gradients.items():
            for key, gradient in layer.items():
                tree[name][key].grad = gradient.clone()
        optimiser.step()
        for name in case.net.names:
            energy = case.energy(name)
            if isinstance(energy, Gaussian) and energy.learned is not None:
                aim = squares[name].mean() if energy.learned == "scalar" else squares[name]
                variance = tree[name]["variance"]
                variance.copy_((variance + energy.adaptation * (aim - variance)).clamp_min(1e-6))
        return copied()

    found: list[tuple[Tree, Relaxed]] = []
    for batch in batches:
        moves = learn if inference.weights_at == "every_step" else None
        relaxed = relax(case, copied(), batch, inference, move_weights=moves)
        if moves is None:
            learn(relaxed.gradients, relaxed.squares)
        found.append((copied(), relaxed))
    return found
