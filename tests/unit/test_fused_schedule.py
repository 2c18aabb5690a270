"""The schedule of the fused kernel: no race, no deadlock, and hardly a wait that could be left out.

The streams of whole training steps are carried out by the model of tests/replay.py in orders drawn at random
and in adversarial ones. The oracle is the order of the program: every task after the other, so that there is
nobody to race with. That the model would notice is tested by faults planted in the words.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import replay
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import Action, Deadlock, Order, Outcome, Replay, orders, random_orders

from pctt import SGD, Adam, Dense, Inference, Network, chain
from pctt.assemble import assemble
from pctt.backends.fused_cores import Cores, evenly
from pctt.backends.fused_schedule import Counters, Stream, schedules
from pctt.backends.fused_stream import CODE, KERNELS, LINK, MOVEMENT, PROCESSOR, WINDOW
from pctt.backends.fused_tasks import Tasks
from pctt.backends.lowering import TILE, lower
from pctt.backends.precision import PrecisionPolicy
from pctt.groups import layout, padded

SECTIONS = ("initialise", "measure_initial", "finish", "measure", "gradients", "update")
ORDERS = 24

NETWORKS = {
    "two layers": chain(20, [Dense(40, "tanh"), Dense(10)]),
    "five of unequal widths": chain(
        70,
        [
            Dense(100, "tanh"),
            Dense(40, "silu", activate="input"),
            Dense(130, "tanh"),
            Dense(64, "gelu"),
            Dense(10),
        ],
    ),
    "no biases": chain(64, [*[Dense(64, "relu", bias=False)] * 4, Dense(10, bias=False)]),
    "sixteen layers": chain(64, [*[Dense(64, "tanh", activate="input")] * 15, Dense(10)]),
}

VARIANTS: dict[str, tuple[Inference, Any]] = {
    "pc": (Inference(6, 0.1), SGD(0.1)),
    "pc, SGD with momentum": (Inference(4, 0.1), SGD(0.1, momentum=0.9)),
    "pc, Adam": (Inference(4, 0.1), Adam(1e-3)),
    "fixed": (Inference(6, 0.1, "fixed"), SGD(0.1)),
    "zil": (Inference(6, 1.0, weights_at="staircase"), SGD(0.1)),
    "ipc": (Inference(5, 0.1, weights_at="every_step"), SGD(0.1)),
    "epc": (Inference(5, 0.1, variables="errors"), SGD(0.1)),
    "gauss-seidel": (Inference(4, 0.2, sweep="gauss_seidel"), SGD(0.1)),
    "momentum": (Inference(6, 0.1, dynamics="momentum", momentum=0.5), Adam(1e-3)),
}


@dataclass(frozen=True)
class Built:
    """sequence: the sections of two training steps, as the engine runs them.    names: of the sections."""

    replay: Replay
    sequence: list[int]
    names: dict[str, int]
    cores: Cores
    counters: Counters


@cache
def built(net: Network, variant: str = "pc", most: int = 1, rows: int = 32, num_steps: int = 0) -> Built:
    """most: cores of a layer.    num_steps: instead of the variant's."""
    inference, learning = VARIANTS[variant]
    inference = replace(inference, num_steps=num_steps or inference.num_steps)
    where = layout(net, True, TILE)
    assembled = assemble(where, inference, (0, len(net.layers)), (), learning, uniform=True)
    program = lower(assembled, where, PrecisionPolicy())
    sections = {name: getattr(program, name) for name in SECTIONS}
    sections |= {f"step {number}": code for number, code in enumerate(program.steps)}
    codes = list(dict.fromkeys(filter(None, sections.values())))
    names = {name: codes.index(code) for name, code in sections.items() if code}
    cores = Cores(tuple(evenly(padded(width, TILE) // TILE, most) for width in net.widths))
    tasks = Tasks(program, codes, cores, rows).sections
    found, counters = schedules(tasks, cores.total)
    streams = [schedule.streams() for schedule in found]
    walk = [f"step {number}" for number in program.walk]
    step = ["initialise", "measure_initial", *walk, "finish", "measure", "gradients", "update"]
    sequence = [names[name] for name in step if name in names]
    return Built(Replay(tasks, streams, counters), 2 * sequence, names, cores, counters)


def drawn_orders(num_cores: int) -> list[Order]:
    """A third at random, the others adversarial."""
    adversarial = list(orders(num_cores))
    Random(0).shuffle(adversarial)
    return [*random_orders(num_cores, ORDERS // 3), *adversarial[: ORDERS - ORDERS // 3]]


def assert_runs_as_the_program(it: Built, sequence: Sequence[int], every: Sequence[Order]) -> None:
    expected = it.replay.sequential(sequence)
    for order in every:
        found = it.replay.run(sequence, order)
        assert not it.replay.difference(expected, found), (
            f"{order.name}: {it.replay.difference(expected, found)}"
        )
        assert not found.left, f"{order.name}: {found.left}"


# --- races and deadlocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "rows"), [(1, 32), (2, 128), (3, 32), (4, 32)])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_order_of_the_processors_changes_a_result(name: str, most: int, rows: int) -> None:
    """Every result of two training steps is made of the same results as in the order of the program, and in
    the end every token and message has been taken. A race would be a wrong number now and then.
    """
    it = built(NETWORKS[name], "pc", most, rows)
    assert_runs_as_the_program(it, it.sequence, drawn_orders(it.cores.total))


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_order_changes_a_result_of_any_variant(variant: str, most: int) -> None:
    it = built(NETWORKS["five of unequal widths"], variant, most)
    assert_runs_as_the_program(it, it.sequence, drawn_orders(it.cores.total))


def test_no_order_changes_a_result_of_long_inference() -> None:
    it = built(NETWORKS["sixteen layers"], num_steps=40)
    assert_runs_as_the_program(it, it.sequence, drawn_orders(it.cores.total))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sections_may_be_repeated(variant: str) -> None:
    """As the schedule says: sections follow each other in any order and number."""
    it = built(NETWORKS["five of unequal widths"], variant, 2)
    for section in dict.fromkeys(it.sequence):
        assert_runs_as_the_program(it, [section] * 4, drawn_orders(it.cores.total)[::3])


@settings(max_examples=15)
@given(
    widths=st.lists(st.integers(1, 130), min_size=3, max_size=5),
    placement=st.sampled_from(["input", "output"]),
    variant=st.sampled_from(sorted(VARIANTS)),
    most=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_no_order_changes_a_result_of_any_network(
    widths: list[int], placement: str, variant: str, most: int, seed: int
) -> None:
    net = chain(widths[0], [Dense(width, "tanh", activate=placement) for width in widths[1:]])
    it = built(net, variant, most)
    assert_runs_as_the_program(it, it.sequence, list(random_orders(it.cores.total, 4, seed)))


def test_counters_may_pass_their_largest_value() -> None:
    """They outlive launches, so that after 2**32 messages they begin again."""
    it = built(NETWORKS["sixteen layers"], most=2)
    expected = it.replay.sequential(it.sequence)
    for before in (1, 3, 10):
        for order in random_orders(it.cores.total, 4):
            found = it.replay.run(it.sequence, order, counted=2**32 - before)
            assert not it.replay.difference(expected, found) and not found.left


# --- planted faults -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One wait or message less on one core; `stream` is what the core reads instead."""

    kind: str
    core: int
    at: int
    stream: Stream


def without(words: list[Any], action: Action) -> list[Any]:
    return words[: action.at] + words[action.at + action.length :]


def postponed(words: list[Any], wait: Action) -> list[Any]:
    """Waits with the next wait on that counter or, if there is none, at the end of the section, so that the
    messages still to come are counted as before.
    """
    words = list(words)
    later = [
        a for a in replay.actions(words) if a.at > wait.at and (a.code, a.counter) == ("WAIT", wait.counter)
    ]
    if later:
        words[later[0].at] += wait.count << 8
    else:
        words.insert(len(words) - 1, words[wait.at])
    return without(words, wait)


def before_its_bytes(words: list[Any], signal: Action) -> list[Any] | None:
    """The message goes out ahead of the moves that it speaks of; None for a credit, which has no moves."""
    earlier = [a for a in replay.actions(words) if a.at < signal.at]
    moves: list[Action] = []
    while earlier and earlier[-1].code in ("MOVE", "SIGNAL"):
        moves.append(earlier.pop())
    if not any(move.code == "MOVE" for move in moves):
        return None
    first, own = moves[-1].at, words[signal.at : signal.at + signal.length]
    return words[:first] + own + without(words, signal)[first:]


def faults(it: Built, section: int) -> Iterator[Fault]:
    """Every single one of a section, but for the own sends that END waits for. They are seldom needed, as the
    reader goes on to the next section only after them.
    """
    for core, stream in enumerate(it.replay.streams[section]):
        channels = {number: c for c, number in it.counters.numbers.items() if c.receiver == core}
        gives = [action.at for action in replay.actions(stream.reader) if action.code == "GIVE"]
        *_, end = replay.instructions(stream.compute)
        before_end = gives[:-1] if end.go else gives
        for action in replay.actions(stream.reader):
            if action.code == "WAIT":
                local = channels[action.counter].local
                if not local or action.at < max(before_end, default=-1):
                    kind = "own send not waited for" if local else "message not waited for"
                    changed = replace(stream, reader=postponed(stream.reader, action))
                    yield Fault(kind, core, action.at, changed)
            elif action.code == "GIVE":
                yield Fault(
                    "no token", core, action.at, replace(stream, reader=without(stream.reader, action))
                )
        for action in replay.actions(stream.writer):
            if action.code == "WAIT":
                changed = replace(stream, writer=postponed(stream.writer, action))
                yield Fault("credit not waited for", core, action.at, changed)
            elif action.code == "SIGNAL":
                yield Fault(
                    "no message", core, action.at, replace(stream, writer=without(stream.writer, action))
                )
                if (words := before_its_bytes(stream.writer, action)) is not None:
                    yield Fault("message before its bytes", core, action.at, replace(stream, writer=words))
        yield from _unfinished(core, stream)


def _unfinished(core: int, stream: Stream) -> Iterator[Fault]:
    """An instruction does not wait for results of its core; the next one that waits does so for both."""
    waiting = [i for i in replay.instructions(stream.compute) if i.done or i.code == "END"]
    for instruction, later in pairwise(waiting):
        words: list[Any] = list(stream.compute)
        words[instruction.at] -= instruction.done << 9
        words[later.at] += instruction.done << 9
        yield Fault("result not waited for", core, instruction.at, replace(stream, compute=words))


def is_noticed(it: Built, section: int, fault: Fault, sequence: list[int], expected: Outcome) -> bool:
    changed = it.replay.changed(section, fault.core, fault.stream)
    every = [*orders(it.cores.total), *random_orders(it.cores.total, 10)]
    for order in every:
        try:
            if changed.difference(expected, changed.run(sequence, order)):
                return True
        except Deadlock:
            return True
    return False


RESULT = "result not waited for"
PLANTED = {
    "inference step": ("pc", "step 0", 1, set()),
    "inference step, two cores": ("pc", "step 0", 2, set()),
    "step with fixed predictions": ("fixed", "step 0", 1, set()),
    "gauss-seidel step": ("gauss-seidel", "step 0", 1, set()),
    "step with learning": ("ipc", "step 0", 1, {RESULT}),
    "initialise": ("pc", "initialise", 1, {RESULT}),
    "gradients": ("pc", "gradients", 1, set()),
    "measure": ("pc", "measure", 1, set()),
}
"""Variant, section, cores of a layer, and faults that need not be noticed: where rows are spread, the message
that they have arrived says that all before is done.
"""

FOUR = chain(64, [*[Dense(64, "tanh", activate="input")] * 3, Dense(10)])


@pytest.mark.parametrize("name", PLANTED)
def test_every_wait_is_needed(name: str) -> None:
    """Without it some order gives other results, or none can go on. So the waits are no more than needed, and
    the tests above would notice one too few.
    """
    variant, section_name, most, redundant = PLANTED[name]
    it = built(FOUR, variant, most)
    section = it.names[section_name]
    sequence = [section] * 4
    expected = it.replay.sequential(sequence)
    planted = [fault for fault in faults(it, section) if fault.kind not in redundant]
    assert planted
    unnoticed = [f for f in planted if not is_noticed(it, section, f, sequence, expected)]
    assert not unnoticed, [(fault.kind, fault.core, fault.at) for fault in unnoticed]


def test_a_deadlock_says_who_waits_for_what() -> None:
    it = built(FOUR)
    section = it.names["step 0"]
    fault = next(f for f in faults(it, section) if f.kind == "no message" and f.core == 2)
    with pytest.raises(Deadlock, match=r"the reader of core \d waits for a message of core 2"):
        it.replay.changed(section, fault.core, fault.stream).run([section], Order("any"))


# --- words --------------------------------------------------------------------------------------------------


def all_streams() -> Iterator[tuple[Built, int, Stream]]:
    """Of every variant, with the core that each is for."""
    for variant in VARIANTS:
        for most in (1, 3):
            it = built(NETWORKS["five of unequal widths"], variant, most)
            for section in it.replay.streams:
                for core, stream in enumerate(section):
                    yield it, core, stream


def node_of(cores: Cores, core: int) -> int:
    return next(node for node in range(len(cores.slices)) if core in cores.of(node))


def test_the_numbers_of_the_header_are_distinct_and_complete() -> None:
    """An enumerator that the reader of the header overlooked would be missing on the host only."""
    text = re.sub(r"//[^\n]*", "", (KERNELS / "stream.h").read_text())
    found = {name: body for name, body in re.findall(r"enum (\w+)[^{]*\{(.*?)\}", text, re.DOTALL)}
    for name, numbers in {
        "Processor": PROCESSOR,
        "Window": WINDOW,
        "Code": CODE,
        "Link": LINK,
        "Movement": MOVEMENT,
    }.items():
        assert len(numbers) == found[name].count("=") == len(set(numbers.values())), name
        assert all(number < 256 for number in numbers.values()), name
    assert set(WINDOW.values()) <= set(range(32))
    assert {*replay.LINK_LENGTHS, LINK["STOP"]} == set(LINK.values())
    assert {*replay.FIXED_LENGTHS, "ELEMENTWISE"} == set(CODE)


def test_words_fit_and_streams_end_where_they_say() -> None:
    for _, _, stream in all_streams():
        for words in (stream.compute, stream.reader, stream.writer):
            assert all(0 <= word < 2**32 for word in words if isinstance(word, int))
        assert [i.code == "END" for i in replay.instructions(stream.compute)].index(True) == len(
            list(replay.instructions(stream.compute))
        ) - 1
        for words in (stream.reader, stream.writer):
            codes = [action.code for action in replay.actions(words)]
            assert codes.index("FINISH") == len(codes) - 1


def test_only_neighbours_talk() -> None:
    """Predictive coding is local: a core sends to those of the nodes beside its own, and to itself a message
    only where it has moved something to itself.
    """
    for it, core, stream in all_streams():
        moved: set[int | None] = set()
        for action in replay.actions(stream.writer):
            if action.code == "TAKE":
                moved = set()
            if action.core is None:
                continue
            assert abs(node_of(it.cores, core) - node_of(it.cores, action.core)) <= 1
            moved |= {action.core} if action.code == "MOVE" else set()
            assert action.core != core or core in moved


def test_a_counter_has_one_core_that_raises_it_and_one_processor_that_waits() -> None:
    """The two words of a counter are read and written without a lock."""
    raised: dict[Any, set[Any]] = defaultdict(set)
    awaited: dict[Any, set[str]] = defaultdict(set)
    for it, core, stream in all_streams():
        for processor in ("reader", "writer"):
            for action in replay.actions(getattr(stream, processor)):
                if action.code == "WAIT":
                    awaited[id(it), core, action.counter].add(processor)
                elif action.code in ("SIGNAL", "TALLY"):
                    owner = core if action.core is None else action.core
                    raised[id(it), owner, action.counter].add((core, action.code))
    assert raised.keys() == awaited.keys()
    assert all(len(found) == 1 for found in (*raised.values(), *awaited.values()))


def test_what_waits_for_a_message_reads_an_operand() -> None:
    """The unpacker waits, and the packer only for operands that it unpacks: an instruction without one would
    write its result before the message has come.
    """
    for _, _, stream in all_streams():
        for i in replay.instructions(stream.compute):
            assert i.loads or not i.go or i.code == "END", f"{i.code} writes {[o.ranges for o in i.stores]}"


def test_what_is_overwritten_in_place_is_read_before_tile_by_tile() -> None:
    """An instruction writes tile 0 before it reads tile 1, so where it reads what it writes it must do so in
    the same places.
    """
    for _, _, stream in all_streams():
        for i in replay.instructions(stream.compute):
            for load in i.loads:
                for store in i.stores:
                    apart = all(
                        a.tensor != b.tensor or a.stop <= b.start or b.stop <= a.start
                        for a in load.ranges
                        for b in store.ranges
                    )
                    in_place = i.code == "ELEMENTWISE" and load.ranges == store.ranges and not load.repeats
                    assert apart or in_place, i


def test_at_most_as_many_tokens_wait_as_are_counted() -> None:
    """Of a count of 16 bits: a section gives fewer DONE tokens than that before END takes the rest."""
    for _, _, stream in all_streams():
        found = list(replay.instructions(stream.compute))
        assert sum(i.done for i in found) == len(found) - 1 < 1 << 16
        sent = sum(i.send for i in found)
        taken = Counter(a.code for a in replay.actions(stream.writer))["TAKE"]
        gone = sum(a.code == "GIVE" for a in replay.actions(stream.reader))
        assert (sent, sum(i.go for i in found)) == (taken, gone)
