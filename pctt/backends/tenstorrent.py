"""Tenstorrent cards through TT-NN: each card operation of `lowering.py` is one TT-NN program.

Every tensor lies in L1, height-sharded with one entry per core, or interleaved where the tiles of a layer are
spread over all cores; outputs are allocated beforehand and written in place. What runs here runs on whatever
ttnn opens: a card, the vendor's simulator (TT_METAL_SIMULATOR) or a mock device
(TT_METAL_MOCK_CLUSTER_DESC_PATH), by the same code.

Where dispatch allows it (fast dispatch), a sequence of sections is recorded as a trace on its second run and
replayed from then on; numbers that change, such as the learning rate, are tensors on the card, so a trace
outlives them. After the first run of a sequence no program may be compiled any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pctt.backends.devices import (
    device_at_work,
    dispatches_fast,
    is_mock,
    load_ttnn,
    open_device,
    place_of,
    release_trace,
)
from pctt.backends.graph_lowering import MAPS, MOVES, number_of
from pctt.backends.lowering import TILE, CardBuffer, Chain, is_reordered, num_programs, scalar_value
from pctt.backends.operations import one_after_the_other
from pctt.backends.placed import Placed
from pctt.backends.precision import PrecisionPolicy
from pctt.placement.budget import spread_product
from pctt.placement.chips import CHIPS, Chip
from pctt.program import BATCH, Instruction, Slot

Call = Callable[[], object]


class Card(Placed):
    """One open card, or a mesh. device: the card's number, default 0; or "mesh:2" for two chips."""

    name = "tenstorrent"

    def __init__(
        self, dtype: torch.dtype, device: str | int | None = None, policy: PrecisionPolicy | None = None
    ) -> None:
        self.place = place_of(device)
        self.device = open_device(device)
        size = self.device.compute_with_storage_grid_size()
        arch = "blackhole" if "BLACKHOLE" in str(self.device.arch()) else "wormhole_b0"
        grid = size.x, size.y
        super().__init__(dtype, _chip(arch, grid), grid, policy, num_chips=self.place[1])
        self.ttnn = load_ttnn()

    @device_at_work()
    def synchronise(self) -> None:
        self.ttnn.synchronize_device(self.device)


class Tenstorrent(Card):
    """Each card operation as a TT-NN program."""

    def __init__(
        self, dtype: torch.dtype, device: str | int | None = None, policy: PrecisionPolicy | None = None
    ) -> None:
        super().__init__(dtype, device, policy)
        fidelity = getattr(self.ttnn.MathFidelity, self.fidelity)
        self.compute = self.ttnn.init_device_compute_kernel_config(
            self.device.arch(),
            math_fidelity=fidelity,
            math_approx_mode=False,
            fp32_dest_acc_en=True,
            packer_l1_acc=True,
        )
        self.aside: dict[Instruction, Any] = {}
        self.gathered: dict[tuple[Slot, int], Any] = {}
        fast = dispatches_fast()
        self.traces = fast and not is_mock()
        self.queues = fast and self.num_chips == 1  # two of them: open_device
        # Where the host alone dispatches, ttnn 0.81.1 starts a program on a mesh before the last has ended.
        self.waits = self.num_chips > 1 and not fast

    def refuse_what_it_lacks(self) -> None:
        for i in (*self.program.training_step(), *self.program.sweep):
            if i.op in MAPS:
                name = self.layout.net.nodes[number_of(i.out[0].buffer)]
                raise ValueError(
                    f"layer {name!r} has {MAPS[i.op]}, which TT-NN's plain operations do not give and the "
                    "tenstorrent backend does not run; use backend='reference' or backend='emulated'."
                )

    # --- tensors --------------------------------------------------------------------------------------------

    @device_at_work()
    def allocate(self, buffer: CardBuffer, batch_size: int) -> CardTensor:
        share = self.share(batch_size)
        rows, columns = (size * TILE for size in buffer.tiles(share))
        # What lies on the cores before it costs nothing, and no view then reorders cores.
        first = buffer.first or 0
        values = torch.zeros(1, first + buffer.count, 1 if buffer.rows == 1 else rows, columns)
        if buffer.scalar is not None:
            values = values[..., :1]
        if buffer.content == "ones":
            values += 1.0
        tensor = self.ttnn.from_torch(
            values,
            dtype=getattr(self.ttnn, buffer.format),
            layout=self.ttnn.TILE_LAYOUT,
            device=self.device,
            memory_config=self._place(buffer, first + buffer.count, share),
            mesh_mapper=self._mapper(),
        )
        if self.waits:
            self.synchronise()
        return CardTensor(self, buffer, tensor)

    def _mapper(self, rows: int | None = None) -> Any:
        """Which chip gets what of a tensor from the host: all of it, or a share of the rows of a batch."""
        if self.num_chips == 1:
            return None
        if rows == BATCH:
            return self.ttnn.ShardTensorToMesh(self.device, dim=2)
        return self.ttnn.ReplicateTensorToMesh(self.device)

    def _place(self, buffer: CardBuffer, num_cores: int, batch_size: int) -> Any:
        """One entry on each of the first cores of the grid, row by row, or the tiles over all cores."""
        ttnn = self.ttnn
        if buffer.first is None:
            return ttnn.L1_MEMORY_CONFIG
        cores = ttnn.num_cores_to_corerangeset(num_cores, ttnn.CoreCoord(*self.grid), row_wise=True)
        shape = [size * TILE for size in buffer.tiles(batch_size)]
        spec = ttnn.ShardSpec(cores, shape, ttnn.ShardOrientation.ROW_MAJOR)
        return ttnn.MemoryConfig(ttnn.TensorMemoryLayout.HEIGHT_SHARDED, ttnn.BufferType.L1, spec)

    @device_at_work()
    def put(self, tensor: CardTensor, buffer: CardBuffer, index: int, values: Tensor) -> None:
        values = values[:1] if buffer.rows == 1 else values
        host = self.ttnn.from_torch(
            values[None, None],
            dtype=getattr(self.ttnn, buffer.format),
            layout=self.ttnn.TILE_LAYOUT,
            mesh_mapper=self._mapper(buffer.rows),
        )
        self.ttnn.copy_host_to_device_tensor(host, tensor.view(index, index + 1))

    @device_at_work()
    def send_ahead(self, buffer: CardTensor, slot: Slot, values: Tensor) -> Callable[[], None]:
        """On the second command queue, to a tensor beside the one in use."""
        if not self.queues:
            return super().send_ahead(buffer, slot, values)
        ttnn, entry = self.ttnn, self.buffer(slot.buffer)
        if slot not in buffer.waiting:
            aside = replace(entry, count=1, first=None)
            fresh = self.allocate(aside, self.planned_rows).tensor  # on the first queue
            buffer.waiting[slot] = Waiting(fresh, taken=ttnn.record_event(self.device, 0))
        waiting, target = buffer.waiting[slot], buffer.view(slot.start, slot.stop)
        host = ttnn.from_torch(
            self.whole(entry, values)[None, None], dtype=waiting.tensor.dtype, layout=ttnn.TILE_LAYOUT
        )
        ttnn.wait_for_event(1, waiting.taken)
        ttnn.copy_host_to_device_tensor(host, waiting.tensor, cq_id=1)
        arrived = ttnn.record_event(self.device, 1)

        @device_at_work()
        def write() -> None:
            ttnn.wait_for_event(0, arrived)
            self._scaled(waiting.tensor, 1.0, [], target)
            waiting.taken = ttnn.record_event(self.device, 0)

        return write

    @device_at_work()
    def get(self, tensor: CardTensor, start: int, stop: int) -> Tensor:
        chips = self.ttnn.get_device_tensors(tensor.view(start, stop))
        return torch.cat([self.ttnn.to_torch(own)[0].float() for own in chips], 1)

    # --- running --------------------------------------------------------------------------------------------

    def bind(
        self, code: Iterable[Instruction], buffers: Mapping[str, Any], scalars: Mapping[str, float]
    ) -> Section:
        code = list(code)
        calls: list[Call] = [self._bind_one(i, buffers) for i in code]
        if self.waits:
            calls = [one_after_the_other([call, self.synchronise]) for call in calls]
        names = sorted({i.scalar for i in code if i.scalar is not None})
        numbers = [(self.buffer(name), buffers[name]) for name in names]
        return Section(calls, numbers, scalars)

    def sequence(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        return Sequence(self, calls)  # type: ignore[arg-type]

    def _bind_one(self, i: Instruction, buffers: Mapping[str, Any]) -> Call:
        ttnn = self.ttnn
        out, *inputs = (buffers[slot.buffer].view(slot.start, slot.stop) for slot in (*i.out, *i.inputs))
        if i.op in MOVES:
            return partial(self._move, i, inputs[0], self._zeros(i), out)
        if i.op == "all_reduce":
            return partial(self._sum_over_chips, i, inputs[0], out)
        number = [] if i.scalar is None else [buffers[i.scalar].tensor]
        chains = {name: self._chain(chain) for name, chain in i.options}
        if i.op == "matmul":
            return partial(
                ttnn.matmul,
                *inputs,
                program_config=self._product_config(*inputs),
                compute_kernel_config=self.compute,
                memory_config=out.memory_config(),
                dtype=out.dtype,
                optional_output_tensor=out,
            )
        if num_programs(i) > 1:
            gathered = self._gathering(i.inputs[0])
            source = inputs[0] if gathered is None else gathered
            aside = {"memory_config": ttnn.L1_MEMORY_CONFIG}
            if i.op == "transpose":
                call = partial(ttnn.transpose, source, -2, -1, **aside)
            else:
                aside["compute_kernel_config"] = self.compute
                call = partial(ttnn.sum, source, dim=-2, keepdim=True, **aside)
            return partial(self._run_aside, i, inputs[0], gathered, call, out)
        if i.op == "addcmul":
            return partial(ttnn.addcmul, *inputs, *number, value=1.0, output_tensor=out)
        if i.op == "fill":  # by 0, also where NaN or infinity was: above_zero makes that 0 or 1
            assert i.scale == 0.0, i
            return partial(self._scaled, out, 0.0, self._chain((("above_zero",),)), out)
        if i.op == "unary":
            return partial(self._scaled, inputs[0], 1.0, chains.get("chain", []), out)
        assert i.op == "binary" and i.function is not None, i
        return partial(
            getattr(ttnn, i.function),
            *inputs,
            *number,
            input_tensor_a_activations=chains.get("a_chain", []),
            input_tensor_b_activations=chains.get("b_chain", []),
            activations=chains.get("out_chain", []),
            output_tensor=out,
        )

    def _scaled(self, a: Any, factor: float, chain: list[Any], out: Any) -> None:
        """out = factor f(a), from any cores to any, rounded to nearest.

        TT-NN's operations of one operand do less: `copy` keeps the format, or cuts it; `typecast` keeps the
        layout; `unary_chain` refuses views that reach over more than one row of cores.
        """
        self.ttnn.multiply(a, factor, input_tensor_a_activations=chain, output_tensor=out)

    def _zeros(self, i: Instruction) -> tuple[Any, Any]:
        """What stands before and after the entries of a `put`."""
        if i.op != "put":
            return None, None
        options = dict(i.options)
        outer, size, inner = options["view"]
        before = options["start"] * inner
        after = (size - options["start"] - options["length"]) * inner
        form = getattr(self.ttnn, self.buffer(i.inputs[0].buffer).format)

        def zeros(columns: int) -> Any:
            shape = (1, 1, self.share(self.planned_rows) * outer, columns)
            if not columns:
                return None
            return self.ttnn.zeros(
                shape, form, self.ttnn.TILE_LAYOUT, self.device, self.ttnn.L1_MEMORY_CONFIG
            )

        return zeros(before), zeros(after)

    def _move(self, i: Instruction, a: Any, zeros: tuple[Any, Any], out: Any) -> None:
        """Of values without their padding, by operations that change no bit; what they make on the way is
        kept, because a trace will write there again. `moved_shapes` lists it.
        """
        ttnn, options, l1 = self.ttnn, dict(i.options), self.ttnn.L1_MEMORY_CONFIG
        source, target = self.buffer(i.inputs[0].buffer), self.buffer(i.out[0].buffer)
        rows, made = self.share(self.planned_rows), [a]

        def reshaped(*shape: int) -> None:
            if tuple(made[-1].shape) != shape:
                made.append(ttnn.reshape(made[-1], shape, memory_config=l1))

        def columns(start: int, stop: int) -> None:
            height, width = tuple(made[-1].shape)[-2:]
            if stop - start != width:
                made.append(ttnn.slice(made[-1], [0, 0, 0, start], [1, 1, height, stop], memory_config=l1))

        self.aside.pop(i, None)
        columns(0, source.columns)
        if i.op == "permute":
            reshaped(rows, *options["shape"])
            axes = (0, *(axis + 1 for axis in options["axes"]))
            made.append(ttnn.permute(made[-1], axes, memory_config=l1))
        elif i.op != "reshape":
            outer, size, inner = options["view"]
            start, length = options["start"], options["length"]
            if i.op == "take":
                reshaped(1, 1, rows * outer, size * inner)
                columns(start * inner, (start + length) * inner)
            else:
                reshaped(1, 1, rows * outer, length * inner)
                parts = [part for part in (zeros[0], made[-1], zeros[1]) if part is not None]
                if len(parts) > 1:
                    made.append(ttnn.concat(parts, dim=-1, memory_config=l1))
        reshaped(1, 1, rows * target.positions, target.columns)
        extra = -target.columns % TILE
        if extra:
            made.append(ttnn.pad(made[-1], [(0, 0)] * 3 + [(0, extra)], 0.0, memory_config=l1))
        self.aside[i] = made[1:]
        self._scaled(made[-1], 1.0, [], out)

    def _sum_over_chips(self, i: Instruction, a: Any, out: Any) -> None:
        """By an exchange that changes no bit, and additions. `ttnn.all_reduce` of 0.81.1 would cut fp32
        numbers to 10 bits of mantissa, and of tensors on single cores it gives wrong ones without a word.

        What is exchanged lies in DRAM, where there is room for the gradients of many chips.
        """
        ttnn, dram = self.ttnn, self.ttnn.DRAM_MEMORY_CONFIG
        self.aside.pop(i, None)
        spread = ttnn.multiply(a, 1.0, memory_config=dram)
        gathered = ttnn.all_gather(spread, dim=0, memory_config=dram)
        _, *shape = spread.shape
        total, *rest = (
            ttnn.slice(gathered, [chip, 0, 0, 0], [chip + 1, *shape], memory_config=dram)
            for chip in range(self.num_chips)
        )
        made = [spread, gathered, total, *rest]  # kept, because a trace will write there again
        for part in rest[:-1]:
            total = ttnn.add(total, part, memory_config=dram)
            made.append(total)
        self.aside[i] = made
        ttnn.add(total, rest[-1], output_tensor=out)

    def _gathering(self, slot: Slot) -> Any:
        """A spread tensor to gather entries in that TT-NN would misplace without a word, or None."""
        buffer = self.buffer(slot.buffer)
        if not is_reordered(buffer, slot, self.grid[0]):
            return None
        key = slot, self.planned_rows  # weights are bound twice, in `update` and in `refresh`
        if key not in self.gathered:
            spread = replace(buffer, count=slot.stop - slot.start, first=None)
            self.gathered[key] = self.allocate(spread, self.planned_rows).tensor
        return self.gathered[key]

    def _run_aside(self, i: Instruction, source: Any, gathered: Any, call: Call, out: Any) -> None:
        """For operations that allocate what they give. Where that lies on single cores, TT-NN 0.81.1 leaves
        transposes unfinished without a word if source and target share cores; so it is spread, then moved.
        """
        if gathered is not None:
            self._scaled(source, 1.0, [], gathered)
        self.aside.pop(i, None)
        self.aside[i] = call()  # kept, because a trace will write to its address again
        self._scaled(self.aside[i], 1.0, [], out)

    def _chain(self, chain: Chain) -> list[Any]:
        make, kind = self.ttnn.UnaryWithParam, self.ttnn.UnaryOpType
        names = {
            "add": kind.ADD_UNARY_SFPU,
            "multiply": kind.MUL_UNARY_SFPU,
            "subtract_from": kind.RSUB,
            "above_zero": kind.GTZ,
            "reciprocal": kind.RECIP,
            "clamp": kind.CLAMP_TSS,
        }
        fast = {"erf": 0.0, "exp": 0.0, "sqrt": 0.0}  # parameter: approximate
        links = []
        for name, *parameters in chain:
            operation = names.get(name) or getattr(kind, name.upper())
            parameters = parameters or ([fast[name]] if name in fast else [])
            links.append(make(operation, *parameters))
        return links

    def _product_config(self, a: Any, b: Any) -> Any:
        rows, depth, columns = (
            size // TILE for size in (a.padded_shape[2], a.padded_shape[3], b.padded_shape[3])
        )
        if a.memory_config().is_sharded():
            height, width = subblock(rows, columns)
            return self.ttnn.MatmulMultiCoreReuseProgramConfig(
                compute_with_storage_grid_size=self.grid,
                in0_block_w=depth,
                out_subblock_h=height,
                out_subblock_w=width,
                per_core_M=rows,
                per_core_N=columns,
            )
        sharing = spread_product(rows, depth, columns, self.grid[0] * self.grid[1])
        return self.ttnn.MatmulMultiCoreReuseMultiCast1DProgramConfig(
            compute_with_storage_grid_size=self.grid,
            in0_block_w=sharing.depth,
            out_subblock_h=1,
            out_subblock_w=1,
            per_core_M=sharing.rows,
            per_core_N=sharing.columns,
            fuse_batch=True,
            fused_activation=None,
            mcast_in0=sharing.by_columns,
        )


MOST_FLOAT32_TILES = 4
"""That the registers of the matrix unit hold at once, in the half that one side works on."""


def subblock(rows: int, columns: int) -> tuple[int, int]:
    """Tiles of a product's result that are computed at once: TT-NN takes whole rows or parts of one row."""
    most = MOST_FLOAT32_TILES
    pairs = [
        (height, width)
        for height in range(1, most + 1)
        for width in range(1, most // height + 1)
        if not (rows % height or columns % width) and (height == 1 or width == columns)
    ]
    return max(pairs, key=lambda pair: pair[0] * pair[1])


@dataclass
class Waiting:
    """Where values arrive on the second queue. taken: the event after which it may be written."""

    tensor: Any
    taken: Any


class CardTensor:
    """A buffer on the card, and views of it.

    tensor: all of it, on a chip's first cores; entry 0 of the buffer lies on core `first`.
    """

    def __init__(self, backend: Tenstorrent, buffer: CardBuffer, tensor: Any) -> None:
        self.backend = backend
        self.buffer = buffer
        self.tensor = tensor
        self.views: dict[tuple[int, int], Any] = {}
        self.waiting: dict[Slot, Waiting] = {}

    def view(self, start: int, stop: int) -> Any:
        """Entries start to stop, on their own cores; no copy."""
        if self.buffer.first is None:
            assert (start, stop) == (0, self.buffer.count), "interleaved tensors have no views"
            return self.tensor
        if (start, stop) not in self.views:
            first = self.buffer.first + start
            self.views[start, stop] = self.backend.ttnn.narrow(self.tensor, 1, first, stop - start)
        return self.views[start, stop]


class Section:
    """Bound instructions, and the numbers on the card that they read."""

    def __init__(
        self, calls: list[Call], numbers: list[tuple[CardBuffer, CardTensor]], scalars: Mapping[str, float]
    ) -> None:
        self.calls = calls
        self.numbers = numbers
        self.scalars = scalars
        self.written: dict[str, float] = {}

    @device_at_work()
    def __call__(self) -> None:
        self.write_numbers()
        for call in self.calls:
            call()

    def write_numbers(self) -> None:
        for buffer, tensor in self.numbers:
            value = scalar_value(self.scalars, buffer)
            if self.written.get(buffer.name) != value:
                self.written[buffer.name] = value
                tensor.backend.put(tensor, buffer, 0, torch.full((1, 1), value))


class Sequence:
    """Sections that are always run one after the other: as they are the first time, then as a trace.

    After the first time ttnn may compile nothing more for them.
    """

    def __init__(self, backend: Tenstorrent, sections: list[Section]) -> None:
        self.backend = backend
        self.sections = sections
        self.warm = False
        self.trace: Any = None

    @device_at_work()
    def __call__(self) -> None:
        device = self.backend.device
        for section in self.sections:
            section.write_numbers()
        device.set_program_cache_misses_allowed(not self.warm)
        try:
            if self.warm and self.backend.traces:
                self._replay()
            else:
                self._run()
        finally:
            device.set_program_cache_misses_allowed(True)
        self.warm = True

    def _run(self) -> None:
        for section in self.sections:
            for call in section.calls:
                call()

    def _replay(self) -> None:
        ttnn, device = self.backend.ttnn, self.backend.device
        if self.trace is None:
            self.trace = ttnn.begin_trace_capture(device, cq_id=0)
            self._run()
            ttnn.end_trace_capture(device, self.trace, cq_id=0)
            weakref.finalize(self, release_trace, self.backend.place, self.trace).atexit = False
        ttnn.execute_trace(device, self.trace, cq_id=0, blocking=False)


def _chip(arch: str, grid: tuple[int, int]) -> Chip:
    """The chip of the table that a device looks like; an unknown grid does not change the other figures."""
    chips = [chip for chip in CHIPS.values() if chip.arch == arch]
    alike = [c for c in chips if grid == c.grid or any(grid == variant.grid for variant in c.harvested)]
    return (alike or chips)[0]
