"""The backprop twin of a network: the same forward pass in plain torch, the same output energy as loss,
gradients by autograd.

It shares no arithmetic with the engine, because it is what the engine is tested against, and the baseline it
is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pctt.activations import LEAKY_SLOPE
from pctt.energies import Categorical
from pctt.layers import maps
from pctt.layers.block import Layer
from pctt.layers.dense import Dense
from pctt.network import Network, Weights

FUNCTIONS = {
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": lambda z: functional.leaky_relu(z, LEAKY_SLOPE),
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "hard_tanh": functional.hardtanh,
    "softmax": lambda z: torch.softmax(z, -1),
}


def forward(net: Network, weights: Weights, inputs: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    """The activities of a feedforward sweep, of every node, each [B, units] or [B, *shape]; of a categorical
    output its logits.

    net, weights: as for `pctt.infer`.
    inputs: of the one node that nothing predicts, or by name. Nodes given by name that are predicted keep
    their values for those above them; what is returned of these is their prediction.
    """
    given = {net.nodes[0]: inputs} if isinstance(inputs, Tensor) else inputs
    found: list[Tensor] = []
    seen: list[Tensor] = []
    for index, (name, shape) in enumerate(zip(net.nodes, net.shapes, strict=True)):
        here = given[name].reshape(-1, *shape) if name in given else None
        if index in net.indices:
            parameters = weights.get(net.nodes[net.owner(index)], {})
            found.append(_predict(net, index, parameters, [seen[source] for source in net.sources(index)]))
        elif here is not None:
            found.append(here)
        else:
            raise ValueError(f"a sweep starts from all inputs; give {name!r}.")
        seen.append(found[-1] if here is None else here)
    return found


def _predict(net: Network, index: int, parameters: Mapping[str, Tensor], sources: list[Tensor]) -> Tensor:
    rule = net.rule(index)
    if isinstance(rule, Dense):
        return predict(rule, parameters, sources[0])
    values = list(sources)
    for map_, inputs, keys in rule.parts:
        own = {key: parameters[name] for key, name in keys.items()}
        values.append(MAPS[map_.kind](map_, own, *(values[value] for value in inputs)))
    return values[rule.top]


def predict(layer: Dense, parameters: Mapping[str, Tensor], source: Tensor) -> Tensor:
    """mu of one layer, [B, units], from the activity below it; of a categorical layer its logits.

    parameters: {"weight": [in, units], "bias": [units]}.    source: [B, in].
    """
    function = FUNCTIONS[layer.activation]
    drive = (function(source) if layer.activate == "input" else source) @ parameters["weight"]
    drive = layer.scale * drive
    if layer.bias:
        drive = drive + parameters["bias"]
    is_logits = isinstance(layer.energy, Categorical) or layer.activate == "input"
    prediction = drive if is_logits else function(drive)
    return prediction + source if layer.skip else prediction


def loss(net: Network, output: Tensor, targets: Tensor) -> Tensor:
    """The energy of the output node per sample, [B]: what predictive coding's total energy is at a
    feedforward start.

    output: its prediction, of a categorical energy the logits.    targets: [B, units] or [B, *shape].
    """
    return energy(net.layer(net.output_index), output, targets)


def energy(layer: Layer, prediction: Tensor, activity: Tensor) -> Tensor:
    """The energy of a node per sample, [B].

    layer: that predicts it.    prediction: of a categorical energy the logits.    activity: what the node is
        at, of the same size.
    """
    if isinstance(layer.energy, Categorical):
        shares = activity.reshape(prediction.shape)
        terms = torch.xlogy(shares, shares) - shares * torch.log_softmax(prediction, -1)
        return terms.flatten(1).sum(-1)
    output = prediction.flatten(1)
    precision = torch.tensor(layer.energy.precision, dtype=output.dtype, device=output.device)
    error = activity.flatten(1) - output
    weighted = error @ precision if layer.energy.is_full else precision * error
    return 0.5 * ((weighted * error).sum(-1) - layer.energy.log_determinant(output.shape[-1]))


def gradients(net: Network, weights: Weights, inputs: Tensor, targets: Tensor) -> tuple[Weights, float]:
    """(dloss/dW of the batch mean, same tree as `weights`; the mean loss).

    inputs, targets: of the nodes `net.input_name` and `net.output`, [B, units] or [B, *shape].
    """
    found, losses, _ = differentiate(net, weights, {net.input_name: inputs, net.output: targets})
    return found, sum(losses.values())


def differentiate(
    net: Network, weights: Weights, given: Mapping[str, Tensor]
) -> tuple[Weights, dict[str, float], dict[str, float]]:
    """Gradients of the summed energies of all given nodes that a layer predicts; these energies; and the
    norms of their errors, root of the batch mean of e'e.

    given: {node: [B, units] or [B, *shape]}, inputs and targets.
    """
    leaves = {
        name: {key: value.detach().clone().requires_grad_() for key, value in layer.items()}
        for name, layer in weights.items()
    }
    predictions = dict(zip(net.nodes, forward(net, leaves, given), strict=True))
    means: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    for index in net.indices:
        name, layer = net.nodes[index], net.layer(index)
        if name in given:
            means[name] = energy(layer, predictions[name], given[name]).mean()
            prediction = predictions[name].detach()
            if isinstance(layer.energy, Categorical):
                prediction = torch.softmax(prediction, -1)
            norms[name] = float(
                (given[name].flatten(1) - prediction.flatten(1)).square().sum(-1).mean().sqrt()
            )
    torch.stack(list(means.values())).sum().backward()
    trained = {
        net.nodes[index]: net.rule(index).trained for index in net.owners if net.nodes[index] in weights
    }
    found = {
        name: {key: _gradient(layer[key]) for key in trained.get(name, tuple(layer))}
        for name, layer in leaves.items()
        if name in trained
    }
    return found, {name: float(mean.detach()) for name, mean in means.items()}, norms


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


# --- maps ---------------------------------------------------------------------------------------------------


def _linear(m: maps.Linear, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    weight = w["weight"]
    if m.mask is not None:
        weight = weight * m.drawn_mask(tuple(weight.shape)).to(weight)
    return functional.linear(x, weight.mT, w.get("bias"))


def _conv(m: maps.Conv2d, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional.conv2d(x, w["weight"], w.get("bias"), m.stride, m.padding, m.dilation, m.groups)


def _conv_transpose(m: maps.ConvTranspose2d, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional.conv_transpose2d(
        x, w["weight"], w.get("bias"), m.stride, m.padding, m.output_padding, m.groups
    )


def _max_pool(m: maps.MaxPool2d, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional.max_pool2d(x, m.kernel, m.stride, m.padding)


def _avg_pool(m: maps.AvgPool2d, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    if m.kernel == 0:
        return x.mean((-2, -1), keepdim=True)
    return functional.avg_pool2d(x, m.kernel, m.stride, m.padding)


def _normalise(m: maps.Normalise, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-m.axes :], eps=m.epsilon)


def _normalise_batch(m: maps.NormaliseBatch, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional.batch_norm(x, None, None, training=True, eps=m.epsilon)


def _affine(m: maps.Affine, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = x.movedim(m.axis + 1 if m.axis >= 0 else m.axis, -1)
    y = x * w["weight"] + w.get("bias", torch.zeros_like(w["weight"]))
    return y.movedim(-1, m.axis + 1 if m.axis >= 0 else m.axis)


def _standardise(m: maps.Standardise, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional.batch_norm(x, w["running_mean"], w["running_var"], eps=m.epsilon)


def _attend(m: maps.Attend, w: Mapping[str, Tensor], *x: Tensor) -> Tensor:
    queries, keys, values = (part.unflatten(-1, (m.heads, -1)).transpose(1, 2) for part in x)
    y = functional.scaled_dot_product_attention(queries, keys, values, is_causal=m.causal)
    return y.transpose(1, 2).flatten(2)


def _slice(m: maps.Slice, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x.narrow(m.axis + 1 if m.axis >= 0 else m.axis, m.start, m.stop - m.start)


def _add(m: maps.Add, w: Mapping[str, Tensor], *x: Tensor) -> Tensor:
    signs = m.signs or (1,) * len(x)
    return torch.stack([sign * part for sign, part in zip(signs, x, strict=True)]).sum(0)


MAPS: dict[str, Callable[..., Any]] = {
    "function": lambda m, w, x: FUNCTIONS[m.name](x),
    "scale": lambda m, w, x: m.factor * x,
    "shift": lambda m, w, x: x + m.constant,
    "reshape": lambda m, w, x: x.reshape(-1, *m.shape),
    "flatten": lambda m, w, x: x.flatten(1),
    "detach": lambda m, w, x: x.detach(),
    "permute": lambda m, w, x: x.permute(0, *(axis + 1 for axis in m.axes)),
    "fill": lambda m, w, x: x.new_full((len(x), *m.shape), m.value),
    "slice": _slice,
    "add": _add,
    "multiply": lambda m, w, a, b: a * b,
    "concat": lambda m, w, *x: torch.cat(x, m.axis + 1 if m.axis >= 0 else m.axis),
    "linear": _linear,
    "conv2d": _conv,
    "conv_transpose2d": _conv_transpose,
    "embedding": lambda m, w, x: functional.embedding(x.long(), w["weight"]),
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "normalise": _normalise,
    "normalise_batch": _normalise_batch,
    "affine": _affine,
    "bias": lambda m, w, x: x + w["bias"],
    "standardise": _standardise,
    "attend": _attend,
}
