"""What every variant keeps, whatever it does: one table, through the same contracts.

The table holds every name of `pctt.variants.VARIANTS` on one network, and networks that have what that one
does not. A new variant is tested here by its name alone; how it moves is for test_variants.py.
"""

from dataclasses import replace

import pytest
import torch
from helpers import (
    FULL,
    Tree,
    assert_near,
    assert_trees_near,
    feedforward,
    identical,
    random_nodes,
    random_weights,
    supervised,
    train,
)

import pctt
from pctt import SGD, Adam, Dense, Engine, Gaussian, Inference, Network, Status, Trainer, chain, mupc, variant
from pctt.variants import VARIANTS

EPS = 1e-12
MLP = chain(5, [*[Dense(6, "tanh")] * 3, Dense(4)])
RESIDUAL = mupc(
    chain(
        5,
        [
            Dense(6, activate="input"),
            *[Dense(6, "tanh", activate="input", skip=True)] * 2,
            Dense(4, "tanh", activate="input"),
        ],
    )
)
LEARNED = chain(
    5,
    [
        Dense(6, "tanh", energy=Gaussian(2.0, "diagonal", 0.05)),
        Dense(6, "tanh", energy=Gaussian(1.0, "scalar", 0.05)),
        Dense(4),
    ],
)
FULLY = chain(5, [Dense(4, "tanh", energy=Gaussian(FULL)), Dense(4, "tanh", energy=Gaussian(FULL)), Dense(4)])

CASES: dict[str, tuple[Network, Inference]] = {
    **{name: (MLP, variant(name, Inference(8, 0.05))) for name in VARIANTS},
    "zeros": (MLP, Inference(8, 0.05, initial="zeros")),
    "carried": (MLP, Inference(8, 0.05, initial="carried")),
    "residual": (RESIDUAL, Inference(8, 0.05)),
    "residual, errors": (RESIDUAL, variant("epc", Inference(8, 0.05))),
    "residual, every step": (RESIDUAL, variant("ipc", Inference(8, 0.05))),
    "learned variance": (LEARNED, Inference(8, 0.05)),
    "learned variance, errors": (LEARNED, variant("epc", Inference(8, 0.05))),
    "learned variance, every step": (LEARNED, variant("ipc", Inference(8, 0.05))),
    "full precision": (FULLY, Inference(8, 0.05)),
    "full precision, errors": (FULLY, variant("epc", Inference(8, 0.05))),
}


def weights_for(net: Network, dtype: torch.dtype = torch.float64) -> Tree:
    """Of standard deviation 1 where the layers have scales, as muPC wants them."""
    weights = random_weights(net, dtype=dtype)
    if any(layer.scale != 1.0 for layer in net.layers):
        for layer in weights.values():
            layer["weight"] *= len(layer["weight"]) ** 0.5
    return weights


def learnt(net: Network, inference: Inference, batches, grouped: bool = True, rule=None) -> Engine:
    """The engine after a learning step on every batch."""
    rule = rule or SGD(0.05, momentum=0.5)
    engine = Engine(net, weights_for(net), inference, ("input", net.output), learning=rule, grouped=grouped)
    for step, batch in enumerate(batches, start=1):
        engine.set_learning(rule.rate, step)
        assert engine.relax(batch, seed=step).status.ok
        engine.learn(rule.rate, step)
    return engine


# --- energy -------------------------------------------------------------------------------------------------


def test_the_variants_that_do_not_descend_the_energy_are_the_known_ones():
    """Fixed predictions, waves, noise, and an output that another energy pulls; nothing else is excused."""
    excused = {name for name, (_, inference) in CASES.items() if not inference.descends}
    assert excused == {"fixed", "exact", "zil", "langevin", "ep"}


@pytest.mark.parametrize("name", [name for name, (_, knobs) in CASES.items() if knobs.descends])
def test_the_energy_falls_at_every_step_of_a_small_rate(name):
    """E6 for all variants: at rate 1e-3, far below 2 over the largest curvature (times the boost of 10) and
    below what Adam, whose steps are of the size of the rate, overshoots by in 20 steps from afar.

    A sign, or a move that one of the two energies beside a node does not know of, would raise it. Rounding
    may raise it by 1e-14 of itself.
    """
    net, inference = CASES[name]
    inference = replace(inference, num_steps=20, rate=1e-3)
    clamp = supervised(net)
    engine = Engine(net, weights_for(net), inference, ("input", net.output), learning=SGD(1e-3))
    engine.set_learning(1e-3, 1)
    energy = torch.tensor(engine.relax(clamp, record=True).trajectory, dtype=torch.float64).sum(-1)
    assert len(energy) == 21
    assert (energy.diff() <= 1e-14 * energy.abs().max()).all()
    assert energy[-1] < energy[0] - 1e-6 * energy[0].abs()


# --- clamped nodes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_clamped_nodes_keep_their_data_bit_for_bit_through_relaxation_and_learning(name):
    """Read from the engine's own buffers, after learning steps on other data; the caller's tensors, too, are
    as they were. A nudged output is not clamped to its target but, in style "clamp", held between.
    """
    net, inference = CASES[name]
    batch, other = supervised(net, 4, seed=1), supervised(net, 4, seed=2)
    kept = {key: values.clone() for key, values in batch.items()}
    engine = learnt(net, inference, [other])
    weights = engine.weights()
    engine.set_learning(0.05, 2)
    engine.relax(batch)
    assert all(identical(batch[key], kept[key]) for key in batch)
    assert identical(engine.read_activity("input"), kept["input"])
    if inference.nudge is None:
        assert identical(engine.read_activity(net.output), kept[net.output])
    elif inference.nudge.style == "clamp":
        b = inference.nudge.beta * (-1.0 if inference.nudge.sign == "negative" else 1.0)
        ahead = feedforward(net, weights, {"input": batch["input"]})[-1]
        held = ahead + b * (batch[net.output] - ahead)
        assert_near(engine.read_activity(net.output), held, EPS)


# --- the batch ----------------------------------------------------------------------------------------------

ORDER = torch.tensor([2, 0, 3, 1, 1, 3, 0, 2])


@pytest.mark.parametrize("name", [name for name in CASES if name != "langevin"])
def test_repeating_and_permuting_the_batch_changes_no_sample_and_no_weight(name):
    """E16: activities follow their samples, and weights after two learning steps are the same.

    Noise is the documented exception: every row of a batch has draws of its own, so two copies of a sample
    go apart, which the test below asks for.
    """
    net, inference = CASES[name]
    batches = [supervised(net, 4, seed) for seed in (1, 2)]
    shuffled = [{key: values[ORDER] for key, values in batch.items()} for batch in batches]
    one, many = learnt(net, inference, batches), learnt(net, inference, shuffled)
    for node in net.nodes:
        assert_near(many.read_activity(node), one.read_activity(node)[ORDER], 10 * EPS, node)
    assert_trees_near(many.weights(), one.weights(), 10 * EPS)


def test_copies_of_a_sample_have_noise_of_their_own():
    """The mean over copies is an average over the posterior only if they are independent: over 5,000 copies
    of one sample the noise of two neighbouring rows has a correlation below 3 / sqrt(2500).
    """
    net, inference = CASES["langevin"]
    sample = supervised(net, 1)
    batch = {key: values.expand(5000, -1) for key, values in sample.items()}
    engine = Engine(net, weights_for(net), replace(inference, num_steps=3), ("input", net.output))
    engine.relax(batch, seed=1)
    x = engine.read_activity("dense2")
    x = (x - x.mean(0)) / x.std(0)
    assert (x[::2] * x[1::2]).mean(0).abs().max() <= 3.5 / 2500**0.5  # the largest of six
    again = (x[::2] * x[::2]).mean(0)
    assert (again > 0.9).all()


# --- grouping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_grouped_and_ungrouped_learn_the_same(name):
    """Three learning steps: stacking equal layers decides how many calls there are, not what they compute."""
    net, inference = CASES[name]
    batches = [supervised(net, 4, seed) for seed in (1, 2, 3)]
    one, other = (learnt(net, inference, batches, grouped) for grouped in (True, False))
    for node in net.nodes:
        assert_near(other.read_activity(node), one.read_activity(node), 10 * EPS, node)
    assert_trees_near(other.weights(), one.weights(), 10 * EPS)


# --- checkpoints --------------------------------------------------------------------------------------------


def data(net: Network) -> tuple[torch.Tensor, torch.Tensor]:
    nodes = random_nodes(net, 20, seed=9)
    return nodes["input"], nodes[net.output]


def stopped(trainer: Trainer, net: Network, after: int, folder) -> None:
    """A fit of two epochs that ends after so many batches and saves."""

    def watch(kind, fields):
        if kind == "batch" and fields["step"] == after:
            trainer.stop()

    result = trainer.fit(data(net), 2, callbacks=[watch], save_to=folder)
    assert result.status is Status.STOPPED and result.steps == after


@pytest.mark.parametrize("name", [name for name in CASES if name != "carried"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, name):
    """Batches of 8, 8 and 4: a stop in the middle of the first epoch and in the second. Settings, network,
    weights with their variances and the state of the rule come back; noise, nudge and counters go on.
    """
    net, inference = CASES[name]
    inference = (
        replace(inference, nudge=replace(inference.nudge, final_beta=0.8)) if inference.nudge else inference
    )

    def trainer() -> Trainer:
        return Trainer(net, inference, Adam(1e-2), weights=weights_for(net), batch_size=8, seed=3)

    whole = trainer()
    assert whole.fit(data(net), 2).status.ok
    for after in (2, 4):
        stopped(trainer(), net, after, tmp_path)
        resumed = pctt.load(tmp_path)
        assert resumed.net == net and resumed.inference == inference
        assert resumed.fit(data(net), 2).status.ok
        for key, layer in whole.weights.items():
            assert all(identical(resumed.weights[key][k], values) for k, values in layer.items()), key
        state = resumed.engine.learning_state()
        for key, layer in whole.engine.learning_state().items():
            assert all(identical(state[key][k], values) for k, values in layer.items()), key


def test_a_trainer_that_shuffles_carries_nothing_on():
    net, inference = CASES["carried"]
    with pytest.raises(ValueError, match=r"initial='carried' goes on from .* use an Engine for streams"):
        Trainer(net, inference, Adam(1e-2))


@pytest.mark.parametrize("name", CASES)
def test_what_is_evaluated_is_the_feedforward_pass_of_the_weights(name):
    """However activities start and move in training, a question is answered by one sweep through the weights.

    An engine that evaluated from its training start would report chance, or yesterday's batch.
    """
    net, inference = CASES[name]
    engine = learnt(net, inference, [supervised(net, 4)])
    inputs = random_nodes(net, 7, seed=5)["input"]
    expected = feedforward(net, engine.weights(), {"input": inputs})[-1]
    assert_near(engine.predict(inputs), expected, EPS)


# --- the emulated card --------------------------------------------------------------------------------------

REFUSED = {
    "nudge+": "nudge",
    "nudge-": "nudge",
    "nudge+-": "nudge",
    "ep": "nudge",
    "adam": "dynamics='adam'",
    "heun": "dynamics='heun'",
    "langevin": "dynamics='langevin'",
    "residual": "scale",
    "residual, errors": "scale",
    "residual, every step": "scale",
    "learned variance": "learned variance",
    "learned variance, errors": "learned variance",
    "learned variance, every step": "learned variance",
    "full precision": "full precision",
    "full precision, errors": "full precision",
}
"""What the card does not run, and the word its refusal has for it."""

LAYERS = 4
NEAR = 4 * LAYERS * 2.0**-9
"""3.1 %: as in test_emulated.py, a gradient is made by at most 2 L products of two operands that are rounded
to bfloat16, by 2^-9 each, if all roundings conspire. Three steps of SGD add three gradients, each of that
relative error; what an error of the weights does to later gradients is smaller by the learning rate."""


def wide(name: str) -> tuple[Network, Inference]:
    """The case on widths that fill no tile and more than one."""
    net, inference = CASES[name]
    if net == MLP:
        net = chain(20, [*[Dense(40, "tanh")] * (LAYERS - 1), Dense(10)])
    return net, replace(inference, rate=inference.rate if inference.rate == 1.0 else 0.1)


def single(tree: Tree) -> Tree:
    return {name: {key: values.float() for key, values in layer.items()} for name, layer in tree.items()}


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED and name != "carried"])
def test_the_emulated_card_learns_as_fp64_does(name):
    """The change of the weights over three learning steps in the default precision, against the oracle, per
    layer and relative to the change itself, so that a layer that hardly moves is judged as strictly. (Where a
    carried run begins, the oracle does not know.)
    """
    net, inference = wide(name)
    rule, weights = SGD(0.02), single(weights_for(net))
    batches = [
        {key: values.float() for key, values in supervised(net, 29, seed).items()} for seed in (1, 2, 3)
    ]
    engine = Engine(net, weights, inference, ("input", net.output), learning=rule, backend="emulated")
    for step, batch in enumerate(batches, start=1):
        engine.set_learning(rule.rate, step)
        engine.relax(batch)
        engine.learn(rule.rate, step)
    start = {n: {k: v.double() for k, v in layer.items()} for n, layer in weights.items()}
    doubled = [{key: values.double() for key, values in batch.items()} for batch in batches]
    expected = train(net, start, doubled, inference, rule)[-1][0]
    found = engine.weights()
    for layer, tree in expected.items():
        for key, values in tree.items():
            moved = values - start[layer][key]
            off = ((found[layer][key].double() - values).norm() / moved.norm()).item()
            assert off <= NEAR, f"{layer}/{key}: {off:.2%}, allowed {NEAR:.2%}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_card_does_not_run_it_refuses_by_name(name):
    """A variant that ran as another one would train, report and publish the wrong algorithm."""
    net, inference = wide(name)
    weights = single(weights_for(net))
    with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
        Engine(net, weights, inference, ("input", net.output), learning=SGD(0.02), backend="emulated")
    assert "backend='reference'" in str(refusal.value)
