"""The fused kernel's instructions carried out in torch, on any machine, with a card's roundings.

It reads the words that the kernels of `kernels/training_step` read, and each core has tensors of its own,
tile by tile as they lie in L1, so that moves copy bytes from place to place. Tasks run in the order of the
program; that any other order gives the same is what `tests/replay.py` checks. Products are rounded as in
`emulated.py`; elementwise functions are fp32, as in the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from pctt.backends.emulated import FUNCTIONS, KEPT_BITS, cut
from pctt.backends.fused_cores import Task
from pctt.backends.fused_plan import FusedPlan, Part, Shares
from pctt.backends.fused_stream import IN0, IN1, LINK, PARAMETERS, TRANSPOSED, Ref, Word
from pctt.backends.lowering import TILE, CardBuffer
from pctt.backends.precision import BYTES, PrecisionPolicy
from pctt.placement.chips import chip as find_chip

FACE = TILE // 2
TILE_SIZE = TILE * TILE
KINDS = {number: kind for kind, number in LINK.items()}
COMBINE = {"ADD": torch.add, "SUBTRACT": torch.sub, "MULTIPLY": torch.mul}

Memory = list[dict[str, Tensor]]
"""Per core, each of its tensors: fp32 values, in the order in which they lie in L1."""


class FusedEmulation(FusedPlan):
    """CPU emulation of one card. device: a chip by name, default n150."""

    name = "emulated"

    def __init__(
        self,
        dtype: torch.dtype,
        device: str | int | None = None,
        policy: PrecisionPolicy | None = None,
        cores_per_layer: int | None = None,
    ) -> None:
        chip = find_chip("n150" if device is None else str(device))
        super().__init__(dtype, chip, chip.grid, policy)
        self.share_layers(cores_per_layer)
        self._working: Memory | None = None

    def forget(self) -> None:
        self._working = None

    def is_fresh(self) -> bool:
        return self._working is None

    # --- tensors --------------------------------------------------------------------------------------------

    def allocate(self, buffer: CardBuffer, batch_size: int) -> Shares:
        held = self.cores.held_by(buffer)
        height, width = self.cores.tiles(buffer, batch_size)
        values = torch.zeros(height * TILE, width * TILE)
        if buffer.content == "ones":
            values[: buffer.rows] = 1.0
        return Shares(buffer, {core: to_tiles(values) for core in held})

    def put(self, tensor: Shares, buffer: CardBuffer, index: int, values: Tensor) -> None:
        height, width = self.cores.tiles(buffer, self.planned_rows)
        for core, share in zip(*self.split(buffer, index, values), strict=True):
            whole = torch.zeros(height * TILE, width * TILE)
            whole[: len(share)] = share
            tensor.tensor[core].copy_(to_tiles(_rounded(whole, buffer.format)))

    def get(self, tensor: Shares, start: int, stop: int) -> Tensor:
        _, width = self.cores.tiles(tensor.buffer, self.planned_rows)
        held = self.holders(tensor.buffer, start, stop)
        shares = torch.stack([from_tiles(tensor.tensor[core], width) for core in held])
        return self.joined(shares, stop - start)

    def synchronise(self) -> None:
        pass

    # --- running --------------------------------------------------------------------------------------------

    def run(self, part: Part, segments: list[tuple[int, int]], numbers: list[float]) -> None:
        if self._working is None:
            self._working = [{} for _ in range(self.cores.total)]
            for buffer in self.tasks.working.values():
                height, width = self.cores.tiles(buffer, self.planned_rows)
                for core in self.cores.held_by(buffer):
                    self._working[core][buffer.name] = torch.zeros(height * width * TILE_SIZE)
        memory: Memory = [dict(working) for working in self._working]
        for name, share in part.buffers.items():
            for core, values in share.tensor.items():
                memory[core][name] = values
        for section, times in segments:
            for _ in range(times):
                for task in self.tasks.sections[section]:
                    self._carry_out(task, memory, numbers)

    def _carry_out(self, task: Task, memory: Memory, numbers: list[float]) -> None:
        own = memory[task.core]
        if task.code == "PRODUCT":
            self._multiply(task.words, own)
        elif task.code == "TRANSPOSE":
            self._transpose(task.words, own)
        elif task.code == "ELEMENTWISE":
            self._elementwise(task.words, own, numbers)
        for move in task.moves:
            source, target = self._from(move.source, own), self._from(move.target, memory[move.core])
            size = BYTES[self._format(move.source)]
            length, *steps = (n // size for n in (move.bytes, move.source_step, move.target_step))
            for row in range(move.rows):
                start, end = (row * step for step in steps)
                target[end : end + length] = source[start : start + length]

    def _multiply(self, words: list[Word], own: Mapping[str, Tensor]) -> None:
        out, a, b = (self._from(word, own) for word in words[:3] if isinstance(word, Ref))
        sizes, steps, flags = (word for word in words[3:] if isinstance(word, int))
        rows, inner, columns = sizes & 0xFF, sizes >> 8 & 0xFF, sizes >> 16
        kept = KEPT_BITS[self.fidelity]
        bits = [kept["bfloat16" if flags & flag else "float32"][i] for i, flag in enumerate((IN0, IN1))]
        left = from_tiles(a[: rows * inner * TILE_SIZE], inner)
        order = torch.arange(inner)[:, None] * (steps & 0xFFFF) + torch.arange(columns) * (steps >> 16)
        tiles = b.view(-1, TILE_SIZE)[order.flatten()]
        if flags & TRANSPOSED:
            tiles = tiles.view(-1, 2, 2, FACE, FACE).permute(0, 2, 1, 4, 3).reshape(-1, TILE_SIZE)
        right = from_tiles(tiles.flatten(), columns)
        result = cut(left, bits[0]) @ cut(right, bits[1])
        assert isinstance(words[0], Ref)
        out[: result.numel()] = _rounded(to_tiles(result), self._format(words[0]))

    def _transpose(self, words: list[Word], own: Mapping[str, Tensor]) -> None:
        out, source = (self._from(word, own) for word in words[:2] if isinstance(word, Ref))
        assert isinstance(words[2], int)
        rows, columns = words[2] & 0xFF, words[2] >> 8
        values = from_tiles(source[: rows * columns * TILE_SIZE], columns)
        out[: values.numel()] = to_tiles(values.T.contiguous())

    def _elementwise(self, words: list[Word], own: Mapping[str, Tensor], numbers: list[float]) -> None:
        assert isinstance(words[0], int)
        tiles, register = words[0], dict[int, Tensor]()
        at = 1
        while True:
            word = words[at]
            assert isinstance(word, int)
            kind, first, second, flags = KINDS[word & 0xFF], word >> 8 & 0xF, word >> 12 & 0xF, word >> 16
            parameters = words[at + 1 : at + 1 + PARAMETERS.get(kind, 0)]
            at += 1 + len(parameters)
            if kind == "STOP":
                return
            if kind == "LOAD":
                assert isinstance(parameters[0], Ref)
                period = flags >> 1 or tiles
                stored = self._from(parameters[0], own).view(-1, TILE_SIZE)
                register[first] = stored[torch.arange(tiles) % period]
            elif kind == "STORE":
                assert isinstance(parameters[0], Ref)
                values = _rounded(register[first], self._format(parameters[0]))
                self._from(parameters[0], own)[: values.numel()] = values.flatten()
            elif kind in COMBINE:
                register[flags] = COMBINE[kind](register[first], register[second])
            elif kind == "ADD_PRODUCT":
                third, result = flags & 0xF, flags >> 4
                register[result] = torch.addcmul(register[first], register[second], register[third])
            elif kind == "COPY":
                register[second] = register[first]
            elif kind != "KEEP":
                indices = [word for word in parameters if isinstance(word, int)]
                register[first] = _function(kind, register.get(first), indices, numbers, tiles)

    def _from(self, ref: Ref, own: Mapping[str, Tensor]) -> Tensor:
        return own[ref.tensor][ref.offset // BYTES[self._format(ref)] :]

    def _format(self, ref: Ref) -> str:
        return (self.tasks.buffers.get(ref.tensor) or self.tasks.working[ref.tensor]).format


def _function(
    kind: str, values: Tensor | None, parameters: list[int], numbers: list[float], tiles: int
) -> Tensor:
    if kind == "NUMBER":
        return torch.full((tiles, TILE_SIZE), numbers[parameters[0]])
    assert values is not None, kind
    if kind == "FILL":
        return torch.full_like(values, _float(parameters[0]))
    if kind == "SCALE":
        return values * numbers[parameters[0]]
    if kind == "SHIFT":
        return values + numbers[parameters[0]]
    if kind == "ROUND":
        return values.bfloat16().float()
    if kind == "SUM_ROWS":
        faces = values.view(-1, 2, 2, FACE, FACE)
        sums = torch.zeros_like(faces)
        sums[:, 0, :, 0] = faces.sum((1, 3))
        return sums.view(-1, TILE_SIZE)
    name = kind.removesuffix("_CONSTANT").lower()
    return FUNCTIONS[name](values, *map(_float, parameters))


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _rounded(values: Tensor, form: str) -> Tensor:
    return values.bfloat16().float() if form == "bfloat16" else values


def to_tiles(values: Tensor) -> Tensor:
    """The numbers of a matrix as they lie in L1: tiles row by row, of each the four faces."""
    rows, columns = (size // TILE for size in values.shape)
    faces = values.view(rows, 2, FACE, columns, 2, FACE)
    return faces.permute(0, 3, 1, 4, 2, 5).flatten()


def from_tiles(values: Tensor, columns: int) -> Tensor:
    """The matrix, `columns` tiles wide."""
    faces = values.view(-1, columns, 2, 2, FACE, FACE).permute(0, 2, 4, 1, 3, 5)
    return faces.reshape(-1, columns * TILE)
