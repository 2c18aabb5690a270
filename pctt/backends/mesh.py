"""Several chips as one: every chip holds the same weights and a share of each batch.

All chips run the same card operations at the same time. A sample relaxes as if it were alone, so inference
sends nothing. A chip's weight gradient is the sum over its own samples of what each adds to that of the batch
mean, 1/B of it, whatever the chip's share; `all_reduce` puts the sum over all chips on every one of them:

    all_reduce  out = the sum over the chips of their a, chip 0 first, then chip 1 and so on

The order is fixed, so all chips add the same numbers in the same order and hold the same bits ever after.
Sums for energies the host adds up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pctt.layers.block import ties_samples
from pctt.network import Network
from pctt.program import Instruction, Program, Slot


def parse_device(device: str | int | None) -> tuple[str | None, int]:
    """What is named, and how many chips of it: (None, 2) of "mesh:2", ("n300", 2) of "n300:2", ("0", 1) of 0.

    Raises ValueError for a number of chips that is none.
    """
    if device is None:
        return None, 1
    name, colon, number = str(device).partition(":")
    if not colon:
        return name, 1
    if not (number.isascii() and number.isdigit() and int(number)):
        raise ValueError(f"device must end in a number of chips, as mesh:2 does, got {device!r}.")
    return None if name == "mesh" else name, int(number)


def refuse_on_mesh(net: Network) -> None:
    """Raises ValueError for a network that means something else where batches are shared out."""
    if ties_samples(rule for part in net.chains for rule in part.rules):
        raise ValueError(
            "NormaliseBatch ties the samples of a batch together, so a mesh cannot share them out; use "
            "Normalise, or a device of one chip."
        )


def with_sums_over_chips(program: Program, num_chips: int) -> Program:
    """The program with an all_reduce of every weight gradient: behind the section `gradients`, and in an
    inference step that moves weights before the first instruction that reads one.
    """

    def sums(slots: Iterable[Slot]) -> list[Instruction]:
        return [
            Instruction("all_reduce", (slot,), (slot,), options=(("chips", num_chips),)) for slot in slots
        ]

    def summed(code: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        fresh: dict[Slot, None] = {}  # gradients that are of each chip's samples alone so far
        done: list[Instruction] = []
        for i in code:
            outs = [slot for slot in i.out if _is_gradient(slot)]
            if not outs:
                read = [slot for slot in fresh if any(_overlap(slot, other) for other in i.inputs)]
                done += sums(read)
                for slot in read:
                    del fresh[slot]
            done.append(i)
            fresh |= dict.fromkeys(outs)
        return (*done, *sums(fresh))

    return replace(program, gradients=summed(program.gradients), steps=tuple(map(summed, program.steps)))


def _overlap(one: Slot, other: Slot) -> bool:
    return one.buffer == other.buffer and one.start < other.stop and other.start < one.stop


def _is_gradient(slot: Slot) -> bool:
    role, _, home = slot.buffer.partition("@")
    return role.endswith("_gradient") and home.startswith("layers")
