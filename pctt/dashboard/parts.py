"""The parts of the page that show one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from pctt.dashboard.chart import SMALL, WIDE, Chart, Series
from pctt.dashboard.folder import Columns, Run, as_number, column
from pctt.dashboard.markup import NOTHING, Markup, element, number, table
from pctt.dashboard.style import colour
from pctt.dashboard.thin import running_mean, spread

MAX_CURVES = 64  # of a chart
MAX_TRAJECTORIES = 12  # of a page
MAX_EXTRA = 6  # charts of fields that this page does not know
MAX_ROWS = 40  # of a table of epochs
MAX_SETTINGS = 400
TITLES = {"energies": "Energy", "error_norms": "Error norms", "learning_rate": "Learning rate"}
UNITS = {"energies": "energy per sample", "error_norms": "error norm", "learning_rate": "learning rate"}


def figure(chart: Chart, note: str = "", key: Markup | None = None, name: str | None = None) -> Markup:
    """A chart with its caption and key, or a sentence where there is nothing to draw."""
    caption = element("figcaption", chart.title, element("small", note) if note else None)
    svg = chart.svg()
    if svg is None:
        svg, key = element("p", "Nothing to draw is recorded.", class_="soft"), None
    return element("figure", caption, svg, key, data_name=name)


def legend(names: Sequence[str]) -> Markup:
    """Names by colour; of many curves some, in order."""
    shown = names if len(names) <= 16 else [names[i] for i in spread(len(names), 9)]
    items = [
        element("li", element("i", class_=colour(names.index(name), len(names)), aria_hidden="true"), name)
        for name in shown
    ]
    return element("ul", *items, class_="key")


def drawn_layers(run: Run) -> list[str]:
    return [run.layers[i] for i in spread(len(run.layers), MAX_CURVES)]


def headline(run: Run) -> Markup:
    """What was run, and how it ended."""
    settings = run.settings
    facts: list[tuple[str, str | None]] = [
        ("outcome", run.outcome),
        ("test accuracy", percent(run.result.get("test_accuracy"))),
        ("test samples", number(as_number(run.result.get("test_samples")), ",.0f")),
        ("epochs", number(_last(run, "epoch"))),
        ("batches", number(float(run.steps[-1]) if len(run.steps) else None, ",.0f")),
        ("total energy, last batch", number(float(run.total_energy[-1]) if len(run.steps) else None)),
        ("data", settings.get("data.name")),
        ("weights", number(run.num_weights, ",")),
        ("network", _network(run)),
        ("algorithm", settings.get("training.algorithm", settings.get("algorithm"))),
        ("inference", _inference(settings)),
        ("learning", _joined(settings, ("learning.kind", "learning.rate", "learning.schedule.kind"))),
        ("batch size", settings.get("training.batch_size", settings.get("batch_size"))),
        ("seed", settings.get("training.seed", settings.get("seed"))),
        *_places(run),
        ("seconds in epochs", number(float(np.nansum(column(run.epochs, "seconds"))), ".1f")),
    ]
    known = [(name, value) for name, value in facts if value not in (None, "", NOTHING)]
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", value)) for name, value in known),
        class_="facts",
    )


def warnings(run: Run) -> Markup | None:
    if not run.warnings:
        return None
    items = [element("li", sentence) for sentence in run.warnings]
    return element("ul", *items, class_="warnings", role="note", aria_label=f"Warnings about {run.name}")


def curves(run: Run, points: int) -> Markup:
    """Everything that is recorded per batch or per epoch.    points: of each chart."""
    names = drawn_layers(run)
    key = legend(names)
    note = "mean over the raw values" if len(run.steps) >= 80 else ""
    if len(names) < len(run.layers):
        note += f"{'; ' if note else ''}{len(names)} of {len(run.layers)} layers"
    known = [field for field in ("energies", "error_norms") if field in run.per_layer]
    other = [field for field in run.per_layer if field not in known][:MAX_EXTRA]
    shown = [
        figure(_by_layer(run, field, run.per_layer[field], names, points), note, key)
        for field in known + other
    ]
    shown.append(figure(accuracy([run]), key=_accuracy_key(run)))
    varying = {
        name: values
        for name, values in run.scalars.items()
        if name == "learning_rate" or len(np.unique(values[~np.isnan(values)])) > 1
    }
    for name, values in list(varying.items())[: MAX_EXTRA + 1]:
        series = [Series(name, run.steps, values, colour(0, 1))]
        shown.append(figure(Chart(_title(name), "batch", _unit(name), series, points=points // 4)))
    shown.append(
        figure(
            times([run]),
            "an epoch with its validation, by its batches; too short where a run was resumed within it",
        )
    )
    return element("div", *shown, class_="figures")


def trajectories(run: Run, points: int, most: int) -> Markup | None:
    """Energy while inferring, of at most `most` recorded batches."""
    entries = [entry for entry in run.of_kind("trajectory") if _is_trajectory(entry)]
    if not entries:
        return None
    entries = [entries[i] for i in spread(len(entries), most)]
    names = [str(name) for name in entries[0]["layers"]]
    kept = spread(len(names), MAX_CURVES)
    energies = [
        np.array([[_at(row, i) for i in kept] for row in entry["energy"]], dtype=float).reshape(-1, len(kept))
        for entry in entries
    ]
    panels: list[Markup] = []
    for entry, energy in zip(entries, energies, strict=True):
        series = [
            Series(names[i], np.arange(len(energy)), energy[:, place], colour(place, len(kept)))
            for place, i in enumerate(kept)
        ]
        title = f"Batch {entry.get('step')}"
        chart = Chart(
            title, "inference step", "energy per sample", series, True, True, SMALL, points, energies
        )
        panels.append(figure(chart, name=title))
    return element(
        "section",
        element("h3", "Energy while inferring"),
        element("p", "Each layer over the inference steps of a batch, all on one scale.", class_="soft"),
        legend([names[i] for i in kept]),
        element("div", *panels, class_="multiples"),
    )


def tables(run: Run) -> Markup:
    """The numbers: epochs, and the layers at the last batch."""
    parts: list[Markup] = []
    if run.epochs:
        rows = [
            [
                number(as_number(entry.get("epoch"))),
                number(as_number(entry.get("train_energy")), ".5g"),
                percent(entry.get("train_accuracy")),
                percent(entry.get("validation_accuracy")),
                number(as_number(entry.get("seconds")), ".2f"),
                number(1e3 * float(spent), ".3g"),
            ]
            for entry, spent in (
                (run.epochs[i], run.seconds_per_batch[i]) for i in spread(len(run.epochs), MAX_ROWS)
            )
        ]
        heads = ["epoch", "training energy", "training", "validation", "seconds", "ms per batch"]
        heads, rows = _without_empty_columns(heads, rows)
        some = f", {len(rows)} of {len(run.epochs)}" if len(rows) < len(run.epochs) else ""
        parts.append(table(heads, rows, f"Epochs{some}"))
    if run.per_layer and run.batches:
        fields = list(run.per_layer)[: MAX_EXTRA + 2]
        rows = [
            [name, *(number(_last_of(run.per_layer[field].get(name))) for field in fields)]
            for name in drawn_layers(run)
        ]
        heads = ["layer", *map(_unit, fields)]
        parts.append(table(heads, rows, f"Layers at batch {run.batches[-1].get('step')}"))
    return element("div", *parts, class_="figures")


def configuration(run: Run) -> Markup:
    items = list(run.settings.items())
    rows = [list(item) for item in items[:MAX_SETTINGS]]
    some = f", the first {MAX_SETTINGS} of {len(items)}" if len(items) > MAX_SETTINGS else ""
    content = table(["setting", "value"], rows, f"Configuration{some}")
    return element("details", element("summary", "Configuration"), content)


def accuracy(runs: Sequence[Run], colours: Sequence[str] | None = None) -> Chart:
    """Validation by epoch, training too where it is recorded, and the test as a ring."""
    series: list[Series] = []
    for index, run in enumerate(runs):
        epochs = column(run.epochs, "epoch")
        of = f" of {run.name}" if colours else ""
        for field, name, own in (
            ("train_accuracy", "training", colour(4, 7)),
            ("validation_accuracy", "validation", colour(0, 7)),
        ):
            if colours and name == "training":
                continue
            values = 100 * column(run.epochs, field)
            series.append(Series(name + of, epochs, values, colours[index] if colours else own))
        test = np.array([100 * as_number(run.result.get("test_accuracy"))])
        last = np.array([epochs[-1] if len(epochs) else 1.0])
        ink = colours[index] if colours else colour(1, 7)
        series.append(Series(f"test{of}", last, test, ink, "ring"))
    return Chart("Accuracy", "epoch", "accuracy (%)", series, points=4000)


def times(runs: Sequence[Run], colours: Sequence[str] | None = None) -> Chart:
    series = [
        Series(
            run.name,
            column(run.epochs, "epoch"),
            1e3 * run.seconds_per_batch,
            colours[index] if colours else colour(0, 1),
        )
        for index, run in enumerate(runs)
    ]
    return Chart("Time per batch", "epoch", "milliseconds", series, points=4000, y_like=(np.zeros(1),))


def smoothed(series: Series) -> list[Series]:
    """The raw values faintly and their mean over a fortieth of them; few values as they are."""
    if len(series.y) < 80:
        return [series]
    mean = running_mean(series.y, len(series.y) // 40)
    return [
        Series(series.name, series.x, series.y, series.colour, "faint"),
        Series(series.name, series.x, mean, series.colour),
    ]


def percent(value: object) -> Markup:
    share = as_number(value)
    if math.isnan(share):
        return NOTHING
    return element("data", f"{share:.2%}", value=repr(share))


def _without_empty_columns(
    heads: list[str], rows: list[list[Markup]]
) -> tuple[list[str], list[list[Markup]]]:
    kept = [i for i in range(len(heads)) if i == 0 or any(row[i] != NOTHING for row in rows)]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _by_layer(run: Run, field: str, columns: Columns, names: Iterable[str], points: int) -> Chart:
    names = list(names)
    series = [
        part
        for index, name in enumerate(names)
        if name in columns
        for part in smoothed(Series(name, run.steps, columns[name], colour(index, len(names))))
    ]
    return Chart(_title(field), "batch", _unit(field), series, log=True, size=WIDE, points=points)


def _accuracy_key(run: Run) -> Markup:
    found = [
        (name, index)
        for name, index, values in (
            ("training", 4, column(run.epochs, "train_accuracy")),
            ("validation", 0, column(run.epochs, "validation_accuracy")),
            ("test, after the last epoch", 1, column([run.result], "test_accuracy")),
        )
        if not np.isnan(values).all()
    ]
    items = [
        element("li", element("i", class_=colour(index, 7), aria_hidden="true"), name)
        for name, index in found
    ]
    return element("ul", *items, class_="key")


def _title(field: str) -> str:
    return TITLES.get(field, field.replace("_", " ").capitalize())[:60]


def _unit(field: str) -> str:
    return UNITS.get(field, field.replace("_", " "))[:40]


def _is_trajectory(entry: dict[str, object]) -> bool:
    layers, energy = entry.get("layers"), entry.get("energy")
    return bool(
        isinstance(layers, list)
        and layers
        and isinstance(energy, list)
        and all(isinstance(row, list) for row in energy)
    )


def _at(row: Sequence[object], index: int) -> float:
    return as_number(row[index]) if index < len(row) else math.nan


def _last(run: Run, field: str) -> float | None:
    return as_number(run.epochs[-1].get(field)) if run.epochs else None


def _last_of(values: np.ndarray | None) -> float | None:
    return float(values[-1]) if values is not None and len(values) else None


def _network(run: Run) -> str | None:
    layers = run.config.get("layers")
    if not isinstance(layers, list):
        return None
    sizes = [str(layer.get("units", layer.get("kind"))) for layer in layers if isinstance(layer, dict)]
    if len(sizes) > 12:
        sizes = [*sizes[:5], "...", *sizes[-2:]]
    return f"{len(layers)} layers: {'-'.join(sizes)}"


def _inference(settings: dict[str, str]) -> str | None:
    if "inference.num_steps" not in settings:
        return None
    steps, rate = settings["inference.num_steps"], settings.get("inference.rate")
    how = _joined(settings, ("inference.prediction", "inference.dynamics"))
    return f"{steps} steps at rate {rate}, {how}"


def _joined(settings: dict[str, str], keys: Sequence[str]) -> str:
    return ", ".join(settings[key] for key in keys if key in settings)


def _places(run: Run) -> list[tuple[str, str | None]]:
    places = run.of_kind("backend")
    if not places:
        return []
    last = places[-1]
    facts: list[tuple[str, str | None]] = [("backend", f"{last.get('backend')}, {last.get('device')}")]
    if isinstance(last.get("precision"), dict):
        facts.append(("precision", ", ".join(f"{name} {form}" for name, form in last["precision"].items())))
    return facts
