"""From local operations to card operations: what the emulated and the Tenstorrent backend both run.

A program comes in as instructions on single slots (`program.py`) and leaves as *card operations*, one TT-NN
program each (two for a few, see `num_programs`). Every tensor gets a format and a place: node i and layer i
live on core i, a stack is one tensor with one shard per core. A matrix product runs where its weights live,
the core of the predicted node, so the sources of layer i must be there too. Their buffers, whose role ends in
^, lie one core further up; the elementwise operation that writes such a buffer carries the data from core to
core. The tiles of a layer that stands apart are spread over all cores, and so is what its products read and
write; a node beside it that lies on a core sends and receives through buffers of its own, whose home is
apart<node>.

    matmul      out = a b                    in0 and in1 on the core of out
    binary      out = h(f(a) op g(b))        f, g, h chains of unary functions; operands on any cores; b may
                                             be one row; with one input, b is the number `scalar`, on the card
    addcmul     out = a + s b                s likewise
    unary       out = f(a), f may be empty: a change of format or place
    transpose   out = a'
    row_sums    out = sum of a over its rows
    fill        out = scale
    all_reduce  out = the sum of a over the chips of a mesh (mesh.py)

Three rewritings keep the count of programs down and the numbers exact. What is added to a state in one step
is summed first, in fp32: a mixed addition would cut the fp32 state to TF32. A function applied to a result
joins the operation that made the result. What nothing reads is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pctt.activations import LEAKY_SLOPE, activation
from pctt.backends.precision import BYTES, PrecisionPolicy
from pctt.energies import Categorical
from pctt.groups import Layout, is_row, padded
from pctt.program import (
    BATCH,
    LEARNING_RATE,
    LEARNING_STEP,
    NUDGE,
    PER_NUDGE,
    Buffer,
    Instruction,
    Program,
    Slot,
    coalesce,
)

TILE = 32

Chain = tuple[tuple[Any, ...], ...]
Scalars = Mapping[str, float]


@dataclass(frozen=True)
class CardBuffer(Buffer):
    """A stacked tensor on cores.

    rows, columns: real sizes of an entry; storage is whole tiles.    format: float32 or bfloat16.
    first: core of entry 0; entry i lies on core first + i. None: tiles in turn over all cores.
    widths: real columns of each entry.    content: zeros, ones, or mask (1 where a sample and a unit are).
    scalar: for one number on the card, (scale, name, options) of its value.
    positions: rows of each sample, where a batch has several.
    """

    format: str = "float32"
    first: int | None = 0
    widths: tuple[int, ...] = ()
    content: str = "zeros"
    scalar: tuple[float, str, tuple[tuple[str, float], ...]] | None = None
    positions: int = 1

    @property
    def role(self) -> str:
        return self.name.partition("@")[0]

    def tiles(self, batch_size: int) -> tuple[int, int]:
        """Rows and columns of an entry as stored, in tiles."""
        rows = batch_size * self.positions if self.rows == BATCH else self.rows
        columns = batch_size * self.positions if self.columns == BATCH else self.columns
        return padded(rows, TILE) // TILE, padded(columns, TILE) // TILE

    def bytes_per_core(self, batch_size: int, num_cores: int) -> int:
        """Bytes that the tensor takes on each of its cores and, as allocation is lock-step, on every core."""
        rows, columns = self.tiles(batch_size)
        tiles = rows * columns if self.first is not None else -(-self.count * rows * columns // num_cores)
        return tiles * TILE * TILE * BYTES[self.format]


def scalar_value(scalars: Scalars, buffer: CardBuffer) -> float:
    """What a number on the card must be now."""
    assert buffer.scalar is not None
    scale, name, options = buffer.scalar
    if name in scalars:
        return scale * scalars[name]
    settings, step = dict(options), scalars[LEARNING_STEP]
    bias1, bias2 = 1.0 - settings["beta1"] ** step, (1.0 - settings["beta2"] ** step) ** 0.5
    if name == "adam_rate":  # rate m^ / (sqrt(v^) + epsilon) = adam_rate m / (sqrt(v) + adam_epsilon)
        return scale * scalars[LEARNING_RATE] * bias2 / bias1
    assert name == "adam_epsilon", name
    return scale * settings["epsilon"] * bias2


# --- functions of one tensor --------------------------------------------------------------------------------

HALF_ERF: Chain = (("multiply", 0.5**0.5), ("erf",), ("add", 1.0), ("multiply", 0.5))
"""The normal distribution function, by which gelu multiplies."""

ACTIVATE: dict[str, Chain] = {
    "identity": (),
    "tanh": (("tanh",),),
    "relu": (("relu",),),
    "leaky_relu": (("leaky_relu", LEAKY_SLOPE),),
    "sigmoid": (("sigmoid",),),
    "silu": (("silu",),),
    "hard_tanh": (("clamp", -1.0, 1.0),),
}

SIGMOID_SLOPE: Chain = (("add", -0.5), ("square",), ("subtract_from", 0.25))
"""y (1 - y) of y = sigmoid(z)."""

DERIVATIVE_OF_VALUE: dict[str, Chain] = {
    "identity": (("square",), ("multiply", 0.0), ("add", 1.0)),
    "tanh": (("square",), ("subtract_from", 1.0)),
    "relu": (("above_zero",),),
    "leaky_relu": (("above_zero",), ("multiply", 1.0 - LEAKY_SLOPE), ("add", LEAKY_SLOPE)),
    "sigmoid": SIGMOID_SLOPE,
    "hard_tanh": (("square",), ("subtract_from", 1.0), ("above_zero",)),
}
"""f' as a function of y = f(z)."""

DERIVATIVE_OF_DRIVE: dict[str, tuple[Chain, Chain]] = {
    "gelu": (
        HALF_ERF,
        (("square",), ("multiply", -0.5), ("exp",), ("multiply", 0.3989422804014327)),  # 1 / sqrt(2 pi)
    ),
    "silu": ((("sigmoid",),), (("sigmoid",), *SIGMOID_SLOPE)),
}
"""f' = p(z) + z q(z), as (p, q)."""

KNOWN = DERIVATIVE_OF_VALUE.keys() | DERIVATIVE_OF_DRIVE.keys()


def num_programs(instruction: Instruction) -> int:
    """TT-NN programs that a card operation is. Of two of them TT-NN allocates the result, which must then be
    carried to its place. A sum over chips is a copy, the exchange, a part for each chip, and their additions.
    """
    if instruction.op == "all_reduce":
        return 2 * dict(instruction.options)["chips"] + 1
    return 2 if instruction.op in ("transpose", "row_sums") else 1


def is_reordered(buffer: CardBuffer, slot: Slot, columns: int) -> bool:
    """Whether TT-NN 0.81.1 orders the cores of a view otherwise than its entries. columns: of the grid.

    It does where the view reaches over rows of the grid and does not begin one. Operations of two operands
    take no notice, others misplace the entries.
    """
    if buffer.first is None:
        return False
    first, last = buffer.first + slot.start, buffer.first + slot.stop - 1
    return first // columns != last // columns and first % columns != 0


ADAMS = ("adam", "adamw")


def not_run(i: Instruction) -> str | None:
    """What an instruction stands for that the card backends do not run."""
    if i.op in ADAMS and "@layers" not in i.out[0].buffer:
        return "dynamics='adam'"
    if i.op == "product" and i.inputs[1].buffer.startswith("precision"):
        return "a full precision"
    words = {
        "clip": "clip_norm",
        "noise": "dynamics='langevin'",
        "step_control": "dynamics='heun'",
        "variance": "a learned variance",
    }
    return "nudge" if i.scalar in (NUDGE, PER_NUDGE) else words.get(i.op)


class CardWriter:
    """Collects card operations in `code` and the tensors they use in `buffers`."""

    def __init__(self) -> None:
        self.buffers: dict[str, CardBuffer] = {}
        self.code: list[Instruction] = []

    def _emit(
        self,
        op: str,
        out: Slot,
        *inputs: Slot,
        function: str | None = None,
        scale: float = 1.0,
        number: str | None = None,
        **chains: Any,
    ) -> Slot:
        options = tuple((name, chain) for name, chain in chains.items() if chain)
        self._write(Instruction(op, (out,), inputs, scale, number, function, options))
        return out

    def _write(self, operation: Instruction) -> None:
        self.code.append(operation)

    def _binary(self, function: str, out: Slot, a: Slot, b: Slot, **chains: Any) -> Slot:
        """chains: `a_chain`, `b_chain` and `out_chain`, applied to the operands and to the result."""
        if self._format(out) == "float32" and self._format(a) != self._format(b):
            # A mixed operation cuts its fp32 operand to TF32: tolerable only where bfloat16 comes out.
            low = a if self._format(a) == "bfloat16" else b
            exact = self._emit("unary", self._beside(low, out), low)
            a, b = (exact if slot == low else slot for slot in (a, b))
        return self._emit("binary", out, a, b, function=function, **chains)

    def _beside(self, low: Slot, out: Slot) -> Slot:
        """A fp32 slot for a copy of `low`, where it lies."""
        raise NotImplementedError

    def _own(self, slot: Slot) -> Slot:
        """A slot of the program, as a slot on the card."""
        raise NotImplementedError

    def _accumulate(self, out: Slot, a: Slot, b: Slot, scale: float, name: str | None) -> Slot:
        """out = a + scale * scalars[name] * b"""
        if name is not None:
            return self._emit("addcmul", out, a, b, number=self._number(out, scale, name))
        if abs(scale) == 1.0:
            return self._binary("add" if scale > 0 else "subtract", out, a, b)
        return self._binary("add", out, a, b, b_chain=(("multiply", scale),))

    def _number(
        self, beside: Slot, scale: float, name: str, options: tuple[tuple[str, float], ...] = ()
    ) -> str:
        """The buffer of one number on the card, scale times the named scalar, in the format of `beside`."""
        form = self._format(beside)
        key = f"{scale:g} {name}" + "".join(f" {value:g}" for _, value in options) + f" {form}@scalars"
        value = scale, name, options
        if key in self.buffers and self.buffers[key].scalar != value:  # the name has six digits only
            key = f"{scale!r} {key}"
        self.buffers.setdefault(key, CardBuffer(key, 1, 1, 1, form, first=None, scalar=value))
        return key

    def _format(self, slot: Slot) -> str:
        return self.buffers[slot.buffer].format

    def _refusal(self, i: Instruction) -> str | None:
        """What an instruction stands for that the card backends do not run."""
        known = any(hasattr(self, f"{prefix}_{i.op}") for prefix in ("", "_by"))
        return not_run(i) or (None if known else f"the operation {i.op!r}")

    def _all_reduce(self, i: Instruction) -> None:
        out, a = (self._own(slot) for slot in (i.out[0], i.inputs[0]))
        self._emit("all_reduce", out, a, **dict(i.options))

    # --- learning rules: a method each, named after its operation -------------------------------------------

    def _descend(self, i: Instruction, weight: Slot, state: list[Slot], gradient: Slot) -> None:
        getattr(self, f"_by_{i.op}")(i, weight, state, gradient)

    def _descends(self, i: Instruction) -> bool:
        return hasattr(self, f"_by_{i.op}")

    def _by_sgd(self, i: Instruction, weight: Slot, state: list[Slot], change: Slot) -> None:
        options = dict(i.options)
        if options["weight_decay"]:
            self._accumulate(change, change, weight, options["weight_decay"], None)
        if state:
            change = self._accumulate(state[0], change, state[0], options["momentum"], None)
        self._accumulate(weight, weight, change, -1.0, i.scalar)

    def _by_adam(self, i: Instruction, weight: Slot, state: list[Slot], gradient: Slot) -> None:
        (first, second), options = state, dict(i.options)
        decay = options["weight_decay"]
        beta1, beta2 = options["beta1"], options["beta2"]
        settings = tuple((name, options[name]) for name in ("beta1", "beta2", "epsilon"))
        if decay and i.op == "adamw":
            self._accumulate(weight, weight, weight, -decay, i.scalar)
        elif decay:
            self._accumulate(gradient, gradient, weight, decay, None)
        squared: Chain = (("square",), ("multiply", 1.0 - beta2))
        scaled: Chain = (("multiply", 1.0 - beta1),)
        self._binary("add", first, first, gradient, a_chain=(("multiply", beta1),), b_chain=scaled)
        self._binary("add", second, second, gradient, a_chain=(("multiply", beta2),), b_chain=squared)
        epsilon = self._number(gradient, 1.0, "adam_epsilon", settings)
        root: Chain = (("sqrt",),)
        inverse: Chain = (("reciprocal",),)
        self._emit(
            "binary", gradient, second, function="add", number=epsilon, a_chain=root, out_chain=inverse
        )
        self._binary("multiply", gradient, gradient, first)
        self._emit(
            "addcmul", weight, weight, gradient, number=self._number(weight, -1.0, "adam_rate", settings)
        )

    _by_adamw = _by_adam


class Lowering(CardWriter):
    """Rewrites one program; `lower` is the way in."""

    def __init__(self, program: Program, layout: Layout, policy: PrecisionPolicy) -> None:
        super().__init__()
        self.program = program
        self.layout = layout
        self.net = layout.net
        self.policy = policy
        self.pending: dict[Slot, list[tuple[Slot, float, str | None]]] = {}
        self.position = "", 0  # section and number of the instruction that is being rewritten
        in_errors = any(name.startswith("adjoint@") for name in program.buffers)
        self.states = ("deviation", "initial", "error") if in_errors else ("deviation", "initial")
        self.moved: dict[Slot, Slot] = {}  # where a value lies that a slot of the program names
        self.nodes = {(f"nodes{stack}", at): i for i, (stack, at) in enumerate(layout.nodes)}
        self.nodes |= {(f"sums{stack}", at): i for i, (stack, at) in enumerate(layout.nodes)}
        self.nodes |= {(f"apart{i}", 0): i for i in range(len(layout.nodes))}
        self.layers = {(f"layers{group}", at): i for i, (group, at) in enumerate(layout.layers, start=1)}
        self._check()

    def lower(self) -> Program:
        names = ("initialise", "measure_initial", "finish", "measure", "gradients", "update", "sweep")
        sections = {name: list(singles(getattr(self.program, name))) for name in names}
        sections |= {f"step{i}": list(singles(code)) for i, code in enumerate(self.program.steps)}
        sections = {name: [self._without_unused(i) for i in code] for name, code in sections.items()}
        life = Life(sections, self.program.walk)
        sections = {name: life.without_dead(name) for name in sections}
        sections = {name: self._through_product(code) for name, code in sections.items()}
        self.life = Life(sections, self.program.walk)
        self.predicted = {  # layers whose predictions inference recomputes
            self._index(i.out[0])
            for code in sections.values()
            for i in code
            if i.op == "product" and len(i.inputs) == 3 and role_of(i.inputs[2]) != "bias"
        }
        done = {name: self._section(name, code) for name, code in sections.items()}
        steps = tuple(done[f"step{i}"] for i in range(len(self.program.steps)))
        refresh = self._emitted(self._refresh)
        update = done["update"]
        if update:
            update = (*update, *refresh)
        return replace(
            self.program,
            buffers=dict(self.buffers),
            steps=steps,
            refresh=refresh,
            **{**{name: done[name] for name in names}, "update": update},
        )

    # --- preparation ----------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.net.backward is not None:
            raise ValueError(
                "backward layers are not run by the card backends; drop them, or use backend='reference'."
            )
        for layer, name in zip(
            self.net.dense_layers("the placement core by core"), self.net.names, strict=True
        ):
            if isinstance(layer.energy, Categorical) or layer.activation == "softmax":
                raise ValueError(
                    f"layer {name!r} has a softmax or a categorical energy, which the card backends do not "
                    "run; use a Gaussian energy with activation 'identity' there, or backend='reference'."
                )
            if layer.activation not in KNOWN:
                raise ValueError(
                    f"layer {name!r} has activation {layer.activation!r}, which the card backends do not "
                    f"run; use one of {', '.join(sorted(KNOWN))}, or backend='reference'."
                )
            if layer.scale != 1.0 or layer.skip:
                raise ValueError(
                    f"layer {name!r} has a scale or a skip, which the card backends do not run; drop "
                    "it, or use backend='reference'."
                )
        steps = [i for code in self.program.steps for i in code]
        for i in (*self.program.initialise, *steps, *self.program.gradients, *self.program.update):
            if what := self._refusal(i):
                raise ValueError(
                    f"{what} is not run by the card backends; drop it, or use backend='reference'."
                )

    @staticmethod
    def _without_unused(instruction: Instruction) -> Instruction:
        """Of drive and value a derivative keeps the one it is computed from."""
        if instruction.op != "derivative":
            return instruction
        assert instruction.function is not None
        v, drive, value = instruction.inputs
        return replace(
            instruction, inputs=(v, drive if activation(instruction.function).needs_drive else value)
        )

    def _through_product(self, code: list[Instruction]) -> list[Instruction]:
        """error = mu - anchor, error = deviation - error: the first one goes to `product` instead, in fp32,
        so that the second is the same operation in every layer.
        """
        result = list(code)
        for index, first in enumerate(code):
            if first.op != "add" or role_of(first.out[0]) != "error" or first.out[0] in first.inputs:
                continue
            error = first.out[0]
            following = [
                i for i, other in enumerate(code[index + 1 :], index + 1) if error in slots_of(other)
            ]
            if following and code[following[0]].op == "add" and code[following[0]].inputs[1] == error:
                second = code[following[0]]
                change = Slot(error.buffer.replace("error@", "product@"), error.start, error.stop)
                result[index] = replace(first, out=(change,))
                result[following[0]] = replace(second, inputs=(second.inputs[0], change))
        return result

    # --- slots ----------------------------------------------------------------------------------------------

    def _index(self, slot: Slot) -> int:
        """The node or layer that a slot belongs to."""
        home = slot.buffer.partition("@")[2]
        if home.isdigit():  # precision@3
            return int(home)
        return self.layers[home, slot.start] if home.startswith("layers") else self.nodes[home, slot.start]

    def _node(self, role: str, index: int, **fields: Any) -> Slot:
        slot, buffer = self.layout.node(role, index)
        return self._made(slot, buffer, **fields)

    def _above(self, role: str, index: int, **fields: Any) -> Slot:
        """The slot of `role` of node `index`, where the layer lies that it is a source of."""
        if index + 1 in self.layout.apart:
            return self._apart(f"{role}^", index, **fields)
        slot, buffer = self.layout.node(f"{role}^", index)
        return self._made(slot, buffer, shift=1, **fields)

    def _below(self, role: str, index: int, **fields: Any) -> Slot:
        """The slot of `role` of node `index`, where the layer lies that predicts it."""
        if self._parted(index):
            return self._apart(role, index, **fields)
        return self._node(role, index, **fields)

    def _parted(self, index: int) -> bool:
        """Whether node `index` lies on a core, but not the layer that predicts it."""
        return index in self.layout.apart and not self.layout.is_apart(index)

    def _apart(self, role: str, index: int, **fields: Any) -> Slot:
        buffer = replace(self.layout.node(role, index)[1], name=f"{role}@apart{index}", count=1)
        return self._made(Slot(buffer.name, 0, 1), buffer, **fields)

    def _mask(self, index: int) -> Slot:
        """1 where a sample and a unit of node `index` are, 0 in the padding."""
        return self._node("mask", index, content="mask")

    def _layer(self, role: str, index: int, **fields: Any) -> Slot:
        slot, buffer = self.layout.layer(role, index)
        return self._made(slot, buffer, **fields)

    def _own(self, slot: Slot) -> Slot:
        """A slot of the program, as a slot on the card."""
        if role_of(slot) in ("change",):  # is only ever the source of a product
            return self._above("change", self._index(slot))
        buffer = self.program.buffers.get(slot.buffer) or self._node_buffer(slot)
        if "@sums" in slot.buffer:  # on the card one row of sums over the batch, per unit
            return self._made(slot, buffer, columns=self._node_buffer(slot).columns)
        return self._made(slot, buffer)

    def _node_buffer(self, slot: Slot) -> Buffer:
        return self.layout.node(role_of(slot), self._index(slot))[1]

    def _made(self, slot: Slot, buffer: Buffer, shift: int = 0, **fields: Any) -> Slot:
        if slot.buffer not in self.buffers:
            home = slot.buffer.partition("@")[2]
            table = self.layers if home.startswith("layers") else self.nodes
            if home.isdigit():
                members = [int(home)]
            else:
                members = [table[home, at] for at in range(buffer.count)]
            above = self.layout.apart | {len(self.net.layers) + 1}
            while shift > 0 and len(members) > 1 and members[-1] + 1 in above:
                members.pop()  # no layer of its own core lies above
            if home.startswith("layers"):
                spread = members[0] in self.layout.apart
            else:
                spread = home.startswith("apart") or self.layout.is_apart(members[0])
            fields.setdefault("format", self._default_format(role_of(slot), slot))
            entry = CardBuffer(
                buffer.name,
                len(members),
                fields.pop("rows", buffer.rows),
                fields.pop("columns", buffer.columns),
                first=None if spread else members[0] + shift,
                widths=tuple(self.net.widths[i] for i in members),
                **fields,
            )
            self.buffers[slot.buffer] = entry
        return slot

    def _default_format(self, role: str, slot: Slot) -> str:
        if "@sums" in slot.buffer:
            return "float32"
        return self.policy.states if role == "error" and role in self.states else self.policy.format(role)

    def _turned(self, role: str, index: int, **fields: Any) -> Slot:
        """A slot for the transposed weights of a layer."""
        rows, columns = self.layout.layer("weight", index)[1].shape(0)[1:]
        return self._layer(role, index, rows=columns, columns=rows, **fields)

    # --- sections -------------------------------------------------------------------------------------------

    def _section(self, name: str, code: list[Instruction]) -> tuple[Instruction, ...]:
        def write() -> None:
            for position, instruction in enumerate(code):
                self._settle(instruction)
                self.position = name, position
                rewrite = self._learn if self._descends(instruction) else getattr(self, f"_{instruction.op}")
                rewrite(instruction)
            for slot in list(self.pending):
                self._flush(slot)
            assert not self.moved, f"{name}: values left away from home: {self.moved}"

        return self._emitted(write)

    def _emitted(self, write: Callable[[], None]) -> tuple[Instruction, ...]:
        self.code = []
        write()
        return coalesce(self.code)

    def _beside(self, low: Slot, out: Slot) -> Slot:
        """A fp32 slot for a copy of `low`, on its core."""
        index, home = self._index(low), low.buffer.partition("@")[2]
        if home.startswith("layers"):
            return self._layer("scratch", index)
        if role_of(low).endswith("^"):
            return self._above("scratch", index)
        return (self._below if home.startswith("apart") else self._node)("scratch", index)

    # --- states: what is added to them in one step is summed first ------------------------------------------

    def _settle(self, instruction: Instruction) -> None:
        """Flushes what `instruction` must not find pending: sums it reads, and terms it overwrites."""
        for slot in list(self.pending):
            adds_to_it = instruction.out == (slot,) and slot in instruction.inputs and self._adds(instruction)
            reads = slot in slots_of(instruction) and not adds_to_it
            sources = {self._home(term) for term, _, _ in self.pending[slot]}
            overwrites = any(out in sources for out in instruction.out)
            if reads or overwrites:
                self._flush(slot)

    def _home(self, slot: Slot) -> Slot:
        """The slot of the program whose value a slot beside a layer carries."""
        return self.layout.node(role_of(slot).removesuffix("^"), self._index(slot))[0]

    def _adds(self, instruction: Instruction) -> bool:
        """Whether `instruction` is a step of a state: out = out + s (...)."""
        if role_of(instruction.out[0]) not in self.states:
            return False
        return (instruction.op == "add" and instruction.inputs[0] == instruction.out[0]) or (
            instruction.op == "product_transposed" and instruction.inputs[-1] == instruction.out[0]
        )

    def _flush(self, slot: Slot) -> None:
        terms = self.pending.pop(slot)
        state = self._own(slot)
        while terms:
            (a, scale, name), *terms = terms
            partner = next((t for t in terms if t[2] == name and abs(t[1]) == abs(scale)), None)
            step = self._node("step", self._index(slot))
            if partner is not None:
                terms.remove(partner)
                b, other = partner[0], partner[1]
                if scale < 0 < other:
                    a, b, scale, other = b, a, other, scale
                self._binary("subtract" if other * scale < 0 else "add", step, a, b)
                a = step
            elif self._format(a) != self._format(state):
                a = self._emit("unary", step, a)
            self._accumulate(state, state, a, scale, name)

    # --- operations, in the order of backends/operations.py -------------------------------------------------

    def _fill(self, i: Instruction) -> None:
        self._emit("fill", self._own(i.out[0]), scale=i.scale)

    def _copy(self, i: Instruction) -> None:
        out, a = self._own(i.out[0]), self._own(i.inputs[0])
        index = self._index(i.out[0])
        stack = self.layout.nodes[index][0]
        beside = any(self.layout.nodes[other][0] == stack for other in self.predicted)
        if role_of(out) == "error" and index not in self.predicted and beside:
            # Its prediction never changes, so its slot of `product` stays zero: its neighbours' operation.
            self._binary("subtract", out, a, self._node("product", index))
        else:
            self._emit("unary", out, a)

    def _add(self, i: Instruction) -> None:
        if self._adds(i):
            self._own(i.out[0])
            self.pending.setdefault(i.out[0], []).append((self._own(i.inputs[1]), i.scale, i.scalar))
            return
        out, (a, b) = self._own(i.out[0]), (self._value(slot) for slot in i.inputs)
        if i.scalar is not None and is_row(role_of(i.inputs[1])):
            # a row that is added to a state must not reach padding
            index = self._index(out)
            rows = self._binary("multiply", self._node("scratch", index), self._mask(index), b)
            self._accumulate(out, a, rows, i.scale, i.scalar)
            return
        self._accumulate(out, a, b, i.scale, i.scalar)
        if self._is_masked(i):  # padding must not count as an error
            self._binary("multiply", out, out, self._mask(self._index(i.out[0])))

    def _is_masked(self, i: Instruction) -> bool:
        """Whether padding comes out of `i` that is not 0: where a node is given an activity, 0 in the
        padding, and its prediction there is not.
        """
        index = self._index(i.out[0])
        if role_of(i.out[0]) == "change" and 0 < index < len(self.program.starts):
            start, end = self.program.starts[index], self.program.ends[index]
            return role_of(start) == "initial" and role_of(end) == "activity"
        return role_of(i.inputs[0]) == "initial" and role_of(i.inputs[1]) == "anchor"

    def _multiply(self, i: Instruction) -> None:
        self._binary("multiply", self._own(i.out[0]), *(self._value(slot) for slot in i.inputs))

    def _activate(self, i: Instruction) -> None:
        assert i.function is not None
        out, a = self._own(i.out[0]), self._own(i.inputs[0])
        index = self._index(i.out[0])
        if i.function == "gelu":
            self._binary("multiply", out, a, a, b_chain=HALF_ERF)
        elif not self._joined(i, out, a, ACTIVATE[i.function]):
            self._emit("unary", out, a, chain=ACTIVATE[i.function])
        if not activation(i.function).keeps_zero and self.net.widths[index] % TILE:
            self._binary("multiply", out, out, self._mask(index))

    def _joined(self, i: Instruction, out: Slot, a: Slot, chain: Chain) -> bool:
        """Whether the function could join the operation that has just written its argument."""
        for index in range(len(self.code) - 1, -1, -1):
            earlier = self.code[index]
            if a in slots_of(earlier) or out in slots_of(earlier):
                break
        else:
            return False
        if earlier.op != "binary" or earlier.out != (a,):
            return False
        if out != a and not self.life.dead(*self.position, i.inputs[0]):
            return False
        options = dict(earlier.options)
        merged = {**options, "out_chain": (*options.get("out_chain", ()), *chain)}
        self.code[index] = replace(earlier, out=(out,), options=tuple(merged.items()))
        return True

    def _derivative(self, i: Instruction) -> None:
        assert i.function is not None
        out, v, at = self._own(i.out[0]), self._value(i.inputs[0]), self._own(i.inputs[1])
        self.moved.pop(i.out[0], None)
        if i.function in DERIVATIVE_OF_VALUE:
            self._binary("multiply", out, at, v, a_chain=DERIVATIVE_OF_VALUE[i.function])
            return
        first, second = DERIVATIVE_OF_DRIVE[i.function]
        slope = self._node("scratch", self._index(i.out[0]))
        self._binary("multiply", slope, at, at, b_chain=second)
        self._binary("add", slope, at, slope, a_chain=first)
        self._emit("binary", out, slope, v, function="multiply")

    def _product(self, i: Instruction) -> None:
        a, weight, *addend = i.inputs
        layer, out = self._index(weight), self._own(i.out[0])
        if role_of(weight) == "weight":
            operands = self._sent(a), self._layer("operand", layer)
        else:  # a change of the weights, which must not reach padding
            source = self._above("sent", layer - 1)
            self._binary("multiply", source, self._own(a), self._mask(layer - 1))
            operands = source, self._emit("unary", self._layer("changed", layer), self._own(weight))
        direct = (not addend or role_of(addend[0]) == "bias") and not self._parted(layer)
        product = self._emit("matmul", out if direct else self._below("product", layer), *operands)
        if not addend:
            assert i.scale == 1.0 and i.scalar is None
            if product != out:
                self._emit("unary", out, product)
        elif role_of(addend[0]) == "bias":
            self._binary("add", out, product, self._own(addend[0]))
        else:
            self._accumulate(out, self._own(addend[0]), product, i.scale, i.scalar)

    def _product_transposed(self, i: Instruction) -> None:
        v, weight, *addend = i.inputs
        assert addend or (i.scale, i.scalar) == (1.0, None), i  # no chain asks for that
        layer = self._index(weight)
        feedback = self._above("feedback", layer - 1)
        self._emit("matmul", feedback, self._received(v), self._turned("transposed", layer))
        if not addend and role_of(i.out[0]) == "adjoint":  # is a sum, a state's step and a source: so at home
            self._emit("unary", self._own(i.out[0]), feedback)
            return
        if not addend:
            self.moved[i.out[0]] = feedback
            return
        self._own(i.out[0])
        terms = [(feedback, i.scale, i.scalar)]
        if self._adds(i):
            self.pending.setdefault(i.out[0], []).extend(terms)
        else:
            self.pending[i.out[0]] = terms
            self._flush(i.out[0])

    def _outer(self, i: Instruction) -> None:
        a, b = i.inputs
        assert i.scalar is not None
        source, out = self._own(a), self._own(i.out[0])
        _, buffer = self.layout.node("transposed_activity^", self._index(a))
        fields = {"rows": buffer.columns, "columns": BATCH, "format": self._format(source)}
        turned = self._emit("transpose", self._above("transposed_activity", self._index(a), **fields), source)
        self._emit("matmul", out, turned, self._received(b))
        self._emit("binary", out, out, number=self._number(out, i.scale, i.scalar), function="multiply")

    def _column_sum(self, i: Instruction) -> None:
        assert i.scalar is not None
        out, index = self._own(i.out[0]), self._index(i.inputs[0])
        ones = self._below("ones", index, rows=1, columns=BATCH, content="ones")
        self._emit("matmul", out, ones, self._received(i.inputs[0]))
        self._emit("binary", out, out, number=self._number(out, i.scale, i.scalar), function="multiply")

    def _inner(self, i: Instruction) -> None:
        a, b = (self._own(slot) for slot in i.inputs)
        index = self._index(i.out[0])
        square = self._binary("multiply", self._node("square", index), a, b)
        self._emit("row_sums", self._own(i.out[0]), square)

    def _learn(self, i: Instruction) -> None:
        weight, *state = (self._own(slot) for slot in i.out)
        self._descend(i, weight, state, self._own(i.inputs[0]))
        if self.position[0].startswith("step") and role_of(weight) == "weight":
            self._renew(self._index(weight))

    # --- values and places ----------------------------------------------------------------------------------

    def _value(self, slot: Slot) -> Slot:
        """Where the value lies that the program has written to `slot`."""
        return self.moved.get(slot) or self._own(slot)

    def _sent(self, slot: Slot) -> Slot:
        """A source of a product, on the product's core and in the format of its operands."""
        if role_of(slot) == "change":
            return self._own(slot)
        return self._emit("unary", self._above("sent", self._index(slot)), self._own(slot))

    def _received(self, slot: Slot) -> Slot:
        """The error of a node, where the layer lies that predicts it."""
        index, own = self._index(slot), self._own(slot)
        below = self._below(role_of(slot), index)
        return own if below == own else self._emit("unary", below, own)

    def _refresh(self) -> None:
        """The copies of the weights that products read, from the weights that learning changes."""
        for index in range(1, len(self.net.layers) + 1):
            self._renew(index)

    def _renew(self, index: int) -> None:
        group = self.layout.layers[index - 1][0]
        roles = [role for role in ("operand", "transposed") if f"{role}@layers{group}" in self.buffers]
        if roles:
            operand = self._emit("unary", self._layer("operand", index), self._layer("weight", index))
            if "transposed" in roles:
                self._emit("transpose", self._turned("transposed", index), operand)


def lower(program: Program, layout: Layout, policy: PrecisionPolicy) -> Program:
    """The card operations of `program`. Raises ValueError naming what a card backend does not run."""
    return Lowering(program, layout, policy).lower()


# --- instructions one by one --------------------------------------------------------------------------------


def role_of(slot: Slot) -> str:
    return slot.buffer.partition("@")[0]


def slots_of(instruction: Instruction) -> tuple[Slot, ...]:
    return (*instruction.out, *instruction.inputs)


def singles(code: Iterable[Instruction]) -> Iterable[Instruction]:
    """The instructions on single entries that `coalesce` joined."""
    for instruction in code:
        for offset in range(instruction.out[0].stop - instruction.out[0].start):
            yield _part(instruction, offset, offset + 1)


def _part(instruction: Instruction, start: int, stop: int) -> Instruction:
    """The share of an instruction that serves entries start to stop of its slots."""

    def part(slot: Slot) -> Slot:
        wide = slot.stop - slot.start > 1
        return Slot(slot.buffer, slot.start + start, slot.start + stop) if wide else slot

    return replace(
        instruction, out=tuple(map(part, instruction.out)), inputs=tuple(map(part, instruction.inputs))
    )


READ_BY_HOST = ("activity", "error", "initial", "anchor")
"""Roles that callers read after a relaxation."""


class Life:
    """Which values are read before they are overwritten, over all paths through the sections."""

    def __init__(self, sections: dict[str, list[Instruction]], walk: tuple[int, ...]) -> None:
        self.sections = sections
        steps = [f"step{kind}" for kind in dict.fromkeys(walk)]
        self.following: dict[str, list[str]] = {
            "initialise": ["measure_initial"],
            "measure_initial": [*steps[:1], "finish"],
            "finish": ["measure"],
            "measure": [*steps, "finish", "gradients"],
            "gradients": ["update"],
            "update": ["initialise"],
            "sweep": [],
        }
        for name in steps:
            self.following[name] = ["measure", "finish"]
        for now, then in dict.fromkeys(pairwise(f"step{kind}" for kind in walk)):
            self.following[now].append(then)

    def dead(self, section: str, position: int, slot: Slot) -> bool:
        """Whether the value of `slot` after that instruction is never read."""
        if "@layers" in slot.buffer or "@sums" in slot.buffer or slot.buffer.startswith("precision"):
            return False
        ahead, seen = [(section, position + 1)], set[str]()
        while ahead:
            name, start = ahead.pop()
            for instruction in self.sections[name][start:]:
                if slot in instruction.inputs:
                    return False
                if slot in instruction.out:
                    break
            else:
                if name in ("finish", "sweep") and role_of(slot) in READ_BY_HOST:
                    return False
                ahead += [(other, 0) for other in self.following[name] if other not in seen]
                seen.update(self.following[name])
        return True

    def without_dead(self, section: str) -> list[Instruction]:
        return [
            instruction
            for position, instruction in enumerate(self.sections[section])
            if not all(self.dead(section, position, slot) for slot in instruction.out)
        ]
