"""Networks, weights and queries: what they are made of, and which mistakes get which sentence."""

import math

import pytest
import torch
from helpers import (
    HIDDEN_ACTIVATIONS,
    NETWORKS,
    ORACLE_FUNCTIONS,
    identical,
    random_nodes,
    random_weights,
)

from pctt import (
    BackendUnavailable,
    Categorical,
    Dense,
    Gaussian,
    Inference,
    chain,
    infer,
    init,
    weight_gradients,
)
from pctt.activations import ACTIVATIONS
from pctt.groups import layout
from pctt.initialisers import SCHEMES
from pctt.network import check_weights

SOFTMAX = Dense(3, "softmax", energy=Categorical())


# --- layers and chains --------------------------------------------------------------------------------------


def test_nodes_are_named_after_the_layers_that_predict_them():
    net = chain(784, [Dense(256, "tanh"), Dense(128, name="top"), Dense(10)])
    assert net.names == ("dense1", "top", "dense3")
    assert net.nodes == ("input", "dense1", "top", "dense3")
    assert net.widths == (784, 256, 128, 10)
    assert net.output == "dense3"
    assert [net.node_index(name) for name in net.nodes] == [0, 1, 2, 3]


def test_weights_are_in_by_out_and_a_bias_is_optional():
    net = chain(4, [Dense(3, "tanh"), Dense(2, bias=False)])
    assert net.weight_shapes() == {"dense1": {"weight": (4, 3), "bias": (3,)}, "dense2": {"weight": (3, 2)}}
    assert net.num_weights() == 4 * 3 + 3 + 3 * 2


def test_networks_with_equal_parts_are_equal_and_hashable():
    """Frozen data: a network can be a key, and a checkpoint's can be compared with one's own."""
    for name, net in NETWORKS.items():
        again = chain(net.input, list(net.layers))
        assert again == net and hash(again) == hash(net), name
    assert len(set(NETWORKS.values())) == len(NETWORKS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: chain(0, [Dense(3)]), "input must be a whole number of at least 1, got 0"),
        (lambda: chain(2.0, [Dense(3)]), "input must be a whole number of at least 1, got 2.0"),
        (lambda: chain(True, [Dense(3)]), "input must be a whole number of at least 1, got True"),
        (lambda: chain(3, []), "a chain needs at least one layer"),
        (lambda: Dense(0), "units must be a whole number of at least 1, got 0"),
        (lambda: Dense(2.5), "units must be a whole number of at least 1, got 2.5"),
        (lambda: Dense(3, "cube"), "activation must be one of identity, tanh, .*, got 'cube'"),
        (lambda: Dense(3, activate="both"), "activate must be one of output, input, got 'both'"),
        (lambda: chain(3, [Dense(3, "softmax"), Dense(2)]), "'dense1' has softmax or a categorical energy"),
        (
            lambda: chain(3, [Dense(3, name="mid", energy=Categorical()), Dense(2)]),
            "'mid' has softmax or a categorical energy, which only the last layer may have",
        ),
        (
            lambda: chain(3, [Dense(3, "tanh", energy=Categorical())]),
            r"got activation 'tanh'; use Dense\(3, 'softmax', energy=Categorical\(\)\)",
        ),
        (
            lambda: chain(3, [Dense(3, "softmax", activate="input")]),
            "softmax is a function of the last layer's output; use activate='output'",
        ),
        (
            lambda: chain(3, [Dense(3, "softmax", activate="input", energy=Categorical())]),
            "softmax is a function of the last layer's output; use activate='output'",
        ),
        (
            lambda: chain(3, [Dense(3, energy=Gaussian((1.0, 2.0)))]),
            r"precision must be one number or 3 \(one per unit\), got 2",
        ),
        (lambda: chain(3, [Dense(3, name="a"), Dense(3, name="a")]), "names must be unique.*'a' is not"),
        (lambda: chain(3, [Dense(3, name="dense2"), Dense(3)]), "names must be unique.*'dense2' is not"),
        (lambda: chain(3, [Dense(3, name="input")]), "not 'input'; 'input' is not"),
        (lambda: chain(3, [Dense(3, name="a/b")]), "without '/'.*'a/b' is not"),
        (lambda: Gaussian(0.0), "precision must be a finite number above 0, got 0.0"),
        (lambda: Gaussian(-1.0), "precision must be a finite number above 0, got -1.0"),
        (lambda: Gaussian((1.0, math.nan)), "precision must be a finite number above 0, got nan"),
        (lambda: Gaussian(math.inf), "precision must be a finite number above 0, got inf"),
        (lambda: Gaussian("1"), "precision must be a finite number above 0, got '1'"),
        (lambda: Gaussian(()), "precision must be a number or one number per unit, got an empty tuple"),
        (lambda: chain(3, [Dense(3)]).node_index("dense7"), "'dense7'; the nodes are input, dense1"),
    ],
)
def test_a_network_that_cannot_be_is_refused_in_a_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_every_activation_may_stand_anywhere_but_softmax():
    for activation in HIDDEN_ACTIVATIONS:
        for placement in ("output", "input"):
            chain(3, [Dense(3, activation, activate=placement), Dense(2, activation, activate=placement)])
    chain(3, [Dense(3, "tanh"), Dense(2, "softmax")])


@pytest.mark.parametrize(
    ("energy", "units", "expected"),
    [(Gaussian(), 5, 0.0), (Gaussian(3.0), 2, 2 * math.log(3)), (Gaussian((2.0, 4.0)), 2, math.log(8))],
)
def test_the_log_determinant_of_a_precision_counts_every_unit(energy, units, expected):
    """A scalar stands for one per unit; forget that and energies of unequal widths do not compare."""
    assert energy.log_determinant(units) == pytest.approx(expected, rel=1e-15)


# --- groups -------------------------------------------------------------------------------------------------


def test_runs_of_equal_layers_share_a_group_and_runs_of_equal_widths_a_stack():
    """5-7-6-6-6-4: the first 6-wide layer maps 7 to 6 and stands alone, though its node joins the stack."""
    where = layout(NETWORKS["tanh at the output"])
    assert where.nodes == ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0))
    assert where.layers == ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))


def test_layers_are_grouped_by_width_and_bias_whatever_their_activation():
    """What layers compute is in the instructions; a group only says that their tensors are stacked."""
    kinds = [
        Dense(4, "tanh"),
        Dense(4, "gelu"),
        Dense(4, "gelu", bias=False),
        Dense(4, "gelu", bias=False, activate="input"),
        Dense(4, "gelu", energy=Gaussian(2.0)),
    ]
    assert layout(chain(4, kinds)).layers == ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))


def test_widths_are_grouped_as_they_are_stored():
    """In tiles of 32, 20 and 30 units take the same room, 40 take two tiles."""
    net = chain(20, [Dense(30), Dense(20), Dense(40), Dense(64)])
    assert layout(net, tile=32).layers == ((0, 0), (0, 1), (1, 0), (2, 0))
    assert layout(net, tile=32).nodes == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))


def test_a_layer_that_stands_apart_shares_nothing():
    """Of 4-4-4-4-4 with layers 1 and 3 apart: node 0 has no other layer, so it stands apart, too."""
    where = layout(chain(4, [Dense(4)] * 4), apart=frozenset({1, 3}))
    assert where.layers == ((0, 0), (1, 0), (2, 0), (3, 0))
    assert where.nodes == ((0, 0), (1, 0), (1, 1), (1, 2), (1, 3))
    assert [where.is_apart(node) for node in range(5)] == [True, False, False, False, False]


def test_ungrouped_everything_stands_alone():
    where = layout(NETWORKS["equal throughout"], grouped=False)
    assert [position for _, position in (*where.nodes, *where.layers)] == [0] * 11


# --- initial weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_initial_weights_are_seeded_and_agree_between_dtypes(scheme):
    """One seed, one network, whatever the dtype and whoever drew from the global generator before."""
    net = NETWORKS["two groups"]
    torch.rand(3)
    double, single = (init(net, 7, scheme, dtype=dtype) for dtype in (torch.float64, torch.float32))
    again, other = init(net, 7, scheme), init(net, 8, scheme)
    for name, layer in double.items():
        assert identical(single[name]["weight"], layer["weight"].float())
        assert identical(single[name]["weight"], again[name]["weight"])
        assert not torch.equal(single[name]["weight"], other[name]["weight"])
        assert not layer["bias"].any()
    assert check_weights(net, double) is torch.float64


def test_initial_weights_have_the_published_scales():
    """Xavier: uniform within sqrt(6 / (in + out)); kaiming: deviation gain / sqrt(in), in and not out;
    orthogonal: orthonormal columns; normal: deviation 0.05.

    The deviation of n = 120,000 draws is off by 1 / sqrt(2n) = 0.2 %; 1 % is five times that.
    """
    net = chain(400, [Dense(300, "relu")])
    weight = {scheme: init(net, 0, scheme)["dense1"]["weight"].double() for scheme in SCHEMES}
    bound = (6 / 700) ** 0.5
    assert 0.999 * bound < weight["xavier"].abs().max() <= bound
    assert weight["xavier"].std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert weight["kaiming"].std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.01)
    assert weight["normal"].std().item() == pytest.approx(0.05, rel=0.01)
    gram = weight["orthogonal"].T @ weight["orthogonal"]
    assert (gram - torch.eye(300)).abs().max() < 1e-5  # fp32 entries, 400 products each
    assert init(net, 0, "normal", gain=0.2)["dense1"]["weight"].std().item() == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheme": "zeros"}, "scheme must be one of xavier, kaiming, orthogonal, normal, got 'zeros'"),
        ({"gain": 0.0}, "gain must be a finite number above 0, got 0.0"),
        ({"gain": math.nan}, "gain must be a finite number above 0, got nan"),
    ],
)
def test_an_unknown_initialisation_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        init(NETWORKS["two layers"], **settings)


# --- weights that do not fit --------------------------------------------------------------------------------


def without(tree, *path):
    tree = {name: dict(layer) for name, layer in tree.items()}
    if len(path) == 1:
        del tree[path[0]]
    else:
        del tree[path[0]][path[1]]
    return tree


def replaced(tree, name, key, value):
    tree = {layer: dict(values) for layer, values in tree.items()}
    tree[name][key] = value
    return tree


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: without(w, "dense1"), r"weights are for layers \['dense2'\], the network has"),
        (lambda w: {**w, "dense9": {}}, "weights are for layers .*'dense9'"),
        (lambda w: without(w, "dense1", "bias"), r"'dense1' needs \['bias', 'weight'\], its weights hold"),
        (lambda w: replaced(w, "dense2", "scale", torch.ones(4)), "'dense2' needs .* hold .*'scale'"),
        (
            lambda w: replaced(w, "dense1", "weight", w["dense1"]["weight"].T),
            r"dense1/weight must have shape \(5, 6\) \(\[in, out\]\), got \(6, 5\)",
        ),
        (
            lambda w: replaced(w, "dense2", "bias", torch.ones(4)),
            "one floating dtype, got .*float32.*float64",
        ),
        (
            lambda w: {n: {k: v.long() for k, v in layer.items()} for n, layer in w.items()},
            "one floating dtype, got .*int64",
        ),
        (
            lambda w: {n: {k: v.half() for k, v in layer.items()} for n, layer in w.items()},
            "float32 or float64, got torch.float16",
        ),
    ],
)
def test_weights_that_do_not_fit_the_network_are_refused_by_name(change, words):
    net = NETWORKS["two layers"]
    weights = change(random_weights(net))
    inputs = random_nodes(net)["input"].to(weights.get("dense2", {}).get("weight", torch.zeros(())).dtype)
    with pytest.raises(ValueError, match=words):
        infer(net, weights, {"input": inputs})


# --- queries that cannot be answered ------------------------------------------------------------------------

ROWS = torch.zeros(3, 5, dtype=torch.float64)
OUTPUT = torch.zeros(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("clamp", "initial", "words"),
    [
        ({}, None, "clamp at least one node"),
        ({"dense7": ROWS}, None, "no node is called 'dense7'; the nodes are input, dense1, dense2"),
        ({"input": ROWS[:, :4]}, None, r"'input' must be a tensor of shape \[batch, 5\], got \(3, 4\)"),
        ({"input": ROWS[0]}, None, r"'input' must be a tensor of shape \[batch, 5\], got \(5,\)"),
        ({"input": ROWS[None]}, None, r"'input' must be a tensor of shape \[batch, 5\], got \(1, 3, 5\)"),
        ({"input": [[0.0] * 5]}, None, r"'input' must be a tensor of shape \[batch, 5\], got list"),
        ({"input": ROWS.numpy()}, None, r"'input' must be a tensor of shape \[batch, 5\], got ndarray"),
        ({"input": ROWS.float()}, None, "'input' is torch.float32 but the weights are torch.float64"),
        ({"input": ROWS.long()}, None, "'input' is torch.int64 but the weights are torch.float64"),
        ({"input": ROWS + math.nan}, None, "'input' holds NaN or infinite values"),
        ({"dense2": OUTPUT - math.inf}, None, "'dense2' holds NaN or infinite values"),
        ({"input": ROWS, "dense2": OUTPUT[:2]}, None, r"the same number of samples, .*got \[2, 3\]"),
        ({"input": ROWS[:0]}, None, r"the same number of samples, at least one, got \[0\]"),
        ({"input": ROWS}, {"input": ROWS}, "'input' is clamped and given an initial activity"),
        ({"input": ROWS}, {"dense1": ROWS}, r"'dense1' must be a tensor of shape \[batch, 6\], got \(3, 5\)"),
        ({"input": ROWS}, {"dense9": ROWS}, "no node is called 'dense9'"),
        ({"input": ROWS}, {"dense2": OUTPUT + math.nan}, "'dense2' holds NaN"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused_in_a_sentence(clamp, initial, words):
    net = NETWORKS["two layers"]
    with pytest.raises(ValueError, match=words):
        infer(net, random_weights(net), clamp, initial=initial)


@pytest.mark.parametrize(
    ("targets", "row"),
    [
        ([[0.5, 0.5, 0.0], [0.5, 0.4, 0.0]], 1),
        ([[1.5, -0.5, 0.0], [0.0, 1.0, 0.0]], 0),
        ([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]], 1),
        ([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 0),
    ],
)
def test_targets_of_a_categorical_output_must_be_distributions(targets, row):
    net = chain(2, [Dense(4, "tanh"), SOFTMAX])
    values = torch.tensor(targets, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"targets must be distributions .* row {row} is not"):
        infer(net, random_weights(net), {"dense2": values})


def test_one_hot_and_soft_targets_are_distributions():
    net = chain(2, [Dense(4, "tanh"), SOFTMAX])
    for targets in ([[0.0, 1.0, 0.0]], [[0.2, 0.3, 0.5]]):
        infer(net, random_weights(net), {"dense2": torch.tensor(targets, dtype=torch.float64)}, throw=True)


def test_a_free_categorical_output_cannot_be_given_a_start():
    """It follows its prediction, so the start would be dropped without a word."""
    net = chain(2, [Dense(4, "tanh"), SOFTMAX])
    start = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="'dense2' is categorical: free, it follows its prediction"):
        inputs = torch.zeros(3, 2, dtype=torch.float64)
        infer(net, random_weights(net), {"input": inputs}, initial={"dense2": start})


def test_an_unknown_backend_or_device_is_answered_with_what_there_is():
    net = NETWORKS["two layers"]
    clamp = {"input": random_nodes(net)["input"]}
    with pytest.raises(ValueError, match=r"backend must be one of reference.*, got 'abacus'"):
        infer(net, random_weights(net), clamp, backend="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="use device='cpu'"):
            infer(net, random_weights(net), clamp, device="cuda")


# --- what a query answers -----------------------------------------------------------------------------------


def test_a_result_holds_every_node_in_the_dtype_of_the_weights():
    for dtype in (torch.float32, torch.float64):
        for net in NETWORKS.values():
            nodes = random_nodes(net, dtype=dtype)
            result = infer(
                net, random_weights(net, dtype=dtype), {net.output: nodes[net.output]}, Inference(3)
            )
            assert set(result.activities) == set(net.nodes)
            assert set(result.errors) == set(result.predictions) == set(net.names)
            tensors = [*result.activities.values(), *result.errors.values(), *result.predictions.values()]
            assert {tensor.dtype for tensor in (*tensors, result.energy)} == {dtype}
            assert result.energy.shape == (4, len(net.layers))
            assert result.clamped == (net.output,)


def test_errors_are_activities_minus_predictions():
    net = NETWORKS["two groups"]
    nodes = random_nodes(net)
    result = infer(net, random_weights(net), {"input": nodes["input"], net.output: nodes[net.output]})
    for name in net.names:
        difference = result.activities[name] - result.predictions[name]
        assert (difference - result.errors[name]).abs().max() <= 1e-15 * 4


def test_weight_gradients_have_the_tree_of_the_weights():
    for net in NETWORKS.values():
        weights, nodes = random_weights(net), random_nodes(net)
        result = infer(net, weights, {net.output: nodes[net.output]}, Inference(4))
        gradients = weight_gradients(net, weights, result)
        assert {n: {k: v.shape for k, v in layer.items()} for n, layer in gradients.items()} == {
            n: {k: v.shape for k, v in layer.items()} for n, layer in weights.items()
        }


def test_an_activation_says_whether_it_keeps_zero():
    """By the oracle's functions. A card's padding is zero; what f makes of it must not count."""
    zero = torch.zeros(1, dtype=torch.float64)
    for name, entry in ACTIVATIONS.items():
        assert entry.keeps_zero == (ORACLE_FUNCTIONS[name](zero).item() == 0.0), name
