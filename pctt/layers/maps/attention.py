"""Attention of several heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pctt._checks import require_count
from pctt.layers.maps.base import Map, Options, Shape, Use, size_of
from pctt.program import Instruction, Slot


@dataclass(frozen=True)
class Attend(Map):
    """Scaled dot-product attention of queries, keys and values, [positions, units] each, over heads that
    share the units evenly (Vaswani et al. 2017, eq. 1).

    heads: at least 1, a divisor of the units.    causal: a position sees itself and those before it.

    Raises ValueError for other shapes. Dropout has no place here.
    """

    heads: int = 1
    causal: bool = False
    kind: ClassVar[str] = "attend"
    is_linear: ClassVar[bool] = False
    num_inputs: ClassVar[int | None] = 3

    def __post_init__(self) -> None:
        require_count("heads", self.heads, least=1)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        queries, keys, values = shapes
        if any(len(shape) != 2 for shape in shapes) or queries[1] != keys[1] or keys[0] != values[0]:
            found = ", ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"attention takes queries, keys and values [positions, units], got {found}.")
        for units in (queries[1], values[1]):
            if units % self.heads:
                raise ValueError(f"{units} units do not divide into {self.heads} heads.")
        if self.causal and queries[0] != keys[0]:
            raise ValueError("causal attention takes as many queries as keys.")
        return queries[0], values[1]

    def _options(self, use: Use) -> Options:
        return (("shapes", use.shapes), ("heads", self.heads), ("causal", self.causal))

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("attend", out, *(use.value(number) for number in range(3)), options=self._options(use))

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
        sizes = [size_of(shape) for shape in use.shapes]
        outs = tuple(use.scratch(f"attended{n}_", size) for n, size in enumerate(sizes))
        values = tuple(use.value(n) for n in range(3))
        use.at.code.append(Instruction("attend_pull", outs, (v, *values), options=self._options(use)))
        use.at.add_scaled(outs[number], into, addend, scale, scalar)
