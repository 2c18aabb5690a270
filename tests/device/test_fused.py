"""The fused kernel: whole training steps in one program of our own, held to the limits of
`test_trajectory.py`, to the bits of the TT-NN path, and to what it promises of launches, cores and memory.

A wait that is missing shows only where cores are slow. So the same step is run with delays at random points,
which must change no bit, and with a wait taken out, which must change some.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pctt
from pctt import (
    SGD,
    Adam,
    AdamW,
    Dense,
    Inference,
    Linear,
    Network,
    Trainer,
    chain,
    graph,
    infer,
    init,
    variant,
)
from pctt.backends.fused import Fused
from pctt.backends.fused_plan import CIRCULAR_BUFFER_BYTES
from pctt.backends.fused_stream import MOVEMENT
from pctt.backends.precision import POLICIES
from pctt.data import Split
from pctt.energies import Gaussian
from pctt.engine import Engine
from pctt.learning import Learning
from tests.device.test_trajectory import FLOOR, Run, assert_parity, cast, rms
from tests.replay import Action, actions


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """L1 is given back by the tensors of one test before the next begins."""
    gc.collect()
    yield
    gc.collect()


PLAIN = SGD(0.1)
HEAVY = SGD(0.1, momentum=0.9, weight_decay=0.01)


@dataclass(frozen=True)
class Case:
    """rows: samples of a batch.    cores: cores_per_layer."""

    net: Network
    inference: Inference
    learning: Learning = PLAIN
    rows: int = 29
    cores: int | None = 1
    policy: str = "mixed"


def dense(widths: Sequence[int], activation: str, activate: str = "output") -> Network:
    """The last layer has the activation only where it is taken at the input."""
    functions = [activation] * (len(widths) - 2) + [activation if activate == "input" else "identity"]
    layers = [Dense(w, f, activate=activate) for w, f in zip(widths[1:], functions, strict=True)]
    return chain(widths[0], layers)


TANH = dense((40, 32, 32, 32, 32), "tanh", "input")
WIDE = dense((40, 64, 64, 64), "tanh", "input")
GELU = dense((40, 64, 64, 10), "gelu")
MIXED = chain(
    30,
    [
        Dense(64, "sigmoid", activate="input"),
        Dense(64, "identity", bias=False),
        Dense(50, "gelu", energy=Gaussian(2.0)),
        Dense(20, "silu"),
        Dense(10, "silu", activate="input"),
    ],
)
KINKS = chain(
    40, [Dense(64, "relu", bias=False), Dense(70, "leaky_relu"), Dense(10, "hard_tanh", activate="input")]
)

CASES = {
    "tanh at the input": Case(TANH, Inference(8, 0.1)),
    "one step, unequal widths": Case(dense((40, 33, 50, 10), "gelu"), Inference(1, 0.1), Adam(0.01), 32, 2),
    "forty steps": Case(dense((40, 32, 10), "tanh"), Inference(40, 0.1), HEAVY),
    "sixteen layers": Case(dense((32,) * 17, "tanh", "input"), Inference(8, 0.1), PLAIN, 32),
    "512 wide": Case(dense((64, 512, 10), "tanh"), Inference(1, 0.1), PLAIN, 32, 4),
    "batches of 128": Case(dense((40, 64, 96), "silu"), Inference(8, 0.1), PLAIN, 128, 3),
    "mixed": Case(MIXED, Inference(8, 0.1), Adam(0.01, weight_decay=0.1)),
    "mixed on two cores a layer": Case(MIXED, Inference(8, 0.1), HEAVY, 32, 2),
    "kinks": Case(KINKS, Inference(8, 0.1), PLAIN, 29, 2),
    "fixed": Case(GELU, variant("fixed", Inference(8, 0.1)), cores=2),
    "ipc": Case(WIDE, variant("ipc", Inference(4, 0.1)), rows=32),
    "epc": Case(dense((40, 96, 70, 10), "gelu"), variant("epc", Inference(4, 0.1)), cores=3),
    "zil": Case(GELU, variant("zil", Inference(4))),
    "gauss-seidel": Case(
        dense((40, 128, 100, 10), "tanh"), variant("gauss-seidel", Inference(4, 0.1)), cores=4
    ),
    "momentum": Case(WIDE, variant("momentum", Inference(8, 0.05)), AdamW(0.01), 32, 2),
}


def batch(case: Case, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(case.rows, case.net.input, generator=generator)
    targets = 0.5 * torch.randn(case.rows, case.net.widths[-1], generator=generator)
    return {"input": inputs, case.net.output: targets}


def engine_of(case: Case, backend: str = "fused") -> Engine:
    dtype = torch.float64 if backend == "reference" else torch.float32
    fused = backend == "fused"
    return Engine(
        case.net,
        cast(init(case.net, 0), dtype),
        case.inference,
        ("input", case.net.output),
        learning=case.learning,
        backend="tenstorrent" if fused else backend,
        precision=None if backend == "reference" else POLICIES[case.policy],
        batch_size=case.rows,
        fused=fused,
        cores_per_layer=case.cores if fused else None,
    )


def backend_of(engine: Engine) -> Fused:
    assert isinstance(engine.backend, Fused)
    return engine.backend


def train_batch(engine: Engine, given: dict[str, Tensor], number: int) -> list[float]:
    """Relaxes and learns, in one launch of the fused kernel; returns the energies."""
    assert engine.learning is not None
    engine.set_learning(engine.learning.rate, number)
    whole = engine.inference.weights_at != "every_step"
    return engine.relax(given, learn=whole).energies


def states(engine: Engine, when: object) -> dict[str, Tensor]:
    net = engine.net
    found = {f"error of {name} {when}": engine.read_node("error", name) for name in net.nodes[1:]}
    for name in net.nodes[1:-1]:
        displacement = engine.read_node("activity", name) - engine.read_node("anchor", name)
        found[f"displacement of {name} {when}"] = displacement
    return found


def run(case: Case, backend: str = "fused") -> Run:
    """Two batches: the first part by part, with the energies of every step, the second in one launch."""
    engine = engine_of(case, backend)
    before = engine.weights()
    first, second = ({k: v.to(engine.dtype) for k, v in batch(case, seed).items()} for seed in (0, 1))
    engine.set_learning(case.learning.rate, 1)
    relaxation = engine.relax(first, record=True)
    assert relaxation.trajectory is not None
    tensors = {"energies of steps": torch.tensor(relaxation.trajectory), **states(engine, 0)}
    if case.inference.weights_at != "every_step":
        engine.compute_gradients()
        for name, tree in engine.gradients().items():
            tensors |= {f"{key} gradient of {name}": values for key, values in tree.items()}
        engine.update(case.learning.rate, 1)
    tensors["energies"] = torch.tensor(train_batch(engine, second, 2))
    tensors |= states(engine, 1)
    for name, tree in engine.weights().items():
        tensors |= {f"change of {key} of {name}": tree[key] - before[name][key] for key in tree}
    return Run({name: values.double() for name, values in tensors.items()}, relaxation)


@pytest.mark.parametrize("name", CASES)
def test_training_agrees_with_the_emulation_and_the_reference(name: str) -> None:
    case = CASES[name]
    assert_parity(case.net, run(case), run(case, "emulated"), run(case, "reference"))


# --- the TT-NN path -----------------------------------------------------------------------------------------


PLACED = {"input": dense((40, 32, 32), "tanh", "input"), "output": dense((40, 32, 10), "tanh")}
MOMENTUM = SGD(0.1, momentum=0.5)


@pytest.mark.parametrize("placed", PLACED)
def test_where_no_operation_mixes_formats_the_bits_are_those_of_the_ttnn_path(placed: str) -> None:
    """Everything that can be read after two batches of 6 steps."""
    case = Case(PLACED[placed], Inference(6, 0.1), MOMENTUM, policy="float32")
    ours, theirs = run(case).tensors, run(case, "tenstorrent").tensors
    assert set(ours) == set(theirs)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_mixed_formats_agree_with_the_ttnn_path_up_to_the_rounding_of_bfloat16() -> None:
    """Where a TT-NN operation takes one bfloat16 and one float32 tensor it cuts the latter to TF32. So the
    energies before the first step are still equal; later ones are not, and what is kept in bfloat16 is now
    and then rounded to the other side.
    """
    case = Case(PLACED["output"], Inference(6, 0.1), MOMENTUM)
    ours, theirs = run(case).tensors, run(case, "tenstorrent").tensors
    assert set(ours) == set(theirs)
    assert torch.equal(ours["energies of steps"][0], theirs["energies of steps"][0])
    for name, values in theirs.items():
        assert rms(ours[name] - values) <= 2.0 * FLOOR * rms(values), name


# --- races --------------------------------------------------------------------------------------------------


Edit = Callable[[Engine], None]
CORES = {1: Case(TANH, Inference(6, 0.1)), 2: Case(WIDE, Inference(6, 0.1), cores=2)}
CREDITED = Case(GELU, variant("ipc", Inference(3, 0.1)))
STALL = 20
"""Waits for nothing, each of which dawdles, that make a core slow where another counts on it."""


def delays(seed: int) -> dict[str, str]:
    return {"DELAY_SEED": str(seed), "DELAY_CYCLES": "3"}


def trained(case: Case, seed: int | None = None, edit: Edit | None = None) -> dict[str, Tensor]:
    """All that two batches leave. seed: of the delays.    edit: of the instructions, before they are sent."""
    engine = engine_of(case)
    if seed is not None:
        backend_of(engine).defines = delays(seed)
    if edit is not None:
        edit(engine)
    found: dict[str, Tensor] = {}
    for number in (1, 2):
        found[f"energies {number}"] = torch.tensor(train_batch(engine, batch(case, number), number))
        found |= states(engine, number)
    for name, tree in engine.weights().items():
        found |= {f"{name} {key}": values for key, values in tree.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert set(a) == set(b)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cores", CORES)
def test_delays_change_no_bit(cores: int) -> None:
    right = trained(CORES[cores])
    assert all(values.isfinite().all() for values in right.values())
    assert same(trained(CORES[cores]), right)
    for seed in (1, 2, 3):
        assert same(trained(CORES[cores], seed), right), f"seed {seed}"


def step_of(engine: Engine) -> int:
    """The section of an inference step."""
    return backend_of(engine).codes[engine.program.steps[0]]


def waits_of(engine: Engine, processor: str) -> Iterator[tuple[int, Action, int]]:
    """(core, wait, the core it waits for) of an inference step, those for the core itself left out."""
    backend = backend_of(engine)
    channels = {(c.receiver, number): c for c, number in backend.counters.numbers.items()}
    for core, stream in enumerate(backend.streams[step_of(engine)]):
        for action in actions(getattr(stream, processor)):
            if action.code == "WAIT" and (sender := channels[core, action.counter].sender) != core:
                yield core, action, sender


def slow(engine: Engine, core: int, processor: str, before: str) -> None:
    words = getattr(backend_of(engine).streams[step_of(engine)][core], processor)
    for action in reversed(list(actions(words))):
        if action.code == before:
            words[action.at : action.at] = [MOVEMENT["WAIT"]] * STALL


@pytest.mark.parametrize("cores", CORES)
def test_a_missing_wait_for_a_message_shows(cores: int) -> None:
    """The layer above no longer waits for what a slow core sends up."""
    case = CORES[cores]

    def late(engine: Engine) -> None:
        _, _, sender = next(iter(waits_of(engine, "reader")))
        slow(engine, sender, "writer", "MOVE")

    def planted(engine: Engine) -> None:
        core, wait, _ = next(iter(waits_of(engine, "reader")))
        late(engine)
        del backend_of(engine).streams[step_of(engine)][core].reader[wait.at]

    right = trained(case)
    assert same(trained(case, 1, late), right)
    assert not same(trained(case, 1, planted), right)


def test_a_missing_wait_for_a_credit_shows() -> None:
    """A core no longer waits until the slow one above has read what is to be written over."""

    def credit(engine: Engine) -> tuple[int, Action, int]:
        return list(waits_of(engine, "writer"))[-1]

    def late(engine: Engine) -> None:
        slow(engine, credit(engine)[2], "reader", "GIVE")

    def planted(engine: Engine) -> None:
        core, wait, _ = credit(engine)
        late(engine)
        del backend_of(engine).streams[step_of(engine)][core].writer[wait.at]

    right = trained(CREDITED)
    assert same(trained(CREDITED, 1, late), right)
    assert not same(trained(CREDITED, 1, planted), right)


# --- launches, cores and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 8, 40])
def test_a_training_step_is_one_launch(num_steps: int) -> None:
    case = Case(dense((40, 32, 32), "tanh", "input"), Inference(num_steps, 0.1))
    engine = engine_of(case)
    before = backend_of(engine).launches
    for number in (1, 2, 3):
        train_batch(engine, batch(case, number), number)
        assert backend_of(engine).launches == before + number


def test_nothing_is_compiled_for_another_network_number_of_steps_rate_or_batch(device: Any) -> None:
    """A program is known by its kernels, its cores and how many sections in a row it is given."""
    first = Case(dense((40, 64, 64, 32), "tanh", "input"), Inference(3, 0.1))
    others = [
        Case(dense((40, 64, 64, 32), "tanh", "input"), Inference(7, 0.05)),
        Case(dense((64, 33, 100, 10), "gelu"), Inference(2, 0.1), Adam(0.01), 64),
        Case(dense((32, 30, 64), "relu"), Inference(2, 0.1), HEAVY, 32, 2),  # as many cores in all
    ]
    engine = engine_of(first)
    for number in (1, 2):
        train_batch(engine, batch(first, number), number)
    known = device.num_program_cache_entries()
    for case in others:
        del engine
        gc.collect()
        engine = engine_of(case)
        train_batch(engine, batch(case, 0), 1)
        engine.set_learning(0.037, 2)
        engine.relax({name: values[:7] for name, values in batch(case, 1).items()}, learn=True)
        assert device.num_program_cache_entries() == known, case


MEMORY = [
    Case(TANH, Inference(3, 0.1)),
    Case(GELU, Inference(3, 0.1), Adam(0.01), 64, 2),
    Case(dense((64, 512, 10), "tanh"), Inference(1, 0.1), PLAIN, 32, None),
]


def test_what_the_host_sees_lies_as_in_the_ttnn_path() -> None:
    """Each core holds its own weights and errors, whichever path runs. Only the transposed copies of weights
    and the numbers that TT-NN reads from the card have no counterpart.
    """
    case = CASES["tanh at the input"]
    fused, single = engine_of(case), engine_of(case, "tenstorrent")
    rows = single.backend.rows(case.rows)
    compared = 0
    for name, buffer in single.program.buffers.items():
        if name not in fused.program.buffers:
            continue
        ours, theirs = (engine.backend.allocate(buffer, rows).tensor for engine in (fused, single))
        assert ours.memory_config() == theirs.memory_config(), name
        assert (ours.shape, ours.dtype, ours.layout) == (theirs.shape, theirs.dtype, theirs.layout), name
        compared += 1
    assert compared >= 10


@pytest.mark.parametrize("case", MEMORY, ids=lambda case: f"{max(case.net.widths)} wide")
def test_what_is_allocated_is_what_was_predicted(case: Case, device: Any) -> None:
    """To the byte: tensors, instructions and counters, all in L1. Circular buffers are not allocated by the
    allocator that is asked here, so they are what is missing.
    """
    import ttnn

    def allocated(kind: Any) -> int:
        return ttnn.device.get_memory_view(device, kind).total_bytes_allocated_per_bank

    before, dram = (allocated(kind) for kind in (ttnn.BufferType.L1, ttnn.BufferType.DRAM))
    engine = engine_of(case)
    train_batch(engine, batch(case, 0), 1)
    taken = allocated(ttnn.BufferType.L1) - before
    assert taken == backend_of(engine).bytes_per_core() - CIRCULAR_BUFFER_BYTES
    assert allocated(ttnn.BufferType.DRAM) == dram
    assert engine._batch is not None
    for share in engine._batch.buffers.values():
        assert share.tensor.memory_config().buffer_type == ttnn.BufferType.L1, share.buffer


@pytest.mark.parametrize("name", CASES)
def test_cores_send_to_cores_of_the_program_only(name: str) -> None:
    """Worker cores: nothing goes to DRAM, nothing to a core that does not take part. The reader only waits,
    so nothing is fetched from there.
    """
    engine = engine_of(CASES[name])
    backend = backend_of(engine)
    total = backend.cores.total
    assert total <= backend.grid[0] * backend.grid[1]
    moves = 0
    for section in backend.streams:
        assert len(section) == total
        for stream in section:
            for action in actions(stream.writer):
                if action.code in ("MOVE", "SIGNAL"):
                    assert action.core is not None and 0 <= action.core < total
                    moves += 1
            assert {action.code for action in actions(stream.reader)} <= {"WAIT", "GIVE", "FINISH"}
    assert moves


# --- training -----------------------------------------------------------------------------------------------


def accuracies(net: Network, inference: Inference, train: Split, test: Split) -> list[float]:
    """After one epoch, of the fused kernel and of the emulation."""
    found: list[float] = []
    for settings in ({"backend": "tenstorrent", "fused": True}, {"backend": "emulated"}):
        trainer = Trainer(net, inference, Adam(0.01), batch_size=32, seed=0, **settings)
        assert trainer.fit(train, epochs=1).status.ok
        found.append(trainer.evaluate(test))
        del trainer
    return found


def part(split: Split, size: int) -> Split:
    return Split(split.inputs[:size], split.labels[:size])


def test_digits_are_learnt_as_by_the_emulation() -> None:
    """Equal but for two test samples, after 40 batches."""
    digits = pctt.data.load("digits")
    net = chain(64, [Dense(64, "tanh"), Dense(10)])
    test = part(digits.test, 192)
    fused, emulated = accuracies(net, Inference(6, 0.1), part(digits.train, 1280), test)
    assert fused > 0.8
    assert abs(fused - emulated) <= 2.01 / len(test)


def test_mnist_is_learnt_as_by_the_emulation() -> None:
    """20 batches of images. Equal but for two test samples."""
    if not os.environ.get("PCTT_DATA"):
        pytest.skip("PCTT_DATA is not set: no real MNIST to read")
    mnist = pctt.data.load("mnist")
    net = chain(784, [Dense(64, "tanh"), Dense(10)])
    test = part(mnist.test, 128)
    fused, emulated = accuracies(net, Inference(6, 0.1), part(mnist.train, 640), test)
    assert fused > 0.4
    assert abs(fused - emulated) <= 2.01 / len(test)


def test_inference_and_prediction_agree_with_the_emulation() -> None:
    net = dense((40, 64, 10), "tanh")
    weights = init(net, 0)
    clamp = batch(Case(net, Inference(5, 0.1)), 0)
    on_card, emulated = (
        infer(net, weights, clamp, Inference(5, 0.1), backend=backend, fused=fused)
        for backend, fused in (("tenstorrent", True), ("emulated", False))
    )
    assert on_card.status.ok
    for name in net.nodes:
        expected = emulated.activities[name]
        assert rms(on_card.activities[name] - expected) <= FLOOR * rms(expected), name
    trainers = [
        Trainer(net, Inference(5, 0.1), PLAIN, seed=0, **settings)
        for settings in ({"backend": "tenstorrent", "fused": True}, {"backend": "emulated"})
    ]
    inputs = torch.rand(70, 40)
    ours, theirs = (trainer.predict(inputs) for trainer in trainers)
    assert ours.shape == (70, 10)
    assert rms(ours - theirs) <= FLOOR * rms(theirs)


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_graph_is_refused() -> None:
    net = graph({"input": 20}, {"a": (Linear(32), "input"), "b": (Linear(10), "a")})
    with pytest.raises(ValueError, match="this network is a graph"):
        Engine(net, init(net, 0), Inference(2, 0.1), ("input", "b"), backend="tenstorrent", fused=True)


def test_more_nodes_than_cores_are_refused(device: Any) -> None:
    size = device.compute_with_storage_grid_size()
    net = dense((32,) * (size.x * size.y + 1), "tanh", "input")
    with pytest.raises(ValueError, match=f"{size.x * size.y + 1} nodes with a core each"):
        engine_of(Case(net, Inference(2, 0.1)))


def test_a_layer_that_does_not_fit_one_core_is_refused_by_its_tensor() -> None:
    with pytest.raises(ValueError, match=r"does not fit.*bytes of L1 on each core.*the largest tensor is"):
        engine_of(Case(dense((32, 2048, 10), "tanh"), Inference(2, 0.1)))


def test_the_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="fused=True is a way of running on a card"):
        Engine(TANH, init(TANH, 0), Inference(2, 0.1), ("input", TANH.output), fused=True)


def test_cores_per_layer_of_the_ttnn_path_are_refused() -> None:
    with pytest.raises(ValueError, match="add fused=True"):
        Engine(
            TANH,
            init(TANH, 0),
            Inference(2, 0.1),
            ("input", TANH.output),
            backend="tenstorrent",
            cores_per_layer=2,
        )


def test_adam_at_every_step_is_refused() -> None:
    case = Case(TANH, variant("ipc", Inference(2, 0.1)), Adam(0.01))
    with pytest.raises(ValueError, match="every_step' with Adam is not run by the card"):
        engine_of(case)
