"""The variants against plain oracles and closed forms, in fp64: E1, E5, E7, E8, E10 and E11 of
docs/mathematics.md, and every setting of `helpers.VARIANT_INFERENCES` and `INCREMENTAL` step by step.

Tolerances: as in test_equalities.py, a comparison of two orders of computation in fp64 is off by about 1e-13
relative to the largest number met; `EPS` leaves a factor of ten. Convergence orders are asserted as ratios
between two small parameters; statistics within three of their own standard errors, with fixed seeds.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import (
    INCREMENTAL,
    NETWORKS,
    VARIANT_INFERENCES,
    VARIANT_NETWORKS,
    Tree,
    assert_near,
    assert_trees_near,
    backprop_oracle,
    energy_of,
    feedforward,
    fits,
    predicted,
    random_nodes,
    random_weights,
    relax,
    supervised,
    train,
    without_variances,
)

from pctt import (
    SGD,
    Adam,
    AdamW,
    Categorical,
    Dense,
    Engine,
    Gaussian,
    Inference,
    Network,
    Nudge,
    Trainer,
    WarmupCosine,
    chain,
    infer,
    variant,
    weight_gradients,
)

EPS = 1e-12
ALL = {**NETWORKS, **VARIANT_NETWORKS}
UNIT = {
    name: net
    for name, net in ALL.items()
    if all(isinstance(layer.energy, Categorical) or layer.energy.is_unit for layer in net.layers)
}
SOME = (
    "precisions and a categorical output",
    "a full precision",
    "skips and learned variances",
)
SMOOTH = ("tanh at the output", "gelu at the input", "placements mixed", "skips")


def largest(tree: Tree) -> float:
    return max(values.abs().max().item() for layer in tree.values() for values in layer.values())


def distance(one: Tree, other: Tree, names) -> float:
    """Norm of the difference of the weights' gradients, relative to that of `other`."""
    off = sum(float((one[name]["weight"] - other[name]["weight"]).square().sum()) for name in names)
    return (off / sum(float(other[name]["weight"].square().sum()) for name in names)) ** 0.5


def gradient_of(net: Network, weights: Tree, clamp, inference: Inference) -> Tree:
    return weight_gradients(net, weights, infer(net, weights, clamp, inference))


# --- step by step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANT_INFERENCES)
def test_a_variant_is_its_equations_at_every_step(settings):
    """E17 for the variants: activities, errors, energies and gradients equal those of plain activities moved
    by autograd, torch.optim or a formula written out.

    Two variables moved from each other's newest values instead of the old ones, a boost one step late or a
    slope at the wrong point of a trial step would still descend, and train.
    """
    for name in SOME:
        net, inference = ALL[name], VARIANT_INFERENCES[settings]
        if not fits(net, inference):
            continue
        weights, clamp = random_weights(net), supervised(net)
        expected = relax(net, weights, clamp, inference, seed=5)
        result = infer(net, weights, clamp, inference, seed=5)
        scale = max(1.0, expected.energies.abs().max().item())
        assert_near(result.energy, expected.energies, EPS * scale, f"{name}: energy")
        for node in net.nodes:
            assert_near(result.activities[node], expected.activities[-1][node], EPS, f"{name}: {node}")
        for node in net.names:
            assert_near(result.errors[node], expected.errors[-1][node], EPS, f"{name}: error of {node}")
        bound = EPS * max(1.0, largest(expected.gradients))
        assert_trees_near(weight_gradients(net, weights, result), expected.gradients, bound)


@pytest.mark.parametrize("settings", ["errors", "gauss-seidel", "heun", "adam", "zeros, errors"])
@pytest.mark.parametrize("roles", ["fcfcff", "ffffcf", "cpffpc", "pffffc", "cffpff"])
def test_variants_answer_any_query(settings, roles):
    """Nodes clamped in the middle, a free input, a free output, nodes placed elsewhere: the oracle does not
    care. Clamps of training reach neither the adjoint below a clamped node nor the slope of a free input.
    """
    for name in ("tanh at the output", "gelu at the input"):
        net, inference = NETWORKS[name], VARIANT_INFERENCES[settings]
        weights, nodes = random_weights(net), random_nodes(net)
        chosen = dict(zip(net.nodes, roles, strict=True))
        clamp = {node: nodes[node] for node in net.nodes if chosen[node] == "c"}
        initial = {node: nodes[node] for node in net.nodes if chosen[node] == "p"}
        expected = relax(net, weights, clamp, inference, initial)
        result = infer(net, weights, clamp, inference, initial)
        for node in net.nodes:
            assert_near(result.activities[node], expected.activities[-1][node], EPS, f"{name}: {node}")
        gradients = weight_gradients(net, weights, result)
        assert_trees_near(gradients, expected.gradients, EPS * max(1.0, largest(expected.gradients)))


def walked(net: Network, weights: Tree, batches, inference: Inference, rule, grouped: bool = True):
    """(weights, energies of every inference step) after each learning step, by the engine."""
    engine = Engine(
        net, weights, inference, ("input", net.output), learning=rule, grouped=grouped, batch_size=4
    )
    for number, batch in enumerate(batches):
        rate = rule.rate * rule.schedule.factor(number, len(batches))
        engine.set_nudge(number / max(1, len(batches) - 1))
        engine.set_learning(rate, number + 1)
        relaxation = engine.relax(batch, record=True, seed=number)
        engine.learn(rate, number + 1)
        yield engine, relaxation


RULES = {
    "sgd": SGD(0.02),
    "momentum": SGD(0.01, momentum=0.8, weight_decay=0.02, schedule=WarmupCosine(0.2, 0.05)),
    "adam": Adam(1e-3, (0.8, 0.99), 1e-4),
    "adamw": AdamW(1e-3, (0.7, 0.95), 1e-4, weight_decay=0.1),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("settings", INCREMENTAL)
def test_weights_that_move_with_every_step_do_so_from_the_same_old_values(settings, rule):
    """iPC: activities and weights step at once from one set of errors, the learning rule num_steps times a
    batch, over three batches.

    If weights moved first, activities would see the new ones: another algorithm with the same name, which
    learns. A counter that starts again with every batch would bias Adam's corrections for ever.
    """
    inference, learning = INCREMENTAL[settings], RULES[rule]
    for name in ("skips and learned variances", *(["gelu at the input"] if rule == "sgd" else [])):
        net = ALL[name]
        weights = random_weights(net)
        batches = [supervised(net, 4, seed) for seed in (1, 2, 3)]
        expected = train(net, weights, batches, inference, learning)
        steps = walked(net, weights, batches, inference, learning, grouped=rule != "adam")
        for (tree, relaxed), (engine, relaxation) in zip(expected, steps, strict=True):
            energies = torch.tensor(relaxation.trajectory, dtype=torch.float64)
            scale = max(1.0, relaxed.energies.abs().max().item())
            assert_near(energies, relaxed.energies, 10 * EPS * scale, f"{name}: energies")
            assert_trees_near(engine.weights(), tree, 10 * EPS)
            for node in net.nodes:
                assert_near(engine.read_activity(node), relaxed.activities[-1][node], 10 * EPS, node)


@pytest.mark.parametrize("settings", ["live", *VARIANT_INFERENCES])
def test_three_learning_steps_are_those_of_the_oracle(settings):
    """Gradients, weights and learned variances through three batches with Adam and its schedule: whatever a
    relaxation leaves behind in a buffer, a variance or a moment meets the next one.
    """
    inference = {"live": Inference(8, 0.1), **VARIANT_INFERENCES}[settings]
    learning = Adam(1e-2, (0.8, 0.99), 1e-6, weight_decay=0.02, schedule=WarmupCosine(0.3, 0.1))
    # Where there is noise, a variance follows the errors of the last sample, which the oracle does not know.
    net = ALL["placements mixed" if inference.dynamics == "langevin" else "skips and learned variances"]
    weights = random_weights(net)
    batches = [supervised(net, 4, seed) for seed in (1, 2, 3)]
    expected = train(net, weights, batches, inference, learning, seeds=(0, 1, 2))
    steps = walked(net, weights, batches, inference, learning)
    for number, ((tree, _), (engine, _)) in enumerate(zip(expected, steps, strict=True)):
        # Adam divides by the root of its second moment, at least 1e-6 here: a rounding of the smallest
        # gradients, 1e-16, becomes rate 1e-16 / 1e-6 = 1e-12 of a weight.
        assert_trees_near(engine.weights(), tree, 10 * EPS * (number + 1))


def test_a_trainer_grows_nudge_and_rate_over_its_learning_steps():
    """One batch an epoch, so that the order of samples does not matter: b goes in equal parts from beta to
    final_beta and the rate along its schedule; neither starts again with an epoch.
    """
    net = NETWORKS["two groups"]
    weights, batch = random_weights(net), supervised(net, 6)
    inference = Inference(8, 0.1, nudge=Nudge(0.2, "centred", "clamp", final_beta=0.8))
    rule = SGD(0.2, momentum=0.5, schedule=WarmupCosine(0.4, 0.2))
    trainer = Trainer(net, inference, rule, weights=weights, batch_size=8)
    trainer.fit((batch["input"], batch[net.output]), 2)
    trainer.fit((batch["input"], batch[net.output]), 5)
    # Two calls: the first took its two steps as if they were all there are.
    first = train(net, weights, [batch] * 2, inference, rule)
    assert trainer.progress.step == 5
    alone = Trainer(net, inference, rule, weights=weights, batch_size=8)
    alone.fit((batch["input"], batch[net.output]), 2)
    assert_trees_near(alone.weights, first[-1][0], 10 * EPS)
    whole = Trainer(net, inference, rule, weights=weights, batch_size=8)
    whole.fit((batch["input"], batch[net.output]), 5)
    assert_trees_near(whole.weights, train(net, weights, [batch] * 5, inference, rule)[-1][0], 10 * EPS)


@pytest.mark.parametrize("settings", ["live", "fixed", "errors", "langevin"])
def test_a_batch_that_starts_where_the_one_before_ended_does_so(settings):
    """initial="carried", batch by batch; the gradients of fixed predictions belong to that start.

    Starting every batch afresh would look the same after enough steps, which is why the difference is here
    one of few steps.
    """
    net = NETWORKS["tanh at the output"]
    plain = {"live": Inference(5, 0.1), "fixed": Inference(5, 0.1, "fixed"), **VARIANT_INFERENCES}[settings]
    weights, inference = random_weights(net), replace(plain, initial="carried")
    engine = Engine(net, weights, inference, ("input", net.output))
    engine.relax(supervised(net, seed=1))
    for seed in (2, 3):
        before = {name: engine.read_activity(name) for name in net.names[:-1]}
        expected = relax(net, weights, supervised(net, seed=seed), plain, before, seed)
        engine.relax(supervised(net, seed=seed), seed=seed)
        for name in net.names:
            assert_near(engine.read_activity(name), expected.activities[-1][name], EPS, name)
        engine.compute_gradients()
        assert_trees_near(engine.gradients(), expected.gradients, EPS * max(1.0, largest(expected.gradients)))


# --- E1 and the exact sweep: backpropagation ----------------------------------------------------------------


@pytest.mark.parametrize("nudge", [None, Nudge(0.3)], ids=["held", "nudged"])
@pytest.mark.parametrize("algorithm", ["zil", "exact", "fixed"])
def test_the_algorithms_that_are_backpropagation_give_its_gradients(algorithm, nudge):
    """E1: with rate 1 the gradient of layer l after L - l steps is that of backpropagation; so are those of
    one sweep down with fixed predictions, and E4. A nudge scales every error by b, the gradient by 1 / b.

    Relative to each layer's own gradient, on every network of unit precision.
    """
    for name, net in UNIT.items():
        weights, clamp = random_weights(net), supervised(net)
        base = Inference(len(net.layers) + 3, 1.0, nudge=nudge)
        expected, _ = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
        found = gradient_of(net, weights, clamp, variant(algorithm, base))
        assert set(found) == set(net.names), name
        assert_trees_near(found, expected, EPS, relative=True)


def test_a_staircase_ends_when_the_first_layer_has_had_its_turn():
    """L - 1 steps, however many were asked for: more would cost time and change no gradient."""
    net = NETWORKS["two groups"]
    weights, clamp = random_weights(net), supervised(net)
    result = infer(net, weights, clamp, variant("zil", Inference(30)))
    assert result.num_steps == len(net.layers) - 1


def test_the_staircase_learns_as_backpropagation_learns():
    """Ten learning steps with momentum: the weights of a run are those of torch."""
    net, rule = NETWORKS["two groups"], SGD(0.1, momentum=0.9)
    weights, batches = random_weights(net), [supervised(net, 4, seed) for seed in range(10)]
    tree = {name: {key: value.clone() for key, value in layer.items()} for name, layer in weights.items()}
    leaves = [value for layer in tree.values() for value in layer.values()]
    optimiser = torch.optim.SGD(leaves, lr=rule.rate, momentum=rule.momentum)
    for batch in batches:
        gradients, _ = backprop_oracle(net, tree, batch["input"], batch[net.output])
        for name, layer in gradients.items():
            for key, gradient in layer.items():
                tree[name][key].grad = gradient
        optimiser.step()
        tree = {name: {key: value for key, value in layer.items()} for name, layer in tree.items()}
    inference = variant("zil", Inference(len(net.layers)))
    (*_, (engine, _)) = walked(net, weights, batches, inference, rule)
    assert_trees_near(engine.weights(), tree, 100 * EPS)


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("name", UNIT)
def test_a_boost_of_one_over_the_rate_makes_the_first_error_of_a_layer_that_of_backpropagation(name, rate):
    """By E2 the first error of layer l is rate^(L - l) delta_l; the boost takes the powers away.

    Errors before their arrival are exactly 0; after it the rate is the usual one again, which the comparison
    with the oracle above sees.
    """
    net = UNIT[name]
    weights, clamp = random_weights(net), supervised(net)
    _, deltas = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    depth = len(net.layers)
    for steps in range(depth):
        errors = infer(net, weights, clamp, Inference(steps, rate, wave_boost=1.0 / rate)).errors
        for index, layer in enumerate(net.names[:-1], start=1):
            if steps < depth - index:
                assert torch.count_nonzero(errors[layer]) == 0, f"{layer} has an error after {steps} steps"
            elif steps == depth - index:
                delta = deltas[index - 1]
                assert_near(errors[layer], delta, EPS * delta.abs().max().item(), layer)


# --- E5: linear networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["gauss-seidel", "errors"])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_other_ways_down_end_at_the_closed_form_of_a_linear_network(settings, placement):
    """E5: F* = 1/2 r'S^-1 r and its gradient, whatever the way there.

    In the errors the Hessian is I + P'P, P the maps from every error to the output: its eigenvalues are at
    least 1 and at most 1 + |P|^2, asserted below 1 / rate, so a step leaves at most 0.95 of the way, 600
    steps 4e-14. One after the other is at least as fast as all at once.
    """
    net = chain(5, [Dense(units, "identity", False, placement) for units in (7, 6, 6, 4)])
    weights, clamp = random_weights(net), supervised(net)
    x, y = clamp["input"], clamp[net.output]
    maps = [weights[name]["weight"].clone().requires_grad_() for name in net.names]
    products = [maps[-1]]  # of W_l .. W_L
    for matrix in reversed(maps[:-1]):
        products.append(matrix @ products[-1])
    assert 1.0 + sum(float(product.detach().square().sum()) for product in products[:-1]) < 1 / 0.05
    spread = torch.eye(4, dtype=torch.float64) + sum(p.T @ p for p in products[:-1])
    residual = y - x @ products[-1]
    output_error = torch.linalg.solve(spread, residual.T).T
    energy = 0.5 * (residual * output_error).sum(-1).mean()
    energy.backward()
    knobs = {"gauss-seidel": {"sweep": "gauss_seidel"}, "errors": {"variables": "errors"}}[settings]
    rate, steps = {"gauss-seidel": (0.3, 1500), "errors": (0.05, 700)}[settings]
    result = infer(net, weights, clamp, Inference(steps, rate, **knobs))
    assert result.energy[-1].sum().item() == pytest.approx(float(energy.detach()), rel=1e-11)
    error = output_error.detach()
    for name, matrix in zip(reversed(net.names), [None, *reversed(maps[1:])], strict=True):
        error = error if matrix is None else error @ matrix.detach().T
        assert_near(result.errors[name], error, 1e-11, name)
    for name, matrix in zip(net.names, maps, strict=True):
        assert matrix.grad is not None
        assert_near(weight_gradients(net, weights, result)[name]["weight"], matrix.grad, 1e-11, name)


# --- E7: descent in the errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tanh at the output", "skips", "a full precision", "learned variances"])
def test_the_energy_of_the_errors_is_that_of_the_activities_they_make(name):
    """E7: E(e) = F(x(e)) after every step, from a start away from the predictions.

    F is computed anew from the activities alone; an error and its activity that drifted apart would each
    still look sensible.
    """
    net = ALL[name]
    weights, nodes = random_weights(net), random_nodes(net)
    clamp = {key: nodes[key] for key in ("input", net.output)}
    initial = {key: nodes[key] for key in net.names[:-1]}
    for steps in (0, 1, 5):
        result = infer(net, weights, clamp, Inference(steps, 0.05, variables="errors"), initial)
        states = [result.activities[node] for node in net.nodes]
        for index in range(1, len(net.layers) + 1):
            mean = predicted(net, weights, index, states[index - 1])
            energy = energy_of(net, index, states[index], mean, weights).mean()
            assert result.energy[-1, index - 1].item() == pytest.approx(energy.item(), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("name", UNIT)
def test_one_step_in_the_errors_brings_backpropagation_to_every_layer(name):
    """E7: from a feedforward start e_l = rate delta_l for every hidden layer after one step, none later than
    another. The gradient of the first layer, whose source is clamped, is then rate times backpropagation's.
    """
    net = UNIT[name]
    weights, clamp = random_weights(net), supervised(net)
    expected, deltas = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    result = infer(net, weights, clamp, Inference(1, 0.03, variables="errors"))
    for layer, delta in zip(net.names[:-1], deltas, strict=False):
        assert_near(result.errors[layer], 0.03 * delta, EPS * delta.abs().max().item(), layer)
    if len(net.layers) > 1:
        first = net.names[0]
        scaled = {first: {key: 0.03 * values for key, values in expected[first].items()}}
        found = weight_gradients(net, weights, result)
        assert_trees_near({first: found[first]}, scaled, EPS, relative=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_after_one_step_in_the_errors_gradients_over_the_rate_tend_to_those_of_backpropagation(name):
    """E7: the distance is O(rate): ten times smaller at a rate ten times smaller, within a fifth.

    The next term is smaller by the rate times a curvature of order 10, at 1e-3 a hundredth.
    """
    net = ALL[name]
    weights, clamp = random_weights(net), supervised(net)
    expected, _ = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    hidden = net.names[1:-1]
    off = []
    for rate in (1e-3, 1e-4, 1e-5):
        found = gradient_of(net, weights, clamp, Inference(1, rate, variables="errors"))
        over = {layer: {"weight": found[layer]["weight"] / rate} for layer in hidden}
        off.append(distance(over, expected, hidden))
    for coarse, fine in pairwise(off):
        assert coarse / fine == pytest.approx(10.0, rel=0.2)


@pytest.mark.parametrize("name", SMOOTH)
def test_errors_and_activities_settle_in_the_same_state(name):
    """E7: the same energy, so the same equilibrium; only the way there differs. Every free node is still (its
    slope, by autograd, below 1e-9), and the states agree to 1e-8: slopes over the least curvature, 0.1.
    """
    net = ALL[name]
    weights, clamp = random_weights(net, gain=0.7), supervised(net)
    states = infer(net, weights, clamp, Inference(1200, 0.25))
    errors = infer(net, weights, clamp, Inference(1000, 0.1, variables="errors"))
    leaves = {node: errors.activities[node].clone().requires_grad_() for node in net.names[:-1]}
    nodes = [leaves.get(node, errors.activities[node]) for node in net.nodes]
    total = sum(
        energy_of(net, i, nodes[i], predicted(net, weights, i, nodes[i - 1])).sum()
        for i in range(1, len(nodes))
    )
    assert isinstance(total, torch.Tensor)
    for slope in torch.autograd.grad(total, list(leaves.values())):
        assert slope.abs().max() < 1e-9
    for node in net.nodes:
        assert_near(errors.activities[node], states.activities[node], 1e-8, node)


# --- E8: nudging --------------------------------------------------------------------------------------------

STRENGTHS = (0.01, 0.001)
SETTLED = Inference(600, 0.3)


def distances_from_backprop(sign: str, style: str) -> list[float]:
    net = NETWORKS["tanh at the output"]
    weights, clamp = random_weights(net, gain=0.7), supervised(net)
    expected, _ = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    return [
        distance(
            gradient_of(net, weights, clamp, replace(SETTLED, nudge=Nudge(beta, sign, style))),
            expected,
            net.names,
        )
        for beta in STRENGTHS
    ]


@pytest.mark.parametrize(("sign", "factor"), [("positive", 10.0), ("negative", 10.0), ("centred", 100.0)])
def test_a_loss_that_nudges_weakly_gives_backpropagation_to_its_order(sign, factor):
    """E8: the gradient of a free output differs from backpropagation's by O(beta), that of a centred pair by
    O(beta^2), so a tenth of beta gives a tenth and a hundredth, within a sixth; at 0.01 the next term is some
    3 % of the first. A strength missing in the pull or in the gradient leaves a constant.
    """
    coarse, fine = distances_from_backprop(sign, "loss")
    assert coarse / fine == pytest.approx(factor, rel=1 / 6)
    assert fine < 0.05


def test_an_output_held_near_its_prediction_does_not_give_backpropagation():
    """E8: the clamp style tends to the direction of clamped predictive coding however weak the nudge.

    Whoever takes it for equilibrium propagation gets a gradient that is off by a fixed share.
    """
    coarse, fine = distances_from_backprop("positive", "clamp")
    assert fine > 0.1 and coarse / fine == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("sign", ["positive", "negative", "centred"])
def test_a_weakly_clamped_linear_network_learns_along_the_errors_of_the_clamped_one(sign):
    """E8: with r = y - (feedforward output), errors are b times those of E5, e_L = S^-1 r, e_l = e_{l+1} W',
    and sources are feedforward and a term in b: dF/dW_l / b is -mean x_{l-1}' e_l and a term in b, which a
    pair cancels.
    """
    net = chain(5, [Dense(units, bias=False) for units in (7, 6, 4)])
    weights, clamp = random_weights(net, gain=0.7), supervised(net)
    maps = [weights[name]["weight"] for name in net.names]
    ahead = feedforward(net, weights, {"input": clamp["input"]})
    spread = torch.eye(4, dtype=torch.float64) + maps[2].T @ maps[2]
    spread = spread + (maps[1] @ maps[2]).T @ (maps[1] @ maps[2])
    error = torch.linalg.solve(spread, (clamp[net.output] - ahead[-1]).T).T
    limit: Tree = {}
    for index in (3, 2, 1):
        limit[net.names[index - 1]] = {"weight": -ahead[index - 1].T @ error / len(error)}
        error = error @ maps[index - 1].T
    off = [
        distance(
            gradient_of(net, weights, clamp, replace(SETTLED, nudge=Nudge(beta, sign))), limit, net.names
        )
        for beta in (0.3, 0.03)
    ]
    if sign == "centred":
        assert max(off) < 1e-10
    else:
        assert off[0] / off[1] == pytest.approx(10.0, rel=1 / 6)


@pytest.mark.parametrize("style", ["clamp", "loss"])
def test_a_centred_pair_is_the_mean_of_its_two_sides(style):
    """(G(b) - G(-b)) / 2b = (G(b)/b + G(-b)/(-b)) / 2; the state that is reported is the positive side's.

    The two share every buffer: a second relaxation that began where the first ended would differ here.
    """
    net = NETWORKS["two groups"]
    weights, clamp = random_weights(net), supervised(net)
    sides = {}
    for sign in ("positive", "negative", "centred"):
        inference = Inference(9, 0.1, nudge=Nudge(0.3, sign, style))
        engine = Engine(net, weights, inference, ("input", net.output))
        for _ in range(2):
            engine.relax(clamp)
            engine.compute_gradients()
        sides[sign] = engine.gradients(), engine.read_activity("dense4")
    mean = {
        name: {key: 0.5 * (values + sides["negative"][0][name][key]) for key, values in layer.items()}
        for name, layer in sides["positive"][0].items()
    }
    assert_trees_near(sides["centred"][0], mean, 10 * EPS)
    assert_near(sides["centred"][1], sides["positive"][1], EPS)


# --- E10: learned variances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", ["diagonal", "scalar"])
def test_a_learned_variance_settles_at_the_mean_square_of_the_errors(learned):
    """E10: dF/dvariance = 0, F by autograd as a function of the variance, at the state that the precision
    itself leads to. Were mean e^2 taken of weighted errors, or summed, it would settle elsewhere.

    One layer between clamped nodes has errors that no precision changes: 500 steps of adaptation 0.1 leave
    0.9^500 = 1e-23 of the way. With a hidden node, held stiffly, they follow the variance a little, so that
    its way is longer by that little: 1e-9 is allowed.
    """
    energy = Gaussian(2.0, learned, 0.1)
    hidden = Dense(6, "tanh", energy=Gaussian(20.0))
    for layers in ([Dense(4, "tanh", energy=energy)], [hidden, Dense(4, energy=energy)]):
        net = chain(5, layers)
        weights, clamp = random_weights(net), supervised(net, 7)
        engine = Engine(net, weights, Inference(30, 0.02), ("input", net.output), learning=SGD(1e-14))
        for step in range(500):
            engine.relax(clamp)
            engine.learn(1e-14, step + 1)
        engine.relax(clamp)
        error = engine.read_node("error", net.output)
        variance = engine.weights()[net.output]["variance"].requires_grad_()
        total = (0.5 * (error**2 / variance + variance.log())).sum(-1).mean()
        (slope,) = torch.autograd.grad(total, variance)
        slope = slope.sum() if learned == "scalar" else slope
        assert slope.abs().max() < 1e-9
        squares = error.square().mean(0)
        settled = squares.mean().expand(4) if learned == "scalar" else squares
        assert_near(variance.detach(), settled, 1e-9)


def test_a_variance_of_errors_that_are_zero_stays_above_zero():
    """Targets that are met exactly would otherwise end in an infinite precision, then in NaN."""
    net = chain(3, [Dense(2, energy=Gaussian(1.0, "diagonal", 1.0))])
    weights, x = random_weights(net), random_nodes(net)["input"]
    (target,) = feedforward(net, weights, {"input": x})[1:]
    engine = Engine(net, weights, Inference(2, 0.1), ("input", net.output), learning=SGD(0.1))
    for step in (1, 2, 3):
        assert engine.relax({"input": x, net.output: target}).status.ok
        engine.learn(0.1, step)
    variance = engine.weights()[net.output]["variance"]
    assert ((variance > 0) & (variance < 1e-5)).all()


# --- E11: Langevin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", ["states", "errors"])
@pytest.mark.parametrize(("rate", "temperature"), [(0.2, 1.0), (0.02, 1.0), (0.2, 0.25)])
def test_langevin_samples_the_posterior_of_a_linear_model_and_its_own_bias(rate, temperature, variables):
    """E11: z ~ N(b, 1/p), y ~ N(w z, 1/q), curvature a = p + w^2 q. The chain is z <- (1 - rate a) z + rate
    (p b + w q y) + sqrt(2 rate T) noise, so it settles at mean (p b + w q y) / a and variance T / (a (1 -
    rate a / 2)), the last factor being what a finite rate adds.

    20,000 chains as one batch, input at 0 so that layer 1's bias is the prior mean. Standard errors: s /
    sqrt(n) of a mean, s^2 sqrt(2 / n) of a variance. Noise of sqrt(rate), or counted twice, is many of them.
    """
    b, w, y, p, q, count = 0.4, 0.9, 1.5, 2.0, 0.7, 20_000
    net = chain(1, [Dense(1, energy=Gaussian(p)), Dense(1, bias=False, energy=Gaussian(q))])
    weights: Tree = {
        "dense1": {"weight": torch.full((1, 1), 0.3), "bias": torch.tensor([b])},
        "dense2": {"weight": torch.tensor([[w]])},
    }
    weights = {name: {k: v.double() for k, v in layer.items()} for name, layer in weights.items()}
    a = p + w * w * q
    steps = int(12 / (rate * a)) + 1  # (1 - rate a)^steps <= exp(-12) of the start
    inference = Inference(steps, rate, dynamics="langevin", temperature=temperature, variables=variables)
    clamp = {
        "input": torch.zeros(count, 1, dtype=torch.float64),
        "dense2": torch.full((count, 1), y, dtype=torch.float64),
    }
    z = infer(net, weights, clamp, inference, seed=11).activities["dense1"].squeeze(-1)
    mean, variance = (p * b + w * q * y) / a, temperature / (a * (1 - rate * a / 2))
    assert abs(z.mean().item() - mean) <= 3 * (variance / count) ** 0.5 + 1e-4 * variance**0.5
    assert abs(z.var().item() - variance) <= 3 * variance * (2 / count) ** 0.5
    third = ((z - z.mean()) ** 3).mean().item() / variance**1.5
    assert abs(third) <= 3 * (6 / count) ** 0.5  # a normal distribution, not merely one of that variance


def test_the_gradient_of_langevin_is_that_of_the_model_averaged_over_the_posterior():
    """Over many chains and steps the mean of dF/dw is its expectation, E[-q (y - w z) z] over the posterior
    (with the variance of a finite rate), and the burn-in is left out of it.

    dF/dw per sample has a standard deviation s; n chains and m steps, correlated over 2 / (rate a) steps,
    give a standard error of s sqrt(2 / (rate a n m)).
    """
    b, w, y, rate, count = 0.0, 0.8, 2.0, 0.1, 4000
    net = chain(1, [Dense(1), Dense(1, bias=False)])
    weights: Tree = {
        "dense1": {"weight": torch.zeros(1, 1), "bias": torch.tensor([b])},
        "dense2": {"weight": torch.tensor([[w]])},
    }
    weights = {name: {k: v.double() for k, v in layer.items()} for name, layer in weights.items()}
    a = 1 + w * w
    inference = Inference(180, rate, dynamics="langevin", burn_in=80)
    clamp = {
        "input": torch.zeros(count, 1, dtype=torch.float64),
        "dense2": torch.full((count, 1), y, dtype=torch.float64),
    }
    found = gradient_of(net, weights, clamp, inference)["dense2"]["weight"].item()
    mean, variance = w * y / a, 1 / (a * (1 - rate * a / 2))
    second = variance + mean**2
    expected = -(y * mean - w * second)
    # Var[y z - w z^2] of a normal z.
    spread = (y - 2 * w * mean) ** 2 * variance + 2 * w * w * variance**2
    error = (spread * 2 / (rate * a) / (count * 100)) ** 0.5
    assert abs(found - expected) <= 3 * error
    assert error < 0.05 * abs(expected)


def test_noise_depends_on_the_seed_and_the_node_alone():
    """Another seed, other samples; the same seed, the same bits, however layers are grouped and whatever ran
    before. A shared generator would make a run depend on its past.
    """
    net = NETWORKS["equal throughout"]
    weights, clamp = random_weights(net), supervised(net)
    inference = variant("langevin", Inference(6, 0.05))
    one, again, other = (infer(net, weights, clamp, inference, seed=seed) for seed in (3, 3, 4))
    apart = infer(net, weights, clamp, inference, seed=3, grouped=False)
    for name in net.names[:-1]:
        assert torch.equal(one.activities[name], again.activities[name])
        assert_near(apart.activities[name], one.activities[name], EPS)
        assert (one.activities[name] - other.activities[name]).abs().max() > 0.01
    hidden = [one.activities[name] - one.predictions[name] for name in net.names[:-1]]
    assert all((a - b).abs().max() > 0.01 for a, b in pairwise(hidden))


# --- Heun ---------------------------------------------------------------------------------------------------


def test_heun_is_of_second_order():
    """All steps taken (a wide tolerance) at a fixed factor: the end of one unit of time differs from the
    flow's by O(step^2). Tolerance adapts the factor, so one step of each size is compared: the local error is
    O(step^3), eight times smaller at half the step, within a fifth. Euler's would be four times.
    """
    net = NETWORKS["tanh at the output"]
    weights, clamp = random_weights(net), supervised(net)
    nodes = random_nodes(net)
    initial = {name: nodes[name] for name in net.names[:-1]}
    off = []
    for rate in (0.02, 0.01):
        exact = infer(net, weights, clamp, Inference(400, rate / 400), initial)
        fine = infer(net, weights, clamp, Inference(200, rate / 200), initial)
        step = infer(net, weights, clamp, Inference(1, rate, dynamics="heun", step_tolerance=1e3), initial)
        flow = {n: 2 * exact.activities[n] - fine.activities[n] for n in net.names}  # Richardson
        off.append(max((step.activities[n] - flow[n]).abs().max().item() for n in net.names))
    assert off[0] / off[1] == pytest.approx(8.0, rel=0.2)


def test_heun_takes_no_step_whose_error_is_above_its_tolerance():
    """A rate far beyond stability: every sample waits until its own factor has come down, and then descends.

    With one factor for the whole batch the stiffest sample would hold up the others, and results would depend
    on the batch (E16).
    """
    net = NETWORKS["tanh at the output"]
    weights, clamp = random_weights(net), supervised(net)
    result = infer(net, weights, clamp, Inference(60, 50.0, dynamics="heun"))
    total = result.energy.sum(-1)
    assert result.status.ok and total[1] == total[0] and total[-1] < 0.5 * total[0]
    plain = infer(net, weights, clamp, Inference(2000, 0.2)).energy[-1].sum()
    assert total[-1] < plain + 0.05


# --- nothing is left of what a variant does not do ----------------------------------------------------------


@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.5), AdamW(1e-2)], ids=["sgd", "adamw"])
def test_learned_variances_carry_no_state_of_the_learning_rule(rule):
    """They move by their own fixed point: no momentum, no decay, no moments in a checkpoint."""
    net = VARIANT_NETWORKS["learned variances"]
    engine = Engine(net, random_weights(net), Inference(3, 0.1), ("input", net.output), learning=rule)
    keys = {key for layer in engine.learning_state().values() for key in layer}
    assert not any("variance" in key for key in keys) and keys
    assert set(without_variances(engine.weights())) == set(net.names)
