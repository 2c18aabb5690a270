"""Recurrent cells: their unrolled graphs against torch's own modules and against predictive coding by
autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_near, assert_trees_near, generator, random_weights
from torch import Tensor, nn
from torch.nn import functional

import pctt
from pctt import (
    SGD,
    Adam,
    Block,
    Categorical,
    Dense,
    Embedding,
    Engine,
    GRUCell,
    Inference,
    LSTMCell,
    Network,
    RNNCell,
    Trainer,
    backprop,
    unroll,
)
from pctt.config import from_dict, to_dict
from pctt.recurrent import (
    cell_weights,
    gather,
    last_nodes,
    num_steps,
    num_tokens,
    output_nodes,
    spread,
    state_nodes,
    zero_state,
)

B, T, IN, UNITS, OUT = 4, 5, 3, 6, 4
CELLS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "rnn": (RNNCell(UNITS), nn.RNN),
    "relu rnn": (RNNCell(UNITS, "relu"), lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)),
    "lstm": (LSTMCell(UNITS), nn.LSTM),
    "lstm, gates": (LSTMCell(UNITS, "gates"), nn.LSTM),
    "gru": (GRUCell(UNITS), nn.GRU),
    "gru, gates": (GRUCell(UNITS, "gates"), nn.GRU),
}
EXACT = Inference(1, 1.0, "fixed", sweep="gauss_seidel")
each_cell = pytest.mark.parametrize("name", CELLS)
SOFTMAX = Dense(OUT, "softmax", energy=Categorical())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Reference:
    """torch's module of a cell with a linear output, and the same weights for an unrolled network."""

    def __init__(self, name: str, layers: int) -> None:
        cell, make = CELLS[name]
        torch.manual_seed(0)
        self.cells = [cell] * layers
        self.module = make(IN, UNITS, num_layers=layers, batch_first=True).double()
        self.head = nn.Linear(UNITS, OUT).double()
        self.suffixes = [f".{number + 1}" if layers > 1 else "" for number in range(layers)]
        self.h0, self.c0 = randn(layers, B, UNITS, seed=5), randn(layers, B, UNITS, seed=6)
        self.weights = cell_weights(self.cells, self.module)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Any]:
        is_lstm = isinstance(self.module, nn.LSTM)
        return self.module(inputs, (self.h0, self.c0) if is_lstm else self.h0)

    @property
    def state(self) -> dict[str, Tensor]:
        state = {f"h0{suffix}": self.h0[number] for number, suffix in enumerate(self.suffixes)}
        if isinstance(self.module, nn.LSTM):
            state |= {f"c0{suffix}": self.c0[number] for number, suffix in enumerate(self.suffixes)}
        return state

    def with_head(self, name: str) -> dict[str, dict[str, Tensor]]:
        head = {"weight": self.head.weight.detach().mT.clone(), "bias": self.head.bias.detach().clone()}
        return {**self.weights, name: head}

    def gradients(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Those that `backward` has left, by layer. Where two biases add up each has the gradient of the
        sum."""
        with torch.no_grad():
            for parameter in self.module.parameters():
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
            for number in range(len(self.cells)):
                once = getattr(self.module, f"bias_hh_l{number}")
                once[: 2 * UNITS if isinstance(self.module, nn.GRU) else None] = 0.0
        assert self.head.weight.grad is not None and self.head.bias.grad is not None
        found = cell_weights(self.cells, self.module)
        return {**found, name: {"weight": self.head.weight.grad.mT, "bias": self.head.bias.grad}}


# --- backpropagation through time ---------------------------------------------------------------------------


@each_cell
@pytest.mark.parametrize("layers", [1, 2])
def test_fixed_prediction_gives_the_gradients_of_torchs_modules(name: str, layers: int) -> None:
    """E14, at either granularity of the nodes."""
    reference = Reference(name, layers)
    inputs, targets = randn(B, T, IN), torch.softmax(randn(B, T, OUT, seed=1), -1)
    net = unroll(reference.cells, T, IN, SOFTMAX)
    weights = reference.with_head("y1")
    given = spread(net, inputs, targets, reference.state, torch.float64)
    result = pctt.infer(net, weights, given, EXACT)
    twin, _, _ = backprop.differentiate(net, weights, given)

    hidden, _ = reference(inputs)
    loss = -(targets * reference.head(hidden).log_softmax(-1)).sum((1, 2)).mean()
    loss.backward()
    expected = reference.gradients("y1")
    assert_trees_near(pctt.weight_gradients(net, weights, result), expected, 1e-10, relative=True)
    assert_trees_near(twin, expected, 1e-10, relative=True)
    layer = layers if layers > 1 else None
    assert_near(gather(net, result.initial, "h", layer), hidden.detach(), 1e-12)


@each_cell
def test_an_output_after_the_last_step_alone(name: str) -> None:
    reference = Reference(name, 1)
    inputs, labels = randn(B, T, IN), torch.tensor([0, 3, 1, 1])
    net = unroll(reference.cells[0], T, IN, SOFTMAX, outputs="last")
    assert net.output == "y" and output_nodes(net) == ("y",)
    given = spread(net, inputs, labels, reference.state, torch.float64)
    weights = reference.with_head("y")
    result = pctt.infer(net, weights, given, EXACT)
    hidden, _ = reference(inputs)
    functional.cross_entropy(reference.head(hidden[:, -1]), labels).backward()
    expected = reference.gradients("y")
    assert_trees_near(pctt.weight_gradients(net, weights, result), expected, 1e-10, relative=True)


@each_cell
def test_the_fixed_point_of_small_steps_is_the_same(name: str) -> None:
    reference = Reference(name, 1)
    net = unroll(reference.cells[0], 3, IN, Dense(OUT))
    weights, targets = reference.with_head("y1"), randn(B, 3, OUT, seed=1)
    given = spread(net, randn(B, 3, IN), targets, reference.state, torch.float64)
    result = pctt.infer(net, weights, given, Inference(600, 0.3, "fixed"))
    hidden, _ = reference(randn(B, 3, IN))
    (0.5 * (targets - reference.head(hidden)).square().sum((1, 2)).mean()).backward()
    expected = reference.gradients("y1")
    assert_trees_near(pctt.weight_gradients(net, weights, result), expected, 1e-9, relative=True)


def test_tokens_are_rows_of_the_embedding() -> None:
    cell, tokens = LSTMCell(UNITS), torch.tensor([[0, 4, 2], [3, 3, 1]])
    net = unroll(cell, 3, Embedding(5, IN), SOFTMAX)
    torch.manual_seed(0)
    table, module = nn.Embedding(5, IN).double(), nn.LSTM(IN, UNITS).double()
    head = nn.Linear(UNITS, OUT).double()
    weights = {
        **cell_weights(cell, module),
        "e1": {"weight": table.weight.detach().clone()},
        "y1": {"weight": head.weight.detach().mT.clone(), "bias": head.bias.detach().clone()},
    }
    labels = torch.tensor([[1, 0, 3], [2, 2, 2]])
    given = spread(net, tokens, labels, dtype=torch.float64)
    found = pctt.weight_gradients(net, weights, pctt.infer(net, weights, given, EXACT))
    hidden, _ = module(table(tokens.T))
    (functional.cross_entropy(head(hidden).flatten(0, 1), labels.T.flatten()) * 3).backward()
    assert table.weight.grad is not None and head.weight.grad is not None
    assert_near(found["e1"]["weight"], table.weight.grad, 1e-12)
    assert_near(found["y1"]["weight"], head.weight.grad.mT, 1e-12)
    assert num_tokens(net) == 5 and num_tokens(unroll(cell, 1, 2)) is None


# --- strict predictive coding -------------------------------------------------------------------------------


def drive(weights: dict[str, Tensor], x: Tensor, h: Tensor, prefix: str = "") -> Tensor:
    return x @ weights[f"weight.{prefix}x"] + weights[f"bias.{prefix}x"] + h @ weights[f"weight.{prefix}h"]


def candidate(weights: dict[str, Tensor], x: Tensor, h: Tensor, r: Tensor, prefix: str = "") -> Tensor:
    before = h @ weights[f"weight.{prefix}h"] + weights[f"bias.{prefix}h"]
    return torch.tanh(x @ weights[f"weight.{prefix}x"] + weights[f"bias.{prefix}x"] + r * before)


def predicted(cell: Any, letter: str, w: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
    """The prediction of one node of a step from the nodes v: letters of the step, and h', c' of the one
    before."""
    x, h = v["x"], v["h'"]
    if isinstance(cell, RNNCell):
        return torch.tanh(drive(w, x, h))
    if isinstance(cell, GRUCell):
        if letter in "rz":
            return torch.sigmoid(drive(w, x, h))
        if letter == "n":
            return candidate(w, x, h, v["r"])
        if cell.nodes == "gates":
            return (1 - v["z"]) * v["n"] + v["z"] * h
        r, z = torch.sigmoid(drive(w, x, h)).chunk(2, -1)
        return (1 - z) * candidate(w, x, h, r, "n") + z * h
    if letter in "ifo":
        return torch.sigmoid(drive(w, x, h))
    if letter == "g":
        return torch.tanh(drive(w, x, h))
    if cell.nodes == "gates":
        return v["o"] * torch.tanh(v["c"]) if letter == "h" else v["f"] * v["c'"] + v["i"] * v["g"]
    if letter == "h":
        return torch.sigmoid(drive(w, x, h)) * torch.tanh(v["c"])
    i, f, g = drive(w, x, h).chunk(3, -1)
    return torch.sigmoid(f) * v["c'"] + torch.sigmoid(i) * torch.tanh(g)


@pytest.mark.parametrize("name", [name for name in CELLS if name != "relu rnn"])
@pytest.mark.parametrize("variables", ["states", "errors"])
def test_live_inference_descends_the_energy_of_all_nodes(name: str, variables: str) -> None:
    """Against activities kept as they are, predictions in full and derivatives by autograd."""
    cell, steps, rate = CELLS[name][0], 7, 0.1
    net = unroll(cell, 3, IN, Dense(OUT))
    weights = random_weights(net, gain=1.0)
    given = spread(net, randn(B, 3, IN), randn(B, 3, OUT, seed=1), dtype=torch.float64)
    leaves = {
        layer: {key: value.clone().requires_grad_() for key, value in tree.items()}
        for layer, tree in weights.items()
    }

    def prediction(node: str, values: dict[str, Tensor]) -> Tensor:
        letter, step = node[0], int(node[1:])
        own = leaves.get(f"{letter}1", {})
        if letter == "y":
            return values[f"h{step}"] @ own["weight"] + own["bias"]
        seen = {other: values[f"{other}{step}"] for other in "xifgorznc" if f"{other}{step}" in values}
        before = {f"{other}'": f"{other}{step - 1}" for other in "hc"}
        seen |= {name: values[node] for name, node in before.items() if node in values}
        return predicted(cell, letter, own, seen)

    hidden = [node for node in net.names if node not in given]

    def forward(errors: dict[str, Tensor]) -> dict[str, Tensor]:
        values = dict(given)
        for node in hidden:
            values[node] = prediction(node, values) + errors.get(node, torch.zeros(()))
        return values

    def energy(values: dict[str, Tensor]) -> Tensor:
        return sum(0.5 * (values[n] - prediction(n, values)).square().sum() for n in net.names)  # type: ignore

    moved = {node: value.detach().requires_grad_() for node, value in forward({}).items() if node in hidden}
    if variables == "errors":
        moved = {node: torch.zeros_like(value).requires_grad_() for node, value in moved.items()}
    for _ in range(steps):
        values = forward(moved) if variables == "errors" else {**given, **moved}
        slopes = torch.autograd.grad(energy(values), list(moved.values()))
        moved = {
            node: (value - rate * slope).detach().requires_grad_()
            for (node, value), slope in zip(moved.items(), slopes, strict=True)
        }
    values = forward(moved) if variables == "errors" else {**given, **moved}
    values = {node: value.detach() for node, value in values.items()}
    (energy(values) / B).backward()

    result = pctt.infer(net, weights, given, Inference(steps, rate, variables=variables))
    for node in hidden:
        assert_near(result.activities[node], values[node], 1e-12, node)
    expected = {layer: {key: leaf.grad for key, leaf in tree.items()} for layer, tree in leaves.items()}
    assert_trees_near(pctt.weight_gradients(net, weights, result), expected, 1e-11)  # type: ignore


# --- the graph ----------------------------------------------------------------------------------------------


def test_nodes_of_a_step_at_either_granularity() -> None:
    assert unroll(LSTMCell(2), 1, 3).names == ("c1", "h1")
    assert set(unroll(LSTMCell(2, "gates"), 1, 3).names) == {"i1", "f1", "g1", "o1", "c1", "h1"}
    assert unroll(GRUCell(2), 1, 3).names == ("h1",)
    assert set(unroll(GRUCell(2, "gates"), 1, 3).names) == {"r1", "z1", "n1", "h1"}
    stacked = unroll([LSTMCell(2), GRUCell(5), RNNCell(4)], 2, Embedding(7, 3), Dense(3))
    assert state_nodes(stacked) == ("h0.1", "c0.1", "h0.2", "h0.3")
    assert last_nodes(stacked) == {"h0.1": "h2.1", "c0.1": "c2.1", "h0.2": "h2.2", "h0.3": "h2.3"}
    assert stacked.shapes[stacked.node_index("h2.2")] == (5,)
    assert output_nodes(unroll([RNNCell(2)] * 2, 12, 3)) == tuple(f"h{t}.2" for t in range(1, 13))


@each_cell
def test_weights_do_not_depend_on_the_number_of_steps(name: str) -> None:
    shapes = [unroll(CELLS[name][0], steps, IN, SOFTMAX).weight_shapes() for steps in (1, 2, 7)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("outputs", ["all", "last"])
def test_a_program_grows_no_faster_than_its_steps(outputs: str) -> None:
    def size(steps: int) -> int:
        net = unroll(LSTMCell(2), steps, 2, Dense(2), outputs)
        engine = Engine(net, pctt.init(net), EXACT, [*net.nodes[: net.num_roots], *output_nodes(net)])
        return len(engine.program.training_step())

    assert size(32) - size(16) <= 2 * (size(16) - size(8)) + 8


def test_one_learning_step_is_that_of_the_summed_gradient() -> None:
    net = unroll(LSTMCell(UNITS), T, IN, Dense(OUT))
    weights = random_weights(net)
    given = spread(net, randn(B, T, IN), randn(B, T, OUT, seed=1), dtype=torch.float64)
    trainer = Trainer(net, EXACT, SGD(0.1), weights=weights, batch_size=B, clamped=tuple(given))
    trainer.fit(given, 1)
    found, _, _ = backprop.differentiate(net, weights, given)
    expected = {n: {k: v - 0.1 * found[n][k] for k, v in tree.items()} for n, tree in weights.items()}
    assert_trees_near(trainer.weights, expected, 1e-12)


def test_an_unrolled_network_survives_being_written_down() -> None:
    net = unroll([GRUCell(3), LSTMCell(2, "gates")], 2, Embedding(4, 3), SOFTMAX)
    assert from_dict(Network, to_dict(net), "network") == net


# --- data ---------------------------------------------------------------------------------------------------


def test_sequences_go_to_the_nodes_and_back() -> None:
    net = unroll(LSTMCell(UNITS), T, IN, Dense(OUT))
    inputs, targets = randn(B, T, IN), randn(B, T, OUT)
    given = spread(net, inputs, targets, dtype=torch.float64)
    assert set(given) == {*net.nodes[: net.num_roots], *output_nodes(net)} and num_steps(net) == T
    assert torch.equal(gather(net, given, "x"), inputs) and torch.equal(gather(net, given), targets)
    assert given["h0"].shape == (B, UNITS) and not given["h0"].any() and not given["c0"].any()
    labels = torch.tensor([[0, 1, 2, 3, 0]] * B)
    assert torch.equal(gather(net, spread(net, inputs, labels)).argmax(-1), labels)


def test_hidden_states_are_the_outputs_where_there_is_no_layer() -> None:
    net = unroll(GRUCell(UNITS), T, IN)
    assert net.output == f"h{T}"
    every = spread(net, randn(B, T, IN), randn(B, T, UNITS))
    last = spread(net, randn(B, T, IN), randn(B, UNITS))
    assert {"h1", "h5"} <= set(every) and "h1" not in last and "h5" in last


LSTM = unroll(LSTMCell(2), 3, 2, Dense(4))
TOKENS = unroll(LSTMCell(2), 3, Embedding(5, 2), SOFTMAX)
ONES = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: LSTMCell(0), "units must be a whole number of at least 1"),
        (lambda: GRUCell(2, "all"), "nodes must be one of state, gates"),
        (lambda: RNNCell(2, "softmax"), "must act on each unit"),
        (lambda: RNNCell(2, "swish"), "swish"),
        (lambda: unroll([], 2, 3), "cell must be"),
        (lambda: unroll(nn.LSTM(2, 2), 2, 3), "cell must be"),  # type: ignore
        (lambda: unroll(RNNCell(2), 0, 3), "length must be a whole number of at least 1"),
        (lambda: unroll(RNNCell(2), 2, 0), "inputs must be a whole number of at least 1"),
        (lambda: unroll(RNNCell(2), 2, 3, "dense"), "output must be"),  # type: ignore
        (lambda: unroll(RNNCell(2), 2, 3, None, "some"), "outputs must be one of all, last"),
        (lambda: spread(LSTM, torch.zeros(2, 4, 2)), r"inputs must be \[B, 3, 2\]"),
        (lambda: spread(TOKENS, ONES * 5), "tokens must be whole numbers 0 to 4"),
        (lambda: spread(TOKENS, ONES.double()), "tokens must be whole numbers"),
        (lambda: spread(TOKENS, ONES, ONES * 4), "labels must be whole numbers 0 to 3"),
        (lambda: spread(TOKENS, ONES, ONES[:1]), r"targets must be \[2, 3\]"),
        (lambda: spread(LSTM, torch.zeros(2, 3, 2), torch.zeros(2, 3)), r"targets must be \[2, 3, 4\]"),
        (lambda: num_steps(pctt.chain(2, [Dense(2)])), "made by unroll"),
        (lambda: gather(LSTM, {}, "q"), "no node 'q1'"),
        (lambda: zero_state(LSTM, 0), "batch_size must be"),
        (lambda: cell_weights(LSTMCell(2), nn.GRU(2, 2)), "does not have the weights"),
        (lambda: cell_weights(LSTMCell(2), nn.LSTM(2, 2, bidirectional=True)), "does not have the weights"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_an_output_may_be_a_block_and_learning_goes_on_in_single_precision() -> None:
    net = unroll(GRUCell(4), 2, 3, Block(["tanh", pctt.Linear(2)]))
    given = spread(net, torch.randn(3, 2, 3), torch.randn(3, 2, 2))
    trainer = Trainer(net, Inference(10, 0.1), Adam(1e-2), batch_size=3, clamped=tuple(given))
    assert trainer.fit(given, 3).status.ok
