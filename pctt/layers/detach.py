"""Detach: a value that is read and not moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pctt.layers.maps import Passing, Use, unchanged
from pctt.program import Slot


@dataclass(frozen=True)
class Detach(Passing):
    """y = x, with no feedback to x: the error of the node predicted through it moves that node alone.

    What then relaxes is no descent of the energy but the node-local rule dx = -e, whose resting points are
    those where every free unit is as predicted (Tang et al. 2023 for the memories of `pctt.RecurrentMemory`).
    """

    kind: ClassVar[str] = "detach"

    def pull(
        self,
        use: Use,
        number: int,
        v: Slot,
        into: Slot,
        addend: Slot | None,
        scale: float,
        scalar: str | None,
    ) -> None:
        unchanged(use, into, addend)
