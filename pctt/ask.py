"""What a trained network can be asked about pictures: the class of one, pictures of a class, the rest of one.

A network is asked by clamping what is known and relaxing the rest, whatever its wiring. `Roles` says which
nodes hold pictures and classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pctt.engine import Engine
from pctt.inference import Inference
from pctt.network import Network, Weights, check_weights
from pctt.queries import InferenceDiverged, infer, recall

PART = 100
"""Pictures asked about at a time."""

Told = Callable[[int], object]


@dataclass(frozen=True)
class Roles:
    """Names of the nodes that hold pictures, one-hot classes (None: there are none) and nothing but zeros."""

    images: str
    labels: str | None = None
    zeros: tuple[str, ...] = ()


def is_generative(net: Network, roles: Roles) -> bool:
    """Whether something predicts the pictures."""
    return net.backward is not None or roles.images in net.names


def refuse_unless_generative(net: Network, roles: Roles) -> None:
    """Raises ValueError where nothing predicts the pictures."""
    if not is_generative(net, roles):
        raise ValueError(
            f"this network has no generative direction: nothing predicts its pictures, {roles.images!r}; "
            "train one that does, such as the presets digits_generative and digits_pcgraph, or give the "
            "chain backward layers."
        )


def classify(
    net: Network,
    weights: Weights,
    roles: Roles,
    pictures: Tensor,
    inference: Inference,
    told: Told | None = None,
) -> Tensor:
    """The activities of the class units [N, classes] that relax with the pictures clamped."""
    if roles.labels is None:
        raise ValueError("this network has not learned classes; ask it for pictures.")
    clamped = {roles.images: pictures, **_zeros(roles, pictures)}
    engine = Engine(net, weights, replace(_plain(inference), nudge=None), tuple(clamped), batch_size=PART)
    found: list[Tensor] = []
    for number in range(0, len(pictures), PART):
        part = {name: values[number : number + PART] for name, values in clamped.items()}
        relaxation = engine.relax(part)
        if not relaxation.status.ok:
            raise InferenceDiverged(f"{relaxation.status.value}; lower the rate ({inference.rate}).")
        found.append(engine.read_activity(roles.labels))
        if told is not None:
            told(len(found[-1]))
    return torch.cat(found)


def generate(
    net: Network,
    weights: Weights,
    roles: Roles,
    classes: Tensor | None,
    count: int,
    inference: Inference,
    seed: int = 0,
    told: Told | None = None,
) -> Tensor:
    """Predicted pictures [count, units].

    classes: [count] numbers of classes to clamp; None for none: what the network expects of no class.
    inference: with dynamics="langevin" each picture is a sample, else the most probable one.

    Raises ValueError where nothing predicts the pictures, or for classes of a network that has none.
    """
    refuse_unless_generative(net, roles)
    dtype = check_weights(net, weights)
    widths = dict(zip(net.nodes, net.widths, strict=True))
    clamped: dict[str, Tensor] = {name: torch.zeros(count, widths[name]) for name in roles.zeros}
    if classes is not None:
        if roles.labels is None:
            raise ValueError("this network has not learned classes; leave them out (--prior).")
        num_classes = widths[roles.labels]
        if bool(((classes < 0) | (classes >= num_classes)).any()):
            raise ValueError(f"classes must be 0 to {num_classes - 1}, got {sorted(set(classes.tolist()))}.")
        clamped[roles.labels] = torch.nn.functional.one_hot(classes, num_classes)
    clamped = {name: values.to(dtype) for name, values in clamped.items()}
    if net.backward is not None:
        return _sweep_down(net, weights, clamped, roles, told)
    initial = {} if clamped else {roles.images: torch.zeros(count, widths[roles.images], dtype=dtype)}
    found: list[Tensor] = []
    for number in range(0, count, PART):
        part, start = ({k: v[number : number + PART] for k, v in d.items()} for d in (clamped, initial))
        result = infer(net, weights, part, inference, start, seed=seed + number, throw=True)
        found.append(result.predictions[roles.images].flatten(1))
        if told is not None:
            told(len(found[-1]))
    return torch.cat(found)


def _sweep_down(
    net: Network, weights: Weights, clamped: dict[str, Tensor], roles: Roles, told: Told | None
) -> Tensor:
    """The pictures that the chain down predicts from classes."""
    assert net.backward is not None and roles.labels is not None
    if roles.labels not in clamped:
        raise ValueError("a chain down predicts pictures of classes; name some.")
    down = {name: weights[name] for name in net.backward.names}
    sweep = infer(net.backward, down, {"input": clamped[roles.labels]}, Inference(num_steps=0))
    if told is not None:
        told(len(clamped[roles.labels]))
    return sweep.activities[net.backward.output]


def complete(
    net: Network,
    weights: Weights,
    roles: Roles,
    pictures: Tensor,
    known: Tensor | None,
    inference: Inference,
    seed: int = 0,
    told: Told | None = None,
) -> Tensor:
    """Pictures [N, units] with the unknown part as the network expects it.

    known: bool [units] or [N, units], True where a pixel is known and stays; None for pictures that are noisy
        all over: these are clamped, and what is returned is the prediction they lead to.

    Raises ValueError where nothing predicts the pictures.
    """
    refuse_unless_generative(net, roles)
    if known is not None:
        known = known.expand_as(pictures)
    found: list[Tensor] = []
    for number in range(0, len(pictures), PART):
        part = pictures[number : number + PART]
        given = {roles.images: part, **_zeros(roles, part)}
        mask = {} if known is None else {roles.images: known[number : number + PART]}
        result = recall(net, weights, given, mask, inference, seed=seed + number, throw=True)
        if known is not None:
            found.append(result.activities[roles.images].flatten(1))
        elif net.backward is not None:
            found.append(result.predictions[net.backward.output].flatten(1))
        else:
            found.append(result.predictions[roles.images].flatten(1))
        if told is not None:
            told(len(part))
    return torch.cat(found)


def parts_known(part: str, shape: Sequence[int]) -> Tensor:
    """bool [units]: the upper, lower, left or right half of a picture (channels, height, width)."""
    known = torch.zeros(tuple(shape), dtype=torch.bool)
    *_, height, width = shape
    rows = {"upper": slice(0, height // 2), "lower": slice(height // 2, height)}
    columns = {"left": slice(0, width // 2), "right": slice(width // 2, width)}
    known[..., rows.get(part, slice(None)), columns.get(part, slice(None))] = True
    return known.flatten()


def _plain(inference: Inference) -> Inference:
    """The settings without what belongs to learning."""
    changes = {"weights_at": "end"}
    if inference.initial in ("amortised", "carried"):
        changes["initial"] = "feedforward"
    return replace(inference, **changes)  # pyright: ignore[reportArgumentType]


def _zeros(roles: Roles, like: Tensor) -> dict[str, Tensor]:
    return {name: torch.zeros(len(like), 1, dtype=like.dtype) for name in roles.zeros}
