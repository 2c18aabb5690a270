"""The forms that data come in: the same samples give the same training, whatever they are wrapped in."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import pctt
from pctt import checkpoint

UNITS, CLASSES, COUNT, BATCH = 6, 3, 50, 8  # so that the last batch has 2


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % CLASSES
    return 3.0 * torch.eye(CLASSES, UNITS)[labels] + torch.randn(COUNT, UNITS, generator=generator), labels


class Items(Dataset[Any]):
    """A map-style data set that counts what is read."""

    def __init__(self, *columns: Any, names: tuple[str, ...] | None = None) -> None:
        self.columns, self.names, self.read = columns, names, 0

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, row: int) -> Any:
        self.read += 1
        values = tuple(column[row] for column in self.columns)
        return dict(zip(self.names, values, strict=True)) if self.names else values


def trainer(**settings: Any) -> pctt.Trainer:
    net = pctt.chain(UNITS, [pctt.Dense(8, "tanh"), pctt.Dense(CLASSES)])
    learning = pctt.Adam(1e-2, schedule=pctt.WarmupCosine())
    return pctt.Trainer(net, pctt.Inference(5, 0.1), learning, batch_size=BATCH, seed=3, **settings)


def trained(data: Any, epochs: int = 2, **settings: Any) -> pctt.Trainer:
    t = trainer(**settings)
    assert t.fit(data, epochs).status is pctt.Status.COMPLETED
    return t


def same(a: pctt.Trainer, b: pctt.Trainer) -> bool:
    one, two = checkpoint.flatten(a.weights), checkpoint.flatten(b.weights)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Given:
    """Batches in a given order, every epoch another; what a loader with a sampler of one's own does."""

    def __init__(self, orders: list[Tensor]) -> None:
        self.orders, self.passes = orders, 0

    def __iter__(self) -> Any:
        inputs, labels = samples()
        order = self.orders[self.passes]
        self.passes += 1
        return iter([[inputs[rows], labels[rows]] for rows in order.split(BATCH)])

    def __len__(self) -> int:
        return -(-COUNT // BATCH)


def test_every_form_of_the_same_samples_gives_the_same_weights_bit_for_bit():
    """The oracle is training on two tensors in memory, which the rest of the suite compares with loops."""
    inputs, labels = samples()
    expected = trained((inputs, labels))
    targets = torch.nn.functional.one_hot(labels, CLASSES).float()
    forms = {
        "TensorDataset": TensorDataset(inputs, labels),
        "Subset": Subset(TensorDataset(inputs, labels), range(COUNT)),
        "numbers": Items(inputs, labels.tolist()),
        "arrays": Items(inputs.double().numpy(), targets.numpy()),
        "by name": Items(inputs, labels, names=("input", "dense2")),
        "loader": Given([trainer()._order(COUNT, epoch) for epoch in range(2)]),
    }
    for name, form in forms.items():
        assert same(trained(form), expected), name
    assert not same(trained((inputs.flip(0), labels.flip(0))), expected)  # the order matters, so it was kept


def test_a_data_set_is_read_batch_by_batch():
    items = Items(*samples())
    t, read = trainer(), []
    t.fit(items, 1, callbacks=[lambda kind, fields: read.append(items.read) if kind == "batch" else None])
    assert read[:3] == [2 * BATCH, 3 * BATCH, 4 * BATCH]  # one batch ahead, for cards
    assert read[-1] == COUNT


@pytest.mark.parametrize("kind", ["data set", "loader"])
def test_a_run_stopped_in_mid_epoch_goes_on_bit_for_bit(kind: str, tmp_path: Path):
    """Of a shuffling loader too: its order is drawn from torch's global generator, which is seeded by the
    epoch here; without that the resumed run sees some samples twice and others never.
    """
    form = Items(*samples()) if kind == "data set" else loader()
    whole = trained(form, 3)
    t = trainer()
    stop_after = lambda kind, fields: t.stop() if kind == "batch" and fields["step"] == 10 else None  # noqa: E731
    assert t.fit(form, 3, callbacks=[stop_after], save_to=tmp_path).status is pctt.Status.STOPPED
    torch.rand(5)  # what else a program draws between must not matter
    again = pctt.load(tmp_path)
    assert again.progress.batch == 10 - -(-COUNT // BATCH)
    assert again.fit(form, 3).status.ok
    assert same(again, whole)


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples()), batch_size=BATCH, shuffle=True, **settings)


def test_a_loader_shuffles_anew_in_every_epoch_and_leaves_the_global_generator_alone():
    seen: list[Tensor] = []

    def collate(rows: list[Any]) -> list[Tensor]:
        seen.append(torch.stack([row[0] for row in rows]))
        return [seen[-1], torch.stack([row[1] for row in rows])]

    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    trained(loader(collate_fn=collate), 2)
    assert torch.equal(torch.rand(1), expected)
    first, second = torch.cat(seen).split(COUNT)
    inputs, _ = samples()
    assert not torch.equal(first, inputs) and not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, inputs.sort(0).values)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_give_the_batches_that_one_process_gives():
    assert same(trained(loader(num_workers=1), 1), trained(loader(), 1))


def test_evaluation_counts_every_sample_of_every_form():
    """The last batch is smaller, so a mean of batch accuracies would differ."""
    inputs, labels = samples()
    t = trained((inputs, labels), 1)
    right = (t.predict(inputs).argmax(1) == labels).sum()
    for form in ((inputs, labels), Items(inputs, labels), loader()):
        assert t.evaluate(form) == pytest.approx(int(right) / COUNT, abs=1e-12)
    assert t.fit(loader(), 2, validation=loader()).validation_accuracy == t.evaluate((inputs, labels))


def test_images_are_flattened_for_a_flat_input():
    inputs, labels = samples()
    assert same(trained(Items(inputs.view(COUNT, 1, 2, 3), labels)), trained((inputs, labels)))


def test_batches_of_a_loader_run_on_the_emulated_card():
    t = trained(loader(), 1, backend="emulated")
    assert t.progress.step == -(-COUNT // BATCH)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(itertools.repeat((torch.zeros(UNITS), 0)))


class Claims(Given):
    def __init__(self, length: int) -> None:
        super().__init__([torch.arange(COUNT)] * 3)
        self.length = length

    def __len__(self) -> int:
        return self.length


def with_nan() -> Items:
    inputs, labels = samples()
    inputs[int(trainer()._order(COUNT, 0)[BATCH + 2])] = torch.nan
    return Items(inputs, labels)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (Endless(), r"IterableDataset has no order.*give a DataLoader"),
        (DataLoader(Endless(), batch_size=BATCH), "data loader has no length.*give it one"),
        (iter([1]), "data loader has no length"),
        (torch.zeros(4, UNITS), "data must be .* got Tensor"),
        ("digits", "data must be .* got str"),
        (3, "data must be .* got int"),
        ((torch.zeros(4, UNITS),), r"data must be .* got 1 parts"),
        (TensorDataset(torch.zeros(4, UNITS)), "got 1 parts"),
        (Items([]), "the data set is empty"),
        (Claims(0), "the data loader is empty"),
        (Claims(9), "length of 9 and gave 7 batches"),
        (Claims(6), "length of 6 and gave more batches"),
        (Items(*samples(), torch.zeros(COUNT)), "batch 1 of an epoch: .* got 3 parts"),
        (Subset(samples()[0], range(COUNT)), "batch 1 of an epoch: .* got Tensor"),
        (Items(samples()[0][:, 1:], samples()[1]), r"batch 1 of an epoch: inputs must be \[N, 6\]"),
        (with_nan(), "batch 2 of an epoch: inputs hold NaN or infinite values, first in row 2"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_sentence(data: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence) as raised:
        trainer().fit(data, 1)
    assert "\n" not in str(raised.value)


def test_a_bad_batch_leaves_the_trainer_able_to_go_on():
    t, good = trainer(), samples()
    with pytest.raises(ValueError, match="batch 2"):
        t.fit(with_nan(), 1)
    assert t.progress.step == 0  # the batch before was not yet learnt, since the next one is read ahead
    assert t.fit(good, 2).status.ok and same(t, trained(good))


def test_a_schedule_spans_the_batches_of_the_loader():
    rates: list[float] = []
    t = trainer()
    t.learning = replace(t.learning)
    note = lambda kind, fields: rates.append(fields["learning_rate"]) if kind == "batch" else None  # noqa: E731
    t.fit(loader(), 2, callbacks=[note])
    expected = [1e-2 * t.learning.schedule.factor(step, 2 * 7) for step in range(2 * 7)]
    assert rates == pytest.approx(expected, rel=1e-12)
