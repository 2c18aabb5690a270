"""Normalisation over a region of a sample or over the batch, and what is done per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pctt._checks import require_count, require_finite_positive
from pctt.layers.maps.base import (
    Map,
    Options,
    Passing,
    Shape,
    Use,
    axis_of,
    bias_gradient,
    channels_of,
    size_of,
)
from pctt.program import Slot


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

        use.delivered(write, "slope", size_of(use.shape), into, addend, scale, scalar)


@dataclass(frozen=True)
class Normalise(_Normalising):
    """y = (x - mean) / sqrt(variance + epsilon), over the last `axes` axes of each sample; no weights (layer
    normalisation, Ba, Kiros & Hinton 2016, without its affine part, which is `Affine`).
    """

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
        view = (size_of(shape[:split]), 1, size_of(shape[split:]))
        return (("view", view), ("batch", False), ("epsilon", self.epsilon))


@dataclass(frozen=True)
class NormaliseBatch(_Normalising):
    """The same over batch and image, per channel. It ties the samples of a batch to each other: alone among
    the maps it makes what a sample relaxes to depend on the others.

    epsilon: added to the variance, above 0.
    """

    epsilon: float = 1e-5
    kind: ClassVar[str] = "normalise_batch"

    def __post_init__(self) -> None:
        require_finite_positive("epsilon", self.epsilon)

    def region(self, shape: Shape) -> Options:
        return (*channels_of(shape, 0), ("batch", True), ("epsilon", self.epsilon))


@dataclass(frozen=True)
class Affine(Map):
    """y = x . weight + bias, a pair of numbers per entry of one axis.

    axis: of a sample; 0 is per channel of an image, -1 per unit.    bias: whether there is one.
    """

    axis: int = -1
    bias: bool = True
    kind: ClassVar[str] = "affine"

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        size = shapes[0][axis_of(self.axis, shapes[0])]
        return {"weight": (size,), "bias": (size,)} if self.bias else {"weight": (size,)}

    def forward(self, use: Use, out: Slot) -> None:
        options = channels_of(use.shape, self.axis)
        use.emit("scale_channels", out, use.value(0), use.weight("weight"), options=options)
        if self.bias:
            use.emit("add_channels", out, out, use.weight("bias"), options=options)

    def push(self, use: Use, number: int, change: Slot, out: Slot, addend: Slot | None, scale: float) -> None:
        options = channels_of(use.shape, self.axis)
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
        weight, options = use.weight("weight"), channels_of(use.shape, self.axis)
        use.emit("scale_channels", into, v, weight, addend, scale=scale, scalar=scalar, options=options)

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        options = channels_of(use.shape, self.axis)
        out, addend = use.gradient("weight")
        use.emit("channel_inner", out, use.value(0), v, addend, scale=scale, scalar=scalar, options=options)
        if self.bias:
            bias_gradient(use, v, scale, scalar, options)


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
        return (("view", (size_of(use.shape[:split]), size_of(use.shape[split:]), 1)),)

    def forward(self, use: Use, out: Slot) -> None:
        use.emit("add_channels", out, use.value(0), use.weight("bias"), options=self._options(use))

    def gradient(self, use: Use, v: Slot, scale: float, scalar: str) -> None:
        bias_gradient(use, v, scale, scalar, self._options(use))


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
        return (*channels_of(use.shape, 0), ("epsilon", self.epsilon))

    def forward(self, use: Use, out: Slot) -> None:
        options = channels_of(use.shape, 0)
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
