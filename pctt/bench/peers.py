"""Contenders, and the processes that they are."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from pctt.bench.work import BACKPROP, GEMM
from pctt.bench.workers.serve import unpack

WORKER = Path(__file__).parent / "workers" / "serve.py"
PYTHON_PATH = "PYTHONPATH"


@dataclass(frozen=True)
class Peer:
    """Another library.

    version: that its adapter was written for.    algorithms: that it takes.
    ways: in which its documentation lets them be run, the first one under the peer's own name.
    """

    version: str
    algorithms: tuple[str, ...]
    ways: tuple[str, ...] = ("",)


PEERS = {
    "pcx": Peer("0.6.3", ("pc", "ipc"), ("", "scan")),
    "fabricpc": Peer("0.6.0", ("pc",)),
    "ngclearn": Peer("3.2.3", ("pc",)),
}


@dataclass(frozen=True)
class Contender:
    """adapter: X of `workers/with_X.py`.    asked: whether the user named it.
    package, version: that must be there, None for a contender of our own.
    """

    name: str
    adapter: str
    algorithm: str
    interpreter: str = sys.executable
    package: str | None = None
    version: str | None = None
    way: str = ""
    asked: bool = False

    @property
    def is_own(self) -> bool:
        return self.package is None


class PeerFailed(Exception):
    """A contender did not do what it should; the text is a sentence."""


def own_contenders(algorithm: str) -> list[Contender]:
    """pctt, torch backprop beside plain predictive coding, and the square product that the floor is from."""
    found = [Contender("pctt", "pctt", algorithm)]
    if algorithm == "pc":
        found.append(Contender("torch backprop", "torch", BACKPROP))
    return [*found, Contender(GEMM, "torch", GEMM)]


def peer_contenders(given: dict[str, str], asked: Sequence[str], algorithm: str) -> list[Contender]:
    """given: {peer: interpreter}.    asked: those of them that the user named."""
    return [
        Contender(
            f"{name} {way}".strip(), name, algorithm, python, name, PEERS[name].version, way, name in asked
        )
        for name, python in given.items()
        if algorithm in PEERS[name].algorithms
        for way in PEERS[name].ways
    ]


def installed_peers() -> dict[str, str]:
    """Those that this interpreter can import."""
    return {name: sys.executable for name in PEERS if importlib.util.find_spec(name) is not None}


@dataclass(frozen=True)
class Answer:
    """To `prepare`. first_batch: seconds.    activities, weights: after it, None where there are none."""

    first_batch: float
    activities: list[Tensor] | None
    weights: list[list[Tensor]] | None
    about: dict[str, Any]


@dataclass(frozen=True)
class Round:
    """milliseconds: of every training batch.    cpu: that all threads have worked for one, on average.
    peak_bytes: the most the process has held so far.
    """

    milliseconds: list[float]
    cpu: float
    peak_bytes: int | None


class Worker:
    """A contender's process; under a `with`, leaving it ends the process.

    threads: that it may use.    limit: seconds that an answer may take, beyond what it is asked to run.
    Every method raises PeerFailed where the process dies, hangs, answers nonsense or says that it failed.
    """

    def __init__(self, contender: Contender, threads: int, limit: float) -> None:
        self.contender, self.limit = contender, limit
        self.runtime: dict[str, str] = {}
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile()
        command = [contender.interpreter, str(WORKER), contender.adapter, "--threads", str(threads)]
        if contender.package is not None:
            command += ["--package", contender.package, "--version", str(contender.version)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(contender),
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # so that a wrapper's own child can be ended with it
            )
        except OSError as error:
            self._errors.close()
            reason = error.strerror or str(error)
            raise PeerFailed(f"{contender.name}: cannot run {contender.interpreter}: {reason}.") from None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; nothing happens the second time."""
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of what it did not read any more
                pipe.close()
        self._errors.close()

    def start(self) -> None:
        """Waits until it has imported what it needs."""
        answer = self._next("ready", self.limit, "starting")
        self.runtime = _checked(self, lambda: {str(k): str(v) for k, v in answer["runtime"].items()})
        if self.contender.package is not None and answer.get("version") is not None:
            self.runtime = {self.contender.package: str(answer["version"]), **self.runtime}

    def prepare(self, key: str, work: dict[str, Any]) -> Answer:
        """One training batch of a work, which `run` then goes on with under that key."""
        self._send({"do": "prepare", "key": key, "work": work}, "preparing")
        answer = self._next("prepared", self.limit, "preparing its first training batch")

        def read() -> Answer:
            activities, weights = answer["activities"], answer["weights"]
            return Answer(
                float(answer["first_batch"]),
                None if activities is None else [_tensor(each) for each in activities],
                None if weights is None else [[_tensor(each) for each in layer] for layer in weights],
                dict(answer["about"]),
            )

        return _checked(self, read)

    def run(self, key: str, seconds: float) -> Round:
        """The training batches within `seconds`."""
        self._send({"do": "run", "key": key, "seconds": seconds}, "running")
        answer = self._next("samples", seconds + self.limit, "running")

        def read() -> Round:
            samples, peak = [float(each) for each in answer["milliseconds"]], answer["peak_bytes"]
            if not samples or not min(samples) > 0:
                raise ValueError("no times")
            return Round(samples, float(answer["cpu"]), None if peak is None else int(peak))

        return _checked(self, read)

    # --- the pipe -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _send(self, request: dict[str, Any], doing: str) -> None:
        """A process that hangs leaves the pipe full, so a thread writes."""
        pipe, text = self._process.stdin, json.dumps(request) + "\n"
        assert pipe is not None

        def write() -> None:
            with suppress(OSError, ValueError):  # it has died, which the next answer tells
                pipe.write(text)
                pipe.flush()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(self.limit)
        if writer.is_alive():
            self.close()
            writer.join()
            raise PeerFailed(
                f"{self.contender.name}: took no request within {self.limit:g} s while {doing}; it was ended."
            )

    def _next(self, kind: str, seconds: float, doing: str) -> dict[str, Any]:
        name = self.contender.name
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise PeerFailed(f"{name}: no answer within {seconds:g} s while {doing}; it was ended.") from None
        if line is None:
            raise self._died(doing)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise PeerFailed(f"{name}: answered {line.strip()[:60]!r} while {doing}, which is no answer.")
        answer = cast("dict[str, Any]", answer)
        if answer.get("kind") == "failed":
            raise PeerFailed(f"{name}: {str(answer.get('sentence')).rstrip('.')}.")
        if answer.get("kind") != kind:
            raise PeerFailed(f"{name}: answered {answer.get('kind')!r} while {doing}, not {kind!r}.")
        return answer

    def _died(self, doing: str) -> PeerFailed:
        try:
            code = self._process.wait(timeout=self.limit)
        except subprocess.TimeoutExpired:
            return PeerFailed(f"{self.contender.name}: closed its output while {doing}; it was ended.")
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip()[:200] for line in reversed(said) if line.strip()), "")
        text = f"{self.contender.name}: its process ended with exit code {code} while {doing}"
        return PeerFailed(f"{text}: {last.rstrip('.')}." if last else f"{text}.")


def _checked(worker: Worker, read: Any) -> Any:
    """What `read` takes from an answer."""
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PeerFailed(f"{worker.contender.name}: an answer does not fit ({reason}).") from None


def _tensor(packed: dict[str, Any]) -> Tensor:
    return torch.from_numpy(unpack(packed))


def _environment(contender: Contender) -> dict[str, str]:
    """pctt's own workers take the pctt that runs here; peers stay on the CPU, where their figures are
    from.
    """
    environment = dict(os.environ)
    if contender.is_own:
        here = str(Path(__file__).parents[2])
        environment[PYTHON_PATH] = os.pathsep.join(filter(None, (here, os.environ.get(PYTHON_PATH))))
    else:
        environment["JAX_PLATFORMS"] = "cpu"
    return environment
