"""Blocks: predictions composed of maps, and their local rules.

A block predicts one node from one or more others. Its maps run one after the other, or branch and join, and
nothing inside has an error of its own: the node's error is pulled back through the block by the chain rule,
one node down and no further. What is a block and what is several layers is therefore a choice of the model:
the same maps spread over nodes give each of them activities and errors.

    values     x_1 .. x_k of the sources, then one per map; the last one is the prediction mu
    change     of a value since the anchor; a linear map computes it from the changes of its inputs, the
               others from their values, f(x) - f(x0)
    feedback   P e pulled through the maps, down to a source
    gradient   dF/dW = -(dy/dW)' v of each map, v what is pulled down to its output
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pctt.describe import MOST_ITEMS, Concise, listed
from pctt.energies import Categorical, Energy, Gaussian
from pctt.layers.dense import Dense
from pctt.layers.maps import Add, Bias, Flatten, Function, Linear, Map, NormaliseBatch, Scale, Shape, Use
from pctt.learning.rules import STATE
from pctt.program import Slot

if TYPE_CHECKING:
    from pctt.state import AbstractState


@dataclass(frozen=True)
class Step(Concise):
    """A map in a block.

    of: its inputs, as numbers of values: 0 to k - 1 are the k sources, k the first map's result, and so on;
        negative ones count back from this step (-1: the one before). Empty: what stands before, of a first
        map with several inputs all sources.
    name: tells its weights from those of other maps: `weight.name`.
    """

    map: Map
    of: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.map, Map):
            raise ValueError(f"a step of a block must be a map such as Linear(...), got {self.map!r}.")
        if "/" in self.name or "." in self.name:
            raise ValueError(f"the name of a step must have no '/' and no '.', got {self.name!r}.")

    def as_part(self) -> str:
        """As it would be typed in the list of a block."""
        if self.of or self.name:
            return repr(self)
        return repr(self.map.name if isinstance(self.map, Function) else self.map)


@dataclass(frozen=True)
class Block(Concise):
    """A layer composed of maps.

    steps: maps, names of activations, `Step(...)`s, or nested lists of these.
    energy: `Gaussian(...)`, or `Categorical()` where the last map is softmax, over the last axis.
    name: of the layer and of the node it predicts; given by the network when None.

    >>> Block([Linear(8), "tanh"]).kind
    'block'
    """

    steps: tuple[Step, ...]
    energy: Energy = field(default_factory=Gaussian)
    name: str | None = None

    kind: ClassVar[str] = "block"

    def __init__(self, steps: Any, energy: Energy | None = None, name: str | None = None) -> None:
        object.__setattr__(self, "steps", tuple(_steps(steps)))
        object.__setattr__(self, "energy", energy or Gaussian())
        object.__setattr__(self, "name", name)
        if not self.steps:
            raise ValueError("a block needs at least one map.")
        if not isinstance(self.energy, (Gaussian, Categorical)):
            raise ValueError(f"energy must be Gaussian(...) or Categorical(), got {self.energy!r}.")

    def as_typed(self, name: str) -> str:
        if name != "steps":
            return super().as_typed(name)
        return f"[{listed([step.as_part() for step in self.steps[:MOST_ITEMS]], len(self.steps))}]"

    @property
    def learns_variance(self) -> bool:
        """Whether the variance of the node's error is learned."""
        return isinstance(self.energy, Gaussian) and self.energy.learned is not None


Layer = Dense | Block


def _steps(given: Any) -> list[Step]:
    if isinstance(given, Step):
        return [given]
    if isinstance(given, Map):
        return [Step(given)]
    if isinstance(given, str):
        return [Step(Function(given))]
    if isinstance(given, (list, tuple)):
        return [step for part in given for step in _steps(part)]
    raise ValueError(f"a block is made of maps, activations by name and lists of them, got {given!r}.")


def block_of(layer: Dense, sources: Sequence[str], shapes: Sequence[Shape]) -> Block:
    """The block that a dense layer is: mu = f_out(sum over sources of f_in(x) W, scaled, + b) (+ x)."""
    count, steps = len(shapes), list[Step]()
    parts: list[int] = []
    for number, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
        at = number
        before: list[Map] = [Flatten()] if len(shape) > 1 else []
        if layer.input_function != "identity":
            before.append(Function(layer.input_function))
        plain = count == 1 and layer.scale == 1.0
        before.append(Linear(layer.units, bias=layer.bias and plain))
        for entry in before:
            name = source if isinstance(entry, Linear) and count > 1 else ""
            steps.append(Step(entry, (at,), name))
            at = count + len(steps) - 1
        parts.append(at)
    if count > 1:
        steps.append(Step(Add(), tuple(parts)))
    if layer.scale != 1.0:
        steps.append(Step(Scale(layer.scale)))
    if layer.bias and (count > 1 or layer.scale != 1.0):
        steps.append(Step(Bias()))
    if layer.output_function != "identity":
        steps.append(Step(Function(layer.output_function)))
    if layer.skip:
        if count > 1:
            raise ValueError("skip adds the one activity below; with several sources use a Block.")
        steps.append(Step(Add(), (0, count + len(steps) - 1)))
    return Block(steps, layer.energy, layer.name)


def express(layer: Layer, sources: Sequence[str], shapes: Sequence[Shape]) -> Expression:
    """A layer predicting from nodes of these names and shapes. Raises ValueError where they do not suit."""
    block = layer if isinstance(layer, Block) else block_of(layer, sources, shapes)
    return Expression(block.steps, tuple(shapes), block.energy)


def ties_samples(rules: Iterable[object]) -> bool:
    """Whether a prediction depends on other samples of the batch."""
    parts = [part for rule in rules if isinstance(rule, Expression) for part in rule.parts]
    return any(isinstance(part[0], NormaliseBatch) for part in parts)


class Expression:
    """A block whose sources' shapes are known: what has the local rules.

    shapes: of the sources.    shape: of the prediction.
    """

    def __init__(self, steps: Sequence[Step], shapes: tuple[Shape, ...], energy: Energy) -> None:
        self.maps = [step.map for step in steps]
        self.energy = energy
        self.num_sources = len(shapes)
        self.inputs: list[tuple[int, ...]] = []
        self.shapes: list[Shape] = list(shapes)
        for number, step in enumerate(steps):
            inputs = self._resolved(number, step)
            self.inputs.append(inputs)
            self.shapes.append(step.map.output_shape([self.shapes[value] for value in inputs]))
        self.last = len(self.shapes) - 1
        self.shape = self.shapes[-1]
        self._check(steps)
        self._keys = self._name_weights(steps)
        self.top = self.last - 1 if self._is_categorical else self.last
        """The value whose gradient the error is: the logits of a categorical energy, else the prediction."""
        # Values that must stand as such after each step, since a map that is not linear reads them.
        self._read = {
            value
            for map_, inputs in zip(self.maps, self.inputs, strict=True)
            if not map_.is_linear
            for value in inputs
        }
        self._changes_read = {
            value
            for map_, inputs in zip(self.maps, self.inputs, strict=True)
            if map_.is_linear
            for value in inputs
        }

    # --- what it is made of ---------------------------------------------------------------------------------

    def _resolved(self, number: int, step: Step) -> tuple[int, ...]:
        here = self.num_sources + number
        count = step.map.num_inputs
        if not step.of:
            several = count is None or count > 1
            if several and number:
                raise ValueError(
                    f"{step.map.kind} takes several inputs; say which, Step({step.map!r}, of=(...))."
                )
            of = tuple(range(self.num_sources)) if several else (here - 1 if number else 0,)
        else:
            of = tuple(here + value if value < 0 else value for value in step.of)
        if any(not 0 <= value < here for value in of):
            raise ValueError(f"step {number + 1} reads values {of}; 0 to {here - 1} stand before it.")
        if count is not None and len(of) != count:
            raise ValueError(f"{step.map.kind} takes {count} inputs, got {len(of)}.")
        return of

    def _check(self, steps: Sequence[Step]) -> None:
        used = {value for inputs in self.inputs for value in inputs}
        unused = [value for value in range(self.last) if value not in used]
        if unused:
            what = "source" if unused[0] < self.num_sources else "result of step"
            number = unused[0] if unused[0] < self.num_sources else unused[0] - self.num_sources + 1
            raise ValueError(f"{what} {number} is not used; drop it, or name it in `of`.")
        softmax = isinstance(steps[-1].map, Function) and steps[-1].map.name == "softmax"
        if isinstance(self.energy, Categorical):
            if not softmax:
                raise ValueError(
                    "a categorical energy needs predictions that are distributions; let the last map be "
                    "'softmax'."
                )
        else:
            self.energy.check(self.units)

    def _name_weights(self, steps: Sequence[Step]) -> list[dict[str, str]]:
        """Per map, {its key: the layer's key}."""
        keys: list[dict[str, str]] = []
        own = [list(self._map_weights(number)) for number in range(len(self.maps))]
        flat = [key for part in own for key in part]
        counts: dict[str, int] = {}
        for number, part in enumerate(own):
            kind, name = self.maps[number].kind, steps[number].name
            counts[kind] = counts.get(kind, 0) + 1
            ambiguous = any(flat.count(key) > 1 for key in part)
            name = name or (f"{kind}{counts[kind]}" if ambiguous else "")
            keys.append({key: f"{key}.{name}" if name else key for key in part})
        named = [key for part in keys for key in part.values()]
        if len(set(named)) != len(named):
            raise ValueError("two maps of a block have weights of one name; name their steps.")
        for kept in ("gradient", *STATE):
            clash = next((key for key in named if f"{key}_{kept}" in named), None)
            if clash is not None:
                raise ValueError(
                    f"a weight called {clash}_{kept} would be taken for the {kept} of {clash}; rename its "
                    "source or step."
                )
        return keys

    def _map_weights(self, number: int) -> dict[str, Shape]:
        return self.maps[number].weight_shapes([self.shapes[value] for value in self.inputs[number]])

    @property
    def _is_categorical(self) -> bool:
        return isinstance(self.energy, Categorical)

    @property
    def units(self) -> int:
        return math.prod(self.shape)

    @property
    def learns_variance(self) -> bool:
        """Whether the variance of the node's error is learned."""
        return isinstance(self.energy, Gaussian) and self.energy.learned is not None

    @property
    def output_function(self) -> str:
        last = self.maps[-1]
        return last.name if isinstance(last, Function) else "identity"

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the weights that descend a gradient."""
        return tuple(
            name
            for map_, keys in zip(self.maps, self._keys, strict=True)
            for key, name in keys.items()
            if key not in map_.frozen
        )

    def weight_shapes(self, fan_in: int = 0) -> dict[str, Shape]:
        """Everything that learning changes, and statistics that stand still."""
        del fan_in
        shapes = {
            name: self._map_weights(number)[key]
            for number, keys in enumerate(self._keys)
            for key, name in keys.items()
        }
        return {**shapes, "variance": (self.units,)} if self.learns_variance else shapes

    def weighted_maps(self) -> list[tuple[Map, list[Shape], dict[str, str], str]]:
        """(map, shapes of its inputs, {its key: the layer's key}, activation that follows) of each map that
        has weights.
        """
        found: list[tuple[Map, list[Shape], dict[str, str], str]] = []
        for number, (map_, keys) in enumerate(zip(self.maps, self._keys, strict=True)):
            if keys:
                following = next((m for m in self.maps[number + 1 :] if isinstance(m, Function)), None)
                shapes = [self.shapes[value] for value in self.inputs[number]]
                found.append((map_, shapes, keys, following.name if following else "identity"))
        return found

    @property
    def parts(self) -> list[tuple[Map, tuple[int, ...], dict[str, str]]]:
        """(map, the values it reads, {its key: the layer's key}) of each map, in order."""
        return list(zip(self.maps, self.inputs, self._keys, strict=True))

    @property
    def masks(self) -> list[tuple[Linear, str, Shape]]:
        """(map, the key of its weight, its shape) of each map with a mask."""
        return [
            (map_, keys["weight"], self._map_weights(number)["weight"])
            for number, (map_, keys) in enumerate(zip(self.maps, self._keys, strict=True))
            if isinstance(map_, Linear) and map_.mask is not None
        ]

    # --- slots ----------------------------------------------------------------------------------------------

    def _slot(self, at: AbstractState, index: int, role: str, value: int) -> Slot:
        return at.inner(f"{role}{value}", index, math.prod(self.shapes[value]))

    def _base(self, at: AbstractState, index: int, value: int) -> Slot:
        """The value that the anchor has."""
        if value == self.last:
            return at.anchor(index)
        if value < self.num_sources and not at.incremental:
            return at.initial_activity(at.net.sources(index)[value])
        return self._slot(at, index, "base", value)

    def _changed(self, at: AbstractState, index: int) -> set[int]:
        """Values that can differ from their bases now."""
        if not at.recomputed(index):
            return set()
        sources = at.net.sources(index)
        changed = {value for value in range(self.num_sources) if at.has_moved(sources[value])}
        for number, inputs in enumerate(self.inputs):
            if changed & set(inputs):
                changed.add(self.num_sources + number)
        return changed

    def _current(self, at: AbstractState, index: int, value: int, changed: Collection[int]) -> Slot:
        """Where a value stands that `predict` has written."""
        if value not in changed:
            return self._base(at, index, value)
        if value < self.num_sources:
            return at.node("activity", at.net.sources(index)[value])
        return self._slot(at, index, "value", value)

    def _use(self, at: AbstractState, index: int, number: int, changed: Collection[int], final: bool) -> Use:
        inputs, keys, output = self.inputs[number], self._keys[number], self.num_sources + number

        def value(position: int) -> Slot:
            return self._now(at, index, inputs[position], changed, final)

        def weight(key: str) -> Slot:
            if key == "mask":
                return at.layer(f"mask of {keys['weight']}", index)
            return at.layer(keys[key], index)

        return Use(
            at,
            tuple(self.shapes[entry] for entry in inputs),
            self.shapes[output],
            value,
            lambda: self._current(at, index, output, changed),
            weight,
            lambda key: at.gradient(keys[key], index),
            lambda role, units: at.inner(f"{role}{output}", index, units),
        )

    def _now(self, at: AbstractState, index: int, value: int, changed: Collection[int], final: bool) -> Slot:
        """The current value, worked out where only its change stands.    final: after inference."""
        if value < self.num_sources and final and not at.incremental:
            return at.final_activity(at.net.sources(index)[value])
        standing = value not in changed or value in self._read or value < self.num_sources
        if standing or not self.maps[value - self.num_sources].is_linear:
            return self._current(at, index, value, changed)
        return self._summed(at, index, value)

    def _summed(self, at: AbstractState, index: int, value: int) -> Slot:
        """A value, from its base and its change."""
        change = self._slot(at, index, "change", value)
        return at.add(self._slot(at, index, "value", value), self._base(at, index, value), change)

    # --- the local rules ------------------------------------------------------------------------------------

    def anchor(self, at: AbstractState, index: int) -> None:
        """The prediction from the initial activities, which the deviations refer to."""
        if at.incremental:  # the activities themselves move
            for value, source in enumerate(at.net.sources(index)):
                at.copy(self._base(at, index, value), at.initial_activity(source))
        for number, map_ in enumerate(self.maps):
            use = self._use(at, index, number, (), False)
            map_.forward(use, self._base(at, index, self.num_sources + number))

    def predict(self, at: AbstractState, index: int, out: Slot, base: Slot, sign: float) -> Slot:
        """out = base + sign (mu - anchor): what the prediction has changed by since the anchor. Returns the
        slot of mu, or `out` where no slot holds that.
        """
        changed = self._changed(at, index)
        sources = at.net.sources(index)
        for value in range(self.num_sources):
            if value in changed and value in self._read:
                source = sources[value]
                at.add(at.node("activity", source), at.anchor(source), at.node("deviation", source))
        for number, map_ in enumerate(self.maps):
            value = self.num_sources + number
            if value not in changed:
                continue
            use, final = self._use(at, index, number, changed, False), value == self.last
            if map_.is_linear:
                self._push(at, index, use, number, changed, (out, base, sign) if final else None)
                if value in self._read:
                    self._summed(at, index, value)
                continue
            now = self._slot(at, index, "value", value)
            map_.forward(use, now)
            if final and not at.floats(index):
                at.add(out, now, at.anchor(index), -1.0)
                at.add(out, base, out, sign)
            elif value in self._changes_read:
                at.add(self._slot(at, index, "change", value), now, self._base(at, index, value), -1.0)
        return out if self.maps[-1].is_linear else self._slot(at, index, "value", self.last)

    def _push(
        self,
        at: AbstractState,
        index: int,
        use: Use,
        number: int,
        changed: Collection[int],
        final: tuple[Slot, Slot, float] | None,
    ) -> None:
        """The change of what a linear map gives; that of the last map goes to the error."""
        own = self._slot(at, index, "change", self.num_sources + number)
        into, addend, scale = final or (own, None, 1.0)
        for position, value in enumerate(self.inputs[number]):
            if value in changed:
                is_source = value < self.num_sources
                source = at.net.sources(index)[value] if is_source else 0
                change = at.change(source) if is_source else self._slot(at, index, "change", value)
                self.maps[number].push(use, position, change, into, addend, scale)
                addend = into

    def feedback(
        self,
        at: AbstractState,
        index: int,
        source: int,
        into: Slot,
        addend: Slot | None,
        scale: float,
        scalar: str | None,
        signal: Slot | None = None,
    ) -> None:
        """into = addend + scale * scalars[scalar] * (vector-Jacobian product with respect to node `source`).

        addend: `into` itself, or None for 0.    signal: the vector, [B, units]; None for P e.
        """
        signal = at.weighted_error(index) if signal is None else signal
        wanted = {value for value, node in enumerate(at.net.sources(index)) if node == source}
        changed = self._changed(at, index)
        pulled = self._pulled(at, index, signal, self._between(wanted), changed, False)
        if self.top in wanted:  # softmax by itself: the source holds the logits
            at.add_scaled(signal, into, addend, scale, scalar)
            addend = into
        for number in reversed(range(len(self.maps))):
            value = self.num_sources + number
            for position, below in enumerate(self.inputs[number]):
                if below in wanted and value in pulled:
                    use = self._use(at, index, number, changed, False)
                    self.maps[number].pull(use, position, pulled[value], into, addend, scale, scalar)
                    addend = into

    def gradient(self, at: AbstractState, index: int) -> None:
        """dF/dW, averaged over the batch, of all weights."""
        weighted = {
            self.num_sources + number
            for number, (map_, keys) in enumerate(zip(self.maps, self._keys, strict=True))
            if set(keys) - set(map_.frozen)
        }
        if not weighted:
            return
        changed = self._changed(at, index)
        wanted = self._between(weighted) | weighted
        pulled = self._pulled(at, index, at.weighted_error(index), wanted, changed, True)
        for value in sorted(weighted):
            number = value - self.num_sources
            use = self._use(at, index, number, changed, True)
            self.maps[number].gradient(use, pulled[value], -1.0, at.gradient_scalar)

    def logits(self, at: AbstractState, index: int) -> Slot:
        """What softmax is taken of, where its current value stands."""
        return self._now(at, index, self.top, self._changed(at, index), False)

    def _between(self, below: Collection[int]) -> set[int]:
        """The values that lie between those and the prediction, and are computed from them."""
        above = set(below)
        for number, inputs in enumerate(self.inputs):
            if above & set(inputs):
                above.add(self.num_sources + number)
        return above - set(below)

    def _pulled(
        self,
        at: AbstractState,
        index: int,
        signal: Slot,
        wanted: Collection[int],
        changed: Collection[int],
        final: bool,
    ) -> dict[int, Slot]:
        """The signal, pulled down to each of the wanted values that are results of maps."""
        pulled = {self.top: signal}
        for number in reversed(range(self.top - self.num_sources + 1)):
            value = self.num_sources + number
            if value not in pulled:
                continue
            for position, below in enumerate(self.inputs[number]):
                if below not in wanted or below < self.num_sources:
                    continue
                slot = self._slot(at, index, "pulled", below)
                use = self._use(at, index, number, changed, final)
                addend = slot if below in pulled else None
                self.maps[number].pull(use, position, pulled[value], slot, addend, 1.0, None)
                pulled[below] = slot
        return pulled
