"""Where the layers of a run lay on the card, and how full its memory was: planned again from the checkpoint,
as the run was.
"""

from __future__ import annotations

import re
from itertools import groupby

from pctt.backends.precision import PrecisionPolicy
from pctt.config import from_dict
from pctt.dashboard.folder import Run
from pctt.dashboard.markup import Markup, element, number, table
from pctt.dashboard.style import colour
from pctt.inference import Inference
from pctt.learning import Learning
from pctt.network import Network
from pctt.placement.chips import cores
from pctt.placement.draw import KINDS, CoreUse, FloorPlan
from pctt.placement.fused_cost import fused_placement
from pctt.placement.fused_report import FusedReport
from pctt.placement.plan import plan

CELL = 46  # of the drawing, one core
_DEVICE = re.compile(r"(\w+) with (\d+)x(\d+) cores$")


def floor_plan(run: Run) -> FloorPlan | None:
    """The plan of a run's last place; None if that was no card.

    Raises ValueError where the folder does not say enough to plan it again.
    """
    places = [entry for entry in run.of_kind("backend") if isinstance(entry.get("device"), str)]
    found = _DEVICE.search(places[-1]["device"]) if places else None
    if found is None:
        return None
    if not run.state:
        raise ValueError("the network is in the checkpoint, which is not there or cannot be read.")
    chip, grid = found[1], (int(found[2]), int(found[3]))
    training = run.config.get("training")
    training = training if isinstance(training, dict) else {}
    try:
        net = from_dict(Network, run.state["network"], "network")
        inference = from_dict(Inference, run.state["inference"], "inference")
        learning = from_dict(Learning, run.state["learning"], "learning")
        batch_size = run.state["batch_size"]
        policy = from_dict(PrecisionPolicy, places[-1].get("precision") or {}, "precision")
        if training.get("fused"):
            sharing = training.get("cores_per_layer")
            placed = fused_placement(net, chip, sharing, batch_size, inference, learning, policy)
            return FusedReport(net, placed, placed.cost(), batch_size, inference.num_steps).floor_plan()
        return plan(net, chip, batch_size, inference, learning, policy, grid).floor_plan()
    except (KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint lacks or mistakes {error}.") from None


def drawn(found: FloorPlan) -> Markup:
    """The grid of cores, and the L1 of those in use as a table."""
    caption = element("figcaption", "Placement", element("small", found.title))
    lines = element("ul", *(element("li", line) for line in found.lines), class_="soft")
    return element("div", element("figure", caption, grid(found)), lines, _memory(found))


def grid(found: FloorPlan) -> Markup:
    """The cores, with what they hold, coloured by layer."""
    layers = sorted({use.layer for use in found.cores if use.layer is not None})
    colours = {layer: colour(i, len(layers)) for i, layer in enumerate(layers)}
    uses = {use.core: use for use in found.cores}
    cells = [_cell(place, uses.get(place), colours) for place in cores(found.grid)]
    columns, rows = found.grid
    return element(
        "svg",
        element("title", found.title),
        *cells,
        viewBox=f"0 0 {columns * CELL} {rows * CELL}",
        role="img",
        aria_label=f"{found.title}: {len(uses)} of {columns * rows} cores in use; the table says which",
        style=f"max-width:{columns * CELL}px",
    )


def num_colours(found: FloorPlan | None) -> int:
    return len({use.layer for use in found.cores if use.layer is not None}) if found else 0


def _cell(place: tuple[int, int], use: CoreUse | None, colours: dict[int, str]) -> Markup:
    x, y = place[0] * CELL, place[1] * CELL
    side = CELL - 4
    name = f"core ({place[0]},{place[1]}): {'not in use' if use is None else use.label}"
    words = "core" if use is None else f"core used {colours.get(use.layer or 0, '')}"
    parts = [
        element("title", name),
        element("rect", x=x + 2, y=y + 2, width=side, height=side, rx=4, class_=words.strip()),
    ]
    if use is not None:
        size = min(12.0, side / (0.62 * len(use.label or "-")))
        style = f"font-size:{size:.1f}px"
        middle = {"x": x + CELL / 2, "y": y + CELL / 2 + size / 3}
        parts.append(element("text", use.label, class_="mid on", style=style, **middle))
    return element("g", *parts)


def _memory(found: FloorPlan) -> Markup:
    runs = [
        list(run) for _, run in groupby(found.cores, lambda use: (use.label, use.layer, use.bytes_by_kind))
    ]
    heads = ["core", "holds", *KINDS, "in all", f"of {found.l1_bytes:,} B"]
    rows: list[list[str]] = []
    for run in runs:
        use, last = run[0], run[-1]
        where = "({},{})".format(*use.core) + ("" if use is last else " to ({},{})".format(*last.core))
        share = use.total_bytes / found.l1_bytes
        bar = element(
            "meter", f"{share:.0%}", value=use.total_bytes, max=found.l1_bytes, aria_label="share of L1"
        )
        sizes = [number(use.bytes_by_kind.get(kind, 0), ",") for kind in KINDS]
        rows.append([where, use.label, *sizes, number(use.total_bytes, ","), Markup(f"{bar} {share:.1%}")])
    return table(heads, rows, "L1 of each used core, bytes")
