"""What `print` and a Python prompt say of networks, settings, results and trainers: what a person asks first,
in a few lines, however large the thing is. `pctt/sketch.py` draws the same for notebooks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pctt.layers.block import Layer, Step
    from pctt.network import Network
    from pctt.queries import InferenceResult
    from pctt.run import FitResult, Trainer

MOST_ROWS = 24
"""Of a table; of more the first and the last are shown."""
MOST_ITEMS = 12
"""Of a tuple."""
MOST_LETTERS = 60
"""Of a cell."""


class Concise:
    """Makes the `repr` of a dataclass name only what differs from its defaults, as it would be typed."""

    def __init_subclass__(cls) -> None:
        if "__repr__" not in vars(cls):
            cls.__repr__ = Concise.__repr__  # `dataclass` leaves one that a class has of its own

    def __repr__(self) -> str:
        return settings(self)

    def as_typed(self, name: str) -> str:
        """The value of a field."""
        return _text(getattr(self, name))


def changed(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults; those without a default are none of them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if default is not dataclasses.MISSING and getattr(value, field.name) != default:
            found[field.name] = getattr(value, field.name)
    return found


def settings(value: Concise, without: Sequence[str] = ()) -> str:
    """`Name(required, other=...)`, which makes an equal value where no long tuple had to be cut.

    without: names of fields to leave out.
    """
    assert dataclasses.is_dataclass(value)
    nothing = dataclasses.MISSING
    fields = dataclasses.fields(value)
    required = [f.name for f in fields if f.default is nothing and f.default_factory is nothing]
    words = [value.as_typed(name) for name in required]
    words += [f"{name}={value.as_typed(name)}" for name in changed(value) if name not in without]
    return f"{type(value).__name__}({', '.join(words)})"


def _text(value: object) -> str:
    if isinstance(value, tuple) and len(value) > MOST_ITEMS:  # numbers per unit, say
        return f"({listed([_text(item) for item in value[:3]], len(value))})"
    return repr(value)


def listed(words: Sequence[str], count: int) -> str:
    """Some of `count` items, the first ones."""
    return ", ".join([*words, *([f"... {count} in all"] if len(words) < count else [])])


def network(net: Network) -> str:
    """A line about the whole, then a row per node: its shape, the layer that predicts it, its weights."""
    try:
        return "\n".join(_network(net))
    except Exception as error:  # one put together by hand that does not hold together: say that, not a trace
        return f"Network of {len(net.names)} layers, which do not fit together: {error}"


def _network(net: Network) -> list[str]:
    kind = "chain" if net.wiring is None else "graph"
    head = f"Network: a {kind} of {len(net.nodes)} nodes, {net.num_weights():,} weights"
    if net.wiring is not None:
        head += f"; input {net.input_name!r}, output {net.output!r}"
    lines = [head, *_nodes(net, {})]
    if net.backward is not None:
        down = dict(zip(net.backward.names, reversed(net.nodes[:-1]), strict=True))
        lines += ["and a chain down", *_nodes(net.backward, down)]
    return lines


def _nodes(net: Network, predicted: Mapping[str, str]) -> list[str]:
    """predicted: {layer: the node it predicts} where it is not called after that."""
    shapes, is_graph = net.weight_shapes(), net.wiring is not None
    heads = ["node", "shape", *(["from"] if is_graph else []), "predicted by", "weights"]
    shown = rows_shown(len(net.nodes))
    rows: list[list[str]] = []
    for index in shown:
        name = net.nodes[index]
        cells = [name, shape(net.shapes[index])]
        if index not in net.indices:
            rows.append([*cells, *[""] * is_graph, "nothing", ""])
            continue
        if predicted:
            cells = [predicted[name], cells[1]]
        sources = ", ".join(net.nodes[source] for source in net.sources(index))
        layer = _layer(net.layer(index))
        size = sum(map(math.prod, shapes.get(name, {}).values()))
        own = net.owner(index) == index
        weights = f"{size:,}" if own else f"those of {net.nodes[net.owner(index)]}"
        rows.append([*cells, *([sources] if is_graph else []), layer, weights])
    if predicted:  # its input is the output of the chain up
        rows = rows[1:]
    return table(heads, rows, gap=_gap(shown), left_out=len(net.nodes) - len(shown))


def _layer(layer: Layer) -> str:
    """As it would be typed; of a block that is no list of maps one after the other, the kinds of its maps."""
    steps: tuple[Step, ...] = getattr(layer, "steps", ())
    if not any(step.of or step.name for step in steps):
        return settings(layer, without=("name",))
    kinds = dict.fromkeys(type(step.map).__name__ for step in steps)
    return f"Block of {len(steps)} maps: {', '.join(kinds)}"


def shape(sizes: Sequence[int]) -> str:
    """As a person writes it: 64, or 1 x 28 x 28."""
    return " x ".join(map(str, sizes)) or "1"


def rows_shown(count: int, most: int = MOST_ROWS) -> list[int]:
    """The numbers of those to show: all, or the first and the last ones."""
    if count <= most:
        return list(range(count))
    last = most // 3
    return [*range(most - last), *range(count - last, count)]


def _gap(shown: Sequence[int]) -> int | None:
    return next((at for at, number in enumerate(shown) if number != at), None)


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], gap: int | None = None, left_out: int = 0
) -> list[str]:
    """Lines of a table, indented by two; the last column stands at the right.

    gap: the row before which `left_out` rows are missing, None for none.
    """
    cells = [[_cut(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines: list[str] = []
    for row in cells:
        words = [f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join(["", *words, f"{row[-1]:>{widths[-1]}}"]).rstrip())
    if gap is not None:
        lines.insert(gap + 1, f"  ... {left_out:,} more ...")
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 4] + " ..."


def inference_result(result: InferenceResult) -> str:
    """How it ended, and per node whether it was free and what its energy became."""
    try:
        return "\n".join(_inference_result(result))
    except Exception as error:  # tensors without values, or one put together by hand
        return f"InferenceResult: {result.status.name}, of which no more can be shown: {error}"


def _inference_result(result: InferenceResult) -> list[str]:
    batch = len(next(iter(result.activities.values())))
    first, last = (result.energy[at].tolist() for at in (0, -1))
    head = f"InferenceResult: {result.status.name} after {result.num_steps} steps, batch of {batch}, "
    lines = [f"{head}energy {sum(first):.4g} -> {sum(last):.4g}", f"  {result.inference!r}"]
    columns = {name: number for number, name in enumerate(result.errors)}
    names = list(dict.fromkeys([*result.activities, *result.errors]))
    shown = rows_shown(len(names))
    rows: list[list[str]] = []
    for number in shown:
        name = names[number]
        values = result.activities.get(name, result.errors.get(name))
        assert values is not None
        at = columns.get(name)
        energy = ["", ""] if at is None else [f"{first[at]:.4g} -> {last[at]:.4g}"]
        if at is not None:
            energy.append(f"{float(result.errors[name].double().square().mean().sqrt()):.3g}")
        rows.append([name, shape(values.shape[1:]), _state(result, name), *energy])
    heads = ["node", "shape", "state", "energy", "rms error"]
    return [*lines, *table(heads, rows, gap=_gap(shown), left_out=len(names) - len(shown))]


def _state(result: InferenceResult, name: str) -> str:
    if name not in result.activities:
        return "backward"
    if name in result.clamped:
        return "clamped" if result.inference.nudge is None or name not in result.errors else "target given"
    return "held in part" if name in result.held else "free"


def fit_result(result: FitResult) -> str:
    """In a line; what stopped it with the advice that came with it."""
    done = f"{_times(result.epochs, 'epoch')}, {_times(result.steps, 'learning step')}"
    words = f"FitResult: {result.status.name}, {done}"
    if result.validation_accuracy is not None:
        words += f", validation accuracy {result.validation_accuracy:.2%}"
    return words if result.status.ok else f"{words}\n  {result.message}"


def trainer(trainer: Trainer) -> str:
    """What trains where, by which rules, how far it is, and the network."""
    done = trainer.progress
    how = "predictive coding" if trainer.algorithm == "pc" else "backpropagation"
    far = f"{_times(done.epoch, 'epoch')}, {_times(done.step, 'learning step')} done"
    lines = [f"Trainer: {how}, batches of {trainer.batch_size}, seed {trainer.seed}; {far}"]
    lines.append(f"  {where(trainer)}")
    if trainer.algorithm == "pc":
        lines.append(f"  {trainer.inference!r}")
    lines.append(f"  {trainer.learning!r}")
    if trainer.on_divergence != "stop":
        halved, skipped = trainer.setbacks.halvings, trainer.setbacks.skipped
        lines.append(f"  on divergence {trainer.on_divergence}: {halved} halvings, {skipped} batches skipped")
    return "\n".join([*lines, network(trainer.net)])


def where(trainer: Trainer) -> str:
    """Backend, device and precision in words."""
    found = trainer.place()
    words = f"backend {found['backend']}, {found['device']}"
    if found["precision"] is None:
        return words
    short = [name for name, form in found["precision"].items() if form == "bfloat16"]
    return f"{words}, {found['precision']['fidelity']}, bfloat16 {', '.join(short) or 'nowhere'}"


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
