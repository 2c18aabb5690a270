"""ttnn on its mock device: a device of the expected size opens, refuses what does not fit, compiles once.

What tools/mock_sfpi.py writes is on trial here, and that ttnn behaves as the Tenstorrent backend counts on.
"""

from typing import Any

import pytest

from tools import mock_sfpi

PRELUDE = """
import ttnn

device = ttnn.open_device(device_id=0)
L1 = ttnn.BufferType.L1


def place(cores, rows, columns, first=0):
    ends = ttnn.CoreCoord(first, 0), ttnn.CoreCoord(first + cores - 1, 0)
    grid = ttnn.CoreRangeSet([ttnn.CoreRange(*ends)])
    spec = ttnn.ShardSpec(grid, [rows, columns], ttnn.ShardOrientation.ROW_MAJOR)
    return ttnn.MemoryConfig(ttnn.TensorMemoryLayout.HEIGHT_SHARDED, L1, spec)


def ones(cores, rows, columns, first=0):
    return ttnn.ones(
        (1, cores, rows, columns), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=device,
        memory_config=place(cores, rows, columns, first),
    )


def free():
    return ttnn.device.get_memory_view(device, L1).largest_contiguous_bytes_free_per_bank


def refused(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("was not refused")

"""
POSTLUDE = """
ttnn.close_device(device)
print("done")
"""


def run_on(mock_cards: Any, chip: str, script: str) -> None:
    """Runs `script` between opening and closing a mock `chip`; fails unless it reaches its end."""
    assert "done" in mock_cards.run(chip, "-c", PRELUDE + script + POSTLUDE).splitlines()


# Grids: all rows or columns of cores that are not switched off, less those that ttnn keeps for dispatch
# (core_descriptors/*.yaml in the wheel). Bytes: L1 less what firmware takes (dev_mem_map.h in the wheel).
@pytest.mark.parametrize(
    ("chip", "arch", "grid", "l1_bytes"),
    [
        ("n150", "WORMHOLE_B0", (8, 8), 1_393_312),
        ("n300", "WORMHOLE_B0", (8, 8), 1_393_312),
        ("p100a", "BLACKHOLE", (11, 10), 1_461_120),
        ("p150", "BLACKHOLE", (11, 10), 1_461_120),
    ],
)
def test_the_device_has_the_grid_and_the_memory_of_the_card(
    mock_cards: Any, chip: str, arch: str, grid: tuple[int, int], l1_bytes: int
) -> None:
    """A descriptor that says something else would let plans pass that do not fit the card."""
    script = f"""
assert device.arch() == ttnn.device.Arch.{arch}, device.arch()
size = device.compute_with_storage_grid_size()
assert (size.x, size.y) == {grid}, size
view = ttnn.device.get_memory_view(device, L1)
assert (view.total_bytes_per_bank, view.num_banks) == ({l1_bytes}, {grid[0] * grid[1]})
"""
    run_on(mock_cards, chip, script)


@pytest.mark.parametrize("chip", ["n150", "p150"])
def test_sharded_operations_build_once_and_stay_in_l1(mock_cards: Any, chip: str) -> None:
    """One layer per core: its shard's bytes on each, the product where its left operand lies, built once.

    The kernels must be the stand-in's: with a real compiler found elsewhere this would pass too, much slower,
    and on this machine only.
    """
    script = """
cores, batch, width = 4, 32, 64
before = free()
activities, weights = ones(cores, batch, width), ones(cores, width, width)
taken = before - free()
assert taken == 2 * (batch * width + width * width), taken

config = ttnn.MatmulMultiCoreReuseProgramConfig(
    compute_with_storage_grid_size=device.compute_with_storage_grid_size(), in0_block_w=width // 32,
    out_subblock_h=1, out_subblock_w=1, per_core_M=batch // 32, per_core_N=width // 32,
)


def step():
    placed = place(cores, batch, width)
    return ttnn.add(activities, ttnn.matmul(activities, weights, program_config=config, memory_config=placed))


known = device.num_program_cache_entries()
result = step()
assert device.num_program_cache_entries() - known == 2, device.num_program_cache_entries()
assert result.memory_config() == place(cores, batch, width), result.memory_config()

device.set_program_cache_misses_allowed(False)
step()
message = refused(lambda: ttnn.tanh(activities))
assert "program cache miss occurred, but cache misses are forbidden" in message, message
assert float(ttnn.to_torch(activities).abs().sum()) == 0, "the mock device keeps numbers now"
"""
    run_on(mock_cards, chip, script)
    kernels = list((mock_cards.folder / "cache" / chip).glob("*/kernels/**/brisc.elf"))
    assert kernels and all(kernel.read_bytes() == mock_sfpi.kernel_elf() for kernel in kernels)


@pytest.mark.parametrize(("chip", "l1_bytes"), [("n150", 1_393_312), ("p150", 1_461_120)])
def test_more_than_l1_is_refused(mock_cards: Any, chip: str, l1_bytes: int) -> None:
    """A 1024x1024 shard of bfloat16 takes 2 MiB of its core, which has less; of 512x512, two fit.

    A third is refused even on the idle core beside: a shard on one core takes its addresses on all of them.
    """
    script = f"""
message = refused(lambda: ones(4, 1024, 1024))
assert "Out of Memory" in message and "bank size is {l1_bytes} B" in message, message
kept = [ones(1, 512, 512), ones(1, 512, 512)]
message = refused(lambda: ones(1, 512, 512, first=1))
assert "Out of Memory" in message, message
"""
    run_on(mock_cards, chip, script)
