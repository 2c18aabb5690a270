"""What the folders have in common whose tests run on what ttnn opens, tests/device and tests/mesh."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from pctt.backends.devices import mode


def without_ttnn() -> str | None:
    """Why ttnn is not there, or None."""
    if importlib.util.find_spec("ttnn") is not None:
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"ttnn is not installed in this Python {version}; it has wheels for 3.10 and 3.12"


def _absent() -> str | None:
    """What these tests need and this machine or environment has not, or None."""
    if (missing := without_ttnn()) is not None:
        return missing
    if mode() == "mock":
        return "TT_METAL_MOCK_CLUSTER_DESC_PATH is set, and a mock device has no numbers"
    if mode() == "nothing":
        return "no Tenstorrent card in /dev/tenstorrent and no simulator in TT_METAL_SIMULATOR"
    return None


def marked(items: list[pytest.Item], folder: Path) -> list[pytest.Item]:
    """Those of `items` that lie in `folder` and can run; all there are marked, and skipped if none can."""
    absent = _absent()
    here = [item for item in items if folder in item.path.parents]  # the hook is handed every test of the run
    for item in here:
        item.add_marker(pytest.mark.sim if mode() == "simulator" else pytest.mark.card)
        item.add_marker(pytest.mark.xdist_group("device"))  # only one process at a time can open a card
        if absent is not None:
            item.add_marker(pytest.mark.skip(reason=absent))
    return here if absent is None else []
