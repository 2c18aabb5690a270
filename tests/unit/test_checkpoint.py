"""Checkpoints: what is read is what was written, and no accident leaves anything else behind.

The oracle of every round trip is the written object itself, compared byte for byte.
"""

import errno
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pctt import checkpoint
from pctt.checkpoint import CheckpointError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
KEYS = st.text(min_size=1, max_size=5).filter(lambda key: "/" not in key and "\ud800" > max(key))
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
METADATA = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        VALUES | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bit pattern, NaN payloads and negative zeros included."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    if dtype == torch.bool:
        return torch.tensor(
            draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape)))
        ).reshape(shape)
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    return torch.tensor(list(data), dtype=torch.uint8).view(dtype).reshape(shape)


TREES = st.recursive(
    tensors(),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=5,
).filter(lambda tree: isinstance(tree, dict) and "__metadata__" not in tree)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).tolist()


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


def write_first(path: Path) -> bytes:
    checkpoint.write(path, {"a": torch.tensor([1.5])}, {"version": 1})
    return path.read_bytes()


# -- round trips -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(tree=TREES, metadata=METADATA)
def test_trees_and_metadata_return_bit_for_bit_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, tree: Any, metadata: dict[str, Any]
) -> None:
    """A resumed run that starts one bit away is a different run, and nothing would say so."""
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    flat = checkpoint.flatten(tree)
    checkpoint.write(path, flat, metadata)
    read_tensors, read_metadata = checkpoint.read(path)
    assert list(read_tensors) == list(flat)
    assert [bits(tensor) for tensor in read_tensors.values()] == [bits(tensor) for tensor in flat.values()]
    assert repr(read_metadata) == repr(metadata)  # repr tells 1 from 1.0 and 0.0 from -0.0
    assert json.dumps(_shape_of(checkpoint.unflatten(read_tensors))) == json.dumps(_shape_of(tree))


def _shape_of(tree: Any) -> Any:
    return {key: _shape_of(value) for key, value in tree.items()} if isinstance(tree, dict) else bits(tree)[1]


def test_the_random_generator_continues_from_its_saved_state(path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    torch.rand(5, generator=generator)
    checkpoint.write(path, {"generator": generator.get_state()}, {})
    expected = torch.rand(5, generator=generator)
    resumed = torch.Generator()
    resumed.set_state(checkpoint.read(path)[0]["generator"])
    assert torch.equal(torch.rand(5, generator=resumed), expected)


def test_views_tied_and_transposed_tensors_are_stored_by_value(path: Path) -> None:
    stack = torch.arange(24.0).reshape(2, 3, 4)
    given_tensors = {"0": stack[0], "1": stack[1], "transposed": stack[0].T, "tied": stack[0], "all": stack}
    checkpoint.write(path, given_tensors, {})
    returned, _ = checkpoint.read(path)
    assert {name: bits(tensor) for name, tensor in returned.items()} == {
        name: bits(tensor) for name, tensor in given_tensors.items()
    }


def test_tensors_read_do_not_depend_on_the_file(path: Path) -> None:
    checkpoint.write(path, {"a": torch.ones(1000)}, {})
    tensor = checkpoint.read(path)[0]["a"]
    path.write_bytes(bytes(path.stat().st_size))  # in place: the same inode
    assert torch.equal(tensor, torch.ones(1000))


# -- refusals of the caller's mistakes -------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, (1, 2), {1: 2}, {1, 2}, torch.ones(1)])
def test_metadata_that_would_not_return_is_refused_and_nothing_is_touched(path: Path, value: Any) -> None:
    before = write_first(path)
    with pytest.raises(ValueError, match="metadata must"):
        checkpoint.write(path, {}, {"nested": [{"value": value}]})
    assert path.read_bytes() == before
    assert files(path.parent) == [path.name]


@pytest.mark.parametrize("tree", [{"a/b": torch.ones(1)}, {"": torch.ones(1)}, {"a": {"": torch.ones(1)}}])
def test_keys_that_would_not_return_are_refused(tree: Any) -> None:
    with pytest.raises(ValueError, match="keys must be"):
        checkpoint.flatten(tree)


@pytest.mark.parametrize("tree", [{"a": {}}, {"a": 1.0}, {"a": None}])
def test_branches_without_tensors_and_other_leaves_are_refused(tree: Any) -> None:
    with pytest.raises(ValueError, match="'a' must be a tensor"):
        checkpoint.flatten(tree)


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["a//b"], ["/a"], ["a/"], [""]])
def test_names_of_no_tree_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError):
        checkpoint.unflatten({name: torch.ones(1) for name in names})


@pytest.mark.parametrize("name", ["__metadata__", "", "a//b"])
def test_names_that_the_file_cannot_hold_are_refused(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        checkpoint.write(path, {name: torch.ones(1)}, {})
    assert files(path.parent) == []


# -- accidents while writing -----------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
import torch
from pctt import checkpoint
path = Path(sys.argv[1])
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:  # each line asks for one child that writes until it is killed
    child = os.fork()
    if child == 0:
        version = int(line)
        while True:
            version += 1
            checkpoint.write(path, {"a": torch.full((200_000,), float(version))}, {"version": version})
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_killing_the_writer_at_any_moment_leaves_a_whole_version(path: Path) -> None:
    """The versions count up, so a file that mixes two, or goes back behind one already read, is seen."""
    moments = random.Random(0)
    command = [sys.executable, "-c", WRITER, str(path)]
    root = Path(checkpoint.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    checkpoint.write(path, {"a": torch.zeros(200_000)}, {"version": 0})
    version = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as writer:
        assert writer.stdin and writer.stdout
        assert writer.stdout.readline() == "ready\n"
        for _ in range(15):
            writer.stdin.write(f"{version}\n")
            writer.stdin.flush()
            child = int(writer.stdout.readline())
            time.sleep(moments.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            assert writer.stdout.readline() == "dead\n"
            tensors, metadata = checkpoint.read(path)
            assert metadata["version"] >= version
            version = metadata["version"]
            assert torch.equal(tensors["a"], torch.full((200_000,), float(version)))
        writer.stdin.close()
    assert version > 0, "no writer got as far as one checkpoint, so nothing was tested"
    checkpoint.write(path, {}, {})
    assert files(path.parent) == [path.name]


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    parent = os.getppid()
    dead = path.with_name(f".{path.name}.{process.pid}.tmp")
    impossible = path.with_name(f".{path.name}.{'9' * 30}.tmp")
    kept = [
        path.with_name(f".{path.name}.{parent}.tmp"),
        path.with_name(f".other.{process.pid}.tmp"),
        path.with_name(f".{path.name}.x.tmp"),
    ]
    for file in [dead, impossible, *kept]:
        file.write_bytes(b"half")
    write_first(path)
    assert files(path.parent) == sorted([path.name, *(file.name for file in kept)])


def refuse(number: int) -> Any:
    def raise_error(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return raise_error


@pytest.mark.parametrize("previous", [True, False])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_full_at_any_call_keeps_the_previous_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, previous: bool
) -> None:
    before = write_first(path) if previous else None
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(errno.ENOSPC))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.write(path, {"a": torch.zeros(9)}, {})
    kept = "the previous checkpoint is kept" if previous else "no checkpoint exists there yet"
    assert str(caught.value) == (
        f"{path} was not written (No space left on device); free some space or choose another folder; {kept}."
    )
    assert files(path.parent) == ([path.name] if previous else [])
    assert (path.read_bytes() if previous else None) == before


def test_an_interrupt_while_writing_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_first(path)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(path, {"a": torch.zeros(9)}, {})
    assert path.read_bytes() == before
    assert files(path.parent) == [path.name]


@pytest.mark.parametrize(("number", "refused"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_a_folder_that_cannot_be_synced_is_told_apart_from_a_file_that_was_not_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, refused: bool
) -> None:
    write_first(path)
    calls: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if refused:
        with pytest.raises(CheckpointError, match=r"was written but may not survive a power cut"):
            checkpoint.write(path, {}, {"version": 2})
    else:
        checkpoint.write(path, {}, {"version": 2})
    assert len(calls) == 2
    assert checkpoint.read(path)[1] == {"version": 2}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("a really full disk needs the mount command")
    if done.returncode:
        pytest.skip("a really full disk needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_keeps_the_previous_file(small_disk: Path) -> None:
    path = small_disk / "checkpoint.safetensors"
    before = write_first(path)
    with pytest.raises(CheckpointError, match=r"No space left on device.*the previous checkpoint is kept\.$"):
        checkpoint.write(path, {"a": torch.zeros(100_000)}, {})
    assert path.read_bytes() == before
    assert files(small_disk) == [path.name]
    checkpoint.write(path, {"a": torch.zeros(10)}, {})  # and the space is free again


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root may write anywhere, so permissions are tested as nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_read_only_folder_keeps_the_previous_file() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders cannot be entered by nobody
        folder = Path(name)
        path = folder / "checkpoint.safetensors"
        before = write_first(path)
        folder.chmod(0o555)
        try:
            with (
                as_ordinary_user(),
                pytest.raises(CheckpointError, match=r"make its folder writable.*is kept\.$"),
            ):
                checkpoint.write(path, {}, {})
        finally:
            folder.chmod(0o755)
        assert path.read_bytes() == before
        assert files(folder) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_file_that_may_not_be_read_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        path = Path(name) / "checkpoint.safetensors"
        write_first(path)
        path.chmod(0)
        with as_ordinary_user(), pytest.raises(CheckpointError, match="check its permissions"):
            checkpoint.read(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="create its folder first; no checkpoint exists there yet"):
        checkpoint.write(tmp_path / "absent" / "checkpoint", {}, {})


# -- files that are no checkpoints -----------------------------------------------------------------


def test_every_truncation_is_refused(path: Path) -> None:
    checkpoint.write(path, {"a": torch.ones(3), "b/c": torch.zeros(2, dtype=torch.uint8)}, {"step": 3})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


@pytest.mark.parametrize("place", ["absent", "."])
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(CheckpointError, match="is missing or no file; give the path"):
        checkpoint.read(tmp_path / place)


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        checkpoint.read(path)


@settings(deadline=None, max_examples=300)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_only_values(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    """There is no checksum, so a changed value passes; a changed header raises no other error."""
    path = tmp_path_factory.getbasetemp() / "changed"
    checkpoint.write(path, {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bool)}, {"step": 3})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        read_tensors, read_metadata = checkpoint.read(path)
    except CheckpointError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in read_tensors.values())
    assert isinstance(read_metadata, dict)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "F64", "BF16", "U8", "F4", "F8_E8M0", "F6_E2M3", "C64", "I3", "", 7]
        ),
        "shape": st.lists(
            st.integers(-1, 3) | st.sampled_from([2**31, 2**62, 2**63, 2**64 - 1, 2**70]), max_size=4
        ),
        "data_offsets": st.lists(st.integers(-1, 20) | st.sampled_from([2**63, 2**64 - 1]), max_size=3),
    }
)


@settings(deadline=None, max_examples=300)
@given(entries=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), size=st.integers(0, 16))
def test_hostile_headers_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any], size: int
) -> None:
    """A header may claim any dtype, shape and place; nothing but our own error may come out."""
    path = tmp_path_factory.getbasetemp() / "hostile"
    content = json.dumps({"format": checkpoint.FORMAT, "names": list(entries), "metadata": {}})
    header = json.dumps({"__metadata__": {checkpoint.METADATA_KEY: content}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    try:
        read_tensors, _ = checkpoint.read(path)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in read_tensors.values()) <= size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is a safetensors file but no checkpoint"),
        ("{", "has a broken header"),
        ("[" * 100_000, "has a broken header"),
        ('{"format": 1, "names": ["a"], "metadata": {"x": NaN}}', "NaN is not JSON"),
        ("[]", "has checkpoint format None, and this pctt reads format 1; use the pctt version"),
        ('{"format": 2, "names": ["a"], "metadata": {}}', "has checkpoint format 2, and"),
        ('{"format": true, "names": ["a"], "metadata": {}}', "has checkpoint format True, and"),
        ('{"format": 1, "metadata": {}}', "lists no tensor names"),
        ('{"format": 1, "names": [1], "metadata": {}}', "lists no tensor names"),
        ('{"format": 1, "names": ["a"]}', "holds no metadata object"),
        ('{"format": 1, "names": ["a"], "metadata": []}', "holds no metadata object"),
        ('{"format": 1, "names": [], "metadata": {}}', "does not hold the tensors"),
        ('{"format": 1, "names": ["a", "a"], "metadata": {}}', "does not hold the tensors"),
    ],
)
def test_whole_files_with_a_wrong_header_are_refused_by_name(
    path: Path, content: str | None, message: str
) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={} if content is None else {"pctt": content})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_pickle_is_refused_unopened(path: Path) -> None:
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        checkpoint.read(path)
