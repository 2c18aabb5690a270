"""The budget against ttnn's own allocator, on its mock device: every tensor to the byte, circular buffers to
the tile. A budget that promises too little fails in the middle of a run, on the card only.
"""

from typing import Any

import pytest

PRELUDE = """
import sys
import torch
import pctt
from pctt.backends import devices
from pctt.placement.budget import TILE_BYTES, budget, circular_buffers

device = devices.open_device()
import ttnn

widths, rows = WIDTHS, ROWS


def l1():
    return ttnn.device.get_memory_view(device, ttnn.BufferType.L1)


layers = [pctt.Dense(units, "tanh") for units in widths[1:-1]] + [pctt.Dense(widths[-1])]
net = pctt.chain(input=widths[0], layers=layers)
inference = pctt.Inference(num_steps=2, rate=0.1)
empty = l1().total_bytes_allocated_per_bank
engine = pctt.Engine(
    net, pctt.init(net), inference, clamped=("input", net.output), learning=pctt.Adam(1e-3),
    backend="tenstorrent", batch_size=rows,
)
program, backend = engine.program, engine.backend
num_cores = backend.grid[0] * backend.grid[1]
found = budget(program, backend.chip, backend.grid, backend.planned_rows)


def train_one_batch():
    engine.relax({"input": torch.rand(rows, widths[0]), net.output: torch.rand(rows, widths[-1])})
    engine.learn(1e-3, 1)


train_one_batch()
"""

TENSORS = """
for _ in range(3):
    train_one_batch()
    assert l1().total_bytes_allocated_per_bank - empty == found.tensors, (l1(), found.tensors)
    lowest = l1().total_bytes_per_bank - l1().largest_contiguous_bytes_free_per_bank - empty
    assert found.tensors <= lowest <= found.tensors + found.reserved, (lowest, found.tensors, found.reserved)
dram = ttnn.device.get_memory_view(device, ttnn.BufferType.DRAM)
assert dram.total_bytes_allocated_per_bank == 0, dram
"""

# Room is taken away until no more is left than the budget says an operation needs.
CIRCULAR_BUFFERS = """
def filler(size):
    tiles = size // (TILE_BYTES // 2)
    core = ttnn.CoreRangeSet([ttnn.CoreRange(ttnn.CoreCoord(0, 0), ttnn.CoreCoord(0, 0))])
    spec = ttnn.ShardSpec(core, [32, 32 * tiles], ttnn.ShardOrientation.ROW_MAJOR)
    place = ttnn.MemoryConfig(ttnn.TensorMemoryLayout.HEIGHT_SHARDED, ttnn.BufferType.L1, spec)
    return ttnn.empty((1, 1, 32, 32 * tiles), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=device,
                      memory_config=place)


def runs_with(room, call):
    kept = filler(l1().largest_contiguous_bytes_free_per_bank - room)
    try:
        call()
    except RuntimeError as error:
        assert "clash with L1 buffers" in str(error), error
        return False
    return True


tried = set()
for i in dict.fromkeys([*program.training_step(), *program.refresh]):
    if i.op in ("transpose", "row_sums"):  # they allocate their result, from the same room
        continue
    needed = circular_buffers(i, program, num_cores, backend.planned_rows)
    call = backend._bind_one(i, engine._batch.buffers)
    assert runs_with(needed, call), (str(i), needed)
    if i.op == "matmul" and needed:
        assert not runs_with(needed - TILE_BYTES, call), (str(i), needed)
        tried.add("exact")
    elif i.op == "addcmul":
        assert not runs_with(needed - TILE_BYTES, call), (str(i), needed)
        tried.add("exact elementwise")
assert tried == {"exact", "exact elementwise"}, tried
"""


def run_on(mock_cards: Any, chip: str, widths: tuple[int, ...], rows: int, script: str) -> None:
    prelude = PRELUDE.replace("WIDTHS", repr(widths)).replace("ROWS", repr(rows))
    whole = f"{prelude}{script}\nprint('done')\ndevices.close_devices()"
    assert "done" in mock_cards.run(chip, "-c", whole).splitlines()


CASES = [
    pytest.param("n150", (64, 32, 32, 32, 10), 32, id="digits on n150"),
    pytest.param("n150", (784, 256, 256, 10), 64, id="spread layers on n150"),
    pytest.param("n150", (64,) * 11, 32, id="ten layers on n150"),
    pytest.param("p150", (784, 256, 256, 10), 64, id="spread layers on p150"),
]


@pytest.mark.parametrize(("chip", "widths", "rows"), CASES)
def test_the_allocator_reports_the_bytes_of_the_budget(
    mock_cards: Any, chip: str, widths: tuple[int, ...], rows: int
) -> None:
    """After each of three batches, tensors equal; what fragments L1 stays within what is reserved for it."""
    run_on(mock_cards, chip, widths, rows, TENSORS)


@pytest.mark.parametrize(("chip", "widths", "rows"), CASES[:2])
def test_operations_run_in_the_room_that_the_budget_gives_their_circular_buffers(
    mock_cards: Any, chip: str, widths: tuple[int, ...], rows: int
) -> None:
    """Every operation runs with it; products and addcmul are refused with one tile less."""
    run_on(mock_cards, chip, widths, rows, CIRCULAR_BUFFERS)
