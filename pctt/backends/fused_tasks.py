"""From card operations to tasks of single cores: what `kernels/training_step` carries out.

A card operation serves many layers; a task is the share of one core in it. A node lies on one core or on
several, each with a slice of its units, of the incoming weights and of all that belongs to them. So an
elementwise operation is the same on every slice, and the three products are

    prediction   the whole source times the slice of the weights
    feedback     the slice of the errors times the slice of the weights, transposed tile by tile: a partial
                 sum for every unit below, which the cores below add up
    gradient     the whole source, transposed, times the slice of the errors

What cores exchange are the buffers whose role ends in ^, which lie with the layer above their node: sources
go up, to every core of that layer, and partial sums of feedback come down, to the slice they are for. A
sender writes them where the receiver reads them. No other tensor leaves its core.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pctt.backends.fused_chain import Chain
from pctt.backends.fused_cores import Cores, Move, Region, Task, Tensors, number_bits, tile_bytes
from pctt.backends.fused_stream import IN0, IN1, OUT, TRANSPOSED, Ref, Word, link
from pctt.backends.lowering import TILE, CardBuffer, singles
from pctt.backends.lowering import Chain as Functions
from pctt.backends.precision import BYTES
from pctt.program import Instruction, Program, Slot


@dataclass
class _Joined:
    """Elementwise operations of one node, done in one go. target: a buffer with the shape of its tiles.

    read, written: by other operations since the first of these, so that no later one may come before them.
    before: what must be done on a core first.
    """

    node: int
    target: CardBuffer
    operations: list[Instruction] = field(default_factory=list)
    chain: Chain = field(default_factory=Chain)
    before: list[CardBuffer] = field(default_factory=list)
    read: set[Slot] = field(default_factory=set)
    written: set[Slot] = field(default_factory=set)


TRANSPOSED_COPY = "transposed@"
"""How tensors begin that hold weights transposed, for the products of TT-NN."""

MOST_TILES = 255
"""A side of a product, eight bits of its instruction."""

HOST_ROLES = ("activity", "error", "initial", "anchor", "movable", "precision")
"""Of what the host reads or writes, beside weights, what learning keeps of them, and energies."""


class Tasks:
    """The tasks of a program whose buffers all lie on single cores.

    sections: the tasks of each code, in the order given.    numbers: what the kernel is told at launch.
    buffers: what the host reads or writes.    working: what is used by tasks alone, zeros at first.
    """

    def __init__(
        self, program: Program, codes: Iterable[Sequence[Instruction]], cores: Cores, rows: int
    ) -> None:
        self.cores = cores
        self.rows = rows
        self.numbers: list[CardBuffer] = []
        codes = [list(map(_without_copies, singles(code))) for code in codes]
        products = [i.out[0].buffer for code in codes for i in code if i.op == "matmul"]
        self.tensors = Tensors(program, cores, rows, {name for name in products if "^" in name})
        self._unread: set[str] = set()
        joined = [self._join(code) for code in codes]
        while (unread := self._never_read(joined)) - self._unread:  # frees registers, so more may be joined
            self._unread |= unread
            joined = [self._join(code) for code in codes]
        self._used: set[str] = set()
        self.sections = [self._section(pieces) for pieces in joined]
        originals = [self.tensors.original(name) for name in program.buffers]
        self.buffers = {buffer.name: buffer for buffer in originals if _is_for_host(buffer)}
        self.working = {
            name: buffer
            for name, buffer in self.tensors.known.items()
            if name in self._used and name not in self.buffers
        }

    # --- which operations go together -----------------------------------------------------------------------

    def _join(self, code: list[Instruction]) -> list[Instruction | _Joined]:
        """The code with elementwise operations of a node collected where the order allows."""
        pieces: list[Instruction | _Joined] = []
        open_: list[_Joined] = []
        for i in code:
            if i.out[0].buffer.startswith(TRANSPOSED_COPY):
                continue
            taker = None
            if i.op in ("binary", "addcmul", "unary", "fill"):
                node = self._node(i)
                taker = next((j for j in reversed(open_) if j.node == node and self._joins(j, i)), None)
                if taker is None:
                    taker = _Joined(node, self._target(i))
                    self._append(taker, i)
                    open_.append(taker)
                    pieces.append(taker)
            else:
                pieces.append(i)
            for other in open_:
                if other is not taker:
                    other.read.update(i.inputs)
                    other.written.update(i.out)
        return pieces

    def _joins(self, joined: _Joined, i: Instruction) -> bool:
        """Adds an operation to others whose results it reads, if it may come where they are and there are
        registers for all.
        """
        target = self._target(i)
        if self.tensors.tiles(target) != self.tensors.tiles(joined.target):
            return False
        if (target.rows == 1) != (joined.target.rows == 1):  # a row, which others read in all of their rows
            return False
        if not any(slot.buffer in joined.chain.current for slot in i.inputs):
            return False
        if any("^" in earlier.out[0].buffer for earlier in joined.operations):
            return False  # others wait for what these send
        if joined.written & {*i.inputs, *i.out} or joined.read & set(i.out):
            return False
        before = joined.chain, list(joined.before)
        joined.chain = joined.chain.copy()
        self._append(joined, i)
        if joined.chain.without(self._unread).links() is None:
            joined.chain, joined.before = before
            joined.operations.pop()
            return False
        return True

    def _append(self, joined: _Joined, i: Instruction) -> None:
        chain, target = joined.chain, self._target(i)
        options = dict(i.options)
        values = [self._load(joined, slot.buffer, target) for slot in i.inputs]
        chains = [options.get(name, ()) for name in ("a_chain", "b_chain")]
        if i.op == "unary":
            chains = [options.get("chain", ()), ()]
        values = [_functions(chain, value, links) for value, links in zip(values, chains, strict=False)]
        if i.op == "fill":
            # Only operands make the packer wait for the unpacker, and with it for what that waits for.
            anything = chain.load(Ref(target.name), target.format == "bfloat16")
            result = chain.add("FILL", anything, parameters=(number_bits(i.scale),))
        elif i.op == "addcmul":
            assert i.scalar is not None
            number = chain.add("NUMBER", parameters=(self._number(i.scalar),))
            result = chain.add("ADD_PRODUCT", *values, number)
        elif i.op == "unary":
            (result,) = values
        elif len(values) == 2:
            assert i.function is not None
            result = chain.add(i.function.upper(), *values)
        else:
            assert i.scalar is not None and i.function is not None
            kind = {"multiply": "SCALE", "add": "SHIFT"}[i.function]
            result = chain.add(kind, *values, parameters=(self._number(i.scalar),))
        result = _functions(chain, result, options.get("out_chain", ()))
        chain.store(target.name, result, target.format == "bfloat16")
        joined.operations.append(i)

    def _load(self, joined: _Joined, name: str, target: CardBuffer) -> int:
        """The value of an operand."""
        buffer, chain = self.tensors.buffer(name), joined.chain
        bfloat16 = buffer.format == "bfloat16"
        value = chain.read(name, bfloat16)
        if value is not None:
            return value
        if "^" in buffer.role:
            landing = self.tensors.landing(buffer)
            height, width = self.tensors.tiles(replace(landing, positions=1))
            block = height * width * tile_bytes(landing)
            value = chain.load(Ref(landing.name), bfloat16)
            for sender in range(1, self.tensors.num_senders(buffer)):
                other = chain.load(Ref(landing.name, sender * block), bfloat16)
                value = chain.add("ADD", value, other)
            if self.tensors.original(name).format == "bfloat16" and not bfloat16:
                value = chain.add("ROUND", value)
            return value
        if buffer.rows == 1 and target.rows != 1:
            spread = self.tensors.beside("spread", buffer, rows=TILE)
            if buffer not in joined.before:
                joined.before.append(buffer)
            return chain.load(Ref(spread.name), bfloat16, self.tensors.tiles(buffer)[1])
        return chain.load(Ref(name), bfloat16)

    def _never_read(self, joined: list[list[Instruction | _Joined]]) -> set[str]:
        """Tensors that chains write and nothing reads."""
        read: set[str] = set()
        for pieces in joined:
            for piece in pieces:
                if isinstance(piece, _Joined):
                    read |= {ref.tensor for ref in piece.chain.loads} | {b.name for b in piece.before}
                else:
                    read |= {slot.buffer for slot in piece.inputs}
        stored = {
            name: self.tensors.known[name]
            for pieces in joined
            for piece in pieces
            if isinstance(piece, _Joined)
            for name in piece.chain.stores
        }
        return {
            name
            for name, buffer in stored.items()
            if name not in read and not _is_for_host(buffer) and not name.startswith("sending ")
        }

    def _section(self, pieces: list[Instruction | _Joined]) -> list[Task]:
        tasks: list[Task] = []
        spread: set[Region] = set()  # rows that stand in all rows of their tiles already
        for piece in pieces:
            if isinstance(piece, _Joined):
                tasks += self._elementwise(piece, spread)
            else:
                tasks += getattr(self, f"_{piece.op}")(piece)
        tasks = _spread_first(tasks)
        for task in tasks:
            self._used |= {name for name, _, _ in (*task.reads, *task.writes)}
            self._used |= {move.writes[0] for move in task.moves}
        return tasks

    def _target(self, i: Instruction) -> CardBuffer:
        """Where an elementwise operation leaves its result: on its own core, also what is to be sent."""
        out = self.tensors.buffer(i.out[0].buffer)
        return self.tensors.beside("sending", out) if "^" in out.role else out

    def _number(self, name: str) -> int:
        buffer = self.tensors.original(name)
        if buffer not in self.numbers:
            self.numbers.append(buffer)
        return self.numbers.index(buffer)

    # --- elementwise ----------------------------------------------------------------------------------------

    def _elementwise(self, joined: _Joined, done: set[Region]) -> list[Task]:
        chain = joined.chain.without(self._unread)
        height, width = self.tensors.tiles(joined.target)
        sent = {
            self._target(i).name: self.tensors.buffer(i.out[0].buffer)
            for i in joined.operations
            if "^" in i.out[0].buffer
        }
        tasks: list[Task] = []
        for core in self.cores.of(joined.node):
            for row in joined.before:
                tasks += self._spread_rows(row, core, done)
            task = _of_chain(core, chain, height * width, "; ".join(map(str, joined.operations)))
            for ref in chain.loads:
                task.reads.add((ref.tensor, core, self._block(ref)))
            task.writes = {(name, core, 0) for name in chain.stores}
            for name, out in sent.items():
                self._send_up(task, self.tensors.known[name], out, joined.node, core)
            tasks.append(task)
        return tasks

    def _block(self, ref: Ref) -> int:
        """Of which sender."""
        if not ref.tensor.startswith("landed "):
            return 0
        landing = self.tensors.known[ref.tensor]
        height, width = self.tensors.tiles(replace(landing, positions=1))
        return ref.offset // (height * width * tile_bytes(landing))

    def _spread_rows(self, buffer: CardBuffer, core: int, done: set[Region]) -> list[Task]:
        """The first row of each tile in all of its rows: a tile is four faces of 16 x 16."""
        spread = self.tensors.beside("spread", buffer, rows=TILE)
        region = (spread.name, core, 0)
        if region in done:
            return []
        done.add(region)
        row, face = 16 * BYTES[buffer.format], 16 * 16 * BYTES[buffer.format]
        task = Task(core, "NOTHING", [], reads={(buffer.name, core, 0)}, name=f"spread {buffer.name}")
        for tile in range(self.tensors.tiles(buffer)[1]):
            start = tile * tile_bytes(buffer)
            for number in range(4):
                source = Ref(buffer.name, start + number % 2 * face)
                target = Ref(spread.name, start + number * face)
                task.moves.append(Move(core, source, target, 16, row, 0, row, (buffer.name, core, 0), region))
        return [task]

    def _send_up(self, task: Task, staging: CardBuffer, out: CardBuffer, node: int, core: int) -> None:
        """To every core of the layer above, beside the slices of the others."""
        height, width = self.tensors.tiles(staging)
        _, columns = self.tensors.tiles(out)
        size, number = tile_bytes(out), core - self.cores.first[node]
        across = min(width, columns - number * width) * size
        for receiver in self.cores.of(node + 1):
            target = Ref(out.name, number * width * size)
            task.moves.append(
                Move(
                    receiver,
                    Ref(staging.name),
                    target,
                    height,
                    across,
                    width * size,
                    columns * size,
                    (staging.name, core, 0),
                    (out.name, receiver, number),
                )
            )

    def _node(self, i: Instruction) -> int:
        """The node on whose cores an elementwise operation works: that of what does not travel."""
        found = {
            self.cores.node(buffer, slot.start)
            for slot in (*i.out, *i.inputs)
            if "^" not in (buffer := self.tensors.buffer(slot.buffer)).role
        }
        assert len(found) == 1, i
        return found.pop()

    def _row_sums(self, i: Instruction) -> list[Task]:
        source, out = self.tensors.buffer(i.inputs[0].buffer), self.tensors.buffer(i.out[0].buffer)
        height, width = self.tensors.tiles(source)
        low, row = source.format == "bfloat16", width * tile_bytes(source)
        chain = Chain()
        total = chain.load(Ref(source.name), low)
        for number in range(1, height):
            total = chain.add("ADD", total, chain.load(Ref(source.name, number * row), low))
        chain.store(out.name, chain.add("SUM_ROWS", total), False)
        cores = self.cores.of(self.cores.node(out, i.out[0].start))
        tasks = [_of_chain(core, chain, width, str(i)) for core in cores]
        for task in tasks:
            task.reads.add((source.name, task.core, 0))
            task.writes.add((out.name, task.core, 0))
        return tasks

    # --- the matrix unit ------------------------------------------------------------------------------------

    def _matmul(self, i: Instruction) -> list[Task]:
        a, b = (self.tensors.buffer(slot.buffer) for slot in i.inputs)
        transposed = i.function == "transposed"
        out = self.tensors.buffer(i.out[0].buffer)
        node = self.cores.node(out, i.out[0].start)
        rows, inner = self.tensors.tiles(a)
        _, width = self.tensors.tiles(b)
        _, columns = self.tensors.tiles(out)
        steps = 1 | width << 16 if transposed else width | 1 << 16
        flags = (
            (IN0 if a.format == "bfloat16" else 0)
            | (IN1 if b.format == "bfloat16" else 0)
            | (OUT if out.format == "bfloat16" else 0)
            | (TRANSPOSED if transposed else 0)
        )
        if max(rows, inner, columns) > MOST_TILES:
            raise ValueError(
                f"a product of {rows} x {inner} by {inner} x {columns} tiles has a side of more than "
                f"{MOST_TILES} tiles, {MOST_TILES * TILE:,} units, as far as the fused kernel counts; use "
                "narrower layers, more cores_per_layer, or drop fused=True."
            )
        tasks: list[Task] = []
        for core in self.cores.of(node):
            words = [Ref(out.name), Ref(a.name), Ref(b.name), rows | inner << 8 | columns << 16, steps, flags]
            task = Task(core, "PRODUCT", words, name=str(i), products=rows * inner * columns)
            task.reads |= self._parts(a, node, core) | {(b.name, core, 0)}
            task.writes.add((out.name, core, 0))
            if out.name in self.tensors.fed:
                self._send_down(task, out, node, core)
            tasks.append(task)
        return tasks

    def _parts(self, buffer: CardBuffer, node: int, core: int) -> set[Region]:
        """What a product reads of a buffer: the blocks of all senders where it was sent."""
        senders = self.cores.slices[node - 1] if "^" in buffer.role else 1
        return {(buffer.name, core, sender) for sender in range(senders)}

    def _send_down(self, task: Task, out: CardBuffer, node: int, core: int) -> None:
        """To each core below the columns of its units."""
        landing = self.tensors.landing(out)
        height, width = self.tensors.tiles(replace(landing, positions=1))
        _, columns = self.tensors.tiles(out)
        size, number = tile_bytes(out), core - self.cores.first[node]
        for part, receiver in enumerate(self.cores.of(node - 1)):
            task.moves.append(
                Move(
                    receiver,
                    Ref(out.name, part * width * size),
                    Ref(landing.name, number * height * width * size),
                    height,
                    min(width, columns - part * width) * size,
                    columns * size,
                    width * size,
                    (out.name, core, 0),
                    (landing.name, receiver, number),
                )
            )

    def _transpose(self, i: Instruction) -> list[Task]:
        source, out = self.tensors.buffer(i.inputs[0].buffer), self.tensors.buffer(i.out[0].buffer)
        assert source.format == out.format and "^" in out.role, i
        node = self.cores.node(source, i.inputs[0].start)
        height, width = self.tensors.tiles(source)
        total, _ = self.tensors.tiles(out)
        staging = self.tensors.beside("sending", out, rows=width * TILE)
        size = tile_bytes(out)
        flag = 1 if out.format == "bfloat16" else 0
        tasks: list[Task] = []
        for number, core in enumerate(self.cores.of(node)):
            words = [Ref(staging.name), Ref(source.name), height | width << 8, flag]
            task = Task(core, "TRANSPOSE", words, {(source.name, core, 0)}, {(staging.name, core, 0)})
            task.name = str(i)
            bytes_ = min(width, total - number * width) * height * size
            for receiver in self.cores.of(node + 1):
                target = Ref(out.name, number * width * height * size)
                task.moves.append(
                    Move(
                        receiver,
                        Ref(staging.name),
                        target,
                        1,
                        bytes_,
                        0,
                        0,
                        (staging.name, core, 0),
                        (out.name, receiver, number),
                    )
                )
            tasks.append(task)
        return tasks


def _spread_first(tasks: list[Task]) -> list[Task]:
    """With rows spread before a sweep needs them, where nothing in the section writes them first."""
    written, first, others = set[Region](), list[Task](), list[Task]()
    for task in tasks:
        waits_for_nothing = task.code == "NOTHING" and not task.reads & written
        (first if waits_for_nothing else others).append(task)
        written |= task.writes
    return [*first, *others]


def _without_copies(i: Instruction) -> Instruction:
    """With the weights in the place of their transposed copy, which the kernel does without."""
    if i.op != "matmul" or not i.inputs[1].buffer.startswith(TRANSPOSED_COPY):
        return i
    a, b = i.inputs
    weights = replace(b, buffer=b.buffer.replace(TRANSPOSED_COPY, "operand@"))
    return replace(i, inputs=(a, weights), function="transposed")


def _of_chain(core: int, chain: Chain, tiles: int, name: str) -> Task:
    links = chain.links()
    assert links is not None, name
    words: list[Word] = [tiles, *(word for _, link_words in links for word in link_words), link("STOP")]
    return Task(core, "ELEMENTWISE", words, name=name, links=tuple(kind for kind, _ in links), tiles=tiles)


def _functions(chain: Chain, value: int, functions: Functions) -> int:
    for name, *parameters in functions:
        kind = f"{name}_constant" if name in ("add", "multiply") else str(name)
        value = chain.add(kind.upper(), value, parameters=tuple(map(number_bits, parameters)))
    return value


def _is_for_host(buffer: CardBuffer) -> bool:
    """Whether the host reads or writes a tensor of a program."""
    if buffer.scalar is not None or "^" in buffer.role:
        return False
    if buffer.content != "zeros" or buffer.role in HOST_ROLES:
        return True
    home = buffer.name.partition("@")[2]
    copies = ("operand", "transposed", "changed")
    return home.startswith("sums") or (home.startswith("layers") and buffer.role not in copies)
