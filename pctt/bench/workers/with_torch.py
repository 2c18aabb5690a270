"""Torch: the same network trained by backpropagation, as a torch user writes it, and a large square product.

algorithm: "backprop" or "gemm". On a device that works by itself every training batch is awaited.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from serve import Prepared
from torch import nn

RUNTIME = ("torch",)
WORK_BY_THEMSELVES = ("cuda",)
"""Types of devices whose work goes on after a call has returned."""


def place(device: str) -> torch.device:
    """A device, with as many threads of torch's as `serve.keep_to` has said."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return torch.device(device)


def awaited(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run`, and then what it has started on the device."""
    if device.type not in WORK_BY_THEMSELVES:
        return run

    def both() -> None:
        run()
        torch.cuda.synchronize(device)

    return both


def prepare(work: dict[str, Any]) -> Prepared:
    device = place(work["device"])
    made = gemm(work, device) if work["algorithm"] == "gemm" else backpropagation(work, device)
    made.run = awaited(made.run, device)
    return made


def backpropagation(work: dict[str, Any], device: torch.device) -> Prepared:
    modules: list[nn.Module] = []
    for weight, bias in work["weights"]:
        linear = nn.Linear(*weight.shape, device=device)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight).T)
            linear.bias.copy_(torch.from_numpy(bias))
        modules += [linear, nn.Tanh()]
    model = nn.Sequential(*modules[:-1])
    optimiser = torch.optim.Adam(model.parameters(), work["learning_rate"], fused=True)
    inputs = torch.from_numpy(work["inputs"]).to(device)
    targets = torch.from_numpy(work["targets"]).to(device)

    def run() -> None:
        optimiser.zero_grad()
        loss = (targets - model(inputs)).square().sum() / (2 * work["batch_size"])
        loss.backward()
        optimiser.step()

    def look() -> Any:
        linears = [each for each in modules if isinstance(each, nn.Linear)]
        return [], [(each.weight.detach().T.cpu(), each.bias.detach().cpu()) for each in linears]

    return Prepared(run, look)


def gemm(work: dict[str, Any], device: torch.device) -> Prepared:
    """A square product; its size stands where a batch size does."""
    size = work["batch_size"]
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return Prepared(lambda: torch.mm(a, b, out=out))
