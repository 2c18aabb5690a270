"""`pctt profile` says where the time of a training step goes, and changes none of its numbers.

No test looks at how long anything took. Counts come from the program, predictions from the planner, and a
step that is timed must leave the weights that one leaves which is not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import pctt
from pctt import Adam, Dense, Engine, Inference, Network, chain, init, presets
from pctt.backends.operations import BackendUnavailable
from pctt.cli import UsageError
from pctt.placement.fused_cost import fused_placement
from pctt.placement.fused_walk import WAITING
from pctt.placement.plan import plan
from pctt.profile import Profile, measure
from pctt.profile.command import profile as command
from pctt.profile.measuring import Stopwatch, training_step
from pctt.profile.owners import WHOLE, Owners
from pctt.profile.result import OUTSIDE, WIDTH
from pctt.variants import VARIANTS

NET = chain(5, [*[Dense(6, "tanh")] * 3, Dense(4)])
BATCH = 7


def made(net: Network = NET, inference: Inference | None = None, **options: Any) -> Engine:
    options = {"learning": Adam(1e-3), **options}
    return Engine(net, init(net), inference or Inference(5, 0.1), ("input", net.output), **options)


def batch(engine: Engine, size: int = BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    widths = dict(zip(engine.net.nodes, engine.net.widths, strict=True))
    return {name: torch.rand(size, widths[name], generator=generator) for name in engine.clamped}


@pytest.fixture(scope="module")
def reference() -> Profile:
    engine = made()
    return measure(engine, batch(engine), 3)


@pytest.fixture(scope="module")
def emulated() -> tuple[Engine, Profile]:
    engine = made(backend="emulated")
    return engine, measure(engine, batch(engine), 2)


@pytest.fixture(scope="module")
def fused() -> tuple[Engine, Profile]:
    engine = made(backend="emulated", fused=True, cores_per_layer=1)
    return engine, measure(engine, batch(engine), 1)


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("by_instruction", [False, True])
def test_a_timed_step_leaves_the_bits_of_one_that_is_not(name: str, by_instruction: bool) -> None:
    """A stopwatch that ran a section twice, left one out or forgot a counter would be seen here."""
    inference = pctt.variant(name, Inference(4, 0.1))
    plain, watched = made(inference=inference), made(inference=inference)
    data = batch(plain)
    training_step(plain, data)
    with Stopwatch(watched, BATCH, by_instruction).running() as laps:
        training_step(watched, data)
    assert laps
    assert_same_bits(plain, watched)
    training_step(plain, data)
    training_step(watched, data)  # and afterwards it is the engine it was
    assert_same_bits(plain, watched)
    assert len(laps) == len({id(lap) for lap in laps})


@pytest.mark.parametrize("options", [{}, {"backend": "emulated"}, {"backend": "emulated", "fused": True}])
def test_measuring_leaves_weights_and_learning_state_as_they_were(options: dict[str, Any]) -> None:
    engine, untouched = made(**options), made(**options)
    data = batch(engine)
    for each in (engine, untouched):
        training_step(each, data)  # so that there is a state of Adam
    measure(engine, data, 1)
    assert_same_bits(engine, untouched)


def assert_same_bits(a: Engine, b: Engine) -> None:
    for one, other in ((a.weights(), b.weights()), (a.learning_state(), b.learning_state())):
        assert one.keys() == other.keys()
        for name, tensors in one.items():
            for key, values in tensors.items():
                assert torch.equal(values, other[name][key]), (name, key)


def test_the_stopwatch_notices_a_step_that_is_another() -> None:
    """The comparison above can fail: half the learning rate is another step."""
    plain, other = made(), made(learning=Adam(5e-4))
    training_step(plain, batch(plain))
    with Stopwatch(other, BATCH).running():
        training_step(other, batch(other))
    with pytest.raises(AssertionError):
        assert_same_bits(plain, other)


# --- counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pc", "nudge+-", "ep", "ipc", "epc", "zil", "heun", "langevin"])
def test_every_instruction_of_the_program_is_counted_once(name: str) -> None:
    engine = made(inference=pctt.variant(name, Inference(4, 0.1)))
    found, program = measure(engine, batch(engine), 1), engine.program
    expected = Counter(map(str, program.training_step()))
    counted = Counter[str]()
    for part in found.parts:
        counted[part.text] += part.runs
    assert counted == expected
    code = {name: getattr(program, name) for name in ("initialise", "measure_initial", "finish", "measure")}
    code |= {name: getattr(program, name) for name in ("gradients", "keep", "combine", "update")}
    code |= {f"step {number}": steps for number, steps in enumerate(program.steps, start=1)}
    assert {section.name: section.instructions for section in found.sections} == {
        name: len(instructions) for name, instructions in code.items() if instructions
    }
    relaxations = 2 if program.keep else 1
    for number in range(len(program.steps)):
        (runs,) = (section.runs for section in found.sections if section.name == f"step {number + 1}")
        assert runs == relaxations * program.walk.count(number)


def test_the_floating_point_operations_are_those_of_the_program(reference: Profile) -> None:
    assert reference.flops == made().program.flops(BATCH)
    assert sum(row.flops for row in reference.layers()) == pytest.approx(reference.flops, rel=1e-12)


def test_a_relaxation_that_ends_early_is_profiled_as_it_is() -> None:
    engine = made(inference=Inference(50, 0.1, tolerance=0.5))
    found = measure(engine, batch(engine), 1)
    steps = sum(section.runs for section in found.sections if section.name.startswith("step"))
    (measured,) = (section.runs for section in found.sections if section.name == "measure")
    assert 0 < steps < 50
    assert measured == steps + 1  # the engine looks after every step, and once more at the end


# --- shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reference", "emulated", "fused"])
def test_shares_add_to_one(kind: str, request: pytest.FixtureRequest) -> None:
    value = request.getfixturevalue(kind)
    found: Profile = value if kind == "reference" else value[1]
    assert sum(found.section_shares().values()) == pytest.approx(1.0, rel=1e-12)
    listed = found.to_dict()
    for table in ("operations", "layers"):
        assert sum(entry["share"] for entry in listed[table]) == pytest.approx(1.0, rel=1e-12)


def test_the_rows_of_operations_and_of_layers_hold_all_time_that_was_measured(reference: Profile) -> None:
    for rows in (reference.operations(), reference.layers()):
        assert sum(row.seconds for row in rows) == pytest.approx(reference.seconds, rel=1e-9)


def test_what_measuring_adds_is_said(reference: Profile) -> None:
    text = reference.as_text()
    assert reference.by_section and reference.by_instruction and reference.clock
    assert f"{reference.by_section - 1:+.1%}" in text
    assert f"{reference.by_instruction - 1:+.1%}" in text
    assert OUTSIDE in text


def test_the_laps_of_a_step_lie_in_it_one_after_the_other() -> None:
    """So the parts of a step cannot be more than the whole, however long it took."""
    engine = made()
    watch = Stopwatch(engine, BATCH)
    for _ in range(3):
        with watch.running() as laps:
            training_step(engine, batch(engine))
        stamps = [stamp for lap in laps for stamp in lap.stamps]
        assert stamps == sorted(stamps)
        assert all(len(lap.stamps) == len(lap.code) + 1 for lap in laps)
        assert sum(lap.nanoseconds for lap in laps) <= stamps[-1] - stamps[0]


# --- whose work ---------------------------------------------------------------------------------------------


def owned(net: Network, **options: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    engine = made(net, **options)
    owners = Owners(net, engine.layout)
    return [(i.op, str(i.out[0]), owners.of(i)) for i in engine.program.training_step()]


def test_the_work_of_unlike_layers_is_told_apart() -> None:
    net = chain(5, [Dense(6, "tanh", name="a"), Dense(7, "tanh", name="b"), Dense(4, name="c")])
    found = owned(net)
    gradients = [names for op, _, names in found if op == "outer"]
    assert sorted(gradients) == [("a",), ("b",), ("c",)]
    assert {names for op, _, names in found if op == "product_transposed"} == {("b",), ("c",)}


def test_stacked_layers_share_what_serves_them_all(reference: Profile) -> None:
    """Layers 2 and 3 are alike and between like nodes, so one product gives the gradients of both."""
    names = [row.name for row in reference.layers()]
    assert names == [name for name in NET.nodes if name in names]
    gradients = [part for part in reference.parts if part.operation == "outer"]
    assert {part.layers: part.flops for part in gradients} == {
        ("dense1",): 2 * BATCH * 5 * 6,
        ("dense2", "dense3"): 2 * (2 * BATCH * 6 * 6),
        ("dense4",): 2 * BATCH * 6 * 4,
    }


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize(
    ("preset", "shape"), [("digits_pcgraph", (1, 8, 8)), ("digits", (1, 8, 8)), ("mnist_cnn", (1, 28, 28))]
)
def test_every_instruction_has_a_layer_of_the_network(
    preset: str, shape: tuple[int, ...], backend: str
) -> None:
    """A name of a buffer that nobody thought of would hide its time under no layer at all."""
    config = presets.PRESETS[preset]()
    net = config.network(shape)
    clamped = tuple(config.clamp or (net.input_name, net.output))
    engine = Engine(net, init(net), config.inference, clamped, learning=config.learning, backend=backend)
    owners = Owners(net, engine.layout)
    for instruction in engine.program.training_step():
        assert set(owners.of(instruction)) <= set(net.nodes), str(instruction)


def test_both_directions_of_a_bidirectional_network_have_their_layers() -> None:
    net = chain(5, [Dense(6, "tanh"), Dense(4)], [Dense(6, "tanh"), Dense(5)])
    found = measure(engine := made(net), batch(engine), 1)
    assert {name for part in found.parts for name in part.layers} <= {*net.nodes, *net.layer_names, WHOLE}
    assert set(net.layer_names) <= {row.name for row in found.layers()}


# --- predictions --------------------------------------------------------------------------------------------


def test_predictions_beside_the_times_are_those_of_the_plan(emulated: tuple[Engine, Profile]) -> None:
    engine, found = emulated
    costs = plan(NET, "n150", BATCH, engine.inference, engine.learning).costs["training step"]
    for name in ("eager", "traced", "floor"):
        total = sum(getattr(part, name) for part in found.parts)
        assert total == pytest.approx(getattr(costs, name), rel=1e-9)
    assert found.flops == costs.flops
    assert "says nothing about the time on a card" in found.as_text().replace("\n", " ")


def test_the_reference_has_no_predictions_for_a_card(reference: Profile) -> None:
    assert all(part.eager is None for part in reference.parts)
    assert "eager" not in reference.as_text()


def test_a_graph_on_a_card_says_that_it_has_no_prediction() -> None:
    config = presets.digits_pcgraph()
    net = config.network(64)
    inference = replace(config.inference, num_steps=2)
    engine = Engine(net, init(net), inference, tuple(config.clamp or ()), backend="emulated")
    found = measure(engine, batch(engine), 1)
    assert found.flops > 0
    assert any("No prediction" in note for note in found.notes)


def test_the_fused_kernel_is_predicted_as_pctt_plan_does(fused: tuple[Engine, Profile]) -> None:
    engine, found = fused
    placement = fused_placement(NET, "n150", 1, BATCH, engine.inference, engine.learning)
    cost = placement.cost()
    assert found.predicted == pytest.approx(cost.training, rel=1e-12)
    elapsed = sum(section.seconds for section in found.sections)
    assert elapsed + placement.chip.eager_launch_seconds == pytest.approx(cost.training, rel=1e-9)
    assert found.seconds == pytest.approx(elapsed * placement.cores.total, rel=1e-9)
    work = {"product": ("matrix",), "elementwise": ("vector",)}
    for code in work:
        expected = sum(
            step.code == code.upper()
            for section in placement.sequence
            for words in placement.sections[section]
            for step in words.compute
        )
        counted = sum(part.runs for part in found.parts if part.operation == code)
        assert counted == expected


def test_watching_the_walk_changes_nothing_in_it_and_sees_every_wait() -> None:
    placement = fused_placement(NET, "n150", 1, BATCH, Inference(5, 0.1), Adam(1e-3))
    walk, plain = placement.run(placement.sequence), placement.run(placement.sequence)
    seen = walk.doings
    assert walk.ends == plain.ends and walk.total == plain.total
    waited = Counter[int]()
    for (core, *_), cycles in plain.waited.items():
        waited[core] += round(1000 * cycles)
    found = Counter[int]()
    for doing in seen:
        found[doing.core] += round(1000 * (doing.stop - doing.start)) * (doing.what == WAITING)
    for core, cycles in waited.items():
        assert found[core] == pytest.approx(cycles, abs=1 + len(seen))


def test_a_fused_engine_with_other_clamped_nodes_is_refused() -> None:
    engine = Engine(NET, init(NET), Inference(2, 0.1), ("input",), backend="emulated", fused=True)
    with pytest.raises(ValueError, match="clamped input and a clamped output"):
        measure(engine, batch(engine), 1)


# --- the trace ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reference", "emulated", "fused"])
def test_the_trace_is_valid_and_what_is_on_a_track_nests(kind: str, request: pytest.FixtureRequest) -> None:
    value = request.getfixturevalue(kind)
    found: Profile = value if kind == "reference" else value[1]
    trace = json.loads(json.dumps(found.trace()))
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    (process,) = (event["args"]["name"] for event in events if event["name"] == "process_name")
    assert process.startswith("measured" if found.is_measured else "predicted, not measured")
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in events} == {1}
    assert {event["tid"] for event in spans} == set(named)
    for track in named:
        open_: list[tuple[int, int]] = []
        inside = [event for event in spans if event["tid"] == track]
        for start, stop in ((nanoseconds(e["ts"]), nanoseconds(e["ts"] + e["dur"])) for e in inside):
            assert 0 <= start <= stop
            while open_ and open_[-1][1] <= start:
                open_.pop()
            assert not open_ or stop <= open_[-1][1]  # ends in what it began in
            open_.append((start, stop))


def nanoseconds(microseconds: float) -> int:
    return round(1000 * microseconds)


def test_the_instructions_of_a_section_fill_its_span(reference: Profile) -> None:
    spans = [span for span in reference.spans if span.track == "sections"]
    names = {section.name: section for section in reference.sections}
    runs = Counter(span.name for span in spans if not span.about)
    assert runs == {name: section.runs for name, section in names.items()}
    number = 0
    while number < len(spans):
        section = spans[number]
        inside = spans[number + 1 : number + 1 + names[section.name].instructions]
        assert inside[0].start == section.start and inside[-1].stop == section.stop
        assert all(a.stop == b.start for a, b in pairwise(inside))
        number += 1 + len(inside)


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reference", "emulated", "fused"])
def test_the_text_is_ascii_and_fits_a_terminal(kind: str, request: pytest.FixtureRequest) -> None:
    value = request.getfixturevalue(kind)
    found: Profile = value if kind == "reference" else value[1]
    deep = replace(found, title=f"{'128-' * 100}10, größer", whole=12.3)
    long = replace(found, parts=tuple(replace(part, layers=("ä" * 40,)) for part in found.parts))
    for text in (found.as_text(), deep.as_text(), long.as_text()):
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= WIDTH == 110


# --- the command --------------------------------------------------------------------------------------------

BACKPROP = "training.algorithm=backprop"
SHORT = ("inference.num_steps=2", "training.batch_size=4")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_leaves_three_files_and_prints_the_tables(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        assert command("digits", batches=1, set=SHORT) == 0
        folder = place / "runs" / f"profile-digits-{number}"
        files = {path.name for path in folder.iterdir()}
        assert files == {"profile.json", "trace.json", "profile.svg"}
    assert (folder / "profile.svg").read_text(encoding="utf-8").count("By section") == 1
    found = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    assert found["batch_size"] == 4 and found["num_steps"] == 2
    assert json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert "product_transposed" in capsys.readouterr().out


def test_as_json_it_prints_one_object_and_nothing_else(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "here"
    out.mkdir()  # an empty folder is as good as none
    assert command("digits", backend="emulated", fused=True, batches=1, set=SHORT, out=out, json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "profile" and not found["measured"]
    assert found["training_step_predicted"] > 0
    assert Path(found["folder"]) == out and (out / "profile.json").is_file()


@pytest.mark.parametrize("preset", ["digits_generative", "digits_pcgraph", "mnist", "mnist_cnn"])
def test_presets_are_profiled_without_their_data(preset: str, place: Path) -> None:
    assert command(preset, batches=1, set=SHORT[1:]) == 0


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (UsageError, "neither a preset", lambda place: command("nonsense")),
        (UsageError, "batches must be at least 1", lambda place: command("digits", batches=0)),
        (UsageError, "exists already; choose another", lambda place: command("digits", out=place / "full")),
        (UsageError, "exists already; choose another", lambda place: command("digits", out=place / "file")),
        (OSError, "cannot write to .*choose another", lambda place: command("digits", out=place / "file/x")),
        (UsageError, "set backend to tenstorrent", lambda place: command("digits", fused=True)),
        (UsageError, "training.speed", lambda place: command("digits", set=("training.speed=1",))),
        (UsageError, "drop training.algorithm", lambda place: command("digits", set=(BACKPROP,))),
        (UsageError, "n150", lambda place: command("digits", backend="emulated", device="z9")),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    error: type[Exception], sentence: str, call: Callable[[Path], int], place: Path
) -> None:
    (place / "full").mkdir()
    for path in (place / "file", place / "full" / "kept"):
        path.write_text("kept", encoding="utf-8")
    with pytest.raises(error, match=sentence) as raised:
        call(place)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in place.rglob("*")) == ["file", "full", "kept"]


def test_a_failure_half_way_leaves_no_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no more room")

    monkeypatch.setattr("pctt.profile.command.draw_profile", fail)
    with pytest.raises(RuntimeError, match="no more room"):
        command("digits", batches=1, set=SHORT)
    assert not list((place / "runs").iterdir())


def test_without_matplotlib_there_is_no_picture_and_a_word_about_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ImportError('matplotlib is not installed; run: pip install "pctt[plot]"')

    monkeypatch.setattr("pctt.profile.command.draw_profile", fail)
    assert command("digits", batches=1, set=SHORT) == 0
    assert "no picture of the profile" in capsys.readouterr().err
    assert {path.name for path in (place / "runs" / "profile-digits-1").iterdir()} == {
        "profile.json",
        "trace.json",
    }


def test_a_mock_card_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TT_METAL_MOCK_CLUSTER_DESC_PATH", str(place))
    with pytest.raises(BackendUnavailable, match="mock device computes nothing"):
        command("digits", backend="tenstorrent")


def test_the_library_refuses_no_batches_and_held_units() -> None:
    engine = made()
    with pytest.raises(ValueError, match="batches must be a whole number of at least 1"):
        measure(engine, batch(engine), 0)
    held = Engine(NET, init(NET), Inference(2, 0.1), ("input",), placed=("dense4",), held=("dense4",))
    with pytest.raises(ValueError, match="held units"):
        measure(held, batch(held), 1)


def test_a_profile_without_learning_is_of_the_relaxation_and_the_gradients() -> None:
    engine = made(learning=None)
    assert "update" not in {section.name for section in measure(engine, batch(engine), 1).sections}
