"""One training step of a network on a card backend, beside the reference in fp64.

    python tools/one_step.py digits --backend emulated
    python tools/one_step.py mnist --data-dir DIR --backend tenstorrent --batch-size 32

Takes a preset or a TOML file as `pctt train` does, relaxes the first batch of its training data, learns once,
and prints what differs: the energy of each layer and its gradients, as the norm of the difference over the
norm. Exit code 1 where a gradient is off by more than --limit.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import pctt
from pctt.config import RunConfig, read_toml
from pctt.data import load
from pctt.network import Network, Weights
from pctt.presets import PRESETS


def step(
    config: RunConfig, net: Network, batch: dict[str, torch.Tensor], backend: str, dtype: torch.dtype
) -> tuple[pctt.Engine, list[float], Weights]:
    """The engine after one training step, its energies per layer, and its gradients in fp64."""
    weights = cast(pctt.init(net, config.training.seed, config.init.scheme, config.init.gain), dtype)
    engine = pctt.Engine(
        net,
        weights,
        config.inference,
        ("input", net.output),
        learning=config.learning,
        backend=backend,
        batch_size=len(batch["input"]),
    )
    started = time.perf_counter()
    relaxation = engine.relax({name: values.to(dtype) for name, values in batch.items()})
    engine.compute_gradients()
    gradients = cast(engine.gradients(), torch.float64)
    engine.update(config.learning.rate, 1)
    engine.backend.synchronise()
    seconds = time.perf_counter() - started
    print(f"{backend}: {relaxation.status.value}; {seconds:.1f} s, compilation included")
    return engine, relaxation.energies, gradients


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: {key: values.to(dtype) for key, values in tree.items()} for name, tree in weights.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network", help=f"{', '.join(PRESETS)} or a TOML file")
    parser.add_argument("--backend", choices=("emulated", "tenstorrent"), default="emulated")
    parser.add_argument("--data-dir")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=float, default=0.01)
    options = parser.parse_args(arguments)
    name = options.network
    config = PRESETS[name]() if name in PRESETS else read_toml(Path(name))
    train = load(config.data.name, options.data_dir).train
    net = config.network(train.inputs.shape[1])
    labels = train.labels[: options.batch_size]
    targets = torch.nn.functional.one_hot(labels, net.widths[-1])
    batch = {"input": train.inputs[: options.batch_size], net.output: targets}
    _, expected_energies, expected = step(config, net, batch, "reference", torch.float64)
    engine, energies, found = step(config, net, batch, options.backend, torch.float32)

    print(f"{'-'.join(map(str, net.widths))}, B = {len(labels)}, T = {config.inference.num_steps}")
    apart = [net.names[layer - 1] for layer in sorted(engine.layout.apart)]
    print(f"spread over all cores: {', '.join(apart) or 'no layer'}\n")
    print("| Layer | Energy, fp64 | off by | Norm of dF/dW, fp64 | off by | dF/db off by |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for layer, exact, energy in zip(net.names, expected_energies, energies, strict=True):
        off = {
            key: float((found[layer][key] - value).norm() / value.norm())
            for key, value in expected[layer].items()
        }
        worst = max(worst, *off.values())
        norm = float(expected[layer]["weight"].norm())
        bias = f"{off['bias']:.2%}" if "bias" in off else "none"
        relative = abs(energy - exact) / abs(exact)
        print(f"| {layer} | {exact:.4g} | {relative:.2%} | {norm:.3g} | {off['weight']:.2%} | {bias} |")
    return int(worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
