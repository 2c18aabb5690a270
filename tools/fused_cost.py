"""Predicted times of the fused kernel: tables as Markdown, a figure, and a check of the counted work.

    python tools/fused_cost.py                        # all tables
    python tools/fused_cost.py --tables depth width   # some
    python tools/fused_cost.py --figure docs/figures/fused-times.png
    python tools/fused_cost.py --check                # on a card or the simulator, needs ttnn

Times are those of `pctt/placement/fused_cost.py`: a model, of which no time was measured. `--check` trains on
the card with kernels that count what they do, and compares the counts with those of the model.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pctt
from pctt.backends.fused_cores import Task
from pctt.backends.fused_stream import LINK, PARAMETERS, Word
from pctt.learning import Learning
from pctt.network import Network
from pctt.placement.chips import chip as find_chip
from pctt.placement.cost import Cost
from pctt.placement.fused_cost import (
    BFLOAT16,
    FLOAT32,
    STEADY,
    FusedCost,
    FusedPlacement,
    Rates,
    backprop_sweeps,
    fused_placement,
)
from pctt.placement.fused_walk import Noc, Overheads, Walk, Words, links, number_of
from pctt.placement.plan import plan
from pctt.plots import COLOURS, GREY

BATCH_SIZE = 32
STEPS = 20
CHIPS = ("n150", "p150")
NETWORKS: dict[str, tuple[int, ...]] = {
    "64-32-32-32-10": (64, 32, 32, 32, 10),
    "784-256-256-10": (784, 256, 256, 10),
    "10 layers of 128": (128,) * 11,
    "16 layers of 256": (256,) * 17,
}
RULES: dict[str, Learning] = {"Adam": pctt.Adam(1e-3), "SGD": pctt.SGD(0.1)}
DEPTHS = (2, 4, 8, 16, 32)
WIDTHS = (32, 64, 128, 256, 512)
SHARED = (1, 2, 4)
"""Cores of a layer."""


def network(widths: Sequence[int], activation: str = "tanh") -> Network:
    hidden = [pctt.Dense(units, activation) for units in widths[1:-1]]
    return pctt.chain(input=widths[0], layers=[*hidden, pctt.Dense(widths[-1])])


@cache
def planned(
    widths: tuple[int, ...],
    chip: str = "n150",
    cores: int | None = 1,
    rule: str = "SGD",
    factor: float = 1.0,
    activation: str = "tanh",
) -> FusedPlacement | None:
    """factor: of the assumed overheads. None where the network does not fit."""
    try:
        return fused_placement(
            network(widths, activation),
            chip,
            cores,
            BATCH_SIZE,
            pctt.Inference(num_steps=STEPS),
            RULES[rule],
            overheads=Overheads().times(factor),
        )
    except ValueError:
        return None


def most_cores(widths: tuple[int, ...], chip: str, rule: str) -> int:
    """Cores per layer, of 1, 2, 4 and 8, with which the training step is fastest."""
    plans = {n: found for n in (1, 2, 4, 8) if (found := planned(widths, chip, n, rule)) is not None}
    return min(plans, key=lambda n: plans[n].cost().training)


def us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 99.95e-6 else f"{1e6 * seconds:,.0f}"


def kib(size: float) -> str:
    return f"{size / 1024:,.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


# --- (a) networks -------------------------------------------------------------------------------------------


def networks() -> str:
    """Fused beside TT-NN: per inference step, and per training step with Adam and with SGD."""
    steps: list[Sequence[object]] = []
    training: list[Sequence[object]] = []
    for name, widths in NETWORKS.items():
        for chip in CHIPS:
            most = most_cores(widths, chip, "Adam")
            found = planned(widths, chip, most, "Adam")
            assert found is not None
            cost = found.cost()
            there = {rule: _tt_nn(widths, chip, rule) for rule in RULES}
            step, _ = there["SGD"]
            steps.append(
                [
                    *(name, chip, f"{most} / {found.cores.total}", us(cost.step)),
                    *((us(step.traced), us(step.eager)) if step else ("-", "-")),
                    *(us(cost.step_floor), us(cost.step_vector_floor)),
                    *((us(step.floor), f"{step.traced / cost.step:.1f}") if step else ("-", "-")),
                    *(_shares(cost), kib(cost.step_noc_bytes), kib(cost.l1_bytes)),
                ]
            )
            row: list[object] = [name, chip, f"{most} / {found.cores.total}"]
            for rule in RULES:
                own = planned(widths, chip, most, rule)
                assert own is not None
                cost, (_, whole) = own.cost(), there[rule]
                row += [us(cost.training), *((us(whole.traced), us(whole.eager)) if whole else ("-", "-"))]
                row += [us(cost.training_vector_floor)]
                row += [f"{whole.traced / cost.training:.1f}" if whole else "-"]
            training.append(row)
    first = table(
        [
            *("network", "chip", "cores per layer / in all", "fused", "traced", "eager", "products alone"),
            *("and SFPU", "TT-NN's floor", "traced / fused", "of the busiest core", "NoC KiB", "L1 KiB"),
        ],
        steps,
    )
    head = ["network", "chip", "cores per layer / in all"]
    for rule in RULES:
        head += [f"{rule}: fused", "traced", "eager", "products and SFPU", "traced / fused"]
    return f"One inference step, us:\n\n{first}\n\nA training step, us:\n\n{table(head, training)}"


def _tt_nn(widths: tuple[int, ...], chip: str, rule: str) -> tuple[Cost | None, Cost | None]:
    """Of an inference step and a training step; None where the network does not fit."""
    try:
        inference = pctt.Inference(num_steps=STEPS)
        costs = plan(network(widths), chip, BATCH_SIZE, inference, RULES[rule]).costs
    except ValueError:
        return None, None
    return costs["inference step"], costs["training step"]


def _shares(cost: FusedCost) -> str:
    return ", ".join(f"{unit} {100 * share:.0f} %" for unit, share in cost.shares.items())


# --- (b) depth ----------------------------------------------------------------------------------------------


def backprop_training(found: FusedPlacement) -> float:
    """Seconds of a training step by backprop: both sweeps, then gradients and update as they are here."""
    rest = found.run([found.names[name] for name in ("gradients", "update")]).ends[-1]
    return found.chip.eager_launch_seconds + sum(backprop_sweeps(found)) + rest / found.chip.clock_hz


def depth() -> str:
    rows: list[Sequence[object]] = []
    for chip in CHIPS:
        for layers in DEPTHS:
            row: list[object] = [chip, layers]
            for width in (128, 256):
                found = planned((width,) * (layers + 1), chip)
                if found is None:
                    row += ["-"] * 7
                    continue
                cost, (forward, backward) = found.cost(), backprop_sweeps(found)
                row += [us(cost.step), us(cost.before), us(without_spreading(found)[0]), us(cost.training)]
                row += [us(forward), us(forward + backward), us(backprop_training(found))]
            rows.append(row)
    head = ["chip", "layers"]
    for width in (128, 256):
        head += [f"{width}: inference step", "before the first", "without spreading", "training step"]
        head += ["backprop: forward", "both sweeps", "training step"]
    return table(head, rows)


# --- (c) width ----------------------------------------------------------------------------------------------


def width() -> str:
    rows: list[Sequence[object]] = []
    for chip in CHIPS:
        for units in WIDTHS:
            row: list[object] = [chip, units]
            for cores in SHARED:
                found = planned((units,) * 5, chip, cores)
                if found is None or max(found.cores.slices) < cores:
                    row += ["-"] * 4
                    continue
                cost = found.cost()
                row += [
                    us(cost.step),
                    us(cost.step_vector_floor),
                    kib(cost.step_noc_bytes),
                    kib(cost.l1_bytes),
                ]
            rows.append(row)
    head = ["chip", "units"]
    for cores in SHARED:
        head += [f"{cores} core{'s' * (cores > 1)}: step", "products and SFPU", "NoC KiB", "L1 KiB"]
    return table(head, rows)


# --- (d) two ways to feed back ------------------------------------------------------------------------------


def feedback() -> str:
    """For a layer of w x w units on n cores, beside one just like it; cycles at the clock of an n150."""
    rates, noc = Rates(find_chip("n150"), "HiFi3", Overheads()), Noc(find_chip("n150"), 8)
    rows: list[Sequence[object]] = []
    for units in (128, 256, 512, 1024):
        for cores in (2, 4, 8):
            for batch in (32, 128):
                if units // 32 % cores:
                    continue
                rows.append([units, cores, batch, *_feedback(rates, noc, units // 32, cores, batch // 32)])
    head = [
        "units",
        "cores",
        "batch",
        "NoC KiB per step: sums",
        "copy",
        "us per step on the way: sums",
        "copy",
    ]
    head += ["L1 KiB per core: sums", "copy", "copy per learning step: NoC KiB", "us"]
    head += [f"us of {STEPS} steps and learning: sums", "copy"]
    return table(head, rows)


def _feedback(rates: Rates, noc: Noc, tiles: int, cores: int, rows: int) -> list[object]:
    """tiles: of the units, below and above.    rows: of a batch, in tiles.

    sums: each core above sends float32 partial sums of all units below, whose cores add them up.
    copy: the cores below hold the rows of the weights that they need, and are sent all errors in bfloat16.
    """
    part, hertz = tiles // cores, rates.chip.clock_hz

    def sending(size: int) -> float:
        """Cycles until a block of `rows` rows for each of the cores has left one core."""
        p, f = noc.packets(size) * rates.overheads.packet, noc.flits(size)
        return cores * (p + f + (rows - 1) * max(p, f))

    adding = rates.of_chain(("LOAD", "ADD") * (cores - 1), rows * part)
    alone = rates.of_chain((), rows * part)
    sums = sending(part * FLOAT32) + adding.front - alone.front + (rows * tiles * FLOAT32) // 64
    copy = sending(part * BFLOAT16) + (rows * part * FLOAT32) // 64
    sums_l1 = 2 * rows * tiles * FLOAT32
    copy_l1 = tiles * part * BFLOAT16 + rows * tiles * BFLOAT16 + rows * part * FLOAT32
    refresh_bytes = tiles * tiles * BFLOAT16
    refresh = part * tiles * noc.flits(BFLOAT16)
    times = [1e6 * cycles / hertz for cycles in (sums, copy, refresh)]
    return [
        kib(cores * rows * tiles * FLOAT32),
        kib(cores * rows * tiles * BFLOAT16),
        f"{times[0]:.1f}",
        f"{times[1]:.1f}",
        kib(sums_l1),
        kib(copy_l1),
        kib(refresh_bytes),
        f"{times[2]:.1f}",
        f"{STEPS * times[0]:.0f}",
        f"{STEPS * times[1] + times[2]:.0f}",
    ]


# --- (e) traffic --------------------------------------------------------------------------------------------


def traffic() -> str:
    """What goes up: the slice of each core to every core of the next layer, one by one or to all at once."""
    rows: list[Sequence[object]] = []
    for chip in CHIPS:
        for units in (128, 256, 512):
            for cores in (2, 4, 8):
                found = planned((units,) * 5, chip, cores)
                if found is None or max(found.cores.slices) < cores:
                    continue
                core = found.cores.of(2)[0]
                above = found.cores.of(3)
                moves = [a for a in found.sections[found.walk[-1]][core].writer if a.core in above]
                o, noc = found.overheads, found.noc
                each = [
                    a.rows * max(noc.packets(a.bytes) * o.packet, noc.flits(a.bytes))
                    for a in moves
                    if a.code == "MOVE"
                ]
                signals = len(above) * (o.barrier + o.packet)
                cost, hertz = found.cost(), found.chip.clock_hz
                unicast, multicast = sum(each) + signals, each[0] + o.barrier + o.packet
                rows.append(
                    [
                        *(chip, units, cores, kib(sum(a.rows * a.bytes for a in moves))),
                        *(us(unicast / hertz), us(multicast / hertz), us(cost.step)),
                        f"{100 * (unicast - multicast) / hertz / cost.step:.1f} %",
                    ]
                )
    head = ["chip", "units", "cores", "KiB sent up by a core", "us: one by one", "to all at once"]
    return table([*head, "inference step", "saved at most"], rows)


# --- (f) what the prediction hangs on -----------------------------------------------------------------------


def without_spreading(found: FusedPlacement) -> tuple[float, float]:
    """Seconds before the first inference step and of a training step in which no core sends to itself: biases
    stand in all rows already.
    """
    sections = [
        [
            replace(words, writer=tuple(a for a in words.writer if a.code != "MOVE" or a.core != core))
            for core, words in enumerate(section)
        ]
        for section in found.sections
    ]
    ends = Walk(sections, found.noc, found.overheads).run(found.sequence).ends
    before = ends[found.sequence.index(found.walk[0]) - 1]
    return before / found.chip.clock_hz, found.chip.eager_launch_seconds + ends[-1] / found.chip.clock_hz


def assumptions() -> str:
    rows: list[Sequence[object]] = []
    for name, widths in NETWORKS.items():
        most = most_cores(widths, "n150", "Adam")
        row: list[object] = [name, most]
        for factor in (0.5, 1.0, 2.0):
            found = planned(widths, "n150", most, "Adam", factor)
            assert found is not None
            cost = found.cost()
            row += [us(cost.step), us(cost.training)]
        found, plain = (planned(widths, "n150", most, "Adam", 1.0, act) for act in ("tanh", "relu"))
        assert found is not None and plain is not None
        cost = plain.cost()
        rows.append([*row, us(cost.step), us(cost.training), us(without_spreading(found)[1])])
    head = ["network, n150", "cores per layer"]
    for factor in ("half", "as assumed", "twice"):
        head += [f"{factor}: step", "training"]
    head += ["relu: step", "training", "no spreading of biases: training"]
    return table(head, rows)


# --- (g) what would make it faster --------------------------------------------------------------------------


def changed(found: FusedPlacement, change: Callable[[FusedPlacement, int], Words]) -> float:
    """Seconds of an inference step of which each core does something else."""
    section, sections = found.walk[-1], list(found.sections)
    sections[section] = tuple(change(found, core) for core in range(found.cores.total))
    ends = Walk(sections, found.noc, found.overheads).run([section] * STEADY).ends
    return (ends[-1] - ends[STEADY // 2 - 1]) / (STEADY - STEADY // 2) / found.chip.clock_hz


def _of_a_step(found: FusedPlacement, core: int) -> tuple[Words, list[Task]]:
    """What a core reads in an inference step, and the tasks that its instructions but the last stand for."""
    words = found.sections[found.walk[-1]][core]
    tasks = [task for task in found.tasks.sections[found.walk[-1]] if task.core == core]
    assert [step.code for step in words.compute] == [*(task.code for task in tasks), "END"]
    return words, tasks


def with_copies(found: FusedPlacement, core: int) -> Words:
    """The cores below a layer hold the weights that they need: no partial sums are added up, and what comes
    down is sent in bfloat16.
    """
    words, tasks = _of_a_step(found, core)
    steps, below = list(words.compute), set[int]()
    for number, task in enumerate(tasks):
        senders = sum(name.startswith("landed ") for name, _, _ in task.reads)
        if task.code == "ELEMENTWISE" and senders > 1:
            sums = found.rates.of_chain(("LOAD", "ADD") * (senders - 1), task.tiles)
            nothing = found.rates.of_chain((), task.tiles)
            work = steps[number].work
            work = replace(
                work,
                vector=work.vector - sums.vector,
                unpack=work.unpack - sums.unpack,
                control=work.control - sums.control + nothing.control,
            )
            steps[number] = replace(steps[number], work=work)
        elif task.code == "PRODUCT" and found.cores.slices[_node(found, core)] > 1:
            below |= {move.core for move in task.moves}
    writer = tuple(
        replace(a, bytes=a.bytes // 2) if a.code == "MOVE" and a.core in below else a for a in words.writer
    )
    return replace(words, compute=tuple(steps), writer=writer)


def _node(found: FusedPlacement, core: int) -> int:
    return next(node for node in range(len(found.cores.slices)) if core in found.cores.of(node))


def in_pairs(found: FusedPlacement, core: int, most: int = 2) -> Words:
    """Each link does two tiles at a time, in chains that use up to `most` registers of four."""
    words, tasks = _of_a_step(found, core)
    steps = list(words.compute)
    for number, task in enumerate(tasks):
        if task.code == "ELEMENTWISE" and registers(task.words) <= most:
            chain, pairs = list(links(task.words)), -(-task.tiles // 2)
            work, half = steps[number].work, found.rates.elementwise(pairs, chain)
            stored = sum(BFLOAT16 if flags else FLOAT32 for kind, flags in chain if kind == "STORE")
            pack = half.pack + (task.tiles - pairs) * (stored // found.overheads.pack_bytes)
            work = replace(work, control=half.control, pack=pack, batches=pairs)
            steps[number] = replace(steps[number], work=work)
    return replace(words, compute=tuple(steps))


def registers(words: Sequence[Word]) -> int:
    """How many a chain uses, from the words of its instruction."""
    names, used, at = {number: name for name, number in LINK.items()}, {0}, 1
    while (kind := names[number_of(words[at]) & 0xFF]) != "STOP":
        word = number_of(words[at])
        used |= {word >> 8 & 0xF, word >> 12 & 0xF}
        used |= {word >> 16 & 0xF, word >> 20 & 0xF} if kind == "ADD_PRODUCT" else set()
        at += 1 + PARAMETERS.get(kind, 0)
    return len(used)


def joined(found: FusedPlacement, core: int) -> Words:
    """The chain that ends a step of a hidden layer multiplies its error by the derivative of tanh, with which
    the next step begins: both are in registers there.
    """
    words, tasks = _of_a_step(found, core)
    steps = list(words.compute)
    last = next((n for n, task in enumerate(tasks) if "TANH" in task.links), None)
    if last is None or "SUBTRACT_FROM" not in tasks[0].links:
        return words
    assert not steps[0].go and steps[1].done
    chain, gated = (list(links(tasks[n].words)) for n in (last, 0))
    at = next(n for n, (kind, _) in enumerate(chain) if kind == "KEEP")
    derivative = [(kind, 0) for kind in ("COPY", "SQUARE", "SUBTRACT_FROM", "MULTIPLY")]
    chain = [*chain[:at], *derivative, *chain[at:], gated[-1]]
    steps[last] = replace(steps[last], work=found.rates.elementwise(tasks[last].tiles, chain))
    steps[1] = replace(steps[1], done=steps[1].done - 1)
    return replace(words, compute=tuple(steps[1:]))


def faster() -> str:
    rows: list[Sequence[object]] = []
    for name, widths in NETWORKS.items():
        for chip in CHIPS:
            most = most_cores(widths, chip, "Adam")
            found = planned(widths, chip, most, "Adam")
            assert found is not None
            step = found.cost().step
            changes = (joined, in_pairs, partial(in_pairs, most=4), *((with_copies,) if most > 1 else ()))
            row = [name, chip, most, us(step)]
            for change in changes:
                seconds = changed(found, change)
                row.append(f"{us(seconds)} ({100 * (seconds / step - 1):+.0f} %)".replace("+0 ", "0 "))
            rows.append([*row, *["-"] * (4 - len(changes))])
    head = ["network", "chip", "cores per layer", "step as it is", "joined", "two tiles per link"]
    return table([*head, "with more registers", "copies of the weights"], rows)


# --- the figure ---------------------------------------------------------------------------------------------


def draw(path: Path) -> None:
    figure = import_module("matplotlib.figure").Figure((10.5, 4.4), dpi=110, layout="constrained")
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for units, colour in ((128, COLOURS[0]), (256, COLOURS[2])):
        plans = {layers: planned((units,) * (layers + 1)) for layers in DEPTHS}
        found = {layers: it for layers, it in plans.items() if it is not None}
        curves: list[tuple[str, str, Callable[[FusedPlacement], float]]] = [
            ("predictive coding, inference step", "-", lambda it: it.cost().step),
            ("predictive coding, initial sweep", ":", lambda it: it.cost().before),
            ("backprop, both sweeps", "--", lambda it: sum(backprop_sweeps(it))),
        ]
        for label, style, value in curves:
            times = [1e6 * value(it) for it in found.values()]
            left.plot(list(found), times, style, color=colour, marker=".", label=f"{label}, {units} units")
    left.set(title="n150, a core per layer", xlabel="layers", ylabel="us", xscale="log", yscale="log")
    left.set_xticks(DEPTHS, labels=[str(layers) for layers in DEPTHS])
    for cores, colour in zip(SHARED, (COLOURS[0], COLOURS[1], COLOURS[2]), strict=True):
        points = {units: planned((units,) * 5, "n150", cores) for units in WIDTHS}
        fit = {u: it for u, it in points.items() if it is not None and max(it.cores.slices) == cores}
        label = f"{cores} core{'s' * (cores > 1)} per layer"
        right.plot(
            list(fit),
            [1e6 * it.cost().step for it in fit.values()],
            "-",
            marker=".",
            color=colour,
            label=label,
        )
        floor = [1e6 * it.cost().step_vector_floor for it in fit.values()]
        right.plot(list(fit), floor, ":", color=colour)
    right.plot([], [], ":", color=GREY, label="products and SFPU alone")
    right.set(title="n150, four layers, inference step", xlabel="units", xscale="log", yscale="log")
    right.set_xticks(WIDTHS, labels=[str(units) for units in WIDTHS])
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, handlelength=3.5, loc="upper left")
    left.set_ylim(10, 20_000)
    right.set_ylim(top=200)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# --- the check ----------------------------------------------------------------------------------------------

CHECKED: dict[str, tuple[int, ...]] = {
    "64-32-32-10": (64, 32, 32, 10),
    "40-64-96-64-10": (40, 64, 96, 64, 10),
    "100-160-130-70": (100, 160, 130, 70),
}


def check() -> tuple[str, bool]:
    """Products, links and instructions that the kernels of each core count in one training step, beside those
    of the model. Whether all are equal.
    """
    torch = import_module("torch")
    engine, device = import_module("pctt.engine"), import_module("pctt.backends.devices")
    rows: list[Sequence[object]] = []
    inference, batch_size = pctt.Inference(num_steps=5, rate=0.1), 40
    for name, widths in CHECKED.items():
        for cores in (1, 2):
            net = network(widths)
            runner = engine.Engine(
                net,
                pctt.init(net, seed=0),
                inference,
                ("input", net.output),
                learning=pctt.SGD(0.1),
                backend="tenstorrent",
                fused=True,
                cores_per_layer=cores,
            )
            backend = runner.backend
            backend.defines["COUNT_WORK"] = "1"
            data = {
                "input": torch.rand(batch_size, widths[0]),
                net.output: torch.rand(batch_size, widths[-1]),
            }
            runner.set_learning(0.1, 1)
            runner.relax(data, learn=True)
            before = backend.work()
            launches = backend.launches
            runner.relax(data, learn=True)
            launches = backend.launches - launches
            counted = [
                tuple(b - a for a, b in zip(old, new, strict=True))
                for old, new in zip(before, backend.work(), strict=True)
            ]
            found = fused_placement(net, backend.chip, cores, batch_size, inference, pctt.SGD(0.1))
            expected = work_of(found)
            rows.append(
                [
                    *(name, backend.chip.name, cores, len(counted), launches),
                    *(f"{sum(c[i] for c in counted):,} / {sum(c[i] for c in expected):,}" for i in range(3)),
                    f"{backend.bytes_per_core():,} / {found.l1_bytes:,}",
                    "equal" if counted == expected else f"{counted} and not {expected}",
                ]
            )
            del runner, backend
            gc.collect()  # what lies on the card goes with them
    device.close_devices()
    head = ["network", "chip", "cores per layer", "cores", "launches", "products of tiles: counted / model"]
    head += ["links", "instructions", "L1 bytes: backend / model", "on every core"]
    return table(head, rows), all(row[-1] == "equal" for row in rows)


def work_of(found: FusedPlacement) -> list[tuple[int, ...]]:
    """Products, links and instructions of each core in a training step."""
    totals: list[tuple[int, ...]] = []
    for core in range(found.cores.total):
        steps = [s for section in found.sequence for s in found.sections[section][core].compute]
        work = [s.work for s in steps if s.code != "END"]
        totals.append((sum(w.products for w in work), sum(w.links for w in work), len(work)))
    return totals


TABLES: dict[str, Callable[[], str]] = {
    "networks": networks,
    "depth": depth,
    "width": width,
    "feedback": feedback,
    "traffic": traffic,
    "assumptions": assumptions,
    "faster": faster,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=tuple(TABLES), default=list(TABLES), metavar="NAME")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the figure, print no table")
    parser.add_argument(
        "--check", action="store_true", help="compare with the counts of a card, print no table"
    )
    arguments = parser.parse_args()
    if arguments.check:
        text, equal = check()
        print(text)
        return 0 if equal else 1
    if arguments.figure:
        draw(arguments.figure)
        return 0
    for name in arguments.tables:
        print(f"## {name}\n\n{TABLES[name]()}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
