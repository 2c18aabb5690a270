"""One contender of `pctt bench` in an interpreter of its own, asked over standard input and output.

    PYTHON serve.py ADAPTER [--package NAME --version VERSION] [--threads N]

This file and the `with_*.py` beside it need nothing but their peer: the interpreter that runs them has
neither pctt nor torch, except where pctt itself is the contender. Requests and answers are JSON, one
object a line:

    answer                  {"kind": "ready", "package", "version", "runtime": {name: version}}
    {"do": "prepare", "key", "work"}
                            {"kind": "prepared", "first_batch", "activities", "weights", "about"}
    {"do": "run", "key", "seconds"}
                            {"kind": "samples", "milliseconds": [...], "cpu", "peak_bytes"}
    anything that fails     {"kind": "failed", "sentence"}

work: `algorithm`, `way`, `widths`, `batch_size`, `num_steps` (T), `rate`, `learning_rate`, `device`,
`weights` (matrix [in, out] and bias [out] of each layer), `inputs` [B, in], `targets` [B, out].
first_batch: seconds from the arrival of a work to the end of its first training batch, with compilation.
activities, weights: after that batch, of the hidden nodes [B, units] and of the layers; None where the
contender has none to show.
cpu: milliseconds that all threads together have worked per training batch, which other programs on the
machine disturb less than the time that passes.
Arrays are {"shape", "float32": base64 of the bytes}.

An adapter is a module with `prepare(work) -> Prepared`, and `RUNTIME`, names of packages whose versions
matter.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

LEAST = 3
"""Training batches of a round, however long they take."""


@dataclass
class Prepared:
    """A work that can run. run: one training batch, awaited.

    look: (activities of the hidden nodes, [(weight, bias)] of the layers) after the last batch.
    about: what else there is to say after it, such as bytes allocated.
    """

    run: Callable[[], object]
    look: Callable[[], tuple[Sequence[Any], Sequence[Sequence[Any]]]] | None = None
    about: Callable[[], dict[str, Any]] | None = None


class Refused(Exception):
    """The peer is not there, or not the one its adapter was written for; the text is a sentence."""


def pack(array: Any) -> dict[str, Any]:
    """Of anything that NumPy takes."""
    import numpy as np

    values = np.ascontiguousarray(np.asarray(array), dtype="<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def unpack(packed: dict[str, Any]) -> Any:
    """A NumPy array of float32, in memory of its own."""
    import numpy as np

    return np.frombuffer(base64.b64decode(packed["float32"]), dtype="<f4").reshape(packed["shape"]).copy()


def arrays_of(work: dict[str, Any]) -> dict[str, Any]:
    """A work with its arrays unpacked."""
    weights = [(unpack(weight), unpack(bias)) for weight, bias in work["weights"]]
    return {
        **work,
        "weights": weights,
        "inputs": unpack(work["inputs"]),
        "targets": unpack(work["targets"]),
    }


def timed(
    run: Callable[[], object],
    seconds: float,
    least: int = LEAST,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Milliseconds of each of the training batches that begin within `seconds`, and of at least `least`."""
    samples = list[float]()
    until = clock() + seconds
    while len(samples) < least or clock() < until:
        start = clock()
        run()
        samples.append(1e3 * (clock() - start))
    return samples


def peak_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say.

    On Linux not from getrusage, whose figure begins with that of the process that started this one.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            (line,) = (line for line in file if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def keep_to(threads: int) -> None:
    """As many threads for OpenMP, BLAS and XLA, before any of them is imported: XLA takes as many as there
    are processors that it may run on.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def check(package: str | None, version: str | None) -> str | None:
    """The version of `package` here. Raises Refused where it is not the one asked for."""
    found = installed(package) if package else None
    if found != version:
        here = f"there is {found}" if found else "there is none"
        raise Refused(
            f"pctt bench was written for {package} {version}, and {here} in {sys.executable}; run: "
            f"{sys.executable} -m pip install {package}=={version}"
        )
    return found


def load(name: str) -> Any:
    """The adapter, which imports its peer."""
    try:
        return importlib.import_module(f"with_{name}")
    except ImportError as error:
        raise Refused(f"importing it in {sys.executable} fails: {error}") from None


def ready(adapter: Any, package: str | None, version: str | None) -> dict[str, Any]:
    runtime = {"python": ".".join(map(str, sys.version_info[:3]))}
    runtime.update({name: installed(name) or "?" for name in adapter.RUNTIME})
    return {"kind": "ready", "package": package, "version": version, "runtime": runtime}


def installed(package: str) -> str | None:
    """Its version, None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Worker:
    """Answers requests about the works it was given."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter
        self.works: dict[str, Prepared] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "prepare":
            return self._prepare(request["key"], request["work"])
        work = self.works[request["key"]]
        worked = time.process_time()
        samples = timed(work.run, request["seconds"])
        cpu = 1e3 * (time.process_time() - worked) / len(samples)
        return {"kind": "samples", "milliseconds": samples, "cpu": cpu, "peak_bytes": peak_bytes()}

    def _prepare(self, key: str, work: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        made = self.works[key] = self.adapter.prepare(arrays_of(work))
        made.run()
        first = time.perf_counter() - start
        activities, weights = (None, None) if made.look is None else made.look()
        about = {} if made.about is None else made.about()
        answer = {
            "kind": "prepared",
            "first_batch": first,
            "activities": None if activities is None else [pack(each) for each in activities],
            "weights": None if weights is None else [[pack(each) for each in layer] for layer in weights],
            "about": about,
        }
        made.run()  # what is compiled in the second batch only is not timed
        return answer


def serve(arguments: argparse.Namespace) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print shall not come between the answers

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        keep_to(arguments.threads)
        version = check(arguments.package, arguments.version)
        adapter = load(arguments.adapter)
        say(ready(adapter, arguments.package, version))
        worker = Worker(adapter)
        for line in sys.stdin:
            say(worker.answer(json.loads(line)))
    except Refused as error:
        say({"kind": "failed", "sentence": str(error)})
    except Exception as error:  # whatever a peer raises, the one who asked is told in one line
        text = " ".join(str(error).split())
        say({"kind": "failed", "sentence": f"{type(error).__name__}: {text[:300]}"})
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="A worker of `pctt bench`; not meant for people.")
    parser.add_argument("adapter")
    parser.add_argument("--package")
    parser.add_argument("--version")
    parser.add_argument("--threads", type=int, default=1)
    serve(parser.parse_args())


if __name__ == "__main__":
    # An adapter imports this file by name, and shall find this module and not load it once more.
    sys.modules["serve"] = sys.modules["__main__"]
    main()
