"""Networks from layers: one after the other, or in any graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pctt._checks import require_count
from pctt.energies import Categorical
from pctt.layers.block import Block, Expression, Layer, express
from pctt.layers.dense import Dense
from pctt.layers.maps import Function, Map
from pctt.network import INPUT, Network, Root, Rule, Wiring


def chain(
    input: int | Sequence[int],
    layers: Sequence[Layer | Map | str | Sequence[Any]],
    backward: Sequence[Dense] = (),
) -> Network:
    """A network whose layers follow each other.

    input: units of the first node, or the shape of a sample, e.g. (1, 28, 28).
    layers: at least one, each predicting the next node: `Dense(...)`, `Block([...])`, or a map such as
    `Conv2d(...)`, which makes a block by itself. A layer without a name is called after its kind and number
    (`dense1`, `dense2`, `conv2d3`, ...).
    backward: of a chain of dense layers, layers of a chain down, from the output to the input, which predict
    nodes L - 1 to 0 and are called after these (`dense1_back`, ..., `input_back`).

    Raises ValueError for an empty chain, a name used twice, shapes that do not suit each other, softmax or a
    categorical energy before the last layer, or a precision whose length is not the layer's number of units.

    >>> chain(input=784, layers=[Dense(256, "tanh"), Dense(10, "identity")]).names
    ('dense1', 'dense2')
    """
    if not layers:
        raise ValueError("a chain needs at least one layer, got none.")
    if isinstance(input, (tuple, list)) or not all(isinstance(layer, Dense) for layer in layers):
        return _chain_of_blocks(input, layers, backward)
    require_count("input", input, least=1)  # pyright: ignore[reportArgumentType]
    assert isinstance(input, int)
    names: list[str] = []
    for number, layer in enumerate(layers, start=1):
        assert isinstance(layer, Dense)
        names.append(layer.name or f"{layer.kind}{number}")
        last = number == len(layers)
        if not last and (layer.activation == "softmax" or isinstance(layer.energy, Categorical)):
            raise ValueError(
                f"layer {names[-1]!r} has softmax or a categorical energy, which only the last layer may "
                "have; "
                "give it an elementwise activation and a Gaussian energy."
            )
        layer.check()
        below = layers[number - 2]
        width = below.units if number > 1 and isinstance(below, Dense) else input
        if layer.skip and width != layer.units:
            raise ValueError(
                f"layer {names[-1]!r} skips from {width} units to {layer.units}; give both layers the same "
                "number, or drop skip."
            )
    _check_names(names, (INPUT,))
    net = Network(input, tuple(layer for layer in layers if isinstance(layer, Dense)), tuple(names))
    return replace(net, backward=_chain_down(net, backward)) if backward else net


def _check_names(names: Sequence[str], roots: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1 or name in roots or not name or "/" in name:
            others = f", without '/', and not {', '.join(map(repr, roots))}" if roots else " and without '/'"
            raise ValueError(f"layer names must be unique{others}; {name!r} is not, so rename that layer.")


def _chain_of_blocks(input: int | Sequence[int], layers: Sequence[Any], backward: Sequence[Dense]) -> Network:
    if backward:
        raise ValueError("backward layers go with a chain of dense layers on one axis; drop them.")
    shape = _shape_of(INPUT, input)
    entries: dict[str, tuple[Any, ...]] = {}
    below = INPUT
    for number, layer in enumerate(map(_layer, layers), start=1):
        name = layer.name or f"{_kind(layer)}{number}"
        _check_names([*entries, name], (INPUT,))
        entries[name] = (layer, below)
        below = name
    return graph({INPUT: shape}, entries)


def _layer(given: Any) -> Layer:
    return given if isinstance(given, (Dense, Block)) else Block(given)


def _kind(layer: Layer) -> str:
    """What an unnamed layer is called after: a block of one weighted map after that."""
    if isinstance(layer, Dense):
        return layer.kind
    kinds = [step.map.kind for step in layer.steps if not isinstance(step.map, Function)] or ["function"]
    weighted = [kind for kind in kinds if kind in ("linear", "conv2d", "conv_transpose2d", "embedding")]
    return weighted[0] if len(weighted) == 1 else kinds[0] if len(kinds) == 1 else layer.kind


def graph(
    inputs: Mapping[str, int | Sequence[int]],
    layers: Mapping[str, tuple[Any, ...]],
    input: str | None = None,
    output: str | None = None,
    shared: Mapping[str, str] | None = None,
) -> Network:
    """A network of any wiring: several parents and children per node, shared weights, cycles.

    inputs: {name: units or shape} of the nodes that nothing predicts.
    layers: {name: (layer, *sources)}; a layer is `Dense(...)`, which reads each source flat and adds what it
    makes of them, a `Block([...])`, or a map. Sources are names of nodes, also of ones further down the dict.
    A node may be predicted from itself.
    input, output: what a `Trainer` puts inputs and targets at; by default the first of `inputs` and the last
    of `layers`.
    shared: {name: other}: layers that use the weights of another one, whose gradients then add up.

    Without cycles, inference starts at a feedforward sweep. Where a cycle closes, the node that comes later
    in the order of nodes starts at 0, unless it is clamped or given an initial activity.

    Raises ValueError for unknown or repeated names, an input that nothing reads, shapes that do not suit a
    layer, weights that cannot be shared, and a categorical energy under another layer.

    >>> net = graph({"x": 3}, {"a": (Dense(4, "tanh"), "x"), "y": (Dense(2), "a", "x")})
    >>> net.weight_shapes()["y"]
    {'weight.a': (4, 2), 'weight.x': (3, 2), 'bias': (2,)}
    """
    if not layers:
        raise ValueError("a graph needs at least one layer, got none.")
    roots = tuple(Root(name, _shape_of(name, shape)) for name, shape in inputs.items())
    _check_names([*layers, *inputs], ())
    entries = {name: _entry(name, entry, (*inputs, *layers)) for name, entry in layers.items()}
    order = _in_order(entries, set(inputs))
    shared = shared or {}
    for name, other in shared.items():
        if name not in entries or other not in entries or other in shared:
            raise ValueError(
                f"shared weights go from a layer with weights of its own to another layer; {name!r}: "
                f"{other!r} "
                f"does not: the layers are {', '.join(entries)}."
            )
    if not roots and input is None:
        input = order[0]
    output = output or list(layers)[-1]
    wiring = Wiring(
        roots,
        tuple(entries[name][1] for name in order),
        tuple(shared.get(name, "") for name in order),
        input or roots[0].name,
        output,
    )
    net = Network(0, tuple(entries[name][0] for name in order), tuple(order), wiring=wiring)
    _check_graph(net)
    return replace(net, input=net.widths[net.node_index(wiring.input)])


def _shape_of(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes: tuple[Any, ...] = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not sizes:
        raise ValueError(f"node {name!r} has no shape; give units, or the shape of a sample.")
    for size in sizes:
        require_count(name, size, least=1)
    return sizes


def _entry(name: str, entry: Any, nodes: Sequence[str]) -> tuple[Layer, tuple[str, ...]]:
    if not isinstance(entry, tuple) or len(entry) < 2:
        raise ValueError(f"layer {name!r} must be (layer, source, ...), got {entry!r}.")
    layer, *sources = entry
    for source in sources:
        if source not in nodes:
            raise ValueError(
                f"layer {name!r} reads {source!r}, which is no node; the nodes are {', '.join(nodes)}."
            )
    try:
        layer = _layer(layer)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None
    return replace(layer, name=name) if isinstance(layer, Dense) else Block(
        layer.steps, layer.energy, name
    ), tuple(sources)


def _in_order(entries: Mapping[str, tuple[Layer, tuple[str, ...]]], roots: set[str]) -> list[str]:
    """Names of the layers, each after its sources; where only cycles are left the first one goes ahead."""
    left, order, placed = list(entries), list[str](), set(roots)
    while left:
        ready = [name for name in left if placed.issuperset(entries[name][1])] or left[:1]
        order += ready
        placed.update(ready)
        left = [name for name in left if name not in placed]
    return order


def _check_graph(net: Network) -> None:
    wiring = net.wiring
    assert wiring is not None
    net.node_index(wiring.input)
    if wiring.output not in net.names:
        raise ValueError(f"output must be a node that a layer predicts, got {wiring.output!r}.")
    for index, name in enumerate(net.nodes):
        if not net.children(index):
            if index < net.num_roots:
                raise ValueError(f"no layer reads the input {name!r}; drop it.")
        elif index in net.indices:
            layer = net.layer(index)
            if isinstance(layer.energy, Categorical):
                raise ValueError(
                    f"layer {name!r} has a categorical energy and {net.nodes[net.children(index)[0]]!r} "
                    "reads "
                    "it; only nodes that nothing reads may have one."
                )
    for index in net.indices:
        name, layer = net.nodes[index], net.layer(index)
        sources = net.sources(index)
        try:
            if isinstance(layer, Dense):
                layer.check()
            express(
                layer, [net.nodes[source] for source in sources], [net.shapes[source] for source in sources]
            )
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    for index in net.indices:
        name, rule = net.nodes[index], net.rule(index)
        if rule.weight_shapes(0) != net.rule(net.owner(index)).weight_shapes(0):
            raise ValueError(
                f"layer {name!r} cannot use the weights of {net.nodes[net.owner(index)]!r}: it needs "
                f"{rule.weight_shapes(0)}."
            )
        if _masks(rule) != _masks(net.rule(net.owner(index))):
            raise ValueError(
                f"layer {name!r} cannot use the weights of {net.nodes[net.owner(index)]!r}: their masks "
                "differ."
            )
        if rule.learns_variance and net.owner(index) != index:
            raise ValueError(f"layer {name!r} shares weights and learns a variance; drop one.")


def _masks(rule: Rule) -> list[tuple[str, str | float | None, int]]:
    masks = rule.masks if isinstance(rule, Expression) else []
    return [(key, entry.mask, entry.seed) for entry, key, _ in masks]


def _chain_down(net: Network, layers: Sequence[Dense]) -> Network:
    units = list(reversed(net.widths[:-1]))
    if [layer.units for layer in layers] != units:
        raise ValueError(
            f"backward layers must predict the nodes below the output, {units} units, got "
            f"{[layer.units for layer in layers]}."
        )
    if any(isinstance(layer.energy, Categorical) for layer in (*net.layers, *layers)):
        raise ValueError("a bidirectional network has Gaussian energies only; drop Categorical().")
    names = [f"{name}_back" for name in reversed(net.nodes[:-1])]
    named = [replace(layer, name=layer.name or name) for layer, name in zip(layers, names, strict=True)]
    down = chain(net.widths[-1], named)
    both = set(down.names) & set(net.names)
    if both:
        raise ValueError(f"layer {both.pop()!r} stands in both chains; rename one.")
    return down
