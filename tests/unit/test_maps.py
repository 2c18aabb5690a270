"""The maps that blocks are composed of, each against a torch function of its own and autograd, in fp64.

`CASES` is the table: a map, the shapes it reads, and what it computes, written without pctt. Every row goes
through the same contracts; a new map fails `test_every_map_stands_in_the_table` until it has a row.

Tolerances. A number here is the end of at most 10 products of at most 60 terms each, off by 600 * 2u =
1.3e-13 relative to the terms summed (Higham 2002, eq. 3.5); 1e-12 (`EPS`) of the largest entry leaves a
factor of ten.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import torch
from graphs import mask_of
from helpers import HIDDEN_ACTIVATIONS, ORACLE_FUNCTIONS, Tensors, assert_near, generator
from torch import Tensor
from torch.nn import functional

from pctt import (
    SGD,
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
    Engine,
    Flatten,
    Gaussian,
    Inference,
    Linear,
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
    infer,
    init,
    weight_gradients,
)
from pctt.layers.maps import MAPS, Fill, Function, Map, Permute

EPS = 1e-12


@dataclass(frozen=True, eq=False)
class Case:
    """compute: (weights of the map, *inputs [B, *shape]) -> output [B, *shape of it]
    whole: the number that the inputs are whole numbers below, None for any numbers.
    """

    map: Map
    shapes: tuple[tuple[int, ...], ...]
    compute: Callable[..., Tensor]
    whole: int | None = None


def _convolved(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> Callable[..., Tensor]:
    """Convolution as windows times a matrix."""

    def compute(w: Tensors, x: Tensor) -> Tensor:
        out, kernel = len(w["weight"]), w["weight"].shape[2:]
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
        ]
        found = []
        for part, matrix in zip(x.chunk(groups, 1), w["weight"].chunk(groups, 0), strict=True):
            windows = functional.unfold(part, kernel, dilation, padding, stride)
            found.append((matrix.flatten(1) @ windows).view(len(x), out // groups, *sizes))
        y = torch.cat(found, 1)
        return y + w["bias"].view(-1, 1, 1) if "bias" in w else y

    return compute


def _transposed(stride=1, padding=0, output_padding=0, groups=1) -> Callable[..., Tensor]:
    def compute(w: Tensors, x: Tensor) -> Tensor:
        return functional.conv_transpose2d(
            x, w["weight"], w.get("bias"), stride, padding, output_padding, groups
        )

    return compute


def _windows(x: Tensor, kernel, stride, padding, fill: float) -> Tensor:
    """[B, C, H, W, numbers of a window]"""
    (height, width), (down, right), (top, left) = kernel, stride, padding
    x = functional.pad(x, (left, left, top, top), value=fill)
    return x.unfold(2, height, down).unfold(3, width, right).flatten(4)


def _largest(kernel, stride, padding=(0, 0)) -> Callable[..., Tensor]:
    return lambda w, x: _windows(x, kernel, stride, padding, -torch.inf).amax(-1)


def _mean(kernel, stride, padding=(0, 0)) -> Callable[..., Tensor]:
    return lambda w, x: _windows(x, kernel, stride, padding, 0.0).mean(-1)


def _standard(axes: tuple[int, ...], epsilon: float = 1e-5) -> Callable[..., Tensor]:
    def compute(w: Tensors, x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        return centred / (centred.square().mean(axes, keepdim=True) + epsilon).sqrt()

    return compute


def _attended(heads: int, causal: bool) -> Callable[..., Tensor]:
    """One head and one query after the other."""

    def compute(w: Tensors, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        found = []
        for q, k, v in zip(*(part.chunk(heads, -1) for part in (queries, keys, values)), strict=True):
            rows = []
            for number in range(q.shape[1]):
                seen = number + 1 if causal else k.shape[1]
                scores = torch.einsum("bu,bpu->bp", q[:, number], k[:, :seen]) / q.shape[-1] ** 0.5
                rows.append(torch.einsum("bp,bpu->bu", scores.softmax(-1), v[:, :seen]))
            found.append(torch.stack(rows, 1))
        return torch.cat(found, -1)

    return compute


def _linear(w: Tensors, x: Tensor) -> Tensor:
    y = torch.einsum("b...i,io->b...o", x, w["weight"])
    return y + w["bias"] if "bias" in w else y


def _affine(axis: int) -> Callable[..., Tensor]:
    """axis: of a sample."""

    def compute(w: Tensors, x: Tensor) -> Tensor:
        x = x.movedim(axis + 1 if axis >= 0 else axis, -1)
        y = x * w["weight"] + (w["bias"] if "bias" in w else 0.0)
        return y.movedim(-1, axis + 1 if axis >= 0 else axis)

    return compute


def _standardised(w: Tensors, x: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    return (x - w["running_mean"].view(shape)) / (w["running_var"].view(shape) + 1e-5).sqrt()


def _full(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64)


def _sum(*signs: int) -> Callable[..., Tensor]:
    return lambda w, *xs: sum(sign * x for sign, x in zip(signs, xs, strict=True))


CASES: dict[str, Case] = {
    **{
        f"function {name}": Case(Function(name), ((7,),), lambda w, x, f=ORACLE_FUNCTIONS[name]: f(x))
        for name in HIDDEN_ACTIVATIONS
    },
    "function tanh, images": Case(Function("tanh"), ((2, 3, 2),), lambda w, x: torch.tanh(x)),
    "function softmax": Case(Function("softmax"), ((5,),), lambda w, x: x.softmax(-1)),
    "function softmax, rows": Case(Function("softmax"), ((3, 4),), lambda w, x: x.softmax(-1)),
    "function softmax, images": Case(Function("softmax"), ((2, 3, 4),), lambda w, x: x.softmax(-1)),
    "scale": Case(Scale(-1.7), ((4,),), lambda w, x: -1.7 * x),
    "scale, zero": Case(Scale(0.0), ((4,),), lambda w, x: 0.0 * x),
    "shift": Case(Shift(0.6), ((2, 3),), lambda w, x: x + 0.6),
    "permute": Case(Permute((2, 0, 1)), ((2, 3, 4),), lambda w, x: x.permute(0, 3, 1, 2)),
    "permute, rows": Case(Permute((1, 0)), ((2, 3),), lambda w, x: x.mT),
    "permute, nothing": Case(Permute((0,)), ((3,),), lambda w, x: x),
    "fill": Case(Fill((2, 2), 0.7), ((3,),), lambda w, x: 0.0 * x.sum() + _full(0.7, len(x), 2, 2)),
    "fill, zero": Case(Fill((3,)), ((2, 2),), lambda w, x: 0.0 * x.sum() + _full(0.0, len(x), 3)),
    "reshape": Case(Reshape((3, 2, 2)), ((4, 3),), lambda w, x: x.reshape(len(x), 3, 2, 2)),
    "flatten": Case(Flatten(), ((2, 3, 2),), lambda w, x: x.flatten(1)),
    "slice": Case(Slice(1, 3), ((4,),), lambda w, x: x[:, 1:3]),
    "slice, channels": Case(Slice(0, 2, 0), ((3, 2, 2),), lambda w, x: x[:, :2]),
    "slice, rows": Case(Slice(1, 3, 1), ((2, 4, 3),), lambda w, x: x[:, :, 1:3]),
    "slice, last axis": Case(Slice(2, 5, -1), ((3, 5),), lambda w, x: x[..., 2:]),
    "slice, all": Case(Slice(0, 4), ((4,),), lambda w, x: x),
    "add, one": Case(Add(), ((4,),), _sum(1)),
    "add, two": Case(Add(), ((4,), (4,)), _sum(1, 1)),
    "add, three": Case(Add((1, -1, -1)), ((2, 3),) * 3, _sum(1, -1, -1)),
    "add, negative first": Case(Add((-1, 1)), ((4,), (4,)), _sum(-1, 1)),
    "multiply": Case(Multiply(), ((2, 3), (2, 3)), lambda w, a, b: a * b),
    "concat, one": Case(Concat(), ((3,),), lambda w, x: x),
    "concat, vectors": Case(Concat(), ((3,), (2,), (4,)), lambda w, *xs: torch.cat(xs, 1)),
    "concat, channels": Case(Concat(0), ((1, 2, 3), (2, 2, 3)), lambda w, *xs: torch.cat(xs, 1)),
    "concat, columns": Case(Concat(-1), ((2, 3), (2, 1)), lambda w, *xs: torch.cat(xs, 2)),
    "concat, rows": Case(Concat(1), ((2, 3, 2), (2, 1, 2)), lambda w, *xs: torch.cat(xs, 2)),
    "linear": Case(Linear(3), ((5,),), _linear),
    "linear, no bias": Case(Linear(3, bias=False), ((5,),), _linear),
    "linear, positions": Case(Linear(4), ((3, 5),), _linear),
    "linear, images": Case(Linear(2), ((2, 3, 4),), _linear),
    "linear, one position": Case(Linear(2), ((1, 3),), _linear),
    "linear, as many positions as units": Case(Linear(3), ((3, 3),), _linear),
    "linear, one unit": Case(Linear(1), ((4, 3),), _linear),
    "linear, no diagonal": Case(Linear(4, mask="off_diagonal"), ((4,),), _linear),
    "linear, no diagonal, positions": Case(Linear(3, False, "off_diagonal"), ((2, 3),), _linear),
    "linear, drawn": Case(Linear(6, mask=0.5, seed=3), ((5,),), _linear),
    "conv2d": Case(Conv2d(3, 3), ((2, 5, 4),), _convolved()),
    "conv2d, one by one": Case(Conv2d(3, 1), ((2, 2, 3),), _convolved()),
    "conv2d, no bias": Case(Conv2d(2, (2, 3), bias=False), ((3, 4, 5),), _convolved()),
    "conv2d, stride": Case(Conv2d(2, 3, (2, 1), 1), ((2, 6, 4),), _convolved((2, 1), (1, 1))),
    "conv2d, stride with a rest": Case(Conv2d(2, 2, 3), ((1, 7, 6),), _convolved((3, 3))),
    "conv2d, padding": Case(Conv2d(2, (3, 2), 1, (2, 0)), ((2, 3, 4),), _convolved(padding=(2, 0))),
    "conv2d, dilation": Case(
        Conv2d(2, (2, 3), 1, 1, (3, 2)), ((2, 6, 5),), _convolved((1, 1), (1, 1), (3, 2))
    ),
    "conv2d, groups": Case(Conv2d(6, 2, groups=2), ((4, 3, 3),), _convolved(groups=2)),
    "conv2d, a group per channel": Case(
        Conv2d(6, 3, 2, 1, groups=3, bias=False), ((3, 4, 5),), _convolved((2, 2), (1, 1), groups=3)
    ),
    "conv2d, everything": Case(
        Conv2d(4, (2, 3), (1, 2), (1, 2), (2, 1), 2), ((2, 5, 4),), _convolved((1, 2), (1, 2), (2, 1), 2)
    ),
    "conv2d, to one pixel": Case(Conv2d(3, (2, 3)), ((2, 2, 3),), _convolved()),
    "conv_transpose2d": Case(ConvTranspose2d(2, 3), ((3, 2, 3),), _transposed()),
    "conv_transpose2d, stride": Case(ConvTranspose2d(2, (3, 2), (2, 3)), ((3, 2, 3),), _transposed((2, 3))),
    "conv_transpose2d, padding": Case(ConvTranspose2d(2, 3, 2, 1, 1), ((2, 3, 2),), _transposed(2, 1, 1)),
    "conv_transpose2d, output padding": Case(
        ConvTranspose2d(3, 2, (2, 3), 0, (1, 2), bias=False), ((2, 2, 2),), _transposed((2, 3), 0, (1, 2))
    ),
    "conv_transpose2d, groups": Case(
        ConvTranspose2d(4, 2, 2, groups=2), ((2, 2, 3),), _transposed(2, groups=2)
    ),
    "conv_transpose2d, from one pixel": Case(ConvTranspose2d(2, (3, 2)), ((4, 1, 1),), _transposed()),
    "embedding": Case(Embedding(6, 3), ((4,),), lambda w, x: w["weight"][x.long()], whole=6),
    "embedding, one position": Case(Embedding(5, 3), ((1,),), lambda w, x: w["weight"][x.long()], whole=5),
    "embedding, two axes": Case(Embedding(5, 2), ((2, 3),), lambda w, x: w["weight"][x.long()], whole=5),
    "max_pool2d": Case(MaxPool2d(2), ((2, 4, 6),), _largest((2, 2), (2, 2))),
    "max_pool2d, overlapping": Case(MaxPool2d(3, 1), ((2, 4, 5),), _largest((3, 3), (1, 1))),
    "max_pool2d, with a rest": Case(MaxPool2d((2, 3)), ((1, 5, 7),), _largest((2, 3), (2, 3))),
    "max_pool2d, padded": Case(
        MaxPool2d((3, 2), (2, 1), (1, 1)), ((2, 5, 3),), _largest((3, 2), (2, 1), (1, 1))
    ),
    "max_pool2d, whole": Case(MaxPool2d((3, 4)), ((2, 3, 4),), _largest((3, 4), (3, 4))),
    "avg_pool2d": Case(AvgPool2d(2), ((2, 4, 6),), _mean((2, 2), (2, 2))),
    "avg_pool2d, overlapping": Case(AvgPool2d(3, (1, 2)), ((2, 4, 5),), _mean((3, 3), (1, 2))),
    "avg_pool2d, with a rest": Case(AvgPool2d((2, 3)), ((1, 5, 7),), _mean((2, 3), (2, 3))),
    "avg_pool2d, padded": Case(AvgPool2d((3, 2), 2, (1, 0)), ((2, 5, 4),), _mean((3, 2), (2, 2), (1, 0))),
    "avg_pool2d, global": Case(AvgPool2d(0), ((3, 4, 5),), _mean((4, 5), (4, 5))),
    "normalise": Case(Normalise(), ((5,),), _standard((1,))),
    "normalise, rows": Case(Normalise(epsilon=0.1), ((3, 4),), _standard((2,), 0.1)),
    "normalise, two axes": Case(Normalise(2), ((2, 3, 4),), _standard((2, 3))),
    "normalise, all": Case(Normalise(3), ((2, 3, 2),), _standard((1, 2, 3))),
    "normalise_batch": Case(NormaliseBatch(), ((4,),), _standard((0,))),
    "normalise_batch, images": Case(NormaliseBatch(0.01), ((2, 3, 4),), _standard((0, 2, 3), 0.01)),
    "affine": Case(Affine(), ((4,),), _affine(-1)),
    "affine, channels": Case(Affine(0), ((3, 2, 4),), _affine(0)),
    "affine, middle, no bias": Case(Affine(1, bias=False), ((2, 3, 2),), _affine(1)),
    "affine, rows": Case(Affine(-1), ((3, 4),), _affine(-1)),
    "bias": Case(Bias(), ((4,),), lambda w, x: x + w["bias"]),
    "bias, rows": Case(Bias(), ((3, 4),), lambda w, x: x + w["bias"]),
    "bias, positions and units": Case(Bias(2), ((3, 4),), lambda w, x: x + w["bias"]),
    "bias, two of three axes": Case(Bias(2), ((2, 3, 2),), lambda w, x: x + w["bias"]),
    "standardise": Case(Standardise(), ((4,),), _standardised),
    "standardise, images": Case(Standardise(), ((3, 2, 4),), _standardised),
    "attend": Case(Attend(), ((3, 4),) * 3, _attended(1, False)),
    "attend, heads": Case(Attend(2), ((3, 4),) * 3, _attended(2, False)),
    "attend, causal": Case(Attend(2, causal=True), ((4, 4), (4, 4), (4, 6)), _attended(2, True)),
    "attend, from elsewhere": Case(Attend(3), ((2, 6), (5, 6), (5, 3)), _attended(3, False)),
    "attend, one key": Case(Attend(), ((2, 3), (1, 3), (1, 2)), _attended(1, False)),
}


def test_every_map_stands_in_the_table():
    """A map without a row would be one that nobody has compared with anything."""
    assert {case.map.kind for case in CASES.values()} == set(MAPS)


# --- what a map is put into ---------------------------------------------------------------------------------


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    source, weights = generator(seed), Tensors()
    for key, shape in shapes.items():
        values = torch.randn(*shape, generator=source, dtype=torch.float64)
        weights[key] = values.exp() if key.startswith("running_var") else values
    return weights


def inputs_of(case: Case, batch: int = 3, seed: int = 1) -> list[Tensor]:
    source = generator(seed)
    if case.whole is not None:
        return [torch.randint(case.whole, (batch, *s), generator=source).double() for s in case.shapes]
    return [torch.randn(batch, *s, generator=source, dtype=torch.float64) for s in case.shapes]


def beside(inputs: dict[str, tuple[int, ...]], steps: Any) -> Network:
    """x0, x1, ... and what a block makes of them, y. Beside them stands a layer that has weights, whose type
    is that of the numbers, whatever the block has.
    """
    layers = {"y": (steps if isinstance(steps, Block) else Block(steps), *inputs), "side": (Dense(1), "free")}
    return graph({**inputs, "free": 1}, layers, input="x0", output="y")


def alone(case: Case) -> Network:
    return beside({f"x{number}": shape for number, shape in enumerate(case.shapes)}, Step(case.map))


def weights_of(case: Case, net: Network) -> dict[str, Tensors]:
    """Of y only where it has some."""
    weights = {name: drawn(shapes) for name, shapes in net.weight_shapes().items()}
    for key in weights.get("y", {}) if isinstance(case.map, Linear) and case.map.mask is not None else ():
        if key in ("weight", "weight.it", "weight.other"):
            weights["y"][key] *= mask_of(case.map, weights["y"][key].shape)
    return weights


def shape_of(net: Network) -> tuple[int, ...]:
    return net.shapes[net.node_index("y")]


def trained(case: Case, weights: Tensors) -> Tensors:
    return {key: values for key, values in weights.items() if not key.startswith("running")}


def masked(case: Case, gradients: Tensors) -> Tensors:
    if isinstance(case.map, Linear) and case.map.mask is not None:
        weight = gradients["weight"]
        return {**gradients, "weight": weight * mask_of(case.map, weight.shape)}
    return gradients


def assert_relative(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert_near(actual, expected, EPS * max(expected.abs().max().item(), 1e-3), what)


# --- contracts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_prediction_of_a_map_is_its_function(name):
    """The anchor of a block of one map; a window, an axis or a head off by one would still be of the right
    shape, and such a network still learns.
    """
    case = CASES[name]
    net, xs = alone(case), inputs_of(CASES[name])
    weights = weights_of(case, net)
    expected = case.compute(weights.get("y", {}), *xs)
    assert shape_of(net) == tuple(expected.shape[1:])
    clamp = dict(zip(net.nodes, xs, strict=False))
    assert_relative(infer(net, weights, clamp, Inference(0)).predictions["y"], expected)


@pytest.mark.parametrize("name", CASES)
def test_the_local_rules_of_a_map_are_the_derivatives_of_its_function(name):
    """One exact step: with the prediction fixed and rate 1 a free input moves by J'e, and the weight gradient
    is minus the mean of (dy/dW)'e; both by autograd of the function in the table.
    """
    case = CASES[name]
    net, xs = alone(case), inputs_of(case)
    weights = weights_of(case, net)
    leaves = [x.clone().requires_grad_() for x in xs]
    tree = {key: values.clone().requires_grad_() for key, values in weights.get("y", {}).items()}
    y = case.compute(tree, *leaves)
    target = torch.randn(y.shape, generator=generator(2), dtype=torch.float64)
    moving = leaves if case.whole is None else []
    wanted = [*moving, *trained(case, tree).values()]
    found = torch.autograd.grad(y, wanted, target - y.detach()) if wanted else ()
    clamp, initial = {"y": target}, dict(zip(net.nodes, xs, strict=False))
    if case.whole is not None:
        clamp, initial = {**clamp, **initial}, {}
    result = infer(net, weights, clamp, Inference(1, 1.0, "fixed", sweep="gauss_seidel"), initial)
    for x, node, slope in zip(xs, net.nodes, found[: len(moving)], strict=False):
        scale = EPS * max(slope.abs().max().item(), x.abs().max().item())  # the activity is x + J'e
        assert_near(result.activities[node], x + slope, scale, node)
    gradients = weight_gradients(net, weights, result).get("y", {})
    expected = dict(zip(trained(case, tree), found[len(moving) :], strict=True))
    assert set(gradients) == set(expected)
    for key, slope in masked(case, expected).items():
        assert_relative(gradients[key], -slope / len(target), key)


def _plain(weights: Tensors, name: str) -> Tensors:
    """The weights of one map of a block: those called `key.name`."""
    return {key.removesuffix(f".{name}"): v for key, v in weights.items() if key.endswith(f".{name}")}


CONTEXTS = ("alone", "before tanh", "after tanh", "twice", "before a product")


def within(case: Case, context: str) -> tuple[Block, Callable[..., Tensor]]:
    """The map among others, and what the block computes."""
    several = len(case.shapes)
    map_, sources, numbers = case.map, tuple(range(several)), count(several)

    def named(weights: Tensors, *xs: Tensor) -> Tensor:
        return case.compute(_plain(weights, "it"), *xs)

    if context == "alone":
        return Block(Step(map_, name="it")), named
    if context == "before tanh":
        return Block([Step(map_, name="it"), "tanh"]), lambda w, *xs: torch.tanh(named(w, *xs))
    if context == "after tanh":
        bent = [Step(Function("tanh"), (source,)) for source in sources]
        of = tuple(next(numbers) for _ in sources)
        return Block([*bent, Step(map_, of, "it")]), lambda w, *xs: named(w, *map(torch.tanh, xs))
    if (
        context == "twice"
    ):  # the same values through two of them, so that errors add up below, within the block
        bent = [] if case.whole else [Step(Function("tanh"), (source,)) for source in sources]
        of = tuple(several + number for number in range(several)) if bent else sources
        here = several + len(bent)
        steps = [*bent, Step(map_, of, "it"), Step(Scale(0.5)), Step(map_, of, "other")]
        block = Block([*steps, Step(Add((1, -1)), (here + 1, here + 2))])

        def both(w: Tensors, *xs: Tensor) -> Tensor:
            ys = [x if case.whole else torch.tanh(x) for x in xs]
            return 0.5 * named(w, *ys) - case.compute(_plain(w, "other"), *ys)

        return block, both
    steps = [Step(map_, name="it"), Flatten(), Step(Linear(3), name="after"), Scale(2.0)]
    return Block(steps), lambda w, *xs: 2.0 * _linear(_plain(w, "after"), named(w, *xs).flatten(1))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", CASES)
def test_predictions_follow_the_activities_and_gradients_the_predictions(name, context):
    """Live: after three steps in which every input moves, the prediction is the function of the activities as
    they are now, and the weight gradient is autograd's there. Predictions are computed from changes; a change
    of another value, or one that is added twice, would show only after a step, and then grow.
    """
    case = CASES[name]
    block, compute = within(case, context)
    names = [f"x{number}" for number in range(len(case.shapes))]
    net = beside(dict(zip(names, case.shapes, strict=True)), block)
    weights, xs = weights_of(case, net), inputs_of(case)
    target = torch.randn(3, *shape_of(net), generator=generator(2), dtype=torch.float64)
    initial, clamp = dict(zip(names, xs, strict=True)), {"y": target}
    if case.whole is not None:
        clamp, initial = {**clamp, **initial}, {}
    dynamics: dict[str, Any] = {"dynamics": "momentum", "momentum": 0.5} if context == "twice" else {}
    inference = Inference(3, 0.05, **dynamics)
    result = infer(net, weights, clamp, inference, initial)

    states = [x.clone() for x in xs]
    speeds = [torch.zeros_like(x) for x in xs]
    tree = {key: values.clone().requires_grad_() for key, values in weights.get("y", {}).items()}
    for _ in range(3 if case.whole is None else 0):
        leaves = [x.clone().requires_grad_() for x in states]
        energy = 0.5 * (target - compute(weights.get("y", {}), *leaves)).square().sum()
        for number, slope in enumerate(torch.autograd.grad(energy, leaves)):
            speeds[number] = dynamics.get("momentum", 0.0) * speeds[number] + slope
            states[number] = states[number] - 0.05 * speeds[number]
    mean = compute(tree, *states)
    for node, state in zip(names, states, strict=True):
        assert_relative(result.activities[node], state, node)
    bound = EPS * max(1.0, mean.abs().max().item(), target.abs().max().item())
    assert_near(result.predictions["y"], mean.detach(), bound, "prediction")
    energy = 0.5 * (target - mean).square().sum(tuple(range(1, mean.dim()))).mean()
    assert result.energy[-1].sum().item() == pytest.approx(energy.item(), rel=1e-11)

    wanted = {key: values for key, values in tree.items() if not key.startswith("running")}
    slopes = torch.autograd.grad(energy, list(wanted.values())) if wanted else ()
    expected = dict(zip(wanted, slopes, strict=True))
    for key in ("weight.it", "weight.other"):
        if key in expected and isinstance(case.map, Linear) and case.map.mask is not None:
            expected[key] = expected[key] * mask_of(case.map, expected[key].shape)
    engine = Engine(net, weights, inference, tuple(clamp), tuple(initial))
    engine.relax({node: values.flatten(1) for node, values in {**clamp, **initial}.items()})
    engine.compute_gradients()
    for found in (weight_gradients(net, weights, result), engine.gradients()):
        assert set(found.get("y", {})) == set(expected)
        for key, slope in expected.items():
            bound = EPS * max(1.0, slope.abs().max().item(), energy.item())
            assert_near(found["y"][key], slope, bound, key)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].map.kind != "normalise_batch"])
def test_a_sample_in_a_batch_is_that_sample_alone(name):
    """E16 for every map but the one that says otherwise: a view of [B, ...] that mixes samples and positions
    would give plausible numbers.
    """
    case = CASES[name]
    net = alone(case)
    weights = init(net, dtype=torch.float64)
    xs = inputs_of(case, batch=4)
    target = torch.randn(4, *shape_of(net), generator=generator(2), dtype=torch.float64)

    def relaxed(rows: slice) -> Tensors:
        initial = {node: x[rows] for node, x in zip(net.nodes, xs, strict=False)}
        clamp = {"y": target[rows]}
        if case.whole is not None:
            clamp, initial = {**clamp, **initial}, {}
        result = infer(net, weights, clamp, Inference(3, 0.1), initial)
        return {**result.activities, "prediction": result.predictions["y"]}

    whole, one = relaxed(slice(0, 4)), relaxed(slice(2, 3))
    for node in whole:
        assert_near(one[node], whole[node][2:3], EPS * max(1.0, whole[node].abs().max().item()), node)


# --- single maps --------------------------------------------------------------------------------------------


def test_the_samples_of_a_batch_are_tied_by_batch_normalisation():
    """What `NormaliseBatch` says of itself: repeating the batch changes nothing, another sample does."""
    net = alone(CASES["normalise_batch"])
    x, weights = inputs_of(CASES["normalise_batch"])[0], init(net, dtype=torch.float64)

    def first(values: Tensor) -> Tensor:
        return infer(net, weights, {"x0": values}, Inference(0)).predictions["y"][0]

    assert_near(first(torch.cat([x, x])), first(x), EPS)
    assert (first(torch.cat([x, x[:1]])) - first(x)).abs().max() > 0.1


def test_of_equal_numbers_in_a_window_the_first_one_takes_all_of_the_error():
    """Flat regions of images are full of ties. Errors that went to every one of them would count several
    times.
    """
    net = beside({"x0": (1, 4, 4)}, MaxPool2d(2))
    weights = init(net, dtype=torch.float64)
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    target = torch.tensor([[2.0, 3.0], [4.0, 5.0]], dtype=torch.float64).view(1, 1, 2, 2)
    inference = Inference(1, 1.0, "fixed", sweep="gauss_seidel")
    moved = infer(net, weights, {"y": target}, inference, {"x0": x}).activities["x0"] - x
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[::2, ::2] = target[0, 0] - 1.0
    assert torch.equal(moved[0, 0], expected)


def test_a_causal_head_does_not_look_ahead():
    """A number from the future would leak into training, and be missing when text is generated."""
    case = CASES["attend, causal"]
    net = alone(case)
    xs, weights = inputs_of(case), init(net, dtype=torch.float64)

    def out(values: list[Tensor]) -> Tensor:
        return infer(net, weights, dict(zip(net.nodes, values, strict=False)), Inference(0)).predictions["y"]

    later = [x.clone() for x in xs]
    for x in later:
        x[:, 2:] += 10.0
    before, after = out(xs), out(later)
    assert torch.equal(before[:, :2], after[:, :2]) and not torch.equal(before[:, 2:], after[:, 2:])


def test_statistics_that_stand_still_get_no_gradient_and_no_learning_state():
    net = graph({"x": (2, 3, 3)}, {"y": (Block([Standardise(), Affine(0)]), "x")})
    assert set(net.weight_shapes()["y"]) == {"weight", "bias", "running_mean", "running_var"}
    x = torch.randn(3, 2, 3, 3, generator=generator(0), dtype=torch.float64)
    weights = init(net, dtype=torch.float64)
    assert set(weight_gradients(net, weights, infer(net, weights, {"x": x}))["y"]) == {"weight", "bias"}


@pytest.mark.parametrize("mask", ["off_diagonal", 0.3])
def test_an_entry_that_a_mask_leaves_out_is_zero_at_the_start_and_stays_zero(mask):
    """Ten learning steps with momentum and decay. A mask that is applied to the start alone is filled in by
    the first gradient.
    """
    net = graph({"x": 6}, {"y": (Block(Linear(6, mask=mask, seed=4)), "x")})
    weights = init(net, dtype=torch.float64)
    missing = mask_of(Linear(6, mask=mask, seed=4), (6, 6)) == 0.0
    assert missing.any() and not missing.all()
    assert not weights["y"]["weight"][missing].any() and weights["y"]["weight"][~missing].all()
    rule = SGD(0.1, momentum=0.9, weight_decay=0.01)
    engine = Engine(net, weights, Inference(1), ("x", "y"), learning=rule)
    x, y = torch.randn(2, 5, 6, generator=generator(1), dtype=torch.float64)
    for step in range(10):
        engine.relax({"x": x, "y": y})
        engine.learn(0.1, step + 1)
    learnt = engine.weights()["y"]["weight"]
    assert not learnt[missing].any() and (learnt != weights["y"]["weight"])[~missing].all()


def test_another_seed_draws_another_mask_and_the_same_one_the_same():
    masks = [Linear(20, mask=0.5, seed=seed).drawn_mask((20, 20)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert 0.4 < masks[0].mean() < 0.6


def test_an_embedding_whose_source_would_move_is_refused():
    """Whole numbers that drifted would be cut to other words, and nothing would say so."""
    net = alone(CASES["embedding"])
    weights = init(net, dtype=torch.float64)
    x = inputs_of(CASES["embedding"])[0]
    y = torch.zeros(3, 4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="whole numbers, which inference cannot move; clamp its source"):
        infer(net, weights, {"y": y}, Inference(2), {"x0": x})


@pytest.mark.parametrize("scheme", ["xavier", "kaiming", "orthogonal", "normal"])
def test_initial_weights_are_of_the_shapes_and_sizes_that_maps_ask_for(scheme):
    """Scales start at 1, biases and means at 0; a kernel's fan-in counts its window and its group."""
    for name, case in CASES.items():
        net = alone(case)
        weights = init(net, 3, scheme, dtype=torch.float64)
        assert {
            k: {n: tuple(v.shape) for n, v in t.items()} for k, t in weights.items()
        } == net.weight_shapes()
        for key, values in weights.get("y", {}).items():
            if key == "running_var" or (key == "weight" and case.map.kind == "affine"):
                assert (values == 1.0).all(), name
            elif key != "weight":
                assert not values.any(), name
    net = graph({"x": (8, 9, 9)}, {"y": (Block(Conv2d(64, 3, groups=2)), "x")})
    kernel = init(net, 0, "kaiming", dtype=torch.float64)["y"]["weight"]
    assert kernel.std().item() == pytest.approx(36**-0.5, rel=0.05)


# --- mistakes -----------------------------------------------------------------------------------------------


def _predicting(steps: Any, *shapes: tuple[int, ...], energy=None) -> Callable[[], Network]:
    names = [f"x{number}" for number in range(len(shapes))]
    return lambda: graph(dict(zip(names, shapes, strict=True)), {"y": (Block(steps, energy), *names)})


IMAGE, ROWS, VECTOR = (4, 5, 6), (3, 4), (6,)
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "unknown function": (lambda: Function("cube"), "activation must be one of identity"),
    "reshape to another size": (
        _predicting(Reshape((2, 2)), VECTOR),
        r"\[6\] does not have the size of \[2, 2\]",
    ),
    "reshape to a negative size": (lambda: Reshape((-2, -3)), "shape must be a whole number of at least 1"),
    "reshape to nothing": (lambda: Reshape(()), "shape must name at least one axis"),
    "permute of axes that are not there": (lambda: Permute((0, 2)), "axes must be 0 to n - 1 in some order"),
    "permute of other axes": (_predicting(Permute((1, 0)), VECTOR), r"\[6\] does not have 2 axes"),
    "fill of no shape": (lambda: Fill(()), "shape must name at least one axis"),
    "fill of no number": (lambda: Fill((2,), float("inf")), "value must be a finite number, got inf"),
    "slice past the end": (_predicting(Slice(2, 7), VECTOR), "entries 2 to 7 are not in axis 0"),
    "slice backwards": (_predicting(Slice(3, 3), VECTOR), "entries 3 to 3 are not in axis 0"),
    "slice from the end": (_predicting(Slice(-2, 2), VECTOR), "entries -2 to 2 are not in axis 0"),
    "slice of an axis that is not there": (_predicting(Slice(0, 1, 2), ROWS), r"\[3, 4\] has no axis 2"),
    "signs that are no signs": (lambda: Add((1, 2)), r"signs must be 1 or -1 each, got \(1, 2\)"),
    "too few signs": (_predicting(Add((1,)), VECTOR, VECTOR), "1 signs do not suit 2 inputs"),
    "add of two shapes": (
        _predicting(Add(), VECTOR, ROWS),
        r"add takes inputs of one shape, got \[6\], \[3, 4\]",
    ),
    "multiply of two shapes": (_predicting(Multiply(), VECTOR, (3,)), "multiply takes inputs of one shape"),
    "multiply of three": (_predicting(Multiply(), VECTOR, VECTOR, VECTOR), "multiply takes 2 inputs, got 3"),
    "concat of unlike shapes": (_predicting(Concat(), ROWS, (3, 5)), "differ beside axis 0"),
    "concat of unlike axes": (_predicting(Concat(), (3,), (3, 1)), "differ beside axis 0"),
    "concat of an axis that is not there": (_predicting(Concat(1), (3,), (3,)), r"\[3\] has no axis 1"),
    "no units": (lambda: Linear(0), "units must be a whole number of at least 1"),
    "half a unit": (lambda: Linear(2.5), "units must be a whole number of at least 1"),  # pyright: ignore
    "unknown mask": (lambda: Linear(3, mask="diagonal"), "mask must be one of off_diagonal, got 'diagonal'"),
    "mask of nothing": (lambda: Linear(3, mask=0.0), "density between 0 and 1, got 0.0"),
    "mask of everything": (lambda: Linear(3, mask=1.0), "density between 0 and 1, got 1.0"),
    "mask that is no number": (lambda: Linear(3, mask=True), "density between 0 and 1, got True"),
    "diagonal of no square": (
        _predicting(Linear(3, mask="off_diagonal"), VECTOR),
        "has no diagonal to leave out",
    ),
    "negative seed": (lambda: Linear(3, mask=0.5, seed=-1), "seed must be a whole number"),
    "conv of a vector": (
        _predicting(Conv2d(2, 3), VECTOR),
        r"conv2d takes samples \[channels, height, width\]",
    ),
    "conv larger than the image": (_predicting(Conv2d(2, 7), IMAGE), r"kernel of \(7, 7\) does not fit"),
    "conv groups": (
        _predicting(Conv2d(3, 2, groups=2), IMAGE),
        "4 and 3 channels do not divide into 2 groups",
    ),
    "conv of three sizes": (
        lambda: Conv2d(2, (3, 3, 3)),
        r"kernel must be one number or two, got \(3, 3, 3\)",
    ),
    "conv of half a size": (lambda: Conv2d(2, 2.5), "kernel must be one number or two, got 2.5"),  # pyright: ignore
    "conv without stride": (lambda: Conv2d(2, 3, 0), "stride must be a whole number of at least 1, got 0"),
    "conv of negative padding": (lambda: Conv2d(2, 3, 1, -1), "padding must be a whole number of at least 0"),
    "conv of no dilation": (lambda: Conv2d(2, 3, 1, 0, 0), "dilation must be a whole number of at least 1"),
    "conv without channels": (lambda: Conv2d(0, 3), "channels must be a whole number of at least 1"),
    "conv without groups": (lambda: Conv2d(2, 3, groups=0), "groups must be a whole number of at least 1"),
    "transposed conv of rows": (_predicting(ConvTranspose2d(2, 3), ROWS), "conv_transpose2d takes samples"),
    "transposed conv groups": (
        _predicting(ConvTranspose2d(3, 2, groups=2), IMAGE),
        "do not divide into 2 groups",
    ),
    "transposed conv to nothing": (
        _predicting(ConvTranspose2d(2, 2, 1, 3), IMAGE),
        r"nothing is left of an image of \(5, 6\)",
    ),
    "output padding of a stride": (
        lambda: ConvTranspose2d(2, 3, 2, 1, 2),
        "output_padding must be below the stride",
    ),
    "embedding of nothing": (lambda: Embedding(0, 3), "num must be a whole number of at least 1"),
    "embedding without units": (lambda: Embedding(3, 0), "units must be a whole number of at least 1"),
    "pool of rows": (_predicting(MaxPool2d(2), ROWS), "max_pool2d takes samples"),
    "pool larger than the image": (
        _predicting(AvgPool2d(6), IMAGE),
        "window of 6 does not fit into an image",
    ),
    "pool of no kernel": (lambda: MaxPool2d(0), "kernel must be a whole number of at least 1"),
    "pool of too much padding": (
        lambda: AvgPool2d(2, 2, 2),
        "padding must be at most half the kernel 2, got 2",
    ),
    "global pool that is padded": (lambda: AvgPool2d(0, None, 1), "kernel=0 .* padding"),
    "pool of three sizes": (lambda: MaxPool2d((2, 2, 2)), "kernel must be one number or two"),
    "normalise of no axes": (lambda: Normalise(0), "axes must be a whole number of at least 1"),
    "normalise of too many": (_predicting(Normalise(3), ROWS), r"\[3, 4\] has no 3 axes to normalise over"),
    "normalise of no epsilon": (lambda: Normalise(epsilon=0.0), "epsilon must be a finite number above 0"),
    "batch of no epsilon": (lambda: NormaliseBatch(-1.0), "epsilon must be a finite number above 0"),
    "affine of an axis that is not there": (_predicting(Affine(2), ROWS), r"\[3, 4\] has no axis 2"),
    "bias of no axes": (lambda: Bias(0), "axes must be a whole number of at least 1"),
    "bias of too many axes": (_predicting(Bias(3), ROWS), r"\[3, 4\] has no 3 axes for a bias"),
    "statistics of no epsilon": (lambda: Standardise(0.0), "epsilon must be a finite number above 0"),
    "factor that is no number": (lambda: Scale(float("nan")), "factor must be a finite number, got nan"),
    "constant that is no number": (lambda: Shift("1"), "constant must be a finite number, got '1'"),  # pyright: ignore
    "no heads": (lambda: Attend(0), "heads must be a whole number of at least 1"),
    "heads that do not divide": (
        _predicting(Attend(3), ROWS, ROWS, ROWS),
        "4 units do not divide into 3 heads",
    ),
    "heads that do not divide the values": (
        _predicting(Attend(2), ROWS, ROWS, (3, 5)),
        "5 units do not divide into 2 heads",
    ),
    "keys of other units": (
        _predicting(Attend(), ROWS, (3, 5), ROWS),
        "attention takes queries, keys and values",
    ),
    "values of other positions": (_predicting(Attend(), ROWS, ROWS, (2, 4)), "attention takes queries, keys"),
    "attention over vectors": (
        _predicting(Attend(), VECTOR, VECTOR, VECTOR),
        "attention takes queries, keys",
    ),
    "causal from elsewhere": (
        _predicting(Attend(causal=True), (2, 4), ROWS, ROWS),
        "as many queries as keys",
    ),
    "attention of one input": (_predicting(Attend(), ROWS), "attend takes 3 inputs, got 1"),
    # Blocks
    "an empty block": (lambda: Block([]), "a block needs at least one map"),
    "a block of a number": (lambda: Block([3]), "made of maps, activations by name and lists of them, got 3"),
    "a step of a word": (lambda: Step("tanh"), "a step of a block must be a map"),  # pyright: ignore
    "a step with a slash": (lambda: Step(Scale(1.0), name="a/b"), "must have no '/' and no '.', got 'a/b'"),
    "a step with a dot": (lambda: Step(Scale(1.0), name="a.b"), "must have no '/' and no '.', got 'a.b'"),
    "an energy of a number": (lambda: Block(["tanh"], 2.0), "energy must be Gaussian"),  # pyright: ignore
    "several inputs that nobody named": (
        _predicting([Scale(2.0), Multiply()], VECTOR),
        "multiply takes several inputs; say which",
    ),
    "a value ahead": (
        _predicting([Step(Scale(2.0), (1,))], VECTOR),
        "reads values .*; 0 to 0 stand before it",
    ),
    "a value before the first": (_predicting([Step(Scale(2.0), (-2,))], VECTOR), "0 to 0 stand before it"),
    "a source that nothing reads": (_predicting([Scale(2.0)], VECTOR, VECTOR), "source 1 is not used"),
    "a result that nothing reads": (
        _predicting([Scale(2.0), Step(Scale(1.0), (0,))], VECTOR),
        "result of step 1 is not used",
    ),
    "two maps of one name": (
        _predicting([Step(Linear(3), name="a"), Step(Linear(3), name="a")], VECTOR),
        "two maps of a block have weights of one name",
    ),
    "a distribution of no softmax": (
        _predicting([Linear(3)], VECTOR, energy=Categorical()),
        "let the last map be 'softmax'",
    ),
    "a precision of other units": (
        _predicting([Linear(3)], VECTOR, energy=Gaussian((1.0, 2.0))),
        r"precision must be one number or 3 \(one per unit\), got 2",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_map_that_cannot_be_is_refused_in_a_sentence(mistake):
    """One sentence that says what is wrong, instead of a shape error from within torch at the first batch."""
    make, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words) as caught:
        make()
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
