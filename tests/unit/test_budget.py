"""The budget of L1 against what ttnn 0.81.1 was seen to take on its mock device.

tests/mock/test_budget_mock.py asks ttnn itself, where it is installed; the numbers here are what it answered.
"""

import pytest

import pctt
from pctt.placement.budget import circular_buffers, spread_product
from pctt.placement.plan import Plan, plan

FP32, BF16 = 4096, 2048


def planned(*widths: int, batch_size: int = 32, card: str = "n150") -> Plan:
    layers = [*(pctt.Dense(units, "tanh") for units in widths[1:-1]), pctt.Dense(widths[-1])]
    net = pctt.chain(input=widths[0], layers=layers)
    return plan(net, card, batch_size, pctt.Inference(num_steps=2, rate=0.1), pctt.Adam(1e-3))


@pytest.mark.parametrize(
    ("widths", "batch_size", "card", "seen"),
    [
        ((64, 32, 32, 32, 10), 32, "n150", 208_896),
        ((784, 256, 256, 10), 64, "n150", 1_282_048),
        ((784, 256, 256, 10), 64, "p150", 1_245_184),
        ((64,) * 8, 32, "n150", 274_432),
    ],
)
def test_tensors_take_what_the_allocator_reported(
    widths: tuple[int, ...], batch_size: int, card: str, seen: int
) -> None:
    """get_memory_view().total_bytes_allocated_per_bank after a batch."""
    assert planned(*widths, batch_size=batch_size, card=card).budget.tensors == seen


@pytest.mark.parametrize(
    ("tiles", "formats", "seen"),
    [
        ((2, 25, 8), (BF16, BF16, FP32), 20_480),
        ((2, 8, 8), (BF16, BF16, FP32), 57_344),
        ((2, 8, 8), (BF16, BF16, BF16), 61_440),
        ((2, 1, 8), (BF16, BF16, BF16), 18_432),
        ((2, 8, 1), (BF16, BF16, FP32), 36_864),
        ((25, 2, 8), (FP32, BF16, FP32), 73_728),
        ((8, 2, 8), (FP32, BF16, FP32), 102_400),
        ((8, 2, 1), (FP32, BF16, FP32), 16_384),
        ((1, 2, 8), (BF16, BF16, FP32), 12_288),
    ],
)
def test_circular_buffers_of_spread_products_are_those_ttnn_named(
    tiles: tuple[int, int, int], formats: tuple[int, int, int], seen: int
) -> None:
    """rows x depth x columns on 64 cores; from its message, with no room left, where their region ends."""
    assert spread_product(*tiles, num_cores=64).circular_buffers(*formats) == seen


def test_circular_buffers_of_elementwise_operations_are_at_least_those_ttnn_named() -> None:
    """From the same message, for 64-32-32-32-10, and for a spread layer of 784 x 256."""
    resident, spread = planned(64, 32, 32, 32, 10), planned(784, 256, 256, 10, batch_size=64)

    def largest(found: Plan, op: str, *words: str) -> int:
        code = [*found.program.training_step(), *found.program.refresh]
        chosen = [i for i in code if i.op == op and all(word in str(i) for word in words)]
        return max(circular_buffers(i, found.program, 64, found.rows) for i in chosen)

    assert largest(resident, "addcmul") == 32_768
    assert largest(resident, "binary", "add(anchor_drive", "bias") == 32_768
    assert largest(resident, "row_sums") == 20_480
    assert largest(resident, "transpose", "activity") == 16_384
    assert largest(resident, "unary", "sent^") == 16_384
    assert largest(spread, "addcmul") == 32_768
    assert 36_864 <= largest(spread, "binary", "sqrt", "reciprocal") <= 36_864 + FP32
    assert 32_768 <= largest(spread, "binary", "0.999", "square") <= 32_768 + 2 * FP32


def test_partial_sums_need_room_where_the_result_is_not_fp32() -> None:
    """2 x 4 tiles of feedback in bfloat16 at 64 rows: 32,768 bytes seen; of fp32 products none."""
    net = pctt.chain(input=64, layers=[pctt.Dense(128, "tanh"), pctt.Dense(128, "tanh"), pctt.Dense(10)])
    found = plan(net, "n150", 64)
    assert not found.layout.apart
    products = {i.out[0].buffer.partition("@")[0]: i for i in found.program.step(1) if i.op == "matmul"}
    assert circular_buffers(products["feedback^"], found.program, 64, 64) == 32_768
    assert circular_buffers(products["product"], found.program, 64, 64) == 0


def test_a_network_that_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(
        ValueError, match=r"does not fit the n150: .* bytes of L1 on each core where there are"
    ):
        planned(8192, 8192, 8192)


def test_kinds_and_totals_add_up() -> None:
    found = planned(784, 256, 256, 10)
    use = found.floor_plan().cores[0]
    assert use.total_bytes == found.budget.total
    assert found.budget.excess == found.budget.total - 1_393_312
    assert all(bytes > 0 for bytes in use.bytes_by_kind.values())
