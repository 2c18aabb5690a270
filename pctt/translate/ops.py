"""What arithmetic and changes of shape become. Functions take what torch's functions and methods take, after
the translator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pctt.layers import maps
from pctt.layers.maps import Scale, Shape, Shift
from pctt.translate.trace import BATCH, Reference, Translator, Value, refuse

# --- arithmetic ---------------------------------------------------------------------------------------------


def add(t: Translator, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _sum(t, a, b, 1, alpha)


def sub(t: Translator, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _sum(t, a, b, -1, alpha)


def rsub(t: Translator, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _sum(t, b, a, -1, alpha)


def _sum(t: Translator, a: Any, b: Any, sign: int, alpha: Any) -> Value:
    """a + sign alpha b"""
    if alpha != 1:
        b = mul(t, b, alpha) if isinstance(b, Value) else refuse("alpha of a constant", "multiply first.")
    if isinstance(a, Value) and isinstance(b, Value):
        if a.shape != b.shape:
            refuse(f"add of {list(a.shape)} and {list(b.shape)}", "bring them to one shape; samples only.")
        return t.apply(maps.Add() if sign == 1 else maps.Add((1, -1)), a, b)
    if isinstance(a, Value):
        if sign == 1:
            return _plus(t, a, b)
        if isinstance(b, Reference):  # a - b = -(b - a)
            return _negative(t, _plus(t, _negative(t, a), b))
        return _plus(t, a, -b)
    return _plus(t, b if sign == 1 else _negative(t, b), a)


def _negative(t: Translator, x: Value) -> Value:
    return t.apply(Scale(-1.0), x)


def _plus(t: Translator, x: Value, b: Any) -> Value:
    """x + b, with b a number, a parameter or a constant tensor."""
    if isinstance(b, (int, float)) or (isinstance(b, Tensor) and b.numel() == 1):
        return t.apply(Shift(float(b)), x)
    if not isinstance(b, (Reference, Tensor)):
        refuse(f"add of a {type(b).__name__}", "add activities, parameters and numbers.")
    reference = b if isinstance(b, Reference) else t.constant(b)
    reference = _without_batch(reference, x.shape)
    shape = tuple(reference.tensor.shape)
    if shape != x.shape[len(x.shape) - len(shape) :]:
        refuse(
            f"add of a parameter {list(shape)} to a sample {list(x.shape)}",
            "give it the shape of the last axes.",
        )
    return t.apply(maps.Bias(len(shape), isinstance(b, Reference)), x, bias=reference)


def _without_batch(reference: Reference, shape: Shape) -> Reference:
    """Without leading axes of 1, such as that of the batch."""
    while reference.tensor.dim() > 1 and reference.tensor.shape[0] == 1:
        if reference.tensor.dim() == len(shape) and shape[0] == 1:
            break
        reference = reference.view("squeeze", 0)
    return reference


def mul(t: Translator, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        if a.shape != b.shape:
            refuse(f"mul of {list(a.shape)} and {list(b.shape)}", "bring them to one shape; samples only.")
        return t.apply(maps.Multiply(), a, b)
    x, factor = (a, b) if isinstance(a, Value) else (b, a)
    if isinstance(factor, (int, float)) or (isinstance(factor, Tensor) and factor.numel() == 1):
        return t.apply(Scale(float(factor)), x)
    if not isinstance(factor, Reference):
        refuse("mul of activities and a constant tensor", "use a number, a parameter or activities.")
    factor = _without_batch(factor, x.shape)
    sizes = tuple(factor.tensor.shape)
    aligned = (*(1,) * (len(x.shape) - len(sizes)), *sizes)
    if aligned == x.shape:
        flat = t.reshape(x, (math.prod(x.shape),))
        y = t.apply(maps.Affine(-1, False), flat, weight=_flat(factor))
        return t.reshape(y, x.shape)
    axes = [axis for axis, size in enumerate(aligned) if size != 1]
    if len(aligned) != len(x.shape) or len(axes) != 1 or aligned[axes[0]] != x.shape[axes[0]]:
        refuse(
            f"mul of a sample {list(x.shape)} by a parameter {list(sizes)}",
            "let it have the sample's shape or one axis of it.",
        )
    return t.apply(maps.Affine(axes[0], False), x, weight=_flat(factor))


def _flat(reference: Reference) -> Reference:
    return reference if reference.tensor.dim() == 1 else reference.view("view", -1)


def div(t: Translator, a: Any, b: Any, rounding_mode: Any = None) -> Value:
    number = isinstance(b, (int, float)) or (isinstance(b, Tensor) and b.numel() == 1)
    if not isinstance(a, Value) or not number or rounding_mode is not None:
        refuse("a division by anything but a number", "multiply instead, or divide by a number.")
    return t.apply(Scale(1.0 / float(b)), a)


def neg(t: Translator, x: Value) -> Value:
    return _negative(t, x)


def power(t: Translator, x: Value, exponent: Any) -> Value:
    if not isinstance(x, Value) or exponent != 2:
        refuse(f"pow to {exponent}", "only squares are supported.")
    return t.apply(maps.Multiply(), x, x)


def square(t: Translator, x: Value) -> Value:
    return power(t, x, 2)


# --- shapes -------------------------------------------------------------------------------------------------


def size(t: Translator, x: Value, dim: int | None = None) -> Any:
    sizes = (BATCH, *x.shape)
    return sizes if dim is None else sizes[dim]


def dimensions(t: Translator, x: Value) -> int:
    return len(x.shape) + 1


def attribute(t: Translator, x: Value, name: str) -> Any:
    if name in ("shape", "ndim"):
        return size(t, x) if name == "shape" else dimensions(t, x)
    if name == "mT":
        return transpose(t, x, -1, -2)
    if name in ("device", "dtype"):
        return None  # taken by new_zeros only
    refuse(f"the attribute {name} of an activity", "only shape, ndim, mT, device and dtype are there.")


def reshape(t: Translator, x: Value, *shape: Any) -> Value:
    first, *rest = shape[0] if isinstance(shape[0], (tuple, list)) else shape
    count = math.prod(x.shape)
    if first is not BATCH and first != -1:
        refuse(f"a shape that begins with {first}", "let it begin with -1 or x.size(0), the batch axis.")
    known = [entry for entry in rest if entry != -1]
    if not all(isinstance(entry, int) for entry in rest) or len(rest) - len(known) > (first is BATCH):
        refuse("a shape of unknown sizes", "leave one -1 at most, or x.size(0) for the batch axis.")
    open_size = count // max(math.prod(known), 1)
    wanted = tuple(open_size if entry == -1 else int(entry) for entry in rest)
    if not wanted or math.prod(wanted) != count:
        refuse(
            f"a reshape of a sample {list(x.shape)} to {list(rest)}",
            "numbers cannot move between samples.",
        )
    return t.reshape(x, wanted)


def flatten(t: Translator, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    first, last = t.axis(x, start_dim), t.axis(x, end_dim)
    if (first, last) == (0, len(x.shape) - 1):
        return x if last == 0 else t.apply(maps.Flatten(), x)
    return t.reshape(x, (*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :]))


def unflatten(t: Translator, x: Value, dim: int, sizes: Any) -> Value:
    axis = t.axis(x, dim)
    known = math.prod(entry for entry in sizes if entry != -1)
    parts = [x.shape[axis] // known if entry == -1 else entry for entry in sizes]
    return t.reshape(x, (*x.shape[:axis], *parts, *x.shape[axis + 1 :]))


def unsqueeze(t: Translator, x: Value, dim: int) -> Value:
    axis = dim % (len(x.shape) + 2) - 1
    if axis < 0:
        refuse("unsqueeze(0)", "the batch axis stays first.")
    return t.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))


def squeeze(t: Translator, x: Value, dim: Any = None) -> Value:
    if not isinstance(dim, int):
        refuse("squeeze without an axis", "name it; a batch of one sample would lose its axis.")
    axis = t.axis(x, dim)
    return t.reshape(x, (*x.shape[:axis], *x.shape[axis + 1 :])) if x.shape[axis] == 1 else x


def permute(t: Translator, x: Value, *dims: Any) -> Value:
    entries = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    order = [entry % (len(x.shape) + 1) for entry in entries]
    if order[0] != 0:
        refuse("a permutation that moves the batch axis", "keep axis 0 first.")
    return t.permute(x, tuple(axis - 1 for axis in order[1:]))


def transpose(t: Translator, x: Value, dim0: int, dim1: int) -> Value:
    axes = list(range(len(x.shape)))
    first, second = t.axis(x, dim0), t.axis(x, dim1)
    axes[first], axes[second] = axes[second], axes[first]
    return t.permute(x, tuple(axes))


def cat(t: Translator, tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Value:
    parts = list(tensors)
    if not all(isinstance(part, Value) for part in parts):
        refuse("cat of activities and constants", "concatenate activities only.")
    place = t.axis(parts[0], dim if axis is None else axis)
    return parts[0] if len(parts) == 1 else t.apply(maps.Concat(place), *parts)


def stack(t: Translator, tensors: Sequence[Value], dim: int = 0) -> Value:
    return cat(t, [unsqueeze(t, part, dim) for part in tensors], dim % (len(tensors[0].shape) + 2))


def chunk(t: Translator, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    count = x.shape[t.axis(x, dim)]
    return split(t, x, -(-count // chunks), dim)


def split(t: Translator, x: Value, split_size: Any, dim: int = 0) -> tuple[Value, ...]:
    axis = t.axis(x, dim)
    count = x.shape[axis]
    whole = isinstance(split_size, int)
    sizes = [min(split_size, count - at) for at in range(0, count, split_size)] if whole else split_size
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return tuple(t.slice(x, axis, start, start + own) for start, own in zip(starts, sizes, strict=True))


def narrow(t: Translator, x: Value, dim: int, start: int, length: int) -> Value:
    return t.slice(x, t.axis(x, dim), start, start + length)


def select(t: Translator, x: Value, dim: int, index: int) -> Value:
    axis = t.axis(x, dim)
    return t.select(x, axis, index % x.shape[axis])


def unbind(t: Translator, x: Value, dim: int = 0) -> tuple[Value, ...]:
    axis = t.axis(x, dim)
    return tuple(t.select(x, axis, place) for place in range(x.shape[axis]))


def getitem(t: Translator, x: Value, index: Any) -> Value:
    entries = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        used = sum(entry is not None and entry is not Ellipsis for entry in entries)
        entries[place : place + 1] = [slice(None)] * (len(x.shape) + 1 - used)
    if entries[0] != slice(None):
        refuse("an index into the batch", "samples stay together: begin with a colon, x[:, 0].")
    axis = 0
    for entry in entries[1:]:
        if entry is None:
            x = t.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))
            axis += 1
        elif isinstance(entry, int):
            x = t.select(x, axis, entry % x.shape[axis])
        elif isinstance(entry, slice) and entry.step in (None, 1):
            start, stop, _ = entry.indices(x.shape[axis])
            x = t.slice(x, axis, start, stop)
            axis += 1
        else:
            refuse(f"the index {entry!r}", "use constant numbers and slices without a step.")
    return x


def new_zeros(t: Translator, x: Value, *shape: Any, dtype: Any = None, device: Any = None) -> Value:
    first, *rest = shape[0] if isinstance(shape[0], (tuple, list)) else shape
    if first is not BATCH or not rest:
        refuse("zeros without the batch axis", "let the shape begin with x.size(0).")
    return t.apply(maps.Fill(tuple(rest)), t.roots[0])


def zeros_like(t: Translator, x: Value, **options: Any) -> Value:
    return t.apply(maps.Fill(x.shape), t.roots[0])
