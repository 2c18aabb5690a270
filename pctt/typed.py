"""From what was typed at the command line to a configuration, for every command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pctt.config import RunConfig, from_dict, parse_value, read_toml, to_dict
from pctt.data import Dataset, load
from pctt.presets import PRESETS
from pctt.report import say_error

OK, FAILED, USAGE = 0, 1, 2
"""Exit codes."""

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
"""(channels, height, width); a plan needs no more of the data, so their files need not be there."""


class UsageError(ValueError):
    """The command line asked for something that cannot be; exit code 2."""


def configuration(what: str) -> RunConfig:
    if what in PRESETS:
        return PRESETS[what]()
    if not what.endswith(".toml"):
        raise UsageError(
            f"{what!r} is neither a preset ({', '.join(PRESETS)}) nor the path of a .toml configuration; "
            "give one of those."
        )
    try:
        return read_toml(Path(what))
    except ValueError as error:
        raise UsageError(str(error)) from None


def assignments(settings: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise UsageError(f"--set takes key=value pairs such as inference.rate=0.05, got {setting!r}.")
        values[key.strip()] = parse_value(text.strip())
    return values


def override(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """`config` with the given dotted keys replaced; None leaves a key as it is."""
    entries = to_dict(config)
    for key, value in sorted(values.items(), key=lambda item: not item[0].endswith("kind")):
        if value is None:
            continue
        *path, last = key.split(".")
        table = entries
        for part in path:
            table = table.setdefault(part, {}) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            raise UsageError(f"there is no setting {key}.")
        if last == "kind" and table.get("kind") != value:
            table.clear()  # the settings of another kind
        table[last] = value
    try:
        return from_dict(RunConfig, entries)
    except ValueError as error:
        raise UsageError(str(error)) from None


def elsewhere(config: RunConfig, backend: str | None, device: str | None) -> RunConfig:
    """`config` on another backend or device. A device and a precision belong to the backend they are for."""
    before = config.training
    backend = backend or before.backend
    device = device or (before.device if backend == before.backend else None)
    try:
        fused = before.fused and backend != "reference"
        cores = before.cores_per_layer if fused else None
        training = replace(before, backend=backend, device=device, fused=fused, cores_per_layer=cores)
        precision = None if backend == "reference" else config.precision
        return replace(config, training=training, precision=precision)
    except ValueError as error:
        raise UsageError(str(error)) from None


def load_data(config: RunConfig) -> Dataset:
    if config.data.name == "digits" and config.data.data_dir is not None:
        say_error("data_dir has no effect on digits, which comes with scikit-learn")
        return load(config.data.name)
    return load(config.data.name, config.data.data_dir)
