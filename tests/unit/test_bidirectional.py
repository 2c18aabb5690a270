"""Bidirectional and hybrid predictive coding: two chains over the same nodes, against autograd."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ORACLE_FUNCTIONS, assert_near, random_nodes, random_weights
from torch import Tensor

from pctt import (
    SGD,
    Adam,
    Categorical,
    Dense,
    Gaussian,
    Inference,
    Network,
    Nudge,
    Trainer,
    chain,
    infer,
    weight_gradients,
)
from pctt import load as load_run
from pctt.network import Weights

NET = chain(
    5,
    [Dense(6, "tanh"), Dense(6, "gelu", energy=Gaussian(0.5)), Dense(3, energy=Gaussian(2.0))],
    backward=[
        Dense(6, "silu", energy=Gaussian(0.3)),
        Dense(6, "tanh", activate="input", bias=False),
        Dense(5, "gelu", activate="input"),
    ],
)


EPS = 1e-12
"""12 steps of sums over 6 numbers of order 1 in fp64, 1e-16 each, with room for their growth."""


def prediction(layer: Dense, weights: Mapping[str, Tensor], source: Tensor) -> Tensor:
    function = ORACLE_FUNCTIONS[layer.activation]
    source = function(source) if layer.activate == "input" else source
    drive = source @ weights["weight"] + (weights["bias"] if layer.bias else 0.0)
    return drive if layer.activate == "input" else function(drive)


def energies(net: Network, weights: Weights, nodes: list[Tensor]) -> list[Tensor]:
    """Per layer, those of the chain down after those of the chain up; summed over the batch."""
    assert net.backward is not None
    last = len(net.layers)
    up = [(name, layer, i, i + 1) for i, (name, layer) in enumerate(zip(net.names, net.layers, strict=True))]
    back = zip(net.backward.names, net.backward.layers, strict=True)
    down = [(name, layer, last - i, last - i - 1) for i, (name, layer) in enumerate(back)]
    found = []
    for name, layer, source, target in [*up, *down]:
        assert isinstance(layer.energy, Gaussian) and isinstance(layer.energy.precision, float)
        precision = layer.energy.precision
        error = nodes[target] - prediction(layer, weights[name], nodes[source])
        constant = layer.units * torch.tensor(precision, dtype=error.dtype).log() * len(error)
        found.append(0.5 * ((precision * error**2).sum() - constant))
    return found


def swept_down(clamp: Mapping[str, Tensor], weights: Weights) -> list[Tensor]:
    assert NET.backward is not None
    nodes = {NET.output: clamp[NET.output]}
    above = NET.output
    for name, layer in zip(NET.backward.names, NET.backward.layers, strict=True):
        below = name.removesuffix("_back")
        nodes[below] = clamp.get(below, prediction(layer, weights[name], nodes[above]))
        above = below
    return [nodes[name] for name in NET.nodes]


def relaxed(clamp: Mapping[str, Tensor], weights: Weights, inference: Inference) -> list[Tensor]:
    """In amortised inference the chain down gives the start and no energy."""
    batch, amortised = len(next(iter(clamp.values()))), inference.initial == "amortised"
    nodes = [clamp.get("input", torch.zeros(batch, NET.input, dtype=torch.float64))]
    for name, layer in zip(NET.names, NET.layers, strict=True):
        nodes.append(clamp.get(name, prediction(layer, weights[name], nodes[-1])))
    nodes = swept_down(clamp, weights) if amortised else nodes
    counted = slice(len(NET.layers) if amortised else None)
    velocity = [torch.zeros_like(node) for node in nodes]
    for _ in range(inference.num_steps):
        leaves = [node.clone().requires_grad_() for node in nodes]
        slopes = torch.autograd.grad(
            torch.stack(energies(NET, weights, leaves)[counted]).sum(), leaves, allow_unused=True
        )
        for i, name in enumerate(NET.nodes):
            if name not in clamp:
                assert slopes[i] is not None
                velocity[i] = inference.momentum * velocity[i] + slopes[i]
                nodes[i] = nodes[i] - inference.rate * velocity[i]
    return nodes


@pytest.mark.parametrize(
    ("held", "initial"),
    [
        (("input", "dense3"), "feedforward"),
        (("dense3",), "feedforward"),
        (("input",), "feedforward"),
        (("dense1",), "feedforward"),
        (("dense3",), "amortised"),
        (("input", "dense3"), "amortised"),
        (("dense1", "dense3"), "amortised"),
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_states_energies_and_gradients_are_those_of_the_summed_energy(
    held: tuple[str, ...], initial: str, momentum: float
) -> None:
    """Both chains must pull on every node, with its own sign and precision: a lost pull still descends."""
    weights, nodes = random_weights(NET), random_nodes(NET, 4)
    clamp = {name: nodes[name] for name in held}
    knobs: dict[str, Any] = {"dynamics": "momentum", "momentum": momentum} if momentum else {}
    inference = Inference(num_steps=12, rate=0.05, initial=initial, **knobs)
    result = infer(NET, weights, clamp, inference)
    expected = relaxed(clamp, weights, inference)
    for name, node in zip(NET.nodes, expected, strict=True):
        assert_near(result.activities[name], node, EPS, name)
    leaves = {
        name: {k: v.clone().requires_grad_() for k, v in tree.items()} for name, tree in weights.items()
    }
    per_layer = energies(NET, leaves, expected)
    assert_near(result.energy[-1], torch.stack(per_layer).detach() / 4, EPS)
    (torch.stack(per_layer).sum() / 4).backward()
    found = weight_gradients(NET, weights, result)
    assert set(found) == set(NET.layer_names)
    for name, tree in leaves.items():
        for key, leaf in tree.items():
            assert_near(found[name][key], leaf.grad, EPS, f"{key} of {name}")  # type: ignore[arg-type]


def test_grouping_changes_nothing() -> None:
    weights, nodes = random_weights(NET), random_nodes(NET, 4)
    clamp = {name: nodes[name] for name in ("input", "dense3")}
    one, other = (
        infer(NET, weights, clamp, Inference(8, 0.05), grouped=grouped) for grouped in (True, False)
    )
    for name in NET.nodes:
        assert_near(one.activities[name], other.activities[name], 1e-14, name)


def test_predictions_are_activities_minus_errors_in_both_chains() -> None:
    weights, nodes = random_weights(NET), random_nodes(NET, 4)
    result = infer(NET, weights, {"input": nodes["input"], "dense3": nodes["dense3"]}, Inference(5, 0.05))
    layer = NET.backward.layers[0]  # type: ignore[union-attr]
    expected = prediction(layer, weights["dense2_back"], result.activities["dense3"])
    assert_near(result.predictions["dense2_back"], expected, EPS)


def test_a_run_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Weights and learning state of the chain down, too."""
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(40, 5, generator=generator), torch.randint(0, 3, (40,), generator=generator)

    def trainer() -> Trainer:
        return Trainer(NET, Inference(4, 0.05), Adam(1e-2), batch_size=8)

    whole, first = trainer(), trainer()
    whole.fit(data, epochs=2)
    first.fit(data, epochs=1)
    first.save(tmp_path)
    second = load_run(tmp_path)
    second.fit(data, epochs=2)
    for name, tree in whole.weights.items():
        for key, values in tree.items():
            assert torch.equal(second.weights[name][key], values), f"{key} of {name}"


@pytest.mark.parametrize(
    "knobs",
    [
        {"prediction": "fixed"},
        {"variables": "errors"},
        {"sweep": "gauss_seidel"},
        {"weights_at": "every_step"},
        {"nudge": Nudge()},
        {"dynamics": "langevin"},
        {"dynamics": "heun"},
        {"initial": "zeros"},
    ],
)
def test_settings_that_it_has_no_program_for_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a bidirectional network takes"):
        Trainer(NET, Inference(4, 0.05, **knobs), SGD(0.1))


def test_backward_layers_must_fit_the_chain() -> None:
    with pytest.raises(ValueError, match=r"\[6, 5\] units, got \[6\]"):
        chain(5, [Dense(6), Dense(3)], backward=[Dense(6)])
    with pytest.raises(ValueError, match="Gaussian energies only"):
        chain(5, [Dense(3, "softmax", energy=Categorical())], backward=[Dense(5)])
    with pytest.raises(ValueError, match="stands in both chains"):
        chain(5, [Dense(6), Dense(3)], backward=[Dense(6, name="dense1"), Dense(5)])
    with pytest.raises(ValueError, match="backward layers are not run by the card backends"):
        Trainer(NET, Inference(4, 0.05), SGD(0.1), backend="emulated")


def test_a_class_is_predicted_from_the_input_alone_whatever_the_start() -> None:
    """A prediction must not begin at what the amortiser made of the targets of the batch before."""
    weights, nodes = random_weights(NET), random_nodes(NET, 4)
    data = nodes["input"], torch.tensor([0, 1, 2, 0])
    expected = nodes["input"]
    for name, layer in zip(NET.names, NET.layers, strict=True):
        expected = prediction(layer, weights[name], expected)
    trainer = Trainer(NET, Inference(4, 0.05, initial="amortised"), SGD(1e-9), weights=weights, batch_size=4)
    trainer.fit(data, epochs=1)
    assert_near(trainer.predict(nodes["input"]), expected, 1e-6)


def test_amortised_starts_need_backward_layers_and_a_clamped_output() -> None:
    weights, nodes = random_weights(NET), random_nodes(NET, 4)
    inference = Inference(4, 0.05, initial="amortised")
    with pytest.raises(ValueError, match="starts from the output, 'dense3'; clamp it"):
        infer(NET, weights, {"input": nodes["input"]}, inference)
    with pytest.raises(ValueError, match="backward layers, which this network lacks"):
        Trainer(chain(5, [Dense(3)]), inference)
