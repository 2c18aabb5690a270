"""Deep networks: accuracy over depth on MNIST, and whether the best learning rate transfers.

`accuracy` trains CURVES, networks 784-64-...-64-10 of the depths asked for, for one pass over the training
images, and reads the test images once, after it. `accuracy --search` trains the candidates of GRID at depth
SEARCH_DEPTH on a part of the training images and reports the accuracy on 6,000 others; CURVES was chosen by
it. `transfer` trains small residual networks on scikit-learn's digits for a fixed number of learning steps
over a grid of rates. Every run is a line of JSON in --out; what stands there already is not run again.
--table prints the lines as markdown, --picture draws them; with either nothing is trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import mean, mode
from typing import Any

import torch

import pctt
from pctt.data import Split, load
from pctt.data.dataset import split_validation
from pctt.network import Weights
from pctt.plots import COLOURS, GREY

WIDTH, BATCH_SIZE = 64, 64
DEPTHS, SEARCH_DEPTH = [5, 10, 20, 50, 128], 20
VALIDATION, SAMPLES = 0.1, 20_000
EPC_STEPS = 5

Line = dict[str, Any]
Shape = tuple[str, int, int]
"""Network, width, hidden layers."""


@dataclass(frozen=True)
class Settings:
    """What a curve is, beside depth, width and seed.

    network: "plain", a chain, or "mupc", residual and scaled by `pctt.mupc`.
    activation: of the hidden layers.    weights: how they are drawn, see `weights_of`.
    method: "pc", "gauss-seidel", "epc", or "backprop", the gradients of backpropagation by the local rules of
        `pctt.variant("exact")`.
    rate: of inference.    num_steps: T; None is the number of hidden layers.
    learning_rate, epsilon: of Adam.
    """

    network: str
    method: str
    learning_rate: float
    rate: float = 1.0
    num_steps: int | None = None
    epsilon: float = 1e-8
    activation: str = "relu"
    weights: str = "normal"

    def inference(self, depth: int) -> pctt.Inference:
        if self.method == "backprop":
            return pctt.variant("exact")
        steps = pctt.Inference(num_steps=self.num_steps or depth, rate=self.rate)
        return pctt.variant(self.method, steps)


@dataclass(frozen=True)
class Curve:
    """title: in table and picture.    settings: chosen on validation images at depth SEARCH_DEPTH."""

    title: str
    settings: Settings


def _plain(method: str, learning_rate: float, rate: float = 1.0, **others: Any) -> Settings:
    return Settings("plain", method, learning_rate, rate, activation="tanh", weights="orthogonal", **others)


def _relu(method: str, learning_rate: float, rate: float = 1.0) -> Settings:
    return Settings("plain", method, learning_rate, rate, activation="relu", weights="kaiming")


SMALL = 1e-16
"""An epsilon of Adam below most gradients of deep layers, but above 1e-19, whose square is 0 in float32."""

CURVES = {
    "pc": Curve("PC, plain tanh chain", _plain("pc", 3e-4, 0.5)),
    "pc-small": Curve("PC, plain tanh chain, epsilon 1e-16", _plain("pc", 1e-3, 0.3, epsilon=SMALL)),
    "epc": Curve("ePC, plain tanh chain", _plain("epc", 1e-3, 0.003, num_steps=EPC_STEPS)),
    "bp": Curve("backprop, plain tanh chain", _plain("backprop", 1e-3)),
    "pc-relu": Curve("PC, plain relu chain", _relu("pc", 1e-3, 0.1)),
    "bp-relu": Curve("backprop, plain relu chain", _relu("backprop", 3e-3)),
    "mupc": Curve("muPC", Settings("mupc", "pc", 0.1, 0.1)),
    "mupc-small": Curve("muPC, epsilon 1e-16", Settings("mupc", "pc", 0.03, 0.3, epsilon=SMALL)),
    "mupc-gs": Curve("muPC, Gauss-Seidel", Settings("mupc", "gauss-seidel", 0.03, 0.5, EPC_STEPS)),
    "mupc-epc": Curve("muPC, ePC", Settings("mupc", "epc", 0.03, 0.03, EPC_STEPS)),
    "mupc-bp": Curve("backprop, muPC network", Settings("mupc", "backprop", 0.03)),
}

Change = dict[str, Any]


def _product(**choices: Iterable[Any]) -> list[Change]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


PLAIN_RATES, MUPC_RATES = (3e-4, 1e-3, 3e-3), (0.01, 0.03, 0.1, 0.3)
RELU_RATES = (1e-4, *PLAIN_RATES)
GRID: dict[str, list[Change]] = {
    "pc": _product(rate=(0.1, 0.3, 0.5), learning_rate=PLAIN_RATES),
    "pc-small": _product(rate=(0.1, 0.3, 0.5), learning_rate=PLAIN_RATES),
    "epc": _product(rate=(0.003, 0.01, 0.03), learning_rate=PLAIN_RATES),
    "bp": _product(learning_rate=PLAIN_RATES),
    "pc-relu": _product(rate=(0.03, 0.1, 0.3), learning_rate=RELU_RATES),
    "bp-relu": _product(learning_rate=RELU_RATES),
    "mupc": _product(rate=(0.1, 0.3, 0.5), learning_rate=MUPC_RATES),
    "mupc-small": _product(rate=(0.1, 0.3, 0.4), learning_rate=MUPC_RATES[:3]),
    "mupc-gs": _product(rate=(0.2, 0.5, 1.0), learning_rate=MUPC_RATES),
    "mupc-epc": _product(rate=(0.03, 0.1, 0.3), learning_rate=MUPC_RATES),
    "mupc-bp": _product(learning_rate=MUPC_RATES),
}
"""Per curve what the candidates of `--search` change in the settings that stand in CURVES."""


def network(kind: str, inputs: int, width: int, depth: int, activation: str = "relu") -> pctt.Network:
    """`depth` hidden layers of `width` units and 10 outputs, without biases.

    kind: "plain"; "residual", f(x) W + x in the hidden layers but the first; "mupc", that with the scales.
    """
    if kind == "plain":
        hidden = [pctt.Dense(width, activation, bias=False) for _ in range(depth)]
        return pctt.chain(inputs, [*hidden, pctt.Dense(10, bias=False)])
    first = pctt.Dense(width, activate="input", bias=False)
    block = pctt.Dense(width, activation, activate="input", bias=False, skip=True)
    last = pctt.Dense(10, activation, activate="input", bias=False)
    net = pctt.chain(inputs, [first, *[block] * (depth - 1), last])
    return pctt.mupc(net) if kind == "mupc" else net


def weights_of(scheme: str, net: pctt.Network, seed: int) -> Weights:
    """ "normal": standard normal, for muPC. "standard": normal of variance 1 / fan-in. Others as `pctt.init`
    calls them, at their own gains.
    """
    if scheme == "normal":
        return pctt.init(net, seed, "normal", 1.0)
    if scheme == "standard":
        return pctt.init(net, seed, "kaiming", 1.0)
    return pctt.init(net, seed, scheme)


# --- accuracy over depth ------------------------------------------------------------------------------------


def standardised(train: Split, *others: Split) -> list[Split]:
    """Pixels minus their mean, over their deviation, both one number of the training images."""
    centre, spread = train.inputs.mean(), train.inputs.std()
    return [Split((split.inputs - centre) / spread, split.labels) for split in (train, *others)]


def planned(curve: str, settings: Settings, depth: int, seed: int, samples: int, search: bool) -> Line:
    """What makes a run that run: the first fields of its line."""
    return {
        "kind": "search" if search else "accuracy",
        "curve": curve,
        "depth": depth,
        "width": WIDTH,
        "seed": seed,
        "samples": samples,
        "settings": asdict(settings),
    }


def train_once(plan: Line, train: Split, judged_by: Split) -> Line:
    """One pass over `train`, then the accuracy on `judged_by`; a failed run's is that of its last weights."""
    settings, depth = Settings(**plan["settings"]), plan["depth"]
    net = network(settings.network, 784, WIDTH, depth, settings.activation)
    trainer = pctt.Trainer(
        net,
        settings.inference(depth),
        pctt.Adam(settings.learning_rate, epsilon=settings.epsilon),
        weights=weights_of(settings.weights, net, plan["seed"]),
        seed=plan["seed"],
        batch_size=BATCH_SIZE,
    )
    started = time.perf_counter()

    def watch(kind: str, fields: dict[str, Any]) -> None:
        if kind == "batch" and fields["step"] % 100 == 0:
            energy = sum(fields["energies"].values())
            passed = time.perf_counter() - started
            say(f"  batch {fields['step']}: energy {energy:.3g}, {passed:.0f} s")

    result = trainer.fit(train, 1, callbacks=[watch])
    seconds = time.perf_counter() - started
    return {
        **plan,
        "status": result.status.name,
        "batches": result.steps,
        "accuracy": trainer.evaluate(judged_by),
        "seconds": round(seconds, 1),
    }


def accuracy(arguments: argparse.Namespace) -> None:
    dataset = load("mnist", arguments.data_dir)
    train, test = standardised(dataset.train, dataset.test)
    if arguments.search:
        train, held_out = split_validation(train, VALIDATION, seed=0)
        assert held_out is not None
        judged_by, depths = held_out, arguments.depths or [SEARCH_DEPTH]
        seeds = arguments.seeds or [0]
    else:
        judged_by, depths = test, arguments.depths or DEPTHS
        seeds = arguments.seeds or [0]
    samples = arguments.samples
    train = Split(train.inputs[:samples], train.labels[:samples])
    plans = []
    for seed in seeds:
        for depth in depths:
            for name in arguments.curves:
                chosen = CURVES[name].settings
                candidates = [chosen]
                if arguments.search:
                    asked = {"rate": arguments.rates, "learning_rate": arguments.learning_rates}
                    given = {key: values for key, values in asked.items() if values}
                    changes = _product(**given) if given else GRID[name]
                    candidates = [replace(chosen, **change) for change in changes]
                plans += [planned(name, each, depth, seed, samples, arguments.search) for each in candidates]
    run_all(plans, arguments.out, lambda plan: train_once(plan, train, judged_by))


def reach(arguments: argparse.Namespace) -> str:
    """How many layers, from the output down, have a gradient that Adam's epsilon does not drown."""
    dataset = load("mnist", arguments.data_dir)
    (train,) = standardised(dataset.train)
    images = train.inputs[:BATCH_SIZE]
    targets = torch.nn.functional.one_hot(train.labels[:BATCH_SIZE], 10).float()
    rows = ["| layers whose gradient's root mean square is above | " + " | ".join(map(str, DEPTHS)) + " |"]
    rows.append("|---" * (len(DEPTHS) + 1) + "|")
    for name in ("pc", "pc-small", "epc", "mupc", "mupc-small", "mupc-gs", "mupc-epc", "mupc-bp"):
        settings, cells = CURVES[name].settings, []
        limit = settings.epsilon
        for depth in DEPTHS:
            net = network(settings.network, 784, WIDTH, depth, settings.activation)
            weights = weights_of(settings.weights, net, 0)
            result = pctt.infer(
                net, weights, {"input": images, net.output: targets}, settings.inference(depth)
            )
            gradients = pctt.weight_gradients(net, weights, result)
            sizes = [gradients[layer]["weight"].square().mean().sqrt() for layer in net.names]
            cells.append(f"{sum(bool(size > limit) for size in sizes)} of {depth + 1}")
        rows.append(f"| {CURVES[name].title}: {limit:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


# --- transfer of the learning rate --------------------------------------------------------------------------

WIDTHS, FIXED_DEPTH = [32, 64, 128, 256], 8
TRANSFER_DEPTHS, FIXED_WIDTH = [4, 8, 16, 32], 64
TRANSFER_STEPS = 88
RATES = [round(10 ** (exponent / 4), 8) for exponent in range(-16, 3)]
TRANSFER_INFERENCE = {"mupc": 0.3, "residual": 0.05}
TRANSFER_TITLES = {"mupc": "muPC", "residual": "standard parametrisation"}


def transfer_series(kind: str) -> tuple[list[Shape], list[Shape]]:
    """The shapes of growing width, and those of growing depth."""
    return [(kind, width, FIXED_DEPTH) for width in WIDTHS], [
        (kind, FIXED_WIDTH, depth) for depth in TRANSFER_DEPTHS
    ]


def transfer_plans(seeds: Iterable[int]) -> list[Line]:
    shapes = [(width, FIXED_DEPTH) for width in WIDTHS]
    shapes += [(FIXED_WIDTH, depth) for depth in TRANSFER_DEPTHS if depth != FIXED_DEPTH]
    ranges = {"mupc": (3e-3, 1.0), "residual": (3e-4, 0.1)}
    return [
        {
            "kind": "transfer",
            "network": kind,
            "width": width,
            "depth": depth,
            "seed": seed,
            "steps": TRANSFER_STEPS,
            "rate": TRANSFER_INFERENCE[kind],
            "epsilon": SMALL,
            "learning_rate": eta,
        }
        for seed in seeds
        for kind in TRANSFER_INFERENCE
        for width, depth in shapes
        for eta in RATES
        if ranges[kind][0] * 0.99 < eta < ranges[kind][1] * 1.01
    ]


def transfer_once(plan: Line, train: Split) -> Line:
    """A fixed number of learning steps; then the squared error of the feedforward output on the training
    set.
    """
    net = network(plan["network"], 64, plan["width"], plan["depth"], "tanh")
    trainer = pctt.Trainer(
        net,
        pctt.Inference(num_steps=plan["depth"], rate=plan["rate"]),
        pctt.Adam(plan["learning_rate"], epsilon=plan["epsilon"]),
        weights=weights_of("normal" if plan["network"] == "mupc" else "standard", net, plan["seed"]),
        seed=plan["seed"],
        batch_size=BATCH_SIZE,
    )
    started = time.perf_counter()
    epochs = math.ceil(plan["steps"] * BATCH_SIZE / len(train))

    def stop(kind: str, fields: dict[str, Any]) -> None:
        if kind == "batch" and fields["step"] == plan["steps"]:
            trainer.stop()

    result = trainer.fit(train, epochs, callbacks=[stop])
    targets = torch.nn.functional.one_hot(train.labels, 10)
    outputs = trainer.predict(train.inputs)
    return {
        **plan,
        "status": result.status.name,
        "loss": float(0.5 * (targets - outputs).square().sum(1).mean()),
        "accuracy": float((outputs.argmax(1) == train.labels).double().mean()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def transfer(arguments: argparse.Namespace) -> None:
    (train,) = standardised(load("digits").train)
    run_all(
        transfer_plans(arguments.seeds or [0, 1, 2]), arguments.out, lambda plan: transfer_once(plan, train)
    )


# --- lines --------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(plans: list[Line], out: Path, run: Any) -> None:
    """Runs what is not in `out` yet and appends it there."""
    done = read(out)
    for number, plan in enumerate(plans, start=1):
        if any(plan.items() <= line.items() for line in done):
            continue
        label = ", ".join(f"{key} {value}" for key, value in plan.items() if key != "kind")
        say(f"[{number}/{len(plans)}] {label}")
        line = run(plan)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        say(f"  {line['status']}, {line['accuracy']:.2%}, {line['seconds']} s")


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


# --- tables -------------------------------------------------------------------------------------------------


def accuracy_table(lines: list[Line], samples: int | None) -> str:
    """A row per curve, a column per depth: mean over seeds, how many, seconds of a run."""
    found = finals(lines, samples)
    depths = sorted({line["depth"] for line in found})
    rows = [
        "| test accuracy, hidden layers: | " + " | ".join(map(str, depths)) + " |",
        "|---" * (len(depths) + 1) + "|",
    ]
    for name, curve in CURVES.items():
        cells = []
        for depth in depths:
            here = [line for line in found if line["curve"] == name and line["depth"] == depth]
            failed = sum(line["status"] != "COMPLETED" for line in here)
            cell = f"{mean(100 * line['accuracy'] for line in here):.1f} % ({len(here)})" if here else "-"
            cells.append(cell + (f", {failed} diverged" if failed else ""))
        rows.append(f"| {curve.title} | " + " | ".join(cells) + " |")
    rows += ["", "| seconds per run | " + " | ".join(map(str, depths)) + " |"]
    rows.append("|---" * (len(depths) + 1) + "|")
    for name, curve in CURVES.items():
        cells = []
        for depth in depths:
            here = [line for line in found if line["curve"] == name and line["depth"] == depth]
            cells.append(f"{mean(line['seconds'] for line in here):.0f}" if here else "-")
        rows.append(f"| {curve.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def search_table(lines: list[Line]) -> str:
    """A row per curve, depth and inference rate, a column per learning rate."""
    found = [line for line in lines if line["kind"] == "search"]
    rates = sorted({line["settings"]["learning_rate"] for line in found})
    rows = ["| validation | rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    rows.append("|---" * (len(rates) + 2) + "|")
    cells: dict[tuple[str, float], dict[float, str]] = {}
    for name, curve in CURVES.items():
        for line in (line for line in found if line["curve"] == name):
            settings = line["settings"]
            kind = f"{curve.title}, depth {line['depth']}"
            cell = f"{100 * line['accuracy']:.1f}"
            if settings == asdict(curve.settings):
                cell = f"**{cell}**"
            if line["status"] != "COMPLETED":
                cell = "diverged"
            cells.setdefault((kind, settings["rate"]), {})[settings["learning_rate"]] = cell
    for (kind, rate), row in cells.items():
        shown = "" if "backprop" in kind else f"{rate:g}"
        rows.append(f"| {kind} | {shown} | " + " | ".join(row.get(eta, "") for eta in rates) + " |")
    return "\n".join(rows)


def finals(lines: list[Line], samples: int | None) -> list[Line]:
    """Lines of test accuracies with the settings of CURVES, by default of the commonest number of images."""
    lines = [
        line
        for line in lines
        if line["kind"] == "accuracy"
        and line["curve"] in CURVES
        and line["settings"] == asdict(CURVES[line["curve"]].settings)
    ]
    samples = samples or mode(line["samples"] for line in lines)
    return [line for line in lines if line["samples"] == samples]


def losses(lines: list[Line]) -> dict[Shape, dict[float, float]]:
    """Per network, width and depth: mean loss over the seeds at each learning rate; inf where a seed
    failed.
    """
    runs: dict[Shape, dict[float, list[float]]] = {}
    for line in lines:
        if line["kind"] == "transfer":
            shape = line["network"], line["width"], line["depth"]
            loss = line["loss"] if line["status"] in ("COMPLETED", "STOPPED") else math.inf
            runs.setdefault(shape, {}).setdefault(line["learning_rate"], []).append(loss)
    return {
        shape: {rate: mean(found) for rate, found in sorted(by_rate.items())}
        for shape, by_rate in runs.items()
    }


def transfer_table(lines: list[Line]) -> str:
    """The best rate of every width and depth, its loss, and the loss at the best rate of the smallest
    network.
    """
    rows = [
        "| network | width | hidden layers | best rate | its loss | loss at the smallest network's rate |"
    ]
    rows.append("|---" * 6 + "|")
    table = losses(lines)
    for kind in TRANSFER_INFERENCE:
        for shapes in transfer_series(kind):
            smallest = best_rate(table[shapes[0]])
            for shape in shapes:
                rate = best_rate(table[shape])
                there = table[shape].get(smallest, math.nan)
                rows.append(
                    f"| {TRANSFER_TITLES[kind]} | {shape[1]} | {shape[2]} | {rate:.3g} "
                    f"| {table[shape][rate]:.4f} | {there:.4f} |"
                )
    return "\n".join(rows)


def best_rate(by_rate: dict[float, float]) -> float:
    return min(by_rate, key=lambda rate: by_rate[rate])


# --- pictures -----------------------------------------------------------------------------------------------

STYLES = {
    "pc": COLOURS[0],
    "epc": COLOURS[2],
    "bp": COLOURS[6],
    "pc-relu": COLOURS[1],
    "bp-relu": COLOURS[5],
    "gs": COLOURS[3],
}
"""Colour of a curve by its name, but for "mupc-" in front and "-small" behind, which is dashed."""


def new_figure(width: float, height: float) -> Any:
    figure = import_module("matplotlib.figure").Figure((width, height), dpi=110, layout="constrained")
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def draw_accuracy(lines: list[Line], samples: int | None, path: Path) -> None:
    """Left the plain chain, right the muPC network."""
    found = finals(lines, samples)
    depths = sorted({line["depth"] for line in found})
    figure = new_figure(10.5, 5.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind, title in zip(
        panels, ("plain", "mupc"), ("Plain chain, standard weights", "Residual network, muPC"), strict=True
    ):
        for name, curve in CURVES.items():
            here = {depth: [] for depth in depths}
            for line in found:
                if line["curve"] == name and curve.settings.network == kind:
                    here[line["depth"]].append(100 * line["accuracy"])
            points = {depth: values for depth, values in here.items() if values}
            if not points:
                continue
            key = name.removesuffix("-small").removeprefix("mupc").removeprefix("-") or "pc"
            colour = STYLES[key]
            style = "--" if name.endswith("small") else "-"
            means = [mean(values) for values in points.values()]
            axes.plot(
                list(points),
                means,
                color=colour,
                linestyle=style,
                marker="o",
                markersize=5,
                linewidth=1.6,
                label=curve.title,
            )
            for depth, values in points.items():
                axes.plot([depth] * len(values), values, ".", color=colour, markersize=3)
        axes.axhline(10, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="hidden layers", xscale="log", ylim=(0, 100))
        axes.set_xticks(depths, labels=[str(depth) for depth in depths])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=9)
    panels[0].set_ylabel("test accuracy (%)")
    panels[1].text(depths[-1], 11, "chance", color=GREY, ha="right", fontsize=9)
    save(figure, path)


def draw_transfer(lines: list[Line], path: Path) -> None:
    """Above muPC, below the standard parametrisation; left over width, right over depth."""
    table = losses(lines)
    figure = new_figure(10.5, 7.0)
    panels = figure.subplots(2, 2, sharey=True)
    for row, kind in zip(panels, TRANSFER_INFERENCE, strict=True):
        for axes, shapes, which in zip(row, transfer_series(kind), (1, 2), strict=True):
            word = ("width", "hidden layers")[which - 1]
            for shape, colour in zip(shapes, (COLOURS[4], COLOURS[0], COLOURS[5], COLOURS[1]), strict=True):
                by_rate = table[shape]
                axes.plot(
                    list(by_rate),
                    list(by_rate.values()),
                    color=colour,
                    linewidth=1.6,
                    label=str(shape[which]),
                )
                best = best_rate(by_rate)
                axes.plot([best], [by_rate[best]], "o", color=colour)
            fixed = f"{FIXED_DEPTH} hidden layers" if which == 1 else f"width {FIXED_WIDTH}"
            axes.set(title=f"{TRANSFER_TITLES[kind]}, {fixed}", xscale="log", yscale="log", ylim=(0.008, 0.8))
            axes.set_xlabel("learning rate")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(title=word, frameon=True, framealpha=0.9, edgecolor="none", loc="lower left")
        row[0].set_ylabel(f"training loss after {TRANSFER_STEPS} steps")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("accuracy", help="test accuracy over depth on MNIST")
    one.add_argument("--curves", nargs="+", choices=tuple(CURVES), default=list(CURVES), metavar="NAME")
    one.add_argument("--depths", type=int, nargs="+", help="hidden layers (default 5 10 20 50 128)")
    one.add_argument("--samples", type=int, default=SAMPLES, help="training images (default 20000)")
    one.add_argument("--data-dir", help="folder of the IDX files; else the environment variable PCTT_DATA")
    one.add_argument("--search", action="store_true", help="train the candidates of GRID, validation only")
    one.add_argument("--learning-rates", type=float, nargs="+", help="with --search, in place of GRID")
    one.add_argument("--rates", type=float, nargs="+", help="of inference; with --search, in place of GRID")
    three = commands.add_parser("reach", help="layers that Adam's epsilon leaves a gradient, before training")
    three.add_argument("--data-dir", help="folder of the IDX files; else the environment variable PCTT_DATA")
    two = commands.add_parser("transfer", help="loss over learning rates, widths and depths, on digits")
    for command, out in ((one, "depth.jsonl"), (two, "transfer.jsonl")):
        command.add_argument("--seeds", type=int, nargs="+")
        command.add_argument("--out", type=Path, default=Path(out), help=f"JSON lines (default {out})")
        command.add_argument("--table", action="store_true", help="print markdown tables, train nothing")
        command.add_argument("--picture", type=Path, metavar="PNG", help="draw the figure, train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # errors that shrink over 100 layers would slow the products down
    if arguments.command == "reach":
        print(reach(arguments))
        return 0
    lines = read(arguments.out)
    if arguments.command == "accuracy":
        if arguments.table:
            print(search_table(lines) if arguments.search else accuracy_table(lines, arguments.samples))
        if arguments.picture:
            draw_accuracy(lines, arguments.samples, arguments.picture)
        if not (arguments.table or arguments.picture):
            accuracy(arguments)
    else:
        if arguments.table:
            print(transfer_table(lines))
        if arguments.picture:
            draw_transfer(lines, arguments.picture)
        if not (arguments.table or arguments.picture):
            transfer(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
