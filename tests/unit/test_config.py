"""Configuration: every dataclass returns from its dict, and every mistake names the place where it stands."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import HIDDEN_ACTIVATIONS, INFERENCES, LEARNINGS, NETWORKS, SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st

from pctt import (
    SGD,
    Adam,
    AdamW,
    Categorical,
    Constant,
    Dense,
    Gaussian,
    Inference,
    Network,
    Nudge,
    WarmupCosine,
)
from pctt.backends.precision import FIDELITIES, FORMATS, PrecisionPolicy
from pctt.config import (
    DataConfig,
    InitConfig,
    RunConfig,
    TrainingConfig,
    from_dict,
    parse_value,
    read_toml,
    to_dict,
)
from pctt.energies import Energy
from pctt.learning import Learning, Schedule
from pctt.presets import PRESETS

ROWS = (
    [(Network, net) for net in NETWORKS.values()]
    + [(Inference, inference) for inference in INFERENCES.values()]
    + [(Learning, rule) for rule in LEARNINGS.values()]
    + [(Schedule, schedule) for schedule in SCHEDULES.values()]
    + [(RunConfig, make()) for make in PRESETS.values()]
)

# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "value"), ROWS)
def test_every_row_of_the_tables_returns_from_its_dict_and_from_json(cls, value):
    """A field that does not return is a run that resumes with other settings."""
    plain = to_dict(value)
    assert from_dict(cls, plain) == value
    assert from_dict(cls, json.loads(json.dumps(plain, allow_nan=False))) == value


POSITIVE = st.floats(1e-6, 1e3)
FRACTION = st.floats(0, 0.99)
TEXT = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=6)
SCHEDULE = st.one_of(st.just(Constant()), st.builds(WarmupCosine, FRACTION, FRACTION))
COMMON = {
    "rate": POSITIVE,
    "weight_decay": st.one_of(st.just(0.0), POSITIVE),
    "clip_norm": st.none() | POSITIVE,
    "schedule": SCHEDULE,
}
ADAMS = {**COMMON, "betas": st.tuples(FRACTION, FRACTION), "epsilon": POSITIVE}
RULES = st.one_of(
    st.builds(SGD, momentum=FRACTION, **COMMON), st.builds(Adam, **ADAMS), st.builds(AdamW, **ADAMS)
)
ENERGIES = st.one_of(
    st.just(Categorical()),
    st.builds(Gaussian, POSITIVE),
    st.builds(Gaussian, st.lists(POSITIVE, min_size=1, max_size=3).map(tuple)),
    st.builds(Gaussian, POSITIVE, st.sampled_from(("scalar", "diagonal")), st.floats(1e-6, 1.0)),
    st.just(Gaussian(((2.0, 0.5), (0.5, 1.0)))),
)
LAYERS = st.builds(
    Dense,
    st.integers(1, 500),
    st.sampled_from(HIDDEN_ACTIVATIONS),
    st.booleans(),
    st.sampled_from(("output", "input")),
    ENERGIES,
    POSITIVE,
    name=st.none() | TEXT,
)
NUDGES = st.builds(
    Nudge,
    st.floats(1e-3, 0.9),
    st.sampled_from(("positive", "negative", "centred")),
    st.sampled_from(("clamp", "loss")),
    st.none() | st.floats(1e-3, 0.9),
)
ON_THE_REFERENCE = st.builds(
    RunConfig,
    layers=st.lists(LAYERS, min_size=1, max_size=3).map(tuple),
    data=st.builds(DataConfig, TEXT, st.none() | TEXT, FRACTION),
    inference=st.builds(
        Inference,
        st.integers(0, 100),
        POSITIVE,
        st.sampled_from(("live", "fixed")),
        st.just("momentum"),
        FRACTION,
        nudge=st.none() | NUDGES,
        tolerance=st.none() | POSITIVE,
    )
    | st.builds(
        Inference,
        st.integers(20, 100),
        POSITIVE,
        dynamics=st.just("langevin"),
        temperature=POSITIVE,
        burn_in=st.integers(0, 19),
        initial=st.sampled_from(("feedforward", "zeros", "carried")),
        variables=st.sampled_from(("states", "errors")),
    )
    | st.builds(Inference, dynamics=st.just("adam"), betas=st.tuples(FRACTION, FRACTION)),
    learning=RULES,
    init=st.builds(
        InitConfig, st.sampled_from(("xavier", "kaiming", "orthogonal", "normal")), st.none() | POSITIVE
    ),
    training=st.builds(
        TrainingConfig,
        epochs=st.integers(0, 50),
        batch_size=st.integers(1, 500),
        seed=st.integers(0, 2**40),
        algorithm=st.sampled_from(("pc", "backprop")),
        device=st.none() | TEXT,
        checkpoint_every=st.none() | st.integers(1, 100),
        tensorboard=st.booleans(),
    ),
)
FORMAT = st.sampled_from(FORMATS)
POLICIES = st.builds(
    PrecisionPolicy, FORMAT, FORMAT, FORMAT, FORMAT, FORMAT, st.none() | st.sampled_from(FIDELITIES)
)


def moved(run: RunConfig, place: tuple[str, str | None], precision: PrecisionPolicy | None) -> RunConfig:
    backend, device = place
    return replace(run, training=replace(run.training, backend=backend, device=device), precision=precision)


PLACES = (("emulated", None), ("emulated", "p150"), ("tenstorrent", None), ("tenstorrent", "1"))
RUNS = ON_THE_REFERENCE | st.builds(moved, ON_THE_REFERENCE, st.sampled_from(PLACES), st.none() | POLICIES)


@settings(max_examples=150)
@given(RUNS)
def test_any_run_configuration_returns_from_its_dict_and_from_json(config):
    plain = to_dict(config)
    assert from_dict(RunConfig, plain) == config
    assert from_dict(RunConfig, json.loads(json.dumps(plain, allow_nan=False))) == config


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def paths_of(value, prefix=()):
    """Every place in a tree of dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *[path for key, inner in items for path in paths_of(inner, (*prefix, key))]]


@settings(max_examples=300)
@given(RUNS, JUNK, st.data())
def test_junk_anywhere_in_a_configuration_is_refused_as_value_error_or_read(config, junk, data):
    """Whatever stands in the file, no other exception: the command line shows ValueErrors as one sentence."""
    plain = json.loads(json.dumps(to_dict(config)))
    path = data.draw(st.sampled_from([path for path in paths_of(plain) if path]))
    target = plain
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = junk
    try:
        read = from_dict(RunConfig, plain)
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(read, RunConfig)


# --- mistakes -----------------------------------------------------------------------------------------------

LAYER = {"units": 3}
CARD = {"layers": [LAYER], "training": {"backend": "emulated"}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "^layers is missing"),
        ({"layers": [LAYER], "epochs": 3}, "^unknown key epochs; known here: layers, data, inference"),
        (
            {"layers": [LAYER], "inference": {"num_step": 3}},
            "^unknown key inference.num_step; known here: num_steps",
        ),
        ({"layers": [LAYER, {"unit": 3}]}, r"^unknown key layers\[1\].unit; known here: units"),
        ({"layers": [LAYER, {"activation": "tanh"}]}, r"^layers\[1\].units is missing"),
        ({"layers": [{"units": "3"}]}, r"^layers\[0\].units must be a whole number, got '3'"),
        ({"layers": [{"units": 3.0}]}, r"^layers\[0\].units must be a whole number, got 3.0"),
        ({"layers": [{"units": True}]}, r"^layers\[0\].units must be a whole number, got True"),
        ({"layers": [{"units": 3, "bias": 1}]}, r"^layers\[0\].bias must be true or false, got 1"),
        ({"layers": [{"units": 3, "activation": 1}]}, r"^layers\[0\].activation must be a string, got 1"),
        ({"layers": [{"units": 0}]}, r"^layers\[0\]: units must be a whole number of at least 1, got 0"),
        ({"layers": [{"units": 3, "activation": "cube"}]}, r"^layers\[0\]: activation must be one of"),
        ({"layers": LAYER}, "^layers must be a list, got"),
        ({"layers": [3]}, r"^layers\[0\] must be a table, got 3"),
        ([LAYER], "^the configuration must be a table, got"),
        ({"layers": [LAYER], "inference": 3}, "^inference must be a table, got 3"),
        ({"layers": [LAYER], "inference": {"rate": "fast"}}, "^inference.rate must be a number, got 'fast'"),
        ({"layers": [LAYER], "inference": {"rate": True}}, "^inference.rate must be a number, got True"),
        ({"layers": [LAYER], "inference": {"rate": -1}}, "^inference: rate must be a finite number above 0"),
        (
            {"layers": [LAYER], "inference": {"rate": math.nan}},
            "^inference: rate must be a finite number above 0",
        ),
        (
            {"layers": [LAYER], "inference": {"tolerance": "low"}},
            "^inference.tolerance must be a number, got 'low'",
        ),
        ({"layers": [LAYER], "inference": {"tolerance": [1e-3]}}, "^inference.tolerance must be a number"),
        ({"layers": [LAYER], "init": {"gain": [1.0]}}, "^init.gain must be a number"),
        ({"layers": [LAYER], "data": {"data_dir": ["/"]}}, "^data.data_dir must be a string"),
        (
            {"layers": [LAYER], "learning": {"rate": 0.1}},
            "^learning must be a table with kind = one of sgd, adam, adamw",
        ),
        (
            {"layers": [LAYER], "learning": "sgd"},
            "^learning must be a table with kind = one of sgd, adam, adamw",
        ),
        (
            {"layers": [LAYER], "learning": {"kind": "gaussian"}},
            "^learning must be a table with kind = one of sgd",
        ),
        (
            {"layers": [LAYER], "learning": {"kind": "sgd", "beta": 1}},
            "^unknown key learning.beta; known here: rate",
        ),
        (
            {"layers": [LAYER], "learning": {"kind": "adam", "betas": [0.9]}},
            "^learning: betas must be two numbers",
        ),
        (
            {"layers": [LAYER], "learning": {"kind": "adam", "betas": 0.9}},
            "^learning.betas must be a list, got 0.9",
        ),
        (
            {"layers": [LAYER], "learning": {"kind": "adam", "betas": [0.9, "x"]}},
            r"^learning.betas\[1\] must be a number, got 'x'",
        ),
        (
            {"layers": [LAYER], "learning": {"kind": "sgd", "schedule": {"kind": "cosine"}}},
            "^learning.schedule must be a table with kind = one of constant, warmup_cosine",
        ),
        (
            {"layers": [{"units": 3, "energy": {"kind": "gaussian", "precision": [1, "x", 1]}}]},
            r"^layers\[0\].energy.precision\[1\] must be a number, got 'x'",
        ),
        (
            {"layers": [{"units": 3, "energy": {"kind": "gaussian", "precision": 0}}]},
            r"^layers\[0\].energy: precision must be a finite number above 0",
        ),
        (
            {"layers": [LAYER], "training": {"epochs": -1}},
            "^training: epochs must be a whole number of at least 0",
        ),
        ({"layers": [LAYER], "training": {"batch_size": 0}}, "^training: batch_size must be .* at least 1"),
        ({"layers": [LAYER], "training": {"seed": -1}}, "^training: seed must be .* at least 0"),
        (
            {"layers": [LAYER], "training": {"algorithm": "magic"}},
            "^training: algorithm must be one of pc, backprop",
        ),
        (
            {"layers": [LAYER], "training": {"checkpoint_every": 0}},
            "^training: checkpoint_every must be .* at least 1",
        ),
        (
            {"layers": [LAYER], "data": {"validation": 1.0}},
            r"^data: validation must be in \[0.0, 1.0\), got 1.0",
        ),
        ({"layers": [LAYER], "init": {"scheme": "zeros"}}, "^init: scheme must be one of xavier"),
        (
            {"layers": [LAYER], "training": {"backend": "emulated", "device": "n151"}},
            "^training: device of the emulated backend must be one of n150, .*, got 'n151'",
        ),
        (
            {"layers": [LAYER], "training": {"backend": "tenstorrent", "device": "n150"}},
            "^training: device of the tenstorrent backend must be a number such as 0, or mesh:2 for two",
        ),
        ({"layers": [LAYER], "precision": {}}, "precision has no effect on the reference backend"),
        ({**CARD, "precision": 3}, "^precision must be a table, got 3"),
        ({**CARD, "precision": {"state": "float32"}}, "^unknown key precision.state; known here: states"),
        ({**CARD, "precision": {"states": "float16"}}, "^precision: states must be one of float32, bfloat16"),
        ({**CARD, "precision": {"fidelity": "HiFi5"}}, "^precision: fidelity must be one of LoFi"),
    ],
)
def test_a_mistake_is_refused_in_a_sentence_that_begins_with_its_place(values, words):
    with pytest.raises(ValueError, match=words):
        from_dict(RunConfig, values)


def test_whole_numbers_are_read_where_numbers_are_meant_and_lists_where_tuples_are():
    """TOML writes rate = 1 and betas = [0, 0.5]; the dataclass compares equal to one written in Python."""
    assert from_dict(Inference, {"rate": 1}) == Inference(rate=1.0)
    assert isinstance(from_dict(Inference, {"rate": 1}).rate, float)
    assert from_dict(Learning, {"kind": "adam", "betas": [0, 0.5]}) == Adam(betas=(0.0, 0.5))
    assert from_dict(Energy, {"kind": "gaussian", "precision": [1, 2]}) == Gaussian((1.0, 2.0))
    assert hash(from_dict(Energy, {"kind": "gaussian", "precision": [1, 2]})) == hash(Gaussian((1.0, 2.0)))


def test_none_is_left_out_and_comes_back():
    assert "tolerance" not in to_dict(Inference())
    assert from_dict(Inference, to_dict(Inference())).tolerance is None
    assert from_dict(Inference, {"tolerance": None}).tolerance is None


# --- files --------------------------------------------------------------------------------------------------

TOML = """
layers = [
    {units = 20, activation = "tanh"},
    {units = 3, activation = "softmax", energy = {kind = "categorical"}},
]

[inference]
num_steps = 7
rate = 1

[learning]
kind = "adamw"
rate = 2e-3
schedule = {kind = "warmup_cosine", warmup = 0.2}

[training]
epochs = 3
"""


def test_a_toml_file_becomes_a_run_configuration(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(TOML, encoding="utf-8")
    assert read_toml(path) == RunConfig(
        layers=(Dense(20, "tanh"), Dense(3, "softmax", energy=Categorical())),
        inference=Inference(7, 1.0),
        learning=AdamW(2e-3, schedule=WarmupCosine(0.2)),
        training=TrainingConfig(epochs=3),
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"layers = [", "run.toml is not valid TOML"),
        (b"\xff\xfe", "run.toml is not valid TOML"),
        (
            TOML.replace("epochs", "epoch").encode(),
            "run.toml: unknown key training.epoch; known here: epochs",
        ),
        (b"", "run.toml: layers is missing"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content, words):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_toml(path)


@pytest.mark.parametrize("place", ["absent.toml", "."])
def test_a_missing_file_is_named_with_what_else_can_be_given(tmp_path: Path, place):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*TOML file or the name of a preset"):
        read_toml(tmp_path / place)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ('"a b"', "a b"),
        ("[1, 2]", [1, 2]),
        ("mnist", "mnist"),
        ("", ""),
    ],
)
def test_a_value_on_the_command_line_is_read_as_toml_and_else_as_text(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_network(name):
    config = PRESETS[name]()
    net = config.network((1, 28, 28) if config.data.name == "mnist" else (1, 8, 8))
    widths = dict(zip(net.nodes, net.widths, strict=True))
    assert widths[config.node_of("images", net) or ""] == (784 if config.data.name == "mnist" else 64)
    assert widths[config.node_of("labels", net) or ""] == 10
