"""Checkpoints and configurations are data: damaged or hostile ones are refused in a sentence, or harmless."""

import json
import math
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import clouds, files, same, train, trainer

import pctt
from pctt import checkpoint, cli, run
from pctt.checkpoint import CheckpointError
from pctt.config import RunConfig, to_dict


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small run, and a configuration."""
    folder = tmp_path_factory.mktemp("saved")
    t = trainer()
    t.fit(clouds(), 1)
    t.save(folder)
    config = RunConfig(layers=(pctt.Dense(8, "tanh"), pctt.Dense(10)))
    (folder / cli.CONFIG).write_text(json.dumps(to_dict(config), indent=2))
    return folder


CHANGES = st.tuples(
    st.sampled_from(("replace", "insert", "remove", "cut", "repeat", "zero")),
    st.integers(0, 10**6),
    st.binary(min_size=1, max_size=12),
)


def changed(data: bytes, how: str, place: int, new: bytes) -> bytes:
    at, size = place % len(data), len(new)
    match how:
        case "replace":
            return data[:at] + new + data[at + size :]
        case "insert":
            return data[:at] + new + data[at:]
        case "remove":
            return data[:at] + data[at + size :]
        case "cut":
            return data[:at]
        case "repeat":
            return data[:at] + data[at : at + 8 * size] * 2 + data[at + 8 * size :]
        case _:
            return data[:at] + bytes(8 * size) + data[at + 8 * size :]


@settings(max_examples=500)
@given(change=CHANGES)
def test_changed_bytes_are_refused_or_change_nothing(saved: Path, change: tuple[str, int, bytes]) -> None:
    """Of a whole run's checkpoint, anywhere: header, numbers, end."""
    before, progress = checkpoint.read(saved / run.CHECKPOINT)
    folder = saved / "changed"
    folder.mkdir(exist_ok=True)
    (folder / run.CHECKPOINT).write_bytes(changed((saved / run.CHECKPOINT).read_bytes(), *change))
    try:
        t = pctt.load(folder)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert same({"weights": t.weights, "learning": t.engine.learning_state()}, checkpoint.unflatten(before))
    assert vars(t.progress) == progress["progress"]


HOSTILE = (
    None, True, -1, 0, 2.5, 1e308, 10**400, 2**63, 2**31, "", "../../etc/passwd", "\x00", "backprop", "tanh",
    [], [[]], {}, {"kind": "sgd"}, [1, [2]], ["input"] * 3, {"a": {"b": None}},
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def put(tree: Any, data: st.DataObject) -> None:
    """A hostile value at any place."""
    path = data.draw(st.sampled_from([path for path in places(tree) if path]))
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = data.draw(st.sampled_from(HOSTILE))


@settings(max_examples=500)
@given(data=st.data())
def test_hostile_descriptions_are_refused_or_make_a_trainer(saved: Path, data: st.DataObject) -> None:
    """Whole files, with their digest, whose metadata hold any value at any place."""
    tensors, description = checkpoint.read(saved / run.CHECKPOINT)
    put(description, data)
    folder = saved / "hostile"
    folder.mkdir(exist_ok=True)
    checkpoint.write(folder / run.CHECKPOINT, tensors, description)
    try:
        t = pctt.load(folder)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert same(t.weights, checkpoint.unflatten(tensors)["weights"])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("weights/dense1/weight", lambda t: t.long(), "int64"),
        ("weights/dense1/weight", lambda t: t > 0, "bool"),
        ("weights/dense1/weight", lambda t: t.double(), "float64"),
        ("weights/dense1/weight", lambda t: t[:, :-1], "7"),
        ("weights/dense1/weight", lambda t: t * math.nan, "'dense1' are NaN or infinite"),
        ("weights/dense3/bias", lambda t: t.sign() / 0.0, "'dense3' are NaN or infinite"),
        ("weights/../../../tmp/evil", lambda t: t, r"\.\."),
        ("weights/dense1", lambda t: t, "lies below|both a tensor and a branch"),
        ("learning/dense1/evil", lambda t: t, "learning state of layer 'dense1'"),
    ],
)
def test_tensors_that_are_not_those_of_the_run_are_refused(saved, tmp_path, name, make, words):
    tensors, description = checkpoint.read(saved / run.CHECKPOINT)
    tensors[name] = make(tensors.get(name, torch.ones(3)))
    checkpoint.write(tmp_path / run.CHECKPOINT, tensors, description)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        pctt.load(tmp_path)
    assert files(tmp_path) == before


def with_header(path: Path, inner: str, entries: str = "") -> None:
    """A safetensors file of one float, with this text under the key `pctt`."""
    header = f'{{"__metadata__": {{"pctt": {json.dumps(inner)}}}{entries}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 if entries else 0))


ENTRY = ', "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("metadata", "entries"), [("{}", ENTRY * 2), ('{"x": 1, "x": 2}', ENTRY), ('{"x": 1}', ENTRY)]
)
def test_a_key_that_stands_twice_is_refused(tmp_path, metadata, entries):
    """Readers differ in which of the two they take, so one could check one and load the other."""
    with_header(tmp_path / "file", f'{{"format": 1, "names": ["a"], "metadata": {metadata}}}', entries)
    if metadata == '{"x": 1}':  # or the refusals had another cause
        assert checkpoint.read(tmp_path / "file")[1] == {"x": 1}
        return
    with pytest.raises(CheckpointError, match="stands there twice"):
        checkpoint.read(tmp_path / "file")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    with_header(tmp_path / "file", f'{{"format": 1, "names": [], "metadata": {{"x": {number}}}}}')
    with pytest.raises(CheckpointError, match="has a broken header"):
        checkpoint.read(tmp_path / "file")


@pytest.mark.parametrize("claimed", [2**26 + 1, 10**8, 2**40, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_unread(tmp_path, claimed):
    """In a file with room for it: 10 GiB that take no disk, and would take as much memory."""
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", claimed))
        file.truncate(10 * 2**30)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"a header of {claimed} bytes"):
            checkpoint.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_header_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="store large arrays as tensors"):
        checkpoint.write(tmp_path / "file", {}, {"text": "x" * 2**26})
    assert not files(tmp_path)


def test_a_file_of_an_earlier_pctt_without_a_digest_is_read(saved, tmp_path):
    data = (saved / run.CHECKPOINT).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    begin, end = data.index(rb"\"digest\""), data.index(rb"\"names\"")
    header = data[8:begin] + data[end : 8 + size]
    header += b" " * (-len(header) % 8)
    (tmp_path / run.CHECKPOINT).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    assert same(pctt.load(tmp_path).weights, pctt.load(saved).weights)


def test_a_configuration_cut_at_any_length_is_one_sentence(saved, tmp_path):
    whole = (saved / cli.CONFIG).read_bytes().rstrip()
    for size in range(len(whole)):
        (tmp_path / cli.CONFIG).write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged") as caught:
            cli._saved_configuration(tmp_path)
        assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=400)
@given(change=CHANGES, data=st.data())
def test_changed_configurations_are_refused_or_read(
    saved: Path, change: tuple[str, int, bytes], data: st.DataObject
) -> None:
    folder = saved / "configuration"
    folder.mkdir(exist_ok=True)
    whole = (saved / cli.CONFIG).read_bytes()
    tree = json.loads(whole)
    put(tree, data)
    for content in (changed(whole, *change), json.dumps(tree).encode()):
        (folder / cli.CONFIG).write_bytes(content)
        try:
            cli._saved_configuration(folder)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        "layers = " + "[" * 100_000,
        "layers = [{units = 3}]\nlayers = [{units = 3}]",
        "layers = [{units = inf}]",
        "layers = [{units = 10}]\n[inference]\nrate = nan",
        "layers = [{units = 10}]\n[inference]\nrate = " + "9" * 400,
        "layers = [{units = 10}]\n[data]\nvalidation = -inf",
        "layers = [{units = 10, name = '../../x'}]",
    ],
)
def test_hostile_toml_is_refused_in_one_sentence(tmp_path, content, capsys):
    path = tmp_path / "run.toml"
    path.write_text(content)
    assert train(path, "--out", tmp_path / "run") in (cli.FAILED, cli.USAGE)
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and len(errors) < 1000, errors[:300]
    assert files(tmp_path) == {"run.toml"}
