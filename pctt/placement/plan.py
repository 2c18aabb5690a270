"""Where the layers of a network go on a chip, and what a training step then takes.

Every layer lies on a core of its own if the chip has the cores and their memory. Where it has not, the layers
that take the most are spread over all cores, tile by tile, one after the other until the rest fits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, cast

from pctt import sketch
from pctt._checks import require_count
from pctt.assemble import assemble
from pctt.backends.graph_lowering import lower_graph
from pctt.backends.lowering import TILE, lower
from pctt.backends.precision import PrecisionPolicy
from pctt.groups import Layout, layout, padded
from pctt.inference import Inference
from pctt.learning import Learning
from pctt.network import INPUT, Network
from pctt.placement.budget import Budget, budget, members_of, refuse_unless_it_fits
from pctt.placement.chips import Chip, Fidelity, Grid, cores
from pctt.placement.chips import chip as find_chip
from pctt.placement.cost import Cost, costs
from pctt.placement.draw import KINDS, CoreUse, FloorPlan, as_text
from pctt.program import Program

COLUMNS: tuple[tuple[str, Callable[[Cost], str]], ...] = (
    ("programs", lambda cost: f"{cost.programs:,}"),
    ("MFLOP", lambda cost: f"{cost.flops / 1e6:,.2f}"),
    ("SFPU Mop", lambda cost: f"{cost.sfpu_operations / 1e6:,.2f}"),
    ("NoC KiB", lambda cost: f"{cost.noc_bytes / 1024:,.1f}"),
    ("DRAM B", lambda cost: f"{cost.dram_bytes:,}"),
    ("eager us", lambda cost: f"{cost.eager * 1e6:,.0f}"),
    ("traced us", lambda cost: f"{cost.traced * 1e6:,.0f}"),
    ("floor us", lambda cost: f"{cost.floor * 1e6:,.1f}"),
)
"""Of the table of costs: heading and how a cost is shown."""


@dataclass(frozen=True)
class Plan:
    """A network on the cores of a chip, before anything runs.

    net, chip: which network, on which chip.    grid: (columns, rows) of cores.
    batch_size: of the largest batches.    rows: of a batch, padding included.
    inference: whose steps `costs` counts.
    layout, budget: where tensors lie, and the bytes of L1 they take.
    program: in card operations.    costs: by section.
    reasons: why a layer, by its index, is spread over all cores.
    """

    net: Network
    chip: Chip
    grid: Grid
    batch_size: int
    rows: int
    inference: Inference
    layout: Layout
    program: Program
    budget: Budget
    costs: dict[str, Cost]
    reasons: dict[int, str]

    def floor_plan(self) -> FloorPlan:
        """The plan to draw. Every core shows the same bytes, because allocation is lock-step."""
        used = self._bytes_by_kind()
        resident = [i for i in range(len(self.net.nodes)) if not self.layout.is_apart(i)]
        places = cores(self.grid)
        uses = [CoreUse(places[i], self.net.nodes[i], i or None, used) for i in resident]
        if self.layout.apart:
            uses += [
                CoreUse(place, "tiles", None, used)
                for place in places
                if place not in {use.core for use in uses}
            ]
        widths = "-".join(map(str, self.net.widths))
        across, down = self.grid
        title = f"{widths} on {self.chip.name}, {across} x {down} cores, batches of {self.batch_size}"
        uses.sort(key=lambda use: places.index(use.core))
        return FloorPlan(title, self.grid, self.chip.l1_bytes, tuple(uses), tuple(self._lines()))

    def __repr__(self) -> str:
        step = self.costs["training step"]
        used = sum(self._bytes_by_kind().values())
        return (
            f"Plan: {self.floor_plan().title}\n"
            f"  {used:,} of {self.chip.l1_bytes:,} B of L1 on each core\n"
            f"  training step of {self.inference.num_steps} inference steps: {1e6 * step.traced:,.0f} us, "
            "predicted, as a trace\n"
            "  print(plan) shows all"
        )

    def __str__(self) -> str:
        return self.as_text()

    def _repr_svg_(self) -> str:
        return sketch.floor_plan(self.floor_plan())

    def as_text(self) -> str:
        """The floor plan, the budget of each core and the costs, in ASCII, at most 110 columns wide."""
        lines = ["", "L1 of each core, bytes"]
        lines += [f"  {kind:<22} {size:>10,}" for kind, size in self._bytes_by_kind().items()]
        lines.append(f"  {'free':<22} {-self.budget.excess:>10,}")
        lines += ["", f"{'':<20}{''.join(f' {head:>9}' for head, _ in COLUMNS)}  bound by"]
        for name, cost in self.costs.items():
            numbers = "".join(f" {show(cost):>9}" for _, show in COLUMNS)
            lines.append(f"{name:<20}{numbers}  {cost.bound}")
        lines += [
            "",
            f"training step: {self.inference.num_steps} inference steps and all else. us: predicted, not "
            "measured; eager: each operation",
            "launched by the host, traced: replayed from a trace, floor: the work alone.",
        ]
        return as_text(self.floor_plan()) + "\n".join(lines) + "\n"

    def _bytes_by_kind(self) -> dict[str, int]:
        used = dict.fromkeys(KINDS, 0)
        for entry in self.budget.entries:
            used[entry.kind] += entry.bytes
        used["transient"] += self.budget.reserved
        used["circular buffers"] += self.budget.circular_buffers
        return used

    def _lines(self) -> list[str]:
        places, lines = cores(self.grid), list[str]()
        for index, (name, layer) in enumerate(
            zip(self.net.names, self.net.dense_layers("a plan"), strict=True), start=1
        ):
            what = f"{name} {self.net.widths[index - 1]}->{layer.units} {layer.activation}"
            if index in self.reasons:
                lines.append(f"{what}: spread over all cores; {self.reasons[index]}")
            else:
                x, y = places[index]
                lines.append(f"{what}: core ({x},{y})")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """What there is to say, as JSON-ready values; bytes are of each core."""
        return {
            "chip": self.chip.name,
            "grid": list(self.grid),
            "widths": list(self.net.widths),
            "batch_size": self.batch_size,
            "rows": self.rows,
            "num_steps": self.inference.num_steps,
            "layers": [
                {
                    "name": name,
                    "core": None if index in self.reasons else list(cores(self.grid)[index]),
                    "spread_because": self.reasons.get(index),
                }
                for index, name in enumerate(self.net.names, start=1)
            ],
            "budget": {
                "tensors": self.budget.tensors,
                "reserved": self.budget.reserved,
                "circular_buffers": self.budget.circular_buffers,
                "available": self.budget.available,
            },
            "costs": {name: cost.to_dict() for name, cost in self.costs.items()},
        }


def plan(
    net: Network,
    chip: str | Chip = "n150",
    batch_size: int = 32,
    inference: Inference | None = None,
    learning: Learning | None = None,
    policy: PrecisionPolicy | None = None,
    grid: Grid | None = None,
) -> Plan:
    """How `net` would be trained on a chip, with its input and its output clamped.

    chip: a name such as "n150".    batch_size: of the largest batches.    learning: None plans no update.
    policy: formats of the tensors.    grid: (columns, rows) of cores, default the chip's.

    Raises ValueError for an unknown chip, and for a network that does not fit or that a card does not run.

    Example:
        >>> import pctt
        >>> net = pctt.chain(input=64, layers=[pctt.Dense(32, "tanh"), pctt.Dense(10)])
        >>> plan(net, "n150").costs["inference step"].programs
        6
    """
    require_count("batch_size", batch_size, least=1)
    net.dense_layers("a plan")
    where_to = find_chip(chip) if isinstance(chip, str) else chip
    inference, policy, grid = inference or Inference(), policy or PrecisionPolicy(), grid or where_to.grid
    num_cores, rows = len(cores(grid)), padded(batch_size, TILE)
    clamped = [net.node_index(name) for name in (INPUT, net.output)]

    def write(where: Layout) -> Program:
        return assemble(where, inference, clamped, (), learning, uniform=True)

    where, program = arrange(net, True, write, policy, where_to, grid, rows)
    found = budget(program, where_to, grid, rows)
    reasons: dict[int, str] = {}
    if where.apart:
        _, first = _lowered(net, True, write, policy, _without_core(net, grid))
        needed = budget(first, where_to, grid, rows).total
        for layer in sorted(where.apart):
            reasons[layer] = (
                f"the chip has {num_cores} cores, all taken by the input and earlier layers"
                if layer >= num_cores
                else f"on cores of their own the layers would take {needed:,} of {where_to.l1_bytes:,} bytes"
            )
    fidelity = cast(Fidelity, policy.fidelity or where_to.fp32_fidelity)
    by_section = costs(program, found, where_to, num_cores, rows, fidelity)
    return Plan(net, where_to, grid, batch_size, rows, inference, where, program, found, by_section, reasons)


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

    grouped: stack equal layers.    write: the program for a layout.    policy: formats of the tensors.
    chip: where.    grid: (columns, rows) of cores.    rows: of a batch, padding included.

    Of a graph every tensor is spread over all cores.

    Raises ValueError for a network that does not fit even when all its layers are spread.
    """
    if net.wiring is not None:
        where = layout(net)
        program = lower_graph(write(where), where, policy)
        refuse_unless_it_fits(program, where, chip, grid, rows)
        return where, program
    apart = _without_core(net, grid)
    while True:
        where, program = _lowered(net, grouped, write, policy, apart)
        found = budget(program, chip, grid, rows)
        if found.excess <= 0:
            return where, program
        if len(apart) == len(net.layers):
            refuse_unless_it_fits(program, where, chip, grid, rows)
        apart |= {_heaviest(found, where)}


def _without_core(net: Network, grid: Grid) -> frozenset[int]:
    """The layers for which the chip has no core left: layer i lies on core i."""
    return frozenset(range(grid[0] * grid[1], len(net.layers) + 1))


def _lowered(
    net: Network,
    grouped: bool,
    write: Callable[[Layout], Program],
    policy: PrecisionPolicy,
    apart: Collection[int],
) -> tuple[Layout, Program]:
    where = layout(net, grouped, TILE, frozenset(apart))
    return where, lower(write(where), where, policy)


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
