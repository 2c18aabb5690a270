"""What a long run may meet: death at any moment, signals, full disks, wrong clocks, a second run. What is
measured here stands in docs/results/reliability.md.
"""

import ast
import ctypes
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from runs import TINY, assert_same_run, clouds, files, records, train, trainer

import pctt
from pctt import checkpoint, cli, record, run
from pctt.engine import Engine

ROOT = Path(checkpoint.__file__).parents[1]
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork, signals and flock")

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
    """Durations are of `perf_counter` and `monotonic`; a file's date decides nothing either. A
    benchmark alone says on which day it was run.
    """
    asked = {("time", "time"), ("time", "time_ns"), ("time", "localtime"), ("time", "gmtime")}
    for path in sorted({*(ROOT / "pctt").rglob("*.py")} - {ROOT / "pctt" / "bench" / "command.py"}):
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
