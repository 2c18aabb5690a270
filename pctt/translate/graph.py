"""What a torch module computes, as values that maps make of each other, and how these are cut into the nodes
of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pctt.energies import Energy
from pctt.layers.block import Block, Step
from pctt.layers.maps import Embedding, Fill, Map, Shape
from pctt.network import Network, Weights
from pctt.wiring import graph

LAYERS = ("linear", "conv2d", "conv_transpose2d", "embedding")
"""Kinds of maps that begin a node; there is about one per layer of the module."""

VIEWS: dict[str, Callable[..., Tensor]] = {
    "t": torch.t,
    "transpose": torch.transpose,
    "permute": Tensor.permute,
    "narrow": torch.narrow,
    "view": Tensor.view,
    "unsqueeze": torch.unsqueeze,
    "squeeze": torch.squeeze,
    "getitem": lambda tensor, index: tensor[index],
}


@dataclass(frozen=True)
class Reference:
    """A parameter or buffer of the module as a map takes it.

    name: as in `state_dict`, of a tensor that stands nowhere there one of its own that begins with "*".
    views: what is done to it before use, so that it can be written back.    tensor: the result, a view.
    """

    name: str
    tensor: Tensor
    views: tuple[tuple[Any, ...], ...] = ()

    def view(self, op: str, *arguments: Any) -> Reference:
        return Reference(self.name, VIEWS[op](self.tensor, *arguments), (*self.views, (op, *arguments)))

    def of(self, tensor: Tensor) -> Tensor:
        """The same view of another tensor."""
        return reduce(lambda seen, view: VIEWS[view[0]](seen, *view[1:]), self.views, tensor)

    @property
    def key(self) -> str:
        return f"{self.name} {self.views}"


@dataclass(eq=False)
class Value:
    """What one map makes of others.

    shape: of a sample.    map: None of an input of the module.    params: of the map, by its key.
    number: values are numbered in the order of their making.
    group: values of one operation of the module.
    name: what a node that ends here is called.    label: tells its weights from others in a block.
    ends: a node ends here in any case, and has this name.
    """

    shape: Shape
    number: int
    map: Map | None = None
    inputs: tuple[Value, ...] = ()
    params: Mapping[str, Reference] = field(default_factory=dict[str, Reference])
    group: int = 0
    name: str = ""
    label: str = ""
    ends: bool = False

    @property
    def kind(self) -> str:
        return "" if self.map is None else self.map.kind

    @property
    def signature(self) -> tuple[str, ...]:
        """Equal for maps that use the same weights in the same way."""
        return (self.kind, *sorted(f"{key} {reference.key}" for key, reference in self.params.items()))


@dataclass(frozen=True)
class Translation:
    """references: of all weights, in the tree that `weights` is.
    symbols: how many there are, of inputs that embeddings read.
    """

    net: Network
    weights: Weights
    references: dict[str, dict[str, Reference]]
    symbols: dict[str, int]


class _Cut:
    """Which values are nodes, and what lies between them.

    by_operation: a node per operation of the module instead of one per layer.
    alone: values with weights that must share a block with no others that have some.
    """

    def __init__(self, output: Value, by_operation: bool, alone: set[Value]) -> None:
        self.output, self.by_operation, self.alone = output, by_operation, alone
        self.order = sorted(_live(output), key=lambda value: value.number)
        self.readers: dict[Value, list[Value]] = {value: [] for value in self.order}
        for value in self.order:
            for below in dict.fromkeys(value.inputs):
                self.readers[below].append(value)
        self.inlined = self._inlined()
        self.nodes: set[Value] = set()
        has_layer: dict[Value, bool] = {}
        has_weights: dict[Value, bool] = {}
        for value in self.order:
            inside = [below for below in value.inputs if below not in self.nodes]
            has_layer[value] = value.kind in LAYERS or any(has_layer[below] for below in inside)
            has_weights[value] = bool(value.params) or any(has_weights[below] for below in inside)
            if self._is_node(value, has_layer[value], has_weights[value]):
                self.nodes.add(value)

    def _inlined(self) -> set[Value]:
        """Values that are computed where they are read: constants, which no error shall move, and what leads
        from inputs to embeddings, whole numbers that none can move.
        """
        found = {value for value in self.order if isinstance(value.map, Fill)}
        ahead = [below for value in self.order if value.kind == "embedding" for below in value.inputs]
        while ahead:
            value = ahead.pop()
            if value.map is not None:
                if value.params:
                    raise ValueError(
                        f"{value.name}: the whole numbers that an embedding reads cannot be computed with "
                        "weights; let it read an input."
                    )
                found.add(value)
                ahead += value.inputs
        return found

    def _is_node(self, value: Value, has_layer: bool, has_weights: bool) -> bool:
        if value.map is None or value is self.output:
            return True
        if value in self.inlined:
            return False
        readers = self.readers[value]
        if value in self.alone or (has_weights and any(reader in self.alone for reader in readers)):
            return True
        if self.by_operation:
            return any(reader.group != value.group for reader in readers)
        return value.ends or len(readers) > 1 or (has_layer and readers[0].kind in LAYERS)

    def block(self, node: Value) -> list[Value]:
        """The values between a node and those it is predicted from, in order, itself included."""
        found, ahead = {node}, [node]
        while ahead:
            for below in ahead.pop().inputs:
                if below not in self.nodes and below not in found:
                    found.add(below)
                    ahead.append(below)
        return sorted(found, key=lambda value: value.number)


def _live(output: Value) -> set[Value]:
    found, ahead = {output}, [output]
    while ahead:
        for below in ahead.pop().inputs:
            if below not in found:
                found.add(below)
                ahead.append(below)
    return found


def _blocks(output: Value, by_operation: bool) -> tuple[_Cut, dict[Value, list[Value]]]:
    """The cut, and the block of every node. Weights are shared by whole layers, so a map whose weights are
    used again, beside others that are not, gets a node of its own.
    """
    alone: set[Value] = set()
    while True:
        cut = _Cut(output, by_operation, alone)
        blocks = {
            value: cut.block(value) for value in cut.order if value in cut.nodes and value.map is not None
        }
        users: dict[str, list[tuple[Value, frozenset[tuple[str, ...]]]]] = {}
        clashing: set[Value] = set()
        for block in blocks.values():
            weighted = [value for value in block if value.params]
            whole = frozenset(value.signature for value in weighted)
            if len(weighted) > len(whole):  # one map twice in a block
                clashing.update(weighted)
            for value in weighted:
                for reference in value.params.values():
                    users.setdefault(reference.key, []).append((value, whole))
        for uses in users.values():
            if len({whole for _, whole in uses}) > 1:
                clashing.update(value for value, _ in uses)
        if clashing <= alone:
            if clashing:
                value = min(clashing, key=lambda value: value.number)
                names = ", ".join(sorted({ref.name for ref in value.params.values()}))
                raise ValueError(
                    f"{names} are used again with other weights beside them; weights are shared together, so "
                    "use the same weight and bias in both places."
                )
            return cut, blocks
        alone |= clashing


def _check_ties(references: Iterable[Reference], state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where an entry of a parameter is part of two weights: they would part in training."""
    by_name: dict[str, dict[str, Reference]] = {}
    for reference in references:
        by_name.setdefault(reference.name, {})[reference.key] = reference
    for name, uses in by_name.items():
        if len(uses) > 1 and name in state:
            entries = torch.arange(state[name].numel()).view(state[name].shape)
            seen = torch.cat([use.of(entries).reshape(-1) for use in uses.values()])
            if len(seen.unique()) != len(seen):
                raise ValueError(
                    f"{name} is used in two forms, such as an embedding tied to a linear layer; pctt shares "
                    "weights only as they are, so give one of the two a copy of its own."
                )


def assemble(
    roots: Sequence[Value],
    output: Value,
    state: Mapping[str, Tensor],
    by_operation: bool,
    energy: Energy | None,
) -> Translation:
    """Cuts values into nodes and makes a network of them.

    roots: the inputs.    output: what is predicted last.    state: tensors of the module by name.
    """
    cut, blocks = _blocks(output, by_operation)
    _check_ties((ref for value in cut.order for ref in value.params.values()), state)
    names: dict[Value, str] = {root: root.name for root in roots}
    taken = set(names.values())
    for node, block in blocks.items():
        names[node] = _unique(node.name if by_operation or node.ends else _name(block), taken, "_")
    layers: dict[str, tuple[Any, ...]] = {}
    shared: dict[str, str] = {}
    owners: dict[frozenset[tuple[str, ...]], tuple[str, dict[tuple[str, ...], str]]] = {}
    references: dict[str, dict[str, Reference]] = {}
    for node, block in blocks.items():
        name, weighted = names[node], [value for value in block if value.params]
        labels: dict[tuple[str, ...], str] = {}
        if weighted:
            whole = frozenset(value.signature for value in weighted)
            if whole in owners:
                shared[name], labels = owners[whole]
            else:
                labels = _labels(weighted)
                owners[whole] = name, labels
                references[name] = {
                    f"{key}.{label}" if label else key: reference
                    for value in weighted
                    for label in (labels[value.signature],)
                    for key, reference in value.params.items()
                }
        sources = list(
            dict.fromkeys(below for value in block for below in value.inputs if below in cut.nodes)
        )
        places = {value: place for place, value in enumerate((*sources, *block))}
        steps = [
            Step(value.map, tuple(places[below] for below in value.inputs), labels.get(value.signature, ""))
            for value in block
            if value.map is not None
        ]
        own = energy if node is output else None
        layers[name] = (Block(steps, own), *(names[source] for source in sources))
    inputs = {root.name: root.shape for root in roots}
    net = graph(inputs, layers, roots[0].name, names[output], shared)
    weights = {
        name: {key: reference.tensor.detach().clone().contiguous() for key, reference in tree.items()}
        for name, tree in references.items()
    }
    return Translation(net, weights, references, _symbols(cut))


def _symbols(cut: _Cut) -> dict[str, int]:
    """Of the inputs that embeddings read: the rows of the smallest table."""
    found: dict[str, int] = {}
    for value in cut.order:
        if isinstance(value.map, Embedding):
            for below in _live(value):
                if below.map is None:
                    found[below.name] = min(found.get(below.name, value.map.num), value.map.num)
    return found


def _labels(weighted: Sequence[Value]) -> dict[tuple[str, ...], str]:
    """Names of the steps that have weights, by their signature: none where the keys tell them apart."""
    keys = [key for value in weighted for key in value.params]
    if len(set(keys)) == len(keys):
        return {value.signature: "" for value in weighted}
    paths = [value.label.split(".") for value in weighted]
    common = len(_common(paths))
    labels: dict[tuple[str, ...], str] = {}
    taken: set[tuple[str, str]] = set()
    for value, path in zip(weighted, paths, strict=True):
        base = "_".join(path[min(common, len(path) - 1) :]) or value.kind
        label, number = base, 1
        while any((label, key) in taken for key in value.params):
            number += 1
            label = f"{base}_{number}"
        taken |= {(label, key) for key in value.params}
        labels[value.signature] = label
    return labels


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    """What all paths begin with."""
    found: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return found


def _name(block: Sequence[Value]) -> str:
    """Of a node: that of the layer in it, of several what their names have in common."""
    found = [value.label for value in block if value.kind in LAYERS]
    found = found or [value.label for value in block if value.params][-1:]
    if not found:
        return block[-1].name
    return ".".join(_common([label.split(".") for label in found])) or found[-1]


def _unique(name: str, taken: set[str], joint: str) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}{joint}{number}"
    taken.add(found)
    return found
