"""Attention, transformer layers and recurrent modules of torch, translated by their parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pctt.layers import maps
from pctt.layers.maps import Function, Scale
from pctt.translate.layers import dropout, layer_norm, linear
from pctt.translate.ops import stack
from pctt.translate.trace import Absent, Reference, Translator, Value, refuse

# --- attention ----------------------------------------------------------------------------------------------


def is_causal(mask: Any, means_allowed: bool) -> bool:
    """Whether a mask is the causal one; False for one that hides nothing.

    means_allowed: what True in a mask of booleans says. Raises Unsupported for other masks.
    """
    advice = "use no mask or the causal one."
    if not isinstance(mask, Tensor):
        refuse("a mask that depends on activities or parameters", advice)
    square = mask.reshape(mask.shape[-2:]) if mask.numel() == math.prod(mask.shape[-2:]) else mask
    if square.dtype == torch.bool:
        allowed = square if means_allowed else ~square
    else:
        allowed = square == 0.0
        if not torch.isneginf(square[~allowed]).all():
            refuse("an attention mask with finite entries", advice)
    if allowed.all():
        return False
    if allowed.dim() != 2 or not torch.equal(allowed, torch.ones_like(allowed).tril()):
        refuse("an attention mask other than the causal one", advice)
    return True


def attend(
    t: Translator,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """functional.scaled_dot_product_attention of samples [positions, units] or [heads, positions, units]."""
    if dropout_p > 0.0:
        refuse("attention with dropout", "use dropout_p=0.")
    causal = is_causal or (attn_mask is not None and _causal(attn_mask, True))
    if enable_gqa or len({len(part.shape) for part in (query, key, value)}) > 1:
        refuse("attention with fewer heads of keys than of queries", "give all the same number of heads.")
    if scale is not None:
        query = t.apply(Scale(scale * math.sqrt(query.shape[-1])), query)
    if len(query.shape) == 2:
        return t.apply(maps.Attend(1, causal), query, key, value)
    heads, positions, _ = query.shape
    y = t.apply(maps.Attend(heads, causal), *(_side_by_side(t, part) for part in (query, key, value)))
    return t.permute(t.reshape(y, (positions, heads, value.shape[-1])), (1, 0, 2))


_causal = is_causal


def _side_by_side(t: Translator, x: Value) -> Value:
    """[heads, positions, units] to [positions, heads * units]"""
    if len(x.shape) != 3:
        refuse(f"attention over samples {list(x.shape)}", "use [heads, positions, units].")
    heads, positions, units = x.shape
    return t.reshape(t.permute(x, (1, 0, 2)), (positions, heads * units))


def attention(
    t: Translator,
    m: Any,
    query: Value,
    key: Value,
    value: Value,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Value, Absent]:
    if key_padding_mask is not None or m.bias_k is not None or m.add_zero_attn:
        refuse("MultiheadAttention with key_padding_mask, add_bias_kv or add_zero_attn", "leave them out.")
    if not m.batch_first:
        refuse("MultiheadAttention with batch_first=False", "make it with batch_first=True.")
    if m.training and m.dropout > 0.0:
        refuse(f"MultiheadAttention with dropout={m.dropout} in training", "call module.eval() first.")
    causal = attn_mask is not None and _causal(attn_mask, False)
    path, units = t.path, m.embed_dim
    projected: list[Value] = []
    for number, (name, x) in enumerate((("q", query), ("k", key), ("v", value))):
        t.part(name)
        if m.in_proj_weight is None:
            weight = t.reference(getattr(m, f"{name}_proj_weight"))
        else:
            weight = _rows(t, m.in_proj_weight, number, units)
        projected.append(linear(t, x, weight, _rows(t, m.in_proj_bias, number, units), f"{path}.{name}"))
    t.part("attend")
    y = t.apply(maps.Attend(m.num_heads, causal), *projected)
    t.part("out_proj")
    y = linear(t, y, m.out_proj.weight, m.out_proj.bias)
    return y, Absent("the shares of an attention (need_weights=True)")


def _rows(t: Translator, stacked: Any, number: int, size: int) -> Reference | None:
    """Of weights that stand one above the other."""
    reference = t.reference(stacked)
    return None if reference is None else reference.view("narrow", 0, number * size, size)


def encoder_layer(
    t: Translator,
    m: Any,
    src: Value,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Value:
    if src_key_padding_mask is not None:
        refuse("TransformerEncoderLayer with src_key_padding_mask", "leave it out.")
    path = t.path

    def normalised(norm: Any, name: str, x: Value) -> Value:
        t.part(name)
        return layer_norm(t, x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def attended(x: Value) -> Value:
        t.path = f"{path}.self_attn" if path else "self_attn"
        y, _ = attention(t, m.self_attn, x, x, x, attn_mask=src_mask)
        t.path = path
        return dropout(t, y, m.dropout1.p, m.dropout1.training)

    def forward(x: Value) -> Value:
        t.part("linear1")
        y = linear(t, x, m.linear1.weight, m.linear1.bias)
        t.part("activation")
        y = dropout(t, t.call(m.activation, y), m.dropout.p, m.dropout.training)
        t.part("linear2")
        y = linear(t, y, m.linear2.weight, m.linear2.bias)
        return dropout(t, y, m.dropout2.p, m.dropout2.training)

    def added(name: str, x: Value, y: Value) -> Value:
        t.part(name)
        return t.apply(maps.Add(), x, y)

    if m.norm_first:
        x = added("add1", src, attended(normalised(m.norm1, "norm1", src)))
        return added("add2", x, forward(normalised(m.norm2, "norm2", x)))
    x = normalised(m.norm1, "norm1", added("add1", src, attended(src)))
    return normalised(m.norm2, "norm2", added("add2", x, forward(x)))


def encoder(
    t: Translator,
    m: Any,
    src: Value,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Value:
    if src_key_padding_mask is not None:
        refuse("TransformerEncoder with src_key_padding_mask", "leave it out.")
    path, x = t.path, src
    for number, layer in enumerate(m.layers):
        t.path = f"{path}.layers.{number}" if path else f"layers.{number}"
        x = t.call(layer, x, mask)
    t.path = path
    if m.norm is not None:
        t.part("norm")
        x = t.call(m.norm, x)
    return x


# --- recurrence ---------------------------------------------------------------------------------------------

State = tuple[Value | None, Value | None]
"""(h, c); None is zeros."""


def _drive(t: Translator, refs: Sequence[Any], x: Value, h: Value | None, units: int) -> tuple[Value, Value]:
    """W_ih x + b_ih and W_hh h + b_hh"""
    w_ih, w_hh, b_ih, b_hh = refs
    name, path = t.name, t.path
    h = t.apply(maps.Fill((units,)), t.roots[0]) if h is None else h
    t.part(f"{name[len(path) :].lstrip('.')}.ih".lstrip("."))
    own = linear(t, x, w_ih, b_ih, f"{path}.ih")
    t.part(f"{name[len(path) :].lstrip('.')}.hh".lstrip("."))
    other = linear(t, h, w_hh, b_hh, f"{path}.hh")
    return own, other


def _step(t: Translator, kind: str, refs: Sequence[Any], units: int, x: Value, state: State) -> State:
    """One step of a cell; `kind` is that of the module: "LSTM", "GRU", "tanh" or "relu"."""
    base = t.name[len(t.path) :].lstrip(".")

    def part(name: str) -> None:
        t.part(f"{base}.{name}" if base else name)

    def entries(value: Value, number: int, name: str, activation: str = "") -> Value:
        part(name)
        own = t.slice(value, 0, number * units, (number + 1) * units)
        return t.apply(Function(activation), own) if activation else own

    def function(name: str, value: Value) -> Value:
        return t.apply(Function(name), value)

    h, c = state
    own, other = _drive(t, refs, x, h, units)
    if kind == "GRU":
        own_r, own_z, own_n = (entries(own, n, f"own_{name}") for n, name in enumerate("rzn"))
        other_r, other_z, other_n = (entries(other, n, f"other_{name}") for n, name in enumerate("rzn"))
        part("r")
        r = function("sigmoid", t.apply(maps.Add(), own_r, other_r))
        part("z")
        z = function("sigmoid", t.apply(maps.Add(), own_z, other_z))
        part("n")
        n = function("tanh", t.apply(maps.Add(), own_n, t.apply(maps.Multiply(), r, other_n)))
        part("h")
        fresh = t.apply(maps.Multiply(), t.apply(maps.Shift(1.0), t.apply(Scale(-1.0), z)), n)
        if h is None:
            return t.apply(Scale(1.0), fresh, ends=True), None
        return t.apply(maps.Add(), fresh, t.apply(maps.Multiply(), z, h), ends=True), None
    part("gates" if kind == "LSTM" else "h")
    drive = t.apply(maps.Add(), own, other, ends=kind == "LSTM")
    if kind != "LSTM":
        return t.apply(Function(kind), drive, ends=True), None
    i, f, o = (entries(drive, n, name, "sigmoid") for n, name in ((0, "i"), (1, "f"), (3, "o")))
    g = entries(drive, 2, "g", "tanh")
    part("c")
    fresh = t.apply(maps.Multiply(), i, g, ends=c is None)
    if c is not None:
        fresh = t.apply(maps.Add(), t.apply(maps.Multiply(), f, c), fresh, ends=True)
    part("h")
    return t.apply(maps.Multiply(), o, function("tanh", fresh), ends=True), fresh


def recurrent(t: Translator, m: Any, x: Value, state: Any = None) -> tuple[Value, Any]:
    """A node per gate and state of every step, with weights shared over the steps."""
    name = type(m).__name__
    if state is not None:
        refuse(f"{name} with an initial state", "leave it out; it is zero.")
    if not m.batch_first or m.bidirectional or getattr(m, "proj_size", 0):
        refuse(f"{name} with batch_first=False, bidirectional or proj_size", "use batch_first=True alone.")
    if m.training and m.dropout > 0.0 and m.num_layers > 1:
        refuse(f"{name} with dropout={m.dropout} in training", "call module.eval() first.")
    kind = m.nonlinearity if isinstance(m, nn.RNN) else name
    path = t.path
    inputs = list[Value]()
    for place in range(x.shape[0]):
        t.part(f"x{place + 1}")
        inputs.append(t.select(x, 0, place))
    last: list[State] = []
    for number in range(m.num_layers):
        keys = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        refs = [t.reference(getattr(m, f"{key}_l{number}", None)) for key in keys]
        state, outputs = (None, None), list[Value]()
        for place, entry in enumerate(inputs):
            t.path = f"{path}.l{number}" if path else f"l{number}"
            t.name = f"{t.path}.t{place + 1}"
            state = _step(t, kind, refs, m.hidden_size, entry, state)
            assert state[0] is not None
            outputs.append(state[0])
        inputs = outputs
        last.append(state)
    t.path = path
    t.part("states")
    whole = stack(t, inputs, 1)
    hidden = [h for h, _ in last]
    return whole, (hidden, [c for _, c in last]) if kind == "LSTM" else hidden


def cell(t: Translator, m: Any, x: Value, state: Any = None) -> Any:
    kind = m.nonlinearity if isinstance(m, nn.RNNCell) else type(m).__name__.removesuffix("Cell")
    refs = [t.reference(part) for part in (m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh)]
    given: State = (None, None)
    if state is not None:
        given = (state[0], state[1]) if kind == "LSTM" else (state, None)
    h, c = _step(t, kind, refs, m.hidden_size, x, given)
    return (h, c) if kind == "LSTM" else h
