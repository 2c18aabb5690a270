"""The figures of docs/scaling.md are those that its command prints."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.scaling import TABLES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize("table", TABLES)
def test_the_page_shows_what_the_tool_prints(table: Callable[[], Iterator[str]]) -> None:
    """Every line of every table, in order, as `python tools/scaling.py` has it."""
    assert "\n".join(table()) in PAGE.read_text(encoding="utf-8")
