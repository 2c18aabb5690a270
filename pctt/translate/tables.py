"""Which module, function and method of torch becomes what."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pctt.translate import layers as layers
from pctt.translate import ops as ops
from pctt.translate import parts as parts
from pctt.translate.trace import Handler, Translator, Value, refuse

# --- modules ------------------------------------------------------------------------------------------------


def _conv_module(t: Translator, m: Any, x: Value) -> Value:
    if m.padding_mode != "zeros":
        refuse(f"{type(m).__name__} with padding_mode={m.padding_mode!r}", "pad with zeros.")
    return layers.conv2d(t, x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def _conv_transpose_module(t: Translator, m: Any, x: Value, output_size: Any = None) -> Value:
    if output_size is not None:
        refuse("ConvTranspose2d with output_size", "give output_padding to the module instead.")
    return layers.conv_transpose2d(
        t, x, m.weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation
    )


def _batch_norm_module(t: Translator, m: Any, x: Value) -> Value:
    batch = m.training or m.running_mean is None
    return layers.batch_norm(t, x, m.running_mean, m.running_var, m.weight, m.bias, batch, 0.1, m.eps)


def _embedding_module(t: Translator, m: Any, x: Any) -> Any:
    return layers.embedding(t, x, m.weight, m.padding_idx, m.max_norm, 2.0, m.scale_grad_by_freq, m.sparse)


MODULES: dict[type, Handler] = {
    nn.Linear: lambda t, m, x: layers.linear(t, x, m.weight, m.bias),
    nn.Conv2d: _conv_module,
    nn.ConvTranspose2d: _conv_transpose_module,
    nn.Embedding: _embedding_module,
    nn.BatchNorm1d: _batch_norm_module,
    nn.BatchNorm2d: _batch_norm_module,
    nn.LayerNorm: lambda t, m, x: layers.layer_norm(t, x, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.GroupNorm: lambda t, m, x: layers.group_norm(t, x, m.num_groups, m.weight, m.bias, m.eps),
    nn.MaxPool2d: lambda t, m, x: layers.max_pool2d(
        t, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda t, m, x: layers.avg_pool2d(
        t, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda t, m, x: layers.adaptive_avg_pool2d(t, x, m.output_size),
    nn.Flatten: lambda t, m, x: ops.flatten(t, x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda t, m, x: ops.unflatten(t, x, m.dim, m.unflattened_size),
    nn.Identity: lambda t, m, x: x,
    nn.Dropout: lambda t, m, x: layers.dropout(t, x, m.p, m.training),
    nn.Dropout1d: lambda t, m, x: layers.dropout(t, x, m.p, m.training),
    nn.Dropout2d: lambda t, m, x: layers.dropout(t, x, m.p, m.training),
    nn.ReLU: lambda t, m, x: layers.relu(t, x),
    nn.LeakyReLU: lambda t, m, x: layers.leaky_relu(t, x, m.negative_slope),
    nn.Tanh: lambda t, m, x: layers.tanh(t, x),
    nn.Sigmoid: lambda t, m, x: layers.sigmoid(t, x),
    nn.GELU: lambda t, m, x: layers.gelu(t, x, m.approximate),
    nn.SiLU: lambda t, m, x: layers.silu(t, x),
    nn.Hardtanh: lambda t, m, x: layers.hardtanh(t, x, m.min_val, m.max_val),
    nn.Softmax: lambda t, m, x: layers.softmax(t, x, m.dim),
    nn.MultiheadAttention: parts.attention,
    nn.TransformerEncoderLayer: parts.encoder_layer,
    nn.TransformerEncoder: parts.encoder,
    nn.RNN: parts.recurrent,
    nn.LSTM: parts.recurrent,
    nn.GRU: parts.recurrent,
    nn.RNNCell: parts.cell,
    nn.LSTMCell: parts.cell,
    nn.GRUCell: parts.cell,
    nn.LogSoftmax: lambda t, m, x: layers.log_softmax(t, x),
}

_BOTH: dict[str, Callable[..., Any]] = {
    "relu": layers.relu,
    "tanh": layers.tanh,
    "sigmoid": layers.sigmoid,
    "softmax": layers.softmax,
    "log_softmax": layers.log_softmax,
    "clamp": layers.clamp,
    "add": ops.add,
    "sub": ops.sub,
    "mul": ops.mul,
    "multiply": ops.mul,
    "div": ops.div,
    "neg": ops.neg,
    "pow": ops.power,
    "square": ops.square,
    "matmul": layers.matmul,
    "mean": layers.mean,
    "sum": layers.total,
    "reshape": ops.reshape,
    "flatten": ops.flatten,
    "unflatten": ops.unflatten,
    "unsqueeze": ops.unsqueeze,
    "squeeze": ops.squeeze,
    "permute": ops.permute,
    "transpose": ops.transpose,
    "swapaxes": ops.transpose,
    "chunk": ops.chunk,
    "split": ops.split,
    "narrow": ops.narrow,
    "select": ops.select,
    "unbind": ops.unbind,
}
"""What torch has as a function and as a method."""

METHODS: dict[str, Handler] = {
    **_BOTH,
    "view": ops.reshape,
    "size": ops.size,
    "dim": ops.dimensions,
    "contiguous": layers.same,
    "clone": layers.same,
    "long": layers.to_whole,
    "int": layers.to_whole,
    "new_zeros": ops.new_zeros,
}

FUNCTIONS: dict[Any, Handler] = {
    **{getattr(torch, name): handler for name, handler in _BOTH.items()},
    **{
        getattr(functional, name): handler
        for name, handler in {
            "linear": layers.linear,
            "conv2d": layers.conv2d,
            "conv_transpose2d": layers.conv_transpose2d,
            "scaled_dot_product_attention": parts.attend,
            "embedding": layers.embedding,
            "batch_norm": layers.batch_norm,
            "layer_norm": layers.layer_norm,
            "group_norm": layers.group_norm,
            "max_pool2d": layers.max_pool2d,
            "avg_pool2d": layers.avg_pool2d,
            "adaptive_avg_pool2d": layers.adaptive_avg_pool2d,
            "relu": layers.relu,
            "relu_": layers.relu,
            "tanh": layers.tanh,
            "sigmoid": layers.sigmoid,
            "silu": layers.silu,
            "gelu": layers.gelu,
            "leaky_relu": layers.leaky_relu,
            "leaky_relu_": layers.leaky_relu,
            "hardtanh": layers.hardtanh,
            "hardtanh_": layers.hardtanh,
            "softmax": layers.softmax,
            "log_softmax": layers.log_softmax,
            "dropout": layers.dropout,
            "dropout1d": layers.dropout,
            "dropout2d": layers.dropout,
        }.items()
    },
    torch.max_pool2d: layers.max_pool2d,
    torch.rsub: ops.rsub,
    torch.cat: ops.cat,
    torch.concat: ops.cat,
    torch.stack: ops.stack,
    torch.clone: layers.same,
    torch.zeros_like: ops.zeros_like,
    operator.add: ops.add,
    operator.iadd: ops.add,
    operator.sub: ops.sub,
    operator.isub: ops.sub,
    operator.mul: ops.mul,
    operator.imul: ops.mul,
    operator.truediv: ops.div,
    operator.itruediv: ops.div,
    operator.neg: ops.neg,
    operator.pow: ops.power,
    operator.matmul: layers.matmul,
    operator.getitem: ops.getitem,
    getattr: ops.attribute,
}
