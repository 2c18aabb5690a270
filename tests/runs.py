"""Small runs that tests of trouble share: on the command line, and as trainers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pctt
from pctt import checkpoint, cli, record, run


def tiny_toml(num_steps: int, batch_size: int) -> str:
    """The configuration of a run of two epochs that takes a moment."""
    return f"""
[[layers]]
units = 16
activation = "tanh"

[[layers]]
units = 10

[inference]
num_steps = {num_steps}

[learning]
kind = "adam"
rate = 0.003

[training]
epochs = 2
batch_size = {batch_size}
"""


TINY = f"{tiny_toml(num_steps=3, batch_size=256)}checkpoint_every = 2\n"


def train(*arguments: object) -> int:
    return cli.main(["train", *(str(argument) for argument in arguments)])


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without the wall clock."""
    return [{**entry, "seconds": 0} for entry in record.read(folder / record.FILE_NAME)]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, learning state, progress and record, bit for bit."""
    assert (first / run.CHECKPOINT).read_bytes() == (second / run.CHECKPOINT).read_bytes()
    assert records(first) == records(second)


def files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


BATCH = 20


def clouds(num: int = 100, wild: tuple[int, ...] = (), seed: int = 3) -> tuple[Tensor, Tensor]:
    """Three clouds in 6 dimensions, with target vectors. wild: batches of the first epoch,
    counted from 0, that hold a target so far out that its square is infinite.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 3
    inputs = 3.0 * torch.eye(3, 6)[labels] + 0.3 * torch.randn(num, 6, generator=generator)
    targets = torch.nn.functional.one_hot(labels, 3).float()
    order = trainer(seed=seed)._order(num, 0)
    for batch in wild:
        targets[order[batch * BATCH]] = 1e30
    return inputs, targets


def network() -> pctt.Network:
    return pctt.chain(6, [pctt.Dense(8, "tanh"), pctt.Dense(8, "tanh"), pctt.Dense(3)])


def trainer(**given: Any) -> pctt.Trainer:
    given = {"batch_size": BATCH, "seed": 3, **given}
    inference = given.pop("inference", pctt.Inference(8, 0.1))
    return pctt.Trainer(network(), inference, given.pop("learning", pctt.Adam(1e-2)), **given)


def same(a: Any, b: Any) -> bool:
    a, b = checkpoint.flatten(a), checkpoint.flatten(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit(t: pctt.Trainer, *arguments: Any, **settings: Any) -> tuple[run.FitResult, list[dict[str, Any]]]:
    """The result and the records, with their kinds."""
    lines: list[dict[str, Any]] = []
    callback = lambda kind, fields: lines.append({"kind": kind, **fields})  # noqa: E731
    return t.fit(*arguments, callbacks=[callback], **settings), lines
