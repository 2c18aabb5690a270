"""Configurations by name, for `pctt train NAME`."""

from __future__ import annotations

from collections.abc import Callable

from pctt.config import DataConfig, RunConfig, TrainingConfig
from pctt.inference import Inference
from pctt.layers import Dense
from pctt.learning import Adam, WarmupCosine


def digits() -> RunConfig:
    """scikit-learn's 8x8 digits, 64-128-128-128-10: seconds on a laptop, needs no files."""
    return RunConfig(
        layers=(Dense(128, "tanh"), Dense(128, "tanh"), Dense(128, "tanh"), Dense(10)),
        data=DataConfig("digits"),
        inference=Inference(num_steps=20, rate=0.1),
        learning=Adam(1e-3, schedule=WarmupCosine()),
        training=TrainingConfig(epochs=40, batch_size=32),
    )


def mnist() -> RunConfig:
    """MNIST, 784-256-256-10."""
    return RunConfig(
        layers=(Dense(256, "tanh"), Dense(256, "tanh"), Dense(10)),
        data=DataConfig("mnist"),
        inference=Inference(num_steps=20, rate=0.1),
        learning=Adam(1e-3, schedule=WarmupCosine()),
        training=TrainingConfig(epochs=10, batch_size=64),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"digits": digits, "mnist": mnist}
