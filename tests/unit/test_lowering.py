"""The lowering to card operations: how many there are, that each is local, and that data lie where they must.

The oracle is the placement itself: node i and layer i on core i, what a layer reads from below on the layer's
core, and an instruction may touch one layer and the two nodes beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from helpers import HIDDEN_ACTIVATIONS, INFERENCES, LEARNINGS, NETWORKS

from pctt import SGD, Adam, Categorical, Dense, Engine, Inference, Network, chain, graph, init
from pctt.assemble import assemble
from pctt.backends.emulated import FUNCTIONS
from pctt.backends.lowering import TILE, CardBuffer, lower
from pctt.backends.precision import POLICIES, PrecisionPolicy
from pctt.groups import Layout, layout
from pctt.learning.rules import _write
from pctt.placement.budget import card_buffer
from pctt.program import BATCH, Instruction, Program, Slot

ROWS = 64
OPERATIONS = {"matmul", "binary", "addcmul", "unary", "transpose", "row_sums", "fill"}
RUNNABLE = {
    name: net
    for name, net in NETWORKS.items()
    if not any(layer.activation == "softmax" or isinstance(layer.energy, Categorical) for layer in net.layers)
}


def lowered(
    net: Network,
    inference: Inference | None = None,
    learning: Any = None,
    policy: PrecisionPolicy | None = None,
    apart: frozenset[int] = frozenset(),
    placed: tuple[int, ...] = (),
) -> tuple[Program, Layout]:
    where = layout(net, True, TILE, apart)
    inference = inference or Inference(num_steps=20, rate=0.1)
    clamped = (0, len(net.layers))
    program = assemble(where, inference, clamped, placed, learning or SGD(0.1), uniform=True)
    return lower(program, where, policy or PrecisionPolicy()), where


def uniform(
    placement: str, activation: str = "tanh", depth: int = 8, width: int = 64, bias: bool = True
) -> Network:
    return chain(width, [Dense(width, activation, bias, placement)] * depth)


def all_code(program: Program) -> list[Instruction]:
    return list(dict.fromkeys([*program.training_step(), *program.refresh]))


# --- how many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [3, 8, 30])
def test_an_inference_step_of_a_uniform_chain_is_eight_programs(depth: int) -> None:
    """However deep the chain: feedback, gate, sum, state; activation, change, prediction, error. Each program
    more costs every step of every batch a launch.
    """
    program, _ = lowered(uniform("input", depth=depth))
    assert len(program.steps) == 1
    assert [i.op for i in program.step(1)] == [
        *("matmul", "binary", "binary", "addcmul"),
        *("binary", "binary", "matmul", "binary"),
    ]


@pytest.mark.parametrize("activation", HIDDEN_ACTIVATIONS)
def test_no_activation_takes_more_than_four_programs_more(activation: str) -> None:
    """gelu and silu compute their slope from the drive; sigmoid(0) must be cleared from the padding."""
    for placement, tanh in (("input", 8), ("output", 10)):
        for width in (64, 40):
            program, _ = lowered(uniform(placement, activation, width=width))
            assert len(program.step(1)) <= tanh + 4, f"{placement}\n{program}"


def test_momentum_and_fixed_predictions_take_few_programs() -> None:
    momentum = Inference(num_steps=20, rate=0.1, dynamics="momentum", momentum=0.5)
    assert len(lowered(uniform("input"), momentum)[0].step(1)) <= 11
    fixed = Inference(num_steps=20, rate=0.1, prediction="fixed")
    assert len(lowered(uniform("input"), fixed)[0].step(1)) <= 5


def test_a_deeper_chain_takes_no_more_programs_but_where_it_sweeps() -> None:
    """All layers run at once in every section but the first sweep, which goes from layer to layer."""
    short, long = (lowered(uniform("input", depth=depth), learning=Adam())[0] for depth in (4, 16))
    for section in ("measure_initial", "finish", "measure", "update", "refresh"):
        assert len(getattr(short, section)) == len(getattr(long, section)), section
    assert len(short.gradients) == len(long.gradients)
    assert len(long.initialise) > len(short.initialise)


# --- which and where ----------------------------------------------------------------------------------------


def cases() -> list[Any]:
    """Every network with one setting, then every setting, rule and policy with one network."""
    mixed = NETWORKS["two groups"]
    found = [pytest.param(net, {}, id=name) for name, net in RUNNABLE.items()]
    found += [pytest.param(mixed, {"inference": i}, id=name) for name, i in INFERENCES.items()]
    found += [pytest.param(mixed, {"learning": rule}, id=name) for name, rule in LEARNINGS.items()]
    found += [pytest.param(mixed, {"policy": policy}, id=name) for name, policy in POLICIES.items()]
    found += [
        pytest.param(mixed, {"apart": frozenset(apart)}, id=f"apart {apart}")
        for apart in ([1], [2, 3], [8], [3, 5], list(range(1, 9)))
    ]
    found.append(pytest.param(mixed, {"placed": (2,)}, id="placed"))
    return found


@pytest.mark.parametrize(("net", "options"), cases())
def test_every_operation_is_local(net: Network, options: dict[str, Any]) -> None:
    """Entry by entry, an operation touches one layer and the nodes at its two ends: nothing else may be
    needed to run a layer on a core of its own.
    """
    program, where = lowered(net, **options)
    for instruction in all_code(program):
        length = instruction.out[0].stop - instruction.out[0].start
        for entry in range(length):
            layers: set[int] = set()
            nodes: set[int] = set()
            for slot in (*instruction.out, *instruction.inputs):
                assert slot.stop - slot.start in (1, length), instruction
                kind, index = owner(slot, entry if slot.stop - slot.start > 1 else 0, where)
                (layers if kind == "layer" else nodes).add(index)
            layers |= {max(nodes)} if len(nodes) == 2 else set()
            assert len(layers) <= 1 and len(nodes) <= 2, instruction
            for layer in layers:
                assert nodes <= {layer - 1, layer}, instruction


@pytest.mark.parametrize(("net", "options"), cases())
def test_tensors_lie_where_their_layers_are(net: Network, options: dict[str, Any]) -> None:
    """Node i and layer i on core i; what a layer reads of the node below it, one core further up; what
    belongs to a spread layer over all cores. A product never reads across cores.
    """
    program, where = lowered(net, **options)
    for instruction in all_code(program):
        assert instruction.op in OPERATIONS
        assert len(instruction.out) == 1
        for slot in (*instruction.out, *instruction.inputs):
            buffer = card_buffer(program, slot.buffer)
            assert 0 <= slot.start < slot.stop <= buffer.count, instruction
            assert core_of(program, slot, 0) == expected_core(slot, buffer, where), f"{instruction}: {slot}"
        if instruction.op == "matmul":
            cores = {core_of(program, slot, 0) for slot in (*instruction.out, *instruction.inputs)}
            assert len(cores) == 1, instruction


@pytest.mark.parametrize(("net", "options"), cases())
def test_shapes_formats_and_functions_fit(net: Network, options: dict[str, Any]) -> None:
    """In tiles, at 64 rows: sides agree, chains name known functions, and no sum of mixed formats, which the
    matrix unit would cut, is kept in fp32.
    """
    program, _ = lowered(net, **options)
    for instruction in all_code(program):
        out, *inputs = (card_buffer(program, slot.buffer) for slot in (*instruction.out, *instruction.inputs))
        for _, links in instruction.options:
            assert all(name in FUNCTIONS for name, *_ in links), instruction
        shapes = [buffer.tiles(ROWS) for buffer in (out, *inputs)]
        if instruction.op == "matmul":
            (rows, columns), (first, inner), (other, last) = shapes
            assert (rows, columns, inner) == (first, last, other), instruction
        elif instruction.op == "transpose":
            assert shapes[0] == shapes[1][::-1], instruction
        elif instruction.op == "row_sums":
            assert out.rows == 1 and shapes[0] == (1, shapes[1][1]) and out.format == "float32", instruction
        else:
            same = [shape == shapes[0] for shape in shapes[1:]]
            rows = [
                buffer.rows == 1 and shape[1] == shapes[0][1]
                for buffer, shape in zip(inputs, shapes[1:], strict=True)
            ]
            assert all(a or b for a, b in zip(same, rows, strict=True)), instruction
        sums = instruction.op == "binary" and instruction.function in ("add", "subtract")
        if sums and out.format == "float32" and len(inputs) == 2:
            assert len({buffer.format for buffer in inputs}) == 1, instruction
        if instruction.scalar is not None:
            number = card_buffer(program, instruction.scalar)
            assert number.scalar is not None
            if instruction.op == "addcmul":  # TT-NN takes no other
                assert len({buffer.format for buffer in (*inputs, number)}) == 1, instruction


def owner(slot: Slot, entry: int, where: Layout) -> tuple[str, int]:
    """("layer" or "node", index) that an entry of a slot belongs to, from the name of its buffer."""
    home = slot.buffer.partition("@")[2]
    at = slot.start + entry
    if home.startswith("layers"):
        group = int(home.removeprefix("layers"))
        return "layer", where.layers.index((group, at)) + 1
    if home.startswith(("nodes", "sums")):
        stack = int(home.removeprefix("nodes").removeprefix("sums"))
        return "node", where.nodes.index((stack, at))
    return "node", int(home.removeprefix("apart"))


def core_of(program: Program, slot: Slot, entry: int) -> int | None:
    first = card_buffer(program, slot.buffer).first
    return None if first is None else first + slot.start + entry


def expected_core(slot: Slot, buffer: CardBuffer, where: Layout) -> int | None:
    """Where the first entry of a slot must lie; None for all cores."""
    kind, index = owner(slot, 0, where)
    role, _, home = slot.buffer.partition("@")
    last = len(where.net.layers)
    if kind == "layer":
        return None if index in where.apart else index
    if home.startswith("apart"):
        return None
    beside = {layer for layer in (index, index + 1) if 1 <= layer <= last}
    if beside <= where.apart:
        return None
    return index + role.endswith("^")


def test_policies_choose_the_formats() -> None:
    """The field of the policy that names a kind of tensor decides its format, and nothing else."""
    roles = {
        **{"deviation": "states", "step": "states", "anchor": "anchors", "source": "anchors"},
        **{"product": "anchors", "change^": "operands", "error": "operands", "feedback^": "operands"},
        **{"operand": "weights", "transposed": "weights", "weight": "masters", "bias": "masters"},
        **{"weight_gradient": "masters", "weight_first_moment": "masters"},
    }
    for policy in POLICIES.values():
        program, _ = lowered(uniform("input"), learning=Adam(), policy=policy)
        found = {name.partition("@")[0]: card_buffer(program, name).format for name in program.buffers}
        for role, field in roles.items():
            assert found[role] == getattr(policy, field), role


def test_storage_is_whole_tiles() -> None:
    """5-6-6-4 units and 29 samples: a node takes one tile, a bias too."""
    program, _ = lowered(NETWORKS["two groups"])
    for name in program.buffers:
        buffer = card_buffer(program, name)
        if buffer.scalar is None:
            assert buffer.tiles(29) == (1, 1), name
            assert buffer.rows in (BATCH, 1, TILE), name


@dataclass(frozen=True)
class Signs(SGD):
    """A learning rule with an operation that no card backend has."""

    def write(self, at: Any) -> None:
        _write(at, "signs", (), self)


@pytest.mark.parametrize("wired", [False, True])
def test_an_operation_that_lowering_does_not_know_is_refused_by_name(wired: bool) -> None:
    """A rule that somebody adds to the reference alone: no AttributeError, and not taken for a map."""
    layer = Dense(4, "tanh")
    net = graph({"input": 3}, {"y": (layer, "input")}) if wired else chain(3, [layer])
    with pytest.raises(ValueError, match="the operation 'signs' is not run by the card backends"):
        Engine(net, init(net), Inference(1), ("input", net.output), learning=Signs(0.1), backend="emulated")
