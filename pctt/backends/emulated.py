"""The card's arithmetic and limits, in torch, on any machine.

It runs the very card operations that the Tenstorrent backend runs (`lowering.py`), on tensors padded to
tiles, with the roundings measured on the vendor's bit-exact simulator (docs/numerics.md):

    storing           bfloat16 is rounded to nearest, ties to even
    matmul            operands are cut, not rounded, to the bits that the math fidelity uses; sums are fp32
    mixed binary      the fp32 operand is cut to TF32, 10 bits of mantissa
    other elementwise fp32

What differs from a card is the order of sums and the last bits of tanh, exp and their like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from pctt.backends.lowering import TILE, CardBuffer, Chain, scalar_value
from pctt.backends.operations import one_after_the_other
from pctt.backends.placed import Placed
from pctt.backends.precision import PrecisionPolicy
from pctt.placement.chips import chip as find_chip
from pctt.program import Instruction, Slot

Call = Callable[[], object]

KEPT_BITS = {
    "HiFi4": {"float32": (10, 9), "bfloat16": (7, 7)},
    "HiFi3": {"float32": (10, 9), "bfloat16": (7, 7)},
    "HiFi2": {"float32": (6, 9), "bfloat16": (6, 7)},
    "LoFi": {"float32": (6, 4), "bfloat16": (6, 4)},
}
"""Bits of mantissa, without the leading one, that a matrix product keeps of in0 and in1."""

TF32_BITS = 10


class Emulated(Placed):
    """CPU emulation of one card. device: a chip by name, default n150."""

    name = "emulated"

    def __init__(
        self, dtype: torch.dtype, device: str | int | None = None, policy: PrecisionPolicy | None = None
    ) -> None:
        chip = find_chip("n150" if device is None else str(device))
        super().__init__(dtype, chip, chip.grid, policy)

    def allocate(self, buffer: CardBuffer, batch_size: int) -> Tensor:
        """[count, rows, columns] in fp32, whole tiles; what is stored is rounded to the buffer's format."""
        rows, columns = (size * TILE for size in buffer.tiles(batch_size))
        tensor = torch.zeros(buffer.count, rows, columns)
        if buffer.content == "ones":
            tensor[:, : buffer.rows] = 1.0
        return tensor

    def bind(
        self, code: Iterable[Instruction], buffers: Mapping[str, Tensor], scalars: Mapping[str, float]
    ) -> Callable[[], None]:
        return one_after_the_other([self._bind_one(instruction, buffers, scalars) for instruction in code])

    def sequence(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        return one_after_the_other(calls)

    def _bind_one(self, i: Instruction, buffers: Mapping[str, Tensor], scalars: Mapping[str, float]) -> Call:
        def tensor(slot: Slot) -> Tensor:
            return buffers[slot.buffer][slot.start : slot.stop]

        out, inputs = tensor(i.out[0]), [tensor(slot) for slot in i.inputs]
        store = partial(_store, out, self.buffer(i.out[0].buffer).format)
        formats = [self.buffer(slot.buffer).format for slot in i.inputs]
        chains: dict[str, Chain] = dict(i.options)

        def number() -> Tensor:
            assert i.scalar is not None
            return torch.tensor(scalar_value(scalars, self.buffer(i.scalar)), dtype=torch.float32)

        if i.op == "fill":
            return partial(out.fill_, i.scale)
        if i.op == "matmul":
            kept = KEPT_BITS[self.fidelity]
            bits = [kept[name][place] for place, name in enumerate(formats)]
            a, b = inputs
            return lambda: store(torch.matmul(cut(a, bits[0]), cut(b, bits[1])))
        if i.op == "transpose":
            return lambda: store(inputs[0].mT)
        if i.op == "row_sums":
            return lambda: out[:, :1].copy_(inputs[0].sum(1, keepdim=True))
        if i.op == "unary":
            return lambda: store(_apply(inputs[0], chains.get("chain", ())))
        if i.op == "addcmul":
            return lambda: store(torch.addcmul(inputs[0], inputs[1], number()))
        assert i.op == "binary" and i.function is not None, i
        combine = getattr(torch, i.function)
        mixed = len(set(formats)) > 1
        bits = [TF32_BITS if mixed and name == "float32" else None for name in formats]

        rows = [self.buffer(slot.buffer).rows for slot in (*i.inputs, *i.out)]
        one_row = len(inputs) == 2 and rows[1] == 1 and rows[2] != 1

        def run() -> None:
            a, *rest = (cut(x, kept) if kept else x for x, kept in zip(inputs, bits, strict=True))
            b = rest[0] if rest else number()
            if one_row:
                b = b[:, :1]
            result = combine(_apply(a, chains.get("a_chain", ())), _apply(b, chains.get("b_chain", ())))
            store(_apply(result, chains.get("out_chain", ())))

        return run

    def put(self, tensor: Tensor, buffer: CardBuffer, index: int, values: Tensor) -> None:
        _store(tensor[index], buffer.format, values)

    def get(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start:stop].clone()

    def synchronise(self) -> None:
        pass


def _store(out: Tensor, form: str, values: Tensor) -> None:
    out.copy_(values.bfloat16() if form == "bfloat16" else values)


def cut(values: Tensor, bits: int) -> Tensor:
    """fp32 values with all but `bits` bits of mantissa set to zero: rounded towards zero."""
    mask = -(1 << (23 - bits))
    return (values.view(torch.int32) & mask).view(torch.float32)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": lambda a, slope: torch.where(a > 0, a, a * slope),
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "clamp": torch.clamp,
    "erf": torch.erf,
    "exp": torch.exp,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "above_zero": lambda a: (a > 0).to(a.dtype),
    "add": torch.add,
    "multiply": torch.mul,
    "subtract_from": lambda a, constant: constant - a,
}


def _apply(values: Tensor, chain: Chain) -> Tensor:
    for name, *parameters in chain:
        values = FUNCTIONS[name](values, *parameters)
    return values
