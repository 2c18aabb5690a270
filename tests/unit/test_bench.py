"""`pctt bench` counts right, asks everyone the same, and says so when a contender is not what it should be.

How long anything takes is nobody's business here. The numbers that contenders are held to are compared with
predictive coding written down in NumPy (`tests/bench_numpy.py`).
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import bench_numpy
import numpy as np
import pytest
import torch

from pctt.bench import command as command_module
from pctt.bench import measuring, work
from pctt.bench.command import bench as command
from pctt.bench.measuring import bench_case, bench_variants
from pctt.bench.peers import PEERS, Answer, Contender, PeerFailed, Round, Worker, peer_contenders
from pctt.bench.sameness import Measure
from pctt.bench.work import CASES, GEMM, SMOKE, Case, Settings
from pctt.bench.workers import serve
from pctt.typed import FAILED, OK, UsageError
from pctt.variants import VARIANTS

TESTS = Path(__file__).resolve().parents[1]
WORKERS = Path(serve.__file__).parent
SETTINGS = Settings(num_steps=4, rounds=3, seconds=0.01, threads=1, limit=60.0)
SMALL = Case((12, 8, 8, 4), 8)


# --- the work -----------------------------------------------------------------------------------------------


def hand_count(widths: tuple[int, ...], batch_size: int, num_steps: int) -> int:
    """FLOPs of the products of a training step: sweep, gradients, T x (prediction, feedback) of layers 2..L.

    From a feedforward start the error reaches node l at step L - l: step t needs feedback and prediction of
    the last t layers, layer 2 at the earliest.
    """
    layers = [2 * batch_size * fan_in * fan_out for fan_in, fan_out in pairwise(widths)]
    steps = [2 * sum(layers[max(1, len(layers) - t) :]) for t in range(1, num_steps + 1)]
    return 2 * sum(layers) + sum(steps)


@pytest.mark.parametrize("case", [case for case in CASES if case.algorithm == "pc"])
def test_products_are_those_counted_by_hand(case: Case) -> None:
    """A floor of too many products would flatter us."""
    assert work.flops(case, "pc", Settings()) == hand_count(case.widths, case.batch_size, 20)


def test_products_of_backpropagation_and_of_variants_are_those_counted_by_hand() -> None:
    """Backpropagation: forward, weight gradients, and errors back through all layers but the first.

    A pair takes everything twice. Weights that move at every step take a gradient and a sweep of all layers
    then: 784-256-256-10, T=20, sweeps and gradients of all layers 1 + 1 and 20 + 21, feedback of 2 and 3.
    """
    case, first, others = CASES[0], 784 * 256, 256 * 256 + 256 * 10
    assert work.flops(case, "backprop", Settings()) == 128 * (2 * first + 3 * others)
    plain = work.flops(case, "pc", Settings())
    assert work.flops(case, "nudge+-", Settings()) == 2 * plain
    assert work.flops(case, "ipc", Settings()) == 128 * (41 * first + 61 * others)


def test_names_shorten_three_equal_widths_and_more() -> None:
    assert [case.network for case in CASES[1:3]] == ["784-256-256-10", "784-128x9-10"]


def message(case: Case, algorithm: str | None = None) -> dict[str, Any]:
    """A work as an adapter gets it."""
    algorithm = algorithm or case.algorithm
    given = work.message(case, work.problem(case), SETTINGS, algorithm, work.RATES[algorithm], "cpu")
    return serve.arrays_of(given)


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Adapters of our own, imported as a worker imports them."""
    monkeypatch.syspath_prepend(str(WORKERS))
    return lambda name: importlib.import_module(f"with_{name}")


@pytest.mark.parametrize("case", CASES[:3])
def test_an_engine_holds_no_more_than_twice_what_nobody_can_do_without(
    case: Case, adapters: Callable[[str], Any]
) -> None:
    """The bound the project set itself."""
    made = adapters("pctt").prepare(message(case))
    made.run()
    assert made.about()["bytes"] <= 2 * work.bytes_needed(case)


def test_backpropagation_is_the_chain_rule_and_adam(adapters: Callable[[str], Any]) -> None:
    """Float32 with a handful of roundings per weight of size up to 1: 1e-6 is 8 units in the last place; the
    step itself is 1e-3.
    """
    given = message(SMALL, "backprop")
    made = adapters("torch").prepare(given)
    made.run()
    for layer, expected in zip(made.look()[1], bench_numpy.backprop_step(given), strict=True):
        for found, wanted in zip(layer, expected, strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pctt", "torch"])
def test_on_a_device_that_works_by_itself_every_batch_is_awaited(
    name: str, adapters: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a GPU's figure would be the time of its launches. A stand-in: the CPU counts as such a
    device, and what waits for it is counted.
    """
    awaited = list[torch.device]()
    monkeypatch.setattr(torch.cuda, "synchronize", awaited.append)
    adapter = adapters(name)
    adapter.prepare(message(SMALL, "pc" if name == "pctt" else "backprop")).run()
    assert not awaited
    monkeypatch.setattr(adapters("torch"), "WORK_BY_THEMSELVES", ("cpu",))
    made = adapter.prepare(message(SMALL, "pc" if name == "pctt" else "backprop"))
    assert len(serve.timed(made.run, 0.0, least=5)) == len(awaited) == 5


def test_what_a_device_has_begun_is_within_the_time_of_its_batch() -> None:
    """The stand-in keeps a queue: its work costs time when it is awaited, not when it is launched."""
    now, waiting = [0.0], list[float]()
    sys.path.insert(0, str(WORKERS))
    try:
        torch_adapter = importlib.import_module("with_torch")
    finally:
        sys.path.remove(str(WORKERS))

    def synchronise(_: torch.device) -> None:
        now[0] += sum(waiting)
        waiting.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", synchronise)
        run = torch_adapter.awaited(lambda: waiting.append(0.007), torch.device("cuda:0"))
        samples = serve.timed(run, 0.0, least=3, clock=lambda: now[0])
    assert samples == pytest.approx([7.0] * 3)


# --- the same work ------------------------------------------------------------------------------------------


def numbers(case: Case, activate: str = "output", fault: str = "") -> tuple[list[Any], list[Any]]:
    net = bench_numpy.Network(message(case), activate, fault)
    net.train()
    activities, weights = net.look()
    return [torch.from_numpy(each) for each in activities], [
        [torch.from_numpy(each) for each in layer] for layer in weights
    ]


@pytest.mark.parametrize("activate", ["output", "input"])
@pytest.mark.parametrize("case", [*SMOKE, Case((20, *[16] * 3, 3), 5)])
def test_predictive_coding_in_numpy_does_the_same_work(case: Case, activate: str) -> None:
    measure = Measure(case, work.problem(case), SETTINGS)
    assert measure.compare(*numbers(case, activate), activate).ok


@pytest.mark.parametrize("fault", bench_numpy.FAULTS)
@pytest.mark.parametrize("case", SMOKE)
def test_a_planted_fault_is_other_work(case: Case, fault: str) -> None:
    """A peer that did less would look fast."""
    if case.algorithm == "ipc" and fault == "last weights from old errors":
        pytest.skip("incremental predictive coding has no last weights")
    measure = Measure(case, work.problem(case), SETTINGS)
    activate = "input" if fault == "tanh on the other side" else "output"
    same = measure.compare(*numbers(case, activate, fault))
    assert not same.ok and "too far" in str(same)


def test_numbers_that_are_none_or_of_another_shape_are_not_the_same() -> None:
    measure = Measure(SMALL, work.problem(SMALL), SETTINGS)
    activities, weights = numbers(SMALL)
    with pytest.raises(ValueError, match="shapes"):
        measure.compare(activities[:1], weights)
    with pytest.raises(ValueError, match="shapes"):
        measure.compare(activities, [[weight.T, bias] for weight, bias in weights])
    activities[0][0, 0] = float("nan")
    assert not measure.compare(activities, weights).ok


# --- rounds -------------------------------------------------------------------------------------------------


class Scripted:
    """A worker whose times are known; `said` is what it was asked, of all of them in order."""

    times: dict[str, list[float]]
    said: list[str]

    def __init__(self, contender: Contender, threads: int, limit: float) -> None:
        self.contender, self.runtime, self.round = contender, {"python": "3"}, 0
        self.is_closed = False

    def start(self) -> None:
        pass

    def prepare(self, key: str, given: dict[str, Any]) -> Answer:
        if self.contender.adapter == "torch":
            return Answer(0.5, None, None, {})
        activities, weights = numbers(SMALL)
        return Answer(0.5, activities, weights, {"bytes": 10_000, "num_steps": 4})

    def run(self, key: str, seconds: float) -> Round:
        self.said.append(self.contender.name)
        time = self.times[self.contender.name][self.round]
        self.round += 1
        if time < 0:
            raise PeerFailed(f"{self.contender.name}: fell over.")
        return Round([time - 1.0, time, time + 5.0], 3.0 * time, 250_000_000)

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    Scripted.said = []
    Scripted.times = {
        "pctt": [6.0, 12.0, 8.0],
        "torch backprop": [3.0, 3.0, 3.0],
        GEMM: [2.0, 4.0, 3.0],
        "fabricpc": [12.0, 12.0, 40.0],
    }
    monkeypatch.setattr(measuring, "Worker", Scripted)
    return Scripted


def peers_named(*names: str, asked: bool = True) -> list[Contender]:
    return peer_contenders({name: "python" for name in names}, names if asked else (), "pc")


def test_figures_floor_and_ratios_are_those_worked_out_by_hand(scripted: type[Scripted]) -> None:
    """The median product takes 3 ms, so 2 x 1024^3 FLOP in 3 ms are 715.8 GFLOP/s, and the floor of 12-8-8-4
    is its FLOP at that rate. fabricpc takes 2, 1 and 5 times as long as pctt in the three rounds: 2.
    """
    result, failures = bench_case(SMALL, SETTINGS, peers_named("fabricpc"))
    ours, backprop, fabricpc = result.lines
    flop = hand_count(SMALL.widths, 8, 4)
    assert not failures
    assert result.gemm_gflops == pytest.approx(2 * 1024**3 / 3e-3 / 1e9)
    assert ours.ms == 8.0 and ours.rounds == (6.0, 12.0, 8.0) and ours.over_pctt == 1.0
    assert ours.floor == pytest.approx(1e3 * flop / (2 * 1024**3 / 3e-3))
    assert ours.to_dict()["over_floor"] == pytest.approx(8.0 / ours.floor)
    assert backprop.mflop == pytest.approx(16 * (2 * 96 + 3 * (64 + 32)) / 1e6)
    assert fabricpc.ms == 12.0 and fabricpc.over_pctt == pytest.approx(2.0)
    assert ours.cpu_floor == pytest.approx(3 * ours.floor)
    assert ours.to_dict()["cpu_over_floor"] == pytest.approx(24.0 / (3 * ours.floor))
    assert fabricpc.cpu_ms == 36.0 and fabricpc.cpu_over_pctt == pytest.approx(2.0)
    assert result.bytes_over_needed == pytest.approx(10_000 / work.bytes_needed(SMALL))
    assert [line.work for line in result.lines] == ["same", "backprop", "same"]


def test_contenders_take_turns_and_each_round_begins_with_another(scripted: type[Scripted]) -> None:
    bench_case(SMALL, SETTINGS, peers_named("fabricpc"))
    names = ["pctt", "torch backprop", GEMM, "fabricpc"]
    assert scripted.said == names + names[1:] + names[:1] + names[2:] + names[:2]


def test_a_peer_that_falls_over_half_way_leaves_the_others_their_rounds(scripted: type[Scripted]) -> None:
    scripted.times["fabricpc"][1] = -1.0
    ticks = list[int]()
    result, failures = bench_case(SMALL, SETTINGS, peers_named("fabricpc"), tick=lambda: ticks.append(1))
    assert [failure.sentence for failure in failures] == ["fabricpc: fell over."]
    assert [line.name for line in result.lines] == ["pctt", "torch backprop"]
    assert {len(line.rounds) for line in result.lines} == {3} and len(ticks) == 3


def test_without_pctt_or_the_product_there_is_no_benchmark(scripted: type[Scripted]) -> None:
    scripted.times[GEMM][2] = -1.0
    with pytest.raises(RuntimeError, match="gemm: fell over"):
        bench_case(SMALL, SETTINGS)


def test_variants_are_measured_beside_plain_predictive_coding(scripted: type[Scripted]) -> None:
    scripted.times["pctt"] = [float(2 + n % len(VARIANTS)) for n in range(3 * len(VARIANTS))]
    lines = bench_variants(SMALL, SETTINGS)
    assert [line.variant for line in lines] == list(VARIANTS)
    assert [line.ms for line in lines] == [2.0 + n for n in range(len(VARIANTS))]
    assert [line.over_pc for line in lines] == [1.0 + n / 2 for n in range(len(VARIANTS))]


def test_tables_are_ascii_and_no_wider_than_a_page(scripted: type[Scripted]) -> None:
    scripted.times["fabricpc"] = [12345.678] * 3
    text = bench_case(SMALL, SETTINGS, peers_named("fabricpc"))[0].as_text()
    assert text.isascii() and max(map(len, text.splitlines())) <= 110
    assert all(name in text for name in ("pctt", "torch backprop", "fabricpc", "/floor"))


# --- workers ------------------------------------------------------------------------------------------------


def interpreter(folder: Path, text: str) -> str:
    """A program that is run where an interpreter with a peer is expected."""
    path = folder / f"fake{len(list(folder.iterdir()))}"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def numpy_peer(folder: Path, fault: str = "", around: str = "") -> str:
    """The real worker, with NumPy for a peer."""
    return interpreter(
        folder,
        f"""
        import sys
        sys.path[:0] = [{str(WORKERS)!r}, {str(TESTS)!r}]
        import bench_numpy, serve
        del sys.argv[1]

        class Adapter:
            RUNTIME = bench_numpy.RUNTIME
            @staticmethod
            def prepare(work):
                made, run = bench_numpy.prepare(work, {fault!r}), 0
                {around or "pass"}
                return made

        serve.load = lambda name: Adapter
        serve.check = lambda package, version: version
        serve.main()
        """,
    )


def contender(python: str, name: str = "pcx", algorithm: str = "pc") -> Contender:
    return Contender(name, name, algorithm, python, name, PEERS[name].version, asked=True)


def given(case: Case = SMALL) -> dict[str, Any]:
    return work.message(case, work.problem(case), SETTINGS, "pc", 1e-3, "cpu")


def test_a_worker_prepares_runs_and_shows_its_numbers(tmp_path: Path) -> None:
    """What a peer prints does not come between its answers."""
    python = numpy_peer(tmp_path, around="print('Training!', flush=True)")
    with Worker(contender(python), 1, 60.0) as worker:
        worker.start()
        versions = {"pcx": PEERS["pcx"].version, "python": sys.version.split()[0], "numpy": np.__version__}
        assert worker.runtime == versions
        answer = worker.prepare("a", given())
        assert answer.first_batch > 0 and answer.activities is not None and answer.weights is not None
        assert Measure(SMALL, work.problem(SMALL), SETTINGS).compare(answer.activities, answer.weights).ok
        found = worker.run("a", 0.0)
        assert len(found.milliseconds) == serve.LEAST and found.cpu > 0
        assert found.peak_bytes is not None and 1e6 < found.peak_bytes
        if sys.platform == "linux":  # of itself, not of us, who have torch
            assert found.peak_bytes < serve.peak_bytes() / 2


NEVER = "import time; time.sleep(600)"
READY = """print('{"kind": "ready", "runtime": {}}', flush=True)"""


@pytest.mark.parametrize(
    ("text", "limit", "sentence"),
    [
        ("import sys; sys.exit('no such library')", 60.0, r"ended with exit code 1 while starting: no such"),
        ("raise SystemExit(3)", 60.0, r"ended with exit code 3 while starting\."),
        (NEVER, 0.5, r"no answer within 0\.5 s while starting; it was ended"),
        ("print('Hello there')", 60.0, r"answered 'Hello there' while starting, which is no answer"),
        ("print('[1, 2]')", 60.0, r"answered '\[1, 2\]' while starting"),
        ("""print('{"kind": "samples"}')""", 60.0, r"answered 'samples' while starting, not 'ready'"),
        ("""print('{"kind": "ready", "runtime": 3}')""", 60.0, r"an answer does not fit \(AttributeError"),
        ("""print('{"kind": "failed", "sentence": "pcx is unwell."}')""", 60.0, r"^pcx: pcx is unwell\.$"),
        (f"{READY}; {NEVER}", 0.5, r"took no request within 0\.5 s while preparing; it was ended"),
        (f"{READY}; input(); {NEVER}", 0.5, r"no answer within 0\.5 s while preparing its first"),
        (f"{READY}; input(); import os; os._exit(9)", 60.0, r"exit code 9 while preparing its first"),
        (f"""{READY}; input(); print('{{"kind": "prepared"}}')""", 60.0, r"does not fit \(KeyError"),
    ],
)
def test_a_worker_that_is_not_as_it_should_be_gives_one_sentence(
    text: str, limit: float, sentence: str, tmp_path: Path
) -> None:
    """Among them one that dies, one that hangs, with and without reading, and one that prints garbage."""
    case = Case((784, 256, 256, 10), 64)  # more than a pipe holds
    with (
        pytest.raises(PeerFailed, match=sentence) as raised,
        Worker(contender(interpreter(tmp_path, text)), 1, limit) as worker,
    ):
        worker.start()
        worker.prepare("a", given(case))
    assert "\n" not in str(raised.value)
    assert worker._process.returncode is not None  # pyright: ignore[reportPrivateUsage]


def test_times_that_are_none_do_not_fit(tmp_path: Path) -> None:
    text = (
        f"""{READY}; input(); print('{{"kind": "samples", "milliseconds": [], "cpu": 1, "peak_bytes": 1}}')"""
    )
    with Worker(contender(interpreter(tmp_path, text)), 1, 60.0) as worker:
        worker.start()
        with pytest.raises(PeerFailed, match="does not fit"):
            worker.run("a", 0.0)


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"cannot run .*nowhere: No such file"):
        Worker(contender(str(tmp_path / "nowhere")), 1, 60.0)


def test_a_wrappers_own_child_is_ended_with_it(tmp_path: Path) -> None:
    """A shell script around an interpreter leaves a process that would keep the pipe open."""
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f"#!/bin/sh\n{sys.executable} -c '{NEVER}'\n", encoding="utf-8")
    wrapper.chmod(0o755)
    with Worker(contender(str(wrapper)), 1, 0.5) as worker, pytest.raises(PeerFailed, match="no answer"):
        worker.start()


def test_another_version_or_none_is_refused_with_the_command_that_installs_it() -> None:
    with pytest.raises(serve.Refused, match=rf"there is {np.__version__} in .* pip install numpy==0\.0\.1"):
        serve.check("numpy", "0.0.1")
    with pytest.raises(serve.Refused, match=r"there is none in .* pip install no-such-thing==1\.0"):
        serve.check("no-such-thing", "1.0")
    assert serve.check("numpy", np.__version__) == np.__version__


@pytest.mark.parametrize("name", PEERS)
def test_an_interpreter_without_the_peer_gives_the_command_that_installs_it(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    wanted = rf"^{name}: .* there is none in \S+; run: \S+ -m pip install {name}=={PEERS[name].version}\.$"
    with Worker(contender(sys.executable, name), 1, 60.0) as worker, pytest.raises(PeerFailed, match=wanted):
        worker.start()


@pytest.mark.parametrize("path", ["serve", *(f"with_{name}" for name in PEERS)])
def test_what_runs_in_an_interpreter_of_a_peer_imports_neither_pctt_nor_torch(path: str) -> None:
    tree = ast.parse((WORKERS / f"{path}.py").read_text(encoding="utf-8"))
    imported = set[str]()
    for entry in ast.walk(tree):
        if isinstance(entry, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in entry.names}
        elif isinstance(entry, ast.ImportFrom):
            assert entry.module is not None and not entry.level
            imported.add(entry.module.partition(".")[0])
    allowed = set(sys.stdlib_module_names) | {"numpy"}
    if path != "serve":
        allowed |= {"serve", "jax", "optax", "ngcsimlib", path.removeprefix("with_")}
    assert imported <= allowed


def test_batches_of_a_round_begin_within_its_seconds() -> None:
    """A clock that goes on by 0.3 s per batch: within 1 s begin batches at 0, 0.3, 0.6 and 0.9."""
    now = [0.0]

    def run() -> None:
        now[0] += 0.3

    assert serve.timed(run, 1.0, least=3, clock=lambda: now[0]) == pytest.approx([300.0] * 4)
    assert len(serve.timed(run, 0.0, least=3, clock=lambda: now[0])) == 3


@pytest.mark.parametrize("name", PEERS)
def test_an_installed_peer_does_the_same_work(name: str) -> None:
    """Its interpreter is given by the environment; its first batch is compiled, which takes seconds."""
    variable = f"PCTT_PEER_{name.upper()}"
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter that has {name}")
    for case in [*SMOKE, Case((20, *[16] * 3, 3), 5)]:
        for entrant in peer_contenders({name: python}, [name], case.algorithm):
            with Worker(entrant, 1, 120.0) as worker:
                worker.start()
                rate = work.RATES[case.algorithm]
                asked = work.message(
                    case, work.problem(case), SETTINGS, case.algorithm, rate, "cpu", entrant.way
                )
                answer = worker.prepare("a", asked)
                assert answer.activities is not None and answer.weights is not None
                activate = answer.about.get("activate", "output")
                measure = Measure(case, work.problem(case), SETTINGS)
                same = measure.compare(answer.activities, answer.weights, activate)
                assert same.ok, f"{entrant.name}, {case}: {same}"
                assert median(worker.run("a", 0.0).milliseconds) > 0


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_leaves_its_figures_a_picture_and_the_peers_that_failed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes of pctt and torch, a peer that does the same, one that does less, and one that dies."""
    monkeypatch.setattr(command_module, "SMOKE", SMOKE[:1])
    fakes = place / "fakes"
    fakes.mkdir()
    peers = (
        f"pcx={numpy_peer(fakes)}",
        f"ngclearn={numpy_peer(fakes, 'one step too few')}",
        f"fabricpc={interpreter(fakes, 'import sys; sys.exit(4)')}",
    )
    assert command(peer=peers, smoke=True, threads=1, out=place / "here", json=True) == FAILED
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["kind"] == "bench" and Path(found["folder"]) == place / "here"
    written = json.loads((place / "here" / "bench.json").read_text(encoding="utf-8"))
    assert {**written, "kind": "bench", "folder": found["folder"]} == found
    (case,) = found["cases"]
    works = {line["name"]: line["work"] for line in case["lines"]}
    assert works == {
        "pctt": "same",
        "torch backprop": "backprop",
        "pcx": "same",
        "pcx scan": "same",
        "ngclearn": "other work",
    }
    assert [(each["peer"], each["asked"]) for each in found["failed"]] == [
        ("ngclearn", True),
        ("fabricpc", True),
    ]
    assert "fabricpc: its process ended with exit code 4 while starting." in printed.err
    assert "ngclearn: does not do the same work: activities " in printed.err
    assert len(case["gemm_rounds"]) == len(case["lines"][0]["rounds"]) == 1
    assert case["lines"][0]["same"]["activities"] <= 1 and case["lines"][0]["peak_bytes"] > 1e6
    ElementTree.parse(place / "here" / "bench.svg")
    assert sorted(path.name for path in place.iterdir()) == ["fakes", "here"]


@pytest.fixture
def stubbed(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch, place: Path) -> Path:
    """Commands without processes."""
    monkeypatch.setattr(command_module, "SMOKE", SMOKE[:1])
    monkeypatch.setattr(command_module, "installed_peers", dict)
    scripted.times = {name: times * 20 for name, times in scripted.times.items()}
    return place


def test_as_text_it_prints_tables_and_where_the_files_are(
    stubbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(smoke=True, variants=True) == OK
    printed = capsys.readouterr()
    assert "12-8-8-4, B=8, pc: " in printed.out and "12-8-8-4, B=8, pc: variants, run in turn" in printed.out
    assert printed.out.endswith("runs/bench-1: bench.json, bench.svg\n") and not printed.err
    assert max(map(len, printed.out.splitlines())) <= 110
    assert (stubbed / "runs" / "bench-1" / "bench.svg").is_file()


def test_a_peer_that_was_found_and_not_asked_for_may_fail(
    stubbed: Path, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "installed_peers", lambda: {"fabricpc": sys.executable})
    scripted.times["fabricpc"] = [-1.0]
    assert command(smoke=True, out=Path("a")) == OK
    assert command(smoke=True, out=Path("b"), peer=("fabricpc=python",)) == FAILED
    assert command(smoke=True, out=Path("c"), alone=True) == OK
    failed = [json.loads(Path(name, "bench.json").read_text())["failed"] for name in "abc"]
    assert [len(each) for each in failed] == [1, 1, 0] and failed[1][0]["asked"]


def test_a_home_folder_is_found_behind_the_name_of_a_peer(
    stubbed: Path, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(stubbed))
    seen = list[str]()
    begin = scripted.__init__

    def init(self: Scripted, contender: Contender, threads: int, limit: float) -> None:
        seen.append(contender.interpreter)
        begin(self, contender, threads, limit)

    monkeypatch.setattr(scripted, "__init__", init)
    assert command(smoke=True, peer=("fabricpc=~/python",)) == OK
    assert seen[-1] == str(stubbed / "python") and set(seen[:-1]) == {sys.executable}


def test_where_torch_sees_a_gpu_there_is_a_section_for_it_without_peers(
    stubbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its floor is from a larger product on that device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Imaginary {device}")
    assert command(smoke=True, peer=("fabricpc=python",), out=Path("a")) == OK
    assert "Imaginary cuda; " in capsys.readouterr().out
    assert command(smoke=True, out=Path("b"), device="cuda:1") == OK
    assert command(smoke=True, out=Path("c"), device="cpu") == OK
    cases = [json.loads(Path(name, "bench.json").read_text())["cases"] for name in "abc"]
    assert [[case["device"] for case in each] for each in cases] == [
        ["cpu", "cuda"],
        ["cpu", "cuda:1"],
        ["cpu"],
    ]
    assert [len(case["lines"]) for case in cases[0]] == [3, 2]
    assert cases[0][0]["lines"][0]["cpu_over_floor"] > 0 and cases[0][1]["lines"][0]["cpu_over_floor"] is None
    assert cases[0][1]["gemm_gflops"] == pytest.approx(64 * cases[0][0]["gemm_gflops"])
    with pytest.raises(UsageError, match="torch sees no device 'cuda:2'"):
        command(device="cuda:2")


@pytest.mark.parametrize(
    ("sentence", "options"),
    [
        ("--peer takes NAME=PYTHON, NAME one of pcx, fabricpc, ngclearn .*'jpc=x'", {"peer": ("jpc=x",)}),
        ("--peer takes NAME=PYTHON", {"peer": ("pcx",)}),
        ("--alone runs no peers", {"peer": ("pcx=x",), "alone": True}),
        ("--rounds must be at least 1, got 0", {"rounds": 0}),
        ("--steps must be at least 1, got -1", {"steps": -1}),
        ("--steps must be at least 3, the layers of the deepest network, got 2", {"steps": 2}),
        ("--threads must be at least 1", {"threads": 0}),
        ("--threads must be at most", {"threads": 100_000}),
        ("--seconds must be above 0", {"seconds": 0.0}),
        ("--limit must be above 0, got nan", {"limit": float("nan")}),
        ("--device must be cpu, cuda or cuda:N, got 'tpu'", {"device": "tpu"}),
        ("--device must be cpu, cuda or cuda:N, got 'mps'", {"device": "mps"}),
        ("torch sees no device 'cuda'", {"device": "cuda"}),
        ("exists already; choose another --out", {"out": Path("full")}),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    sentence: str, options: dict[str, Any], stubbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (stubbed / "full" / "kept").mkdir(parents=True)
    with pytest.raises(UsageError, match=sentence):
        command(**{"smoke": True, **options})
    assert [path.name for path in stubbed.iterdir()] == ["full"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("pctt: fell over.")])
def test_what_ends_half_way_leaves_no_folder(
    error: BaseException, stubbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(command_module, "bench_case", fail)
    if isinstance(error, KeyboardInterrupt):
        assert command(smoke=True) == FAILED
        assert capsys.readouterr().err == "pctt: interrupted; nothing was written.\n"
    else:
        with pytest.raises(RuntimeError, match="fell over"):
            command(smoke=True)
    assert not list((stubbed / "runs").iterdir())


def test_without_matplotlib_there_is_no_picture_and_a_word_about_it(
    stubbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ImportError('matplotlib is not installed; run: pip install "pctt[plot]"')

    monkeypatch.setattr(command_module, "draw_benchmark", fail)
    assert command(smoke=True, out=Path("a")) == OK
    assert "no picture of the benchmark: matplotlib is not installed; run: pip" in capsys.readouterr().err
    assert [path.name for path in Path("a").iterdir()] == ["bench.json"]
