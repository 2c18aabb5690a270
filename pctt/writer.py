"""Where instructions are written: slots of the buffers of a layout, and one method per operation.

What the rules of layers, dynamics and learning need beside these is in `assemble.py`.
"""

from __future__ import annotations

from pctt.energies import Gaussian
from pctt.groups import Layout
from pctt.network import Network
from pctt.program import BATCH, Buffer, Instruction, Slot


class AbstractWriter:
    """Collects instructions in `code` and the buffers they use in `buffers`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.net: Network = layout.net
        self.buffers: dict[str, Buffer] = {}
        self.code: list[Instruction] = []
        for index in self.net.owners:
            if self.net.wiring is not None:  # also those that no instruction reads
                for key in self.net.rule(index).weight_shapes(0):
                    self.layer(key, index)
            if self.net.rule(
                index
            ).learns_variance:  # there also where nothing is learnt, for whoever reads the weights
                self.layer("variance", index)

    # --- slots ----------------------------------------------------------------------------------------------

    def node(self, role: str, index: int) -> Slot:
        """A tensor of node `index`, [batch, units]."""
        return self._made(*self.layout.node(role, index))

    def layer(self, role: str, index: int) -> Slot:
        """A tensor of layer `index`, [in, out] or for a bias or a variance [out]."""
        return self._made(*self.layout.layer(role, index))

    def inner(self, role: str, index: int, units: int) -> Slot:
        """A tensor within the block that predicts node `index`, [batch, units]."""
        return self._made(*self.layout.inner(role, index, units))

    def sum(self, role: str, index: int) -> Slot:
        """A number of node `index`."""
        return self._made(*self.layout.sum(role, index))

    def sample(self, role: str) -> Slot:
        """A number of each sample, [batch, 1]."""
        name = f"{role}@samples"
        return self._made(Slot(name, 0, 1), Buffer(name, 1, BATCH, 1))

    def precision(self, index: int) -> Slot:
        """P of node `index`: one row where it is diagonal."""
        name, units = f"precision@{self.layout.tag}{index}", self.net.widths[index]
        energy = self.net.layer(index).energy
        full = isinstance(energy, Gaussian) and energy.is_full
        return self._made(Slot(name, 0, 1), Buffer(name, 1, units if full else 1, units))

    def _made(self, slot: Slot, buffer: Buffer) -> Slot:
        self.buffers[buffer.name] = buffer
        return slot

    # --- instructions ---------------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        out: Slot,
        *inputs: Slot,
        scale: float = 1.0,
        scalar: str | None = None,
        function: str | None = None,
    ) -> Slot:
        self.code.append(Instruction(op, (out,), inputs, scale, scalar, function))
        return out

    def copy(self, out: Slot, a: Slot, scale: float = 1.0, scalar: str | None = None) -> Slot:
        return self.emit("copy", out, a, scale=scale, scalar=scalar)

    def add(self, out: Slot, a: Slot, b: Slot, scale: float = 1.0, scalar: str | None = None) -> Slot:
        return self.emit("add", out, a, b, scale=scale, scalar=scalar)

    def add_scaled(self, a: Slot, into: Slot, addend: Slot | None, scale: float, scalar: str | None) -> None:
        """into = addend + scale scalars[scalar] a; no addend is 0."""
        if addend is None:
            self.copy(into, a, scale, scalar)
        else:
            self.add(into, addend, a, scale, scalar)

    def activate(self, out: Slot, a: Slot, function: str) -> Slot:
        return self.emit("activate", out, a, function=function)

    def derivative(self, out: Slot, v: Slot, drive: Slot, value: Slot, function: str) -> Slot:
        return self.emit("derivative", out, v, drive, value, function=function)

    def product(
        self,
        out: Slot,
        a: Slot,
        weight: Slot,
        addend: Slot | None,
        scale: float = 1.0,
        scalar: str | None = None,
    ) -> Slot:
        addends = () if addend is None else (addend,)
        return self.emit("product", out, a, weight, *addends, scale=scale, scalar=scalar)

    def product_transposed(
        self,
        out: Slot,
        a: Slot,
        weight: Slot,
        addend: Slot | None = None,
        scale: float = 1.0,
        scalar: str | None = None,
    ) -> Slot:
        addends = () if addend is None else (addend,)
        return self.emit("product_transposed", out, a, weight, *addends, scale=scale, scalar=scalar)

    def outer(self, out: Slot, a: Slot, b: Slot, scale: float, scalar: str) -> Slot:
        return self.emit("outer", out, a, b, scale=scale, scalar=scalar)

    def column_sum(self, out: Slot, a: Slot, scale: float, scalar: str) -> Slot:
        return self.emit("column_sum", out, a, scale=scale, scalar=scalar)
