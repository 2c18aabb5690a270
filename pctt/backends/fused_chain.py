"""Elementwise work that stays in registers: several card operations on tiles loaded and stored once.

The matrix unit has four registers of one float32 tile each. A `Chain` collects operations as values, each
computed from earlier ones; `links` gives those of the kernel for one tile, with a register for each value
as long as something needs it. A value that would have lain in L1 as bfloat16 in between is rounded to it, so
that a chain gives the bits that single operations give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pctt.backends.fused_stream import BFLOAT16, Ref, Word, link

NUM_REGISTERS = 4


@dataclass(frozen=True)
class Value:
    """What one link computes. inputs: earlier values, by their place in the chain."""

    kind: str
    inputs: tuple[int, ...] = ()
    parameters: tuple[Word, ...] = ()
    flags: int = 0


@dataclass
class Chain:
    """values: in the order of their computing.    stores: where values end up, by name of the tensor.

    current: the value that a tensor has by now, where that is in a register.
    """

    values: list[Value] = field(default_factory=list)
    stores: dict[str, tuple[int, bool]] = field(default_factory=dict)  # value, whether bfloat16
    current: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, *inputs: int, parameters: tuple[Word, ...] = (), flags: int = 0) -> int:
        self.values.append(Value(kind, inputs, parameters, flags))
        return len(self.values) - 1

    def load(self, ref: Ref, bfloat16: bool, period: int = 0) -> int:
        """period: tiles after which to begin again, 0 for never."""
        flags = (BFLOAT16 if bfloat16 else 0) | period << 1
        return self.add("LOAD", parameters=(ref,), flags=flags)

    def read(self, name: str, bfloat16: bool) -> int | None:
        """The value of a tensor if it is in a register, as a load would give it."""
        value = self.current.get(name)
        if value is None or not bfloat16:
            return value
        if self.values[value].kind != "ROUND":
            value = self.current[name] = self.add("ROUND", value)
        return value

    def store(self, name: str, value: int, bfloat16: bool) -> None:
        self.current[name] = value
        self.stores[name] = value, bfloat16

    def copy(self) -> Chain:
        return Chain(list(self.values), dict(self.stores), dict(self.current))

    def without(self, names: set[str]) -> Chain:
        """The same without stores to tensors that nobody reads, and without what only they needed."""
        stores = {name: what for name, what in self.stores.items() if name not in names}
        needed = {value for value, _ in stores.values()}
        for number in range(len(self.values) - 1, -1, -1):
            if number in needed:
                needed.update(self.values[number].inputs)
        places = {old: new for new, old in enumerate(sorted(needed))}
        values = [
            Value(v.kind, tuple(places[i] for i in v.inputs), v.parameters, v.flags)
            for number, v in enumerate(self.values)
            if number in needed
        ]
        return Chain(values, {name: (places[value], low) for name, (value, low) in stores.items()})

    @property
    def loads(self) -> list[Ref]:
        return [v.parameters[0] for v in self.values if v.kind == "LOAD" and isinstance(v.parameters[0], Ref)]

    def links(self) -> list[Link] | None:
        """Those for one tile, each with its kind and its words; None where registers do not suffice."""
        last = {value: len(self.values) for value, _ in self.stores.values()}
        for number, value in enumerate(self.values):
            for i in value.inputs:
                last[i] = max(last.get(i, 0), number)
        free, where = list(range(NUM_REGISTERS - 1, -1, -1)), dict[int, int]()
        links: list[Link] = []
        for number, value in enumerate(self.values):
            dying = [i for i in dict.fromkeys(value.inputs) if last[i] == number]
            if dying:
                register = where[dying[0]]
                free += [where[i] for i in dying[1:]]
            elif free:
                register = free.pop()
            else:
                return None
            if len(value.inputs) == 1 and not dying:  # functions of one register leave their result in it
                links.append(("COPY", [link("COPY", where[value.inputs[0]], register)]))
            links.append((value.kind, _words(value, [where[i] for i in value.inputs], register)))
            where[number] = register
            if number not in last:
                free.append(register)
        links.append(("KEEP", [link("KEEP")]))
        for name, (value, bfloat16) in self.stores.items():
            word = link("STORE", where[value], flags=BFLOAT16 if bfloat16 else 0)
            links.append(("STORE", [word, Ref(name)]))
        return links


Link = tuple[str, list[Word]]


def _words(value: Value, registers: list[int], result: int) -> list[Word]:
    if len(registers) == 3:
        first, second, third = registers
        return [link(value.kind, first, second, third | result << 4)]
    if len(registers) == 2:
        return [link(value.kind, *registers, flags=result)]
    return [link(value.kind, result, flags=value.flags), *value.parameters]
