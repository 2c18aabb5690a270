"""A Tenstorrent card through one program of our own: whole training steps in `kernels/training_step`.

The card operations are those of the TT-NN path (`lowering.py`), on the same tensors; but instead of a TT-NN
program each they become instructions in the L1 of the cores (`fused_tasks.py`, `fused_schedule.py`), which
three persistent kernels on every core read. One launch runs any sequence of sections, a whole training step
with all its inference steps too, and from launch to end nothing goes to DRAM or to the host. The kernels are
compiled once: the network, the batch, the number of steps and the rates are data to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pctt.backends.devices import device_at_work
from pctt.backends.fused_cores import number_bits
from pctt.backends.fused_plan import L1_UNIT, MOST_NUMBERS, PAGES, TOKENS, FusedPlan, Part, Shares
from pctt.backends.fused_schedule import Remote
from pctt.backends.fused_stream import COUNTER_BYTES, KERNELS, WINDOW, Ref, Word
from pctt.backends.lowering import TILE, CardBuffer
from pctt.backends.precision import PrecisionPolicy
from pctt.backends.tenstorrent import Card
from pctt.groups import padded

FORMATS = {
    "float32": ("FLOAT32_TO_DEST", "FLOAT32_IN0", "FLOAT32_IN1", "FLOAT32_OUT"),
    "bfloat16": ("BFLOAT16_IN0", "BFLOAT16_IN1", "BFLOAT16_OUT"),
}
"""Circular buffers that stand for a format; they share the room of a tile, which nothing is written to."""


USUAL_ARGUMENTS = 64


class Fused(FusedPlan, Card):
    """cores_per_layer: cores that each layer is shared among where it has as many tiles of units; None takes
    as few as L1 allows.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: str | int | None = None,
        policy: PrecisionPolicy | None = None,
        cores_per_layer: int | None = None,
    ) -> None:
        Card.__init__(self, dtype, device, policy)
        self.share_layers(cores_per_layer)
        self.defines: dict[str, str] = {}  # of the kernels; tests make cores slow with them
        self._places = [
            self.device.worker_core_from_logical_core(self.ttnn.CoreCoord(x, y))
            for y in range(self.grid[1])
            for x in range(self.grid[0])
        ]
        self._tables: dict[tuple[tuple[str, int], ...], Any] = {}
        self._own: tuple[Any, Any] | None = None  # mailbox and working memory

    def forget(self) -> None:
        self._tables.clear()
        self._own = None

    def is_fresh(self) -> bool:
        return self._own is None

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
        held, shares = self.split(buffer, index, values)
        host = self.ttnn.from_torch(
            shares[None], dtype=getattr(self.ttnn, buffer.format), layout=self.ttnn.TILE_LAYOUT
        )
        self.ttnn.copy_host_to_device_tensor(host, self._view(tensor, held.start, held.stop))

    @device_at_work()
    def get(self, tensor: Shares, start: int, stop: int) -> Tensor:
        held = self.holders(tensor.buffer, start, stop)
        shares = self.ttnn.to_torch(self._view(tensor, held.start, held.stop))[0].float()
        return self.joined(shares, stop - start)

    def _view(self, tensor: Shares, start: int, stop: int) -> Any:
        """What lies on some cores; no copy."""
        if (start, stop) not in tensor.views:
            tensor.views[start, stop] = self.ttnn.narrow(tensor.tensor, 1, start, stop - start)
        return tensor.views[start, stop]

    # --- running --------------------------------------------------------------------------------------------

    @device_at_work()
    def run(self, part: Part, segments: list[tuple[int, int]], numbers: list[float]) -> None:
        if self._own is None:
            words = self.counters.most * COUNTER_BYTES // 4, self.working_bytes // 4
            mailbox, working = (self._upload([[0] * number] * self.cores.total) for number in words)
            self._own = mailbox, working
        mailbox, working = self._own
        table = self._table(part, working.buffer_address())
        bits = [*map(number_bits, numbers), *[0] * (MOST_NUMBERS - len(numbers))]
        arguments = [table.buffer_address(), mailbox.buffer_address(), len(segments), *bits]
        arguments += [number for segment in segments for number in segment]
        # As many in most launches, else each number of segments would be a program of its own to TT-NN.
        arguments += [0] * (USUAL_ARGUMENTS - len(arguments))
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
        length = padded(max(map(len, tables)), L1_UNIT // 4)
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
