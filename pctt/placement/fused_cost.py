"""The predicted time of a training step in the fused kernel.

`Rates` says how many cycles an instruction takes on a chip; `fused_walk.py` lets the processors of all cores
carry out their words and wait for each other, so that overlap and waiting are not assumed. `fused_placement`
does both for a network. `backprop_sweeps` is what backprop would take at the same rates on the same cores.

Nothing here was measured on a card. `Overheads` says which figures have a source and which are assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from pctt.assemble import assemble
from pctt.backends.fused_cores import Cores, Move, Task
from pctt.backends.fused_plan import SECTIONS, FusedPlan
from pctt.backends.fused_stream import IN0, IN1, OUT
from pctt.backends.fused_tasks import Tasks
from pctt.backends.lowering import TILE
from pctt.backends.precision import BYTES, PrecisionPolicy
from pctt.inference import Inference
from pctt.learning import Learning
from pctt.network import INPUT, Network
from pctt.placement.chips import Chip, Fidelity
from pctt.placement.chips import chip as find_chip
from pctt.placement.cost import ADDCMUL_INSTRUCTIONS, BINARY_INSTRUCTIONS, SFPU_INSTRUCTIONS
from pctt.placement.fused_walk import Noc, Overheads, Walk, Words, Work, links, number_of, read

BEFORE, AFTER = ("initialise", "measure_initial"), ("finish", "measure", "gradients", "update")
"""What a training step does before its inference steps, and after."""

FLOAT32, BFLOAT16 = (TILE * TILE * BYTES[name] for name in ("float32", "bfloat16"))

LINK_INSTRUCTIONS = {
    "LOAD": 0,
    "KEEP": 0,
    "STORE": 0,
    "ADD": BINARY_INSTRUCTIONS,
    "SUBTRACT": BINARY_INSTRUCTIONS,
    "MULTIPLY": BINARY_INSTRUCTIONS,
    "ADD_PRODUCT": ADDCMUL_INSTRUCTIONS,
    "COPY": 2,
    "ROUND": 4,
    "SUM_ROWS": 8,
    "FILL": 1,
    "NUMBER": 1,
    "SCALE": SFPU_INSTRUCTIONS["multiply"],
    "SHIFT": SFPU_INSTRUCTIONS["add"],
    "ADD_CONSTANT": SFPU_INSTRUCTIONS["add"],
    "MULTIPLY_CONSTANT": SFPU_INSTRUCTIONS["multiply"],
}
"""Of the SFPU, per 32 elements; functions that are not here have those of `cost.py`. COPY, ROUND, SUM_ROWS,
FILL and NUMBER are estimates."""

MOST_TILES = 4  # in the registers of one side, in float32


# --- the work of one instruction ----------------------------------------------------------------------------


class Rates:
    """Cycles of instructions on one chip.    fidelity: of its matrix unit.    overheads: what no arithmetic
    accounts for.
    """

    def __init__(self, chip: Chip, fidelity: Fidelity, overheads: Overheads) -> None:
        self.chip = chip
        self.overheads = overheads
        self.product_cycles = chip.tile_product_cycles(fidelity)
        self._known: dict[tuple[object, ...], Work] = {}

    def work(self, code: str, words: Sequence[object]) -> Work:
        """Of the words of an instruction, without its header."""
        key = (code, *words)
        if key not in self._known:
            self._known[key] = self._work(code, words)
        return self._known[key]

    def _work(self, code: str, words: Sequence[object]) -> Work:
        if code == "PRODUCT":
            return self._product(number_of(words[3]), number_of(words[5]))
        if code == "TRANSPOSE":
            return self._transpose(number_of(words[2]), bool(words[3]))
        if code == "ELEMENTWISE":
            return self.elementwise(number_of(words[0]), list(links(words)))
        return Work()

    def _product(self, sizes: int, flags: int) -> Work:
        o = self.overheads
        rows, inner, columns = sizes & 0xFF, sizes >> 8 & 0xFF, sizes >> 16 & 0xFF
        products = rows * inner * columns
        first, second = (BFLOAT16 if flags & flag else FLOAT32 for flag in (IN0, IN1))
        loading = max((first + second) / o.two_unpackers_bytes, max(first, second) / o.unpack_bytes, o.issue)
        batches = rows * -(-columns // MOST_TILES)
        stored = rows * columns * (BFLOAT16 if flags & OUT else FLOAT32)
        return Work(
            products=products,
            matrix=products * self.product_cycles,
            unpack=round(products * max(0.0, loading - self.product_cycles)),
            control=o.product + batches * o.batch,
            pack=stored // o.pack_bytes,
            batches=batches,
        )

    def _transpose(self, sizes: int, narrow: bool) -> Work:
        o, tiles, size = self.overheads, (sizes & 0xFF) * (sizes >> 8), BFLOAT16 if narrow else FLOAT32
        return Work(
            matrix=tiles * 64,  # moves between registers, assumed
            unpack=tiles * size // o.unpack_bytes,
            control=o.product + tiles * o.batch,
            pack=tiles * size // o.pack_bytes,
            batches=tiles,
        )

    def elementwise(self, tiles: int, chain: Sequence[tuple[str, int]]) -> Work:
        """chain: kinds and flags of the links."""
        o, matrix, vector, unpack, pack, control = self.overheads, 0, 0, 0, 0, self.overheads.batch
        control += o.formats * _changes([flags & 1 for kind, flags in chain if kind == "LOAD"])
        pack += o.formats * _changes([flags & 1 for kind, flags in chain if kind == "STORE"])
        for kind, flags in chain:
            size = BFLOAT16 if flags & 1 else FLOAT32
            if kind == "STORE":
                pack += o.link + size // o.pack_bytes
                continue
            control += o.link
            vector += self.vector_instructions(kind) * TILE * TILE // self.chip.sfpu_lanes
            if kind == "LOAD":
                unpack += size // o.unpack_bytes
                matrix += 8 if flags & 1 else 0  # from SrcA to the registers, 128 elements a cycle
        return Work(
            links=tiles * len(chain),
            matrix=tiles * matrix,
            vector=tiles * vector,
            unpack=tiles * unpack,
            control=o.formats + tiles * control,
            pack=o.formats + tiles * pack,
            batches=tiles,
        )

    def of_chain(self, kinds: Iterable[str], tiles: int) -> Work:
        """Of links on float32 tiles."""
        return self.elementwise(tiles, [(kind, 0) for kind in kinds])

    @staticmethod
    def vector_instructions(kind: str) -> int:
        """Instructions of the SFPU per element of an operation called `kind`."""
        found = LINK_INSTRUCTIONS.get(kind)
        return SFPU_INSTRUCTIONS[kind.lower()] if found is None else found


def _changes(formats: list[int]) -> int:
    """How often the format changes from one tile's turn to the next, which begins where this one ends."""
    return sum(before != after for before, after in zip(formats, [*formats[1:], *formats[:1]], strict=True))


# --- plans --------------------------------------------------------------------------------------------------

UNITS = ("matrix", "vector", "unpack", "control")
"""What a compute kernel does before it stores."""
STEADY = 16
"""Inference steps that are walked for the time of one, of which the later half counts."""


@dataclass(frozen=True)
class FusedCost:
    """Predicted seconds, and counts.

    step: of one inference step once it repeats itself.    before: from the start to the first of them.
    training: of a training step, the launch by the host included.
    step_floor, training_floor: the products of tiles alone, on the core with the most of them.
    step_vector_floor, training_vector_floor: those and the work of the SFPU.
    step_noc_bytes, training_noc_bytes: between different cores.    l1_bytes: on each core.
    busy: of an inference step, by core, the part in which the compute kernel does not wait.
    shares: of the core that is busiest in it, by what takes the cycles; `waiting` is the rest.
    """

    step: float
    before: float
    training: float
    step_floor: float
    step_vector_floor: float
    training_floor: float
    training_vector_floor: float
    step_noc_bytes: int
    training_noc_bytes: int
    l1_bytes: int
    busy: tuple[float, ...]
    shares: dict[str, float]

    @property
    def bound(self) -> str:
        """What takes most of a step's cycles, or `waiting`."""
        return max(self.shares, key=lambda unit: self.shares[unit])


@dataclass(frozen=True)
class FusedPlacement:
    """A network on the cores of a chip as the fused kernel runs it.

    cores, tasks: of which layer, and what they do.    rates: cycles of what they do.
    sections: what each core reads, by section.    names: of the sections.
    l1_bytes: taken on each core.
    walk: the section of each inference step.
    """

    chip: Chip
    cores: Cores
    tasks: Tasks
    sections: tuple[tuple[Words, ...], ...]
    names: dict[str, int]
    walk: tuple[int, ...]
    l1_bytes: int
    rates: Rates

    @property
    def noc(self) -> Noc:
        """The network between the cores."""
        return Noc(self.chip, self.chip.grid[0])

    @property
    def overheads(self) -> Overheads:
        """The cycles that no arithmetic accounts for."""
        return self.rates.overheads

    @property
    def sequence(self) -> list[int]:
        """The sections of a training step, in order."""
        before, after = (
            [self.names[name] for name in part if name in self.names] for part in (BEFORE, AFTER)
        )
        return [*before, *self.walk, *after]

    def run(self, sequence: Sequence[int]) -> Walk:
        """The walk of all cores through these sections, with the time of everything they do."""
        return Walk(self.sections, self.noc, self.overheads).run(sequence)

    def tile_shape(self, node: int) -> tuple[int, int]:
        """Rows and columns of the activities of a node on one of its cores, in tiles."""
        buffers = [b for b in self.tasks.buffers.values() if b.role == "error"]
        buffer = next(b for b in buffers if b.first is not None and b.first <= node < b.first + b.count)
        return self.cores.tiles(buffer, self.tasks.rows)

    def cycles(self, sequence: Iterable[int], units: Sequence[str] = UNITS) -> list[int]:
        """By core, of the instructions of some sections."""
        totals = [0] * self.cores.total
        for section in sequence:
            for core, words in enumerate(self.sections[section]):
                totals[core] += sum(getattr(step.work, unit) for step in words.compute for unit in units)
        return totals

    def noc_bytes(self, sequence: Iterable[int]) -> int:
        """Bytes that go from one core to another in these sections."""
        return sum(
            action.rows * action.bytes
            for section in sequence
            for core, words in enumerate(self.sections[section])
            for action in words.writer
            if action.core != core
        )

    def floor(self, sequence: Iterable[int], vector: bool = False) -> float:
        """Seconds of the products of tiles on the core with the most; `vector` adds the work of the SFPU."""
        cycles = [0] * self.cores.total
        for section in sequence:
            for core, words in enumerate(self.sections[section]):
                works = [step.work for step in words.compute]
                cycles[core] += sum(work.products for work in works) * self.rates.product_cycles
                cycles[core] += sum(work.vector for work in works) if vector else 0
        return max(cycles) / self.chip.clock_hz

    def cost(self) -> FusedCost:
        """Of a training step with at least one inference step.

        Raises ValueError where nothing moves in inference.
        """
        if not self.walk:
            raise ValueError(
                "no node moves in inference, so there is no step to predict; plan a network of two layers or "
                "more, with at least one inference step."
            )
        sequence, last, hertz = self.sequence, self.walk[-1], self.chip.clock_hz
        whole, again = self.run(sequence).ends, self.run([last] * STEADY).ends
        step = (again[-1] - again[STEADY // 2 - 1]) / (STEADY - STEADY // 2)
        busiest, busy = self._busy(last, step)
        return FusedCost(
            step=step / hertz,
            before=whole[sequence.index(self.walk[0]) - 1] / hertz,
            training=self.chip.eager_launch_seconds + whole[-1] / hertz,
            step_floor=self.floor([last]),
            step_vector_floor=self.floor([last], vector=True),
            training_floor=self.floor(sequence),
            training_vector_floor=self.floor(sequence, vector=True),
            step_noc_bytes=self.noc_bytes([last]),
            training_noc_bytes=self.noc_bytes(sequence),
            l1_bytes=self.l1_bytes,
            busy=busy,
            shares=self._shares(busiest, last, step),
        )

    def _busy(self, section: int, step: float) -> tuple[int, tuple[float, ...]]:
        """The busiest core of an inference step, and the part of it in which each core works."""
        busy = [
            sum(entry.work.front + self.overheads.instruction for entry in words.compute) / step
            for words in self.sections[section]
        ]
        return busy.index(max(busy)), tuple(busy)

    def _shares(self, core: int, section: int, step: float) -> dict[str, float]:
        steps = self.sections[section][core].compute
        shares = {unit: sum(getattr(entry.work, unit) for entry in steps) / step for unit in UNITS}
        shares["control"] += len(steps) * self.overheads.instruction / step
        return {**shares, "waiting": 1.0 - sum(shares.values())}


def fused_placement(
    net: Network,
    chip: str | Chip = "n150",
    cores_per_layer: int | None = 1,
    batch_size: int = 32,
    inference: Inference | None = None,
    learning: Learning | None = None,
    policy: PrecisionPolicy | None = None,
    overheads: Overheads | None = None,
) -> FusedPlacement:
    """How the fused kernel would train `net`, with its input and its output clamped.

    chip, batch_size, inference, learning, policy: as for `pctt.placement.plan.plan`.
    overheads: what no arithmetic accounts for, else as measured.
    cores_per_layer: that each layer is shared among where it has as many tiles of units; None takes as few as
        L1 allows.

    Raises ValueError for a network that needs more cores or more of their memory than there is.

    Example:
        >>> import pctt
        >>> net = pctt.chain(input=64, layers=[pctt.Dense(32, "tanh"), pctt.Dense(10)])
        >>> fused_placement(net, "n150", learning=pctt.SGD(0.1)).cores.total
        3
    """
    where_to = find_chip(chip) if isinstance(chip, str) else chip
    inference, clamped = inference or Inference(), [net.node_index(name) for name in (INPUT, net.output)]
    compiler = _Compiler(where_to, policy, cores_per_layer)
    _, program = compiler.compile(
        net, True, lambda where: assemble(where, inference, clamped, (), learning, uniform=True), batch_size
    )
    by_name = {name: getattr(program, name) for name in SECTIONS}
    names = {name: compiler.codes[code] for name, code in by_name.items() if code}
    rates = Rates(where_to, cast(Fidelity, compiler.fidelity), overheads or Overheads())
    return FusedPlacement(
        where_to,
        compiler.cores,
        compiler.tasks,
        tuple(tuple(read(stream, rates.work) for stream in section) for section in compiler.streams),
        names,
        tuple(compiler.codes[code] for number in program.walk if (code := program.steps[number])),
        compiler.bytes_per_core(),
        rates,
    )


class _Compiler(FusedPlan):
    """Lays a network out as the kernel's own backend does, and runs nothing."""

    def __init__(self, chip: Chip, policy: PrecisionPolicy | None, cores_per_layer: int | None) -> None:
        super().__init__(torch.float32, chip, chip.grid, policy)
        self.share_layers(cores_per_layer)

    def forget(self) -> None:
        pass


# --- backprop on the same cores -----------------------------------------------------------------------------


FORWARD = ("LOAD", "LOAD", "ADD", "TANH", "KEEP", "STORE", "STORE")
DERIVATIVE = ("LOAD", "SQUARE", "SUBTRACT_FROM", "MULTIPLY", "KEEP", "STORE", "STORE")


def backprop_sweeps(plan: FusedPlacement) -> tuple[float, float]:
    """Seconds of a forward and of a backward sweep of tanh layers on the same cores, layer after layer.

    A layer is a product, the elementwise work that must follow it (bias and tanh; the sum of what several
    cores send, times the derivative), and its way to the next layer. Nothing else, so this is the least that
    a kernel like this one would take for backprop.

    plan: from `fused_placement`.
    """
    forward = backward = 0.0
    start, step = (plan.tasks.sections[s] for s in (plan.names["initialise"], plan.walk[-1]))
    for node in range(1, len(plan.cores.slices)):
        core, height, width = plan.cores.first[node], *plan.tile_shape(node)
        product = next(task for task in start if task.code == "PRODUCT" and task.core == core)
        forward += _layer(plan, product, FORWARD, height * width, _moves_up(plan, node, start))
        if node == 1:  # nothing learns below
            continue
        product = next(task for task in step if task.code == "PRODUCT" and task.core == core and task.moves)
        height, width = plan.tile_shape(node - 1)
        sums = ("LOAD", *("LOAD", "ADD") * (plan.cores.slices[node] - 1))
        backward += _layer(plan, product, (*sums, *DERIVATIVE), height * width, product.moves)
    return forward / plan.chip.clock_hz, backward / plan.chip.clock_hz


def _moves_up(plan: FusedPlacement, node: int, section: list[Task]) -> list[Move]:
    """What the first core of a node sends to the layer above in the forward sweep."""
    core = plan.cores.first[node]
    sending = (
        [move for move in task.moves if "sent^" in move.writes[0] and move.core != core]
        for task in section
        if task.core == core and task.code == "ELEMENTWISE"
    )
    return next(filter(None, sending), [])


def _layer(plan: FusedPlacement, product: Task, chain: Sequence[str], tiles: int, moves: list[Move]) -> float:
    """Cycles of a product, what follows it, and the way of the result to the next layer."""
    o, rates, noc = plan.overheads, plan.rates, plan.noc
    cycles = 2 * (o.instruction + o.token) + rates.work(product.code, product.words).alone
    cycles += rates.of_chain(chain, tiles).alone
    if moves:
        sent = sum(m.rows * max(noc.packets(m.bytes) * o.packet, noc.flits(m.bytes)) for m in moves)
        far = max(moves, key=lambda m: noc.latency(product.core, m.core))
        way = 2 * noc.latency(product.core, far.core) + noc.latency(far.core, product.core)
        cycles += sent + way + 2 * o.token + o.barrier + o.packet + o.atomic + o.poll
    return cycles
