"""A picture of a benchmark: a panel per case, a bar per contender, its floor marked on it."""

# The import of matplotlib and its message are those of `plots.py`.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pctt.bench.result import Benchmark, CaseResult, Line
from pctt.plots import COLOURS, GREY, _matplotlib

OURS, BACKPROP, PEER = COLOURS[0], COLOURS[1], COLOURS[2]
OTHER = "#BBBBBB"  # does not do the same work


def draw_benchmark(found: Benchmark, path: Path) -> Path:
    """One SVG. Bars: milliseconds per training batch, medians over rounds; whiskers: least and most of them.

    Raises ImportError where matplotlib is not installed.
    """
    cases = found.cases
    columns = min(2, len(cases))
    rows = -(-len(cases) // columns)
    figure = _matplotlib("figure").Figure(figsize=(6 * columns, 1 + 2.4 * rows), layout="constrained")
    _matplotlib("backends.backend_svg").FigureCanvasSVG(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, case in zip(panels, cases, strict=False):
        _draw_case(axes, case)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    line, patch = _matplotlib("lines").Line2D, _matplotlib("patches").Patch
    handles = [
        patch(color=OURS, label="pctt"),
        patch(color=BACKPROP, label="backpropagation"),
        patch(color=PEER, label="other libraries, the same work"),
        line([], [], color="black", linewidth=2, label="floor: the products alone"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(_title(found), fontsize=10, fontweight="bold")
    settings = {"svg.fonttype": "none", "svg.hashsalt": "pctt"}  # the same benchmark, the same file
    with importlib.import_module("matplotlib").rc_context(settings):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def _title(found: Benchmark) -> str:
    where, rounds = found.environment, found.settings["rounds"]
    threads = f"{where['threads']} thread{'s' * (where['threads'] > 1)}"
    return f"{where['processor']}, {threads}, {where['date'][:10]}; medians of {rounds} interleaved rounds"


def _draw_case(axes: Any, case: CaseResult) -> None:
    lines, places = case.lines, range(len(case.lines))
    medians = [line.ms for line in lines]
    spread = [
        [line.ms - min(line.rounds) for line in lines],
        [max(line.rounds) - line.ms for line in lines],
    ]
    axes.barh(places, medians, color=[_colour(line) for line in lines], height=0.7)
    axes.errorbar(medians, places, xerr=spread, fmt="none", ecolor=GREY, elinewidth=1, capsize=2)
    for place, line in zip(places, lines, strict=True):
        axes.plot([line.floor] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
        axes.text(max(line.rounds), place, f" {line.ms:.3g}", va="center", fontsize=8)
    axes.set_yticks(places, labels=[line.name for line in lines])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(max(line.rounds) for line in lines))
    axes.set_title(case.title, fontsize=10)
    axes.set_xlabel("ms per training batch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def _colour(line: Line) -> str:
    if line.name == "pctt":
        return OURS
    if line.algorithm == "backprop":
        return BACKPROP
    return PEER if line.same is not None and line.same.ok else OTHER
