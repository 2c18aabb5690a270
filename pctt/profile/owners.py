"""Whose work an instruction is: the layers that its slots belong to."""

from __future__ import annotations

import re
from collections import defaultdict

from pctt.groups import Layout
from pctt.network import Network
from pctt.program import Instruction, Slot

WHOLE = "(all)"
"""Where no slot names a layer, as with what is kept per sample."""
PLACES = ("nodes", "sums", "layers", "inner", "apart", "")
"""What stands after the @ in names of buffers, before a number; nothing before that of a precision."""

Home = tuple[str, tuple[str, ...]]
"""What a slot is part of (nodes, layers, inner, ...), and the layers that it belongs to."""


class Owners:
    """The layers of a network by the names of its buffers.

    A node belongs to the layer that predicts it, and one that nothing predicts to itself. Weights shared by
    several layers belong to the one that has them.
    """

    def __init__(self, net: Network, layout: Layout) -> None:
        self._names: dict[str, tuple[str, ...]] = {}  # of the nodes of a chain, by its tag
        self._members: dict[str, list[int]] = defaultdict(list)  # nodes of a stack, layers of a group
        for part, where in zip(net.chains, (layout, layout.backward), strict=False):
            assert where is not None
            is_first = where is layout
            self._names[where.tag] = part.nodes if is_first else (net.nodes[-1], *part.nodes[1:])
            for index, (stack, _) in enumerate(where.nodes):
                self._members[f"{where.tag}nodes{stack}"].append(index)
                self._members[f"{where.tag}sums{stack}"].append(index)
            if part.wiring is None:
                for index, (group, _) in enumerate(where.layers, start=1):
                    self._members[f"{where.tag}layers{group}"].append(index)

    def of(self, instruction: Instruction) -> tuple[str, ...]:
        """The layers that an instruction serves; what it takes is theirs in equal parts.

        Those of the block or the weights that it names, otherwise those of the node that it writes. So the
        errors sent down through the weights of a layer are work of that layer.
        """
        homes = [self._home(slot) for slot in (*instruction.out, *instruction.inputs)]
        for kind in ("inner", "layers"):
            for found, names in homes:
                if found == kind:
                    return names
        return homes[0][1]

    def _home(self, slot: Slot) -> Home:
        place = slot.buffer.partition("@")[2]
        parts = re.fullmatch(r"(back_)?([a-z]*)(\d+)", place)
        if parts is None or parts[2] not in PLACES:
            return "", (WHOLE,)
        tag, kind, number = parts[1] or "", parts[2], int(parts[3])
        names = self._names[tag]
        if place in self._members:
            return kind, tuple(names[index] for index in self._members[place][slot.start : slot.stop])
        return kind, (names[number],)
