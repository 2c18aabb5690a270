"""What the network is: layers in a chain or in a graph, as frozen data. Where it runs and how it learns is
decided elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pctt import describe, sketch
from pctt.layers.block import Block, Expression, Layer, express
from pctt.layers.dense import Dense
from pctt.layers.maps import Embedding, Linear, Reshape, Shape

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

    def __repr__(self) -> str:
        return describe.network(self)

    def _repr_svg_(self) -> str:
        return sketch.network(self)

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
        """Names of all nodes, those that nothing predicts first."""
        roots = (INPUT,) if self.wiring is None else tuple(root.name for root in self.wiring.roots)
        return (*roots, *self.names)

    @cached_property
    def num_roots(self) -> int:
        """How many nodes nothing predicts."""
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
        """Index of the node `output`."""
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
        """The local rules of every layer, in the order of `layers`."""
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
        """How many numbers the layers have; shared ones count once."""
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
