"""Graphs on the emulated card: near fp64 for every map and wiring, padding that is always empty, refusals.

Oracles: the reference backend in fp64, which `test_graphs` holds against autograd, sums of parts against
wholes, and the sizes of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from graphs import GRAPHS, accepts, as_graph, graph_values, graph_weights
from helpers import Tree, generator
from torch import Tensor

import pctt
from pctt import (
    SGD,
    AdamW,
    Add,
    Affine,
    Block,
    Categorical,
    Conv2d,
    Dense,
    Engine,
    Gaussian,
    Inference,
    Linear,
    MaxPool2d,
    Multiply,
    Network,
    Nudge,
    Shift,
    Step,
    chain,
    graph,
    variant,
)
from pctt.backends import emulated
from pctt.backends.emulated import Emulated
from pctt.backends.graph_lowering import MAPS as CARD_MAPS
from pctt.backends.graph_lowering import MOVES, lower_graph
from pctt.backends.lowering import CardBuffer
from pctt.backends.precision import POLICIES, PrecisionPolicy
from pctt.backends.tenstorrent import Tenstorrent
from pctt.groups import layout
from pctt.layers.maps import MAPS, Fill, Permute
from pctt.placement.budget import budget, card_buffer
from pctt.program import BATCH

STEPS = Inference(num_steps=8, rate=0.1)
BATCH_SIZE = 5

UNROUNDED = 2.0**-24 * 2000
"""Relative: some 2,000 roundings to fp32 lie between a weight and its gradient after 8 steps."""

SETTINGS = {
    "live": STEPS,
    "fixed": Inference(num_steps=8, rate=0.1, prediction="fixed"),
    "exact": variant("exact", STEPS),
    "epc": variant("epc", STEPS),
    "gauss-seidel": Inference(num_steps=6, rate=0.1, sweep="gauss_seidel"),
    "zeros": Inference(num_steps=8, rate=0.1, initial="zeros"),
    "momentum": Inference(num_steps=8, rate=0.05, dynamics="momentum", momentum=0.5),
}

WIDE = graph(  # widths that fill no tile, more than one tile, a leaf beside the output
    {"x": 20},
    {
        "a": (Dense(40, "sigmoid"), "x"),
        "b": (Block([Linear(70), Shift(0.5), "gelu", Linear(40, bias=False), Step(Add(), (0, -1))]), "a"),
        "c": (Block([Step(Linear(40), (0,)), "sigmoid", Step(Multiply(), (1, -1))], Gaussian(2.0)), "a", "b"),
        "side": (Dense(33, "silu", energy=Gaussian(tuple(0.5 + n / 33 for n in range(33)))), "b", "c"),
        "y": (Dense(10, "gelu", activate="input"), "c", "x"),
    },
)

CARD_GRAPHS: dict[str, Network] = {
    **{
        name: case.net
        for name, case in GRAPHS.items()
        if name not in ("precisions", "learned variances")  # which the cards do not run
    },
    "wide": WIDE,
    "a state that starts full": graph(
        {"x": (2, 3)},
        {
            "h": (
                Block(
                    [
                        Step(Fill((3, 2), 0.5), (0,)),
                        Step(Permute((1, 0)), (0,)),
                        Step(Add((1, -1)), (1, 2)),
                        Affine(),
                        "tanh",
                    ]
                ),
                "x",
            ),
            "y": (Dense(3), "h"),
        },
    ),
}


def single(tree: Tree) -> Tree:
    return {name: {key: values.float() for key, values in layer.items()} for name, layer in tree.items()}


def clamped(net: Network) -> tuple[str, ...]:
    case = next((case for case in GRAPHS.values() if case.net is net), None)
    return case.clamped if case is not None else (*net.nodes[: net.num_roots], net.output)


def given_for(net: Network, batch: int = BATCH_SIZE, seed: int = 1) -> dict[str, Tensor]:
    """The clamp of training, [batch, units], fp64."""
    case = next((case for case in GRAPHS.values() if case.net is net), None)
    if case is not None:
        values = graph_values(case, batch, seed)
        return {name: values[name].flatten(1) for name in clamped(net)}
    source = generator(seed)
    return {
        name: torch.randn(batch, net.widths[net.node_index(name)], generator=source, dtype=torch.float64)
        for name in clamped(net)
    }


def engine_for(net: Network, weights: Tree, inference: Inference = STEPS, **options: Any) -> Engine:
    options.setdefault("backend", "emulated")
    weights = single(weights) if options["backend"] == "emulated" else weights
    options.setdefault("learning", SGD(0.1))
    return Engine(net, weights, inference, clamped(net), **options)


def floats(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in values.items()}


def flat(tree: Tree) -> dict[str, Tensor]:
    return {f"{name}/{key}": values for name, layer in tree.items() for key, values in layer.items()}


def layers(tree: Tree) -> dict[str, Tensor]:
    """All gradients of a layer as one vector."""
    return {
        name: torch.cat([values.double().flatten() for values in layer.values()])
        for name, layer in tree.items()
        if layer
    }


def bound(net: Network) -> float:
    """Relative. A gradient is made by at most two operations per map, up and down, each of two operands
    rounded to bfloat16 by 2^-9 of each, if all roundings conspire. A sign, a transpose, a factor or a term
    that is wrong changes a gradient by as much as its own size.
    """
    return 4 * sum(len(net.rule(index).maps) for index in net.indices) * 2.0**-9  # type: ignore[union-attr]


# --- against fp64 -------------------------------------------------------------------------------------------


def assert_near_fp64(net: Network, inference: Inference, **options: Any) -> None:
    weights, given = graph_weights(net), given_for(net)
    exact, card = (
        engine_for(net, weights, inference, backend="reference"),
        engine_for(net, weights, inference, **options),
    )
    wanted, outcome = exact.relax(given, record=True), card.relax(floats(given), record=True)
    for engine in (exact, card):
        engine.compute_gradients()
    allowed, truth = bound(net), layers(exact.gradients())
    for name, gradient in layers(card.gradients()).items():
        distance = (gradient - truth[name]).norm() / truth[name].norm().clamp_min(1e-9)
        assert distance <= allowed, f"{name}: {distance:.2%}, allowed {allowed:.2%}"
    found, energies = torch.tensor(outcome.trajectory), torch.tensor(wanted.trajectory)
    # A square doubles the relative error of an error.
    assert (found - energies).abs().max() <= 2 * allowed * energies.abs().sum(-1).max(), "energies"
    for name in net.nodes:
        activity = exact.read_activity(name)
        distance = (card.read_activity(name) - activity).norm()
        assert distance <= allowed * activity.norm().clamp_min(1.0), f"activity of {name}"


@pytest.mark.parametrize("name", CARD_GRAPHS)
def test_every_graph_is_near_fp64(name: str) -> None:
    assert_near_fp64(CARD_GRAPHS[name], STEPS)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "live"])
@pytest.mark.parametrize("name", ["diamond", "gates", "images", "tokens", "a cycle", "wide"])
def test_every_setting_is_near_fp64(name: str, setting: str) -> None:
    if name in GRAPHS and not accepts(GRAPHS[name], SETTINGS[setting]):
        pytest.skip("a cycle has no activities that follow from its errors")
    assert_near_fp64(CARD_GRAPHS[name], SETTINGS[setting])


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_its_roundings_the_emulation_is_the_reference(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in fp32, products of uncut operands: then only the order of fp32 sums differs. So the lowering
    leaves nothing out, adds nothing twice and reads nothing too late; 2^-9 would hide a small term.
    """
    monkeypatch.setattr(emulated, "cut", lambda values, bits: values)
    for name, net in CARD_GRAPHS.items():
        if name in GRAPHS and not accepts(GRAPHS[name], SETTINGS[setting]):
            continue
        weights, given = graph_weights(net), given_for(net)
        exact = engine_for(net, weights, SETTINGS[setting], backend="reference")
        card = engine_for(net, weights, SETTINGS[setting], precision=POLICIES["float32"])
        exact.relax(given)
        card.relax(floats(given))
        for engine in (exact, card):
            engine.compute_gradients()
        truth = layers(exact.gradients())
        for layer, gradient in layers(card.gradients()).items():
            distance = (gradient - truth[layer]).norm() / truth[layer].norm().clamp_min(1e-9)
            assert distance <= UNROUNDED, f"{name}, {layer}: {distance:.1e}"


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs(policy: str) -> None:
    """Near fp64 where states, anchors and masters are fp32; the others lose what docs/numerics.md says."""
    if policy in ("mixed", "float32"):
        assert_near_fp64(WIDE, STEPS, precision=POLICIES[policy])
    else:
        engine = engine_for(WIDE, graph_weights(WIDE), precision=POLICIES[policy], learning=AdamW(0.1))
        assert engine.relax(floats(given_for(WIDE))).status.ok
        engine.learn(0.1, 1)


def test_every_map_stands_in_a_graph() -> None:
    kinds = {map_.kind for net in CARD_GRAPHS.values() for rule in net.rules for map_ in rule.maps}  # type: ignore[union-attr]
    assert kinds == set(MAPS)


def test_every_card_operation_of_maps_is_run() -> None:
    """Else one of them could be wrong unnoticed."""
    ops = set[str]()
    for net in CARD_GRAPHS.values():
        engine = engine_for(net, graph_weights(net))
        ops |= {i.op for i in engine.program.training_step()}
    assert ops >= {*CARD_MAPS, *MOVES}


def test_a_chain_wired_as_a_graph_computes_the_same() -> None:
    net = chain(20, [Dense(40, "tanh"), Dense(40, "gelu", activate="input"), Dense(10)])
    weights = graph_weights(as_graph(net))
    results: list[dict[str, Tensor]] = []
    for wired in (net, as_graph(net)):
        engine = Engine(wired, single(weights), STEPS, ("input", net.output), backend="emulated")
        given = {n: values.float() for n, values in given_for_chain(net).items()}
        engine.relax(given)
        engine.compute_gradients()
        results.append(flat(engine.gradients()))
    for name, values in results[0].items():
        distance = (results[1][name] - values).norm() / values.norm()
        assert distance <= bound(as_graph(net)), f"{name}: {distance:.2%}"


def given_for_chain(net: Network) -> dict[str, Tensor]:
    source = generator(1)
    ends = {"input": net.widths[0], net.output: net.widths[-1]}
    return {name: torch.randn(BATCH_SIZE, units, generator=source) for name, units in ends.items()}


# --- padding ------------------------------------------------------------------------------------------------


def leaks(engine: Engine, batch: int) -> list[str]:
    """Tensors of the program with something other than 0 beside their samples and units."""
    assert engine._batch is not None
    found: list[str] = []
    for name, (values,) in engine._batch.buffers.items():
        buffer = card_buffer(engine.program, name)
        if buffer.content == "ones" or buffer.scalar is not None or " " in buffer.role:
            continue  # what lies between two operations need not be empty: a sum before its mask, a slope
        rows, columns = (
            batch * buffer.positions if size == BATCH else size for size in (buffer.rows, buffer.columns)
        )
        rest = values.clone()
        rest[:, :rows, :columns] = 0.0
        if rest.any():
            found.append(name)
    return found


@pytest.mark.parametrize("name", CARD_GRAPHS)
def test_padding_is_always_empty(name: str) -> None:
    """After two batches of a learning rule with state, the second one smaller."""
    net = CARD_GRAPHS[name]
    engine = engine_for(net, graph_weights(net), learning=AdamW(0.1))
    for step, batch in enumerate((32, 7), start=1):
        engine.relax(floats(given_for(net, batch)))
        engine.learn(0.1, step)
        assert not leaks(engine, batch)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_batch_is_the_sum_of_its_parts(setting: str) -> None:
    """32 samples at once fill the tiles; 29 and 3 leave rows of padding. Per sample they must be the same bit
    for bit, and gradients must add up, to the rounding of fp32 sums over at most 64 terms.
    """
    weights, whole = graph_weights(WIDE), floats(given_for(WIDE, 32))
    engine = engine_for(WIDE, weights, SETTINGS[setting])

    def total(start: int, stop: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        engine.relax({name: values[start:stop] for name, values in whole.items()})
        engine.compute_gradients()
        gradients = {name: v.double() * (stop - start) for name, v in flat(engine.gradients()).items()}
        return gradients, [engine.read_node("error", name) for name in WIDE.names]

    gradients, errors = total(0, 32)
    first, rest = total(0, 29), total(29, 32)
    for own, other, last in zip(errors, first[1], rest[1], strict=True):
        assert torch.equal(own, torch.cat([other, last]))
    for name, gradient in gradients.items():
        parts = first[0][name] + rest[0][name]
        sizes = first[0][name].abs().max() + rest[0][name].abs().max() + gradient.abs().max()
        assert (gradient - parts).abs().max() <= 64 * 2.0**-24 * sizes, name


def test_padding_that_counts_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the tests above: masks that let everything through."""
    honest = Emulated.begin

    def begin(self: Emulated, buffers: Mapping[str, Any], batch_size: int) -> None:
        honest(self, buffers, batch_size)
        for name, (values,) in buffers.items():
            if self.buffer(name).content == "mask":
                values.fill_(1.0)

    monkeypatch.setattr(Emulated, "begin", begin)
    engine = engine_for(WIDE, graph_weights(WIDE))
    engine.relax(floats(given_for(WIDE)))
    engine.compute_gradients()
    assert leaks(engine, BATCH_SIZE)
    with pytest.raises(AssertionError, match="allowed"):
        assert_near_fp64(WIDE, STEPS)


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [SGD(0.5, momentum=0.5, weight_decay=0.1), AdamW(0.1)], ids=["sgd", "adamw"])
def test_updates_are_those_of_the_reference(rule: SGD | AdamW) -> None:
    """After four updates at most some forty roundings of 2^-24 of the largest weight from fp64."""
    net = GRAPHS["a recurrent network unrolled"].net
    weights = graph_weights(net)
    card = engine_for(net, weights, learning=rule)
    exact = engine_for(net, weights, learning=rule, backend="reference")
    for step in range(1, 5):
        gradients = graph_weights(net, 10 + step, 0.1)
        card.load_gradients(single(gradients))
        exact.load_gradients({n: {k: v.float().double() for k, v in g.items()} for n, g in gradients.items()})
        for engine in (card, exact):
            engine.update(rule.rate, step)
    before, expected = flat(weights), flat(exact.weights())
    for name, values in flat(card.weights()).items():
        distance = (values.double() - expected[name]).abs().max()
        assert distance <= 40 * 2.0**-24 * expected[name].abs().max(), name
        assert distance < 1e-3 * (expected[name] - before[name]).abs().max(), "the update is visible"


@pytest.mark.parametrize("setting", ["at the end", "at every step"])
def test_a_change_of_weights_reaches_the_copies_that_products_read(setting: str) -> None:
    """What a trained engine predicts is what a new one with its weights predicts."""
    inference = STEPS if setting == "at the end" else variant("ipc", STEPS)
    engine, given = engine_for(WIDE, graph_weights(WIDE), inference), floats(given_for(WIDE))
    engine.set_learning(0.1, 1)
    engine.relax(given)
    engine.learn(0.1, 1)
    fresh = Engine(WIDE, engine.weights(), inference, clamped(WIDE), learning=SGD(0.1), backend="emulated")
    assert torch.equal(engine.sweep({"x": given["x"]}), fresh.sweep({"x": given["x"]}))


@pytest.mark.slow
def test_a_convolutional_network_learns() -> None:
    """Bars across and bars down, 8 x 8 with noise: told apart after three epochs."""
    source = generator(3)
    labels = torch.arange(96) % 2
    images = 0.3 * torch.randn(96, 1, 8, 8, generator=source)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 3:5] += 1.0 - label
        image[0, :, 3:5] += label
    data = (images.flatten(1), labels)
    net = chain(
        (1, 8, 8),
        [
            Block([Conv2d(4, 3), "gelu", MaxPool2d(2)]),
            Block([Conv2d(6, 2), "gelu"]),
            Dense(12, "gelu"),
            Dense(2),
        ],
    )
    trainer = pctt.Trainer(
        net, Inference(num_steps=6, rate=0.2), pctt.Adam(1e-2), batch_size=32, backend="emulated"
    )
    assert trainer.fit(data, 4).status.ok
    assert trainer.evaluate(data) > 0.95


# --- memory and refusals ------------------------------------------------------------------------------------


def test_the_budget_counts_every_tensor() -> None:
    engine = engine_for(WIDE, graph_weights(WIDE))
    backend = engine.backend
    assert isinstance(backend, Emulated)
    found = budget(engine.program, backend.chip, backend.grid, 32)
    names = {entry.buffer.name for entry in found.entries}
    assert names >= set(engine.program.buffers)
    assert all(isinstance(b, CardBuffer) and b.first is None for b in engine.program.buffers.values())


def test_a_graph_that_does_not_fit_is_refused_with_its_layer() -> None:
    net = graph({"x": 4000}, {"a": (Dense(4000, "tanh"), "x"), "y": (Dense(10), "a")})
    weights = {n: {k: torch.zeros(s) for k, s in layer.items()} for n, layer in net.weight_shapes().items()}
    with pytest.raises(
        ValueError, match=r"does not fit the n150: .* bytes of L1 .* of a with .* What would fit"
    ):
        engine_for(net, weights)


@pytest.mark.parametrize(
    ("net", "inference", "learning", "what"),
    [
        (GRAPHS["precisions"].net, STEPS, SGD(0.1), "a full precision"),
        (GRAPHS["learned variances"].net, STEPS, SGD(0.1), "a learned variance"),
        (WIDE, Inference(4, 0.1, nudge=Nudge()), SGD(0.1), "nudge"),
        (WIDE, Inference(4, 0.1, dynamics="langevin"), SGD(0.1), "langevin"),
        (WIDE, STEPS, SGD(0.1, clip_norm=1.0), "clip_norm"),
        (WIDE, variant("ipc", STEPS), AdamW(0.1), "weights_at='every_step' with Adam"),
    ],
)
def test_what_no_card_runs_is_refused(net: Network, inference: Inference, learning: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what}.* card backends; .*backend='reference'"):
        engine_for(net, graph_weights(net), inference, learning=learning)


@pytest.mark.parametrize(
    ("name", "layer", "what"),
    [
        ("images", "a", "a convolution"),
        ("channels", "a", "weights per channel"),
        ("tokens", "e", "embedding"),
        ("batch normalisation", "a", "a convolution"),
        ("two roots, three leaves", "label", "softmax"),
    ],
)
def test_tenstorrent_refuses_what_ttnn_does_not_give(name: str, layer: str, what: str) -> None:
    backend = Tenstorrent.__new__(Tenstorrent)  # no card, no ttnn
    net = GRAPHS[name].net
    indices = [net.node_index(node) for node in clamped(net)]
    backend.layout = layout(net)
    backend.program = lower_graph(
        pctt.assemble.assemble(backend.layout, STEPS, indices, (), SGD(0.1)),
        backend.layout,
        PrecisionPolicy(),
    )
    with pytest.raises(ValueError, match=f"layer '{layer}' has {what}, .*backend='emulated'"):
        backend.refuse_what_it_lacks()


def test_categorical_energies_are_those_of_the_reference() -> None:
    net = graph({"x": 3}, {"y": (Block([Linear(4), "softmax"], Categorical()), "x")})
    weights, inputs = graph_weights(net), given_for(net)
    given = {"x": inputs["x"], "y": inputs["y"].softmax(-1)}
    exact = engine_for(net, weights, backend="reference").relax(given).energies[0]
    assert abs(engine_for(net, weights).relax(floats(given)).energies[0] - exact) <= 2.0**-7 * exact
