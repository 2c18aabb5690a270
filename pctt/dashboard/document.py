"""The page: one run, or several with their curves over each other."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pctt.checkpoint import make_folder, replace_file
from pctt.dashboard import parts
from pctt.dashboard.chart import SMALL, Chart, Series
from pctt.dashboard.folder import Run, read
from pctt.dashboard.markup import NOTHING, Markup, element, join, number, table
from pctt.dashboard.placement import drawn, floor_plan, num_colours
from pctt.dashboard.style import SCRIPT, colour, sheet
from pctt.dashboard.thin import spread
from pctt.placement.draw import FloorPlan

POINTS = 60_000  # of all curves, which keeps the page below 2 MB
MAX_LAYERS = 12  # compared between runs


def page(folders: Sequence[str | Path]) -> str:
    """The HTML of a page about the runs in `folders`, complete in itself: no script, style, font or picture
    from elsewhere.

    Raises FileNotFoundError for a folder without a run, ValueError for a record that is damaged.
    """
    return render(read_all(folders))


def read_all(folders: Sequence[str | Path]) -> list[Run]:
    """The runs, each with a name of its own."""
    if not folders:
        raise ValueError("a page needs at least one run folder; name one that `pctt train` wrote.")
    runs = [read(Path(folder)) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [replace(run, name=f"{run.folder}") for run in runs]
        names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({index})") if names.count(run.name) > 1 else run
        for index, run in enumerate(runs, start=1)
    ]


def render(runs: Sequence[Run]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    plans = [_plan(run) for run in runs]
    share = POINTS // len(runs)
    body = [element("h1", f"{title} – pctt")]
    if len(runs) > 1:
        body += [_contents(runs), _comparison(runs)]
    for index, (run, found) in enumerate(zip(runs, plans, strict=True), start=1):
        body.append(_section(run, found, index, len(runs), share))
    foot = "Energies and error norms are per sample: means over the batch. Made by pctt dashboard."
    body.append(element("footer", element("p", foot)))
    counts = [len(runs), *(len(parts.drawn_layers(run)) for run in runs)]
    counts += [num_colours(found) for found in plans if isinstance(found, FloorPlan)]
    counts += [_num_inferring(run) for run in runs]
    return "<!DOCTYPE html>\n" + element(
        "html",
        _head(title, Markup(sheet(counts))),
        element("body", element("main", *body), element("script", Markup(SCRIPT))),
        lang="en",
    )


def write(text: str, path: Path) -> Path:
    """Writes a page; the file there before survives any failure."""
    make_folder(path.parent)
    replace_file(path, text.encode(), "page")
    return path


def _head(title: str, style: Markup) -> Markup:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    rule = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=rule),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} – pctt"),
        element("style", style),
    )


def _section(run: Run, found: FloorPlan | str | None, index: int, count: int, points: int) -> Markup:
    num_charts = 2 + len(run.per_layer)
    most = max(2, parts.MAX_TRAJECTORIES // count)
    placed: Markup | None = None
    if isinstance(found, FloorPlan):
        placed = drawn(found)
    elif found is not None:
        placed = element("p", found, class_="soft")
    return element(
        "section",
        element("h2", run.name) if count > 1 else None,
        element("p", str(run.folder), class_="soft"),
        parts.headline(run),
        parts.warnings(run),
        parts.curves(run, points // (2 * num_charts)),
        parts.trajectories(run, points // (3 * most), most),
        parts.tables(run),
        placed,
        parts.configuration(run),
        id=f"run-{index}",
        aria_label=run.name,
    )


def _plan(run: Run) -> FloorPlan | str | None:
    """The placement, or why it cannot be shown; None for a run on no card."""
    try:
        return floor_plan(run)
    except ValueError as error:
        return f"The placement on the card cannot be shown: {error}"


def _num_inferring(run: Run) -> int:
    entries = run.of_kind("trajectory")
    layers = entries[0].get("layers") if entries else None
    return min(len(layers), parts.MAX_CURVES) if isinstance(layers, list) else 0


# --- several runs -------------------------------------------------------------------------------------------


def _contents(runs: Sequence[Run]) -> Markup:
    links = [element("li", element("a", run.name, href=f"#run-{i}")) for i, run in enumerate(runs, start=1)]
    return element("nav", element("ul", *links), aria_label="Runs")


def _comparison(runs: Sequence[Run]) -> Markup:
    colours = [colour(index, len(runs)) for index in range(len(runs))]
    points = POINTS // 12
    energy = [
        part
        for run, ink in zip(runs, colours, strict=True)
        for part in parts.smoothed(Series(run.name, run.steps, run.total_energy, ink))
    ]
    rates = [
        Series(run.name, run.steps, run.scalars["learning_rate"], ink)
        for run, ink in zip(runs, colours, strict=True)
        if "learning_rate" in run.scalars
    ]
    charts = [
        Chart("Total energy", "batch", "energy per sample", energy, log=True, points=points),
        parts.accuracy(runs, colours),
        Chart("Learning rate", "batch", "learning rate", rates, points=points // 4),
        parts.times(runs, colours),
    ]
    return element(
        "section",
        element("h2", "Compared"),
        parts.legend([run.name for run in runs]),
        _results(runs),
        element("div", *(parts.figure(chart) for chart in charts), class_="figures"),
        _layers_compared(runs, colours),
        _differences(runs),
        aria_label="Compared",
    )


def _layers_compared(runs: Sequence[Run], colours: Sequence[str]) -> Markup | None:
    every = list(dict.fromkeys(name for run in runs for name in run.layers))
    names = [every[i] for i in spread(len(every), MAX_LAYERS)]
    panels: list[Markup] = []
    for field in ("energies", "error_norms"):
        for name in names:
            series = [
                Series(run.name, run.steps, run.per_layer[field][name], ink)
                for run, ink in zip(runs, colours, strict=True)
                if name in run.per_layer.get(field, {})
            ]
            title = f"{parts.TITLES[field]}, {name}"
            unit, points = parts.UNITS[field], POINTS // (5 * len(names))
            panels.append(
                parts.figure(Chart(title, "batch", unit, series, True, True, SMALL, points), name=title)
            )
    if not panels:
        return None
    return element("section", element("h3", "Layer by layer"), element("div", *panels, class_="multiples"))


def _results(runs: Sequence[Run]) -> Markup:
    rows = [
        [
            run.name,
            run.outcome,
            parts.percent(run.result.get("test_accuracy")),
            number(float(run.steps[-1]) if len(run.steps) else None, ",.0f"),
            number(float(run.total_energy[-1]) if len(run.steps) else None),
            join([f"{entry.get('backend')}" for entry in run.of_kind("backend")], ", "),
            str(len(run.warnings) or ""),
        ]
        for run in runs
    ]
    heads = ["run", "outcome", "test accuracy", "batches", "total energy, last batch", "backend", "warnings"]
    return table(heads, rows, "Results")


def _differences(runs: Sequence[Run]) -> Markup:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [
        [key, *(run.settings.get(key, NOTHING) for run in runs)]
        for key in keys
        if len({run.settings.get(key) for run in runs}) > 1
    ]
    if not rows:
        return element("p", "The configurations are equal.")
    some = f", the first {parts.MAX_SETTINGS}" if len(rows) > parts.MAX_SETTINGS else ""
    heads = ["setting", *(run.name for run in runs)]
    return table(heads, rows[: parts.MAX_SETTINGS], f"Differences between the configurations{some}")
