"""The backprop twin of a network: the same forward pass in plain torch, the same output energy as loss,
gradients by autograd.

It shares no line with the engine, because it is what the engine is tested against, and the baseline it is
compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from pctt.activations import LEAKY_SLOPE
from pctt.energies import Categorical
from pctt.layers import Dense
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


def forward(net: Network, weights: Weights, inputs: Tensor) -> list[Tensor]:
    """The activities of a feedforward sweep, node 0 to L, each [B, units]; of a categorical output its
    logits.
    """
    activities = [inputs]
    for name, layer in zip(net.names, net.layers, strict=True):
        activities.append(predict(layer, weights[name], activities[-1]))
    return activities


def predict(layer: Dense, parameters: Mapping[str, Tensor], source: Tensor) -> Tensor:
    """mu of one layer, [B, units], from the activity below it; of a categorical layer its logits."""
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
    """
    energy = net.layers[-1].energy
    if isinstance(energy, Categorical):
        entropy = -torch.xlogy(targets, targets).sum(-1)
        return functional.cross_entropy(output, targets, reduction="none") - entropy
    precision = torch.tensor(energy.precision, dtype=output.dtype, device=output.device)
    error = targets - output
    weighted = error @ precision if energy.is_full else precision * error
    return 0.5 * ((weighted * error).sum(-1) - energy.log_determinant(output.shape[-1]))


def gradients(net: Network, weights: Weights, inputs: Tensor, targets: Tensor) -> tuple[Weights, float]:
    """(dloss/dW of the batch mean, same tree as `weights`; the mean loss)."""
    return differentiate(net, weights, inputs, targets)[:2]


def differentiate(
    net: Network, weights: Weights, inputs: Tensor, targets: Tensor
) -> tuple[Weights, float, float]:
    """What `gradients` gives, and the norm of the output's error, root of the batch mean of e'e."""
    leaves = {
        name: {key: value.detach().requires_grad_() for key, value in layer.items()}
        for name, layer in weights.items()
    }
    output = forward(net, leaves, inputs)[-1]
    mean = loss(net, output, targets).mean()
    mean.backward()
    prediction = output.detach()
    if isinstance(net.layers[-1].energy, Categorical):
        prediction = torch.softmax(prediction, -1)
    square = (targets - prediction).square().sum(-1).mean()
    return (
        {name: {key: _gradient(value) for key, value in layer.items()} for name, layer in leaves.items()},
        float(mean.detach()),
        float(square.sqrt()),
    )


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
