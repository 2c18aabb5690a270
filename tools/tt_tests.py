"""Runs the tests that need ttnn: on mock cards, and on every simulator and card that is here.

    python tools/tt_tests.py                  with the Python that has ttnn; `make test-tt` does this
    python tools/tt_tests.py --list           only says what would run
    python tools/tt_tests.py --find-python    prints a Python that ttnn has wheels for, ends with 1 if none
    python tools/tt_tests.py --only blackhole
    python tools/tt_tests.py -- -k matmul     what follows -- is handed to pytest

tests/mock needs nothing but ttnn. tests/device runs on a card if /dev/tenstorrent has one, and on simulators:
the one TT_METAL_SIMULATOR names, or else wormhole/libttsim.so and blackhole/libttsim.so in the folder sim
beside the compiler, /opt/tenstorrent/sfpi. A simulated Wormhole runs twice, in fast dispatch only what is
marked fast_dispatch; a simulated Blackhole once. tests/mesh runs on cards, if ttnn sees two chips or more,
and on two simulated Blackholes, blackhole_x2/libttsim.so, which is the simulator's build bh_x2. What the runs
leave is in build/tt: kernels, which later runs use again, output and results. Ends with 1 if a run fails;
what was skipped is listed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "tt"
COMPILER = Path("/opt/tenstorrent/sfpi")  # where ttnn looks for it

PYTHONS = ("3.12", "3.10")
"""Versions that ttnn has wheels for, the preferred one first."""

DESCRIPTIONS = {
    "blackhole_x2": "blackhole_140_arch.yaml",
    "wormhole": "wormhole_b0_80_arch.yaml",
    "blackhole": "blackhole_140_arch.yaml",
}
"""Per simulated chip, or two, the file, of ttnn's soc_descriptors, that ttnn wants beside the simulator."""


@dataclass(frozen=True)
class Run:
    """One run of pytest. set: variables of its own.    unset: beginnings of those it must not see."""

    name: str
    arguments: tuple[str, ...]
    set: dict[str, str] = field(default_factory=dict[str, str])
    unset: tuple[str, ...] = ("TT_", "TTNN_")

    @property
    def folder(self) -> Path:
        return OUTPUT / self.name.replace(", ", "-").replace(" ", "-")

    def environment(self) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if not key.startswith(self.unset)}
        logs = {"TT_METAL_LOGS_PATH": str(self.folder), "TT_METAL_LOGGER_LEVEL": "FATAL"}
        return {**logs, **own, **self.set}


@dataclass(frozen=True)
class Outcome:
    """passed: None if it was not run.    skipped: (reason, test) each."""

    run: Run
    passed: bool | None
    summary: str
    skipped: tuple[tuple[str, str], ...] = ()


# --- what is here -------------------------------------------------------------------------------------------


def find_python() -> str | None:
    """A Python that ttnn has wheels for and that can make an environment, as a path, or None."""
    question = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    for version in PYTHONS:
        pyenv = {**os.environ, "PYENV_VERSION": version}  # else its python3.12 may only say what it has
        for command, environment in (
            (sys.executable, None),
            (f"python{version}", None),
            (f"python{version}", pyenv),
        ):
            try:
                answer = subprocess.run(
                    [command, "-c", question], capture_output=True, text=True, env=environment
                )
            except OSError:
                continue
            found, _, path = answer.stdout.strip().partition(" ")
            if answer.returncode == 0 and found == version:
                return path
    return None


def find_simulators() -> dict[str, Path]:
    """{chip: libttsim.so}. Raises ValueError where TT_METAL_SIMULATOR names a file of an unknown chip."""
    named = os.environ.get("TT_METAL_SIMULATOR")
    if not named:
        places = {chip: COMPILER / "sim" / chip / "libttsim.so" for chip in DESCRIPTIONS}
        return {chip: path for chip, path in places.items() if path.exists()}
    path = Path(named).resolve()
    beside = path.parent / "soc_descriptor.yaml"
    hints = str(path) + (beside.read_text(encoding="utf-8") if beside.exists() else "")
    for chip in DESCRIPTIONS:
        if chip in hints.lower():
            return {chip: path}
    raise ValueError(
        f"TT_METAL_SIMULATOR={named}: its path does not say which chip it simulates; put it into a folder "
        f"called {' or '.join(DESCRIPTIONS)}."
    )


def simulated(chip: str, simulator: Path, dispatch: str, *arguments: str) -> Run:
    """The tests on a simulated `chip`, slow or fast dispatch."""
    name = f"simulated {chip}, {dispatch} dispatch"
    folder = Run(name, ()).folder
    variables = {
        "TT_METAL_SIMULATOR": str(folder / simulator.name),
        # ttnn takes a kernel from its cache whatever compiler and settings made it.
        "TT_METAL_CACHE": str(folder / "cache"),
        "TT_METAL_DISABLE_SFPLOADMACRO": "1",  # an instruction that the simulator has not
    }
    if dispatch == "slow":
        variables["TT_METAL_SLOW_DISPATCH_MODE"] = "1"
    return Run(name, ("tests/mesh" if chip == "blackhole_x2" else "tests/device", *arguments), variables)


def link_simulator(folder: Path, chip: str, simulator: Path, ttnn: Path) -> None:
    """Puts the simulator and its chip's description side by side into `folder`, as links."""
    folder.mkdir(parents=True, exist_ok=True)
    description = ttnn / "tt_metal" / "soc_descriptors" / DESCRIPTIONS[chip]
    for name, target in ((simulator.name, simulator), ("soc_descriptor.yaml", description)):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def find_runs(ttnn: Path) -> tuple[list[Run], list[str]]:
    """What can run here, and what not: one line each, with what it takes."""
    runs = [Run("mock cards", ("tests/mock", "-n", "2", "--dist", "loadgroup"))]
    absent: list[str] = []
    if any(Path("/dev/tenstorrent").glob("*")):
        instead = ("TT_METAL_SIMULATOR", "TT_METAL_MOCK", "TT_METAL_SLOW_DISPATCH_MODE")
        runs.append(Run("card", ("tests/device",), unset=instead))
        runs.append(Run("mesh of cards", ("tests/mesh",), unset=instead))
    else:
        absent.append("card: /dev/tenstorrent is empty")
    simulators = find_simulators()
    for chip in DESCRIPTIONS:
        if chip not in simulators:
            absent.append(f"simulated {chip}: no {COMPILER}/sim/{chip}/libttsim.so, TT_METAL_SIMULATOR unset")
            continue
        here = [simulated(chip, simulators[chip], "slow")]
        if chip == "wormhole":
            here.append(simulated(chip, simulators[chip], "fast", "-m", "fast_dispatch"))
        for run in here:
            link_simulator(run.folder, chip, simulators[chip], ttnn)
        runs += here
    return runs, absent


# --- running ------------------------------------------------------------------------------------------------


_going: set[subprocess.Popen[bytes]] = set()


def stop(process: subprocess.Popen[bytes]) -> None:
    """With the processes that it has started: a simulator that hangs does not end by itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def perform(run: Run, arguments: Sequence[str], deadline: float) -> Outcome:
    """Runs one; it is stopped, and has then failed, at the deadline (of time.monotonic)."""
    left = deadline - time.monotonic()
    if left <= 0:
        return Outcome(run, None, "not started: no time was left")
    run.folder.mkdir(parents=True, exist_ok=True)
    output, results = run.folder / "output.txt", run.folder / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *run.arguments, f"--junitxml={results}", *arguments]
    print(f"running   {run.name}: {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=run.environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be stopped with it
        )
        _going.add(process)
        try:
            status: int | None = process.wait(left)
        except subprocess.TimeoutExpired:
            status = None
            stop(process)
        _going.remove(process)
    text = output.read_text(encoding="utf-8", errors="replace")
    print(f"\n--- {run.name} ---\n{text}", flush=True)
    minutes = (time.monotonic() - started) / 60
    ending = "stopped at the time limit" if status is None else f"exit status {status}"
    summary = f"{ending} after {minutes:.1f} min, {counts(results)}"
    return Outcome(run, status == 0, summary, tuple(skipped(results)))


def counts(results: Path) -> str:
    """How many tests passed, failed and were skipped, of a JUnit file that may be missing."""
    if not results.exists():
        return "no results"
    kinds: Counter[str] = Counter()
    for test in ElementTree.parse(results).iter("testcase"):
        children = {child.tag for child in test}
        kinds[next((kind for kind in ("failure", "error", "skipped") if kind in children), "passed")] += 1
    names = {"passed": "passed", "failure": "failed", "error": "with an error", "skipped": "skipped"}
    return ", ".join(f"{kinds[kind]} {name}" for kind, name in names.items() if kinds[kind]) or "no tests"


def skipped(results: Path) -> Iterable[tuple[str, str]]:
    """(reason, test) of every skipped test; the test without its parameters."""
    if not results.exists():
        return
    for test in ElementTree.parse(results).iter("testcase"):
        mark = test.find("skipped")
        if mark is not None:
            name = f"{test.get('classname', '')}.{test.get('name', '').partition('[')[0]}"
            yield mark.get("message", "no reason given"), name


def report(outcomes: Sequence[Outcome], absent: Sequence[str]) -> None:
    print("\n--- summary ---")
    words = {True: "passed", False: "FAILED", None: "not run"}
    for outcome in outcomes:
        print(f"{words[outcome.passed]:9} {outcome.run.name}: {outcome.summary}")
    for line in absent:
        print(f"not here  {line}")
    for outcome in outcomes:
        for reason, number in Counter(reason for reason, _ in outcome.skipped).items():
            print(f"skipped   {outcome.run.name}: {number} because {reason}")
            names = Counter(name for other, name in outcome.skipped if other == reason)
            for name, times in names.items():
                print(f"            {name}{f' ({times} cases)' if times > 1 else ''}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--find-python", action="store_true", help="print a Python that ttnn has wheels for")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--only", metavar="WORDS", default="", help="the runs with this in their name")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all runs together (default 60)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each taking a core (default 1)")
    parser.add_argument("pytest", nargs="*", help="after --: arguments for pytest")
    options = parser.parse_args(argv)
    if options.find_python:
        python = find_python()
        if python is None:
            print(f"no Python {' or '.join(PYTHONS)} here, and ttnn has wheels for no other", file=sys.stderr)
            return 1
        print(python)
        return 0
    spec = importlib.util.find_spec("ttnn")
    if spec is None or not spec.submodule_search_locations:
        print(
            f"{sys.executable} has no ttnn: run `make test-tt`, which makes a Python that has.",
            file=sys.stderr,
        )
        return 2
    try:
        runs, absent = find_runs(Path(spec.submodule_search_locations[0]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for line in (*(f"found     {run.name}" for run in runs), *(f"not here  {line}" for line in absent)):
        print(line, flush=True)
    runs = [run for run in runs if options.only in run.name]
    if not runs:
        print(f"no run has {options.only!r} in its name.", file=sys.stderr)
        return 2
    if options.list:
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    pool = ThreadPoolExecutor(options.jobs)
    try:
        outcomes = list(pool.map(lambda run: perform(run, options.pytest, deadline), runs))
    except (KeyboardInterrupt, SystemExit):
        pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(_going):
            stop(process)
        raise
    report(outcomes, absent)
    return int(any(outcome.passed is False for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
