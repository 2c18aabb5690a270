"""Tests here need ttnn and the mock device of tools/mock_sfpi.py. Each script on it runs in a process of its
own, because ttnn reads its settings at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from on_device import without_ttnn

from tools import mock_sfpi

HERE = Path(__file__).parent
ROOT = Path(mock_sfpi.__file__).parents[1]
TIMEOUT_S = 1200  # networks of many kinds take about a minute a card on an idle machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = without_ttnn()
    for item in items:
        if HERE in item.path.parents:  # the hook is handed every test of the run
            item.add_marker(pytest.mark.mock)
            item.add_marker(pytest.mark.skipif(missing is not None, reason=str(missing)))


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
