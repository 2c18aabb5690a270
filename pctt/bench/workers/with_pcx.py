"""PCX (Pinchetti et al. 2025) as its tutorials train: a model of linear layers and vodes, one jitted function
per batch that the user writes.

`way`: "", the loop over inference steps of tutorials 0 and 4, which is unrolled; "scan", the same by
`pxf.scan` (tutorial 3), which compiles sooner. The energy is summed over the batch, so activities move by
their own gradients, and weight gradients are scaled by 1/B. Incremental predictive coding follows tutorial
4: activities and weights move by gradients of the same state; its scale there is 1, and 1/B here.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax
import optax
import pcx.functional as pxf
import pcx.nn as pxnn
import pcx.predictive_coding as pxc
import pcx.utils as pxu
from serve import Prepared

RUNTIME = ("jax", "equinox", "optax")

VALUES = pxc.VodeParam | pxc.VodeParam.Cache


class Model(pxc.EnergyModule):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = [pxnn.Linear(*pair) for pair in pairwise(widths)]
        self.vodes = [pxc.Vode() for _ in self.layers]
        self.vodes[-1].h.frozen = True  # by this mark the masks below know the clamped one

    def __call__(self, x: Any, y: Any) -> Any:
        for layer, vode in zip(self.layers[:-1], self.vodes[:-1], strict=True):
            x = vode(jax.nn.tanh(layer(x)))
        self.vodes[-1](self.layers[-1](x))
        if y is not None:
            self.vodes[-1].set("h", y)
        return self.vodes[-1].get("u")


@pxf.vmap(pxu.M(VALUES).to((None, 0)), in_axes=(0, 0), out_axes=0)
def forward(x: Any, y: Any, *, model: Any) -> Any:
    return model(x, y)


@pxf.vmap(pxu.M(VALUES).to((None, 0)), in_axes=(0,), out_axes=None, axis_name="batch")
def energy(x: Any, *, model: Any) -> Any:
    model(x, None)
    return jax.lax.psum(model.energy(), "batch")


def free() -> Any:
    return pxu.M_hasnot(pxc.VodeParam, frozen=True)


def gradients(mask: Any, x: Any, model: Any) -> Any:
    """Of the batch's energy, by what the mask lets through."""
    with pxu.step(model, clear_params=pxc.VodeParam.Cache):
        _, found = pxf.value_and_grad(mask.to([False, True]))(energy)(x, model=model)
    return found["model"]


def begin(x: Any, y: Any, model: Any) -> None:
    model.train()
    with pxu.step(model, (pxc.STATUS.INIT, pxc.STATUS.NONE), clear_params=pxc.VodeParam.Cache):
        forward(x, y, model=model)


def train_step(num_steps: int, incremental: bool, way: str) -> Any:
    """The jitted function of one training batch."""

    def move(x: Any, model: Any, optim_w: Any, optim_h: Any) -> None:
        mask = free() | pxu.M(pxnn.LayerParam) if incremental else free()
        found = gradients(mask, x, model)
        if incremental:
            optim_w.step(model, found, scale_by=1.0 / x.shape[0])
        optim_h.step(model, found)

    def one(_: Any, x: Any, *, model: Any, optim_w: Any, optim_h: Any) -> Any:
        move(x, model, optim_w, optim_h)
        model.clear_params(pxc.VodeParam.Cache)
        return (x,), None

    @pxf.jit()
    def train_on_batch(x: Any, y: Any, *, model: Any, optim_w: Any, optim_h: Any) -> None:
        begin(x, y, model)
        optim_h.init(free()(model))
        if way == "scan":
            pxf.scan(one, xs=None, length=num_steps)(x, model=model, optim_w=optim_w, optim_h=optim_h)
        else:
            for _ in range(num_steps):
                move(x, model, optim_w, optim_h)
        optim_h.clear()
        if not incremental:
            optim_w.step(model, gradients(pxu.M(pxnn.LayerParam), x, model), scale_by=1.0 / x.shape[0])
        model.clear_params(pxc.VodeParam.Cache)

    return train_on_batch


def prepare(work: dict[str, Any]) -> Prepared:
    model = Model(work["widths"])
    for layer, (weight, bias) in zip(model.layers, work["weights"], strict=True):
        layer.nn.weight.set(jax.numpy.asarray(weight.T))  # equinox keeps [out, in]
        layer.nn.bias.set(jax.numpy.asarray(bias))
    x, y = jax.numpy.asarray(work["inputs"]), jax.numpy.asarray(work["targets"])
    # A sweep ahead gives the vodes their shapes, so that the function is compiled once, as tutorial 0 says.
    begin(x, y, model)
    model.clear_params(pxc.VodeParam.Cache)
    optim_w = pxu.Optim(lambda: optax.adam(work["learning_rate"]), pxu.M(pxnn.LayerParam)(model))
    optim_h = pxu.Optim(lambda: optax.sgd(work["rate"]))
    step = train_step(work["num_steps"], work["algorithm"] == "ipc", work["way"])

    def run() -> None:
        step(x, y, model=model, optim_w=optim_w, optim_h=optim_h)
        jax.block_until_ready([layer.nn.weight.get() for layer in model.layers])

    def look() -> Any:
        activities = [vode.h.get() for vode in model.vodes[:-1]]
        return activities, [(layer.nn.weight.get().T, layer.nn.bias.get()) for layer in model.layers]

    return Prepared(run, look)
