"""The equalities E2 to E6, E10, E16 and E17 of docs/mathematics.md, in fp64.

Tolerances. A product over n terms is off by at most n u relative to the sum of their magnitudes (Higham 2002,
eq. 3.5), with u = 1.1e-16 in fp64. Widths here are below 10, magnitudes of order 1, and fewer than 50
products follow each other, so a comparison of two orders of computation is off by about 50 * 10 * 2u = 1e-13;
1e-12 (`EPS`) leaves a factor of ten. Where an equality is exact by construction the test asks for equal bits.
"""

from dataclasses import replace

import pytest
import torch
from helpers import (
    INFERENCES,
    NETWORKS,
    PLACEMENTS,
    assert_near,
    assert_trees_near,
    backprop_oracle,
    energy_of,
    feedforward,
    identical,
    predicted,
    random_nodes,
    random_weights,
    relax,
    supervised,
)
from torch import Tensor

from pctt import Categorical, Dense, Engine, Gaussian, Inference, Network, chain, infer, weight_gradients

EPS = 1e-12
UNIT = {
    name: net
    for name, net in NETWORKS.items()
    if all(isinstance(layer.energy, Categorical) or layer.energy.is_unit for layer in net.layers)
}
DEEP = {name: net for name, net in UNIT.items() if len(net.layers) >= 3}


def gradient_of(net: Network, weights, clamp, inference: Inference):
    return weight_gradients(net, weights, infer(net, weights, clamp, inference))


def largest(tree) -> float:
    return max(values.abs().max().item() for layer in tree.values() for values in layer.values())


# --- E2, E3: what a feedforward start gives -----------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("name", UNIT)
def test_an_error_arrives_one_layer_per_step_as_a_power_of_the_rate_times_that_of_backpropagation(name, rate):
    """E2: e_l(t) is exactly 0 for t < L - l, and e_l(L - l) = rate^(L - l) delta_l.

    A stale or fresh error in the wrong place, or a rate used twice, would keep every trajectory plausible and
    bend all hidden gradients. Each layer is compared relative to its own error, which is smaller by rate^k;
    the deviation form has no cancellation, so EPS holds however small it is.
    """
    net = UNIT[name]
    weights, clamp = random_weights(net), supervised(net)
    _, deltas = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    depth = len(net.layers)
    for steps in range(depth):
        errors = infer(net, weights, clamp, Inference(steps, rate)).errors
        for index, layer in enumerate(net.names[:-1], start=1):
            if steps < depth - index:
                assert torch.count_nonzero(errors[layer]) == 0, f"{layer} has an error after {steps} steps"
            elif steps == depth - index:
                expected = rate**steps * deltas[index - 1]
                assert_near(errors[layer], expected, EPS * expected.abs().max().item(), layer)


@pytest.mark.parametrize("prediction", ["live", "fixed"])
@pytest.mark.parametrize("name", UNIT)
def test_without_a_step_only_the_last_layer_has_a_gradient_and_it_is_that_of_backpropagation(
    name, prediction
):
    """E3: at T = 0 hidden weight gradients are exactly 0, the last layer's is backpropagation's.

    A gradient taken from a leftover buffer would pass every test of trained networks.
    """
    net = UNIT[name]
    weights, clamp = random_weights(net), supervised(net)
    expected, _ = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    found = gradient_of(net, weights, clamp, Inference(0, 0.1, prediction))
    for layer in net.names[:-1]:
        assert all(torch.count_nonzero(values) == 0 for values in found[layer].values())
    last = net.output
    assert_trees_near({last: found[last]}, {last: expected[last]}, EPS, relative=True)


# --- E4: fixed predictions are backpropagation --------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 1, 7])
@pytest.mark.parametrize("name", UNIT)
def test_fixed_predictions_with_rate_one_give_backpropagation_exactly_from_one_step_less_than_layers(
    name, extra
):
    """E4: with rate 1 the errors are those of backpropagation after L - 1 updates, and stay there.

    `infer` returns the errors recomputed after the last update, hence L - 1 updates where the table of
    docs/mathematics.md, which counts the errors before each update, has n = L.
    """
    net = UNIT[name]
    weights, clamp = random_weights(net), supervised(net)
    expected, deltas = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    inference = Inference(len(net.layers) - 1 + extra, 1.0, "fixed")
    result = infer(net, weights, clamp, inference)
    for layer, delta in zip(net.names, deltas, strict=True):
        assert_near(result.errors[layer], delta, EPS * delta.abs().max().item(), layer)
    assert_trees_near(weight_gradients(net, weights, result), expected, EPS, relative=True)


@pytest.mark.parametrize("name", DEEP)
def test_one_step_fewer_leaves_the_first_layer_without_gradient_and_the_others_exact(name):
    """E4: after L - 2 updates the error has reached layer 2; layer 1 has gradient exactly 0.

    Were it not so, errors would travel two layers in a step: no longer local.
    """
    net = DEEP[name]
    weights, clamp = random_weights(net), supervised(net)
    expected, _ = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    found = gradient_of(net, weights, clamp, Inference(len(net.layers) - 2, 1.0, "fixed"))
    first, *others = net.names
    assert all(torch.count_nonzero(values) == 0 for values in found[first].values())
    assert_trees_near({k: found[k] for k in others}, {k: expected[k] for k in others}, EPS, relative=True)


@pytest.mark.parametrize("name", ["tanh at the output", "tanh at the input", "categorical"])
def test_fixed_predictions_at_a_small_rate_converge_to_backpropagation_and_are_wrong_before(name):
    """E4: at rate 0.1 after 400 steps backpropagation; after 20 steps still off by more than 5 %.

    The rest of mode k is (1 - 0.1)^n times a polynomial of degree L - 1 in n: at most
    0.9^396 * 400^4 / 24 = 8e-10 of the first layer's error, and smaller above; 2e-9 allowed.
    """
    net = UNIT[name]
    weights, clamp = random_weights(net), supervised(net)
    expected, _ = backprop_oracle(net, weights, clamp["input"], clamp[net.output])
    converged = gradient_of(net, weights, clamp, Inference(400, 0.1, "fixed"))
    assert_trees_near(converged, expected, 2e-9, relative=True)
    early = gradient_of(net, weights, clamp, Inference(20, 0.1, "fixed"))[net.names[0]]["weight"]
    wanted = expected[net.names[0]]["weight"]
    assert (early - wanted).norm() > 0.05 * wanted.norm()


# --- E5: linear networks have a closed form -----------------------------------------------------------------

LINEAR_WIDTHS = (5, 7, 6, 6, 6, 4)


def linear_network(placement: str = "output") -> Network:
    return chain(5, [Dense(units, "identity", False, placement) for units in LINEAR_WIDTHS[1:]])


def closed_form_energy(matrices: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of F* = 1/2 r' S^-1 r, S = I + sum_{l=2..L} P_l P_l', P_l = W_L ... W_l.

    matrices: W_1 .. W_L as [out, in], the usual orientation.
    """
    products = [matrices[-1]]  # P_L, P_{L-1}, .., P_1
    for matrix in reversed(matrices[:-1]):
        products.append(products[-1] @ matrix)
    spread = torch.eye(y.shape[1], dtype=y.dtype) + sum(product @ product.T for product in products[:-1])
    residual = y - x @ products[-1].T
    return 0.5 * (residual * torch.linalg.solve(spread, residual.T).T).sum(-1).mean()


@pytest.mark.parametrize("placement", ["output", "input"])
def test_a_linear_network_relaxes_to_its_closed_form(placement):
    """E5: F* = 1/2 r'S^-1 r, e_L* = S^-1 r, e_l* = W_{l+1}' e_{l+1}*, and the gradient is dF*/dW.

    The last says that local learning at equilibrium descends one global function; a factor lost anywhere in
    energy, feedback or gradient breaks one of the four. The Hessian's eigenvalues lie in [h, 3.6] with h >
    0.05 (asserted), so 2,000 steps at rate 0.4 leave (1 - 0.02)^2000 = 3e-18 of the way.
    """
    net = linear_network(placement)
    weights, clamp = random_weights(net, seed=3, gain=0.8), supervised(net, batch=6)
    x, y = clamp["input"], clamp[net.output]
    matrices = [weights[name]["weight"].T.clone().requires_grad_() for name in net.names]

    inner = matrices[1:]  # the Hessian of F in x_1 .. x_{L-1} is J'J, J mapping activities to errors
    sizes = LINEAR_WIDTHS[1:-1]
    jacobian = torch.zeros(sum(LINEAR_WIDTHS[1:]), sum(sizes), dtype=torch.float64)
    row = column = 0
    for matrix, size in zip(inner, sizes, strict=True):
        jacobian[row : row + size, column : column + size] = torch.eye(size, dtype=torch.float64)
        jacobian[row + size : row + size + len(matrix), column : column + size] = -matrix.detach()
        row, column = row + size, column + size
    modes = torch.linalg.eigvalsh(jacobian.T @ jacobian)
    assert modes.min() > 0.05 and modes.max() < 2 / 0.4

    result = infer(net, weights, clamp, Inference(2000, 0.4))
    energy = closed_form_energy(matrices, x, y)
    assert result.energy[-1].sum().item() == pytest.approx(energy.item(), rel=EPS)

    products = [matrices[-1].detach()]
    for matrix in reversed(matrices[:-1]):
        products.append(products[-1] @ matrix.detach())
    spread = torch.eye(4, dtype=torch.float64) + sum(product @ product.T for product in products[:-1])
    error = torch.linalg.solve(spread, (y - x @ products[-1].T).T).T
    for name, matrix in zip(reversed(net.names), [None, *reversed(matrices[1:])], strict=True):
        if matrix is not None:
            error = error @ matrix.detach()
        assert_near(result.errors[name], error, EPS, name)

    energy.backward()
    for name, gradient in weight_gradients(net, weights, result).items():
        matrix = matrices[net.names.index(name)]
        assert matrix.grad is not None
        assert_near(gradient["weight"], matrix.grad.T, EPS, name)


# --- E6: equilibrium ----------------------------------------------------------------------------------------

SMOOTH = [name for name in NETWORKS if not any(word in name for word in ("relu", "hard_tanh"))]


@pytest.mark.parametrize("name", SMOOTH)
def test_at_equilibrium_every_weighted_error_is_the_feedback_of_the_next(name):
    """E6: P_l e_l = g_l(P_{l+1} e_{l+1}), the vector-Jacobian product taken by autograd.

    It characterises equilibrium whatever the path there: an inference that descends anything but F ends
    elsewhere, and quietly so. 1,500 steps at rate 0.2 leave at most 0.98^1500 = 7e-14 of a mode of curvature
    0.1; a step's own rounding is 1e-16, so 1e-11 is allowed.
    """
    net = NETWORKS[name]
    weights, clamp = random_weights(net, gain=0.7), supervised(net)
    result = infer(net, weights, clamp, Inference(1500, 0.2))
    reference = relax(net, weights, result.activities, Inference(0))
    for index in range(1, len(net.layers)):
        node = net.names[index - 1]
        source = result.activities[node].clone().requires_grad_()
        states = {**result.activities, node: source}
        total = one_step_energy(net, weights, states, index)
        (slope,) = torch.autograd.grad(total, source)
        assert slope.abs().max() <= 1e-11, f"{node} still moves"
        assert_near(result.errors[node], reference.errors[0][node], EPS, node)


def one_step_energy(net: Network, weights, states, index: int) -> Tensor:
    """The two energies that node `index` takes part in, summed over the batch."""
    nodes = [states[name] for name in net.nodes]
    own = energy_of(net, index, nodes[index], predicted(net, weights, index, nodes[index - 1]))
    next_ = predicted(net, weights, index + 1, nodes[index])
    return (own + energy_of(net, index + 1, nodes[index + 1], next_)).sum()


@pytest.mark.parametrize("name", SMOOTH)
def test_the_energy_falls_at_every_step_of_a_small_rate(name):
    """E6: F(t) is monotone for small rates (here 0.02, far below 2 over the largest curvature, about 10).

    A flipped sign anywhere makes it rise. Rounding may raise it by a few u once nothing moves: 1e-14 F.
    Kinked activations are left out: at a kink the gradient jumps, and no rate is small enough.
    """
    net = NETWORKS[name]
    energy = infer(net, random_weights(net), supervised(net), Inference(200, 0.02)).energy.sum(-1)
    scale = energy.abs().max()
    assert (energy.diff() <= 1e-14 * scale).all()
    if len(net.layers) > 1:
        assert energy[-1] < energy[0] - 1e-3 * abs(energy[0])


# --- E10: precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.25, 3.0])
@pytest.mark.parametrize("dynamics", ["euler", "momentum"])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_scaling_every_precision_is_scaling_both_rates(factor, dynamics, placement):
    """E10: precision c P at rate gamma / c gives the states of P at gamma, and c times the weight gradient.

    A precision applied in the error but not in the gradient, or twice, would look like a badly chosen rate.
    The energies differ by the factor and by -1/2 log|cP|, checked too.
    """
    precisions = [(0.5, 1.0, 2.0, 3.0), 1.5, (2.0, 0.25, 1.0, 1.5)]

    def network(scale: float) -> Network:
        scaled = [tuple(scale * v for v in p) if isinstance(p, tuple) else scale * p for p in precisions]
        return chain(5, [Dense(4, "tanh", activate=placement, energy=Gaussian(p)) for p in scaled])

    momentum = 0.6 if dynamics == "momentum" else 0.0
    one, scaled = network(1.0), network(factor)
    weights, clamp = random_weights(one), supervised(one)
    a = infer(one, weights, clamp, Inference(15, 0.1, dynamics=dynamics, momentum=momentum))
    b = infer(scaled, weights, clamp, Inference(15, 0.1 / factor, dynamics=dynamics, momentum=momentum))
    for name in one.nodes:
        assert_near(b.activities[name], a.activities[name], EPS, name)
    expected = {
        name: {key: factor * values for key, values in layer.items()}
        for name, layer in weight_gradients(one, weights, a).items()
    }
    assert_trees_near(weight_gradients(scaled, weights, b), expected, EPS, relative=True)
    logs = torch.tensor([0.5 * layer.energy.log_determinant(4) for layer in one.layers], dtype=torch.float64)
    shifted = (
        factor * (a.energy + logs) - logs - 0.5 * 4 * torch.log(torch.tensor(factor, dtype=torch.float64))
    )
    assert_near(b.energy, shifted, EPS * shifted.abs().max().item(), "energy")


def test_a_precision_of_one_is_no_precision():
    """The same network without P, with P = 1 and P = (1, .., 1); the last takes the weighted path."""
    results = []
    for energy in (Gaussian(), Gaussian(1.0), Gaussian((1.0,) * 6)):
        net = chain(5, [Dense(6, "tanh", energy=energy)] * 3)
        weights, clamp = random_weights(net), supervised(net)
        results.append(infer(net, weights, clamp, Inference(10, 0.1)))
    for other in results[1:]:
        assert_near(other.energy, results[0].energy, EPS)
        for name, values in results[0].activities.items():
            assert_near(other.activities[name], values, EPS, name)


# --- E16: the batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["live", "fixed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_duplicating_and_permuting_the_batch_changes_neither_states_nor_gradients(name, settings):
    """E16: each sample relaxes as if alone, and weight gradients are batch means.

    A mean taken before differentiating with respect to activities scales the inference rate by 1/B and
    nothing crashes: results then depend on the batch size. A product's rows may be summed in another order
    for another number of rows, hence EPS and not equal bits.
    """
    net, inference = NETWORKS[name], INFERENCES[settings]
    weights, clamp = random_weights(net), supervised(net, batch=4)
    order = torch.tensor([2, 0, 3, 1, 1, 3, 0, 2, 3, 2, 1, 0])
    single = infer(net, weights, clamp, inference)
    many = infer(net, weights, {name: values[order] for name, values in clamp.items()}, inference)
    for node in net.nodes:
        assert_near(many.activities[node], single.activities[node][order], EPS, node)
    assert_near(many.energy, single.energy, EPS * max(1.0, single.energy.abs().max().item()), "energy")
    gradients = weight_gradients(net, weights, single)
    assert_trees_near(weight_gradients(net, weights, many), gradients, EPS * max(1.0, largest(gradients)))


def test_a_sample_alone_is_that_sample_in_its_batch():
    net = NETWORKS["two groups"]
    weights, clamp = random_weights(net), supervised(net, batch=5)
    together = infer(net, weights, clamp, Inference(10, 0.1))
    alone = infer(net, weights, {name: values[3:4] for name, values in clamp.items()}, Inference(10, 0.1))
    for node in net.nodes:
        assert_near(alone.activities[node], together.activities[node][3:4], EPS, node)


# --- E17: the deviation form --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", INFERENCES)
@pytest.mark.parametrize("name", NETWORKS)
def test_deviations_are_plain_predictive_coding_at_every_step(name, settings):
    """E17: activities, errors and energies of every step, and the gradients, equal the plain form's.

    This is the one test that sees every row of both tables.
    """
    net, inference = NETWORKS[name], INFERENCES[settings]
    weights, clamp = random_weights(net), supervised(net)
    expected = relax(net, weights, clamp, inference)
    result = infer(net, weights, clamp, inference)
    scale = max(1.0, expected.energies.abs().max().item())
    assert_near(result.energy, expected.energies, EPS * scale, "energy")
    for steps in {min(1, inference.num_steps), inference.num_steps // 2, inference.num_steps}:
        part = infer(net, weights, clamp, replace(inference, num_steps=steps))
        for node in net.nodes:
            assert_near(part.activities[node], expected.activities[steps][node], EPS, f"{node}, step {steps}")
        for node in net.names:
            assert_near(part.errors[node], expected.errors[steps][node], EPS, f"error {node}, step {steps}")
            mean = expected.activities[steps][node] - expected.errors[steps][node]
            assert_near(part.predictions[node], mean, EPS, f"prediction {node}, step {steps}")
    assert_trees_near(weight_gradients(net, weights, result), expected.gradients, EPS * scale)


@pytest.mark.parametrize("settings", INFERENCES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_has_the_gradients_of_plain_predictive_coding(name, settings):
    """What training runs: relaxation and gradients in one program, on the buffers that inference left behind.

    `weight_gradients` starts anew from a result, so it would not see a gradient taken from the initial
    activity, from an anchor or from a buffer that another instruction has overwritten since.
    """
    net, inference = NETWORKS[name], INFERENCES[settings]
    weights, clamp = random_weights(net), supervised(net)
    expected = relax(net, weights, clamp, inference)
    for grouped in (True, False):
        engine = Engine(net, weights, inference, ("input", net.output), grouped=grouped)
        engine.relax(clamp)
        engine.compute_gradients()
        assert_trees_near(engine.gradients(), expected.gradients, EPS * max(1.0, largest(expected.gradients)))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_deviations_lose_less_of_the_early_layers_in_single_precision_than_activities(placement):
    """The reason for the deviation form: E2 says that the signal k layers below the output is rate^k delta.

    Ten layers of 64, tanh, rate 0.1, T = 20: activities of order 1, errors of the first layer 3e-6. The
    change of a prediction is a difference of two values of tanh, each rounded by at most u = 6e-8 and each of
    a drive rounded by as much: 4 u per error, whatever the number of steps, because it is computed afresh
    from the deviation. Activities kept as they are accumulate a rounding of theirs at every step; the oracle
    in the same precision shows how much. Measured: ten times more in the first layer's gradient; three times
    is asserted, so that a silent return to activities would be seen.
    """
    net = chain(64, [Dense(64, "tanh", activate=placement)] * 10)
    inference = Inference(20, 0.1)
    # The fp64 run starts from the very numbers of the fp32 run, so that only the arithmetic differs.
    weights, clamp = random_weights(net, dtype=torch.float32), supervised(net, 8, dtype=torch.float32)
    doubled = {name: {key: v.double() for key, v in layer.items()} for name, layer in weights.items()}
    exact = relax(net, doubled, {name: values.double() for name, values in clamp.items()}, inference)
    plain = relax(net, weights, clamp, inference)
    result = infer(net, weights, clamp, inference)
    unit = torch.finfo(torch.float32).eps / 2
    for name in net.names:
        off = (result.errors[name].double() - exact.errors[-1][name]).square().mean().sqrt().item()
        assert off <= 4 * unit, f"{name}: {off:.1e}"

    def distance(tree) -> float:
        wanted = exact.gradients[net.names[0]]["weight"]
        return ((tree[net.names[0]]["weight"].double() - wanted).norm() / wanted.norm()).item()

    assert distance(plain.gradients) >= 3 * distance(weight_gradients(net, weights, result))


# --- grouping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_grouped_and_ungrouped_give_the_same_numbers(name):
    """Stacking equal layers changes only how many products are one call; a slot off by one shows at once."""
    net, inference = NETWORKS[name], INFERENCES["live"]
    weights, clamp = random_weights(net), supervised(net)
    grouped = infer(net, weights, clamp, inference, grouped=True)
    single = infer(net, weights, clamp, inference, grouped=False)
    for node in net.nodes:
        assert_near(grouped.activities[node], single.activities[node], EPS, node)
    assert_near(grouped.energy, single.energy, EPS * max(1.0, single.energy.abs().max().item()))
    gradients = weight_gradients(net, weights, single, grouped=False)
    assert_trees_near(weight_gradients(net, weights, grouped), gradients, EPS * max(1.0, largest(gradients)))


def test_the_feedforward_start_is_the_feedforward_pass():
    """Nothing clamped but the input, no error anywhere: nothing may move, to the last bit."""
    for name, net in NETWORKS.items():
        weights, nodes = random_weights(net), random_nodes(net)
        start = infer(net, weights, {"input": nodes["input"]}, Inference(0))
        later = infer(net, weights, {"input": nodes["input"]}, Inference(25, 0.2))
        for node, values in zip(net.nodes, feedforward(net, weights, {"input": nodes["input"]}), strict=True):
            assert_near(start.activities[node], values, EPS, f"{name}: {node}")
            assert identical(start.activities[node], later.activities[node])
        assert all(torch.count_nonzero(error) == 0 for error in later.errors.values())
