"""The streams of the fused kernel carried out by a model of its processors, to find races and deadlocks.

A race on a card shows once in many runs, as a wrong number. Here the order in which processors work is drawn,
and what they compute is symbolic: the content of a stretch of bytes is a hash of the instruction that wrote
it and of all that this one read. So two runs end in the same memory only if the same results went into the
same results, and any value that came too late or was overwritten too early shows, however small its weight.
Where a section is run again its results count as others, so that no old value passes for a new one.

What is modelled follows the kernels, and knows of the scheduler nothing but the words that it writes:

    reader    waits for messages, gives GO tokens
    unpack    waits for GO and DONE tokens, reads operands; up to AHEAD instructions before `pack`
    pack      writes results, gives DONE and SEND tokens
    writer    takes SEND tokens, waits for credits, starts moves, signals
    bytes     lets what a core has sent arrive, one row at a time and in any order
    signals   likewise the messages; they start only when all bytes sent before have arrived

`unpack` and `pack` are threads of the compute kernel, which run through the same words each for itself. An
instruction without an operand gives `pack` nothing to wait for, so it is carried out whatever `unpack` is
waiting for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import NamedTuple, TypeVar

from pctt.backends.fused_cores import Move, Task
from pctt.backends.fused_schedule import Counters, Remote, Stream, Word
from pctt.backends.fused_stream import CODE, IN0, IN1, KERNELS, LINK, MOVEMENT, OUT, Ref

T = TypeVar("T")

KINDS = ("reader", "unpack", "pack", "writer", "bytes", "signals")
READER, UNPACK, PACK, WRITER, BYTES, SIGNALS = range(len(KINDS))

AHEAD = 4
"""Instructions whose operands may be read before an earlier result is written. On a card the registers of the
matrix unit bound it to fewer.
"""

TILE_BYTES = {False: 4096, True: 2048}
"""By whether a tensor is bfloat16."""

# --- what words mean ----------------------------------------------------------------------------------------


def _lengths() -> tuple[dict[str, int], dict[int, int]]:
    """Words after the header of the instructions of fixed length, and after each kind of link, as compute.cpp
    counts them.
    """
    text = (KERNELS / "compute.cpp").read_text()
    fixed = {
        name: int(size)
        for name, size in re.findall(r"case (\w+):\s+\w+\(words \+ at[^;]*;\s+at \+= (\d+);", text)
    }
    links = {LINK[name]: int(size) for name, size in re.findall(r"case (\w+): apply_.*return (\d+);", text)}
    body = text[text.index("elementwise(Words") : text.index("void kernel_main")]
    _, *cases = re.split(r"case (\w+):", body)
    for name, case in zip(cases[::2], cases[1::2], strict=True):
        links[LINK[name]] = case.count("at++")
    return {"NOTHING": 0, "END": 0, **fixed}, links


FIXED_LENGTHS, LINK_LENGTHS = _lengths()


class Range(NamedTuple):
    """Bytes of a tensor, on the core that the words are for."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Operand:
    """What a link or an instruction reads or writes. repeats: whether tiles are used more than once."""

    ranges: tuple[Range, ...]
    repeats: bool = False


@dataclass(frozen=True)
class Instruction:
    """Of the compute kernel; `at` which word of the stream."""

    at: int
    code: str
    go: bool
    done: int
    send: bool
    words: tuple[Word, ...]
    loads: tuple[Operand, ...]
    stores: tuple[Operand, ...]


class Row(NamedTuple):
    """Bytes that travel together, of a sender and of a receiver."""

    sources: tuple[Range, ...]
    targets: tuple[Range, ...]


@dataclass(frozen=True)
class Action:
    """Of a data movement kernel; `length` words from `at` on. core: the one it is addressed to."""

    at: int
    length: int
    code: str
    count: int
    counter: int
    core: int | None = None
    rows: tuple[Row, ...] = ()


def instructions(words: Sequence[Word]) -> Iterator[Instruction]:
    """What a compute kernel reads, END included."""
    names = {number: name for name, number in CODE.items()}
    at = 0
    while at < len(words):
        word = _number(words[at])
        code = names[word & 0xFF]
        length = FIXED_LENGTHS.get(code)
        if length is None:
            length = _elementwise_length(words, at + 1)
        own = tuple(words[at + 1 : at + 1 + length])
        assert len(own) == length, f"{code} is cut off"
        loads, stores = operands(code, own)
        yield Instruction(
            at, code, bool(word & 0x100), word >> 9 & 0xFFFF, bool(word & 0x2000000), own, loads, stores
        )
        at += 1 + length


def actions(words: Sequence[Word | Remote]) -> Iterator[Action]:
    """What a reader or a writer reads, FINISH included."""
    names = {number: name for name, number in MOVEMENT.items()}
    at = 0
    while at < len(words):
        word = _number(words[at])
        code, count, counter = names[word & 0xFF], word >> 8 & 0xFF, word >> 16
        if code == "MOVE":
            core, source, target, steps, target_step = words[at + 1 : at + 6]
            assert isinstance(core, Remote) and isinstance(source, Ref) and isinstance(target, Ref)
            size, source_step = (units * 16 for units in (_number(steps) & 0xFFFF, _number(steps) >> 16))
            rows = moved_rows(source, target, count, size, source_step, 16 * _number(target_step))
            action = Action(at, 6, code, count, counter, core.core, rows)
        elif code == "SIGNAL":
            core = words[at + 1]
            assert isinstance(core, Remote)
            action = Action(at, 3, code, count, _number(words[at + 2]), core.core)
        else:
            action = Action(at, 1, code, count, counter)
        yield action
        at += action.length


def operands(code: str, words: Sequence[Word]) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    """What an instruction reads and what it writes."""
    if code == "PRODUCT":
        sizes, steps, flags = map(_number, words[3:])
        rows, inner, columns = sizes & 0xFF, sizes >> 8 & 0xFF, sizes >> 16 & 0xFF
        inner_step, column_step = steps & 0xFFFF, steps >> 16
        second = {k * inner_step + j * column_step for k in range(inner) for j in range(columns)}
        loads = (
            _tiles(words[1], range(rows * inner), bool(flags & IN0)),
            _tiles(words[2], second, bool(flags & IN1)),
        )
        return loads, (_tiles(words[0], range(rows * columns), bool(flags & OUT)),)
    if code == "TRANSPOSE":
        sizes, narrow = _number(words[2]), bool(words[3])
        tiles = range((sizes & 0xFF) * (sizes >> 8))
        return (_tiles(words[1], tiles, narrow),), (_tiles(words[0], tiles, narrow),)
    if code == "ELEMENTWISE":
        return _elementwise(words)
    return (), ()


def _elementwise(words: Sequence[Word]) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    loads: list[Operand] = []
    stores: list[Operand] = []
    count, at = _number(words[0]), 1
    while (kind := _number(words[at]) & 0xFF) != LINK["STOP"]:
        flags = _number(words[at]) >> 16
        if kind == LINK["LOAD"]:
            period = flags >> 1 or count
            operand = _tiles(words[at + 1], range(min(period, count)), bool(flags & 1))
            loads.append(Operand(operand.ranges, period < count))
        elif kind == LINK["STORE"]:
            stores.append(_tiles(words[at + 1], range(count), bool(flags)))
        at += 1 + LINK_LENGTHS[kind]
    return tuple(loads), tuple(stores)


def _elementwise_length(words: Sequence[Word], start: int) -> int:
    at = start + 1
    while (kind := _number(words[at]) & 0xFF) != LINK["STOP"]:
        at += 1 + LINK_LENGTHS[kind]
    return at + 1 - start


def moved_rows(
    source: Ref, target: Ref, count: int, size: int, source_step: int, target_step: int
) -> tuple[Row, ...]:
    """The rows of a move; in one where they lie together at the target, which keeps stretches long."""
    sources = [source.offset + row * source_step for row in range(count)]
    targets = [target.offset + row * target_step for row in range(count)]
    if count > 1 and target_step == size:
        return (Row(_joined(source.tensor, sources, size), _joined(target.tensor, targets, size)),)
    return tuple(
        Row((Range(source.tensor, a, a + size),), (Range(target.tensor, b, b + size),))
        for a, b in zip(sources, targets, strict=True)
    )


def _tiles(address: Word, tiles: Iterable[int], narrow: bool) -> Operand:
    assert isinstance(address, Ref), address
    size = TILE_BYTES[narrow]
    return Operand(_joined(address.tensor, [address.offset + tile * size for tile in tiles], size))


def _joined(tensor: str, starts: Iterable[int], size: int) -> tuple[Range, ...]:
    """Pieces of `size` bytes, with neighbours as one."""
    found: list[Range] = []
    for start in sorted(set(starts)):
        if found and found[-1].stop == start:
            found[-1] = found[-1]._replace(stop=start + size)
        else:
            found.append(Range(tensor, start, start + size))
    return tuple(found)


def _number(word: Word | Remote) -> int:
    assert isinstance(word, int), f"{word} stands where a number must"
    return word


# --- memory -------------------------------------------------------------------------------------------------


class Cells:
    """Numbers of the stretches of bytes that are always read and written as a whole, of every core."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        cuts: dict[str, set[int]] = defaultdict(set)
        for tensor, start, stop in ranges:
            cuts[tensor] |= {start, stop}
        self._first: dict[tuple[str, int], int] = {}
        self.per_core = 0
        for tensor, offsets in cuts.items():
            for offset in sorted(offsets):
                self._first[tensor, offset] = self.per_core
                self.per_core += 1

    def of(self, core: int, ranges: Iterable[Range]) -> tuple[int, ...]:
        shift = core * self.per_core
        return tuple(
            shift + cell
            for tensor, start, stop in ranges
            for cell in range(self._first[tensor, start], self._first[tensor, stop])
        )

    def name(self, cell: int) -> str:
        core, number = divmod(cell, self.per_core)
        tensor, offset = next(key for key, first in self._first.items() if first == number)
        return f"{tensor} from byte {offset} on core {core}"


class _Compute(NamedTuple):
    """An instruction, as the model carries it out.

    held: whether `pack` must wait for `unpack`, as it does for operands only.    key: stands for its words.
    """

    go: bool
    done: int
    send: bool
    end: bool
    held: bool
    key: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class _Flight(NamedTuple):
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class _Movement(NamedTuple):
    code: str
    count: int
    counter: int
    flights: tuple[_Flight, ...]


def _arrive(memory: list[int], flight: _Flight) -> None:
    value = hash(tuple(memory[cell] for cell in flight.sources))
    for part, cell in enumerate(flight.targets):
        memory[cell] = hash((value, part))


# --- orders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """Who makes the next step: drawn among those that can; of `late` one only when nobody else can."""

    name: str
    seed: int = 0
    late: frozenset[tuple[int, int]] = frozenset()  # core, kind


def orders(num_cores: int, seed: int = 0) -> Iterator[Order]:
    """The adversarial ones: each core and each kind of processor always last, always first; then subsets."""
    everyone = {(core, kind) for core in range(num_cores) for kind in range(len(KINDS))}
    for core in range(num_cores):
        own = frozenset(agent for agent in everyone if agent[0] == core)
        yield Order(f"core {core} last", seed, own)
        yield Order(f"core {core} first", seed, frozenset(everyone - own))
    for kind, name in enumerate(KINDS):
        own = frozenset(agent for agent in everyone if agent[1] == kind)
        yield Order(f"{name} last", seed, own)
        yield Order(f"{name} first", seed, frozenset(everyone - own))
        for core in range(num_cores):
            yield Order(f"{name} of core {core} last", seed, frozenset({(core, kind)}))


def random_orders(num_cores: int, number: int, seed: int = 0) -> Iterator[Order]:
    """In every second one a random half comes last."""
    for draw in range(number):
        random = Random(1000 * seed + draw)
        late = [
            (core, kind) for core in range(num_cores) for kind in range(len(KINDS)) if random.random() < 0.5
        ]
        yield Order(f"random {draw}", 1000 * seed + draw, frozenset(late if draw % 2 else ()))


# --- replay -------------------------------------------------------------------------------------------------


class Deadlock(Exception):
    """Nobody can make a step, and not all are done; the message says who waits for what."""


class Outcome(NamedTuple):
    """memory: of all cores.    traces: of each core, a hash of all its results, also those overwritten since.

    left: tokens and messages that nobody has taken.
    """

    memory: list[int]
    traces: list[int]
    left: list[str]


class Replay:
    """Sections of one program, in streams, and carried out task by task for comparison.

    tasks, streams: by section; `streams` by core too.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[Task]],
        streams: Sequence[Sequence[Stream]],
        counters: Counters,
    ) -> None:
        self.num_cores = len(streams[0])
        self.num_counters = counters.most
        self.streams = [list(section) for section in streams]
        self._channels = {(c.receiver, number): c for c, number in counters.numbers.items()}
        self._keys: dict[tuple[str, tuple[Word, ...]], int] = {}
        self._cells = Cells(_touched(tasks, streams))
        self._compute = [
            [self._decoded_compute(core, s) for core, s in enumerate(section)] for section in streams
        ]
        self._moving = [
            [self._decoded_movement(core, s) for core, s in enumerate(section)] for section in streams
        ]
        self._tasks = [[self._decoded_task(task) for task in section] for section in tasks]

    def changed(self, section: int, core: int, stream: Stream) -> Replay:
        """The same but for one stream of one core."""
        other = copy(self)
        other.streams, other._compute, other._moving = (
            [list(cores) for cores in table] for table in (self.streams, self._compute, self._moving)
        )
        other.streams[section][core] = stream
        other._compute[section][core] = self._decoded_compute(core, stream)
        other._moving[section][core] = self._decoded_movement(core, stream)
        return other

    # --- decoding -------------------------------------------------------------------------------------------

    def _key(self, code: str, words: Sequence[Word]) -> int:
        return self._keys.setdefault((code, tuple(words)), len(self._keys))

    def _decoded_compute(self, core: int, stream: Stream) -> list[_Compute]:
        return [
            _Compute(
                i.go,
                i.done,
                i.send,
                i.code == "END",
                bool(i.loads),
                self._key(i.code, i.words),
                self._of(core, i.loads),
                self._of(core, i.stores),
            )
            for i in instructions(stream.compute)
        ]

    def _decoded_movement(self, core: int, stream: Stream) -> tuple[list[_Movement], list[_Movement]]:
        """Of reader and writer, without FINISH; counters numbered over all cores."""
        return tuple(  # type: ignore[return-value]
            [
                _Movement(
                    action.code,
                    action.count,
                    (core if action.core is None else action.core) * self.num_counters + action.counter,
                    self._flights(core, action.core, action.rows),
                )
                for action in actions(words)
                if action.code != "FINISH"
            ]
            for words in (stream.reader, stream.writer)
        )

    def _decoded_task(self, task: Task) -> tuple[int, _Compute, list[_Flight]]:
        loads, stores = operands(task.code, task.words)
        reads, writes = self._of(task.core, loads), self._of(task.core, stores)
        compute = _Compute(False, 0, False, False, False, self._key(task.code, task.words), reads, writes)
        flights = [
            flight for move in task.moves for flight in self._flights(task.core, move.core, _rows_of(move))
        ]
        return task.core, compute, flights

    def _of(self, core: int, operands: Iterable[Operand]) -> tuple[int, ...]:
        return self._cells.of(core, (stretch for operand in operands for stretch in operand.ranges))

    def _flights(self, sender: int, receiver: int | None, rows: Iterable[Row]) -> tuple[_Flight, ...]:
        return tuple(
            _Flight(
                self._cells.of(sender, row.sources),
                self._cells.of(sender if receiver is None else receiver, row.targets),
            )
            for row in rows
        )

    # --- running --------------------------------------------------------------------------------------------

    def _memory(self) -> list[int]:
        return list(range(self.num_cores * self._cells.per_core))

    def sequential(self, sequence: Iterable[int]) -> Outcome:
        """These sections task by task in the order of the program, moves done at once."""
        memory, traces = self._memory(), [0] * self.num_cores
        for turn, section in enumerate(sequence):
            for core, compute, flights in self._tasks[section]:
                value = hash((compute.key, turn, *[memory[cell] for cell in compute.reads]))
                if compute.writes:
                    traces[core] = hash((traces[core], value))
                for part, cell in enumerate(compute.writes):
                    memory[cell] = hash((value, part))
                for flight in flights:
                    _arrive(memory, flight)
        return Outcome(memory, traces, [])

    def run(self, sequence: Sequence[int], order: Order, counted: int = 0) -> Outcome:
        """These sections in one launch. counted: where all counters stand at the beginning.

        Raises Deadlock.
        """
        state = _Run(self, sequence, order, counted)
        state.go_on()
        state.check_all_done()
        return Outcome(state.memory, state.traces, state.left())

    def difference(self, expected: Outcome, found: Outcome) -> str:
        """What two runs do not agree in, in words; empty if they agree."""
        pairs = enumerate(zip(expected.memory, found.memory, strict=True))
        wrong = [self._cells.name(cell) for cell, (value, other) in pairs if value != other]
        cores = [core for core in range(self.num_cores) if expected.traces[core] != found.traces[core]]
        if not wrong and not cores:
            return ""
        return (
            f"results on cores {cores} differ; in the end {len(wrong)} stretches do: {'; '.join(wrong[:5])}"
        )


class _Run:
    """Where all processors are."""

    def __init__(self, replay: Replay, sequence: Sequence[int], order: Order, counted: int) -> None:
        cores = range(replay.num_cores)
        self.replay = replay
        self.memory = replay._memory()
        self.traces = [0 for _ in cores]
        self.compute = [[op for s in sequence for op in replay._compute[s][core]] for core in cores]
        self.turns = [
            [turn for turn, s in enumerate(sequence) for _ in replay._compute[s][core]] for core in cores
        ]
        self.reading, self.writing = (
            [[op for s in sequence for op in replay._moving[s][core][side]] for core in cores]
            for side in (0, 1)
        )
        self.at_reader, self.at_unpack, self.at_pack, self.at_writer = ([0 for _ in cores] for _ in range(4))
        self.go, self.done, self.send = ([0 for _ in cores] for _ in range(3))
        self.latched: list[dict[int, int]] = [{} for _ in cores]
        self.flying: list[list[_Flight]] = [[] for _ in cores]
        self.signals: list[list[int]] = [[] for _ in cores]
        self.arrived = [counted % 2**32] * (replay.num_cores * replay.num_counters)
        self.expected = list(self.arrived)
        self.random = Random(order.seed)
        self.late = [(core, kind) in order.late for core in cores for kind in range(len(KINDS))]
        self.is_ready = [False] * len(self.late)
        self.ready: tuple[list[int], list[int]] = ([], [])
        for agent in range(len(self.late)):
            self._wake(agent)

    def _wake(self, agent: int) -> None:
        """What it may have waited for has come about; it will find out whether that is enough."""
        if not self.is_ready[agent]:
            self.is_ready[agent] = True
            self.ready[self.late[agent]].append(agent)

    def go_on(self) -> None:
        """Until nobody can make a step."""
        steps = (
            *(self._step_reader, self._step_unpack, self._step_pack),
            *(self._step_writer, self._step_bytes, self._step_signals),
        )
        draw, kinds = self.random.random, len(KINDS)
        early, late = self.ready
        while early or late:
            candidates = early or late
            index = int(draw() * len(candidates))
            agent = candidates[index]
            if not steps[agent % kinds](agent // kinds):
                # By its index no more: `_wake` only appends, so the agent still stands there.
                candidates[index] = candidates[-1]
                candidates.pop()
                self.is_ready[agent] = False

    # Each makes one step of a core, or says that it cannot.

    def _step_reader(self, core: int) -> bool:
        at = self.at_reader[core]
        if at == len(self.reading[core]):
            return False
        op = self.reading[core][at]
        if op.code == "WAIT":
            if not self._has_come(op):
                return False
        else:
            assert op.code == "GIVE", op
            self.go[core] += 1
            self._wake(core * len(KINDS) + UNPACK)
        self.at_reader[core] = at + 1
        return True

    def _has_come(self, op: _Movement) -> bool:
        expected = (self.expected[op.counter] + op.count) % 2**32
        if (self.arrived[op.counter] - expected) % 2**32 >= 2**31:  # the sign of an int32
            return False
        self.expected[op.counter] = expected
        return True

    def _step_unpack(self, core: int) -> bool:
        at = self.at_unpack[core]
        if at == len(self.compute[core]) or at - self.at_pack[core] >= AHEAD:
            return False
        op = self.compute[core][at]
        if op.go > self.go[core] or op.done > self.done[core]:
            return False
        self.go[core] -= op.go
        self.done[core] -= op.done
        if op.held:
            memory = self.memory
            self.latched[core][at] = hash(
                (op.key, self.turns[core][at], *[memory[cell] for cell in op.reads])
            )
        self.at_unpack[core] = at + 1
        self._wake(core * len(KINDS) + PACK)
        return True

    def _step_pack(self, core: int) -> bool:
        at = self.at_pack[core]
        if at == len(self.compute[core]):
            return False
        op = self.compute[core][at]
        if op.held:
            if at >= self.at_unpack[core]:
                return False
            value = self.latched[core].pop(at)
        else:
            value = hash((op.key, self.turns[core][at]))
        if op.writes:
            self.traces[core] = hash((self.traces[core], value))
        for part, cell in enumerate(op.writes):
            self.memory[cell] = hash((value, part))
        if not op.end:
            self.done[core] += 1
            if op.send:
                self.send[core] += 1
                self._wake(core * len(KINDS) + WRITER)
        self.at_pack[core] = at + 1
        self._wake(core * len(KINDS) + UNPACK)
        return True

    def _step_writer(self, core: int) -> bool:
        at = self.at_writer[core]
        if at == len(self.writing[core]):
            return False
        op = self.writing[core][at]
        if op.code == "MOVE":
            self.flying[core] += op.flights
            self._wake(core * len(KINDS) + BYTES)
        elif op.code == "TAKE":
            if self.send[core] < op.count:
                return False
            self.send[core] -= op.count
        elif op.code == "WAIT":
            if not self._has_come(op):
                return False
        elif self.flying[core]:
            return False
        elif op.code == "SIGNAL":
            self.signals[core].append(op.counter)
            self._wake(core * len(KINDS) + SIGNALS)
        else:
            assert op.code == "TALLY", op
            self._count(op.counter)
        self.at_writer[core] = at + 1
        return True

    def _step_bytes(self, core: int) -> bool:
        if not self.flying[core]:
            return False
        _arrive(self.memory, self._drawn(self.flying[core]))
        if not self.flying[core]:
            self._wake(core * len(KINDS) + WRITER)
        return True

    def _step_signals(self, core: int) -> bool:
        if not self.signals[core]:
            return False
        self._count(self._drawn(self.signals[core]))
        return True

    def _drawn(self, waiting: list[T]) -> T:
        index = int(self.random.random() * len(waiting))
        waiting[index], waiting[-1] = waiting[-1], waiting[index]
        return waiting.pop()

    def _count(self, counter: int) -> None:
        self.arrived[counter] = (self.arrived[counter] + 1) % 2**32
        owner = counter // self.replay.num_counters
        self._wake(owner * len(KINDS) + READER)
        self._wake(owner * len(KINDS) + WRITER)

    # --- the end --------------------------------------------------------------------------------------------

    def check_all_done(self) -> None:
        waiting = [text for core in range(self.replay.num_cores) for text in self._waiting(core)]
        if waiting:
            raise Deadlock(f"nobody can go on: {'; '.join(waiting)}.")

    def _waiting(self, core: int) -> Iterator[str]:
        for kind, at, ops in (
            ("reader", self.at_reader[core], self.reading[core]),
            ("writer", self.at_writer[core], self.writing[core]),
        ):
            if at < len(ops):
                what = "a SEND token" if ops[at].code == "TAKE" else self._message(ops[at].counter)
                yield f"the {kind} of core {core} waits for {what}"
        at, ops = self.at_unpack[core], self.compute[core]
        if at < len(ops):
            go, done = ops[at].go > self.go[core], ops[at].done > self.done[core]
            tokens = [name for name, lacks in (("GO", go), ("DONE", done)) if lacks]
            yield f"the compute kernel of core {core} waits for {' and '.join(tokens)} at instruction {at}"

    def _message(self, counter: int) -> str:
        channel = self.replay._channels[divmod(counter, self.replay.num_counters)]
        return f"{'a credit' if channel.credit else 'a message'} of core {channel.sender}"

    def left(self) -> list[str]:
        found = [
            f"{tokens[core]} {name} tokens on core {core}"
            for name, tokens in (("GO", self.go), ("SEND", self.send), ("DONE", self.done))
            for core in range(self.replay.num_cores)
            if tokens[core]
        ]
        for counter, (arrived, expected) in enumerate(zip(self.arrived, self.expected, strict=True)):
            if arrived != expected:
                owner = counter // self.replay.num_counters
                found.append(f"{self._message(counter)} to core {owner}: {arrived} came, {expected} taken")
        return found


def _rows_of(move: Move) -> tuple[Row, ...]:
    return moved_rows(move.source, move.target, move.rows, move.bytes, move.source_step, move.target_step)


def _touched(tasks: Sequence[Sequence[Task]], streams: Sequence[Sequence[Stream]]) -> Iterator[Range]:
    """Every stretch that anything reads or writes."""
    rows: list[Row] = []
    for task in (task for section in tasks for task in section):
        for operand in chain(*operands(task.code, task.words)):
            yield from operand.ranges
        rows += [row for move in task.moves for row in _rows_of(move)]
    for stream in (stream for section in streams for stream in section):
        for instruction in instructions(stream.compute):
            for operand in (*instruction.loads, *instruction.stores):
                yield from operand.ranges
        rows += [row for action in actions(stream.writer) for row in action.rows]
    for row in rows:
        yield from row.sources
        yield from row.targets
