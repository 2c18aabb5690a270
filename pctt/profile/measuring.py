"""Times the sections and the instructions of a training step, and changes no number of it.

The engine drives every step as ever; while it is timed, its bound sections for one batch size are exchanged
for others that run the same instructions on the same buffers and read the clock in between. On a device that
works by itself it is awaited after every call. A round is one training step without any of that, one timed by
section and one timed by instruction, each from the same weights, so that they do the same work and what
disturbs the machine disturbs all three.
"""

# The engine has no public face for its bound sections; this module is the one that looks behind it.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import cast

import torch
from torch import Tensor

from pctt._checks import require_count
from pctt.backends.devices import mode
from pctt.backends.fused_plan import FusedPlan
from pctt.backends.lowering import TILE, CardBuffer
from pctt.backends.operations import one_after_the_other
from pctt.backends.placed import Placed
from pctt.backends.reference import Reference
from pctt.engine import Engine
from pctt.placement.budget import budget
from pctt.placement.chips import Fidelity
from pctt.placement.cost import Cost, CostModel
from pctt.profile.fused import predicted
from pctt.profile.owners import Owners
from pctt.profile.result import Part, Profile, Section, Span
from pctt.program import Instruction

WARM_UP = 3
"""Training steps before the first that counts: a card compiles in one, records a trace in the next."""
MATRIX = 1024
"""Rows and columns of the square product that says what the machine can do, as in `pctt bench`."""
DISTURBED = 1.5
"""Times as long as the fastest training step that the slowest may take."""

Batch = Mapping[str, Tensor]
clock = time.perf_counter_ns


def measure(engine: Engine, batch: Batch, batches: int = 10) -> Profile:
    """Where the time of a training step of `engine` goes.

    batch: {node: activities [B, units]} of every clamped and placed node.
    batches: training steps that medians are over; three times as many run, beside those that warm up.

    Weights and learning state are afterwards what they were. With the fused kernel the parts are predicted,
    as one launch has none that could be timed from outside, and only the whole step is measured.

    Raises ValueError for an engine with held units, and for a fused one whose clamped nodes are not the
    input and the output.

    Example:
        >>> import pctt, torch
        >>> net = pctt.chain(input=64, layers=[pctt.Dense(32, "tanh"), pctt.Dense(10)])
        >>> ends = "input", net.output
        >>> engine = pctt.Engine(net, pctt.init(net), pctt.Inference(5), ends, learning=pctt.SGD(0.1))
        >>> profile = measure(engine, {"input": torch.rand(32, 64), net.output: torch.rand(32, 10)}, 2)
        >>> [section.runs for section in profile.sections if section.name.startswith("step")]
        [1, 4]
    """
    require_count("batches", batches, least=1)
    if engine.held:
        raise ValueError("an engine with held units is not profiled; build it without held.")
    weights, state = engine.weights(), engine.learning_state()

    def step() -> int:
        engine.load_weights(weights)
        engine.load_learning_state(state)
        engine.backend.synchronise()
        begun = clock()
        training_step(engine, batch)
        return clock() - begun

    try:
        if isinstance(engine.backend, FusedPlan):
            for _ in range(WARM_UP):
                step()
            whole = 1e-9 * median(step() for _ in range(batches))
            return predicted(engine, len(next(iter(batch.values()))), batches, whole, _what_it_is(engine))
        return _measured(engine, batch, batches, step)
    finally:
        engine.load_weights(weights)
        engine.load_learning_state(state)


def training_step(engine: Engine, batch: Batch) -> None:
    """One batch as a `Trainer` does it, until the device has done it."""
    judged_between = engine.inference.tolerance is not None or engine.inference.weights_at == "every_step"
    whole = engine.backend.whole_steps and not judged_between
    rate = engine.learning.rate if engine.learning is not None else 0.0
    engine.set_learning(rate, 1)
    engine.relax(batch, learn=whole)
    if not whole:
        engine.learn(rate, 1)
    engine.backend.synchronise()


@dataclass(frozen=True)
class Lap:
    """A run of a section: its name, its instructions, and the clock before the first call and after each."""

    section: str
    code: tuple[Instruction, ...]
    stamps: list[int]

    @property
    def nanoseconds(self) -> int:
        return self.stamps[-1] - self.stamps[0]


@dataclass(frozen=True)
class _Round:
    """A timed training step: nanoseconds, and its laps."""

    nanoseconds: int
    laps: list[Lap]

    def of_sections(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for lap in self.laps:
            found[lap.section] = found.get(lap.section, 0) + lap.nanoseconds
        return found

    def of_instructions(self) -> dict[tuple[str, int], int]:
        """By section and place in it."""
        found: dict[tuple[str, int], int] = {}
        for lap in self.laps:
            for place, (start, stop) in enumerate(pairwise(lap.stamps)):
                found[lap.section, place] = found.get((lap.section, place), 0) + stop - start
        return found


class Stopwatch:
    """Other sections for `engine` on batches of one size, the same but for reading the clock.

    by_instruction: after each instruction; else at the end of a section alone.
    """

    def __init__(self, engine: Engine, batch_size: int, by_instruction: bool = True) -> None:
        self.engine = engine
        self.laps: list[Lap] = []
        self.by_instruction = by_instruction
        self._rows = engine.backend.rows(batch_size)
        self._plain = engine._prepare(self._rows)
        self._wait = engine.backend.synchronise if _works_by_itself(engine) else None
        program = engine.program
        names = ("initialise", "measure_initial", "finish", "measure", "gradients", "keep", "combine")
        made = {name: self._section(name, getattr(program, name)) for name in names}
        kinds = [self._section(f"step {kind}", code) for kind, code in enumerate(program.steps, start=1)]
        steps = [engine._counted(number, kinds[kind]) for number, kind in enumerate(program.walk, start=1)]
        inferring = [made["initialise"], made["measure_initial"], *steps, made["finish"], made["measure"]]
        learning = [made["gradients"], made["combine"], self._section("update", program.update)]
        self._timed = replace(
            self._plain,
            **made,
            steps=steps,
            relaxation=one_after_the_other(inferring),
            learning=one_after_the_other(learning),
            training=one_after_the_other([*inferring, *learning]),
        )

    @contextmanager
    def running(self) -> Generator[list[Lap]]:
        """Within it training steps of the engine leave a lap for every section that they run."""
        engine = self.engine
        self.laps.clear()
        engine._batches[self._rows] = self._timed
        try:
            yield self.laps
        finally:
            engine._batches[self._rows] = engine._batch = self._plain

    def _section(self, name: str, code: tuple[Instruction, ...]) -> Callable[[], None]:
        backend, buffers, scalars = self.engine.backend, self._plain.buffers, self.engine.scalars
        if not code:
            return backend.bind(code, buffers, scalars)
        pieces = [(i,) for i in code] if self.by_instruction else [code]
        calls = [backend.bind(piece, buffers, scalars) for piece in pieces]
        return _stamped(name, code, calls, self._wait, self.laps)


def _stamped(
    name: str,
    code: tuple[Instruction, ...],
    calls: list[Callable[[], None]],
    wait: Callable[[], None] | None,
    laps: list[Lap],
) -> Callable[[], None]:
    def run() -> None:
        stamps = [clock()]
        for call in calls:
            call()
            stamps.append(clock())
        laps.append(Lap(name, code, stamps))

    def run_and_wait() -> None:
        wait_for_it = cast(Callable[[], None], wait)
        wait_for_it()
        stamps = [clock()]
        for call in calls:
            call()
            wait_for_it()
            stamps.append(clock())
        laps.append(Lap(name, code, stamps))

    return run if wait is None else run_and_wait


def _works_by_itself(engine: Engine) -> bool:
    """Whether a call may return before its work is done."""
    backend = engine.backend
    if isinstance(backend, Reference):
        return backend.device.type != "cpu"
    return backend.name == "tenstorrent"


# --- the profile --------------------------------------------------------------------------------------------


def _measured(engine: Engine, batch: Batch, batches: int, step: Callable[[], int]) -> Profile:
    batch_size = len(next(iter(batch.values())))
    by_section, by_instruction = (Stopwatch(engine, batch_size, each) for each in (False, True))

    def timed_step(watch: Stopwatch) -> _Round:
        with watch.running() as laps:
            return _Round(step(), list(laps))

    product, rates = _product(engine), list[float]()
    rounds: list[tuple[int, _Round, _Round]] = []
    for _ in range(WARM_UP + batches):
        rounds.append((step(), timed_step(by_section), timed_step(by_instruction)))
        if product is not None:
            rates.append(product())
    whole, coarse, fine = (list(each) for each in zip(*rounds[WARM_UP:], strict=True))
    shown = sorted(fine, key=lambda each: each.nanoseconds)[len(fine) // 2]
    owners = Owners(engine.net, engine.layout)
    return Profile(
        title=_title(engine, batch_size),
        is_measured=True,
        batch_size=batch_size,
        num_steps=engine.program.num_steps,
        nodes=engine.net.nodes,
        batches=batches,
        whole=1e-9 * median(whole),
        whole_range=(1e-9 * min(whole), 1e-9 * max(whole)),
        by_section=_beside(coarse, whole),
        by_instruction=_beside(fine, whole),
        clock=1e-9 * _clock_nanoseconds(),
        outside=1e-9 * median(each.nanoseconds - sum(each.of_sections().values()) for each in coarse),
        product_rate=median(rates[WARM_UP:]) if rates else None,
        sections=tuple(_sections(coarse)),
        parts=tuple(_parts(engine, batch_size, owners, fine)),
        spans=tuple(_spans(owners, engine.net.nodes, shown)),
        notes=(f"Medians of {batches} training steps.", *_what_it_is(engine), *_disturbed(whole)),
    )


def _beside(rounds: list[_Round], whole: list[int]) -> float:
    """How many times as long a timed training step takes as the one beside it: the median over rounds."""
    return median(each.nanoseconds / plain for each, plain in zip(rounds, whole, strict=True))


def _sections(rounds: list[_Round]) -> list[Section]:
    laps, times = rounds[0].laps, [each.of_sections() for each in rounds]
    runs = [lap.section for lap in laps]
    return [
        Section(name, runs.count(name), instructions, 1e-9 * median(each[name] for each in times))
        for name, instructions in {lap.section: len(lap.code) for lap in laps}.items()
    ]


def _parts(engine: Engine, batch_size: int, owners: Owners, rounds: list[_Round]) -> list[Part]:
    laps, times, predict = (
        rounds[0].laps,
        [each.of_instructions() for each in rounds],
        _planner(engine, batch_size),
    )
    runs, parts = [lap.section for lap in laps], list[Part]()
    for section, code in {lap.section: lap.code for lap in laps}.items():
        number = runs.count(section)
        for place, instruction in enumerate(code):
            cost = None if predict is None else predict.operation(instruction)
            parts.append(
                Part(
                    section,
                    instruction.op,
                    str(instruction),
                    owners.of(instruction),
                    number,
                    1e-9 * median(each[section, place] for each in times),
                    number * _flops(engine, instruction, batch_size),
                    *(None if cost is None else number * each for each in _seconds(cost)),
                )
            )
    return parts


def _seconds(cost: Cost | None) -> tuple[float, float, float]:
    return (0.0, 0.0, 0.0) if cost is None else (cost.eager, cost.traced, cost.floor)


def _flops(engine: Engine, i: Instruction, batch_size: int) -> int:
    """Of a product; on a card with its padding to whole tiles."""
    backend, buffers = engine.backend, engine.program.buffers
    if not isinstance(backend, Placed) or i.op != "matmul":
        return engine.program._flops(i, batch_size)
    out, a = buffers[i.out[0].buffer], buffers[i.inputs[0].buffer]
    assert isinstance(out, CardBuffer) and isinstance(a, CardBuffer)
    rows = backend.share(backend.rows(batch_size))  # of each chip
    (height, width), depth = out.tiles(rows), a.tiles(rows)[1]
    return 2 * TILE**3 * (i.out[0].stop - i.out[0].start) * height * width * depth


def _planner(engine: Engine, batch_size: int) -> CostModel | None:
    """What `pctt plan` computes with; of graphs it knows nothing."""
    backend = engine.backend
    if not isinstance(backend, Placed) or engine.net.wiring is not None:
        return None
    rows, grid = backend.share(backend.rows(batch_size)), backend.grid
    found = budget(engine.program, backend.chip, grid, rows)
    fidelity = cast(Fidelity, backend.fidelity)
    return CostModel(engine.program, found, backend.chip, grid[0] * grid[1], rows, fidelity)


def _spans(owners: Owners, nodes: tuple[str, ...], shown: _Round) -> list[Span]:
    """Sections with their instructions, and the instructions once more on a track of each layer."""
    origin, spans = shown.laps[0].stamps[0], list[Span]()
    by_layer: dict[str, list[Span]] = {name: [] for name in nodes}
    for lap in shown.laps:
        start, stop = lap.stamps[0] - origin, lap.stamps[-1] - origin
        spans.append(Span("sections", lap.section, start, stop))
        for number, i in enumerate(lap.code):
            start, stop = (stamp - origin for stamp in lap.stamps[number : number + 2])
            name = i.op if i.function is None else f"{i.op} {i.function}"
            spans.append(Span("sections", name, start, stop, str(i)))
            for layer in dict.fromkeys(owners.of(i)):
                by_layer.setdefault(layer, []).append(Span(layer, name, start, stop, str(i)))
    return [*spans, *(span for layer in by_layer.values() for span in layer)]


# --- the machine --------------------------------------------------------------------------------------------


def _title(engine: Engine, batch_size: int) -> str:
    backend, threads = engine.backend, torch.get_num_threads()
    place = f"emulated {backend.chip.name}" if isinstance(backend, Placed) else "reference"
    if backend.name == "tenstorrent":
        place = f"tenstorrent, {mode()}"
    device = backend.device if isinstance(backend, Reference) else torch.device("cpu")
    if device.type == "cpu" and backend.name != "tenstorrent":
        place += f" on the CPU, {threads} thread{'s' * (threads > 1)}"
    elif isinstance(backend, Reference):
        place += f" on {device}"
    widths = "-".join(map(str, engine.net.widths))
    return (
        f"{widths}, batches of {batch_size}, {engine.program.num_steps} inference steps, "
        f"{str(engine.dtype).removeprefix('torch.')}; {place}"
    )


def _what_it_is(engine: Engine) -> tuple[str, ...]:
    backend, notes = engine.backend, list[str]()
    if backend.name == "emulated":
        notes.append("us: of the emulation on this CPU, which says nothing about the time on a card.")
    elif backend.name == "tenstorrent":
        one = "one launch" if isinstance(backend, FusedPlan) else "each operation with its launch"
        notes.append(f"us: wall time of {one} by the host, awaited before the next.")
        if mode() != "card":
            notes.append(f"It ran on a {mode()}: simulation time, which says nothing about a card.")
    elif _works_by_itself(engine):
        notes.append("us: each instruction with its launch, awaited before the next.")
    if isinstance(backend, Placed) and not isinstance(backend, FusedPlan):
        if engine.net.wiring is not None:
            notes.append("No prediction for a card: the planner takes chains of dense layers.")
        else:
            notes.append(
                f"eager, traced, floor: what the planner predicts for the {backend.chip.name}, launched one "
                "by one, replayed from a trace, and the work alone."
            )
    return tuple(notes)


def _clock_nanoseconds() -> float:
    """What reading the clock and keeping what it says takes."""

    def once() -> float:
        stamps, number = list[int](), 1000
        for _ in range(number):
            stamps.append(clock())
        return (stamps[-1] - stamps[0]) / number

    return median(once() for _ in range(5))


def _disturbed(whole: list[int]) -> tuple[str, ...]:
    least, most = min(whole), max(whole)
    if most < DISTURBED * least:
        return ()
    return (
        f"Something else ran here too: the slowest step took {most / least:.1f} times as long as the "
        "fastest; trust the shares more than the times.",
    )


def _product(engine: Engine) -> Callable[[], float] | None:
    """A large square product, on the device of the reference backend, which says its FLOP/s."""
    backend = engine.backend
    if not isinstance(backend, Reference):
        return None
    a, b = (torch.rand(MATRIX, MATRIX, dtype=engine.dtype, device=backend.device) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> float:
        backend.synchronise()
        begun = clock()
        torch.mm(a, b, out=out)
        backend.synchronise()
        return 2 * MATRIX**3 / (1e-9 * (clock() - begun))

    return run
