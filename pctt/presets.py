"""Configurations by name, for `pctt train NAME`."""

from __future__ import annotations

from collections.abc import Callable

from pctt.config import DataConfig, InitConfig, RunConfig, TrainingConfig
from pctt.inference import Inference
from pctt.layers import Dense
from pctt.learning import Adam, WarmupCosine


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


PRESETS: dict[str, Callable[[], RunConfig]] = {"digits": digits, "mnist": mnist}
