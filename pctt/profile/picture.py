"""A picture of a profile: bars for sections and layers, stacked by kind of operation."""

# The import of matplotlib and its message are those of `plots.py`.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pctt.placement.fused_walk import WAITING
from pctt.plots import COLOURS, GREY, _matplotlib
from pctt.profile.result import Part, Profile

OTHERS = "others"
MOST_NAMES = 40  # beside one another; of more bars not every one is named
Amounts = dict[str, dict[str, float]]
"""Microseconds by bar and kind of operation."""


def draw_profile(profile: Profile, path: Path) -> Path:
    """One SVG with two panels of bars: sections, and layers.

    The longest kinds of operation have a colour each. Of a prediction, layers are shown without waiting.

    Raises ImportError where matplotlib is not installed.
    """
    figure = _matplotlib("figure").Figure(figsize=(12, 5), layout="constrained")
    _matplotlib("backends.backend_svg").FigureCanvasSVG(figure)
    kinds = [row.name for row in profile.operations()]
    kept = kinds if len(kinds) <= len(COLOURS) else kinds[: len(COLOURS) - 1]
    by_section = _amounts(profile.parts, kept, lambda part: (part.section,))
    working = [part for part in profile.parts if part.operation != WAITING]
    by_layer = _amounts(working, kept, lambda part: part.layers)
    by_layer = {row.name: by_layer[row.name] for row in profile.layers()}
    colours = {**dict(zip(kept, COLOURS, strict=False)), OTHERS: GREY}
    unit = "us of all instructions" if profile.is_measured else "us of all cores together, predicted"
    for axes, title, amounts in zip(
        figure.subplots(1, 2), ("section", "layer"), (by_section, by_layer), strict=True
    ):
        _draw_bars(axes, amounts, colours)
        axes.set(title=f"By {title}", xlabel=unit)
    shown = [name for name in colours if name != OTHERS or len(kept) < len(kinds)]
    patch = _matplotlib("patches").Patch
    handles = [patch(color=colours[name], label=name) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), frameon=False)
    title = profile.title if len(profile.title) < 120 else f"{profile.title[:117]}..."
    figure.suptitle(title, fontsize=10, fontweight="bold")
    path = Path(path)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "pctt"}  # the same profile, the same file
    with importlib.import_module("matplotlib").rc_context(settings):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def _amounts(parts: Iterable[Part], kept: list[str], names_of: Callable[[Part], tuple[str, ...]]) -> Amounts:
    amounts: Amounts = {}
    for part in parts:
        kind, names = part.operation if part.operation in kept else OTHERS, names_of(part)
        for name in names:
            bar = amounts.setdefault(name, {})
            bar[kind] = bar.get(kind, 0.0) + 1e6 * part.seconds / len(names)
    return amounts


def _draw_bars(axes: Any, amounts: Amounts, colours: dict[str, str]) -> None:
    places, left = range(len(amounts)), [0.0] * len(amounts)
    for kind, colour in colours.items():
        widths = [bar.get(kind, 0.0) for bar in amounts.values()]
        axes.barh(places, widths, left=left, color=colour, height=0.7)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    named = slice(None, None, -(-len(amounts) // MOST_NAMES) or 1)
    axes.set_yticks(places[named], labels=list(amounts)[named])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
