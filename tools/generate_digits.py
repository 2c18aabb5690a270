"""Digits drawn from a generative model that Monte Carlo predictive coding has trained.

The model is a chain with its input held at 0: a Gaussian latent, whose mean is the first layer's bias, a
hidden layer, and the 64 pixels of scikit-learn's digits. From one start it is trained by Langevin dynamics,
whose gradients are averages over samples of the posterior (Oliviers, Bogacz & Meulemans 2024), and by plain
predictive coding (dynamics "euler"), whose gradients are taken near its mode, with the same steps and rates.
Prints, as Markdown for docs/results/generation.md, how good both are beside the untrained model, whether
ancestral and Langevin sampling agree, and what a training step costs. Takes some minutes on one core.

    python tools/generate_digits.py
    python tools/generate_digits.py --seed 1 --picture runs/samples.png
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import pctt
from pctt.data import load
from pctt.network import Network, Weights

LATENT, HIDDEN, PIXELS, SIDE = 16, 64, 64, 8
PRECISIONS = {"dense1": 1.0, "dense2": 10.0, "dense3": 50.0}
"""Of the latent, the hidden layer and the pixels."""
NUM_STEPS, BURN_IN, RATE = 60, 30, 0.01
BATCH, LEARNING_RATE = 64, 2e-3
NUM_SAMPLES = 1000
SURE = 0.9
"""From this probability on the classifier counts as sure."""
SMALL_RATE, MIXING_STEPS = 0.005, 2000
"""Of Langevin sampling after training, where the bias that a rate brings would show."""
MODELS = {"langevin": "Langevin", "euler": "plain", "untrained": "untrained"}
COLUMNS = 20


def network() -> Network:
    energies = [pctt.Gaussian(precision) for precision in PRECISIONS.values()]
    return pctt.chain(
        1,
        [
            pctt.Dense(LATENT, energy=energies[0]),
            pctt.Dense(HIDDEN, "tanh", energy=energies[1]),
            pctt.Dense(PIXELS, "sigmoid", energy=energies[2]),
        ],
    )


def start(net: Network, images: Tensor, seed: int) -> Weights:
    """Initial weights whose mean image is that of the data."""
    weights = pctt.init(net, seed=seed)
    weights[net.output]["bias"] = torch.logit(images.mean(0), eps=0.01)
    return weights


def settings(dynamics: str) -> pctt.Inference:
    burn_in = BURN_IN if dynamics == "langevin" else 0
    return pctt.Inference(NUM_STEPS, RATE, dynamics=dynamics, burn_in=burn_in)


def train(net: Network, dynamics: str, images: Tensor, marks: list[int], seed: int) -> dict[int, Weights]:
    """The weights after each of these numbers of epochs."""
    trainer = pctt.Trainer(
        net,
        settings(dynamics),
        pctt.Adam(LEARNING_RATE),
        weights=start(net, images, seed),
        batch_size=BATCH,
        seed=seed,
    )
    found: dict[int, Weights] = {}
    for epochs in marks:
        outcome = trainer.fit((torch.zeros(len(images), 1), images), epochs=epochs)
        if not outcome.status.ok:
            raise SystemExit(f"dynamics {dynamics!r}, {outcome.message}")
        found[epochs] = trainer.weights
    return found


# --- drawing from a model -----------------------------------------------------------------------------------


def generate(weights: Weights, noise: Tensor) -> Tensor:
    """Ancestral sampling: the pixels' predictions [B, 64].

    noise: [B, LATENT + HIDDEN] of N(0, 1), the errors of latent and hidden layer over their deviations.
    """
    latent, hidden = noise.split([LATENT, HIDDEN], -1)
    first, second, third = weights.values()
    latent = first["bias"] + latent / math.sqrt(PRECISIONS["dense1"])
    hidden = torch.tanh(latent @ second["weight"] + second["bias"]) + hidden / math.sqrt(PRECISIONS["dense2"])
    return torch.sigmoid(hidden @ third["weight"] + third["bias"])


def draw(weights: Weights, count: int, seed: int) -> Tensor:
    noise = torch.randn(count, LATENT + HIDDEN, generator=torch.Generator().manual_seed(seed))
    return generate(weights, noise)


def sample_jointly(
    net: Network, weights: Weights, count: int, seed: int, variables: str, num_steps: int
) -> Tensor:
    """Langevin sampling with only the input clamped: the pixels' predictions [count, 64] after the steps.

    The free nodes start at 0, which is no sample of anything.
    """
    inference = pctt.Inference(
        num_steps, SMALL_RATE, dynamics="langevin", variables=variables, initial="zeros"
    )
    result = pctt.infer(net, weights, {"input": torch.zeros(count, 1)}, inference, seed=seed, throw=True)
    return result.predictions[net.output]


def reconstruct(net: Network, weights: Weights, images: Tensor, seed: int, chains: int = 10) -> Tensor:
    """What the model makes of images: the pixels' predictions, averaged over samples of the posterior."""
    inference = pctt.Inference(MIXING_STEPS // 4, SMALL_RATE, dynamics="langevin")
    repeated = images.repeat(chains, 1)
    clamp = {"input": torch.zeros(len(repeated), 1), net.output: repeated}
    result = pctt.infer(net, weights, clamp, inference, seed=seed, throw=True)
    return result.predictions[net.output].view(chains, *images.shape).mean(0)


# --- how good it is -----------------------------------------------------------------------------------------


def log_likelihood(
    weights: Weights, images: Tensor, seed: int, num_steps: int = 200, chains: int = 2
) -> float:
    """Mean log-likelihood of the images in nats, latent and hidden layer integrated out.

    Annealed importance sampling (Neal 2001), beside pctt and not through it: from the prior to the posterior
    by likelihoods to the power 0 .. 1, Hamiltonian moves in the noise of `generate`, each accepted or not, so
    that it is an estimate of the likelihood without bias, and of its logarithm one that is too low.
    """
    generator = torch.Generator().manual_seed(seed)
    precision = PRECISIONS["dense3"]
    data = images.repeat(chains, 1)
    noise = torch.randn(len(data), LATENT + HIDDEN, generator=generator)
    constant = 0.5 * PIXELS * math.log(precision / (2.0 * math.pi))

    def fit(values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.detach().requires_grad_()
        likelihood = constant - 0.5 * precision * (data - generate(weights, values)).square().sum(-1)
        (slope,) = torch.autograd.grad(likelihood.sum(), values)
        return likelihood.detach(), slope

    powers = torch.linspace(0.0, 1.0, num_steps + 1).square().tolist()
    likelihood, slope = fit(noise)
    weight = torch.zeros(len(data))
    size = 0.3
    for before, power in itertools.pairwise(powers):
        weight += (power - before) * likelihood
        momentum = torch.randn(noise.shape, generator=generator)
        place, speed, there, force = noise, momentum, likelihood, slope
        for _ in range(5):
            speed = speed + 0.5 * size * (power * force - place)
            place = place + size * speed
            there, force = fit(place)
            speed = speed + 0.5 * size * (power * force - place)
        gain = power * (there - likelihood) - 0.5 * (
            place.square() - noise.square() + speed.square() - momentum.square()
        ).sum(-1)
        taken = gain > torch.log(torch.rand(len(data), generator=generator))
        noise = torch.where(taken[:, None], place, noise)
        slope = torch.where(taken[:, None], force, slope)
        likelihood = torch.where(taken, there, likelihood)
        size *= 1.05 if taken.float().mean() > 0.75 else 1 / 1.05
    return float((weight.view(chains, -1).logsumexp(0) - math.log(chains)).mean())


def references(train: Tensor, test: Tensor) -> dict[str, float]:
    """The exact log-likelihood of two simple models that see the pixels through the same noise: the Gaussian
    most likely for the training images, and the training images themselves.
    """
    train, test, floor = train.double(), test.double(), 1.0 / PRECISIONS["dense3"]
    values, directions = torch.linalg.eigh(torch.cov(train.T))
    values = values.clamp(min=floor)
    along = (test - train.mean(0)) @ directions
    gaussian = -0.5 * (along.square() / values + (2.0 * math.pi * values).log()).sum(-1)
    kernels = (-0.5 / floor * torch.cdist(test, train).square()).logsumexp(-1) - math.log(len(train))
    kernels = kernels - 0.5 * PIXELS * math.log(2.0 * math.pi * floor)
    return {"a Gaussian": float(gaussian.mean()), "training images + noise": float(kernels.mean())}


def nearest(images: Tensor, others: Tensor) -> float:
    """Mean distance to the nearest of the others."""
    return float(torch.cdist(images, others).amin(-1).mean())


class Judge:
    """A support vector machine trained on real digits, with probabilities."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        svm = importlib.import_module("sklearn.svm").SVC(gamma=0.5, C=10.0)
        calibrated = importlib.import_module("sklearn.calibration").CalibratedClassifierCV
        self.machine: Any = calibrated(svm, ensemble=False).fit(images.numpy(), labels.numpy())

    def __call__(self, images: Tensor) -> tuple[float, float]:
        """Share of images it is sure about, and the number of equally frequent classes with the entropy that
        its answers have.
        """
        probabilities = torch.from_numpy(self.machine.predict_proba(images.numpy()))
        shares = torch.bincount(probabilities.argmax(-1), minlength=10) / len(images)
        classes = math.exp(float(torch.special.entr(shares).sum()))
        return float((probabilities.amax(-1) > SURE).double().mean()), classes


def disagreement(ones: Tensor, others: Tensor) -> tuple[float, float]:
    """Root mean square over pixels of the difference of means, and of variances, over its standard error:
    about 1 where both are samples of one distribution.
    """

    def moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        centred = values.double() - values.double().mean(0)
        variance = centred.square().mean(0)
        return values.double().mean(0), variance, variance, centred.pow(4).mean(0) - variance.square()

    mean, variance, of_mean, of_variance = moments(ones)
    mean2, variance2, of_mean2, of_variance2 = moments(others)
    by_mean = (mean - mean2).square() / (of_mean / len(ones) + of_mean2 / len(others))
    by_variance = (variance - variance2).square() / (of_variance / len(ones) + of_variance2 / len(others))
    return float(by_mean.mean().sqrt()), float(by_variance.mean().sqrt())


def milliseconds(net: Network, images: Tensor, rounds: int = 7) -> dict[str, float]:
    """Of processor time for a training step, per dynamics; run in turn, median over rounds."""
    clamp = {"input": torch.zeros(BATCH, 1), net.output: images[:BATCH]}
    engines = {
        name: pctt.Engine(
            net,
            start(net, images, 0),
            settings(name),
            tuple(clamp),
            learning=pctt.Adam(LEARNING_RATE),
            batch_size=BATCH,
        )
        for name in ("langevin", "euler")
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            before = time.process_time()
            for step in range(5):
                engine.relax(clamp, seed=step)
                engine.learn(LEARNING_RATE, 5 * turn + step + 1)
            if turn:  # the first is to warm up
                times[name].append(1e3 * (time.process_time() - before) / 5)
    return {name: median(values) for name, values in times.items()}


# --- what is shown ------------------------------------------------------------------------------------------


def draw_picture(path: Path, rows: dict[str, Tensor]) -> None:
    """One row of images per entry, its name at the left."""
    agg: Any = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 0.47 * len(rows)))
    agg(figure)
    axes = figure.add_axes((0.24, 0.01, 0.755, 0.98))
    cell = SIDE + 1
    canvas = torch.ones(cell * len(rows), cell * COLUMNS)
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images[:COLUMNS]):
            place = slice(cell * row, cell * row + SIDE), slice(cell * column, cell * column + SIDE)
            canvas[place] = 1.0 - image.clamp(0, 1).view(SIDE, SIDE)
    framed = torch.full((len(canvas) + 1, canvas.shape[1] + 1), 0.75)
    framed[1:, 1:] = canvas
    for line in range(0, len(framed), cell):
        framed[line] = 0.75
    for line in range(0, framed.shape[1], cell):
        framed[:, line] = 0.75
    axes.imshow(framed.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([cell * row + cell / 2 for row in range(len(rows))], labels=list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---") + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=40, help="of both trainings (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and all draws (default 0)")
    parser.add_argument("--picture", type=Path, help="PNG file to draw samples and reconstructions to")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.seed < 0:
        parser.error("--epochs must be at least 1, --seed at least 0.")
    torch.set_num_threads(1)
    digits, net, seed = load("digits"), network(), options.seed
    train_images, test = digits.train.inputs, digits.test.inputs
    marks = sorted({min(epochs, options.epochs) for epochs in (5, 10, 20)} | {options.epochs})

    stages = {name: train(net, name, train_images, marks, seed) for name in ("langevin", "euler")}
    stages["untrained"] = {options.epochs: start(net, train_images, seed)}
    models = {name: weights[options.epochs] for name, weights in stages.items()}
    known = {
        (name, epochs): log_likelihood(weights, test, seed)
        for name, of_model in stages.items()
        for epochs, weights in of_model.items()
    }
    print(f"Seed {seed}, log-likelihood of the {len(test)} test images, nats per image:\n")
    rows = [
        [MODELS[name], *(f"{known[name, epochs]:.1f}" for epochs in marks)] for name in ("langevin", "euler")
    ]
    print(table(["Training", *(f"{epochs} epochs" for epochs in marks)], rows), flush=True)

    judge = Judge(train_images, digits.train.labels)
    samples = {name: draw(weights, NUM_SAMPLES, seed) for name, weights in models.items()}
    rebuilt = {name: reconstruct(net, weights, test, seed) for name, weights in models.items()}
    rows = []
    for name, images in samples.items():
        sure, classes = judge(images)
        error = (rebuilt[name] - test).square().mean().sqrt()
        distances = nearest(images, test), nearest(test, images)
        cells = [*(f"{number:.2f}" for number in distances), f"{sure:.0%}", f"{classes:.1f}", f"{error:.3f}"]
        rows.append([MODELS[name], f"{known[name, options.epochs]:.1f}", *cells])
    for name, likelihood in references(train_images, test).items():
        rows.append([name, f"{likelihood:.1f}", *5 * ["-"]])
    real = train_images[torch.randperm(len(train_images), generator=torch.Generator().manual_seed(seed))]
    real = real[:NUM_SAMPLES]
    sure, classes = judge(test)
    cells = [f"{nearest(real, test):.2f}", f"{nearest(test, real):.2f}", f"{sure:.0%}", f"{classes:.1f}", "-"]
    rows.append(["real digits", "-", *cells])
    print(f"After {options.epochs} epochs; {NUM_SAMPLES} samples each:\n")
    head = ["Model", "log-likelihood", "to test", "from test", "sure", "classes", "reconstruction"]
    print(table(head, rows), flush=True)

    many = draw(models["langevin"], 20 * NUM_SAMPLES, seed + 1)
    ways = {"ancestral": draw(models["langevin"], NUM_SAMPLES, seed + 2)}
    for variables, num_steps in (
        ("states", MIXING_STEPS // 4),
        ("states", MIXING_STEPS),
        ("errors", MIXING_STEPS),
    ):
        ways[f"Langevin, {variables}, {num_steps} steps"] = sample_jointly(
            net, models["langevin"], NUM_SAMPLES, seed, variables, num_steps
        )
    rows = []
    for name, images in ways.items():
        by_mean, by_variance = disagreement(many, images)
        spread = images.double().var(0).sum() / many.double().var(0).sum()
        rows.append([name, f"{by_mean:.2f}", f"{by_variance:.2f}", f"{spread:.3f}"])
    print(f"{NUM_SAMPLES} samples of the Langevin-trained model beside {len(many)} ancestral ones:\n")
    print(table(["Sampling", "means", "variances", "total variance, ratio"], rows), flush=True)

    times = milliseconds(net, train_images)
    ratio = times["langevin"] / times["euler"]
    rows = [[f"{times['langevin']:.1f} ms", f"{times['euler']:.1f} ms", f"{ratio:.2f}"]]
    print(f"A training step of {BATCH} images and {NUM_STEPS} inference steps, processor time:\n")
    print(table(["Langevin", "plain", "ratio"], rows))

    if options.picture is not None:
        shown = {
            "digits (test images)": test,
            "drawn, Langevin-trained": samples["langevin"],
            "the same by Langevin sampling": ways[f"Langevin, states, {MIXING_STEPS} steps"],
            "drawn, trained by plain PC": samples["euler"],
            "drawn, untrained": samples["untrained"],
            "reconstructed, Langevin-trained": rebuilt["langevin"],
            "reconstructed, plain PC": rebuilt["euler"],
        }
        draw_picture(options.picture, shown)
        print(f"Picture: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
