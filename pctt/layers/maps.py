"""Maps: the parts that a block's prediction is composed of, each with its local rules in backend operations.

A map takes one or more values, [B, *shape] each and stored flat, to one value. It has three rules:

    forward    y = map(x)
    push       what a change of one input adds to y, where the map is linear (up to a constant) in its inputs
    pull       v -> J' v, with J = dy/dx of one input
    gradient   v -> (dy/dW)' v for each of its weights

Blocks (`block.py`) compose them; only changes go through linear maps, as everywhere in pctt. Maps whose names
torch.nn has mean what they mean there, on samples without the batch axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pctt._checks import require_count, require_finite_positive, require_one_of
from pctt.activations import activation
from pctt.program import Instruction, Slot

if TYPE_CHECKING:
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
class Map:
    """What all maps have. Subclasses are data: what they compute depends on nothing but their fields."""

    kind: ClassVar[str] = ""
    is_linear: ClassVar[bool] = True
    num_inputs: ClassVar[int | None] = 1
    """None: one or more."""

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Raises ValueError where the inputs' shapes do not suit."""
        return shapes[0]

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
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


def _size(shape: Shape) -> int:
    return math.prod(shape)


def _require_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")


def _check_shape(entry: Reshape | Fill) -> None:
    object.__setattr__(entry, "shape", tuple(entry.shape))
    if not entry.shape:
        raise ValueError("shape must name at least one axis.")
    for size in entry.shape:
        require_count("shape", size, least=1)


def _check_sizes(entry: Map, name: str, least: int) -> None:
    """One number for both axes of an image, or one each."""
    value = getattr(entry, name)
    if isinstance(value, list):  # as it comes out of TOML or JSON
        value = tuple(value)
        object.__setattr__(entry, name, value)
    if not isinstance(value, int) and not (isinstance(value, tuple) and len(value) == 2):
        raise ValueError(f"{name} must be one number or two, got {value!r}.")
    for size in _pair(value):
        require_count(name, size, least=least)


# --- one input, no weights ----------------------------------------------------------------------------------


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

        use.delivered(write, "slope", _size(use.shape), into, addend, scale, scalar)


@dataclass(frozen=True)
class Scale(Map):
    """y = factor x"""

    factor: float
    kind: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        _require_number("factor", self.factor)

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
        _require_number("constant", self.constant)

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("shift", out, use.value(0), scale=self.constant)


@dataclass(frozen=True)
class Reshape(Passing):
    """The same numbers as another shape."""

    shape: tuple[int, ...]
    kind: ClassVar[str] = "reshape"

    def __post_init__(self) -> None:
        _check_shape(self)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        if _size(shapes[0]) != _size(self.shape):
            raise ValueError(
                f"a sample of shape {list(shapes[0])} does not have the size of {list(self.shape)}."
            )
        return self.shape


@dataclass(frozen=True)
class Flatten(Passing):
    """All numbers in one axis."""

    kind: ClassVar[str] = "flatten"

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (_size(shapes[0]),)


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
        _check_shape(self)
        _require_number("value", self.value)

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


def unchanged(use: Use, into: Slot, addend: Slot | None) -> None:
    """into = addend + 0"""
    if addend is None:
        use.emit("fill", into, scale=0.0)
    elif addend != into:
        use.at.copy(into, addend)


@dataclass(frozen=True)
class Slice(Map):
    """Entries start to stop of one axis of a sample; negative axes count from the end."""

    start: int
    stop: int
    axis: int = 0
    kind: ClassVar[str] = "slice"

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        axis = _axis(self.axis, shape)
        if not 0 <= self.start < self.stop <= shape[axis]:
            raise ValueError(
                f"entries {self.start} to {self.stop} are not in axis {axis} of a sample of shape "
                f"{list(shape)}."
            )
        return (*shape[:axis], self.stop - self.start, *shape[axis + 1 :])

    def _options(self, use: Use) -> Options:
        return _region(use.shapes[0], _axis(self.axis, use.shapes[0]), self.start, self.stop - self.start)

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


def _axis(axis: int, shape: Shape) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"a sample of shape {list(shape)} has no axis {axis}.")
    return axis % len(shape)


def _region(shape: Shape, axis: int, start: int, length: int) -> Options:
    """Entries of one axis of a flat sample: as (outer, size, inner), first entry, number of entries."""
    view = (_size(shape[:axis]), shape[axis], _size(shape[axis + 1 :]))
    return (("view", view), ("start", start), ("length", length))


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
    """y = a . b, entry by entry: a gate."""

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

        use.delivered(write, "slope", _size(use.shape), into, addend, scale, scalar)


@dataclass(frozen=True)
class Concat(Map):
    """The inputs one after the other along one axis."""

    axis: int = 0
    kind: ClassVar[str] = "concat"
    num_inputs: ClassVar[int | None] = None

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        axis = _axis(self.axis, shapes[0])
        rests = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
        if len(rests) != 1 or len({len(shape) for shape in shapes}) != 1:
            raise ValueError(
                f"shapes {', '.join(str(list(shape)) for shape in shapes)} differ beside axis {axis}, so "
                "they "
                "do not concatenate."
            )
        return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])

    def _options(self, use: Use, number: int) -> Options:
        axis = _axis(self.axis, use.shape)
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


# --- products -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear(Map):
    """y = x W + b over the last axis of x; W is [in, out].

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
        positions = _size(use.shape[:-1])
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
class Conv2d(Map):
    """Convolution over [channels, height, width]; the weight is [out, in / groups, height, width]."""

    channels: int
    kernel: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True
    kind: ClassVar[str] = "conv2d"

    def __post_init__(self) -> None:
        require_count("channels", self.channels, least=1)
        require_count("groups", self.groups, least=1)
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            _check_sizes(self, name, least)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        channels, *sizes = _image(self.kind, shapes[0])
        if channels % self.groups or self.channels % self.groups:
            raise ValueError(
                f"{channels} and {self.channels} channels do not divide into {self.groups} groups."
            )
        found = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                sizes,
                _pair(self.padding),
                _pair(self.dilation),
                _pair(self.kernel),
                _pair(self.stride),
                strict=True,
            )
        ]
        if min(found) < 1:
            raise ValueError(
                f"a kernel of {_pair(self.kernel)} does not fit into an image of {tuple(sizes)}."
            )
        return (self.channels, *found)

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        weight: dict[str, Shape] = {
            "weight": (self.channels, shapes[0][0] // self.groups, *_pair(self.kernel))
        }
        return {**weight, "bias": (self.channels,)} if self.bias else weight

    def fans(self, shapes: Sequence[Shape]) -> tuple[int, int]:
        area = math.prod(_pair(self.kernel))
        return shapes[0][0] // self.groups * area, self.channels // self.groups * area

    def _options(self, use: Use) -> Options:
        return (
            ("shape", use.shapes[0]),
            ("out_shape", use.shape),
            ("kernel", (self.channels, use.shapes[0][0] // self.groups, *_pair(self.kernel))),
            ("stride", _pair(self.stride)),
            ("padding", _pair(self.padding)),
            ("dilation", _pair(self.dilation)),
            ("groups", self.groups),
        )

    def forward(self, use: Use, out: Slot) -> None:
        bias = use.weight("bias") if self.bias else None
        use.emit("convolve", out, use.value(0), use.weight("weight"), bias, options=self._options(use))

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        weight = use.weight("weight")
        use.emit("convolve", out, change, weight, addend, scale=scale, options=self._options(use))

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
        weight, options = use.weight("weight"), self._options(use)
        use.emit("convolve_transposed", into, v, weight, addend, scale=scale, scalar=scalar, options=options)

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        out, addend = use.gradient("weight")
        use.emit(
            "convolve_outer",
            out,
            use.value(0),
            v,
            addend,
            scale=scale,
            scalar=scalar,
            options=self._options(use),
        )
        if self.bias:
            _bias_gradient(use, v, scale, scalar, _channels(use.shape, 0))


@dataclass(frozen=True)
class ConvTranspose2d(Map):
    """The transpose of a convolution; the weight is [in, out / groups, height, width], as in torch."""

    channels: int
    kernel: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    output_padding: int | tuple[int, int] = 0
    groups: int = 1
    bias: bool = True
    kind: ClassVar[str] = "conv_transpose2d"

    def __post_init__(self) -> None:
        require_count("channels", self.channels, least=1)
        require_count("groups", self.groups, least=1)
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("output_padding", 0)):
            _check_sizes(self, name, least)
        if any(
            extra >= stride
            for extra, stride in zip(_pair(self.output_padding), _pair(self.stride), strict=True)
        ):
            raise ValueError(
                f"output_padding must be below the stride {self.stride}, got {self.output_padding}."
            )

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        channels, *sizes = _image(self.kind, shapes[0])
        if channels % self.groups or self.channels % self.groups:
            raise ValueError(
                f"{channels} and {self.channels} channels do not divide into {self.groups} groups."
            )
        found = [
            (size - 1) * stride - 2 * padding + kernel + extra
            for size, padding, kernel, stride, extra in zip(
                sizes,
                _pair(self.padding),
                _pair(self.kernel),
                _pair(self.stride),
                _pair(self.output_padding),
                strict=True,
            )
        ]
        if min(found) < 1:
            raise ValueError(f"nothing is left of an image of {tuple(sizes)} after padding {self.padding}.")
        return (self.channels, *found)

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        weight: dict[str, Shape] = {
            "weight": (shapes[0][0], self.channels // self.groups, *_pair(self.kernel))
        }
        return {**weight, "bias": (self.channels,)} if self.bias else weight

    def fans(self, shapes: Sequence[Shape]) -> tuple[int, int]:
        area = math.prod(_pair(self.kernel))
        return shapes[0][0] // self.groups * area, self.channels // self.groups * area

    def _options(self, use: Use) -> Options:
        # Those of the convolution that this one is the transpose of, from its output to its input.
        return (
            ("shape", use.shape),
            ("out_shape", use.shapes[0]),
            ("kernel", (use.shapes[0][0], self.channels // self.groups, *_pair(self.kernel))),
            ("stride", _pair(self.stride)),
            ("padding", _pair(self.padding)),
            ("dilation", (1, 1)),
            ("groups", self.groups),
        )

    def forward(self, use: Use, out: Slot) -> None:
        weight, options = use.weight("weight"), self._options(use)
        bias = use.weight("bias") if self.bias else None
        use.emit("convolve_transposed", out, use.value(0), weight, bias, options=options)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        weight, options = use.weight("weight"), self._options(use)
        use.emit("convolve_transposed", out, change, weight, addend, scale=scale, options=options)

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
        weight, options = use.weight("weight"), self._options(use)
        use.emit("convolve", into, v, weight, addend, scale=scale, scalar=scalar, options=options)

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        out, addend = use.gradient("weight")
        options = self._options(use)
        use.emit("convolve_outer", out, v, use.value(0), addend, scale=scale, scalar=scalar, options=options)
        if self.bias:
            _bias_gradient(use, v, scale, scalar, _channels(use.shape, 0))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _image(kind: str, shape: Shape) -> Shape:
    if len(shape) != 3:
        raise ValueError(f"{kind} takes samples [channels, height, width], got {list(shape)}.")
    return shape


def _bias_gradient(use: Use, v: Slot, scale: float, scalar: str, options: Options) -> None:
    out, addend = use.gradient("bias")
    use.emit("channel_sum", out, v, addend, scale=scale, scalar=scalar, options=options)


def _channels(shape: Shape, axis: int) -> Options:
    """A flat sample as (outer, channels, inner)."""
    axis = _axis(axis, shape)
    return (("view", (_size(shape[:axis]), shape[axis], _size(shape[axis + 1 :]))),)


@dataclass(frozen=True)
class Embedding(Map):
    """Rows of a table: x holds whole numbers 0 to num - 1, [positions]; y is [positions, units].

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


# --- pooling ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaxPool2d(Map):
    """The largest of each window; errors go back to where it stood."""

    kernel: int | tuple[int, int]
    stride: int | tuple[int, int] | None = None
    padding: int | tuple[int, int] = 0
    kind: ClassVar[str] = "max_pool2d"
    is_linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_pool(self)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return _pooled(self, shapes[0])

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("pool_max", out, use.value(0), options=_pool_options(self, use))

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
            use.emit("unpool_max", out, v, use.value(0), options=_pool_options(self, use))

        use.delivered(write, "spread", _size(use.shapes[0]), into, addend, scale, scalar)


@dataclass(frozen=True)
class AvgPool2d(Map):
    """The mean of each window, padding counted as zeros; errors spread evenly over it. A kernel of 0 is the
    whole image.
    """

    kernel: int | tuple[int, int]
    stride: int | tuple[int, int] | None = None
    padding: int | tuple[int, int] = 0
    kind: ClassVar[str] = "avg_pool2d"

    def __post_init__(self) -> None:
        if self.kernel != 0:
            _check_pool(self)
        elif self.stride is not None or self.padding != 0:
            raise ValueError("kernel=0 is the whole image and takes no stride and no padding; drop them.")

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        return _pooled(self, shapes[0])

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        use.emit("pool_mean", out, change, addend, scale=scale, options=_pool_options(self, use))

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
        options = _pool_options(self, use)
        use.emit("unpool_mean", into, v, addend, scale=scale, scalar=scalar, options=options)


def _check_pool(pool: MaxPool2d | AvgPool2d) -> None:
    for name, least in (("kernel", 1), ("stride", 1), ("padding", 0)):
        if getattr(pool, name) is not None:
            _check_sizes(pool, name, least)
    if any(
        2 * padding > kernel for padding, kernel in zip(_pair(pool.padding), _pair(pool.kernel), strict=True)
    ):
        raise ValueError(f"padding must be at most half the kernel {pool.kernel}, got {pool.padding}.")


def _window(pool: MaxPool2d | AvgPool2d, shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel and stride on an image of that shape."""
    kernel = _pair(pool.kernel) if pool.kernel != 0 else (shape[1], shape[2])
    return kernel, kernel if pool.stride is None else _pair(pool.stride)


def _pooled(pool: MaxPool2d | AvgPool2d, shape: Shape) -> Shape:
    channels, *sizes = _image(pool.kind, shape)
    found = [
        (size + 2 * padding - kernel) // stride + 1
        for size, padding, kernel, stride in zip(
            sizes, _pair(pool.padding), *_window(pool, shape), strict=True
        )
    ]
    if min(found) < 1:
        raise ValueError(f"a window of {pool.kernel} does not fit into an image of {tuple(sizes)}.")
    return (channels, *found)


def _pool_options(pool: MaxPool2d | AvgPool2d, use: Use) -> Options:
    kernel, stride = _window(pool, use.shapes[0])
    return (
        ("shape", use.shapes[0]),
        ("out_shape", use.shape),
        ("kernel", kernel),
        ("stride", stride),
        ("padding", _pair(pool.padding)),
    )


# --- normalisation ------------------------------------------------------------------------------------------


class _Normalising(Map):
    """y = (x - mean) / sqrt(variance + epsilon) over some of the numbers of a batch."""

    is_linear: ClassVar[bool] = False

    def region(self, shape: Shape) -> Options:
        """What mean and variance are taken over."""
        raise NotImplementedError

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("normalise", out, use.value(0), options=self.region(use.shape))

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
            use.emit("normalise_pull", out, v, use.value(0), options=self.region(use.shape))

        use.delivered(write, "slope", _size(use.shape), into, addend, scale, scalar)


@dataclass(frozen=True)
class Normalise(_Normalising):
    """y = (x - mean) / sqrt(variance + epsilon), over the last `axes` axes of each sample; no weights."""

    axes: int = 1
    epsilon: float = 1e-5
    kind: ClassVar[str] = "normalise"

    def __post_init__(self) -> None:
        require_count("axes", self.axes, least=1)
        require_finite_positive("epsilon", self.epsilon)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        if self.axes > len(shapes[0]):
            raise ValueError(
                f"a sample of shape {list(shapes[0])} has no {self.axes} axes to normalise over."
            )
        return shapes[0]

    def region(self, shape: Shape) -> Options:
        split = len(shape) - self.axes
        view = (_size(shape[:split]), 1, _size(shape[split:]))
        return (("view", view), ("batch", False), ("epsilon", self.epsilon))


@dataclass(frozen=True)
class NormaliseBatch(_Normalising):
    """The same over batch and image, per channel. It ties the samples of a batch to each other: alone among
    the maps it makes what a sample relaxes to depend on the others.
    """

    epsilon: float = 1e-5
    kind: ClassVar[str] = "normalise_batch"

    def __post_init__(self) -> None:
        require_finite_positive("epsilon", self.epsilon)

    def region(self, shape: Shape) -> Options:
        return (*_channels(shape, 0), ("batch", True), ("epsilon", self.epsilon))


@dataclass(frozen=True)
class Affine(Map):
    """y = x . weight + bias, a pair of numbers per entry of one axis (axis 0: per channel)."""

    axis: int = -1
    bias: bool = True
    kind: ClassVar[str] = "affine"

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        size = shapes[0][_axis(self.axis, shapes[0])]
        return {"weight": (size,), "bias": (size,)} if self.bias else {"weight": (size,)}

    def forward(self, use: Use, out: Slot) -> None:
        options = _channels(use.shape, self.axis)
        use.emit("scale_channels", out, use.value(0), use.weight("weight"), options=options)
        if self.bias:
            use.emit("add_channels", out, out, use.weight("bias"), options=options)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        options = _channels(use.shape, self.axis)
        use.emit("scale_channels", out, change, use.weight("weight"), addend, scale=scale, options=options)

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
        weight, options = use.weight("weight"), _channels(use.shape, self.axis)
        use.emit("scale_channels", into, v, weight, addend, scale=scale, scalar=scalar, options=options)

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        options = _channels(use.shape, self.axis)
        out, addend = use.gradient("weight")
        use.emit("channel_inner", out, use.value(0), v, addend, scale=scale, scalar=scalar, options=options)
        if self.bias:
            _bias_gradient(use, v, scale, scalar, options)


@dataclass(frozen=True)
class Bias(Passing):
    """y = x + bias, a number per entry of the last `axes` axes (positions and units of an embedding).

    trained: False for numbers that no gradient moves, such as positions written down as sines.
    """

    axes: int = 1
    trained: bool = True
    kind: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        require_count("axes", self.axes, least=1)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        if self.axes > len(shapes[0]):
            raise ValueError(f"a sample of shape {list(shapes[0])} has no {self.axes} axes for a bias.")
        return shapes[0]

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        return {"bias": shapes[0][-self.axes :]}

    @property
    def frozen(self) -> tuple[str, ...]:
        return () if self.trained else ("bias",)

    def _options(self, use: Use) -> Options:
        split = len(use.shape) - self.axes
        return (("view", (_size(use.shape[:split]), _size(use.shape[split:]), 1)),)

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("add_channels", out, use.value(0), use.weight("bias"), options=self._options(use))

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        _bias_gradient(use, v, scale, scalar, self._options(use))


@dataclass(frozen=True)
class Standardise(Map):
    """y = (x - running_mean) / sqrt(running_var + epsilon) per channel, with statistics that stand still:
    batch normalisation as torch has it in evaluation.
    """

    epsilon: float = 1e-5
    kind: ClassVar[str] = "standardise"

    def __post_init__(self) -> None:
        require_finite_positive("epsilon", self.epsilon)

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        return {"running_mean": (shapes[0][0],), "running_var": (shapes[0][0],)}

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("running_mean", "running_var")

    def _options(self, use: Use) -> Options:
        return (*_channels(use.shape, 0), ("epsilon", self.epsilon))

    def forward(self, use: Use, out: Slot) -> None:
        options = _channels(use.shape, 0)
        use.emit("add_channels", out, use.value(0), use.weight("running_mean"), scale=-1.0, options=options)
        use.emit("divide_channels", out, out, use.weight("running_var"), options=self._options(use))

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        options, variance = self._options(use), use.weight("running_var")
        use.emit("divide_channels", out, change, variance, addend, scale=scale, options=options)

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
        options, variance = self._options(use), use.weight("running_var")
        use.emit("divide_channels", into, v, variance, addend, scale=scale, scalar=scalar, options=options)


# --- attention ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attend(Map):
    """Scaled dot-product attention of queries, keys and values, [positions, units] each, over heads that
    share the units evenly (Vaswani et al. 2017, eq. 1).

    causal: a position sees itself and those before it.    dropout has no place here.
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
        sizes = [_size(shape) for shape in use.shapes]
        outs = tuple(use.scratch(f"attended{n}_", size) for n, size in enumerate(sizes))
        values = tuple(use.value(n) for n in range(3))
        use.at.code.append(Instruction("attend_pull", outs, (v, *values), options=self._options(use)))
        use.at.add_scaled(outs[number], into, addend, scale, scalar)


MAPS: dict[str, type[Map]] = {
    entry.kind: entry
    for entry in (
        Function,
        Scale,
        Shift,
        Reshape,
        Flatten,
        Permute,
        Fill,
        Slice,
        Add,
        Multiply,
        Concat,
        Linear,
        Conv2d,
        ConvTranspose2d,
        Embedding,
        MaxPool2d,
        AvgPool2d,
        Normalise,
        NormaliseBatch,
        Affine,
        Bias,
        Standardise,
        Attend,
    )
}
