"""Pictures for notebooks, as SVG that stands by itself: how a network is wired, how the energy falls, which
core holds what. They need no library; `pctt/describe.py` says the same in words.
"""

# The page about runs has the same elements, and imports what is drawn here; hence the imports in functions.

from __future__ import annotations

from typing import TYPE_CHECKING

from pctt.describe import rows_shown, shape

if TYPE_CHECKING:
    from pctt.dashboard.markup import Markup
    from pctt.network import Network
    from pctt.placement.draw import FloorPlan
    from pctt.queries import InferenceResult

MOST_NODES = 24
MOST_IN_A_ROW = 9
"""Of a plain chain, whose nodes stand side by side."""
MOST_CURVES = 7
WIDTH, HEIGHT = 112, 62  # of a node
ACROSS, DOWN = 54, 22  # between nodes
MARGIN = 34
LETTERS = 15  # that fit into a node
LETTER = 7  # its width
BLUE, ORANGE, LINE = "#0072B2", "#D55E00", "#d8dee4"

STYLE = f"""
.pctt text{{fill:#1b1f24;font:13px sans-serif}}.pctt .mid{{text-anchor:middle}}.pctt .end{{text-anchor:end}}
.pctt .name{{fill:#57606a}}.pctt .bold{{font-weight:bold}}.pctt .small{{font-size:11px;fill:#57606a}}
.pctt path{{fill:none;stroke-linecap:round;stroke-linejoin:round}}.pctt .grid{{stroke:{LINE}}}
.pctt .line{{stroke-width:1.8}}.pctt .dots{{stroke-width:6}}
.pctt .node{{fill:#fff;stroke:#1b1f24;stroke-width:1.3}}.pctt .end-node{{fill:#e8e8e8;stroke-width:3}}
.pctt .up,.pctt .back{{stroke:{BLUE};stroke-width:1.8}}.pctt .back{{stroke:{ORANGE};stroke-dasharray:6 4}}
.pctt .core{{fill:#f6f8fa;stroke:{LINE}}}
.pctt text.on{{fill:#fff;paint-order:stroke;stroke:#000;stroke-width:1.8px;stroke-linejoin:round}}
"""


def network(net: Network) -> str:
    """Nodes as boxes, predictions as arrows, dashed where they close a cycle against the order of the nodes.

    Of large networks the first and the last nodes are drawn.
    """
    from pctt.dashboard.markup import element

    is_row = not net.sources_ahead and all(len(net.sources(index)) == 1 for index in net.indices)
    shown = rows_shown(len(net.nodes), MOST_IN_A_ROW if is_row else MOST_NODES)
    columns, gap = _columns(net, shown)
    stacks: dict[int, list[int]] = {}
    for index in shown:
        stacks.setdefault(columns[index], []).append(index)
    tallest = max(map(len, stacks.values()))
    middle = MARGIN + (tallest * HEIGHT + (tallest - 1) * DOWN) / 2
    places = {
        index: (
            MARGIN + column * (WIDTH + ACROSS),
            middle + (number - (len(stack) - 1) / 2) * (HEIGHT + DOWN) - HEIGHT / 2,
        )
        for column, stack in stacks.items()
        for number, index in enumerate(stack)
    }
    arrows = [
        _arrow(places[source], places[index], source >= index)
        for index in shown
        if index in net.indices
        for source in dict.fromkeys(net.sources(index))
        if source in places
    ]
    boxes = [_box(net, index, *places[index]) for index in shown]
    if gap is not None:
        left_out = f"{len(net.nodes) - len(shown):,} more"
        x = MARGIN + gap * (WIDTH + ACROSS) + WIDTH / 2
        boxes.append(element("text", f"... {left_out} ...", x=x, y=f"{middle + 4:.0f}", class_="mid"))
    width = 2 * MARGIN + (max(columns.values()) + 1) * (WIDTH + ACROSS) - ACROSS
    height = 2 * middle + (MARGIN if net.sources_ahead else 0)
    heads = (_head("up", BLUE), _head("back", ORANGE))
    title = f"A network of {len(net.nodes)} nodes; arrows go from what predicts to what is predicted"
    return _page(title, width, height, element("defs", *heads), *arrows, *boxes)


def _columns(net: Network, shown: list[int]) -> tuple[dict[int, int], int | None]:
    """The column of each node, right of all that it is predicted from; and that of the gap."""
    columns: dict[int, int] = {}
    gap, first = None, 0
    for number, index in enumerate(shown):
        if number and shown[number - 1] != index - 1:
            gap = max(columns.values()) + 1
            first = gap + 1
        sources = net.sources(index) if index in net.indices else ()
        before = [columns[source] + 1 for source in sources if source in columns]
        columns[index] = max([first, *before])
    return columns, gap


def _box(net: Network, index: int, x: float, y: float) -> Markup:
    from pctt.dashboard.markup import element

    name = net.nodes[index]
    words = "node end-node" if name in (net.input_name, net.output) else "node"
    lines = [(name, "mid bold"), (shape(net.shapes[index]), "mid"), (_what(net, index), "mid small")]
    texts = [
        element("text", _cut(text), x=x + WIDTH / 2, y=f"{y + 19 + 17 * row:.1f}", class_=kind)
        for row, (text, kind) in enumerate(lines)
    ]
    frame = element("rect", x=x, y=f"{y:.1f}", width=WIDTH, height=HEIGHT, rx=7, class_=words)
    return element("g", element("title", name), frame, *texts)


def _what(net: Network, index: int) -> str:
    """How a node is predicted, in a word or two."""
    from pctt.layers.dense import Dense
    from pctt.layers.maps import Function

    if index not in net.indices:
        return "given or free"
    layer = net.layer(index)
    if isinstance(layer, Dense):
        return layer.activation
    maps = [step.map for step in layer.steps]
    return ", ".join(map_.name if isinstance(map_, Function) else map_.kind for map_ in maps)


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 2] + "…"


def _arrow(source: tuple[float, float], target: tuple[float, float], is_back: bool) -> Markup:
    from pctt.dashboard.markup import element

    (x1, y1), (x2, y2) = source, target
    if is_back or x2 <= x1:  # from below one box to below the other
        a, b, drop = x1 + 0.6 * WIDTH, x2 + 0.4 * WIDTH, MARGIN if source != target else 0.7 * MARGIN
        y1, y2 = y1 + HEIGHT, y2 + HEIGHT
        low = max(y1, y2) + drop
        path = f"M{a:.1f} {y1:.1f}C{a:.1f} {low:.1f} {b:.1f} {low:.1f} {b:.1f} {y2 + 2:.1f}"
        return element("path", d=path, class_="back", marker_end="url(#pctt-back)")
    start, end = x1 + WIDTH, x2 - 2
    y1, y2 = y1 + HEIGHT / 2, y2 + HEIGHT / 2
    lift = 0.9 * HEIGHT if end - start > ACROSS and y1 == y2 else 0  # over what stands between
    bend = (end - start) / 2
    path = f"M{start:.1f} {y1:.1f}C{start + bend:.1f} {y1 - lift:.1f} "
    path += f"{end - bend:.1f} {y2 - lift:.1f} {end:.1f} {y2:.1f}"
    return element("path", d=path, class_="up", marker_end="url(#pctt-up)")


def _head(name: str, colour: str) -> Markup:
    from pctt.dashboard.markup import element

    tip = element("path", d="M0,0 L10,5 L0,10 z", style=f"fill:{colour}")
    size = {"refX": 9, "refY": 5, "markerWidth": 7, "markerHeight": 7}
    return element("marker", tip, id=f"pctt-{name}", viewBox="0 0 10 10", orient="auto", **size)


def energies(result: InferenceResult) -> str | None:
    """The total energy and that of each layer, where they are few, at every inference step; None for one step
    or fewer.
    """
    import numpy as np

    from pctt.dashboard.chart import WIDE, Chart, Series
    from pctt.dashboard.markup import Markup, element
    from pctt.dashboard.style import colour

    values = result.energy.detach().cpu().double().numpy()
    if len(values) < 3:
        return None
    total, steps = values.sum(1), np.arange(len(values))
    curves = {"total": total}
    if 1 < values.shape[1] <= MOST_CURVES:
        curves |= dict(zip(result.errors, values.T, strict=True))
    series = [
        Series(name, steps, curve, colour(number, len(curves)))
        for number, (name, curve) in enumerate(curves.items())
    ]
    chart = Chart("Energy", "inference step", "energy per sample", series, log=bool((total > 0).all()))
    drawn = chart.svg()
    if drawn is None:
        return None
    width, height = WIDE
    placed = Markup(drawn.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1))
    names = [
        element("text", name, x=width - 20, y=32 + 20 * number, class_=colour(number, len(curves)))
        for number, name in enumerate(curves)
    ]
    return _page("Energy during inference", width + 100, height, placed, *names)


def floor_plan(plan: FloorPlan) -> str:
    """The grid of cores, coloured by layer."""
    from pctt.dashboard.markup import Markup, element
    from pctt.dashboard.placement import CELL, grid

    columns, rows = plan.grid
    width, height, head = columns * CELL, rows * CELL, 26
    size = f'<svg x="8" y="{head}" width="{width}" height="{height}" '
    drawn = Markup(grid(plan).replace("<svg ", size, 1))
    paper = max(width, LETTER * len(plan.title)) + 16
    title = element("text", plan.title, x=8, y=18)
    return _page(plan.title, paper, height + head + 6, title, drawn)


def _page(title: str, width: float, height: float, *parts: Markup) -> str:
    """An SVG document on white paper, in whatever page it is shown."""
    from pctt.dashboard.markup import Markup, element
    from pctt.plots import COLOURS

    inks = "".join(
        f".pctt .k{number} path{{stroke:{ink}}}.pctt text.k{number},.pctt .k{number}.used{{fill:{ink}}}"
        for number, ink in enumerate(COLOURS)
    )
    paper = element("rect", width="100%", height="100%", style="fill:#fff")
    return element(
        "svg",
        element("title", title),
        element("style", Markup(STYLE + inks)),
        paper,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        class_="pctt",
        role="img",
    )
