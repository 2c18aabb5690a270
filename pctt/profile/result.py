"""What a profile says: where the time of one training step goes, as text, as numbers and as a trace."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pctt.placement.fused_walk import WAITING

WIDTH = 110
NAME = 22  # columns of a name in a table
OUTSIDE = "outside sections"
"""Of a training step all that is no section: data to the buffers, energies back to the host, Python."""


@dataclass(frozen=True)
class Section:
    """A section of the program within one training step.

    name: as `pctt.program.Program` has it.
    runs: how often it ran.    instructions: of one run.    seconds: of all runs.
    """

    name: str
    runs: int
    instructions: int
    seconds: float


@dataclass(frozen=True)
class Part:
    """An instruction of a section, with all its runs in one training step.

    operation, text: its name, and the whole instruction.
    layers: that it serves, each with an equal part of it.    seconds: of all runs, and so are the others.
    flops: of products.    eager, traced, floor: what the planner predicts for a card, in seconds.
    In a prediction of the fused kernel: all of one kind that the cores of a layer do in a section, the
    seconds of all cores added up.
    """

    section: str
    operation: str
    text: str
    layers: tuple[str, ...]
    runs: int
    seconds: float
    flops: int = 0
    eager: float | None = None
    traced: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Span:
    """Something on a track of the trace.

    name: what is shown on it.    start, stop: nanoseconds.    about: shown when it is selected.
    """

    track: str
    name: str
    start: int
    stop: int
    about: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table; a layer's flops and seconds are its parts of what serves several."""

    name: str
    count: int
    seconds: float
    products: float
    flops: float
    predictions: tuple[float, ...]


@dataclass(frozen=True)
class Profile:
    """Where the time of one training step goes.

    title: network and machine.    is_measured: else predicted, but for `whole`.
    batch_size, num_steps: samples and inference steps of a training step.
    sections, parts: what it consists of, coarse and fine.
    whole: median seconds of a training step in which nothing is measured.
    whole_range: the least and the most of them.
    by_section, by_instruction: how many times as long one takes in which every section, every instruction is
        timed.
    clock: seconds that timing adds to each of them, at least.
    outside: seconds of a training step that are in no section.
    predicted: seconds of a training step of the fused kernel, its launch by the host included.
    product_rate: FLOP/s of a large square product on the same machine.
    batches: that medians are over.    nodes: of the network, in order.
    spans: of one training step.    notes: what the times are.
    """

    title: str
    is_measured: bool
    batch_size: int
    num_steps: int
    batches: int
    nodes: tuple[str, ...]
    whole: float
    sections: tuple[Section, ...]
    parts: tuple[Part, ...]
    spans: tuple[Span, ...]
    notes: tuple[str, ...]
    whole_range: tuple[float, float] | None = None
    by_section: float | None = None
    by_instruction: float | None = None
    clock: float | None = None
    outside: float = 0.0
    predicted: float | None = None
    product_rate: float | None = None

    def __repr__(self) -> str:
        whole = f"{1e3 * self.whole:,.3g} ms" if self.is_measured else "predicted"
        return f"Profile: {self.title}; a training step: {whole}. print(profile) shows all."

    def __str__(self) -> str:
        return self.as_text()

    # --- sums -----------------------------------------------------------------------------------------------

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(part.flops for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of all instructions; in a prediction of all cores together."""
        return sum(part.seconds for part in self.parts)

    @property
    def product_seconds(self) -> float:
        """Seconds of one training step that the products would take at `product_rate`."""
        return sum(part.seconds for part in self.parts if part.flops)

    def section_shares(self) -> dict[str, float]:
        """Of the training step timed by section; they add to 1."""
        seconds = {section.name: section.seconds for section in self.sections}
        if self.is_measured:
            seconds[OUTSIDE] = self.outside
        total = sum(seconds.values())
        return {name: each / total for name, each in seconds.items()}

    def operations(self) -> list[Row]:
        """What each kind of operation took, the longest first."""
        rows = self._rows(lambda part: (part.operation,))
        return sorted(rows, key=lambda row: -row.seconds)

    def layers(self) -> list[Row]:
        """What the instructions of each layer took, without waiting. One that serves several counts at each
        of them, with an equal part of its time.
        """
        found = {row.name: row for row in self._rows(lambda part: part.layers)}
        order = [*self.nodes, *found]
        return sorted(found.values(), key=lambda row: order.index(row.name))

    def _rows(self, names_of: Callable[[Part], tuple[str, ...]]) -> list[Row]:
        found: dict[str, list[tuple[Part, int]]] = {}
        for part in self.parts:
            names = names_of(part)
            if part.operation == WAITING and names != (WAITING,):
                continue
            for name in dict.fromkeys(names):
                found.setdefault(name, []).append((part, len(set(names))))
        return [_row(name, parts) for name, parts in found.items()]

    # --- text -----------------------------------------------------------------------------------------------

    def as_text(self) -> str:
        """Tables by section, by kind of operation and by layer, in ASCII, at most 110 columns wide."""
        lines = [line for text in (self.title, *self.notes) for line in _wrapped(text)] + [""]
        lines += self._summary()
        shares = self.section_shares()
        lines += ["", _head("section", "runs", "instr.", self.flops > 0, self._predicts)]
        for section in self.sections:
            row = _row(section.name, [(part, 1) for part in self.parts if part.section == section.name])
            counts = f"{section.runs:>7,}{section.instructions:>8,}"
            lines.append(self._line(row, counts, section.seconds, shares[section.name]))
        if self.is_measured:
            outside = Row(OUTSIDE, 0, self.outside, 0.0, 0.0, ())
            lines.append(self._line(outside, " " * 15, self.outside, shares[OUTSIDE]))
        tables = (("operation", self.operations()), ("layer", self.layers()))
        for name, rows in tables:
            lines += ["", _head(name, "", "instr.", self.flops > 0, self._predicts)]
            whole = sum(row.seconds for row in rows) or 1.0
            lines += [self._line(row, f"{row.count:>15,}", row.seconds, row.seconds / whole) for row in rows]
        return "\n".join(lines) + "\n"

    @property
    def _predicts(self) -> bool:
        return any(part.eager is not None for part in self.parts)

    def _summary(self) -> list[str]:
        if self.predicted is not None:
            text = f"training step, predicted: {_us(self.predicted)} us with its launch; " + (
                f"sections: time passed; operations and layers: time of all cores, {_us(self.seconds)} us."
            )
            return [*_wrapped(text), *_wrapped(f"training step, wall time here: {_us(self.whole)} us")]
        assert self.by_section is not None and self.by_instruction is not None
        assert self.clock is not None and self.whole_range is not None
        least, most = self.whole_range
        text = (
            f"training step: {_us(self.whole)} us [{_us(least)}, {_us(most)}]; timing its sections adds "
            f"{self.by_section - 1:+.1%}, its instructions {self.by_instruction - 1:+.1%} (medians of "
            f"neighbouring steps); reading the clock takes {1e9 * self.clock:.0f} ns."
        )
        lines = _wrapped(text)
        if self.flops:
            rate = self.flops / self.product_seconds
            text = (
                f"products: {self.product_seconds / self.seconds:.1%} of the instructions' time, "
                f"{self.flops / 1e6:,.1f} MFLOP at {rate / 1e9:,.1f} GFLOP/s"
            )
            if self.product_rate is not None:
                text += (
                    f"; a large square product reaches {self.product_rate / 1e9:,.1f} here, which puts "
                    f"their floor at {_us(self.flops / self.product_rate)} us"
                )
            lines += _wrapped(text + ".")
        return lines

    def _line(self, row: Row, counts: str, seconds: float, share: float) -> str:
        rate = f"{row.flops / row.products / 1e9:,.1f}" if row.products else ""
        predictions = "".join(f"{_us(each):>11}" for each in row.predictions) if self._predicts else ""
        text = f"{_short(row.name):<{NAME}}{counts}{_us(seconds):>14}{share:>8.1%}{rate:>10}{predictions}"
        return text.rstrip()

    # --- numbers and trace ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All but the trace, as JSON-ready values; times in seconds."""
        shares = self.section_shares()
        return {
            "title": self.title,
            "notes": list(self.notes),
            "measured": self.is_measured,
            "batch_size": self.batch_size,
            "num_steps": self.num_steps,
            "batches": self.batches,
            "training_step": self.whole,
            "training_step_range": None if self.whole_range is None else list(self.whole_range),
            "times_as_long_timed_by_section": self.by_section,
            "times_as_long_timed_by_instruction": self.by_instruction,
            "training_step_predicted": self.predicted,
            "clock": self.clock,
            "outside": self.outside,
            "flops": self.flops,
            "product_seconds": self.product_seconds,
            "product_rate": self.product_rate,
            "sections": [{**asdict(section), "share": shares[section.name]} for section in self.sections],
            "operations": self._entries(self.operations()),
            "layers": self._entries(self.layers()),
            "parts": [{**asdict(part), "layers": list(part.layers)} for part in self.parts],
        }

    def _entries(self, rows: list[Row]) -> list[dict[str, Any]]:
        whole, names = sum(row.seconds for row in rows) or 1.0, ("eager", "traced", "floor")
        return [
            {
                "name": row.name,
                "instructions": row.count,
                "seconds": row.seconds,
                "share": row.seconds / whole,
                "flops": row.flops,
                **(dict(zip(names, row.predictions, strict=True)) if self._predicts else {}),
            }
            for row in rows
        ]

    def trace(self) -> dict[str, Any]:
        """One training step in the format of chrome://tracing and ui.perfetto.dev; times in microseconds."""
        tracks = {track: number for number, track in enumerate(dict.fromkeys(s.track for s in self.spans), 1)}
        kind = "measured" if self.is_measured else "predicted, not measured"
        events: list[dict[str, Any]] = [_about("process_name", 0, {"name": f"{kind}: {self.title}"})]
        for track, number in tracks.items():
            events.append(_about("thread_name", number, {"name": track}))
            events.append(_about("thread_sort_index", number, {"sort_index": number}))
        for span in self.spans:
            events.append(
                {
                    "name": span.name,
                    "cat": kind.partition(",")[0],
                    "ph": "X",
                    "pid": 1,
                    "tid": tracks[span.track],
                    "ts": span.start / 1000,
                    "dur": (span.stop - span.start) / 1000,
                    "args": {"about": span.about} if span.about else {},
                }
            )
        return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"notes": " ".join(self.notes)}}


def _about(name: str, track: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 1, "tid": track, "args": arguments}


def _row(name: str, parts: Iterable[tuple[Part, int]]) -> Row:
    """parts: with the number of rows that share them."""
    count, seconds, products, flops, predictions = 0, 0.0, 0.0, 0.0, [0.0, 0.0, 0.0]
    for part, sharers in parts:
        count += part.runs
        seconds += part.seconds / sharers
        products += part.seconds / sharers if part.flops else 0.0
        flops += part.flops / sharers
        for place, each in enumerate((part.eager, part.traced, part.floor)):
            predictions[place] += (each or 0.0) / sharers
    return Row(name, count, seconds, products, flops, tuple(predictions))


def _head(name: str, first: str, second: str, rates: bool, predicts: bool) -> str:
    columns = "".join(f"{head:>11}" for head in ("eager us", "traced us", "floor us")) if predicts else ""
    rate = f"{'GFLOP/s':>10}" if rates else ""
    return f"{name:<{NAME}}{first:>7}{second:>8}{'us':>14}{'share':>8}{rate}{columns}"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()


def _short(name: str) -> str:
    name = _ascii(name)
    return name if len(name) < NAME else f"{name[: NAME - 2]}~"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(_ascii(text), WIDTH)
