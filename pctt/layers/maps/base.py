"""What a map is, and what maps share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pctt._checks import require_count
from pctt.describe import Concise
from pctt.program import Instruction, Slot

if TYPE_CHECKING:
    from pctt.layers.maps.shaping import Fill, Reshape
    from pctt.state import AbstractState

Shape = tuple[int, ...]
Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Use:
    """A map at its place in a program.

    shapes, shape: of the inputs and of the output, without the batch axis.
    value: the slot of the current value of input number n.    output: that of the output.
    weight: the slot of a weight, by its key.    gradient: that of its gradient, and what it is added to.
    scratch: a slot for a result on its way, by role and units.
    """

    at: AbstractState
    shapes: tuple[Shape, ...]
    shape: Shape
    value: Callable[[int], Slot]
    output: Callable[[], Slot]
    weight: Callable[[str], Slot]
    gradient: Callable[[str], tuple[Slot, Slot | None]]
    scratch: Callable[[str, int], Slot]

    def emit(
        self,
        op: str,
        out: Slot,
        *inputs: Slot | None,
        scale: float = 1.0,
        scalar: str | None = None,
        function: str | None = None,
        options: Options = (),
    ) -> Slot:
        given = tuple(slot for slot in inputs if slot is not None)
        self.at.code.append(Instruction(op, (out,), given, scale, scalar, function, options))
        return out

    def delivered(
        self,
        write: Callable[[Slot], object],
        role: str,
        units: int,
        into: Slot,
        addend: Slot | None,
        scale: float,
        scalar: str | None,
    ) -> None:
        """into = addend + scale scalars[scalar] r, r what `write` puts into a slot of `units` units: `into`
        itself where nothing is added or multiplied, else a scratch slot of `role`.
        """
        if addend is None and scale == 1.0 and scalar is None:
            write(into)
            return
        found = self.scratch(role, units)
        write(found)
        self.at.add_scaled(found, into, addend, scale, scalar)


@dataclass(frozen=True)
class Map(Concise):
    """What all maps have. Subclasses are data: what they compute depends on nothing but their fields."""

    kind: ClassVar[str] = ""
    is_linear: ClassVar[bool] = True
    num_inputs: ClassVar[int | None] = 1
    """None: one or more."""

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Raises ValueError where the inputs' shapes do not suit."""
        return shapes[0]

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """{key: shape} of the map's weights, for inputs of these shapes, which have no batch axis."""
        del shapes
        return {}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Keys of weights that no gradient moves."""
        return ()

    def fans(self, shapes: Sequence[Shape]) -> tuple[int, int]:
        """Inputs per output and outputs per input of the weight called `weight`, for initialisation."""
        del shapes
        return 1, 1

    def forward(self, use: Use, out: Slot) -> None:
        """out = the map of the current values."""
        for number in range(len(use.shapes)):
            self.push(use, number, use.value(number), out, out if number else None, 1.0)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        """out = addend + scale (what a change of input `number` changes y by)"""
        raise NotImplementedError(f"{self.kind} is not linear")

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
        """into = addend + scale scalars[scalar] (dy/dx_number)' v"""
        raise NotImplementedError

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        """The gradient of each trained weight = what it is added to + scale scalars[scalar] (dy/dW)' v"""
        del use, v, scale, scalar


class Passing(Map):
    """A map whose output changes by as much as its inputs do."""

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        use.at.add_scaled(change, out, addend, scale, None)

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
        use.at.add_scaled(v, into, addend, scale, scalar)


def size_of(shape: Shape) -> int:
    return math.prod(shape)


def require_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")


def check_shape(entry: Reshape | Fill) -> None:
    object.__setattr__(entry, "shape", tuple(entry.shape))
    if not entry.shape:
        raise ValueError("shape must name at least one axis.")
    for size in entry.shape:
        require_count("shape", size, least=1)


def check_sizes(entry: Map, name: str, least: int) -> None:
    """One number for both axes of an image, or one each."""
    value = getattr(entry, name)
    if isinstance(value, list):  # as it comes out of TOML or JSON
        value = tuple(value)
        object.__setattr__(entry, name, value)
    if not isinstance(value, int) and not (isinstance(value, tuple) and len(value) == 2):
        raise ValueError(f"{name} must be one number or two, got {value!r}.")
    for size in pair(value):
        require_count(name, size, least=least)


def axis_of(axis: int, shape: Shape) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"a sample of shape {list(shape)} has no axis {axis}.")
    return axis % len(shape)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image(kind: str, shape: Shape) -> Shape:
    if len(shape) != 3:
        raise ValueError(f"{kind} takes samples [channels, height, width], got {list(shape)}.")
    return shape


def bias_gradient(use: Use, v: Slot, scale: float, scalar: str, options: Options) -> None:
    out, addend = use.gradient("bias")
    use.emit("channel_sum", out, v, addend, scale=scale, scalar=scalar, options=options)


def channels_of(shape: Shape, axis: int) -> Options:
    """A flat sample as (outer, channels, inner)."""
    axis = axis_of(axis, shape)
    return (("view", (size_of(shape[:axis]), shape[axis], size_of(shape[axis + 1 :]))),)


def unchanged(use: Use, into: Slot, addend: Slot | None) -> None:
    """into = addend + 0"""
    if addend is None:
        use.emit("fill", into, scale=0.0)
    elif addend != into:
        use.at.copy(into, addend)
