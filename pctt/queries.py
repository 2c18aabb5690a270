"""Asking a network: clamp any nodes, relax the others, and read states, energies and weight gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pctt import describe, sketch
from pctt.energies import Categorical
from pctt.engine import Engine, Status
from pctt.inference import Inference
from pctt.network import Network, Weights, check_weights


class InferenceDiverged(ArithmeticError):
    """A relaxation ended in a status that is not ok, and the caller asked for that to raise."""


@dataclass(frozen=True)
class InferenceResult:
    """The state after inference. All tensors are copies, [B, units] or where a node has a shape [B, *shape],
    keyed by node name.

    activities: of every node.    predictions, errors: of every layer, which has the name of the node it
        predicts; errors = activities - predictions.
    energy: [steps run + 1, layers], batch mean, row 0 before the first step.
    status: how it ended.
    num_steps: steps run.    inference: the settings.    clamped: names of the nodes held at data.
    initial: the activities inference started from, which fixed predictions and their weight gradients refer
        to.
    given: what the caller gave, by node, clamped or as initial activity. The activity of an output that is
        nudged is not its target.
    seed: of the noise.
    held: {node: bool [B, units]}, units that stayed at their initial activities.
    """

    activities: dict[str, Tensor]
    predictions: dict[str, Tensor]
    errors: dict[str, Tensor]
    energy: Tensor
    status: Status
    num_steps: int
    inference: Inference
    initial: dict[str, Tensor]
    clamped: tuple[str, ...]
    given: dict[str, Tensor]
    seed: int = 0
    held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __repr__(self) -> str:
        return describe.inference_result(self)

    def _repr_svg_(self) -> str | None:
        return sketch.energies(self)


def infer(
    net: Network,
    weights: Weights,
    clamp: Mapping[str, Tensor],
    inference: Inference | None = None,
    initial: Mapping[str, Tensor] | None = None,
    backend: str = "reference",
    device: str | int | None = None,
    grouped: bool = True,
    throw: bool = False,
    seed: int = 0,
    held: Mapping[str, Tensor] | None = None,
    fused: bool = False,
) -> InferenceResult:
    """Relaxes the free nodes with the clamped ones held at data (Whittington & Bogacz 2017, eq. 2.10 to
    2.13).

    net, weights: the network, and {layer: {key: tensor}} of one dtype, in which it computes.
    clamp: {node: [B, units] or [B, *shape]}, any subset of the nodes, at least one.
    initial: where to start other nodes than at their predictions; an input that is free and not named starts
        at zero.
    inference: the knobs, default `Inference()`.
    backend: "reference", "emulated" or "tenstorrent"; the last two take fp32 weights and compute in a card's
        default precision.
    device: a torch device, a chip such as "n150", or the number of a card.
    grouped: stack equal layers; the numbers are the same.
    throw: raise InferenceDiverged unless the status is ok; otherwise look at `status`.
    seed: of the noise of dynamics="langevin".
    held: {node: bool [B, units] or [B, *shape]} of nodes in `initial`: where True, a unit stays at its
        initial activity, so that of each sample another part may be known.
    fused: on a card, each step in one program of our own (docs/kernels.md).

    The result is the state after exactly `num_steps` updates (fewer with a tolerance), with errors and
    predictions belonging to it. Raises ValueError for unknown nodes, wrong shapes or dtypes, NaN, or targets
    that are no distributions where the energy is categorical; for a network that a card does not run or hold;
    BackendUnavailable where the backend cannot run; DeviceLost if its device fails.
    """
    inference = inference or Inference()
    dtype = check_weights(net, weights)
    _check_given(net, clamp, initial or {}, dtype)
    given = {name: values.flatten(1) for name, values in {**clamp, **(initial or {})}.items()}
    still = _check_held(net, held or {}, initial or {})
    engine = Engine(
        net,
        weights,
        inference,
        tuple(clamp),
        tuple(initial or {}),
        backend=backend,
        device=device,
        grouped=grouped,
        batch_size=len(next(iter(given.values()))),
        held=tuple(still),
        fused=fused,
    )
    relaxation = engine.relax(given, record=True, seed=seed, held=still)
    if throw and not relaxation.status.ok:
        raise InferenceDiverged(f"{relaxation.status.value}; lower the rate ({inference.rate}).")
    fixed = set(clamp) - ({net.output} if inference.nudge is not None else set[str]())
    activities = {
        name: given[name].detach().clone() if name in fixed else engine.read_activity(name)
        for name in net.nodes
    }
    for name, units in still.items():  # to the bit, where anchor plus deviation would round
        activities[name] = torch.where(units, given[name].to(activities[name].device), activities[name])
    errors = {name: engine.read_error(name) for name in net.layer_names}
    shapes, place = dict(zip(net.nodes, net.shapes, strict=True)), errors[net.output].device
    activities = {
        name: values.to(place).view(len(values), *shapes[name]) for name, values in activities.items()
    }
    errors = {name: values.view(len(values), *shapes.get(name, (-1,))) for name, values in errors.items()}
    predicted = dict(zip(net.names, net.names, strict=True))  # layer: the node it predicts
    if net.backward is not None:
        predicted |= dict(zip(net.backward.names, reversed(net.nodes[:-1]), strict=True))
    return InferenceResult(
        activities=activities,
        predictions={name: activities[predicted[name]] - error for name, error in errors.items()},
        errors=errors,
        energy=torch.tensor(relaxation.trajectory, dtype=dtype),
        status=relaxation.status,
        num_steps=relaxation.num_steps,
        inference=inference,
        initial={
            name: engine.read_activity(name, initial=True).view(-1, *shapes[name]) for name in net.nodes
        },
        clamped=tuple(clamp),
        given={name: values.detach().clone() for name, values in given.items()},
        seed=seed,
        held={name: values.detach().clone() for name, values in still.items()},
    )


def recall(
    net: Network,
    weights: Weights,
    known: Mapping[str, Tensor],
    mask: Mapping[str, Tensor] | None = None,
    inference: Inference | None = None,
    initial: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> InferenceResult:
    """What a network makes of a part: nodes, and units of nodes, that are known are held, all others relax
    (Salvatori et al. 2021, 2022).

    net, weights: as for `infer`.
    known: {node: [B, units] or [B, *shape]}.
    mask: {node: bool, same shape} of nodes known in part: True where a unit is known. The values that `known`
        has for the others are where these start: nothing is known of a noisy picture, say, and all of it is a
        good start.
    initial: where to start nodes that are not in `known`; else at their predictions.
    inference: the knobs, default 500 steps of momentum, as the last changes are slow.
    settings: backend, device, throw, seed and grouped, as for `infer`.

    Returns and raises what `infer` does.

    >>> from pctt import Dense, chain, init
    >>> net = chain(2, [Dense(3)])
    >>> half = {"dense1": torch.tensor([[True, True, False]])}
    >>> image = torch.tensor([[1.0, 2.0, 0.0]])
    >>> recall(net, init(net), {"dense1": image}, half).activities["dense1"].shape
    torch.Size([1, 3])
    """
    mask = mask or {}
    for name in mask:
        if name not in known:
            raise ValueError(
                f"the mask of {name!r} says which of its units are known; give their values too."
            )
    inference = inference or Inference(num_steps=500, rate=0.05, dynamics="momentum", momentum=0.9)
    start = {name: known[name] for name in mask}
    held = {name: units for name, units in mask.items() if not isinstance(units, Tensor) or units.any()}
    clamp = {name: values for name, values in known.items() if name not in mask}
    return infer(net, weights, clamp, inference, {**(initial or {}), **start}, held=held, **settings)


def weight_gradients(
    net: Network,
    weights: Weights,
    result: InferenceResult,
    backend: str = "reference",
    device: str | int | None = None,
    grouped: bool = True,
) -> Weights:
    """The descent gradient dF/dW of the batch-mean energy at `result`, by the local rules; same tree as
    `weights`, without learned variances.

    For live predictions it is taken at the final activities, for fixed ones at those inference started from
    (Millidge et al. 2022).

    net, weights: those that `result` was inferred with.
    backend, device, grouped: as for `infer`.

    Raises what `infer` does.
    """
    if not result.inference.gradient_is_of_the_end:  # it is what the relaxation gathered on its way
        engine = Engine(
            net,
            weights,
            result.inference,
            result.clamped,
            [name for name in result.given if name not in result.clamped],
            backend=backend,
            device=device,
            grouped=grouped,
            batch_size=len(next(iter(result.given.values()))),
            held=tuple(result.held),
        )
        engine.relax(result.given, seed=result.seed, held=result.held)
        engine.compute_gradients()
        return engine.gradients()
    # The same program with every node clamped has each layer's source, drive and error at hand without an
    # inference step; the errors are the result's own, which are more precise in fp32 than activities minus
    # recomputed predictions.
    base = result.initial if result.inference.prediction == "fixed" else result.activities
    at_rest = Inference(num_steps=0, prediction=result.inference.prediction)
    engine = Engine(
        net,
        weights,
        at_rest,
        net.nodes,
        backend=backend,
        device=device,
        grouped=grouped,
        batch_size=len(next(iter(base.values()))),
    )
    engine.relax({name: values.flatten(1) for name, values in base.items()})
    engine.write_errors({name: values.flatten(1) for name, values in result.errors.items()})
    engine.compute_gradients()
    return engine.gradients()


def _check_given(
    net: Network, clamp: Mapping[str, Tensor], initial: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    if not clamp and not initial:
        raise ValueError("clamp at least one node or start it somewhere, e.g. clamp={'input': x}.")
    both = sorted(set(clamp) & set(initial))
    if both:
        raise ValueError(
            f"{both[0]!r} is clamped and given an initial activity; a clamped node never moves, so drop one."
        )
    sizes: dict[int, str] = {}
    for name, values in {**clamp, **initial}.items():
        shape, units = net.shapes[net.node_index(name)], net.widths[net.node_index(name)]
        if not isinstance(values, Tensor) or tuple(values.shape[1:]) not in (shape, (units,)):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name!r} must be a tensor of shape [batch, {expected}], got {got}.")
        if values.dtype != dtype:
            raise ValueError(f"{name!r} is {values.dtype} but the weights are {dtype}; convert one of them.")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name!r} holds NaN or infinite values; clean the data first.")
        check_whole_numbers(net, name, values)
        sizes.setdefault(values.shape[0], name)
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"all given nodes must have the same number of samples, at least one, got {sorted(sizes)}."
        )
    for name, layer, shape in zip(net.names, net.layers, net.shapes[net.num_roots :], strict=True):
        if isinstance(layer.energy, Categorical):
            if name in initial:
                raise ValueError(
                    f"{name!r} is categorical: free, it follows its prediction, so an initial activity "
                    "has no effect; clamp it."
                )
            if name in clamp:
                check_distribution(name, clamp[name].reshape(-1, shape[-1]))


def _check_held(net: Network, held: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{node: bool [B, units]}"""
    for name, units in held.items():
        net.node_index(name)
        if name not in initial:
            raise ValueError(
                f"units of {name!r} can only be held at an initial activity; give it, e.g. "
                f"initial={{{name!r}: x}}, and do not clamp the node."
            )
        if not isinstance(units, Tensor) or units.dtype != torch.bool or units.shape != initial[name].shape:
            expected, got = list(initial[name].shape), _told(units)
            raise ValueError(f"held units of {name!r} must be a bool tensor {expected}, got {got}.")
    return {name: units.flatten(1) for name, units in held.items()}


def _told(values: object) -> str:
    if isinstance(values, Tensor):
        return f"{values.dtype} {list(values.shape)}"
    return type(values).__name__


def check_whole_numbers(net: Network, name: str, values: Tensor) -> None:
    """Raises ValueError unless all `values` are rows of every table that reads node `name`."""
    num = net.vocabulary(net.node_index(name))
    if num is None:
        return
    off = (values != values.round()) | (values < 0) | (values >= num)
    if off.any():
        found = float(values[off][0])
        raise ValueError(
            f"{name!r} is read by an embedding, so it must hold whole numbers 0 to {num - 1}, got {found:g}."
        )


def check_distribution(name: str, values: Tensor) -> None:
    """Raises ValueError unless every row of `values` is a distribution over classes."""
    off = (values < 0).any(-1) | ((values.sum(-1) - 1.0).abs() > 1e-3)
    if off.any():
        raise ValueError(
            f"{name!r} has a categorical energy, so its targets must be distributions (>= 0, sum 1); row "
            f"{int(off.nonzero()[0])} "
            "is not; use one-hot or soft labels, or a Gaussian energy."
        )
