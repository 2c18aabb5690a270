"""PC graphs on MNIST: every node predicts every other, or only the next; which classifies how well.

Trains one graph of the nodes image, hidden ... and label with image and label clamped, then clamps the test
images alone, relaxes everything else and takes the largest label unit. Prints the accuracy on all test images
after each epoch. The files of MNIST are looked for in --data-dir, else in PCTT_DATA.

    python tools/pc_graph.py --graph all
    python tools/pc_graph.py --graph layered --hidden 256 256 --epochs 10
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import pctt
from pctt.data import Split, load
from pctt.network import Network, Weights

GRAPHS = ("all", "all-but-image", "all-to-label", "layered", "generative")
"""all-but-image: all to all, without predictions of the image, as PRECO's use_input_error=False.
all-to-label: nor from the label, which training clamps, so that no unit can copy it.
"""


def connections(kind: str, hidden: list[str]) -> list[tuple[str, str]]:
    """What predicts what."""
    nodes = ["image", *hidden, "label"]
    if kind == "all":
        return [(source, target) for target in nodes for source in nodes]
    if kind == "all-but-image":
        return [(source, target) for target in nodes[1:] for source in nodes]
    if kind == "all-to-label":
        return [(source, target) for target in nodes[1:] for source in nodes[:-1]]
    up = list(itertools.pairwise(nodes))
    return up if kind == "layered" else [(above, below) for below, above in up]


def network(
    kind: str, sizes: list[int], pixels: int, activation: str, precisions: dict[str, float]
) -> Network:
    hidden = [f"hidden{number}" for number in range(1, len(sizes) + 1)]
    nodes = {"image": pixels, **dict(zip(hidden, sizes, strict=True)), "label": 10}
    backward = kind == "generative"  # whose label nothing predicts
    return pctt.pc_graph(
        nodes,
        connections(kind, hidden),
        activation,
        {name: pctt.Gaussian(value) for name, value in precisions.items()} or None,
        input="label" if backward else "image",
        output="image" if backward else "label",
    )


def accuracy(net: Network, weights: Weights, data: Split, inference: pctt.Inference) -> float:
    """Of the label that relaxes with the image alone clamped."""
    engine = pctt.Engine(net, weights, inference, ("image",), batch_size=1000)
    right = 0
    for images, labels in zip(data.inputs.split(1000), data.labels.split(1000), strict=True):
        engine.relax({"image": images})
        right += int((engine.read_activity("label").argmax(-1) == labels).sum())
    return right / len(data)


def main(arguments: list[str] | None = None) -> int:
    parser: Any = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graph", choices=GRAPHS, default="all", help="what predicts what (default all)")
    parser.add_argument("--data", default="mnist", help="data set (default mnist)")
    parser.add_argument("--data-dir", help="folder of its files")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128], help="units of each hidden node")
    parser.add_argument("--activation", default="tanh")
    parser.add_argument("--precision", nargs="+", default=[], help="of nodes, such as label=10; else 1")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, help="training images (default all)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="inference steps of training")
    parser.add_argument("--rate", type=float, default=0.1, help="of inference")
    parser.add_argument("--test-steps", type=int, default=100)
    parser.add_argument("--test-rate", type=float, help="default that of training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    parser.add_argument("--init", default="normal", help="scheme of the initial weights (default normal)")
    parser.add_argument("--gain", type=float, default=None)
    parser.add_argument(
        "--feature-gain", type=float, help="of the image's weights to hidden nodes, if another"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = load(options.data, options.data_dir)
    train = data.train
    images, targets = train.inputs[: options.samples], _one_hot(train.labels[: options.samples])
    precisions = {
        name: float(value) for name, _, value in (text.partition("=") for text in options.precision)
    }
    net = network(options.graph, options.hidden, images.shape[1], options.activation, precisions)
    training = pctt.Inference(options.steps, options.rate)
    testing = replace(training, num_steps=options.test_steps, rate=options.test_rate or options.rate)
    learning = pctt.AdamW(
        options.learning_rate, weight_decay=options.weight_decay, schedule=pctt.WarmupCosine()
    )
    weights = pctt.init(net, options.seed, options.init, options.gain)
    if options.feature_gain is not None:
        features = pctt.init(net, options.seed + 1, "normal", options.feature_gain)
        for name in net.names:
            if name.startswith("hidden") and "weight.image" in weights[name]:
                weights[name]["weight.image"] = features[name]["weight.image"]
    trainer = pctt.Trainer(
        net,
        training,
        learning,
        weights=weights,
        batch_size=options.batch_size,
        seed=options.seed,
        clamped=("image", "label"),
    )
    begun = time.process_time()

    def report(kind: str, fields: dict[str, Any]) -> None:
        if kind == "epoch":
            share = accuracy(net, trainer.weights, data.test, testing)
            spent = time.process_time() - begun
            energy, epoch = fields["train_energy"], fields["epoch"]
            print(
                f"epoch {epoch:>2}  energy {energy:.4f}  test {share:.2%}  {spent:.0f} s of processor",
                flush=True,
            )

    print(f"{options.graph}: {'-'.join(map(str, net.widths))}, {net.num_weights()} weights", flush=True)
    outcome = trainer.fit({"image": images, "label": targets}, options.epochs, callbacks=[report])
    if not outcome.status.ok:
        print(f"training failed: {outcome.message}", file=sys.stderr)
        return 1
    return 0


def _one_hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, 10).float()


if __name__ == "__main__":
    sys.exit(main())
