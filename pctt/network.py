"""What the network is: layers in a chain, as frozen data. Where it runs and how it learns is decided
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pctt._checks import require_count
from pctt.energies import Categorical
from pctt.initialisers import initialise_weight
from pctt.layers.dense import Dense

INPUT = "input"

Weights = dict[str, dict[str, Tensor]]
"""{layer name: {"weight": [in, out], "bias": [out]}}"""


@dataclass(frozen=True)
class Network:
    """A chain of layers. Node 0 is `input`; node l is named after layer l, the one that predicts it.

    input: units of node 0.    layers: layer 1 to L.    names: one per layer, unique.
    """

    input: int
    layers: tuple[Dense, ...]
    names: tuple[str, ...]

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
        widths = self.widths
        return {
            name: layer.weight_shapes(widths[index])
            for index, (name, layer) in enumerate(zip(self.names, self.layers, strict=True))
        }

    def num_weights(self) -> int:
        return sum(
            torch.Size(shape).numel() for shapes in self.weight_shapes().values() for shape in shapes.values()
        )


def chain(input: int, layers: Sequence[Dense]) -> Network:
    """A network whose layers follow each other.

    input: units of the first node.
    layers: at least one; a layer without a name is called after its kind and number among its kind (`dense1`,
    `dense2`, ...).

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
    for name in names:
        if names.count(name) > 1 or name == INPUT or not name or "/" in name:
            raise ValueError(
                f"layer names must be unique, without '/', and not 'input'; {name!r} is not, so rename that "
                "layer."
            )
    return Network(input, tuple(layers), tuple(names))


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
    widths = net.widths
    weights: Weights = {}
    for index, (name, layer) in enumerate(zip(net.names, net.layers, strict=True)):
        weight = initialise_weight(widths[index], layer.units, layer.activation, scheme, gain, generator)
        weights[name] = {"weight": weight.to(dtype)}
        if layer.bias:
            weights[name]["bias"] = torch.zeros(layer.units, dtype=dtype)
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
