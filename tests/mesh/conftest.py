"""Tests here run on two chips or more that ttnn opens as one mesh: of cards, or of a simulator of several.

Where there are not as many they are skipped. Where there are and the mesh does not open, they fail.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pctt.backends.devices import close_devices, load_ttnn, mode, open_device

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
    for item in items:
        if HERE not in item.path.parents:  # the hook is handed every test of the run
            continue
        item.add_marker(pytest.mark.sim if mode() == "simulator" else pytest.mark.card)
        item.add_marker(pytest.mark.xdist_group("device"))  # only one process at a time can open a card
        if absent is not None:
            item.add_marker(pytest.mark.skip(reason=absent))


@pytest.fixture(scope="session", autouse=True)
def device() -> Iterator[Any]:
    """A mesh of two chips, opened once for all tests and closed after the last one."""
    if load_ttnn().get_num_devices() < 2:
        pytest.skip("ttnn sees one chip; a mesh needs two")
    close_devices()  # a single card, of other tests in this process
    try:
        yield open_device("mesh:2")
    finally:
        close_devices()
