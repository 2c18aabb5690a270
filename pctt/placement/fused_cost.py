"""The predicted time of a training step in the fused kernel, from the words that its processors read.

Every core has three processors: a reader that waits for messages, the compute kernel, and a writer that
sends. `Walk` lets all of them carry out their words in the order in which they would on a card, each word for
its time, so that overlap and waiting come out and are not assumed. The compute kernel is a pipeline of two:
what comes into the registers and is worked on there (unpacker, FPU, SFPU), and the packer, which stores tiles
while the next are worked on.

Nothing here was measured on a card. `Overheads` says which figures have a source and which are assumed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from typing import cast

import torch

from pctt.assemble import assemble
from pctt.backends.fused_plan import SECTIONS, FusedPlan
from pctt.backends.fused_schedule import Remote, Stream
from pctt.backends.fused_stream import CODE, IN0, IN1, LINK, MOVEMENT, OUT
from pctt.backends.fused_tasks import Cores, Move, Task, Tasks
from pctt.backends.lowering import TILE
from pctt.backends.precision import BYTES, PrecisionPolicy
from pctt.inference import Inference
from pctt.learning import Learning
from pctt.network import INPUT, Network
from pctt.placement.chips import Chip, Fidelity
from pctt.placement.chips import chip as find_chip
from pctt.placement.cost import ADDCMUL_INSTRUCTIONS, BINARY_INSTRUCTIONS, SFPU_INSTRUCTIONS

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

LINK_PARAMETERS = {
    **dict.fromkeys(("LOAD", "STORE", "FILL", "NUMBER", "SCALE", "SHIFT", "LEAKY_RELU"), 1),
    **dict.fromkeys(("ADD_CONSTANT", "MULTIPLY_CONSTANT", "SUBTRACT_FROM"), 1),
    "CLAMP": 2,
}
"""Words of a link after its first one."""

CODE_WORDS = {"PRODUCT": 6, "TRANSPOSE": 4, "NOTHING": 0, "END": 0}
MOST_TILES = 4  # in the registers of one side, in float32


@dataclass(frozen=True)
class Overheads:
    """Cycles of what is no arithmetic, and bytes per cycle between L1 and the registers.

    unpack_bytes, two_unpackers_bytes, pack_bytes, atomic: tt-isa-documentation WormholeB0 TensixTile/L1.md,
    at best: one unpacker reads four times 128 bits a cycle, both together five, four packers write 128 bits
    each, an atomic operation takes five cycles. Taken over for Blackhole. All others are assumed:

    instruction: reading one and jumping to it.    product: its formats and addresses.
    link: reading it, calling its function and setting the SFPU up for it.
    formats: setting the unpacker or the packer to another format.
    issue: at least between two products of tiles.    batch: taking and giving the registers.
    token: from one processor of a core to another.    poll: seeing that a counter has changed.
    packet: giving a write to the NoC.    barrier: seeing that all writes have arrived.
    """

    unpack_bytes: int = 64
    two_unpackers_bytes: int = 80
    pack_bytes: int = 64
    atomic: int = 5
    instruction: int = 60
    product: int = 200
    link: int = 50
    formats: int = 60
    issue: int = 40
    batch: int = 30
    token: int = 20
    poll: int = 15
    packet: int = 40
    barrier: int = 20

    def times(self, factor: float) -> Overheads:
        """With every assumed figure times a factor."""
        names = ("instruction", "product", "link", "formats", "issue", "batch", "token", "poll", "packet")
        names = (*names, "barrier")
        return replace(self, **{name: round(factor * getattr(self, name)) for name in names})


# --- the work of one instruction ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Cycles of an instruction, by what takes them, but for what stores: `pack`, in the pipeline after it.

    matrix, vector: of FPU and SFPU.    unpack: of loading, where arithmetic does not hide it.
    control: of reading, calling and setting up.    batches: that go through the registers in turn.
    """

    products: int = 0
    links: int = 0
    matrix: int = 0
    vector: int = 0
    unpack: int = 0
    control: int = 0
    pack: int = 0
    batches: int = 1

    @property
    def front(self) -> int:
        return self.matrix + self.vector + self.unpack + self.control

    @property
    def alone(self) -> float:
        """Cycles from its start to its last result, with nothing before it in the pipeline."""
        first, last = self.front / self.batches, self.pack / self.batches
        return first + (self.batches - 1) * max(first, last) + last


class Rates:
    """Cycles of instructions on one chip."""

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
            return self._product(_number(words[3]), _number(words[5]))
        if code == "TRANSPOSE":
            return self._transpose(_number(words[2]), bool(words[3]))
        if code == "ELEMENTWISE":
            return self._elementwise(_number(words[0]), list(links(words)))
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

    def _elementwise(self, tiles: int, chain: Sequence[tuple[str, int]]) -> Work:
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
        return self._elementwise(tiles, [(kind, 0) for kind in kinds])

    @staticmethod
    def vector_instructions(kind: str) -> int:
        found = LINK_INSTRUCTIONS.get(kind)
        return SFPU_INSTRUCTIONS[kind.lower()] if found is None else found


def _changes(formats: list[int]) -> int:
    """How often the format changes from one tile's turn to the next, which begins where this one ends."""
    return sum(before != after for before, after in zip(formats, [*formats[1:], *formats[:1]], strict=True))


def links(words: Sequence[object]) -> Iterable[tuple[str, int]]:
    """Kind and flags of each link of an elementwise instruction."""
    names = {number: name for name, number in LINK.items()}
    at = 1
    while (kind := names[_number(words[at]) & 0xFF]) != "STOP":
        yield kind, _number(words[at]) >> 16
        at += 1 + LINK_PARAMETERS.get(kind, 0)


def _number(word: object) -> int:
    assert isinstance(word, int), word
    return word


# --- what the processors read -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """An instruction of the compute kernel, with what it waits for."""

    code: str
    go: bool
    done: int
    send: bool
    work: Work


@dataclass(frozen=True)
class Action:
    """Of a reader or a writer. rows, bytes: of a move, and of each row."""

    code: str
    count: int = 0
    counter: int = 0
    core: int = -1
    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Words:
    """What one core does in a section."""

    compute: tuple[Step, ...]
    reader: tuple[Action, ...]
    writer: tuple[Action, ...]


def read(stream: Stream, rates: Rates) -> Words:
    return Words(
        tuple(_steps(stream.compute, rates)),
        tuple(_actions(stream.reader)),
        tuple(_actions(stream.writer)),
    )


def _steps(words: Sequence[object], rates: Rates) -> Iterable[Step]:
    names, at = {number: name for name, number in CODE.items()}, 0
    while at < len(words):
        word = _number(words[at])
        code = names[word & 0xFF]
        if code == "ELEMENTWISE":
            length = 2 + sum(1 + LINK_PARAMETERS.get(kind, 0) for kind, _ in links(words[at + 1 :]))
        else:
            length = CODE_WORDS[code]
        work = rates.work(code, words[at + 1 : at + 1 + length])
        yield Step(code, bool(word & 0x100), word >> 9 & 0xFFFF, bool(word & 0x2000000), work)
        at += 1 + length


def _actions(words: Sequence[object]) -> Iterable[Action]:
    names, at = {number: name for name, number in MOVEMENT.items()}, 0
    while at < len(words):
        word = _number(words[at])
        code, count, counter = names[word & 0xFF], word >> 8 & 0xFF, word >> 16
        if code == "MOVE":
            yield Action(
                code, core=_core(words[at + 1]), rows=count, bytes=16 * (_number(words[at + 4]) & 0xFFFF)
            )
            at += 6
        elif code == "SIGNAL":
            yield Action(code, counter=_number(words[at + 2]), core=_core(words[at + 1]))
            at += 3
        else:
            yield Action(code, count, counter)
            at += 1


def _core(word: object) -> int:
    assert isinstance(word, Remote), word
    return word.core


# --- the network between the cores --------------------------------------------------------------------------

TORUS = {"wormhole_b0": (10, 12), "blackhole": (17, 12)}
"""Columns and rows of routers; tt-isa-documentation, NoC/README.md and coordinates of either chip."""
SKIPPED = {"wormhole_b0": ({0, 5}, {0, 6}), "blackhole": ({0, 8, 9}, {0, 1})}
"""Columns and rows of routers without cores, before harvesting."""
MOST_FLITS = 256  # of data in a packet


@dataclass(frozen=True)
class Noc:
    """The NoC that the writers send on, number 1: packets go left and upwards, and around the torus."""

    chip: Chip
    columns: int

    @cached_property
    def _places(self) -> tuple[list[int], list[int]]:
        (width, height), (no_x, no_y) = TORUS[self.chip.arch], SKIPPED[self.chip.arch]
        return [x for x in range(width) if x not in no_x], [y for y in range(height) if y not in no_y]

    def hops(self, sender: int, receiver: int) -> int:
        xs, ys = self._places
        (down, right), (below, after) = divmod(sender, self.columns), divmod(receiver, self.columns)
        width, height = TORUS[self.chip.arch]
        return (xs[right] - xs[after]) % width + (ys[down % len(ys)] - ys[below % len(ys)]) % height

    def latency(self, sender: int, receiver: int) -> int:
        """Cycles of a packet on its way; one to the same core does not leave it."""
        return self.chip.noc_end_cycles + self.chip.noc_hop_cycles * self.hops(sender, receiver)

    def flits(self, size: int) -> int:
        """Cycles that a link takes for a row of so many bytes, headers included."""
        return -(-size // self.chip.noc_bytes_per_cycle) + self.packets(size)

    def packets(self, size: int) -> int:
        return -(-size // (MOST_FLITS * self.chip.noc_bytes_per_cycle))


# --- the walk -----------------------------------------------------------------------------------------------

Key = tuple[int, object]
"""A core, and a counter of it or a kind of token."""
Pause = Generator["float | tuple[Key, int]", None, None]


class Walk:
    """Carries out a sequence of sections on all cores.

    ends: when the last compute kernel has reached the end of each section of the sequence, in cycles.
    total: cycles of all that was done, as if nothing overlapped.
    waited: cycles that compute kernels waited, by core, section, place of the instruction there, and for
        what: "go", for what other cores send or for what is still being sent, or "done", for results of
        their own.
    """

    def __init__(self, sections: Sequence[Sequence[Words]], noc: Noc, overheads: Overheads) -> None:
        self.sections = sections
        self.noc = noc
        self.overheads = overheads
        self.num_cores = len(sections[0])

    def run(self, sequence: Sequence[int]) -> Walk:
        self.now = self.total = 0.0
        self.waited: dict[tuple[int, int, int, str], float] = defaultdict(float)
        self.ends = [0.0] * len(sequence)
        self._heap: list[tuple[float, int, Key | None, Pause | None]] = []
        self._pushed = 0
        self._there: dict[Key, int] = defaultdict(int)
        self._waiting: dict[Key, tuple[int, Pause]] = {}
        self._out = [0.0] * self.num_cores  # when the way out of a core is free, and the way in
        self._in = [0.0] * self.num_cores
        self._arrived = [0.0] * self.num_cores  # when a core knows that all it sent is there
        for core in range(self.num_cores):
            for start in (self._reader, self._compute, self._writer):
                self._push(0.0, None, start(core, sequence))
        while self._heap:
            self.now, _, key, pause = heappop(self._heap)
            if key is not None:
                self._there[key] += 1
                needed, waiting = self._waiting.get(key, (0, None))
                if waiting is None or self._there[key] < needed:
                    continue
                del self._waiting[key]
                self._there[key] -= needed
                pause = waiting
            assert pause is not None
            self._go_on(pause)
        assert not self._waiting, self._waiting
        return self

    def _push(self, when: float, key: Key | None, pause: Pause | None = None) -> None:
        self._pushed += 1
        heappush(self._heap, (when, self._pushed, key, pause))

    def _go_on(self, pause: Pause) -> None:
        for what in pause:
            if isinstance(what, tuple):
                key, needed = what
                if self._there[key] < needed:
                    self._waiting[key] = needed, pause
                    return
                self._there[key] -= needed
            else:
                self.total += what
                self._push(self.now + what, None, pause)
                return

    def _post(self, delay: float, core: int, what: object) -> None:
        self.total += delay
        self._push(self.now + delay, (core, what))

    def _reader(self, core: int, sequence: Sequence[int]) -> Pause:
        for section in sequence:
            for action in self.sections[section][core].reader:
                if action.code == "WAIT":
                    yield (core, action.counter), action.count
                    yield self.overheads.poll
                elif action.code == "GIVE":
                    self._post(self.overheads.token, core, "go")

    def _compute(self, core: int, sequence: Sequence[int]) -> Pause:
        packed = 0.0
        for position, section in enumerate(sequence):
            for number, step in enumerate(self.sections[section][core].compute):
                yield self.overheads.instruction
                for what, needed in (("go", int(step.go)), ("done", step.done)):
                    if needed:
                        before = self.now
                        yield (core, what), needed
                        self.waited[core, section, number, what] += self.now - before
                if step.code == "END":
                    self.ends[position] = max(self.ends[position], self.now)
                    continue
                work, start = step.work, self.now
                first, last = work.front / work.batches, work.pack / work.batches
                end = max(start + first, packed) + (work.batches - 1) * max(first, last)
                packed = end + last
                self.total += last
                self._post(packed - start + self.overheads.token, core, "done")
                if step.send:
                    self._post(packed - start + self.overheads.token, core, "send")
                yield end - start

    def _writer(self, core: int, sequence: Sequence[int]) -> Pause:
        o = self.overheads
        for section in sequence:
            for action in self.sections[section][core].writer:
                if action.code == "TAKE":
                    yield (core, "send"), action.count
                elif action.code == "WAIT":
                    yield (core, action.counter), action.count
                    yield o.poll
                elif action.code == "MOVE":
                    yield self._move(core, action)
                elif action.code in ("SIGNAL", "TALLY"):
                    yield max(0.0, self._arrived[core] - self.now) + o.barrier
                    if action.code == "TALLY":
                        self._post(o.atomic, core, action.counter)
                    else:
                        yield o.packet
                        self._post(
                            self.noc.latency(core, action.core) + o.atomic, action.core, action.counter
                        )

    def _move(self, core: int, action: Action) -> float:
        """Cycles until the writer has given all rows to the NoC. One leaves while the next is given."""
        packets, flits = self.noc.packets(action.bytes), self.noc.flits(action.bytes)
        given = packets * self.overheads.packet
        there, back = self.noc.latency(core, action.core), self.noc.latency(action.core, core)
        start = max(self.now + given, self._out[core])
        leaving = flits + (action.rows - 1) * max(given, flits)
        self._out[core] = start + leaving
        self._in[action.core] = max(start + there, self._in[action.core]) + leaving
        self._arrived[core] = max(self._arrived[core], self._in[action.core] + back)
        self.total += given + leaving + there + back
        return start + leaving - flits - self.now


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
        return max(self.shares, key=lambda unit: self.shares[unit])


@dataclass(frozen=True)
class FusedPlacement:
    """A network on the cores of a chip as the fused kernel runs it.

    sections: what each core reads, by section.    names: of the sections.
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
        return Noc(self.chip, self.chip.grid[0])

    @property
    def overheads(self) -> Overheads:
        return self.rates.overheads

    @property
    def sequence(self) -> list[int]:
        """The sections of a training step, in order."""
        before, after = (
            [self.names[name] for name in part if name in self.names] for part in (BEFORE, AFTER)
        )
        return [*before, *self.walk, *after]

    def run(self, sequence: Sequence[int]) -> Walk:
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
        """Of a training step with at least one inference step."""
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
        tuple(tuple(read(stream, rates) for stream in section) for section in compiler.streams),
        names,
        tuple(compiler.codes[program.steps[number]] for number in program.walk),
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
