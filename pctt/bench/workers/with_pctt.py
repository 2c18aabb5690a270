"""pctt itself: an engine on the reference backend. algorithm: a name of `pctt.variants.VARIANTS`."""

from __future__ import annotations

from typing import Any

import torch
from serve import Prepared
from with_torch import awaited, place

from pctt.bench import work as shared

RUNTIME = ("torch",)


def prepare(work: dict[str, Any]) -> Prepared:
    device = place(work["device"])
    problem = shared.Problem(
        [(torch.from_numpy(weight), torch.from_numpy(bias)) for weight, bias in work["weights"]],
        torch.from_numpy(work["inputs"]).to(device),
        torch.from_numpy(work["targets"]).to(device),
    )
    settings = shared.Settings(num_steps=work["num_steps"], rate=work["rate"])
    inference = shared.inference(work["algorithm"], settings)
    engine = shared.engine(problem, tuple(work["widths"]), inference, device=str(device))
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        shared.train(engine, problem, work["learning_rate"], step)

    def look() -> Any:
        activities = [engine.read_activity(name) for name in engine.net.nodes[1:-1]]
        return activities, [(each["weight"], each["bias"]) for each in engine.weights().values()]

    def about() -> dict[str, Any]:
        return {"bytes": sum(engine.bytes_allocated().values()), "num_steps": engine.program.num_steps}

    return Prepared(awaited(run, device), look, about)
