"""Configuration: frozen dataclasses on one side, plain dicts (TOML, JSON) on the other.

Every dataclass of the public face can be written as a dict and read back. A choice between kinds (SGD or
Adam, Gaussian or categorical) carries a key `kind`. Unknown keys, wrong types and missing keys are errors
that name the place, e.g. `inference.num_step`.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pctt._checks import require_between, require_count, require_finite_positive, require_one_of
from pctt.backends import BACKENDS
from pctt.backends.devices import place_of
from pctt.backends.mesh import parse_device
from pctt.backends.precision import PrecisionPolicy
from pctt.describe import Concise
from pctt.energies import Categorical, Gaussian
from pctt.inference import Inference
from pctt.initialisers import SCHEMES
from pctt.layers import maps
from pctt.layers.block import Block, Layer, Step
from pctt.layers.dense import Dense
from pctt.layers.detach import Detach
from pctt.layers.maps import Function, Map
from pctt.learning import Adam, Constant, Learning, WarmupCosine
from pctt.network import INPUT, Network
from pctt.placement.chips import CHIPS
from pctt.scaling import mupc
from pctt.wiring import chain, graph

MAPS: dict[str, type[Map]] = {**maps.MAPS, Detach.kind: Detach}

KINDS: dict[str, type] = {
    "gaussian": Gaussian,
    "categorical": Categorical,
    **{rule.__name__.lower(): rule for rule in get_args(Learning)},
    "constant": Constant,
    "warmup_cosine": WarmupCosine,
    "block": Block,
    **MAPS,
}
NAMES = {kind: name for name, kind in KINDS.items()}

ALGORITHMS = ("pc", "backprop")
ON_DIVERGENCE = ("stop", "halve_rate", "skip_batch")
"""What a batch that diverges, or is not finite, does to a run."""


@dataclass(frozen=True)
class InitConfig(Concise):
    """Initial weights.    scheme, gain: as of `pctt.init`."""

    scheme: str = "xavier"
    gain: float | None = None

    def __post_init__(self) -> None:
        require_one_of("scheme", self.scheme, SCHEMES)
        if self.gain is not None:
            require_finite_positive("gain", self.gain)


@dataclass(frozen=True)
class DataConfig(Concise):
    """What to train on.

    name: of the data set.    data_dir: folder of its files, else PCTT_DATA.
    validation: fraction of the training data held out, in [0, 1).
    """

    name: str = "digits"
    data_dir: str | None = None
    validation: float = 0.1

    def __post_init__(self) -> None:
        require_between("validation", self.validation, 0.0, 1.0)


@dataclass(frozen=True)
class TrainingConfig(Concise):
    """How long, how and where to train.

    epochs: of the whole run.    batch_size: samples per learning step.
    seed: of weights, validation split and batch order.
    algorithm: pc, or the backprop twin.
    backend: reference, emulated or tenstorrent.
    device: reference: a torch device; emulated: a chip such as n150, or two: n300:2; tenstorrent: the number
        of a card; emulated, tenstorrent: mesh:2 for two chips that share out each batch.
    checkpoint_every: also write a checkpoint after this many batches, not only after each epoch.
    tensorboard: mirror the metrics to tensorboard event files in the run folder.
    fused: tenstorrent: every training step is one program.    cores_per_layer: its cores for each layer.
    on_divergence: of a batch: stop the run, halve_rate of inference and repeat the batch, or skip_batch.
    """

    epochs: int = 10
    batch_size: int = 64
    seed: int = 0
    algorithm: str = "pc"
    backend: str = "reference"
    device: str | None = None
    checkpoint_every: int | None = None
    tensorboard: bool = False
    fused: bool = False
    cores_per_layer: int | None = None
    on_divergence: str = "stop"

    def __post_init__(self) -> None:
        require_one_of("on_divergence", self.on_divergence, ON_DIVERGENCE)
        require_count("epochs", self.epochs)
        require_count("batch_size", self.batch_size, least=1)
        require_count("seed", self.seed)
        require_one_of("algorithm", self.algorithm, ALGORITHMS)
        require_one_of("backend", self.backend, BACKENDS)
        if self.device is not None:
            _check_device(self.backend, self.device)
        if self.checkpoint_every is not None:
            require_count("checkpoint_every", self.checkpoint_every, least=1)
        if self.fused and self.backend == "reference":
            raise ValueError("fused is a way of running on a card; set backend to tenstorrent or emulated.")
        if self.fused and parse_device(self.device)[1] > 1:
            raise ValueError("fused runs on one chip, and device is several; drop one of the two.")
        if self.cores_per_layer is not None:
            require_count("cores_per_layer", self.cores_per_layer, least=1)
            if not self.fused:
                raise ValueError("cores_per_layer is of the fused kernel; set fused as well.")


def _check_device(backend: str, device: str) -> None:
    if backend == "emulated":
        name = device.partition(":")[0]  # judged before the number, as cuda:0 has none of chips
        if name != "mesh" or name == device:
            require_one_of("device of the emulated backend", name, tuple(CHIPS))
        parse_device(device)
    if backend == "tenstorrent":
        place_of(device)


@dataclass(frozen=True)
class Wired(Concise):
    """A layer of a graph: its table has these keys beside the layer's own.

    of: names of the nodes that it predicts from.    shared: name of the layer whose weights it uses.
    """

    layer: Layer
    of: tuple[str, ...]
    shared: str | None = None

    def __post_init__(self) -> None:
        if not self.of:
            raise ValueError("of must name at least one node.")


ROLES = ("images", "labels", "zeros")
"""What of a data set a node can be clamped to; labels are one-hot."""


@dataclass(frozen=True)
class RunConfig(Concise):
    """Everything that decides a run.

    data, inference, learning, init, training: sections of their own.
    layers: of the chain; its input is as wide as the data, and where there are blocks, of its shape. A table
        without `kind` is a dense layer; kind = "block" has `steps`, the kind of a map makes a block of it.
        With `of` in a table it is a graph, and layers without `of` read the one before.
    backward: layers of a chain down, from the output to the input.
    scaling: "standard", or "mupc" for the scales of `pctt.mupc`, which go with weights from N(0, 1).
    precision: formats on a card; None for its defaults, and on the reference backend, which has none.
    inputs: of a graph, units or shapes of the nodes that nothing predicts and nothing of `clamp` is put at.
    clamp: {node: images, labels or zeros}, what training holds; None for images at the first node and
        labels at the last layer.
    """

    layers: tuple[Layer | Wired, ...]
    data: DataConfig = field(default_factory=DataConfig)
    inference: Inference = field(default_factory=Inference)
    learning: Learning = field(default_factory=Adam)
    init: InitConfig = field(default_factory=InitConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    backward: tuple[Dense, ...] = ()
    scaling: str = "standard"
    precision: PrecisionPolicy | None = None
    inputs: dict[str, int | tuple[int, ...]] | None = None
    clamp: dict[str, str] | None = None

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
        if self.inputs is not None and not self.is_graph:
            raise ValueError("inputs are those of a graph; give layers `of`, or drop inputs.")
        if self.is_graph and self.backward:
            raise ValueError("backward layers go with a chain; drop them, or `of` of the layers.")
        for name, role in (self.clamp or {}).items():
            require_one_of(f"clamp.{name}", role, ROLES)
        roles = list((self.clamp or {"": "images"}).values())
        if roles.count("images") != 1 or roles.count("labels") > 1:
            raise ValueError("clamp must put images at one node, and labels at one at most.")

    @property
    def is_graph(self) -> bool:
        """Whether a layer says what it reads, or there are nodes beside input and output."""
        return any(isinstance(layer, Wired) for layer in self.layers)

    def node_of(self, role: str, net: Network) -> str | None:
        """The node that images or labels are put at; None without one."""
        if self.clamp is None:
            return {"images": net.input_name, "labels": net.output}.get(role)
        return next((name for name, found in self.clamp.items() if found == role), None)

    def network(self, shape: int | tuple[int, ...], num_classes: int = 10) -> Network:
        """shape: of a sample, or its number of units where all layers are dense."""
        bare = [layer.layer if isinstance(layer, Wired) else layer for layer in self.layers]
        dense = all(isinstance(layer, Dense) for layer in bare)
        units = shape if isinstance(shape, int) else math.prod(shape)
        sizes = {"images": units if dense else shape, "labels": num_classes, "zeros": 1}
        clamp = self.clamp or {}
        if not self.is_graph:
            net = chain(sizes[clamp.get(INPUT, "images")], bare, self.backward)
        else:
            net = self._graph(sizes, bare)
        for name in clamp:
            net.node_index(name)
        return mupc(net) if self.scaling == "mupc" else net

    def _graph(self, sizes: dict[str, int | tuple[int, ...]], bare: list[Layer]) -> Network:
        names = [layer.name or f"layer{number}" for number, layer in enumerate(bare, start=1)]
        clamp = dict(self.clamp) if self.clamp is not None else {INPUT: "images", names[-1]: "labels"}
        roots: dict[str, Any] = {
            name: sizes[role] for name, role in clamp.items() if name not in names and name not in self._given
        }
        roots |= self._given
        entries: dict[str, tuple[Any, ...]] = {}
        shared: dict[str, str] = {}
        before = next(iter(roots), names[0])
        for name, layer, entry in zip(names, bare, self.layers, strict=True):
            if name in entries:
                raise ValueError(f"two layers are called {name!r}; rename one.")
            entries[name] = (layer, *(entry.of if isinstance(entry, Wired) else (before,)))
            if isinstance(entry, Wired) and entry.shared is not None:
                shared[name] = entry.shared
            before = name
        images, labels = (
            next((name for name, found in clamp.items() if found == role), None)
            for role in ("images", "labels")
        )
        ends = (images, labels) if labels in names else (labels or next(iter(roots), images), images)
        output = ends[1] if ends[1] in names else names[-1]
        return graph(roots, entries, ends[0], output, shared)

    @property
    def _given(self) -> dict[str, int | tuple[int, ...]]:
        return self.inputs or {}


def wired(net: Network) -> tuple[Wired, ...]:
    """The layers of a graph as a configuration has them."""
    wiring = net.wiring
    if wiring is None:
        raise ValueError("a chain is described by its layers.")
    return tuple(
        Wired(replace(layer, name=name) if isinstance(layer, Dense) else layer, of, shared or None)
        for name, layer, of, shared in zip(net.names, net.layers, wiring.sources, wiring.shared, strict=True)
    )


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
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid TOML: {error}.") from None
    try:
        return from_dict(RunConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_dict(value: Any) -> Any:
    """A dataclass as JSON-ready dicts, lists and scalars; None is left out."""
    if isinstance(value, Wired):
        own = {"of": list(value.of), "shared": value.shared}
        return {**to_dict(value.layer), **{key: entry for key, entry in own.items() if entry is not None}}
    if isinstance(value, Mapping):
        return {key: to_dict(entry) for key, entry in value.items()}
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
    if cls is Map or (cls is Step and not (isinstance(values, Mapping) and "map" in values)):
        return _from_map(cls, values, place)
    if origin in (Union, types.UnionType):
        return _from_union(get_args(cls), values, place)
    if dataclasses.is_dataclass(cls):
        return _from_table(cls, values, place)
    if origin is tuple:
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{place} must be a list, got {values!r}.")
        element = get_args(cls)[0]
        return tuple(from_dict(element, value, f"{place}[{index}]") for index, value in enumerate(values))
    if origin is dict:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ValueError(f"{place} must be a table, got {values!r}.")
        element = get_args(cls)[1]
        return {key: from_dict(element, value, f"{place}.{key}") for key, value in values.items()}
    if cls is float and isinstance(values, int) and not isinstance(values, bool):
        try:
            return float(values)
        except OverflowError:
            raise ValueError(f"{place} is too large for a number.") from None
    if not isinstance(values, cls) or (isinstance(values, bool) and cls is not bool):
        raise ValueError(f"{place} must be {_ARTICLES.get(cls, cls.__name__)}, got {values!r}.")
    return values


_ARTICLES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _from_map(cls: Any, values: Any, place: str) -> Any:
    """A map from its table or, for an activation, its name; or the step that it makes."""
    if isinstance(values, str):
        found: Map = Function(values)
    elif isinstance(values, Mapping) and isinstance(values.get("kind"), str) and values["kind"] in MAPS:
        found = _from_table(MAPS[values["kind"]], _without_kind(values), place)
    else:
        raise ValueError(
            f"{place} must be an activation or a table with kind = one of {', '.join(MAPS)}, got {values!r}."
        )
    return Step(found) if cls is Step else found


def _without_kind(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "kind"}


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
        plain = [scalar for scalar in scalars if get_origin(scalar) is None] or scalars
        fitting = [scalar for scalar in plain if isinstance(scalar, type) and isinstance(values, scalar)]
        return from_dict((fitting or plain)[0], values, place)
    if len(tables) == 1:
        return _from_table(tables[0], values, place)
    if Dense in tables:
        return _from_layer(tables, values, place)
    names = [NAMES[choice] for choice in tables if isinstance(choice, type)]
    if not isinstance(values, Mapping) or values.get("kind") not in names:
        raise ValueError(f"{place} must be a table with kind = one of {', '.join(names)}, got {values!r}.")
    return _from_table(KINDS[values["kind"]], _without_kind(values), place)


def _from_layer(tables: list[Any], values: Any, place: str) -> Any:
    """A dense layer, a block, or the block that one map makes; in a graph with what it reads."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} must be a table, got {values!r}.")
    if Wired in tables and ("of" in values or "shared" in values):
        bare = {key: value for key, value in values.items() if key not in ("of", "shared")}
        layer = _from_layer([choice for choice in tables if choice is not Wired], bare, place)
        if "of" not in values:
            raise ValueError(f"{place}.of is missing; a layer with shared weights says what it reads.")
        of = from_dict(tuple[str, ...], values["of"], f"{place}.of")
        shared = from_dict(str | None, values.get("shared"), f"{place}.shared")
        try:
            return Wired(layer, of, shared)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    kind = values.get("kind", "dense")
    if kind == "dense":
        return _from_table(Dense, _without_kind(values), place)
    if isinstance(kind, str) and kind in MAPS:
        name = values.get("name") if kind != Function.kind else None
        bare = {key: value for key, value in values.items() if key != "name" or name is None}
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{place}.name must be a string, got {name!r}.")
        return Block(_from_map(Step, bare, place), name=name)
    if kind != "block":
        raise ValueError(f"{place}.kind must be dense, block or one of {', '.join(MAPS)}, got {kind!r}.")
    return _from_table(Block, _without_kind(values), place)


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
