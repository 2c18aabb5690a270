"""The cost model: counts against counts by hand, times against chips on which only one thing takes time."""

from dataclasses import replace

import pytest

import pctt
from pctt.assemble import assemble
from pctt.groups import layout
from pctt.placement.budget import card_buffer
from pctt.placement.chips import Chip, chip
from pctt.placement.cost import CostModel
from pctt.placement.plan import Plan, plan

N150 = chip("n150")
FREE = {"sfpu_lanes": 10**12, "noc_bytes_per_cycle": 10**12}  # units that take no time
STEP = "inference step"


def chain(*widths: int, activation: str = "tanh", bias: bool = False) -> pctt.Network:
    hidden = [pctt.Dense(units, activation, bias=bias) for units in widths[1:-1]]
    return pctt.chain(input=widths[0], layers=[*hidden, pctt.Dense(widths[-1], bias=bias)])


def planned(net: pctt.Network, card: str | Chip = "n150", batch_size: int = 32) -> Plan:
    return plan(net, card, batch_size, pctt.Inference(num_steps=5, rate=0.1), pctt.SGD(0.1))


@pytest.mark.parametrize("widths", [(64, 32, 32, 32, 32), (256, 512, 512, 32)])
def test_flops_are_those_of_the_program_before_lowering(widths: tuple[int, ...]) -> None:
    """Lowering moves and merges products but neither adds nor drops one. Whole tiles, so no padding counts;
    no bias, whose gradient is a product on the card only. In one case all layers are resident, in the other
    some are spread.
    """
    net = chain(*widths)
    found = planned(net)
    assert bool(found.layout.apart) == (512 in widths)
    last = len(widths) - 1
    program = assemble(layout(net), found.inference, (0, last), (), pctt.SGD(0.1), uniform=True)
    assert found.costs["training step"].flops == program.flops(32)


def test_noc_bytes_of_a_step_are_those_of_what_changes_cores() -> None:
    """Three free nodes of one tile, counted by hand: fp32 tiles of 4096 bytes, bfloat16 of 2048.

    step = feedback^ - error: 3 cores, in 2 x 2048, out 4096; deviation += rate step, whose tiles TT-NN deals
    out: in 2 x 4096, out 4096 and the rate, a tile; sent^ = deviation: in 4096, out 2048. All else is in
    place.
    """
    cost = planned(chain(64, 32, 32, 32, 32)).costs[STEP]
    assert cost.noc_bytes == 3 * ((2 * 2048 + 4096) + (2 * 4096 + 4096 + 4096) + (4096 + 2048))


def test_adding_a_bias_moves_its_operands() -> None:
    """TT-NN deals out the tiles of an operation that broadcasts a row; without a bias all stays in place."""
    found = planned(chain(64, 32, 32, 32, 10, bias=True))
    model = CostModel(found.program, found.budget, N150, 64, 32, "HiFi3")
    adds = [i for i in found.program.initialise if i.inputs and i.inputs[-1].buffer.startswith("bias")]
    assert [model.operation(i).noc_bytes for i in adds] == [3 * 4096] * 4


def test_a_spread_product_sends_one_operand_to_every_core_that_shares_it() -> None:
    """64 x 784 by 784 x 256: 2 x 25 by 25 x 8 tiles, a column each for 8 of 64 cores. Each gets all 50 tiles
    of the activities and its 25 of the weights, in bfloat16, and gives 2 tiles of fp32.
    """
    found = planned(chain(784, 256, 256, 10), batch_size=64)
    model = CostModel(found.program, found.budget, N150, 64, 64, "HiFi3")
    product = next(i for i in found.program.initialise if i.op == "matmul")
    cost = model.operation(product)
    assert cost.noc_bytes == 8 * 50 * 2048 + 8 * 25 * 2048 + 8 * 2 * 4096
    assert cost.flops == 2 * 64 * 800 * 256
    # 75 tiles at 32 bytes a cycle beside 50 tile products of 48 cycles, at 1 GHz
    assert cost.bound == "NoC" and cost.floor == pytest.approx(75 * 2048 / 32 * 1e-9)
    alone = CostModel(found.program, found.budget, replace(N150, **FREE), 64, 64, "HiFi3").operation(product)
    assert alone.bound == "FPU" and alone.floor == pytest.approx(50 * 48 * 1e-9)


def test_vector_operations_follow_the_chains_of_functions() -> None:
    """relu for tanh on two free nodes of one tile: 87 instructions less in its activation, 2 less in its
    derivative, on each of 1024 elements.
    """
    tanh = planned(chain(64, 32, 32, 32, 32)).costs[STEP]
    relu = planned(chain(64, 32, 32, 32, 32, activation="relu")).costs[STEP]
    assert tanh.programs == relu.programs == 10
    assert tanh.sfpu_operations - relu.sfpu_operations == 2 * 1024 * ((91 - 4) + (5 + 5 - 8))


def test_layers_of_a_stack_work_at_the_same_time() -> None:
    """Twice as many layers cost the same time and more work, and no more operations."""
    few, many = (planned(chain(*[32] * nodes)).costs[STEP] for nodes in (5, 8))
    assert (few.programs, few.traced, few.floor) == (many.programs, many.traced, many.floor)
    assert many.flops > few.flops and many.noc_bytes > few.noc_bytes


def test_the_matrix_unit_alone_takes_its_cycles() -> None:
    """Three products of one tile at HiFi3, 3 x 16 cycles each; of 1024 elements at 128 a cycle and phase one
    multiplication, fp32 by bfloat16, and one subtraction, of bfloat16, which has one phase.
    """
    cost = planned(chain(64, 32, 32, 32, 32), replace(N150, **FREE)).costs[STEP]
    assert cost.bound == "FPU"
    assert cost.floor == pytest.approx((3 * 48 + (3 + 1) * 1024 / 128) * 1e-9)


def test_eager_and_traced_times_add_what_lies_between_the_operations() -> None:
    net = chain(64, 32, 32, 32, 32)
    cost = planned(net).costs["training step"]
    assert cost.traced == pytest.approx(cost.floor + cost.programs * 4e-6)
    assert cost.eager == pytest.approx(cost.programs * 25e-6), "no operation here takes as long as a launch"
    slow = planned(net, replace(N150, clock_hz=1e3)).costs["training step"]
    assert slow.eager == pytest.approx(slow.floor), "the host is ahead of operations that take seconds"
    assert dict(cost.bound_by).keys() <= {"FPU", "SFPU", "NoC"}
    assert sum(seconds for _, seconds in cost.bound_by) == pytest.approx(cost.floor)


def test_a_training_step_is_its_sections() -> None:
    costs = dict(planned(chain(64, 32, 32, 32, 10, bias=True)).costs)
    whole, step = costs.pop("training step"), costs.pop(STEP)
    for name in ("programs", "flops", "sfpu_operations", "noc_bytes"):
        rest = sum(getattr(cost, name) for cost in costs.values())
        assert getattr(whole, name) == rest + 5 * getattr(step, name)


def test_only_tensors_outside_l1_cost_dram_bytes() -> None:
    """Every tensor of a plan has its place in the budget of L1. Take one out, and what reads it counts."""
    found = planned(chain(64, 32, 32, 32, 32))
    assert all(cost.dram_bytes == 0 for cost in found.costs.values())
    entries = tuple(entry for entry in found.budget.entries if entry.buffer.name != "operand@layers1")
    model = CostModel(found.program, replace(found.budget, entries=entries), N150, 64, 32, "HiFi3")
    product = found.program.step(1)[6]
    assert product.inputs[1].buffer == "operand@layers1"
    assert card_buffer(found.program, "operand@layers1").format == "bfloat16"
    assert model.total(found.program.step(1)).dram_bytes == 3 * 2048
