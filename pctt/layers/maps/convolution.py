"""Convolution over images, and its transpose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pctt._checks import require_count
from pctt.layers.maps.base import (
    Map,
    Options,
    Shape,
    Use,
    bias_gradient,
    channels_of,
    check_sizes,
    image,
    pair,
)
from pctt.program import Slot


@dataclass(frozen=True)
class Conv2d(Map):
    """Convolution over [channels, height, width]; the weight is [out, in / groups, height, width].

    channels: of the output.    kernel, stride, padding, dilation: in pixels, one number or (height, width).
    groups: parts that the channels of input and output divide into, each reading its own.
    bias: whether there is one, a number per channel.

    Raises ValueError for sizes out of range, and where an image is smaller than the kernel.
    """

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
            check_sizes(self, name, least)

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        channels, *sizes = image(self.kind, shapes[0])
        if channels % self.groups or self.channels % self.groups:
            raise ValueError(
                f"{channels} and {self.channels} channels do not divide into {self.groups} groups."
            )
        found = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                sizes,
                pair(self.padding),
                pair(self.dilation),
                pair(self.kernel),
                pair(self.stride),
                strict=True,
            )
        ]
        if min(found) < 1:
            raise ValueError(f"a kernel of {pair(self.kernel)} does not fit into an image of {tuple(sizes)}.")
        return (self.channels, *found)

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        weight: dict[str, Shape] = {
            "weight": (self.channels, shapes[0][0] // self.groups, *pair(self.kernel))
        }
        return {**weight, "bias": (self.channels,)} if self.bias else weight

    def fans(self, shapes: Sequence[Shape]) -> tuple[int, int]:
        area = math.prod(pair(self.kernel))
        return shapes[0][0] // self.groups * area, self.channels // self.groups * area

    def _options(self, use: Use) -> Options:
        return (
            ("shape", use.shapes[0]),
            ("out_shape", use.shape),
            ("kernel", (self.channels, use.shapes[0][0] // self.groups, *pair(self.kernel))),
            ("stride", pair(self.stride)),
            ("padding", pair(self.padding)),
            ("dilation", pair(self.dilation)),
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
            bias_gradient(use, v, scale, scalar, channels_of(use.shape, 0))


@dataclass(frozen=True)
class ConvTranspose2d(Map):
    """The transpose of a convolution; the weight is [in, out / groups, height, width], as in torch.

    channels, kernel, stride, padding, groups, bias: as of `Conv2d`.
    output_padding: pixels added to one side of the result, below the stride.

    Raises ValueError for sizes out of range.
    """

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
            check_sizes(self, name, least)
        if any(
            extra >= stride
            for extra, stride in zip(pair(self.output_padding), pair(self.stride), strict=True)
        ):
            raise ValueError(
                f"output_padding must be below the stride {self.stride}, got {self.output_padding}."
            )

    def output_shape(self, shapes: Sequence[Shape]) -> Shape:
        channels, *sizes = image(self.kind, shapes[0])
        if channels % self.groups or self.channels % self.groups:
            raise ValueError(
                f"{channels} and {self.channels} channels do not divide into {self.groups} groups."
            )
        found = [
            (size - 1) * stride - 2 * padding + kernel + extra
            for size, padding, kernel, stride, extra in zip(
                sizes,
                pair(self.padding),
                pair(self.kernel),
                pair(self.stride),
                pair(self.output_padding),
                strict=True,
            )
        ]
        if min(found) < 1:
            raise ValueError(f"nothing is left of an image of {tuple(sizes)} after padding {self.padding}.")
        return (self.channels, *found)

    def weight_shapes(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        weight: dict[str, Shape] = {
            "weight": (shapes[0][0], self.channels // self.groups, *pair(self.kernel))
        }
        return {**weight, "bias": (self.channels,)} if self.bias else weight

    def fans(self, shapes: Sequence[Shape]) -> tuple[int, int]:
        area = math.prod(pair(self.kernel))
        return shapes[0][0] // self.groups * area, self.channels // self.groups * area

    def _options(self, use: Use) -> Options:
        # Those of the convolution that this one is the transpose of, from its output to its input.
        return (
            ("shape", use.shape),
            ("out_shape", use.shapes[0]),
            ("kernel", (use.shapes[0][0], self.channels // self.groups, *pair(self.kernel))),
            ("stride", pair(self.stride)),
            ("padding", pair(self.padding)),
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
            bias_gradient(use, v, scale, scalar, channels_of(use.shape, 0))
