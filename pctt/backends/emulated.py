"""The card's arithmetic and limits, in torch, on any machine.

It runs the very card operations that the Tenstorrent backend runs (`lowering.py`), on tensors padded to
tiles, with the roundings measured on the vendor's bit-exact simulator (docs/numerics.md):

    storing             bfloat16 is rounded to nearest, ties to even
    matmul              operands are cut, not rounded, to the bits that the math fidelity uses; sums are fp32
    add, subtract       fp32 where both operands are; otherwise `matrix_sum`, 10 bits of mantissa
    multiply, addcmul   fp32, whatever the formats of the operands
    chains              fp32, but what a chain makes of a bfloat16 operand is rounded to bfloat16; where
                        no tensor is fp32 the result of every function is, of some towards zero
    all_reduce          sums of two, as by `add`, from chip 0 on

What differs from a card: it rounds the terms of a product once more, in groups of eight, which adds errors of
3e-4 of a typical result, and the last bits of tanh, exp and their like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from pctt.backends import reference_maps
from pctt.backends.graph_lowering import MAPS, MOVES, PRODUCTS
from pctt.backends.lowering import TILE, CardBuffer, Chain, scalar_value
from pctt.backends.mesh import parse_device
from pctt.backends.operations import one_after_the_other
from pctt.backends.placed import Placed
from pctt.backends.precision import PrecisionPolicy
from pctt.placement.chips import chip as find_chip
from pctt.program import BATCH, Instruction, Slot

Call = Callable[[], object]

KEPT_BITS = {
    "HiFi4": {"float32": (10, 9), "bfloat16": (7, 7)},
    "HiFi3": {"float32": (10, 9), "bfloat16": (7, 7)},
    "HiFi2": {"float32": (6, 9), "bfloat16": (6, 7)},
    "LoFi": {"float32": (6, 4), "bfloat16": (6, 4)},
}
"""Bits of mantissa, without the leading one, that a matrix product keeps of in0 and in1."""

TF32_BITS, BFLOAT16_BITS = 10, 7

CUT = ("add", "multiply", "leaky_relu")
"""Functions whose results are cut to bfloat16, not rounded, where operand and output are bfloat16."""


class Emulated(Placed):
    """CPU emulation of one card, or of a mesh. device: a chip by name, default n150, or several: "n300:2";
    "mesh:2" are two of the default.

    A buffer is a list of tensors, one of each chip.
    """

    name = "emulated"

    def __init__(
        self, dtype: torch.dtype, device: str | int | None = None, policy: PrecisionPolicy | None = None
    ) -> None:
        name, num_chips = parse_device(device)
        chip = find_chip(name or "n150")
        super().__init__(dtype, chip, chip.grid, policy, num_chips)

    def allocate(self, buffer: CardBuffer, batch_size: int) -> list[Tensor]:
        """Of each chip [count, rows, columns] in fp32, whole tiles; what is stored is rounded to the buffer's
        format.
        """
        rows, columns = (size * TILE for size in buffer.tiles(self.share(batch_size)))
        tensor = torch.zeros(buffer.count, rows, columns)
        if buffer.content == "ones":
            tensor[:, : buffer.rows] = 1.0
        return [tensor.clone() for _ in range(self.num_chips)]

    def bind(
        self, code: Iterable[Instruction], buffers: Mapping[str, list[Tensor]], scalars: Mapping[str, float]
    ) -> Callable[[], None]:
        on_chips = [
            {name: tensors[chip] for name, tensors in buffers.items()} for chip in range(self.num_chips)
        ]
        calls: list[Call] = []
        for i in code:
            if i.op == "all_reduce":
                calls.append(partial(self._sum_over_chips, i, on_chips))
            elif i.op in MAPS or i.op in MOVES:
                calls += [partial(self._run_map, i, own, chip) for chip, own in enumerate(on_chips)]
            else:
                calls += [self._bind_one(i, own, scalars) for own in on_chips]
        return one_after_the_other(calls)

    def sequence(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        return one_after_the_other(calls)

    def _bind_one(self, i: Instruction, buffers: Mapping[str, Tensor], scalars: Mapping[str, float]) -> Call:
        def tensor(slot: Slot) -> Tensor:
            return buffers[slot.buffer][slot.start : slot.stop]

        out, inputs = tensor(i.out[0]), [tensor(slot) for slot in i.inputs]
        store = partial(_store, out, self.buffer(i.out[0].buffer).format)
        formats = [self.buffer(slot.buffer).format for slot in i.inputs]
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
        form = self.buffer(i.out[0].buffer).format
        if i.op == "unary":
            wide = "float32" in (*formats, form)  # what the destination registers hold
            chain: Chain = dict(i.options).get("chain", ())
            return lambda: store(_apply(inputs[0], chain, wide))
        if i.op == "addcmul":
            number = self._number(i, scalars)
            return lambda: store(torch.addcmul(inputs[0], inputs[1], number()))
        assert i.op == "binary", i
        return self._bind_binary(i, inputs, self._number(i, scalars), store)

    def _sum_over_chips(self, i: Instruction, on_chips: list[dict[str, Tensor]]) -> None:
        (out,), (source,) = i.out, i.inputs
        form = self.buffer(out.buffer).format
        exact = form == "float32"
        total, *rest = (own[source.buffer][source.start : source.stop] for own in on_chips)
        for part in rest:
            total = total + part if exact else rounded_away(matrix_sum(total, part), BFLOAT16_BITS)
        for own in on_chips:
            _store(own[out.buffer][out.start : out.stop], form, total)

    def _run_map(self, i: Instruction, buffers: Mapping[str, Tensor], chip: int) -> None:
        """In fp32, on tensors without their padding; products cut their operands as `matmul` does."""
        kept, samples = KEPT_BITS[self.fidelity], self.samples_on(chip)
        if not samples and any(self.buffer(slot.buffer).rows == BATCH for slot in i.inputs):
            for slot in i.out:
                buffers[slot.buffer].zero_()
            return

        def corner(slot: Slot) -> Tensor:
            buffer = self.buffer(slot.buffer)
            rows = samples * buffer.positions if buffer.rows == BATCH else buffer.rows
            return buffers[slot.buffer][0, :rows, : buffer.columns]

        operands = [corner(slot).contiguous() for slot in i.inputs]
        if i.op in PRODUCTS:
            bits = [kept[self.buffer(slot.buffer).format] for slot in i.inputs]
            operands = [
                cut(values, bits[place][min(place, 1)]) if place < 2 or i.op.startswith("attend") else values
                for place, values in enumerate(operands)
            ]
        outs = [torch.empty(corner(slot).shape) for slot in i.out]
        MAP_OPERATIONS[i.op](i, outs, operands, {})()
        for slot, values in zip(i.out, outs, strict=True):
            buffers[slot.buffer].zero_()
            _store(corner(slot), self.buffer(slot.buffer).format, values)

    def _number(self, i: Instruction, scalars: Mapping[str, float]) -> Callable[[], Tensor]:
        """The number that an instruction reads, as it is when called."""

        def number() -> Tensor:
            assert i.scalar is not None
            buffer = self.buffer(i.scalar)
            value = torch.tensor(scalar_value(scalars, buffer), dtype=torch.float32)
            return value.bfloat16().float() if buffer.format == "bfloat16" else value

        return number

    def _bind_binary(
        self,
        i: Instruction,
        inputs: list[Tensor],
        number: Callable[[], Tensor],
        store: Callable[[Tensor], None],
    ) -> Call:
        assert i.function is not None
        chains: dict[str, Chain] = dict(i.options)
        form = self.buffer(i.out[0].buffer).format
        formats = [self.buffer(slot.buffer).format for slot in i.inputs]
        formats += [self.buffer(i.scalar).format] if i.scalar is not None else []
        wide = "float32" in (*formats, form)
        exact = i.function == "multiply" or formats == ["float32"] * 2
        combine = getattr(torch, i.function) if exact else SUMS[i.function]
        rows = [self.buffer(slot.buffer).rows for slot in (*i.inputs, *i.out)]
        one_row = len(inputs) == 2 and rows[1] == 1 and rows[2] != 1

        def operand(values: Tensor, name: str, place: int) -> Tensor:
            """What its chain makes of an operand, which is then stored once more in the operand's format."""
            chain = chains.get(name, ())
            if not chain:
                return values
            if formats[place] == "float32":
                return _apply(values if exact else cut(values, TF32_BITS), chain, wide=True)
            return rounded_away(_apply(values, chain, wide), BFLOAT16_BITS)

        def run() -> None:
            a, b = inputs if len(inputs) == 2 else (inputs[0], number())
            b = b[:, :1] if one_row else b
            result = combine(operand(a, "a_chain", 0), operand(b, "b_chain", 1))
            if not wide:
                result = result.bfloat16().float() if exact else rounded_away(result, BFLOAT16_BITS)
            result = _apply(result, chains.get("out_chain", ()), wide)
            if form == formats[0] == "bfloat16" and not exact:
                result = rounded_away(result, BFLOAT16_BITS)
            store(result)

        return run

    def put(self, tensor: list[Tensor], buffer: CardBuffer, index: int, values: Tensor) -> None:
        parted = buffer.rows == BATCH
        shares = values.chunk(self.num_chips) if parted else [values] * self.num_chips
        for own, share in zip(tensor, shares, strict=True):
            _store(own[index], buffer.format, share)

    def get(self, tensor: list[Tensor], start: int, stop: int) -> Tensor:
        return torch.cat([own[start:stop] for own in tensor], 1)

    def synchronise(self) -> None:
        pass


def _store(out: Tensor, form: str, values: Tensor) -> None:
    out.copy_(values.bfloat16() if form == "bfloat16" else values)


def cut(values: Tensor, bits: int) -> Tensor:
    """fp32 values with all but `bits` bits of mantissa set to zero: rounded towards zero."""
    mask = -(1 << (23 - bits))
    return (values.view(torch.int32) & mask).view(torch.float32)


def rounded_away(values: Tensor, bits: int) -> Tensor:
    """fp32 values rounded to `bits` bits of mantissa, ties away from zero."""
    half = 1 << (22 - bits)
    return cut((values.view(torch.int32) + half).view(torch.float32), bits)


def matrix_sum(a: Tensor, b: Tensor, sign: float = 1.0) -> Tensor:
    """a + sign * b as the matrix unit adds: operands cut to TF32, the smaller one rounded, ties away from
    zero, to the last of the 10 bits of mantissa of the larger one.

    So a difference of nearly equal numbers is exact, and one of unequal numbers good to 2^-11 of the larger.
    """
    a, b = (cut(values, TF32_BITS).double() for values in (a, b))
    exponent = torch.maximum(a.abs(), b.abs()).frexp().exponent  # the larger one is below 2^exponent
    unit = torch.exp2((exponent - TF32_BITS - 1).double())
    a, b = (values.sign() * (values.abs() / unit + 0.5).floor() * unit for values in (a, b))
    return (a + sign * b).float()


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": matrix_sum,
    "subtract": partial(matrix_sum, sign=-1.0),
}

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


def _apply(values: Tensor, chain: Chain, wide: bool) -> Tensor:
    """wide: the results of the functions are fp32, not bfloat16."""
    for name, *parameters in chain:
        values = FUNCTIONS[name](values, *parameters)
        if not wide:
            values = cut(values, BFLOAT16_BITS) if name in CUT else values.bfloat16().float()
    return values


# --- maps ---------------------------------------------------------------------------------------------------


def _reshape(operands: list[Tensor], options: Mapping[str, object]) -> Tensor:
    return operands[0]


def _rows(values: Tensor, i: Instruction) -> Tensor:
    return values.view(-1, dict(i.options)["last"])


def _softmax(i: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Mapping[str, float]) -> Call:
    return lambda: _rows(outs[0], i).copy_(_rows(inputs[0], i).softmax(-1))


def _softmax_pull(
    i: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Mapping[str, float]
) -> Call:
    v, y = (_rows(values, i) for values in inputs)
    return lambda: _rows(outs[0], i).copy_(y * (v - (v * y).sum(-1, keepdim=True)))


def _cross_entropy(
    i: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Mapping[str, float]
) -> Call:
    """Per unit, summed over the batch; the sum over units is the host's."""
    target, logits = inputs
    logs = _rows(logits, i).log_softmax(-1).view_as(logits)
    return lambda: outs[0].copy_((torch.xlogy(target, target) - target * logs).sum(0, keepdim=True))


MAP_OPERATIONS: dict[str, Callable[..., Call]] = {
    **reference_maps.OPERATIONS,
    "reshape": reference_maps.whole(_reshape),
    "softmax": _softmax,
    "softmax_pull": _softmax_pull,
    "cross_entropy": _cross_entropy,
}
