"""Relative error of every layer's weight gradient, per precision policy, against the reference in fp64.

A chain of layers of 64 units between 64 inputs and 10 outputs relaxes 32 digits, and the gradients that its
local rules then give are compared with those of the same network in fp64. What is shown is the norm of the
difference over the norm, layer by layer from the input. Prints Markdown, for docs/numerics.md.

    python tools/precision_table.py                                     # the emulated card
    python tools/precision_table.py --backend tenstorrent --depths 10   # what ttnn opens
"""

from __future__ import annotations

import argparse
import sys

import torch

import pctt
from pctt.backends.precision import POLICIES, PrecisionPolicy
from pctt.data import load
from pctt.network import Network, Weights

WIDTH, BATCH, RATE = 64, 32, 0.1
LIMIT = 0.01
"""What the default policy must hold in every layer."""


def network(depth: int, placement: str) -> Network:
    """`depth` layers with tanh; at the output the last one is linear."""
    hidden = [pctt.Dense(WIDTH, "tanh", activate=placement) for _ in range(depth - 1)]
    last = "tanh" if placement == "input" else "identity"
    return pctt.chain(input=WIDTH, layers=[*hidden, pctt.Dense(10, last, activate=placement)])


def gradients(
    net: Network, num_steps: int, seed: int, backend: str, dtype: torch.dtype, policy: PrecisionPolicy | None
) -> list[torch.Tensor]:
    """dF/dW of the batch mean for each layer, fp64."""
    digits = load("digits").train
    inputs, targets = digits.inputs[:BATCH].to(dtype), torch.eye(10, dtype=dtype)[digits.labels[:BATCH]]
    weights: Weights = {
        name: {key: values.to(dtype) for key, values in layer.items()}
        for name, layer in pctt.init(net, seed=seed).items()
    }
    inference = pctt.Inference(num_steps=num_steps, rate=RATE)
    engine = pctt.Engine(net, weights, inference, ("input", net.output), backend=backend, precision=policy)
    relaxation = engine.relax({"input": inputs, net.output: targets})
    assert relaxation.status.ok, relaxation.status
    engine.compute_gradients()
    return [layer["weight"].double() for layer in engine.gradients().values()]


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def table(
    depth: int, num_steps: int, seed: int, backend: str, policies: list[str], placement: str
) -> tuple[list[str], float]:
    """The lines of one table, and the largest error of the default policy."""
    net = network(depth, placement)
    exact = gradients(net, num_steps, seed, "reference", torch.float64, None)
    single = gradients(net, num_steps, seed, "reference", torch.float32, None)
    layers = range(1, depth + 1)
    lines = [
        f"{depth} layers, T = {num_steps}, tanh at the {placement}, seed {seed}, {backend}, in percent:",
        "",
        "| Policy | " + " | ".join(map(str, layers)) + " |",
        "|---" * (depth + 1) + "|",
        _row("norm of the gradient", [f"{gradient.norm().item():.0e}" for gradient in exact]),
        _row("reference, fp32", [f"{100 * error:.2g}" for error in errors(single, exact)]),
    ]
    worst = 0.0
    for name in policies:
        policy = POLICIES[name]
        found = errors(gradients(net, num_steps, seed, backend, torch.float32, policy), exact)
        lines.append(_row(name, [f"{100 * error:.2g}" for error in found]))
        if policy == PrecisionPolicy():
            worst = max(worst, *found)
    return lines, worst


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("emulated", "tenstorrent"), default="emulated")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 16])
    parser.add_argument("--num-steps", type=int, default=20, help="at least the depth (default 20)")
    parser.add_argument("--policies", nargs="+", choices=tuple(POLICIES), default=list(POLICIES))
    parser.add_argument("--placement", choices=("input", "output"), default="input")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.num_steps < max(options.depths):
        parser.error("--num-steps must be at least the depth, or no error has reached the first layer.")
    torch.set_num_threads(1)
    worst = 0.0
    for depth in options.depths:
        lines, largest = table(
            depth, options.num_steps, options.seed, options.backend, options.policies, options.placement
        )
        print("\n".join(lines) + "\n", flush=True)
        worst = max(worst, largest)
    if worst > LIMIT:
        print(f"The default policy is off by {worst:.1%} somewhere, above {LIMIT:.0%}.", file=sys.stderr)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
