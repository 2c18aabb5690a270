"""What the emulated and the Tenstorrent backend share: lowering, padding, masks, the limit of L1, and which
chip of a mesh has which samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pctt.backends.lowering import TILE, CardBuffer
from pctt.backends.mesh import refuse_on_mesh, with_sums_over_chips
from pctt.backends.precision import PrecisionPolicy
from pctt.groups import Layout, padded
from pctt.network import Network
from pctt.placement.budget import refuse_unless_it_fits
from pctt.placement.chips import Chip
from pctt.placement.plan import arrange
from pctt.program import BATCH, Program, Slot


class Placed:
    """A backend whose tensors lie on the cores of a chip, or of each chip of a mesh. Subclasses move the data
    and run the operations.

    A batch has as many rows on every chip: sample i is row i of all chips' rows one after the other.
    """

    name = "placed"
    uniform = True
    whole_steps = False

    def __init__(
        self,
        dtype: torch.dtype,
        chip: Chip,
        grid: tuple[int, int],
        policy: PrecisionPolicy | None,
        num_chips: int = 1,
    ) -> None:
        if dtype != torch.float32:
            raise ValueError(
                f"the {self.name} backend takes float32 weights and rounds them as its policy says, got "
                f"{dtype}; convert the weights, or use backend='reference' for float64."
            )
        self.chip = chip
        self.grid = grid
        self.num_chips = num_chips
        self.policy = policy or PrecisionPolicy()
        self.fidelity = self.policy.fidelity or chip.fp32_fidelity
        self._buffers: dict[str, CardBuffer] = {}
        self.planned_rows = 0
        self.batch_size = 0  # of the batch that runs
        self._masked: dict[int, int] = {}  # batch size that the masks of a set of buffers stand for

    def compile(
        self, net: Network, grouped: bool, write: Callable[[Layout], Program], batch_size: int
    ) -> tuple[Layout, Program]:
        self.planned_rows = self._whole_tiles(batch_size)
        self.uniform = net.wiring is None  # the nodes of a graph are served one after the other
        if self.num_chips > 1:
            refuse_on_mesh(net)

        def shared_out(where: Layout) -> Program:
            program = write(where)
            return with_sums_over_chips(program, self.num_chips) if self.num_chips > 1 else program

        rows = self.share(self.planned_rows)
        self.layout, self.program = arrange(net, grouped, shared_out, self.policy, self.chip, self.grid, rows)
        self.refuse_what_it_lacks()
        self._buffers = {
            name: buffer for name, buffer in self.program.buffers.items() if isinstance(buffer, CardBuffer)
        }
        return self.layout, self.program

    def refuse_what_it_lacks(self) -> None:
        """Raises ValueError naming a layer whose card operations this backend does not have."""

    def buffer(self, name: str) -> CardBuffer:
        return self._buffers[name]

    def share(self, rows: int) -> int:
        """How many rows of a batch each chip has."""
        return -(-rows // self.num_chips)

    def _whole_tiles(self, batch_size: int) -> int:
        """Rows of all chips, whole tiles on each."""
        return self.num_chips * padded(self.share(batch_size), TILE)

    def samples_on(self, chip: int) -> int:
        """How many samples of the batch lie on a chip."""
        share = self.share(self.planned_rows)
        return min(max(self.batch_size - chip * share, 0), share)

    def rows(self, batch_size: int) -> int:
        if batch_size > self.planned_rows:
            rows = self._whole_tiles(batch_size)
            refuse_unless_it_fits(self.program, self.layout, self.chip, self.grid, self.share(rows))
            self.planned_rows = rows
        return self.planned_rows

    def begin(self, buffers: Mapping[str, Any], batch_size: int) -> None:
        self.batch_size = batch_size
        if self._masked.get(id(buffers)) == batch_size:
            return
        self._masked[id(buffers)] = batch_size
        for name, handle in buffers.items():
            buffer = self._buffers[name]
            if buffer.content == "mask":
                rows = batch_size * buffer.positions
                for entry, width in enumerate(buffer.widths):
                    self.write(handle, Slot(name, entry, entry + 1), torch.ones(rows, width))

    def write(self, buffer: Any, slot: Slot, values: Tensor) -> None:
        entry = self._buffers[slot.buffer]
        self.put(buffer, entry, slot.start, self.whole(entry, values))

    def send_ahead(self, buffer: Any, slot: Slot, values: Tensor) -> Callable[[], None]:
        return partial(self.write, buffer, slot, values)

    def whole(self, buffer: CardBuffer, values: Tensor) -> Tensor:
        """An entry of a buffer with all its padding, fp32 on the host, from the values in its corner; of a
        batch the rows of all chips.
        """
        rows, columns = (size * TILE for size in buffer.tiles(self.share(self.planned_rows)))
        if buffer.rows == BATCH:
            rows *= self.num_chips
        values = values.detach().to("cpu", torch.float32)
        values = values[None] if values.dim() == 1 else values
        result = torch.zeros(rows, columns)
        result[: values.shape[0], : values.shape[1]] = values
        return result

    def read(self, buffer: Any, slot: Slot) -> Tensor:
        entry = self._buffers[slot.buffer]
        values = self.get(buffer, slot.start, slot.stop)
        if "@sums" in slot.buffer:  # each chip has summed over its rows; the host sums over columns and chips
            return values.unflatten(1, (self.num_chips, -1))[:, :, 0].double().sum((1, 2)).view(-1, 1, 1)
        if entry.rows != BATCH:  # all chips have the same
            values = values[:, : values.shape[1] // self.num_chips]
        return values[:, :1] if entry.rows == 1 else values

    def seed(self, seed: int) -> None:
        """Nothing here is random: lowering refuses noise."""

    def put(self, tensor: Any, buffer: CardBuffer, index: int, values: Tensor) -> None:
        """Host to entry `index`; values fp32, [rows, columns] with all padding, of a batch the rows of all
        chips.
        """
        raise NotImplementedError

    def get(self, tensor: Any, start: int, stop: int) -> Tensor:
        """A copy of entries on the host, fp32 with all padding: all chips' rows, one after the other."""
        raise NotImplementedError
