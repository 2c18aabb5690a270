"""FabricPC through its own `make_train_step`, which is one jitted function per batch.

Its energy is summed over the batch for activities and divided by B for weights, as ours is, and the states
begin at a feedforward sweep, which is its default.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax
import optax
from fabricpc.core.activations import TanhActivation
from fabricpc.core.inference import InferenceSGD
from fabricpc.core.topology import Edge
from fabricpc.core.types import GraphParams, NodeParams
from fabricpc.graph_assembly import TaskMap, graph
from fabricpc.graph_initialization import initialize_params
from fabricpc.nodes import Linear
from fabricpc.training import make_train_step
from serve import Prepared

RUNTIME = ("jax", "optax")


def prepare(work: dict[str, Any]) -> Prepared:
    widths = work["widths"]
    nodes = [Linear(shape=(widths[0],), name="n0")]
    for number, units in enumerate(widths[1:-1], start=1):
        nodes.append(Linear(shape=(units,), name=f"n{number}", activation=TanhActivation()))
    nodes.append(Linear(shape=(widths[-1],), name=f"n{len(widths) - 1}"))
    structure = graph(
        nodes=nodes,
        edges=[Edge(source=a, target=b.slot("in")) for a, b in pairwise(nodes)],
        task_map=TaskMap(x=nodes[0], y=nodes[-1]),
        inference=InferenceSGD(eta_infer=work["rate"], infer_steps=work["num_steps"]),
    )
    key = jax.random.PRNGKey(0)
    params = initialize_params(structure, key)
    entries = dict(params.nodes)
    for number, (weight, bias) in enumerate(work["weights"], start=1):
        (edge,) = entries[f"n{number}"].weights
        entries[f"n{number}"] = NodeParams(
            weights={edge: jax.numpy.asarray(weight)}, biases={"b": jax.numpy.asarray(bias[None])}
        )
    optimizer = optax.adam(work["learning_rate"])
    step = make_train_step(structure, optimizer, algorithm="pc")
    batch = {"x": jax.numpy.asarray(work["inputs"]), "y": jax.numpy.asarray(work["targets"])}
    now: dict[str, Any] = {"params": GraphParams(nodes=entries)}
    now["optimizer"] = optimizer.init(now["params"])

    def run() -> None:
        now["params"], now["optimizer"], _, now["state"] = step(now["params"], now["optimizer"], batch, key)
        jax.block_until_ready(now["params"])

    def look() -> Any:
        layers = [now["params"].nodes[f"n{number}"] for number in range(1, len(widths))]
        activities = [now["state"].nodes[f"n{number}"].z_latent for number in range(1, len(widths) - 1)]
        return activities, [(next(iter(each.weights.values())), each.biases["b"][0]) for each in layers]

    return Prepared(run, look)
