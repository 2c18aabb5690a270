"""How a chain of layers would be trained on several chips: how many it needs, and what a step would take.

Layers are consecutive on the chips. A chip takes layers as long as their weights, learning state, activities
and errors stay in the L1 of its cores, as the fused kernel lays them out (`fused_cost.py`), with a copy of
the node below its first layer. Between two chips pass, per inference step, the change of the lower node's
activity, up, in the format of operands, and the feedback to it, down, in float32 as the kernel sends it. What
is left of the box holds further copies of the network, with batches of their own, whose weight gradients a
ring adds up after inference.

Everything is predicted, and nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

from pctt.backends.lowering import TILE
from pctt.backends.precision import BYTES, PrecisionPolicy
from pctt.groups import padded
from pctt.inference import Inference
from pctt.layers.dense import Dense
from pctt.learning import Learning
from pctt.network import Network
from pctt.placement.boxes import Box
from pctt.placement.boxes import box as find_box
from pctt.placement.chips import Chip
from pctt.placement.fused_cost import FusedCost, FusedPlacement, fused_placement
from pctt.wiring import chain

KEPT = 3
"""Equal layers in a row that are planned for any number of them: L1 and the time of an inference step do not
grow with more, and the sweep before it grows by as much each (docs/results/fused.md, Depth)."""


@dataclass(frozen=True)
class Share:
    """The layers of one chip.

    first, last: numbers of the layers, from 1.    cores: that they take, the copy of the node below included.
    l1_bytes: on each core.    weights: numbers learnt.
    step, before, rest: predicted seconds of an inference step, of what comes before the first, and of
        gradients and update; None for a network of one layer, in which nothing moves.
    """

    first: int
    last: int
    cores: int
    l1_bytes: int
    weights: int
    step: float | None
    before: float | None
    rest: float | None


@dataclass(frozen=True)
class Scaling:
    """A network on the chips of a box.

    Of `step` there are two bounds: a boundary's two messages wholly in addition to the slowest chip's step
    (nothing hidden), and only the slowest of both (everything hidden).
    """

    net: Network
    box: Box
    batch_size: int
    num_steps: int
    shares: tuple[Share, ...]
    policy: PrecisionPolicy

    @property
    def num_chips(self) -> int:
        """That one copy of the network needs."""
        return len(self.shares)

    @property
    def replicas(self) -> int:
        """Copies that the box holds; 0 where it does not hold one."""
        return self.box.num_chips // self.num_chips

    @cached_property
    def boundaries(self) -> tuple[tuple[int, int], ...]:
        """Bytes up and down across each boundary in an inference step, padding to tiles included."""
        rows, widths = padded(self.batch_size, TILE), self.net.widths
        sizes = [rows * padded(widths[share.last], TILE) for share in self.shares[:-1]]
        return tuple((size * BYTES[self.policy.operands], size * BYTES["float32"]) for size in sizes)

    @property
    def messages(self) -> int:
        """Across each boundary in a training step: two per inference step, the first sweep's, and one for the
        weight gradient (docs/parallel.md).
        """
        return 2 * self.num_steps + 2

    @property
    def message_seconds(self) -> float:
        """Of both messages of the slowest boundary, one after the other."""
        return max((sum(map(self.box.message_seconds, pair)) for pair in self.boundaries), default=0.0)

    @property
    def step_alone(self) -> float | None:
        """Of the slowest chip, as if it had the boundary's other side on it."""
        steps = [share.step for share in self.shares if share.step is not None]
        return max(steps) if len(steps) == self.num_chips else None

    @property
    def step_exposed(self) -> float | None:
        return None if self.step_alone is None else self.step_alone + self.message_seconds

    @property
    def step_hidden(self) -> float | None:
        if self.step_alone is None:
            return None
        single = [self.box.message_seconds(size) for pair in self.boundaries for size in pair]
        return max([self.step_alone, *single])

    @property
    def training(self) -> float | None:
        """Seconds of a training step of one copy, no message hidden."""
        if self.step_exposed is None:
            return None
        sweep = sum(share.before or 0.0 for share in self.shares)
        sweep += 2 * sum(self.box.message_seconds(up) for up, _ in self.boundaries)
        rest = max(share.rest or 0.0 for share in self.shares)
        return self.box.chip.eager_launch_seconds + sweep + self.num_steps * self.step_exposed + rest

    @property
    def reduce_bytes(self) -> int:
        """Gradients of the chip with most weights."""
        return max(share.weights for share in self.shares) * BYTES[self.policy.masters]

    @property
    def reduce_seconds(self) -> float:
        """Of the all_reduce between the copies; 0 for one."""
        return self.box.all_reduce_seconds(self.reduce_bytes, self.replicas) if self.replicas > 1 else 0.0

    @property
    def samples_per_second(self) -> float | None:
        """With a batch for each copy."""
        if self.training is None or self.replicas == 0:
            return None
        return self.replicas * self.batch_size / (self.training + self.reduce_seconds)

    def as_text(self) -> str:
        """The shares, the times and the assumptions, in ASCII, at most 110 columns wide."""
        box, cores = self.box, self.box.chip.grid[0] * self.box.chip.grid[1]
        lines = [
            f"{_widths(self.net)} on {box.name}: {box.num_chips} chips ({box.mesh[0]} x {box.mesh[1]} "
            f"{box.chip_name}), batches of {self.batch_size}",
            "",
            f"One copy takes {_count(self.num_chips, 'chip')}; the box holds {self.replicas}.",
        ]
        lines += [
            "",
            f"{'chips':<10}{'layers each':>12}{'cores':>10}{'L1 B':>12}{'weights':>12}{'step us':>10}",
        ]
        for (layers, used, l1_bytes, weights, step), run in groupby(self.shares, _alike):
            chips = len(list(run))
            lines.append(
                f"{chips:<10}{layers:>12}{f'{used}/{cores}':>10}{l1_bytes:>12,}{weights:>12,}{_us(step):>10}"
            )
        up, down = max(self.boundaries, default=(0, 0))
        lines += [
            "",
            f"inference step, us: {_us(self.step_alone)} on the slowest chip; {_us(self.step_hidden)} to "
            f"{_us(self.step_exposed)} with messages hidden or not",
        ]
        if self.boundaries:
            lines.append(
                f"each boundary and inference step: {up:,} B up, {down:,} B down, "
                f"{_us(self.message_seconds)} us; {self.messages} messages a training step"
            )
        lines += [
            f"training step of {self.num_steps} inference steps, nothing hidden: {_us(self.training)} us",
            f"all_reduce of {self.reduce_bytes:,} B over {_count(self.replicas, 'copy', 'copies')}: "
            f"{_us(self.reduce_seconds)} us",
            "samples per second, a batch for each copy: "
            + ("-" if self.samples_per_second is None else f"{self.samples_per_second:,.0f}"),
            "",
            f"Assumed: {_count(box.links, 'link')} of {box.link_bytes_per_second / 1e9:g} GB/s each way "
            f"between neighbours, {box.hop_seconds * 1e6:g} us a hop; layers that",
            "follow each other on neighbouring chips; the fused kernel's layout and times on each chip.",
            "Predicted, not measured.",
        ]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """What there is to say, as JSON-ready values; times in seconds."""
        return {
            "box": self.box.name,
            "chip": self.box.chip_name,
            "num_chips": self.num_chips,
            "replicas": self.replicas,
            "batch_size": self.batch_size,
            "num_steps": self.num_steps,
            "widths": list(self.net.widths),
            "shares": [
                {"layers": [s.first, s.last], "cores": s.cores, "l1_bytes": s.l1_bytes, "weights": s.weights}
                for s in self.shares
            ],
            "boundary_bytes": [list(pair) for pair in self.boundaries],
            "step": {"alone": self.step_alone, "hidden": self.step_hidden, "exposed": self.step_exposed},
            "message_seconds": self.message_seconds,
            "training": self.training,
            "all_reduce": self.reduce_seconds,
            "samples_per_second": self.samples_per_second,
        }


def scaling(
    net: Network,
    box: str | Box = "galaxy",
    batch_size: int = 32,
    inference: Inference | None = None,
    learning: Learning | None = None,
    policy: PrecisionPolicy | None = None,
) -> Scaling:
    """How `net` would be trained on the chips of a box.

    batch_size: of each copy of the network.

    Raises ValueError for an unknown box, for a graph, and for a layer that one chip cannot hold.

    Example:
        >>> import pctt
        >>> deep = pctt.chain(32, [pctt.Dense(32, "tanh") for _ in range(100)])
        >>> scaling(deep, "galaxy", learning=pctt.SGD(0.1)).num_chips
        2
    """
    net.dense_layers("a plan")
    where_to = find_box(box) if isinstance(box, str) else box
    splitter = _Splitter(net, where_to, batch_size, inference or Inference(), learning, policy)
    return Scaling(
        net,
        where_to,
        batch_size,
        splitter.inference.num_steps,
        tuple(splitter.shares()),
        policy or PrecisionPolicy(),
    )


@dataclass(frozen=True)
class _Part:
    """Consecutive layers on a chip of their own. below: units of the node that the first one reads."""

    chip: Chip
    below: int
    layers: tuple[Dense, ...]
    batch_size: int
    inference: Inference
    learning: Learning | None
    policy: PrecisionPolicy | None


@lru_cache(maxsize=256)
def _placed(part: _Part) -> FusedPlacement | str:
    """How they lie there, or why they do not fit."""
    rules = part.batch_size, part.inference, part.learning, part.policy
    try:
        return fused_placement(chain(part.below, part.layers), part.chip, None, *rules)
    except ValueError as error:
        return str(error)


@lru_cache(maxsize=256)
def _cost(part: _Part) -> FusedCost | None:
    plan = _placed(part)
    return None if isinstance(plan, str) or not plan.walk else plan.cost()


class _Splitter:
    """Gives each chip as many layers as fit, one chip after the other."""

    def __init__(
        self,
        net: Network,
        box: Box,
        batch_size: int,
        inference: Inference,
        learning: Learning | None,
        policy: PrecisionPolicy | None,
    ) -> None:
        self.net, self.box, self.inference = net, box, inference
        self.rules = batch_size, inference, learning, policy
        self.layers = [replace(layer, name=None) for layer in net.dense_layers("a plan")]

    def shares(self) -> list[Share]:
        found: list[Share] = []
        first, count = 1, len(self.layers)
        while first <= count:
            last, fitting = first, self._fits(first, first)
            if isinstance(fitting, str):
                raise ValueError(
                    f"layer {self.net.names[first - 1]!r} does not fit one {self.box.chip_name}, and no "
                    f"layer is shared between chips: {fitting}"
                )
            while last < count and not isinstance(beside := self._fits(first, last + 1), str):
                last, fitting = last + 1, beside
            found.append(self._share(first, last, *fitting))
            first = last + 1
        return found

    def _fits(self, first: int, last: int) -> tuple[int, int] | str:
        """Cores and bytes of L1 that layers take together, or why they do not fit."""
        part = self._short(first, last, KEPT)
        plan = _placed(part)
        if isinstance(plan, str):
            return plan
        widths = part.below, *(layer.units for layer in part.layers)
        slices = dict(zip(widths, plan.cores.slices, strict=True))
        total = sum(slices[width] for width in self.net.widths[first - 1 : last + 1])
        if total > self.box.chip.grid[0] * self.box.chip.grid[1]:
            return f"its layers take {total} cores."
        return total, plan.l1_bytes

    def _short(self, first: int, last: int, kept: int, chip: Chip | None = None) -> _Part:
        """The layers with at most so many equal ones in a row."""
        widths = self.net.widths
        described = [(widths[i - 1], self.layers[i - 1]) for i in range(first, last + 1)]
        runs = (list(run)[:kept] for _, run in groupby(described))
        kept_layers = tuple(layer for run in runs for _, layer in run)
        return _Part(chip or self.box.chip, widths[first - 1], kept_layers, *self.rules)

    def _cost(self, first: int, last: int, kept: int) -> FusedCost | None:
        """Of a single layer with a neighbour beside it, as if the chip had three times as many rows of cores:
        in a network of one layer no node is free to move.
        """
        part = self._short(first, last, kept)
        if first == last and len(self.layers) > 1:
            (columns, rows), end = self.box.chip.grid, max(2, last)
            chip = replace(self.box.chip, grid=(columns, 3 * rows))
            part = self._short(end - 1, end, kept, chip)
        return _cost(part)

    def _share(self, first: int, last: int, cores: int, l1_bytes: int) -> Share:
        layers = range(first, last + 1)
        widths = self.net.widths
        weights = sum(widths[i] * (widths[i - 1] + self.layers[i - 1].bias) for i in layers)
        cost = self._cost(first, last, KEPT)
        if cost is None:
            return Share(first, last, cores, l1_bytes, weights, None, None, None)
        rest = cost.training - self.box.chip.eager_launch_seconds - cost.before
        rest -= self.inference.num_steps * cost.step
        short, longer = (len(self._short(first, last, kept).layers) for kept in (KEPT, KEPT + 1))
        before, more = cost.before, self._cost(first, last, KEPT + 1)
        if longer > short and more is not None:  # each layer more takes as long as this one
            before += (len(layers) - short) * (more.before - cost.before) / (longer - short)
        return Share(first, last, cores, l1_bytes, weights, cost.step, before, max(0.0, rest))


def _alike(share: Share) -> tuple[int, int, int, int, float | None]:
    return share.last - share.first + 1, share.cores, share.l1_bytes, share.weights, share.step


def _widths(net: Network) -> str:
    """The widths, runs of equal ones counted: 784-16x256-10."""
    runs = [(width, len(list(run))) for width, run in groupby(net.widths)]
    return "-".join(f"{width}" if count == 1 else f"{count}x{width}" for width, count in runs)


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:,.1f}"
