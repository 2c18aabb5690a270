"""Recurrent cells, and how they are unrolled over time into a graph.

    RNN    h = f(x Wx + b + h' Wh)
    LSTM   i, f, o = sigmoid(x Wx + b + h' Wh) each, g = tanh(the same);   c = f c' + i g,   h = o tanh(c)
    GRU    r, z = sigmoid(x Wx + b + h' Wh) each,  n = tanh(x Wx + b + r (h' Wh + b'));   h = n + z (h' - n)

h', c' are those of the step before. This is torch's `RNN`, `LSTM` and `GRU` with its two biases as one, where
they only add up. Every step has nodes of its own and all steps use the weights of the first one, whose
gradients add up. Nodes are called after a letter and the step: x1 is the first input, h0 and c0 are the state
that the sequence begins with, h3 the hidden state after three steps, e1 an embedded token, y1 an output. In a
stack of cells the layer follows: h3.1, h3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pctt._checks import require_count, require_one_of
from pctt.activations import activation
from pctt.describe import Concise
from pctt.energies import Categorical
from pctt.layers.block import Block, Step
from pctt.layers.dense import Dense
from pctt.layers.maps import Add, Embedding, Flatten, Function, Linear, Map, Multiply, Slice
from pctt.network import Network, Weights
from pctt.wiring import graph

Part = tuple[Block, tuple[str, ...]]
"""A block and what it reads: "x", a letter of the same step, or with a stroke, "h'", of the one before."""
NODES = ("state", "gates")


class _Maps:
    """The steps of a block; a call adds one and returns the number of its value."""

    def __init__(self, num_sources: int) -> None:
        self.steps: list[Step] = []
        self._num_sources = num_sources

    def __call__(self, map_: Map, *of: int, name: str = "") -> int:
        self.steps.append(Step(map_, of, name))
        return self._num_sources + len(self.steps) - 1

    def linear(self, units: int, prefix: str = "") -> int:
        """x Wx + b + h' Wh of the first two sources."""
        x = self(Linear(units), 0, name=f"{prefix}x")
        return self(Add(), x, self(Linear(units, bias=False), 1, name=f"{prefix}h"))

    def block(self) -> Block:
        return Block(self.steps)


def _gate(units: int, function: str) -> Part:
    """A gate that is a node: f(x Wx + b + h' Wh)."""
    maps = _Maps(2)
    maps(Function(function), maps.linear(units))
    return maps.block(), ("x", "h'")


@dataclass(frozen=True)
class RNNCell(Concise):
    """h = f(x Wx + b + h' Wh), with h' the h of the step before.

    units: of h.    activation: f, tanh as in torch, or another that acts on each unit.
    """

    units: int
    activation: str = "tanh"

    letters: ClassVar[tuple[str, ...]] = ("h",)

    def __post_init__(self) -> None:
        require_count("units", self.units, least=1)
        activation(self.activation)
        if self.activation == "softmax":
            raise ValueError("activation of a cell must act on each unit, and softmax does not; use tanh.")

    def parts(self) -> dict[str, Part]:
        """{letter of a node: (its block, the letters it reads)} of one step; h' is h of the step before."""
        return {"h": _gate(self.units, self.activation)}


@dataclass(frozen=True)
class LSTMCell(Concise):
    """c = f c' + i g, h = o tanh(c), with gates i, f, o and g of x and h' (Hochreiter & Schmidhuber 1997;
    Gers et al. 2000).

    units: of c and of h.
    nodes: "state" for one node per c and h, which hold the gates; "gates" for a node, and so an error, of
        each gate too (Millidge et al. 2022).
    """

    units: int
    nodes: str = "state"

    letters: ClassVar[tuple[str, ...]] = ("h", "c")

    def __post_init__(self) -> None:
        require_count("units", self.units, least=1)
        require_one_of("nodes", self.nodes, NODES)

    def parts(self) -> dict[str, Part]:
        """{letter of a node: (its block, the letters it reads)} of one step; h' is h of the step before."""
        units = self.units
        if self.nodes == "gates":
            cell, hidden = _Maps(4), _Maps(2)
            cell(Add(), cell(Multiply(), 1, 3), cell(Multiply(), 0, 2))
            hidden(Multiply(), 0, hidden(Function("tanh"), 1))
            return {
                **{gate: _gate(units, "tanh" if gate == "g" else "sigmoid") for gate in "ifgo"},
                "c": (cell.block(), ("i", "f", "g", "c'")),
                "h": (hidden.block(), ("o", "c")),
            }
        cell, hidden = _Maps(3), _Maps(3)
        drives = cell.linear(3 * units)
        i, f, g = (
            cell(Function(function), cell(Slice(number * units, (number + 1) * units), drives))
            for number, function in enumerate(("sigmoid", "sigmoid", "tanh"))
        )
        cell(Add(), cell(Multiply(), f, 2), cell(Multiply(), i, g))
        o = hidden(Function("sigmoid"), hidden.linear(units))
        hidden(Multiply(), o, hidden(Function("tanh"), 2))
        return {"c": (cell.block(), ("x", "h'", "c'")), "h": (hidden.block(), ("x", "h'", "c"))}


@dataclass(frozen=True)
class GRUCell(Concise):
    """h = n + z (h' - n), with gates r and z of x and h', and n of x and r times what h' gives (Cho et al.
    2014, the order of product and gate that torch has).

    units: of h.
    nodes: "state" for one node per h, which holds the gates; "gates" for a node, and so an error, of each
        gate and of n too.
    """

    units: int
    nodes: str = "state"

    letters: ClassVar[tuple[str, ...]] = ("h",)

    def __post_init__(self) -> None:
        require_count("units", self.units, least=1)
        require_one_of("nodes", self.nodes, NODES)

    def parts(self) -> dict[str, Part]:
        """{letter of a node: (its block, the letters it reads)} of one step; h' is h of the step before."""
        units = self.units
        if self.nodes == "gates":
            new, hidden = _Maps(3), _Maps(3)
            _candidate(new, units, 2, "")
            _blend(hidden, 0, 1, 2)
            return {
                "r": _gate(units, "sigmoid"),
                "z": _gate(units, "sigmoid"),
                "n": (new.block(), ("x", "h'", "r")),
                "h": (hidden.block(), ("z", "n", "h'")),
            }
        maps = _Maps(2)
        drives = maps.linear(2 * units)
        r = maps(Function("sigmoid"), maps(Slice(0, units), drives))
        z = maps(Function("sigmoid"), maps(Slice(units, 2 * units), drives))
        _blend(maps, z, _candidate(maps, units, r, "n"), 1)
        return {"h": (maps.block(), ("x", "h'"))}


def _candidate(maps: _Maps, units: int, r: int, prefix: str) -> int:
    """tanh(x Wx + b + r (h' Wh + b'))"""
    x, h = maps(Linear(units), 0, name=f"{prefix}x"), maps(Linear(units), 1, name=f"{prefix}h")
    return maps(Function("tanh"), maps(Add(), x, maps(Multiply(), r, h)))


def _blend(maps: _Maps, z: int, n: int, before: int) -> int:
    """n + z (h' - n)"""
    return maps(Add(), n, maps(Multiply(), z, maps(Add((1, -1)), before, n)))


Cell = RNNCell | LSTMCell | GRUCell


def unroll(
    cell: Cell | Sequence[Cell],
    length: int,
    inputs: int | Embedding,
    output: Dense | Block | None = None,
    outputs: str = "all",
) -> Network:
    """A graph of `length` steps of a recurrent network. Its weights do not depend on `length`: those of one
    graph serve another with more or fewer steps.

    cell: one, or several, each reading the hidden state of the one before.
    inputs: units of an input; or an `Embedding(num, units)`, with which an input is a whole number, a token.
    output: what is predicted from the last cell's h: `Dense(...)` or a block. Without one the hidden states
        are the outputs.
    outputs: "all" for one of every step, y1 to yT; "last" for one after the last step, y.

    The inputs x1 to xT and the states that the sequence begins with, h0 and c0, are nodes that nothing
    predicts.
    Raises ValueError for what is none of the above.

    >>> net = unroll(LSTMCell(8), 2, inputs=3, output=Dense(4))
    >>> net.nodes
    ('x1', 'x2', 'h0', 'c0', 'c1', 'h1', 'y1', 'c2', 'h2', 'y2')
    """
    cells = _cells(cell)
    require_count("length", length, least=1)
    require_one_of("outputs", outputs, ("all", "last"))
    if isinstance(inputs, Embedding):
        shape = 1
    else:
        require_count("inputs", inputs, least=1)
        shape = inputs
    if output is not None and not isinstance(output, (Dense, Block)):
        raise ValueError(f"output must be Dense(...), Block([...]) or None, got {output!r}.")

    suffixes = [f".{number}" if len(cells) > 1 else "" for number in range(1, len(cells) + 1)]
    layers: dict[str, tuple[Any, ...]] = {}
    shared: dict[str, str] = {}

    def place(letter: str, step: int, suffix: str, layer: Any, *sources: str) -> str:
        name = f"{letter}{step}{suffix}"
        layers[name] = (layer, *sources)
        if step > 1:
            shared[name] = f"{letter}1{suffix}"
        return name

    for step in range(1, length + 1):
        below = f"x{step}"
        if isinstance(inputs, Embedding):
            below = place("e", step, "", Block([inputs, Flatten()]), below)
        for entry, suffix in zip(cells, suffixes, strict=True):
            for letter, (block, reads) in entry.parts().items():
                place(letter, step, suffix, block, *(_read(name, step, suffix, below) for name in reads))
            below = f"h{step}{suffix}"
        if output is not None and outputs == "all":
            place("y", step, "", output, below)
        elif output is not None and step == length:
            layers["y"] = (output, below)
    roots = {f"x{step}": shape for step in range(1, length + 1)}
    for entry, suffix in zip(cells, suffixes, strict=True):
        roots |= {f"{letter}0{suffix}": entry.units for letter in entry.letters}
    last = "y" if "y" in layers else f"y{length}" if output is not None else f"h{length}{suffixes[-1]}"
    return graph(roots, layers, input="x1", output=last, shared=shared)


def _cells(given: Any) -> tuple[Cell, ...]:
    cells = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not cells or not all(isinstance(entry, (RNNCell, LSTMCell, GRUCell)) for entry in cells):
        raise ValueError(f"cell must be RNNCell, LSTMCell, GRUCell or a list of these, got {given!r}.")
    return cells


def _read(name: str, step: int, suffix: str, below: str) -> str:
    if name == "x":
        return below
    before = name.endswith("'")
    return f"{name[0]}{step - before}{suffix}"


# --- data ---------------------------------------------------------------------------------------------------


def num_steps(net: Network) -> int:
    """Steps of an unrolled network. Raises ValueError for another one."""
    count = 0
    while f"x{count + 1}" in net.nodes[: net.num_roots]:
        count += 1
    if not count or not state_nodes(net):
        raise ValueError("this takes a network made by unroll(...), with nodes x1, x2, ... and h0.")
    return count


def state_nodes(net: Network) -> tuple[str, ...]:
    """The nodes of the state that a sequence begins with, h0 and c0."""
    return tuple(name for name in net.nodes[: net.num_roots] if name.partition(".")[0] in ("h0", "c0"))


def last_nodes(net: Network) -> dict[str, str]:
    """Of each of these the node that holds the same after the last step: {"h0": "h25"}."""
    steps = num_steps(net)
    return {name: f"{name[0]}{steps}{name[2:]}" for name in state_nodes(net)}


def output_nodes(net: Network) -> tuple[str, ...]:
    """y1 to yT, or y after the last step; without an output layer the hidden states of the last cell."""
    if net.output == "y":
        return ("y",)
    steps = num_steps(net)
    letter, suffix = net.output[0], net.output.removeprefix(f"{net.output[0]}{steps}")
    return tuple(f"{letter}{step}{suffix}" for step in range(1, steps + 1))


def num_tokens(net: Network) -> int | None:
    """Different tokens that an input may be, None where inputs are vectors."""
    first = net.layers[net.names.index("e1")] if "e1" in net.names else None
    map_ = first.steps[0].map if isinstance(first, Block) else None
    return map_.num if isinstance(map_, Embedding) else None


def zero_state(net: Network, batch_size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state that a sequence begins with, all zeros, {node: [B, units]}."""
    require_count("batch_size", batch_size, least=1)
    widths = dict(zip(net.nodes, net.widths, strict=True))
    return {name: torch.zeros(batch_size, widths[name], dtype=dtype) for name in state_nodes(net)}


def spread(
    net: Network,
    inputs: Tensor,
    targets: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Sequences as the data of nodes, {node: [B, units]}, of an unrolled network of T steps.

    inputs: [B, T, units], or tokens [B, T].
    targets: [B, T, units], of one output after the last step [B, units]; or labels, whole numbers, [B, T] or
        [B].
    state: what h0 and c0 are, default zeros.
    Raises ValueError for other shapes, and tokens or labels that are not there.
    """
    steps, tokens = num_steps(net), num_tokens(net)
    units = 1 if tokens is not None else net.widths[0]
    expected = [steps] if tokens is not None else [steps, units]
    if list(inputs.shape[1:]) != expected or not len(inputs):
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"inputs must be [B, {sizes}] for this network, got {list(inputs.shape)}.")
    if tokens is not None:
        check_numbers("tokens", inputs, tokens)
    parts = inputs.reshape(len(inputs), steps, units).to(dtype)
    nodes = {f"x{step + 1}": parts[:, step] for step in range(steps)}
    nodes |= zero_state(net, len(inputs), dtype) if state is None else dict(state)
    return nodes if targets is None else {**nodes, **_spread_targets(net, targets, len(inputs), dtype)}


def _spread_targets(net: Network, targets: Tensor, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
    units, labelled = net.widths[net.output_index], not targets.is_floating_point()
    single = net.output == "y" or (net.output[0] == "h" and targets.dim() == 2)
    names = (net.output,) if single else output_nodes(net)
    expected = [count, *([] if single else [len(names)]), *([] if labelled else [units])]
    if list(targets.shape) != expected:
        raise ValueError(f"targets must be {expected} for this network, got {list(targets.shape)}.")
    if labelled:
        check_numbers("labels", targets, units)
        targets = nn.functional.one_hot(targets.long(), units)
    rows = targets.reshape(count, len(names), units).to(dtype)
    return {name: rows[:, number] for number, name in enumerate(names)}


def check_numbers(what: str, values: Tensor, below: int) -> None:
    """Raises ValueError unless all values are whole numbers 0 to below - 1."""
    if values.is_floating_point() or values.min() < 0 or values.max() >= below:
        raise ValueError(
            f"{what} must be whole numbers 0 to {below - 1}, got {values.dtype} from {values.min().item()} "
            f"to {values.max().item()}."
        )


def gather(net: Network, values: Mapping[str, Tensor], letter: str = "y", layer: int | None = None) -> Tensor:
    """The nodes of one letter at all steps as a sequence, [B, T, units], e.g. of `infer(...).activities`.

    layer: of a stack of cells, counted from 1.
    """
    suffix = "" if layer is None else f".{layer}"
    names = [f"{letter}{step}{suffix}" for step in range(1, num_steps(net) + 1)]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"no node {missing[0]!r} is given; there are {', '.join(values)}.")
    return torch.stack([values[name] for name in names], 1)


# --- torch's weights ----------------------------------------------------------------------------------------


def cell_weights(cell: Cell | Sequence[Cell], module: nn.RNN | nn.LSTM | nn.GRU) -> Weights:
    """The weights of a torch module for the cells of an unrolled network, without embedding and output.

    Raises ValueError where the module is of another kind or size, or has directions or projections.
    """
    cells = _cells(cell)
    kinds = {RNNCell: nn.RNN, LSTMCell: nn.LSTM, GRUCell: nn.GRU}
    fits = (
        len(cells) == module.num_layers and not module.bidirectional and not module.proj_size and module.bias
    )
    if not fits or any(
        not isinstance(module, kinds[type(entry)]) or entry.units != module.hidden_size for entry in cells
    ):
        raise ValueError(f"{module} does not have the weights of {', '.join(map(repr, cells))}.")
    weights: Weights = {}
    for number, entry in enumerate(cells):
        own = {
            key: getattr(module, f"{key}_l{number}").detach()
            for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        suffix = f".{number + 1}" if len(cells) > 1 else ""
        for letter, layer in _weights_by_letter(entry, own).items():
            weights[f"{letter}1{suffix}"] = {key: values.clone() for key, values in layer.items()}
    return weights


def _weights_by_letter(cell: Cell, own: Mapping[str, Tensor]) -> Weights:
    def take(gates: str, *numbers: int) -> dict[str, Tensor]:
        rows = torch.cat([torch.arange(cell.units) + cell.units * number for number in numbers])
        return {
            f"weight.{gates}x": own["weight_ih"][rows].mT,
            f"weight.{gates}h": own["weight_hh"][rows].mT,
            f"bias.{gates}x": (own["bias_ih"] + own["bias_hh"])[rows],
        }

    def candidate(prefix: str) -> dict[str, Tensor]:
        apart = {f"bias.{prefix}x": own["bias_ih"], f"bias.{prefix}h": own["bias_hh"]}
        return {**take(prefix, 2), **{key: values[2 * cell.units :] for key, values in apart.items()}}

    if isinstance(cell, RNNCell):
        return {"h": take("", 0)}
    if isinstance(cell, LSTMCell):
        if cell.nodes == "state":
            return {"c": take("", 0, 1, 2), "h": take("", 3)}
        return {gate: take("", number) for number, gate in enumerate("ifgo")}
    if cell.nodes == "state":
        return {"h": {**take("", 0, 1), **candidate("n")}}
    return {"r": take("", 0), "z": take("", 1), "n": candidate("")}


def is_categorical(net: Network) -> bool:
    """Whether the outputs are distributions."""
    return isinstance(net.layer(net.output_index).energy, Categorical)
