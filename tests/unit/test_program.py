"""Programs: merging changes no number, depth costs no instructions, and nothing reaches beyond its
neighbours."""

import re

import pytest
import torch
from helpers import INFERENCES, NETWORKS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pctt import SGD, Adam, Dense, Inference, Network, WarmupCosine, chain
from pctt import assemble as assemble_module
from pctt.assemble import assemble
from pctt.backends import backend
from pctt.backends.reference import OPERATIONS
from pctt.groups import Layout, layout
from pctt.program import (
    BATCH,
    INFERENCE_RATE,
    LEARNING_RATE,
    PER_SAMPLE,
    Buffer,
    Instruction,
    Program,
    Slot,
    coalesce,
)

# --- coalesce -----------------------------------------------------------------------------------------------

COUNT, ROWS, SIZE = 4, 2, 3
NAMES = ("a", "b", "w")  # "w" holds square matrices, the others rows


def test_merging_gives_equal_bits_and_keeps_every_instruction():
    """The anchor of the property below: the plainest chain, where each instruction feeds the next."""
    code = [
        Instruction("add", (Slot("a", i, i + 1),), (Slot("b", i, i + 1), Slot("b", i, i + 1)))
        for i in range(4)
    ]
    assert [str(instruction) for instruction in coalesce(code)] == ["a[0:4] = add(b[0:4], b[0:4])"]


@st.composite
def instructions(draw: st.DrawFn) -> Instruction:
    """One instruction on slots of one entry; sources overlap with targets as often as chance has it."""

    def slot(names: str) -> Slot:
        start = draw(st.integers(0, COUNT - 1))
        return Slot(draw(st.sampled_from(names)), start, start + 1)

    op = draw(st.sampled_from(("fill", "copy", "add", "product", "product_transposed", "outer", "activate")))
    scale, out = draw(st.sampled_from((1.0, -1.0))), slot("ab")
    match op:
        case "fill":
            return Instruction(op, (out,), scale=scale)
        case "copy":
            return Instruction(op, (out,), (slot("ab"),))
        case "activate":
            return Instruction(op, (out,), (slot("ab"),), function="relu")
        case "add":
            return Instruction(op, (out,), (slot("ab"), slot("ab")), scale)
        case "outer":
            a, b = slot("ab"), slot("ab")
            return Instruction(op, (slot("w"),), (a, b), scale)
        case _:
            source = slot("ab")
            while source == out:  # a product may read its target only as the addend
                source = Slot(source.buffer, (source.start + 1) % COUNT, (source.start + 1) % COUNT + 1)
            addend = draw(st.one_of(st.just(()), st.just((out,)), slots_of("ab").map(lambda s: (s,))))
            return Instruction(op, (out,), (source, slot("w"), *addend), scale)


def slots_of(names: str):
    return st.builds(lambda n, i: Slot(n, i, i + 1), st.sampled_from(names), st.integers(0, COUNT - 1))


def runs_of(make):
    """The same instruction on neighbouring slots, as a stack of layers writes them."""

    def shifted(instruction: Instruction, by: int) -> Instruction | None:
        def move(slot: Slot) -> Slot:
            return Slot(slot.buffer, slot.start + by, slot.stop + by)

        slots = (*instruction.out, *instruction.inputs)
        if any(slot.stop + by > COUNT for slot in slots):
            return None
        return Instruction(
            instruction.op,
            tuple(map(move, instruction.out)),
            tuple(map(move, instruction.inputs)),
            instruction.scale,
            function=instruction.function,
        )

    def run(instruction: Instruction, length: int, downwards: bool) -> list[Instruction]:
        found = [i for i in (shifted(instruction, by) for by in range(length)) if i is not None]
        return found[::-1] if downwards else found

    return st.builds(run, make, st.integers(1, COUNT), st.booleans())


@settings(max_examples=300)
@given(
    st.lists(runs_of(instructions()), min_size=1, max_size=7).map(
        lambda runs: [i for run in runs for i in run]
    ),
    st.integers(0, 99),
)
def test_merging_never_changes_a_result(code: list[Instruction], seed: int):
    """Any program, merged and as written, leaves equal bits in every buffer.

    The numbers are small integers, whose sums and products fp64 holds exactly below 2^53 (programs that leave
    that range are passed over), so the order in which a batched product adds makes no difference. A
    dependency overlooked would make training differ between grouped and ungrouped networks by what looks like
    rounding.
    """
    device = backend("reference", torch.float64)
    shapes = {name: Buffer(name, COUNT, SIZE if name == "w" else ROWS, SIZE) for name in NAMES}
    source = torch.Generator().manual_seed(seed)
    start = {
        name: torch.randint(-1, 2, buffer.shape(1), generator=source).double()
        for name, buffer in shapes.items()
    }
    merged = coalesce(code)
    results = []
    for variant in (code, merged):
        buffers = {name: values.clone() for name, values in start.items()}
        device.bind(separate(variant) if variant is code else variant, buffers, {})()
        results.append(buffers)
    assume(all(values.abs().max() < 2.0**53 for values in results[0].values()))
    for name in NAMES:
        assert torch.equal(results[0][name], results[1][name]), "\n".join(map(str, code))
    assert sorted(map(str, separate(merged))) == sorted(map(str, code))


def separate(code) -> list[Instruction]:
    """The instructions on single slots that a merged program stands for."""
    single = []
    for instruction in code:
        for by in range(instruction.out[0].stop - instruction.out[0].start):
            out, inputs = (
                tuple(Slot(slot.buffer, slot.start + by, slot.start + by + 1) for slot in slots)
                for slots in (instruction.out, instruction.inputs)
            )
            single.append(
                Instruction(
                    instruction.op,
                    out,
                    inputs,
                    instruction.scale,
                    instruction.scalar,
                    instruction.function,
                    instruction.options,
                )
            )
    return single


# --- the size of programs -----------------------------------------------------------------------------------


def supervised_program(net: Network, inference: Inference, grouped: bool = True, learning=None) -> Program:
    return assemble(layout(net, grouped), inference, [0, len(net.layers)], [], learning)


@pytest.mark.parametrize("placement", ["output", "input"])
@pytest.mark.parametrize("settings_", ["live", "live, momentum", "fixed"])
def test_a_steady_step_has_as_many_instructions_at_any_depth(placement, settings_):
    """Ten equal layers take the instructions of five: what grouping is for.

    If one kind stopped merging, every number would stay right and each step would cost L calls instead of
    one.
    """
    inference = Inference(60, 0.1, INFERENCES[settings_].prediction, INFERENCES[settings_].dynamics)
    counts = {
        depth: len(
            supervised_program(chain(6, [Dense(6, "tanh", activate=placement)] * depth), inference).steps[-1]
        )
        for depth in (5, 10, 20)
    }
    assert len(set(counts.values())) == 1, counts


def test_ten_equal_layers_take_eight_instructions_a_step():
    """By hand, for activate="output": d -= rate e; gated = f'(.) e; d += rate gated W'; e_1 = d_1 (the input
    is clamped, its prediction stands); z = dW + z0; mu = f(z); mu - p; e = d - that. The error instructions
    of the clamped output are those of its group.
    """
    program = supervised_program(chain(6, [Dense(6, "tanh")] * 10), Inference(20, 0.1))
    assert [instruction.op for instruction in program.steps[-1]] == [
        "add",
        "derivative",
        "product_transposed",
        "copy",
        "product",
        "activate",
        "add",
        "add",
    ]
    products = [i for i in program.steps[-1] if i.op.startswith("product")]
    assert all(i.out[0].stop - i.out[0].start == 9 for i in products)


def test_gradients_and_update_of_a_group_are_one_instruction_each():
    """Layer 1 reads the input, another buffer, so its outer product stands alone; the other nine are one."""
    program = supervised_program(chain(6, [Dense(6, "tanh")] * 10), Inference(20, 0.1), learning=Adam())
    outers = [i for i in program.gradients if i.op == "outer"]
    assert sorted(i.out[0].stop - i.out[0].start for i in outers) == [1, 9]
    assert [(i.op, i.out[0].stop - i.out[0].start) for i in program.update] == [("adam", 10), ("adam", 10)]


def test_early_steps_leave_out_what_no_error_has_reached():
    """E2 as cost: step t of a chain of L layers relaxes the last t hidden nodes, and after L - 1 all."""
    net = chain(6, [Dense(6, "tanh")] * 5)
    program = supervised_program(net, Inference(20, 0.1))
    for number in range(1, 7):
        moved = {
            position
            for instruction in program.step(number)
            for slot in instruction.out
            if slot.buffer.startswith("deviation")
            for position in range(slot.start, slot.stop)
        }
        assert len(moved) == min(number, 4)


# --- flops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
def test_the_flops_of_a_step_are_those_counted_by_hand(grouped):
    """5-4-3 with T = 7 and B = 6, input and output clamped; a product of [B, m] with [m, n] is 2 B m n.

    Initially both products; in each step feedback through W_2 and prediction through W_2 (the clamped input's
    prediction stands); finally the gradients of both. Hence 2 B (32 + 7 * 24 + 32).
    """
    net = chain(5, [Dense(4, "tanh"), Dense(3)])
    program = supervised_program(net, Inference(7, 0.1), grouped, SGD())
    assert program.flops(6) == 2 * 6 * ((20 + 12) + 7 * 2 * 12 + (20 + 12))


@pytest.mark.parametrize("grouped", [True, False])
def test_the_flops_of_equal_layers_are_those_counted_by_hand(grouped):
    """4-4-4-4 with T = 5, merged or not: steps 1, 2, 3.. feed back through layers {3}, {3,2}, {3,2}, .. and
    predict {3}, {3,2}, {3,2}, ..: 2 + 4 * 4 products of 16; 3 initially, 3 for the gradients. Fixed
    predictions leave out the predicting.
    """
    net = chain(4, [Dense(4, "tanh")] * 3)
    live = supervised_program(net, Inference(5, 0.1), grouped)
    assert live.flops(10) == 2 * 10 * 16 * (3 + 2 + 4 * 4 + 3)
    fixed = supervised_program(net, Inference(5, 0.1, "fixed"), grouped)
    assert fixed.flops(10) == 2 * 10 * 16 * (3 + 1 + 4 * 2 + 3)


# --- locality -----------------------------------------------------------------------------------------------


def every_program(monkeypatch, net: Network, inference: Inference) -> tuple[Layout, Program]:
    """The program of training, with one slot per instruction, as layers and dynamics write it."""
    monkeypatch.setattr(assemble_module, "coalesce", tuple)
    where = layout(net)
    learning = SGD(momentum=0.9, clip_norm=1.0, schedule=WarmupCosine())
    return where, assemble(where, inference, [0, len(net.layers)], [], learning)


def place(where: Layout, slot: Slot) -> tuple[str, int]:
    """("node", l), ("layer", l) or ("sum", l) of a slot of one entry, with l counted 0..L or 1..L."""
    assert slot.stop == slot.start + 1
    home = slot.buffer.partition("@")[2]
    if home.isdigit():  # the precision of one node
        return "node", int(home)
    kind, number = re.fullmatch(r"(nodes|sums|layers)(\d+)", home).groups()
    table = where.layers if kind == "layers" else where.nodes
    index = table.index((int(number), slot.start))
    return {"nodes": ("node", index), "sums": ("sum", index), "layers": ("layer", index + 1)}[kind]


@pytest.mark.parametrize("settings_", ["live", "live, momentum", "fixed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_instruction_stays_with_one_layer_and_its_two_nodes(monkeypatch, name, settings_):
    """An instruction on layer l touches nodes l - 1 and l only; one without weights touches a single node.

    This is what "local" means. A program that reads two layers away may train better and is not predictive
    coding, and it could not run with one layer per core.
    """
    net = NETWORKS[name]
    where, program = every_program(monkeypatch, net, INFERENCES[settings_])
    sections = [program.initialise, program.measure_initial, *program.steps, program.finish, program.measure]
    for instruction in [i for s in (*sections, program.gradients, program.update) for i in s]:
        places = [place(where, slot) for slot in (*instruction.out, *instruction.inputs)]
        layers = {index for kind, index in places if kind in ("layer", "sum")}
        nodes = {index for kind, index in places if kind == "node"}
        assert len(layers) <= 1, str(instruction)
        if layers:
            (layer,) = layers
            assert nodes <= {layer - 1, layer}, str(instruction)
        else:
            assert len(nodes) == 1, str(instruction)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_batch_factor_stands_in_the_weight_gradients_and_nowhere_else(monkeypatch, name):
    """Inference descends the batch sum, learning the batch mean: 1/B in every gradient, never in a step.

    In a step it would make the effective inference rate depend on the batch size (E16).
    """
    _, program = every_program(monkeypatch, NETWORKS[name], INFERENCES["live"])
    steps = [program.initialise, program.measure_initial, *program.steps, program.finish, program.measure]
    for instruction in [i for section in steps for i in section]:
        assert instruction.scalar in (None, INFERENCE_RATE)
    for instruction in program.gradients:
        is_gradient = instruction.op in ("outer", "column_sum")
        assert instruction.scalar == (PER_SAMPLE if is_gradient else None), str(instruction)
    assert {i.scalar for i in program.update if i.op != "clip"} == {LEARNING_RATE}


# --- reading a program --------------------------------------------------------------------------------------


def test_a_program_uses_only_operations_there_are_and_buffers_it_declares():
    for net in NETWORKS.values():
        program = supervised_program(net, INFERENCES["live, momentum"], learning=Adam(clip_norm=1.0))
        for instruction in program.training_step():
            assert instruction.op in OPERATIONS
            for slot in (*instruction.out, *instruction.inputs):
                assert 0 <= slot.start < slot.stop <= program.buffers[slot.buffer].count


def test_a_program_prints_one_line_per_instruction():
    """For people; and the only place that shows the factor of an instruction."""
    program = supervised_program(chain(4, [Dense(4, "tanh")] * 3), Inference(5, 0.1), learning=SGD())
    text = str(program)
    sections = [program.initialise, program.measure_initial, *program.steps]
    sections += [program.finish, program.measure, program.gradients, program.update]
    assert len(text.splitlines()) == sum(1 + len(section) for section in sections)
    assert "step 1:" in text and "s=-inference_rate" in text and "activate.tanh" in text


def test_a_buffer_has_one_row_per_sample_or_a_fixed_number():
    assert Buffer("x", 3, BATCH, 5).shape(7) == (3, 7, 5)
    assert Buffer("w", 3, 4, 5).shape(7) == (3, 4, 5)
