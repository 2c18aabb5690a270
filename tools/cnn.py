"""Convolutional networks by predictive coding beside their backprop twins.

    lenet   a LeNet-like network on MNIST: validation accuracy of some rates, or test accuracy of one over
    seeds vgg     VGG-5 on images of CIFAR-10's size: seconds per epoch beside the twin's, and how far the
    local
            gradients of fixed prediction are from autograd's, in fp64

Appends JSON lines to --out, one per run; docs/results/cnn.md shows what came out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pctt
from pctt import backprop
from pctt.data import Split, load, split_validation

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def lenet(function: str = "gelu") -> pctt.Network:
    """LeNet-5's sizes (LeCun et al. 1998) with max pooling: 61,706 weights."""
    pool = pctt.MaxPool2d(2)
    return pctt.chain(
        MNIST,
        [
            pctt.Block([pctt.Conv2d(6, 5, padding=2), function, pool]),
            pctt.Block([pctt.Conv2d(16, 5), function, pool]),
            pctt.Dense(120, function),
            pctt.Dense(84, function),
            pctt.Dense(10),
        ],
    )


def vgg5(function: str = "gelu", widths: tuple[int, ...] = (128, 256, 512, 512)) -> pctt.Network:
    """VGG-5 as in Pinchetti et al. 2025: four convolutions, each with a pool, and one dense layer."""
    layers: list[Any] = [
        pctt.Block([pctt.Conv2d(width, 3, padding=1), function, pctt.MaxPool2d(2)]) for width in widths
    ]
    return pctt.chain(CIFAR, [*layers, pctt.Dense(10)])


def train(arguments: argparse.Namespace, seed: int, algorithm: str) -> dict[str, Any]:
    data = load("mnist", arguments.data_dir)
    training, validation = split_validation(data.train, 0.1, 0)
    if not arguments.test:
        training = Split(training.inputs[: arguments.images], training.labels[: arguments.images])
    training = data.train if arguments.test else training
    held_out = data.test if arguments.test else validation
    trainer = pctt.Trainer(
        lenet(arguments.function),
        pctt.Inference(arguments.num_steps, arguments.inference_rate),
        pctt.Adam(arguments.learning_rate, schedule=pctt.WarmupCosine()),
        weights=pctt.init(lenet(arguments.function), seed, "kaiming"),
        seed=seed,
        batch_size=arguments.batch_size,
        algorithm=algorithm,
    )
    history: list[float] = []
    assert held_out is not None
    started = time.perf_counter()

    def note(kind: str, fields: dict[str, Any]) -> None:
        if kind == "epoch":
            history.append(fields["validation_accuracy"])
            print(f"{algorithm} seed {seed} epoch {len(history)}: {history[-1]:.4f}", flush=True)

    outcome = trainer.fit(training, arguments.epochs, held_out, callbacks=[note])
    return {
        "what": "lenet",
        "algorithm": algorithm,
        "seed": seed,
        "on": "test" if arguments.test else "validation",
        "num_steps": arguments.num_steps,
        "inference_rate": arguments.inference_rate,
        "learning_rate": arguments.learning_rate,
        "batch_size": arguments.batch_size,
        "function": arguments.function,
        "epochs": arguments.epochs,
        "status": outcome.status.name,
        "accuracies": history,
        "seconds": time.perf_counter() - started,
    }


def time_vgg(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a training batch in turn with the twin's, times the batches of an epoch of 50,000."""
    net = vgg5()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(arguments.batch_size, *CIFAR, generator=generator)
    targets = torch.eye(10)[torch.randint(0, 10, (arguments.batch_size,), generator=generator)]
    clamp = {"input": images.flatten(1), net.output: targets}
    engine = pctt.Engine(
        net,
        pctt.init(net, 0, "kaiming"),
        pctt.Inference(arguments.num_steps, arguments.inference_rate),
        ("input", net.output),
        learning=pctt.Adam(1e-4),
    )
    ours: list[float] = []
    twins: list[float] = []
    for step in range(1, arguments.repeats + 2):  # the first of each warms up
        started = time.perf_counter()
        engine.relax(clamp)
        engine.learn(1e-4, step)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        found, _, _ = backprop.differentiate(net, engine.weights(), clamp)
        engine.load_gradients(found)
        engine.update(0.0, step)
        twins.append(time.perf_counter() - started)
    batch, twin = (float(torch.tensor(times[1:]).median()) for times in (ours, twins))
    batches = 50_000 / arguments.batch_size
    flops = engine.program.flops(arguments.batch_size)
    return {
        "what": "vgg5 time",
        "num_steps": arguments.num_steps,
        "batch_size": arguments.batch_size,
        "seconds_per_batch": batch,
        "twin_seconds_per_batch": twin,
        "ratio": batch / twin,
        "epoch_minutes": batch * batches / 60,
        "twin_epoch_minutes": twin * batches / 60,
        "gflop_per_batch": flops / 1e9,
        "floor_seconds_per_batch": flops / _flops_per_second(),
    }


def _flops_per_second() -> float:
    """What this machine's matrix product reaches, the floor of the figures above."""
    a = torch.rand(1024, 1024)
    times: list[float] = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(times)


def compare_vgg(arguments: argparse.Namespace) -> dict[str, Any]:
    """Largest relative distance of a weight gradient from autograd's, in fp64, per layer."""
    net = vgg5()
    weights = pctt.init(net, 0, "kaiming", dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, *CIFAR, generator=generator, dtype=torch.float64)
    targets = torch.eye(10, dtype=torch.float64)[torch.randint(0, 10, (4,), generator=generator)]
    exact = pctt.variant("exact")
    result = pctt.infer(net, weights, {"input": images, net.output: targets}, exact)
    found = pctt.weight_gradients(net, weights, result)
    expected, _ = backprop.gradients(net, weights, images, targets)
    distances = {
        name: max(_distance(found[name][key], values) for key, values in layer.items())
        for name, layer in expected.items()
    }
    return {"what": "vgg5 gradients", "relative_distance": distances}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("lenet", "vgg"))
    parser.add_argument("--data-dir", help="folder of MNIST's files, else PCTT_DATA")
    parser.add_argument("--algorithms", nargs="+", default=["pc", "backprop"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=54_000, help="of the training set, when validating")
    parser.add_argument("--test", action="store_true", help="train on all 60,000 images, report the test set")
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--inference-rate", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--function", default="gelu")
    parser.add_argument("--repeats", type=int, default=3, help="timed batches of vgg")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/cnn.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.what == "vgg":
        results = (work(arguments) for work in (compare_vgg, time_vgg))
    else:
        results = (train(arguments, seed, name) for seed in arguments.seeds for name in arguments.algorithms)
    for result in results:
        print(json.dumps(result), flush=True)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
