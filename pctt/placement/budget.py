"""The budget of L1: what every tensor of a program takes on each core, and whether that fits.

Allocation is lock-step: a shard that lies on one core reserves its addresses on every core, so what counts is
the sum over all tensors of their bytes per core, wherever they lie. Tensors grow from the top of L1, the
circular buffers of the operation that is running from the bottom.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pctt.backends.lowering import TILE, CardBuffer
from pctt.backends.precision import BYTES
from pctt.groups import Layout
from pctt.placement.chips import CHIPS, Chip, Grid
from pctt.program import Instruction, Program

TILE_BYTES = TILE * TILE * 4

KINDS = {
    "weights": ("weight", "bias", "operand", "transposed", "precision"),
    "learning state": ("_momentum", "_moment"),
    "transient": ("_gradient", "transposing", "transposed_activity", "scratch", "square", "product", "step"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the budget. members: the nodes or layers it belongs to, none for a number.
    bytes: on each core.
    """

    buffer: CardBuffer
    bytes: int

    @property
    def kind(self) -> str:
        """weights, learning state, transient, or activities and errors."""
        role = self.buffer.role.removesuffix("^")
        for kind in ("learning state", "transient"):
            if any(role.endswith(end) for end in KINDS[kind]):
                return kind
        return "weights" if role in KINDS["weights"] else "activities and errors"


@dataclass(frozen=True)
class Budget:
    """L1 of each core, in bytes."""

    entries: tuple[Entry, ...]
    circular_buffers: int
    available: int

    @property
    def tensors(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def total(self) -> int:
        return self.tensors + self.circular_buffers

    @property
    def excess(self) -> int:
        """Bytes too many; not above 0 if it fits."""
        return self.total - self.available


def card_buffer(program: Program, name: str) -> CardBuffer:
    """A buffer of a lowered program."""
    found = program.buffers[name]
    assert isinstance(found, CardBuffer), name
    return found


def budget(program: Program, chip: Chip, grid: Grid, rows: int) -> Budget:
    """The budget of a lowered program at `rows` rows a batch on a grid of (columns, rows) cores."""
    num_cores = grid[0] * grid[1]
    buffers = [card_buffer(program, name) for name in program.buffers]
    entries = tuple(Entry(buffer, buffer.bytes_per_core(rows, num_cores)) for buffer in buffers)
    code = {*program.training_step(), *program.refresh}
    largest = max((_circular(i, program, num_cores, rows) for i in code), default=0)
    return Budget(entries, largest, chip.l1_bytes)


@dataclass(frozen=True)
class SpreadProduct:
    """How a product whose operands are spread over the cores is shared among them: each core computes
    some of the columns of the result, or some of its rows, in blocks along the inner dimension.

    rows, columns, depth: tiles per core of the result, tiles of a block.    by_columns: what is shared.
    """

    rows: int
    columns: int
    depth: int
    by_columns: bool

    def circular_buffers(self, first: int, second: int, out: int) -> int:
        """Bytes on a core; first, second, out: of one tile of the operands and of the result."""
        operands = 2 * self.depth * (self.rows * first + self.columns * second)
        partial_sums = 0 if out == TILE_BYTES else TILE_BYTES
        return operands + self.rows * self.columns * (out + partial_sums)


def spread_product(rows: int, depth: int, columns: int, num_cores: int) -> SpreadProduct:
    """The sharing of a product of rows x depth by depth x columns tiles."""
    block = next(size for size in (4, 3, 2, 1) if depth % size == 0)
    if columns >= rows:
        return SpreadProduct(rows, -(-columns // num_cores), block, by_columns=True)
    return SpreadProduct(-(-rows // num_cores), columns, block, by_columns=False)


def _circular(instruction: Instruction, program: Program, num_cores: int, rows: int) -> int:
    """Bytes of the circular buffers of one operation that are not aliased to the shards of its tensors."""
    out = card_buffer(program, instruction.out[0].buffer)
    if instruction.op != "matmul":
        return ELEMENTWISE_TILES * TILE_BYTES
    height, width = out.tiles(rows)
    if out.first is not None:  # partial sums, where the output has another format than the accumulator
        return 0 if out.format == "float32" else height * width * TILE_BYTES
    operands = [card_buffer(program, slot.buffer) for slot in instruction.inputs]
    sharing = spread_product(height, operands[0].tiles(rows)[1], width, num_cores)
    return sharing.circular_buffers(*(TILE * TILE * BYTES[buffer.format] for buffer in (*operands, out)))


ELEMENTWISE_TILES = 10
"""Two tiles for each operand and for what its chains of functions leave, and for the result."""


def refuse_unless_it_fits(program: Program, layout: Layout, chip: Chip, grid: Grid, rows: int) -> None:
    """Raises ValueError naming the layer at fault, the bytes too many, and what would fit."""
    found = budget(program, chip, grid, rows)
    if found.excess <= 0:
        return
    largest = max(found.entries, key=lambda entry: entry.bytes)
    name = ", ".join(layout.net.nodes[index] for index in members_of(largest.buffer, layout))
    remedies = [
        f"{what} ({-other.excess:,} bytes to spare)"
        for what, other in _remedies(program, chip, grid, rows)
        if other.excess <= 0
    ]
    advice = " or ".join(remedies) if remedies else "narrower layers, or backend='reference'"
    raise ValueError(
        f"the network does not fit the {chip.name}: {found.total:,} bytes of L1 on each core where there "
        f"are {found.available:,}, {found.excess:,} too many; the largest tensor is {largest.buffer.role} of "
        f"{name} with {largest.bytes:,} bytes. What would fit: {advice}."
    )


def _remedies(program: Program, chip: Chip, grid: Grid, rows: int) -> list[tuple[str, Budget]]:
    masters = ("weight@", "bias@", "weight_", "bias_")
    halved = {
        name: replace(card_buffer(program, name), format="bfloat16") if name.startswith(masters) else buffer
        for name, buffer in program.buffers.items()
    }
    smaller = replace(program, buffers=halved)
    found = [
        (f"a batch_size of at most {size}", budget(program, chip, grid, size))
        for size in (256, 128, 64, 32)
        if size < rows
    ][:1]
    found.append(("masters='bfloat16' in the precision policy", budget(smaller, chip, grid, rows)))
    found += [
        (f"a {other.name}", budget(program, other, other.grid, rows))
        for other in CHIPS.values()
        if other.l1_bytes > chip.l1_bytes or other.grid[0] * other.grid[1] > grid[0] * grid[1]
    ]
    return found


def members_of(buffer: CardBuffer, layout: Layout) -> list[int]:
    """Indices of the nodes, or of the layers by the node each predicts, whose entries a buffer holds."""
    home = buffer.name.partition("@")[2]
    if home.isdigit():
        return [int(home)]
    if home.startswith("layers"):
        return [i for i, (group, _) in enumerate(layout.layers, start=1) if f"layers{group}" == home]
    if home.startswith("apart"):
        return [int(home.removeprefix("apart"))]
    number = home.removeprefix("nodes").removeprefix("sums")
    return [i for i, (stack, _) in enumerate(layout.nodes) if str(stack) == number]
