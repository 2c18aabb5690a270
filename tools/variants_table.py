"""MNIST, 784-128-128-128-10: test accuracy of the variants of predictive coding beside their backprop twins.

Without another option it trains every column with every seed on all 60,000 training images, with the settings
of COLUMNS, and appends one JSON line per run; what stands in the file already is not run again. The test
images are read once per run, after its last epoch. --search instead trains the candidates of GRID on 54,000
images and reports the accuracy on the other 6,000; it never reads the test images. COLUMNS was chosen by it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

import pctt
from pctt.data import Split, load
from pctt.data.dataset import split_validation


@dataclass(frozen=True)
class Settings:
    """What is chosen per column; the rest is the same for all.

    output: "squared error", or "cross-entropy" on a softmax.
    rate, num_steps, momentum, weights_at, variables: of `pctt.Inference`.
    sign, style, beta: of `pctt.Nudge`; without a sign the output is held at its target.
    gain: of the initial weights' kaiming scale; None is the activation's own.
    epsilon: of AdamW. Errors shrink by about the rate from layer to layer, and the gradients with them, so
        that 1e-8 would slow the first layers down.
    """

    algorithm: str = "pc"
    output: str = "squared error"
    activation: str = "leaky_relu"
    num_steps: int = 5
    rate: float = 0.02
    momentum: float = 0.0
    weights_at: str = "end"
    variables: str = "states"
    sign: str | None = None
    style: str = "clamp"
    beta: float = 0.5
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    batch_size: int = 128
    gain: float | None = None
    epsilon: float = 1e-12

    def network(self) -> pctt.Network:
        hidden = [pctt.Dense(128, self.activation) for _ in range(3)]
        if self.output == "cross-entropy":
            output = pctt.Dense(10, "softmax", energy=pctt.Categorical())
        else:
            output = pctt.Dense(10)
        return pctt.chain(784, [*hidden, output])

    def inference(self) -> pctt.Inference | None:
        if self.algorithm == "backprop":
            return None
        return pctt.Inference(
            num_steps=self.num_steps,
            rate=self.rate,
            dynamics="momentum" if self.momentum else "euler",
            momentum=self.momentum,
            weights_at=self.weights_at,
            variables=self.variables,
            nudge=pctt.Nudge(self.beta, self.sign, self.style) if self.sign else None,
        )

    def trainer(self, seed: int) -> pctt.Trainer:
        net = self.network()
        return pctt.Trainer(
            net,
            self.inference(),
            pctt.AdamW(
                self.learning_rate,
                epsilon=self.epsilon,
                weight_decay=self.weight_decay,
                schedule=pctt.WarmupCosine(warmup=0.1, final=0.0),
            ),
            weights=pctt.init(net, seed, "kaiming", self.gain),
            seed=seed,
            batch_size=self.batch_size,
            algorithm=self.algorithm,
        )


Change = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """title: in the table.    pcx: best test epoch of 25 in percent, Pinchetti et al., ICLR 2025.
    kind: what makes it that column.    chosen: on the validation images, where not the default.
    """

    title: str
    pcx: float | None
    kind: Change
    chosen: Change

    @property
    def settings(self) -> Settings:
        return self.candidate(self.chosen)

    def candidate(self, change: Change) -> Settings:
        return Settings(**{**self.kind, **change})


SMALL_WEIGHTS = 3**-0.5
"""Gain of torch's own linear layers: weights of variance 1 / (3 fan-in)."""

INCREMENTAL: Change = {
    "num_steps": 6,
    "rate": 0.5,
    "momentum": 0.35,
    "gain": SMALL_WEIGHTS,
    "learning_rate": 5e-4,
    "weight_decay": 0.5,
}

COLUMNS = {
    "pc-se": Column("PC, squared error", 98.26, {}, {"gain": SMALL_WEIGHTS}),
    "pc-ce": Column("PC, cross-entropy", 98.11, {"output": "cross-entropy"}, {}),
    "pn": Column("positive nudging", 98.36, {"sign": "positive"}, {}),
    "nn": Column("negative nudging", 98.26, {"sign": "negative"}, {"gain": SMALL_WEIGHTS}),
    "cn": Column("centred nudging", 98.23, {"sign": "centred"}, {"gain": SMALL_WEIGHTS}),
    "ipc": Column(
        "iPC",
        98.45,
        {"weights_at": "every_step"},
        {**INCREMENTAL, "weight_decay": 0.3, "num_steps": 12},
    ),
    "epc": Column("ePC", None, {"variables": "errors"}, {"rate": 0.002}),
    "bp-se": Column("backprop, squared error", 98.29, {"algorithm": "backprop"}, {}),
    "bp-ce": Column(
        "backprop, cross-entropy", 98.07, {"algorithm": "backprop", "output": "cross-entropy"}, {}
    ),
}

DECAYS: list[Change] = [
    {"weight_decay": 0.3},
    {"weight_decay": 0.5},
    {"weight_decay": 1.0},
    {"weight_decay": 0.5, "learning_rate": 1e-3},
]
NUDGES: list[Change] = [
    {"style": "clamp", "beta": 0.5, "rate": 0.02},
    {"style": "clamp", "beta": 0.5, "rate": 0.05},
    {"style": "clamp", "beta": 0.2, "rate": 0.02},
    {"style": "loss", "beta": 0.2, "rate": 0.02},
    {"style": "clamp", "beta": 0.5, "rate": 0.02, "gain": SMALL_WEIGHTS},
]
GRID: dict[str, list[Change]] = {
    "pc-se": [
        {"rate": 0.01},
        {"rate": 0.02},
        {"rate": 0.02, "num_steps": 8},
        {"rate": 0.02, "weight_decay": 0.5},
        {"rate": 0.02, "gain": SMALL_WEIGHTS},
    ],
    "pc-ce": [
        {"rate": 0.02, "weight_decay": 0.3},
        {"rate": 0.02, "weight_decay": 0.5},
        {"rate": 0.02, "weight_decay": 1.0},
    ],
    "pn": NUDGES,
    "nn": NUDGES,
    "cn": [NUDGES[0], NUDGES[-1]],
    "epc": [{"rate": 0.001}, {"rate": 0.002}, {"rate": 0.005}],
    "bp-se": DECAYS,
    "bp-ce": DECAYS,
    "ipc": [
        INCREMENTAL,
        {**INCREMENTAL, "weight_decay": 1.0},
        {**INCREMENTAL, "learning_rate": 1e-3},
        {**INCREMENTAL, "learning_rate": 2e-3},
        {**INCREMENTAL, "learning_rate": 2e-3, "num_steps": 8, "batch_size": 256},
        {**INCREMENTAL, "learning_rate": 1e-3, "num_steps": 8},
        {
            **INCREMENTAL,
            "learning_rate": 2e-3,
            "num_steps": 8,
            "batch_size": 256,
            "rate": 0.7,
            "weight_decay": 1.0,
        },
        {**INCREMENTAL, "learning_rate": 3e-3},
        {**INCREMENTAL, "learning_rate": 2e-3, "weight_decay": 0.3},
        {**INCREMENTAL, "learning_rate": 2e-3, "rate": 0.3, "momentum": 0.6},
        {**INCREMENTAL, "learning_rate": 3e-3, "num_steps": 5, "weight_decay": 0.3},
        {**INCREMENTAL, "learning_rate": 3e-3, "weight_decay": 1.0},
        {**INCREMENTAL, "learning_rate": 1e-3, "weight_decay": 0.3, "num_steps": 10},
        {**INCREMENTAL, "learning_rate": 1e-3, "weight_decay": 0.2, "num_steps": 8},
        {**INCREMENTAL, "weight_decay": 0.3, "num_steps": 12},
    ],
}
"""Per column what a candidate changes in the defaults of Settings, beside the column's kind."""

VALIDATION = 0.1
TIMED_BATCHES = 20
EPOCHS, SEARCH_EPOCHS, SEEDS = 8, 6, [0, 1, 2, 3, 4]


def run(
    column: str,
    settings: Settings,
    seed: int,
    epochs: int,
    train: Split,
    held_out: Split | None,
    test: Split | None,
) -> dict[str, Any]:
    """One run and its JSON line; a run that fails is a line, too, without accuracies."""
    torch.set_num_threads(1)
    trainer = settings.trainer(seed)
    history: list[float] = []

    def watch(kind: str, fields: dict[str, Any]) -> None:
        if kind != "epoch":
            return
        if held_out is not None:
            history.append(fields["validation_accuracy"])
        reached = f", validation {history[-1]:.2%}" if history else ""
        print(f"  epoch {fields['epoch']}: {fields['seconds']:.1f} s{reached}", file=sys.stderr, flush=True)

    started = time.perf_counter()
    result = trainer.fit(train, epochs, held_out, callbacks=[watch])
    seconds = time.perf_counter() - started
    return {
        "kind": "final" if test is not None else "search",
        "column": column,
        "seed": seed,
        "epochs": epochs,
        "training_samples": len(train),
        "status": result.status.name,
        "validation_accuracy": result.validation_accuracy,
        "validation_history": history,
        "test_accuracy": trainer.evaluate(test) if test is not None and result.status.ok else None,
        "seconds": round(seconds, 1),
        "settings": asdict(settings),
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def identity(line: dict[str, Any]) -> str:
    """What makes two runs the same."""
    keys = ("kind", "column", "seed", "epochs", "training_samples", "settings")
    return json.dumps([line[key] for key in keys], sort_keys=True)


def run_all(
    jobs: list[tuple[str, Settings, int]],
    epochs: int,
    data: tuple[Split, Split | None, Split | None],
    out: Path,
) -> None:
    """Runs what is not in `out` yet and appends it there."""
    train, held_out, test = data
    done = {identity(line) for line in read(out)}
    for number, (column, settings, seed) in enumerate(jobs, start=1):
        planned = {
            "kind": "final" if test is not None else "search",
            "column": column,
            "seed": seed,
            "epochs": epochs,
            "training_samples": len(train),
            "settings": asdict(settings),
        }
        label = f"[{number}/{len(jobs)}] {column}, seed {seed}"
        if identity(planned) in done:
            print(f"{label}: there already", file=sys.stderr)
            continue
        print(label, changed(column, settings), file=sys.stderr, flush=True)
        line = run(column, settings, seed, epochs, train, held_out, test)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        accuracy = line["validation_accuracy"] if test is None else line["test_accuracy"]
        shown = "failed" if accuracy is None else f"{accuracy:.2%}"
        print(f"{label}: {line['status']}, {shown}, {line['seconds']:.0f} s", file=sys.stderr, flush=True)


def changed(column: str, settings: Settings) -> str:
    """Where settings differ from the defaults and the column's kind."""
    plain = asdict(COLUMNS[column].candidate({}))
    return ", ".join(f"{key}={value}" for key, value in asdict(settings).items() if value != plain[key])


def table(lines: list[dict[str, Any]], columns: list[str], epochs: int) -> str:
    """The markdown table of the final runs with the settings of COLUMNS."""
    rows = [
        f"| | test accuracy, epoch {epochs} | seeds | lowest, highest | PCX, best of 25 epochs |",
        "|---|---|---|---|---|",
    ]
    for name in columns:
        column, found = COLUMNS[name], final_runs(lines, name, epochs)
        accuracies = [100 * line["test_accuracy"] for line in found if line["test_accuracy"] is not None]
        failed = len(found) - len(accuracies)
        reached, span = "-", "-"
        if accuracies:
            error = stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else math.nan
            reached = f"{mean(accuracies):.2f} ± {error:.2f} %"
            span = f"{min(accuracies):.2f}, {max(accuracies):.2f}"
        seeds = f"{len(accuracies)}" + (f", {failed} failed" if failed else "")
        pcx = "-" if column.pcx is None else f"{column.pcx:.2f} %"
        rows.append(f"| {column.title} | {reached} | {seeds} | {span} | {pcx} |")
    return "\n".join(rows)


def final_runs(lines: list[dict[str, Any]], column: str, epochs: int) -> list[dict[str, Any]]:
    wanted = ("final", column, epochs, asdict(COLUMNS[column].settings))
    keys = ("kind", "column", "epochs", "settings")
    return [line for line in lines if tuple(line[key] for key in keys) == wanted]


def timing(columns: list[str], train: Split, rounds: int) -> str:
    """Seconds per epoch. The columns train a few batches each in turn, round after round, so that what
    disturbs the machine disturbs all of them; look along the ratios, never between runs.
    """
    torch.set_num_threads(1)
    trainers = {name: COLUMNS[name].settings.trainer(0) for name in dict.fromkeys(["pc-se", *columns])}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds + 1):
        for name, trainer in trainers.items():
            size = TIMED_BATCHES * trainer.batch_size
            started = time.perf_counter()
            trainer.fit(Split(train.inputs[:size], train.labels[:size]), number + 1)
            if number:  # the first one allocates
                times[name].append((time.perf_counter() - started) * len(train) / size)
    rows = ["| | s per epoch | over PC, squared error |", "|---|---|---|"]
    for name in columns:
        ratio = median(one / other for one, other in zip(times[name], times["pc-se"], strict=True))
        rows.append(f"| {COLUMNS[name].title} | {median(times[name]):.1f} | {ratio:.2f} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(COLUMNS)
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"of {', '.join(names)} (default all)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="(default 0 to 4; with --search 0)")
    parser.add_argument("--epochs", type=int, help="(default 8; with --search 6)")
    parser.add_argument("--data-dir", help="folder of the IDX files; else the environment variable PCTT_DATA")
    parser.add_argument(
        "--out", type=Path, default=Path("variants.jsonl"), help="JSON lines (default variants.jsonl)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--search", action="store_true", help="train the candidates of GRID, validation only")
    what.add_argument(
        "--table", action="store_true", help="print the markdown table from --out, train nothing"
    )
    what.add_argument("--time", type=int, metavar="ROUNDS", help="print seconds per epoch, columns in turn")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read(arguments.out), arguments.columns, arguments.epochs or EPOCHS))
        return 0
    dataset = load("mnist", arguments.data_dir)
    if arguments.time:
        print(timing(arguments.columns, dataset.train, arguments.time))
        return 0
    if arguments.search:
        train, held_out = split_validation(dataset.train, VALIDATION, seed=0)
        jobs = [
            (column, COLUMNS[column].candidate(change), seed)
            for column in arguments.columns
            for change in GRID[column]
            for seed in arguments.seeds or [0]
        ]
        run_all(jobs, arguments.epochs or SEARCH_EPOCHS, (train, held_out, None), arguments.out)
        return 0
    seeds = arguments.seeds or SEEDS
    jobs = [(column, COLUMNS[column].settings, seed) for seed in seeds for column in arguments.columns]
    run_all(jobs, arguments.epochs or EPOCHS, (dataset.train, None, dataset.test), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
