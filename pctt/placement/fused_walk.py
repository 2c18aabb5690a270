"""What the processors of the fused kernel do, walked through event by event.

Every core has three processors: a reader that waits for messages, the compute kernel, and a writer that
sends. `read` takes the words that they read apart; `Walk` lets all of them carry out theirs in the order in
which they would on a card, each word for its time, so that overlap and waiting come out and are not assumed.
The compute kernel is a pipeline of two: what comes into the registers and is worked on there (unpacker, FPU,
SFPU), and the packer, which stores tiles while the next are worked on. What a word takes is for
`fused_cost.py` to say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush

from pctt.backends.fused_schedule import Remote, Stream
from pctt.backends.fused_stream import CODE, LINK, MOVEMENT, PARAMETERS
from pctt.placement.chips import Chip

CODE_WORDS = {"PRODUCT": 6, "TRANSPOSE": 4, "NOTHING": 0, "END": 0}
"""Words of an instruction after its first one; those of elementwise work count themselves."""


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


# --- what the processors read -------------------------------------------------------------------------------


WorkOf = Callable[[str, Sequence[object]], Work]
"""What an instruction takes: from its code and its words without the header."""


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


def read(stream: Stream, work: WorkOf) -> Words:
    return Words(
        tuple(_steps(stream.compute, work)),
        tuple(_actions(stream.reader)),
        tuple(_actions(stream.writer)),
    )


def _steps(words: Sequence[object], work: WorkOf) -> Iterable[Step]:
    names, at = {number: name for name, number in CODE.items()}, 0
    while at < len(words):
        word = number_of(words[at])
        code = names[word & 0xFF]
        if code == "ELEMENTWISE":
            length = 2 + sum(1 + PARAMETERS.get(kind, 0) for kind, _ in links(words[at + 1 :]))
        else:
            length = CODE_WORDS[code]
        own = work(code, words[at + 1 : at + 1 + length])
        yield Step(code, bool(word & 0x100), word >> 9 & 0xFFFF, bool(word & 0x2000000), own)
        at += 1 + length


def _actions(words: Sequence[object]) -> Iterable[Action]:
    names, at = {number: name for name, number in MOVEMENT.items()}, 0
    while at < len(words):
        word = number_of(words[at])
        code, count, counter = names[word & 0xFF], word >> 8 & 0xFF, word >> 16
        if code == "MOVE":
            yield Action(
                code, core=_core(words[at + 1]), rows=count, bytes=16 * (number_of(words[at + 4]) & 0xFFFF)
            )
            at += 6
        elif code == "SIGNAL":
            yield Action(code, counter=number_of(words[at + 2]), core=_core(words[at + 1]))
            at += 3
        else:
            yield Action(code, count, counter)
            at += 1


def _core(word: object) -> int:
    assert isinstance(word, Remote), word
    return word.core


def links(words: Sequence[object]) -> Iterable[tuple[str, int]]:
    """Kind and flags of each link of an elementwise instruction."""
    names = {number: name for name, number in LINK.items()}
    at = 1
    while (kind := names[number_of(words[at]) & 0xFF]) != "STOP":
        yield kind, number_of(words[at]) >> 16
        at += 1 + PARAMETERS.get(kind, 0)


def number_of(word: object) -> int:
    assert isinstance(word, int), word
    return word


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


READING = "reading"
"""An instruction, before its core waits and works."""

WAITING = "waiting"
"""For other cores, or for results of its own."""


@dataclass(frozen=True)
class Doing:
    """What a compute kernel does from one cycle to another, at a position of the sequence of sections."""

    core: int
    position: int
    what: str
    start: float
    stop: float


class Walk:
    """Carries out a sequence of sections on all cores.

    ends: when the last compute kernel has reached the end of each section of the sequence, in cycles.
    total: cycles of all that was done, as if nothing overlapped.
    waited: cycles that compute kernels waited, by core, section, place of the instruction there, and for
        what: "go", for what other cores send or for what is still being sent, or "done", for results of
        their own.
    doings: of the compute kernels, in the order in which they end.
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
        self.doings: list[Doing] = []
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
                before = self.now
                yield self.overheads.instruction
                self._did(core, position, READING, before)
                for what, needed in (("go", int(step.go)), ("done", step.done)):
                    if needed:
                        before = self.now
                        yield (core, what), needed
                        self.waited[core, section, number, what] += self.now - before
                        self._did(core, position, WAITING, before)
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
                self._did(core, position, step.code.lower(), start)

    def _did(self, core: int, position: int, what: str, start: float) -> None:
        if self.now > start:
            self.doings.append(Doing(core, position, what, start, self.now))

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
