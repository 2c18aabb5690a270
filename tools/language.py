"""A character LSTM on Python's documentation, by predictive coding and as its backprop twin.

Trains CURVES, the same network from the same weights over the same chunks in the same order, on the text
`load_text("pydoc")`: truncated recurrence, one learning step per chunk, the state carried on. Losses are bits
per character of a feedforward sweep, of a training chunk before its learning step, of the validation text
every --every steps. `--search` trains the candidates of GRID for the first chunks with another seed; it chose
the learning rates. The inference rates of strict PC and ePC are below its best ones, which fail later on.
`--agreement` measures how far the gradients of each curve are from those of backpropagation. Every run is a
line of JSON in --out; what stands there already is not run again. --table prints the lines as markdown,
--picture draws them; with either nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

import pctt
from pctt import backprop
from pctt.data.text import load_text, windows
from pctt.network import Weights
from pctt.plots import COLOURS, GREY
from pctt.recurrent import spread
from pctt.sequences import Chunks, sample

LENGTH, STREAMS, UNITS, EMBEDDED = 20, 32, 64, 32
CHUNKS, HELD_OUT = 200, 40
SEARCH_CHUNKS, SEARCH_SEED = 60, 100

Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """algorithm: "pc" or "backprop".    learning_rate: of Adam.    inference: what differs from its
    defaults."""

    algorithm: str
    learning_rate: float
    inference: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    title: str
    settings: Settings


EXACT = {"num_steps": 1, "rate": 1.0, "prediction": "fixed", "sweep": "gauss_seidel"}
FIXED = {"num_steps": 20, "rate": 0.5, "prediction": "fixed"}
STRICT = {"num_steps": 20, "rate": 0.01}
EPC = {"num_steps": 5, "rate": 0.002, "variables": "errors"}

CURVES = {
    "backprop": Curve("backprop", Settings("backprop", 1e-2, {"num_steps": 0})),
    "slow": Curve("backprop, learning rate of strict PC", Settings("backprop", 3e-3, {"num_steps": 0})),
    "exact": Curve("fixed prediction, one sweep down", Settings("pc", 1e-2, EXACT)),
    "fixed": Curve("fixed prediction, T = 20", Settings("pc", 1e-2, FIXED)),
    "epc": Curve("ePC, T = 5", Settings("pc", 1e-2, EPC)),
    "strict": Curve("strict PC, T = 20", Settings("pc", 3e-3, STRICT)),
}
GRID: dict[str, list[Settings]] = {
    "backprop": [Settings("backprop", eta, {"num_steps": 0}) for eta in (3e-3, 1e-2, 2e-2)],
    "epc": [Settings("pc", 1e-2, {**EPC, "rate": rate}) for rate in (0.02, 0.1)],
    "strict": [
        *(Settings("pc", 1e-2, {**STRICT, "rate": rate}) for rate in (0.05, 0.1, 0.2)),
        *(Settings("pc", 3e-3, {**STRICT, "rate": rate}) for rate in (0.02, 0.05, 0.1)),
    ],
}
"""Candidates of --search. The fixed predictions take the learning rate of backprop."""


def network(symbols: int, length: int = LENGTH) -> pctt.Network:
    output = pctt.Dense(symbols, "softmax", energy=pctt.Categorical())
    return pctt.unroll(pctt.LSTMCell(UNITS), length, pctt.Embedding(symbols, EMBEDDED), output)


def data() -> tuple[int, Chunks, Chunks]:
    """Symbols; training chunks; validation chunks."""
    text = load_text("pydoc")
    train, held_out = (windows(part, LENGTH, STREAMS) for part in (text.train, text.validation))
    return len(text.symbols), (train[0], train[1]), (held_out[0][:HELD_OUT], held_out[1][:HELD_OUT])


def train_once(plan: Line, every: int, keep: Path | None) -> Line:
    settings = Settings(**plan["settings"])
    symbols, (inputs, targets), held_out = data()
    net = network(symbols)
    stream = pctt.Stream(
        net,
        pctt.Inference(**settings.inference),
        pctt.Adam(settings.learning_rate),
        weights=pctt.init(net, plan["seed"]),
        algorithm=settings.algorithm,
        seed=plan["seed"],
    )
    started = time.perf_counter()
    chunks = plan["chunks"]
    result = stream.fit((inputs[:chunks], targets[:chunks]), 1, held_out, validate_every=every)
    if keep is not None:
        stream.save(keep)
    return {
        **plan,
        "status": result.status.name,
        "train": [round(loss, 4) for _, loss in stream.losses],
        "validation": [[step, round(loss, 4)] for step, loss in stream.validation],
        "seconds": round(time.perf_counter() - started, 1),
    }


# --- runs ---------------------------------------------------------------------------------------------------


def planned(kind: str, curve: str, settings: Settings, seed: int, chunks: int) -> Line:
    """What makes a run that run: the first fields of its line."""
    return {"kind": kind, "curve": curve, "seed": seed, "chunks": chunks, "settings": asdict(settings)}


def plans_of(arguments: argparse.Namespace) -> list[Line]:
    if arguments.search:
        return [
            planned("search", name, settings, SEARCH_SEED, SEARCH_CHUNKS)
            for name in arguments.curves
            for settings in GRID.get(name, [])
        ]
    return [
        planned("run", name, CURVES[name].settings, seed, arguments.chunks)
        for seed in arguments.seeds
        for name in arguments.curves
    ]


def run_all(plans: list[Line], out: Path, every: int, keep: Path | None) -> None:
    """Runs what is not in `out` yet and appends it there."""
    done = read(out)
    for number, plan in enumerate(plans, start=1):
        if any(plan.items() <= line.items() for line in done):
            continue
        say(f"[{number}/{len(plans)}] {plan['curve']}, seed {plan['seed']}, {plan['settings']}")
        folder = None if keep is None else keep / f"{plan['curve']}-{plan['seed']}"
        line = train_once(plan, every, folder)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        say(f"  {line['status']}, {line['validation'][-1:]} bits per character, {line['seconds']} s")


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


# --- how near to backpropagation ----------------------------------------------------------------------------


def agreement(learning_steps: tuple[int, ...] = (0, 60)) -> str:
    """Cosine and ratio of norms of the gradients to those of backpropagation, per layer, in a chunk after
    some learning steps of backprop.
    """
    symbols, (inputs, targets), _ = data()
    net = network(symbols)
    layers = list(net.weight_shapes())
    rows = ["| cosine (norm), layer: | " + " | ".join(layers) + " |", "|---" * (len(layers) + 1) + "|"]
    for steps in learning_steps:
        stream = pctt.Stream(
            net, None, pctt.Adam(1e-2), weights=pctt.init(net, SEARCH_SEED), algorithm="backprop"
        )
        if steps:
            stream.fit((inputs[:steps], targets[:steps]), 1)
        weights, given = stream.weights, spread(net, inputs[steps], targets[steps])
        reference, _, _ = backprop.differentiate(net, weights, given)
        for curve in (CURVES[name] for name in ("exact", "fixed", "epc", "strict")):
            result = pctt.infer(net, weights, given, pctt.Inference(**curve.settings.inference))
            found = pctt.weight_gradients(net, weights, result)
            cells = [_compared(found[layer], reference[layer]) for layer in layers]
            rows.append(f"| {curve.title}, after {steps} steps | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _compared(found: dict[str, Tensor], reference: dict[str, Tensor]) -> str:
    a, b = (torch.cat([tree[key].flatten().double() for key in reference]) for tree in (found, reference))
    cosine = torch.nn.functional.cosine_similarity(a, b, 0)
    return f"{float(cosine):.3f} ({float(a.norm() / b.norm()):.2f})"


# --- tables and picture -------------------------------------------------------------------------------------


def finals(lines: list[Line]) -> list[Line]:
    """Runs with the settings of CURVES, to their end."""
    runs = [line for line in lines if line["kind"] == "run" and line["status"] == "COMPLETED"]
    return [line for line in runs if line["settings"] == asdict(CURVES[line["curve"]].settings)]


def table(lines: list[Line]) -> str:
    """A row per curve: bits per character, mean and standard deviation over seeds."""
    rows = [
        "| bits per character | training, last 50 chunks | validation, half-way | validation, end | "
        "end minus backprop's, by seed | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines = finals(lines)
    ends = {(line["curve"], line["seed"]): line["validation"][-1][1] for line in lines}
    for name, curve in CURVES.items():
        here = [line for line in lines if line["curve"] == name]
        if not here:
            continue
        last = [mean(line["train"][-50:]) for line in here]
        middle = [line["validation"][len(line["validation"]) // 2 - 1][1] for line in here]
        end = [line["validation"][-1][1] for line in here]
        gaps = [
            f"{ends[name, line['seed']] - ends['backprop', line['seed']]:+.3f}"
            for line in here
            if ("backprop", line["seed"]) in ends
        ]
        seconds = mean(line["seconds"] for line in here)
        cells = [_spread(last), _spread(middle), _spread(end), ", ".join(gaps), f"{seconds:.0f}"]
        rows.append(f"| {curve.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def search_table(lines: list[Line]) -> str:
    rows = ["| curve | inference rate | learning rate | bits per character |", "|---|---|---|---|"]
    for line in (line for line in lines if line["kind"] == "search"):
        settings = Settings(**line["settings"])
        cell = f"{line['validation'][-1][1]:.3f}" if line["status"] == "COMPLETED" else line["status"]
        chosen = settings == CURVES[line["curve"]].settings
        cell = f"**{cell}**" if chosen else cell
        rate = settings.inference.get("rate", "")
        rows.append(f"| {line['curve']} | {rate} | {settings.learning_rate:g} | {cell} |")
    return "\n".join(rows)


def draw(lines: list[Line], path: Path) -> None:
    """Bits per character, means over seeds with a band of one standard deviation: training and validation."""
    lines = finals(lines)
    figure_module = import_module("matplotlib.figure")
    figure = figure_module.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for colour, (name, curve) in zip(COLOURS, CURVES.items(), strict=False):
        here = [line for line in lines if line["curve"] == name]
        if not here:
            continue
        train = torch.tensor([line["train"] for line in here], dtype=torch.float64)
        width = 10
        smooth = train.unfold(1, width, 1).mean(-1)
        dashes = {"fixed": (0, (4, 2)), "exact": (0, (1, 2)), "epc": (0, (5, 4))}.get(name, "-")
        _band(left, torch.arange(smooth.shape[1]) + width, smooth, colour, dashes, curve.title)
        held_out = torch.tensor([[loss for _, loss in line["validation"]] for line in here])
        steps = torch.tensor([step for step, _ in here[0]["validation"]])
        _band(right, steps, held_out.double(), colour, dashes, curve.title)
    for axes, title in ((left, "training, mean of 10 chunks"), (right, "validation")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("learning steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY)
    left.set_ylabel("bits per character")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _band(axes: Any, x: Tensor, values: Tensor, colour: str, dashes: Any, title: str) -> None:
    centre = values.mean(0)
    axes.plot(x.numpy(), centre.numpy(), color=colour, linestyle=dashes, linewidth=1.5, label=title)
    if len(values) > 1:
        width = values.std(0)
        low, high = (centre - width).numpy(), (centre + width).numpy()
        axes.fill_between(x.numpy(), low, high, color=colour, alpha=0.15, linewidth=0)


def text_of(weights: Weights, count: int = 300) -> str:
    """What a trained network goes on with after a few characters."""
    text = load_text("pydoc")
    net = network(len(text.symbols), 1)
    drawn = sample(net, weights, text.encode("The "), count, temperature=0.7)
    return "The " + text.decode(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("language.jsonl"), help="a line of JSON per run")
    parser.add_argument(
        "--curves", nargs="+", default=list(CURVES), choices=list(CURVES), help="default: all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--chunks", type=int, default=CHUNKS, help=f"learning steps, default {CHUNKS}")
    parser.add_argument("--every", type=int, default=25, help="learning steps between validations")
    parser.add_argument("--keep", type=Path, help="folder for a checkpoint of every run")
    parser.add_argument("--search", action="store_true", help="train the candidates of GRID instead")
    parser.add_argument("--agreement", action="store_true", help="print the table of gradients")
    parser.add_argument("--table", action="store_true", help="print what stands in --out")
    parser.add_argument("--picture", type=Path, help="draw what stands in --out")
    parser.add_argument("--text", type=Path, help="sample text from a checkpoint's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = read(arguments.out)
    if arguments.table:
        print(table(lines), search_table(lines), sep="\n\n")
    if arguments.picture:
        draw(lines, arguments.picture)
    if arguments.agreement:
        print(agreement())
    if arguments.text:
        stream = pctt.Stream(network(data()[0]), None, pctt.Adam())
        stream.load(arguments.text)
        print(text_of(stream.weights))
    if not (arguments.table or arguments.picture or arguments.agreement or arguments.text):
        run_all(plans_of(arguments), arguments.out, arguments.every, arguments.keep)


if __name__ == "__main__":
    main()
