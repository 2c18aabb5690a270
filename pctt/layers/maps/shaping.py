"""Maps without weights: functions, shapes, and what joins several values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pctt.activations import activation
from pctt.layers.maps.base import (
    Map,
    Options,
    Passing,
    Shape,
    Use,
    axis_of,
    check_shape,
    require_number,
    size_of,
    unchanged,
)
from pctt.program import Slot


@dataclass(frozen=True)
class Function(Map):
    """An activation, y = f(x). name: one of those of `Dense`; softmax runs over the last axis."""

    name: str
    kind: ClassVar[str] = "function"
    is_linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        activation(self.name)

    def _options(self, use: Use) -> Options:
        return (("last", use.shape[-1]),) if self.name == "softmax" else ()

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("activate", out, use.value(0), function=self.name, options=self._options(use))

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
        def write(out: Slot) -> None:
            operands = v, use.value(0), use.output()
            use.emit("derivative", out, *operands, function=self.name, options=self._options(use))

        use.delivered(write, "slope", size_of(use.shape), into, addend, scale, scalar)


@dataclass(frozen=True)
class Scale(Map):
    """y = factor x"""

    factor: float
    kind: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        require_number("factor", self.factor)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        use.at.add_scaled(change, out, addend, scale * self.factor, None)

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
        use.at.add_scaled(v, into, addend, scale * self.factor, scalar)


@dataclass(frozen=True)
class Shift(Passing):
    """y = x + constant"""

    constant: float
    kind: ClassVar[str] = "shift"

    def __post_init__(self) -> None:
        require_number("constant", self.constant)

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("shift", out, use.value(0), scale=self.constant)


@dataclass(frozen=True)
class Reshape(Passing):
    """The same numbers as another shape.    shape: of y, without the batch axis."""

    shape: tuple[int, ...]
    kind: ClassVar[str] = "reshape"

    def __post_init__(self) -> None:
        check_shape(self)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        if size_of(shapes[0]) != size_of(self.shape):
            raise ValueError(
                f"a sample of shape {list(shapes[0])} does not have the size of {list(self.shape)}."
            )
        return self.shape


@dataclass(frozen=True)
class Flatten(Passing):
    """All numbers in one axis."""

    kind: ClassVar[str] = "flatten"

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (size_of(shapes[0]),)


@dataclass(frozen=True)
class Permute(Map):
    """The axes of a sample in another order; axes: where each axis of the result stood, as in torch."""

    axes: tuple[int, ...]
    kind: ClassVar[str] = "permute"

    def __post_init__(self) -> None:
        if sorted(self.axes) != list(range(len(self.axes))):
            raise ValueError(f"axes must be 0 to n - 1 in some order, got {self.axes}.")

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if len(shape) != len(self.axes):
            raise ValueError(f"a sample of shape {list(shape)} does not have {len(self.axes)} axes.")
        return tuple(shape[axis] for axis in self.axes)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        options = (("shape", use.shapes[0]), ("axes", self.axes))
        use.emit("permute", out, change, addend, scale=scale, options=options)

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
        back = tuple(self.axes.index(axis) for axis in range(len(self.axes)))
        options = (("shape", use.shape), ("axes", back))
        use.emit("permute", into, v, addend, scale=scale, scalar=scalar, options=options)


@dataclass(frozen=True)
class Fill(Map):
    """y = value everywhere, whatever x is: the state that a recurrence begins with. shape: of y."""

    shape: tuple[int, ...]
    value: float = 0.0
    kind: ClassVar[str] = "fill"

    def __post_init__(self) -> None:
        check_shape(self)
        require_number("value", self.value)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.shape

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("fill", out, scale=self.value)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        unchanged(use, out, addend)

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


@dataclass(frozen=True)
class Slice(Map):
    """Entries start to stop of one axis of a sample; negative axes count from the end."""

    start: int
    stop: int
    axis: int = 0
    kind: ClassVar[str] = "slice"

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        axis = axis_of(self.axis, shape)
        if not 0 <= self.start < self.stop <= shape[axis]:
            raise ValueError(
                f"entries {self.start} to {self.stop} are not in axis {axis} of a sample of shape "
                f"{list(shape)}."
            )
        return (*shape[:axis], self.stop - self.start, *shape[axis + 1 :])

    def _options(self, use: Use) -> Options:
        return _region(use.shapes[0], axis_of(self.axis, use.shapes[0]), self.start, self.stop - self.start)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        use.emit("take", out, change, addend, scale=scale, options=self._options(use))

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
        use.emit("put", into, v, addend, scale=scale, scalar=scalar, options=self._options(use))


# --- several inputs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Add(Map):
    """y = sum of the inputs, all of one shape.    signs: 1 or -1 per input, all 1 when empty."""

    signs: tuple[int, ...] = ()
    kind: ClassVar[str] = "add"
    num_inputs: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if any(sign not in (1, -1) for sign in self.signs):
            raise ValueError(f"signs must be 1 or -1 each, got {self.signs}.")

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        if self.signs and len(self.signs) != len(shapes):
            raise ValueError(f"{len(self.signs)} signs do not suit {len(shapes)} inputs.")
        return _same(self.kind, shapes)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        use.at.add_scaled(change, out, addend, scale * self._sign(number), None)

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
        use.at.add_scaled(v, into, addend, scale * self._sign(number), scalar)

    def _sign(self, number: int) -> int:
        return self.signs[number] if self.signs else 1


@dataclass(frozen=True)
class Multiply(Map):
    """y = a . b of two inputs of one shape, entry by entry: a gate."""

    kind: ClassVar[str] = "multiply"
    is_linear: ClassVar[bool] = False
    num_inputs: ClassVar[int | None] = 2

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return _same(self.kind, shapes)

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("multiply", out, use.value(0), use.value(1))

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
        def write(out: Slot) -> None:
            use.emit("multiply", out, v, use.value(1 - number))

        use.delivered(write, "slope", size_of(use.shape), into, addend, scale, scalar)


@dataclass(frozen=True)
class Concat(Map):
    """The inputs one after the other along one axis of a sample; a negative one counts from the end."""

    axis: int = 0
    kind: ClassVar[str] = "concat"
    num_inputs: ClassVar[int | None] = None

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        axis = axis_of(self.axis, shapes[0])
        rests = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
        if len(rests) != 1 or len({len(shape) for shape in shapes}) != 1:
            raise ValueError(
                f"shapes {', '.join(str(list(shape)) for shape in shapes)} differ beside axis {axis}, so "
                "they "
                "do not concatenate."
            )
        return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])

    def _options(self, use: Use, number: int) -> Options:
        axis = axis_of(self.axis, use.shape)
        start = sum(shape[axis] for shape in use.shapes[:number])
        return _region(use.shape, axis, start, use.shapes[number][axis])

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        use.emit("put", out, change, addend, scale=scale, options=self._options(use, number))

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
        use.emit("take", into, v, addend, scale=scale, scalar=scalar, options=self._options(use, number))


def _same(kind: str, shapes: Sequence[Shape]) -> Shape:
    if len(set(shapes)) != 1:
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{kind} takes inputs of one shape, got {found}.")
    return shapes[0]


def _region(shape: Shape, axis: int, start: int, length: int) -> Options:
    """Entries of one axis of a flat sample: as (outer, size, inner), first entry, number of entries."""
    view = (size_of(shape[:axis]), shape[axis], size_of(shape[axis + 1 :]))
    return (("view", view), ("start", start), ("length", length))
