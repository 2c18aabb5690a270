"""Where the layers of a network go on a chip.

Every layer lies on a core of its own if the chip has the cores and their memory. Where it has not, the layers
that take the most are spread over all cores, tile by tile, one after the other until the rest fits.
"""

from __future__ import annotations

from collections.abc import Callable

from pctt.backends.lowering import TILE, lower
from pctt.backends.precision import PrecisionPolicy
from pctt.groups import Layout, layout
from pctt.network import Network
from pctt.placement.budget import Budget, budget, members_of, refuse_unless_it_fits
from pctt.placement.chips import Chip, Grid
from pctt.program import Program


def arrange(
    net: Network,
    grouped: bool,
    write: Callable[[Layout], Program],
    policy: PrecisionPolicy,
    chip: Chip,
    grid: Grid,
    rows: int,
) -> tuple[Layout, Program]:
    """The layout of `net` that keeps most layers on cores of their own, and its program in card operations.

    write: the program for a layout.    grid: (columns, rows) of cores.    rows: of a batch, padding included.

    Raises ValueError for a network that does not fit even when all its layers are spread.
    """
    num_layers, num_cores = len(net.layers), grid[0] * grid[1]
    apart = frozenset(range(num_cores, num_layers + 1))
    while True:
        where = layout(net, grouped, TILE, apart)
        program = lower(write(where), where, policy)
        found = budget(program, chip, grid, rows)
        if found.excess <= 0:
            return where, program
        if len(apart) == num_layers:
            refuse_unless_it_fits(program, where, chip, grid, rows)
        apart |= {_heaviest(found, where)}


def _heaviest(found: Budget, where: Layout) -> int:
    """The layer, of those on cores, whose tensors and nodes take the most bytes."""
    resident = [layer for layer in range(1, len(where.net.layers) + 1) if layer not in where.apart]
    weight = dict.fromkeys(resident, 0)
    for entry in found.entries:
        if entry.buffer.first is None:
            continue
        members = members_of(entry.buffer, where)
        if "@layers" in entry.buffer.name:
            beside = {layer for layer in members if layer in weight}
        else:
            beside = {layer for node in members for layer in (node, node + 1) if layer in weight}
        for layer in beside:
            weight[layer] += entry.bytes
    return max(weight, key=lambda layer: (weight[layer], -layer))
