"""From the forms that data come in to the batches of a trainer: tensors and arrays, torch data sets, data
loaders.

Whatever the form, batch k of epoch n holds the same samples every time, so that a run that was broken off
goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from pctt.data import Split
from pctt.energies import Categorical
from pctt.network import Network
from pctt.queries import check_distribution, check_whole_numbers

Data = Split | tuple[Any, Any] | Mapping[str, Any] | Dataset[Any] | Iterable[Any]
"""Inputs and labels or targets; or the data of each clamped node, by name; or a data set of such samples; or
a loader of such batches.
"""


@dataclass(frozen=True)
class Batch:
    """Checked data of some samples.

    nodes: {clamped node: [B, units]} in the engine's dtype.
    labels: int64 [B] or [B, positions]; None where the output is not clamped.
    """

    nodes: dict[str, Tensor]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(next(iter(self.nodes.values())))

    def rows(self, which: Tensor) -> Batch:
        """Some of the samples. which: int64 [B], their numbers."""
        labels = None if self.labels is None else self.labels[which]
        return Batch({name: values[which] for name, values in self.nodes.items()}, labels)


class Feed(Protocol):
    """A source of batches; `num_batches` to an epoch."""

    num_batches: int

    def epoch(self, number: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch in the order of training, from batch `first` on. Both count from 0."""
        ...

    def once(self) -> Iterator[Batch]:
        """Every sample once, in its own order, in batches of any size."""
        ...


class InMemory:
    """A feed of checked tensors.

    samples: all of them.    batch_size: of all batches but the last.
    order: of the samples, by number of the epoch.
    """

    def __init__(self, samples: Batch, batch_size: int, order: Callable[[int], Tensor]) -> None:
        self.num_batches = math.ceil(len(samples) / batch_size)
        self._samples, self._batch_size, self._order = samples, batch_size, order

    def epoch(self, number: int, first: int) -> Iterator[Batch]:
        """Batches of an epoch, as `Feed.epoch`."""
        for rows in self._order(number).split(self._batch_size)[first:]:
            yield self._samples.rows(rows)

    def once(self) -> Iterator[Batch]:
        """Every sample once, as `Feed.once`."""
        yield self._samples


class FromDataset:
    """A torch data set of samples (input, label or target) or {node: values}, read when a batch is due.

    dataset: with a length.    read: checks a batch.    batch_size: of all batches but the last.
    order: of the samples, by number of the epoch.
    """

    def __init__(
        self, dataset: Any, read: Callable[[Any], Batch], batch_size: int, order: Callable[[int], Tensor]
    ) -> None:
        self.num_batches = math.ceil(len(dataset) / batch_size)
        self._dataset, self._read, self._batch_size, self._order = dataset, read, batch_size, order

    def epoch(self, number: int, first: int) -> Iterator[Batch]:
        """Batches of an epoch, as `Feed.epoch`."""
        parts = self._order(number).split(self._batch_size)
        for batch, rows in enumerate(parts[first:], first + 1):
            yield _named(f"batch {batch}", self._read, self._collated(rows))

    def once(self) -> Iterator[Batch]:
        """Every sample once, as `Feed.once`."""
        for batch, rows in enumerate(torch.arange(len(self._dataset)).split(self._batch_size), 1):
            yield _named(f"batch {batch}", self._read, self._collated(rows))

    def _collated(self, rows: Tensor) -> Any:
        return default_collate([self._dataset[row] for row in rows.tolist()])


class FromLoader:
    """A `DataLoader`, or anything else with a length that gives batches (inputs, labels or targets) or {node:
    values} each time it is iterated over.

    A loader shuffles, and data sets augment, by torch's global generator. Here each epoch has a generator
    state of its own, made from `seed` and its number, and the caller's is left alone. Of a loader that was
    given a generator the order is that generator's.

    loader: as said.    read: checks a batch.    seed: of the order, with the number of the epoch.
    """

    def __init__(self, loader: Any, read: Callable[[Any], Batch], seed: int) -> None:
        self.num_batches = len(loader)
        self._loader, self._read, self._seed = loader, read, seed

    def epoch(self, number: int, first: int) -> Iterator[Batch]:
        """Batches of an epoch, as `Feed.epoch`; those before `first` are drawn and dropped. Raises ValueError
        where their number is not the length.
        """
        count = 0
        for count, batch in enumerate(_seeded(self._loader, derived_seed(self._seed, number)), 1):
            if count > self.num_batches:
                break
            if count > first:  # the generator must go past those before
                yield _named(f"batch {count}", self._read, batch)
        if count != self.num_batches:
            raise ValueError(
                f"the data loader has a length of {self.num_batches} and gave "
                f"{'more' if count > self.num_batches else count} batches; make its length right."
            )

    def once(self) -> Iterator[Batch]:
        """Every sample once, as `Feed.once`."""
        return self.epoch(0, 0)


def _seeded(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    state = torch.Generator().manual_seed(seed).get_state()
    iterator: Iterator[Any] | None = None
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            try:
                iterator = iter(batches) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                return
            state = torch.get_rng_state()
        yield batch


def _named(where: str, read: Callable[[Any], Batch], data: Any) -> Batch:
    try:
        return read(data)
    except ValueError as error:
        raise ValueError(f"{where} of an epoch: {error}") from None


def feed(
    data: Data,
    read: Callable[[Any], Batch],
    batch_size: int,
    seed: int,
    order: Callable[[int, int], Tensor],
) -> Feed:
    """What `data` are, as a feed.

    read: checks data in memory, as `Reader` does.    batch_size: of forms that have none of their own.
    order: of the samples, by their number and the epoch's.

    Raises ValueError for what is none of the forms of `Data`, or empty.
    """
    if isinstance(data, TensorDataset):  # whole tensors are there already
        data = tuple(data.tensors)
    if isinstance(data, Split | tuple | list | Mapping):
        samples = read(data)
        return InMemory(samples, batch_size, lambda epoch: order(len(samples), epoch))
    if isinstance(data, IterableDataset):
        raise ValueError(
            "an IterableDataset has no order to go on from; give a DataLoader of it that has a length."
        )
    is_dataset = isinstance(data, Dataset)
    kind = "data set" if is_dataset else "data loader"
    if isinstance(data, Tensor | np.ndarray | str | bytes) or not (is_dataset or isinstance(data, Iterable)):
        raise ValueError(
            "data must be (inputs, labels or targets), {node: values}, a torch data set or a data loader, "
            f"got {type(data).__name__}."
        )
    try:
        size = len(data) if isinstance(data, Sized | Dataset) else None  # pyright: ignore[reportArgumentType]
    except TypeError:  # as of loaders of data sets without one
        size = None
    if size is None:
        raise ValueError(
            f"the {kind} has no length, and the learning rate's schedule needs one; give it one."
        )
    if size == 0:
        raise ValueError(f"the {kind} is empty; give it at least one sample.")
    if not is_dataset:
        return FromLoader(data, read, seed)
    count = size
    return FromDataset(data, read, batch_size, lambda epoch: order(count, epoch))


class Reader:
    """Checks data against a network and brings them into its form.

    clamped: the nodes that data are for.    dtype: the engine's.
    """

    def __init__(self, net: Network, clamped: tuple[str, ...], dtype: torch.dtype) -> None:
        self.net, self.clamped, self.dtype = net, clamped, dtype

    def __call__(self, data: Any) -> Batch:
        """Raises ValueError for shapes that do not fit, NaN, labels beyond the output's units, and targets
        of a categorical output that are no distributions.
        """
        net = self.net
        if isinstance(data, Mapping):
            given = {name: _tensor(values) for name, values in data.items()}
        else:
            pair = (data.inputs, data.labels) if isinstance(data, Split) else data
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                got = f"{len(pair)} parts" if isinstance(pair, tuple | list) else type(pair).__name__
                raise ValueError(f"data must be (inputs, labels or targets) or {{node: values}}, got {got}.")
            given = {net.input_name: _tensor(pair[0]), net.output: _tensor(pair[1])}
        if set(given) != set(self.clamped):
            raise ValueError(
                f"data must be of the clamped nodes, {', '.join(self.clamped)}; got {', '.join(given)}."
            )
        sizes = [len(values) for values in given.values()]
        if 0 in sizes or len(set(sizes)) != 1:
            raise ValueError(
                f"inputs and labels must be as many, at least one; got {' and '.join(map(str, sizes))}."
            )
        labels = None
        for name, values in given.items():
            shape, layer = net.shapes[net.node_index(name)], None
            if net.node_index(name) in net.indices:
                layer = net.layer(net.node_index(name))
            if name == net.output and layer is not None and set(self.clamped) >= {net.input_name, net.output}:
                values, labels = self._answers(values, shape, isinstance(layer.energy, Categorical))
            elif not _fits(values, shape):
                expected = ", ".join(map(str, shape))
                word = "inputs" if name == net.input_name else repr(name)
                raise ValueError(
                    f"{word} must be [N, {expected}] for this network, got {list(values.shape)}."
                )
            if not torch.isfinite(values).all():
                row = int((~torch.isfinite(values)).flatten(1).any(-1).nonzero()[0])
                word = {net.input_name: "inputs hold", net.output: "targets hold"}.get(
                    name, f"{name!r} holds"
                )
                raise ValueError(f"{word} NaN or infinite values, first in row {row}; clean the data first.")
            check_whole_numbers(net, name, values)
            given[name] = values.flatten(1).to(self.dtype)
        return Batch(given, labels)

    def _answers(self, answers: Tensor, shape: tuple[int, ...], categorical: bool) -> tuple[Tensor, Tensor]:
        """Targets [N, *shape] and labels [N, *positions], from either."""
        *positions, classes = shape
        units = math.prod(shape)
        if not answers.is_floating_point() and list(answers.shape[1:]) == positions:
            labels = answers.long()
            off = (labels < 0) | (labels >= classes)
            if off.any():
                first = tuple(off.nonzero()[0].tolist())
                raise ValueError(
                    f"labels must be 0 to {classes - 1}, as the output has {classes} units; row {first[0]} "
                    f"has {int(labels[first])}."
                )
            return torch.nn.functional.one_hot(labels, classes), labels
        if tuple(answers.shape[1:]) not in (shape, (units,)):
            where = "".join(f", {size}" for size in positions)
            raise ValueError(
                f"labels must be whole numbers [N{where}], or targets [N{where}, {classes}], got "
                f"{answers.dtype} {list(answers.shape)}."
            )
        rows = answers.reshape(len(answers), *positions, classes)
        if categorical and torch.isfinite(answers).all():
            check_distribution(self.net.output, rows.reshape(-1, classes))
        return answers, rows.argmax(-1)


def _fits(values: Tensor, shape: tuple[int, ...]) -> bool:
    """Samples of the node's shape or flat; those of a flat node may have any shape, as images mostly do."""
    own, units = tuple(values.shape[1:]), math.prod(shape)
    return own in (shape, (units,)) or (len(shape) == 1 and len(own) > 1 and math.prod(own) == units)


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))


def batch_order(seed: int, epoch: int, num_samples: int) -> Tensor:
    """The order in which an epoch takes the samples, drawn from (seed, epoch)."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(derived_seed(seed, epoch)))


def derived_seed(*numbers: int) -> int:
    """A seed that depends on all the numbers, and on nothing else; 0 to 2^63 - 1."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
