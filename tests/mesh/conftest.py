"""Tests here run on two chips or more that ttnn opens as one mesh: of cards, or of a simulator of several.

Where there are not as many they are skipped. Where there are and the mesh does not open, they fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from on_device import marked

from pctt.backends.devices import close_devices, load_ttnn, open_device

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked(items, HERE)


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
