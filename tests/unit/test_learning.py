"""Learning rules against torch.optim, schedules against their closed form, state against itself.

Tolerance of a trajectory: one step of any of the rules is fewer than 20 roundings of numbers no larger than
the weight, the gradient or the state, so after n steps a weight is off by at most 20 n u times the largest
number met; Adam's division by sqrt(v) does not amplify because m and v see the same gradients. u is 6e-8 or
1.1e-16.
"""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    LEARNINGS,
    NETWORKS,
    SCHEDULES,
    assert_near,
    assert_trees_near,
    generator,
    identical,
    optimiser_of,
    random_weights,
    supervised,
)

from pctt import SGD, Adam, AdamW, Constant, Dense, Engine, Inference, WarmupCosine, chain

NUM_STEPS = 24
NET = NETWORKS["some biases"]


def engine_of(weights, learning, net=NET, grouped: bool = True) -> Engine:
    return Engine(net, weights, Inference(0), ("input", net.output), learning=learning, grouped=grouped)


def random_gradients(weights, seed: int):
    """Of different size per layer and step, so that a state shared or swapped between layers shows."""
    source = generator(seed)
    return {
        name: {
            key: (torch.randn(v.shape, generator=source, dtype=torch.float64) * (1 + index)).to(v.dtype)
            for key, v in layer.items()
        }
        for index, (name, layer) in enumerate(weights.items())
    }


def rate_at(rule, step: int) -> float:
    return rule.rate * rule.schedule.factor(step, NUM_STEPS)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LEARNINGS)
def test_a_rule_moves_weights_as_torch_optim_does(name, dtype, grouped):
    """24 steps of given gradients with the rule's schedule, weights of every layer equal throughout.

    Swapped betas, a decay of the wrong sign or a bias correction that starts at step 0 all still train.
    """
    rule, weights = LEARNINGS[name], random_weights(NET, dtype=dtype)
    leaves = {n: {k: v.clone().requires_grad_() for k, v in layer.items()} for n, layer in weights.items()}
    optimiser = optimiser_of(rule, [v for layer in leaves.values() for v in layer.values()])
    engine = engine_of(weights, rule, grouped=grouped)
    largest = 1.0
    for step in range(NUM_STEPS):
        gradients = random_gradients(weights, seed=step)
        for layer, values in gradients.items():
            for key, value in values.items():
                leaves[layer][key].grad = value.clone()
                largest = max(largest, value.abs().max().item())
        rate = rate_at(rule, step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        engine.load_gradients(gradients)
        engine.update(rate, step + 1)
        expected = {n: {k: v.detach() for k, v in layer.items()} for n, layer in leaves.items()}
        largest = max(largest, *(v.abs().max().item() for layer in expected.values() for v in layer.values()))
        bound = 20 * (step + 1) * torch.finfo(dtype).eps / 2 * largest
        assert_trees_near(engine.weights(), expected, bound)


def test_adam_without_decay_follows_its_published_recurrence():
    """Kingma & Ba 2015, algorithm 1, in Python floats: an oracle that does not share torch's kernels."""
    rate, beta1, beta2, epsilon = 0.05, 0.7, 0.9, 1e-3
    net = chain(1, [Dense(1, bias=False)])
    weights = {"dense1": {"weight": torch.tensor([[0.3]], dtype=torch.float64)}}
    engine = engine_of(weights, Adam(rate, (beta1, beta2), epsilon), net)
    w, m, v = 0.3, 0.0, 0.0
    for t, g in enumerate((0.5, -2.0, 0.1, 0.0, 3.0, -0.7), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w -= rate * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + epsilon)
        engine.load_gradients({"dense1": {"weight": torch.tensor([[g]], dtype=torch.float64)}})
        engine.update(rate, t)
        assert engine.weights()["dense1"]["weight"].item() == pytest.approx(w, rel=1e-13)


# --- clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, 14.0, 1e6])
@pytest.mark.parametrize("rule", [SGD(1.0), Adam(0.1), AdamW(0.1)])
def test_each_layer_clips_its_own_gradient_as_torch_clips_that_of_its_parameters(rule, limit):
    """Weight and bias of a layer share one norm, and no layer sees another's: a network-wide norm is not
    local.

    torch divides by norm + 1e-6, hence a relative difference of up to 1e-6 / norm, and the norms are above 5.
    """
    weights = random_weights(NET)
    gradients = random_gradients(weights, seed=5)
    clipped, plain = (engine_of(weights, replace(rule, clip_norm=c)) for c in (limit, None))
    expected = {}
    norms = []
    for name, layer in gradients.items():
        leaves = [torch.zeros_like(v).requires_grad_() for v in layer.values()]
        for leaf, value in zip(leaves, layer.values(), strict=True):
            leaf.grad = value.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, limit).item())
        expected[name] = {key: leaf.grad for key, leaf in zip(layer, leaves, strict=True)}
    assert min(norms) > 4 and (limit != 14.0 or min(norms) < limit < max(norms))
    clipped.load_gradients(gradients)
    clipped.update(rule.rate, 1)
    plain.load_gradients(expected)
    plain.update(rule.rate, 1)
    assert_trees_near(clipped.weights(), plain.weights(), 1e-6 / 4 * max(1.0, min(limit, max(norms))))
    if limit == 1e6:  # nothing to clip: nothing may change, not even in the last bit
        same = engine_of(weights, rule)
        same.load_gradients(gradients)
        same.update(rule.rate, 1)
        assert_trees_near(clipped.weights(), same.weights(), 0.0)


def test_a_clipped_gradient_has_the_norm_of_the_limit_and_its_own_direction():
    weights = random_weights(NET)
    gradients = random_gradients(weights, seed=6)
    engine = engine_of(weights, SGD(1.0, clip_norm=0.5))
    engine.load_gradients(gradients)
    engine.update(1.0, 1)
    for name, layer in gradients.items():
        moved = torch.cat([(weights[name][k] - engine.weights()[name][k]).flatten() for k in layer])
        given = torch.cat([v.flatten() for v in layer.values()])
        assert moved.norm().item() == pytest.approx(0.5, rel=1e-13)
        assert_near(moved, given * (0.5 / given.norm()), 1e-14)


def test_a_gradient_of_zero_survives_clipping():
    """0 / 0 would fill the weights of a layer no error has reached with NaN."""
    weights = random_weights(NET)
    engine = engine_of(weights, SGD(1.0, clip_norm=0.5))
    engine.load_gradients(
        {n: {k: torch.zeros_like(v) for k, v in layer.items()} for n, layer in weights.items()}
    )
    engine.update(1.0, 1)
    assert_trees_near(engine.weights(), weights, 0.0)


# --- schedules ----------------------------------------------------------------------------------------------


def closed_form(schedule, step: int, total: int) -> float:
    """(n + 1) / (N + 1) for the N warm-up steps, then final + (1 - final) cos^2 of the remaining way."""
    if isinstance(schedule, Constant):
        return 1.0
    num_warmup = math.ceil(schedule.warmup * total)  # the steps below warmup * total
    if step < num_warmup:
        return (step + 1) / (math.floor(schedule.warmup * total) + 1)
    way = (step - schedule.warmup * total) / (total - schedule.warmup * total)
    return schedule.final + (1 - schedule.final) * math.cos(0.5 * math.pi * min(way, 1.0)) ** 2


@pytest.mark.parametrize("total", [2, 10, 57, 400])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_follows_its_closed_form(name, total):
    schedule = SCHEDULES[name]
    for step in range(total + 3):
        expected = closed_form(schedule, step, total)
        assert schedule.factor(step, total) == pytest.approx(expected, rel=1e-13, abs=1e-15)


def test_warm_up_cosine_starts_small_peaks_at_the_rate_and_ends_at_its_fraction():
    """100 steps, a tenth warm-up: 1/11 first, the rate itself at step 10, half way down at 55, 0.1 at 100."""
    schedule = WarmupCosine(0.1, 0.1)
    assert schedule.factor(0, 100) == pytest.approx(1 / 11)
    assert schedule.factor(9, 100) == pytest.approx(10 / 11)
    assert schedule.factor(10, 100) == pytest.approx(1.0)
    assert schedule.factor(55, 100) == pytest.approx(0.55)
    assert schedule.factor(100, 100) == pytest.approx(0.1)
    assert schedule.factor(10_000, 100) == pytest.approx(0.1)
    factors = [schedule.factor(step, 100) for step in range(120)]
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors)


# --- state --------------------------------------------------------------------------------------------------


def steps(engine: Engine, rule, numbers) -> None:
    for step in numbers:
        engine.load_gradients(random_gradients(engine.weights(), seed=step))
        engine.update(rate_at(rule, step), step + 1)


@pytest.mark.parametrize("regrouped", [False, True])
@pytest.mark.parametrize("name", LEARNINGS)
def test_learning_state_moved_to_another_engine_continues_bit_for_bit(name, regrouped):
    """8 steps, then weights and state to a new engine, then 8 more: the same bits as 16 in one.

    The moved state may go to an engine grouped otherwise, since checkpoints do not depend on the grouping.
    """
    rule, weights = LEARNINGS[name], random_weights(NET)
    whole, first = engine_of(weights, rule), engine_of(weights, rule)
    steps(whole, rule, range(16))
    steps(first, rule, range(8))
    second = engine_of(first.weights(), rule, grouped=not regrouped)
    second.load_learning_state(first.learning_state())
    steps(second, rule, range(8, 16))
    for tree, other in (
        (whole.weights(), second.weights()),
        (whole.learning_state(), second.learning_state()),
    ):
        assert {n: list(layer) for n, layer in tree.items()} == {n: list(layer) for n, layer in other.items()}
        for layer, values in tree.items():
            assert all(identical(values[key], other[layer][key]) for key in values)


def test_learning_state_is_per_layer_shaped_like_its_weights_and_starts_at_zero():
    weights = random_weights(NET)
    state = engine_of(weights, Adam()).learning_state()
    for name, layer in weights.items():
        expected = {
            f"{key}_{kind}": v for key, v in layer.items() for kind in ("first_moment", "second_moment")
        }
        assert set(state[name]) == set(expected)
        for key, values in expected.items():
            assert state[name][key].shape == values.shape and not state[name][key].any()
    momentum = engine_of(weights, SGD(momentum=0.9)).learning_state()
    assert set(momentum["dense1"]) == {"weight_momentum", "bias_momentum"}
    assert not any(engine_of(weights, SGD()).learning_state().values())


def test_learning_state_of_another_rule_is_refused():
    weights = random_weights(NET)
    adam, sgd = engine_of(weights, Adam()), engine_of(weights, SGD(momentum=0.9))
    with pytest.raises(ValueError, match="written by another learning rule"):
        adam.load_learning_state(sgd.learning_state())
    with pytest.raises(ValueError, match="'dense1' must hold"):
        sgd.load_learning_state({})


def test_what_an_engine_gives_out_is_a_copy():
    """Otherwise the next learning step would change weights the caller kept, e.g. the last good ones."""
    weights = random_weights(NET)
    engine = engine_of(weights, Adam())
    kept, state = engine.weights(), engine.learning_state()
    steps(engine, Adam(), range(2))
    assert_trees_near(kept, weights, 0.0)
    assert not any(values.any() for layer in state.values() for values in layer.values())


def test_one_learning_step_descends_the_energy_that_inference_reached():
    """The sign of it all: relax, step a little along the local gradients, relax again: F is lower."""
    for name, net in NETWORKS.items():
        weights, clamp = random_weights(net), supervised(net)
        engine = Engine(net, weights, Inference(30, 0.05), ("input", net.output), learning=SGD())
        before = sum(engine.relax(clamp).energies)
        engine.compute_gradients()
        engine.update(1e-3, 1)
        assert sum(engine.relax(clamp).energies) < before, name


# --- settings that are refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGD(0.0), "rate must be a finite number above 0, got 0.0"),
        (lambda: Adam(-1.0), "rate must be a finite number above 0, got -1.0"),
        (lambda: AdamW(math.inf), "rate must be a finite number above 0, got inf"),
        (lambda: SGD(math.nan), "rate must be a finite number above 0, got nan"),
        (lambda: SGD("0.1"), "rate must be a finite number above 0, got '0.1'"),
        (lambda: SGD(True), "rate must be a finite number above 0, got True"),
        (lambda: SGD(momentum=1.0), r"momentum must be in \[0.0, 1.0\), got 1.0"),
        (lambda: SGD(momentum=-0.1), r"momentum must be in \[0.0, 1.0\), got -0.1"),
        (lambda: SGD(momentum=math.nan), r"momentum must be in \[0.0, 1.0\), got nan"),
        (lambda: SGD(weight_decay=-0.1), r"weight_decay must be in \[0.0, inf\), got -0.1"),
        (lambda: AdamW(weight_decay=math.nan), r"weight_decay must be in \[0.0, inf\), got nan"),
        (lambda: SGD(clip_norm=0.0), "clip_norm must be a finite number above 0, got 0.0"),
        (lambda: Adam(clip_norm=-1), "clip_norm must be a finite number above 0, got -1"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas must be in \[0.0, 1.0\), got 1.0"),
        (lambda: AdamW(betas=(-0.1, 0.9)), r"betas must be in \[0.0, 1.0\), got -0.1"),
        (lambda: Adam(betas=(0.9,)), r"betas must be two numbers, got \(0.9,\)"),
        (lambda: Adam(epsilon=0.0), "epsilon must be a finite number above 0, got 0.0"),
        (lambda: WarmupCosine(warmup=1.0), r"warmup must be in \[0.0, 1.0\), got 1.0"),
        (lambda: WarmupCosine(final=-0.5), r"final must be in \[0.0, 1.0\), got -0.5"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_a_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()
