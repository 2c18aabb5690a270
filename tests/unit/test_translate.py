"""Translation between torch modules and networks: the same outputs, and with fixed predictions the same
gradients.

The expected values are the module's own output and autograd's gradients in it, so nothing of pctt stands on
their side. Tolerances: fp64, sums over fewer than 500 terms and fewer than 100 products after each other, so
two orders of computation are off by at most about 500 * 100 * 2u = 1e-11 of the largest terms where all
roundings agree in sign, and by u times the root of that count, 5e-14, where they do not, as here. 1e-12 for
outputs and 1e-10 for gradients, relative to the largest entry of a parameter's, leave room for entries that
cancel. A wrong rule is off by parts of 1.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pctt
from pctt import backprop, translate
from pctt.translate import layers as translate_layers
from pctt.translate import parameter_gradients
from tools.translated_gradients import ARCHITECTURES, EXACT, Transformer, batch_of, compare, made
from tools.translated_gradients import main as gradients_tool

NODES = ("activations", "operations")
OUTPUT, GRADIENT = 1e-12, 1e-10
each_cut = pytest.mark.parametrize("nodes", NODES)


def assert_translated(
    module: nn.Module, x: Tensor, nodes: str, categorical: bool = False, unused: tuple[str, ...] = ()
) -> pctt.Network:
    """Sweep, gradients and the way back."""
    found = compare(module, x, nodes, categorical)
    assert found.output < OUTPUT
    assert found.gradients, "a module without parameters compares nothing"
    for name, error in found.gradients.items():
        assert error < GRADIENT, f"the gradient of {name} is off by {error:.1e}"
    net, weights = pctt.from_torch(module, x, nodes)
    back = pctt.to_torch(net, weights)
    with torch.no_grad():
        torch.testing.assert_close(back(x), module(x), rtol=OUTPUT, atol=OUTPUT)
    return found.net


# --- architectures ------------------------------------------------------------------------------------------


@each_cut
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_computes_the_same_and_has_the_gradients_of_autograd(name: str, nodes: str) -> None:
    """LeNet-5, VGG-5 to 9, ResNet-18, an LSTM and a transformer, cut both ways.

    One wrong axis, sign or order of gates leaves a network that trains and is another one.
    """
    architecture = ARCHITECTURES[name]
    module = made(name, architecture.small)
    categorical = bool(architecture.tokens)
    assert_translated(module, batch_of(name, 3), nodes, categorical)


@pytest.mark.slow
@each_cut
def test_resnet18_at_full_width(nodes: str) -> None:
    """11.2 million parameters, as published; sums over up to 4,608 terms are still far below the limits."""
    found = compare(made("resnet18", 64), batch_of("resnet18", 2), nodes)
    assert found.output < OUTPUT and max(found.gradients.values()) < GRADIENT
    assert sum(p.numel() for p in made("resnet18", 64).parameters()) > 11e6


def test_resnet18_has_a_node_per_convolution_and_one_for_the_output() -> None:
    """The shortcut's convolution and the addition lie in the block of the second convolution."""
    net, _ = pctt.from_torch(made("resnet18", 4), batch_of("resnet18", 1))
    assert len(net.names) == 18
    places = {
        name: (step.map.kind for step in layer.steps)
        for name, layer in zip(net.names, net.layers, strict=True)
    }
    assert list(places["layer1.0.conv2"]) == ["conv2d", "standardise", "affine", "add", "function"]
    assert list(places["layer2.0"]).count("conv2d") == 2
    sources = dict(zip(net.names, net.wiring.sources, strict=True))
    assert sources["layer2.0"] == ("layer2.0.conv1", "layer1.1.conv2")
    assert sources["fc"] == ("layer4.1.conv2",)


def test_vgg_has_a_node_per_layer() -> None:
    net, _ = pctt.from_torch(made("vgg5", 4), batch_of("vgg5", 1))
    assert [[step.map.kind for step in layer.steps] for layer in net.layers] == [
        *[["conv2d", "function", "max_pool2d"]] * 3,
        ["conv2d", "function", "max_pool2d", "flatten"],
        ["linear"],
    ]


@each_cut
def test_a_transformer_with_normalisation_after_each_part(nodes: str) -> None:
    torch.manual_seed(0)
    module = Transformer(8, length=5, norm_first=False).double()
    assert_translated(module, torch.randint(27, (2, 5)).double(), nodes, True)


@each_cut
def test_fp32_weights_stay_fp32(nodes: str) -> None:
    """Within 1e-4: fp32's u is 6e-8, times the same 100 * 10 that fp64's limit has."""
    module = made("lenet5", 6, dtype=torch.float32)
    found = compare(module, batch_of("lenet5", 3, dtype=torch.float32), nodes)
    _, weights = pctt.from_torch(module, (1, 28, 28), nodes)
    assert {value.dtype for tree in weights.values() for value in tree.values()} == {torch.float32}
    assert max(found.gradients.values()) < 1e-4


# --- single operations --------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """function(self, x), with parts and parameters of any kind."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def after_linear(function: Callable[..., Any], units: int = 6, **parts: Any) -> nn.Module:
    return Wrapped(lambda m, x: function(m, m.first(x)), first=nn.Linear(5, units), **parts)


def after_conv(function: Callable[..., Any], **parts: Any) -> nn.Module:
    """On samples [4, 6, 8]."""
    return Wrapped(lambda m, x: function(m, m.first(x)), first=nn.Conv2d(3, 4, 3, padding=1), **parts)


def between(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *modules)


def heads(x: Tensor) -> Tensor:
    return x.view(x.size(0), x.size(1), 2, 3).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().view(x.size(0), -1, 6)


def attention_by_hand(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
    return m.out(merged(y)) + x


def unrolled(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(0), 4)
    for place in range(3):
        h = torch.tanh(m.own(x[:, place]) + m.recurrent(h))
    return m.out(h)


def unrolled_cells(m: Any, x: Tensor) -> Tensor:
    h, c = m.cell(x[:, 0])
    for place in range(1, 3):
        h, c = m.cell(x[:, place], (h, c))
    return m.out(torch.cat([h, c], 1))


def gru_cells(m: Any, x: Tensor) -> Tensor:
    h = m.cell(x[:, 0])
    return m.cell(x[:, 1], h)


def branches(m: Any, x: Tensor) -> Tensor:
    a = F.relu(m.a(x))
    b, c = m.b(x).split([2, 4], dim=1)
    gate = torch.sigmoid(c) * a[:, 2:]
    return m.out(torch.cat((b, gate, (a - 0.5) * 2), dim=1)) - m.skip(x)


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def multihead(m: Any, x: Tensor) -> Tensor:
    y, _ = m.attention(x, x, x, attn_mask=causal(3), need_weights=False)
    return y + x


def cross(m: Any, x: Tensor) -> Tensor:
    y, _ = m.attention(m.query(x), x[:, :2], x[:, 1:], need_weights=False)
    return y


def last_of(m: Any, x: Tensor) -> Tensor:
    _, (h, c) = m.lstm(x)
    return m.out(h[-1] * c[0])


def last_step(m: Any, x: Tensor) -> Tensor:
    states, _ = m.rnn(x)
    return m.out(states[:, -1])


SEQUENCE, IMAGE = (3, 5), (3, 6, 8)
OPERATIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a square linear layer": (lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), (5,)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(5, 3, bias=False)), (5,)),
    "linear alone": (lambda: nn.Linear(5, 3), (5,)),
    "functional linear": (lambda: Wrapped(lambda m, x: F.linear(x, m.w, m.b), w=t(3, 5), b=t(3)), (5,)),
    "matmul with a parameter": (lambda: Wrapped(lambda m, x: x @ m.w, w=t(5, 3)), (5,)),
    "matmul with a turned one": (lambda: Wrapped(lambda m, x: torch.matmul(x, m.w.t()), w=t(5, 5)), (5,)),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        (4, 7, 8),
    ),
    "conv2d, same": (lambda: nn.Conv2d(3, 2, (3, 5), padding="same", dilation=2), (3, 9, 9)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 2, 3, padding="valid"), IMAGE),
    "functional conv2d": (lambda: Wrapped(lambda m, x: F.conv2d(x, m.w, padding=1), w=t(2, 3, 3, 3)), IMAGE),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 4), stride=2, padding=1, output_padding=1, groups=2),
        (4, 3, 5),
    ),
    "functional conv_transpose2d": (
        lambda: Wrapped(lambda m, x: F.conv_transpose2d(x, m.w, m.b, 2), w=t(3, 2, 2, 2), b=t(2)),
        IMAGE,
    ),
    "batch norm": (lambda: between(nn.BatchNorm2d(4), nn.ReLU()).eval(), IMAGE),
    "batch norm in training": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh()).train(),
        IMAGE,
    ),
    "batch norm without weights": (lambda: between(nn.BatchNorm2d(4, affine=False)).eval(), IMAGE),
    "batch norm on one axis": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval(), (5,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), SEQUENCE),
    "layer norm over an image": (lambda: between(nn.LayerNorm([4, 6, 8])), IMAGE),
    "layer norm without weights": (lambda: between(nn.LayerNorm([4, 6, 8], elementwise_affine=False)), IMAGE),
    "functional layer norm": (lambda: after_linear(lambda m, x: F.layer_norm(x, (6,), m.w), w=t(6)), (5,)),
    "group norm": (lambda: between(nn.GroupNorm(2, 4)), IMAGE),
    "functional group norm": (lambda: after_conv(lambda m, x: F.group_norm(x, 2)), IMAGE),
    "max_pool2d": (lambda: between(nn.MaxPool2d(3, 2, 1)), IMAGE),
    "functional max_pool2d": (lambda: after_conv(lambda m, x: F.max_pool2d(x, (2, 1))), IMAGE),
    "avg_pool2d": (lambda: between(nn.AvgPool2d(3, stride=2, padding=1)), IMAGE),
    "functional avg_pool2d": (lambda: after_conv(lambda m, x: F.avg_pool2d(x, 2)), IMAGE),
    "adaptive_avg_pool2d": (lambda: between(nn.AdaptiveAvgPool2d((3, 2))), IMAGE),
    "adaptive_avg_pool2d to one": (lambda: after_conv(lambda m, x: F.adaptive_avg_pool2d(x, 1)), IMAGE),
    "mean of an image": (lambda: after_conv(lambda m, x: x.mean((2, 3))), IMAGE),
    "mean over positions": (
        lambda: after_linear(lambda m, x: torch.mean(x, dim=1, keepdim=True)),
        SEQUENCE,
    ),
    "sum over channels": (lambda: after_conv(lambda m, x: x.sum(1)), IMAGE),
    "flatten": (lambda: between(nn.Flatten(), nn.Linear(192, 3)), IMAGE),
    "flatten of some axes": (lambda: after_conv(lambda m, x: torch.flatten(x, 2)), IMAGE),
    "view": (lambda: after_conv(lambda m, x: m.out(x.view(x.size(0), -1)), out=nn.Linear(192, 2)), IMAGE),
    "reshape": (lambda: after_conv(lambda m, x: x.reshape(-1, 2, 2, 48)), IMAGE),
    "unflatten": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3))), (5,)),
    "unsqueeze and squeeze": (lambda: after_linear(lambda m, x: x.unsqueeze(1).squeeze(1) * 2), (5,)),
    "dropout in evaluation": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Identity()).eval(),
        (5,),
    ),
    "relu": (lambda: between(nn.ReLU(inplace=True)), IMAGE),
    "leaky relu": (lambda: between(nn.LeakyReLU()), IMAGE),
    "hardtanh": (lambda: between(nn.Hardtanh()), IMAGE),
    "clamp": (lambda: after_linear(lambda m, x: x.clamp(-1, 1) + x.clamp(min=0)), (5,)),
    "gelu": (lambda: between(nn.GELU()), IMAGE),
    "silu": (lambda: between(nn.SiLU()), IMAGE),
    "softmax": (lambda: after_linear(lambda m, x: m.out(x.softmax(-1)), out=nn.Linear(6, 3)), SEQUENCE),
    "functional activations": (
        lambda: after_linear(lambda m, x: F.gelu(F.silu(torch.tanh(F.leaky_relu(x.sigmoid()))))),
        (5,),
    ),
    "arithmetic with numbers": (lambda: after_linear(lambda m, x: 1 - (-x + 2) * 3 / 4 - 0.5), (5,)),
    "squares": (lambda: after_linear(lambda m, x: x**2 - x.square() * 0.5), (5,)),
    "add with alpha": (lambda: after_linear(lambda m, x: torch.add(x, x.tanh(), alpha=0.3)), (5,)),
    "a parameter added": (lambda: after_linear(lambda m, x: x + m.b, b=t(6)), SEQUENCE),
    "a parameter subtracted": (
        lambda: after_linear(lambda m, x: m.a - (x - m.b), a=t(6), b=t(3, 6)),
        SEQUENCE,
    ),
    "a parameter as factor": (lambda: after_linear(lambda m, x: m.a * x * m.b, a=t(6), b=t(3, 6)), SEQUENCE),
    "a factor per channel": (lambda: after_conv(lambda m, x: x * m.a, a=t(1, 4, 1, 1)), IMAGE),
    "a part of a parameter": (lambda: after_linear(lambda m, x: x + m.b[:, :3], b=t(1, 9, 6)), SEQUENCE),
    "a constant added": (lambda: after_linear(lambda m, x: x + torch.arange(6.0).double()), SEQUENCE),
    "cat": (lambda: after_conv(lambda m, x: torch.cat([x, x.tanh(), x], 1)), IMAGE),
    "stack": (lambda: after_linear(lambda m, x: torch.stack([x, x.tanh()], dim=1)), (5,)),
    "chunk": (lambda: after_conv(lambda m, x: torch.chunk(x, 2, 1)[1] * x.narrow(1, 1, 2)), IMAGE),
    "unbind": (lambda: after_conv(lambda m, x: x.unbind(1)[2]), IMAGE),
    "slices": (lambda: after_conv(lambda m, x: x[:, 1:3, ..., -1] - x[:, :2, :, 0]), IMAGE),
    "new axes": (lambda: after_linear(lambda m, x: x[:, None] + x[..., None, :]), (5,)),
    "permute": (lambda: after_conv(lambda m, x: m.out(x.permute(0, 2, 3, 1)), out=nn.Linear(4, 3)), IMAGE),
    "transpose": (lambda: after_conv(lambda m, x: x.transpose(-1, 1) * x.mT.mT.transpose(1, 3)), IMAGE),
    "attention by hand": (
        lambda: Wrapped(attention_by_hand, qkv=nn.Linear(6, 18), out=nn.Linear(6, 6)),
        (4, 6),
    ),
    "attention, scaled, with a mask": (
        lambda: after_linear(
            lambda m, x: F.scaled_dot_product_attention(
                x, x.tanh(), x, attn_mask=torch.ones(3, 3).tril().bool(), scale=0.7
            )
        ),
        SEQUENCE,
    ),
    "multihead attention": (
        lambda: Wrapped(multihead, attention=nn.MultiheadAttention(6, 3, batch_first=True)),
        (3, 6),
    ),
    "multihead attention across": (
        lambda: Wrapped(
            cross,
            query=nn.Linear(6, 4),
            attention=nn.MultiheadAttention(4, 2, batch_first=True, kdim=6, vdim=6, bias=False),
        ),
        (3, 6),
    ),
    "an encoder layer": (lambda: nn.TransformerEncoderLayer(6, 2, 9, 0.0, batch_first=True), (3, 6)),
    "lstm": (lambda: Wrapped(last_of, lstm=nn.LSTM(5, 4, batch_first=True), out=nn.Linear(4, 2)), SEQUENCE),
    "gru, two layers": (
        lambda: Wrapped(last_step, rnn=nn.GRU(5, 4, 2, batch_first=True), out=nn.Linear(4, 2)),
        SEQUENCE,
    ),
    "rnn": (
        lambda: Wrapped(last_step, rnn=nn.RNN(5, 4, batch_first=True), out=nn.Linear(4, 2)),
        SEQUENCE,
    ),
    "rnn with relu and no bias": (
        lambda: Wrapped(
            last_step,
            rnn=nn.RNN(5, 4, nonlinearity="relu", bias=False, batch_first=True),
            out=nn.Linear(4, 2),
        ),
        SEQUENCE,
    ),
    "a recurrence unrolled": (
        lambda: Wrapped(unrolled, own=nn.Linear(5, 4), recurrent=nn.Linear(4, 4), out=nn.Linear(4, 2)),
        SEQUENCE,
    ),
    "cells unrolled": (
        lambda: Wrapped(unrolled_cells, cell=nn.LSTMCell(5, 4), out=nn.Linear(8, 2)),
        SEQUENCE,
    ),
    "gru cells": (lambda: Wrapped(gru_cells, cell=nn.GRUCell(5, 4)), SEQUENCE),
    "branches": (
        lambda: Wrapped(
            branches, a=nn.Linear(5, 6), b=nn.Linear(5, 6), skip=nn.Linear(5, 3), out=nn.Linear(12, 3)
        ),
        (5,),
    ),
    "a layer used twice in one block": (
        lambda: Wrapped(
            lambda m, x: m.out(m.a(x[:, 0]) + m.a(x[:, 1])), a=nn.Linear(5, 4), out=nn.Linear(4, 2)
        ),
        SEQUENCE,
    ),
    "a layer used alone and beside another": (
        lambda: Wrapped(lambda m, x: m.a(torch.tanh(m.a(x))) + m.b(x), a=nn.Linear(5, 5), b=nn.Linear(5, 5)),
        (5,),
    ),
}


def t(*shape: int) -> Tensor:
    return torch.randn(*shape)


def drawn(name: str) -> tuple[nn.Module, Tensor]:
    """The module of a row with statistics and scales unlike those at the start, and a batch of 3 for it."""
    build, shape = OPERATIONS[name]
    torch.manual_seed(len(name))
    module = build().double()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                for parameter in part.parameters():
                    parameter.normal_()
    return module, torch.randn(3, *shape, dtype=torch.float64)


@each_cut
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_computes_the_same_and_has_the_gradients_of_autograd(name: str, nodes: str) -> None:
    """One row per module, function and method that is supported, none of them with equal sizes that would
    hide a wrong axis.
    """
    module, x = drawn(name)
    assert_translated(module, x, nodes)


MOVING = (
    *("transpose", "attention by hand", "lstm", "a recurrence unrolled", "a constant added"),
    *("branches", "gru, two layers", "batch norm", "softmax", "multihead attention"),
)


@each_cut
@pytest.mark.parametrize("name", MOVING)
def test_activities_that_move_follow_the_energy_of_the_translation(name: str, nodes: str) -> None:
    """Live inference against gradient descent on the energy by autograd: fixed predictions never push a
    change through a map, so this is where permutations, zeros and constants would be wrong unseen.
    """
    module, x = drawn(name)
    net, weights = pctt.from_torch(module, x, nodes)
    y = torch.randn(3, *net.shapes[net.output_index], dtype=torch.float64)
    steps, rate = 5, 0.05
    found = pctt.infer(net, weights, {"input": x, net.output: y}, pctt.Inference(steps, rate))
    start = pctt.infer(net, weights, {"input": x}, pctt.Inference(num_steps=0)).activities
    activities = {**start, "input": x, net.output: y}
    free = [name for name in net.names if name != net.output]
    for _ in range(steps):
        moving = {name: activities[name].detach().requires_grad_() for name in free}
        here = {**activities, **moving}
        predictions = dict(zip(net.nodes, backprop.forward(net, weights, here), strict=True))
        energy = sum(0.5 * (here[name] - predictions[name]).square().sum() for name in net.names)
        slopes = torch.autograd.grad(energy, list(moving.values())) if moving else ()
        activities |= {
            name: moving[name].detach() - rate * slope for name, slope in zip(free, slopes, strict=True)
        }
    for name in net.names:
        torch.testing.assert_close(found.activities[name], activities[name], rtol=1e-10, atol=1e-12)


# --- what the translation is --------------------------------------------------------------------------------


def test_a_linear_layer_that_is_not_turned_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: weights of a square layer taken as torch has them, [out, in]."""
    module, x = drawn("a square linear layer")

    def unturned(t: Any, x: Any, weight: Any, bias: Any = None, label: str = "") -> Any:
        matrix = t.reference(weight)
        return t.apply(pctt.Linear(len(matrix.tensor)), x, weight=matrix, bias=t.reference(bias))

    monkeypatch.setattr(translate_layers, "linear", unturned)
    with pytest.raises(ValueError, match="something else"):  # from_torch looks at its own output
        pctt.from_torch(module)
    monkeypatch.setattr(translate, "_check_output", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_translated(module, x, "activations")


def test_parameters_used_again_are_one_layer() -> None:
    """Unrolled over three steps a recurrence has one cell's weights, and its gradients are summed."""
    module, x = drawn("a recurrence unrolled")
    net, weights = pctt.from_torch(module, x)
    assert sum(value.numel() for tree in weights.values() for value in tree.values()) == sum(
        parameter.numel() for parameter in module.parameters()
    )
    assert len([name for name in net.wiring.shared if name]) == 2


def test_modules_that_share_a_parameter_are_one_layer() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    module[2].weight, module[2].bias = module[0].weight, module[0].bias
    assert_translated(module, torch.randn(3, 5).double(), "activations")
    net, _ = pctt.from_torch(module)
    assert net.wiring.shared == ("", "0")


@each_cut
def test_weights_written_back_are_those_that_were_taken(nodes: str) -> None:
    """Into a module with other weights, by name: every parameter and statistic has equal bits."""
    for name in OPERATIONS:
        module, x = drawn(name)
        net, weights = pctt.from_torch(module, x, nodes)
        other, _ = drawn(name)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        assert pctt.to_torch(net, weights, into=other) is other
        for key, value in module.state_dict().items():
            if name == "a part of a parameter" and key == "b":  # positions that are not used keep theirs
                continue
            assert torch.equal(other.state_dict()[key], value), f"{name}: {key}"


@each_cut
@pytest.mark.parametrize("name", ["lstm", "transformer", "lenet5"])
def test_a_step_of_learning_written_back_is_a_step_of_sgd_in_torch(name: str, nodes: str) -> None:
    """weights - rate * local gradients, into the module, beside torch.optim.SGD on a twin of it."""
    module, twin = (made(name, ARCHITECTURES[name].small) for _ in range(2))
    x = batch_of(name, 3)
    net, weights = pctt.from_torch(module, x, nodes, pctt.Categorical())
    shape = twin(x).shape
    labels = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    target = F.one_hot(labels, shape[-1]).double()
    result = pctt.infer(net, weights, {"input": x, net.output: target}, EXACT)
    gradients = pctt.weight_gradients(net, weights, result)
    moved = {
        layer: {key: value - 0.1 * gradients[layer].get(key, 0.0) for key, value in tree.items()}
        for layer, tree in weights.items()
    }
    pctt.to_torch(net, moved, into=module)
    loss = -(target * twin(x).log_softmax(-1)).sum() / len(x)
    loss.backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for (key, value), expected in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12, msg=key)


def test_gradients_get_the_names_and_shapes_of_the_modules_parameters() -> None:
    module = made("transformer", 8)
    x = batch_of("transformer", 2)
    net, weights = pctt.from_torch(module, x)
    result = pctt.infer(net, weights, {"input": x}, pctt.Inference(num_steps=0))
    found = parameter_gradients(net, pctt.weight_gradients(net, weights, result), module)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in module.named_parameters()
    }


def test_a_softmax_at_the_end_is_not_put_there_twice() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.Softmax(-1)).double()
    net, weights = pctt.from_torch(module, energy=pctt.Categorical())
    x = torch.randn(4, 5).double()
    torch.testing.assert_close(pctt.to_torch(net, weights)(x), module(x))


def test_logits_that_are_read_elsewhere_too_have_the_gradients_of_cross_entropy() -> None:
    """The softmax then stands in a block of its own, whose error must reach the logits below it."""
    torch.manual_seed(0)
    net = pctt.graph(
        {"input": 3},
        {"z": (pctt.Linear(4), "input"), "y": (pctt.Block(["softmax"], pctt.Categorical()), "z")},
    )
    weights = pctt.init(net, dtype=torch.float64)
    x, y = torch.randn(5, 3).double(), torch.eye(4).double()[[0, 1, 2, 3, 1]]
    result = pctt.infer(net, weights, {"input": x, "y": y}, EXACT)
    found = pctt.weight_gradients(net, weights, result)["z"]["weight"]
    weight = weights["z"]["weight"].clone().requires_grad_()
    F.cross_entropy(x @ weight + weights["z"]["bias"], y).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-12, atol=1e-14)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, context: Tensor, scale: float = 2.0) -> Tensor:
        return torch.tanh(self.a(x) + scale * self.b(context))


def test_several_inputs_have_the_names_they_have_in_forward() -> None:
    torch.manual_seed(0)
    module, x, context = Two().double(), torch.randn(2, 3).double(), torch.randn(2, 5).double()
    net, weights = pctt.from_torch(module, [x, (5,)])
    given = {"input": x, "context": context}
    found = pctt.infer(net, weights, given, pctt.Inference(num_steps=0)).predictions[net.output]
    torch.testing.assert_close(found, module(x, context), rtol=OUTPUT, atol=OUTPUT)
    torch.testing.assert_close(pctt.to_torch(net, weights)(x, context), module(x, context))
    assert pctt.from_torch(module)[0] == net  # linear layers say what they read


def test_positions_embedded_by_constants_are_a_bias() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(x.long()) + self.places(torch.arange(3))

    torch.manual_seed(0)
    x = torch.randint(7, (2, 3)).double()
    for nodes in NODES:
        net = assert_translated(Model().double(), x, nodes)
        assert "bias" in {step.map.kind for layer in net.layers for step in layer.steps}


def test_tokens_sliced_before_their_embedding_are_no_node() -> None:
    """Inference cannot move whole numbers."""
    torch.manual_seed(0)
    module = Wrapped(
        lambda m, x: m.out(m.e(x[:, 0].long()) * m.e(x.long()[:, 1])),
        e=nn.Embedding(7, 4),
        out=nn.Linear(4, 2),
    )
    for nodes in NODES:
        assert_translated(module.double(), torch.randint(7, (3, 2)).double(), nodes)


def test_a_trainer_trains_a_translation() -> None:
    """End to end: the network of a module on data, and back into it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    net, weights = pctt.from_torch(module, energy=pctt.Categorical())
    from pctt.data import load

    digits = load("digits")
    trainer = pctt.Trainer(net, EXACT, pctt.Adam(1e-2), weights=weights)
    trainer.fit(digits.train, epochs=5)
    pctt.to_torch(net, trainer.weights, into=module)
    accuracy = (module(digits.test.inputs).argmax(-1) == digits.test.labels).float().mean()
    assert accuracy > 0.85


# --- back to torch ------------------------------------------------------------------------------------------


def test_any_network_without_cycles_becomes_a_module_that_torch_trains() -> None:
    """Dense layers, several inputs, a shared layer, a learned variance; forward is the sweep, and weights()
    are what torch made of them.
    """
    net = pctt.graph(
        {"x": 3, "c": 4},
        {
            "a": (pctt.Dense(5, "tanh", energy=pctt.Gaussian(1.0, "diagonal")), "x", "c"),
            "b": (pctt.Dense(5, "tanh", scale=0.5), "a"),
            "b again": (pctt.Dense(5, "tanh", scale=0.5), "b"),
            "y": (pctt.Block([pctt.Linear(3), "softmax"], pctt.Categorical()), "b again"),
        },
        shared={"b again": "b"},
    )
    weights = pctt.init(net, dtype=torch.float64)
    module = pctt.to_torch(net, weights)
    x, c = torch.randn(6, 3).double(), torch.randn(6, 4).double()
    swept = pctt.infer(net, weights, {"x": x, "c": c}, pctt.Inference(num_steps=0)).predictions["y"]
    torch.testing.assert_close(module(x, c), swept, rtol=OUTPUT, atol=OUTPUT)
    torch.testing.assert_close(module.logits(x, c).softmax(-1), swept, rtol=OUTPUT, atol=OUTPUT)
    assert "a_variance" in dict(module.named_buffers())
    F.cross_entropy(module.logits(x, c), torch.arange(6) % 3).backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    for name, tree in module.weights().items():
        for key, value in tree.items():
            assert torch.equal(value, weights[name][key]) == (key == "variance"), f"{name} {key}"
    with pytest.raises(ValueError, match="takes x, c, got 1 inputs"):
        module(x)


def test_a_chain_of_dense_layers_becomes_a_module() -> None:
    net = pctt.chain(4, [pctt.Dense(5, "tanh", activate="input"), pctt.Dense(2)])
    weights = pctt.init(net)
    x = torch.randn(3, 4)
    swept = pctt.infer(net, weights, {"input": x}, pctt.Inference(num_steps=0)).predictions[net.output]
    torch.testing.assert_close(pctt.to_torch(net, weights)(x), swept)


def test_going_back_is_refused_for_cycles_and_for_other_modules() -> None:
    cycle = pctt.graph({"x": 2}, {"a": (pctt.Dense(2), "x", "a")})
    with pytest.raises(ValueError, match="cycles"):
        pctt.to_torch(cycle, pctt.init(cycle))
    net, weights = pctt.from_torch(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="not what from_torch makes of Sequential in train mode"):
        pctt.to_torch(net, weights, into=nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    other = replace(net.layers[1], energy=pctt.Gaussian(2.0))
    changed = replace(net, layers=(net.layers[0], other))  # another energy is still the same module
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    assert torch.equal(pctt.to_torch(changed, weights, into=module)[2].weight, weights["2"]["weight"].T)


# --- refusals -----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.e(x))


def overwriting(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return torch.relu_(y) + y


def overwriting_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    z = y[:, 1:]
    z.add_(1.0)
    return torch.cat([z, y], 1)


def two_biases(m: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, m.w, m.a)), m.w, m.b)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "an unknown module": (lambda: nn.Sequential(nn.Linear(5, 3), nn.Softplus()), (5,), r"Softplus in '1'"),
    "an unknown function": (lambda: after_linear(lambda m, x: torch.cumsum(x, 1)), (5,), "cumsum in Wrapped"),
    "an unknown method": (lambda: after_linear(lambda m, x: x.cos()), (5,), r"an activity\.cos"),
    "activations made whole": (lambda: after_linear(lambda m, x: x.long()), (5,), "made whole numbers"),
    "prelu": (lambda: between(nn.PReLU()), IMAGE, "PReLU in '1'"),
    "dropout in training": (lambda: between(nn.Dropout(0.2)), IMAGE, r"dropout with p=0\.2 .*eval\(\)"),
    "functional dropout": (lambda: after_linear(lambda m, x: F.dropout(x)), (5,), "dropout with p=0.5"),
    "gelu by tanh": (lambda: between(nn.GELU("tanh")), IMAGE, "approximate='tanh'"),
    "another slope": (lambda: between(nn.LeakyReLU(0.2)), IMAGE, "negative_slope=0.2"),
    "another range": (lambda: between(nn.Hardtanh(0, 6)), IMAGE, r"\[0, 6\]"),
    "softmax over channels": (lambda: between(nn.Softmax(1)), IMAGE, "softmax over dim=1"),
    "log_softmax": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(-1)),
        (5,),
        r"energy=pctt\.Categorical",
    ),
    "same with an even kernel": (lambda: nn.Sequential(nn.Conv2d(3, 2, 2, padding="same")), IMAGE, "same"),
    "circular padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")),
        IMAGE,
        "padding_mode='circular'",
    ),
    "a dilated transpose": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 3, dilation=2)),
        IMAGE,
        "conv_transpose2d with dilation",
    ),
    "sizes that do not divide": (lambda: between(nn.AdaptiveAvgPool2d(5)), IMAGE, "sizes that divide"),
    "ceil_mode": (lambda: between(nn.MaxPool2d(2, ceil_mode=True)), IMAGE, "ceil_mode"),
    "the batch axis": (lambda: after_linear(lambda m, x: x.mean(0)), (5,), "over the batch axis"),
    "an index into the batch": (lambda: after_linear(lambda m, x: x[0]), (5,), "an index into the batch"),
    "a number as batch size": (lambda: after_linear(lambda m, x: x.view(3, 6)), (5,), "begins with 3"),
    "samples merged": (lambda: after_linear(lambda m, x: x.reshape(-1, 3)), (5,), "between samples"),
    "broadcasting": (lambda: after_conv(lambda m, x: x * x.mean((2, 3), keepdim=True)), IMAGE, "mul of"),
    "a product of activities": (lambda: after_linear(lambda m, x: x @ x.mT), SEQUENCE, "scaled_dot_product"),
    "another mask": (
        lambda: Wrapped(
            lambda m, x: m.a(x, x, x, attn_mask=torch.eye(3).bool())[0],
            a=nn.MultiheadAttention(6, 2, batch_first=True),
        ),
        (3, 6),
        "mask other than the causal one in 'a'",
    ),
    "attention's shares": (
        lambda: Wrapped(lambda m, x: m.a(x, x, x)[1] * 2.0, a=nn.MultiheadAttention(6, 2, batch_first=True)),
        (3, 6),
        "shares of an attention",
    ),
    "batch second": (
        lambda: Wrapped(lambda m, x: m.r(x)[0], r=nn.LSTM(5, 4)),
        SEQUENCE,
        "LSTM with batch_first=False",
    ),
    "two directions": (
        lambda: Wrapped(lambda m, x: m.r(x)[0], r=nn.GRU(5, 4, batch_first=True, bidirectional=True)),
        SEQUENCE,
        "bidirectional",
    ),
    "padding_idx": (lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=0)), (4,), "padding_idx"),
    "a number per sample": (lambda: after_linear(lambda m, x: x.sum(1)), (5,), "one number per sample"),
    "a number per sample, selected": (
        lambda: after_linear(lambda m, x: x[:, 0]),
        (5,),
        "one number per sample",
    ),
    "several outputs": (lambda: after_linear(lambda m, x: (x, x)), (5,), "one tensor"),
    "no weights": (lambda: nn.Sequential(nn.ReLU()), (5,), "has no weights"),
    "nothing": (lambda: nn.Identity(), (5,), "an output that is an input"),
    "control flow": (
        lambda: after_linear(lambda m, x: x if x.sum() > 0 else -x),
        (5,),
        "torch.fx cannot trace",
    ),
    "tied in two forms": (Tied, (4,), r"e\.weight is used in two forms"),
    "one weight, two biases": (
        lambda: Wrapped(two_biases, w=t(5, 5), a=t(5), b=t(5)),
        (5,),
        "used again with other weights",
    ),
    "a weight computed": (
        lambda: Wrapped(lambda m, x: F.linear(x, m.w * 2.0), w=t(3, 5)),
        (5,),
        "mul of a parameter",
    ),
    "overwritten": (lambda: Wrapped(overwriting, first=nn.Linear(5, 4)), (5,), "relu_, which overwrites"),
    "overwritten through a view": (
        lambda: Wrapped(overwriting_a_view, first=nn.Linear(5, 4)),
        (5,),
        "add_, which overwrites first",
    ),
    "shapes that do not suit": (lambda: nn.Sequential(nn.Conv2d(3, 2, 9)), IMAGE, "kernel of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_translated_is_refused_by_name(name: str) -> None:
    """Anything let through would be another function than the module's."""
    build, shape, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        pctt.from_torch(build(), shape)


def test_a_refusal_names_operation_module_line_and_a_way_out() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x, 1)  # this line

    module = nn.Sequential(nn.Linear(5, 3), nn.Sequential(Inner()))
    with pytest.raises(ValueError) as refused:
        pctt.from_torch(module)
    text = str(refused.value)
    assert "cumsum" in text and "'1.0'" in text and "pctt.graph" in text
    assert "test_translate.py, line " in text and "torch.cumsum(x, 1)  # this line" in text


def test_what_torch_fx_records_wrongly_is_noticed() -> None:
    """It takes z += 1 for z = z + 1, and so does not see that y, whose view z is, changes too."""

    def overwriting(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        z = y[:, 1:]
        z += 1.0
        return torch.cat([z, y], 1)

    with pytest.raises(ValueError, match=r"something else than torch\.fx records"):
        pctt.from_torch(Wrapped(overwriting, first=nn.Linear(5, 4)))


def test_translating_leaves_a_module_as_it_is() -> None:
    """The check of its output runs the module, in training too, where normalisation moves its statistics."""
    module, x = drawn("batch norm in training")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pctt.from_torch(module, x)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_hooks_are_refused() -> None:
    module = nn.Sequential(nn.Linear(5, 3))
    module[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        pctt.from_torch(module)


def test_bad_arguments_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3))
    with pytest.raises(ValueError, match="of unknown shape"):
        pctt.from_torch(module)
    with pytest.raises(ValueError, match="nodes"):
        pctt.from_torch(module, IMAGE, nodes="layers")
    with pytest.raises(ValueError, match="takes an nn"):
        pctt.from_torch(lambda x: x, IMAGE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a batch"):
        pctt.from_torch(module, torch.zeros(3))
    with pytest.raises(ValueError, match="without a shape"):
        pctt.from_torch(Two(), [(3,)])


def test_frozen_parameters_are_pointed_out() -> None:
    """pctt would train them, silently."""
    module = nn.Sequential(nn.Linear(5, 3)).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"requires_grad is False for 0\.weight"):
        pctt.from_torch(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pctt.from_torch(module.requires_grad_(True))


# --- the tool -----------------------------------------------------------------------------------------------


def test_the_tool_writes_its_table(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = [f"--json={tmp_path / 'a.json'}", f"--markdown={tmp_path / 'a.md'}"]
    assert gradients_tool(["--only", "vgg5", "--batch-size", "2", *out]) == 0
    assert "| vgg5 | 4 | 4,546 | activations | 5 |" in capsys.readouterr().out
    assert (tmp_path / "a.md").read_text().count("\n") == 4
    assert len((tmp_path / "a.json").read_text().splitlines()) == 2
    assert gradients_tool(["--only", "vgg5", "--nodes", "activations", "--limit", "0"]) == 1
