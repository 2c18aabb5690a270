"""Several emulated chips against one, and against the equations in fp64: shares of a batch change nothing but
the order in which a gradient's terms are added.

Oracles: the training of `helpers` and `graphs` in fp64 on whole batches, which knows neither pctt nor chips;
sums worked out by hand; one chip.

Tolerance. Where products do not cut their operands all is fp32: some 2,000 roundings lie between a weight and
its gradient, and three learning steps add up three such gradients. Of weights that are near 1 that is below
3 * 2000 * 2^-24; a gradient that is wrong by a share of a chip is off by 10% of itself, some 1e-3.
"""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from helpers import LEARNINGS, NETWORKS, Tree, assert_trees_near, identical, random_weights, supervised, train
from torch import Tensor

import pctt
from pctt import SGD, AdamW, Dense, Engine, Inference, chain, graph
from pctt.backends import backend, emulated, mesh
from pctt.backends.devices import place_of
from pctt.backends.emulated import Emulated
from pctt.backends.lowering import CardBuffer
from pctt.backends.precision import POLICIES
from pctt.config import TrainingConfig
from pctt.placement.budget import SEMAPHORE_BYTES, budget
from pctt.program import Instruction, Slot

STEPS = Inference(num_steps=6, rate=0.1)
EVERY_STEP = Inference(num_steps=6, rate=0.1, weights_at="every_step")
BATCHES = (40, 70, 5)
"""Two chips have 32 and 8 of them, then 64 and 6, then 5 and none; of three chips one has none at first."""

NEAR = 3 * 2000 * 2.0**-24

NETS: dict[str, pctt.Network] = {
    "groups": NETWORKS["two groups"],
    "widths": chain(20, [*[Dense(40, "tanh", activate="input")] * 3, Dense(10)]),
    "no biases": NETWORKS["no biases"],
}
SETTINGS = {
    "live": STEPS,
    "fixed": Inference(num_steps=6, rate=0.1, prediction="fixed"),
    "every step": EVERY_STEP,
    "epc": pctt.variant("epc", STEPS),
    "momentum": Inference(num_steps=6, rate=0.05, dynamics="momentum", momentum=0.5),
}
GRAPHS = {
    name: case
    for name, case in graphs.GRAPHS.items()
    if name not in ("precisions", "learned variances", "batch normalisation")
}


def single(tree: Tree) -> Tree:
    return {name: {key: values.float() for key, values in layer.items()} for name, layer in tree.items()}


def double(tree: Tree) -> Tree:
    return {name: {key: values.double() for key, values in layer.items()} for name, layer in tree.items()}


def engine_on(device: str, net: pctt.Network, weights: Tree, inference: Inference, **options: Any) -> Engine:
    options = {"clamped": ("input", net.output), "learning": SGD(0.1), "batch_size": 64, **options}
    return Engine(net, single(weights), inference, backend="emulated", device=device, **options)


def learn(engine: Engine, batches: list[dict[str, Tensor]], rate: float) -> list[pctt.Relaxation]:
    """A learning step per batch, in one sequence."""
    found = []
    for step, batch in enumerate(batches, start=1):
        engine.set_learning(rate, step)
        at_end = engine.inference.weights_at == "end"
        values = {name: tensor.flatten(1).float() for name, tensor in batch.items()}
        found.append(engine.relax(values, learn=at_end))
    return found


@pytest.fixture
def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of whole operands."""
    monkeypatch.setattr(emulated, "cut", lambda values, bits: values)


# --- the whole batch ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncut")
@pytest.mark.parametrize("chips", [2, 3])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NETS)
def test_shares_of_a_batch_train_as_the_whole(name: str, setting: str, chips: int) -> None:
    """Shares that are unequal, or empty; a batch larger than was planned for."""
    net, rule = NETS[name], SGD(0.1, momentum=0.5)
    weights = random_weights(net)
    batches = [supervised(net, size, seed) for seed, size in enumerate(BATCHES)]
    engine = engine_on(
        f"mesh:{chips}", net, weights, SETTINGS[setting], learning=rule, precision=POLICIES["float32"]
    )
    found = learn(engine, batches, rule.rate)
    wanted = train(net, weights, batches, SETTINGS[setting], rule)
    assert_trees_near(double(engine.weights()), wanted[-1][0], NEAR)
    for outcome, (_, relaxed) in zip(found, wanted, strict=True):
        assert sum(outcome.energies) == pytest.approx(float(relaxed.energies[-1].sum()), rel=1e-3)


@pytest.mark.usefixtures("uncut")
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_train_as_the_whole(name: str) -> None:
    case, rule = GRAPHS[name], SGD(0.05)
    weights = graphs.graph_weights(case.net)
    values = [graphs.graph_values(case, size, seed) for seed, size in enumerate(BATCHES)]
    batches = [{node: batch[node] for node in case.clamped} for batch in values]
    options = {"clamped": case.clamped, "learning": rule, "precision": POLICIES["float32"]}
    engine = engine_on("mesh:2", case.net, weights, STEPS, **options)
    learn(engine, batches, rule.rate)
    truth = graphs.train(case, weights, batches, STEPS, rule)[-1][0]
    assert_trees_near(double(engine.weights()), truth, NEAR)


@pytest.mark.usefixtures("uncut")
@pytest.mark.parametrize("rule", LEARNINGS.values(), ids=LEARNINGS)
def test_gradients_are_those_of_the_whole_before_any_rule(rule: Any) -> None:
    """As `Engine.gradients` reads them: on a mesh they are summed when they are computed."""
    net = NETS["groups"]
    weights, batch = random_weights(net), supervised(net, 40)
    engines = [
        engine_on("mesh:2", net, weights, STEPS, learning=rule, precision=POLICIES["float32"]),
        Engine(net, weights, STEPS, ("input", net.output), learning=rule),
    ]
    found = []
    for engine, given in zip(engines, (single({"": batch})[""], batch), strict=True):
        engine.relax(given)
        engine.compute_gradients()
        found.append(double(engine.gradients()))
    assert_trees_near(*found, NEAR)


def test_what_is_watched_is_the_whole_batch() -> None:
    """Energies of every step, error norms, and when the energy has settled."""
    net = NETS["widths"]
    weights, batch = random_weights(net), single({"": supervised(net, 40)})[""]
    settling = Inference(num_steps=60, rate=0.1, tolerance=1e-3)
    one, two = (
        engine_on(device, net, weights, settling).relax(batch, record=True) for device in ("n150", "n150:2")
    )
    assert (one.status, one.num_steps) == (two.status, two.num_steps)
    assert one.status is pctt.Status.CONVERGED
    assert torch.allclose(torch.tensor(one.trajectory), torch.tensor(two.trajectory), rtol=1e-5)
    assert one.error_norms == pytest.approx(two.error_norms, rel=1e-5)


def test_nodes_are_read_and_written_sample_by_sample() -> None:
    """Sample i is row i, on whichever chip it lies, in every batch."""
    net = NETS["widths"]
    weights = random_weights(net)
    one, two = (engine_on(device, net, weights, STEPS) for device in ("n150", "mesh:2"))
    for size in (40, 5):
        batch = single({"": supervised(net, size)})[""]
        for engine in (one, two):
            engine.relax(batch)
        for node in net.nodes:
            assert torch.allclose(one.read_activity(node), two.read_activity(node), atol=1e-5), node
        assert torch.equal(two.read_activity("input"), batch["input"])
        assert torch.allclose(one.predict(batch["input"]), two.predict(batch["input"]), atol=1e-5)
    errors = {name: torch.randn(5, net.rule(i).units) for i, name in enumerate(net.names, start=1)}
    for engine in (one, two):
        engine.write_errors(errors)
        engine.compute_gradients()
    assert_trees_near(one.gradients(), two.gradients(), 1e-5)


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("inference", [STEPS, EVERY_STEP], ids=["at the end", "every step"])
def test_all_chips_hold_the_same_bits(inference: Inference, policy: str) -> None:
    net, rule = NETS["groups"], SGD(0.1, momentum=0.5, weight_decay=0.01)
    weights = random_weights(net)
    options = {"learning": rule, "precision": POLICIES[policy]}
    engine = engine_on("mesh:3", net, weights, inference, **options)
    learn(engine, [supervised(net, size, seed) for seed, size in enumerate(BATCHES)], rule.rate)
    compared = 0
    for name, (first, *others) in engine._persistent.items():
        if "@sums" not in name:  # of each chip's own samples, as they should be
            assert all(identical(first, other) for other in others), name
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("device", ["mesh:1", "n150:1"])
def test_a_mesh_of_one_is_one_chip_to_the_bit(device: str) -> None:
    net, rule = NETS["widths"], AdamW(1e-2)
    weights = random_weights(net)
    batches = [supervised(net, size, seed) for seed, size in enumerate(BATCHES)]
    one, other = (engine_on(where, net, weights, STEPS, learning=rule) for where in ("n150", device))
    assert learn(one, batches, rule.rate) == learn(other, batches, rule.rate)
    assert one.program == other.program
    for name, layer in one.weights().items():
        assert all(identical(values, other.weights()[name][key]) for key, values in layer.items())


@pytest.mark.parametrize(
    ("form", "parts", "total"),
    [
        ("float32", [2.0**24, 1.0, -(2.0**24)], 0.0),  # 1 is lost beside 2^24; in other orders it is not
        ("float32", [1.0, 2.0**-11, 2.0**-23], 1.0 + 2.0**-11 + 2.0**-23),  # more than TF32 or bfloat16 hold
        ("bfloat16", [256.0, 1.0, 1.0], 260.0),  # ties go away from zero: 258, then 260
    ],
)
def test_the_sum_goes_from_chip_to_chip(form: str, parts: list[float], total: float) -> None:
    card = Emulated(torch.float32, "mesh:3")
    buffer = CardBuffer("weight_gradient@layers1", 2, 32, 32, form)
    card._buffers = {buffer.name: buffer}
    handle = card.allocate(buffer, 1)
    for own, value in zip(handle, parts, strict=True):
        own.fill_(value)
    slot = Slot(buffer.name, 1, 2)
    card.bind(
        [Instruction("all_reduce", (slot,), (slot,), options=(("chips", 3),))], {buffer.name: handle}, {}
    )()
    for own, value in zip(handle, parts, strict=True):
        assert (own[0] == value).all(), "an entry that was not to be summed"
        assert (own[1] == total).all(), own[1, 0, 0]


# --- the program --------------------------------------------------------------------------------------------


def entries(slot: Slot) -> set[tuple[str, int]]:
    return {(slot.buffer, at) for at in range(slot.start, slot.stop)}


def test_every_gradient_is_summed_once_and_before_it_is_used() -> None:
    net = NETS["groups"]
    for inference in (STEPS, EVERY_STEP):
        one, two = (
            engine_on(device, net, random_weights(net), inference).program for device in ("n150", "mesh:2")
        )
        assert not any(i.op == "all_reduce" for i in one.training_step())
        sections = two.steps if inference is EVERY_STEP else (two.gradients,)
        for code in sections:
            summed = [slot for i in code if i.op == "all_reduce" for slot in i.out]
            gradients = {name: b.count for name, b in two.buffers.items() if "_gradient@" in name}
            every = sorted((name, at) for name, count in gradients.items() for at in range(count))
            assert sorted(entry for slot in summed for entry in entries(slot)) == every
            own: set[tuple[str, int]] = set()  # entries that are of a chip's own samples
            for i in code:
                read = {entry for slot in i.inputs for entry in entries(slot)}
                written = {entry for slot in i.out for entry in entries(slot)} & set(every)
                if i.op == "all_reduce":
                    assert written <= own, i
                    own -= written
                else:
                    assert not (read - written) & own, i
                    own |= written if not read & set(every) or read & own else set()
            assert not own
        plain = [i for i in two.training_step() if i.op != "all_reduce"]
        assert len(plain) == len(one.training_step())


def test_the_budget_has_room_for_the_exchange() -> None:
    net = NETS["widths"]
    one, two = (engine_on(device, net, random_weights(net), STEPS) for device in ("n150", "mesh:2"))
    found = [budget(e.program, e.backend.chip, e.backend.grid, 32) for e in (one, two)]
    assert found[1].tensors == found[0].tensors
    exchanges = 3 * 2  # weights and biases of the layers 20-40, of the two 40-40 together, of 40-10
    assert found[1].reserved == found[0].reserved + SEMAPHORE_BYTES * exchanges


# --- planted faults -----------------------------------------------------------------------------------------


def distance_to_the_whole() -> float:
    """How far two chips are from the truth after a step on 40 samples, 32 and 8 of them."""
    net = NETS["widths"]
    weights, batch = random_weights(net), supervised(net, 40)
    engine = engine_on("mesh:2", net, weights, STEPS, precision=POLICIES["float32"])
    learn(engine, [batch], 0.1)
    truth = train(net, weights, [batch], STEPS, SGD(0.1))[-1][0]
    return max(
        float((values.double() - truth[name][key]).abs().max())
        for name, layer in engine.weights().items()
        for key, values in layer.items()
    )


@pytest.mark.usefixtures("uncut")
def test_faults_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distance_to_the_whole() <= NEAR
    with monkeypatch.context() as planted:  # each chip learns from its own samples
        planted.setattr("pctt.backends.placed.with_sums_over_chips", lambda program, num_chips: program)
        assert distance_to_the_whole() > 10 * NEAR

    def mean_of_means(self: Emulated, i: Instruction, on_chips: list[dict[str, Tensor]]) -> None:
        (slot,) = i.out
        parts = [own[slot.buffer][slot.start : slot.stop] for own in on_chips]
        means = [part * (self.batch_size / self.samples_on(chip)) for chip, part in enumerate(parts)]
        for part in parts:
            part.copy_(sum(means) / len(means))

    with monkeypatch.context() as planted:  # the 8 samples weigh as much as the 32
        planted.setattr(Emulated, "_sum_over_chips", mean_of_means)
        assert distance_to_the_whole() > 10 * NEAR


# --- where it is chosen -------------------------------------------------------------------------------------


def test_a_trainer_runs_and_goes_on_on_a_mesh(tmp_path: Any) -> None:
    """A checkpoint knows nothing of chips; on as many it goes on to the bit."""
    inputs, labels = torch.randn(100, 20), torch.arange(100) % 10

    def trainer(device: str) -> pctt.Trainer:
        return pctt.Trainer(
            NETS["widths"], STEPS, AdamW(1e-2), batch_size=40, backend="emulated", device=device
        )

    whole = trainer("mesh:2")
    whole.fit((inputs, labels), 2)
    assert whole.place()["device"] == "2 chips, each n150 with 8x8 cores"
    first = trainer("mesh:2")
    first.fit((inputs, labels), 1)
    first.save(tmp_path)
    second = pctt.load(tmp_path, backend="emulated", device="mesh:2")
    second.fit((inputs, labels), 2)
    for name, layer in whole.weights.items():
        assert all(identical(values, second.weights[name][key]) for key, values in layer.items())
    alone = pctt.load(tmp_path, backend="emulated", device="n150")
    assert alone.evaluate((inputs, labels)) == pytest.approx(first.evaluate((inputs, labels)), abs=0.02)


def test_devices_are_named_the_same_way_everywhere() -> None:
    assert mesh.parse_device("mesh:2") == (None, 2)
    assert mesh.parse_device("p150:8") == ("p150", 8)
    assert place_of("mesh:8") == (0, 8) and place_of(3) == (3, 1) and place_of(None) == (0, 1)
    for device in ("mesh:2", "n300:2"):
        assert TrainingConfig(backend="emulated", device=device).device == device
        assert backend("emulated", torch.float32, device).num_chips == 2  # type: ignore[attr-defined]
    TrainingConfig(backend="tenstorrent", device="mesh:2")


@pytest.mark.parametrize("device", ["mesh", "mesh:", "mesh:0", "mesh:two", "mesh:-1", "n999:2", "2:2"])
@pytest.mark.parametrize("name", ["emulated", "tenstorrent"])
def test_what_is_no_device_is_refused(name: str, device: str) -> None:
    with pytest.raises(ValueError, match="device") as said:
        TrainingConfig(backend=name, device=device)
    assert device.partition(":")[0] in str(said.value)


def test_what_a_mesh_does_not_do_is_refused() -> None:
    net = chain(20, [Dense(10)])
    with pytest.raises(ValueError, match="fused=True runs on one chip"):
        engine_on("mesh:2", net, random_weights(net), STEPS, fused=True)
    with pytest.raises(ValueError, match="fused runs on one chip"):
        TrainingConfig(backend="emulated", device="mesh:2", fused=True)
    tied = graph({"x": 6}, {"y": (pctt.Block([pctt.Linear(6), pctt.NormaliseBatch(), pctt.Linear(3)]), "x")})
    with pytest.raises(ValueError, match="NormaliseBatch ties the samples"):
        engine_on("mesh:2", tied, graphs.graph_weights(tied), STEPS, clamped=("x", "y"))
    engine_on("n150", tied, graphs.graph_weights(tied), STEPS, clamped=("x", "y"))
