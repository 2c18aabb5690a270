"""One network on MNIST that classifies, generates and completes, from one file of weights.

Trains a bidirectional chain (pixels-256-256-10, with a chain down of the same widths), saves it, loads it
again and asks it three things: the class of every test image (one sweep up), an image of every class (one
sweep down, judged by a classifier that has seen real images only), and the lower half of test images whose
upper half is held (relaxation of everything else), beside the mean image and the nearest training image.

    python tools/three_in_one.py --out runs/three --picture docs/figures/three-in-one.png
    python tools/three_in_one.py --data digits --hidden 64 64 --epochs 10
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pctt
from pctt import ask, plots
from pctt.data import Dataset, Split, load
from pctt.memory import nearest
from pctt.network import Network


def network(pixels: int, hidden: list[int], weight: float) -> Network:
    """weight: precision of the predictions from above; those from below have 1."""
    up = [*(pctt.Dense(units, "gelu") for units in hidden), pctt.Dense(10)]
    energy = pctt.Gaussian(weight)
    down = [pctt.Dense(units, "gelu", energy=energy) for units in reversed(hidden)]
    return pctt.chain(pixels, up, backward=[*down, pctt.Dense(pixels, "sigmoid", energy=energy)])


def train(options: argparse.Namespace, data: Dataset, folder: Path) -> None:
    net = network(data.train.inputs.shape[1], options.hidden, options.weight)
    trainer = pctt.Trainer(
        net,
        pctt.Inference(options.steps, options.rate),
        pctt.Adam(1e-3, schedule=pctt.WarmupCosine()),
        weights=pctt.init(net, options.seed, "kaiming"),
        batch_size=64,
        seed=options.seed,
    )

    def report(kind: str, fields: dict[str, Any]) -> None:
        if kind == "epoch":
            words = f"epoch {fields['epoch']}  energy {fields['train_energy']:.4f}"
            print(f"{words}  {fields['seconds']:.0f} s", flush=True)

    outcome = trainer.fit(data.train, options.epochs, callbacks=[report], save_to=folder)
    if not outcome.status.ok:
        raise SystemExit(f"training failed: {outcome.message}")


def judge(data: Split, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(classes, probabilities) that a classifier trained on real images gives pictures."""
    logistic: Any = importlib.import_module("sklearn.linear_model").LogisticRegression(C=0.05, max_iter=200)
    found = logistic.fit(data.inputs[:5000].numpy(), data.labels[:5000].numpy())
    probabilities = torch.from_numpy(found.predict_proba(pictures.numpy()))
    return probabilities.argmax(-1), probabilities.amax(-1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="mnist", help="data set (default mnist)")
    parser.add_argument("--data-dir", help="folder of its files, else PCTT_DATA")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--weight", type=float, default=0.03, help="precision of the chain down")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="inference steps of training")
    parser.add_argument("--rate", type=float, default=0.05, help="of inference")
    parser.add_argument("--count", type=int, default=200, help="test images to complete")
    parser.add_argument("--complete-steps", type=int, default=300, help="of Adam at rate 0.02")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the weights; if it has some they are used")
    parser.add_argument("--picture", type=Path, help="a .png to draw the images into")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = load(options.data, options.data_dir)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        if not (folder / "checkpoint.safetensors").is_file():
            train(options, data, folder)
        trainer = pctt.load(folder)
    net, weights, roles = trainer.net, trainer.weights, ask.Roles("input", trainer.net.output)
    right = trainer.evaluate(data.test)
    print(f"classification: {right:.2%} of {len(data.test)} test images", flush=True)

    classes = torch.arange(10)
    drawn = ask.generate(net, weights, roles, classes, 10, trainer.inference)
    means = torch.stack([data.train.inputs[data.train.labels == label].mean(0) for label in range(10)])
    taken_for, sure = judge(data.train, drawn)
    distance = float((drawn - means).norm() / means.norm())
    blank = float((means - means.mean(0)).norm() / means.norm())
    agreed = int((taken_for == classes).sum())
    print(
        f"generation: the judge takes {agreed} of 10 images for their class, {float(sure.mean()):.0%} sure "
        f"on average; distance from the class means {distance:.3f} (one image for all: {blank:.3f})",
        flush=True,
    )

    originals = data.test.inputs[: options.count]
    known = ask.parts_known("upper", data.shape)
    given = originals * known
    start = torch.where(known, originals, data.train.inputs.mean(0))  # where unknown pixels start
    asking = pctt.Inference(options.complete_steps, 0.02, dynamics="adam")
    answers = {
        "network": ask.complete(net, weights, roles, start, known, asking),
        "mean": start,
        "nearest": torch.where(known, originals, nearest(data.train.inputs, given, known)),
        "nothing": given,
    }
    print(f"completion of {len(originals)} test images from the upper half, squared error per unknown pixel:")
    for name, pictures in answers.items():
        print(f"  {name:<8} {float((pictures - originals)[:, ~known].square().mean()):.4f}")
    if options.picture is not None:
        rows = [
            ("generated", drawn),
            ("original", originals[:10]),
            ("given", given[:10]),
            ("completed", answers["network"][:10]),
            ("nearest", answers["nearest"][:10]),
        ]
        plots.draw_pictures(options.picture, rows, data.shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
