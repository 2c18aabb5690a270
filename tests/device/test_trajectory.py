"""Whole batches on the device beside the emulation and the fp64 reference: equal within twice the emulation's
own distance from the reference.

The program is the same on both sides, so faults are planted on the device's side only: the comparison must
notice them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pctt import SGD, Adam, Dense, Inference, Network, chain, init, variant
from pctt.backends.tenstorrent import Tenstorrent
from pctt.energies import Gaussian
from pctt.engine import Engine, Relaxation
from pctt.learning import Learning
from pctt.network import Weights
from pctt.program import Instruction, Slot

BATCH = 29  # not a multiple of 32: three rows of padding
NUM_STEPS = 12

LIVE = Inference(NUM_STEPS, 0.1)

FLOOR = 2.0**-9
"""Of a tensor's norm: one unit in the last place of bfloat16, in which errors and feedback are stored."""

NETWORKS = {
    "tanh at the input": chain(40, [Dense(32, "tanh", activate="input") for _ in range(4)]),
    "gelu at the output": chain(40, [Dense(33, "gelu"), Dense(40, "gelu"), Dense(10)]),
    "mixed": chain(
        30,
        [
            Dense(64, "sigmoid", activate="input"),
            Dense(64, "tanh", bias=False),
            Dense(50, "gelu", energy=Gaussian(2.0)),
            Dense(20, "silu"),
            Dense(10, "silu", activate="input"),
        ],
    ),
    "kinks": chain(
        30, [Dense(64, "relu"), Dense(64, "leaky_relu"), Dense(10, "hard_tanh", activate="input")]
    ),
}


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """L1 is given back by the tensors of one test before the next begins."""
    yield
    gc.collect()


@dataclass
class Run:
    """What an engine left after some batches: per name, one tensor."""

    tensors: dict[str, Tensor]
    relaxation: Relaxation


def batch(net: Network, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(BATCH, net.input, generator=generator)
    targets = 0.5 * torch.randn(BATCH, net.widths[-1], generator=generator)
    return {"input": inputs, net.output: targets}


def run(
    backend: str,
    net: Network,
    num_batches: int = 2,
    learning: Learning | None = None,
    inference: Inference = LIVE,
) -> Run:
    """Relaxes and learns, and collects energies of every step, activities, errors, gradients and weights."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    weights = cast(init(net, 0), dtype)
    learning = learning or SGD(0.1)
    engine = Engine(net, weights, inference, ("input", net.output), learning=learning, backend=backend)
    tensors: dict[str, Tensor] = {}
    for number in range(num_batches):
        given = {name: values.to(dtype) for name, values in batch(net, number).items()}
        engine.set_learning(0.1, number + 1)
        relaxation = engine.relax(given, record=True)
        assert relaxation.trajectory is not None
        tensors[f"energies {number}"] = torch.tensor(relaxation.trajectory)
        for name in net.nodes[1:]:
            tensors[f"error of {name} {number}"] = engine.read_node("error", name)
        for name in net.nodes[1:-1]:
            tensors[f"displacement of {name} {number}"] = engine.read_node(
                "activity", name
            ) - engine.read_node("anchor", name)
        engine.compute_gradients()
        for name, tree in engine.gradients().items():
            tensors |= {f"{key} gradient of {name} {number}": values for key, values in tree.items()}
        engine.update(0.1, number + 1)
    for name, tree in engine.weights().items():
        tensors |= {f"change of {key} of {name}": tree[key] - weights[name][key] for key in tree}
    return Run({name: values.double() for name, values in tensors.items()}, relaxation)


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: {key: values.to(dtype) for key, values in tree.items()} for name, tree in weights.items()}


def assert_parity(net: Network, device: Run, emulated: Run, reference: Run) -> None:
    """Per tensor, in RMS and, where the activations are smooth, in the largest element: at a kink a rounding
    decides between two derivatives.
    """
    kinked = {layer.activation for layer in net.layers} & {"relu", "leaky_relu", "hard_tanh"}
    sizes = {"RMS": rms} if kinked else {"RMS": rms, "largest element": largest}
    assert set(device.tensors) == set(emulated.tensors) == set(reference.tensors)
    for name, truth in reference.tensors.items():
        off, allowed = device.tensors[name] - truth, emulated.tensors[name] - truth
        for what, size in sizes.items():
            limit = 2.0 * size(allowed) + FLOOR * size(truth)
            assert size(off) <= limit, f"{name}: {what} of the difference {size(off):.3g}, limit {limit:.3g}"


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def largest(values: Tensor) -> float:
    return float(values.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trajectory_agrees_with_the_emulation_and_the_reference(name: str) -> None:
    """Two batches: every energy of every step, all errors, displacements, gradients, and the new weights."""
    net = NETWORKS[name]
    assert_parity(net, run("tenstorrent", net), run("emulated", net), run("reference", net))


@pytest.mark.one_chip
@pytest.mark.parametrize(
    "learning",
    [SGD(0.1, momentum=0.9, weight_decay=0.01), Adam(0.01, weight_decay=0.1)],
    ids=["momentum", "adam"],
)
def test_learning_rules_agree(learning: Learning) -> None:
    net = chain(40, [Dense(32, "tanh", activate="input"), Dense(10)])
    inference = Inference(3, 0.1)
    runs = [run(backend, net, 3, learning, inference) for backend in ("tenstorrent", "emulated", "reference")]
    assert_parity(net, *runs)


@pytest.mark.one_chip
@pytest.mark.parametrize("network", ["tanh at the input", "gelu at the output"])
@pytest.mark.parametrize("name", ["fixed", "exact", "zil", "ipc", "epc", "gauss-seidel", "boosted"])
def test_variants_agree(name: str, network: str) -> None:
    """Two batches of 5 steps; with `ipc` of 10 learning steps, whose errors feed the next ones."""
    net, inference = NETWORKS[network], variant(name, Inference(5, 0.1))
    runs = [run(backend, net, 2, None, inference) for backend in ("tenstorrent", "emulated", "reference")]
    assert_parity(net, *runs)


# --- planted faults -----------------------------------------------------------------------------------------


def transposed(i: Instruction) -> Instruction:
    """Feedback through W instead of W'."""
    if i.op != "matmul" or not i.inputs[1].buffer.startswith("transposed@"):
        return i
    weight = i.inputs[1]
    return replace(
        i,
        inputs=(i.inputs[0], Slot(weight.buffer.replace("transposed", "operand"), weight.start, weight.stop)),
    )


def shifted(i: Instruction) -> Instruction:
    """Nodes descend the error of the node above instead of their own."""
    if i.op != "binary" or not i.out[0].buffer.startswith("step@"):
        return i
    feedback, error = i.inputs
    return replace(i, inputs=(feedback, Slot(error.buffer, error.start + 1, error.stop + 1)))


def stale(i: Instruction) -> Instruction | None:
    """Errors are not computed anew after a step."""
    return None if computes_errors(i) else i


def computes_errors(i: Instruction) -> bool:
    to, *sources = (slot.buffer.partition("@")[0] for slot in (*i.out, *i.inputs))
    return i.op == "binary" and to == "error" and sources[1:] == ["product"]


FAULTS: dict[str, Callable[[Instruction], Instruction | None]] = {
    "transposed weights": transposed,
    "one layer off": shifted,
    "stale errors": stale,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETWORKS["tanh at the input"]
    honest, changed = Tenstorrent.bind, []

    def bind(self: Tenstorrent, code: Any, buffers: Any, scalars: Any) -> Any:
        code = list(code)
        faulty = [FAULTS[name](i) for i in code]
        changed.extend(i for i, other in zip(code, faulty, strict=True) if i != other)
        return honest(self, [i for i in faulty if i is not None], buffers, scalars)

    emulated, reference = run("emulated", net), run("reference", net)
    monkeypatch.setattr(Tenstorrent, "bind", bind)
    wrong = run("tenstorrent", net)
    assert changed, "the fault has found nothing to change"
    with pytest.raises(AssertionError, match="of the difference"):
        assert_parity(net, wrong, emulated, reference)


# --- what a batch may do to the device ----------------------------------------------------------------------


def engine_after(num_batches: int, net: Network, num_steps: int = 5) -> tuple[Engine, dict[str, Tensor]]:
    engine = Engine(
        net,
        init(net, 0),
        Inference(num_steps, 0.1),
        ("input", net.output),
        learning=SGD(0.1),
        backend="tenstorrent",
    )
    given = batch(net, 0)
    for number in range(num_batches):
        engine.relax(given)
        engine.learn(0.1, number + 1)
    return engine, given


def test_nothing_is_compiled_after_the_first_batch(device: Any) -> None:
    """Neither for another learning rate nor for fewer samples."""
    engine, given = engine_after(1, NETWORKS["tanh at the input"])
    known = device.num_program_cache_entries()
    engine.relax({name: values[:7] for name, values in given.items()})
    engine.learn(0.037, 2)
    engine.relax(given)
    engine.learn(0.5, 3)
    assert device.num_program_cache_entries() == known


def test_inference_allocates_nothing_and_learning_only_l1(device: Any) -> None:
    """Between the writing of the batch and the end of the learning step no tensor is made in DRAM and nothing
    goes to the host or comes from it.
    """
    import ttnn

    engine, _ = engine_after(1, NETWORKS["tanh at the input"])
    prepared = engine._batch
    assert prepared is not None

    def captured(run_it: Callable[[], None]) -> list[dict[str, Any]]:
        ttnn.graph.begin_graph_capture(ttnn.graph.RunMode.NORMAL)
        try:
            run_it()
        finally:
            graph = ttnn.graph.end_graph_capture()
        return graph

    inside = [call for step in prepared.steps for call in step.calls]  # type: ignore[attr-defined]
    steps = captured(lambda: [call() for call in inside] and None)
    assert any(node["node_type"] == "function_start" for node in steps), "nothing was captured"
    assert not [node for node in steps if node["node_type"] == "buffer_allocate"]

    sections = (prepared.initialise, prepared.measure_initial, *prepared.steps, prepared.finish)
    sections = (*sections, prepared.measure, prepared.gradients, engine._update)
    whole = captured(lambda: [call() for section in sections for call in section.calls] and None)  # type: ignore[attr-defined]
    made = [node["params"] for node in whole if node["node_type"] == "buffer_allocate"]
    assert made, "the transposes of a learning step allocate their outputs"
    assert {params["type"] for params in made} == {"L1"}
    names = {node["params"].get("name", "") for node in whole if node["node_type"] == "function_start"}
    assert not [name for name in names if "host" in name.lower() or "to_torch" in name.lower()], names


@pytest.mark.fast_dispatch
def test_traces_and_the_second_queue_change_no_bit() -> None:
    """Five batches: eager, replayed from traces, and replayed with each batch sent ahead."""
    net = NETWORKS["tanh at the input"]

    def trained(traces: bool, ahead: bool) -> Weights:
        engine = Engine(
            net,
            init(net, 0),
            Inference(5, 0.1),
            ("input", net.output),
            learning=Adam(0.01),
            backend="tenstorrent",
        )
        assert isinstance(engine.backend, Tenstorrent)
        assert engine.backend.traces, "fast dispatch, but no traces"
        engine.backend.traces = traces
        batches = [batch(net, seed) for seed in range(5)]
        for number, given in enumerate(batches):
            following = batches[number + 1] if ahead and number + 1 < len(batches) else None
            engine.relax(given, upcoming=following)
            engine.learn(0.01 / (number + 1), number + 1)
        return engine.weights()

    eager = trained(traces=False, ahead=False)
    for ahead in (False, True):
        replayed = trained(traces=True, ahead=ahead)
        for name, tree in eager.items():
            for key, values in tree.items():
                assert torch.equal(replayed[name][key], values), f"{key} of {name}, sent ahead: {ahead}"
