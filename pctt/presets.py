"""Configurations by name, for `pctt train NAME`."""

from __future__ import annotations

from collections.abc import Callable

from pctt.config import DataConfig, InitConfig, RunConfig, TrainingConfig, Wired, wired
from pctt.energies import Gaussian
from pctt.inference import Inference
from pctt.layers import Block, Conv2d, Dense, MaxPool2d
from pctt.learning import Adam, AdamW, WarmupCosine
from pctt.pcgraph import pc_graph


def digits() -> RunConfig:
    """scikit-learn's 8x8 digits, 64-128-128-128-10: seconds on a laptop, needs no files."""
    return RunConfig(
        layers=(Dense(128, "gelu"), Dense(128, "gelu"), Dense(128, "gelu"), Dense(10)),
        data=DataConfig("digits"),
        init=InitConfig("kaiming"),
        inference=Inference(num_steps=20, rate=0.01),
        learning=Adam(1e-3, schedule=WarmupCosine()),
        training=TrainingConfig(epochs=30, batch_size=32),
    )


def mnist() -> RunConfig:
    """MNIST, 784-256-256-10. Activation, rates and initialiser were chosen on the validation split."""
    return RunConfig(
        layers=(Dense(256, "gelu"), Dense(256, "gelu"), Dense(10)),
        data=DataConfig("mnist"),
        init=InitConfig("kaiming"),
        inference=Inference(num_steps=20, rate=0.01),
        learning=Adam(1e-3, schedule=WarmupCosine()),
        training=TrainingConfig(epochs=10, batch_size=64),
    )


def mnist_cnn() -> RunConfig:
    """MNIST with LeNet's sizes: two convolutions with pools, then 120-84-10."""
    pool = MaxPool2d(2)
    return RunConfig(
        layers=(
            Block([Conv2d(6, 5, padding=2), "gelu", pool]),
            Block([Conv2d(16, 5), "gelu", pool]),
            Dense(120, "gelu"),
            Dense(84, "gelu"),
            Dense(10),
        ),
        data=DataConfig("mnist"),
        init=InitConfig("kaiming"),
        inference=Inference(num_steps=8, rate=0.03),
        learning=Adam(2e-3, schedule=WarmupCosine()),
        training=TrainingConfig(epochs=10, batch_size=64),
    )


def _pc_graph(data: str, pixels: int, hidden: int, epochs: int) -> RunConfig:
    """Image, hidden and label nodes that all predict each other, and themselves but for the diagonal."""
    net = pc_graph({"image": pixels, "hidden": hidden, "label": 10})
    return RunConfig(
        layers=wired(net),
        clamp={"image": "images", "label": "labels"},
        data=DataConfig(data),
        init=InitConfig("normal", 0.001),
        inference=Inference(num_steps=20, rate=0.1),
        learning=AdamW(1e-3, schedule=WarmupCosine()),
        training=TrainingConfig(epochs=epochs, batch_size=64),
    )


def digits_pcgraph() -> RunConfig:
    """A fully connected PC graph on scikit-learn's digits: it classifies, generates and completes."""
    return _pc_graph("digits", 64, 64, 20)


def mnist_pcgraph() -> RunConfig:
    """The same on MNIST, 784-128-10."""
    return _pc_graph("mnist", 784, 128, 3)


def digits_generative() -> RunConfig:
    """Digits drawn from a class and a latent vector, trained by Langevin dynamics; needs no files."""
    return RunConfig(
        layers=(
            Wired(Dense(16, name="latent"), ("nothing",)),
            Wired(Dense(64, "tanh", energy=Gaussian(10.0), name="hidden"), ("latent", "label")),
            Wired(Dense(64, "sigmoid", energy=Gaussian(50.0), name="image"), ("hidden",)),
        ),
        clamp={"nothing": "zeros", "label": "labels", "image": "images"},
        data=DataConfig("digits"),
        inference=Inference(num_steps=40, rate=0.01, dynamics="langevin", burn_in=20),
        learning=Adam(2e-3),
        training=TrainingConfig(epochs=20, batch_size=64),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    make.__name__: make
    for make in (digits, digits_generative, digits_pcgraph, mnist, mnist_cnn, mnist_pcgraph)
}
