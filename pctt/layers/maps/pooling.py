"""Pooling: windows of an image to their largest entry or to their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pctt.layers.maps.base import Map, Options, Shape, Use, check_sizes, image, pair, size_of
from pctt.program import Slot


@dataclass(frozen=True)
class MaxPool2d(Map):
    """The largest of each window; errors go back to where it stood.

    kernel: of the window, in pixels, one number or (height, width).    stride: None for that of the kernel.
    padding: at most half the kernel; what is padded is never the largest.
    """

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

        use.delivered(write, "spread", size_of(use.shapes[0]), into, addend, scale, scalar)


@dataclass(frozen=True)
class AvgPool2d(Map):
    """The mean of each window, padding counted as zeros; errors spread evenly over it. A kernel of 0 is the
    whole image.

    kernel, stride, padding: as of `MaxPool2d`.
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
            check_sizes(pool, name, least)
    if any(
        2 * padding > kernel for padding, kernel in zip(pair(pool.padding), pair(pool.kernel), strict=True)
    ):
        raise ValueError(f"padding must be at most half the kernel {pool.kernel}, got {pool.padding}.")


def _window(pool: MaxPool2d | AvgPool2d, shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel and stride on an image of that shape."""
    kernel = pair(pool.kernel) if pool.kernel != 0 else (shape[1], shape[2])
    return kernel, kernel if pool.stride is None else pair(pool.stride)


def _pooled(pool: MaxPool2d | AvgPool2d, shape: Shape) -> Shape:
    channels, *sizes = image(pool.kind, shape)
    found = [
        (size + 2 * padding - kernel) // stride + 1
        for size, padding, kernel, stride in zip(
            sizes, pair(pool.padding), *_window(pool, shape), strict=True
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
        ("padding", pair(pool.padding)),
    )
