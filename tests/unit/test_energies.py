"""Energies against autograd: full precisions, log-determinants, learned variances, refusals.

The twin of a matrix precision is its Cholesky factor: 1/2 |C'e|^2 with P = C C'. Tolerance: as in
test_equalities.py.
"""

import math

import pytest
import torch
from helpers import (
    FULL,
    VARIANT_NETWORKS,
    assert_near,
    assert_trees_near,
    backprop_oracle,
    random_nodes,
    random_weights,
    supervised,
)

from pctt import (
    SGD,
    Dense,
    Engine,
    Gaussian,
    Inference,
    Trainer,
    backprop,
    chain,
    infer,
    init,
    weight_gradients,
)

EPS = 1e-12
P = torch.tensor(FULL, dtype=torch.float64)


def by_factor(error: torch.Tensor) -> torch.Tensor:
    """Energy per sample of a full precision, by its Cholesky factor."""
    factor = torch.linalg.cholesky(P)
    return 0.5 * (error @ factor).square().sum(-1) - factor.diagonal().log().sum()


def test_a_full_precision_has_the_energy_of_its_cholesky_factor():
    """1/2 (e'Pe - log|P|), batch mean, before and after inference, and log|P| by the factor's diagonal."""
    energy = Gaussian(FULL)
    assert energy.is_full and not energy.is_unit
    assert energy.log_determinant(4) == pytest.approx(
        2 * torch.linalg.cholesky(P).diagonal().log().sum().item(), rel=1e-13
    )
    net = chain(5, [Dense(4, "tanh", energy=energy), Dense(4, energy=energy)])
    weights, clamp = random_weights(net), supervised(net)
    for steps in (0, 7):
        result = infer(net, weights, clamp, Inference(steps, 0.1))
        for index, name in enumerate(net.names):
            expected = by_factor(result.errors[name]).mean()
            assert result.energy[-1, index].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("placement", ["output", "input"])
def test_a_full_precision_moves_activities_and_weights_down_its_energy(placement):
    """One step of a start away from the predictions, and the gradients, by autograd of the factored energy.

    P applied in the error alone, or in the feedback alone, is a descent in nothing; a diagonal P would not
    tell the two apart from P'.
    """
    net = chain(4, [Dense(4, "tanh", activate=placement, energy=Gaussian(FULL))] * 3)
    weights, nodes = random_weights(net), random_nodes(net)
    clamp = {"input": nodes["input"], "dense3": nodes["dense3"]}
    initial = {"dense1": nodes["dense1"], "dense2": nodes["dense2"]}

    def total(states, tree):
        energies = []
        for below, name in zip(net.nodes, net.names, strict=False):
            source = torch.tanh(states[below]) if placement == "input" else states[below]
            drive = source @ tree[name]["weight"] + tree[name]["bias"]
            mean = drive if placement == "input" else torch.tanh(drive)
            energies.append(by_factor(states[name] - mean))
        return torch.stack(energies).sum(0)

    leaves = {name: nodes[name].clone().requires_grad_() for name in initial}
    slopes = torch.autograd.grad(total({**clamp, **leaves}, weights).sum(), list(leaves.values()))
    result = infer(net, weights, clamp, Inference(1, 0.05), initial)
    for (name, start), slope in zip(initial.items(), slopes, strict=True):
        assert_near(result.activities[name], start - 0.05 * slope, EPS, name)

    tree = {n: {k: v.clone().requires_grad_() for k, v in layer.items()} for n, layer in weights.items()}
    total(result.activities, tree).mean().backward()
    expected = {n: {k: v.grad for k, v in layer.items()} for n, layer in tree.items()}
    assert_trees_near(weight_gradients(net, weights, result), expected, 10 * EPS)


def test_a_diagonal_matrix_is_a_precision_per_unit():
    values = (0.5, 1.0, 2.0, 3.0)
    matrix = tuple(tuple(v if i == j else 0.0 for j in range(4)) for i, v in enumerate(values))
    results = []
    for precision in (values, matrix):
        net = chain(5, [Dense(4, "tanh", energy=Gaussian(precision))] * 3)
        results.append(infer(net, random_weights(net), supervised(net), Inference(9, 0.1)))
    assert_near(results[1].energy, results[0].energy, 10 * EPS)
    for name in ("dense1", "dense2"):
        assert_near(results[1].activities[name], results[0].activities[name], EPS, name)


@pytest.mark.parametrize("precision", [0.5, 4.0, (0.5, 1.0, 2.0, 3.0)])
def test_a_variance_that_has_not_moved_yet_is_one_over_the_precision(precision):
    """States, energies and log-determinants of a learned variance at its start are those of the precision."""
    results = []
    for energy in (Gaussian(precision), Gaussian(precision, "diagonal")):
        net = chain(5, [Dense(4, "tanh", energy=energy)] * 3)
        weights = init(net, seed=1, dtype=torch.float64)
        results.append(infer(net, weights, supervised(net), Inference(9, 0.1)))
    assert_near(results[1].energy, results[0].energy, 10 * EPS)
    assert_near(results[1].activities["dense2"], results[0].activities["dense2"], EPS)


@pytest.mark.parametrize(("learned", "adaptation"), [("diagonal", 1.0), ("diagonal", 0.2), ("scalar", 0.2)])
def test_a_variance_moves_by_its_share_towards_the_mean_square(learned, adaptation):
    """v <- v + adaptation (mean_B e^2 - v), after the gradients, which still belong to the old precision; the
    next relaxation has the new one, in its steps, its energy and its log-determinant.
    """
    energy = Gaussian(2.0, learned, adaptation)
    net = chain(5, [Dense(6, "tanh"), Dense(4, energy=energy)])
    weights = {**random_weights(net)}
    weights["dense2"]["variance"] = torch.full((4,), 0.5, dtype=torch.float64)
    clamp, inference = supervised(net), Inference(6, 0.1)
    engine = Engine(net, weights, inference, ("input", net.output))
    with_rule = Engine(net, weights, inference, ("input", net.output), learning=SGD(1e-14))
    engine.relax(clamp)
    with_rule.relax(clamp)
    squares = engine.read_node("error", "dense2").square().mean(0)
    aim = squares.mean().expand(4) if learned == "scalar" else squares
    with_rule.learn(1e-14, 1)
    found = with_rule.weights()["dense2"]["variance"]
    assert_near(found, 0.5 + adaptation * (aim - 0.5), EPS)

    fixed = chain(5, [Dense(6, "tanh"), Dense(4, energy=Gaussian(tuple((1 / found).tolist())))])
    kept = {name: {k: v for k, v in layer.items() if k != "variance"} for name, layer in weights.items()}
    expected = infer(fixed, kept, clamp, inference)
    relaxation = with_rule.relax(clamp)
    assert relaxation.energies == pytest.approx(expected.energy[-1].tolist(), rel=1e-11)
    assert_near(with_rule.read_activity("dense1"), expected.activities["dense1"], 1e-11)


@pytest.mark.parametrize("name", [name for name in VARIANT_NETWORKS if "variances" not in name])
def test_the_backprop_twin_has_scales_skips_and_matrix_precisions_too(name):
    """A baseline without them would be another network, trained under the same name."""
    net = VARIANT_NETWORKS[name]
    weights, clamp = random_weights(net), supervised(net)
    expected, _ = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    found, loss = backprop.gradients(net, weights, clamp["input"], clamp[net.output])
    assert_trees_near(found, expected, EPS, relative=True)
    energy = infer(net, weights, clamp, Inference(0)).energy[0, -1].item()
    assert loss == pytest.approx(energy, rel=1e-12)


def test_the_backprop_twin_has_no_errors_for_a_variance_to_follow():
    """Were it not refused, the variance would follow a target that nobody computes."""
    net = VARIANT_NETWORKS["learned variances"]
    with pytest.raises(ValueError, match="a learned variance follows the errors of predictive coding"):
        Trainer(net, algorithm="backprop")


def test_a_learned_variance_stands_beside_the_weights_and_fits_them():
    """[units] per layer that learns one, at 1 / precision; weights without it are refused by name."""
    net = VARIANT_NETWORKS["learned variances"]
    weights = init(net, dtype=torch.float64)
    assert_near(weights["dense1"]["variance"], torch.full((6,), 0.5, dtype=torch.float64), 0.0)
    assert_near(weights["dense2"]["variance"], torch.full((6,), 2.0, dtype=torch.float64), 0.0)
    assert "variance" not in weights["dense3"]
    expected = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    assert_near(weights["dense4"]["variance"], expected, 0.0)
    without = {name: {k: v for k, v in layer.items() if k != "variance"} for name, layer in weights.items()}
    with pytest.raises(ValueError, match=r"layer 'dense1' needs \['bias', 'variance', 'weight'\]"):
        infer(net, without, supervised(net))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": 0.0}, "precision must be a finite number above 0, got 0.0"),
        ({"precision": (1.0, -1.0)}, "precision must be a finite number above 0, got -1.0"),
        ({"precision": (1.0, math.inf)}, "precision must be a finite number above 0, got inf"),
        ({"precision": ()}, "precision must be a number or one number per unit, got an empty tuple"),
        (
            {"precision": ((1.0, 0.0), (0.0,))},
            r"a full precision must be a square matrix, got 2 rows of lengths \[1, 2\]",
        ),
        ({"precision": ((1.0, 0.0),)}, "must be a square matrix, got 1 rows"),
        ({"precision": (1.0, (0.0, 1.0))}, r"must be a square matrix, got 2 rows of lengths \[0, 2\]"),
        ({"precision": ((1.0, 0.5), (0.4, 1.0))}, "must be symmetric and positive definite"),
        ({"precision": ((1.0, 2.0), (2.0, 1.0))}, "must be symmetric and positive definite"),
        ({"precision": ((math.nan, 0.0), (0.0, 1.0))}, "must be symmetric and positive definite"),
        ({"precision": FULL, "learned": "diagonal"}, "a full precision is not learned"),
        ({"precision": (1.0, 2.0), "learned": "scalar"}, "learned='scalar' starts from one precision"),
        ({"learned": "full"}, "learned must be one of scalar, diagonal, got 'full'"),
        ({"learned": "diagonal", "adaptation": 0.0}, "adaptation must be above 0"),
        ({"learned": "diagonal", "adaptation": 1.5}, r"adaptation must be in \[0.0, 1.0"),
        ({"learned": "diagonal", "adaptation": -0.1}, r"adaptation must be in \[0.0, 1.0"),
    ],
)
def test_an_energy_that_cannot_be_is_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        Gaussian(**settings)


@pytest.mark.parametrize("precision", [(1.0, 2.0), ((1.0, 0.0), (0.0, 1.0))])
def test_a_precision_for_another_number_of_units_is_refused(precision):
    with pytest.raises(ValueError, match=r"precision must be one number or 3 \(one per unit\), got 2"):
        chain(4, [Dense(3, energy=Gaussian(precision))])


def test_lists_become_tuples_so_that_energies_can_be_compared_and_stored():
    """As they come out of TOML or JSON."""
    rows = [list(row) for row in FULL]
    assert Gaussian(rows) == Gaussian(FULL)  # pyright: ignore[reportArgumentType]
    assert hash(Gaussian([1.0, 2.0])) == hash(Gaussian((1.0, 2.0)))  # pyright: ignore[reportArgumentType]
