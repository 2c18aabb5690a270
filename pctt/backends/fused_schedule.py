"""Who waits for whom: from the tasks of a section to what the three processors of each core read.

Each core does its tasks in the order of the program. Where a task needs what another core sends it waits for
that message; a sender waits until what it writes over has been read. Both are found by following, for every
core, how far it can know the others to be: a message tells how far its sender was, and of all that the sender
knew. Where that knowledge says already that the old value has been read, no wait is needed; in predictive
coding the errors that come down say so of the activities that went up. Elsewhere the reader sends a credit.

    reader      WAIT for messages and for the core's own sends, GIVE the compute kernel a token
    compute     tasks; those with `go` take a token, those with `done` wait for results of this core
    writer      TAKE a token when a task is done, WAIT for credits, MOVE, SIGNAL

At the end of a section all its messages have come and all its tasks are done, so sections follow each other
in any order and number. Every wait is for something earlier in the order of the program, and the processors
keep to that order, so nothing can wait for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from pctt.backends.fused_cores import Move, Region, Task
from pctt.backends.fused_stream import MOVEMENT, Word, header

MOST_MESSAGES = 255


@dataclass(frozen=True)
class Remote:
    """Stands for the place of a core on the chip."""

    core: int


@dataclass(frozen=True)
class Channel:
    """A counter of core `receiver` that one core raises. credit: what its writer waits for, else its reader.

    Where sender and receiver are the same it counts what the core has sent from where it may write again.
    """

    receiver: int
    sender: int
    credit: bool
    local: bool = False


@dataclass
class Stream:
    """What one core does in a section, as words. A Remote stands for the x | y << 8 of a core."""

    compute: list[Word] = field(default_factory=list)
    reader: list[Word | Remote] = field(default_factory=list)
    writer: list[Word | Remote] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.compute) + len(self.reader) + len(self.writer)


@dataclass
class _Message:
    """The `number`th message of a channel, sent when task `after` of the sender is done; what it tells."""

    channel: Channel
    number: int
    after: int
    knows: dict[int, int]


@dataclass
class _Entry:
    """A task of a core. waits: what its reader waits for; done: the results of this core that it needs.

    credits: what its moves wait for.    sends: one message to each receiver of its moves.
    grants: credits to give when it is done.
    """

    task: Task
    waits: list[_Message] = field(default_factory=list)
    done: int = 0
    credits: list[_Message] = field(default_factory=list)
    sends: list[_Message] = field(default_factory=list)
    grants: list[_Message] = field(default_factory=list)


class Counters:
    """Numbers of the counters of each core, the same in all sections."""

    def __init__(self) -> None:
        self.numbers: dict[Channel, int] = {}
        self._used: dict[int, int] = defaultdict(int)

    def __getitem__(self, channel: Channel) -> int:
        if channel not in self.numbers:
            self._used[channel.receiver] += 1
            self.numbers[channel] = self._used[channel.receiver]
        return self.numbers[channel]

    @property
    def most(self) -> int:
        """On any core, with the first one, which counts no messages."""
        return 1 + max(self._used.values(), default=0)


Place = tuple[Region, int]
"""A region and a core that sends to it."""


class Schedule:
    """The streams of one section, by core.

    settled: where a sender knows at the begin of the section that what stood there has been read.
    """

    def __init__(
        self, tasks: list[Task], num_cores: int, counters: Counters, settled: Collection[Place] = ()
    ) -> None:
        self.counters = counters
        self.settled = settled
        self.asked: set[Place] = set()  # of the places where the begin of the section has to be awaited
        self.entries: list[list[_Entry]] = [[] for _ in range(num_cores)]
        self._known: list[dict[int, int]] = [{} for _ in range(num_cores)]  # by the compute kernel
        self._writer_known: list[dict[int, int]] = [{} for _ in range(num_cores)]
        self._sent: dict[Channel, int] = defaultdict(int)
        self._written: dict[Region, int | _Message] = {}
        self._read: dict[Region, int] = {}
        self._leaving: dict[Region, list[_Message]] = defaultdict(list)
        self._left: list[list[_Message]] = [[] for _ in range(num_cores)]  # messages nobody has waited for
        self._credits: dict[tuple[int, int, int], _Message] = {}
        self._starts: list[_Entry] = [
            _Entry(Task(core, "NOTHING", [], name="begin")) for core in range(num_cores)
        ]
        for task in tasks:
            self._add(task)
        for core, messages in enumerate(self._left):
            for message in messages:
                _learn(self._known[core], message.knows)
        self._number_credits()

    def settles(self, place: Place) -> bool:
        """Whether the sender knows at the end of the section that all reads in it are done."""
        region, sender = place
        return self._known[sender].get(region[1], -1) >= self._read.get(region, -1)

    # --- dependencies ---------------------------------------------------------------------------------------

    def _add(self, task: Task) -> None:
        core, entry = task.core, _Entry(task)
        self.entries[core].append(entry)
        number = len(self.entries[core])
        known = self._known[core]
        for region in sorted(task.reads):
            writer = self._written.get(region, 0)
            if isinstance(writer, _Message):
                self._await(entry, core, writer)
            else:
                entry.done = max(entry.done, writer)
            self._read[region] = number
        for region in sorted(task.writes):
            for message in self._leaving.pop(region, []):
                self._await(entry, core, message)
            assert not isinstance(self._written.get(region), _Message), region
            self._written[region] = number
        known[core] = number
        if task.moves:
            self._send(entry, number)

    def _await(self, entry: _Entry, core: int, message: _Message) -> None:
        if message in self._left[core]:
            self._left[core].remove(message)
            entry.waits.append(message)
        _learn(self._known[core], message.knows)

    def _send(self, entry: _Entry, number: int) -> None:
        core, moves = entry.task.core, entry.task.moves
        known = self._writer_known[core]
        _learn(known, self._known[core])
        for move in moves:
            old, needed = self._written.get(move.writes), self._read.get(move.writes, 0)
            assert not isinstance(old, _Message) or old not in self._left[move.core], f"{move.writes}: unread"
            place = move.writes, core
            if move.core == core or known.get(move.core, -1) >= needed:
                continue
            if needed == 0:
                self.asked.add(place)
            if needed > 0 or place not in self.settled:
                entry.credits.append(self._credit(move.core, core, needed))
        messages: dict[int, _Message] = {}
        for move in moves:
            if move.core not in messages:
                message = self._message(Channel(move.core, core, credit=False), number, dict(known))
                messages[move.core] = message
                self._left[move.core].append(message)
            self._written[move.writes] = messages[move.core]
        entry.sends = list(messages.values())
        leaving = self._message(_tally(core), number, {})
        self._left[core].append(leaving)
        for region in dict.fromkeys(move.reads for move in moves):
            self._leaving[region].append(leaving)

    def _message(self, channel: Channel, after: int, knows: dict[int, int]) -> _Message:
        self._sent[channel] += 1
        return _Message(channel, self._sent[channel], after, knows)

    def _credit(self, reader: int, sender: int, needed: int) -> _Message:
        """A message from `reader` when its task `needed` is done; `sender` waits for it before it writes."""
        key = reader, sender, needed
        if key not in self._credits:
            giver = self.entries[reader][needed - 1] if needed else self._starts[reader]
            message = self._message(Channel(sender, reader, credit=True), needed, {reader: needed})
            self._credits[key] = message
            giver.grants.append(message)
        message = self._credits[key]
        _learn(self._writer_known[sender], message.knows)
        return message

    def _number_credits(self) -> None:
        """In the order in which they are given, which is not that in which the need for them was found."""
        by_channel: dict[Channel, list[_Message]] = defaultdict(list)
        for message in self._credits.values():
            by_channel[message.channel].append(message)
        for messages in by_channel.values():
            for number, message in enumerate(sorted(messages, key=lambda m: m.after), start=1):
                message.number = number

    # --- streams --------------------------------------------------------------------------------------------

    def streams(self) -> list[Stream]:
        return [self._stream(core) for core in range(len(self.entries))]

    def _stream(self, core: int) -> Stream:
        stream = Stream()
        reached: dict[Channel, int] = defaultdict(int)
        start = self._starts[core]
        entries = [start, *self.entries[core]] if start.grants else self.entries[core]
        shift = 1 if start.grants else 0
        taken = 0
        for entry in entries:
            go = self._wait(stream.reader, reached, entry.waits)
            if go:
                stream.reader.append(MOVEMENT["GIVE"])
            needed = entry.done + shift if entry.done else 0
            pops = max(0, needed - taken)
            taken += pops
            send = bool(entry.sends or entry.grants)
            stream.compute.append(header(entry.task.code, go, pops, send))
            stream.compute += entry.task.words
            if send:
                stream.writer.append(MOVEMENT["TAKE"] | 1 << 8)
            for message in entry.grants:
                stream.writer += self._signal(message)
            self._wait(stream.writer, reached, entry.credits)
            for move in entry.task.moves:
                stream.writer += _move_words(move)
            for message in entry.sends:
                stream.writer += self._signal(message)
            if entry.sends:
                stream.writer.append(MOVEMENT["TALLY"] | self.counters[_tally(core)] << 16)
        go = self._wait(stream.reader, reached, self._left[core])
        if go:
            stream.reader.append(MOVEMENT["GIVE"])
        stream.compute.append(header("END", go, len(entries) - taken, False))
        stream.reader.append(MOVEMENT["FINISH"])
        stream.writer.append(MOVEMENT["FINISH"])
        return stream

    def _wait(
        self, words: list[Word | Remote], reached: dict[Channel, int], messages: list[_Message]
    ) -> bool:
        """Appends the waits for messages not yet waited for; whether there was one."""
        before = len(words)
        for message in messages:
            missing = message.number - reached[message.channel]
            if missing > 0:
                assert missing <= MOST_MESSAGES
                reached[message.channel] = message.number
                words.append(MOVEMENT["WAIT"] | missing << 8 | self.counters[message.channel] << 16)
        return len(words) > before

    def _signal(self, message: _Message) -> list[Word | Remote]:
        channel = message.channel
        return [MOVEMENT["SIGNAL"], Remote(channel.receiver), self.counters[channel]]


def schedules(sections: list[list[Task]], num_cores: int) -> tuple[list[Schedule], Counters]:
    """Of all sections of a program, which may follow each other in any order.

    Where each section that reads a place leaves its sender knowing that it has, no section needs to ask.
    """
    settled: set[Place] | None = None
    while True:
        counters = Counters()
        found = [Schedule(tasks, num_cores, counters, settled or ()) for tasks in sections]
        asked = {place for schedule in found for place in schedule.asked} if settled is None else settled
        still = {place for place in asked if all(schedule.settles(place) for schedule in found)}
        if still == settled:  # without the credits that are gone now, too
            return found, counters
        settled = still


def _tally(core: int) -> Channel:
    return Channel(core, core, credit=False, local=True)


def _learn(known: dict[int, int], told: dict[int, int]) -> None:
    for core, number in told.items():
        known[core] = max(known.get(core, -1), number)


def _move_words(move: Move) -> list[Word | Remote]:
    sizes = move.bytes, move.source_step, move.target_step
    assert not any(size % 16 for size in sizes), move
    row, source_step, target_step = (size // 16 for size in sizes)
    assert row < 1 << 16 and source_step < 1 << 16 and move.rows < 256, move
    code = MOVEMENT["MOVE"] | move.rows << 8
    target = replace(move.target, core=move.core)
    return [code, Remote(move.core), move.source, target, row | source_step << 16, target_step]
