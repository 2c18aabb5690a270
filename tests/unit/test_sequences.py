"""Truncated recurrence on streams: against torch's own loop, carried state, resuming, losses, sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_trees_near, generator, random_weights
from torch import Tensor, nn
from torch.nn import functional

import pctt
from pctt import (
    Adam,
    Categorical,
    Dense,
    Embedding,
    GRUCell,
    Inference,
    LSTMCell,
    RNNCell,
    Status,
    Stream,
    unroll,
)
from pctt.data.text import windows
from pctt.network import Network
from pctt.recurrent import cell_weights
from pctt.sequences import Chunks, sample

SYMBOLS, UNITS, LENGTH, STREAMS = 5, 6, 4, 3
EXACT = Inference(1, 1.0, "fixed", sweep="gauss_seidel")


def character_network(length: int = LENGTH, cell: Any = None) -> Network:
    output = Dense(SYMBOLS, "softmax", energy=Categorical())
    return unroll(cell or LSTMCell(UNITS), length, Embedding(SYMBOLS, 3), output)


def chunks(count: int = 6, seed: int = 0) -> Chunks:
    ids = torch.randint(SYMBOLS, (count * LENGTH * STREAMS + 1,), generator=generator(seed))
    return windows(ids, LENGTH, STREAMS)


def stream(algorithm: str = "pc", inference: Inference = EXACT, seed: int = 0) -> Stream:
    net = character_network()
    return Stream(net, inference, Adam(1e-2), weights=random_weights(net), algorithm=algorithm, seed=seed)


class Twin(nn.Module):
    """Truncated backpropagation through time as one writes it in torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(SYMBOLS, 3)
        self.lstm = nn.LSTM(3, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, SYMBOLS)
        self.double()
        nn.init.zeros_(self.lstm.bias_hh_l0)
        self.lstm.bias_hh_l0.requires_grad_(False)  # two biases that add up would learn twice as fast

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {
            "e1": {"weight": self.table.weight.detach().clone()},
            **cell_weights(LSTMCell(UNITS), self.lstm),
            "y1": {
                "weight": self.head.weight.detach().mT.clone(),
                "bias": self.head.bias.detach().clone(),
            },
        }

    def fit(self, data: Chunks, epochs: int) -> list[float]:
        optimiser = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)
        losses: list[float] = []
        for _ in range(epochs):
            state = None
            for inputs, targets in zip(*data, strict=True):
                hidden, state = self.lstm(self.table(inputs), state)
                state = tuple(part.detach() for part in state)
                loss = functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())
                optimiser.zero_grad()
                (loss * LENGTH).backward()
                optimiser.step()
                losses.append(loss.item() / math.log(2.0))
        return losses


@pytest.mark.parametrize("algorithm", ["backprop", "pc"])
def test_learning_is_truncated_backpropagation_through_time(algorithm: str) -> None:
    """The twin, and fixed predictions, whose gradients are backpropagation's: two passes, state carried."""
    twin, data = Twin(), chunks()
    ours = Stream(character_network(), EXACT, Adam(1e-2), weights=twin.weights(), algorithm=algorithm)
    assert ours.fit(data, 2).status is Status.COMPLETED
    losses = twin.fit(data, 2)
    assert [step for step, _ in ours.losses] == list(range(1, 13))
    assert_near(torch.tensor([loss for _, loss in ours.losses]), torch.tensor(losses), 1e-6)
    assert_trees_near(ours.weights, twin.weights(), 1e-8)


def test_the_state_is_carried_within_a_pass_and_is_zero_at_its_beginning() -> None:
    """A still network's losses on the stream are those of one long sequence."""
    net, data = character_network(), chunks(4)
    weights = random_weights(net)
    still = Stream(net, EXACT, Adam(1e-30), weights=weights)
    still.fit(data, 2)
    long = Stream(character_network(4 * LENGTH), EXACT, weights=weights)
    whole = tuple(part.transpose(0, 1).reshape(1, STREAMS, 4 * LENGTH) for part in data)
    mean = long.evaluate((whole[0], whole[1]))
    losses = [loss for _, loss in still.losses]
    assert sum(losses[:4]) / 4 == pytest.approx(mean, rel=1e-12)
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-12)
    assert still.evaluate(data) == pytest.approx(mean, rel=1e-12)
    assert still.perplexity(data) == pytest.approx(2.0**mean)


def test_a_network_that_knows_nothing_takes_the_bits_of_its_symbols() -> None:
    net = character_network()
    nothing = {
        name: {k: torch.zeros_like(v) for k, v in layer.items()} for name, layer in pctt.init(net).items()
    }
    assert Stream(net, weights=nothing).evaluate(chunks()) == pytest.approx(math.log2(SYMBOLS), rel=1e-6)


@pytest.mark.parametrize(
    "inference",
    [
        Inference(6, 0.1),
        Inference(6, 0.3, "fixed"),
        Inference(4, 0.05, variables="errors"),
        Inference(4, 0.05, weights_at="every_step"),
        Inference(6, 0.1, initial="zeros"),
    ],
    ids=["strict", "fixed", "errors", "every step", "zeros"],
)
def test_a_stream_that_was_stopped_goes_on_bit_for_bit(inference: Inference, tmp_path: Path) -> None:
    data, held_out = chunks(), chunks(2, seed=1)
    whole = stream(inference=inference)
    assert whole.fit(data, 2, held_out, validate_every=4).status.ok
    assert [step for step, _ in whole.validation] == [4, 6, 8, 12]

    first = stream(inference=inference)

    def stop(kind: str, fields: dict[str, Any]) -> None:
        if kind == "batch" and fields["step"] == 8:
            first.stop()

    assert first.fit(data, 2, held_out, 4, [stop], save_to=tmp_path).status is Status.STOPPED
    by_state, by_file = stream(inference=inference), stream(inference=inference)
    by_state.load_state(first.state())
    by_file.load(tmp_path)
    for other in (by_state, by_file):
        assert other.fit(data, 2, held_out, 4).status.ok
        assert_trees_near(other.weights, whole.weights, 0.0)
        assert other.losses[-4:] == whole.losses[-4:] and other.validation[-1] == whole.validation[-1]
    assert by_state.losses == whole.losses and by_state.validation == whole.validation


def test_a_state_is_plain_tensors() -> None:
    trained = stream()
    trained.fit(chunks(2), 1)

    def check(tree: Any) -> None:
        for value in tree.values():
            if isinstance(value, dict):
                check(value)
            else:
                assert isinstance(value, Tensor)

    state = trained.state()
    check(state)
    assert set(state["carried"]) == {"h0", "c0"} and state["carried"]["h0"].any()


@pytest.mark.parametrize(
    ("cell", "algorithm", "inference"),
    [
        (RNNCell(12), "pc", Inference(6, 0.1)),
        (GRUCell(12), "pc", EXACT),
        (LSTMCell(12, "gates"), "backprop", EXACT),
    ],
    ids=["strict", "exact", "backprop"],
)
def test_a_repeated_word_is_learnt(cell: Any, algorithm: str, inference: Inference) -> None:
    """abcde and again: of the five symbols each follows from the one before."""
    net = character_network(cell=cell)
    trained = Stream(net, inference, Adam(2e-2), algorithm=algorithm)
    trained.fit(windows(torch.arange(5).repeat(100), LENGTH, STREAMS), 3)
    assert trained.losses[0][1] > 2.0 and trained.losses[-1][1] < 0.4
    drawn = sample(character_network(1, cell), trained.weights, torch.tensor([0, 1]), 8, temperature=0.0)
    assert drawn.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]


def test_samples_are_seeded_and_follow_the_distribution() -> None:
    net = character_network(1)
    weights = {
        name: {k: torch.zeros_like(v) for k, v in layer.items()} for name, layer in pctt.init(net).items()
    }
    shares = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    weights["y1"]["bias"] = shares.log()
    start = torch.tensor([0])
    drawn = sample(net, weights, start, 2000, seed=3)
    assert torch.equal(drawn, sample(net, weights, start, 2000, seed=3))
    found = torch.bincount(drawn, minlength=5) / 2000
    assert_near(found, shares, 0.05)
    assert sample(net, weights, start, 0).tolist() == []
    assert set(sample(net, weights, start, 50, temperature=0.05).tolist()) == {0}


def test_sequences_of_vectors_have_an_energy_for_a_loss() -> None:
    """A delayed echo: y_t = x_{t-1}."""
    signal = torch.randn(20, STREAMS, LENGTH, 2, generator=generator(0))
    flat = signal.transpose(0, 1).flatten(1, 2)
    late = torch.cat([torch.zeros(STREAMS, 1, 2), flat[:, :-1]], 1)
    targets = late.unflatten(1, (20, LENGTH)).transpose(0, 1)
    net = unroll(RNNCell(12), LENGTH, 2, Dense(2))
    trained = Stream(net, Inference(8, 0.2), Adam(2e-2))
    data = (signal, targets.contiguous())
    before = trained.evaluate(data)
    assert trained.fit(data, 15).status.ok
    after = trained.evaluate(data)
    assert after < 0.2 * before
    with pytest.raises(ValueError, match="perplexity is of distributions"):
        trained.perplexity(data)


def test_divergence_ends_the_run_before_the_weights() -> None:
    net = character_network()
    weights = random_weights(net)
    weights["e1"]["weight"] *= 1e200
    weights["c1"]["weight.x"] *= 1e200  # whose product is infinite, and infinity minus infinity NaN
    spoilt = Stream(net, EXACT, Adam(1e-2), weights=weights)
    result = spoilt.fit(chunks(), 1)
    assert result.status is Status.NON_FINITE and spoilt.progress.step == 0 and not spoilt.losses
    assert_trees_near(spoilt.weights, weights, 0.0)


INPUTS, TARGETS = chunks()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Stream(pctt.chain(2, [Dense(2)])), "made by unroll"),
        (lambda: Stream(unroll(RNNCell(2), 3, 2, Dense(1), "last")), "outputs='all'"),
        (lambda: Stream(character_network(), Inference(initial="carried")), "carried"),
        (lambda: stream().fit((INPUTS[0], TARGETS[0]), 1), r"targets must begin|must begin with the same"),
        (lambda: stream().fit((INPUTS, TARGETS[:2]), 1), "must begin with the same"),
        (lambda: stream().fit(INPUTS, 1), "chunks must be"),  # type: ignore
        (lambda: stream().fit((INPUTS + 1, TARGETS), 1), "tokens must be whole numbers 0 to 4"),
        (lambda: stream().fit((INPUTS, TARGETS - 1), 1), "labels must be whole numbers 0 to 4"),
        (lambda: stream().fit((INPUTS[..., :3], TARGETS[..., :3]), 1), r"inputs must be \[B, 4\]"),
        (lambda: stream().fit((INPUTS, TARGETS), 1, validate_every=2), "needs validation chunks"),
        (lambda: stream().fit((INPUTS, TARGETS), 1, (INPUTS, TARGETS), 0), "validate_every must be"),
        (lambda: sample(character_network(), {}, INPUTS[0, 0], 1), "goes step by step"),
        (
            lambda: sample(character_network(1), pctt.init(character_network(1)), INPUTS[0], 1),
            r"tokens must be \[N\]",
        ),
        (
            lambda: sample(character_network(1), {}, INPUTS[0, 0], 1, temperature=-1.0),
            "temperature must be",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
