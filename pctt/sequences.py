"""Training on long sequences, a chunk at a time: truncated recurrence.

A batch of streams is cut into chunks of as many steps as the network is unrolled for. Every chunk is one
learning
step, which begins with the state that the chunk before has left: h0 and c0 are clamped to it, and errors do
not cross from one chunk into the one before.

The state that is carried is the feedforward one, that of a sweep through the chunk with the weights of before
its learning step, not the activities after inference. It is thus what a forward pass of backpropagation
through time would carry, and needs no targets, as in validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pctt import checkpoint
from pctt._checks import require_count
from pctt.backprop import energy
from pctt.config import from_dict
from pctt.engine import Engine, Relaxation
from pctt.feed import Batch, Data, Feed, InMemory
from pctt.inference import Inference
from pctt.learning import Learning
from pctt.network import Network, Weights
from pctt.recurrent import (
    check_numbers,
    is_categorical,
    last_nodes,
    num_steps,
    num_tokens,
    output_nodes,
    spread,
    zero_state,
)
from pctt.run import CHECKPOINT, Callback, FitResult, Progress, Trainer

Chunks = tuple[Tensor, Tensor]
"""Inputs and targets, [num_chunks, streams, T] of tokens and labels, with a further axis of vectors; row b of
a chunk goes on where row b of the one before ended. `pctt.data.text.windows` makes them.
"""


class Stream:
    """Trains an unrolled network on streams, by predictive coding or as its backprop twin.

    net: of `unroll`, with an output at every step.
    inference, learning, weights, algorithm, seed, backend, device: as of a `Trainer`.

    losses: [(learning step, loss)] of every chunk seen, before that step; validation: the same of the
    held-out chunks. A loss is the mean over outputs, in bits for distributions (2 to the power of it is the
    perplexity), else an output's energy.

    >>> stream = Stream(net, Inference(20, 0.1), Adam(1e-3))  # doctest: +SKIP
    >>> stream.fit(windows(text.train, 25, 32), epochs=2)  # doctest: +SKIP
    """

    def __init__(
        self,
        net: Network,
        inference: Inference | None = None,
        learning: Learning | None = None,
        *,
        weights: Weights | None = None,
        algorithm: str = "pc",
        seed: int = 0,
        backend: str = "reference",
        device: str | int | None = None,
    ) -> None:
        steps = num_steps(net)
        if len(output_nodes(net)) != steps:
            raise ValueError("a stream has a target at every step; unroll with outputs='all'.")
        self.net = net
        self.validation: list[tuple[int, float]] = []
        self._trainer = _ChunkTrainer(
            net,
            inference,
            learning,
            weights=weights,
            algorithm=algorithm,
            seed=seed,
            backend=backend,
            device=device,
            clamped=(*net.nodes[: net.num_roots], *output_nodes(net)),
        )

    @property
    def weights(self) -> Weights:
        """A copy of the weights."""
        return self._trainer.weights

    @property
    def progress(self) -> Progress:
        """Where it is; a pass is an epoch, a chunk a batch."""
        return self._trainer.progress

    @property
    def losses(self) -> list[tuple[int, float]]:
        """[(learning step, loss)] of every chunk seen."""
        return self._trainer.losses

    def fit(
        self,
        chunks: Chunks,
        epochs: int,
        validation: Chunks | None = None,
        validate_every: int | None = None,
        callbacks: Sequence[Callback] = (),
        save_to: str | Path | None = None,
        save_every: int | None = None,
    ) -> FitResult:
        """Goes over the chunks in order until `epochs` passes have been made in all; each pass begins with a
        state of zeros. A stream that has made some goes on from there, within a pass from where it stopped.

        validation: chunks whose loss is taken after every pass, and after every `validate_every` learning
            steps.
        callbacks, save_to, save_every: as of `Trainer.fit`.

        Divergence and NaN end the run before they reach the weights; look at the result's status.
        Raises ValueError for chunks that do not fit the network.
        """
        if validate_every is not None:
            require_count("validate_every", validate_every, least=1)
            if validation is None:
                raise ValueError("validate_every needs validation chunks; give both.")
        if validation is not None:
            self._trainer.check(validation)

        def watch(kind: str, fields: dict[str, Any]) -> None:
            step = self.progress.step
            due = kind == "epoch" or (validate_every and kind == "batch" and step % validate_every == 0)
            if validation is not None and due and (not self.validation or self.validation[-1][0] != step):
                self.validation.append((step, self.evaluate(validation)))

        self._trainer.batch_size = self._trainer.check(chunks)
        return self._trainer.fit(
            chunks, epochs, callbacks=(watch, *callbacks), save_to=save_to, save_every=save_every
        )

    def stop(self) -> None:
        """Asks a running `fit` to save and return after the chunk it is at."""
        self._trainer.stop()

    def evaluate(self, chunks: Chunks) -> float:
        """The mean loss over all chunks, predicted by sweeps from a state of zeros on: in bits per symbol for
        distributions.
        """
        streams = self._trainer.check(chunks)
        state = zero_state(self.net, streams, self._trainer.engine.dtype)
        losses: list[float] = []
        for inputs, targets in zip(*chunks, strict=True):
            loss, state = self._trainer.sweep(
                spread(self.net, inputs, targets, state, self._trainer.engine.dtype)
            )
            losses.append(loss)
        return sum(losses) / len(losses)

    def perplexity(self, chunks: Chunks) -> float:
        """2 to the power of `evaluate`, of distributions."""
        if not is_categorical(self.net):
            raise ValueError("perplexity is of distributions; this network's outputs are not, use evaluate.")
        return 2.0 ** self.evaluate(chunks)

    # --- storage --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a stream needs to go on bit for bit, as plain tensors: {"weights", "learning", "carried":
        trees of tensors, "losses", "validation": [N, 2], "progress": [5]}.
        """
        progress = asdict(self.progress)
        return {
            "weights": self.weights,
            "learning": self._trainer.engine.learning_state(),
            "carried": {name: values.clone() for name, values in self._trainer.carried.items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64).view(-1, 2),
            "validation": torch.tensor(self.validation, dtype=torch.float64).view(-1, 2),
            "progress": torch.tensor([float(value) for value in progress.values()], dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave, of a stream with the same network and settings."""
        trainer = self._trainer
        trainer.engine.load_weights(state["weights"])
        trainer.engine.load_learning_state(state["learning"])
        trainer.carried = {name: values.clone() for name, values in state["carried"].items()}
        trainer.losses[:] = [(int(step), loss) for step, loss in state["losses"].tolist()]
        self.validation = [(int(step), loss) for step, loss in state["validation"].tolist()]
        epoch, batch, step, total, samples = state["progress"].tolist()
        trainer.progress = Progress(int(epoch), int(batch), int(step), total, int(samples))

    def save(self, folder: str | Path) -> Path:
        """Writes weights, learning state, carried state and progress to `folder`."""
        return self._trainer.save(folder)

    def load(self, folder: str | Path) -> None:
        """Goes on from what `save` wrote, of a stream with the same network and settings; the losses on the
        way are not in it.
        """
        tensors, description = checkpoint.read(Path(folder) / CHECKPOINT)
        tree = checkpoint.unflatten(tensors)
        self._trainer.engine.load_weights(tree["weights"])
        self._trainer.engine.load_learning_state(tree.get("learning", {}))
        self._trainer.carried = dict(tree.get("carried", {}))
        self._trainer.progress = from_dict(Progress, description["progress"], "progress")


class _ChunkTrainer(Trainer):
    """A trainer whose batches are chunks in their order, each with the state that the one before has left."""

    def __init__(
        self, net: Network, inference: Inference | None, learning: Learning | None, **others: Any
    ) -> None:
        super().__init__(net, inference, learning, **others)
        self.carried: dict[str, Tensor] = {}
        self.losses: list[tuple[int, float]] = []

    def check(self, chunks: Any) -> int:
        """The number of streams. Raises ValueError for what is no chunks of this network."""
        if (
            not isinstance(chunks, tuple)
            or len(chunks) != 2
            or not all(isinstance(c, Tensor) for c in chunks)
        ):
            raise ValueError("chunks must be (inputs, targets), two tensors [num_chunks, streams, T, ...].")
        inputs, targets = chunks
        if inputs.dim() < 3 or inputs.shape[:3] != targets.shape[:3] or 0 in inputs.shape[:3]:
            raise ValueError(
                "inputs and targets must begin with the same [num_chunks, streams, T], got "
                f"{list(inputs.shape)} and {list(targets.shape)}."
            )
        for values in chunks:
            if values.is_floating_point() and not torch.isfinite(values).all():
                raise ValueError("chunks hold NaN or infinite values; clean the data first.")
        net = self.net
        spread(net, inputs[0], targets[0], dtype=self.engine.dtype)
        for what, values, below in (
            ("tokens", inputs, num_tokens(net)),
            ("labels", targets, net.widths[net.output_index]),
        ):
            if below is not None and not values.is_floating_point():
                check_numbers(what, values, below)
        return inputs.shape[1]

    def sweep(self, nodes: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The loss of a chunk, and the state it leaves."""
        engine, net = self.engine, self.net
        engine.sweep({name: nodes[name] for name in net.nodes[: net.num_roots]})
        left = {first: engine.read_node("anchor", last) for first, last in last_nodes(net).items()}
        return _loss(engine, nodes), left

    def _feed(self, data: Data) -> Feed:
        assert isinstance(data, tuple)
        inputs, targets = data
        rows = {self.net.input_name: inputs.flatten(0, 1), self.net.output: targets.flatten(0, 1)}
        in_order = torch.arange(inputs.shape[0] * inputs.shape[1])
        return InMemory(Batch(rows, None), self.batch_size, lambda epoch: in_order)

    def _train_batch(
        self, batch: dict[str, Tensor], upcoming: dict[str, Tensor] | None, rate: float, record: bool
    ) -> Relaxation:
        del upcoming  # its state is not known yet
        inputs, targets = batch[self.net.input_name], batch[self.net.output]
        begins = self.progress.batch == 0
        state = zero_state(self.net, len(inputs), self.engine.dtype) if begins else self.carried
        nodes = spread(self.net, inputs, targets, state, self.engine.dtype)
        loss, left = self.sweep(nodes)
        relaxation = super()._train_batch(nodes, None, rate, record)
        if relaxation.status.ok:
            self.carried = left
            self.losses.append((self.progress.step + 1, loss))
        return relaxation

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / CHECKPOINT
        path.parent.mkdir(parents=True, exist_ok=True)
        trees = {
            "weights": self.engine.weights(),
            "learning": self.engine.learning_state(),
            "carried": self.carried,
        }
        tensors = checkpoint.flatten({name: tree for name, tree in trees.items() if tree})
        checkpoint.write(path, tensors, {**self._description(), "progress": asdict(self.progress)})
        return path


def _loss(engine: Engine, nodes: Mapping[str, Tensor]) -> float:
    """Of the last sweep, mean over samples and outputs."""
    net, layer = engine.net, engine.net.layer(engine.net.output_index)
    losses: list[Tensor] = []
    for name in output_nodes(net):
        prediction, target = engine.read_node("anchor", name), nodes[name].cpu()
        if is_categorical(net):
            logs = prediction.clamp_min(torch.finfo(prediction.dtype).tiny).log2()
            losses.append(-(target * logs).sum(-1).mean())
        else:
            losses.append(energy(layer, prediction, target).mean())
    return float(torch.stack(losses).mean())


def sample(
    net: Network,
    weights: Weights,
    tokens: Tensor,
    count: int,
    seed: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """Goes on with a sequence of tokens: `count` further ones, each drawn from what the network predicts.

    net: of one step, `unroll(cell, 1, ...)`, with the weights of any number of steps.
    tokens: int64 [N], what comes before, at least one.    temperature: 0 takes the likeliest each time.
    """
    if num_steps(net) != 1 or not is_categorical(net):
        raise ValueError("sampling goes step by step; give unroll(cell, 1, ...) with a categorical output.")
    if tokens.dim() != 1 or not len(tokens):
        raise ValueError(f"tokens must be [N] with N at least 1, got {list(tokens.shape)}.")
    require_count("count", count)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature!r}.")
    roots = net.nodes[: net.num_roots]
    engine = Engine(net, weights, Inference(num_steps=0), roots)
    generator = torch.Generator().manual_seed(seed)
    state, drawn = zero_state(net, 1, engine.dtype), list[int]()
    given = tokens.tolist()
    for position in range(len(given) + count - 1):
        token = given[position] if position < len(given) else drawn[-1]
        shares = engine.sweep(spread(net, torch.tensor([[token]]), None, state, engine.dtype))[0]
        state = {name: engine.read_node("anchor", last) for name, last in last_nodes(net).items()}
        if position < len(given) - 1:
            continue
        if temperature == 0.0:
            drawn.append(int(shares.argmax()))
        else:
            logits = shares.double().clamp_min(1e-300).log() / temperature
            drawn.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return torch.tensor(drawn[:count], dtype=torch.int64)
