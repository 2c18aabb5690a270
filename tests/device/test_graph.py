"""Graphs on the device beside the emulation and the fp64 reference, held to the same limits as chains in
`test_trajectory.py`; faults are planted on the device's side and must be noticed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pctt import (
    SGD,
    Adam,
    Add,
    Block,
    Concat,
    Dense,
    Engine,
    Flatten,
    Gaussian,
    Inference,
    Linear,
    Multiply,
    Network,
    Reshape,
    Slice,
    Step,
    Trainer,
    graph,
    init,
    variant,
)
from pctt.backends.tenstorrent import Tenstorrent
from pctt.layers.maps import Permute
from pctt.network import Weights
from pctt.program import Instruction, Slot
from tests.device.test_trajectory import FLOOR, Run, batch, largest, rms, run

STEPS = Inference(5, 0.1)

RESIDUAL = Block([Linear(33), "tanh", Step(Add(), (0, -1))])
GATE = Block(
    [
        Step(Linear(33), (0,), "gate"),
        "sigmoid",
        Step(Multiply(), (1, -1)),
    ],
    Gaussian(2.0),
)

NETWORKS = {
    # Two parents and three children, a residual sum, a gate, weights that two layers share.
    "gated": graph(
        {"input": 20},
        {
            "a": (Dense(33, "tanh"), "input"),
            "b": (RESIDUAL, "a"),
            "c": (RESIDUAL, "b"),
            "d": (GATE, "c", "a"),
            "y": (Dense(10, "gelu", activate="input"), "d", "a"),
        },
        shared={"c": "b"},
    ),
    # Layers over positions, parts, and what joins them.
    "parts": graph(
        {"input": 12},
        {
            "a": (Block([Reshape((3, 4)), Linear(5), "silu"]), "input"),
            "b": (Block([Permute((1, 0)), Linear(7), "tanh", Flatten()]), "a"),
            "c": (Block([Step(Slice(3, 24), (0,)), Step(Flatten(), (1,)), Step(Concat(), (2, 3))]), "b", "a"),
            "y": (Dense(3), "c"),
        },
    ),
    "a cycle": graph(
        {"input": 20},
        {
            "a": (Dense(33, "tanh", activate="input"), "input", "b"),
            "b": (Dense(40, "tanh"), "a"),
            "y": (Dense(10), "b"),
        },
    ),
}


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()


def assert_parity(device: Run, emulated: Run, reference: Run) -> None:
    """Per tensor, in RMS and in the largest element."""
    assert set(device.tensors) == set(emulated.tensors) == set(reference.tensors)
    for name, truth in reference.tensors.items():
        off, allowed = device.tensors[name] - truth, emulated.tensors[name] - truth
        for size in (rms, largest):
            limit = 2.0 * size(allowed) + FLOOR * size(truth)
            assert size(off) <= limit, (
                f"{name}: {size.__name__} of the difference {size(off):.3g} > {limit:.3g}"
            )


def runs(net: Network, learning: Any = None, inference: Inference = STEPS, num_batches: int = 2) -> list[Run]:
    backends = ("tenstorrent", "emulated", "reference")
    return [run(backend, net, num_batches, learning, inference) for backend in backends]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trajectory_agrees_with_the_emulation_and_the_reference(name: str) -> None:
    assert_parity(*runs(NETWORKS[name]))


@pytest.mark.one_chip
@pytest.mark.parametrize("name", ["fixed", "exact", "epc", "gauss-seidel"])
def test_variants_agree(name: str) -> None:
    assert_parity(*runs(NETWORKS["gated"], inference=variant(name, STEPS)))


@pytest.mark.one_chip
@pytest.mark.parametrize(
    ("learning", "inference"),
    [
        (SGD(0.1, momentum=0.9, weight_decay=0.01), Inference(3, 0.1, initial="zeros")),
        (Adam(0.01, epsilon=0.1), STEPS),
    ],
    ids=["momentum, from zeros", "adam"],
)
def test_learning_rules_agree(learning: Any, inference: Inference) -> None:
    """With its usual epsilon Adam moves a weight whose gradient is near 0 by the whole rate, to the side that
    a rounding decides. One as large as the gradients leaves every change a smooth function of them.
    """
    assert_parity(*runs(NETWORKS["a cycle"], learning, inference, 3))


def transposed(i: Instruction) -> Instruction:
    """Feedback through W instead of its transpose."""
    if i.op != "matmul" or not i.inputs[1].buffer.startswith("transposed weight@layers2"):
        return i
    return replace(i, inputs=(i.inputs[0], Slot("operand weight@layers2", 0, 1)))


def unshared(i: Instruction) -> Instruction:
    """Of two layers that share a weight only the last one's gradient counts."""
    if i.op != "addcmul" or i.out[0].buffer != "weight_gradient@layers2":
        return i
    return Instruction("binary", i.out, i.inputs[1:], 1.0, i.scalar, "multiply")


def ungated(i: Instruction) -> Instruction:
    """The gate's share is not sent down."""
    if i.op != "binary" or i.function != "multiply" or not i.out[0].buffer.startswith("pulled3@inner4"):
        return i
    return replace(i, inputs=(i.inputs[0], i.inputs[0]))


FAULTS: dict[str, Callable[[Instruction], Instruction]] = {
    "transposed weights": transposed,
    "a gradient overwritten": unshared,
    "a gate's other input": ungated,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, honest, changed = NETWORKS["gated"], Tenstorrent.bind, list[Instruction]()
    emulated, reference = run("emulated", net, 2, None, STEPS), run("reference", net, 2, None, STEPS)

    def bind(self: Tenstorrent, code: Any, buffers: Any, scalars: Any) -> Any:
        code = list(code)
        faulty = [FAULTS[name](i) for i in code]
        changed.extend(i for i, other in zip(code, faulty, strict=True) if i != other)
        return honest(self, faulty, buffers, scalars)

    monkeypatch.setattr(Tenstorrent, "bind", bind)
    wrong = run("tenstorrent", net, 2, None, STEPS)
    assert changed, "the fault has found nothing to change"
    with pytest.raises(AssertionError, match="of the difference"):
        assert_parity(wrong, emulated, reference)


@pytest.mark.one_chip
def test_a_trainer_trains_a_graph() -> None:
    """Two epochs of two batches, the second one smaller: weights change as on the emulation, as near as
    bfloat16 is to either.
    """
    net, changes = NETWORKS["gated"], list[Weights]()
    data = batch(net, 0)
    for backend in ("tenstorrent", "emulated"):
        trainer = Trainer(net, STEPS, SGD(0.1), batch_size=20, backend=backend, seed=1, weights=init(net, 0))
        assert trainer.fit((data["input"], data["y"]), 2).status.ok
        after, before = trainer.engine.weights(), init(net, 0)
        changes.append({n: {k: v - before[n][k] for k, v in tree.items()} for n, tree in after.items()})
    for layer, tree in changes[1].items():
        for key, values in tree.items():
            assert rms(changes[0][layer][key] - values) <= 8 * FLOOR * rms(values), f"{key} of {layer}"


@pytest.mark.fast_dispatch
@pytest.mark.parametrize("name", ["a cycle", "parts"])
def test_traces_change_no_bit(name: str) -> None:
    """Four batches: eager, and replayed from traces, with each batch sent ahead."""

    def trained(traces: bool) -> Weights:
        net = NETWORKS[name]
        engine = Engine(
            net, init(net), Inference(2, 0.1), ("input", "y"), learning=Adam(0.01), backend="tenstorrent"
        )
        assert isinstance(engine.backend, Tenstorrent)
        assert engine.backend.traces, "fast dispatch, but no traces"
        engine.backend.traces = traces
        batches = [batch(net, seed) for seed in range(4)]
        for number, given in enumerate(batches):
            engine.relax(given, upcoming=batches[number + 1] if traces and number < 3 else None)
            engine.learn(0.01 / (number + 1), number + 1)
        return engine.weights()

    eager, replayed = trained(traces=False), trained(traces=True)
    for layer, tree in eager.items():
        for key, values in tree.items():
            assert torch.equal(replayed[layer][key], values), f"{key} of {layer}"


def test_nothing_is_compiled_after_the_first_batch(device: Any) -> None:
    net = NETWORKS["parts"]
    run("tenstorrent", net, 1, None, Inference(2, 0.1))
    known = device.num_program_cache_entries()
    run("tenstorrent", net, 3, SGD(0.037), Inference(2, 0.1))
    assert device.num_program_cache_entries() == known
