"""The backprop twin against finite differences, and fixed-prediction predictive coding against the twin."""

import numpy as np
import pytest
import torch
from helpers import (
    INFERENCES,
    NETWORKS,
    assert_near,
    assert_trees_near,
    backprop_oracle,
    feedforward,
    random_nodes,
    random_weights,
    supervised,
)
from scipy.optimize import approx_fprime

from pctt import Categorical, Gaussian, Inference, backprop, infer, weight_gradients

STEP = 2e-8


@pytest.mark.parametrize("name", NETWORKS)
def test_the_twin_has_the_gradients_of_finite_differences(name):
    """Forward differences of the mean loss by every weight, h = 2e-8, through the twin's own forward pass.

    Truncation h/2 |f''| with |f''| < 50, rounding 2u |f| / h with |f| < 40: 5e-7 + 4e-7, so 1e-6 absolute.
    The largest entry of each gradient is above 1e-2, asserted, so that a zero gradient cannot pass.
    """
    net = NETWORKS[name]
    weights, clamp = random_weights(net), supervised(net)
    x, y = clamp["input"], clamp[net.output]
    keys = [(layer, key) for layer, values in weights.items() for key in values]
    shapes = [weights[layer][key].shape for layer, key in keys]
    flat = np.concatenate([weights[layer][key].numpy().ravel() for layer, key in keys])

    def unflatten(vector):
        tree, start = {}, 0
        for (layer, key), shape in zip(keys, shapes, strict=True):
            end = start + shape.numel()
            tree.setdefault(layer, {})[key] = torch.from_numpy(vector[start:end]).reshape(shape)
            start = end
        return tree

    def mean_loss(vector):
        return backprop.loss(net, backprop.forward(net, unflatten(vector), x)[-1], y).mean().item()

    expected = unflatten(approx_fprime(flat, mean_loss, STEP))
    found, loss = backprop.gradients(net, weights, x, y)
    assert loss == pytest.approx(mean_loss(flat), rel=1e-14)
    assert max(v.abs().max() for layer in found.values() for v in layer.values()) > 1e-2
    assert_trees_near(found, expected, 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_twin_is_the_plain_forward_pass_and_its_loss_the_energy_at_a_feedforward_start(name):
    """The loss is what `infer` reports before its first step; otherwise baseline and model minimise different
    things. Hidden layers with a precision add their constant -1/2 log|P|, which depends on no weight.
    """
    net = NETWORKS[name]
    weights, clamp = random_weights(net), supervised(net)
    activities = backprop.forward(net, weights, clamp["input"])
    expected = feedforward(net, weights, {"input": clamp["input"]})
    for node, found, wanted in zip(net.nodes, activities, expected, strict=True):
        is_logits = node == net.output and isinstance(net.layers[-1].energy, Categorical)
        assert_near(found.softmax(-1) if is_logits else found, wanted, 1e-13, node)
    loss = backprop.loss(net, activities[-1], clamp[net.output])
    energy = infer(net, weights, clamp, Inference(0)).energy
    assert loss.shape == (3,)
    assert loss.mean().item() == pytest.approx(energy[0, -1].item(), rel=1e-12)
    for index, layer in enumerate(net.layers[:-1]):
        assert isinstance(layer.energy, Gaussian)
        assert energy[0, index].item() == pytest.approx(-0.5 * layer.energy.log_determinant(layer.units))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_twin_agrees_with_backpropagation_written_another_way(name):
    net = NETWORKS[name]
    weights, clamp = random_weights(net), supervised(net)
    expected, _ = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    found, _ = backprop.gradients(net, weights, clamp["input"], clamp[net.output])
    assert_trees_near(found, expected, 1e-12, relative=True)


@pytest.mark.parametrize("name", ["tanh at the output", "gelu at the input", "categorical", "two groups"])
def test_fixed_predictions_with_rate_one_have_the_gradients_of_the_twin(name):
    """E4, engine against twin: what makes the twin the right baseline, and the engine testable by it."""
    net = NETWORKS[name]
    weights, clamp = random_weights(net), supervised(net)
    result = infer(net, weights, clamp, Inference(len(net.layers), 1.0, "fixed"))
    expected, _ = backprop.gradients(net, weights, clamp["input"], clamp[net.output])
    assert_trees_near(weight_gradients(net, weights, result), expected, 1e-12, relative=True)


def test_the_twin_takes_soft_labels_and_its_loss_is_zero_only_for_them_exactly():
    """KL(y || softmax z), not cross-entropy: zero when the prediction is the target, also a soft one."""
    net = NETWORKS["categorical"]
    targets = random_nodes(net)[net.output]
    assert backprop.loss(net, targets.log(), targets).abs().max() <= 1e-15
    assert backprop.loss(net, targets.flip(-1).log(), targets).min() > 1e-3
    one_hot = torch.eye(4, dtype=torch.float64)[:3]
    assert backprop.loss(net, 40.0 * one_hot, one_hot).abs().max() <= 1e-15


def test_the_twin_leaves_the_weights_it_is_given_alone():
    net = NETWORKS["two layers"]
    weights, clamp = random_weights(net), supervised(net)
    before = {n: {k: v.clone() for k, v in layer.items()} for n, layer in weights.items()}
    backprop.gradients(net, weights, clamp["input"], clamp[net.output])
    assert_trees_near(weights, before, 0.0)
    assert not any(v.requires_grad for layer in weights.values() for v in layer.values())


def test_live_predictions_are_not_backpropagation():
    """So that the tests above cannot pass because everything is compared with itself."""
    net = NETWORKS["tanh at the output"]
    weights, clamp = random_weights(net), supervised(net)
    found = weight_gradients(net, weights, infer(net, weights, clamp, INFERENCES["live, fast"]))["dense1"][
        "weight"
    ]
    wanted = backprop.gradients(net, weights, clamp["input"], clamp[net.output])[0]["dense1"]["weight"]
    assert (found - wanted).norm() > 0.05 * wanted.norm()
