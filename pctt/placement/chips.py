"""The chips that a plan can be made for: grids, memory and speeds, as numbers with their sources.

Nothing here opens a device. A plan for a card that is there should still ask it for its grid, because
firmware, harvesting and dispatch settings change it; `Chip.harvested` lists the changes that are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pctt._checks import require_count, require_one_of

Grid: TypeAlias = "tuple[int, int]"
Fidelity: TypeAlias = Literal["LoFi", "HiFi2", "HiFi3", "HiFi4"]

# The matrix unit multiplies 5 by 7 bits of mantissa, hidden bits included, at a time; each phase adds another
# part of the product (tt-isa-documentation SrcASrcB.md).
FIDELITY_PHASES: Mapping[str, int] = {"LoFi": 1, "HiFi2": 2, "HiFi3": 3, "HiFi4": 4}
TILE = 32  # rows and columns of the tile that all units work on


@dataclass(frozen=True)
class Variant:
    """grid: (columns, rows) that the same chip reports in another setting.
    when: that setting, in words."""

    grid: Grid
    when: str


@dataclass(frozen=True)
class Chip:
    """One chip as ttnn 0.81.1 opens it. `SOURCES` says where each figure comes from.

    name: of the card; an n300 has two of these chips, of which this is one.
    arch: as ttnn spells it.
    grid: (columns, rows) of cores that a program may use, by default.
    harvested: other grids of this chip, and when it reports them.
    l1_bytes: L1 per core that buffers and circular buffers share, with l1_small_size 0.
    clock_hz: of the cores and the NoC, at full speed.
    multiply_adds_per_cycle: of one core's FPU (matrix unit) at LoFi.
    sfpu_lanes: elements that one core's SFPU (vector unit) works on per cycle.
    noc_bytes_per_cycle: through one link of one NoC in its one direction; there are two NoCs.
    noc_hop_cycles: from one router to the next.
    noc_end_cycles: from the sending core into its router and from the last router into the receiving core.
    dram_bytes_per_second: of all channels together, at best.
    eager_launch_seconds: host time per operation that is launched one by one.
    traced_gap_seconds: time between two operations of a replayed trace.
    traced_gap_range: (low, high) of what was seen for it, in seconds.
    fp32_fidelity: math fidelity to use when results accumulate in fp32.
    """

    name: str
    arch: Literal["wormhole_b0", "blackhole"]
    grid: Grid
    harvested: tuple[Variant, ...]
    l1_bytes: int
    clock_hz: float
    multiply_adds_per_cycle: int
    sfpu_lanes: int
    noc_bytes_per_cycle: int
    noc_hop_cycles: int
    noc_end_cycles: int
    dram_bytes_per_second: float
    eager_launch_seconds: float
    traced_gap_seconds: float
    traced_gap_range: tuple[float, float]
    fp32_fidelity: Fidelity

    def tile_product_cycles(self, fidelity: Fidelity) -> int:
        """Cycles of one core for the product of two 32x32 tiles: 16 per phase.

        Raises:
            ValueError: there is no such fidelity.
        """
        return TILE**3 // self.multiply_adds_per_cycle * _phases(fidelity)

    def matmul_flops_per_second(self, fidelity: Fidelity) -> float:
        """Peak of one core in FLOP/s, a multiply and an add counted as two.

        Raises:
            ValueError: there is no such fidelity.
        """
        return 2 * self.multiply_adds_per_cycle * self.clock_hz / _phases(fidelity)


# By field. "mock" is ttnn 0.81.1 with TT_METAL_MOCK_CLUSTER_DESC_PATH set to tt-umd's example description of
# the card, asked on 2026-11-24; no card was at hand. Speeds are the makers' or other people's measurements.
SOURCES: Mapping[str, str] = {
    "grid": "mock: compute_with_storage_grid_size() after open_device(device_id=0). An n150's 72 cores less "
    "a row for dispatch; an n300 chip's 64 likewise, opened with dispatch type WORKER as the backend does; a "
    "Blackhole's 120 less a column",
    "harvested": "mock, with the settings named; core_descriptors/*.yaml in the ttnn wheel; firmware: "
    "release notes of tt-system-firmware 19.5.0, tt-metal issue 47014",
    "l1_bytes": "mock: get_memory_view(device, BufferType.L1).total_bytes_per_bank",
    "clock_hz": "specifications of the cards; Blackhole is 'up to'",
    "multiply_adds_per_cycle": "8x16 by 16x16 per cycle: tt-metal tech_reports/matrix_engine/"
    "matrix_engine.md, tt-isa-documentation MatrixUnit.md",
    "sfpu_lanes": "tt-isa-documentation MatrixUnit.md: SFPMAD is 0.064 TFLOP/s at 1 GHz, two per lane",
    "noc_bytes_per_cycle": "a flit per cycle: tt-isa-documentation WormholeB0 and BlackholeA0 NoC/README.md",
    "noc_hop_cycles": "the same pages, Performance",
    "noc_end_cycles": "the same pages: about 5 cycles at either end",
    "dram_bytes_per_second": "specifications of the cards; 267 of 288 GB/s reached on Wormhole, tt-metal "
    "tech_reports/Saturating_DRAM_bandwidth",
    "eager_launch_seconds": "25.9 to 27.5 us for cached operations on Wormhole, tt-metal pull request 50488; "
    "depends on the host, not on the chip",
    "traced_gap_seconds": "floor of about 4000 cycles in a traced model, tt-metal issue 12074",
    "traced_gap_range": "3000 to 6000 cycles, tt-metal issue 12074; on Wormhole, taken over for Blackhole",
    "fp32_fidelity": "Wormhole: at HiFi4 with fp32 accumulation a hardware bug puts rare results off by a "
    "power of two (docstring of ttnn.matmul; met once on the simulator, right at HiFi3), and HiFi3 is exact "
    "for bfloat16 too. Blackhole has no such bug",
}

_N150 = Chip(
    name="n150",
    arch="wormhole_b0",
    grid=(8, 8),
    harvested=(
        Variant((7, 9), "dispatch axis COL"),
        Variant((8, 9), "slow dispatch (TT_METAL_SLOW_DISPATCH_MODE=1), as on the simulator"),
    ),
    l1_bytes=1_393_312,
    clock_hz=1.0e9,
    multiply_adds_per_cycle=8 * 16 * 16,
    sfpu_lanes=32,
    noc_bytes_per_cycle=32,
    noc_hop_cycles=9,
    noc_end_cycles=5 + 5,
    dram_bytes_per_second=288e9,
    eager_launch_seconds=25e-6,
    traced_gap_seconds=4e-6,
    traced_gap_range=(3e-6, 6e-6),
    fp32_fidelity="HiFi3",
)
_N300 = replace(
    _N150,
    name="n300",
    grid=(8, 7),
    harvested=(
        Variant((8, 8), "dispatch type ETH, ttnn's default, where elementwise operations fail"),
        Variant((7, 8), "dispatch axis COL"),
    ),
)
_P150 = replace(
    _N150,
    name="p150",
    arch="blackhole",
    grid=(11, 10),
    harvested=(Variant((13, 10), "firmware before 19.5.0, which has all 140 cores"),),
    l1_bytes=1_461_120,
    clock_hz=1.35e9,
    noc_bytes_per_cycle=64,
    dram_bytes_per_second=512e9,
    fp32_fidelity="HiFi4",
)
_P100A = replace(_P150, name="p100a", harvested=(), dram_bytes_per_second=448e9)

CHIPS: Mapping[str, Chip] = {entry.name: entry for entry in (_N150, _N300, _P100A, _P150)}


def chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
        ValueError: there is none; the message lists those that there are.

    Example:
        >>> chip("n150").tile_product_cycles("HiFi3")
        48
    """
    require_one_of("chip", name, tuple(CHIPS))
    return CHIPS[name]


def cores(grid: Grid) -> list[tuple[int, int]]:
    """Logical coordinates (x, y) of every core of a grid (columns, rows), row by row, x fastest.

    This is the order in which ttnn lays the shards of a ROW_MAJOR tensor on a full rectangle.

    Raises:
        ValueError: a side is not a whole number of at least 1.
    """
    columns, rows = grid
    require_count("columns", columns, least=1)
    require_count("rows", rows, least=1)
    return [(x, y) for y in range(rows) for x in range(columns)]


def _phases(fidelity: str) -> int:
    require_one_of("fidelity", fidelity, tuple(FIDELITY_PHASES))
    return FIDELITY_PHASES[fidelity]
