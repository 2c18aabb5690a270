"""Any network, any clamp, any settings: trajectories and gradients are those of plain predictive coding by
autograd.

Hypothesis draws the shapes and the switches, a seeded generator the numbers. Tolerance in fp64, with u =
1.1e-16: widths are at most 6 and there are at most 8 steps through at most 5 layers, so each number is the
end of at most 2 * 8 * 5 products of 6 terms, off by at most 80 * 6 * 2u = 1e-13 relative to the largest
number met; 1e-12 (`EPS`) leaves a factor of ten for terms that grow on the way. It is multiplied by the
largest energy or gradient where that is above 1.
"""

import pytest
import torch
from helpers import (
    HIDDEN_ACTIVATIONS,
    ORACLE_FUNCTIONS,
    PLACEMENTS,
    assert_near,
    assert_trees_near,
    fits,
    generator,
    identical,
    random_nodes,
    random_weights,
    relax,
)
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from pctt import Categorical, Dense, Gaussian, Inference, Network, Nudge, chain, infer, weight_gradients
from pctt.backends import backend
from pctt.program import Buffer, Instruction, Slot

EPS = 1e-12
KINKED = ("relu", "leaky_relu", "hard_tanh")
SMOOTH = tuple(name for name in HIDDEN_ACTIVATIONS if name not in KINKED)

seeds = st.integers(0, 2**31)


@st.composite
def networks(draw: st.DrawFn, activations: tuple[str, ...] = HIDDEN_ACTIVATIONS) -> Network:
    """1 to 5 layers; widths from a short list, so that runs of equal layers are common."""
    widths = draw(st.lists(st.sampled_from((1, 3, 4, 4, 6)), min_size=1, max_size=5))
    share = draw(st.booleans())  # all layers of one kind, else each its own
    kind = draw(_kinds(activations))
    layers = []
    for number, units in enumerate(widths, start=1):
        activation, placement, bias = kind if share else draw(_kinds(activations))
        if number == len(widths):
            activation, energy = draw(_outputs(activation, placement, units))
        else:
            energy = draw(_gaussians(units))
        layers.append(Dense(units, activation, bias, placement, energy))
    return chain(draw(st.sampled_from((1, 4, 5))), layers)


def _kinds(activations: tuple[str, ...]):
    return st.tuples(st.sampled_from(activations), st.sampled_from(PLACEMENTS), st.booleans())


def _gaussians(units: int):
    values = st.sampled_from((0.25, 0.5, 1.0, 2.0, 3.0))
    per_unit = st.lists(values, min_size=units, max_size=units).map(tuple)
    return st.one_of(st.just(Gaussian()), st.builds(Gaussian, values), st.builds(Gaussian, per_unit))


@st.composite
def _outputs(draw: st.DrawFn, activation: str, placement: str, units: int):
    if draw(st.booleans()):
        return activation, draw(_gaussians(units))
    if placement == "output":
        return "softmax", draw(st.one_of(st.just(Categorical()), _gaussians(units)))
    return activation, Categorical()


@st.composite
def inferences(draw: st.DrawFn) -> Inference:
    momentum = draw(st.sampled_from((None, 0.0, 0.5, 0.9)))
    return Inference(
        num_steps=draw(st.integers(0, 8)),
        rate=draw(st.sampled_from((0.01, 0.05, 0.1))),
        prediction=draw(st.sampled_from(("live", "fixed"))),
        dynamics="euler" if momentum is None else "momentum",
        momentum=momentum or 0.0,
    )


@st.composite
def variants(draw: st.DrawFn, nudged: bool = False) -> Inference:
    """Settings of the other ways to relax: whatever is accepted, weights standing still.

    Adam is left out: it divides a slope by its own size, so of a slope that is 0 in exact arithmetic and
    1e-17 in another order of summation it makes a step, here and not there.
    """
    nudge = None
    if nudged:
        sign, style = (
            draw(st.sampled_from(("positive", "negative", "centred"))),
            draw(st.sampled_from(("clamp", "loss"))),
        )
        nudge = Nudge(draw(st.sampled_from((0.05, 0.5))), sign, style)
    dynamics = draw(st.sampled_from(("euler", "momentum", "heun", "langevin")))
    own = {"momentum": {"momentum": 0.6}, "heun": {"step_tolerance": 1e-2}, "langevin": {"temperature": 0.1}}
    try:
        return Inference(
            num_steps=draw(st.integers(0, 6)),
            rate=draw(st.sampled_from((0.01, 0.05, 0.1))),
            prediction=draw(st.sampled_from(("live", "live", "fixed"))),
            variables=draw(st.sampled_from(("states", "errors"))),
            sweep=draw(st.sampled_from(("jacobi", "jacobi", "gauss_seidel"))),
            initial=draw(st.sampled_from(("feedforward", "feedforward", "zeros"))),
            dynamics=dynamics,
            nudge=nudge,
            **own.get(dynamics, {}),
        )
    except ValueError:  # the settings contradict each other, which test_inference_settings.py is about
        reject()


@st.composite
def clamps(draw: st.DrawFn, net: Network, seed: int, placed: bool = False):
    """(clamp, initial): any nodes held, at least one; with `placed` some others are given their starts."""
    nodes = random_nodes(net, draw(st.integers(1, 4)), seed)
    roles = draw(
        st.lists(
            st.sampled_from("ccfp" if placed else "ccf"), min_size=len(net.nodes), max_size=len(net.nodes)
        )
    )
    chosen = dict(zip(net.nodes, roles, strict=True))
    if isinstance(net.layers[-1].energy, Categorical) and chosen[net.output] == "p":
        chosen[net.output] = "f"  # refused: it follows its prediction
    assume("c" in chosen.values())
    return (
        {name: values for name, values in nodes.items() if chosen[name] == "c"},
        {name: values for name, values in nodes.items() if chosen[name] == "p"},
    )


def assert_equals_oracle(net, weights, clamp, inference, initial, grouped=True) -> None:
    expected = relax(net, weights, clamp, inference, initial)
    result = infer(net, weights, clamp, inference, initial, grouped=grouped)
    scale = max(1.0, *(values.abs().max().item() for values in expected.activities[-1].values()))
    for name in net.nodes:
        assert_near(result.activities[name], expected.activities[-1][name], EPS * scale, name)
    for name in net.names:
        assert_near(result.errors[name], expected.errors[-1][name], EPS * scale, f"error of {name}")
    energy_scale = max(1.0, expected.energies.abs().max().item())
    assert_near(result.energy, expected.energies, EPS * energy_scale, "energy")
    gradients = weight_gradients(net, weights, result, grouped=grouped)
    slopes = [values.abs().max().item() for layer in expected.gradients.values() for values in layer.values()]
    assert_trees_near(gradients, expected.gradients, EPS * scale * max(1.0, *slopes))


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), networks(), inferences(), seeds, st.booleans())
def test_any_query_relaxes_and_learns_like_the_oracle(data, net, inference, seed, grouped):
    """T steps, then the weight gradients: input free, output free, nodes clamped in the middle.

    A rule that is right only for the clamps of training would answer every other query wrongly, and
    generation and recall would merely look like a poor model.
    """
    clamp, _ = data.draw(clamps(net, seed))
    assert_equals_oracle(net, random_weights(net, seed), clamp, inference, {}, grouped)


@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(st.data(), networks(activations=SMOOTH), variants(), seeds, st.booleans())
def test_any_query_of_any_variant_relaxes_and_learns_like_the_oracle(data, net, inference, seed, grouped):
    """The same for descent in the errors, for nodes that move one after the other, second-order steps, noise
    and a start at zero: an adjoint that passes a clamped node, or a slope at an activity of another stage,
    shows only away from the clamps of training. Kinked activations are left out: what one hard_tanh
    saturates stands exactly on the kink of the next, where autograd has the other slope.
    """
    clamp, initial = data.draw(clamps(net, seed, placed=True))
    assert_equals_oracle(net, random_weights(net, seed), clamp, inference, initial, grouped)


@settings(max_examples=50, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(networks(activations=SMOOTH), variants(nudged=True), seeds, st.integers(1, 4))
def test_any_nudge_relaxes_and_learns_like_the_oracle(net, inference, seed, batch):
    """A nudged output, drawn or pushed, held or pulled, with every way to relax."""
    assume(fits(net, inference))
    nodes = random_nodes(net, batch, seed)
    clamp = {name: nodes[name] for name in ("input", net.output)}
    assert_equals_oracle(net, random_weights(net, seed), clamp, inference, {})


@settings(max_examples=100)
@given(st.data(), networks(), inferences(), seeds, st.booleans())
def test_free_nodes_may_start_anywhere(data, net, inference, seed, grouped):
    """Nodes named in `initial` start there and not at their predictions, which changes only where they begin.

    The prediction above such a node is anchored at the given activity, not at the feedforward one; confuse
    the two and recall from a noisy memory would settle beside it.
    """
    clamp, initial = data.draw(clamps(net, seed, placed=True))
    assert_equals_oracle(net, random_weights(net, seed), clamp, inference, initial, grouped)


@settings(max_examples=60)
@given(networks(), inferences(), seeds, st.integers(1, 4))
def test_training_relaxes_and_learns_like_the_oracle(net, inference, seed, batch):
    """The clamp of training, input and output, deserves examples of its own."""
    nodes = random_nodes(net, batch, seed)
    clamp = {name: nodes[name] for name in ("input", net.output)}
    assert_equals_oracle(net, random_weights(net, seed), clamp, inference, {})


@settings(max_examples=60)
@given(st.data(), networks(), inferences(), seeds)
def test_grouped_equals_ungrouped(data, net, inference, seed):
    clamp, initial = data.draw(clamps(net, seed, placed=True))
    weights = random_weights(net, seed)
    grouped = infer(net, weights, clamp, inference, initial, grouped=True)
    single = infer(net, weights, clamp, inference, initial, grouped=False)
    scale = max(1.0, *(values.abs().max().item() for values in single.activities.values()))
    for name in net.nodes:
        assert_near(grouped.activities[name], single.activities[name], EPS * scale, name)


@settings(max_examples=60)
@given(st.data(), networks(), inferences(), seeds, st.sampled_from((torch.float32, torch.float64)))
def test_clamped_nodes_come_back_bit_for_bit_and_the_caller_keeps_what_was_given(
    data, net, inference, seed, dtype
):
    """A clamped node that is rebuilt as anchor + deviation would be off in the last bit, and drift over time.

    Nothing that was passed in may be written to: weights, clamps, initial activities.
    """
    clamp, initial = data.draw(clamps(net, seed, placed=True))
    clamp = {name: values.to(dtype) for name, values in clamp.items()}
    initial = {name: values.to(dtype) for name, values in initial.items()}
    weights = random_weights(net, seed, dtype=dtype)
    given_before = {name: values.clone() for name, values in {**clamp, **initial}.items()}
    weights_before = {name: {k: v.clone() for k, v in layer.items()} for name, layer in weights.items()}
    result = infer(net, weights, clamp, inference, initial)
    weight_gradients(net, weights, result)
    for name in clamp:
        assert identical(result.activities[name], given_before[name])
        assert result.activities[name] is not clamp[name]
    for name, values in {**clamp, **initial}.items():
        assert identical(values, given_before[name])
    assert all(identical(weights[n][k], weights_before[n][k]) for n in weights for k in weights[n])


@settings(max_examples=60)
@given(st.data(), networks(activations=SMOOTH), seeds)
def test_one_small_step_never_raises_the_energy(data, net, seed):
    """F after one step of rate 1e-4 is at most F before: the step follows the negative gradient.

    To second order the change is -rate |g|^2 (1 - rate h / 2) for a curvature h along g; h is below 1e3 for
    these weights and precisions, so it is negative. Rounding of F: 1e-14 of the sum of its terms.
    """
    clamp, initial = data.draw(clamps(net, seed, placed=True))
    result = infer(net, random_weights(net, seed), clamp, Inference(1, 1e-4), initial)
    before, after = result.energy.sum(-1).tolist()
    assert after <= before + 1e-14 * result.energy.abs().sum().item()


@settings(max_examples=60)
@given(st.data(), networks(activations=SMOOTH), inferences(), seeds)
def test_single_precision_is_as_close_to_double_as_plain_torch_in_single_precision(
    data, net, inference, seed
):
    """Distance to the fp64 oracle at most twice that of the same oracle run in fp32, plus a floor of
    rounding.

    The floor covers cases where the oracle is exact by luck: T + L dependent products of at most 6 terms and
    a bias, 7 (T + L) u times the largest activity, u = 6e-8. Kinked activations are left out: a rounding that
    crosses a kink changes the derivative by 1.
    """
    clamp, initial = data.draw(clamps(net, seed, placed=True))
    weights = random_weights(net, seed, dtype=torch.float32)

    def single(tensors):
        return {name: values.float() for name, values in tensors.items()}

    def double(tensors):
        return {name: values.float().double() for name, values in tensors.items()}

    exact = relax(
        net, {n: double(layer) for n, layer in weights.items()}, double(clamp), inference, double(initial)
    ).activities[-1]
    plain = relax(net, weights, single(clamp), inference, single(initial)).activities[-1]
    found = infer(net, weights, single(clamp), inference, single(initial)).activities
    scale = max(1.0, *(values.abs().max().item() for values in exact.values()))
    floor = 7 * (inference.num_steps + len(net.layers)) * torch.finfo(torch.float32).eps / 2 * scale
    for name in net.nodes:
        allowed = 2 * (plain[name].double() - exact[name]).abs().max().item() + floor
        assert_near(found[name].double(), exact[name], allowed, name)


# --- one operation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", (*HIDDEN_ACTIVATIONS, "softmax"))
def test_an_activation_and_its_derivative_are_those_of_autograd(name, dtype):
    """f(z) and J_f(z)'v, z between -6 and 6 and away from kinks; both through the instructions that run them.

    A derivative taken at the value where it belongs at the drive is right for tanh and wrong for gelu, and
    such a network still learns. Each is a handful of operations on numbers of order 6: 20 * 6 u.
    """
    z = torch.linspace(-6, 6, 96, dtype=torch.float64).reshape(1, 12, 8)
    assert (z.abs() > 1e-3).all() and ((z.abs() - 1).abs() > 1e-3).all()
    v = torch.randn(z.shape, generator=generator(3), dtype=torch.float64)
    device = backend("reference", dtype)
    buffers = {key: device.allocate(Buffer(key, 1, 12, 8), 12) for key in ("z", "v", "value", "result")}
    slots = {key: Slot(key, 0, 1) for key in buffers}
    for key, values in (("z", z), ("v", v)):
        device.write(buffers[key], slots[key], values[0].to(dtype))
    code = [
        Instruction("activate", (slots["value"],), (slots["z"],), function=name),
        Instruction(
            "derivative", (slots["result"],), (slots["v"], slots["z"], slots["value"]), function=name
        ),
    ]
    device.bind(code, buffers, {})()

    leaf = z.to(dtype).double().requires_grad_()
    value = ORACLE_FUNCTIONS[name](leaf)
    (slope,) = torch.autograd.grad(value, leaf, v.to(dtype).double())
    bound = 20 * 6 * torch.finfo(dtype).eps / 2
    assert_near(buffers["value"].double(), value.detach(), bound, "f")
    assert_near(buffers["result"].double(), slope, bound, "J'v")
