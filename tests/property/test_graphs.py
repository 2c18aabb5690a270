"""Any graph, any query: gradients of fixed prediction are those of backpropagation, energies fall, and
states are those of plain predictive coding by autograd.

Hypothesis draws the wiring, the layers and the switches, a seeded generator the numbers. Tolerance in fp64,
with u = 1.1e-16: at most 12 layers of sums of at most 36 terms, of numbers of order 1, over at most 5 steps;
a number is off by at most 12 * 36 * 5 * 2u = 5e-13 relative to the largest one met, and 1e-10 (`EPS`) leaves
room for products of gates, which grow on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from graphs import Graph, build, graph_values, graph_weights, predicted, relax
from helpers import ORACLE_FUNCTIONS, Tensors, assert_near, assert_trees_near
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pctt import (
    Add,
    Block,
    Categorical,
    Concat,
    Conv2d,
    Dense,
    Flatten,
    Gaussian,
    Inference,
    Linear,
    Multiply,
    Normalise,
    Scale,
    Step,
    infer,
    weight_gradients,
)
from pctt.layers.maps import Function

EPS = 1e-10
SMOOTH = ("identity", "tanh", "sigmoid", "gelu", "silu")
QUICK = [HealthCheck.too_slow, HealthCheck.data_too_large]

seeds = st.integers(0, 2**31)


@dataclass
class _Made:
    """A layer, what it computes, and the shape of its node."""

    layer: Any
    compute: Callable[..., Tensor] | None
    shape: tuple[int, ...]


def _dense(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> _Made:
    units, function = draw(st.sampled_from((2, 3, 4))), draw(st.sampled_from(SMOOTH))
    placement = draw(st.sampled_from(("output", "input")))
    scale, bias = draw(st.sampled_from((1.0, 0.7))), draw(st.booleans())
    return _Made(Dense(units, function, bias, placement, scale=scale), None, (units,))


def _summed(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> _Made:
    signs = tuple(draw(st.sampled_from((1, -1))) for _ in shapes)
    layer = Block([Step(Add(signs)), "tanh"])
    return _Made(
        layer,
        lambda w, *xs: torch.tanh(torch.stack([s * x for s, x in zip(signs, xs, strict=True)]).sum(0)),
        shapes[0],
    )


def _gated(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> _Made:
    """sigmoid(a) b, or a gated by itself."""
    second = len(shapes) - 1
    gate = Step(Function("sigmoid"), (0,))
    layer = Block([gate, Step(Multiply(), (len(shapes), second))])
    return _Made(layer, lambda w, *xs: xs[0].sigmoid() * xs[second], shapes[0])


def _joined(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> _Made:
    """All sources, flat, one after the other, then a product."""
    units, count = draw(st.sampled_from((2, 3))), len(shapes)
    flat = [Step(Flatten(), (number,)) for number in range(count)]
    layer = Block([*flat, Step(Concat(), tuple(range(count, 2 * count))), Linear(units), "gelu", Scale(0.8)])

    def compute(w: Tensors, *xs: Tensor) -> Tensor:
        both = torch.cat([x.flatten(1) for x in xs], 1)
        return 0.8 * functional.gelu(both @ w["weight"] + w["bias"])

    return _Made(layer, compute, (units,))


def _residual(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> _Made:
    """x + W tanh(W' x), over the last axis."""
    units = shapes[0][-1]
    steps = [Step(Linear(3), name="up"), "tanh", Step(Linear(units, False), name="down"), Step(Add(), (0, 3))]

    def compute(w: Tensors, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ w["weight.up"] + w["bias.up"]) @ w["weight.down"]

    return _Made(Block(steps), compute, shapes[0])


def _normal(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> _Made:
    axes = draw(st.integers(1, len(shapes[0])))
    layer = Block([Normalise(axes, 0.5), "tanh"])  # of two or three numbers, so that the slope stays small
    return _Made(
        layer, lambda w, x: torch.tanh(functional.layer_norm(x, x.shape[-axes:], eps=0.5)), shapes[0]
    )


def _convolved(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> _Made:
    channels, size = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2)))
    stride, padding = draw(st.sampled_from((1, 2))), draw(st.sampled_from((0, 1)))
    layer = Block([Conv2d(channels, size, stride, padding), "tanh"])
    out = tuple((n + 2 * padding - size) // stride + 1 for n in shapes[0][1:])
    return _Made(
        layer,
        lambda w, x: torch.tanh(functional.conv2d(x, w["weight"], w["bias"], stride, padding)),
        (channels, *out),
    )


@st.composite
def graphs(draw: st.DrawFn, cyclic: bool = False, precise: bool = False) -> Graph:
    """3 to 12 nodes: one to three roots, an image among them perhaps, and layers that read nodes before
    them. Layers of one shape may share weights. With `cyclic` some dense layers read nodes after them, or
    themselves; with `precise` energies have precisions.
    """
    num_nodes = draw(st.integers(3, 12))
    num_roots = draw(st.integers(1, min(3, num_nodes - 2)))
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(num_roots):
        image = draw(st.booleans()) and number == 0
        shapes[f"x{number}"] = (1, 3, 2) if image else (draw(st.sampled_from((2, 3, 4))),)
    inputs, layers = dict(shapes), dict[str, tuple[Any, ...]]()
    unread = list(shapes)
    for number in range(num_nodes - num_roots):
        name, names = f"n{number}", list(shapes)
        wanted = [unread[0]] if unread and unread[0] in inputs else [draw(st.sampled_from(names))]
        same = [other for other in names if shapes[other] == shapes[wanted[0]] and other not in wanted]
        kinds = ["dense", "dense", "joined", "residual", "normal", "gated", "summed"]
        kind = draw(st.sampled_from([*kinds, "convolved"] if len(shapes[wanted[0]]) == 3 else kinds))
        if kind in ("dense", "joined"):
            others = [other for other in names if other not in wanted]
            wanted += draw(st.lists(st.sampled_from(others), unique=True, max_size=2)) if others else []
        elif kind in ("gated", "summed") and same:
            wanted += draw(st.lists(st.sampled_from(same), unique=True, max_size=1))
        maker = {
            "dense": _dense,
            "joined": _joined,
            "residual": _residual,
            "normal": _normal,
            "gated": _gated,
            "summed": _summed,
            "convolved": _convolved,
        }[kind]
        made = maker(draw, [shapes[source] for source in wanted])
        shapes[name] = made.shape
        layers[name] = (made.layer, made.compute, *wanted)
        unread = [source for source in unread if source not in wanted]
    for source in [source for source in unread if source in inputs]:  # roots must be read
        last = list(layers)[-1]
        layers[f"{last}{source}"] = (Dense(2, "tanh"), None, source)
        shapes[f"{last}{source}"] = (2,)
    if cyclic:
        for name, (layer, compute, *sources) in list(layers.items()):
            if isinstance(layer, Dense) and draw(st.booleans()):
                back = draw(st.sampled_from(list(layers)))
                if back not in sources:
                    layers[name] = (layer, compute, *sources, back)
    if precise:
        for name, (layer, compute, *sources) in list(layers.items()):
            units, energy = prod(shapes[name]), draw(_gaussians())
            energy = (
                energy
                if isinstance(energy, Gaussian)
                else Gaussian(tuple(0.5 + 0.25 * i for i in range(units)))
            )
            made = Block(layer.steps, energy) if isinstance(layer, Block) else _with(layer, energy)
            layers[name] = (made, compute, *sources)
    read = {source for _, _, *sources in layers.values() for source in sources}
    leaves = [name for name in layers if name not in read]
    for name in leaves[:-1]:
        layer, _, *sources = layers[name]
        if isinstance(layer, Dense) and not cyclic and draw(st.booleans()):
            layers[name] = (Dense(layer.units, "softmax", energy=Categorical()), None, *sources)
    shared = _shared(draw, layers, shapes)
    clamped = [*inputs, *(leaves or list(layers)[-1:])]
    return build(inputs, layers, clamped=clamped, output=clamped[-1], shared=shared)


def _gaussians():
    return st.sampled_from((Gaussian(), Gaussian(0.5), Gaussian(2.0), None))


def _with(layer: Dense, energy: Gaussian) -> Dense:
    return Dense(layer.units, layer.activation, layer.bias, layer.activate, energy, layer.scale)


def _shared(draw: st.DrawFn, layers, shapes) -> dict[str, str]:
    """Dense layers with one source each, of the same sizes, use the weights of the first, perhaps."""
    owners: dict[Any, str] = {}
    shared: dict[str, str] = {}
    for name, (layer, _, *sources) in layers.items():
        if isinstance(layer, Dense) and len(sources) == 1:
            key = (layer.units, layer.bias, prod(shapes[sources[0]]))
            if key in owners and draw(st.booleans()):
                shared[name] = owners[key]
            owners.setdefault(key, name)
    return shared


def backprop(case: Graph, weights, clamp):
    """Gradients of the energies of the clamped nodes under one feedforward pass, batch mean."""
    leaves = {n: {k: v.clone().requires_grad_() for k, v in layer.items()} for n, layer in weights.items()}
    nodes = {name: clamp[name].flatten(1) for name in case.net.nodes[: case.net.num_roots]}
    loss = torch.zeros((), dtype=torch.float64)
    for name in case.net.names:
        nodes[name] = predicted(case, leaves, name, nodes)
        target = clamp[name].flatten(1) if name in clamp else None
        if target is not None and isinstance(case.energy(name), Categorical):
            loss = loss - (target * nodes[name].log_softmax(-1)).sum(-1).mean()
        elif target is not None:
            loss = loss + 0.5 * (target - nodes[name]).square().sum(-1).mean()
    flat = [value for layer in leaves.values() for value in layer.values()]
    if not flat:
        return {}
    found = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
    return {name: {key: next(found) for key in layer} for name, layer in leaves.items()}


def scale_of(*trees) -> float:
    values = [v.abs().max().item() for tree in trees for layer in tree.values() for v in layer.values()]
    return max([1.0, *values])


@settings(max_examples=40, suppress_health_check=QUICK)
@given(graphs(), seeds, st.integers(1, 3))
def test_fixed_predictions_give_the_gradients_of_backpropagation(case, seed, batch):
    """Millidge, Tschantz & Buckley 2022, on any graph without cycles: one sweep down from the leaves at rate
    1, and as many steps of all nodes at once as there are layers.

    Errors of several children add up, those of shared weights too, and every one passes each layer once.
    """
    weights = graph_weights(case.net, seed)
    if not weights:
        return
    values = graph_values(case, batch, seed)
    clamp = {name: values[name] for name in case.clamped}
    expected = backprop(case, weights, clamp)
    sweep = Inference(1, 1.0, "fixed", sweep="gauss_seidel")
    for inference in (sweep, Inference(len(case.net.layers), 1.0, "fixed")):
        result = infer(case.net, weights, clamp, inference)
        found = weight_gradients(case.net, weights, result)
        assert_trees_near(found, expected, EPS * scale_of(expected))


@st.composite
def queries(draw: st.DrawFn, case: Graph, seed: int):
    """(clamp, initial): any nodes held, at least one; some others are given their starts."""
    values = graph_values(case, draw(st.integers(1, 3)), seed)
    names = list(values)
    roles = {name: draw(st.sampled_from("ccfp")) for name in names}
    roles[draw(st.sampled_from(names))] = "c"
    for name in case.net.names:
        if isinstance(case.energy(name), Categorical) and roles[name] == "p":
            roles[name] = "f"
    return (
        {name: values[name] for name in names if roles[name] == "c"},
        {name: values[name] for name in names if roles[name] == "p"},
    )


SETTINGS = (
    Inference(4, 0.05),
    Inference(3, 0.1, "fixed"),
    Inference(3, 0.1, sweep="gauss_seidel"),
    Inference(3, 0.05, dynamics="momentum", momentum=0.6),
    Inference(3, 0.05, dynamics="heun", step_tolerance=1e-2),
    Inference(3, 0.02, variables="errors"),
    Inference(3, 0.05, initial="zeros"),
)


@settings(max_examples=40, suppress_health_check=QUICK)
@given(st.data(), st.booleans(), st.sampled_from(SETTINGS), seeds)
def test_any_query_of_any_graph_relaxes_and_learns_like_the_oracle(data, cyclic, inference, seed):
    """Cycles, precisions, free roots, placed and clamped nodes in the middle. Rules that hold only for the
    clamps of training would answer these wrongly, and recall would merely look like a poor model.
    """
    case = data.draw(graphs(cyclic=cyclic, precise=True))
    weights = graph_weights(case.net, seed)
    if not weights or (case.ahead and inference.variables == "errors"):
        return
    clamp, initial = data.draw(queries(case, seed))
    expected = relax(case, weights, clamp, inference, initial)
    result = infer(case.net, weights, clamp, inference, initial)
    scale = max(1.0, expected.energies.abs().max().item())
    assert_near(result.energy, expected.energies, EPS * scale, "energy")
    for name in case.net.nodes:
        assert_near(result.activities[name], expected.activities[-1][name], EPS * scale, name)
    for name in case.net.names:
        assert_near(result.errors[name], expected.errors[-1][name], EPS * scale, f"error of {name}")
    gradients = weight_gradients(case.net, weights, result)
    assert_trees_near(gradients, expected.gradients, EPS * scale * scale_of(expected.gradients))


def largest_curvature(case: Graph, weights, states: Tensors, free: list[str]) -> float:
    """Of F in the free nodes, over the samples, by autograd at these states and power iteration."""
    leaves = {name: states[name].clone().requires_grad_() for name in free}
    total = _energy(case, weights, {**states, **leaves})
    slopes = torch.autograd.grad(total, list(leaves.values()), create_graph=True, materialize_grads=True)
    v = [torch.ones_like(slope) for slope in slopes]
    size = 0.0
    for _ in range(30):
        product = torch.autograd.grad(
            slopes, list(leaves.values()), v, retain_graph=True, materialize_grads=True
        )
        size = torch.sqrt(sum((p * p).sum() for p in product)).item()
        if size == 0.0:
            return 0.0
        v = [p / size for p in product]
    return size


def _energy(case: Graph, weights, nodes: Tensors) -> Tensor:
    flat = {name: values.flatten(1) for name, values in nodes.items()}
    total = torch.zeros((), dtype=torch.float64)
    for name in case.net.names:
        error = flat[name] - predicted(case, weights, name, flat)
        precision = torch.as_tensor(case.energy(name).precision, dtype=torch.float64)
        total = total + 0.5 * (precision * error.square()).sum()
    return total


@settings(max_examples=40, suppress_health_check=QUICK)
@given(st.data(), st.booleans(), st.sampled_from(("jacobi", "gauss_seidel")), seeds)
def test_the_energy_of_any_query_falls_at_a_small_rate(data, cyclic, sweep, seed):
    """E6: ten steps at a twentieth of 1 over the largest curvature at the start, whatever is clamped and
    wherever the others begin. A flipped sign, a pull that is missing or counted twice would let it rise.

    A step changes F by -rate |g|^2 (1 - rate c / 2), c a curvature on its way; it would have to grow forty
    times within ten steps for that to be positive, while activities move by less than half of what a Newton
    step would. Rounding: 1e-13 of the sum of the terms.
    """
    case = data.draw(graphs(cyclic=cyclic, precise=True))
    weights = graph_weights(case.net, seed, gain=0.7)
    if not weights or any(isinstance(case.energy(name), Categorical) for name in case.net.names):
        return
    clamp, initial = data.draw(queries(case, seed))
    free = [name for name in case.net.nodes if name not in clamp]
    start = infer(case.net, weights, clamp, Inference(0), initial)
    curvature = largest_curvature(case, weights, start.activities, free) if free else 0.0
    rate = 0.05 / max(curvature, 1.0)
    energy = infer(case.net, weights, clamp, Inference(10, rate, sweep=sweep), initial).energy
    rounding = 1e-13 * energy.abs().sum(1).max().item()
    assert (energy.sum(1).diff() <= rounding).all()


def test_the_functions_drawn_are_known_to_the_oracle():
    assert set(SMOOTH) <= set(ORACLE_FUNCTIONS)
