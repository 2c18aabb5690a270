"""The predicted time line of the fused kernel: what every core does when, in the walk of `fused_walk.py`."""

from __future__ import annotations

from collections import defaultdict

from pctt.backends.fused_plan import FusedPlan
from pctt.engine import Engine
from pctt.network import INPUT
from pctt.placement.fused_cost import AFTER, BEFORE, FusedPlacement, fused_placement
from pctt.placement.fused_walk import WAITING, Doing
from pctt.profile.result import Part, Profile, Section, Span


def predicted(engine: Engine, batch_size: int, batches: int, whole: float, notes: tuple[str, ...]) -> Profile:
    """The profile of a fused engine: predicted, beside `whole`, the seconds that a step took here."""
    backend = engine.backend
    assert isinstance(backend, FusedPlan)
    if set(engine.clamped) != {INPUT, engine.net.output} or engine.placed:
        raise ValueError(
            "the time line of the fused kernel is predicted for a clamped input and a clamped output; clamp "
            "these two, or drop fused=True."
        )
    placement = fused_placement(
        engine.net,
        backend.chip,
        backend.cores_per_layer,
        backend.rows(batch_size),
        engine.inference,
        engine.learning,
        backend.policy,
    )
    sequence = placement.sequence
    walk = placement.run(sequence)
    seen = walk.doings
    names, hertz = _names(placement), placement.chip.clock_hz
    nodes = [name for node, name in enumerate(engine.net.nodes) for _ in placement.cores.of(node)]
    across, down = placement.chip.grid
    widths = "-".join(map(str, engine.net.widths))
    return Profile(
        title=(
            f"{widths} in the fused kernel on {placement.chip.name}, {placement.cores.total} of "
            f"{across * down} cores, batches of {batch_size}, {engine.program.num_steps} inference steps"
        ),
        is_measured=False,
        batch_size=batch_size,
        num_steps=engine.program.num_steps,
        nodes=engine.net.nodes,
        batches=batches,
        whole=whole,
        sections=tuple(_sections(placement, names, walk.ends)),
        parts=tuple(_parts(placement, seen, names, nodes, walk.ends[-1])),
        spans=tuple(_spans(seen, names, nodes, walk.ends, hertz)),
        notes=(
            "us: predicted, not measured (docs/results/fused.md); a simulator of the kernel keeps no time.",
            f"The products alone: {1e6 * placement.floor(sequence):,.1f} us, on the core with the most.",
            f"wall time: median of {batches} training steps here. "
            + " ".join(notes).replace("us: ", "It is "),
        ),
        predicted=placement.chip.eager_launch_seconds + walk.ends[-1] / hertz,
    )


def _names(placement: FusedPlacement) -> list[str]:
    """Of each position of the sequence."""
    before, after = ([name for name in part if name in placement.names] for part in (BEFORE, AFTER))
    kinds = list(dict.fromkeys(placement.walk))
    return [*before, *(f"step {kinds.index(section) + 1}" for section in placement.walk), *after]


def _sections(placement: FusedPlacement, names: list[str], ends: list[float]) -> list[Section]:
    """seconds: from the last core's end of the section before to its end of this one."""
    cycles: dict[str, float] = defaultdict(float)
    instructions: dict[str, int] = {}
    for position, (name, section) in enumerate(zip(names, placement.sequence, strict=True)):
        cycles[name] += ends[position] - (ends[position - 1] if position else 0.0)
        instructions[name] = sum(len(words.compute) for words in placement.sections[section])
    hertz = placement.chip.clock_hz
    return [
        Section(name, names.count(name), instructions[name], cycles[name] / hertz) for name in instructions
    ]


def _parts(
    placement: FusedPlacement, seen: list[Doing], names: list[str], nodes: list[str], end: float
) -> list[Part]:
    cycles: dict[tuple[str, str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    last = dict.fromkeys(range(placement.cores.total), 0.0)
    for doing in seen:
        key = names[doing.position], doing.what, nodes[doing.core]
        cycles[key] += doing.stop - doing.start
        counts[key] += 1
        last[doing.core] = max(last[doing.core], doing.stop)
    for core, stop in last.items():  # has nothing left to do until the slowest is done
        cycles[names[-1], WAITING, nodes[core]] += end - stop
    hertz = placement.chip.clock_hz
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    keys = sorted(cycles, key=lambda key: (nodes.index(key[2]), order[key[0]]))
    return [
        Part(section, what, "", (node,), counts[section, what, node], cycles[section, what, node] / hertz)
        for section, what, node in keys
    ]


def _spans(
    seen: list[Doing], names: list[str], nodes: list[str], ends: list[float], hertz: float
) -> list[Span]:
    def nanoseconds(cycles: float) -> int:
        return round(1e9 * cycles / hertz)

    starts = [0.0, *ends[:-1]]
    sections = [
        Span("end of each section on the last core", name, nanoseconds(start), nanoseconds(stop))
        for name, start, stop in zip(names, starts, ends, strict=True)
    ]
    cores = [
        Span(
            f"core {doing.core:>3} {nodes[doing.core]}",
            doing.what,
            nanoseconds(doing.start),
            nanoseconds(doing.stop),
            names[doing.position],
        )
        for doing in sorted(seen, key=lambda doing: (doing.core, doing.start))
    ]
    return [*sections, *cores]
