"""The budget of L1: what every tensor of a program takes on each core, and whether that fits.

Allocation is lock-step: a shard that lies on one core reserves its addresses on every core, so what counts is
the sum over all tensors of their bytes per core, wherever they lie. Tensors grow from the top of L1, the
circular buffers of the operation that is running from the bottom. docs/placement.md says how both were
checked against ttnn's own allocator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pctt.backends.graph_lowering import MOVES, moved_shapes
from pctt.backends.lowering import TILE, CardBuffer, is_reordered, num_programs
from pctt.backends.precision import BYTES
from pctt.groups import Layout
from pctt.learning.rules import STATE
from pctt.placement.chips import CHIPS, Chip, Grid
from pctt.program import Instruction, Program, Slot

TILE_BYTES = TILE * TILE * 4

EXCHANGE_BYTES = 13 * TILE_BYTES
"""Of the circular buffers of an exchange between chips: the least that ttnn 0.81.1 runs with, 10 tiles on
Wormhole and 13 on Blackhole (mock device, 2026-11-30)."""

SEMAPHORE_BYTES = 128
"""Of the semaphores by which chips signal each other, which stay, for each exchange: 64 on Wormhole, 128 on
Blackhole (the same)."""

KINDS = {
    "weights": ("weight", "bias", "operand", "transposed", "precision"),
    "learning state": tuple(f"_{name}" for name in STATE),
    "transient": (*("_gradient", "transposed_activity", "scratch", "square", "product", "step", "_aside"),),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the budget. bytes: on each core."""

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
    """L1 of each core, in bytes.

    entries: the tensors that stay.    circular_buffers: of the operation that needs most.
    reserved: room for the data of the next batch, which may arrive beside those in use, and on a mesh for the
        semaphores of its chips.
    """

    entries: tuple[Entry, ...]
    circular_buffers: int
    available: int
    reserved: int = 0

    @property
    def tensors(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def total(self) -> int:
        return self.tensors + self.reserved + self.circular_buffers

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
    code = dict.fromkeys([*program.training_step(), *program.refresh])
    tensors = [card_buffer(program, name) for name in program.buffers]
    gathered: dict[Slot, None] = {}
    for number, i in enumerate(code):
        if num_programs(i) == 2:  # what TT-NN allocates is spread over all cores
            out, buffer = i.out[0], card_buffer(program, i.out[0].buffer)
            _, _, home = buffer.name.partition("@")
            name = f"{i.op}_aside {number}@{home}"
            tensors.append(replace(buffer, name=name, first=None, count=out.stop - out.start))
            gathered[i.inputs[0]] = None
        if i.op in MOVES:
            tensors += _made_by_moves(number, i, program)
    for slot in gathered:
        source = card_buffer(program, slot.buffer)
        if is_reordered(source, slot, grid[0]):
            role, _, home = source.name.partition("@")
            name, count = f"{role} {slot.start} gathered_aside@{home}", slot.stop - slot.start
            tensors.append(replace(source, name=name, first=None, count=count))
    entries = tuple(Entry(buffer, buffer.bytes_per_core(rows, num_cores)) for buffer in tensors)
    largest = max((circular_buffers(i, program, num_cores, rows) for i in code), default=0)
    reserved = _arriving(program, num_cores, rows)
    reserved += SEMAPHORE_BYTES * sum(i.op == "all_reduce" for i in code)
    return Budget(entries, largest, chip.l1_bytes, reserved)


def _made_by_moves(number: int, i: Instruction, program: Program) -> list[CardBuffer]:
    source, out = (card_buffer(program, slot.buffer) for slot in (i.inputs[0], i.out[0]))
    home = out.name.partition("@")[2]
    return [
        replace(source, name=f"{i.op}_aside {number}.{part}@{home}", columns=columns, positions=positions)
        for part, (positions, columns) in enumerate(
            [*moved_shapes(i, source, out), (out.positions, out.columns)]
        )
    ]


def _arriving(program: Program, num_cores: int, rows: int) -> int:
    """Bytes on a core of a second copy of the given activities, spread over all cores."""
    given = {slot for i in program.training_step() for slot in i.inputs if slot.buffer.startswith("initial@")}
    total = 0
    for slot in given:
        buffer = replace(card_buffer(program, slot.buffer), first=None)
        total += (slot.stop - slot.start) * buffer.bytes_per_core(rows, num_cores)
    return total


@dataclass(frozen=True)
class SpreadProduct:
    """How a product whose operands are spread over the cores is shared among them: each core computes
    some of the columns of the result, or some of its rows, in blocks along the inner dimension.

    rows, columns, depth: tiles per core of the result, tiles of a block.    num_blocks: along the inner
    dimension.    num_cores: that have a share.    by_columns: what is shared.
    """

    rows: int
    columns: int
    depth: int
    num_blocks: int
    num_cores: int
    by_columns: bool

    def circular_buffers(self, first: int, second: int, out: int) -> int:
        """Bytes on a core; first, second, out: of one tile of the operands and of the result.

        Two blocks of the operands if there are two, and the result, beside which fp32 partial sums lie where
        it is not fp32 itself.
        """
        operands = min(2, self.num_blocks) * self.depth * (self.rows * first + self.columns * second)
        partial_sums = 0 if out == TILE_BYTES else TILE_BYTES
        return operands + self.rows * self.columns * (out + partial_sums)


def spread_product(rows: int, depth: int, columns: int, num_cores: int) -> SpreadProduct:
    """The sharing of a product of rows x depth by depth x columns tiles."""
    block = next(size for size in (4, 3, 2, 1) if depth % size == 0)
    longer = max(rows, columns)
    share = -(-longer // num_cores)
    used = -(-longer // share)
    if columns >= rows:
        return SpreadProduct(rows, share, block, depth // block, used, by_columns=True)
    return SpreadProduct(share, columns, block, depth // block, used, by_columns=False)


def circular_buffers(instruction: Instruction, program: Program, num_cores: int, rows: int) -> int:
    """Bytes on a core of the circular buffers of one card operation, those aside that alias its tensors.

    A product whose tensors lie on single cores aliases them all, and needs room for fp32 partial sums only
    where its result has another format. An elementwise operation passes its operands and its result through
    two tiles each, what is broadcast through two more, and what a function leaves of an operand through one.
    This is an upper bound: where all of its tensors lie on the same cores it needs less, down to nothing.
    """
    i = instruction
    out = card_buffer(program, i.out[0].buffer)
    inputs = [card_buffer(program, slot.buffer) for slot in i.inputs]
    tile = {buffer.name: TILE * TILE * BYTES[buffer.format] for buffer in (*inputs, out)}
    if i.op == "matmul":
        height, width = out.tiles(rows)
        if out.first is not None:
            return 0 if out.format == "float32" else height * width * TILE_BYTES
        sharing = spread_product(height, inputs[0].tiles(rows)[1], width, num_cores)
        return sharing.circular_buffers(*(tile[buffer.name] for buffer in (*inputs, out)))
    number = TILE_BYTES if i.scalar else 0
    operands = sum(tile[buffer.name] for buffer in inputs) if inputs else tile[out.name]
    total = 2 * (operands + number + tile[out.name])
    if i.op == "binary":
        row = inputs[1] if len(inputs) > 1 and inputs[1].rows == 1 and out.rows != 1 else None
        total += 2 * (tile[row.name] if row else number)
        chains = dict(i.options)
        total += 2 * TILE_BYTES * len({"a_chain", "b_chain"} & chains.keys())
    elif i.op == "all_reduce":  # in turn a copy, the exchange, its parts and their additions
        total = EXCHANGE_BYTES
    elif i.op == "row_sums":  # the ones that a reduction multiplies by
        total += TILE_BYTES
    elif i.op in ("unary", "fill"):  # a factor, and what the functions leave
        total += TILE_BYTES + (2 * TILE_BYTES if i.options or i.op == "fill" else 0)
    elif i.op in MOVES:  # whole rows of tiles at a time; an estimate
        widths = [columns for _, columns in moved_shapes(i, inputs[0], out)]
        total = TILE_BYTES * (4 + 4 * -(-max(widths) // TILE))
    return total


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
    num_layers, num_cores = len(layout.net.layers), grid[0] * grid[1]
    if layout.net.wiring is not None:
        num_layers = 0  # no layer has a core of its own
    crowded = (
        f"{num_layers} layers are more than the {num_cores} cores of the {chip.name} can hold one each, and "
        if num_layers > num_cores
        else ""
    )
    raise ValueError(
        f"{crowded}the network does not fit the {chip.name}: {found.total:,} bytes of L1 on each core where "
        f"there are {found.available:,}, {found.excess:,} too many; the largest tensor is "
        f"{largest.buffer.role} of {name} with {largest.bytes:,} bytes. What would fit: {advice}."
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
    if layout.net.wiring is not None:
        digits = home.lstrip("abcdefghijklmnopqrstuvwxyz")
        return [int(digits)] if digits and not home.startswith(("columns", "scalars")) else []
    if home.isdigit():
        return [int(home)]
    if home.startswith("layers"):
        return [i for i, (group, _) in enumerate(layout.layers, start=1) if f"layers{group}" == home]
    if home.startswith("apart"):
        return [int(home.removeprefix("apart"))]
    number = home.removeprefix("nodes").removeprefix("sums")
    return [i for i, (stack, _) in enumerate(layout.nodes) if str(stack) == number]
