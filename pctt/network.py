"""What the network is: layers in a chain or in a graph, as frozen data. Where it runs and how it learns is
decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pctt._checks import require_count
from pctt.energies import Categorical, Gaussian
from pctt.initialisers import initialise, initialise_weight
from pctt.layers.block import Block, Expression, Layer, express
from pctt.layers.dense import Dense
from pctt.layers.maps import Embedding, Function, Linear, Map, Reshape, Shape

INPUT = "input"

Weights = dict[str, dict[str, Tensor]]
"""{layer name: {"weight": [in, out], "bias": [out]}}, for other maps than dense ones as they say"""

Rule = Dense | Expression
"""What has the local rules of a layer: in a chain of dense layers these themselves, else what a block
becomes once it knows the shapes of its sources.
"""


@dataclass(frozen=True)
class Root:
    """A node that nothing predicts: data, or a cause that inference finds.    shape: of one sample."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Wiring:
    """How layers hang together that do not simply follow each other.

    roots: the nodes that nothing predicts.
    sources: per layer, the names of the nodes it predicts from; a node may come after the layer (a cycle).
    shared: per layer, the name of the layer whose weights it uses, "" for its own.
    input, output: the nodes that a `Trainer` puts inputs and targets at.
    """

    roots: tuple[Root, ...]
    sources: tuple[tuple[str, ...], ...]
    shared: tuple[str, ...]
    input: str
    output: str


@dataclass(frozen=True)
class Network:
    """Nodes, and the layers that predict them. Nodes are numbered: those that nothing predicts come first,
    then those of the layers, each named after its layer. In a chain node 0 is `input` and layer l predicts
    node l.

    input: units of the node `input`.    layers, names: one name per layer, unique.
    backward: a chain down that predicts the same nodes from the output on, for bidirectional predictive
        coding; its input is node L, its layers predict nodes L - 1 to 0.
    wiring: None for a chain of dense layers.
    """

    input: int
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    backward: Network | None = None
    wiring: Wiring | None = None

    @property
    def chains(self) -> tuple[Network, ...]:
        """The chain up, and the chain down if there is one."""
        return (self,) if self.backward is None else (self, self.backward)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of all layers, those of the chain down included."""
        return tuple(name for part in self.chains for name in part.names)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        roots = (INPUT,) if self.wiring is None else tuple(root.name for root in self.wiring.roots)
        return (*roots, *self.names)

    @cached_property
    def num_roots(self) -> int:
        return len(self.nodes) - len(self.names)

    @cached_property
    def indices(self) -> range:
        """Of the nodes that a layer predicts."""
        return range(self.num_roots, len(self.nodes))

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of one sample of every node."""
        if self.wiring is None:
            dense = (layer for layer in self.layers if isinstance(layer, Dense))
            return ((self.input,), *((layer.units,) for layer in dense))
        return _shapes(self)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Units of every node."""
        return tuple(map(math.prod, self.shapes))

    @property
    def input_name(self) -> str:
        """The node that a `Trainer` puts inputs at."""
        return INPUT if self.wiring is None else self.wiring.input

    @property
    def output(self) -> str:
        """The node that a `Trainer` puts targets at."""
        return self.names[-1] if self.wiring is None else self.wiring.output

    @cached_property
    def output_index(self) -> int:
        return self.node_index(self.output)

    def dense_layers(self, what: str) -> tuple[Dense, ...]:
        """The layers of a chain of dense ones. Raises ValueError, saying that `what` takes no other
        network.
        """
        layers = tuple(layer for layer in self.layers if isinstance(layer, Dense))
        if self.wiring is not None:
            raise ValueError(
                f"{what} takes a chain of dense layers from units to units, and this is a graph."
            )
        return layers

    def layer(self, index: int) -> Layer:
        """The layer that predicts node `index`."""
        return self.layers[index - self.num_roots]

    def rule(self, index: int) -> Rule:
        """The local rules of the layer that predicts node `index`."""
        return self.rules[index - self.num_roots]

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        if self.wiring is None:
            return tuple(layer for layer in self.layers if isinstance(layer, Dense))
        return tuple(
            express(layer, self.wiring.sources[number], [self.shapes[j] for j in self._sources[number]])
            for number, layer in enumerate(self.layers)
        )

    @cached_property
    def _sources(self) -> tuple[tuple[int, ...], ...]:
        if self.wiring is None:
            return tuple((number,) for number in range(len(self.layers)))
        places = {name: index for index, name in enumerate(self.nodes)}
        return tuple(tuple(places[name] for name in names) for names in self.wiring.sources)

    @cached_property
    def _children(self) -> tuple[tuple[int, ...], ...]:
        children: list[list[int]] = [[] for _ in self.nodes]
        for index in self.indices:
            for source in dict.fromkeys(self.sources(index)):
                children[source].append(index)
        return tuple(map(tuple, children))

    def sources(self, index: int) -> tuple[int, ...]:
        """The nodes that node `index` is predicted from."""
        return self._sources[index - self.num_roots]

    def children(self, index: int) -> tuple[int, ...]:
        """The nodes that are predicted from node `index`, each once."""
        return self._children[index]

    def vocabulary(self, index: int) -> int | None:
        """How many whole numbers an embedding that reads node `index` knows; None where none reads it."""
        sizes: list[int] = []
        for child in self.children(index):
            rule = self.rule(child)
            for map_, inputs, _ in rule.parts if isinstance(rule, Expression) else ():
                sources = [self.sources(child)[value] for value in inputs if value < len(self.sources(child))]
                if isinstance(map_, Embedding) and index in sources:
                    sizes.append(map_.num)
        return min(sizes, default=None)

    @cached_property
    def _owners(self) -> tuple[int, ...]:
        if self.wiring is None:
            return tuple(self.indices)
        return tuple(
            self.node_index(name) if name else index
            for index, name in zip(self.indices, self.wiring.shared, strict=True)
        )

    def owner(self, index: int) -> int:
        """The layer whose weights layer `index` uses: itself, unless they are shared."""
        return self._owners[index - self.num_roots]

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The layers that have weights of their own."""
        return tuple(index for index in self.indices if self.owner(index) == index)

    @cached_property
    def sources_ahead(self) -> frozenset[int]:
        """Nodes that an earlier node, or the node itself, is predicted from: where cycles close."""
        return frozenset(j for index in self.indices for j in self.sources(index) if j >= index)

    def node_index(self, name: str) -> int:
        """Index of the node called `name`. Raises ValueError that lists the nodes there are."""
        try:
            return self.nodes.index(name)
        except ValueError:
            raise ValueError(f"no node is called {name!r}; the nodes are {', '.join(self.nodes)}.") from None

    def weight_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of every layer that has weights, by its name."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for part in self.chains:
            for index in part.owners:
                rule = part.rule(index)
                own = rule.weight_shapes(part.widths[part.sources(index)[0]])
                if own or part.wiring is None:
                    shapes[part.nodes[index]] = own
        return shapes

    def num_weights(self) -> int:
        return sum(
            torch.Size(shape).numel() for shapes in self.weight_shapes().values() for shape in shapes.values()
        )


def _shapes(net: Network) -> tuple[Shape, ...]:
    """Found along the sources; where a cycle leaves one open, by what the layer says itself."""
    wiring = net.wiring
    assert wiring is not None
    known: dict[str, Shape] = {root.name: root.shape for root in wiring.roots}
    for name, layer in zip(net.names, net.layers, strict=True):
        if isinstance(layer, Dense):
            known[name] = (layer.units,)
    left = [
        entry for entry in zip(net.names, net.layers, wiring.sources, strict=True) if entry[0] not in known
    ]
    believed = left[:0]
    while left:
        ready = [entry for entry in left if all(source in known for source in entry[2])]
        if not ready:
            said = next((entry for entry in left if _said(entry[1])), None)
            if said is None:
                raise ValueError(
                    f"the shape of node {left[0][0]!r} depends on itself; predict one node of the cycle by a "
                    "Dense layer."
                )
            known[said[0]] = _said(said[1])
            believed.append(said)
            left.remove(said)
            continue
        for name, layer, sources in ready:
            try:
                known[name] = express(layer, sources, [known[source] for source in sources]).shape
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
        left = [entry for entry in left if entry[0] not in known]
    for name, layer, sources in believed:
        try:
            found = express(layer, sources, [known[source] for source in sources]).shape
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        if found != known[name]:
            raise ValueError(
                f"the shape of node {name!r} depends on itself; predict one node of the cycle by a Dense "
                "layer."
            )
    return tuple(known[name] for name in net.nodes)


def _said(layer: Layer) -> Shape:
    """The shape that the last `Linear` or `Reshape` of a block gives a sample of one axis; () without one."""
    for step in reversed(layer.steps) if isinstance(layer, Block) else ():
        if isinstance(step.map, Linear):
            return (step.map.units,)
        if isinstance(step.map, Reshape):
            return step.map.shape
    return ()


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


def init(
    net: Network,
    seed: int = 0,
    scheme: str = "xavier",
    gain: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Seeded initial weights; biases are zero.

    scheme: "xavier" (uniform, Glorot & Bengio 2010), "kaiming" (normal, fan-in, He et al. 2015), "orthogonal"
    (Saxe et al. 2014) or "normal" (standard deviation = gain).
    gain: factor on the scheme's own scale; by default 1, for kaiming the activation's gain, for normal 0.05.
    dtype: drawn in float64 and rounded, so float32 and float64 networks of one seed agree.

    Returns {layer name: {"weight": [in, out], "bias": [out]}}; of other maps than dense ones the weights have
    torch's shapes, fan-in is what one output reads, scales start at 1, and embeddings at N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for part in net.chains:
        for index in part.owners:
            rule, name = part.rule(index), part.nodes[index]
            if isinstance(rule, Dense):
                fan_in = part.widths[index - 1]
                weight = initialise_weight(fan_in, rule.units, rule.activation, scheme, gain, generator)
                weights[name] = {"weight": weight.to(dtype)}
                if rule.bias:
                    weights[name]["bias"] = torch.zeros(rule.units, dtype=dtype)
            elif rule.weight_shapes():
                layer = part.layer(index)
                function = layer.activation if isinstance(layer, Dense) else None
                drawn = _start(rule, function, scheme, gain, generator)
                weights[name] = {key: values.to(dtype) for key, values in drawn.items()}
            if rule.learns_variance and isinstance(rule.energy, Gaussian):
                weights[name]["variance"] = (1.0 / rule.energy.matrix(rule.units)).to(dtype)
    return weights


def _start(
    rule: Expression, function: str | None, scheme: str, gain: float | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Initial weights of a block: matrices and kernels by the scheme, scales and variances 1, the rest 0.

    function: the activation of a dense layer, before or after its product; else the one that follows a map.
    """
    weights: dict[str, Tensor] = {}
    for map_, shapes, keys, following in rule.weighted_maps():
        for key, shape in map_.weight_shapes(shapes).items():
            if key != "weight" or len(shape) == 1:
                value = 1.0 if key in ("weight", "running_var") else 0.0
                weights[keys[key]] = torch.full(shape, value, dtype=torch.float64)
                continue
            fan_in, fan_out = map_.fans(shapes)
            if isinstance(map_, Embedding):
                drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
                weights[keys[key]] = drawn if gain is None else gain * drawn
                continue
            weights[keys[key]] = initialise(
                shape, fan_in, fan_out, function or following, scheme, gain, generator
            )
            if isinstance(map_, Linear) and map_.mask is not None:
                weights[keys[key]] *= map_.drawn_mask(shape)
    return weights


def check_weights(net: Network, weights: Weights) -> torch.dtype:
    """The common dtype of `weights`. Raises ValueError where names, shapes or dtypes do not fit `net`."""
    shapes = net.weight_shapes()
    if set(weights) != set(shapes):
        raise ValueError(
            f"weights are for layers {sorted(weights)}, the network has {sorted(shapes)}; "
            "use the weights of this network or pctt.init(net)."
        )
    dtypes = set()
    for name, expected in shapes.items():
        if set(weights[name]) != set(expected):
            raise ValueError(
                f"layer {name!r} needs {sorted(expected)}, its weights hold {sorted(weights[name])}."
            )
        for key, shape in expected.items():
            tensor = weights[name][key]
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name}/{key} must be a torch tensor, got {type(tensor).__name__}.")
            if tuple(tensor.shape) != shape:
                axes = " ([in, out])" if len(shape) == 2 else ""
                raise ValueError(f"{name}/{key} must have shape {shape}{axes}, got {tuple(tensor.shape)}.")
            dtypes.add(tensor.dtype)
    if not shapes:  # nothing to learn: maps without weights
        return torch.get_default_dtype()
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(
            f"weights must share one floating dtype, got {sorted(map(str, dtypes))}; convert them first."
        )
    return next(iter(dtypes))
