"""muPC: the scales against its formulas, and what they are for."""

import math

import pytest
import torch
from helpers import assert_near, generator

from pctt import Dense, Engine, Inference, Network, chain, init, mupc


def residual_chain(inputs: int, width: int, depth: int, outputs: int, activation: str = "tanh") -> Network:
    """Input layer, depth - 2 residual layers, readout; all as mu = f(x) W, the first without f."""
    hidden = [Dense(width, activation, False, "input", skip=True)] * (depth - 2)
    first = Dense(width, "identity", False, "input")
    return chain(inputs, [first, *hidden, Dense(outputs, activation, False, "input")])


@pytest.mark.parametrize("depth", [3, 10, 64])
@pytest.mark.parametrize("width", [16, 100])
def test_scales_of_a_residual_chain_are_those_of_the_paper(width, depth):
    """Innocenti, Achour & Buckley 2025: 1 / sqrt(D) into the first layer, 1 / sqrt(N L) in a residual layer,
    1 / N at the readout. With 1 / sqrt(N) there the best rates would go with the width again.
    """
    scales = [layer.scale for layer in mupc(residual_chain(9, width, depth, 3)).layers]
    expected = [1 / math.sqrt(9), *[1 / math.sqrt(width * depth)] * (depth - 2), 1 / width]
    assert scales == pytest.approx(expected, rel=1e-15)


def test_layers_without_a_skip_are_not_scaled_by_depth_and_a_single_layer_is_the_first():
    """Only what is added depth times has to become smaller with depth."""
    plain = mupc(chain(4, [Dense(9, "tanh"), Dense(16, "tanh"), Dense(2)]))
    assert [layer.scale for layer in plain.layers] == pytest.approx([1 / 2, 1 / 3, 1 / 16])
    mixed = mupc(chain(4, [Dense(9), Dense(9, activate="input", skip=True), Dense(9), Dense(2)]))
    assert [layer.scale for layer in mixed.layers] == pytest.approx([1 / 2, 1 / 6, 1 / 3, 1 / 9])
    assert mupc(chain(16, [Dense(2)])).layers[0].scale == pytest.approx(1 / 4)


def test_scales_are_replaced_and_nothing_else():
    """Applied twice it is applied once; names, energies and skips stay."""
    net = residual_chain(9, 16, 5, 3)
    once = mupc(net)
    assert mupc(once) == once
    assert [(d.units, d.skip, d.energy, d.activate) for d in once.layers] == [
        (d.units, d.skip, d.energy, d.activate) for d in net.layers
    ]
    assert once.names == net.names and once.input == net.input


@pytest.mark.parametrize(("width", "depth"), [(32, 4), (256, 4), (32, 64), (128, 32)])
def test_activities_keep_their_size_over_width_and_depth(width, depth):
    """Weights from N(0, 1), inputs of mean square 1. x_1 then has variance 1; a residual layer adds the mean
    of f(x)^2 over L, at most 1 / L for tanh, so the last hidden one has a variance of at most 1 + (L - 2) / L
    < 2 and at least 1, whatever width and depth.

    256 samples of `width` units share their weights: over draws of these the mean square of x_1 has a
    relative standard deviation of at most sqrt(2 / width), 0.25; three of them give 0.25, and 3 at the end.
    Without the scales it would be of order width^depth.
    """
    net = mupc(residual_chain(24, width, depth, 3))
    weights = init(net, seed=1, scheme="normal", gain=1.0, dtype=torch.float64)
    inputs = torch.randn(256, 24, generator=generator(2), dtype=torch.float64)
    engine = Engine(net, weights, Inference(0), ("input",))
    engine.relax({"input": inputs})
    sizes = [engine.read_node("anchor", name).square().mean().item() for name in net.names[:-1]]
    assert all(0.25 < size < 3.0 for size in sizes), sizes
    # The readout is a mean over the width of N(0, 1) times f: of variance mean f^2 / width, not of order 1.
    readout = engine.read_node("anchor", net.output).square().mean().item()
    assert readout < 3 * 1.0 / width


def test_a_scale_is_a_factor_on_the_weights():
    """Scale s with weights w has the predictions, states and energies of scale 1 with weights s w; and the
    gradient with respect to w is s times that with respect to s w.
    """
    plain = chain(5, [Dense(6, "tanh"), Dense(6, "tanh", activate="input"), Dense(4)])
    layers = [
        Dense(d.units, d.activation, d.bias, d.activate, scale=s)
        for d, s in zip(plain.layers, (0.5, 2.0, 0.3), strict=True)
    ]
    scaled = chain(5, layers)
    weights = init(scaled, seed=3, dtype=torch.float64)
    folded = {
        name: {**layer, "weight": layer["weight"] * d.scale}
        for (name, layer), d in zip(weights.items(), layers, strict=True)
    }
    nodes = {
        "input": torch.randn(3, 5, generator=generator(4), dtype=torch.float64),
        "dense3": torch.randn(3, 4, generator=generator(5), dtype=torch.float64),
    }
    engines = []
    for net, tree in ((scaled, weights), (plain, folded)):
        engine = Engine(net, tree, Inference(9, 0.1), ("input", "dense3"))
        engine.relax(nodes)
        engine.compute_gradients()
        engines.append(engine)
    one, other = engines
    for name, layer in zip(scaled.names, layers, strict=True):
        assert_near(one.read_activity(name), other.read_activity(name), 1e-12, name)
        expected = layer.scale * other.gradients()[name]["weight"]
        assert_near(one.gradients()[name]["weight"], expected, 1e-12, name)
        assert_near(one.gradients()[name]["bias"], other.gradients()[name]["bias"], 1e-12, name)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (lambda: [Dense(5, skip=True)], "use activate='input' and a Gaussian energy"),
        (lambda: [Dense(6, activate="input", skip=True)], "layer 'dense1' skips from 5 units to 6"),
        (lambda: [Dense(5, scale=0.0)], "scale must be a finite number above 0, got 0.0"),
        (lambda: [Dense(5, scale=-1.0)], "scale must be a finite number above 0, got -1.0"),
        (lambda: [Dense(5, activate="input", skip=1)], "skip must be True or False, got 1"),
    ],
)
def test_scales_and_skips_that_cannot_be_are_refused_in_a_sentence(layers, words):
    with pytest.raises(ValueError, match=words):
        chain(5, layers())
