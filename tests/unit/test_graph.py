"""Networks of any wiring against plain predictive coding by autograd (`tests/graphs.py`), in fp64: every row
of its table, every setting that a graph takes, and chains of dense layers both ways.

Tolerances. As in test_equalities.py: a comparison of two orders of computation in fp64 is off by about 1e-13
relative to the largest number met; `EPS` leaves a factor of ten.
"""

import pytest
import torch
from graphs import (
    ACYCLIC,
    GRAPHS,
    Graph,
    accepts,
    as_graph,
    graph_values,
    graph_weights,
    held,
    mask_of,
    predicted,
    relax,
    total_energy,
    train,
)
from helpers import (
    INCREMENTAL,
    INFERENCES,
    NETWORKS,
    VARIANT_INFERENCES,
    VARIANT_NETWORKS,
    Tree,
    assert_near,
    assert_trees_near,
    fits,
    identical,
    random_nodes,
    random_weights,
    supervised,
)

import pctt
from pctt import (
    SGD,
    Adam,
    Add,
    Block,
    Categorical,
    Concat,
    Conv2d,
    Dense,
    Engine,
    Flatten,
    Gaussian,
    Inference,
    Linear,
    MaxPool2d,
    Network,
    Nudge,
    Slice,
    Step,
    chain,
    graph,
    infer,
    init,
    weight_gradients,
)
from pctt.checkpoint import flatten, read, unflatten, write
from pctt.layers.maps import Function

EPS = 1e-12
SETTINGS = {**INFERENCES, **VARIANT_INFERENCES}
EVERYWHERE = (
    *("live", "fixed, momentum", "in the errors", "one after the other", "gauss-seidel, fixed"),
    *("heun", "boosted", "zeros", "nudged", "nudged by a loss"),
)
"""Settings that every graph is asked with; the others go to `RICH`."""
RICH = ("leaves without data", "an output that others are predicted from", "lateral")


def largest(tree: Tree) -> float:
    return max(values.abs().max().item() for layer in tree.values() for values in layer.values())


def assert_equals_oracle(case: Graph, inference: Inference, clamp=None, initial=None, seed: int = 5) -> None:
    weights = graph_weights(case.net)
    clamp = held(case) if clamp is None else clamp
    expected = relax(case, weights, clamp, inference, initial, seed)
    result = infer(case.net, weights, clamp, inference, initial, seed=seed)
    scale = max(1.0, expected.energies.abs().max().item())
    assert_near(result.energy, expected.energies, EPS * scale, "energy")
    for node in case.net.nodes:
        assert_near(result.activities[node], expected.activities[-1][node], EPS * scale, node)
    for node in case.net.names:
        assert_near(result.errors[node], expected.errors[-1][node], EPS * scale, f"error of {node}")
    bound = EPS * scale * max(1.0, largest(expected.gradients))
    assert_trees_near(weight_gradients(case.net, weights, result), expected.gradients, bound)


# --- every graph, every setting -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", EVERYWHERE)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_plain_predictive_coding(name, settings):
    """E17 on any wiring: activities, errors, energies and gradients are those of dF/dx by autograd.

    A pull from one child too few, from a child twice or through another child's source leaves an inference
    that settles, at other activities, and that learns.
    """
    case = GRAPHS[name]
    if not accepts(case, SETTINGS[settings]):
        return
    assert_equals_oracle(case, SETTINGS[settings])


@pytest.mark.parametrize("settings", [name for name in SETTINGS if name not in EVERYWHERE])
def test_a_variant_is_its_equations_on_a_graph(settings):
    """The settings that are left, on the graphs that have a bit of everything. One after the other, a node
    must see what its children's other parents have become; a nudge must see an output before its children
    pull it.
    """
    for name in RICH:
        if accepts(GRAPHS[name], SETTINGS[settings]):
            assert_equals_oracle(GRAPHS[name], SETTINGS[settings])


@pytest.mark.parametrize("settings", ["live", "in the errors", "one after the other", "heun"])
@pytest.mark.parametrize("name", ["leaves without data", "precisions", "gates", "a cycle", "lateral"])
def test_a_graph_answers_any_query(name, settings):
    """Every node in turn is alone clamped, alone free, or alone placed: roots move, leaves settle."""
    case, inference = GRAPHS[name], SETTINGS[settings]
    if not accepts(case, inference):
        return
    values = graph_values(case)
    movable = [n for n in case.net.nodes if n not in case.net.names or isinstance(case.energy(n), Gaussian)]
    for number, node in enumerate(case.net.nodes):
        others = {n: v for n, v in values.items() if n != node}
        if number % 3 == 0:
            assert_equals_oracle(case, inference, {node: values[node]})
        elif number % 3 == 1:
            assert_equals_oracle(case, inference, others)
        elif node in movable:
            placed = {n: values[n] for n in movable if n != node}
            assert_equals_oracle(case, inference, {node: values[node]}, placed)


@pytest.mark.parametrize("settings", ["live", "fixed", "adam", "nudged both ways"])
@pytest.mark.parametrize("name", GRAPHS)
def test_an_engine_leaves_nothing_of_one_batch_to_the_next(name, settings):
    """Relaxation and gradients in one program, on the buffers that another batch, and a smaller one, has
    used: `weight_gradients` starts anew from a result and would not see what is left there.
    """
    case, inference = GRAPHS[name], SETTINGS[settings]
    if not accepts(case, inference):
        return
    weights = graph_weights(case.net)
    engine = Engine(case.net, weights, inference, case.clamped)
    for batch, seed in ((3, 8), (2, 9), (3, 1)):
        clamp = held(case, batch, seed)
        engine.relax({node: values.flatten(1) for node, values in clamp.items()}, seed=5)
        engine.compute_gradients()
    expected = relax(case, weights, clamp, inference, seed=5)
    scale = max(1.0, expected.energies.abs().max().item())
    for node in case.net.nodes:
        if node not in clamp:
            state = expected.activities[-1][node].flatten(1)
            assert_near(engine.read_activity(node), state, EPS * scale, node)
    bound = EPS * scale * max(1.0, largest(expected.gradients))
    assert_trees_near(engine.gradients(), expected.gradients, bound)


# --- learning -----------------------------------------------------------------------------------------------

LEARNT = (
    *("learned variances", "images", "tokens", "lateral", "drawn connections"),
    *("a recurrent network unrolled", "an output that others are predicted from", "channels"),
)
RULES = {
    "sgd": SGD(0.02),
    "adam": Adam(1e-3, (0.8, 0.99), 1e-4, weight_decay=0.02),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "settings", ["live", "nudged", "every step", "every step, momentum", "every step, nudged by a loss"]
)
def test_three_learning_steps_on_a_graph_are_those_of_the_oracle(settings, rule):
    """Weights, shared ones and learned variances, at the end of inference or with every step of it, over
    three batches, by torch.optim. Statistics that stand still and entries that a mask leaves out do not
    move.
    """
    inference, learning = {**SETTINGS, **INCREMENTAL}[settings], RULES[rule]
    for name in LEARNT:
        case = GRAPHS[name]
        if not accepts(case, inference):
            continue
        weights = graph_weights(case.net)
        batches = [held(case, 4, seed) for seed in (1, 2, 3)]
        expected = train(case, weights, batches, inference, learning)
        engine = Engine(case.net, weights, inference, case.clamped, learning=learning)
        for number, (batch, (tree, relaxed)) in enumerate(zip(batches, expected, strict=True)):
            engine.set_learning(learning.rate, number + 1)
            flat = {node: values.flatten(1) for node, values in batch.items()}
            energies = torch.tensor(engine.relax(flat, record=True).trajectory, dtype=torch.float64)
            engine.learn(learning.rate, number + 1)
            scale = max(1.0, relaxed.energies.abs().max().item())
            assert_near(energies, relaxed.energies, 10 * EPS * scale, f"{name}: energies")
            assert_trees_near(engine.weights(), tree, 10 * EPS * scale)


def test_the_gradient_of_shared_weights_is_the_sum_over_the_layers_that_use_them():
    """Against the same network with a copy of the weights for every layer: its gradients add up, one by one.

    A term that overwrites the ones before it would be the gradient of the last time step alone.
    """
    case = GRAPHS["a recurrent network unrolled"]
    weights, clamp = graph_weights(case.net), held(case)
    inference = SETTINGS["live"]
    found = weight_gradients(case.net, weights, infer(case.net, weights, clamp, inference))
    wires = {
        name: (layer, *case.sources[name])
        for name, layer in zip(case.net.names, case.net.layers, strict=True)
    }
    apart = graph({"h0": 4, "x1": 2, "x2": 2, "x3": 2}, wires)
    copies = {name: weights[case.shared.get(name, name)] for name in apart.names}
    single = weight_gradients(apart, copies, infer(apart, copies, clamp, inference))
    for name, layer in found.items():
        users = [user for user in apart.names if case.shared.get(user, user) == name]
        assert len(users) > 1
        for key, values in layer.items():
            parts = [single[user][key] for user in users]
            assert_near(values, torch.stack(parts).sum(0), EPS, f"{name}/{key}")
            assert all(part.abs().max() > 1e-6 for part in parts)


def test_weights_of_a_graph_survive_a_checkpoint_bit_for_bit(tmp_path):
    for name, case in GRAPHS.items():
        weights = graph_weights(case.net)
        write(tmp_path / "weights", flatten(weights), {})
        tree = unflatten(read(tmp_path / "weights")[0])
        engine = Engine(case.net, tree, Inference(1), case.clamped or case.net.nodes[:1])
        after = engine.weights()
        assert {k: set(v) for k, v in after.items()} == {k: set(v) for k, v in weights.items()}, name
        assert all(identical(after[n][k], weights[n][k]) for n in weights for k in weights[n]), name


# --- chains both ways ---------------------------------------------------------------------------------------


def compare(net: Network, inference: Inference, weights: Tree, clamp, initial=None) -> None:
    wired = as_graph(net)
    assert wired.nodes == net.nodes and wired.widths == net.widths and wired.output == net.output
    one = infer(net, weights, clamp, inference, initial, seed=5)
    two = infer(wired, weights, clamp, inference, initial, seed=5)
    scale = max(1.0, one.energy.abs().max().item())
    assert_near(two.energy, one.energy, EPS * scale, "energy")
    for node in net.nodes:
        assert_near(two.activities[node], one.activities[node], EPS * scale, node)
    for node in net.names:
        assert_near(two.errors[node], one.errors[node], EPS * scale, f"error of {node}")
        assert_near(two.predictions[node], one.predictions[node], EPS * scale, f"prediction of {node}")
    expected = weight_gradients(net, weights, one)
    found = weight_gradients(wired, weights, two)
    assert_trees_near(found, expected, EPS * scale * max(1.0, largest(expected)))


ALL = {**NETWORKS, **VARIANT_NETWORKS}


@pytest.mark.parametrize("settings", ["live", "fixed, momentum", "one after the other"])
@pytest.mark.parametrize("name", ALL)
def test_a_chain_of_dense_layers_is_the_same_as_a_graph(name, settings):
    """Two implementations of one rule, `Dense` and `Block`: states, errors, predictions, energies,
    gradients.
    """
    compare(ALL[name], SETTINGS[settings], random_weights(ALL[name]), supervised(ALL[name]))


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_of_a_chain_is_the_same_as_a_graph(settings):
    for name in ("precisions and a categorical output", "skips and learned variances"):
        net, inference = ALL[name], SETTINGS[settings]
        if inference.weights_at != "staircase" and fits(net, inference):
            compare(net, inference, random_weights(net), supervised(net))


@pytest.mark.parametrize("roles", ["fcfcff", "cpffpc", "pffffc", "cffpff"])
def test_any_query_of_a_chain_is_the_same_as_a_graph(roles):
    for name in ("tanh at the output", "gelu at the input"):
        net = ALL[name]
        nodes, chosen = random_nodes(net), dict(zip(net.nodes, roles, strict=True))
        clamp = {node: nodes[node] for node in net.nodes if chosen[node] == "c"}
        initial = {node: nodes[node] for node in net.nodes if chosen[node] == "p"}
        for settings in ("live", "zeros", "one after the other"):
            compare(net, SETTINGS[settings], random_weights(net), clamp, initial)


@pytest.mark.parametrize("settings", INCREMENTAL)
@pytest.mark.parametrize("rule", RULES)
def test_learning_with_every_step_is_the_same_in_a_chain_and_a_graph(settings, rule):
    inference = INCREMENTAL[settings]
    for name in ("skips and learned variances", "gelu at the input"):
        net = ALL[name]
        wired, weights = as_graph(net), random_weights(net)
        engines = [
            Engine(part, weights, inference, ("input", net.output), learning=RULES[rule])
            for part in (net, wired)
        ]
        for step in range(3):
            for engine in engines:
                engine.set_learning(0.01, step + 1)
                engine.relax(supervised(net, 4, step))
        assert_trees_near(engines[1].weights(), engines[0].weights(), 100 * EPS)


def test_initial_weights_of_a_chain_and_of_its_graph_are_the_same():
    for name, net in ALL.items():
        for scheme in ("xavier", "kaiming"):
            one, two = (init(part, 3, scheme) for part in (net, as_graph(net)))
            assert {k: set(v) for k, v in one.items()} == {k: set(v) for k, v in two.items()}, name
            for layer in one:
                for key in one[layer]:
                    assert torch.equal(one[layer][key], two[layer][key]), f"{name}: {layer}/{key}"


def test_a_chain_of_blocks_is_a_graph_with_names_of_its_own():
    """`chain` with a shape and maps: what follows what, what it is called, and its first numbers."""
    net = chain((1, 6, 5), [Conv2d(2, 3), [Conv2d(3, 2), "tanh", MaxPool2d(2)], "relu", Dense(4)])
    assert net.names == ("conv2d1", "conv2d2", "function3", "dense4")
    assert net.shapes == ((1, 6, 5), (2, 4, 3), (3, 1, 1), (3, 1, 1), (4,))
    weights = init(net, 1, dtype=torch.float64)
    x = torch.randn(3, 1, 6, 5, dtype=torch.float64)
    y = torch.conv2d(x, weights["conv2d1"]["weight"], weights["conv2d1"]["bias"])
    y = torch.max_pool2d(torch.conv2d(y, weights["conv2d2"]["weight"], weights["conv2d2"]["bias"]).tanh(), 2)
    y = y.relu().flatten(1) @ weights["dense4"]["weight"]
    result = infer(net, weights, {"input": x}, Inference(2))
    assert_near(result.activities["dense4"], y, EPS)
    engine = Engine(net, weights, Inference(2), ("input", "dense4"))
    assert_near(engine.predict(x.flatten(1)), y, EPS)


# --- backpropagation ----------------------------------------------------------------------------------------


def by_autograd(case: Graph, weights: Tree, clamp) -> Tree:
    """The gradient of the loss of a feedforward pass from the roots: the energies of the clamped leaves."""
    leaves = {n: {k: v.clone().requires_grad_() for k, v in layer.items()} for n, layer in weights.items()}
    rows = len(next(iter(clamp.values())))
    nodes = {
        name: clamp[name].flatten(1) if name in clamp else torch.zeros(rows, units, dtype=torch.float64)
        for name, units in zip(case.net.nodes, case.net.widths, strict=True)
        if name not in case.net.names
    }
    loss = torch.zeros((), dtype=torch.float64)
    for name in case.net.names:
        nodes[name] = predicted(case, leaves, name, nodes)
        if name in clamp:
            target = clamp[name].flatten(1)
            if isinstance(case.energy(name), Categorical):
                logs = nodes[name].unflatten(1, case.shapes[name]).log_softmax(-1).flatten(1)
                loss = loss - (target * logs).sum(-1).mean()
            else:
                loss = loss + 0.5 * (target - nodes[name]).square().sum(-1).mean()
    flat = [value for layer in leaves.values() for value in layer.values()]
    found = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    tree = {name: {key: next(found) for key in layer} for name, layer in leaves.items()}
    return {
        name: {k: torch.zeros_like(weights[name][k]) if v is None else v for k, v in layer.items()}
        for name, layer in tree.items()
    }


PLAIN = [
    name
    for name, case in ACYCLIC.items()
    if all(isinstance(layer.energy, Categorical) or layer.energy.is_unit for layer in case.net.layers)
    and name not in ("an output that others are predicted from", "drawn connections", "channels")
]


@pytest.mark.parametrize("algorithm", ["one sweep", "all at once"])
@pytest.mark.parametrize("name", PLAIN)
def test_fixed_predictions_give_the_gradients_of_backpropagation_on_any_graph_without_cycles(name, algorithm):
    """Millidge, Tschantz & Buckley 2022: one sweep down at rate 1, or as many steps as the graph is deep. The
    errors of a node with several children must be their sum before its parents see it.
    """
    case = GRAPHS[name]
    weights, clamp = graph_weights(case.net), held(case)
    sweep = "gauss_seidel" if algorithm == "one sweep" else "jacobi"
    steps = 1 if algorithm == "one sweep" else len(case.net.layers)
    result = infer(case.net, weights, clamp, Inference(steps, 1.0, "fixed", sweep=sweep))
    found = weight_gradients(case.net, weights, result)
    expected = by_autograd(case, weights, clamp)
    assert_trees_near(found, expected, EPS * max(1.0, largest(expected)))


# --- what a graph is ----------------------------------------------------------------------------------------


def test_layers_stand_after_their_sources_whatever_the_order_they_are_given_in():
    net = graph(
        {"x": 2},
        {"y": (Dense(2), "b", "a"), "b": (Dense(3), "a"), "a": (Dense(4), "x"), "z": (Dense(1), "x")},
    )
    place = {name: number for number, name in enumerate(net.nodes)}
    for index in net.indices:
        assert all(source < index for source in net.sources(index))
    assert net.nodes[0] == "x" and set(place) == {"x", "a", "b", "y", "z"}
    assert net.output == "z" and net.input_name == "x" and not net.sources_ahead
    assert net.children(place["a"]) == tuple(sorted((place["b"], place["y"])))


def test_a_layer_that_reads_a_node_twice_is_pulled_for_both():
    """mu = tanh(x A + x B): one child, two terms; a child counted twice would pull four times."""
    block = Block(
        [Step(Linear(2, False), (0,), "a"), Step(Linear(2, False), (1,), "b"), Step(Concat(), (2, 3)), "tanh"]
    )
    net = graph({"x": 3}, {"y": (block, "x", "x")})
    weights = init(net, dtype=torch.float64)
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    both = torch.cat([weights["y"]["weight.a"], weights["y"]["weight.b"]], 1)
    (slope,) = torch.autograd.grad(0.5 * (y - torch.tanh(leaf @ both)).square().sum(), leaf)
    for knobs in ({"prediction": "fixed", "sweep": "gauss_seidel"}, {"variables": "errors"}):
        result = infer(net, weights, {"y": y}, Inference(1, 1.0, **knobs), {"x": x})
        assert_near(result.activities["x"], x - slope, EPS)
    assert net.children(0) == (1,)


def test_networks_of_equal_parts_are_equal_and_hashable():
    again = graph({"x": 3}, {"a": (Block([Linear(4), "tanh"]), "x"), "y": (Dense(2), "a", "x")})
    net = graph({"x": 3}, {"a": (Block([Linear(4), "tanh"]), "x"), "y": (Dense(2), "a", "x")})
    other = graph({"x": 3}, {"a": (Block([Linear(4), "relu"]), "x"), "y": (Dense(2), "a", "x")})
    assert net == again and hash(net) == hash(again) and net != other
    assert len({case.net for case in GRAPHS.values()}) == len(GRAPHS)


def test_a_graph_with_cycles_has_no_feedforward_sweep():
    case = GRAPHS["a cycle"]
    engine = Engine(case.net, graph_weights(case.net), Inference(2), case.clamped)
    with pytest.raises(ValueError, match="cycles has no feedforward sweep"):
        engine.predict(torch.zeros(2, 3, dtype=torch.float64))


def test_a_sweep_predicts_the_output_from_the_roots_and_disturbs_no_relaxation():
    """Also where a root is free, which starts at zero whatever a sweep has had there."""
    for name, case in ACYCLIC.items():
        weights, clamp = graph_weights(case.net), held(case)
        flat = {node: values.flatten(1) for node, values in clamp.items()}
        values = graph_values(case)
        roots = {root: values[root].flatten(1) for root in case.net.nodes[: case.net.num_roots]}
        nodes = dict(roots)
        for layer in case.net.names:
            nodes[layer] = predicted(case, weights, layer, nodes)
            if isinstance(case.energy(layer), Categorical):
                nodes[layer] = nodes[layer].unflatten(1, case.shapes[layer]).softmax(-1).flatten(1)
        for settings in ("live", "zeros"):
            engine = Engine(case.net, weights, SETTINGS[settings], case.clamped)
            engine.relax(flat)
            before = {node: engine.read_activity(node) for node in case.net.nodes}
            assert_near(engine.sweep(roots), nodes[case.net.output], 10 * EPS, name)
            engine.relax(flat)
            assert all(torch.equal(engine.read_activity(node), before[node]) for node in before), name


# --- cycles -------------------------------------------------------------------------------------------------


def all_to_all(matrix, f, x, free, rate: float, steps: int):
    """One layer of N units that predicts itself: mu = f(x) W, by the equations written out. x: [B, N]."""
    x = x.clone()
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        error = leaf - f(leaf) @ matrix
        (slope,) = torch.autograd.grad(0.5 * error.square().sum(), leaf)
        x = torch.where(free, x - rate * slope, x)
    return x, x - f(x) @ matrix


def test_nodes_that_predict_each_other_are_one_layer_of_units_with_a_matrix():
    """mu = W f(x) over all nodes together, whose blocks are the weights between them, diagonal left out
    (Salvatori et al. 2022): clamp some units, relax the rest, dF/dW = -f(x)'e masked.

    Nodes predicted in an order, each from neighbours that have moved already, would be another algorithm.
    """
    units = {"a": 3, "b": 4, "c": 2}
    layers = {}
    for name, size in units.items():
        steps: list[Step] = []
        for number, source in enumerate(units):
            mask = "off_diagonal" if source == name else None
            steps += [Step(Function("tanh"), (number,))]
            steps += [Step(Linear(size, False, mask), name=source)]
        parts = (4, 6, 8)
        layers[name] = (Block([*steps, Step(Add(), parts)]), *units)
    net = graph({}, layers, input="a", output="c")
    assert net.sources_ahead == frozenset({0, 1, 2}) and net.widths == (3, 4, 2)
    weights = graph_weights(net)
    for name, size in units.items():
        weights[name][f"weight.{name}"] *= mask_of(Linear(size, mask="off_diagonal"), (size, size))
    matrix = torch.cat(
        [torch.cat([weights[name][f"weight.{source}"] for source in units]) for name in units], 1
    )
    assert not matrix.diagonal().any()
    values = {n: torch.randn(3, s, dtype=torch.float64) for n, s in units.items()}
    known = {"a": values["a"], "c": values["c"]}
    start = torch.cat([values["a"], torch.zeros(3, 4, dtype=torch.float64), values["c"]], 1)
    free = torch.tensor([False] * 3 + [True] * 4 + [False] * 2)
    result = infer(net, weights, known, Inference(15, 0.1))
    x, error = all_to_all(matrix, torch.tanh, start, free, 0.1, 15)
    assert_near(torch.cat([result.activities[n] for n in units], 1), x, EPS)
    assert_near(torch.cat([result.errors[n] for n in units], 1), error, EPS)
    gradient = -torch.tanh(x).mT @ error / 3
    found = weight_gradients(net, weights, result)
    rows = 0
    for source, size in units.items():
        columns = 0
        for name, width in units.items():
            block = gradient[rows : rows + size, columns : columns + width].clone()
            if source == name:
                block.fill_diagonal_(0.0)
            assert_near(found[name][f"weight.{source}"], block, EPS, f"{source} to {name}")
            columns += width
        rows += size


def test_a_layered_network_is_the_matrix_with_blocks_below_its_diagonal():
    """E9: all-to-all units with the blocks of a chain, errors of the input left out, are the chain."""
    net = chain(
        3,
        [
            Dense(4, "tanh", False, "input"),
            Dense(4, "tanh", False, "input"),
            Dense(2, "tanh", False, "input"),
        ],
    )
    wired, weights, clamp = as_graph(net), random_weights(net), supervised(net)
    matrix = torch.zeros(13, 13, dtype=torch.float64)
    row, column = 0, 3
    for name in net.names:
        block = weights[name]["weight"]
        matrix[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    start = infer(net, weights, {"input": clamp["input"]}, Inference(0)).activities
    start[net.output] = clamp[net.output]
    x = torch.cat([start[node] for node in net.nodes], 1)
    free = torch.tensor([False] * 3 + [True] * 8 + [False] * 2)
    x, error = all_to_all(matrix, torch.tanh, x, free, 0.1, 12)
    for part in (net, wired):
        result = infer(part, weights, clamp, Inference(12, 0.1))
        assert_near(torch.cat([result.activities[node] for node in net.nodes], 1), x, EPS)
        assert_near(torch.cat([result.errors[node] for node in net.names], 1), error[:, 3:], EPS)
        gradient = -torch.tanh(x).mT @ error / 3
        found = weight_gradients(part, weights, result)
        assert_near(found["dense2"]["weight"], gradient[3:7, 7:11], EPS)


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in ACYCLIC])
def test_cycles_relax_to_where_no_node_is_drawn_any_more(name):
    """E6: at the end dF/dx of every free node is 0, by autograd of the energy written out."""
    case = GRAPHS[name]
    weights, clamp = graph_weights(case.net, gain=0.6), held(case)
    result = infer(case.net, weights, clamp, Inference(1500, 0.15))
    leaves = {node: values.clone().requires_grad_() for node, values in result.activities.items()}
    free = [node for node in case.net.nodes if node not in clamp]
    for slope in torch.autograd.grad(total_energy(case, weights, leaves).sum(), [leaves[n] for n in free]):
        assert slope.abs().max() < 1e-10
    assert (result.energy.sum(1).diff() <= 1e-14).all()


def test_a_nudge_that_holds_an_output_in_a_cycle_is_refused_and_a_loss_is_not():
    """Held near its prediction it would have to be known before the nodes that it is predicted from."""
    case = GRAPHS["all to all, without roots"]
    weights, clamp = graph_weights(case.net), held(case)
    with pytest.raises(ValueError, match=r"nudge.*'c' is held near its prediction.*use style='loss'"):
        infer(case.net, weights, clamp, Inference(2, nudge=Nudge(0.3)))
    assert infer(case.net, weights, clamp, Inference(2, nudge=Nudge(0.3, "positive", "loss"))).status.ok


# --- batches and precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["live", "fixed"])
@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "batch normalisation"])
def test_repeating_and_permuting_the_batch_changes_neither_states_nor_gradients(name, settings):
    """E16: each sample relaxes as if alone, in all graphs but those that normalise over the batch."""
    case, inference = GRAPHS[name], SETTINGS[settings]
    weights, clamp = graph_weights(case.net), held(case, 4)
    order = torch.tensor([2, 0, 3, 1, 1, 3, 0, 2])
    single = infer(case.net, weights, clamp, inference)
    many = infer(case.net, weights, {node: values[order] for node, values in clamp.items()}, inference)
    scale = max(1.0, single.energy.abs().max().item())
    for node in case.net.nodes:
        assert_near(many.activities[node], single.activities[node][order], EPS * scale, node)
    gradients = weight_gradients(case.net, weights, single)
    bound = EPS * scale * max(1.0, largest(gradients))
    assert_trees_near(weight_gradients(case.net, weights, many), gradients, bound)


def test_what_the_caller_gave_is_not_written_to_and_clamped_nodes_come_back_bit_for_bit():
    for name, case in GRAPHS.items():
        weights, clamp = graph_weights(case.net), held(case)
        before = (
            {n: v.clone() for n, v in clamp.items()},
            {n: {k: v.clone() for k, v in t.items()} for n, t in weights.items()},
        )
        result = infer(case.net, weights, clamp, Inference(3))
        weight_gradients(case.net, weights, result)
        assert all(identical(result.activities[n], before[0][n]) for n in clamp), name
        assert all(identical(clamp[n], before[0][n]) for n in clamp), name
        assert all(identical(weights[n][k], before[1][n][k]) for n in weights for k in weights[n]), name


def test_nodes_may_be_given_flat_or_in_their_shape():
    case = GRAPHS["images"]
    weights, clamp = graph_weights(case.net), held(case)
    one = infer(case.net, weights, clamp, Inference(4))
    two = infer(case.net, weights, {node: values.flatten(1) for node, values in clamp.items()}, Inference(4))
    for node in case.net.nodes:
        assert torch.equal(one.activities[node], two.activities[node])
        assert one.activities[node].shape[1:] == case.shapes[node]


# --- mistakes -----------------------------------------------------------------------------------------------

D = Dense(3)
SOFT = Dense(3, "softmax", energy=Categorical())
MISTAKES = {
    "no layers": (lambda: graph({"x": 3}, {}), "a graph needs at least one layer, got none"),
    "no source": (lambda: graph({"x": 3}, {"y": (D,)}), r"layer 'y' must be \(layer, source, ...\), got"),
    "no tuple": (lambda: graph({"x": 3}, {"y": D}), r"layer 'y' must be \(layer, source, ...\), got"),
    "an unknown source": (
        lambda: graph({"x": 3}, {"y": (D, "z")}),
        "layer 'y' reads 'z', which is no node; the nodes are x, y",
    ),
    "an input and a layer of one name": (
        lambda: graph({"x": 3}, {"x": (D, "x")}),
        "names must be unique and without '/'; 'x' is not",
    ),
    "a slash": (
        lambda: graph({"x": 3}, {"a/b": (D, "x")}),
        "names must be unique and without '/'; 'a/b' is not",
    ),
    "an empty name": (
        lambda: graph({"": 3}, {"y": (D, "")}),
        "names must be unique and without '/'; '' is not",
    ),
    "an input that nothing reads": (
        lambda: graph({"x": 3, "z": 2}, {"y": (D, "x")}),
        "no layer reads the input 'z'; drop it",
    ),
    "an input without shape": (lambda: graph({"x": ()}, {"y": (D, "x")}), "node 'x' has no shape"),
    "an input of no units": (
        lambda: graph({"x": 0}, {"y": (D, "x")}),
        "x must be a whole number of at least 1",
    ),
    "an input of half a unit": (lambda: graph({"x": 1.5}, {"y": (D, "x")}), "x must be a whole number"),
    "an unknown input": (lambda: graph({"x": 3}, {"y": (D, "x")}, input="z"), "no node is called 'z'"),
    "an unknown output": (
        lambda: graph({"x": 3}, {"y": (D, "x")}, output="z"),
        "output must be a node that a layer predicts, got 'z'",
    ),
    "an output that nothing predicts": (
        lambda: graph({"x": 3}, {"y": (D, "x")}, output="x"),
        "output must be a node that a layer predicts, got 'x'",
    ),
    "no layer": (lambda: graph({"x": 3}, {"y": (3, "x")}), "layer 'y': a block is made of maps"),
    "shapes that do not suit": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "y": (Conv2d(2, 3), "x")}),
        "layer 'y': conv2d takes samples",
    ),
    "a skip of other units": (
        lambda: graph({"x": 4}, {"a": (Dense(5), "x"), "y": (Dense(3, activate="input", skip=True), "x")}),
        r"layer 'y': add takes inputs of one shape, got \[4\], \[3\]",
    ),
    "a skip over several sources": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "y": (Dense(3, activate="input", skip=True), "a", "x")}),
        "layer 'y': skip adds the one activity below",
    ),
    "a precision of other units": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "y": (Dense(3, energy=Gaussian((1.0, 2.0))), "a")}),
        r"layer 'y': precision must be one number or 3",
    ),
    "a source with a dot": (
        lambda: graph({"x.1": 3, "z": 2}, {"a": (D, "z"), "y": (D, "x.1", "z")}),
        "layer 'y': the name of a step must have no '/' and no '.'",
    ),
    "a source called like a gradient": (
        lambda: graph({"x": 3}, {"x_gradient": (D, "x"), "y": (D, "x", "x_gradient")}),
        "layer 'y': a weight called weight.x_gradient would be taken for the gradient of weight.x",
    ),
    "a source twice": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "y": (D, "x", "x")}),
        "layer 'y': two maps of a block have weights of one name",
    ),
    "a categorical node under another": (
        lambda: graph({"x": 3}, {"a": (SOFT, "x"), "y": (D, "a")}),
        "layer 'a' has a categorical energy and 'y' reads it",
    ),
    "a categorical node without softmax": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "y": (Block(["tanh"], Categorical()), "x")}),
        "layer 'y': a categorical energy needs predictions that are distributions",
    ),
    "a shape that depends on itself": (
        lambda: graph({}, {"a": (Block("tanh"), "b"), "b": (Block("tanh"), "a")}),
        "the shape of node 'a' depends on itself; predict one node of the cycle by a Dense layer",
    ),
    "a shape that is not what it said": (
        lambda: graph({}, {"a": (Block([Linear(3), Slice(0, 2)]), "a")}),
        "the shape of node 'a' depends on itself",
    ),
    "an unknown layer shares": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "y": (D, "a")}, shared={"z": "a"}),
        "'z': 'a' does not",
    ),
    "shared with an unknown layer": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "y": (D, "a")}, shared={"y": "x"}),
        "'y': 'x' does not: the layers are a, y",
    ),
    "shared in a row": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "b": (D, "a"), "y": (D, "b")}, shared={"b": "a", "y": "b"}),
        "'y': 'b' does not",
    ),
    "shared with itself": (
        lambda: graph({"x": 3}, {"a": (D, "x"), "y": (D, "a")}, shared={"y": "y"}),
        "'y': 'y' does not",
    ),
    "weights of other shapes": (
        lambda: graph({"x": 4}, {"a": (D, "x"), "y": (D, "a")}, shared={"y": "a"}),
        "layer 'y' cannot use the weights of 'a': it needs",
    ),
    "weights with another mask": (
        lambda: graph(
            {"x": 3},
            {"a": (Block(Linear(3, mask="off_diagonal")), "x"), "y": (Block(Linear(3)), "a")},
            shared={"y": "a"},
        ),
        "layer 'y' cannot use the weights of 'a': their masks differ",
    ),
    "weights and a variance": (
        lambda: graph(
            {"x": 3},
            {n: (Dense(3, energy=Gaussian(learned="scalar")), s) for n, s in (("a", "x"), ("y", "a"))},
            shared={"y": "a"},
        ),
        "layer 'y' shares weights and learns a variance",
    ),
    "a chain of no layers": (lambda: chain((1, 2), []), "a chain needs at least one layer"),
    "a chain down of blocks": (
        lambda: chain((1, 2), [Block([Flatten(), Linear(2)])], backward=[Dense(2)]),
        "backward layers go with a chain of dense layers on one axis",
    ),
    "a chain of two layers of one name": (
        lambda: chain((1, 2), [Dense(3, name="a"), Dense(3, name="a")]),
        "names must be unique.*'a' is not",
    ),
    "a chain whose shapes do not suit": (
        lambda: chain((1, 4, 4), [Conv2d(2, 3), Conv2d(2, 3)]),
        r"layer 'conv2d2': a kernel of \(3, 3\) does not fit into an image of \(2, 2\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_graph_that_cannot_be_is_refused_in_a_sentence(mistake):
    """The sentence names the layer that is wrong, not the one that happened to be looked at first."""
    make, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words) as caught:
        make()
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    ("name", "inference", "words"),
    [
        (
            "diamond",
            Inference(9, 1.0, weights_at="staircase"),
            "weights_at='staircase' counts the layers of a chain",
        ),
        ("a cycle", Inference(3, variables="errors"), "variables='errors' takes a graph without cycles"),
        ("leaves without data", Inference(3, weights_at="every_step"), "needs a learning rule"),
    ],
)
def test_settings_that_do_not_go_with_a_graph_are_refused_in_a_sentence(name, inference, words):
    case = GRAPHS[name]
    with pytest.raises(ValueError, match=words):
        infer(case.net, graph_weights(case.net), held(case), inference)


def test_a_free_leaf_that_is_categorical_cannot_be_placed():
    case = GRAPHS["leaves without data"]
    values = graph_values(case)
    with pytest.raises(ValueError, match="'floating' is categorical: free, it follows its prediction"):
        infer(case.net, graph_weights(case.net), held(case), Inference(1), {"floating": values["floating"]})


def test_targets_of_every_position_must_be_distributions():
    case = GRAPHS["tokens"]
    clamp = held(case)
    clamp["y"][1, 2] = 0.5
    with pytest.raises(ValueError, match=r"must be distributions .*row 5 is not"):
        infer(case.net, graph_weights(case.net), clamp, Inference(1))


def test_values_of_a_wrong_shape_are_refused_with_the_shape_that_is_right():
    case = GRAPHS["images"]
    clamp = {**held(case), "x": torch.zeros(3, 5, 4, dtype=torch.float64)}
    with pytest.raises(
        ValueError, match=r"'x' must be a tensor of shape \[batch, 1, 5, 4\], got \(3, 5, 4\)"
    ):
        infer(case.net, graph_weights(case.net), clamp, Inference(1))


# --- numbers that a table is read by ------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1.0, 7.0, 1.5])
def test_a_number_that_is_no_row_of_the_table_is_refused_before_anything_runs(wrong: float) -> None:
    """Torch takes -1 for the last row, and half a number for the whole one below."""
    net = pctt.graph({"tokens": 3}, {"y": (pctt.Block([pctt.Embedding(7, 2), pctt.Flatten()]), "tokens")})
    tokens = torch.tensor([[0.0, 6.0, wrong]])
    with pytest.raises(ValueError, match=r"'tokens' is read by an embedding, .* 0 to 6, got"):
        pctt.infer(net, pctt.init(net), {"tokens": tokens})
    with pytest.raises(ValueError, match=r"'tokens' is read by an embedding"):
        pctt.Trainer(net).fit({"tokens": tokens, "y": torch.zeros(1, 6)}, 1)
    assert net.vocabulary(0) == 7 and net.vocabulary(1) is None


def test_a_network_without_weights_is_inferred() -> None:
    net = pctt.graph({"a": 3, "b": 3}, {"y": (pctt.Add(), "a", "b")})
    a, y = torch.rand(2, 3), torch.rand(2, 3)
    result = pctt.infer(net, pctt.init(net), {"a": a, "y": y}, pctt.Inference(200, 0.3))
    assert torch.allclose(result.activities["b"], y - a, atol=1e-5)


def test_the_state_of_a_weight_is_not_taken_for_that_of_one_whose_name_begins_alike() -> None:
    """`weight.h_2` is a weight, and no state of `weight.h`."""
    net = pctt.graph(
        {"x": 2}, {"h": (pctt.Dense(3), "x"), "h_2": (pctt.Dense(3), "x"), "y": (pctt.Dense(2), "h", "h_2")}
    )
    engine = pctt.Engine(net, pctt.init(net), pctt.Inference(2), ("x", "y"), learning=pctt.SGD(0.1, 0.9))
    wanted = {"weight.h_momentum", "weight.h_2_momentum", "bias_momentum"}
    assert set(engine.learning_state()["y"]) == wanted


def test_a_free_input_starts_at_zero_also_after_a_sweep() -> None:
    """It shares its buffer with the sweep's input, whose values would otherwise be where inference starts."""
    net = pctt.chain(2, [pctt.Dense(3, "tanh"), pctt.Dense(2)])
    engine = pctt.Engine(net, pctt.init(net), pctt.Inference(3, 0.1), ("dense2",))
    engine.predict(torch.rand(4, 2))
    engine.relax({"dense2": torch.rand(4, 2)})
    assert torch.equal(engine.read_activity("input", initial=True), torch.zeros(4, 2))
