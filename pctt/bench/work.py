"""The work that contenders share: networks, a batch, initial weights, and the products it takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

import pctt
from pctt.bench.workers.serve import pack
from pctt.profile.measuring import MATRIX

MATRIX_ON_A_GPU = 4096
"""Rows and columns of its square product: a smaller one takes no longer than its launch."""
BACKPROP, GEMM = "backprop", "gemm"
RATES = {"pc": 1e-3, "ipc": 1e-5, BACKPROP: 1e-3}
"""Learning rates. That of incremental predictive coding is smaller as every batch takes T learning steps."""
RATE_OF_VARIANTS = 1e-6
"""So small that none diverges, however often it is run."""


@dataclass(frozen=True)
class Case:
    """One network, batch size and algorithm. widths: units of node 0 to L.    algorithm: pc or ipc."""

    widths: tuple[int, ...]
    batch_size: int
    algorithm: str = "pc"

    @property
    def network(self) -> str:
        """The widths, three and more equal ones as 128x9."""
        runs = [(width, len(list(group))) for width, group in groupby(self.widths)]
        parts = [f"{width}x{n}" if n > 2 else "-".join([str(width)] * n) for width, n in runs]
        return "-".join(parts)


CASES = (
    Case((784, 256, 256, 10), 64),
    Case((784, 256, 256, 10), 256),
    Case((784, *[128] * 9, 10), 64),
    Case((784, 256, 256, 10), 64, "ipc"),
)
SMOKE = (Case((12, 8, 8, 4), 8), Case((12, 8, 8, 4), 8, "ipc"))


@dataclass(frozen=True)
class Settings:
    """num_steps: T.    rate: of inference.    rounds, seconds: per contender and round.    threads: of each.
    limit: seconds a contender may take for an answer beyond its round.
    """

    num_steps: int = 20
    rate: float = 0.1
    rounds: int = 9
    seconds: float = 0.5
    threads: int = 1
    limit: float = 120.0


def network(widths: tuple[int, ...], activate: str = "output") -> pctt.Network:
    """tanh in hidden layers. activate: "output" for mu = tanh(x W + b), "input" for mu = tanh(x) W + b, where
    the input itself is taken as it is.
    """
    if activate == "output":
        layers = [pctt.Dense(units, "tanh") for units in widths[1:-1]] + [pctt.Dense(widths[-1])]
    else:
        layers = [pctt.Dense(widths[1])]
        layers += [pctt.Dense(units, "tanh", activate="input") for units in widths[2:]]
    return pctt.chain(widths[0], layers)


def inference(algorithm: str, settings: Settings) -> pctt.Inference:
    """algorithm: a name of `pctt.VARIANTS`."""
    return pctt.variant(algorithm, pctt.Inference(num_steps=settings.num_steps, rate=settings.rate))


@dataclass(frozen=True)
class Problem:
    """weights: (matrix [in, out], bias [out]) of each layer.    inputs: [B, in].    targets: [B, out]."""

    weights: list[tuple[Tensor, Tensor]]
    inputs: Tensor
    targets: Tensor


def problem(case: Case) -> Problem:
    """Random pixels and classes; all contenders begin at the same float32 numbers."""
    drawn = pctt.init(network(case.widths), seed=0)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(case.batch_size, case.widths[0], generator=generator)
    labels = torch.randint(0, case.widths[-1], (case.batch_size,), generator=generator)
    targets = nn.functional.one_hot(labels, case.widths[-1]).float()
    return Problem([(each["weight"], each["bias"]) for each in drawn.values()], inputs, targets)


def engine(
    problem: Problem,
    widths: tuple[int, ...],
    inference: pctt.Inference,
    activate: str = "output",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> pctt.Engine:
    net = network(widths, activate)
    weights: dict[str, dict[str, Tensor]] = {
        name: {"weight": weight.to(dtype), "bias": bias.to(dtype)}
        for name, (weight, bias) in zip(net.names, problem.weights, strict=True)
    }
    ends = ("input", net.output)
    return pctt.Engine(net, weights, inference, ends, learning=pctt.Adam(1e-3), device=device)


def relax(engine: pctt.Engine, problem: Problem, learning_rate: float, step: int) -> None:
    """Its inference, within which incremental predictive coding also learns."""
    engine.set_learning(learning_rate, step)
    engine.relax({"input": problem.inputs, engine.net.output: problem.targets})


def train(engine: pctt.Engine, problem: Problem, learning_rate: float, step: int) -> None:
    """One training batch: inference, gradients, Adam."""
    relax(engine, problem, learning_rate, step)
    engine.learn(learning_rate, step)


def flops(case: Case, algorithm: str, settings: Settings) -> int:
    """Of the products of one training batch that must be done, two per multiply-add."""
    layers = [2 * case.batch_size * fan_in * fan_out for fan_in, fan_out in pairwise(case.widths)]
    if algorithm == BACKPROP:  # forward, weight gradients, and errors down to the first hidden layer
        return 3 * sum(layers) - layers[0]
    made = engine(problem(case), case.widths, inference(algorithm, settings))
    return made.program.flops(case.batch_size)


def gemm_size(device: str) -> int:
    return MATRIX if torch.device(device).type == "cpu" else MATRIX_ON_A_GPU


def bytes_needed(case: Case) -> int:
    """That nobody can do without: weights, Adam's moments, activity, prediction and error of every node."""
    weights = sum(fan_in * fan_out + fan_out for fan_in, fan_out in pairwise(case.widths))
    return 4 * (3 * weights + 3 * case.batch_size * sum(case.widths))


def message(
    case: Case, problem: Problem, settings: Settings, algorithm: str, rate: float, device: str, way: str = ""
) -> dict[str, Any]:
    """A work as `workers/serve.py` describes it. rate: of learning.    way: of those an adapter knows."""
    return {
        "algorithm": algorithm,
        "way": way,
        "widths": list(case.widths),
        "batch_size": case.batch_size,
        "num_steps": settings.num_steps,
        "rate": settings.rate,
        "learning_rate": rate,
        "device": device,
        "weights": [[pack(weight), pack(bias)] for weight, bias in problem.weights],
        "inputs": pack(problem.inputs),
        "targets": pack(problem.targets),
    }


def gemm_message(device: str) -> dict[str, Any]:
    """The work of a square product: its size stands where a batch size does."""
    size, nothing = gemm_size(device), pack(torch.zeros(0))
    given = {"algorithm": GEMM, "batch_size": size, "device": device, "weights": []}
    return {**given, "inputs": nothing, "targets": nothing}
