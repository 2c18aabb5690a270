"""One network that classifies bottom-up and generates top-down: bidirectional predictive coding on digits.

Trains 64-128-128-10 with a chain down, for several weights of the chain down, and prints the test accuracy of
the sweep up and how far the images that the sweep down makes of the ten classes are from the classes' mean
images. One row of the picture shows the mean images, one those generated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import pctt
from pctt.data import load

WEIGHTS = (1.0, 0.1, 0.01)


def network(weight: float) -> pctt.Network:
    """weight: precision of the predictions from above; those from below have 1."""

    def down(units: int, activation: str = "gelu") -> pctt.Dense:
        return pctt.Dense(units, activation, energy=pctt.Gaussian(weight))

    up = [pctt.Dense(128, "gelu"), pctt.Dense(128, "gelu"), pctt.Dense(10)]
    return pctt.chain(64, up, backward=[down(128), down(128), down(64, "identity")])


def train(weight: float, epochs: int, seed: int) -> tuple[float, Tensor]:
    """(test accuracy of the last epoch, images generated from the classes, [10, 64])."""
    digits, net = load("digits"), network(weight)
    learning = pctt.Adam(1e-3, schedule=pctt.WarmupCosine())
    weights = pctt.init(net, seed, "kaiming")
    trainer = pctt.Trainer(net, pctt.Inference(8, 0.05), learning, weights=weights, seed=seed, batch_size=32)
    result = trainer.fit(digits.train, epochs)
    if not result.status.ok or net.backward is None:
        raise SystemExit(f"training failed: {result.message}")
    down = {name: trainer.weights[name] for name in net.backward.names}
    sweep = pctt.infer(net.backward, down, {"input": torch.eye(10)}, pctt.Inference(num_steps=0))
    return trainer.evaluate(digits.test), sweep.activities[net.backward.output]


def draw(rows: dict[str, Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 10, figsize=(8, 0.95 * len(rows)))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.view(8, 8), cmap="gray_r", vmin=0.0, vmax=1.0)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=80, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="a .png to draw the images into")
    options = parser.parse_args()
    train_split = load("digits").train
    means = torch.stack([train_split.inputs[train_split.labels == k].mean(0) for k in range(10)])
    blank = float((means - means.mean(0)).norm() / means.norm())
    rows = {"class means": means}
    print(f"distance from the class means, relative; one image for all would have {blank:.3f}")
    print(
        f"{'weight of the chain down':>24}  {'accuracy':>8}  {'distance':>8}   "
        f"(mean of {options.seeds} seeds)"
    )
    for weight in WEIGHTS:
        found = [train(weight, options.epochs, seed) for seed in range(options.seeds)]
        accuracy = sum(value for value, _ in found) / len(found)
        distance = sum(float((images - means).norm() / means.norm()) for _, images in found) / len(found)
        print(f"{weight:>24g}  {accuracy:>8.2%}  {distance:>8.3f}", flush=True)
        rows[f"weight {weight:g}"] = found[0][1]
    if options.picture is not None:
        draw(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
