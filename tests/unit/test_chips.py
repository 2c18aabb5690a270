"""The table of chips: derived figures against published ones, and names that are not there."""

from dataclasses import fields
from typing import Any

import pytest

from pctt.placement.chips import CHIPS, FIDELITY_PHASES, SOURCES, Chip, Fidelity, chip, cores

FIDELITIES: tuple[Fidelity, ...] = ("LoFi", "HiFi2", "HiFi3", "HiFi4")
TABLE_LAST_DIGIT = 1e-3  # the published tables give TFLOP/s to three decimals, cut or rounded


@pytest.mark.parametrize(
    ("fidelity", "teraflops"), [("LoFi", 4.096), ("HiFi2", 2.048), ("HiFi3", 1.366), ("HiFi4", 1.024)]
)
def test_one_core_at_one_gigahertz_multiplies_at_the_published_rate(
    fidelity: Fidelity, teraflops: float
) -> None:
    """Multiply-adds mistaken for FLOPs, or phases left out, would put every time estimate off by a factor."""
    for name in ("n150", "n300"):
        rate = chip(name).matmul_flops_per_second(fidelity) / 1e12
        assert rate == pytest.approx(teraflops, abs=TABLE_LAST_DIGIT)
    for name in ("p100a", "p150"):
        rate = chip(name).matmul_flops_per_second(fidelity) / 1e12
        assert rate == pytest.approx(1.35 * teraflops, abs=1.35 * TABLE_LAST_DIGIT)


@pytest.mark.parametrize(
    ("name", "num_cores", "fidelity", "teraflops"),
    [
        # tt-perf-report's peaks, in whole TFLOP/s. They count all cores of a card (of 64 at LoFi).
        ("n150", 72, "HiFi4", 74),
        ("n150", 64, "LoFi", 262),
        ("p150", 120, "LoFi", 664),
        ("p150", 120, "HiFi2", 332),
        ("p150", 120, "HiFi4", 166),
    ],
)
def test_a_chip_has_the_published_peak(name: str, num_cores: int, fidelity: Fidelity, teraflops: int) -> None:
    assert round(num_cores * chip(name).matmul_flops_per_second(fidelity) / 1e12) == teraflops


def test_a_tile_product_takes_the_cycles_of_tt_metals_utilisation_formula() -> None:
    """16 cycles per phase for 32x32 by 32x32 (GEMM_FLOPS.md), and the same peak as counted in FLOPs."""
    for entry in CHIPS.values():
        cycles = [entry.tile_product_cycles(fidelity) for fidelity in FIDELITIES]
        assert cycles == [16, 32, 48, 64]
        for fidelity, count in zip(FIDELITIES, cycles, strict=True):
            flops = 2 * 32**3 / (count / entry.clock_hz)
            assert entry.matmul_flops_per_second(fidelity) == pytest.approx(flops, rel=1e-14)


def test_the_worked_bound_of_a_wide_layer_comes_out() -> None:
    """Two products of [32, 256] by [256, 256] at HiFi3 on one Wormhole core: 6.1 us of matrix unit; 16 KiB to
    a neighbour: 0.5 us of NoC (both computed by hand from the published rates).
    """
    n150 = chip("n150")
    tiles = 2 * (32 // 32) * (256 // 32) ** 2
    seconds = tiles * n150.tile_product_cycles("HiFi3") / n150.clock_hz
    assert seconds == pytest.approx(6.1e-6, abs=0.05e-6)
    exchange = 32 * 256 * 2 / n150.noc_bytes_per_cycle / n150.clock_hz
    assert exchange == pytest.approx(0.5e-6, abs=0.05e-6)


def test_rates_per_cycle_give_the_published_rates_per_second() -> None:
    """SFPMAD 0.064 TFLOP/s per core at 1 GHz; a NoC link 32 GB/s on Wormhole, 86.4 GB/s on Blackhole."""
    n150, p150 = chip("n150"), chip("p150")
    assert 2 * n150.sfpu_lanes * n150.clock_hz == pytest.approx(0.064e12)
    assert n150.noc_bytes_per_cycle * n150.clock_hz == pytest.approx(32e9)
    assert p150.noc_bytes_per_cycle * p150.clock_hz == pytest.approx(86.4e9)


@pytest.mark.parametrize(
    ("name", "l1", "base"),
    [("n150", 1464, 105_824), ("n300", 1464, 105_824), ("p100a", 1536, 111_744), ("p150", 1536, 111_744)],
)
def test_usable_memory_is_what_the_firmware_leaves_of_the_l1(name: str, l1: int, base: int) -> None:
    """L1 in KiB (dev_mem_map.h) less the allocator's base address, as ttnn reports it."""
    assert chip(name).l1_bytes == l1 * 1024 - base


def test_grids_are_those_that_ttnn_opens() -> None:
    """Cores of the card less those for dispatch: a row on Wormhole, a column on Blackhole."""
    assert {name: entry.grid for name, entry in CHIPS.items()} == {
        "n150": (8, 72 // 8 - 1),
        "n300": (8, 64 // 8 - 1),  # a row dispatches, as on an n150
        "p100a": (120 // 10 - 1, 10),
        "p150": (120 // 10 - 1, 10),
    }
    other = {name: [variant.grid for variant in entry.harvested] for name, entry in CHIPS.items()}
    assert (8, 64 // 8) in other["n300"]  # when its Ethernet cores dispatch
    assert other["p150"] == [(140 // 10 - 1, 10)]
    for entry in CHIPS.values():
        assert entry.grid not in other[entry.name]
        assert all(variant.when for variant in entry.harvested)


def test_results_in_fp32_avoid_the_fidelity_at_which_wormhole_errs() -> None:
    expected = {"wormhole_b0": "HiFi3", "blackhole": "HiFi4"}
    for entry in CHIPS.values():
        assert entry.fp32_fidelity == expected[entry.arch]


def test_overheads_lie_in_their_range_and_a_trace_is_faster() -> None:
    for entry in CHIPS.values():
        low, high = entry.traced_gap_range
        assert (low, high) == (3e-6, 6e-6)
        assert low <= entry.traced_gap_seconds <= high < entry.eager_launch_seconds == 25e-6


def test_every_figure_has_a_source() -> None:
    named = {"name", "arch"}
    assert set(SOURCES) == {field.name for field in fields(Chip)} - named
    assert all(SOURCES.values())


def test_cores_are_listed_row_by_row() -> None:
    assert cores((3, 2)) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert cores((1, 2)) == [(0, 0), (0, 1)]


@pytest.mark.parametrize("grid", [(0, 2), (2, 0), (2, -1), (2.0, 2), (True, 2)])
def test_a_grid_without_cores_is_refused(grid: Any) -> None:
    with pytest.raises(ValueError, match=r"(columns|rows) must be a whole number of at least 1, got"):
        cores(grid)


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"chip must be one of n150, .*p150.*, got 'n151'"):
        chip("n151")
    assert set(FIDELITY_PHASES) == set(FIDELITIES)
    for rate in (chip("n150").matmul_flops_per_second, chip("n150").tile_product_cycles):
        with pytest.raises(
            ValueError, match="fidelity must be one of LoFi, HiFi2, HiFi3, HiFi4, got 'HiFi5'"
        ):
            rate("HiFi5")  # pyright: ignore[reportArgumentType]
