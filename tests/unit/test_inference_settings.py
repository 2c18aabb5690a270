"""Settings of inference: what is refused, when a relaxation stops, and how it says that it went wrong."""

import math
from dataclasses import replace
from itertools import combinations

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

from pctt import (
    SGD,
    Dense,
    Engine,
    Inference,
    InferenceDiverged,
    Nudge,
    Status,
    chain,
    infer,
    init,
    weight_gradients,
)
from pctt.inference.settings import CONTRADICTIONS

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
        (
            {"dynamics": "newton"},
            "dynamics must be one of euler, momentum, .*langevin.*, got 'newton'",
        ),
        ({"dynamics": "momentum", "momentum": 1.0}, r"momentum must be in \[0.0, 1.0\), got 1.0"),
        ({"dynamics": "momentum", "momentum": -0.1}, r"momentum must be in \[0.0, 1.0\), got -0.1"),
        ({"momentum": 0.5}, "momentum=0.5 has no effect with dynamics='euler'"),
        ({"initial": "ones"}, "initial must be one of feedforward, zeros, carried.*, got 'ones'"),
        ({"variables": "weights"}, "variables must be one of states, errors, got 'weights'"),
        ({"sweep": "random"}, "sweep must be one of jacobi, gauss_seidel, got 'random'"),
        ({"weights_at": "start"}, "weights_at must be one of end, every_step, staircase, got 'start'"),
        ({"dynamics": "adam", "betas": (0.9,)}, r"betas must be two numbers, got \(0.9,\)"),
        ({"dynamics": "adam", "betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"dynamics": "adam", "betas": (0.9, 1.0)}, r"betas must be in \[0.0, 1.0\), got 1.0"),
        ({"dynamics": "heun", "step_tolerance": 0.0}, "step_tolerance must be a finite number above 0"),
        ({"dynamics": "langevin", "temperature": -1.0}, "temperature must be a finite number above 0"),
        ({"dynamics": "langevin", "burn_in": -1}, "burn_in must be a whole number of at least 0, got -1"),
        ({"weights_at": "every_step", "num_steps": 0}, "num_steps=0 has none; take at least one"),
        (
            {"dynamics": "langevin", "burn_in": 20, "num_steps": 20},
            "burn_in=20 leaves no sample of num_steps=20; lower one or raise the other",
        ),
        ({"wave_boost": 0.0}, "wave_boost must be a finite number above 0, got 0.0"),
        ({"nudge": 0.5}, r"nudge must be Nudge\(...\) or None, got 0.5"),
        ({"tolerance": 0.0}, "tolerance must be a finite number above 0, got 0.0"),
        ({"tolerance": math.nan}, "tolerance must be a finite number above 0, got nan"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        Inference(**settings)


# --- knobs that do nothing, and knobs that contradict -------------------------------------------------------

OWN_KNOBS: dict[str, tuple[object, tuple[str, ...]]] = {
    "momentum": (0.5, ("momentum",)),
    "betas": ((0.5, 0.9), ("adam",)),
    "step_tolerance": (1e-3, ("heun",)),
    "temperature": (0.5, ("langevin",)),
    "burn_in": (3, ("langevin",)),
}
"""Knobs that only some rules of dynamics read: a value, and which."""


@pytest.mark.parametrize("dynamics", ["euler", "momentum", "adam", "heun", "langevin"])
@pytest.mark.parametrize("knob", OWN_KNOBS)
def test_a_knob_that_its_dynamics_do_not_read_is_refused_and_others_accepted(knob, dynamics):
    """A temperature without noise, betas without Adam: whoever sets them believes that they do something."""
    value, rules = OWN_KNOBS[knob]
    if dynamics in rules:
        assert getattr(Inference(dynamics=dynamics, **{knob: value}), knob) == value
        return
    with pytest.raises(ValueError) as refusal:
        Inference(dynamics=dynamics, **{knob: value})
    words = str(refusal.value)
    assert words.startswith(f"{knob}={value} has no effect with dynamics={dynamics!r}")
    assert f"use dynamics={rules[0]!r} or leave {knob} out" in words


def test_a_knob_at_its_default_is_not_refused():
    """Settings read back from a checkpoint name every knob."""
    assert Inference(betas=(0.9, 0.999), temperature=1.0, step_tolerance=1e-2, burn_in=0) == Inference()
    assert Inference(betas=[0.9, 0.999]) == Inference()  # pyright: ignore[reportArgumentType]


SOME_VALUES: dict[str, list[object]] = {
    "weights_at": ["every_step", "staircase"],
    "dynamics": ["momentum", "adam", "heun", "langevin"],
    "initial": ["zeros", "carried"],
    "tolerance": [1e-3],
    "wave_boost": [4.0],
    "nudge": [
        Nudge(0.3),
        Nudge(0.3, "centred"),
        Nudge(0.3, "positive", "loss"),
        Nudge(0.3, "centred", "loss"),
    ],
}
"""What `...`, any value but the default, may stand for."""


def settings_of(condition: tuple[str, object]) -> list[dict[str, object]]:
    """Every way to fulfil one condition of the table, by the one knob that it names."""
    name, value = condition
    knob, _, attribute = name.partition(".")
    if attribute:
        return [{knob: nudge} for nudge in SOME_VALUES[knob] if getattr(nudge, attribute) == value]
    return [{knob: one} for one in (SOME_VALUES[knob] if value is ... else [value])]


@pytest.mark.parametrize(
    ("one", "other", "why"),
    CONTRADICTIONS,
    ids=[f"{a[0]}-{b[0]}-{i}" for i, (a, b, _) in enumerate(CONTRADICTIONS)],
)
def test_every_contradiction_is_refused_with_both_knobs_named(one, other, why):
    """Nothing but the two knobs is set, so no other row can be what refuses them; in either order, by a
    sentence that says both, with their values, and why.
    """
    seen = []
    for first in settings_of(one):
        for second in settings_of(other):
            with pytest.raises(ValueError) as refusal:
                Inference(**{**first, **second})
            words = str(refusal.value)
            for name, _ in (one, other):
                assert f"{name}=" in words, words
            assert "contradict each other: " in words
            seen.append(words)
    assert any(why in words for words in seen), f"another row always comes first: {seen}"
    for alone in (*settings_of(one), *settings_of(other)):
        Inference(**alone)  # neither is refused by itself


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"variables": "errors", "prediction": "fixed"},
            "variables='errors' and prediction='fixed' contradict each other: an activity is its prediction "
            "plus its error, anew each step.",
        ),
        (
            {"weights_at": "every_step", "dynamics": "heun"},
            "weights_at='every_step' and dynamics='heun' contradict each other: its step is tried before it "
            "is taken.",
        ),
        (
            {"weights_at": "staircase", "initial": "zeros"},
            "weights_at='staircase' and initial='zeros' contradict each other: it counts on errors that "
            "travel one layer per step from a feedforward start.",
        ),
        (
            {"dynamics": "langevin", "tolerance": 1e-3},
            "dynamics='langevin' and tolerance=0.001 contradict each other: its energy never settles.",
        ),
        (
            {"wave_boost": 2.0, "sweep": "gauss_seidel"},
            "wave_boost=2.0 and sweep='gauss_seidel' contradict each other: it counts on errors that travel "
            "one layer per step.",
        ),
        (
            {"nudge": Nudge(0.1, "centred", "loss"), "weights_at": "staircase"},
            "nudge.style='loss' and weights_at='staircase' contradict each other: the output would have no "
            "error yet when its turn comes.",
        ),
    ],
)
def test_a_contradiction_reads_as_a_sentence(settings, sentence):
    with pytest.raises(ValueError) as refusal:
        Inference(**settings)
    assert str(refusal.value) == sentence


def test_no_two_rows_say_the_same():
    pairs = [frozenset((one, other)) for one, other, _ in CONTRADICTIONS]
    assert len(set(pairs)) == len(pairs)
    for one, other, why in CONTRADICTIONS:
        assert one[0] != other[0] and why and not why.endswith(".")


def test_any_two_knobs_that_do_not_contradict_relax_to_something_finite():
    """Every pair of values of two knobs, on a network of three layers, training clamp: refused by the table
    or run. A pair that the table forgot and that the assembler trips over would end in an assertion there.
    """
    net = chain(4, [Dense(5, "tanh"), Dense(5, "tanh"), Dense(3)])
    weights, clamp = random_weights(net), supervised(net)
    knobs: list[dict[str, object]] = [
        {"prediction": "fixed"},
        {"variables": "errors"},
        {"sweep": "gauss_seidel"},
    ]
    knobs += [{name: value} for name, values in SOME_VALUES.items() for value in values]
    run = 0
    for one, other in combinations(knobs, 2):
        if set(one) & set(other):
            continue
        try:
            inference = Inference(4, 0.05, **{**one, **other})
        except ValueError:
            continue
        engine = Engine(net, weights, inference, ("input", net.output), learning=SGD(0.01))
        for step in (1, 2):
            engine.set_learning(0.01, step)
            assert engine.relax(clamp).status.ok, f"{one}, {other}"
            engine.learn(0.01, step)
        # Of fixed predictions from zeros the sources are 0, so that biases alone learn.
        key = "bias" if {**one, **other} == {"prediction": "fixed", "initial": "zeros"} else "weight"
        moved = [(engine.weights()[n][key] - weights[n][key]).abs().max() for n in net.names]
        assert all(torch.isfinite(m) and m > 0 for m in moved), f"{one}, {other}: {moved}"
        run += 1
    assert run > 80


# --- what a network must bring ------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "ok"), [(0, False), (6, False), (7, True), (30, True)])
def test_a_staircase_takes_a_step_fewer_than_layers(num_steps, ok):
    """Eight layers: fewer steps would leave the first of them without a gradient, for ever and silently."""
    weights, clamp = random_weights(NET), supervised(NET)
    inference = Inference(num_steps, 1.0, weights_at="staircase")
    if ok:
        gradients = weight_gradients(NET, weights, infer(NET, weights, clamp, inference))
        assert all(gradients[name]["weight"].any() for name in NET.names)
        return
    words = (
        f"takes 7 inference steps or more with 8 layers, got num_steps={num_steps}: the first layer's turn"
    )
    with pytest.raises(ValueError, match=words):
        infer(NET, weights, clamp, inference)


def test_weights_that_move_in_inference_need_a_rule_that_moves_them():
    """`infer` asks a question; it must not learn, nor silently do something else than was asked."""
    with pytest.raises(ValueError, match="needs a learning rule; use a Trainer, or weights_at='end'"):
        infer(NET, random_weights(NET), supervised(NET), Inference(weights_at="every_step"))


# --- nudges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "beta must be a finite number above 0, got 0.0"),
        ({"beta": -0.5}, "beta must be a finite number above 0, got -0.5"),
        ({"beta": math.nan}, "beta must be a finite number above 0, got nan"),
        ({"final_beta": 0.0}, "final_beta must be a finite number above 0, got 0.0"),
        ({"sign": "both"}, "sign must be one of positive, negative, centred, got 'both'"),
        ({"style": "soft"}, "style must be one of clamp, loss, got 'soft'"),
        (
            {"beta": 1.0, "sign": "negative", "style": "loss"},
            "beta must be below 1 where the loss pushes the output away, got 1.0",
        ),
        (
            {"beta": 0.5, "final_beta": 1.5, "sign": "centred", "style": "loss"},
            "final_beta must be below 1 where the loss pushes the output away, got 1.5",
        ),
    ],
)
def test_a_nudge_that_cannot_work_is_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        Nudge(**settings)


def test_a_nudge_grows_in_equal_parts_to_its_final_strength():
    for sign, factor in (("positive", 1.0), ("negative", -1.0), ("centred", 1.0)):
        nudge = Nudge(0.2, sign, final_beta=0.8)
        assert [nudge.at(s) for s in (0.0, 0.5, 1.0)] == pytest.approx(
            [0.2 * factor, 0.5 * factor, 0.8 * factor]
        )
        assert Nudge(0.2, sign).at(0.7) == pytest.approx(0.2 * factor)
    assert Nudge(1.0, "positive", "loss").at(0.3) == 1.0  # drawn towards the target it may be as strong


@pytest.mark.parametrize("sign", ["positive", "negative", "centred"])
@pytest.mark.parametrize("style", ["clamp", "loss"])
def test_a_categorical_output_can_only_be_held_nearer_to_its_target(sign, style):
    """u + b (y - u) is a distribution for b in (0, 1]; with a negative b entries leave 0 to 1, and a free
    categorical node follows its prediction, so a loss could not pull it.
    """
    net, inference = NETWORKS["categorical"], Inference(4, 0.1, nudge=Nudge(0.5, sign, style))
    weights, clamp = random_weights(net), supervised(net)
    if (sign, style) == ("positive", "clamp"):
        output = infer(net, weights, clamp, inference).activities[net.output]
        assert (output >= 0).all() and torch.allclose(output.sum(-1), torch.ones(3, dtype=torch.float64))
        return
    why = "follows its prediction" if style == "loss" else "would leave 0 to 1"
    with pytest.raises(ValueError, match=f"nudge must have style='clamp' and sign='positive'.*{why}"):
        infer(net, weights, clamp, inference)


def test_a_categorical_output_is_not_held_beyond_its_target():
    net, clamp = NETWORKS["categorical"], supervised(NETWORKS["categorical"])
    clamp[net.output] = torch.eye(4, dtype=torch.float64)[:3]
    for nudge in (Nudge(1.5), Nudge(0.5, final_beta=2.0)):
        with pytest.raises(ValueError, match="nudge must not be stronger than 1"):
            infer(net, random_weights(net), clamp, Inference(4, 0.1, nudge=nudge))


def test_a_nudge_needs_the_targets_of_the_output():
    nodes = random_nodes(NET)
    with pytest.raises(
        ValueError, match="nudge acts on the output, 'dense8', by its targets; clamp it to them"
    ):
        infer(NET, random_weights(NET), {"input": nodes["input"]}, Inference(nudge=Nudge()))


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
