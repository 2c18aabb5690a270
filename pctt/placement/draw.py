"""A plan of a chip to look at: which core holds which layer, and how full its memory is.

`as_text` is for a terminal and needs nothing. `save_picture` needs matplotlib (`pip install "pctt[plot]"`),
imported only when something is drawn, and without its global state.
"""

from __future__ import annotations

import importlib
import os
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pctt import sketch
from pctt._checks import require_count, require_one_of
from pctt.placement.chips import cores
from pctt.plots import COLOUR_MAP, COLOURS, GREY, MAP_END

WIDTH = 110  # columns of text
BAR = 20  # characters of a bar
MAX_LABEL = 16  # characters of a label beside a bar
SUFFIXES = (".svg", ".png")

# In the order in which bars stack them. Greys, because colours stand for layers; hatched is what comes and
# goes, solid is what stays.
STYLES: Mapping[str, dict[str, str]] = {
    "weights": {"facecolor": "#303030"},
    "learning state": {"facecolor": "#707070"},
    "activities and errors": {"facecolor": "#b4b4b4"},
    "transient": {"facecolor": "#ffffff", "hatch": "////"},
    "circular buffers": {"facecolor": "#ffffff", "hatch": "...."},
}
KINDS = tuple(STYLES)
MAX_HEIGHT = 15.0  # inches of the column of bars; more cores make thinner bars
NO_LAYER = "#e0e0e0"
UNUSED = "#f7f7f7"


@dataclass(frozen=True)
class CoreUse:
    """core: logical (x, y).
    label: what it holds, in a word.
    layer: the number that picks its colour, None for a core that serves no layer.
    bytes_by_kind: bytes of L1 by kind, one of `KINDS`; kinds that are left out hold nothing."""

    core: tuple[int, int]
    label: str
    layer: int | None
    bytes_by_kind: dict[str, int]

    def __post_init__(self) -> None:
        if self.layer is not None:
            require_count("layer", self.layer)
        for kind, size in self.bytes_by_kind.items():
            require_one_of(f"kind of bytes on core {self.core}", kind, KINDS)
            require_count(f"bytes of {kind} on core {self.core}", size)

    @property
    def total_bytes(self) -> int:
        """Bytes of L1 that it holds, of all kinds."""
        return sum(self.bytes_by_kind.values())


@dataclass(frozen=True)
class FloorPlan:
    """title: above the drawing.
    grid: (columns, rows) of cores.
    l1_bytes: bytes of L1 that one core has to give.
    cores: those in use, each once. A core may hold more than `l1_bytes`; the drawing then says so.
    lines: the legend, one sentence per layer."""

    title: str
    grid: tuple[int, int]
    l1_bytes: int
    cores: tuple[CoreUse, ...]
    lines: tuple[str, ...]

    def __repr__(self) -> str:
        return f"FloorPlan: {self.title}; {len(self.cores)} in use. print(plan) shows them."

    def __str__(self) -> str:
        return as_text(self)

    def _repr_svg_(self) -> str:
        return sketch.floor_plan(self)

    def __post_init__(self) -> None:
        require_count("l1_bytes", self.l1_bytes, least=1)
        free = set(cores(self.grid))
        columns, rows = self.grid
        for use in self.cores:
            if use.core not in free:
                raise ValueError(
                    f"core {use.core} ({use.label}) is listed twice or lies outside the grid of {columns} "
                    f"columns by {rows} rows; list each used core of the grid once."
                )
            free.remove(use.core)


def as_text(plan: FloorPlan) -> str:
    """The plan in ASCII, at most 110 columns wide: the grid, a bar per used core, the legend.

    Neighbours in the list of cores that have one label and hold the same share a bar.

    A bar shows the share of L1 in use: one mark as soon as there is anything, full only when nothing is left.
    Characters outside ASCII become question marks.

    Raises:
        ValueError: the grid has more columns than fit side by side.
    """
    lines = [*_wrapped(plan.title), "", *_grid_rows(plan), "", *_bar_rows(plan)]
    if plan.lines:
        lines += ["", *(part for line in plan.lines for part in _wrapped(line))]
    return "\n".join(lines) + "\n"


def save_picture(plan: FloorPlan, path: Path) -> Path:
    """Draw the plan: left the grid, coloured by layer, right the L1 of each used core, by kind.

    The file appears whole or not at all, and the same plan gives the same SVG, byte for byte, with the same
    matplotlib.

    Args:
        plan: what to draw.
        path: an .svg or .png to write; its folder is created.

    Returns:
        The path written.

    Raises:
        ValueError: another suffix.
        ModuleNotFoundError: matplotlib is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"a picture's name must end in .svg or .png, got {path.name!r}; rename it.")
    figure = _draw(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Labels stay text, so that they can be searched; ids come from the salt instead of a random number.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "pctt"}
    metadata = {"Date": None} if suffix == ".svg" else None
    try:
        with _matplotlib().rc_context(settings):
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
        os.replace(temporary, path)
    finally:  # after a successful replace there is nothing left to remove
        with suppress(OSError):
            temporary.unlink()
    return path


def _grid_rows(plan: FloorPlan) -> list[str]:
    columns, rows = plan.grid
    labels = {use.core: _ascii(use.label) for use in plan.cores}
    margin = len(f"y={rows - 1}")
    room = (WIDTH - margin) // columns - 1
    if room < 2:
        raise ValueError(
            f"a grid of {columns} columns does not fit into {WIDTH} characters; use save_picture for it."
        )
    cell = min(room, max([len(f"x={columns - 1}"), *map(len, labels.values())]))
    header = " " * margin + "".join(f" {_short(f'x={x}', cell):<{cell}}" for x in range(columns))
    result = [header.rstrip()]
    for y in range(rows):
        names = (_short(labels.get((x, y), "."), cell) for x in range(columns))
        result.append((f"{f'y={y}':<{margin}}" + "".join(f" {name:<{cell}}" for name in names)).rstrip())
    return result


def _bar_rows(plan: FloorPlan) -> list[str]:
    used = len(plan.cores)
    result = [f"L1 per core, {plan.l1_bytes:,} B; {used} of {plan.grid[0] * plan.grid[1]} cores in use"]
    runs = [
        list(run) for _, run in groupby(plan.cores, lambda use: (use.label, use.layer, use.bytes_by_kind))
    ]
    where = max((len(_place(run)) for run in runs), default=0)
    label = min(MAX_LABEL, max((len(_ascii(use.label)) for use in plan.cores), default=0))
    digits = max((len(f"{use.total_bytes:,}") for use in plan.cores), default=0)
    for run in runs:
        use = run[0]
        total = use.total_bytes
        marks = _marks(total, plan.l1_bytes)
        over = f"  {total - plan.l1_bytes:,} B too many" if total > plan.l1_bytes else ""
        result.append(
            f"{_place(run):<{where}} {_short(_ascii(use.label), label):<{label}} "
            f"[{'#' * marks:-<{BAR}}] {total:>{digits},} B {total / plan.l1_bytes:>6.1%}{over}"
        )
    return result


def _marks(total: int, limit: int) -> int:
    """Marks of a bar: rounded, but neither empty for something nor full while anything is left."""
    if total >= limit:
        return BAR
    return min(BAR - 1, max(round(BAR * total / limit), 1 if total else 0))


def _place(run: Sequence[CoreUse]) -> str:
    ends = [run[0]] if len(run) == 1 else [run[0], run[-1]]
    return " to ".join(f"({x},{y})" for x, y in (use.core for use in ends))


def _short(text: str, width: int) -> str:
    """Cut in the middle, because names of layers differ at their ends."""
    if len(text) <= width:
        return text
    tail = width // 2
    return f"{text[: width - tail - 1]}~{text[-tail:]}"


def _ascii(text: str) -> str:
    return " ".join(text.split()).encode("ascii", "replace").decode()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(_ascii(text), WIDTH, subsequent_indent="    ") or [""]


def _draw(plan: FloorPlan) -> Any:
    columns, rows = plan.grid
    legend = [part for line in plan.lines for part in textwrap.wrap(line, 88, subsequent_indent="    ")]
    grid_height = max(1.5, min(6.0, 6.4 * rows / columns)) + 0.6
    legend_height = 0.16 * len(legend) + 0.1
    row_height = min(0.3, MAX_HEIGHT / max(1, len(plan.cores)))
    height = max(grid_height + legend_height, row_height * len(plan.cores) + 1.2) + 0.6
    figure = _matplotlib("figure").Figure(figsize=(14, height), dpi=130, layout="constrained")
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06)
    # The legend's part takes what is left below a grid of fixed height.
    ratios = [grid_height, height - grid_height]
    layout = figure.add_gridspec(2, 2, height_ratios=ratios, width_ratios=[1, 1])
    colours = _layer_colours(plan)
    _draw_grid(figure.add_subplot(layout[0, 0]), plan, colours)
    words = figure.add_subplot(layout[1, 0])
    words.set_axis_off()
    style = {"family": "monospace", "fontsize": 8, "va": "top", "parse_math": False}
    words.text(0, 1, "\n".join(legend), transform=words.transAxes, **style)
    _draw_bars(figure.add_subplot(layout[:, 1]), plan, colours, 72 * row_height)
    figure.suptitle(plan.title, fontweight="bold", parse_math=False)
    return figure


def _draw_grid(axes: Any, plan: FloorPlan, colours: dict[int | None, str]) -> None:
    rectangle = _matplotlib("patches").Rectangle
    columns, rows = plan.grid
    uses = {use.core: use for use in plan.cores}
    points = 72 * 5.0 / max(columns, rows)  # of one cell's side, roughly
    for x, y in cores(plan.grid):
        use = uses.get((x, y))
        colour = UNUSED if use is None else colours[use.layer]
        axes.add_patch(rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=colour, edgecolor=GREY, lw=0.5))
        if use is None:
            continue
        label = _short(use.label, 12)
        size = min(9.0, points / (0.62 * max(1, len(label))))
        ink = "white" if _is_dark(colour) else "black"
        style = {"ha": "center", "va": "center", "fontsize": size, "color": ink, "parse_math": False}
        axes.text(x, y, label, **style)
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), aspect="equal")
    axes.set(xticks=range(columns), yticks=range(rows), xlabel="x", ylabel="y")
    axes.set_title(f"{len(plan.cores)} of {columns * rows} cores in use")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_bars(axes: Any, plan: FloorPlan, colours: dict[int | None, str], points: float) -> None:
    """points: height of one bar and its gap."""
    axes.set(title="L1 of each used core", xlabel="KiB")
    most = max((use.total_bytes for use in plan.cores), default=0)
    places = list(range(len(plan.cores)))
    left = [0.0] * len(places)
    for kind, style in STYLES.items():
        sizes = [use.bytes_by_kind.get(kind, 0) / 1024 for use in plan.cores]
        if any(sizes):
            axes.barh(
                places, sizes, left=left, height=0.72, label=kind, edgecolor=GREY, linewidth=0.4, **style
            )
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    limit = f"L1 of a core, {plan.l1_bytes:,} B"
    axes.axvline(plan.l1_bytes / 1024, color="black", linestyle="--", linewidth=1.4, label=limit)
    axes.set(xlim=(0, 1.04 * max(most, plan.l1_bytes) / 1024), ylim=(max(8, len(places)) - 0.4, -0.6))
    names = [f"{_short(use.label, MAX_LABEL)} {_place([use])}" for use in plan.cores]
    axes.set_yticks(places, labels=names, fontsize=min(8.0, 0.75 * points), parse_math=False)
    # A swatch ties the bar to the core's colour in the grid.
    for place, use in zip(places, plan.cores, strict=True):
        style = {"marker": "s", "markersize": min(7.0, 0.5 * points), "clip_on": False, "linestyle": "none"}
        style |= {"transform": axes.get_yaxis_transform(), "markeredgecolor": GREY, "markeredgewidth": 0.4}
        axes.plot([-0.012], [place], color=colours[use.layer], **style)
    axes.tick_params(axis="y", length=0, pad=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _layer_colours(plan: FloorPlan) -> dict[int | None, str]:
    """Each layer's colour, as in the curves of a run: distinct ones for few layers, a scale for many."""
    layers = sorted({use.layer for use in plan.cores if use.layer is not None})
    if len(layers) <= len(COLOURS):
        colours = list(COLOURS[: len(layers)])
    else:
        colors = _matplotlib("colors")
        scale = _matplotlib("cm").ScalarMappable(norm=colors.Normalize(0, 1), cmap=COLOUR_MAP)
        steps = [MAP_END * i / (len(layers) - 1) for i in range(len(layers))]
        colours = [colors.to_hex(scale.to_rgba(step)) for step in steps]
    return {None: NO_LAYER, **dict(zip(layers, colours, strict=True))}


def _is_dark(colour: str) -> bool:
    """By the luma of Rec. 601, of a colour written #rrggbb."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 110


def _matplotlib(module: str | None = None) -> Any:
    try:
        return importlib.import_module("matplotlib" if module is None else f"matplotlib.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('drawing needs matplotlib: pip install "pctt[plot]".') from error
