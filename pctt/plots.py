"""One picture of a run: energy while learning, accuracy, and energy while inferring.

Needs matplotlib (`pip install "pctt[plot]"`), imported only when something is drawn, and without its global
state.
"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, told apart by colour-blind readers, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
COLOUR_MAP = "viridis"  # for more layers than colours: also safe, and ordered as depth is
MAP_END = 0.92  # leaves out the palest end
MAX_RAW_POINTS = 2000
GREY = "#555555"

Records = Sequence[dict[str, Any]]


def draw_run(records: Records, path: Path, title: str | None = None) -> Path:
    """Draw a run as one PNG with three panels.

    Left: energy of each layer per training batch, a running mean over the raw values. Middle: accuracy per
        epoch, with
    the final test accuracy marked. Right: energy of each layer along the inference of the latest recorded
    trajectory. Energies stand on a logarithmic scale, so values that are zero or negative are not drawn. A
    panel without records says so.

    Args:
        records: as `pctt.record.read` returns them; kinds and fields that are not drawn are passed over.
        path: the PNG to write; its folder is created.
        title: a line above the panels.

    Returns:
        The path written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _matplotlib("figure").Figure(figsize=(14, 4.9), dpi=130, layout="constrained")
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06)
    colours = _layer_colours(records)
    batches, accuracy, inference = figure.subplots(1, 3)
    _draw_batches(batches, records, colours)
    _draw_accuracy(accuracy, records)
    _draw_trajectory(inference, records, colours)
    for axes in (batches, accuracy, inference):
        axes.spines[["top", "right"]].set_visible(False)
    _draw_layer_key(figure, [batches, accuracy, inference], colours)
    if title is not None:
        figure.suptitle(title, fontweight="bold")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def draw_pictures(
    path: Path, rows: Sequence[tuple[str, Any]], shape: Sequence[int], title: str | None = None
) -> Path:
    """Rows of pictures side by side as one PNG, each row with its name at the left.

    rows: (name, pictures [N, units]), tensors or arrays with values from 0 to 1; others are clipped.
    shape: (height, width) or (channels, height, width) of a picture; of three channels colours are drawn.

    Raises ImportError where matplotlib is not installed.
    """
    channels, height, width = (1, *shape) if len(shape) == 2 else tuple(shape)
    columns = max(len(pictures) for _, pictures in rows)
    tall, wide = height + 1, width + 1  # a line between pictures
    canvas = np.full((tall * len(rows) + 1, wide * columns + 1, 3), 0.8)
    for line, (_, pictures) in enumerate(rows):
        values = np.clip(np.nan_to_num(np.asarray(pictures, dtype=float)), 0.0, 1.0)
        for column, picture in enumerate(values.reshape(-1, channels, height, width)):
            colours = picture if channels == 3 else 1.0 - picture[:1].repeat(3, 0)  # ink on paper
            top, left = tall * line + 1, wide * column + 1
            canvas[top : top + height, left : left + width] = colours.transpose(1, 2, 0)
    named = any(name for name, _ in rows)
    size = (
        0.55 * columns + (1.7 if named else 0.2),
        0.55 * len(rows) * height / width + (0.4 if title else 0.1),
    )
    figure = _matplotlib("figure").Figure(figsize=size, dpi=100, layout="constrained")
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(canvas, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([tall * (line + 0.5) for line in range(len(rows))], labels=[name for name, _ in rows])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    if title is not None:
        figure.suptitle(title, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _draw_batches(axes: Any, records: Records, colours: dict[str, Any]) -> None:
    axes.set(title="Energy while learning", xlabel="training batch", ylabel="energy per sample")
    batches = [record for record in records if record.get("kind") == "batch" and "energies" in record]
    steps = np.array([record["step"] for record in batches], dtype=float)
    window = max(1, len(batches) // 40)
    stride = max(1, len(batches) // MAX_RAW_POINTS)
    faint = 0.3 if len(batches) < 500 else 0.15
    if len(colours) > len(COLOURS):
        faint /= 3
    drawn = False
    for name, colour in colours.items():
        energies = _positive([record["energies"].get(name) for record in batches])
        if np.isnan(energies).all():
            continue
        drawn = True
        raw = {"color": colour, "alpha": faint, "markersize": 3, "markeredgewidth": 0}
        axes.plot(steps[::stride], energies[::stride], ".", **raw)
        marker = "o" if len(batches) == 1 else ""
        axes.plot(steps, _running_mean(energies, window), color=colour, linewidth=1.6, marker=marker)
    _finish_energy_axes(axes, drawn, "no energies of batches recorded")


def _draw_trajectory(axes: Any, records: Records, colours: dict[str, Any]) -> None:
    axes.set(title="Energy while inferring", xlabel="inference step", ylabel="energy per sample")
    trajectories = [record for record in records if record.get("kind") == "trajectory"]
    drawn = False
    if trajectories:
        latest = trajectories[-1]
        axes.set_title(f"Energy while inferring, batch {latest['step']}")
        for layer, name in enumerate(latest["layers"]):
            energies = _positive([row[layer] for row in latest["energy"]])
            if np.isnan(energies).all():
                continue
            drawn = True
            marker = "o" if len(colours) <= len(COLOURS) else ""
            axes.plot(energies, color=colours[name], linewidth=1.6, marker=marker, markersize=3)
    _finish_energy_axes(axes, drawn, "no trajectory recorded")


def _draw_accuracy(axes: Any, records: Records) -> None:
    axes.set(title="Accuracy", xlabel="epoch", ylabel="accuracy (%)")
    epochs = [record for record in records if record.get("kind") == "epoch"]
    results = [
        record
        for record in records
        if record.get("kind") == "result" and _is_number(record.get("test_accuracy"))
    ]
    numbers = [record["epoch"] for record in epochs]
    drawn = False
    for field, label, colour, marker in (
        ("train_accuracy", "training", COLOURS[4], "s"),
        ("validation_accuracy", "validation", COLOURS[0], "o"),
    ):
        accuracies = 100 * _numbers([record.get(field) for record in epochs])
        if np.isfinite(accuracies).any():
            drawn = True
            size = 5 if len(epochs) <= 30 else 2
            axes.plot(
                numbers, accuracies, color=colour, marker=marker, markersize=size, linewidth=1.6, label=label
            )
    if results:
        drawn = True
        test = 100 * float(results[-1]["test_accuracy"])
        at = numbers[-1] if numbers else 1
        label = f"test, last epoch: {test:.2f} %"
        # Hollow, so that the validation point below it stays visible.
        style = {"marker": "D", "markersize": 10, "markerfacecolor": "none", "markeredgewidth": 2}
        axes.plot([at], [test], linestyle="none", color=COLOURS[1], label=label, clip_on=False, **style)
    if not drawn:
        _say(axes, "no accuracy recorded")
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.05 * (high - low), min(high, 100.5) if high > low else high)
    if len(numbers) <= 1:
        centre = numbers[0] if numbers else 1
        axes.set_xlim(centre - 1, centre + 1)
    axes.xaxis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")


def _finish_energy_axes(axes: Any, drawn: bool, otherwise: str) -> None:
    if not drawn:
        _say(axes, otherwise)
        return
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.grid(alpha=0.25)


def _say(axes: Any, sentence: str) -> None:
    axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set(xticks=[], yticks=[])


def _layer_colours(records: Records) -> dict[str, Any]:
    """Each layer's colour, in order of depth: distinct ones for few layers, a scale for many."""
    names: dict[str, None] = {}
    for record in records:
        if record.get("kind") == "trajectory":
            names |= dict.fromkeys(record["layers"])
        elif record.get("kind") == "batch":
            names |= dict.fromkeys(record.get("energies", ()))
    if len(names) <= len(COLOURS):
        return dict(zip(names, COLOURS, strict=False))
    scale = _matplotlib("cm").ScalarMappable(cmap=COLOUR_MAP)
    scale.set_clim(0, 1)
    return {name: scale.to_rgba(MAP_END * i / (len(names) - 1)) for i, name in enumerate(names)}


def _draw_layer_key(figure: Any, panels: list[Any], colours: dict[str, Any]) -> None:
    """Below the panels, where it covers nothing: a legend for few layers, a colour bar for many."""
    if not colours:
        return
    if len(colours) <= len(COLOURS):
        line = _matplotlib("lines").Line2D
        columns = len(colours) if sum(map(len, colours)) < 110 else 2
        handles = [line([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, title="layer"
        )
        return
    shades = _matplotlib("colors").ListedColormap(list(colours.values()))
    scale = _matplotlib("cm").ScalarMappable(cmap=shades)
    scale.set_clim(-0.5, len(colours) - 0.5)
    bar = figure.colorbar(scale, ax=panels, location="bottom", aspect=70, shrink=0.6, pad=0.04)
    names = list(colours)
    ticks = sorted({round(i * (len(names) - 1) / 5) for i in range(6)})
    bar.set_ticks(ticks, labels=[names[i] for i in ticks])
    bar.set_label("layer")
    bar.outline.set_visible(False)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window, shorter at the ends; missing values do not count and stay missing."""
    missing = np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(missing, 0.0, values))])
    counts = np.concatenate([[0], np.cumsum(~missing)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(missing, np.nan, mean)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _positive(values: Sequence[float | None]) -> np.ndarray:
    numbers = _numbers(values)
    return np.where(numbers > 0, numbers, math.nan)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError('matplotlib is not installed; run: pip install "pctt[plot]"') from error
