"""What `pctt plan --fused` shows: which cores hold which layer, and what a step would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pctt import sketch
from pctt.backends.fused_plan import CIRCULAR_BUFFER_BYTES
from pctt.network import Network
from pctt.placement.budget import Entry
from pctt.placement.chips import cores
from pctt.placement.draw import KINDS, CoreUse, FloorPlan, as_text
from pctt.placement.fused_cost import FusedCost, FusedPlacement


@dataclass(frozen=True)
class FusedReport:
    """A network as the fused kernel would train it on a chip, and the predicted cost.

    net, batch_size, num_steps: what is trained, and its inference steps.    placement: on which cores.
    """

    net: Network
    placement: FusedPlacement
    cost: FusedCost
    batch_size: int
    num_steps: int

    def floor_plan(self) -> FloorPlan:
        """The plan to draw. Tensors take room on every core, as allocation is lock-step; working memory,
        instructions and counters, all transient here, are drawn as those of the core itself.
        """
        placement, chip = self.placement, self.placement.chip
        places, shared = cores(chip.grid), dict.fromkeys(KINDS, 0)
        for buffer in placement.tasks.buffers.values():
            size = placement.cores.bytes(buffer, placement.tasks.rows)
            shared[Entry(buffer, size).kind] += size
        shared["circular buffers"] += CIRCULAR_BUFFER_BYTES
        working = [0] * placement.cores.total
        for buffer in placement.tasks.working.values():
            for core in placement.cores.held_by(buffer):
                working[core] += placement.cores.bytes(buffer, placement.tasks.rows)
        overhead = placement.l1_bytes - sum(shared.values()) - max(working)
        uses = [
            CoreUse(
                places[core],
                name,
                node or None,
                {**shared, "transient": shared["transient"] + working[core] + overhead},
            )
            for node, name in enumerate(self.net.nodes)
            for core in placement.cores.of(node)
        ]
        across, down = chip.grid
        widths = "-".join(map(str, self.net.widths))
        title = f"{widths} fused on {chip.name}, {across} x {down} cores, batches of {self.batch_size}"
        return FloorPlan(title, chip.grid, chip.l1_bytes, tuple(uses), tuple(self._lines()))

    def _lines(self) -> list[str]:
        lines: list[str] = []
        layers = self.net.dense_layers("a plan")
        for index, (name, layer) in enumerate(zip(self.net.names, layers, strict=True), start=1):
            held = self.placement.cores.of(index)
            where = f"core {held[0]}" if len(held) == 1 else f"cores {held[0]} to {held[-1]}"
            busy = self.cost.busy[held[0]]
            what = f"{name} {self.net.widths[index - 1]}->{layer.units} {layer.activation}"
            lines.append(f"{what}: {where}, busy {busy:.0%} of an inference step")
        return lines

    def __repr__(self) -> str:
        cost = self.cost
        return (
            f"FusedReport: {self.floor_plan().title}\n"
            f"  training step of {self.num_steps} inference steps: {1e6 * cost.training:,.0f} us, predicted\n"
            "  print(report) shows all"
        )

    def __str__(self) -> str:
        return self.as_text()

    def _repr_svg_(self) -> str:
        return sketch.floor_plan(self.floor_plan())

    def as_text(self) -> str:
        """The floor plan and the predicted times, in ASCII, at most 110 columns wide."""
        cost = self.cost
        rows = [
            ("inference step", cost.step, cost.step_floor, cost.step_vector_floor, cost.step_noc_bytes),
            (
                "training step",
                cost.training,
                cost.training_floor,
                cost.training_vector_floor,
                cost.training_noc_bytes,
            ),
        ]
        lines = ["", f"{'':<16}{'us':>10}{'products, us':>14}{'and SFPU, us':>14}{'NoC KiB':>12}"]
        lines += [
            f"{name:<16}{1e6 * time:>10.1f}{1e6 * floor:>14.1f}{1e6 * vector:>14.1f}{noc / 1024:>12,.1f}"
            for name, time, floor, vector, noc in rows
        ]
        shares = ", ".join(f"{unit} {share:.0%}" for unit, share in cost.shares.items())
        lines += [
            "",
            f"The busiest core in an inference step: {shares}.",
            f"training step: {self.num_steps} inference steps and all else, one launch. us: predicted, not "
            "measured. products, and",
            "SFPU: what the arithmetic alone takes on the core with the most of it.",
        ]
        return as_text(self.floor_plan()) + "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """What there is to say, as JSON-ready values."""
        placement, cost = self.placement, self.cost
        return {
            "chip": placement.chip.name,
            "fused": True,
            "widths": list(self.net.widths),
            "batch_size": self.batch_size,
            "num_steps": self.num_steps,
            "nodes": [
                {"name": name, "cores": list(placement.cores.of(node))}
                for node, name in enumerate(self.net.nodes)
            ],
            "l1_bytes": placement.l1_bytes,
            "l1_available": placement.chip.l1_bytes,
            "seconds": {"inference step": cost.step, "training step": cost.training},
            "floor": {"inference step": cost.step_floor, "training step": cost.training_floor},
            "noc_bytes": {"inference step": cost.step_noc_bytes, "training step": cost.training_noc_bytes},
            "busy": list(cost.busy),
        }
