"""The reference's operations behind the maps of `layers/maps/`: convolution, pooling, normalisation,
attention and what moves numbers about. Shapes and windows stand in an instruction's options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pctt.program import Instruction

Call = Callable[[], object]
Scalars = Mapping[str, float]
Compute = Callable[[list[Tensor], dict[str, Any]], Tensor]

aten = torch.ops.aten


def linear(num_operands: int, compute: Compute) -> Callable[..., Call]:
    """An operation out = addend + s compute(operands); without an addend out = s compute(operands)."""

    def build(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
        (out,), operands, addends = outs, inputs[:num_operands], inputs[num_operands:]
        options, scale, name = dict(instruction.options), instruction.scale, instruction.scalar
        addend, out = _spread(addends[0], out, options) if addends else (None, out)

        def run() -> None:
            factor = scale if name is None else scale * scalars[name]
            result = compute(operands, options).reshape(out.shape)
            if addend is not None:
                torch.add(addend, result, alpha=factor, out=out)
            elif factor == 1.0:
                out.copy_(result)
            else:
                torch.mul(result, factor, out=out)

        return run

    return build


def _spread(addend: Tensor, out: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Both in shapes that add: of a bias per channel and images, views of them by channel."""
    if addend.shape == out.shape or "out_shape" not in options:
        return addend, out
    channels = addend.shape[-1]
    return addend.view(channels, 1), out.view(-1, channels, out.shape[-1] // channels)


def whole(compute: Compute) -> Callable[..., Call]:
    """An operation out = compute(inputs)."""

    def build(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
        (out,), options = outs, dict(instruction.options)
        return lambda: out.copy_(compute(inputs, options).reshape(out.shape))

    return build


# --- convolution --------------------------------------------------------------------------------------------


def _images(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat.view(-1, *shape)


def _convolve(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    a, weight = operands
    return functional.conv2d(
        _images(a, options["shape"]),
        weight.view(options["kernel"]),
        None,
        options["stride"],
        options["padding"],
        options["dilation"],
        options["groups"],
    )


def _convolve_transposed(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    v, weight = operands
    images = v.new_empty(()).expand(v.numel() // _numel(options["out_shape"]), *options["shape"])
    return _convolution_backward(_images(v, options["out_shape"]), images, weight, options, 0)


def _convolve_outer(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    a, v = operands
    weight = a.new_empty(()).expand(options["kernel"])
    return _convolution_backward(
        _images(v, options["out_shape"]), _images(a, options["shape"]), weight, options, 1
    )


def _convolution_backward(
    v: Tensor, images: Tensor, weight: Tensor, options: Mapping[str, Any], which: int
) -> Tensor:
    mask = [which == 0, which == 1, False]
    return aten.convolution_backward(
        v,
        images,
        weight.view(options["kernel"]) if which == 0 else weight,
        None,
        options["stride"],
        options["padding"],
        options["dilation"],
        False,
        [0, 0],
        options["groups"],
        mask,
    )[which]


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


# --- pooling ------------------------------------------------------------------------------------------------


def _pool_max(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    images = _images(operands[0], options["shape"])
    return functional.max_pool2d(images, options["kernel"], options["stride"], options["padding"])


def _unpool_max(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    v, a = operands
    images, window = (
        _images(a, options["shape"]),
        (options["kernel"], options["stride"], options["padding"], (1, 1), False),
    )
    places = aten.max_pool2d_with_indices(images, *window)[1]
    return aten.max_pool2d_with_indices_backward(_images(v, options["out_shape"]), images, *window, places)


def _pool_mean(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    images = _images(operands[0], options["shape"])
    return functional.avg_pool2d(images, options["kernel"], options["stride"], options["padding"])


def _unpool_mean(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    v = _images(operands[0], options["out_shape"])
    images = v.new_empty(()).expand(len(v), *options["shape"])
    window = options["kernel"], options["stride"], options["padding"]
    return aten.avg_pool2d_backward(v, images, *window, False, True, None)


# --- parts and channels -------------------------------------------------------------------------------------


def _take(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    return operands[0].view(-1, *options["view"]).narrow(2, options["start"], options["length"])


def _permute(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    return operands[0].view(-1, *options["shape"]).permute(0, *(axis + 1 for axis in options["axes"]))


def _put(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    outer, size, inner = options["view"]
    part = operands[0].view(-1, outer, options["length"], inner)
    after = size - options["start"] - options["length"]
    return functional.pad(part, (0, 0, options["start"], after))


def _add_channels(
    instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars
) -> Call:
    (out,), (a, row), view = outs, inputs, dict(instruction.options)["view"]
    out, a = out.view(-1, *view), a.view(-1, *view)
    return lambda: torch.add(a, row.view(-1, 1), alpha=instruction.scale, out=out)


def _scale_channels(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    a, row = operands
    return a.view(-1, *options["view"]) * row.view(-1, 1)


def _divide_channels(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    a, variance = operands
    return a.view(-1, *options["view"]) * (variance + options["epsilon"]).rsqrt().view(-1, 1)


def _channel_sum(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    return operands[0].view(-1, *options["view"]).sum((0, 1, 3))


def _channel_inner(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    a, v = (tensor.view(-1, *options["view"]) for tensor in operands)
    return (a * v).sum((0, 1, 3))


# --- normalisation ------------------------------------------------------------------------------------------


def _axes(options: Mapping[str, Any]) -> tuple[int, ...]:
    return (0, 1, 3) if options["batch"] else (3,)


def _normalise(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    return _standard(operands[0].view(-1, *options["view"]), options)[0]


def _standard(a: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(a - mean) / deviation, and 1 / deviation."""
    variance, mean = torch.var_mean(a, _axes(options), correction=0, keepdim=True)
    inverse = (variance + options["epsilon"]).rsqrt()
    return (a - mean) * inverse, inverse


def _normalise_pull(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    v, a = (tensor.view(-1, *options["view"]) for tensor in operands)
    y, inverse = _standard(a, options)
    axes = _axes(options)
    return inverse * (v - v.mean(axes, keepdim=True) - y * (v * y).mean(axes, keepdim=True))


# --- tables and attention -----------------------------------------------------------------------------------


def _embed(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    numbers, table = operands
    return table[numbers.long()]


def _embed_outer(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    numbers, v = operands
    rows = v.view(numbers.numel(), -1)
    table = rows.new_zeros(options["num"], rows.shape[-1])
    return table.index_add_(0, numbers.long().view(-1), rows)


def _heads(flat: Tensor, shape: tuple[int, ...], heads: int) -> Tensor:
    """[B, heads, positions, units of a head]"""
    positions, units = shape
    return flat.view(-1, positions, heads, units // heads).transpose(1, 2)


def _attention(operands: list[Tensor], options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    shapes, heads = options["shapes"], options["heads"]
    queries, keys, values = (_heads(flat, shape, heads) for flat, shape in zip(operands, shapes, strict=True))
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5
    if options["causal"]:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return queries, keys, values, scores.softmax(-1)


def _attend(operands: list[Tensor], options: Mapping[str, Any]) -> Tensor:
    _, _, values, shares = _attention(operands, options)
    return (shares @ values).transpose(1, 2)


def _attend_pull(
    instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars
) -> Call:
    v, *operands = inputs
    options = dict(instruction.options)
    shapes, heads = options["shapes"], options["heads"]

    def run() -> None:
        queries, keys, values, shares = _attention(operands, options)
        signal = _heads(v, (shapes[0][0], shapes[2][1]), heads)
        slopes = signal @ values.mT
        slopes = shares * (slopes - (slopes * shares).sum(-1, keepdim=True)) * queries.shape[-1] ** -0.5
        found = (slopes @ keys, slopes.mT @ queries, shares.mT @ signal)
        for out, result in zip(outs, found, strict=True):
            out.copy_(result.transpose(1, 2).reshape(out.shape))

    return run


def _shift(instruction: Instruction, outs: list[Tensor], inputs: list[Tensor], scalars: Scalars) -> Call:
    return lambda: torch.add(inputs[0], instruction.scale, out=outs[0])


LINEAR: dict[str, tuple[int, Compute]] = {
    "convolve": (2, _convolve),
    "convolve_transposed": (2, _convolve_transposed),
    "convolve_outer": (2, _convolve_outer),
    "pool_mean": (1, _pool_mean),
    "unpool_mean": (1, _unpool_mean),
    "take": (1, _take),
    "put": (1, _put),
    "permute": (1, _permute),
    "scale_channels": (2, _scale_channels),
    "divide_channels": (2, _divide_channels),
    "channel_sum": (1, _channel_sum),
    "channel_inner": (2, _channel_inner),
    "embed_outer": (2, _embed_outer),
}
"""Operations that may be scaled and added to something: how many operands each has, and what of them."""

OPERATIONS: dict[str, Callable[..., Call]] = {
    **{name: linear(*entry) for name, entry in LINEAR.items()},
    "pool_max": whole(_pool_max),
    "unpool_max": whole(_unpool_max),
    "shift": _shift,
    "add_channels": _add_channels,
    "normalise": whole(_normalise),
    "normalise_pull": whole(_normalise_pull),
    "embed": whole(_embed),
    "attend": whole(_attend),
    "attend_pull": _attend_pull,
}
