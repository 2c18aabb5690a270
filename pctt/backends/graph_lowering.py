"""From local operations to card operations, for networks that are graphs.

Here every tensor is interleaved, its tiles dealt out in turn over all cores, so nothing has a place and every
node is served by operations of its own. Formats go by role (`precision.py`), products read copies of the
weights, and sums are fp32, as in `lowering.py`, whose card operations these are. Besides there are:

    reshape     out = the numbers of a, sample by sample, as rows of other length
    take, put, permute
                moves of numbers within a sample, as in backends/operations.py
    others      of the maps that TT-NN's plain operations do not give, by the names in backends/operations.py:
                out = op(inputs), without factor or addend. `MAPS` lists them.

What is added up in several instructions is summed once, when it is read: `pending` holds the terms of what
has been written so far, and an operation that reads the sum, or overwrites a term, has it computed first.

All padding is zero, at all times. Rows without a sample and columns without a unit are multiplied by a mask
wherever something would come out of nothing: where a bias is added, a constant, or a function with f(0) other
than 0. So padding cannot count as an error, reach a gradient or move a weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pctt.activations import activation
from pctt.backends.lowering import (
    ACTIVATE,
    ADAMS,
    DERIVATIVE_OF_DRIVE,
    DERIVATIVE_OF_VALUE,
    HALF_ERF,
    CardBuffer,
    CardWriter,
    Chain,
    Life,
    role_of,
    slots_of,
)
from pctt.backends.precision import PrecisionPolicy
from pctt.backends.reference_maps import LINEAR
from pctt.groups import Layout
from pctt.program import BATCH, Instruction, Program, Slot

Term = tuple[Slot, float, "str | None"]
"""A term of a sum: slot, factor, and name of a scalar that multiplies it."""

MOVES = ("reshape", "take", "put", "permute")
"""Card operations that move numbers and change none."""

PRODUCTS = ("convolve", "convolve_transposed", "convolve_outer", "attend", "attend_pull")
"""Of the operations of maps, those of the matrix unit."""

MAPS = {
    "convolve": "a convolution",
    "convolve_transposed": "a convolution",
    "convolve_outer": "a convolution",
    "pool_max": "max_pool2d",
    "unpool_max": "max_pool2d",
    "pool_mean": "avg_pool2d",
    "unpool_mean": "avg_pool2d",
    "add_channels": "weights per channel",
    "scale_channels": "weights per channel",
    "divide_channels": "weights per channel",
    "channel_sum": "weights per channel",
    "channel_inner": "weights per channel",
    "normalise": "a normalisation",
    "normalise_pull": "a normalisation",
    "embed": "embedding",
    "embed_outer": "embedding",
    "attend": "attend",
    "attend_pull": "attend",
    "softmax": "softmax",
    "softmax_pull": "softmax",
    "cross_entropy": "a categorical energy",
}
"""Card operations that `emulated` has and TT-NN's plain operations do not give, and what they are part of."""


class GraphLowering(CardWriter):
    """Rewrites one program; `lower_graph` is the way in."""

    def __init__(self, program: Program, layout: Layout, policy: PrecisionPolicy) -> None:
        super().__init__()
        self.program = program
        self.layout = layout
        self.net = layout.net
        self.policy = policy
        self.pending: dict[Slot, list[Term]] = {}
        self.copies: dict[tuple[str, Slot], Slot] = {}  # of values that still stand, by what they are for
        self.position = "", 0  # section and number of the instruction that is being rewritten
        self.reading: set[Slot] = set()  # the slots of that
        self._check()

    def lower(self) -> Program:
        names = ("initialise", "measure_initial", "finish", "measure", "gradients", "update", "sweep")
        sections = {name: list(getattr(self.program, name)) for name in names}
        sections |= {f"step{i}": list(code) for i, code in enumerate(self.program.steps)}
        sections = {name: [_without_unused(i) for i in code] for name, code in sections.items()}
        size = -1
        while size != (size := sum(map(len, sections.values()))):  # what only dead instructions read is dead
            life = Life(sections, self.program.walk)
            sections = {name: life.without_dead(name) for name in sections}
        self.life = Life(sections, self.program.walk)
        self._look_at(list({i: None for code in sections.values() for i in code}))
        done = {name: self._section(name, code) for name, code in sections.items()}
        for name in self.program.buffers:  # also what only the host writes
            if "@layers" in name or role_of(Slot(name, 0, 1)) in ("initial", "movable"):
                self._own(Slot(name, 0, 1))
        steps = tuple(done[f"step{i}"] for i in range(len(self.program.steps)))
        refresh = self._emitted(lambda: [self._renew(weight) for weight in self.read])
        update = (*done["update"], *refresh) if done["update"] else ()
        return replace(
            self.program,
            buffers=dict(self.buffers),
            steps=steps,
            refresh=refresh,
            **{**{name: done[name] for name in names}, "update": update},
        )

    # --- preparation ----------------------------------------------------------------------------------------

    def _check(self) -> None:
        steps = [i for code in self.program.steps for i in code]
        for i in (*self.program.initialise, *steps, *self.program.gradients, *self.program.update):
            what = None if i.op in MAPS or i.op in MOVES else self._refusal(i)
            if i in steps and i.op in ADAMS and "@layers" in i.out[0].buffer:
                what = "weights_at='every_step' with Adam"
            if what:
                raise ValueError(
                    f"{what} is not run by the card backends; drop it, or use backend='reference'."
                )

    def _look_at(self, code: list[Instruction]) -> None:
        """Notes which copies of the weights products read, and which changes nothing but products reads."""
        self.read: dict[Slot, set[str]] = {}
        readers: dict[str, set[str]] = {}
        for i in code:
            if i.op in ("product", "product_transposed", "convolve", "convolve_transposed"):
                copies = self.read.setdefault(i.inputs[1], {"operand"})
                if i.op == "product_transposed":
                    copies.add("transposed")
            for place, slot in enumerate(i.inputs):
                is_source = place == 0 and i.op in ("product", "convolve", "convolve_transposed")
                readers.setdefault(slot.buffer, set()).add("product" if is_source else i.op)
        self.operands = {
            name for name, ops in readers.items() if ops == {"product"} and re.match(r"change\d*@", name)
        }

    # --- slots ----------------------------------------------------------------------------------------------

    def _own(self, slot: Slot) -> Slot:
        """A slot of the program, as a slot on the card."""
        if slot.buffer not in self.buffers:
            buffer = self.program.buffers[slot.buffer]
            columns = buffer.columns
            if "@sums" in slot.buffer:  # on the card one row of sums over the batch, per unit
                columns = self.net.widths[number_of(slot.buffer)]
            self._make(slot.buffer, buffer.rows, columns, self._default_format(slot.buffer))
        return slot

    def _make(self, name: str, rows: int, columns: int, form: str, **fields: Any) -> Slot:
        if name not in self.buffers:
            widths = (columns,)
            self.buffers[name] = CardBuffer(name, 1, rows, columns, form, None, widths, **fields)
        return Slot(name, 0, 1)

    def _default_format(self, name: str) -> str:
        role, _, home = name.partition("@")
        if home.startswith("sums"):
            return "float32"
        if home.startswith("layers"):
            return self.policy.masters
        if home.startswith("inner"):
            role = re.sub(r"[\d_]+$", "", role)
        if role == "change":
            return self.policy.operands if name in self.operands else self.policy.anchors
        in_errors = any(other.startswith("adjoint@") for other in self.program.buffers)
        return self.policy.states if role == "error" and in_errors else self.policy.format(role)

    def _like(self, role: str, slot: Slot, form: str) -> Slot:
        """A slot of the size of another one, for what `role` says of it."""
        buffer, (own, _, home) = self.buffers[slot.buffer], slot.buffer.partition("@")
        name = f"{role} {own}@{home}"
        return self._make(name, buffer.rows, buffer.columns, form, positions=buffer.positions)

    def _mask(self, like: Slot) -> Slot:
        """1 where a sample and a unit are, 0 in the padding."""
        buffer = self.buffers[like.buffer]
        name = f"mask@columns{buffer.columns}" + (f"x{buffer.positions}" if buffer.positions > 1 else "")
        form = self.policy.format("mask")
        return self._make(name, BATCH, buffer.columns, form, positions=buffer.positions, content="mask")

    def _columns(self, slot: Slot) -> int:
        return self.buffers[slot.buffer].columns

    # --- sections -------------------------------------------------------------------------------------------

    def _section(self, name: str, code: list[Instruction]) -> tuple[Instruction, ...]:
        def write() -> None:
            for position, instruction in enumerate(code):
                self.position, self.reading = (name, position), set(slots_of(instruction))
                for slot in slots_of(instruction):
                    self._own(slot)
                rewrite = self._learn if self._descends(instruction) else None
                (rewrite or getattr(self, f"_{instruction.op}", self._map))(instruction)
            for slot in list(self.pending):
                if self.life.dead(name, len(code), slot):
                    self.pending.pop(slot)

        return self._emitted(write)

    def _emitted(self, write: Callable[[], object]) -> tuple[Instruction, ...]:
        self.code, self.copies = [], {}
        write()
        for slot in list(self.pending):
            self._flush(slot)
        return tuple(self.code)

    def _write(self, operation: Instruction) -> None:
        """After the sums that it reads, or of which it overwrites a term."""
        operation = replace(operation, inputs=tuple(map(self._value, operation.inputs)))
        for out in operation.out:
            self._overwrite(out)
        super()._write(operation)
        self.copies = {
            key: copy
            for key, copy in self.copies.items()
            if key[1] not in operation.out and copy not in operation.out
        }

    def _value(self, slot: Slot) -> Slot:
        """Where the value of a slot stands: in itself once its sum is computed, or where it is a copy of."""
        terms = self.pending.get(slot, [])
        if len(terms) == 1 and terms[0][1:] == (1.0, None):
            (a, _, _) = terms[0]
            if a != slot and self._format(a) == self._format(slot):
                return a
        self._flush(slot)
        return slot

    def _overwrite(self, out: Slot) -> None:
        """Computes the sums that still need what stands in `out`, before it goes."""
        self.pending.pop(out, None)
        for slot in [slot for slot, terms in self.pending.items() if any(term[0] == out for term in terms)]:
            of_program = slot.buffer in self.program.buffers and slot not in self.reading
            if of_program and self.life.dead(*self.position, slot):
                self.pending.pop(slot, None)  # a copy, whose readers went to the original
            else:
                self._flush(slot)

    # --- sums -----------------------------------------------------------------------------------------------

    def _sum(self, out: Slot, *terms: Term) -> Slot:
        """out = the sum of the terms, when it is read."""
        first, *rest = terms
        if first == (out, 1.0, None) and out in self.pending and all(term != out for term, _, _ in rest):
            found = [(self._value(term), scale, name) for term, scale, name in rest]
            self.pending[out] += found
            return out
        found = [(self._value(term), scale, name) for term, scale, name in terms]
        self._overwrite(out)
        self.pending[out] = found
        return out

    def _flush(self, out: Slot) -> None:
        terms = self.pending.pop(out, [])
        if not terms:
            return
        formats = {self._format(slot) for slot in (out, *(term for term, _, _ in terms))}
        wide = "float32" if "float32" in formats else "bfloat16"
        whole = next((term for term in terms if term[0] == out and term[1:] == (1.0, None)), None)
        whole = whole or next((term for term in terms if term[1:] == (1.0, None)), None)
        total: Slot | None = None
        if whole is not None:
            terms.remove(whole)
            total = whole[0]
            if not terms:
                self._copied(out, total)
        while terms:
            (a, scale, name), *terms = terms
            partner = next((t for t in terms if t[2] == name and abs(t[1]) == abs(scale)), None)
            if partner is not None and (name is not None or abs(scale) != 1.0):
                terms.remove(partner)
                b, other = partner[0], partner[1]
                if scale < 0 < other:
                    a, b, scale, other = b, a, other, scale
                step = self._like("step" if wide == "float32" else "short step", out, wide)
                a = self._binary("subtract" if other * scale < 0 else "add", step, a, b)
            free = self._format(out) == wide and all(term != out for term, _, _ in terms)
            ends = not terms and (name is None or total is None)
            into = out if free or ends else self._like("sum" if wide == "float32" else "short sum", out, wide)
            if total is None:
                total = self._scaled(into, a, scale, name)
            else:
                if name is not None:
                    total, a = (self._as(wide, slot) for slot in (total, a))
                total = self._accumulate(into, total, a, scale, name)
            if not terms:
                self._copied(out, total)

    def _copied(self, out: Slot, a: Slot) -> None:
        if a != out:
            self._emit("unary", out, a)

    def _scaled(self, out: Slot, a: Slot, scale: float, name: str | None) -> Slot:
        """out = scale scalars[name] a"""
        if name is not None:
            return self._emit("binary", out, a, function="multiply", number=self._number(out, scale, name))
        return self._emit("unary", out, a, chain=() if scale == 1.0 else (("multiply", scale),))

    def _as(self, form: str, slot: Slot) -> Slot:
        """A value in another format."""
        return slot if self._format(slot) == form else self._copy_for(f"{form} of", slot, form)

    def _copy_for(self, purpose: str, slot: Slot, form: str) -> Slot:
        slot = self._value(slot)
        key = purpose, slot
        if key not in self.copies:
            self.copies[key] = self._emit("unary", self._like(purpose, slot, form), slot)
        return self.copies[key]

    def _binary(self, function: str, out: Slot, a: Slot, b: Slot, **chains: Any) -> Slot:
        """A mixed sum cuts its fp32 operand to TF32, so what is added to it is made fp32 first."""
        if function != "multiply" and {self._format(a), self._format(b)} == {"float32", "bfloat16"}:
            a, b = self._as("float32", a), self._as("float32", b)
        return self._emit("binary", out, a, b, function=function, **chains)

    # --- elementwise ----------------------------------------------------------------------------------------

    def _fill(self, i: Instruction) -> None:
        out = i.out[0]
        if i.scale == 0.0:
            self._emit("fill", out, scale=0.0)
        else:
            self._emit("unary", out, self._mask(out), chain=(("multiply", i.scale),))

    def _copy(self, i: Instruction) -> None:
        self._sum(i.out[0], (i.inputs[0], i.scale, i.scalar))

    def _add(self, i: Instruction) -> None:
        (out,), (a, b) = i.out, i.inputs
        if b == out and out in self.pending:  # a difference that goes into another one is kept in fp32
            terms = self.pending.pop(out)
            b = self._like("part of", out, "float32")
            self._sum(b, *terms)
        self._sum(i.out[0], (a, 1.0, None), (b, i.scale, i.scalar))

    def _shift(self, i: Instruction) -> None:
        out, a = i.out[0], i.inputs[0]
        self._binary("multiply", out, a, self._mask(out), a_chain=(("add", i.scale),))

    def _multiply(self, i: Instruction) -> None:
        self._binary("multiply", i.out[0], *i.inputs)

    def _activate(self, i: Instruction) -> None:
        assert i.function is not None
        out, a = i.out[0], i.inputs[0]
        if i.function == "softmax":
            self._emit_map(i, (out,), (a,), "softmax")
        elif i.function == "gelu":
            self._binary("multiply", out, a, a, b_chain=HALF_ERF)
        elif not activation(i.function).keeps_zero:
            self._binary("multiply", out, a, self._mask(out), a_chain=ACTIVATE[i.function])
        elif not self._joined(out, a, ACTIVATE[i.function]):
            self._emit("unary", out, a, chain=ACTIVATE[i.function])

    def _joined(self, out: Slot, a: Slot, chain: Chain) -> bool:
        """Whether the function could join the operation that has just written its argument."""
        self._flush(a)
        earlier = self.code[-1] if self.code else None
        if earlier is None or earlier.op != "binary" or earlier.out != (a,):
            return False
        if out != a and not self.life.dead(*self.position, a):
            return False
        if out in slots_of(earlier) or out in self.pending or self._is_term(a) or self._is_term(out):
            return False
        options = dict(earlier.options)
        options["out_chain"] = (*options.get("out_chain", ()), *chain)
        self.code[-1] = replace(earlier, out=(out,), options=tuple(options.items()))
        self.copies = {key: copy for key, copy in self.copies.items() if key[1] != out}
        return True

    def _is_term(self, slot: Slot) -> bool:
        return any(term[0] == slot for terms in self.pending.values() for term in terms)

    def _derivative(self, i: Instruction) -> None:
        assert i.function is not None
        out, (v, at) = i.out[0], i.inputs
        if i.function == "identity":
            self._sum(out, (v, 1.0, None))
        elif i.function == "softmax":
            self._emit_map(i, (out,), (v, at), "softmax_pull")
        elif i.function in DERIVATIVE_OF_VALUE:
            self._binary("multiply", out, at, v, a_chain=DERIVATIVE_OF_VALUE[i.function])
        else:
            first, second = DERIVATIVE_OF_DRIVE[i.function]
            slope = self._like("slope of", at, self.policy.anchors)
            self._binary("multiply", slope, at, at, b_chain=second)
            self._binary("add", slope, at, slope, a_chain=first)
            self._binary("multiply", out, slope, v)

    # --- products -------------------------------------------------------------------------------------------

    def _operand(self, slot: Slot) -> Slot:
        """What a product reads of a value."""
        return self._as(self.policy.operands, slot)

    def _rows(self, slot: Slot, positions: int) -> Slot:
        """The positions of all samples as rows."""
        slot = self._value(slot)
        key = "rows of", slot
        if positions > 1 and key not in self.copies:
            columns, form = self._columns(slot) // positions, self._format(slot)
            name = "rows of {}@{}".format(*slot.buffer.split("@"))
            rows = self._make(name, BATCH, columns, form, positions=positions)
            self.copies[key] = self._emit("reshape", rows, slot)
        return self.copies[key] if positions > 1 else slot

    def _weight(self, copy: str, weight: Slot) -> Slot:
        """The copy of a weight that products read."""
        buffer, home = self.buffers[weight.buffer], weight.buffer
        rows, columns = (buffer.rows, buffer.columns)[:: -1 if copy == "transposed" else 1]
        return self._make(f"{copy} {home}", rows, columns, self.policy.format(copy))

    def _product(self, i: Instruction) -> None:
        a, weight, *addend = i.inputs
        is_bias = bool(addend) and self.buffers[addend[0].buffer].rows == 1
        self._matmul(i, a, self._weight("operand", weight), weight, addend, is_bias)

    def _product_transposed(self, i: Instruction) -> None:
        v, weight, *addend = i.inputs
        self._matmul(i, v, self._weight("transposed", weight), weight, addend, False)

    def _matmul(
        self, i: Instruction, a: Slot, b: Slot, weight: Slot, addend: list[Slot], is_bias: bool
    ) -> None:
        """out = addend + s a b, or with a bias out = a b + bias"""
        out, positions = i.out[0], dict(i.options).get("positions", 1)
        source = self._rows(self._operand(a), positions)
        plain = i.scale == 1.0 and i.scalar is None
        if plain and not addend and positions == 1:
            self._emit("matmul", out, source, b)
            return
        product = self._product_slot(out, weight, i.op, positions)
        self._emit("matmul", product, source, b)
        if is_bias:
            assert plain
            into = out if positions == 1 else product
            self._binary("add", product, product, addend[0])
            self._binary("multiply", into, product, self._mask(into))
            addend = []
        if positions > 1:
            whole = out if plain and not addend else self._like("flat", out, self._format(product))
            product = self._emit("reshape", whole, product)
        if addend or not plain:
            terms = [(slot, 1.0, None) for slot in addend]
            self._sum(out, *terms, (product, i.scale, i.scalar))

    def _product_slot(self, out: Slot, weight: Slot, op: str, positions: int) -> Slot:
        """Where a product lies that is one term of a sum."""
        columns = self._columns(out) // positions
        role = "product" if op == "product" else "feedback"
        name = f"{role} by {weight.buffer.replace('@', ' ')} for {out.buffer}"
        form = self.policy.format(role)
        return self._make(name, BATCH, columns, form, positions=positions)

    def _outer(self, i: Instruction) -> None:
        a, v, *addend = i.inputs
        positions = dict(i.options).get("positions", 1)
        a, v = self._rows(a, positions), self._rows(self._operand(v), positions)
        self._matrix_gradient(i, self._turned(a), v, addend)

    def _turned(self, a: Slot) -> Slot:
        a = self._value(a)
        key = "transposed", a
        if key not in self.copies:
            buffer = self.buffers[a.buffer]
            name = "transposed {}@{}".format(*a.buffer.split("@"))
            turned = self._make(name, buffer.columns, BATCH, buffer.format, positions=buffer.positions)
            self.copies[key] = self._emit("transpose", turned, a)
        return self.copies[key]

    def _column_sum(self, i: Instruction) -> None:
        v, *addend = i.inputs
        positions = dict(i.options).get("positions", 1)
        v = self._rows(self._operand(v), positions)
        name = f"ones@columns{positions}"
        form = self.policy.format("ones")
        ones = self._make(name, 1, BATCH, form, positions=positions, content="ones")
        self._matrix_gradient(i, ones, v, addend)

    def _matrix_gradient(self, i: Instruction, a: Slot, b: Slot, addend: list[Slot]) -> None:
        """out = addend + s a b"""
        out = i.out[0]
        product = self._like("term of", out, self._format(out)) if addend else out
        self._emit("matmul", product, a, b)
        self._add_gradient(i, product, addend)

    def _add_gradient(self, i: Instruction, term: Slot, addend: list[Slot]) -> None:
        out = i.out[0]
        if addend:
            self._accumulate(out, addend[0], term, i.scale, i.scalar)
        else:
            self._scaled(out, term, i.scale, i.scalar)

    def _inner(self, i: Instruction) -> None:
        a, b = i.inputs
        square = self._like("square of", a, self.policy.format("square"))
        self._emit("row_sums", i.out[0], self._binary("multiply", square, a, b))

    # --- rows of weights: a number per unit -----------------------------------------------------------------

    def _is_row(self, i: Instruction, weight: Slot) -> bool:
        """Whether the channels of an instruction are units of a flat sample, and the weight is one row."""
        outer, _, inner = dict(i.options)["view"]
        return outer == inner == self.buffers[weight.buffer].rows == 1

    def _add_channels(self, i: Instruction) -> None:
        out, (a, row) = i.out[0], i.inputs
        if not self._is_row(i, row):
            self._emit_map(i, i.out, i.inputs)
            return
        chains = {} if i.scale == 1.0 else {"b_chain": (("multiply", i.scale),)}
        whole = self._binary("add", self._like("unmasked", out, self._format(out)), a, row, **chains)
        self._binary("multiply", out, whole, self._mask(out))

    def _scale_channels(self, i: Instruction) -> None:
        if not self._is_row(i, i.inputs[1]):
            self._map(i)
            return
        out, (a, row, *addend) = i.out[0], i.inputs
        if not addend and i.scale == 1.0 and i.scalar is None:
            self._binary("multiply", out, a, row)
            return
        scaled = self._like(f"scaled by {row.buffer.replace('@', ' ')} for", out, self._format(a))
        self._binary("multiply", scaled, a, row)
        self._sum(out, *((slot, 1.0, None) for slot in addend), (scaled, i.scale, i.scalar))

    def _channel_sum(self, i: Instruction) -> None:
        if self._is_row(i, i.out[0]):
            self._column_sum(replace(i, options=()))
        else:
            self._map(i)

    def _channel_inner(self, i: Instruction) -> None:
        if not self._is_row(i, i.out[0]):
            self._map(i)
            return
        a, v, *addend = i.inputs
        square = self._like("square of", a, self.policy.format("square"))
        term = self._like("term of", i.out[0], "float32")
        self._emit("row_sums", term, self._binary("multiply", square, a, v))
        self._add_gradient(i, term, addend)

    # --- the other maps -------------------------------------------------------------------------------------

    def _map(self, i: Instruction) -> None:
        """out = addend + s op(operands), by an operation of that name."""
        count = OPERANDS.get(i.op, len(i.inputs))
        operands, addend = list(i.inputs[:count]), list(i.inputs[count:])
        if i.op in ("convolve", "convolve_transposed"):
            operands = [self._operand(operands[0]), self._weight("operand", operands[1])]
        elif i.op in PRODUCTS:
            operands = [self._operand(slot) for slot in operands]
        is_bias = bool(addend) and self.buffers[addend[0].buffer].rows == 1 and i.op in BIASED
        if is_bias:
            operands, addend = [*operands, *addend], []
        if not addend and i.scale == 1.0 and i.scalar is None:
            self._emit_map(i, i.out, operands)
            return
        out = i.out[0]
        form = self._format(operands[0]) if i.op in MOVES else self.policy.anchors
        source = operands[1 if i.op in BIASED else 0].buffer.replace("@", " ")
        term = self._like(f"{i.op} of {source} for", out, form)
        self._emit_map(i, (term,), operands)
        if "@layers" in out.buffer:
            self._add_gradient(i, term, addend)
        else:
            self._sum(out, *((slot, 1.0, None) for slot in addend), (term, i.scale, i.scalar))

    def _emit_map(
        self, i: Instruction, outs: tuple[Slot, ...], operands: Sequence[Slot], op: str | None = None
    ) -> None:
        scale = i.scale if i.op == "add_channels" else 1.0
        self._write(Instruction(op or i.op, outs, tuple(operands), scale, options=i.options))

    def _cross_entropy(self, i: Instruction) -> None:
        options = i.options or (("last", self._columns(i.inputs[1])),)
        self._emit_map(replace(i, options=options), i.out, i.inputs)

    # --- weights --------------------------------------------------------------------------------------------

    def _learn(self, i: Instruction) -> None:
        weight, *state = i.out
        self._descend(i, weight, state, i.inputs[0])
        if self.position[0].startswith("step"):
            self._renew(weight)

    def _renew(self, weight: Slot) -> None:
        """The copies of a weight that products read, from the one that learning changes."""
        copies = self.read.get(weight, set())
        if copies:
            operand = self._emit("unary", self._weight("operand", weight), weight)
            if "transposed" in copies:
                self._emit("transpose", self._weight("transposed", weight), operand)


def moved_shapes(i: Instruction, a: CardBuffer, out: CardBuffer) -> list[tuple[int, int]]:
    """What TT-NN makes on the way of a move: (rows per sample, columns) of the values without padding, of a
    view in which the move is one of columns, of its parts and its result, and of the values to be padded.
    """
    options = dict(i.options)
    first, last = (a.positions, a.columns), (out.positions, out.columns)
    if i.op == "reshape":
        return [first, last]
    if i.op == "permute":
        shapes = [options["shape"], tuple(options["shape"][axis] for axis in options["axes"])]
        return [first, *((math.prod(shape[:-1]), shape[-1]) for shape in shapes), last]
    outer, size, inner = options["view"]
    start, length = options["start"], options["length"]
    if i.op == "take":
        return [first, (outer, size * inner), (outer, length * inner), last]
    parts = [(outer, count * inner) for count in (start, length, size - start - length)]
    return [first, *(part for part in parts if part[1]), (outer, size * inner), last]


OPERANDS = {name: count for name, (count, _) in LINEAR.items()}
"""How many inputs of an operation are not what its result is added to."""

BIASED = ("convolve", "convolve_transposed")


def number_of(name: str) -> int:
    """The node, or the layer by its node, that a buffer of a graph belongs to."""
    found = re.search(r"\d+$", name)
    assert found is not None, name
    return int(found.group())


def _without_unused(instruction: Instruction) -> Instruction:
    """Of drive and value a derivative keeps the one it is computed from."""
    if instruction.op != "derivative":
        return instruction
    assert instruction.function is not None
    v, drive, value = instruction.inputs
    kept = drive if activation(instruction.function).needs_drive else value
    return replace(instruction, inputs=(v, kept))


def lower_graph(program: Program, layout: Layout, policy: PrecisionPolicy) -> Program:
    """The card operations of a graph's program. Raises ValueError naming what no card backend runs."""
    return GraphLowering(program, layout, policy).lower()
