"""A training step as data: ordered lists of local operations on slots of stacked buffers.

An instruction reads and writes slots that belong to one layer and its two nodes, so whatever program is built
from them is local by construction. `assemble.py` writes programs, `backends/` run them, and anything else (a
planner, a cost model, a drawing) can read them.

Batch reduction: `PER_SAMPLE`, the factor 1/B, stands in the instructions of the weight gradients and, for the
energies it reports, in the engine. (With a nudged output `PER_NUDGE` stands there, 1/B over the nudge.) The
inference instructions have no batch factor at all, so each sample relaxes as if it were alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

BATCH = -1
"""Row count of a buffer that has one row per sample."""

INFERENCE_RATE = "inference_rate"
INFERENCE_STEP = "inference_step"
NOISE = "noise"
NUDGE = "nudge"
LEARNING_RATE = "learning_rate"
PER_SAMPLE = "per_sample"
PER_NUDGE = "per_nudge"
LEARNING_STEP = "learning_step"
"""Names of the scalars that a backend reads at run time, so that a schedule changes no instruction."""


@dataclass(frozen=True)
class Buffer:
    """A stacked tensor [count, rows, columns]; rows = BATCH stands for the batch size."""

    name: str
    count: int
    rows: int
    columns: int

    def shape(self, batch_size: int) -> tuple[int, int, int]:
        return self.count, batch_size if self.rows == BATCH else self.rows, self.columns


@dataclass(frozen=True)
class Slot:
    """Entries start to stop of the first axis of a buffer."""

    buffer: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.buffer}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Instruction:
    """out = op(inputs). `backends/operations.py` defines every op. The effective factor is scale *
    scalars[scalar].

    out: one slot, or several for the few operations that write more than one.
    function: name of the activation where the op applies one.
    options: further constants of the op, by name: numbers, or for card operations chains of functions.
    """

    op: str
    out: tuple[Slot, ...]
    inputs: tuple[Slot, ...] = ()
    scale: float = 1.0
    scalar: str | None = None
    function: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        name = f"{self.op}.{self.function}" if self.function else self.op
        words = [*map(str, self.inputs)]
        if self.scalar:
            factor = {1.0: "", -1.0: "-"}.get(self.scale, f"{self.scale:g} ")
            words.append(f"s={factor}{self.scalar}")
        elif self.scale != 1.0 or not self.inputs:
            words.append(f"s={self.scale:g}")
        chains = [(key, value) for key, value in self.options if key.endswith("chain")]
        words += [f"{key}={'.'.join(' '.join(map(str, link)) for link in chain)}" for key, chain in chains]
        return f"{', '.join(map(str, self.out))} = {name}({', '.join(words)})"


@dataclass(frozen=True)
class Program:
    """What one batch does, in order: initialise, measure_initial, step(1) .. step(num_steps), finish,
    measure, gradients, update.

    refresh: what must follow when weights have been written from outside, for backends that keep copies of
        them; empty in an assembled program.
    steps: the inference steps that differ from each other.
    walk: which of `steps` each inference step is. From a feedforward start the errors travel one layer per
        step (equality E2 of docs/mathematics.md), so the first steps need only the layers already reached.
    starts, ends: where the activity of each node stands that inference starts from, and that it ends in.
    sweep: the feedforward sweep from the input, where `initialise` starts elsewhere.
    keep, combine: for training steps of two relaxations, whose weight gradients are subtracted: what puts
        those of the first aside, and what takes them from those of the second; otherwise empty.
    """

    buffers: dict[str, Buffer]
    initialise: tuple[Instruction, ...]
    measure_initial: tuple[Instruction, ...]
    steps: tuple[tuple[Instruction, ...], ...]
    finish: tuple[Instruction, ...]
    measure: tuple[Instruction, ...]
    gradients: tuple[Instruction, ...]
    update: tuple[Instruction, ...]
    walk: tuple[int, ...]
    starts: tuple[Slot, ...]
    ends: tuple[Slot, ...]
    refresh: tuple[Instruction, ...] = ()
    sweep: tuple[Instruction, ...] = ()
    keep: tuple[Instruction, ...] = ()
    combine: tuple[Instruction, ...] = ()

    @property
    def num_steps(self) -> int:
        """Inference steps of one relaxation."""
        return len(self.walk)

    def step(self, number: int) -> tuple[Instruction, ...]:
        """Instructions of inference step `number`, counted from 1."""
        return self.steps[self.walk[number - 1]]

    def training_step(self) -> list[Instruction]:
        """Every instruction of one training step, in order."""
        relaxation = [*self.initialise, *self.measure_initial]
        relaxation += [instruction for index in self.walk for instruction in self.steps[index]]
        relaxation += [*self.finish, *self.measure, *self.gradients]
        first = [*relaxation, *self.keep] if self.keep else []
        return [*first, *relaxation, *self.combine, *self.update]

    def flops(self, batch_size: int) -> int:
        """Floating-point operations of the products of one training step; a multiply-add counts two."""
        return sum(self._flops(instruction, batch_size) for instruction in self.training_step())

    def _flops(self, instruction: Instruction, batch_size: int) -> int:
        options = dict(instruction.options)
        if instruction.op.startswith("convolve"):
            (_, height, width), kernel = options["out_shape"], options["kernel"]
            return 2 * batch_size * height * width * math.prod(kernel)
        if instruction.op.startswith("attend"):
            (queries, units), (keys, _), (_, values) = options["shapes"]
            products = 2 if instruction.op == "attend" else 5
            return products * batch_size * queries * keys * (units + values)
        if instruction.op not in ("product", "product_transposed", "outer"):
            return 0
        batch_size *= options.get("positions", 1)
        weight = instruction.out[0] if instruction.op == "outer" else instruction.inputs[1]
        _, rows, columns = self.buffers[weight.buffer].shape(batch_size)
        return 2 * batch_size * rows * columns * (weight.stop - weight.start)

    def __str__(self) -> str:
        sections = [("initialise", self.initialise), ("measure_initial", self.measure_initial)]
        sections += [(f"step {number}", code) for number, code in enumerate(self.steps, start=1)]
        names = ("finish", "measure", "gradients", "keep", "combine", "update", "sweep")
        sections += [(name, getattr(self, name)) for name in names if getattr(self, name)]
        return "\n".join(
            f"{name}:" + "".join(f"\n  {instruction}" for instruction in code) for name, code in sections
        )


PURE = (
    *("copy", "add", "multiply", "activate", "derivative", "product", "product_transposed"),
    *("convolve", "convolve_transposed", "pool_max", "unpool_max", "pool_mean", "unpool_mean", "take", "put"),
    "permute",
    *("shift", "add_channels", "scale_channels", "divide_channels", "normalise", "normalise_pull"),
    *("embed", "attend", "attend_pull"),
)
"""Operations whose result is a function of their inputs."""


def without_repeats(code: Iterable[Instruction]) -> list[Instruction]:
    """The code without instructions whose result stands there already, as rules that know nothing of each
    other may write the same one.
    """
    standing: set[Instruction] = set()
    touching: dict[Slot, set[Instruction]] = {}
    kept: list[Instruction] = []
    for instruction in code:
        if instruction in standing:
            continue
        kept.append(instruction)
        for slot in instruction.out:
            standing -= touching.pop(slot, set())
        if instruction.op in PURE and not set(instruction.out) & set(instruction.inputs):
            standing.add(instruction)
            for slot in (*instruction.out, *instruction.inputs):
                touching.setdefault(slot, set()).add(instruction)
    return kept


def coalesce(code: Iterable[Instruction]) -> tuple[Instruction, ...]:
    """The same computation with neighbouring slots served by one batched instruction.

    code: instructions on slots of one entry each. Two of them may change places where neither writes what the
    other reads or writes, so the numbers cannot change. Greedy: of the instructions that could come next it
    takes the first kind of which none is still waiting, and joins its runs of neighbouring slots.
    """
    todo = list(code)
    waiting, followers = _dependencies(todo)
    kinds = [_kind(instruction) for instruction in todo]
    remaining = Counter(kinds)
    ready = [index for index, count in enumerate(waiting) if not count]
    merged: list[Instruction] = []
    while ready:
        ready.sort()
        here = Counter(kinds[index] for index in ready)
        whole = next(
            (kinds[index] for index in ready if here[kinds[index]] == remaining[kinds[index]]),
            kinds[ready[0]],
        )
        taken = [index for index in ready if kinds[index] == whole]
        ready = [index for index in ready if kinds[index] != whole]
        remaining[whole] -= len(taken)
        merged += _join(
            sorted((todo[index] for index in taken), key=lambda instruction: instruction.out[0].start)
        )
        for index in taken:
            for follower in followers[index]:
                waiting[follower] -= 1
                if not waiting[follower]:
                    ready.append(follower)
    return tuple(merged)


def _kind(instruction: Instruction) -> Hashable:
    """What two instructions must share to be one: everything but the positions in their buffers."""
    slots = (*instruction.out, *instruction.inputs)
    offsets = tuple((slot.buffer, slot.start - instruction.out[0].start) for slot in slots)
    return replace(instruction, out=(), inputs=()), len(instruction.out), offsets


def _dependencies(code: list[Instruction]) -> tuple[list[int], list[set[int]]]:
    """How many earlier instructions each one must follow, and the later ones that must follow each."""
    writer: dict[Slot, int] = {}
    readers: dict[Slot, list[int]] = {}
    followers: list[set[int]] = [set() for _ in code]
    for index, instruction in enumerate(code):
        before = [writer[slot] for slot in (*instruction.inputs, *instruction.out) if slot in writer]
        before += [reader for slot in instruction.out for reader in readers.pop(slot, ())]
        for other in before:
            followers[other].add(index)
        for slot in instruction.inputs:
            readers.setdefault(slot, []).append(index)
        for slot in instruction.out:
            writer[slot] = index
    waiting = [0] * len(code)
    for later in followers:
        for index in later:
            waiting[index] += 1
    return waiting, followers


def _join(code: list[Instruction]) -> list[Instruction]:
    """Instructions of one kind, in the order of their slots, with neighbours joined."""
    joined: list[Instruction] = []
    for instruction in code:
        if joined and joined[-1].out[0].stop == instruction.out[0].start:
            last = joined.pop()
            out, inputs = (
                tuple(Slot(a.buffer, a.start, b.stop) for a, b in zip(first, second, strict=True))
                for first, second in ((last.out, instruction.out), (last.inputs, instruction.inputs))
            )
            instruction = replace(instruction, out=out, inputs=inputs)
        joined.append(instruction)
    return joined
