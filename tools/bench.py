"""Milliseconds per training batch: predictive coding, backpropagation in plain torch, and the floor.

Contenders run in turn, round after round, so that what disturbs the machine disturbs all of them; the table
shows the median over rounds of each round's median. The floor is the time that the matrix products of a
training step would take at the rate of a large square product measured in the same rounds. For ratios look
along a line, never between runs. A second table has a line per variant of `pctt.variants`, on the first
network, run in turn with plain predictive coding.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

import pctt
from pctt.variants import VARIANTS


@dataclass(frozen=True)
class Case:
    """One network and batch size. widths: units of node 0 to L."""

    name: str
    widths: tuple[int, ...]
    batch_size: int


CASES = (
    Case("784-256-256-10", (784, 256, 256, 10), 64),
    Case("784-256-256-10", (784, 256, 256, 10), 256),
    Case("784-128x9-10", (784, *[128] * 9, 10), 64),
)
GEMM_SIZE = 1024


def predictive_coding(
    case: Case, num_steps: int, variant: str = "pc"
) -> tuple[Callable[[], None], pctt.Engine]:
    """One training step of pctt: T inference steps at rate 0.1, gradients, Adam."""
    layers = [pctt.Dense(units, "tanh") for units in case.widths[1:-1]] + [pctt.Dense(case.widths[-1])]
    net = pctt.chain(case.widths[0], layers)
    inference = pctt.variant(variant, pctt.Inference(num_steps=num_steps, rate=0.1))
    clamped = ("input", net.output)
    engine = pctt.Engine(net, pctt.init(net), inference, clamped, learning=pctt.Adam(1e-3))
    inputs, targets = batch(case)
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        engine.set_learning(1e-6, step)  # so small that no variant diverges, however often it is run
        engine.relax({"input": inputs, net.output: targets})
        engine.learn(1e-6, step)

    return run, engine


def backpropagation(case: Case) -> Callable[[], None]:
    """The same network, loss and optimiser as a torch user writes them."""
    modules: list[nn.Module] = []
    for fan_in, fan_out in zip(case.widths[:-1], case.widths[1:], strict=True):
        modules += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    model = nn.Sequential(*modules[:-1])
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    inputs, targets = batch(case)

    def run() -> None:
        optimiser.zero_grad()
        loss = (targets - model(inputs)).square().sum() / (2 * case.batch_size)
        loss.backward()
        optimiser.step()

    return run


def batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(case.batch_size, case.widths[0], generator=generator)
    labels = torch.randint(0, case.widths[-1], (case.batch_size,), generator=generator)
    return inputs, nn.functional.one_hot(labels, case.widths[-1]).float()


def gemm() -> Callable[[], None]:
    a, b = torch.rand(GEMM_SIZE, GEMM_SIZE), torch.rand(GEMM_SIZE, GEMM_SIZE)
    out = torch.empty(GEMM_SIZE, GEMM_SIZE)

    def run() -> None:
        torch.mm(a, b, out=out)

    return run


def measure(contenders: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Per contender the median milliseconds of every round; each round gives each contender `seconds`."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            samples: list[float] = []
            until = time.perf_counter() + seconds
            while time.perf_counter() < until or len(samples) < 3:
                start = time.perf_counter()
                run()
                samples.append(1e3 * (time.perf_counter() - start))
            times[name].append(median(samples))
    return times


def bench(case: Case, num_steps: int, rounds: int, seconds: float) -> dict[str, Any]:
    """All figures of one case; milliseconds are per training batch."""
    run, engine = predictive_coding(case, num_steps)
    contenders = {"pctt": run, "backprop": backpropagation(case), "gemm": gemm()}
    times = measure(contenders, rounds, seconds)
    gemm_rate = 2 * GEMM_SIZE**3 / (1e-3 * median(times["gemm"]))
    flops = engine.program.flops(case.batch_size)
    floor = 1e3 * flops / gemm_rate
    pctt_ms = median(times["pctt"])
    sizes = engine.bytes_allocated()
    needed = weights_and_state(engine, case)
    return {
        "network": case.name,
        "batch_size": case.batch_size,
        "num_steps": num_steps,
        "pctt_ms": pctt_ms,
        "pctt_ms_range": [min(times["pctt"]), max(times["pctt"])],
        "backprop_ms": median(times["backprop"]),
        "backprop_ms_range": [min(times["backprop"]), max(times["backprop"])],
        "mflop": flops / 1e6,
        "gemm_gflops": gemm_rate / 1e9,
        "floor_ms": floor,
        "pctt_over_floor": pctt_ms / floor,
        "pctt_over_backprop": pctt_ms / median(times["backprop"]),
        "bytes": sum(sizes.values()),
        "bytes_over_needed": sum(sizes.values()) / needed,
    }


def bench_variants(case: Case, num_steps: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A line per variant: milliseconds per training batch, and products, beside those of plain PC."""
    made = {name: predictive_coding(case, num_steps, name) for name in VARIANTS}
    times = measure({name: run for name, (run, _) in made.items()}, rounds, seconds)
    flops = {name: engine.program.flops(case.batch_size) for name, (_, engine) in made.items()}
    return [
        {
            "variant": name,
            "network": case.name,
            "batch_size": case.batch_size,
            "num_steps": made[name][1].program.num_steps,
            "ms": median(times[name]),
            "over_pc": median(a / b for a, b in zip(times[name], times["pc"], strict=True)),
            "flops_over_pc": flops[name] / flops["pc"],
        }
        for name in VARIANTS
    ]


def weights_and_state(engine: pctt.Engine, case: Case) -> int:
    """Bytes nobody can do without: weights, Adam's moments, activity, prediction and error of every node."""
    moments = 2 * engine.net.num_weights()
    return 4 * (engine.net.num_weights() + moments + 3 * case.batch_size * sum(case.widths))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="inference steps T (default 20)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--seconds", type=float, default=0.5, help="per contender and round (default 0.5)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.json:
        print(
            f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}; T={arguments.steps}, tanh, Adam, float32; ms per training batch, "
            f"median of {arguments.rounds} interleaved rounds [least, most]"
        )
        print(
            f"{'network':<16}{'B':>4}  {'pctt':>22}  {'torch backprop':>22}  {'floor':>6}  {'/floor':>6}  "
            f"{'/backprop':>9}  {'GFLOP/s':>7}  {'memory/needed':>13}"
        )
    for case in CASES:
        figures = bench(case, arguments.steps, arguments.rounds, arguments.seconds)
        if arguments.json:
            print(json.dumps(figures), flush=True)
            continue
        spans = []
        for name in ("pctt", "backprop"):
            least, most = figures[f"{name}_ms_range"]
            spans.append(f"{figures[f'{name}_ms']:.2f} [{least:.2f}, {most:.2f}]")
        columns = [
            f"{case.name:<16}{case.batch_size:>4}",
            *(f"{span:>22}" for span in spans),
            f"{figures['floor_ms']:>6.2f}",
            f"{figures['pctt_over_floor']:>6.2f}",
            f"{figures['pctt_over_backprop']:>9.2f}",
            f"{figures['gemm_gflops']:>7.0f}",
            f"{figures['bytes_over_needed']:>13.2f}",
        ]
        print("  ".join(columns), flush=True)
    case = CASES[0]
    lines = bench_variants(case, arguments.steps, arguments.rounds, arguments.seconds / 2)
    if not arguments.json:
        print(f"\n{case.name}, B={case.batch_size}: variants, run in turn")
        print(f"{'variant':<14}{'T':>4}{'ms':>9}{'/pc':>8}{'products/pc':>13}")
    for line in lines:
        if arguments.json:
            print(json.dumps(line), flush=True)
        else:
            print(
                f"{line['variant']:<14}{line['num_steps']:>4}{line['ms']:>9.2f}{line['over_pc']:>8.2f}"
                f"{line['flops_over_pc']:>13.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
