"""A run folder as the dashboard sees it: the record by columns, the settings by dotted keys, and what is odd
about it.

The files may come from anyone and from any version, so nothing in them is taken for granted: what is no
number is missing, what cannot be used is passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pctt import checkpoint, record
from pctt.run import CHECKPOINT

CONFIG = "config.json"
MOST = 1e300  # numbers beyond it count as infinite, so that sums and percentages stay finite
LONGEST = 200  # characters of a setting that are shown
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """name: to tell it from the others.    records: of metrics.jsonl.    config: of config.json, or of the
    checkpoint.    state: metadata of the checkpoint, {} without.    num_weights: in it, None without.
    oddities: found while reading, in sentences.
    """

    folder: Path
    name: str
    records: Sequence[dict[str, Any]]
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    num_weights: int | None
    oddities: tuple[str, ...]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.records if entry.get("kind") == kind]

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        return self.of_kind("batch")

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        return self.of_kind("epoch")

    @cached_property
    def steps(self) -> np.ndarray:
        """[batches]"""
        return column(self.batches, "step")

    @cached_property
    def layers(self) -> list[str]:
        names: dict[str, None] = {}
        for entry in self.batches:
            energies = entry.get("energies")
            names |= dict.fromkeys(energies if isinstance(energies, dict) else ())
        return list(names)

    @cached_property
    def per_layer(self) -> dict[str, Columns]:
        """Of each field of a batch with a number per layer: {layer: [batches]}."""
        found: dict[str, Columns] = {}
        for row, entry in enumerate(self.batches):
            for field, values in entry.items():
                if isinstance(values, dict):
                    columns = found.setdefault(field, {})
                    for name, value in values.items():
                        if name not in columns:
                            columns[name] = np.full(len(self.batches), np.nan)
                        columns[name][row] = as_number(value)
        return found

    @cached_property
    def scalars(self) -> Columns:
        """Of each other field of a batch that is a number: [batches]."""
        fields = dict.fromkeys(
            field for entry in self.batches for field, value in entry.items() if _is_number(value)
        )
        return {field: column(self.batches, field) for field in fields if field not in ("step", "epoch")}

    @cached_property
    def total_energy(self) -> np.ndarray:
        """[batches]; missing where the energy of a layer is."""
        energies = self.per_layer.get("energies", {})
        return np.sum(list(energies.values()), axis=0) if energies else np.full(len(self.batches), np.nan)

    @cached_property
    def seconds_per_batch(self) -> np.ndarray:
        """[epochs]; wall clock, validation included."""
        done = column(self.batches, "epoch")
        counts = np.array([np.count_nonzero(done == epoch) for epoch in column(self.epochs, "epoch")])
        return column(self.epochs, "seconds") / np.where(counts > 0, counts, np.nan)

    @cached_property
    def result(self) -> dict[str, Any]:
        return (self.of_kind("result") or [{}])[-1]

    @cached_property
    def settings(self) -> dict[str, str]:
        """{dotted key: value as text}"""
        return {key: _shown(value) for key, value in _flat(self.config, "")}

    @property
    def outcome(self) -> str:
        if self.result:
            return "finished"
        failures = self.of_kind("failed")
        if failures:
            return f"failed: {str(failures[-1].get('status')).lower()}"
        return "no result yet"

    @property
    def warnings(self) -> list[str]:
        """What a reader should know before believing the curves."""
        said = list(self.oddities)
        for failure in self.of_kind("failed"):
            said.append(f"The run failed ({failure.get('status')}): {failure.get('message')}")
        skipped, halved = self.of_kind("skipped"), self.of_kind("halved")
        if skipped:
            step, status = skipped[0].get("step"), skipped[0].get("status")
            said.append(f"Batches that went wrong were skipped: {len(skipped)}, first {step} ({status}).")
        if halved:
            step, rate = halved[-1].get("step"), halved[-1].get("inference_rate")
            said.append(
                f"The inference rate was halved {len(halved)} times, last at batch {step}, to {rate}."
            )
        if not self.result and not self.of_kind("failed"):
            said.append("There is no result: the run is still going on, was stopped, or was killed.")
        places = self.of_kind("backend")
        for before, now in pairwise(places):
            said.append(
                f"The run was resumed elsewhere: from batch {now.get('step')} on {_place(now)}, "
                f"before on {_place(before)}."
            )
        training = self.config.get("training")
        planned = as_number(training.get("epochs")) if isinstance(training, dict) else math.nan
        done = [value for value in column(self.epochs, "epoch") if not math.isnan(value)]
        if done and max(done) > planned:
            said.append(
                f"The run was resumed: it was begun for {planned:.0f} epochs and has done {max(done):.0f}. A "
                "schedule of the learning rate may jump there."
            )
        missing = sum(int(np.isnan(values).sum()) for values in self.per_layer.get("energies", {}).values())
        if missing:
            said.append(f"{missing} energies in the record are missing or not finite.")
        steps = column([entry for entry in self.records if entry.get("kind") in ("batch", "skipped")], "step")
        gaps = int(np.count_nonzero(np.diff(steps) != 1))
        if gaps:
            said.append(f"Batches are missing from the record or out of order, in {gaps} places.")
        return said


def read(folder: Path) -> Run:
    """The run in `folder`; a run that is being written too.

    Raises FileNotFoundError where there is none, ValueError or OSError where its record cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give one that `pctt train` wrote.")
    path, oddities = folder / record.FILE_NAME, list[str]()
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no run ({record.FILE_NAME} is missing); give the folder that `pctt train` wrote."
        )
    records = record.read(path)
    if not records:
        oddities.append("Nothing is recorded yet.")
    state, num_weights = _checkpoint(folder / CHECKPOINT, oddities)
    config = _config(folder / CONFIG, state, oddities)
    if _is_cut_off(path):
        oddities.append(
            "The last line of the record is only half there and was left out: the run is being written, or "
            "was killed."
        )
    name = folder.name or folder.resolve().name
    return Run(folder, name, records, config, state, num_weights, tuple(oddities))


def column(entries: Sequence[Mapping[str, Any]], field: str) -> np.ndarray:
    """A field of each entry, NaN where it is no number."""
    return np.array([as_number(entry.get(field)) for entry in entries], dtype=float)


def as_number(value: object) -> float:
    """NaN for what is no number, or beyond `MOST`."""
    return float(value) if _is_number(value) else math.nan  # pyright: ignore[reportArgumentType]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST


def _is_cut_off(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _checkpoint(path: Path, oddities: list[str]) -> tuple[dict[str, Any], int | None]:
    if not path.is_file():
        oddities.append("There is no checkpoint, so the run can neither go on nor be evaluated.")
        return {}, None
    try:
        tensors, state = checkpoint.read(path)
    except checkpoint.CheckpointError as error:
        oddities.append(f"The checkpoint cannot be used: {error}")
        return {}, None
    return state, sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("weights/"))


def _config(path: Path, state: Mapping[str, Any], oddities: list[str]) -> dict[str, Any]:
    if not path.is_file():  # a run from Python
        return {name: state[name] for name in state if name != "progress"}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        list(_flat(config, ""))
    except (ValueError, RecursionError) as error:
        oddities.append(f"{CONFIG} is damaged: {error}")
        return {}
    if not isinstance(config, dict):
        oddities.append(f"{CONFIG} is damaged: it holds no table.")
        return {}
    return config


def _flat(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for index, entry in enumerate(value):
            yield from _flat(entry, f"{place}[{index}]")
    else:
        yield place, value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _place(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('backend')} ({entry.get('device')})"
