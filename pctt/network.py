"""What the network is: layers in a chain, as frozen data. Where it runs and how it learns is decided
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pctt._checks import require_count
from pctt.energies import Categorical, Gaussian
from pctt.initialisers import initialise_weight
from pctt.layers.dense import Dense

INPUT = "input"

Weights = dict[str, dict[str, Tensor]]
"""{layer name: {"weight": [in, out], "bias": [out]}}"""


@dataclass(frozen=True)
class Network:
    """A chain of layers. Node 0 is `input`; node l is named after layer l, the one that predicts it.

    input: units of node 0.    layers: layer 1 to L.    names: one per layer, unique.
    backward: a chain down that predicts the same nodes from the output on, for bidirectional predictive
        coding; its input is node L, its layers predict nodes L - 1 to 0.
    """

    input: int
    layers: tuple[Dense, ...]
    names: tuple[str, ...]
    backward: Network | None = None

    @property
    def chains(self) -> tuple[Network, ...]:
        """The chain up, and the chain down if there is one."""
        return (self,) if self.backward is None else (self, self.backward)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of all layers, those of the chain down included."""
        return tuple(name for part in self.chains for name in part.names)

    @property
    def nodes(self) -> tuple[str, ...]:
        return (INPUT, *self.names)

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of node 0 to L."""
        return (self.input, *(layer.units for layer in self.layers))

    @property
    def output(self) -> str:
        return self.names[-1]

    def node_index(self, name: str) -> int:
        """Index of the node called `name`. Raises ValueError that lists the nodes there are."""
        try:
            return self.nodes.index(name)
        except ValueError:
            raise ValueError(f"no node is called {name!r}; the nodes are {', '.join(self.nodes)}.") from None

    def weight_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {
            name: layer.weight_shapes(part.widths[index])
            for part in self.chains
            for index, (name, layer) in enumerate(zip(part.names, part.layers, strict=True))
        }

    def num_weights(self) -> int:
        return sum(
            torch.Size(shape).numel() for shapes in self.weight_shapes().values() for shape in shapes.values()
        )


def chain(input: int, layers: Sequence[Dense], backward: Sequence[Dense] = ()) -> Network:
    """A network whose layers follow each other.

    input: units of the first node.
    layers: at least one; a layer without a name is called after its kind and number among its kind (`dense1`,
    `dense2`, ...).
    backward: layers of a chain down, from the output to the input, which predict nodes L - 1 to 0 and are
    called after these (`dense1_back`, ..., `input_back`).

    Raises ValueError for an empty chain, a name used twice, softmax or a categorical energy before the last
    layer, or a precision whose length is not the layer's number of units.

    >>> chain(input=784, layers=[Dense(256, "tanh"), Dense(10, "identity")]).names
    ('dense1', 'dense2')
    """
    require_count("input", input, least=1)
    if not layers:
        raise ValueError("a chain needs at least one layer, got none.")
    names: list[str] = []
    for number, layer in enumerate(layers, start=1):
        if not isinstance(layer, Dense):
            raise ValueError(f"layers must be Dense(...), got {layer!r} as layer {number}.")
        names.append(layer.name or f"{layer.kind}{number}")
        last = number == len(layers)
        if not last and (layer.activation == "softmax" or isinstance(layer.energy, Categorical)):
            raise ValueError(
                f"layer {names[-1]!r} has softmax or a categorical energy, which only the last layer may "
                "have; "
                "give it an elementwise activation and a Gaussian energy."
            )
        layer.check()
        below = layers[number - 2].units if number > 1 else input
        if layer.skip and below != layer.units:
            raise ValueError(
                f"layer {names[-1]!r} skips from {below} units to {layer.units}; give both layers the same "
                "number, or drop skip."
            )
    for name in names:
        if names.count(name) > 1 or name == INPUT or not name or "/" in name:
            raise ValueError(
                f"layer names must be unique, without '/', and not 'input'; {name!r} is not, so rename that "
                "layer."
            )
    net = Network(input, tuple(layers), tuple(names))
    return replace(net, backward=_chain_down(net, backward)) if backward else net


def _chain_down(net: Network, layers: Sequence[Dense]) -> Network:
    units = list(reversed(net.widths[:-1]))
    if [layer.units for layer in layers] != units:
        raise ValueError(
            f"backward layers must predict the nodes below the output, {units} units, got "
            f"{[layer.units for layer in layers]}."
        )
    if any(isinstance(layer.energy, Categorical) for layer in (*net.layers, *layers)):
        raise ValueError("a bidirectional network has Gaussian energies only; drop Categorical().")
    names = [f"{name}_back" for name in reversed(net.nodes[:-1])]
    named = [replace(layer, name=layer.name or name) for layer, name in zip(layers, names, strict=True)]
    down = chain(net.widths[-1], named)
    both = set(down.names) & set(net.names)
    if both:
        raise ValueError(f"layer {both.pop()!r} stands in both chains; rename one.")
    return down


def init(
    net: Network,
    seed: int = 0,
    scheme: str = "xavier",
    gain: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Seeded initial weights; biases are zero.

    scheme: "xavier" (uniform, Glorot & Bengio 2010), "kaiming" (normal, fan-in, He et al. 2015), "orthogonal"
    (Saxe et al. 2014) or "normal" (standard deviation = gain).
    gain: factor on the scheme's own scale; by default 1, for kaiming the activation's gain, for normal 0.05.
    dtype: drawn in float64 and rounded, so float32 and float64 networks of one seed agree.

    Returns {layer name: {"weight": [in, out], "bias": [out]}}.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    layers = [
        entry for part in net.chains for entry in zip(part.names, part.widths, part.layers, strict=False)
    ]
    for name, fan_in, layer in layers:
        weight = initialise_weight(fan_in, layer.units, layer.activation, scheme, gain, generator)
        weights[name] = {"weight": weight.to(dtype)}
        if layer.bias:
            weights[name]["bias"] = torch.zeros(layer.units, dtype=dtype)
        if layer.learns_variance and isinstance(layer.energy, Gaussian):
            weights[name]["variance"] = (1.0 / layer.energy.matrix(layer.units)).to(dtype)
    return weights


def check_weights(net: Network, weights: Weights) -> torch.dtype:
    """The common dtype of `weights`. Raises ValueError where names, shapes or dtypes do not fit `net`."""
    shapes = net.weight_shapes()
    if set(weights) != set(shapes):
        raise ValueError(
            f"weights are for layers {sorted(weights)}, the network has {sorted(shapes)}; "
            "use the weights of this network or pctt.init(net)."
        )
    dtypes = set()
    for name, expected in shapes.items():
        if set(weights[name]) != set(expected):
            raise ValueError(
                f"layer {name!r} needs {sorted(expected)}, its weights hold {sorted(weights[name])}."
            )
        for key, shape in expected.items():
            tensor = weights[name][key]
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name}/{key} must be a torch tensor, got {type(tensor).__name__}.")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name}/{key} must have shape {shape} ([in, out]), got {tuple(tensor.shape)}."
                )
            dtypes.add(tensor.dtype)
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(
            f"weights must share one floating dtype, got {sorted(map(str, dtypes))}; convert them first."
        )
    return next(iter(dtypes))
