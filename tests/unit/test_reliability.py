"""What a long run may meet: death at any moment, signals, full disks, wrong clocks, a second run, bad
batches, hostile files. What is measured here stands in docs/results/reliability.md.
"""

import ast
import ctypes
import gc
import itertools
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
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pctt
from pctt import checkpoint, cli, record, run
from pctt.checkpoint import CheckpointError
from pctt.config import RunConfig, TrainingConfig, to_dict
from pctt.engine import Engine, Relaxation, Status

ROOT = Path(checkpoint.__file__).parents[1]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork, signals and flock")

TINY = """
[[layers]]
units = 16
activation = "tanh"

[[layers]]
units = 10

[inference]
num_steps = 3

[learning]
kind = "adam"
rate = 0.003

[training]
epochs = 2
batch_size = 256
checkpoint_every = 2
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def train(*arguments: object) -> int:
    return cli.main(["train", *(str(argument) for argument in arguments)])


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without the wall clock."""
    return [{**entry, "seconds": 0} for entry in record.read(folder / record.FILE_NAME)]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, learning state, progress and record, bit for bit."""
    assert (first / run.CHECKPOINT).read_bytes() == (second / run.CHECKPOINT).read_bytes()
    assert records(first) == records(second)


def files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# --- death at any moment ------------------------------------------------------------------------------------

SERVER = """
import builtins, json, os, signal, sys
import torch, tyro
torch.set_num_threads(1)
from pctt import checkpoint, cli, record
from pctt.data import load
from pctt.engine import Engine
load("digits")  # imports scikit-learn

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def countdown(call, number, last):
    left = [number]
    def counted(*arguments):
        left[0] -= 1
        return last(*arguments) if left[0] == 0 else call(*arguments)
    return counted

def half(file):
    class Half:
        def __getattr__(self, name): return getattr(file, name)
        def __enter__(self): return self
        def __exit__(self, *_): file.close()
        def write(self, data):
            file.write(data[: len(data) // 2])
            file.flush()
            die()
    return Half()

def half_record(recorder, line):
    recorder._file.write(line[: len(line) // 2])
    die()

def arm(spot, number):
    '''Die at the number-th time that the run comes to this spot.'''
    if spot == "in a checkpoint":
        opened = lambda *arguments: half(open(*arguments))
        checkpoint.open = countdown(open, 2 * number, opened)  # the lock of a checkpoint's digest is not read
    elif spot == "before fsync":
        os.fsync = countdown(os.fsync, number, die)
    elif spot == "before rename":
        os.replace = countdown(os.replace, number, die)
    elif spot == "after rename":
        replace = os.replace
        os.replace = countdown(replace, number, lambda *arguments: (replace(*arguments), die()))
    elif spot == "in a record":
        append = record.Recorder._append
        record.Recorder._append = countdown(append, number, half_record)
    elif spot.startswith("signals"):
        learn = Engine.learn
        def signalled(*arguments):
            for kind in spot.split()[1:]:
                os.kill(os.getpid(), int(kind))
            learn(*arguments)
        Engine.learn = countdown(learn, number, signalled)
    elif spot == "between the files":
        record.Recorder.__init__ = countdown(record.Recorder.__init__, number, die)

print("ready", flush=True)
for line in sys.stdin:
    arguments, spot, number = json.loads(line)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        arm(spot, number)
        os._exit(cli.main(arguments))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

SPOTS = ("in a checkpoint", "before fsync", "before rename", "after rename", "in a record")


class Server:
    """Trains in children of one process that has imported everything."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SERVER]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._line() == "ready"

    def begin(self, arguments: list[str], spot: str = "", number: int = 0) -> int:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([arguments, spot, number]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """The exit code of the child, negative for a signal."""
        return os.waitstatus_to_exitcode(int(self._line()))

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.mark.slow
@POSIX
def test_fifty_kills_at_random_moments_lose_nothing(server: Server, tiny: Path, tmp_path: Path) -> None:
    """Half of them after a random time, half at a spot where a file is half written. After each the run goes
    on, and in the end it has the bytes of one that never stopped.
    """
    moments = random.Random(0)
    command = ["train", str(tiny), "--epochs", "60", "--out"]
    whole = tmp_path / "whole"
    began = time.monotonic()
    server.begin([*command, str(whole)])
    assert server.end() == cli.OK
    duration = time.monotonic() - began
    spots = itertools.cycle(SPOTS)
    kills, parts = dict.fromkeys((*SPOTS, "at a random time"), 0), [tmp_path / "part0"]

    def go_on() -> list[str]:
        known = (parts[-1] / cli.CONFIG).is_file()
        return [*command, str(parts[-1]), *(["--resume"] if known else [])]

    while sum(kills.values()) < 50:
        if sum(kills.values()) % 2:
            spot = next(spots)
            server.begin(go_on(), spot, moments.randint(1, 6))
        else:
            spot = "at a random time"
            child = server.begin(go_on())
            time.sleep(moments.uniform(0.0, 0.3 * duration))
            with suppress(ProcessLookupError):  # it may have ended
                os.kill(child, signal.SIGKILL)
        code = server.end()
        assert code in (cli.OK, -signal.SIGKILL), code
        if code == cli.OK:
            parts.append(tmp_path / f"part{len(parts)}")
        else:
            kills[spot] += 1
            if (parts[-1] / run.CHECKPOINT).is_file():
                checkpoint.read(parts[-1] / run.CHECKPOINT)
    server.begin(go_on())
    assert server.end() == cli.OK
    for part in parts:
        assert_same_run(whole, part)
        assert files(part) == files(whole), "nothing half written may be left behind"
    assert all(kills.values()), kills
    print(f"kills: {kills}; {len(parts)} runs of {duration:.1f} s; {time.monotonic() - began:.0f} s in all")


@POSIX
def test_a_run_killed_between_its_first_checkpoint_and_its_record_goes_on(
    server: Server, tiny: Path, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(tiny, "--out", whole) == cli.OK
    server.begin(["train", str(tiny), "--out", str(part)], "between the files", 1)
    assert server.end() == -signal.SIGKILL
    assert (part / run.CHECKPOINT).is_file() and not (part / record.FILE_NAME).is_file()
    assert train(tiny, "--out", part, "--resume") == cli.OK
    assert_same_run(whole, part)


@POSIX
@pytest.mark.parametrize(("spot", "number"), [("before fsync", 1), ("before rename", 1), ("after rename", 1)])
def test_a_run_killed_while_its_configuration_is_written_can_be_begun_or_resumed(
    server: Server, tiny: Path, tmp_path: Path, spot: str, number: int
) -> None:
    """Otherwise its folder would be refused to both, as used and as no run."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(tiny, "--out", whole) == cli.OK
    command = ["train", str(tiny), "--out", str(part)]
    server.begin(command, spot, number)
    assert server.end() == -signal.SIGKILL and files(part)
    known = (part / cli.CONFIG).is_file()
    assert known == (spot == "after rename")
    assert train(*command[1:], *(["--resume"] if known else [])) == cli.OK
    assert_same_run(whole, part)
    assert files(part) == files(whole)


def test_a_run_whose_checkpoint_was_removed_is_not_begun_again_over_its_record(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(tiny, "--out", out) == cli.OK
    (out / run.CHECKPOINT).unlink()
    before = records(out)
    assert train(tiny, "--out", out, "--resume") == cli.FAILED
    assert "is gone and its record is not" in capsys.readouterr().err
    assert records(out) == before


# --- signals ------------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_batch_and_it_goes_on_bit_for_bit(
    number: signal.Signals, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(tiny, "--out", whole) == cli.OK
    learn = Engine.learn

    def signalled(engine: Engine, rate: float, step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), number)
        learn(engine, rate, step)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "learn", signalled)
        capsys.readouterr()
        assert train(tiny, "--out", part) == cli.FAILED
    errors = capsys.readouterr().err
    assert errors == (f"pctt: stopped after batch 5; the same command with --out {part} --resume goes on.\n")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert pctt.load(part).progress.step == 5
    assert train(tiny, "--out", part, "--resume") == cli.OK
    assert_same_run(whole, part)


@POSIX
def test_a_signal_before_the_first_batch_is_not_lost(tiny, tmp_path, capsys, monkeypatch):
    """Between the handler and the first batch lies the preparation of the data."""
    clamped, whole, part = cli._clamped, tmp_path / "whole", tmp_path / "part"

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(cli, "_clamped", clamped)
        return clamped(*arguments)

    monkeypatch.setattr(cli, "_clamped", signalled)
    assert train(tiny, "--out", part) == cli.FAILED
    assert "stopped after batch 1;" in capsys.readouterr().err
    assert train(tiny, "--out", part, "--resume") == cli.OK
    assert train(tiny, "--out", whole) == cli.OK
    assert_same_run(whole, part)


@POSIX
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_of_either_kind_ends_at_once(
    server: Server, tiny: Path, tmp_path: Path, first: signal.Signals, second: signal.Signals
) -> None:
    """Both in batch 5: after the first alone there would be a checkpoint of batch 5."""
    out = tmp_path / "run"
    server.begin(["train", str(tiny), "--out", str(out)], f"signals {int(first)} {int(second)}", 5)
    assert server.end() == -second
    assert pctt.load(out).progress.step == 4


def test_ctrl_c_while_data_are_loaded_is_one_sentence(tiny, tmp_path, capsys, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_data", interrupt)
    assert train(tiny, "--out", tmp_path / "run") == cli.FAILED
    assert capsys.readouterr().err == "pctt: interrupted; no run had begun.\n"
    assert not (tmp_path / "run").exists()


# --- full disks and read-only folders -----------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("a really full disk needs the mount command")
    if done.returncode:
        pytest.skip("a really full disk needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_at_any_moment_is_one_sentence_and_the_run_goes_on(tiny, tmp_path, capsys):
    """More and more pages are left, so that it is full at the folder, the configuration, the checkpoint, the
    record and the picture in turn.
    """
    whole = tmp_path / "whole"
    assert train(tiny, "--out", whole) == cli.OK
    stopped_at = set[str]()
    with small_disk(tmp_path / "disk", "512k") as disk:
        page = os.statvfs(disk).f_bsize
        for free in (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24):
            out, ballast = disk / "run", disk / "ballast"
            ballast.write_bytes(bytes((os.statvfs(disk).f_bavail - free) * page))
            capsys.readouterr()
            code = train(tiny, "--out", out)
            errors = capsys.readouterr().err
            if code != cli.OK:
                assert code == cli.FAILED and len(errors.splitlines()) == 1, errors
                assert "No space left on device" in errors and "free some space" in errors
                assert "Errno" not in errors
                stopped_at.add(next(name for name in (*files(whole), "the folder", "used") if name in errors))
            ballast.unlink()
            left = files(out) if out.exists() else set()
            assert left <= files(whole), left
            known = cli.CONFIG in left
            assert train(tiny, "--out", out, *(["--resume"] if known else [])) == cli.OK
            assert_same_run(whole, out)
            for entry in out.iterdir():
                entry.unlink()
            out.rmdir()
    assert {run.CHECKPOINT, record.FILE_NAME} <= stopped_at, stopped_at


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


@POSIX
def test_read_only_folders_are_one_sentence_and_keep_what_is_there(capsys):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders cannot be entered by nobody
        folder = Path(name)
        folder.chmod(0o755)
        tiny, out = folder / "tiny.toml", folder / "run"
        tiny.write_text(TINY)
        with as_ordinary_user():
            assert train(tiny, "--out", out) == cli.FAILED
            errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1 and "make its folder writable" in errors
        assert files(folder) == {"tiny.toml"}
        assert train(tiny, "--out", out) == cli.OK
        before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
        capsys.readouterr()
        with as_ordinary_user():
            assert train(tiny, "--out", out, "--epochs", 3, "--resume") == cli.FAILED
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1 and "make its folder writable" in errors
        assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before


# --- clocks -------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(tiny, tmp_path, monkeypatch):
    straight, jumping = tmp_path / "straight", tmp_path / "jumping"
    assert train(tiny, "--out", straight) == cli.OK
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600.0 * next(hours))
    assert train(tiny, "--out", jumping) == cli.OK
    assert_same_run(straight, jumping)
    lasted = [entry["seconds"] for entry in record.read(jumping / record.FILE_NAME) if "seconds" in entry]
    assert len(lasted) == 2 and all(0.0 <= seconds < 60.0 for seconds in lasted)


def test_nothing_in_pctt_asks_for_the_time_of_day():
    """Durations are of `perf_counter` and `monotonic`; a file's date decides nothing either."""
    asked = {("time", "time"), ("time", "time_ns"), ("time", "localtime"), ("time", "gmtime")}
    for path in sorted((ROOT / "pctt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                assert (owner, node.attr) not in asked and owner != "datetime", f"{path}:{node.lineno}"
                assert node.attr not in ("st_mtime", "st_mtime_ns", "st_ctime"), f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                assert node.module != "datetime" or names == {"timedelta"}, f"{path}:{node.lineno}"
                assert node.module != "time" or "time" not in names, f"{path}:{node.lineno}"


# --- two runs, one folder -----------------------------------------------------------------------------------


@POSIX
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(server, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    child = server.begin(["train", str(tiny), "--epochs", "100000", "--out", str(out)])
    deadline = time.monotonic() + 60
    while not (out / record.FILE_NAME).is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert train(tiny, "--epochs", 100000, "--out", out, "--resume") == cli.USAGE
    errors = capsys.readouterr().err
    assert errors == f"pctt: another run is at work in {out}; wait for its end, or choose another folder.\n"
    os.kill(child, signal.SIGKILL)
    assert server.end() == -signal.SIGKILL
    assert checkpoint.LOCK in files(out)  # and nobody holds it
    done = pctt.load(out).progress.epoch
    assert train(tiny, "--epochs", done + 1, "--out", out, "--resume") == cli.OK
    assert checkpoint.LOCK not in files(out)


@POSIX
def test_of_two_new_runs_in_one_folder_the_later_is_refused(tiny, tmp_path, capsys, monkeypatch):
    """Both have seen an empty folder: one while the other is at work, one after it has ended."""
    out, load = tmp_path / "run", cli.load_data

    def slow(config):
        monkeypatch.setattr(cli, "load_data", load)
        assert train(tiny, "--out", out) == cli.OK
        return load(config)

    monkeypatch.setattr(cli, "load_data", slow)
    assert train(tiny, "--out", out) == cli.USAGE
    assert "exists already" in capsys.readouterr().err
    with checkpoint.hold(tmp_path):
        pass
    other = tmp_path / "other"
    other.mkdir()
    with checkpoint.hold(other):
        assert train(tiny, "--out", other) == cli.USAGE
        assert "another run is at work" in capsys.readouterr().err
        assert files(other) == {checkpoint.LOCK}
    assert train(tiny, "--out", other) == cli.OK
    assert_same_run(out, other)


@POSIX
def test_a_lock_on_a_file_that_was_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    """The holder ends between another's opening and locking of the file: that would keep no third one out."""
    import fcntl

    lock, first = fcntl.flock, checkpoint.hold(tmp_path)
    first.__enter__()

    def release_then_lock(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        first.__exit__(None, None, None)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", release_then_lock)
    with checkpoint.hold(tmp_path):
        assert files(tmp_path) == {checkpoint.LOCK}
        with pytest.raises(checkpoint.FolderInUse), checkpoint.hold(tmp_path):
            pass
    assert not files(tmp_path)


@POSIX
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match="cannot be locked .Operation not supported."),
        checkpoint.hold(tmp_path),
    ):
        pass


# --- batches that go wrong ----------------------------------------------------------------------------------

BATCH = 20


def clouds(num: int = 100, wild: tuple[int, ...] = (), seed: int = 3) -> tuple[Tensor, Tensor]:
    """Three clouds in 6 dimensions, with target vectors. wild: batches of the first epoch,
    counted from 0, that hold a target so far out that its square is infinite.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 3
    inputs = 3.0 * torch.eye(3, 6)[labels] + 0.3 * torch.randn(num, 6, generator=generator)
    targets = torch.nn.functional.one_hot(labels, 3).float()
    order = trainer(seed=seed)._order(num, 0)
    for batch in wild:
        targets[order[batch * BATCH]] = 1e30
    return inputs, targets


def network() -> pctt.Network:
    return pctt.chain(6, [pctt.Dense(8, "tanh"), pctt.Dense(8, "tanh"), pctt.Dense(3)])


def trainer(**given: Any) -> pctt.Trainer:
    given = {"batch_size": BATCH, "seed": 3, **given}
    inference = given.pop("inference", pctt.Inference(8, 0.1))
    return pctt.Trainer(network(), inference, given.pop("learning", pctt.Adam(1e-2)), **given)


def same(a: Any, b: Any) -> bool:
    a, b = checkpoint.flatten(a), checkpoint.flatten(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit(t: pctt.Trainer, *arguments: Any, **settings: Any) -> tuple[run.FitResult, list[dict[str, Any]]]:
    """The result and the records, with their kinds."""
    lines: list[dict[str, Any]] = []
    callback = lambda kind, fields: lines.append({"kind": kind, **fields})  # noqa: E731
    return t.fit(*arguments, callbacks=[callback], **settings), lines


@pytest.mark.parametrize("algorithm", ["pc", "backprop"])
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_a_skipped_batch_is_as_if_it_had_not_been(backend: str, algorithm: str) -> None:
    """Against a loop over the other batches, with Adam's count of steps; NaN must not stay in any buffer."""
    if (backend, algorithm) == ("emulated", "backprop"):
        pytest.skip("the twin runs in torch, whatever the backend of the engine")
    inputs, targets = clouds(wild=(1, 2))
    t = trainer(backend=backend, algorithm=algorithm, on_divergence="skip_batch")
    by_hand = trainer(backend=backend, algorithm=algorithm)
    order = t._order(len(inputs), 0)
    for number, batch in enumerate(order.split(BATCH)):
        if number not in (1, 2):
            nodes = {"input": inputs[batch], "dense3": targets[batch]}
            assert by_hand._train_batch(nodes, None, 1e-2, number == 0).status.ok
            by_hand.progress.step += 1
    result, lines = fit(t, (inputs, targets), 1)
    assert result.status is Status.COMPLETED and result.steps == 5
    assert same(t.weights, by_hand.weights)
    assert same(t.engine.learning_state(), by_hand.engine.learning_state())
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [line["step"] for line in skipped] == [2, 3]
    assert all(line["epoch"] == 1 and line["status"] == "NON_FINITE" for line in skipped)
    assert all(line["layer"] in t.net.names for line in skipped)
    assert [line["step"] for line in lines if line["kind"] == "batch"] == [1, 4, 5]
    assert math.isfinite(lines[-1]["train_energy"])


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dynamics", ["euler", "momentum", "adam", "heun", "langevin"])
def test_a_halved_rate_is_the_rate_of_a_run_that_began_with_half(dynamics, backend, monkeypatch):
    """The first batch is called diverged once, and tried again."""
    if backend == "emulated" and dynamics in ("heun", "langevin", "adam"):
        pytest.skip("not run by the card backends")
    settings = {"momentum": 0.5} if dynamics == "momentum" else {}
    half = pctt.Inference(6, 0.02, dynamics=dynamics, **settings)
    expected = trainer(inference=half, backend=backend)
    fit(expected, clouds(), 2)
    t = trainer(inference=replace(half, rate=0.04), backend=backend, on_divergence="halve_rate")
    relax, calls = t.engine.relax, itertools.count()

    def once(*arguments: Any, **others: Any) -> Relaxation:
        found = relax(*arguments, **others)
        return replace(found, status=Status.DIVERGED) if next(calls) == 0 else found

    monkeypatch.setattr(t.engine, "relax", once)
    result, lines = fit(t, clouds(), 2)
    assert result.status is Status.COMPLETED
    assert same(t.weights, expected.weights)
    (halved,) = [line for line in lines if line["kind"] == "halved"]
    assert (halved["step"], halved["inference_rate"]) == (1, 0.02)


def test_a_rate_that_diverges_is_halved_until_it_does_not(tmp_path):
    """Each time by half, from the batch at fault on, until it no longer diverges."""
    wild = pctt.Inference(60, 8.0)
    result, _ = fit(trainer(inference=wild), clouds(), 1)
    assert result.status in (Status.DIVERGED, Status.NON_FINITE)
    t = trainer(inference=wild, on_divergence="halve_rate")
    result, lines = fit(t, clouds(), 3)
    assert result.status is Status.COMPLETED
    rates = [line["inference_rate"] for line in lines if line["kind"] == "halved"]
    assert (
        rates == [8.0 * 0.5**n for n in range(1, len(rates) + 1)] and t.setbacks.halvings == len(rates) >= 2
    )


@pytest.mark.parametrize("on_divergence", ["halve_rate", "skip_batch"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_with_setbacks_resumes_bit_for_bit(tmp_path, on_divergence, stop):
    """Stopped before, between and after two of them; weights, counters and record are those of one run."""
    wild = (1, 3) if on_divergence == "skip_batch" else ()
    inference = pctt.Inference(60, 8.0) if on_divergence == "halve_rate" else pctt.Inference(8, 0.1)

    def go(t: pctt.Trainer, folder: Path, resume_after: int | None, stop: int) -> None:
        with record.Recorder(folder, resume_after=resume_after) as recorder:

            def watch(kind: str, fields: dict[str, Any]) -> None:
                if kind in ("batch", "skipped") and fields["step"] == stop:
                    t.stop()

            t.fit(clouds(wild=wild), 2, callbacks=[recorder.log_record, watch], save_to=folder)

    whole = trainer(inference=inference, on_divergence=on_divergence)
    go(whole, tmp_path / "whole", None, 0)
    assert whole.setbacks.skipped + whole.setbacks.halvings >= 2
    go(trainer(inference=inference, on_divergence=on_divergence), tmp_path / "part", None, stop)
    t = pctt.load(tmp_path / "part")
    assert t.progress.step == stop and t.on_divergence == on_divergence
    go(t, tmp_path / "part", stop, 0)
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_halving_gives_up_and_says_so(tmp_path):
    inputs, targets = clouds(wild=(2,))
    t = trainer(on_divergence="halve_rate")
    result, lines = fit(t, (inputs, targets), 1, save_to=tmp_path)
    assert result.status is Status.NON_FINITE and result.steps == 2
    assert "batch 3" in result.message and "after 10 halvings of the rate" in result.message
    assert len([line for line in lines if line["kind"] == "halved"]) == run.MOST_HALVINGS == 10


@pytest.mark.parametrize(("num", "limit"), [(100, 5), (4000, 100)])
def test_skipping_gives_up_after_an_epoch_or_a_hundred_in_a_row(num, limit):
    inputs, targets = clouds(num)
    targets[:] = 1e30
    t = trainer(on_divergence="skip_batch")
    before = t.weights
    result, lines = fit(t, (inputs, targets), 1)
    assert result.status is Status.NON_FINITE and len(lines) == limit - 1 == result.steps
    assert f"after {limit - 1} batches in a row that were skipped" in result.message
    assert same(before, t.weights)


def test_batches_skipped_now_and_then_do_not_add_up(monkeypatch):
    monkeypatch.setattr(run, "MOST_SKIPPED", 3)
    t = trainer(on_divergence="skip_batch")
    result, _ = fit(t, clouds(200, wild=(0, 1, 3, 4, 6, 7, 9)), 1)
    assert result.status is Status.COMPLETED and t.setbacks == run.Setbacks(0, 7, 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inference": pctt.Inference(4, 0.1, weights_at="every_step")}, "with weights_at='every_step'"),
        ({"backend": "emulated", "fused": True, "batch_size": 32}, "in the fused kernel"),
    ],
)
@pytest.mark.parametrize("on_divergence", ["halve_rate", "skip_batch"])
def test_where_a_batch_cannot_be_undone_only_stop_is_possible(given, words, on_divergence, tmp_path):
    with pytest.raises(ValueError, match=f"{words} they have moved by then; use on_divergence='stop'"):
        trainer(**given, on_divergence=on_divergence)
    t = trainer(**given)
    t.on_divergence = on_divergence
    with pytest.raises(ValueError, match="use on_divergence='stop'"):
        t.fit(clouds(), 1)


def test_a_card_that_cannot_train_such_a_run_can_still_evaluate_it(tmp_path):
    trainer(on_divergence="skip_batch").save(tmp_path)
    t = pctt.load(tmp_path, backend="emulated", fused=True)
    assert 0.0 <= t.evaluate(clouds()) <= 1.0
    with pytest.raises(ValueError, match="in the fused kernel"):
        t.fit(clouds(), 1)


def test_backprop_has_no_rate_to_halve_and_other_words_are_refused():
    with pytest.raises(ValueError, match="algorithm='backprop' has none"):
        trainer(algorithm="backprop", on_divergence="halve_rate")
    for make in (lambda: trainer(on_divergence="go on"), lambda: TrainingConfig(on_divergence="go on")):
        with pytest.raises(ValueError, match="on_divergence must be one of stop, halve_rate, skip_batch"):
            make()


def test_the_command_says_what_was_halved_and_may_change_its_mind(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    command = (tiny, "--out", out, "--set", "inference.rate=8.0", "inference.num_steps=30")
    assert train(*command) == cli.FAILED
    capsys.readouterr()
    assert train(*command, "training.on_divergence=halve_rate", "--resume") == cli.OK
    errors = capsys.readouterr().err
    assert "worst in layer" in errors and "inference.rate is 4 from now on." in errors
    kinds = [line["kind"] for line in records(out)]
    assert "halved" in kinds and "failed" not in kinds and kinds[-1] == "result"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [3, 5])
def test_weights_that_are_no_longer_finite_reach_no_checkpoint(tmp_path, monkeypatch, value, step):
    """An update may make them so at energies that were finite; the next energy would show it, one checkpoint
    too late. Batch 5 is the end of the epoch.
    """
    t = trainer()
    t.fit(clouds(), 0, save_to=tmp_path)
    t.save(tmp_path)
    kept, learn = (tmp_path / run.CHECKPOINT).read_bytes(), t.engine.learn

    def broken(rate: float, number: int) -> None:
        learn(rate, number)
        if number == step:
            weights = t.weights
            weights["dense2"]["weight"][0, 0] = value
            t.engine.load_weights(weights)

    monkeypatch.setattr(t.engine, "learn", broken)
    result = t.fit(clouds(), 2, save_to=tmp_path, save_every=3)
    assert result.status is Status.NON_FINITE
    assert f"after batch {step} the weights of layer 'dense2' are NaN or infinite" in result.message
    if step == 3:
        assert (tmp_path / run.CHECKPOINT).read_bytes() == kept
    assert pctt.load(tmp_path).progress.step == (0 if step == 3 else 3)
    with pytest.raises(ValueError, match="'dense2' are NaN or infinite, so they are not written"):
        t.save(tmp_path)


def test_weights_that_broke_without_a_checkpoint_are_blamed_and_no_batch_is_skipped_for_them(monkeypatch):
    t = trainer(on_divergence="skip_batch")
    weights = t.weights
    weights["dense1"]["bias"][0] = math.nan
    t.engine.load_weights(weights)
    result, lines = fit(t, clouds(), 1)
    assert result.status is Status.NON_FINITE and not lines
    assert "the weights of 'dense1' were NaN or infinite before" in result.message


def test_data_of_another_length_do_not_go_on_with_a_half_done_epoch(tmp_path):
    t = trainer()
    t.progress.batch = 4
    with pytest.raises(ValueError, match="stopped after batch 4 of an epoch, and these data make only 2"):
        t.fit(clouds(40), 1)


# --- hostile files ------------------------------------------------------------------------------------------


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


# --- the same bits, and no growth ---------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_two_processes_make_the_same_bits(server: Server, tiny: Path, tmp_path: Path, backend: str) -> None:
    """One thread each; their hashes of text differ, so an order taken from a set would show."""
    here, there = tmp_path / "here", tmp_path / "there"
    assert train(tiny, "--backend", backend, "--epochs", 1, "--out", here) == cli.OK
    server.begin(["train", str(tiny), "--backend", backend, "--epochs", "1", "--out", str(there)])
    assert server.end() == cli.OK
    assert_same_run(here, there)


def resident_bytes() -> int:
    """What is in use: free pages, which would hide a leak, go back to the system first."""
    gc.collect()
    with suppress(AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
GROWTH = 4 * 2**20
"""Bytes by which memory may grow while a run goes on; a leak of 600 a batch over 8,000 would show."""


def growth(t: pctt.Trainer, folder: Path, early: int, late: int, leak: int = 0) -> int:
    """Bytes of growth from batch `early` to batch `late`, with record and checkpoints."""
    inputs, targets = clouds(40 * t.batch_size)
    sizes, kept = list[int](), list[bytes]()
    with record.Recorder(folder) as recorder:

        def measure(kind: str, fields: dict[str, Any]) -> None:
            if kind == "batch":
                kept.append(os.urandom(leak) if leak else b"")
                if fields["step"] in (early, late):
                    sizes.append(resident_bytes())

        callbacks = [recorder.log_record, measure]
        t.fit((inputs, targets), late // 40, (inputs, targets), callbacks, save_to=folder, save_every=500)
    return sizes[1] - sizes[0]


@pytest.mark.slow
@LINUX
def test_ten_thousand_batches_take_no_more_memory_than_two_thousand(tmp_path):
    grown = growth(trainer(batch_size=8, inference=pctt.Inference(2, 0.1)), tmp_path, 2000, 10_000)
    print(f"growth on the reference, batches 2,000 to 10,000: {grown} bytes")
    assert grown < GROWTH


@pytest.mark.slow
@LINUX
def test_the_fused_kernel_in_emulation_does_not_grow(tmp_path):
    """A leak of 9 KB a batch would show."""
    t = trainer(batch_size=32, inference=pctt.Inference(2, 0.1), backend="emulated", fused=True)
    grown = growth(t, tmp_path, 120, 600)
    print(f"growth on the fused kernel in emulation, batches 120 to 600: {grown} bytes")
    assert grown < GROWTH


@LINUX
def test_the_measure_of_growth_sees_a_leak(tmp_path):
    t = trainer(batch_size=8, inference=pctt.Inference(0, 0.1))
    assert growth(t, tmp_path, 40, 400, leak=20_000) > GROWTH
