"""Where the tensors of the fused kernel lie, and what a core is told to do with them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pctt.backends.fused_stream import Ref, Word
from pctt.backends.lowering import TILE, CardBuffer
from pctt.backends.precision import BYTES
from pctt.program import BATCH, Program

Region = tuple[str, int, int]
"""A tensor on a core; of one that several cores write to, the block of that sender."""


@dataclass(frozen=True)
class Cores:
    """Which cores hold which node: node i the next `slices[i]` of them, counted row by row from (0, 0).

    A layer lies with the node that it predicts.
    """

    slices: tuple[int, ...]

    @cached_property
    def first(self) -> tuple[int, ...]:
        return tuple(sum(self.slices[:node]) for node in range(len(self.slices)))

    @property
    def total(self) -> int:
        return sum(self.slices)

    def of(self, node: int) -> range:
        return range(self.first[node], self.first[node] + self.slices[node])

    def node(self, buffer: CardBuffer, entry: int) -> int:
        """The node whose cores hold that entry of a buffer."""
        assert buffer.first is not None, buffer
        return buffer.first + entry

    def held_by(self, buffer: CardBuffer) -> range:
        """Every core with an entry of a buffer, or a slice of one."""
        last = self.node(buffer, buffer.count - 1)
        return range(self.first[self.node(buffer, 0)], self.of(last).stop)

    def num_slices(self, buffer: CardBuffer) -> int:
        """Cores that share the columns of an entry; 1 where each has them all."""
        if is_whole(buffer):
            return 1
        (number,) = {self.slices[self.node(buffer, entry)] for entry in range(buffer.count)}  # nodes alike
        return number

    def tiles(self, buffer: CardBuffer, rows: int) -> tuple[int, int]:
        """Rows and columns on one core, in tiles. rows: of a batch."""
        height, width = buffer.tiles(rows)
        return height, -(-width // self.num_slices(buffer))

    def bytes(self, buffer: CardBuffer, rows: int) -> int:
        height, width = self.tiles(buffer, rows)
        return height * width * tile_bytes(buffer)


def evenly(tiles: int, most: int) -> int:
    """The largest number of cores up to `most` of which each gets a share of that many tiles."""
    return max(n for n in range(1, min(tiles, most) + 1) if -(-tiles // -(-tiles // n)) == n)


def is_whole(buffer: CardBuffer) -> bool:
    """Whether every core of a layer has all columns: of what it is sent, and of what has no units."""
    return "^" in buffer.role or buffer.columns == BATCH


def tile_bytes(buffer: CardBuffer) -> int:
    return TILE * TILE * BYTES[buffer.format]


@dataclass
class Move:
    """Rows of bytes that a core sends when a task is done. core: where to, the sender itself included.

    rows: how many; bytes: of each; source_step, target_step: from one to the next.
    """

    core: int
    source: Ref
    target: Ref
    rows: int
    bytes: int
    source_step: int
    target_step: int
    reads: Region
    writes: Region


@dataclass
class Task:
    """What a core does without waiting in between. words: of its instruction, without the header.

    products: of tiles.    links: of its elementwise work, for one tile; tiles: how many.
    """

    core: int
    code: str
    words: list[Word]
    reads: set[Region] = field(default_factory=set)
    writes: set[Region] = field(default_factory=set)
    moves: list[Move] = field(default_factory=list)
    name: str = ""
    products: int = 0
    links: tuple[str, ...] = ()
    tiles: int = 0


def number_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


class Tensors:
    """The tensors of a program on its cores, and those for sending, receiving and spreading beside them.

    fed: buffers that products write for the layer below.    rows: of a batch.
    """

    def __init__(self, program: Program, cores: Cores, rows: int, fed: set[str]) -> None:
        self.program = program
        self.cores = cores
        self.rows = rows
        self.fed = fed
        self.known: dict[str, CardBuffer] = {}

    def original(self, name: str) -> CardBuffer:
        buffer = self.program.buffers[name]
        assert isinstance(buffer, CardBuffer), name
        return buffer

    def buffer(self, name: str) -> CardBuffer:
        """A tensor of the program. Partial sums that are still to be added up are not rounded before."""
        buffer = self.original(name)
        if name in self.fed and self.num_senders(buffer) > 1:
            buffer = replace(buffer, format="float32")
        return self.remember(buffer)

    def remember(self, buffer: CardBuffer) -> CardBuffer:
        return self.known.setdefault(buffer.name, buffer)

    def num_senders(self, buffer: CardBuffer) -> int:
        nodes = range(self.cores.node(buffer, 0), self.cores.node(buffer, buffer.count))
        return max(self.cores.slices[node] for node in nodes)

    def beside(self, what: str, buffer: CardBuffer, **changes: Any) -> CardBuffer:
        """A buffer with a slice for each node of `buffer`, one core below where that lies with the layer."""
        assert buffer.first is not None
        first = buffer.first - 1 if "^" in buffer.role else buffer.first
        name = f"{what} {buffer.name.replace('^', '')}"
        return self.remember(replace(buffer, name=name, first=first, **changes))

    def landing(self, buffer: CardBuffer) -> CardBuffer:
        return self.beside("landed", buffer, positions=self.num_senders(buffer))

    def tiles(self, buffer: CardBuffer) -> tuple[int, int]:
        return self.cores.tiles(buffer, self.rows)
