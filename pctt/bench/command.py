"""`pctt bench`: what a training batch takes, beside backpropagation, other libraries and the floor."""

from __future__ import annotations

import json as json_module
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import pctt
from pctt.bench.measuring import bench_case, bench_variants
from pctt.bench.peers import PEERS, installed_peers, peer_contenders
from pctt.bench.picture import draw_benchmark
from pctt.bench.result import Benchmark, CaseResult, Failure, Variant, variants_as_text
from pctt.bench.work import CASES, SMOKE, Settings
from pctt.folders import new_folder, whole_folder
from pctt.report import Asking, print_json, say_error
from pctt.typed import FAILED, OK, UsageError


def bench(
    *,
    peer: tuple[str, ...] = (),
    alone: bool = False,
    variants: bool = False,
    device: str | None = None,
    steps: int = 20,
    rounds: int = 9,
    seconds: float = 0.5,
    threads: int | None = None,
    limit: float = 120.0,
    smoke: bool = False,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Milliseconds per training batch, beside torch backprop, other libraries and the machine's floor.

    Args:
        peer: Other libraries to run beside pctt, as NAME=PYTHON with an interpreter that has them: pcx,
            fabricpc, ngclearn. Those that this interpreter can import are run without being named.
        alone: Run no other libraries.
        variants: Also a table of all variants of predictive coding.
        device: A CUDA device to run pctt and backprop on too, such as cuda:1, or cpu for none; else cuda
            where torch sees one.
        steps: Inference steps.
        rounds: Interleaved rounds.
        seconds: Per contender and round.
        threads: Of every contender; else as many as torch takes.
        limit: Seconds a contender may take for an answer, compilation included.
        smoke: Tiny networks and one short round, to see that all runs.
        out: Folder for bench.json and bench.svg; else runs/bench-1, -2, ...
        json: Print one JSON object instead of text.
    """
    settings = _settings(steps, rounds, seconds, threads, limit, smoke)
    devices, interpreters = _devices(device), _interpreters(peer, alone)
    folder = new_folder(out, "bench")
    try:
        with whole_folder(folder) as staging:
            asked = [text.partition("=")[0] for text in peer]
            found = _run(settings, smoke, devices, interpreters, asked, variants, json)
            _write(found, staging)
    except KeyboardInterrupt:
        say_error("interrupted; nothing was written.")
        return FAILED
    if json:
        print_json("bench", {**found.to_dict(), "folder": str(folder)})
    else:
        print(f"{folder}: bench.json, bench.svg")
    return FAILED if any(failure.asked for failure in found.failures) else OK


def _run(
    settings: Settings,
    smoke: bool,
    devices: Sequence[str],
    interpreters: dict[str, str],
    asked: Sequence[str],
    variants: bool,
    as_json: bool,
) -> Benchmark:
    cases = SMOKE if smoke else CASES
    environment = _environment(settings, devices)
    if not as_json:
        print(_heading(environment, settings), flush=True)
    results, lines, failures = list[CaseResult](), list[Variant](), list[Failure]()
    total = settings.rounds * (len(cases) * len(devices) + variants)
    with Asking(total, "bench", as_json, "round") as progress:
        for device in devices:
            for case in cases:
                failed = {failure.peer for failure in failures}
                kept = {name: each for name, each in interpreters.items() if name not in failed}
                peers = peer_contenders(kept if device == "cpu" else {}, asked, case.algorithm)
                result, new = bench_case(case, settings, peers, device, lambda: progress.update(1))
                for failure in new:
                    say_error(failure.sentence)
                results.append(result)
                failures += new
                if not as_json:
                    progress.say("\n" + result.as_text())
        if variants:
            lines = bench_variants(cases[0], settings, devices[0], lambda: progress.update(1))
            if not as_json:
                progress.say("\n" + variants_as_text(results[0].title, lines))
    environment["load_after"] = _load()
    return Benchmark(environment, asdict(settings), tuple(results), tuple(lines), tuple(failures))


# --- what was asked -----------------------------------------------------------------------------------------


def _settings(
    steps: int, rounds: int, seconds: float, threads: int | None, limit: float, smoke: bool
) -> Settings:
    threads = torch.get_num_threads() if threads is None else threads
    for name, value in (("steps", steps), ("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}.")
    for name, value in (("seconds", seconds), ("limit", limit)):
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name} must be above 0, got {value:g}.")
    if threads > _processors():
        raise UsageError(f"--threads must be at most {_processors()}, the processors here, got {threads}.")
    deepest = max(len(case.widths) - 1 for case in (SMOKE if smoke else CASES))
    if steps < deepest:  # what no error reaches has no gradient, and numbers that could be compared
        raise UsageError(
            f"--steps must be at least {deepest}, the layers of the deepest network, got {steps}."
        )
    if smoke:
        steps, rounds, seconds = min(steps, 4), 1, min(seconds, 0.01)
    return Settings(steps, rounds=rounds, seconds=seconds, threads=threads, limit=limit)


def _devices(device: str | None) -> list[str]:
    if device is None:
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    try:
        known = torch.device(device)
    except RuntimeError:
        known = None
    if known is None or known.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {device!r}.")
    if known.type == "cpu":
        return ["cpu"]
    if not torch.cuda.is_available() or (known.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"torch sees no device {device!r}; use --device cpu, or install a CUDA torch.")
    return ["cpu", str(known)]


def _interpreters(peer: tuple[str, ...], alone: bool) -> dict[str, str]:
    if alone and peer:
        raise UsageError("--alone runs no peers and --peer names some; drop one of the two.")
    found = {} if alone else installed_peers()
    for text in peer:
        name, _, path = text.partition("=")
        if name not in PEERS or not path:
            raise UsageError(
                f"--peer takes NAME=PYTHON, NAME one of {', '.join(PEERS)} and PYTHON an interpreter that "
                f"has it, got {text!r}."
            )
        found[name] = os.path.expanduser(path)  # a shell leaves the ~ of NAME=~/...
    return found


# --- where it ran -------------------------------------------------------------------------------------------


def _environment(settings: Settings, devices: Sequence[str]) -> dict[str, Any]:
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pctt": pctt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "processors": _processors(),
        "threads": settings.threads,
        "load_before": _load(),
    }
    gpus = {device: torch.cuda.get_device_name(device) for device in devices if device != "cpu"}
    return {**found, "gpus": gpus} if gpus else found


def _heading(environment: dict[str, Any], settings: Settings) -> str:
    threads = settings.threads
    places = ", ".join([environment["processor"], *environment.get("gpus", {}).values()])
    return (
        f"{places}; {threads} thread{'s' * (threads > 1)}, torch {environment['torch']}, "
        f"{environment['date'][:10]}\nT={settings.num_steps}, tanh, Adam, float32; ms per training batch, "
        f"median of {settings.rounds} interleaved rounds"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load() -> list[float] | None:
    """Programs that ran or waited, over 1, 5 and 15 minutes."""
    try:
        return [round(each, 2) for each in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _write(found: Benchmark, folder: Path) -> None:
    (folder / "bench.json").write_text(json_module.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    try:
        draw_benchmark(found, folder / "bench.svg")
    except ImportError as error:
        say_error(f"no picture of the benchmark: {error}")
