"""Tests here run on whatever ttnn opens: a card, or the simulator that TT_METAL_SIMULATOR names.

Where neither is there, they are skipped. Where one is there and does not open, they fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from on_device import marked

from pctt.backends.devices import close_devices, open_device

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow_dispatch = os.environ.get("TT_METAL_SLOW_DISPATCH_MODE") is not None
    second_chip = "blackhole" in os.environ.get("TT_METAL_SIMULATOR", "")
    all_chips = "PCTT_ALL_CHIPS" in os.environ
    for item in marked(items, HERE):
        if second_chip and not all_chips and item.get_closest_marker("one_chip"):
            item.add_marker(
                pytest.mark.skip(reason="runs on a simulated Wormhole; PCTT_ALL_CHIPS=1 runs it here too")
            )
        elif slow_dispatch and item.get_closest_marker("fast_dispatch"):
            item.add_marker(
                pytest.mark.skip(reason="TT_METAL_SLOW_DISPATCH_MODE is set, and traces need fast dispatch")
            )


@pytest.fixture(scope="session", autouse=True)
def device() -> Iterator[Any]:
    """The device, opened once for all tests and closed after the last one."""
    try:
        yield open_device()
    finally:
        close_devices()


@pytest.fixture(scope="session")
def arch(device: Any) -> str:
    """ "wormhole_b0" or "blackhole"."""
    return "blackhole" if "BLACKHOLE" in str(device.arch()) else "wormhole_b0"
