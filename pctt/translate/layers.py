"""What layers, normalisation, pooling and activations of torch become. Functions here take what torch's
functions take, after the translator.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pctt.layers import maps
from pctt.layers.maps import Function, Scale
from pctt.translate.trace import Handler, Reference, Translator, Value, refuse

# --- layers -------------------------------------------------------------------------------------------------


def linear(t: Translator, x: Value, weight: Any, bias: Any = None, label: str = "") -> Value:
    """torch's weight is [out, in], pctt's [in, out]."""
    matrix = _weight(t, weight).view("t")
    units = matrix.tensor.shape[1]
    return t.apply(
        maps.Linear(units, bias is not None), x, label=label, weight=matrix, bias=t.reference(bias)
    )


def _weight(t: Translator, weight: Any) -> Reference:
    reference = t.reference(weight)
    if reference is None:
        refuse("an operation without its weight", "give it one.")
    return reference


def matmul(t: Translator, x: Any, other: Any) -> Value:
    if not isinstance(x, Value) or not isinstance(other, Reference) or other.tensor.dim() != 2:
        refuse("a matrix product of two activities", "use functional.scaled_dot_product_attention or mul.")
    return t.apply(maps.Linear(other.tensor.shape[1], False), x, weight=other)


def conv2d(
    t: Translator,
    x: Value,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    kernel = _weight(t, weight)
    channels, _, *sizes = kernel.tensor.shape
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spans = [d * (size - 1) for d, size in zip(_pair(dilation), sizes, strict=True)]
        if any(span % 2 for span in spans):
            refuse("padding='same' of an even kernel", "pad by a number, or use an odd kernel.")
        padding = (spans[0] // 2, spans[1] // 2)
    map_ = maps.Conv2d(
        channels,
        (sizes[0], sizes[1]),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        groups,
        bias is not None,
    )
    return t.apply(map_, x, weight=kernel, bias=t.reference(bias))


def conv_transpose2d(
    t: Translator,
    x: Value,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    if _pair(dilation) != (1, 1):
        refuse("conv_transpose2d with dilation", "use dilation=1.")
    kernel = _weight(t, weight)
    _, channels, height, width = kernel.tensor.shape
    map_ = maps.ConvTranspose2d(
        channels * groups,
        (height, width),
        _pair(stride),
        _pair(padding),
        _pair(output_padding),
        groups,
        bias is not None,
    )
    return t.apply(map_, x, weight=kernel, bias=t.reference(bias))


def _pair(size: Any) -> tuple[int, int]:
    sizes = (size,) * 2 if isinstance(size, int) else tuple(size) * (2 if len(size) == 1 else 1)
    return int(sizes[0]), int(sizes[1])


def embedding(
    t: Translator,
    x: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    del norm_type
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse:
        refuse("embedding with padding_idx, max_norm, scale_grad_by_freq or sparse", "leave them out.")
    table = _weight(t, weight)
    if isinstance(x, Tensor):  # of constant positions: rows of the table in order, added as they are
        places = x.reshape(-1)
        if not torch.equal(places, torch.arange(len(places))):
            refuse("an embedding of constant numbers that are not 0, 1, 2, ...", "use torch.arange(n).")
        rows = table if len(places) == len(table.tensor) else table.view("narrow", 0, 0, len(places))
        return rows if x.dim() == 1 else rows.view("view", (*x.shape, table.tensor.shape[1]))
    num, units = table.tensor.shape
    if isinstance(x, Value) and not x.shape:  # one symbol per sample
        return t.reshape(t.apply(maps.Embedding(num, units), replace(x, shape=(1,)), weight=table), (units,))
    return t.apply(maps.Embedding(num, units), x, weight=table)


# --- normalisation ------------------------------------------------------------------------------------------


def batch_norm(
    t: Translator,
    x: Value,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    """In training over the batch; the running statistics are then left as they are."""
    del momentum
    if training:
        y = t.apply(maps.NormaliseBatch(eps), x)
    else:
        mean, variance = t.reference(running_mean), t.reference(running_var)
        y = t.apply(maps.Standardise(eps), x, running_mean=mean, running_var=variance)
    return _affine(t, y, weight, bias, 0)


def _affine(t: Translator, y: Value, weight: Any, bias: Any, axis: int) -> Value:
    if weight is None and bias is None:
        return y
    if weight is None:
        refuse("a normalisation with a bias and no weight", "give it both or none.")
    affine = maps.Affine(axis, bias is not None)
    return t.apply(affine, y, weight=t.reference(weight), bias=t.reference(bias))


def layer_norm(
    t: Translator, x: Value, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Value:
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if x.shape[-len(sizes) :] != sizes:
        refuse(f"layer_norm over {list(sizes)} of a sample {list(x.shape)}", "let the shapes agree.")
    y = t.apply(maps.Normalise(len(sizes), eps), x)
    if len(sizes) == 1 or (weight is None and bias is None):
        return _affine(t, y, weight, bias, -1)
    flat = t.reshape(y, (*x.shape[: -len(sizes)], math.prod(sizes)))
    weight, bias = t.reference(weight), t.reference(bias)
    weight, bias = (None if part is None else part.view("view", -1) for part in (weight, bias))
    return t.reshape(_affine(t, flat, weight, bias, -1), x.shape)


def group_norm(
    t: Translator, x: Value, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Value:
    grouped = t.reshape(x, (num_groups, math.prod(x.shape) // num_groups))
    y = t.reshape(t.apply(maps.Normalise(1, eps), grouped), x.shape)
    return _affine(t, y, weight, bias, 0)


# --- pooling and means --------------------------------------------------------------------------------------


def max_pool2d(
    t: Translator,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    if _pair(dilation) != (1, 1) or ceil_mode or return_indices:
        refuse("max_pool2d with dilation, ceil_mode or return_indices", "leave them out.")
    return t.apply(maps.MaxPool2d(_pair(kernel_size), _pair(stride or kernel_size), _pair(padding)), x)


def avg_pool2d(
    t: Translator,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    uncounted = not count_include_pad and _pair(padding) != (0, 0)
    if ceil_mode or divisor_override is not None or uncounted:
        refuse(
            "avg_pool2d with ceil_mode, divisor_override or padding that does not count", "leave them out."
        )
    return t.apply(maps.AvgPool2d(_pair(kernel_size), _pair(stride or kernel_size), _pair(padding)), x)


def adaptive_avg_pool2d(t: Translator, x: Value, output_size: Any) -> Value:
    wanted: tuple[Any, ...] = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    sizes = x.shape[1:]
    wanted = tuple(size if new is None else new for new, size in zip(wanted, sizes, strict=True))
    if any(size % new for new, size in zip(wanted, sizes, strict=True)):
        refuse(f"adaptive_avg_pool2d from {list(sizes)} to {list(wanted)}", "use sizes that divide.")
    kernel = _pair([size // new for new, size in zip(wanted, sizes, strict=True)])
    return x if kernel == (1, 1) else t.apply(maps.AvgPool2d(kernel, kernel), x)


def mean(t: Translator, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    """Over neighbouring axes: the mean of a window that is all of them."""
    if dim is None or dtype is not None:
        refuse("a mean over the batch, or in another dtype", "name axes of a sample, mean(1).")
    axes = sorted(t.axis(x, entry) for entry in ([dim] if isinstance(dim, int) else dim))
    first, after = axes[0], axes[-1] + 1
    if axes != list(range(first, after)):
        refuse("a mean over axes that are no neighbours", "take one mean after the other.")
    size = math.prod(x.shape[first:after])
    shape = (math.prod(x.shape[:first]), size, math.prod(x.shape[after:]))
    y = t.apply(maps.AvgPool2d((size, 1), (size, 1)), t.reshape(x, shape))
    left = (1,) * (after - first) if keepdim else ()
    return t.reshape(y, (*x.shape[:first], *left, *x.shape[after:]))


def total(t: Translator, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    y = mean(t, x, dim, keepdim, dtype)
    return t.apply(Scale(float(math.prod(x.shape) // math.prod(y.shape))), y)


# --- activations --------------------------------------------------------------------------------------------


def _activation(name: str) -> Handler:
    def handler(t: Translator, x: Value, inplace: bool = False) -> Value:
        del inplace
        return t.apply(Function(name), x)

    return handler


relu, tanh, sigmoid, silu = map(_activation, ("relu", "tanh", "sigmoid", "silu"))


def gelu(t: Translator, x: Value, approximate: str = "none") -> Value:
    if approximate != "none":
        refuse(f"gelu with approximate={approximate!r}", "use the exact one, approximate='none'.")
    return t.apply(Function("gelu"), x)


def leaky_relu(t: Translator, x: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    del inplace
    if negative_slope != 0.01:
        refuse(f"leaky_relu with negative_slope={negative_slope}", "use 0.01, the one that pctt has.")
    return t.apply(Function("leaky_relu"), x)


def hardtanh(
    t: Translator, x: Value, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False
) -> Value:
    del inplace
    if (min_val, max_val) != (-1.0, 1.0):
        refuse(f"hardtanh or clamp to [{min_val}, {max_val}]", "use the range [-1, 1].")
    return t.apply(Function("hard_tanh"), x)


def clamp(t: Translator, x: Value, min: Any = None, max: Any = None) -> Value:
    return relu(t, x) if (min, max) == (0, None) else hardtanh(t, x, min, max)


def softmax(t: Translator, x: Value, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
    if dim is None or dtype is not None or t.axis(x, dim) != len(x.shape) - 1:
        refuse(f"softmax over dim={dim}", "let it run over the last axis, dim=-1, in the dtype of its input.")
    return t.apply(Function("softmax"), x)


def log_softmax(t: Translator, x: Value, *arguments: Any, **options: Any) -> Value:
    refuse(
        "log_softmax",
        "let the module return logits and give energy=pctt.Categorical(), which is log-softmax and negative "
        "log-likelihood in one.",
    )


def dropout(t: Translator, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training and p > 0.0:
        refuse(f"dropout with p={p} in training", "call module.eval() first, or set p=0.")
    return x


def same(t: Translator, x: Value, *arguments: Any, **options: Any) -> Value:
    return x


def to_whole(t: Translator, x: Value) -> Value:
    """Whole numbers are stored as floats; only inputs, and parts of them, hold any."""
    ahead = [x]
    while ahead:
        value = ahead.pop()
        if value.kind not in ("", "slice", "reshape", "flatten", "permute", "concat"):
            refuse("activities made whole numbers", "leave out long() and int(), unless of an input.")
        ahead += value.inputs
    return x
