"""Configuration: frozen dataclasses on one side, plain dicts (TOML, JSON) on the other.

Every dataclass of the public face can be written as a dict and read back. A choice between kinds (SGD or
Adam, Gaussian or categorical) carries a key `kind`. Unknown keys, wrong types and missing keys are errors
that name the place, e.g. `inference.num_step`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pctt._checks import require_between, require_count, require_finite_positive, require_one_of
from pctt.backends import BACKENDS
from pctt.backends.precision import PrecisionPolicy
from pctt.energies import Categorical, Gaussian
from pctt.inference import Inference
from pctt.initialisers import SCHEMES
from pctt.layers import Dense
from pctt.learning import SGD, Adam, AdamW, Constant, Learning, WarmupCosine
from pctt.network import Network, chain
from pctt.placement.chips import CHIPS
from pctt.scaling import mupc

KINDS: dict[str, type] = {
    "gaussian": Gaussian,
    "categorical": Categorical,
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "constant": Constant,
    "warmup_cosine": WarmupCosine,
}
NAMES = {kind: name for name, kind in KINDS.items()}

ALGORITHMS = ("pc", "backprop")


@dataclass(frozen=True)
class InitConfig:
    """Initial weights, see pctt.init."""

    scheme: str = "xavier"
    gain: float | None = None

    def __post_init__(self) -> None:
        require_one_of("scheme", self.scheme, SCHEMES)
        if self.gain is not None:
            require_finite_positive("gain", self.gain)


@dataclass(frozen=True)
class DataConfig:
    """name: of the data set. data_dir: folder of its files, else PCTT_DATA. validation: fraction of the
    training data held out.
    """

    name: str = "digits"
    data_dir: str | None = None
    validation: float = 0.1

    def __post_init__(self) -> None:
        require_between("validation", self.validation, 0.0, 1.0)


@dataclass(frozen=True)
class TrainingConfig:
    """epochs: of the whole run.
    seed: of weights, validation split and batch order.
    algorithm: pc, or the backprop twin.
    device: reference: a torch device; emulated: a chip such as n150; tenstorrent: the number of a card.
    checkpoint_every: also write a checkpoint after this many batches, not only after each epoch.
    tensorboard: mirror the metrics to tensorboard event files in the run folder.
    """

    epochs: int = 10
    batch_size: int = 64
    seed: int = 0
    algorithm: str = "pc"
    backend: str = "reference"
    device: str | None = None
    checkpoint_every: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        require_count("epochs", self.epochs)
        require_count("batch_size", self.batch_size, least=1)
        require_count("seed", self.seed)
        require_one_of("algorithm", self.algorithm, ALGORITHMS)
        require_one_of("backend", self.backend, BACKENDS)
        if self.device is not None:
            _check_device(self.backend, self.device)
        if self.checkpoint_every is not None:
            require_count("checkpoint_every", self.checkpoint_every, least=1)


def _check_device(backend: str, device: str) -> None:
    if backend == "emulated":
        require_one_of("device of the emulated backend", device, tuple(CHIPS))
    if backend == "tenstorrent" and not (device.isascii() and device.isdigit()):
        raise ValueError(f"device of the tenstorrent backend must be a number such as 0, got {device!r}.")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    layers: of the chain; its input is as wide as the data.
    backward: layers of a chain down, from the output to the input.
    scaling: "standard", or "mupc" for the scales of `pctt.mupc`, which go with weights from N(0, 1).
    precision: formats on a card; None for its defaults, and on the reference backend, which has none.
    """

    layers: tuple[Dense, ...]
    data: DataConfig = field(default_factory=DataConfig)
    inference: Inference = field(default_factory=Inference)
    learning: Learning = field(default_factory=Adam)
    init: InitConfig = field(default_factory=InitConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    backward: tuple[Dense, ...] = ()
    scaling: str = "standard"
    precision: PrecisionPolicy | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers must name at least one layer.")
        require_one_of("scaling", self.scaling, ("standard", "mupc"))
        if self.scaling == "mupc" and (self.init.scheme, self.init.gain) != ("normal", 1.0):
            raise ValueError(
                f"scaling='mupc' and init.scheme={self.init.scheme!r} with gain {self.init.gain} contradict "
                "each other: its scales are for weights from N(0, 1); set init.scheme = 'normal' and "
                "init.gain = 1.0."
            )
        if self.precision is not None and self.training.backend == "reference":
            raise ValueError(
                "precision has no effect on the reference backend, which computes in the dtype of the "
                "weights; drop it, or set training.backend to emulated or tenstorrent."
            )

    def network(self, num_inputs: int) -> Network:
        net = chain(num_inputs, self.layers, self.backward)
        return mupc(net) if self.scaling == "mupc" else net


def read_toml(path: Path) -> RunConfig:
    """The configuration in a TOML file. Raises ValueError naming file and key, FileNotFoundError for a
    missing file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no configuration file {path}; give the path of a TOML file or the name of a preset."
        )
    try:
        values = _toml().loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid TOML: {error}.") from None
    try:
        return from_dict(RunConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_dict(value: Any) -> Any:
    """A dataclass as JSON-ready dicts, lists and scalars; None is left out."""
    if dataclasses.is_dataclass(value):
        entries = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        entries = {key: entry for key, entry in entries.items() if entry is not None}
        return {"kind": NAMES[type(value)], **entries} if type(value) in NAMES else entries
    if isinstance(value, (tuple, list)):
        return [to_dict(entry) for entry in value]
    return value


def from_dict(cls: Any, values: Any, place: str = "") -> Any:
    """The inverse of `to_dict`: a value of type `cls`. Raises ValueError naming the place of what does not
    fit.
    """
    origin = get_origin(cls)
    if origin in (Union, types.UnionType):
        return _from_union(get_args(cls), values, place)
    if dataclasses.is_dataclass(cls):
        return _from_table(cls, values, place)
    if origin is tuple:
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{place} must be a list, got {values!r}.")
        element = get_args(cls)[0]
        return tuple(from_dict(element, value, f"{place}[{index}]") for index, value in enumerate(values))
    if cls is float and isinstance(values, int) and not isinstance(values, bool):
        return float(values)
    if not isinstance(values, cls) or (isinstance(values, bool) and cls is not bool):
        raise ValueError(f"{place} must be {_ARTICLES.get(cls, cls.__name__)}, got {values!r}.")
    return values


_ARTICLES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _from_union(choices: tuple[Any, ...], values: Any, place: str) -> Any:
    if values is None and types.NoneType in choices:
        return None
    tables = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if not tables:
        scalars = [choice for choice in choices if choice is not types.NoneType]
        lists = [choice for choice in scalars if get_origin(choice) is tuple]
        if lists and isinstance(values, list):  # the flat ones come before the nested ones
            nested = bool(values) and isinstance(values[0], list)
            return from_dict(lists[-1] if nested else lists[0], values, place)
        return from_dict(scalars[0], values, place)
    if len(tables) == 1:
        return _from_table(tables[0], values, place)
    names = [NAMES[choice] for choice in tables if isinstance(choice, type)]
    if not isinstance(values, Mapping) or values.get("kind") not in names:
        raise ValueError(f"{place} must be a table with kind = one of {', '.join(names)}, got {values!r}.")
    return _from_table(KINDS[values["kind"]], {key: v for key, v in values.items() if key != "kind"}, place)


def _from_table(cls: Any, values: Any, place: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{place or 'the configuration'} must be a table, got {values!r}.")
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    prefix = f"{place}." if place else ""
    for key in values:
        if key not in names:
            raise ValueError(f"unknown key {prefix}{key}; known here: {', '.join(names)}.")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ValueError(f"{prefix}{f.name} is missing.")
    built = {key: from_dict(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{place or 'the configuration'}: {error}") from None


def parse_value(text: str) -> Any:
    """One value as written in TOML; text that is none is a string."""
    try:
        return _toml().loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _toml() -> Any:
    try:
        import tomllib  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                'reading TOML on Python 3.10 needs tomli: pip install "pctt[cli]".'
            ) from None
    return tomllib
