"""Settings of inference: what is refused, when a relaxation stops, and how it says that it went wrong."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    INFERENCES,
    NETWORKS,
    assert_near,
    random_nodes,
    random_weights,
    relax,
    supervised,
)

from pctt import Engine, Inference, InferenceDiverged, Status, infer, init, weight_gradients

NET = NETWORKS["two groups"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": -1}, "num_steps must be a whole number of at least 0, got -1"),
        ({"num_steps": 2.0}, "num_steps must be a whole number of at least 0, got 2.0"),
        ({"num_steps": True}, "num_steps must be a whole number of at least 0, got True"),
        ({"rate": 0.0}, "rate must be a finite number above 0, got 0.0"),
        ({"rate": -0.1}, "rate must be a finite number above 0, got -0.1"),
        ({"rate": math.inf}, "rate must be a finite number above 0, got inf"),
        ({"rate": math.nan}, "rate must be a finite number above 0, got nan"),
        ({"rate": "fast"}, "rate must be a finite number above 0, got 'fast'"),
        ({"prediction": "dead"}, "prediction must be one of live, fixed, got 'dead'"),
        ({"dynamics": "newton"}, "dynamics must be one of euler, momentum, got 'newton'"),
        ({"dynamics": "momentum", "momentum": 1.0}, r"momentum must be in \[0.0, 1.0\), got 1.0"),
        ({"dynamics": "momentum", "momentum": -0.1}, r"momentum must be in \[0.0, 1.0\), got -0.1"),
        ({"momentum": 0.5}, "momentum=0.5 has no effect with dynamics='euler'"),
        ({"initial": "zeros"}, "initial must be one of feedforward, got 'zeros'"),
        ({"tolerance": 0.0}, "tolerance must be a finite number above 0, got 0.0"),
        ({"tolerance": math.nan}, "tolerance must be a finite number above 0, got nan"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        Inference(**settings)


# --- the stopping rule --------------------------------------------------------------------------------------


def expected_stop(energies: torch.Tensor, tolerance: float, first: int) -> int:
    """The first step >= `first` whose energy differs from the one before by at most the tolerance of that."""
    totals = energies.sum(-1).tolist()
    for step in range(first, len(totals)):
        if abs(totals[step - 1] - totals[step]) <= tolerance * abs(totals[step - 1]):
            return step
    return len(totals) - 1


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["tanh at the output", "tanh at the input", "categorical", "one precision"])
def test_inference_stops_at_the_step_whose_energy_has_settled_according_to_the_oracle(name, tolerance):
    """A rule one step late wastes a step a batch; one that compares the wrong rows stops at random.

    Tolerances are far above fp64 rounding, and no row lies within 1e-9 of its threshold (asserted).
    """
    net, settings = NETWORKS[name], Inference(400, 0.1)
    weights, clamp = random_weights(net), supervised(net)
    expected = relax(net, weights, clamp, settings)
    # The rule waits until errors have reached every node: L - 1 steps, and one that is like all later ones.
    stop = expected_stop(expected.energies, tolerance, first=len(net.layers))
    totals = expected.energies.sum(-1)
    relative = (totals.diff() / totals[:-1]).abs()
    assert ((relative - tolerance).abs() > 1e-9).all() and stop < 400
    result = infer(net, weights, clamp, replace(settings, tolerance=tolerance))
    assert result.status is Status.CONVERGED and result.status.ok
    assert result.num_steps == stop
    assert result.energy.shape == (stop + 1, len(net.layers))
    assert_near(result.energy, expected.energies[: stop + 1], 1e-12 * expected.energies.abs().max().item())
    for node in net.nodes:
        assert_near(result.activities[node], expected.activities[stop][node], 1e-12, node)


def test_the_rule_waits_until_the_errors_have_reached_every_node():
    """Ten layers at a rate so small that every step changes the energy by less than the tolerance.

    Without the wait inference would stop after one step, and no layer but the last two would ever learn.
    """
    net = NETWORKS["two groups"]
    weights, clamp = random_weights(net), supervised(net)
    result = infer(net, weights, clamp, Inference(50, 1e-6, tolerance=1e-2))
    assert result.status is Status.CONVERGED
    assert result.num_steps >= len(net.layers) - 1
    gradients = weight_gradients(net, weights, result)
    assert all(gradients[name]["weight"].any() for name in net.names)


def test_a_tolerance_that_is_not_reached_runs_all_steps():
    weights, clamp = random_weights(NET), supervised(NET)
    result = infer(NET, weights, clamp, Inference(15, 0.05, tolerance=1e-9))
    assert result.status is Status.COMPLETED and result.num_steps == 15


def test_nothing_to_relax_converges_at_once():
    """Only the input clamped: the energy is 0 and stays 0, and 0 <= tolerance * 0 counts as settled."""
    nodes = random_nodes(NET)
    result = infer(NET, random_weights(NET), {"input": nodes["input"]}, Inference(30, 0.1, tolerance=1e-6))
    assert result.status is Status.CONVERGED and result.num_steps <= 1


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tanh at the output", "tanh at the input", "categorical", "one precision"])
def test_a_rate_that_diverges_is_reported_and_raises_on_request(name):
    """Rate 5 is above 2 over the largest curvature, which is at least the smallest precision, 0.5 (E6)."""
    net = NETWORKS[name]
    weights, clamp = random_weights(net), supervised(net)
    result = infer(net, weights, clamp, Inference(40, 5.0))
    assert result.status in (Status.DIVERGED, Status.NON_FINITE) and not result.status.ok
    with pytest.raises(InferenceDiverged, match="lower the rate"):
        infer(net, weights, clamp, Inference(40, 5.0), throw=True)


def test_energies_that_grow_but_stay_finite_are_called_diverged_and_overflow_non_finite():
    """relu without bias keeps growing geometrically: about 1e10 after 12 steps, beyond 1e308 after 600."""
    net = NETWORKS["relu at the output"]
    weights, clamp = random_weights(net), supervised(net)
    assert infer(net, weights, clamp, Inference(12, 5.0)).status is Status.DIVERGED
    assert infer(net, weights, clamp, Inference(600, 5.0)).status is Status.NON_FINITE


def test_a_tolerance_does_not_hide_a_divergence():
    weights, clamp = random_weights(NET), supervised(NET)
    assert not infer(NET, weights, clamp, Inference(40, 5.0, tolerance=1e-6)).status.ok


@pytest.mark.parametrize("settings", INFERENCES)
def test_a_stable_rate_is_ok(settings):
    result = infer(NET, random_weights(NET), supervised(NET), INFERENCES[settings], throw=True)
    assert result.status is Status.COMPLETED
    assert result.num_steps == INFERENCES[settings].num_steps


def test_weights_that_are_not_finite_end_in_non_finite():
    weights = random_weights(NET)
    weights["dense2"]["weight"][0, 0] = math.nan
    assert infer(NET, weights, supervised(NET), Inference(3, 0.1)).status is Status.NON_FINITE


# --- what a relaxation reports ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_energies_and_error_norms_of_a_relaxation_are_those_of_its_state(name):
    """Energies are batch means per layer, norms the root of the batch mean of e'e, recorded or not."""
    net = NETWORKS[name]
    weights, clamp = random_weights(net), supervised(net)
    expected = relax(net, weights, clamp, Inference(6, 0.1))
    for record in (False, True):
        engine = Engine(net, weights, Inference(6, 0.1), ("input", net.output))
        relaxation = engine.relax(clamp, record)
        assert relaxation.energies == pytest.approx(expected.energies[-1].tolist(), rel=1e-12, abs=1e-12)
        norms = [expected.errors[-1][n].square().sum(-1).mean().sqrt().item() for n in net.names]
        assert relaxation.error_norms == pytest.approx(norms, rel=1e-12)
        assert (relaxation.trajectory is not None) == record


def test_an_engine_used_for_batches_of_several_sizes_keeps_nothing_of_the_batch_before():
    """Deviations and velocities left over from the last batch would be small, plausible and wrong."""
    inference = INFERENCES["live, momentum"]
    engine = Engine(NET, random_weights(NET), inference, ("input", NET.output))
    for batch, seed in ((4, 1), (2, 2), (4, 3), (2, 1), (4, 1)):
        clamp = supervised(NET, batch, seed)
        expected = relax(NET, random_weights(NET), clamp, inference)
        engine.relax(clamp)
        engine.compute_gradients()
        for node in NET.names[:-1]:
            assert_near(engine.read_node("activity", node), expected.activities[-1][node], 1e-12, node)
        for name, layer in expected.gradients.items():
            assert_near(engine.gradients()[name]["weight"], layer["weight"], 1e-12, name)


def test_results_are_copies_that_the_next_relaxation_leaves_alone():
    weights = init(NET, dtype=torch.float64)
    first = infer(NET, weights, supervised(NET), Inference(5, 0.1))
    kept = {name: values.clone() for name, values in first.activities.items()}
    infer(NET, weights, supervised(NET, seed=9), Inference(5, 0.1))
    assert all(torch.equal(first.activities[name], values) for name, values in kept.items())
