"""What a command shows: a progress bar and lines on a terminal, plain lines in a pipe, or JSON lines."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pctt import plots, record
from pctt.config import RunConfig
from pctt.data import Dataset
from pctt.describe import changed, where
from pctt.engine import Status
from pctt.run import FitResult, Trainer

CURVES = "curves.png"


@dataclass
class Reporter:
    """Tells whoever started the command how it goes."""

    as_json: bool
    bar: Any = None

    def start(
        self,
        config: RunConfig,
        dataset: Dataset,
        trainer: Trainer,
        folder: Path,
        num_training: int,
        is_new: bool,
    ) -> None:
        widths = "-".join(map(str, trainer.net.widths))
        facts = {
            "network": widths,
            "weights": trainer.net.num_weights(),
            "data": dataset.name,
            "training_samples": num_training,
            "validation_samples": len(dataset.train) - num_training,
            "test_samples": len(dataset.test),
            "algorithm": config.training.algorithm,
            **trainer.place(),
            "seed": config.training.seed,
            "folder": str(folder),
            "from_epoch": trainer.progress.epoch,
            "from_step": trainer.progress.step,
        }
        if self.as_json:
            print_json("start", facts)
            return
        verb = "training" if is_new else f"resuming after batch {trainer.progress.step}:"
        knobs = config.inference
        how = f"T={knobs.num_steps}, rate={knobs.rate:g}, {knobs.prediction} prediction"
        others = {name: value for name, value in changed(knobs).items() if name not in SAID}
        how += "".join(f", {name}={value}" for name, value in others.items())
        print(
            f"{verb} {widths} ({trainer.net.num_weights():,} weights) on {dataset.name}: "
            f"{num_training} training, {len(dataset.train) - num_training} validation, "
            f"{len(dataset.test)} test samples; "
            f"{'predictive coding, ' + how if config.training.algorithm == 'pc' else 'backpropagation'}; "
            f"{where(trainer)}",
            flush=True,
        )
        if sys.stderr.isatty():
            self.bar = _progress_bar(
                config.training.epochs * math.ceil(num_training / trainer.batch_size),
                trainer.progress.step,
                f"{trainer.place()['backend']}: {trainer.place()['device']}",
            )

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "batch" and self.bar is not None:
            self.bar.update()
            if fields["step"] % 20 == 0:
                self.bar.set_postfix_str(
                    f"epoch {fields['epoch']}, energy {sum(fields['energies'].values()):.4f}"
                )
        elif kind == "epoch" and self.as_json:
            print_json(kind, fields)
        elif kind == "epoch":
            accuracy = fields["validation_accuracy"]
            line = f"epoch {fields['epoch']:>3}  energy {fields['train_energy']:.5f}" + (
                f"  validation {accuracy:.2%}" if accuracy is not None else ""
            )
            line += f"  {fields['seconds']:.1f} s"
            if self.bar is not None:
                self.bar.write(line)
            else:
                print(line, flush=True)

    def end(self, result: dict[str, Any], picture: Path | None, note: str | None) -> None:
        self._close()
        if self.as_json:
            print_json("result", {key: value for key, value in result.items() if key != "kind"})
            return
        accuracy = result["test_accuracy"]
        found = (
            f"test accuracy {accuracy:.2%} on {result['test_samples']} samples, "
            if accuracy is not None
            else ""
        )
        print(f"{found}after the last of {result['epochs']} epochs" + (f" ({note})" if note else ""))
        if picture is not None and accuracy is not None:
            print(f"curves in {picture}; `pctt eval {picture.parent}` evaluates the run again")
        elif picture is not None:
            print(f"curves in {picture}; `pctt generate {picture.parent}` shows what it has learned")

    def failed(self, outcome: FitResult, folder: Path) -> None:
        self._close()
        if self.as_json:
            print_json(
                "failed", {"status": outcome.status.name, "message": outcome.message, "step": outcome.steps}
            )
        message = outcome.message
        if outcome.status is Status.STOPPED:
            message = (
                f"stopped after batch {outcome.steps}; the same command with --out {folder} --resume goes on."
            )
        elif outcome.status is Status.DEVICE_LOST:
            message += f" The same command with --out {folder} --resume goes on from it."
        say_error(message)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Asking:
    """A progress bar over the pictures of a question, or over other units, on a terminal and without
    --json.
    """

    def __init__(self, total: int, place: str, as_json: bool, unit: str = "picture") -> None:
        shown = not as_json and sys.stderr.isatty()
        self.bar = _progress_bar(total, 0, place, unit) if shown else None

    def update(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)

    def say(self, text: str) -> None:
        """Lines above the bar."""
        if self.bar is not None:
            self.bar.write(text, end="")
        else:
            print(text, end="", flush=True)

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *reason: object) -> None:
        if self.bar is not None:
            self.bar.close()


SAID = ("num_steps", "rate", "prediction")


def _progress_bar(total: int, done: int, place: str, unit: str = "batch") -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        raise ModuleNotFoundError('the progress bar needs tqdm: pip install "pctt[cli]".') from None
    return tqdm(total=total, initial=done, desc=place, unit=unit, dynamic_ncols=True, leave=False)


def draw(folder: Path, config: RunConfig) -> Path | None:
    """The picture of the run in `folder`, or None, said on standard error, where matplotlib is missing."""
    title = f"{folder.name}: {config.data.name}, {config.training.algorithm}, seed {config.training.seed}"
    try:
        return plots.draw_run(record.read(folder / record.FILE_NAME), folder / CURVES, title)
    except ImportError as error:
        say_error(f"no picture of the curves: {error}")
        return None


def print_json(kind: str, fields: dict[str, Any]) -> None:
    """One line of --json."""
    print(json.dumps({"kind": kind, **fields}), flush=True)


def say_error(message: str) -> None:
    print(f"pctt: {message}", file=sys.stderr)
