"""A training step cut over ranks: which rank runs which instruction, and what must be sent in between.

A program is a list of instructions on slots, each local to one layer and its two nodes (program.py). So a
rank that has some of the layers runs the instructions of these, and wherever one reads a slot that another
rank wrote last, that slot is sent first. Nothing else is known here: not what an inference step is, nor which
of its values cross. The operations and their order are those of one process, and so are the bits.

An instruction belongs to the layer whose weights it touches, else to the node it writes; node l is at home
with layer l, node 0 with layer 1. In a chain only neighbours then exchange anything, per boundary between
node l and layer l + 1 and inference step, live predictions:

    activate="output"   up d_l, after its own error; down d_l, after the feedback of layer l + 1
    activate="input"    down the feedback to node l; up the change of f(x_l)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from pctt.groups import Layout
from pctt.program import Instruction, Program, Slot


@dataclass(frozen=True)
class Message:
    """`slot`, as `source` has written it, is sent to `target`."""

    slot: Slot
    source: int
    target: int

    def slots(self, rank: int) -> tuple[Slot, ...]:
        """Those that `rank` needs for it, none if it takes no part."""
        return (self.slot,) if rank in (self.source, self.target) else ()


@dataclass(frozen=True)
class Task:
    """An instruction and the rank that runs it."""

    rank: int
    instruction: Instruction

    def slots(self, rank: int) -> tuple[Slot, ...]:
        """Those that `rank` needs for it, none if it is another's."""
        return (*self.instruction.out, *self.instruction.inputs) if rank == self.rank else ()


Section = list[Task | Message]
"""What all ranks do, in order; a rank does its part of it in this order."""


PRODUCTS = ("product", "product_transposed", "outer")


def product_terms(program: Program, instruction: Instruction) -> int:
    """Multiply-adds per sample of an instruction: the entries of its weight, 0 where it is no product."""
    if instruction.op not in PRODUCTS:
        return 0
    weight = instruction.out[0] if instruction.op == "outer" else instruction.inputs[1]
    _, rows, columns = program.buffers[weight.buffer].shape(1)
    return rows * columns


def loads(layout: Layout, program: Program) -> list[int]:
    """Multiply-adds per sample that a training step does with the weights of each layer, 1 to L. The layer
    above a clamped input has few for its size: it predicts once, and sends nothing down.
    """
    places = {
        layout.layer("weight", index)[1].name.partition("@")[2]: index
        for index in range(1, len(layout.net.layers) + 1)
    }
    sums = [0] * len(places)
    for instruction in program.training_step():
        for slot in (*instruction.out, *instruction.inputs):
            index = places.get(slot.buffer.partition("@")[2])
            if index is not None:
                sums[index - 1] += product_terms(program, instruction)
                break
    return sums


def balanced(costs: Sequence[int], size: int) -> tuple[int, ...]:
    """The rank of each layer, given what each costs: consecutive layers, such that the most of any rank is
    the least possible.

    Raises ValueError where there are more ranks than layers.
    """
    if size > len(costs):
        raise ValueError(
            f"{len(costs)} layers cannot be split over {size} ranks; start at most {len(costs)}."
        )
    sums = [0, *accumulate(costs)]

    @cache
    def best(begin: int, left: int) -> tuple[int, tuple[int, ...]]:
        """Of the layers from `begin` on, over `left` ranks: the most of one, and where ranks begin."""
        if left == 1:
            return sums[-1] - sums[begin], (begin,)
        options: list[tuple[int, tuple[int, ...]]] = []
        for end in range(begin + 1, len(costs) - left + 2):
            most, begins = best(end, left - 1)
            options.append((max(most, sums[end] - sums[begin]), (begin, *begins)))
        return min(options)

    begins = best(0, size)[1]
    return tuple(sum(begin <= layer for begin in begins) - 1 for layer in range(len(costs)))


class Cut:
    """The sections of a program, cut. ranks: of each layer, 1 to L, in order."""

    def __init__(self, layout: Layout, program: Program, ranks: Sequence[int]) -> None:
        self._nodes = _places(layout, (ranks[0], *ranks))
        self._layers = {
            layout.layer("weight", index)[1].name.partition("@")[2]: rank
            for index, rank in enumerate(ranks, start=1)
        }
        self._holders: dict[Slot, set[int]] = {}
        self.initialise = self._section((*program.initialise, *program.measure_initial))
        self.steps = [self._section(program.steps[kind]) for kind in program.walk]
        self.finish = self._section((*program.finish, *program.measure))
        self.learn = self._section((*program.gradients, *program.update))

    def home(self, slot: Slot) -> int:
        """The rank that a slot's first value is given to."""
        place = slot.buffer.partition("@")[2]
        return self._layers[place] if place in self._layers else self._nodes[place]

    def _rank(self, instruction: Instruction) -> int:
        for slot in (*instruction.out, *instruction.inputs):
            if slot.buffer.partition("@")[2] in self._layers:
                return self.home(slot)
        return self.home(instruction.out[0])

    def _section(self, code: Iterable[Instruction]) -> Section:
        section: Section = []
        for instruction in code:
            rank = self._rank(instruction)
            for slot in instruction.inputs:
                holders = self._holders.setdefault(slot, {self.home(slot)})
                if rank not in holders:
                    nearest = min(holders, key=lambda holder: abs(holder - rank))
                    assert abs(nearest - rank) == 1, f"{slot} would travel from rank {nearest} to {rank}"
                    section.append(Message(slot, nearest, rank))
                    holders.add(rank)
            section.append(Task(rank, instruction))
            for slot in instruction.out:
                self._holders[slot] = {rank}
        return section


def _places(layout: Layout, ranks: Sequence[int]) -> Mapping[str, int]:
    """The rank of each node, by what stands behind the @ in the names of its buffers."""
    places: dict[str, int] = {}
    for index, rank in enumerate(ranks):
        for _, buffer in (layout.node("activity", index), layout.sum("square", index)):
            places[buffer.name.partition("@")[2]] = rank
        places[f"{layout.tag}{index}"] = rank  # of a precision
    return places
