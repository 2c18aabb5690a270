"""Gradients of translated torch modules: predictive coding beside autograd, for known architectures.

    python tools/translated_gradients.py                       all, small widths, both ways to cut into nodes
    python tools/translated_gradients.py --full --only resnet18
    python tools/translated_gradients.py --json FILE --markdown FILE

Each module is translated by `pctt.from_torch`, one step of inference with fixed predictions, rate 1 and
sweep="gauss_seidel" is run, and the local weight gradients are compared with autograd's in the module: the
largest difference over the largest entry, per parameter, in fp64 (--dtype float32 for single precision). The
loss is half the squared error, or cross-entropy, summed over a sample and averaged over the batch. Exit code
1 where an error is above --limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import pctt
from pctt.translate import parameter_gradients

EXACT = pctt.Inference(1, 1.0, "fixed", sweep="gauss_seidel")

# --- architectures ------------------------------------------------------------------------------------------


def lenet(width: int = 6, **_: Any) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) on 28 x 28: tanh and mean pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(width, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def vgg(channels: list[int], pools: list[int], hidden: int = 0) -> nn.Module:
    """VGG as in Pinchetti et al. 2025, on 32 x 32: convolutions of 3 x 3, a pool after some of them."""
    layers: list[nn.Module] = []
    below = 3
    for number, own in enumerate(channels):
        layers += [nn.Conv2d(below, own, 3, padding=1), nn.GELU()]
        layers += [nn.MaxPool2d(2)] if number in pools else []
        below = own
    units = below * (32 // 2 ** len(pools)) ** 2
    head = [nn.Linear(units, hidden), nn.GELU(), nn.Linear(hidden, 10)] if hidden else [nn.Linear(units, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def vgg5(width: int = 128, **_: Any) -> nn.Module:
    return vgg([width, 2 * width, 4 * width, 4 * width], [0, 1, 2, 3])


def vgg7(width: int = 128, **_: Any) -> nn.Module:
    return vgg([width, width, 2 * width, 2 * width, 4 * width, 4 * width], [1, 3, 5])


def vgg9(width: int = 128, **_: Any) -> nn.Module:
    widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 4 * width]
    return vgg(widths, [1, 3, 5, 6], 4 * width)


class Residual(nn.Module):
    """The basic block of He et al. 2016."""

    def __init__(self, below: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(below, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or below != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(below, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self, width: int = 64, **_: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        below = width
        for stage in range(4):
            own = width * 2**stage
            blocks = nn.Sequential(Residual(below, own, 1 if stage == 0 else 2), Residual(own, own, 1))
            self.add_module(f"layer{stage + 1}", blocks)
            below = own
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(below, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class LanguageLSTM(nn.Module):
    """Embedding, two layers of LSTM, logits of the next symbol at every position."""

    def __init__(self, width: int = 128, num: int = 27, **_: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num, width)
        self.lstm = nn.LSTM(width, width + 1, num_layers=2, batch_first=True)
        self.head = nn.Linear(width + 1, num)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens.long()))
        return self.head(states)


class Transformer(nn.Module):
    """A causal language model of encoder layers with learned positions."""

    def __init__(self, width: int = 64, num: int = 27, length: int = 12, norm_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num, width)
        self.positions = nn.Parameter(0.3 * torch.randn(1, length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 3 * width, 0.0, functional.gelu, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.long()) + self.positions
        return self.head(self.norm(self.encoder(x, self.mask)))


@dataclass(frozen=True)
class Architecture:
    """small, full: widths.    shape: of a sample.    tokens: symbols where the inputs are whole numbers."""

    build: Callable[..., nn.Module]
    small: int
    full: int
    shape: tuple[int, ...]
    tokens: int = 0


ARCHITECTURES = {
    "lenet5": Architecture(lenet, 6, 6, (1, 28, 28)),
    "vgg5": Architecture(vgg5, 4, 128, (3, 32, 32)),
    "vgg7": Architecture(vgg7, 4, 128, (3, 32, 32)),
    "vgg9": Architecture(vgg9, 4, 128, (3, 32, 32)),
    "resnet18": Architecture(ResNet18, 4, 64, (3, 64, 64)),
    "lstm": Architecture(LanguageLSTM, 8, 128, (12,), 27),
    "transformer": Architecture(Transformer, 8, 64, (12,), 27),
}


def made(name: str, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An architecture in evaluation mode, with statistics and scales that are not those of its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ARCHITECTURES[name].build(width=width).to(dtype).eval()
        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, nn.BatchNorm2d):
                    assert part.running_mean is not None and part.running_var is not None
                    part.running_mean.normal_(0.0, 0.2)
                    part.running_var.uniform_(0.5, 2.0)
                if isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
                    part.weight.uniform_(0.5, 1.5)
                    part.bias.normal_(0.0, 0.2)
    return module


def batch_of(name: str, size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    architecture, source = ARCHITECTURES[name], torch.Generator().manual_seed(seed)
    if architecture.tokens:
        tokens = torch.randint(architecture.tokens, (size, *architecture.shape), generator=source)
        return tokens.to(dtype)
    return torch.randn(size, *architecture.shape, generator=source, dtype=torch.float64).to(dtype)


# --- the comparison -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """output: largest difference of the sweep from the module's output.    gradients: per parameter, the
    largest difference over the largest entry.    net: the translation.
    """

    output: float
    gradients: dict[str, float]
    net: pctt.Network


def compare(module: nn.Module, x: Tensor, nodes: str, categorical: bool = False, seed: int = 2) -> Comparison:
    """A module and its translation, on one batch and random targets."""
    energy = pctt.Categorical() if categorical else None
    net, weights = pctt.from_torch(module, x, nodes, energy)
    output, source = module(x), torch.Generator().manual_seed(seed)
    if categorical:
        labels = torch.randint(output.shape[-1], output.shape[:-1], generator=source)
        target = functional.one_hot(labels, output.shape[-1]).to(output.dtype)
        loss = -(target * output.log_softmax(-1)).sum() / len(x)
    else:
        target = torch.randn(output.shape, generator=source, dtype=torch.float64).to(output.dtype)
        loss = 0.5 * (target - output).square().sum() / len(x)
    expected = {name: value for name, value in module.named_parameters() if value.requires_grad}
    slopes = torch.autograd.grad(loss, list(expected.values()), materialize_grads=True)
    result = pctt.infer(net, weights, {"input": x, net.output: target}, EXACT)
    found = parameter_gradients(net, pctt.weight_gradients(net, weights, result), module)
    errors: dict[str, float] = {}
    for name, slope in zip(expected, slopes, strict=True):
        difference = (found[name] - slope).abs().max() if name in found else slope.abs().max()
        errors[name] = float(difference / slope.abs().max().clamp_min(torch.finfo(slope.dtype).tiny))
    start = pctt.infer(net, weights, {"input": x}, pctt.Inference(num_steps=0)).predictions[net.output]
    off = (start - (output.softmax(-1) if categorical else output)).abs().max()
    return Comparison(float(off.detach()), errors, net)


def row(name: str, nodes: str, options: argparse.Namespace) -> dict[str, Any]:
    architecture, dtype = ARCHITECTURES[name], getattr(torch, options.dtype)
    width = architecture.full if options.full else architecture.small
    module = made(name, width, options.seed, dtype)
    x = batch_of(name, options.batch_size, options.seed + 1, dtype)
    started = time.perf_counter()
    found = compare(module, x, nodes, categorical=bool(architecture.tokens), seed=options.seed + 2)
    worst = max(found.gradients, key=lambda parameter: found.gradients[parameter])
    return {
        "architecture": name,
        "width": width,
        "nodes": nodes,
        "num_nodes": len(found.net.names),
        "num_weights": sum(parameter.numel() for parameter in module.parameters()),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "output_error": found.output,
        "gradient_error": found.gradients[worst],
        "worst_parameter": worst,
        "seconds": round(time.perf_counter() - started, 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| Module | Width | Parameters | Cut by | Nodes | Output off by | Gradient off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        lines.append(
            f"| {entry['architecture']} | {entry['width']} | {entry['num_weights']:,} | {entry['nodes']} "
            f"| {entry['num_nodes']} | {entry['output_error']:.0e} | {entry['gradient_error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(ARCHITECTURES), nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--nodes", choices=("activations", "operations", "both"), default="both")
    parser.add_argument("--full", action="store_true", help="published widths instead of small ones")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1e-10, help="largest gradient error that passes")
    parser.add_argument("--json", type=Path, help="file for one JSON object per row")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    ways = ("activations", "operations") if options.nodes == "both" else (options.nodes,)
    rows = [row(name, nodes, options) for name in options.only for nodes in ways]
    print(table(rows))
    if options.json:
        options.json.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(table(rows), encoding="utf-8")
    return int(any(entry["gradient_error"] > options.limit for entry in rows))


if __name__ == "__main__":
    sys.exit(main())
