"""Groups: consecutive equal parts of a chain share one stacked buffer, so that one operation serves them all.

A *stack* is a run of consecutive nodes of equal width; their activities, errors and so on are one buffer [N,
B, D]. A *group* is a run of consecutive equal layers between nodes of one stack; their weights are one buffer
[L, D, D]. An instruction names slots of these buffers, and `program.coalesce` merges instructions on
neighbouring slots into one batched instruction. On a card a stack is one sharded tensor with one node per
core, and a group's weights likewise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from pctt.network import Network
from pctt.program import BATCH, Buffer, Slot


@dataclass(frozen=True)
class Layout:
    """Where each node and layer lives: (stack, position) per node 0..L, (group, position) per layer 1..L."""

    net: Network
    nodes: tuple[tuple[int, int], ...]
    layers: tuple[tuple[int, int], ...]

    # Looked up for every instruction, so computed once.
    @cached_property
    def _widths(self) -> tuple[int, ...]:
        return self.net.widths

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
        name = f"{role}@nodes{stack}"
        return Slot(name, position, position + 1), Buffer(
            name, self._stack_sizes[stack], BATCH, self._widths[index]
        )

    def layer(self, role: str, index: int) -> tuple[Slot, Buffer]:
        """The slot of layer `index` (1..L) in the buffer of `role`: [layers, in, out], or [layers, 1, out]
        for a bias.
        """
        group, position = self.layers[index - 1]
        fan_in, fan_out = self._widths[index - 1 : index + 1]
        name = f"{role}@layers{group}"
        rows = 1 if role.startswith("bias") else fan_in
        return Slot(name, position, position + 1), Buffer(name, self._group_sizes[group], rows, fan_out)


def layout(net: Network, grouped: bool = True) -> Layout:
    """The grouping of `net`; `grouped=False` gives every node and layer a buffer of its own."""
    widths = net.widths
    unnamed = [replace(layer, name=None) for layer in net.layers]
    # A layer joins its predecessor's group when both are equal and both keep the width: then their nodes
    # share a stack.
    keys = [
        (layer, widths[index]) if grouped and widths[index] == layer.units else (index,)
        for index, layer in enumerate(unnamed)
    ]
    node_keys = list(widths) if grouped else list(range(len(widths)))
    return Layout(net, _runs(node_keys), _runs(keys))


def _runs(keys: list[Any]) -> tuple[tuple[int, int], ...]:
    """(run, position in the run) of each key, a run being consecutive equal keys."""
    return tuple(
        (run, position)
        for run, (_, members) in enumerate(groupby(keys))
        for position, _ in enumerate(members)
    )
