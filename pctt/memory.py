"""Associative memories: networks that have learned a set of patterns and complete or clean a part of one.

    HierarchicalMemory   a memory vector predicts hidden layers, these the pattern (Salvatori et al. 2021)
    RecurrentMemory      every unit predicted from all others, e = x - x W - b, W without its diagonal: it
                         learns means and covariances (Tang et al. 2023)

Both are networks like any other, trained by `pctt.Trainer` and asked by `pctt.recall`: known units are held,
the others start where the caller says and relax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pctt._checks import require_count, require_finite_positive
from pctt.energies import Gaussian
from pctt.inference import Inference
from pctt.initialisers import init
from pctt.layers.block import Block, Step
from pctt.layers.dense import Dense
from pctt.layers.detach import Detach
from pctt.layers.maps import Linear
from pctt.learning import Adam, Learning
from pctt.network import INPUT, Network, Weights, check_weights
from pctt.queries import recall
from pctt.run import Callback, FitResult, Trainer
from pctt.wiring import graph

PATTERN = "pattern"
"""The node that patterns are clamped to."""


class Memory:
    """What both memories share.

    net, weights: the network, and its weights as they are now.
    training, asking: inference while learning, and while recalling.
    """

    def __init__(
        self,
        net: Network,
        weights: Weights,
        training: Inference,
        asking: Inference,
        batch_size: int,
        seed: int,
    ) -> None:
        self.net = net
        self.weights = weights
        self.training = training
        self.asking = asking
        self.batch_size = batch_size
        self.seed = seed

    @property
    def units(self) -> int:
        """Of a pattern."""
        return self.net.widths[self.net.node_index(PATTERN)]

    def clamps(self, count: int) -> dict[str, Tensor]:
        """What is clamped beside the pattern."""
        del count
        return {}

    def fit(
        self,
        patterns: Tensor,
        epochs: int,
        learning: Learning | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> FitResult:
        """Learns patterns [N, units], from the weights as they are, by `pctt.Trainer`."""
        patterns = self._checked(patterns)
        data = {**self.clamps(len(patterns)), PATTERN: patterns}
        trainer = Trainer(
            self.net,
            self.training,
            learning or Adam(1e-3),
            weights=self.weights,
            batch_size=self.batch_size,
            seed=self.seed,
            clamped=tuple(data),
        )
        outcome = trainer.fit(data, epochs, callbacks=callbacks)
        self.weights = trainer.weights
        return outcome

    def recall(
        self, patterns: Tensor, known: Tensor | None = None, asking: Inference | None = None
    ) -> Tensor:
        """The patterns [B, units] that relaxation makes of these.

        known: bool [B, units] or [units]: True where a unit is known and stays; None where none is sure, as
            in noisy patterns. The other units start as given.
        asking: other settings than the memory's own.
        """
        patterns = self._checked(patterns)
        mask = torch.zeros_like(patterns, dtype=torch.bool) if known is None else known.expand_as(patterns)
        given = {**self.clamps(len(patterns)), PATTERN: patterns}
        result = recall(self.net, self.weights, given, {PATTERN: mask}, asking or self.asking, throw=True)
        return result.activities[PATTERN]

    def _checked(self, patterns: Tensor) -> Tensor:
        if patterns.dim() != 2 or patterns.shape[1] != self.units:
            raise ValueError(
                f"patterns must be [N, {self.units}] for this memory, got {list(patterns.shape)}."
            )
        return patterns.to(check_weights(self.net, self.weights))


class HierarchicalMemory(Memory):
    """A generative network: memory vector -> layers -> pattern. What it is asked relaxes down the energy.

    units: of a pattern.
    layers: units of the memory vector and of the hidden layers, from the top down.
    activation: of all layers above the pattern.
    prior: precision of the memory vector about its learned mean. The smaller, the less recall is drawn to the
        mean of all patterns.
    batch_size: patterns per learning step.    seed: of weights and batch order.    dtype: of both.
    training, asking: inference while learning, and while recalling; by default 40 and 1000 steps of momentum.
    """

    def __init__(
        self,
        units: int,
        layers: Sequence[int] = (64, 256),
        activation: str = "tanh",
        prior: float = 0.01,
        batch_size: int = 50,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        training: Inference | None = None,
        asking: Inference | None = None,
    ) -> None:
        require_finite_positive("prior", prior)
        top, *hidden = layers
        nodes: dict[str, tuple[Any, ...]] = {"memory": (Dense(top, energy=Gaussian(prior)), INPUT)}
        above = "memory"
        for number, size in enumerate(hidden, start=1):
            nodes[f"hidden{number}"] = (Dense(size, activation, activate="input"), above)
            above = f"hidden{number}"
        nodes[PATTERN] = (Dense(units, activation, activate="input"), above)
        net = graph({INPUT: 1}, nodes)
        relaxing = Inference(40, 0.05, dynamics="momentum", momentum=0.9)
        super().__init__(
            net,
            init(net, seed, dtype=dtype),
            training or relaxing,
            asking or replace(relaxing, num_steps=1000),
            batch_size,
            seed,
        )

    def clamps(self, count: int) -> dict[str, Tensor]:
        return {INPUT: torch.zeros(count, 1, dtype=check_weights(self.net, self.weights))}


class RecurrentMemory(Memory):
    """Every unit is predicted from all others of the pattern: e = x - x W - b.

    Recall moves every free unit towards its own prediction and no other one (`Detach`): at rest the free
    units are the most probable ones of a Gaussian with the learned mean and covariance, given the known ones.

    units: of a pattern.    batch_size, seed, dtype: as of `HierarchicalMemory`.
    asking: inference while recalling; None for momentum of 1000 steps.
    """

    def __init__(
        self,
        units: int,
        batch_size: int = 50,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        asking: Inference | None = None,
    ) -> None:
        require_count("units", units, least=2)
        block = Block([Step(Detach()), Step(Linear(units, mask="off_diagonal"))])
        net = graph({}, {PATTERN: (block, PATTERN)})
        weights = init(net, seed, "normal", 1e-4, dtype)
        relaxing = Inference(1000, 0.2, dynamics="momentum", momentum=0.9)
        super().__init__(net, weights, Inference(num_steps=0), asking or relaxing, batch_size, seed)

    def learn(self, patterns: Tensor, ridge: float = 1e-3) -> None:
        """The weights that learning with weight decay tends to, at once, as a product of each unit's own
        regression on the others: W_ji = -P_ji / P_ii with P the inverse of covariance + ridge.

        ridge: above 0 where there are fewer patterns than units.
        """
        dtype = check_weights(self.net, self.weights)
        exact = self._checked(patterns).double()
        mean = exact.mean(0)
        centred = exact - mean
        covariance = centred.T @ centred / len(exact)
        precision = torch.linalg.inv(covariance + ridge * torch.eye(self.units, dtype=exact.dtype))
        weight = -precision / precision.diagonal()
        weight.fill_diagonal_(0.0)
        self.weights = {PATTERN: {"weight": weight.to(dtype), "bias": (mean - mean @ weight).to(dtype)}}


# --- how much a memory holds --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capacity:
    """How well `count` stored patterns are recalled.

    error, given: mean squared error per unit of what was recalled, and of what it was recalled from.
    recalled: share of the patterns whose own error is below the threshold.
    """

    count: int
    error: float
    given: float
    recalled: float


def capacity(
    make: Callable[[Tensor], Memory],
    patterns: Tensor,
    counts: Sequence[int],
    known: Tensor | None = None,
    noise: float = 0.0,
    threshold: float = 0.005,
    seed: int = 0,
) -> list[Capacity]:
    """Recall of the first so many patterns by memories that have learned just these.

    make: gives a memory that has learned the patterns [N, units] it is given.
    known: bool [units], the part that recall is given, beside zeros; None for all units.
    noise: standard deviation of what is added to the units given. With `known` these stay as they are given.
    threshold: mean squared error per unit below which a pattern counts as recalled.
    """
    found: list[Capacity] = []
    for count in counts:
        stored = patterns[:count]
        generator = torch.Generator().manual_seed(seed)
        given = stored + noise * torch.randn(stored.shape, generator=generator, dtype=stored.dtype)
        given = given if known is None else given * known
        answer = make(stored).recall(given, known)
        errors = (answer - stored).square().mean(-1)
        before = float((given - stored).square().mean())
        share = float((errors < threshold).double().mean())
        found.append(Capacity(len(stored), float(errors.mean()), before, share))
    return found


# --- what others recall -------------------------------------------------------------------------------------


def nearest(stored: Tensor, patterns: Tensor, known: Tensor | None = None) -> Tensor:
    """For each pattern the stored one that is nearest to it in the known units: no memory but a list."""
    return stored[_distances(stored, patterns, known).argmin(-1)]


def hopfield(
    stored: Tensor,
    patterns: Tensor,
    known: Tensor | None = None,
    sharpness: float = 1.0,
    steps: int = 3,
) -> Tensor:
    """A modern Hopfield network (Ramsauer et al. 2021) that compares by distance (Millidge et al. 2022):
    x <- softmax(-sharpness/2 |x - stored|^2) stored, distances over the known units. It keeps the patterns
    themselves.
    """
    state = patterns
    for _ in range(steps):
        state = torch.softmax(-0.5 * sharpness * _distances(stored, state, known), -1) @ stored
        if known is not None:
            state = torch.where(known.expand_as(patterns), patterns, state)
    return state


def _distances(stored: Tensor, patterns: Tensor, known: Tensor | None) -> Tensor:
    """[B, N] squared distances over the known units, up to a number per row."""
    mask = torch.ones_like(patterns) if known is None else known.expand_as(patterns).to(patterns.dtype)
    return mask @ stored.square().T - 2.0 * (mask * patterns) @ stored.T
