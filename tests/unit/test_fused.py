"""The instructions of the fused kernel compute what the program says, on any number of cores.

They are carried out in torch (`pctt/backends/fused_emulated.py`), which needs no card; tests/device does so
with the kernels. Oracle: the reference in fp64, within twice the distance of the emulation that runs the
card operations one by one, plus one unit in the last place of bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pctt import SGD, Adam, AdamW, Dense, Inference, Trainer, chain, graph, infer, init, load, variant
from pctt.backends.fused_chain import NUM_REGISTERS, Chain
from pctt.backends.fused_cores import Cores, evenly
from pctt.backends.fused_emulated import from_tiles, to_tiles
from pctt.backends.fused_plan import FusedPlan
from pctt.backends.fused_stream import Ref
from pctt.energies import Gaussian
from pctt.engine import Engine
from pctt.learning import Learning
from pctt.network import Network

FLOOR = 2.0**-9
BATCH = 29  # not a multiple of 32: three rows of padding

NETWORKS = {
    "at the input": chain(40, [*[Dense(64, "tanh", activate="input")] * 3, Dense(10)]),
    "at the output": chain(40, [Dense(96, "tanh"), Dense(33, "sigmoid"), Dense(10)]),
    "gelu and silu": chain(
        70, [Dense(64, "gelu", activate="input"), Dense(64, "silu", bias=False), Dense(20, "gelu")]
    ),
    "precisions": chain(
        40, [Dense(64, "tanh", energy=Gaussian(tuple(0.5 + 0.02 * i for i in range(64)))), Dense(10)]
    ),
}
VARIANTS: dict[str, tuple[Inference, Learning]] = {
    "pc": (Inference(6, 0.1), SGD(0.1, momentum=0.9, weight_decay=0.01)),
    "fixed": (Inference(5, 0.5, prediction="fixed"), SGD(0.1)),
    "ipc": (variant("ipc", Inference(5, 0.1)), SGD(0.05)),
    "epc": (variant("epc", Inference(5, 0.1)), SGD(0.1)),
    "zil": (variant("zil", Inference(4, 0.1)), SGD(0.1)),
    "gauss-seidel": (Inference(5, 0.1, sweep="gauss_seidel"), SGD(0.1)),
    "momentum": (Inference(5, 0.1, dynamics="momentum"), SGD(0.1)),
    "adam": (Inference(5, 0.1), Adam(0.01)),
    "adamw": (Inference(5, 0.1), AdamW(0.01, weight_decay=0.1)),
}
CASES = [
    *[(network, "pc") for network in NETWORKS],
    *[("at the output", name) for name in VARIANTS],
    ("at the input", "ipc"),
    ("at the input", "epc"),
]


@cache
def after_two_batches(network: str, name: str, backend: str, cores: int | None = None) -> dict[str, Tensor]:
    """What an engine holds after two training steps. cores: of each layer, None for the backend itself."""
    net, (inference, learning) = NETWORKS[network], VARIANTS[name]
    dtype = torch.float64 if backend == "reference" else torch.float32
    weights = {k: {key: v.to(dtype) for key, v in tree.items()} for k, tree in init(net, seed=0).items()}
    engine = Engine(
        net,
        weights,
        inference,
        ("input", net.output),
        learning=learning,
        backend=backend,
        fused=cores is not None,
        cores_per_layer=cores,
    )
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for step in (1, 2):
        inputs = torch.rand(BATCH, net.input, generator=generator).to(dtype)
        targets = 0.5 * torch.randn(BATCH, net.widths[-1], generator=generator).to(dtype)
        engine.set_learning(0.1, step)
        relaxation = engine.relax({"input": inputs, net.output: targets})
        engine.learn(0.1, step)
        found[f"energies {step}"] = torch.tensor(relaxation.energies, dtype=torch.float64)
        for node in net.names:
            found[f"activity {node} {step}"] = engine.read_activity(node).double()
            found[f"error {node} {step}"] = engine.read_error(node).double()
    for layer, tree in engine.weights().items():
        for key, values in tree.items():
            found[f"change of {layer}.{key}"] = values.double() - weights[layer][key].double()
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize(("network", "name"), CASES)
def test_fused_training_agrees_with_the_reference_as_single_operations_do(
    network: str, name: str, cores: int
) -> None:
    expected = after_two_batches(network, name, "reference")
    single = after_two_batches(network, name, "emulated")
    fused = after_two_batches(network, name, "emulated", cores)
    for key, values in expected.items():
        limit = 2.0 * distance(single[key], values) + FLOOR
        assert distance(fused[key], values) <= limit, key


def engine_for(net: Network, **options: object) -> Engine:
    return Engine(
        net,
        init(net, seed=0),
        Inference(5, 0.1),
        ("input", net.output),
        learning=SGD(0.1),
        backend="emulated",
        fused=True,
        **options,  # type: ignore[arg-type]
    )


def batch_for(net: Network, size: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    targets = torch.rand(size, net.widths[-1], generator=generator)
    return {"input": torch.rand(size, net.input, generator=generator), net.output: targets}


def planned(engine: Engine) -> FusedPlan:
    assert isinstance(engine.backend, FusedPlan)
    return engine.backend


@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_a_training_step_is_one_launch_however_many_inference_steps_it_has(num_steps: int) -> None:
    net = NETWORKS["at the input"]
    engine = Engine(
        net,
        init(net, seed=0),
        Inference(num_steps, 0.1),
        ("input", net.output),
        learning=SGD(0.1),
        backend="emulated",
        fused=True,
    )
    before = planned(engine).launches
    engine.set_learning(0.1, 1)
    engine.relax(batch_for(net), learn=True)
    assert planned(engine).launches == before + 1


def test_relaxing_and_learning_in_one_launch_equals_doing_so_in_two() -> None:
    net = NETWORKS["at the output"]
    once, twice = engine_for(net), engine_for(net)
    once.set_learning(0.1, 1)
    once.relax(batch_for(net), learn=True)
    twice.relax(batch_for(net))
    twice.learn(0.1, 1)
    for layer, tree in once.weights().items():
        for key, values in tree.items():
            assert torch.equal(values, twice.weights()[layer][key]), (layer, key)


def test_a_larger_batch_later_is_planned_anew_with_the_weights_of_before() -> None:
    net = NETWORKS["at the input"]
    grown, whole = engine_for(net, batch_size=32), engine_for(net, batch_size=70)
    for engine in (grown, whole):
        engine.relax(batch_for(net))
        engine.learn(0.1, 1)
        engine.relax(batch_for(net, 70))
        engine.learn(0.1, 2)
    for layer, tree in grown.weights().items():
        assert torch.equal(tree["weight"], whole.weights()[layer]["weight"]), layer


# --- which cores, how much memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", range(1, 30))
@pytest.mark.parametrize("most", [1, 2, 3, 4, 7])
def test_every_core_of_a_layer_has_a_share(tiles: int, most: int) -> None:
    number = evenly(tiles, most)
    share = math.ceil(tiles / number)
    assert 1 <= number <= most
    assert (number - 1) * share < tiles <= number * share


def test_cores_follow_each_other_without_gaps() -> None:
    cores = Cores((2, 1, 4))
    assert [core for node in range(3) for core in cores.of(node)] == list(range(cores.total))


def test_layers_get_more_cores_where_one_has_not_the_memory() -> None:
    net = chain(784, [Dense(256, "tanh"), Dense(256, "tanh"), Dense(10)])
    engine = Engine(
        net,
        init(net),
        Inference(5, 0.1),
        ("input", net.output),
        learning=Adam(1e-3),
        backend="emulated",
        fused=True,
        batch_size=64,
    )
    backend = planned(engine)
    assert max(backend.cores.slices) > 1
    assert backend.bytes_per_core() <= backend.chip.l1_bytes


def test_every_task_finds_its_tensors_on_its_core() -> None:
    """Also what a move writes on another core; else an address would be of something else."""
    backend = planned(engine_for(NETWORKS["gelu and silu"], cores_per_layer=2))
    held = {
        **{b.name: backend.cores.held_by(b) for b in backend.tasks.buffers.values()},
        **{b.name: backend.cores.held_by(b) for b in backend.tasks.working.values()},
    }
    for section in backend.tasks.sections:
        for task in section:
            for word in task.words:
                assert not isinstance(word, Ref) or task.core in held[word.tensor], task.name
            for move in task.moves:
                assert task.core in held[move.source.tensor] and move.core in held[move.target.tensor]


# --- chains -------------------------------------------------------------------------------------------------


def test_a_value_between_two_operations_is_rounded_where_it_would_have_been_stored_in_bfloat16() -> None:
    chain_ = Chain()
    chain_.store("a", chain_.load(Ref("x"), bfloat16=False), bfloat16=True)
    value = chain_.read("a", bfloat16=True)
    assert value is not None and chain_.values[value].kind == "ROUND"
    assert chain_.read("a", bfloat16=True) == value  # once


def test_a_chain_with_too_many_values_at_once_has_no_links() -> None:
    chain_ = Chain()
    values = [chain_.load(Ref(f"x{i}"), False) for i in range(NUM_REGISTERS + 1)]
    for i, value in enumerate(values):
        chain_.store(f"y{i}", value, False)
    assert chain_.links() is None


def test_what_nobody_reads_is_not_computed() -> None:
    chain_ = Chain()
    a = chain_.load(Ref("a"), False)
    chain_.store("unread", chain_.add("TANH", a), False)
    chain_.store("read", chain_.add("SQUARE", a), False)
    links = chain_.without({"unread"}).links()
    assert links is not None
    assert [kind for kind, _ in links] == ["LOAD", "SQUARE", "KEEP", "STORE"]


def test_all_elementwise_work_of_an_inference_step_is_two_chains_per_layer() -> None:
    """One from the feedback to the change that is sent up, one from the product to the error."""
    engine = engine_for(NETWORKS["at the input"])
    backend = planned(engine)
    step = backend.tasks.sections[backend.codes[engine.program.steps[0]]]
    hidden = backend.cores.of(2)[0]
    assert [task.code for task in step if task.core == hidden] == [
        "PRODUCT",
        "ELEMENTWISE",
        "PRODUCT",
        "ELEMENTWISE",
    ]


def test_tiles_are_four_faces_row_by_row() -> None:
    values = torch.arange(64.0 * 96).view(64, 96)
    tiles = to_tiles(values)
    assert torch.equal(tiles[:16], values[0, :16])
    assert torch.equal(tiles[256:272], values[0, 16:32])
    assert torch.equal(tiles[512:528], values[16, :16])
    assert torch.equal(tiles[1024:1040], values[0, 32:48])
    assert torch.equal(from_tiles(tiles, 3), values)


# --- what users call ----------------------------------------------------------------------------------------


def test_inference_is_that_of_the_reference() -> None:
    net = NETWORKS["at the output"]
    weights, clamp = init(net, seed=0), batch_for(net)
    fused = infer(net, weights, clamp, Inference(6, 0.1), backend="emulated", fused=True)
    plain = infer(net, weights, clamp, Inference(6, 0.1))
    assert torch.allclose(fused.energy, plain.energy, rtol=5e-3)


def test_a_run_goes_on_with_and_without_the_kernel(tmp_path: Path) -> None:
    net = chain(8, [Dense(32, "tanh"), Dense(4)])
    data = torch.rand(96, 8), torch.randint(0, 4, (96,))
    trainer = Trainer(net, Inference(4, 0.1), Adam(0.01), batch_size=32, backend="emulated", fused=True)
    trainer.fit(data, epochs=1)
    trainer.save(tmp_path)
    for fused in (True, False):
        again = load(tmp_path, backend="emulated", fused=fused)
        assert again.fit(data, epochs=2).status.ok
        assert again.progress.step == 6


def test_divergence_is_told_after_the_weights_have_moved() -> None:
    net = chain(8, [Dense(32, "tanh"), Dense(32, "tanh"), Dense(4)])
    trainer = Trainer(net, Inference(4, 0.1), SGD(0.1), batch_size=32, backend="emulated", fused=True)
    targets = torch.zeros(96, 4)
    targets[64:] = 1e30  # of the last batch, which is not one whose trajectory is recorded
    unshuffled = torch.arange(96)
    trainer._order = lambda *_: unshuffled  # type: ignore[method-assign]
    result = trainer.fit((torch.rand(96, 8), targets), epochs=1)
    assert not result.status.ok
    assert "the weights have moved with it" in result.message


def refusals() -> dict[str, tuple[Callable[[], object], str]]:
    net = NETWORKS["at the input"]
    wide = chain(784, [Dense(2048, "tanh"), Dense(2048, "tanh"), Dense(10)])
    deep = chain(32, [Dense(32, "tanh")] * 70)
    incremental = variant("ipc", Inference(4, 0.1))
    wired = graph({"input": 8}, {"y": (Dense(4), "input")})
    return {
        "the reference": (
            lambda: Engine(net, init(net), Inference(), ("input", net.output), fused=True),
            "use backend='tenstorrent' or 'emulated'",
        ),
        "memory": (lambda: engine_for(wide, cores_per_layer=1), "does not fit the fused kernel"),
        "cores": (lambda: engine_for(deep), "71 nodes with a core each take 71 cores"),
        "no cores": (lambda: engine_for(net, cores_per_layer=0), "cores_per_layer"),
        "a graph": (lambda: engine_for(wired), "this network is a graph"),
        "cores without the kernel": (
            lambda: Engine(net, init(net), Inference(), ("input",), backend="emulated", cores_per_layer=2),
            "add fused=True",
        ),
        "Adam at every step": (
            lambda: Engine(
                net,
                init(net),
                incremental,
                ("input", net.output),
                learning=Adam(),
                backend="emulated",
                fused=True,
            ).relax(batch_for(net)),
            "use SGD",
        ),
    }


@pytest.mark.parametrize("what", refusals())
def test_what_the_kernel_cannot_do_is_refused_with_the_way_out(what: str) -> None:
    call, message = refusals()[what]
    with pytest.raises(ValueError, match=message):
        call()
