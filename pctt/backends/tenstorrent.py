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

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pctt.backends.lowering import TILE, CardBuffer, Chain, scalar_value
from pctt.backends.operations import BackendUnavailable
from pctt.backends.placed import Placed
from pctt.backends.precision import PrecisionPolicy
from pctt.placement.budget import spread_product
from pctt.placement.chips import CHIPS, Chip
from pctt.program import Instruction, Slot

Call = Callable[[], object]

_open: dict[int, Any] = {}  # devices of this process, kept open: opening one takes seconds


class Tenstorrent(Placed):
    """One card through TT-NN. device: its number, default 0."""

    name = "tenstorrent"

    def __init__(
        self, dtype: torch.dtype, device: str | int | None = None, policy: PrecisionPolicy | None = None
    ) -> None:
        self.device = open_device(device)
        size = self.device.compute_with_storage_grid_size()
        arch = "blackhole" if "BLACKHOLE" in str(self.device.arch()) else "wormhole_b0"
        super().__init__(dtype, _chip(arch, (size.x, size.y)), (size.x, size.y), policy)
        self.ttnn = _ttnn()
        fidelity = getattr(self.ttnn.MathFidelity, self.fidelity)
        self.compute = self.ttnn.init_device_compute_kernel_config(
            self.device.arch(),
            math_fidelity=fidelity,
            math_approx_mode=False,
            fp32_dest_acc_en=True,
            packer_l1_acc=True,
        )
        self.kept: dict[Instruction, Any] = {}
        self.traces = os.environ.get("TT_METAL_SLOW_DISPATCH_MODE") is None and not is_mock()

    # --- tensors --------------------------------------------------------------------------------------------

    def allocate(self, buffer: CardBuffer, batch_size: int) -> CardTensor:
        if buffer.transient:
            return CardTensor(self, buffer, batch_size, None)
        rows, columns = (size * TILE for size in buffer.tiles(batch_size))
        values = torch.zeros(1, buffer.count, 1 if buffer.rows == 1 else rows, columns)
        if buffer.scalar is not None:
            values = values[..., :1]
        if buffer.content == "ones":
            values += 1.0
        tensor = self.ttnn.from_torch(
            values,
            dtype=getattr(self.ttnn, buffer.format),
            layout=self.ttnn.TILE_LAYOUT,
            device=self.device,
            memory_config=self.place(buffer, buffer.count, 0, batch_size),
        )
        return CardTensor(self, buffer, batch_size, tensor)

    def place(self, buffer: CardBuffer, count: int, start: int, batch_size: int) -> Any:
        """Entries start to start + count of a buffer, one per core, or the tiles over all cores."""
        ttnn = self.ttnn
        if buffer.first is None:
            return ttnn.L1_MEMORY_CONFIG
        first, last = buffer.first + start, buffer.first + start + count
        across, ranges = self.grid[0], []
        while first < last:  # one range per row of the grid
            row, column = divmod(first, across)
            stop = min(last, (row + 1) * across)
            corner, opposite = ttnn.CoreCoord(column, row), ttnn.CoreCoord(column + stop - first - 1, row)
            ranges.append(ttnn.CoreRange(corner, opposite))
            first = stop
        shape = [size * TILE for size in buffer.tiles(batch_size)]
        spec = ttnn.ShardSpec(ttnn.CoreRangeSet(ranges), shape, ttnn.ShardOrientation.ROW_MAJOR)
        return ttnn.MemoryConfig(ttnn.TensorMemoryLayout.HEIGHT_SHARDED, ttnn.BufferType.L1, spec)

    def put(self, tensor: CardTensor, buffer: CardBuffer, index: int, values: Tensor) -> None:
        values = values[:1] if buffer.rows == 1 else values
        host = self.ttnn.from_torch(
            values[None, None], dtype=getattr(self.ttnn, buffer.format), layout=self.ttnn.TILE_LAYOUT
        )
        self.ttnn.copy_host_to_device_tensor(host, tensor.view(index, index + 1))

    def get(self, tensor: CardTensor, start: int, stop: int) -> Tensor:
        return self.ttnn.to_torch(tensor.view(start, stop))[0].float()

    def synchronise(self) -> None:
        self.ttnn.synchronize_device(self.device)

    # --- running --------------------------------------------------------------------------------------------

    def bind(
        self, code: Iterable[Instruction], buffers: Mapping[str, Any], scalars: Mapping[str, float]
    ) -> Section:
        code = list(code)
        calls = [self._bind_one(i, buffers) for i in code]
        names = sorted({i.scalar for i in code if i.scalar is not None})
        numbers = [(self.buffer(name), buffers[name]) for name in names]
        return Section(calls, numbers, scalars)

    def sequence(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        return Sequence(self, calls)  # type: ignore[arg-type]

    def _bind_one(self, i: Instruction, buffers: Mapping[str, Any]) -> Call:
        ttnn, chains = self.ttnn, {name: self._chain(chain) for name, chain in i.options}

        def tensor(slot: Slot) -> Any:
            return buffers[slot.buffer].view(slot.start, slot.stop)

        if i.op == "transpose":
            holder, source = buffers[i.out[0].buffer], tensor(i.inputs[0])
            start, stop = i.out[0].start, i.out[0].stop
            place = self.place(holder.buffer, stop - start, start, holder.batch_size)
            self._check_transpose(source, place)
            return lambda: holder.replace(start, stop, ttnn.transpose(source, -2, -1, memory_config=place))
        out = tensor(i.out[0])
        if any(buffers[slot.buffer].buffer.transient for slot in i.inputs):  # made anew by each run
            return lambda: self._run(i, chains, out, [tensor(slot) for slot in i.inputs], buffers)
        inputs = [tensor(slot) for slot in i.inputs]
        return lambda: self._run(i, chains, out, inputs, buffers)

    def _run(self, i: Instruction, chains: dict[str, Any], out: Any, inputs: list[Any], buffers: Any) -> None:
        ttnn = self.ttnn
        number = [] if i.scalar is None else [buffers[i.scalar].tensor]
        if i.op == "fill":
            ttnn.fill(out, i.scale, output_tensor=out)
        elif i.op == "matmul":
            ttnn.matmul(
                *inputs,
                program_config=self._product_config(*inputs),
                compute_kernel_config=self.compute,
                memory_config=out.memory_config(),
                dtype=out.dtype,
                optional_output_tensor=out,
            )
        elif i.op == "row_sums":
            sums = ttnn.sum(
                inputs[0],
                dim=-2,
                keepdim=True,
                memory_config=out.memory_config(),
                compute_kernel_config=self.compute,
            )
            ttnn.copy(sums, out)
            self.kept[i] = sums  # a trace will write to its address again
        elif i.op == "addcmul":
            ttnn.addcmul(*inputs, *number, value=1.0, output_tensor=out)
        elif i.op == "unary":
            if "chain" in chains:
                ttnn.unary_chain(
                    inputs[0], chains["chain"], memory_config=out.memory_config(), output_tensor=out
                )
            elif inputs[0].dtype == out.dtype:
                ttnn.copy(inputs[0], out)
            else:  # ttnn.copy cuts fp32 to bfloat16, typecast rounds to nearest
                ttnn.typecast(inputs[0], out.dtype, memory_config=out.memory_config(), output_tensor=out)
        else:
            assert i.op == "binary" and i.function is not None, i
            getattr(ttnn, i.function)(
                *inputs,
                *number,
                input_tensor_a_activations=chains.get("a_chain", []),
                input_tensor_b_activations=chains.get("b_chain", []),
                activations=chains.get("out_chain", []),
                output_tensor=out,
            )

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
            links.append(make(operation, *parameters) if len(parameters) < 2 else make(operation, parameters))
        return links

    def _product_config(self, a: Any, b: Any) -> Any:
        rows, depth, columns = (
            size // TILE for size in (a.padded_shape[2], a.padded_shape[3], b.padded_shape[3])
        )
        if a.memory_config().is_sharded():
            pairs = [
                (h, w)
                for h in range(1, 5)
                for w in range(1, 5)
                if h * w <= 4 and not (rows % h or columns % w)
            ]
            height, width = max(pairs, key=lambda pair: pair[0] * pair[1])  # of 4 tiles of fp32 accumulator
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

    def _check_transpose(self, source: Any, place: Any) -> None:
        """TT-NN 0.81.1 leaves entries unwritten, without a word, where the two share their cores."""
        if source.memory_config().is_sharded() and place.is_sharded():
            assert source.memory_config().shard_spec.grid != place.shard_spec.grid, "transpose in place"


class CardTensor:
    """A buffer on the card. tensor: all of it; parts: by (start, stop), views or what an operation made."""

    def __init__(self, backend: Tenstorrent, buffer: CardBuffer, batch_size: int, tensor: Any) -> None:
        self.backend = backend
        self.buffer = buffer
        self.batch_size = batch_size
        self.tensor = tensor
        self.parts: dict[tuple[int, int], Any] = {}

    def view(self, start: int, stop: int) -> Any:
        """Entries start to stop, on their own cores; no copy."""
        if start == 0 and stop == self.buffer.count and self.tensor is not None:
            return self.tensor
        if (start, stop) not in self.parts:
            whole, first = self.tensor, 0
            if whole is None:  # a transient buffer is there in parts
                first, whole = next(
                    (begin, part)
                    for (begin, end), part in self.parts.items()
                    if begin <= start and stop <= end
                )
            self.parts[start, stop] = self.backend.ttnn.narrow(whole, 1, start - first, stop - start)
        return self.parts[start, stop]

    def replace(self, start: int, stop: int, made: Any) -> None:
        """A transient buffer's entries start to stop are now those of the tensor `made`."""
        inside = [key for key in self.parts if start <= key[0] and key[1] <= stop]
        for key in inside:
            del self.parts[key]
        self.parts[start, stop] = made


class Section:
    """Bound instructions, and the numbers on the card that they read."""

    def __init__(
        self, calls: list[Call], numbers: list[tuple[CardBuffer, CardTensor]], scalars: Mapping[str, float]
    ) -> None:
        self.calls = calls
        self.numbers = numbers
        self.scalars = scalars
        self.written: dict[str, float] = {}

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
    """Sections that are always run one after the other: as they are the first time, then as a trace."""

    def __init__(self, backend: Tenstorrent, sections: list[Section]) -> None:
        self.backend = backend
        self.sections = sections
        self.runs = 0
        self.trace: Any = None

    def __call__(self) -> None:
        self.runs += 1
        for section in self.sections:
            section.write_numbers()
        if self.runs == 1 or not self.backend.traces:
            for section in self.sections:
                section()
            return
        ttnn, device = self.backend.ttnn, self.backend.device
        if self.trace is None:
            self.trace = ttnn.begin_trace_capture(device, cq_id=0)
            for section in self.sections:
                for call in section.calls:
                    call()
            ttnn.end_trace_capture(device, self.trace, cq_id=0)
        ttnn.execute_trace(device, self.trace, cq_id=0, blocking=False)


# --- devices ------------------------------------------------------------------------------------------------


def is_mock() -> bool:
    return bool(os.environ.get("TT_METAL_MOCK_CLUSTER_DESC_PATH"))


def _ttnn() -> Any:
    if importlib.util.find_spec("ttnn") is None:
        fits = sys.version_info[:2] in ((3, 10), (3, 12))
        where = "" if fits else " in an environment of Python 3.10 or 3.12, the ones ttnn has wheels for"
        raise BackendUnavailable(
            f'the tenstorrent backend needs ttnn: pip install "pctt[tt]"{where}; without a card, '
            "backend='emulated' computes the same on the CPU."
        )
    os.environ.setdefault("TT_METAL_LOGGER_LEVEL", "FATAL")
    import ttnn  # pyright: ignore[reportMissingImports]

    return ttnn


def open_device(device: str | int | None = None) -> Any:
    """The device of that number, opened once per process. Raises BackendUnavailable where there is none."""
    number = _number(device)
    if number in _open:
        return _open[number]
    simulator = os.environ.get("TT_METAL_SIMULATOR")
    if simulator and not Path(simulator).exists():
        raise BackendUnavailable(
            f"TT_METAL_SIMULATOR={simulator} does not exist; correct the path, or unset it to use a card."
        )
    mock = os.environ.get("TT_METAL_MOCK_CLUSTER_DESC_PATH")
    if mock and not Path(mock).exists():
        raise BackendUnavailable(
            f"TT_METAL_MOCK_CLUSTER_DESC_PATH={mock} does not exist; correct the path, or unset it."
        )
    ttnn = _ttnn()
    if not simulator and not mock and not any(Path("/dev/tenstorrent").glob("*")):
        raise BackendUnavailable(
            "there is no Tenstorrent device (/dev/tenstorrent is empty); install the driver if there is a "
            "card, set TT_METAL_SIMULATOR to simulate one, or use backend='emulated'."
        )
    fast = os.environ.get("TT_METAL_SLOW_DISPATCH_MODE") is None
    options = {"trace_region_size": 32 << 20} if fast and not mock else {}
    try:
        _open[number] = ttnn.open_device(device_id=number, **options)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackendUnavailable(f"ttnn could not open device {number}: {reason}") from error
    return _open[number]


def _chip(arch: str, grid: tuple[int, int]) -> Chip:
    """The chip of the table that a device looks like; an unknown grid does not change the other figures."""
    chips = [chip for chip in CHIPS.values() if chip.arch == arch]
    alike = [c for c in chips if grid == c.grid or any(grid == variant.grid for variant in c.harvested)]
    return (alike or chips)[0]


def close_devices() -> None:
    """Closes every device that this process has opened."""
    while _open:
        _, device = _open.popitem()
        _ttnn().close_device(device)


def _number(device: str | int | None) -> int:
    try:
        return 0 if device is None else int(device)
    except ValueError:
        raise ValueError(
            f"device of the tenstorrent backend must be a number such as 0, got {device!r}."
        ) from None
