"""NGC-Learn: cells, error cells and Hebbian synapses, wired as its museum wires a discriminative network, for
any number of layers.

A process is compiled as a whole, and the inference steps are one `scan` of it; reset, projection,
inference and learning are launched one after the other from Python. The activation stands before the
product, mu = tanh(z) W + b, so pctt is compared in that placement. At every batch feedback synapses are
set to the transposes of the forward ones, and a projection gives the initial states. NGC-Learn sums weight
changes over the batch; `post_wght` makes that the mean.
"""

# Wiring is written a >> b.
# pyright: reportMissingImports=false, reportUnusedExpression=false

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from ngclearn import Context, MethodProcess
from ngclearn.components import GaussianErrorCell, HebbianSynapse, RateCell, StaticSynapse
from ngclearn.utils.distribution_generator import DistributionGenerator
from ngcsimlib.global_state import stateManager
from serve import Prepared

RUNTIME = ("jax", "ngcsimlib")


@dataclass
class Circuit:
    """Of a network with L layers. states, projected: cells of node 0 to L.    errors, forward, projection: of
    layer 1 to L.    feedback: from layer 2 to L.    output_error: of the projection.
    """

    states: list[Any]
    projected: list[Any]
    errors: list[Any]
    forward: list[Any]
    projection: list[Any]
    feedback: list[Any]
    output_error: Any

    def wire(self) -> None:
        last = len(self.forward)
        for number in range(last):
            below, synapse, error = self.states[number], self.forward[number], self.errors[number]
            below.zF >> synapse.inputs
            synapse.outputs >> error.mu
            self.states[number + 1].z >> error.target
            below.zF >> synapse.pre
            error.dmu >> synapse.post
            self.projected[number].zF >> self.projection[number].inputs
            self.projection[number].outputs >> self.projected[number + 1].j
        for number in range(1, last):
            state, synapse = self.states[number], self.feedback[number - 1]
            self.errors[number].dmu >> synapse.inputs
            synapse.outputs >> state.j
            self.errors[number - 1].dtarget >> state.j_td
        self.projected[last].z >> self.output_error.mu

    def processes(self) -> tuple[Any, Any, Any, Any]:
        """reset, project, advance, evolve."""
        names = ("reset", "project", "advance", "evolve")
        reset, project, advance, evolve = (MethodProcess(name=name) for name in names)
        for cell in [*self.projected, self.output_error, *self.states, *self.errors]:
            reset >> cell.reset
        for cell, synapse in zip(self.projected[:-1], self.projection, strict=True):
            project >> cell.advance_state
            project >> synapse.advance_state
        project >> self.projected[-1].advance_state
        project >> self.output_error.advance_state
        for part in [*self.feedback, *self.states, *self.forward, *self.errors]:
            advance >> part.advance_state
        for synapse in self.forward:
            evolve >> synapse.evolve
        return reset, project, advance, evolve

    def pin(self) -> None:
        """Gives projection and feedback the weights of the forward synapses."""
        for target, synapse in zip(self.projection, self.forward, strict=True):
            target.weights.set(synapse.weights.get())
            target.biases.set(synapse.biases.get())
        for target, synapse in zip(self.feedback, self.forward[1:], strict=True):
            target.weights.set(jnp.transpose(synapse.weights.get()))

    def begin(self) -> None:
        """The states from the projection."""
        for state, cell in zip(self.states[1:-1], self.projected[1:-1], strict=True):
            state.z.set(cell.z.get())
        self.errors[-1].dmu.set(self.output_error.dmu.get())
        self.errors[-1].dtarget.set(self.output_error.dtarget.get())


def build(widths: list[int], batch_size: int, learning_rate: float) -> Circuit:
    last, zero = len(widths) - 1, DistributionGenerator.constant(value=0.0)
    common = {"batch_size": batch_size, "weight_init": zero, "key": jax.random.PRNGKey(0)}
    learning = {
        "eta": learning_rate,
        "optim_type": "adam",
        "sign_value": -1.0,
        "w_bound": 0.0,
        "post_wght": 1.0 / batch_size,
    }

    def cells(name: str, tau: float) -> list[Any]:
        return [
            RateCell(
                f"{name}{number}",
                n_units=units,
                tau_m=tau if 0 < number < last else 0.0,  # 0: it holds what it is given
                act_fx="tanh" if 0 < number < last else "identity",
                batch_size=batch_size,
            )
            for number, units in enumerate(widths)
        ]

    shapes = list(enumerate(pairwise(widths), start=1))
    return Circuit(
        states=cells("z", 1.0),
        projected=cells("q", 0.0),
        errors=[GaussianErrorCell(f"e{n}", n_units=shape[1], batch_size=batch_size) for n, shape in shapes],
        forward=[
            HebbianSynapse(f"W{n}", shape=shape, bias_init=zero, **learning, **common) for n, shape in shapes
        ],
        projection=[StaticSynapse(f"Q{n}", shape=shape, bias_init=zero, **common) for n, shape in shapes],
        feedback=[StaticSynapse(f"E{n}", shape=shape[::-1], **common) for n, shape in shapes[1:]],
        output_error=GaussianErrorCell("eq", n_units=widths[-1], batch_size=batch_size),
    )


def prepare(work: dict[str, Any]) -> Prepared:
    with Context("network"):
        circuit = build(work["widths"], work["batch_size"], work["learning_rate"])
        circuit.wire()
        reset, project, advance, evolve = circuit.processes()
    for synapse, (weight, bias) in zip(circuit.forward, work["weights"], strict=True):
        synapse.weights.set(jnp.asarray(weight))
        synapse.biases.set(jnp.asarray(bias[None]))
    x, y = jnp.asarray(work["inputs"]), jnp.asarray(work["targets"])
    rate = work["rate"]
    rows = jnp.asarray(advance.pack_rows(work["num_steps"], dt=rate))

    def run() -> None:
        reset.run()
        circuit.pin()
        circuit.projected[0].j.set(x)
        circuit.output_error.target.set(y)
        project.run(dt=rate)
        circuit.begin()
        circuit.states[0].j.set(x)
        circuit.states[-1].j.set(y)
        state, _ = advance.scan(rows)
        stateManager.set_state(state)
        evolve.run(dt=rate)
        jax.block_until_ready([synapse.weights.get() for synapse in circuit.forward])

    def look() -> Any:
        activities = [cell.z.get() for cell in circuit.states[1:-1]]
        return activities, [(each.weights.get(), each.biases.get()[0]) for each in circuit.forward]

    return Prepared(run, look, lambda: {"activate": "input"})
