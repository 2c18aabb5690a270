"""What the fused kernel and its emulation share: from a network to tasks, streams and launches.

Both are given the card operations of `lowering.py` and run the instructions made of them; how a launch is
carried out is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pctt._checks import require_count
from pctt.backends.fused_cores import Cores, evenly
from pctt.backends.fused_schedule import schedules
from pctt.backends.fused_stream import ARGUMENT, COUNTER_BYTES
from pctt.backends.fused_tasks import Tasks
from pctt.backends.lowering import TILE, CardBuffer, lower, scalar_value
from pctt.backends.placed import Placed
from pctt.groups import Layout, layout, padded
from pctt.network import Network
from pctt.program import Instruction, Program

SECTIONS = ("initialise", "measure_initial", "finish", "measure", "gradients", "update", "refresh", "sweep")
MOST_ARGUMENTS = 341
"""That TT-Metalium takes at run time."""
MOST_NUMBERS = ARGUMENT["SEGMENTS"] - ARGUMENT["NUMBERS"]
MOST_SEGMENTS = (MOST_ARGUMENTS - ARGUMENT["SEGMENTS"]) // 2

L1_UNIT = 64
"""Bytes that TT-NN allocates in on Blackhole, the coarser of the two chips."""
PAGES = {"float32": 4096, "bfloat16": 2048}
TOKENS = ("GO", "DONE", "SEND")
CIRCULAR_BUFFER_BYTES = sum(PAGES.values()) + len(TOKENS) * PAGES["bfloat16"]

Code = tuple[Instruction, ...]


class FusedPlan(Placed):
    """cores_per_layer: cores that each layer is shared among where it has as many tiles of units; None takes
    as few as L1 allows.
    """

    whole_steps = True
    cores_per_layer: int | None = None

    def share_layers(self, cores_per_layer: int | None) -> None:
        if cores_per_layer is not None:
            require_count("cores_per_layer", cores_per_layer, least=1)
        self.cores_per_layer = cores_per_layer
        self.launches = 0

    # --- compiling ------------------------------------------------------------------------------------------

    def compile(
        self, net: Network, grouped: bool, write: Callable[[Layout], Program], batch_size: int
    ) -> tuple[Layout, Program]:
        if net.wiring is not None:
            raise ValueError(
                "the fused kernel runs chains of dense layers, and this network is a graph; drop fused=True, "
                "or build it with pctt.chain."
            )
        self.planned_rows = padded(batch_size, TILE)
        self.layout = layout(net, grouped, TILE)
        self._lowered = lower(write(self.layout), self.layout, self.policy)
        sections = [getattr(self._lowered, name) for name in SECTIONS] + list(self._lowered.steps)
        self.codes: dict[Code, int] = {}
        for code in filter(None, sections):
            self.codes.setdefault(code, len(self.codes))
        self.numbers = [{i.scalar for i in code} for code in self.codes]
        widths = [padded(width, TILE) // TILE for width in net.widths]
        asked = self.cores_per_layer
        tried: set[Cores] = set()
        for most in (asked,) if asked is not None else range(1, max(widths) + 1):
            cores = Cores(tuple(evenly(width, most) for width in widths))
            if cores in tried or (tried and cores.total > self.grid[0] * self.grid[1]):
                continue
            tried.add(cores)
            self.cores = cores
            self._require_cores()
            self._plan()
            if self.bytes_per_core() <= self.chip.l1_bytes:
                break
        self._require_room()
        self.program = replace(self._lowered, buffers=dict(self.tasks.buffers))
        self._buffers = self.tasks.buffers
        return self.layout, self.program

    def _plan(self) -> None:
        """Tasks and streams of every section, for batches of the planned rows."""
        self.tasks = Tasks(self._lowered, self.codes, self.cores, self.planned_rows)
        assert len(self.tasks.numbers) <= MOST_NUMBERS, self.tasks.numbers
        self.schedules, self.counters = schedules(self.tasks.sections, self.cores.total)
        self.streams = [schedule.streams() for schedule in self.schedules]
        self.offsets: list[dict[str, int]] = []  # into the working memory of each core
        self.working_bytes = 0
        for core in range(self.cores.total):
            offsets: dict[str, int] = {}
            total = 0
            for name, buffer in self.tasks.working.items():
                if core in self.cores.held_by(buffer):
                    offsets[name] = total
                    total += self.cores.bytes(buffer, self.planned_rows)
            self.offsets.append(offsets)
            self.working_bytes = max(self.working_bytes, total)
        self.forget()

    def forget(self) -> None:
        """Called when the instructions have changed: what was made of the old ones is of no use any more."""
        raise NotImplementedError

    def rows(self, batch_size: int) -> int:
        if batch_size > self.planned_rows:
            before, self.planned_rows = self.planned_rows, padded(batch_size, TILE)
            self._plan()
            try:
                self._require_room()
            except ValueError:
                self.planned_rows = before
                self._plan()
                raise
        return self.planned_rows

    # --- limits ---------------------------------------------------------------------------------------------

    def bytes_per_core(self) -> int:
        """L1 that tensors, working memory, instructions, counters and circular buffers take on each core.
        Allocation is lock-step: each tensor counts on all cores, of the working memory the largest.
        """
        tensors = sum(self.cores.bytes(buffer, self.planned_rows) for buffer in self.tasks.buffers.values())
        words = self._longest(range(len(self.streams))) + self._longest(self._sections_of_weights())
        counters = padded(self.counters.most * COUNTER_BYTES, L1_UNIT)
        return tensors + self.working_bytes + 4 * words + counters + CIRCULAR_BUFFER_BYTES

    def _longest(self, sections: Iterable[int]) -> int:
        """Words of the table of the core with the most instructions."""
        sections = list(sections)
        lengths = [sum(self.streams[s][core].length for s in sections) for core in range(self.cores.total)]
        return padded(3 * len(self.streams) + max(lengths), L1_UNIT // 4)

    def _sections_of_weights(self) -> list[int]:
        """Sections that read and write no batch: they are bound twice, with and without one."""
        return [self.codes[code] for code in (self._lowered.update, self._lowered.refresh) if code]

    def _require_cores(self) -> None:
        num_cores = self.grid[0] * self.grid[1]
        if self.cores.total > num_cores:
            most = max(self.cores.slices)
            share = "a core each" if most == 1 else f"up to {most} cores each"
            raise ValueError(
                f"{len(self.cores.slices)} nodes with {share} take {self.cores.total} cores, and the "
                f"{self.chip.name} has {num_cores} here; use fewer or narrower layers, fewer "
                "cores_per_layer, or drop fused=True to spread layers over all cores."
            )

    def _require_room(self) -> None:
        taken, available = self.bytes_per_core(), self.chip.l1_bytes
        if taken <= available:
            return
        buffers = {**self.tasks.buffers, **self.tasks.working}.values()
        sizes = {buffer.name: self.cores.bytes(buffer, self.planned_rows) for buffer in buffers}
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"the network does not fit the fused kernel on the {self.chip.name}: {taken:,} bytes of L1 on "
            f"each core where there are {available:,}, {taken - available:,} too many, with up to "
            f"{max(self.cores.slices)} cores per layer; the largest tensor is {largest.partition('@')[0]!r} "
            f"with {sizes[largest]:,} bytes. Use a smaller batch_size, more cores_per_layer, narrower "
            "layers, or drop fused=True."
        )

    # --- slices ---------------------------------------------------------------------------------------------

    def split(self, buffer: CardBuffer, index: int, values: Tensor) -> tuple[range, Tensor]:
        """The cores that hold an entry, and what each of them has of it: [cores, rows, columns]."""
        held = self.cores.of(self.cores.node(buffer, index))
        values = values[:1] if buffer.rows == 1 else values
        width = self.cores.tiles(buffer, self.planned_rows)[1] * TILE
        values = torch.nn.functional.pad(values, (0, len(held) * width - values.shape[1]))
        return held, values.view(len(values), len(held), width).transpose(0, 1).contiguous()

    def holders(self, buffer: CardBuffer, start: int, stop: int) -> range:
        """The cores that hold entries start to stop."""
        first, last = (self.cores.node(buffer, entry) for entry in (start, stop - 1))
        return range(self.cores.first[first], self.cores.of(last).stop)

    def joined(self, shares: Tensor, num_entries: int) -> Tensor:
        """Entries from what their cores hold, in order: [entries, rows, columns]."""
        rows, width = shares.shape[1:]
        return shares.view(num_entries, -1, rows, width).transpose(1, 2).reshape(num_entries, rows, -1)

    # --- running --------------------------------------------------------------------------------------------

    def bind(
        self, code: Iterable[Instruction], buffers: Mapping[str, Any], scalars: Mapping[str, float]
    ) -> Part:
        code = tuple(code)
        return Part(self, self.codes[code] if code else None, buffers, scalars)

    def sequence(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        parts: list[Part] = []
        for call in calls:
            if not isinstance(call, (Part, Parts)):
                raise ValueError(
                    "the fused kernel has one number for the step of Adam in a launch, and weights_at="
                    "'every_step' needs one per inference step; use SGD, or drop fused=True."
                )
            parts += call.parts
        return Parts(self, parts)

    def launch(self, parts: list[Part]) -> None:
        """Runs sections one after the other, in one program."""
        sections = [part.section for part in parts if part.section is not None]
        if not sections:
            return
        if self.is_fresh():  # copies of the weights lie in working memory
            sections = [self.codes[self._lowered.refresh], *sections]
        segments = [(section, len(list(run))) for section, run in groupby(sections)]
        if len(segments) > MOST_SEGMENTS:
            raise ValueError(
                f"one launch takes at most {MOST_SEGMENTS} different sections in a row, and these inference "
                f"steps are {len(segments)}; use fewer inference steps."
            )
        widest = max(parts, key=lambda part: len(part.buffers))
        used = {name for section, _ in segments for name in self.numbers[section]}
        numbers = [
            scalar_value(widest.scalars, buffer) if buffer.name in used else 0.0
            for buffer in self.tasks.numbers
        ]
        self.launches += 1
        self.run(widest, segments, numbers)

    def is_fresh(self) -> bool:
        """Whether nothing was launched yet since `forget`."""
        raise NotImplementedError

    def run(self, part: Part, segments: list[tuple[int, int]], numbers: list[float]) -> None:
        """Runs sections, each so many times, on the buffers of `part`. numbers: as the tasks number them."""
        raise NotImplementedError


class Part:
    """A section on a set of buffers; a launch of its own where it is called alone. section: None if empty."""

    def __init__(
        self,
        backend: FusedPlan,
        section: int | None,
        buffers: Mapping[str, Any],
        scalars: Mapping[str, float],
    ) -> None:
        self.backend = backend
        self.section = section
        self.buffers = buffers
        self.scalars = scalars
        self.parts: list[Part] = [self]

    @cached_property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Of tensors on a card."""
        return tuple((name, share.tensor.buffer_address()) for name, share in self.buffers.items())

    def __call__(self) -> None:
        self.backend.launch(self.parts)


class Parts:
    """Sections that are always run one after the other: one launch."""

    def __init__(self, backend: FusedPlan, parts: list[Part]) -> None:
        self.backend = backend
        self.parts = parts

    def __call__(self) -> None:
        self.backend.launch(self.parts)


class Shares:
    """A buffer in slices, one on each core: entry i of the tensor is what lies on core i."""

    def __init__(self, buffer: CardBuffer, tensor: Any) -> None:
        self.buffer = buffer
        self.tensor = tensor
        self.views: dict[tuple[int, int], Any] = {}
