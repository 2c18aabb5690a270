"""Tests here need ttnn and the mock device of tools/mock_sfpi.py. Each script on it runs in a process of its
own, because ttnn reads its settings at import.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools import mock_sfpi

HERE = Path(__file__).parent
ROOT = Path(mock_sfpi.__file__).parents[1]
TIMEOUT_S = 1200  # networks of many kinds take about a minute a card on an idle machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    reason = f"ttnn is not installed in this Python {version}; it has wheels for 3.10 and 3.12"
    for item in items:
        if HERE in item.path.parents:  # the hook is handed every test of the run
            item.add_marker(pytest.mark.mock)
            item.add_marker(pytest.mark.skipif(importlib.util.find_spec("ttnn") is None, reason=reason))


@dataclass(frozen=True)
class MockCards:
    """folder: of what ttnn reads and leaves."""

    folder: Path

    def run(self, chip: str, *arguments: str) -> str:
        """Runs Python where ttnn sees a mock card; fails unless it ends well. Returns what it prints."""
        # Nothing that a shell has set for a simulator or a card.
        own = {key: value for key, value in os.environ.items() if not key.startswith(("TT_", "TTNN_"))}
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**own, **mock_sfpi.environment(self.folder, chip), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        return result.stdout


@pytest.fixture(scope="module")
def mock_cards(tmp_path_factory: pytest.TempPathFactory) -> MockCards:
    return MockCards(tmp_path_factory.mktemp("mock_sfpi"))
