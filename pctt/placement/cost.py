"""What a training step costs on a chip: counts that follow from its card operations, and predicted times.

Of each operation the busiest core counts: the cores of a stack work at the same time, each on its own entry,
and what is spread is shared among them. An operation takes as long as the slowest of three things: the matrix
unit (FPU), the vector unit (SFPU) and what goes over the network between the cores (NoC).

    eager    launched one by one: the host's time per launch, or the work where that takes longer
    traced   replayed from a trace: the gap between two operations, and the work
    floor    the work alone: what one kernel that does everything could reach

No time here was measured on a card. The speeds are those of `chips.py`, the assumptions in docs/placement.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pctt.backends.lowering import TILE, CardBuffer, num_programs
from pctt.backends.precision import BYTES
from pctt.placement.budget import TILE_BYTES, Budget, card_buffer, spread_product
from pctt.placement.chips import FIDELITY_PHASES, Chip, Fidelity
from pctt.program import Instruction, Program

UNITS = ("FPU", "SFPU", "NoC")

# Vector instructions per 32 elements, load and store included, counted in the kernels that ttnn 0.81.1
# compiles for Wormhole and fp32 tiles, stalls (SFPNOP) included; clamp is an estimate. fp32 asks for the
# accurate forms: tanh takes some 15 instructions in its bfloat16 form.
SFPU_INSTRUCTIONS = {
    "add": 4,
    "multiply": 4,
    "subtract_from": 5,
    "square": 5,
    "relu": 4,
    "leaky_relu": 8,
    "above_zero": 8,
    "clamp": 8,
    "tanh": 91,
    "sigmoid": 85,
    "silu": 87,
    "erf": 117,
    "exp": 85,
    "sqrt": 44,
    "reciprocal": 27,
}
BINARY_INSTRUCTIONS = 7  # add, subtract, multiply of two fp32 tiles
ADDCMUL_INSTRUCTIONS = 8

# Elementwise operations of the FPU, which takes what is not fp32 on both sides (tt-isa MatrixUnit.md).
FPU_ELEMENTS_PER_CYCLE = 128


@dataclass(frozen=True)
class Cost:
    """What a part of a program takes.

    programs: of TT-NN.
    flops: of the matrix products, a multiply-add counted as two, padding to whole tiles included.
    sfpu_operations: instructions of the vector unit times the elements they work on.
    noc_bytes: what arrives at cores from other cores; the same bytes sent to many count at each.
    dram_bytes: of tensors that are not in L1.
    eager, traced, floor: predicted seconds.
    bound_by: seconds of the floor, by the unit that takes longest in each operation.
    """

    programs: int = 0
    flops: int = 0
    sfpu_operations: int = 0
    noc_bytes: int = 0
    dram_bytes: int = 0
    eager: float = 0.0
    traced: float = 0.0
    floor: float = 0.0
    bound_by: tuple[tuple[str, float], ...] = ()

    def __add__(self, other: Cost) -> Cost:
        bound = dict(self.bound_by)
        for unit, seconds in other.bound_by:
            bound[unit] = bound.get(unit, 0.0) + seconds
        return Cost(
            self.programs + other.programs,
            self.flops + other.flops,
            self.sfpu_operations + other.sfpu_operations,
            self.noc_bytes + other.noc_bytes,
            self.dram_bytes + other.dram_bytes,
            self.eager + other.eager,
            self.traced + other.traced,
            self.floor + other.floor,
            tuple(bound.items()),
        )

    @property
    def bound(self) -> str:
        """The unit that bounds most of the floor."""
        return max(self.bound_by, key=lambda item: item[1])[0] if self.floor else "-"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values, times in seconds."""
        return {
            "programs": self.programs,
            "flops": self.flops,
            "sfpu_operations": self.sfpu_operations,
            "noc_bytes": self.noc_bytes,
            "dram_bytes": self.dram_bytes,
            "eager_seconds": self.eager,
            "traced_seconds": self.traced,
            "floor_seconds": self.floor,
            "bound": self.bound,
        }


def costs(
    program: Program, found: Budget, chip: Chip, num_cores: int, rows: int, fidelity: Fidelity
) -> dict[str, Cost]:
    """Cost of each section of a lowered program, and of the whole training step.

    found: its budget.    chip, num_cores: what it runs on.    rows: of a batch, padding included.
    fidelity: of the matrix unit.
    """
    model = CostModel(program, found, chip, num_cores, rows, fidelity)
    sections = {
        "initialise, measure": (*program.initialise, *program.measure_initial),
        "inference step": program.step(max(1, program.num_steps)) if program.steps else (),
        "finish, measure": (*program.finish, *program.measure),
        "gradients": program.gradients,
        "update, refresh": program.update,
        "training step": program.training_step(),
    }
    return {name: model.total(code) for name, code in sections.items()}


class CostModel:
    """Costs of the card operations of one program on one chip.

    found, num_cores, rows, fidelity: as for `costs`.
    """

    def __init__(
        self, program: Program, found: Budget, chip: Chip, num_cores: int, rows: int, fidelity: Fidelity
    ) -> None:
        self.program = program
        self.chip = chip
        self.num_cores = num_cores
        self.rows = rows
        self.fidelity: Fidelity = fidelity
        self.in_l1 = {entry.buffer.name for entry in found.entries}
        self._known: dict[Instruction, Cost] = {}

    def total(self, code: Iterable[Instruction]) -> Cost:
        """The cost of all of them, one after the other."""
        total = Cost()
        for instruction in code:
            if instruction not in self._known:
                self._known[instruction] = self.operation(instruction)
            total += self._known[instruction]
        return total

    def operation(self, i: Instruction) -> Cost:
        """The cost of one card operation."""
        out = _Operand(i.out[0].start, i.out[0].stop, card_buffer(self.program, i.out[0].buffer), self.rows)
        inputs = [
            _Operand(slot.start, slot.stop, card_buffer(self.program, slot.buffer), self.rows)
            for slot in i.inputs
        ]
        if i.op == "matmul":
            work = self._matmul(out, *inputs)
        else:
            work = self._elementwise(i, out, inputs)
        seconds = {
            "FPU": work.fpu_cycles / self.chip.clock_hz,
            "SFPU": work.sfpu_cycles / self.chip.clock_hz,
            "NoC": work.noc_busiest / self.chip.noc_bytes_per_cycle / self.chip.clock_hz,
        }
        unit = max(UNITS, key=lambda name: seconds[name])
        busy = seconds[unit]
        outside = [operand for operand in (out, *inputs) if operand.buffer.name not in self.in_l1]
        programs = num_programs(i)
        return Cost(
            programs,
            work.flops,
            work.sfpu_operations,
            work.noc_bytes,
            sum(operand.bytes for operand in outside),
            max(programs * self.chip.eager_launch_seconds, busy),
            programs * self.chip.traced_gap_seconds + busy,
            busy,
            ((unit, busy),),
        )

    def _matmul(self, out: _Operand, a: _Operand, b: _Operand) -> _Work:
        cycles = self.chip.tile_product_cycles(self.fidelity)
        (height, width), depth = out.shape, a.shape[1]
        flops = 2 * TILE**3 * out.count * height * width * depth
        if not out.is_spread:  # each core has all it needs
            return _Work(fpu_cycles=height * width * depth * cycles, flops=flops)
        sharing = spread_product(height, depth, width, self.num_cores)
        whole, parted = (a, b) if sharing.by_columns else (b, a)
        share = sharing.columns if sharing.by_columns else sharing.rows
        arriving = whole.bytes + share * depth * parted.tile_bytes
        leaving = sharing.rows * sharing.columns * out.tile_bytes
        return _Work(
            fpu_cycles=sharing.rows * sharing.columns * depth * cycles,
            flops=flops,
            noc_bytes=sharing.num_cores * whole.bytes + parted.bytes + out.bytes,
            noc_busiest=max(arriving, leaving),
        )

    def _elementwise(self, i: Instruction, out: _Operand, inputs: list[_Operand]) -> _Work:
        tiles = max([out.tiles, *(operand.tiles for operand in inputs)])
        in_place = self._in_place(i, out, inputs)
        share = tiles // out.count if in_place else -(-tiles // self.num_cores)
        workers = out.count if in_place else min(tiles, self.num_cores)
        numbers = TILE_BYTES if i.scalar else 0  # a number on the card is one tile, which each core reads
        instructions, fpu_cycles = self._per_tile(i, out, inputs)
        work = _Work(
            fpu_cycles=share * fpu_cycles,
            sfpu_cycles=share * instructions * TILE * TILE // self.chip.sfpu_lanes,
            sfpu_operations=tiles * instructions * TILE * TILE,
            noc_bytes=workers * numbers,
            noc_busiest=numbers,
        )
        if in_place:
            return work
        # Tiles go from their cores to those that work on them, on one NoC, and back on the other.
        leaving, arriving = self._at_home(inputs), self._at_home([out])
        taken = share * sum(operand.tile_bytes for operand in inputs) + numbers
        given = share * out.tile_bytes
        work.noc_bytes += out.bytes + sum(operand.bytes for operand in inputs)
        work.noc_busiest = max(leaving, arriving, taken, given)
        return work

    @staticmethod
    def _in_place(i: Instruction, out: _Operand, inputs: list[_Operand]) -> bool:
        """Whether each core works on its own entry. TT-NN does so only where all tensors lie on the same
        cores, for some operations; the tiles of all others it deals out over the whole grid.
        """
        if i.op not in ("binary", "unary", "fill") or out.is_spread:
            return False
        if any(operand.place != out.place for operand in inputs):
            return False
        if i.op == "binary":
            return all(operand.is_row == out.is_row for operand in inputs)  # no row is broadcast
        return all(operand.buffer.format == out.buffer.format for operand in inputs)

    def _at_home(self, operands: list[_Operand]) -> int:
        """Bytes of whole tensors on the core that has most of them."""
        loads: Counter[int] = Counter()
        everywhere = 0
        for operand in operands:
            if operand.is_spread:
                everywhere += -(-operand.tiles // self.num_cores) * operand.tile_bytes
            else:
                for core in operand.place:
                    loads[core] += operand.bytes // operand.count
        return everywhere + max(loads.values(), default=0)

    def _per_tile(self, i: Instruction, out: _Operand, inputs: list[_Operand]) -> tuple[int, int]:
        """SFPU instructions per 32 elements, and FPU cycles per tile."""
        instructions = sum(
            SFPU_INSTRUCTIONS[name]
            for _, chain in i.options
            if isinstance(chain, tuple)
            for name, *_ in chain
        )
        if i.op == "binary":
            if all(operand.buffer.format == "float32" for operand in inputs):
                return instructions + BINARY_INSTRUCTIONS, 0
            phases = FIDELITY_PHASES[self.fidelity] if i.function == "multiply" else 1
            return instructions, TILE * TILE // FPU_ELEMENTS_PER_CYCLE * phases
        if i.op == "addcmul":
            return ADDCMUL_INSTRUCTIONS, 0
        # All others end in a product with a number, which carries the result to its place.
        instructions += SFPU_INSTRUCTIONS["multiply"]
        if i.op == "fill":
            instructions += SFPU_INSTRUCTIONS["above_zero"]
        sums = i.op == "row_sums"  # a product with ones
        return instructions, self.chip.tile_product_cycles(self.fidelity) if sums else 0


@dataclass
class _Work:
    """Cycles and bytes on the busiest core, and the counts over all cores."""

    fpu_cycles: int = 0
    sfpu_cycles: int = 0
    flops: int = 0
    sfpu_operations: int = 0
    noc_bytes: int = 0
    noc_busiest: int = 0


@dataclass(frozen=True)
class _Operand:
    """Entries start to stop of a buffer, at `rows` rows a batch."""

    start: int
    stop: int
    buffer: CardBuffer
    rows: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def is_spread(self) -> bool:
        return self.buffer.first is None

    @property
    def is_row(self) -> bool:
        return self.buffer.rows == 1

    @property
    def place(self) -> range:
        """The core of each entry; none where it is spread."""
        first = self.buffer.first
        return range(0) if first is None else range(first + self.start, first + self.stop)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of an entry, in tiles."""
        return self.buffer.tiles(self.rows)

    @property
    def tiles(self) -> int:
        rows, columns = self.shape
        return self.count * rows * columns

    @property
    def tile_bytes(self) -> int:
        return TILE * TILE * BYTES[self.buffer.format]

    @property
    def bytes(self) -> int:
        return self.tiles * self.tile_bytes
