"""Tests here run on whatever ttnn opens: a card, or the simulator that TT_METAL_SIMULATOR names.

Where neither is there, they are skipped. Where one is there and does not open, they fail.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pctt.backends.devices import close_devices, mode, open_device

HERE = Path(__file__).parent


def _absent() -> str | None:
    """What these tests need and this machine or environment has not, or None."""
    if importlib.util.find_spec("ttnn") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"ttnn is not installed in this Python {version}; it has wheels for 3.10 and 3.12"
    if mode() == "mock":
        return "TT_METAL_MOCK_CLUSTER_DESC_PATH is set, and a mock device has no numbers"
    if mode() == "nothing":
        return "no Tenstorrent card in /dev/tenstorrent and no simulator in TT_METAL_SIMULATOR"
    return None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = _absent()
    slow_dispatch = os.environ.get("TT_METAL_SLOW_DISPATCH_MODE") is not None
    second_chip = "blackhole" in os.environ.get("TT_METAL_SIMULATOR", "")
    all_chips = "PCTT_ALL_CHIPS" in os.environ
    for item in items:
        if HERE not in item.path.parents:  # the hook is handed every test of the run
            continue
        item.add_marker(pytest.mark.sim if mode() == "simulator" else pytest.mark.card)
        item.add_marker(pytest.mark.xdist_group("device"))  # only one process at a time can open a card
        if absent is not None:
            item.add_marker(pytest.mark.skip(reason=absent))
        elif second_chip and not all_chips and item.get_closest_marker("one_chip"):
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
