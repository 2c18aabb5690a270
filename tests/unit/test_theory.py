"""Closed forms, curvature and alignment of pctt.theory against dense linear algebra, autograd and the engine.

Tolerances. As in test_equalities.py a comparison of two orders of computation, of magnitudes of order 1 and
sums below 10 terms, is off by less than 1e-13, and `EPS` leaves a factor of ten. The solution of a linear
system is off by that times the condition number, here below 100, which is asserted: `SOLVED`. Eigenvalues are
asked for to 1e-9 of the largest one.
"""

import functools
import math
import re

import numpy as np
import pytest
import torch
from helpers import (
    FULL,
    NETWORKS,
    VARIANT_NETWORKS,
    assert_near,
    assert_trees_near,
    energy_of,
    feedforward,
    identical,
    mean_of,
    predicted,
    random_nodes,
    random_weights,
    relax,
    supervised,
    without_variances,
)
from torch import Tensor

from pctt import (
    Categorical,
    Dense,
    Gaussian,
    Inference,
    InferenceResult,
    Network,
    backprop,
    chain,
    infer,
    init,
    theory,
    weight_gradients,
)
from pctt.theory import Spectrum

EPS = 1e-12
SOLVED = 1e-10
PER_UNIT = Gaussian((0.5, 1.0, 2.0, 3.0))

LINEAR: dict[str, Network] = {
    "four layers": chain(5, [Dense(7), Dense(6), Dense(6), Dense(4)]),
    "one layer": chain(5, [Dense(4)]),
    "no biases": chain(5, [Dense(6, bias=False), Dense(4, bias=False)]),
    "a bottleneck": chain(5, [Dense(6), Dense(1), Dense(4)]),
    "placements mixed": chain(5, [Dense(6), Dense(6, activate="input"), Dense(4)]),
    "one precision": chain(
        5, [Dense(6, energy=Gaussian(0.5)), Dense(6, energy=Gaussian(2.0)), Dense(4, energy=Gaussian(3.0))]
    ),
    "a precision per unit": chain(5, [Dense(4, energy=PER_UNIT), Dense(6), Dense(4, energy=PER_UNIT)]),
    "a full precision": chain(
        5, [Dense(4, energy=Gaussian(FULL)), Dense(6), Dense(4, energy=Gaussian(FULL))]
    ),
    "learned variances": chain(5, [Dense(6, energy=Gaussian(2.0, "diagonal")), Dense(4)]),
    "scales and a skip": chain(
        5, [Dense(6, scale=0.5), Dense(6, activate="input", scale=0.6, skip=True), Dense(4, scale=0.7)]
    ),
}
ALL = {**NETWORKS, **VARIANT_NETWORKS}


def oracle_energy(net: Network, weights, nodes: list[Tensor]) -> Tensor:
    """Total energy per sample, [B], by the helpers."""
    return sum(
        energy_of(net, i, nodes[i], predicted(net, weights, i, nodes[i - 1]), weights)
        for i in range(1, len(nodes))
    )


# --- energy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_energy_is_that_of_the_equations_and_of_the_engine(name):
    """Each layer counts once, with its precision; without one every Hessian would still look plausible."""
    net = ALL[name]
    weights, nodes = random_weights(net), random_nodes(net)
    found = theory.energy(net, weights, nodes)
    expected = oracle_energy(net, weights, [nodes[node] for node in net.nodes])
    assert_near(found, expected, EPS * expected.abs().max().item())
    result = infer(net, weights, supervised(net), Inference(5))
    mean = theory.energy(net, weights, result.activities).mean().item()
    assert mean == pytest.approx(result.energy[-1].sum().item(), rel=EPS)


@pytest.mark.parametrize("name", ["two layers", "a full precision", "categorical at the input"])
def test_the_energy_can_be_differentiated_by_activities_and_weights(name):
    """Finite differences by torch's gradcheck: steps of 1e-6, its own bounds of 1e-5 and 0.1 %."""
    net = ALL[name]
    weights, nodes = random_weights(net), random_nodes(net, batch=1)
    hidden, first = nodes[net.names[0]].requires_grad_(), weights[net.names[1]]["weight"].requires_grad_()

    def total(activity, weight):
        tree = {**weights, net.names[1]: {**weights[net.names[1]], "weight": weight}}
        return theory.energy(net, tree, {**nodes, net.names[0]: activity})

    assert torch.autograd.gradcheck(total, (hidden, first))


def test_single_precision_is_converted_and_not_computed_in():
    net = NETWORKS["tanh at the output"]
    weights, nodes = random_weights(net, dtype=torch.float32), random_nodes(net, dtype=torch.float32)
    doubles = {name: {key: v.double() for key, v in layer.items()} for name, layer in weights.items()}
    exact = {name: values.double() for name, values in nodes.items()}
    assert identical(theory.energy(net, weights, nodes), theory.energy(net, doubles, exact))
    clamped = ("input", net.output)
    found = theory.hessian_spectrum(net, weights, nodes, clamped)
    assert found == theory.hessian_spectrum(net, doubles, exact, clamped)
    linear = LINEAR["four layers"]
    weights, clamp = random_weights(linear, dtype=torch.float32), supervised(linear, dtype=torch.float32)
    doubles = {name: {key: v.double() for key, v in layer.items()} for name, layer in weights.items()}
    low = theory.linear_equilibrium(linear, weights, clamp["input"], clamp[linear.output])
    high = theory.linear_equilibrium(linear, doubles, clamp["input"].double(), clamp[linear.output].double())
    assert identical(low.total, high.total)
    assert all(identical(low.activities[node], high.activities[node]) for node in linear.nodes)


# --- the equilibrium of linear networks ---------------------------------------------------------------------


def joint_system(net: Network, weights, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """dF/dx_l = 0 of all free nodes, x_1 .. x_{L-1} side by side, as one system: its matrix, which is the
    Hessian, [N, N], and its right-hand side, [B, N].

    -x_{l-1} W_l P_l + x_l (P_l + W_{l+1} P_{l+1} W_{l+1}') - x_{l+1} P_{l+1} W_{l+1}'
        = b_l P_l - b_{l+1} P_{l+1} W_{l+1}'
    """
    widths, last = net.widths, len(net.layers)
    w, b, p = [None], [None], [None]
    for name, layer in zip(net.names, net.layers, strict=True):
        own = {key: value.numpy() for key, value in weights[name].items()}
        w.append(layer.scale * own["weight"] + (np.eye(layer.units) if layer.skip else 0.0))
        b.append(own.get("bias", np.zeros(layer.units)))
        precision = 1 / own["variance"] if "variance" in own else np.array(layer.energy.precision)
        p.append(precision if precision.ndim == 2 else np.diag(np.broadcast_to(precision, layer.units)))
    at = np.cumsum([0, *widths[1:last]])
    system, constant = np.zeros((at[-1], at[-1])), np.zeros((len(x), at[-1]))
    for i in range(1, last):
        here, up = slice(at[i - 1], at[i]), p[i + 1] @ w[i + 1].T
        system[here, here] = p[i] + w[i + 1] @ up
        constant[:, here] = b[i] @ p[i] - b[i + 1] @ up
        if i == 1:
            constant[:, here] += x.numpy() @ w[1] @ p[1]
        if i == last - 1:
            constant[:, here] += y.numpy() @ up
        else:
            system[slice(at[i], at[i + 1]), here] = -up
            system[here, slice(at[i], at[i + 1])] = -up.T
    return system, constant


def joint_solution(net: Network, weights, x: Tensor, y: Tensor) -> np.ndarray:
    """x_1 .. x_{L-1} side by side, [B, N]."""
    system, constant = joint_system(net, weights, x, y)
    assert np.linalg.cond(system) < 100
    return np.linalg.solve(system, constant.T).T  # the matrix is symmetric


@pytest.mark.parametrize("name", LINEAR)
def test_the_closed_form_solves_the_equations_of_all_free_nodes_at_once(name):
    """Against numpy on the joint system, which knows nothing of S. A precision on the wrong side of a
    product, or a bias left out, would still give some point that looks relaxed.
    """
    net = LINEAR[name]
    weights, clamp = random_weights(net), supervised(net)
    x, y = clamp["input"], clamp[net.output]
    found = theory.linear_equilibrium(net, weights, x, y)
    hidden = [found.activities[node] for node in net.names[:-1]]
    if hidden:
        assert_near(torch.cat(hidden, -1), torch.from_numpy(joint_solution(net, weights, x, y)), SOLVED)
    assert identical(found.activities["input"], x)
    assert_near(found.activities[net.output], y, EPS)
    nodes = [found.activities[node] for node in net.nodes]
    for i, node in enumerate(net.names, start=1):
        assert_near(found.errors[node], nodes[i] - predicted(net, weights, i, nodes[i - 1]), SOLVED)
        expected = energy_of(net, i, nodes[i], predicted(net, weights, i, nodes[i - 1]), weights).mean()
        assert_near(found.energy[i - 1], expected, SOLVED)
    assert_near(found.total, oracle_energy(net, weights, nodes).mean(), SOLVED)


@functools.cache
def relaxed(name: str) -> InferenceResult:
    net = LINEAR[name]
    return infer(net, random_weights(net), supervised(net), Inference(1500, 0.1))


@pytest.mark.parametrize("name", LINEAR)
def test_a_long_relaxation_ends_at_the_closed_form(name):
    """The slowest mode of all, of eigenvalue 0.18, keeps (1 - 0.1 * 0.18)^1500 = 1e-12 of its way."""
    net = LINEAR[name]
    weights, clamp = random_weights(net), supervised(net)
    found = theory.linear_equilibrium(net, weights, clamp["input"], clamp[net.output])
    result = relaxed(name)
    for node in net.names:
        assert_near(result.activities[node], found.activities[node], 1e-10, node)
        assert_near(result.errors[node], found.errors[node], 1e-10, node)
    assert_near(result.energy[-1], found.energy, 1e-10)


@pytest.mark.parametrize("name", LINEAR)
def test_the_gradient_of_the_energy_at_equilibrium_is_that_of_learning(name):
    """The envelope theorem: at the minimum over activities d total / dW is the partial derivative, which
    local rules compute. Differentiating through S therefore gives the same numbers in another way.
    """
    net = LINEAR[name]
    weights, clamp = random_weights(net), supervised(net)
    local = weight_gradients(net, weights, relaxed(name))
    leaves = {
        name: {key: v.clone().requires_grad_() for key, v in tree.items()} for name, tree in weights.items()
    }
    theory.linear_equilibrium(net, leaves, clamp["input"], clamp[net.output]).total.backward()
    through = {name: {key: v.grad for key, v in tree.items()} for name, tree in leaves.items()}
    assert_trees_near(local, without_variances(through), 1e-10)


# --- curvature ----------------------------------------------------------------------------------------------

CURVED = [
    "tanh at the output",
    "tanh at the input",
    "identity at the output",
    "relu at the output",
    "two layers",
    "widths of one",
    "placements mixed",
    "softmax, squared error",
    "categorical",
    "categorical at the input",
    "a precision per unit",
    "precisions and a categorical output",
    "scales",
    "skips",
    "a full precision",
    "skips and learned variances",
]


def dense_eigenvalues(net: Network, weights, nodes, clamped, variables: str) -> np.ndarray:
    """All eigenvalues of every sample's Hessian, [B, N]: torch's dense Hessian of the helpers' energy."""
    last = len(net.layers)
    floats = isinstance(net.layers[-1].energy, Categorical) and net.output not in clamped
    free = [i for i, name in enumerate(net.nodes) if name not in clamped and not (floats and i == last)]
    found = []
    for row in range(len(nodes["input"])):
        at = [nodes[name][row : row + 1] for name in net.nodes]
        own = [
            0.0 * at[0],
            *(mean_of(net, i, predicted(net, weights, i, at[i - 1])) for i in range(1, last + 1)),
        ]
        start = [at[i] - own[i] if variables == "errors" else at[i] for i in free]

        def total(flat, at=at):
            parts = dict(zip(free, flat[None].split([net.widths[i] for i in free], -1), strict=True))
            placed = []
            for i, value in enumerate(at):
                value = parts.get(i, value)
                if variables == "errors" and i in free and i > 0:
                    value = value + predicted(net, weights, i, placed[-1])
                placed.append(value)
            if floats:
                placed[last] = mean_of(net, last, predicted(net, weights, last, placed[last - 1]))
            return oracle_energy(net, weights, placed).sum()

        hessian = torch.autograd.functional.hessian(total, torch.cat(start, -1)[0])
        found.append(torch.linalg.eigvalsh(hessian).numpy())
    return np.stack(found)


@pytest.mark.parametrize("variables", ["states", "errors"])
@pytest.mark.parametrize("name", CURVED)
def test_the_extreme_eigenvalues_are_those_of_the_dense_hessian(name, variables):
    """At random activities, far from equilibrium, for three ways to clamp. 1e-9 of the largest absolute
    eigenvalue was asked for, EPS of it is for rounding.
    """
    net = ALL[name]
    weights, nodes = random_weights(net), random_nodes(net, batch=2)
    for clamped in (("input", net.output), (net.output,), ("input", net.names[0])):
        if clamped != ("input", net.output):
            nodes = random_nodes(net, batch=1)
        found = theory.hessian_spectrum(net, weights, nodes, clamped, variables)
        expected = dense_eigenvalues(net, weights, nodes, clamped, variables)
        bound = (1e-9 + EPS) * np.abs(expected).max()
        assert abs(found.largest - expected.max()) <= bound, clamped
        assert abs(found.smallest - expected.min()) <= bound, clamped
        assert found.residual <= bound


def test_curvature_of_both_signs_is_found_even_where_the_negative_one_is_larger():
    """The power method alone would return the eigenvalue of largest size, which here is below 0."""
    net = chain(1, [Dense(1, "tanh", bias=False), Dense(1, "tanh", bias=False)])
    weights = {name: {"weight": torch.tensor([[3.0]], dtype=torch.float64)} for name in net.names}
    # F(h) = (h - mu)^2 / 2 + (y - tanh 3h)^2 / 2, F'' = 1 + 9 s^2 + 18 t s (y - t), t = tanh 3h, s = 1 - t^2
    h, y = -0.2, 3.0
    t = math.tanh(3 * h)
    s = 1 - t * t
    second = 1 + 9 * s * s + 18 * t * s * (y - t)
    assert second < -10
    nodes = {"input": [[0.5]], "dense1": [[h]], "dense2": [[y]]}
    nodes = {name: torch.tensor(values, dtype=torch.float64) for name, values in nodes.items()}
    found = theory.hessian_spectrum(net, weights, nodes, ("input", "dense2"))
    assert found.largest == found.smallest == pytest.approx(second, rel=EPS)
    with pytest.raises(ValueError, match="no rate is stable"):
        theory.largest_stable_rate(found)
    wide = chain(5, [Dense(6, "tanh"), Dense(6, "tanh"), Dense(4, "tanh")])
    weights, nodes = random_weights(wide, gain=3.0), random_nodes(wide)
    nodes[wide.output] = -10.0 * torch.sign(feedforward(wide, weights, {"input": nodes["input"]})[-1])
    expected = dense_eigenvalues(wide, weights, nodes, ("input", wide.output), "errors")
    assert -expected.min() > expected.max() > 0
    found = theory.hessian_spectrum(wide, weights, nodes, ("input", wide.output), "errors")
    assert [found.smallest, found.largest] == pytest.approx([expected.min(), expected.max()], rel=1e-8)


def test_in_errors_a_linear_network_has_the_curvature_of_its_jacobian():
    """H = I + J J' with J the Jacobian of the output by every hidden error, from numpy's singular values; so
    with more hidden units than outputs the smallest eigenvalue is 1 whatever the weights.
    """
    net = LINEAR["four layers"]
    weights, nodes = random_weights(net), random_nodes(net)
    _, w2, w3, w4 = (weights[name]["weight"].numpy() for name in net.names)
    jacobian = np.concatenate([w2 @ w3 @ w4, w3 @ w4, w4])
    found = theory.hessian_spectrum(net, weights, nodes, ("input", net.output), "errors")
    assert found.largest == pytest.approx(1 + np.linalg.svd(jacobian, compute_uv=False)[0] ** 2, rel=1e-9)
    assert found.smallest == pytest.approx(1.0, rel=1e-8)


def test_a_free_categorical_output_is_no_variable_and_adds_no_curvature():
    """It follows its prediction at energy 0, so the spectrum is that of the network without that layer."""
    net = NETWORKS["categorical"]
    weights, nodes = random_weights(net), random_nodes(net)
    short = chain(net.input, net.layers[:-1])
    for variables in ("states", "errors"):
        found = theory.hessian_spectrum(net, weights, nodes, ("input",), variables)
        kept = {name: nodes[name] for name in short.nodes}
        expected = theory.hessian_spectrum(
            short, {name: weights[name] for name in short.names}, kept, ("input",), variables
        )
        assert [found.largest, found.smallest] == pytest.approx(
            [expected.largest, expected.smallest], rel=1e-8
        )


def test_a_hessian_with_few_eigenvalues_ends_early_and_exactly():
    """Weights of 0 leave the precisions, 2 and 5: two powers span all there is, and what follows is rounding
    that must not be taken for a direction, nor the zeros in its place for eigenvalues.
    """
    net = chain(5, [Dense(9, energy=Gaussian(2.0)), Dense(8, energy=Gaussian(5.0)), Dense(3)])
    weights = {name: {key: 0.0 * v for key, v in tree.items()} for name, tree in random_weights(net).items()}
    nodes = random_nodes(net)
    found = theory.hessian_spectrum(net, weights, nodes, ("input", net.output))
    assert [found.smallest, found.largest] == pytest.approx([2.0, 5.0], rel=EPS)
    uniform = chain(5, [Dense(9), Dense(8), Dense(3)])
    found = theory.hessian_spectrum(uniform, weights, nodes, ("input", net.output))
    assert [found.smallest, found.largest] == pytest.approx([1.0, 1.0], rel=EPS)


@pytest.mark.parametrize("num_iterations", [1, 4, 9])
def test_too_few_iterations_stay_inside_the_spectrum_and_the_residual_says_how_far(num_iterations):
    """Values of a subspace lie between the extremes (Courant-Fischer), and within the residual of each is an
    eigenvalue (Parlett 1998, theorem 4.5.1).
    """
    net = NETWORKS["tanh at the output"]
    weights, nodes = random_weights(net), random_nodes(net, batch=1)
    clamped = ("input", net.output)
    every = dense_eigenvalues(net, weights, nodes, clamped, "states")[0]
    found = theory.hessian_spectrum(net, weights, nodes, clamped, num_iterations=num_iterations)
    assert every.min() <= found.smallest <= found.largest <= every.max()
    assert found.residual > 1e-3
    for value in (found.smallest, found.largest):
        assert np.abs(every - value).min() <= found.residual + EPS
    full = theory.hessian_spectrum(net, weights, nodes, clamped)
    assert max(every.max() - full.largest, full.smallest - every.min()) < every.max() - found.largest


def test_a_wider_tolerance_ends_sooner_and_is_kept():
    """156 free units; the ends are asked for to 1e-2 and to 1e-9 of the largest eigenvalue, and are so."""
    net = chain(5, [*[Dense(52, "tanh")] * 3, Dense(4)])
    weights, nodes = random_weights(net), random_nodes(net, batch=2)
    found = {
        tolerance: theory.hessian_spectrum(
            net, weights, nodes, ("input", net.output), num_iterations=156, tolerance=tolerance
        )
        for tolerance in (1e-2, 1e-9)
    }
    expected = dense_eigenvalues(net, weights, nodes, ("input", net.output), "states")
    for tolerance, spectrum in found.items():
        assert spectrum.residual <= tolerance * np.abs(expected).max()
        assert abs(spectrum.largest - expected.max()) <= tolerance * np.abs(expected).max()
        assert abs(spectrum.smallest - expected.min()) <= tolerance * np.abs(expected).max()
    assert found[1e-2].residual > 1e3 * found[1e-9].residual


def test_seed_and_the_callers_autograd_do_not_matter():
    """Neither changes the result beyond the tolerance, and no gradient is left behind in the weights."""
    net = NETWORKS["tanh at the output"]
    weights, nodes = random_weights(net), random_nodes(net)
    found = [
        theory.hessian_spectrum(net, weights, nodes, ("input", net.output), seed=seed) for seed in (0, 0, 7)
    ]
    assert found[0] == found[1]
    assert found[2].smallest == pytest.approx(found[0].smallest, rel=1e-8)
    early = [
        theory.hessian_spectrum(net, weights, nodes, ("input", net.output), num_iterations=2, seed=seed)
        for seed in (0, 7)
    ]
    assert early[0] != early[1]  # else the seed would reach nothing
    before = torch.get_rng_state()
    for layer in weights.values():
        layer["weight"].requires_grad_()
    with torch.no_grad():
        assert theory.hessian_spectrum(net, weights, nodes, ("input", net.output)) == found[0]
    assert all(layer["weight"].grad is None for layer in weights.values())
    assert torch.equal(torch.get_rng_state(), before)


# --- rates --------------------------------------------------------------------------------------------------


def disturbed(net: Network, weights, clamp):
    """Equilibrium of a linear network, its hidden activities moved a little, and its spectrum."""
    rest = theory.linear_equilibrium(net, weights, clamp["input"], clamp[net.output])
    noise = torch.Generator().manual_seed(5)
    moved = {
        node: rest.activities[node]
        + 0.01 * torch.randn(rest.activities[node].shape, generator=noise, dtype=torch.float64)
        for node in net.names[:-1]
    }
    spectrum = theory.hessian_spectrum(net, weights, rest.activities, ("input", net.output))
    return rest, moved, spectrum


def test_inference_falls_just_below_the_largest_stable_rate_and_grows_just_above():
    """From near equilibrium the excess energy of the fastest mode changes by (1 - rate largest)^2 per step:
    at 0.95 and 1.05 of the bound by 0.9^2 and 1.1^2. After 200 steps above it all others are gone, as they
    shrink, so the last step shows the factor itself.
    """
    net = LINEAR["four layers"]
    weights, clamp = random_weights(net), supervised(net)
    rest, moved, spectrum = disturbed(net, weights, clamp)
    bound = theory.largest_stable_rate(spectrum)
    assert bound == 2.0 / spectrum.largest
    excess = {}
    for part in (0.95, 1.05):
        result = infer(net, weights, clamp, Inference(200, part * bound), initial=moved)
        excess[part] = result.energy.sum(1) - rest.total
    assert (excess[0.95].diff()[:50] < 0).all() and excess[0.95][-1] < 1e-6 * excess[0.95][0]
    assert excess[1.05][-1] > 1e6 * excess[1.05][0]
    assert (excess[1.05][-1] / excess[1.05][-2]).item() == pytest.approx(1.1**2, rel=1e-2)


def test_in_errors_the_same_holds_for_descent_in_errors():
    """The errors of a tanh network near a minimum: descent by autograd in the helpers' energy."""
    net = NETWORKS["tanh at the output"]
    weights, clamp = random_weights(net), supervised(net, batch=1)
    rest = infer(net, weights, clamp, Inference(2000, 0.1))
    spectrum = theory.hessian_spectrum(net, weights, rest.activities, ("input", net.output), "errors")
    assert spectrum.smallest > 0

    def total(errors):
        nodes = [clamp["input"]]
        for i, error in enumerate(errors, start=1):
            nodes.append(predicted(net, weights, i, nodes[-1]) + error)
        return oracle_energy(net, weights, [*nodes, clamp[net.output]]).sum()

    for part, falls in ((0.95, True), (1.05, False)):
        noise = torch.Generator().manual_seed(5)
        errors = [
            rest.errors[node]
            + 1e-4 * torch.randn(rest.errors[node].shape, generator=noise, dtype=torch.float64)
            for node in net.names[:-1]
        ]
        at_start = total(errors).item()
        for _ in range(25):  # 1.1^25 = 11 times a deviation of 1e-4 is still near
            errors = [error.detach().requires_grad_() for error in errors]
            slopes = torch.autograd.grad(total(errors), errors)
            rate = part * theory.largest_stable_rate(spectrum)
            errors = [error - rate * slope for error, slope in zip(errors, slopes, strict=True)]
        assert (total(errors).item() < at_start) is falls


@pytest.mark.parametrize("name", ["four layers", "one precision", "a precision per unit"])
def test_the_suggested_rate_shrinks_the_worst_mode_most(name):
    """Of 1000 rates up to the bound none leaves less of the worst mode; and a displacement along the slowest
    and the fastest mode shrinks, at the suggested rate, to (largest - smallest) / (largest + smallest) of
    itself per step. The modes are numpy's, of the joint system.
    """
    net = LINEAR[name]
    weights, clamp = random_weights(net), supervised(net, batch=1)
    rest, _, spectrum = disturbed(net, weights, clamp)
    rate = theory.suggest_rate(spectrum)
    assert rate == pytest.approx(2 / (spectrum.largest + spectrum.smallest), rel=1e-15)
    ends = np.array([spectrum.smallest, spectrum.largest])
    rates = np.linspace(0, theory.largest_stable_rate(spectrum), 1000)[:, None]
    worst = np.abs(1 - rate * ends).max()
    assert worst <= np.abs(1 - rates * ends).max(1).min() + EPS
    assert worst == pytest.approx(
        (spectrum.largest - spectrum.smallest) / (spectrum.largest + spectrum.smallest)
    )

    vectors = np.linalg.eigh(joint_system(net, weights, clamp["input"], clamp[net.output])[0])[1]
    away = torch.from_numpy(0.01 * (vectors[:, :1] + vectors[:, -1:]).T).split(net.widths[1:-1], -1)
    moved = {node: rest.activities[node] + part for node, part in zip(net.names, away, strict=False)}
    result = relax(net, weights, clamp, Inference(20, rate), initial=moved)
    left = torch.cat([result.activities[-1][node] - rest.activities[node] for node in net.names[:-1]], -1)
    assert left.norm().item() == pytest.approx(worst**20 * torch.cat(away, -1).norm().item(), rel=1e-8)


def test_without_a_smallest_eigenvalue_above_zero_the_suggested_rate_is_the_bound():
    for smallest in (0.0, -3.0, -5.0):
        spectrum = Spectrum(4.0, smallest)
        assert theory.suggest_rate(spectrum) == theory.largest_stable_rate(spectrum) == 0.5


# --- regimes ------------------------------------------------------------------------------------------------


def measured(net: Network, weights, clamp, rate: float, num_steps: int) -> tuple[float, float]:
    """Relaxed fraction of the slowest and the fastest mode, from activities: the way covered along numpy's
    eigenvectors of the joint system over the whole way.
    """
    hidden = net.names[:-1]
    start = feedforward(net, weights, {"input": clamp["input"]})[1:-1]
    x, y = clamp["input"], clamp[net.output]
    whole = joint_solution(net, weights, x, y) - torch.cat(start, -1).numpy()
    result = infer(net, weights, clamp, Inference(num_steps, rate))
    covered = torch.cat([result.activities[node] for node in hidden], -1) - torch.cat(start, -1)
    vectors = np.linalg.eigh(joint_system(net, weights, x, y)[0])[1]
    way = (whole @ vectors)[0, [0, -1]]
    assert np.abs(way).min() > 1e-3
    slow, fast = (covered.numpy() @ vectors)[0, [0, -1]] / way
    return slow, fast


@pytest.mark.parametrize(
    ("part", "num_steps", "verdict"),
    [
        (0.001, 20, "backprop-like"),
        (0.04, 1, "backprop-like"),
        (0.1, 20, "in between"),
        (0.9, 3, "in between"),
        (0.3, 500, "equilibrium"),
        (0.9, 300, "equilibrium"),
        (1.05, 10, "unstable"),
    ],
)
def test_the_relaxed_fractions_are_those_that_inference_shows(part, num_steps, verdict):
    """`part` is of the largest stable rate. The fraction divides SOLVED by the length of the way along a
    mode, above 1e-3 here, which is asserted; an unstable mode grows by 1.1^10 only.
    """
    net = LINEAR["four layers"]
    weights, clamp = random_weights(net), supervised(net)
    rest = theory.linear_equilibrium(net, weights, clamp["input"], clamp[net.output])
    spectrum = theory.hessian_spectrum(net, weights, rest.activities, ("input", net.output))
    rate = part * theory.largest_stable_rate(spectrum)
    found = theory.regime(spectrum, rate, num_steps)
    assert found.verdict == verdict
    slow, fast = measured(net, weights, clamp, rate, num_steps)
    assert [found.slowest, found.fastest] == pytest.approx([slow, fast], abs=1e-7)


@pytest.mark.parametrize("variables", ["states", "errors"])
@pytest.mark.parametrize("num_steps", [3, 20])
def test_backprop_like_means_each_layers_gradient_is_a_known_multiple_of_backpropagations(
    num_steps, variables
):
    """At the edge of the verdict, k layers from the output binomial(T, k) rate^k times, in errors T rate
    times, to within FIRST_WAVE.

    This is what the threshold is for; were the verdict about another quantity, nothing else would notice.
    """
    net = NETWORKS["tanh at the output"]
    net = chain(net.input, net.layers[-4:])
    weights, clamp = random_weights(net), supervised(net)
    start = infer(net, weights, clamp, Inference(0)).activities
    spectrum = theory.hessian_spectrum(net, weights, start, ("input", net.output), variables)
    rate = (1 - (1 - 0.99 * theory.FIRST_WAVE) ** (1 / num_steps)) / spectrum.largest
    assert theory.regime(spectrum, rate, num_steps).verdict == "backprop-like"
    result = infer(net, weights, clamp, Inference(num_steps, rate, variables=variables))
    expected, _ = backprop.gradients(net, weights, clamp["input"], clamp[net.output])
    found = theory.alignment(weight_gradients(net, weights, result), expected)
    for away, name in enumerate(reversed(net.names)):
        assert found[name].cosine > 0.995  # an angle of 0.1
        multiple = math.comb(num_steps, away) * rate**away
        if variables == "errors" and away > 0:
            multiple = num_steps * rate
        assert found[name].norm_ratio == pytest.approx(multiple, rel=theory.FIRST_WAVE), name


def test_equilibrium_means_activities_have_less_than_a_twentieth_of_their_way_left():
    net = LINEAR["four layers"]
    weights, clamp = random_weights(net), supervised(net)
    rest = theory.linear_equilibrium(net, weights, clamp["input"], clamp[net.output])
    spectrum = theory.hessian_spectrum(net, weights, rest.activities, ("input", net.output))
    rate = theory.suggest_rate(spectrum)
    steps = next(n for n in range(1, 1000) if theory.regime(spectrum, rate, n).verdict == "equilibrium")
    result = infer(net, weights, clamp, Inference(steps, rate))
    hidden = net.names[:-1]
    start = torch.cat(feedforward(net, weights, {"input": clamp["input"]})[1:-1], -1)
    end = torch.cat([rest.activities[node] for node in hidden], -1)
    now = torch.cat([result.activities[node] for node in hidden], -1)
    assert ((now - end).norm(dim=-1) < 0.05 * (start - end).norm(dim=-1)).all()


@pytest.mark.parametrize("num_steps", [1, 2, 20, 501])
@pytest.mark.parametrize("ends", [(5.2, 0.21), (20.0, 1.0), (3.0, 3.0), (1.0, 1e-20)])
def test_the_sentence_tells_how_to_reach_the_other_regimes_and_is_right(ends, num_steps):
    """The advice is taken and leads where it says. Rates are printed with two or three digits."""
    spectrum = Spectrum(*ends)
    begins = {"backprop-like": "Backprop-like", "equilibrium": "At equilibrium", "in between": "In between"}
    for part in (1e-4, 0.02, 0.5, 0.96, 0.999, 1 - 1e-16):
        rate = part * theory.largest_stable_rate(spectrum)
        found = theory.regime(spectrum, rate, num_steps)
        assert found.sentence.startswith(begins[found.verdict] + ": ")
        percents = [float(text) / 100 for text in re.findall(r"by (-?[\d.]+)%", found.sentence)]
        assert percents == pytest.approx([found.slowest, found.fastest], abs=6e-4)
        if found.verdict != "backprop-like":
            gentle = float(re.search(r"a rate below (\S+) ", found.sentence)[1])
            assert theory.regime(spectrum, 0.94 * gentle, num_steps).verdict == "backprop-like"
            assert theory.regime(spectrum, 1.06 * gentle, num_steps).verdict != "backprop-like"
        if found.verdict != "equilibrium":
            counts = re.search(r"takes (\d+) steps of this rate, or (\d+) of", found.sentence).groups()
            for at, steps in zip((rate, theory.suggest_rate(spectrum)), map(int, counts), strict=True):
                if steps < 1e12:  # beyond, 1 - rate smallest rounds to 1
                    assert theory.regime(spectrum, at, steps).verdict == "equilibrium"
                    assert steps == 1 or theory.regime(spectrum, at, steps - 1).verdict != "equilibrium"
    for part in (1.0, 3.0):
        found = theory.regime(spectrum, part * theory.largest_stable_rate(spectrum), num_steps)
        assert found.verdict == "unstable" and f"multiplied by {1 - 2 * part:.3g}" in found.sentence
        bound = re.search(r"rate below (\S+)\.", found.sentence)[1]
        assert float(bound) == pytest.approx(2 / spectrum.largest, rel=5e-3)


def test_a_mode_that_overshoots_or_moves_away_is_neither_backprop_like_nor_at_equilibrium():
    """(1 - 1.98)^2 = 0.96 is a relaxed fraction of 0.04 that has gone to the far side and come back."""
    back = theory.regime(Spectrum(1.0, 0.5), 1.98, 2)
    assert back.fastest == pytest.approx(1 - 0.98**2) and back.verdict == "in between"
    over = theory.regime(Spectrum(1.0, 0.5), 1.9, 1)
    assert over.fastest == pytest.approx(1.9) and over.verdict == "in between"
    away = theory.regime(Spectrum(1.0, -0.1), 0.5, 100)
    assert away.slowest == pytest.approx(1 - 1.05**100) and away.verdict == "in between"
    assert "does not pull back" in away.sentence
    fast = theory.regime(Spectrum(1.0, -50.0), 0.01, 5)  # the fastest mode has relaxed by 5 %
    assert fast.fastest < 0.05 and fast.verdict == "in between"
    assert theory.regime(Spectrum(1e3, 1.0), 1e3, 10**6).verdict == "unstable"  # beyond the range of floats


# --- alignment ----------------------------------------------------------------------------------------------


def test_a_gradient_is_aligned_with_itself_and_against_its_negative():
    gradients = random_weights(NETWORKS["some biases"])
    scaled = {name: {key: -3.0 * v for key, v in tree.items()} for name, tree in gradients.items()}
    for found in theory.alignment(gradients, gradients).values():
        assert found.cosine == pytest.approx(1.0, abs=EPS) and found.norm_ratio == 1.0
    for found in theory.alignment(scaled, gradients).values():
        assert found.cosine == pytest.approx(-1.0, abs=EPS) and found.norm_ratio == pytest.approx(
            3.0, rel=EPS
        )


def test_alignment_is_numpys_over_weight_and_bias_together():
    net = NETWORKS["some biases"]
    ours, other = random_weights(net, seed=1), random_weights(net, seed=2, dtype=torch.float32)
    found = theory.alignment(ours, other)
    assert list(found) == list(net.names)
    for name in net.names:
        a, b = (
            np.concatenate([tree[name][key].double().numpy().ravel() for key in sorted(ours[name])])
            for tree in (ours, other)
        )
        assert found[name].cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=EPS)
        assert found[name].norm_ratio == pytest.approx(np.linalg.norm(a) / np.linalg.norm(b), rel=EPS)


@pytest.mark.parametrize(
    "name", ["tanh at the output", "tanh at the input", "categorical", "a precision per unit"]
)
def test_fixed_predictions_are_aligned_with_the_backprop_twin(name):
    """E4. Precisions leave the fixed point where it is: P_l e_l is backpropagation's signal whatever P_l.

    The slowest, with 0.25 beside 3, keeps (1 - 0.9 / 12)^796 * 800^4 / 24 = 2e-17 of the first layer's error.
    """
    net = NETWORKS[name]
    weights, clamp = random_weights(net), supervised(net)
    rate = 0.9 / max(
        np.max(layer.energy.precision) if isinstance(layer.energy, Gaussian) else 1 for layer in net.layers
    )
    result = infer(net, weights, clamp, Inference(800, rate, "fixed"))
    expected, _ = backprop.gradients(net, weights, clamp["input"], clamp[net.output])
    for found in theory.alignment(weight_gradients(net, weights, result), expected).values():
        assert found.cosine == pytest.approx(1.0, abs=1e-10)
        assert found.norm_ratio == pytest.approx(1.0, rel=1e-10)


def test_a_gradient_of_zero_has_no_direction():
    """As a hidden layer's before the error has reached it; 0 or 1 in its place would be read as a result."""
    net = NETWORKS["tanh at the output"]
    weights, clamp = random_weights(net), supervised(net)
    none_yet = weight_gradients(net, weights, infer(net, weights, clamp, Inference(0)))
    expected, _ = backprop.gradients(net, weights, clamp["input"], clamp[net.output])
    found = theory.alignment(none_yet, expected)
    assert math.isnan(found[net.names[0]].cosine) and found[net.names[0]].norm_ratio == 0.0
    assert found[net.output].cosine == pytest.approx(1.0, abs=EPS)
    assert theory.alignment(expected, none_yet)[net.names[0]].norm_ratio == math.inf


SUPERVISED = ("input", "dense4")

# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [("tanh at the output", "tanh"), ("categorical", "tanh"), ("a precision per unit", "silu")],
)
def test_the_closed_form_is_refused_to_networks_that_have_none(name, says):
    net = NETWORKS[name]
    clamp = supervised(net)
    with pytest.raises(ValueError, match=rf"closed form needs identity .*'dense1' is {says}"):
        theory.linear_equilibrium(net, random_weights(net), clamp["input"], clamp[net.output])
    last = chain(5, [Dense(6), Dense(4, "softmax", energy=Categorical())])
    y = torch.eye(4, dtype=torch.float64)[:3]
    with pytest.raises(ValueError, match=r"'dense2' is softmax with Categorical\(\)"):
        theory.linear_equilibrium(last, random_weights(last), clamp["input"], y)
    hidden_in_name = chain(5, [Dense(4, activate="input", energy=Categorical())])  # softmax of an identity
    with pytest.raises(ValueError, match="Categorical"):
        theory.linear_equilibrium(hidden_in_name, random_weights(hidden_in_name), clamp["input"], y)


def test_weights_and_activities_that_do_not_fit_are_refused_with_a_sentence():
    net = LINEAR["four layers"]
    weights, nodes = random_weights(net), random_nodes(net)
    x, y = nodes["input"], nodes[net.output]
    with pytest.raises(ValueError, match="weights are for layers"):
        theory.energy(net, {}, nodes)
    with pytest.raises(ValueError, match=r"activities are of .*; give them for input, dense1"):
        theory.energy(net, weights, {"input": x})
    with pytest.raises(ValueError, match=r"'dense1' must be a tensor of shape \[batch, 7\], got \(3, 2\)"):
        theory.energy(net, weights, {**nodes, "dense1": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="must be a tensor"):
        theory.hessian_spectrum(net, weights, {**nodes, "dense1": [[0.0] * 7]}, SUPERVISED)
    with pytest.raises(ValueError, match="'dense4' holds NaN"):
        theory.hessian_spectrum(net, weights, {**nodes, "dense4": y * math.nan}, SUPERVISED)
    with pytest.raises(ValueError, match="same number of samples"):
        theory.energy(net, weights, {**nodes, "dense4": y[:2]})
    with pytest.raises(ValueError, match="same number of samples"):
        theory.linear_equilibrium(net, weights, x, y[:2])
    with pytest.raises(ValueError, match=r"'input' must be a tensor of shape \[batch, 5\]"):
        theory.linear_equilibrium(net, weights, y, x)
    categorical = NETWORKS["categorical"]
    with pytest.raises(ValueError, match="must be distributions"):
        theory.energy(
            categorical,
            random_weights(categorical),
            {**random_nodes(categorical), categorical.output: torch.ones(3, 4)},
        )


def test_settings_of_the_spectrum_that_mean_nothing_are_refused():
    net = LINEAR["four layers"]
    weights, nodes = random_weights(net), random_nodes(net)
    for bad, says in (
        ({"variables": "weights"}, "variables must be one of states, errors"),
        ({"num_iterations": 0}, "num_iterations must be"),
        ({"tolerance": 0.0}, "tolerance must be"),
        ({"seed": -1}, "seed must be"),
    ):
        with pytest.raises(ValueError, match=says):
            theory.hessian_spectrum(net, weights, nodes, SUPERVISED, **bad)
    with pytest.raises(ValueError, match="no node is called 'label'"):
        theory.hessian_spectrum(net, weights, nodes, ("input", "label"))
    with pytest.raises(ValueError, match="no free node"):
        theory.hessian_spectrum(net, weights, nodes, net.nodes)
    alone = chain(5, [Dense(4, "softmax", energy=Categorical())])
    for clamped in (("input",), ()):  # the output follows its prediction, and the input meets no energy
        with pytest.raises(ValueError, match="no free node"):
            theory.hessian_spectrum(alone, random_weights(alone), random_nodes(alone), clamped)


def test_rates_and_spectra_that_mean_nothing_are_refused():
    for largest, smallest in (
        (1.0, 2.0),
        (math.nan, 0.0),
        (1.0, math.nan),
        (math.inf, 0.0),
        (0.0, -math.inf),
    ):
        with pytest.raises(ValueError, match="finite eigenvalues"):
            Spectrum(largest, smallest)
    for tool in (
        theory.largest_stable_rate,
        theory.suggest_rate,
        lambda spectrum: theory.regime(spectrum, 0.1, 5),
    ):
        with pytest.raises(ValueError, match="no rate is stable"):
            tool(Spectrum(0.0, -1.0))
    with pytest.raises(ValueError, match="rate must be"):
        theory.regime(Spectrum(2.0, 1.0), 0.0, 5)
    with pytest.raises(ValueError, match="num_steps must be"):
        theory.regime(Spectrum(2.0, 1.0), 0.1, 0)


def test_gradients_of_two_networks_are_not_compared():
    one = init(chain(5, [Dense(4)]))
    with pytest.raises(ValueError, match="not of one network"):
        theory.alignment(one, init(chain(5, [Dense(3)])))
    with pytest.raises(ValueError, match="not of one network"):
        theory.alignment(one, {})
