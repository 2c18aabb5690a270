"""Maps that multiply by a matrix: linear, and rows of a table by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pctt._checks import require_count, require_one_of
from pctt.layers.maps.base import Map, Options, Shape, Use, size_of
from pctt.program import Slot


@dataclass(frozen=True)
class Linear(Map):
    """y = x W + b over the last axis of x; W is [in, out].

    units: of y, along the last axis.    bias: whether b, [out], is there.
    mask: None; "off_diagonal" for a W without its diagonal; or a density in (0, 1), of the entries drawn by
        `seed` that W has. Entries that it has not are zero for good.
    """

    units: int
    bias: bool = True
    mask: str | float | None = None
    seed: int = 0
    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        require_count("units", self.units, least=1)
        require_count("seed", self.seed)
        if isinstance(self.mask, str):
            require_one_of("mask", self.mask, ("off_diagonal",))
        elif self.mask is not None and not 0.0 < self.mask < 1.0:
            raise ValueError(f"mask must be 'off_diagonal' or a density between 0 and 1, got {self.mask!r}.")

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][:-1], self.units)

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        weight: dict[str, Shape] = {"weight": (shapes[0][-1], self.units)}
        if self.mask == "off_diagonal" and shapes[0][-1] != self.units:
            raise ValueError(f"a W [{shapes[0][-1]}, {self.units}] has no diagonal to leave out.")
        return {**weight, "bias": (self.units,)} if self.bias else weight

    def drawn_mask(self, shape: Shape) -> Tensor:
        """1 where the weight has an entry and 0 elsewhere, float64."""
        if self.mask == "off_diagonal":
            return 1.0 - torch.eye(*shape, dtype=torch.float64)
        assert isinstance(self.mask, float)
        draws = torch.rand(*shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return (draws < self.mask).double()

    def fans(self, shapes: Sequence[Shape]) -> tuple[int, int]:
        return shapes[0][-1], self.units

    def _options(self, use: Use) -> Options:
        positions = size_of(use.shape[:-1])
        return (("positions", positions),) if positions > 1 else ()

    def forward(self, use: Use, out: Slot) -> None:
        bias = use.weight("bias") if self.bias else None
        use.emit("product", out, use.value(0), use.weight("weight"), bias, options=self._options(use))

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        use.emit(
            "product", out, change, use.weight("weight"), addend, scale=scale, options=self._options(use)
        )

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
        options = self._options(use)
        use.emit(
            "product_transposed",
            into,
            v,
            use.weight("weight"),
            addend,
            scale=scale,
            scalar=scalar,
            options=options,
        )

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        options = self._options(use)
        out, addend = use.gradient("weight")
        use.emit("outer", out, use.value(0), v, addend, scale=scale, scalar=scalar, options=options)
        if self.mask is not None:
            use.emit("multiply", out, out, use.weight("mask"))
        if self.bias:
            out, addend = use.gradient("bias")
            use.emit("column_sum", out, v, addend, scale=scale, scalar=scalar, options=options)


@dataclass(frozen=True)
class Embedding(Map):
    """Rows of a table [num, units]: x holds whole numbers 0 to num - 1, [positions]; y is [positions, units].

    Whole numbers have no slope, so the node below must be clamped.
    """

    num: int
    units: int
    kind: ClassVar[str] = "embedding"
    is_linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_count("num", self.num, least=1)
        require_count("units", self.units, least=1)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0], self.units)

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        return {"weight": (self.num, self.units)}

    def fans(self, shapes: Sequence[Shape]) -> tuple[int, int]:
        return 1, self.units

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("embed", out, use.value(0), use.weight("weight"))

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
        raise ValueError("an embedding reads whole numbers, which inference cannot move; clamp its source.")

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        out, addend = use.gradient("weight")
        options = (("num", self.num),)
        use.emit("embed_outer", out, use.value(0), v, addend, scale=scale, scalar=scalar, options=options)
