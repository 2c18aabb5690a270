"""From torch modules to networks and back, with the same weights.

    from_torch    a module becomes a graph of nodes, each predicted by a block of what lies between
    to_torch      a network without cycles becomes a module, or its weights go back into the one it came from

With the result, one step of `Inference(1, 1.0, "fixed", sweep="gauss_seidel")` gives the gradient that
backpropagation gives in the module.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pctt import backprop
from pctt._checks import require_one_of
from pctt.energies import Categorical, Energy
from pctt.layers.block import Block
from pctt.layers.maps import Function, Shape
from pctt.network import Network, Weights, check_weights
from pctt.translate.graph import Translation, Value, assemble
from pctt.translate.tables import FUNCTIONS, METHODS, MODULES
from pctt.translate.trace import Translator

NODES = ("activations", "operations")


def from_torch(
    module: nn.Module,
    example: Any = None,
    nodes: str = "activations",
    energy: Energy | None = None,
) -> tuple[Network, Weights]:
    """The network that computes what a module computes, and a copy of its weights in their dtype.

    module: anything torch.fx can trace, translated in the mode it is in. In evaluation batch normalisation
        has its running statistics, which stand still; in training those of the batch, and the running ones
        are then left as they are. Dropout must be off.
    example: a batch [B, *shape], or the shape of a sample without the batch axis; of several inputs a list of
        these. Not needed where a linear layer reads the input.
    nodes: "activations": about one node per layer. A node ends before a linear, convolutional or embedding
        layer if another one lies in it, and where several read a value; normalisation, activation, pooling
        and the addition of a residual stay with the layer before. "operations": every operation of the module
        is a node (Millidge et al. 2022).
    energy: of the output; `Categorical()` puts softmax after the module's logits.

    Returns (net, weights). The first input is called "input", others as in `forward`; whole numbers that an
    embedding reads are given as floats. Layers are called after the modules in them. Weights of linear layers
    are [in, out], all others as in torch. Modules and parameters that are used again become shared layers.

    Raises ValueError, which names the operation, the module and the line, for what cannot be translated.

    >>> net, weights = from_torch(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    >>> net.names, tuple(weights["0"]["weight"].shape)
    (('0', '2'), (4, 3))
    """
    require_one_of("nodes", nodes, NODES)
    if not isinstance(module, nn.Module):
        raise ValueError(f"from_torch takes an nn.Module, got a {type(module).__name__}.")
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        warnings.warn(
            f"requires_grad is False for {', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''}; pctt "
            "trains all weights of a network.",
            stacklevel=2,
        )
    translation = _translate(module, _shapes(example), nodes, energy)
    if not translation.weights:
        raise ValueError(f"{type(module).__name__} has no weights to learn; from_torch takes one with some.")
    _check_output(module, translation, check_weights(translation.net, translation.weights))
    return translation.net, translation.weights


def _translate(
    module: nn.Module, shapes: Sequence[Shape] | None, nodes: str, energy: Energy | None
) -> Translation:
    translator = Translator(module, shapes, (MODULES, FUNCTIONS, METHODS))
    output = translator.run()
    if isinstance(energy, Categorical) and not _is_softmax(output):
        softmax = Function("softmax")
        translator.name = output.name
        output = replace(translator.apply(softmax, output, label=output.label), group=output.group)
    return assemble(translator.roots, output, translator.state, nodes == "operations", energy)


def _check_output(module: nn.Module, translation: Translation, dtype: torch.dtype) -> None:
    """Raises ValueError where the module computes something else on a random batch.

    torch.fx records what it sees: it takes `y += 1` for `y = y + 1`, which differs where a view of y is read,
    and does not see every side effect.
    """
    net, source = translation.net, torch.Generator().manual_seed(0)
    device = next(iter(_tensors(module).values())).device
    given: dict[str, Tensor] = {}
    for name, shape in zip(net.nodes[: net.num_roots], net.shapes, strict=False):
        if name in translation.symbols:
            given[name] = torch.randint(translation.symbols[name], (2, *shape), generator=source).to(device)
        else:
            given[name] = torch.randn(2, *shape, generator=source).to(device, dtype)
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.no_grad():
        expected: Tensor = module(*given.values())
        for buffer, value in kept:  # batch normalisation in training moves its statistics
            buffer.copy_(value)
        numbers = {name: values.to(dtype) for name, values in given.items()}
        found = backprop.forward(net, translation.weights, numbers)[net.output_index]
    allowed = [(found, expected)]
    if isinstance(net.layer(net.output_index).energy, Categorical):  # found are logits
        allowed.append((found.softmax(-1), expected))
    # Two orders of computation of up to 1e4 roundings each.
    limit = 1e4 * torch.finfo(dtype).eps * float(expected.abs().max().clamp_min(1.0))
    if not any(a.shape == b.shape and bool(((a - b).abs() <= limit).all()) for a, b in allowed):
        raise ValueError(
            f"{type(module).__name__} computes something else than torch.fx records of it; write it without "
            "operations in place such as `y += x` where y is read again, and without side effects."
        )


def _is_softmax(value: Value) -> bool:
    return isinstance(value.map, Function) and value.map.name == "softmax"


def _shapes(example: Any) -> list[Shape] | None:
    """Shapes of samples, one per input."""
    if example is None:
        return None
    if isinstance(example, int):
        return [(example,)]
    if isinstance(example, (tuple, list)) and not all(isinstance(size, int) for size in example):
        return [_shape(entry) for entry in example]
    return [_shape(example)]


def _shape(example: Any) -> Shape:
    if isinstance(example, Tensor):
        if example.dim() < 2:
            raise ValueError(f"an example must be a batch [B, ...], got a tensor {list(example.shape)}.")
        return tuple(example.shape[1:])
    sizes = (example,) if isinstance(example, int) else tuple(example)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"an example must be a batch or the shape of a sample, got {example!r}.")
    return sizes


class TorchNetwork(nn.Module):
    """A network's feedforward sweep as a module: trainable by torch, with `weights()` to go back.

    Weights are parameters, statistics and learned variances buffers. Names have "_" for every "." of the
    network's.
    """

    def __init__(self, net: Network, weights: Weights) -> None:
        super().__init__()
        check_weights(net, weights)
        if net.backward is not None or net.sources_ahead:
            raise ValueError("a module computes forward only; this network has cycles or a chain down.")
        self.net = net
        self._places: dict[tuple[str, str], str] = {}
        for index in net.owners:
            name = net.nodes[index]
            trained = net.rule(index).trained
            for key, value in weights.get(name, {}).items():
                place, copy = self._place(f"{name}_{key}"), value.detach().clone()
                self._places[name, key] = place
                if key in trained:
                    self.register_parameter(place, nn.Parameter(copy))
                else:
                    self.register_buffer(place, copy)

    def _place(self, name: str) -> str:
        name = name.replace(".", "_")
        name = name if name.isidentifier() else f"layer_{name}"
        while hasattr(self, name):
            name += "_"
        return name

    def forward(self, *inputs: Tensor) -> Tensor:
        """The prediction of the output node, [B, *shape]; inputs in the order of the network's."""
        output = self.logits(*inputs)
        is_categorical = isinstance(self.net.layer(self.net.output_index).energy, Categorical)
        return torch.softmax(output, -1) if is_categorical else output

    def logits(self, *inputs: Tensor) -> Tensor:
        """The same without the softmax of a categorical output, as `functional.cross_entropy` takes it."""
        names = self.net.nodes[: self.net.num_roots]
        if len(inputs) != len(names):
            raise ValueError(f"this module takes {', '.join(names)}, got {len(inputs)} inputs.")
        given = dict(zip(names, inputs, strict=True))
        return backprop.forward(self.net, self._tree(), given)[self.net.output_index]

    def weights(self) -> Weights:
        """A copy of the parameters, as the network's weights."""
        return {
            name: {key: value.detach().clone() for key, value in tree.items()}
            for name, tree in self._tree().items()
        }

    def _tree(self) -> Weights:
        tree: Weights = {name: {} for name in self.net.weight_shapes()}
        for (name, key), place in self._places.items():
            tree[name][key] = getattr(self, place)
        return tree


def to_torch(net: Network, weights: Weights, into: nn.Module | None = None) -> nn.Module:
    """A module that computes what a network predicts in a feedforward sweep, or the module it came from with
    the network's weights.

    net, weights: as for `pctt.infer`.
    into: a module that `from_torch` makes this network of, in the same mode (train or eval); its parameters
        are overwritten and it is returned.

    Without `into`, a `TorchNetwork`: its `forward` takes the inputs, its `logits` leaves the softmax of a
    categorical output out, its `weights()` are the network's after training in torch.

    Raises ValueError for cycles, weights that do not suit, or another module.
    """
    if into is None:
        return TorchNetwork(net, weights)
    check_weights(net, weights)
    translation = _translation_of(net, into)
    state = _tensors(into)
    with torch.no_grad():
        for name, tree in translation.references.items():
            for key, reference in tree.items():
                if reference.name in state:  # else a constant
                    reference.of(state[reference.name].detach()).copy_(weights[name][key])
    return into


def parameter_gradients(net: Network, gradients: Weights, module: nn.Module) -> dict[str, Tensor]:
    """Gradients of a network's weights as those of the parameters of the module it came from, by their names,
    so that an optimiser of torch can take them as `.grad`.

    Parameters that the output does not depend on are left out. Raises what `to_torch` does.
    """
    state, found = _tensors(module), dict[str, Tensor]()
    for name, tree in _translation_of(net, module).references.items():
        for key, reference in tree.items():
            if key in gradients.get(name, {}) and reference.name in state:
                gradient = gradients[name][key]
                if reference.name not in found:
                    found[reference.name] = gradient.new_zeros(state[reference.name].shape)
                reference.of(found[reference.name]).add_(gradient)
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _translation_of(net: Network, module: nn.Module) -> Translation:
    """How the module becomes this network: translating is the record of which weight is which."""
    shapes = list(net.shapes[: net.num_roots])
    categorical = isinstance(net.layer(net.output_index).energy, Categorical)
    for nodes in NODES:
        found = _translate(module, shapes, nodes, Categorical() if categorical else None)
        if _structure(found.net) == _structure(net):
            return found
    raise ValueError(
        f"this network is not what from_torch makes of {type(module).__name__} in "
        f"{'train' if module.training else 'eval'} mode; give the module it came from, in the mode it had."
    )


def _structure(net: Network) -> Any:
    """What tells networks apart, but for energies."""
    layers = tuple(layer.steps if isinstance(layer, Block) else layer for layer in net.layers)
    return net.nodes, net.shapes, layers, net.wiring
