"""A Tenstorrent card through one program of our own: whole training steps in `kernels/training_step`.

The card operations are those of the TT-NN path (`lowering.py`), on the same tensors; but instead of a TT-NN
program each they become instructions in the L1 of the cores (`fused_tasks.py`, `fused_schedule.py`), which
three persistent kernels on every core read. One launch runs any sequence of sections, a whole training step
with all its inference steps too, and from launch to end nothing goes to DRAM or to the host. The kernels are
compiled once: the network, the batch, the number of steps and the rates are data to them.
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
from pctt.backends.fused_schedule import Remote, schedules
from pctt.backends.fused_stream import ARGUMENT, COUNTER_BYTES, KERNELS, WINDOW, Ref, Word
from pctt.backends.fused_tasks import Cores, Tasks, evenly, number_bits
from pctt.backends.lowering import TILE, CardBuffer, lower, scalar_value
from pctt.backends.precision import PrecisionPolicy
from pctt.backends.tenstorrent import Card, device_at_work
from pctt.groups import Layout, layout, padded
from pctt.network import Network
from pctt.program import Instruction, Program

SECTIONS = ("initialise", "measure_initial", "finish", "measure", "gradients", "update", "refresh", "sweep")
MOST_ARGUMENTS = 341
"""That TT-Metalium takes at run time."""
MOST_NUMBERS = ARGUMENT["SEGMENTS"] - ARGUMENT["NUMBERS"]
MOST_SEGMENTS = (MOST_ARGUMENTS - ARGUMENT["SEGMENTS"]) // 2

FORMATS = {
    "float32": ("FLOAT32_TO_DEST", "FLOAT32_IN0", "FLOAT32_IN1", "FLOAT32_OUT"),
    "bfloat16": ("BFLOAT16_IN0", "BFLOAT16_IN1", "BFLOAT16_OUT"),
}
"""Circular buffers that stand for a format; they share the room of a tile, which nothing is written to."""
TOKENS = ("GO", "DONE", "SEND")
PAGES = {"float32": 4096, "bfloat16": 2048}
CIRCULAR_BUFFER_BYTES = sum(PAGES.values()) + len(TOKENS) * PAGES["bfloat16"]

Code = tuple[Instruction, ...]


class Fused(Card):
    """cores_per_layer: cores that each layer is shared among where it has as many tiles of units; None takes
    as few as L1 allows.
    """

    whole_steps = True

    def __init__(
        self,
        dtype: torch.dtype,
        device: str | int | None = None,
        policy: PrecisionPolicy | None = None,
        cores_per_layer: int | None = None,
    ) -> None:
        super().__init__(dtype, device, policy)
        if cores_per_layer is not None:
            require_count("cores_per_layer", cores_per_layer, least=1)
        self.cores_per_layer = cores_per_layer
        self.defines: dict[str, str] = {}  # of the kernels; tests make cores slow with them
        self.launches = 0
        self._places = [
            self.device.worker_core_from_logical_core(self.ttnn.CoreCoord(x, y))
            for y in range(self.grid[1])
            for x in range(self.grid[0])
        ]
        self._tables: dict[tuple[tuple[str, int], ...], Any] = {}
        self._own: tuple[Any, Any] | None = None  # mailbox and working memory

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
        self._tables.clear()
        self._own = None

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
        counters = self.counters.most * COUNTER_BYTES
        return tensors + self.working_bytes + 4 * words + counters + CIRCULAR_BUFFER_BYTES

    def _longest(self, sections: Iterable[int]) -> int:
        """Words of the table of the core with the most instructions."""
        sections = list(sections)
        lengths = [sum(self.streams[s][core].length for s in sections) for core in range(self.cores.total)]
        return padded(3 * len(self.streams) + max(lengths), 8)

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

    # --- tensors --------------------------------------------------------------------------------------------

    @device_at_work()
    def allocate(self, buffer: CardBuffer, batch_size: int) -> Shares:
        held = self.cores.held_by(buffer)
        height, width = (size * TILE for size in self.cores.tiles(buffer, batch_size))
        values = torch.zeros(1, held.stop, 1 if buffer.rows == 1 else height, width)
        if buffer.content == "ones":
            values += 1.0
        tensor = self.ttnn.from_torch(
            values,
            dtype=getattr(self.ttnn, buffer.format),
            layout=self.ttnn.TILE_LAYOUT,
            device=self.device,
            memory_config=self._on_cores(held.stop, (height, width)),
        )
        return Shares(buffer, tensor)

    def _on_cores(self, num_cores: int, shape: tuple[int, int]) -> Any:
        spec = self.ttnn.ShardSpec(
            self._core_ranges(num_cores), list(shape), self.ttnn.ShardOrientation.ROW_MAJOR
        )
        layout, memory = self.ttnn.TensorMemoryLayout.HEIGHT_SHARDED, self.ttnn.BufferType.L1
        return self.ttnn.MemoryConfig(layout, memory, spec)

    def _core_ranges(self, num_cores: int) -> Any:
        """The first cores of the grid, row by row."""
        corner = self.ttnn.CoreCoord(*self.grid)
        return self.ttnn.num_cores_to_corerangeset(num_cores, corner, row_wise=True)

    @device_at_work()
    def put(self, tensor: Shares, buffer: CardBuffer, index: int, values: Tensor) -> None:
        held = self.cores.of(self.cores.node(buffer, index))
        values = values[:1] if buffer.rows == 1 else values
        width = tensor.tensor.shape[3]
        shares = torch.nn.functional.pad(values, (0, len(held) * width - values.shape[1]))
        shares = shares.view(len(values), len(held), width).transpose(0, 1)
        host = self.ttnn.from_torch(
            shares[None].contiguous(),
            dtype=getattr(self.ttnn, buffer.format),
            layout=self.ttnn.TILE_LAYOUT,
        )
        self.ttnn.copy_host_to_device_tensor(host, self._view(tensor, held.start, held.stop))

    @device_at_work()
    def get(self, tensor: Shares, start: int, stop: int) -> Tensor:
        first, last = (self.cores.node(tensor.buffer, entry) for entry in (start, stop - 1))
        cores = range(self.cores.first[first], self.cores.of(last).stop)
        shares = self.ttnn.to_torch(self._view(tensor, cores.start, cores.stop))[0].float()
        rows, width = shares.shape[1:]
        values = shares.view(stop - start, -1, rows, width).transpose(1, 2)
        return values.reshape(stop - start, rows, -1)

    def _view(self, tensor: Shares, start: int, stop: int) -> Any:
        """What lies on some cores; no copy."""
        if (start, stop) not in tensor.views:
            tensor.views[start, stop] = self.ttnn.narrow(tensor.tensor, 1, start, stop - start)
        return tensor.views[start, stop]

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

    @device_at_work()
    def launch(self, parts: list[Part]) -> None:
        """Runs sections one after the other, in one program."""
        running = [part.section for part in parts if part.section is not None]
        if not running:
            return
        if self._own is None:
            words = self.counters.most * COUNTER_BYTES // 4, self.working_bytes // 4
            self._own = tuple(self._upload([[0] * number] * self.cores.total) for number in words)
            running = [self.codes[self._lowered.refresh], *running]  # copies of the weights lie there
        mailbox, working = self._own
        segments = [(section, len(list(run))) for section, run in groupby(running)]
        if len(segments) > MOST_SEGMENTS:
            raise ValueError(
                f"one launch takes at most {MOST_SEGMENTS} different sections in a row, and these inference "
                f"steps are {len(segments)}; use fewer inference steps."
            )
        widest = max(parts, key=lambda part: len(part.buffers))
        used = {name for section, _ in segments for name in self.numbers[section]}
        numbers = [0] * MOST_NUMBERS
        for index, buffer in enumerate(self.tasks.numbers):
            if buffer.name in used:
                numbers[index] = number_bits(scalar_value(widest.scalars, buffer))
        table = self._table(widest, working.buffer_address())
        arguments = [table.buffer_address(), mailbox.buffer_address(), len(segments), *numbers]
        arguments += [number for segment in segments for number in segment]
        self.launches += 1
        self.ttnn.generic_op([table, mailbox], self._descriptor(arguments))

    def work(self) -> list[tuple[int, int, int]]:
        """What the compute kernel of each core counted with COUNT_WORK in `defines`: products of tiles, links
        and instructions since the first launch.
        """
        assert self._own is not None, "nothing was launched yet"
        words = self.ttnn.to_torch(self._own[0])[0, :, 0, :3].tolist()
        return [(products, links, instructions) for products, links, instructions in words]

    def _table(self, part: Part, working: int) -> Any:
        """The instructions of every core, in its L1, on the buffers of `part`: of all sections that these
        are enough for.
        """
        if part.addresses not in self._tables:
            addresses = dict(part.addresses)
            whole = self._buffers.keys() <= addresses.keys()
            sections = range(len(self.streams)) if whole else self._sections_of_weights()
            everywhere = [
                addresses | {name: working + offset for name, offset in offsets.items()}
                for offsets in self.offsets
            ]
            tables = [self._words(core, sections, everywhere) for core in range(self.cores.total)]
            self._tables[part.addresses] = self._upload(tables)
        return self._tables[part.addresses]

    def _words(self, core: int, sections: Iterable[int], addresses: list[dict[str, int]]) -> list[int]:
        table = [0] * (3 * len(self.streams))
        for section in sections:
            stream = self.streams[section][core]
            for processor, words in enumerate((stream.compute, stream.reader, stream.writer)):
                table[3 * section + processor] = len(table)
                table += [self._word(word, core, addresses) for word in words]
        return table

    def _word(self, word: Word | Remote, core: int, addresses: list[dict[str, int]]) -> int:
        if isinstance(word, Ref):
            return addresses[core if word.core is None else word.core][word.tensor] + word.offset
        if isinstance(word, Remote):
            return self._places[word.core].x | self._places[word.core].y << 8
        return word

    def _upload(self, tables: list[list[int]]) -> Any:
        """Words of each core, in its L1."""
        length = padded(max(map(len, tables)), 8)
        words = torch.zeros(1, len(tables), 1, length, dtype=torch.int64)
        for core, table in enumerate(tables):
            words[0, core, 0, : len(table)] = torch.tensor(table, dtype=torch.int64)
        signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        return self.ttnn.from_torch(
            signed,
            dtype=self.ttnn.uint32,
            layout=self.ttnn.ROW_MAJOR_LAYOUT,
            device=self.device,
            memory_config=self._on_cores(len(tables), (1, length)),
        )

    # --- the program ----------------------------------------------------------------------------------------

    def _descriptor(self, arguments: list[int]) -> Any:
        ttnn, cores = self.ttnn, self._core_ranges(self.cores.total)
        compute = ttnn.ComputeConfigDescriptor(
            math_fidelity=getattr(ttnn.MathFidelity, self.fidelity),
            fp32_dest_acc_en=True,
            math_approx_mode=False,
        )
        modes = [ttnn.UnpackToDestMode.Default] * (64 if self.chip.arch == "blackhole" else 32)
        modes[WINDOW["FLOAT32_TO_DEST"]] = ttnn.UnpackToDestMode.UnpackToDestFp32
        compute.unpack_to_dest_mode = modes
        kernels = [
            ttnn.KernelDescriptor(
                kernel_source=str(KERNELS / name),
                core_ranges=cores,
                compile_time_args=[],
                defines=list(self.defines.items()),
                runtime_args=ttnn.RuntimeArgs(),
                common_runtime_args=arguments,
                config=config,
            )
            for name, config in (
                ("reader.cpp", ttnn.ReaderConfigDescriptor()),
                ("compute.cpp", compute),
                ("writer.cpp", ttnn.WriterConfigDescriptor()),
            )
        ]
        windows = [*FORMATS.items(), *(("bfloat16", (token,)) for token in TOKENS)]
        circular_buffers = [
            ttnn.CBDescriptor(
                total_size=PAGES[form],
                core_ranges=cores,
                format_descriptors=[
                    ttnn.CBFormatDescriptor(
                        buffer_index=WINDOW[name], data_format=getattr(ttnn, form), page_size=PAGES[form]
                    )
                    for name in names
                ],
            )
            for form, names in windows
        ]
        return ttnn.ProgramDescriptor(kernels=kernels, semaphores=[], cbs=circular_buffers)


class Shares:
    """A buffer in slices, one on each core: entry i of the tensor is what lies on core i."""

    def __init__(self, buffer: CardBuffer, tensor: Any) -> None:
        self.buffer = buffer
        self.tensor = tensor
        self.views: dict[tuple[int, int], Any] = {}


class Part:
    """A section on a set of buffers; a launch of its own where it is called alone. section: None if empty."""

    def __init__(
        self,
        backend: Fused,
        section: int | None,
        buffers: Mapping[str, Shares],
        scalars: Mapping[str, float],
    ) -> None:
        self.backend = backend
        self.section = section
        self.buffers = buffers
        self.scalars = scalars
        self.parts: list[Part] = [self]

    @cached_property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        return tuple((name, share.tensor.buffer_address()) for name, share in self.buffers.items())

    def __call__(self) -> None:
        self.backend.launch(self.parts)


class Parts:
    """Sections that are always run one after the other: one launch."""

    def __init__(self, backend: Fused, parts: list[Part]) -> None:
        self.backend = backend
        self.parts = parts

    def __call__(self) -> None:
        self.backend.launch(self.parts)
