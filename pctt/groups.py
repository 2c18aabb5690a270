"""Groups: consecutive equal parts of a chain share one stacked buffer, so that one operation serves them all.

A *stack* is a run of consecutive nodes of equal width; their activities, errors and so on are one buffer [N,
B, D]. A *group* is a run of consecutive layers between nodes of one stack, all with a bias or all without;
their weights are one buffer [L, D, D]. An instruction names slots of these buffers, and `program.coalesce`
merges instructions on neighbouring slots into one batched instruction. On a card, which stores whole tiles,
widths count in tiles; a stack is one sharded tensor with one node per core, and a group's weights likewise.
What one core cannot hold stands apart: a layer whose tiles are spread over all cores is a group of its own,
and a node with such layers only is a stack of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from pctt.network import Network
from pctt.program import BATCH, Buffer, Slot


@dataclass(frozen=True)
class Layout:
    """Where each node and layer lives: (stack, position) per node 0..L, (group, position) per layer 1..L.

    tile: what rows and columns of weights, and columns of nodes, are padded to a multiple of.
    apart: layers that are spread over all cores.
    tag: in the names of all buffers.    backward: of the chain down, if the network has one.
    """

    net: Network
    nodes: tuple[tuple[int, int], ...]
    layers: tuple[tuple[int, int], ...]
    tile: int = 1
    apart: frozenset[int] = frozenset()
    tag: str = ""
    backward: Layout | None = None

    def is_apart(self, index: int) -> bool:
        """Whether node `index` is spread over all cores: no layer beside it lies on one core."""
        return _is_apart(self.net, self.apart, index)

    # Looked up for every instruction, so computed once.
    @cached_property
    def _widths(self) -> tuple[int, ...]:
        return tuple(padded(width, self.tile) for width in self.net.widths)

    @cached_property
    def _stack_sizes(self) -> Counter[int]:
        return Counter(stack for stack, _ in self.nodes)

    @cached_property
    def _group_sizes(self) -> Counter[int]:
        return Counter(group for group, _ in self.layers)

    def node(self, role: str, index: int) -> tuple[Slot, Buffer]:
        """The slot of node `index` in the buffer of `role`, and that buffer: [nodes in the stack, batch,
        units].
        """
        stack, position = self.nodes[index]
        name = f"{role}@{self.tag}nodes{stack}"
        return Slot(name, position, position + 1), Buffer(
            name, self._stack_sizes[stack], BATCH, self._widths[index]
        )

    def sum(self, role: str, index: int) -> tuple[Slot, Buffer]:
        """The slot of a number that belongs to node `index`, in a buffer [nodes in the stack, 1, 1]."""
        stack, position = self.nodes[index]
        name = f"{role}@{self.tag}sums{stack}"
        return Slot(name, position, position + 1), Buffer(name, self._stack_sizes[stack], 1, 1)

    def layer(self, role: str, index: int) -> tuple[Slot, Buffer]:
        """The slot of layer `index` (1..L) in the buffer of `role`: [layers, in, out], or [layers, 1, out]
        for a bias or a variance. In a graph that of the layer whose weights it uses, with all axes of a
        weight but the first in one.
        """
        if self.net.wiring is not None:
            return self._weight(role, self.net.owner(index))
        group, position = self.layers[index - 1]
        fan_in, fan_out = self._widths[index - 1 : index + 1]
        name = f"{role}@{self.tag}layers{group}"
        rows = 1 if is_row(role) else fan_in
        return Slot(name, position, position + 1), Buffer(name, self._group_sizes[group], rows, fan_out)

    def _weight(self, role: str, owner: int) -> tuple[Slot, Buffer]:
        shape = self._weight_shapes[owner][weight_of(role, self._weight_shapes[owner])]
        rows, columns = (1, *shape) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
        name = f"{role}@{self.tag}layers{owner}"
        return Slot(name, 0, 1), Buffer(name, 1, rows, columns)

    @cached_property
    def _weight_shapes(self) -> dict[int, dict[str, tuple[int, ...]]]:
        return {index: self.net.rule(index).weight_shapes(0) for index in self.net.owners}

    def inner(self, role: str, index: int, units: int) -> tuple[Slot, Buffer]:
        """The slot of a value within the block that predicts node `index`: [1, batch, units]."""
        name = f"{role}@{self.tag}inner{index}"
        return Slot(name, 0, 1), Buffer(name, 1, BATCH, units)


def weight_of(role: str, names: Collection[str]) -> str:
    """Which of a layer's weights a role is about: itself, its gradient, a moment of that, a mean."""
    about = role.removeprefix("mask of ").removeprefix("mean_").removeprefix("kept_")
    found = [name for name in names if about == name or about.startswith(f"{name}_")]
    return max(found, key=len)


def is_row(role: str) -> bool:
    """Whether tensors of `role` hold a number per unit of a layer, not one per weight."""
    return "bias" in role or "variance" in role


def padded(size: int, tile: int) -> int:
    """The smallest multiple of `tile` that holds `size`."""
    return -(-size // tile) * tile


def layout(net: Network, grouped: bool = True, tile: int = 1, apart: frozenset[int] = frozenset()) -> Layout:
    """The grouping of `net`; `grouped=False` gives every node and layer a buffer of its own, and so has a
    graph.
    """
    if net.wiring is not None:
        nodes = tuple((index, 0) for index in range(len(net.nodes)))
        return Layout(net, nodes, nodes[net.num_roots :], tile, apart)
    widths = [padded(width, tile) for width in net.widths]

    def joins(index: int) -> bool:
        """Whether layer `index` may share a group: it keeps the width, so its nodes share a stack."""
        return grouped and index not in apart and widths[index - 1] == widths[index]

    layer_keys = [
        (layer.bias, widths[i]) if joins(i) else (i,)
        for i, layer in enumerate(net.dense_layers("grouping"), start=1)
    ]
    node_keys = [
        (width,) if grouped and not _is_apart(net, apart, i) else (width, i) for i, width in enumerate(widths)
    ]
    below = layout(net.backward, grouped, tile) if net.backward is not None else None
    down = None if below is None else replace(below, tag="back_")
    return Layout(net, _runs(node_keys), _runs(layer_keys), tile, apart, backward=down)


def _is_apart(net: Network, apart: frozenset[int], node: int) -> bool:
    return all(layer in apart for layer in (node, node + 1) if 1 <= layer <= len(net.layers))


def _runs(keys: list[Any]) -> tuple[tuple[int, int], ...]:
    """(run, position in the run) of each key, a run being consecutive equal keys."""
    return tuple(
        (run, position)
        for run, (_, members) in enumerate(groupby(keys))
        for position, _ in enumerate(members)
    )
