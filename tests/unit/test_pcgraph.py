"""PC graphs against one matrix over all units, and units that are held while others relax."""

import pytest
import torch
from torch import Tensor

import pctt
from pctt import Inference, pc_graph, recall

SIZES = {"image": 7, "hidden": 5, "label": 3}
LAYERED = [("image", "hidden"), ("hidden", "label")]
FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}


def whole(
    net: pctt.Network, weights: pctt.network.Weights, names: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """(W, which of its entries there are, b) over all units; a node that nothing predicts has no columns."""
    sizes = [net.widths[net.node_index(name)] for name in names]
    spans = dict(zip(names, torch.arange(sum(sizes)).split(sizes), strict=True))
    matrix, mask = (torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64) for _ in range(2))
    bias = torch.zeros(sum(sizes), dtype=torch.float64)
    for index in net.indices:
        target = net.nodes[index]
        sources = [net.nodes[source] for source in net.sources(index)]
        for source in sources:
            key = f"weight.{source}" if len(sources) > 1 else "weight"
            rows, columns = spans[source][:, None], spans[target][None]
            matrix[rows, columns] = weights[target][key]
            mask[rows, columns] = 1.0
        bias[spans[target]] = weights[target]["bias"]
    return matrix, mask * (1.0 - torch.eye(len(mask), dtype=torch.float64)), bias


def relaxed(
    matrix: Tensor,
    bias: Tensor,
    activity: Tensor,
    free: Tensor,
    counted: Tensor,
    function: str,
    steps: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """(activities, errors) after plain steps; `counted` says which units are predicted at all."""
    f = FUNCTIONS[function]
    for _ in range(steps):
        x = activity.clone().requires_grad_()
        error = counted * (x - f(x) @ matrix - bias)
        (slope,) = torch.autograd.grad(0.5 * error.square().sum(), x)
        activity = activity - rate * free * slope
    return activity, counted * (activity - f(activity) @ matrix - bias)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("connections", "clamped"),
    [("all", ["image", "label"]), ("all", ["image"]), (LAYERED, ["image", "label"])],
)
def test_states_and_gradients_are_those_of_one_matrix(function, connections, clamped):
    """E9, and its full form: states, errors and masked gradients e f(x)' after 20 steps; fp64 roundings."""
    net = pc_graph(SIZES, connections, function)
    weights = pctt.init(net, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    data = {name: torch.randn(4, SIZES[name], generator=generator, dtype=torch.float64) for name in clamped}
    start = {
        name: 0.1 * torch.randn(4, size, generator=generator, dtype=torch.float64)
        for name, size in SIZES.items()
        if name not in clamped
    }
    result = pctt.infer(net, weights, data, Inference(20, 0.05), initial=start)
    gradients = pctt.weight_gradients(net, weights, result)

    names = list(SIZES)
    matrix, mask, bias = whole(net, weights, names)
    if connections == "all":
        assert float(matrix[mask == 0].abs().max()) == 0.0, "no unit predicts itself"
    span = dict(zip(names, torch.arange(15).split(list(SIZES.values())), strict=True))
    free, counted = torch.ones(15, dtype=torch.float64), torch.ones(15, dtype=torch.float64)
    for name in clamped:
        free[span[name]] = 0.0
    for root in net.nodes[: net.num_roots]:
        counted[span[root]] = 0.0
    begun = torch.cat([{**data, **start}[name] for name in names], 1)
    activity, error = relaxed(matrix, bias, begun, free, counted, function, 20, 0.05)
    expected = -mask * (FUNCTIONS[function](activity).T @ error) / 4
    got, _, got_bias = whole(net, gradients, names)
    for name in names:
        torch.testing.assert_close(result.activities[name], activity[:, span[name]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got_bias, -error.sum(0) / 4, rtol=1e-11, atol=1e-12)


def test_the_layered_graph_is_the_chain():
    """E9: image -> hidden -> label with the activation at the input of each layer, to fp64 roundings."""
    net, chained = (
        pc_graph(SIZES, "forward"),
        pctt.chain(7, [pctt.Dense(5, "tanh", activate="input"), pctt.Dense(3, "tanh", activate="input")]),
    )
    weights = pctt.init(net, 2, dtype=torch.float64)
    same = dict(zip(chained.names, weights.values(), strict=True))
    x, y = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    ours = pctt.infer(net, weights, {"image": x, "label": y})
    theirs = pctt.infer(chained, same, {"input": x, "dense2": y})
    torch.testing.assert_close(ours.activities["hidden"], theirs.activities["dense1"], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({},), "needs nodes"),
        (({"a": 2, "b": 3}, "some"), "connections must be"),
        (({"a": 2, "b": 3}, [("a", "c")]), "a pair .source, target. of nodes a, b"),
        (({"a": 2, "b": 3}, [("a", "b"), ("a", "b")]), "twice"),
        (({"a": 2, "b": 3, "c": 1}, [("a", "b")]), "'c' has no connection"),
        (({"a": 2, "b": 3}, "forward", "tanh", {"a": pctt.Gaussian(2.0)}), "energy has 'a'"),
    ],
)
def test_what_is_no_graph_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        pc_graph(*arguments)


def test_a_pc_graph_returns_from_a_checkpoint_and_learns(tmp_path):
    net = pc_graph({"image": 4, "hidden": 6, "label": 2})
    trainer = pctt.Trainer(net, Inference(10, 0.1), pctt.SGD(0.05), weights=pctt.init(net, 0, "normal", 0.01))
    x = torch.randn(40, 4)
    labels = (x[:, 0] > 0).long()
    before = trainer.evaluate((x, labels))
    assert trainer.fit((x, labels), epochs=30).status.ok
    assert trainer.evaluate((x, labels)) >= max(before, 0.9)
    trainer.save(tmp_path)
    again = pctt.load(tmp_path)
    assert again.net == net and again.evaluate((x, labels)) == trainer.evaluate((x, labels))
    diagonal = trainer.weights["hidden"]["weight.hidden"].diagonal()
    assert float(diagonal.abs().max()) == 0.0, "learning must not fill the diagonal"


# --- held units ---------------------------------------------------------------------------------------------


def gaussian_case() -> tuple[pctt.Network, pctt.network.Weights, Tensor, Tensor, Tensor]:
    """(net, weights, mean, covariance, draws) of a linear generative chain of 4 causes and 6 units."""
    net = pctt.chain(1, [pctt.Dense(4), pctt.Dense(6, energy=pctt.Gaussian(2.0))])
    weights = pctt.init(net, 3, dtype=torch.float64)
    weights["dense1"]["bias"] = torch.randn(
        4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    down, mean = weights["dense2"]["weight"], weights["dense1"]["bias"]
    covariance = down.T @ down + 0.5 * torch.eye(6, dtype=torch.float64)
    draws = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return net, weights, mean @ down + weights["dense2"]["bias"], covariance, draws


def conditional(mean: Tensor, covariance: Tensor, x: Tensor, known: Tensor) -> Tensor:
    """The mean of the unknown units given the known ones, in each row."""
    rows = []
    for row, mask in zip(x, known, strict=True):
        answer = row.clone()
        if not mask.all():
            across = covariance[~mask][:, mask] @ torch.linalg.inv(covariance[mask][:, mask])
            answer[~mask] = mean[~mask] + across @ (row[mask] - mean[mask])
        rows.append(answer)
    return torch.stack(rows)


@pytest.mark.parametrize(("dynamics", "settings"), [("euler", {}), ("momentum", {"momentum": 0.8})])
def test_recall_of_a_linear_model_is_the_conditional_mean(dynamics, settings):
    """Another mask in every row, one of them full and one empty; converged to 1e-8."""
    net, weights, mean, covariance, x = gaussian_case()
    known = torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    known[0], known[1] = True, False
    asking = Inference(2000, 0.1, dynamics=dynamics, **settings)
    result = recall(
        net,
        weights,
        {"input": torch.zeros(5, 1, dtype=torch.float64), "dense2": x},
        {"dense2": known},
        asking,
    )
    expected = conditional(mean, covariance, x, known)
    torch.testing.assert_close(result.activities["dense2"], expected, rtol=0, atol=1e-8)
    assert torch.equal(result.activities["dense2"][known], x[known])


@pytest.mark.parametrize("dynamics", ["euler", "momentum", "adam", "heun", "langevin"])
@pytest.mark.parametrize("sweep", ["jacobi", "gauss_seidel"])
def test_held_units_stay_and_the_others_move(dynamics, sweep):
    if sweep == "gauss_seidel" and dynamics in ("heun", "langevin"):
        pytest.skip("these take jacobi sweeps only")
    net = pc_graph(SIZES)
    weights = pctt.init(net, 0, dtype=torch.float64)
    x = torch.randn(4, 7, dtype=torch.float64)
    known = torch.rand(4, 7) < 0.5
    settings = {"momentum": 0.5} if dynamics == "momentum" else {}
    asking = Inference(30, 0.02, dynamics=dynamics, sweep=sweep, **settings)
    label = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]
    result = pctt.infer(net, weights, {"label": label}, asking, {"image": x}, held={"image": known}, seed=1)
    assert torch.equal(result.activities["image"][known], x[known])
    assert ((result.activities["image"] - x)[~known].abs() > 1e-6).all()
    if dynamics in ("euler", "heun"):
        falls = result.energy.sum(1).diff()
        assert float(falls.max()) <= 1e-12, "the energy of what may move can only fall"


def test_holding_every_unit_is_clamping_and_none_is_placing():
    net = pc_graph(SIZES)
    weights = pctt.init(net, 0, dtype=torch.float64)
    x, y = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    asking = Inference(15, 0.05)
    every = torch.ones(4, 7, dtype=torch.bool)
    held = pctt.infer(net, weights, {"label": y}, asking, {"image": x}, held={"image": every})
    clamped = pctt.infer(net, weights, {"label": y, "image": x}, asking)
    torch.testing.assert_close(
        held.activities["hidden"], clamped.activities["hidden"], rtol=1e-12, atol=1e-12
    )
    free = pctt.infer(net, weights, {"label": y}, asking, {"image": x}, held={"image": ~every})
    placed = pctt.infer(net, weights, {"label": y}, asking, {"image": x})
    torch.testing.assert_close(free.activities["image"], placed.activities["image"], rtol=1e-12, atol=1e-12)


def test_units_of_a_bidirectional_chain_can_be_held():
    net = pctt.chain(
        6, [pctt.Dense(5, "tanh"), pctt.Dense(3)], backward=[pctt.Dense(5, "tanh"), pctt.Dense(6)]
    )
    weights = pctt.init(net, 0, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    known = torch.rand(4, 6) < 0.5
    result = recall(net, weights, {"input": x}, {"input": known}, Inference(50, 0.05))
    assert torch.equal(result.activities["input"][known], x[known])
    assert ((result.activities["input"] - x)[~known].abs() > 1e-6).all()
    assert float(result.energy.sum(1).diff().max()) <= 1e-12


def test_programs_without_held_units_have_no_instruction_more():
    """Nothing of it stands in a program whose nodes are placed and not held."""
    net = pctt.chain(6, [pctt.Dense(5, "tanh"), pctt.Dense(3)])
    weights = pctt.init(net, 0)
    plain = pctt.Engine(net, weights, Inference(4, 0.1), ("dense2",), ("input",))
    held = pctt.Engine(net, weights, Inference(4, 0.1), ("dense2",), ("input",), held=("input",))
    assert "movable" not in str(plain.program) and "movable" in str(held.program)


def test_the_emulated_card_holds_units_too():
    net = pctt.chain(6, [pctt.Dense(5, "tanh"), pctt.Dense(3)])
    weights = pctt.init(net, 0)
    x, y = torch.randn(4, 6), torch.randn(4, 3)
    known = torch.rand(4, 6) < 0.5
    asking = Inference(10, 0.1)
    card = recall(net, weights, {"input": x, "dense2": y}, {"input": known}, asking, backend="emulated")
    here = recall(net, weights, {"input": x, "dense2": y}, {"input": known}, asking)
    assert torch.equal(card.activities["input"][known], x[known])
    torch.testing.assert_close(
        card.activities["input"], here.activities["input"], rtol=0, atol=0.02
    )  # bfloat16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"held": {"input": torch.ones(2, 6, dtype=torch.bool)}}, "only be held at an initial activity"),
        (
            {"initial": {"input": torch.zeros(2, 6)}, "held": {"input": torch.ones(2, 6)}},
            "must be a bool tensor",
        ),
        (
            {"initial": {"input": torch.zeros(2, 6)}, "held": {"input": torch.ones(2, 5, dtype=torch.bool)}},
            r"bool tensor \[2, 6\], got torch.bool \[2, 5\]",
        ),
        (
            {
                "initial": {"input": torch.zeros(2, 6)},
                "held": {"input": torch.ones(2, 6, dtype=torch.bool)},
                "inference": Inference(variables="errors"),
            },
            "variables='states'",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(settings, words):
    net = pctt.chain(6, [pctt.Dense(3)])
    with pytest.raises(ValueError, match=words):
        pctt.infer(net, pctt.init(net), {"dense1": torch.zeros(2, 3)}, **settings)


def test_a_mask_without_values_is_refused():
    net = pctt.chain(6, [pctt.Dense(3)])
    with pytest.raises(ValueError, match="give their values too"):
        recall(
            net, pctt.init(net), {"dense1": torch.zeros(2, 3)}, {"input": torch.ones(2, 6, dtype=torch.bool)}
        )
