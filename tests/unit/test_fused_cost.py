"""The cost model of the fused kernel: counts against closed forms, times against bounds and a walk by hand.

A wrong count would make a wrong floor; a walk that lost a wait would promise times that no card can reach.
Whether the counts are those of a card is checked by tools/fused_cost.py --check.
"""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

import pctt
from pctt.placement.chips import chip
from pctt.placement.cost import SFPU_INSTRUCTIONS
from pctt.placement.fused_cost import FusedPlacement, Rates, backprop_sweeps, fused_placement
from pctt.placement.fused_walk import Action, Noc, Overheads, Step, Walk, Words, Work

N150 = chip("n150")
STEPS = 6
CASES = [
    (widths, card, cores)
    for widths in [(64, 32, 32, 32, 32), (128, 64, 128, 256, 64), (96, 160, 70, 10)]
    for card in ("n150", "p150")
    for cores in (1, 2, 4)
]


@cache
def planned(
    widths: tuple[int, ...],
    card: str = "n150",
    cores: int | None = 1,
    batch_size: int = 32,
    factor: float = 1.0,
) -> FusedPlacement:
    """factor: of the assumed overheads."""
    layers = [*[pctt.Dense(units, "tanh") for units in widths[1:-1]], pctt.Dense(widths[-1])]
    net = pctt.chain(input=widths[0], layers=layers)
    inference, overheads = pctt.Inference(num_steps=STEPS, rate=0.1), Overheads().times(factor)
    return fused_placement(net, card, cores, batch_size, inference, pctt.SGD(0.1), overheads=overheads)


def products(plan: FusedPlacement, section: int) -> list[int]:
    return [sum(step.work.products for step in words.compute) for words in plan.sections[section]]


# --- counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("batch_size", [32, 64])
def test_products_of_tiles_are_those_of_the_closed_form(cores: int, batch_size: int) -> None:
    """A layer of a x b tiles takes rows a b products to predict, as many to feed back and for its gradient.
    The first layer, whose source is clamped, predicts once and feeds nothing back; its gradient is taken. The
    gradient of a bias is a product with a row of ones.
    """
    widths = (128, 64, 192, 64)
    plan = planned(widths, cores=cores, batch_size=batch_size)
    layers = [a * b * batch_size // 32**3 for a, b in pairwise(widths)]
    assert sum(products(plan, plan.walk[-1])) == 2 * sum(layers[1:])
    # the anchors, and the first predictions of what moves
    assert sum(products(plan, plan.names["initialise"])) == sum(layers) + sum(layers[1:])
    biases = sum(width * batch_size // 32**2 for width in widths[1:])
    assert sum(products(plan, plan.names["gradients"])) == sum(layers) + biases


@pytest.mark.parametrize(("widths", "card", "cores"), CASES)
def test_what_the_processors_read_is_what_the_tasks_say(
    widths: tuple[int, ...], card: str, cores: int
) -> None:
    """Products, links and bytes: words are read by other rules than those by which they are written."""
    plan = planned(widths, card, cores)
    for section, tasks in enumerate(plan.tasks.sections):
        words = plan.sections[section]
        assert products(plan, section) == [
            sum(task.products for task in tasks if task.core == core) for core in range(plan.cores.total)
        ]
        links = sum(step.work.links for core in words for step in core.compute)
        assert links == sum(len(task.links) * task.tiles for task in tasks)
        moves = [move for task in tasks for move in task.moves]
        sent = sum(a.rows * a.bytes for core in words for a in core.writer)
        assert sent == sum(move.rows * move.bytes for move in moves)


def test_bytes_of_a_step_counted_by_hand() -> None:
    """Three free nodes of one tile, in bfloat16: each sends its change up and is sent its feedback."""
    cost = planned((64, 32, 32, 32, 32)).cost()
    assert cost.step_noc_bytes == 3 * (2048 + 2048)


def test_feedback_of_layers_on_several_cores_is_sent_in_float32_to_each_core_below() -> None:
    """64 units on two cores: either core sends either core below a tile, and its change to either above."""
    cost = planned((64, 64, 64, 64), cores=2).cost()
    free = 2
    assert cost.step_noc_bytes == free * (4 * 4096 + 4 * 2048)


@pytest.mark.parametrize("card", ["n150", "p150"])
def test_more_cores_never_give_one_core_more_products(card: str) -> None:
    plans = [planned((64, 128, 64, 128, 64), card, cores) for cores in (1, 2, 4)]
    for name in plans[0].names:
        most = [max(products(plan, plan.names[name])) for plan in plans]
        assert most == sorted(most, reverse=True), name


# --- the work of an instruction -----------------------------------------------------------------------------


def test_work_of_a_chain_by_hand() -> None:
    """Two tiles of tanh: 32 cycles per instruction and tile, a load of 4096 bytes at 64 a cycle."""
    o = Overheads()
    work = Rates(N150, "HiFi3", o).of_chain(("LOAD", "TANH", "KEEP", "STORE"), 2)
    assert work.vector == 2 * 32 * SFPU_INSTRUCTIONS["tanh"] == 2 * 32 * 91
    assert work.unpack == 2 * 64
    assert work.pack == o.formats + 2 * (o.link + 64)
    assert work.control == o.formats + 2 * (3 * o.link + o.batch)
    assert (work.links, work.batches) == (8, 2)
    # the first tile, then the longer of the two stages, then the last tile is stored
    assert work.alone == work.front / 2 + max(work.front, work.pack) / 2 + work.pack / 2


def test_work_of_a_product_by_hand() -> None:
    """2 x 3 by 3 x 5 tiles, bfloat16 times bfloat16 to float32: 30 products, two groups of columns per row.
    On Wormhole two tiles take 51.2 cycles to load at 80 bytes a cycle, and 48 to multiply at HiFi3.
    """
    o = Overheads()
    words = [0, 0, 0, 2 | 3 << 8 | 5 << 16, 5 | 1 << 16, 3]
    work = Rates(N150, "HiFi3", o).work("PRODUCT", words)
    assert (work.products, work.matrix, work.batches) == (30, 30 * 48, 4)
    assert work.unpack == round(30 * (51.2 - 48))
    assert work.pack == 10 * 4096 // 64 and work.control == o.product + 4 * o.batch
    assert Rates(chip("p150"), "HiFi4", o).work("PRODUCT", words).unpack == 0


# --- the walk -----------------------------------------------------------------------------------------------


def test_a_walk_by_hand() -> None:
    """Core 0 makes a result and sends 64 bytes to core 1, which waits for them.

    Core 0 reads for 60 cycles, works until 160 and has stored at 170; 20 later its writer knows. It gives the
    packet until 230; that leaves in 3 flits and is in core 1, 9 hops away on a NoC that goes left only, after
    10 + 81 cycles, at 324. Its answer is back after 10 + 9, at 343; the writer sees it at 363, gives the
    message until 403, which is there at 403 + 91 + 5 = 499. The reader sees it at 514, the compute kernel at
    534. It works until 634 and has stored at 644, which its unpacker knows at 664; the end, read until 694,
    waits no longer.
    """
    work = Work(matrix=100, pack=10)
    end = Step("END", False, 1, False, Work())
    sender = Words(
        (Step("PRODUCT", False, 0, True, work), end),
        (Action("FINISH"),),
        (
            Action("TAKE", 1),
            Action("MOVE", core=1, rows=1, bytes=64),
            Action("SIGNAL", counter=1, core=1),
            Action("FINISH"),
        ),
    )
    receiver = Words(
        (Step("PRODUCT", True, 0, False, work), end),
        (Action("WAIT", 1, 1), Action("GIVE"), Action("FINISH")),
        (Action("FINISH"),),
    )
    walk = Walk([[sender, receiver]], Noc(N150, 8), Overheads()).run([0])
    assert walk.ends == [694]
    assert walk.waited[1, 0, 0, "go"] == 534 - 60
    assert walk.total >= 694


def test_the_second_of_two_messages_waits_for_the_way_out() -> None:
    """Rows that leave faster than the writer gives them, and slower."""
    noc, o = Noc(N150, 8), Overheads()
    times: list[float] = []
    for size in (64, 8192):
        writer = (Action("TAKE", 1), Action("MOVE", core=1, rows=3, bytes=size), Action("SIGNAL", 0, 1, 1))
        sender = Words(
            (Step("NOTHING", False, 0, True, Work()), Step("END", False, 1, False, Work())), (), writer
        )
        receiver = Words((Step("END", True, 0, False, Work()),), (Action("WAIT", 1, 1), Action("GIVE")), ())
        times.append(Walk([[sender, receiver]], noc, o).run([0]).ends[0])
    assert noc.flits(64) == 3 and noc.flits(8192) == 257
    assert times[1] - times[0] == (3 * 257) - (3 + 2 * o.packet)


def test_places_of_cores_count_on_a_torus_that_goes_one_way() -> None:
    noc = Noc(N150, 8)
    assert noc.hops(1, 0) == 1 and noc.hops(0, 1) == 9
    assert noc.hops(8, 0) == 1 and noc.hops(0, 8) == 11
    assert noc.hops(4, 3) == 2, "a column of DRAM between them"
    assert noc.latency(3, 3) == 10


@pytest.mark.parametrize(("widths", "card", "cores"), CASES)
def test_a_walk_is_no_shorter_than_the_busiest_core_and_no_longer_than_all_work(
    widths: tuple[int, ...], card: str, cores: int
) -> None:
    plan = planned(widths, card, cores)
    for sequence in ([plan.walk[-1]] * 4, plan.sequence):
        walk = plan.run(sequence)
        busiest = max(plan.cycles(sequence))
        floor = plan.floor(sequence) * plan.chip.clock_hz
        assert floor < busiest < walk.ends[-1] < walk.total
        assert walk.ends == sorted(walk.ends)


@pytest.mark.parametrize(("widths", "card", "cores"), CASES)
def test_times_keep_their_order(widths: tuple[int, ...], card: str, cores: int) -> None:
    cost = planned(widths, card, cores).cost()
    assert cost.step_floor < cost.step_vector_floor < cost.step
    assert cost.training_floor < cost.training_vector_floor < cost.training
    assert cost.training > cost.before + STEPS * cost.step + 25e-6
    assert all(0 <= busy < 1 for busy in cost.busy)
    assert sum(cost.shares.values()) == pytest.approx(1) and cost.shares["waiting"] > 0


def test_a_step_takes_the_same_time_each_time_once_it_repeats_itself() -> None:
    plan = planned((64, 64, 128, 64, 64), cores=2)
    ends = plan.run([plan.walk[-1]] * 24).ends
    periods = [b - a for a, b in pairwise(ends[8:])]
    assert max(periods) == pytest.approx(min(periods), rel=0.02)
    assert plan.cost().step == pytest.approx(sum(periods) / len(periods) / N150.clock_hz, rel=0.02)


def test_assumed_overheads_only_add() -> None:
    costs = [planned((64, 128, 128, 64), factor=factor).cost() for factor in (0.0, 0.5, 1.0, 2.0)]
    assert [cost.step for cost in costs] == sorted(cost.step for cost in costs)
    assert costs[0].step_vector_floor == costs[-1].step_vector_floor < costs[0].step


# --- depth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [1, 2])
def test_an_inference_step_takes_the_same_time_at_any_depth_and_backprop_does_not(cores: int) -> None:
    """What local learning promises: layers work at the same time. A sweep passes through them one by one; so
    does the sweep that predictive coding starts from.
    """
    depths = (4, 8, 16)
    plans = [planned((64,) * (depth + 1), cores=cores) for depth in depths]
    steps = [plan.cost().step for plan in plans]
    assert max(steps) == pytest.approx(min(steps), rel=0.05)  # other ways over the NoC
    for sweeps in ([sum(backprop_sweeps(plan)) for plan in plans], [plan.cost().before for plan in plans]):
        per_layer = [
            (b - a) / (m - n) for a, b, n, m in zip(sweeps, sweeps[1:], depths, depths[1:], strict=False)
        ]
        assert per_layer[0] == pytest.approx(per_layer[1], rel=0.1)
        assert sweeps[-1] > 3 * sweeps[0]


# --- limits -------------------------------------------------------------------------------------------------


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="take 80 cores, and the n150 has 64"):
        planned((128,) * 20, cores=4)
    with pytest.raises(ValueError, match=r"[\d,]+ bytes of L1 on each core where there are 1,393,312"):
        planned((2048, 2048, 2048))


def test_as_few_cores_as_memory_allows() -> None:
    wide = planned((512, 512, 512, 10), cores=None)
    most = max(wide.cores.slices)
    assert wide.l1_bytes <= N150.l1_bytes and most > 1
    with pytest.raises(ValueError, match="bytes of L1"):
        planned((512, 512, 512, 10), cores=most - 1)
    assert planned((64, 64, 64), cores=None).cores.slices == (1, 1, 1)


def test_a_chip_twice_as_fast_takes_half_the_time_but_for_the_launch() -> None:
    plan = planned((64, 64, 64))
    fast = replace(plan, chip=replace(N150, clock_hz=2 * N150.clock_hz)).cost()
    slow = plan.cost()
    assert fast.step == pytest.approx(slow.step / 2)
    assert fast.training - 25e-6 == pytest.approx((slow.training - 25e-6) / 2)


def test_a_network_in_which_nothing_moves_has_no_step_to_predict() -> None:
    """One layer, both ends clamped: it is placed, and its cost is refused in a sentence."""
    placed = fused_placement(pctt.chain(32, [pctt.Dense(32)]), "n150", learning=pctt.SGD(0.1))
    assert placed.cores.total == 2 and placed.walk == ()
    with pytest.raises(ValueError, match="no node moves in inference, so there is no step to predict"):
        placed.cost()
