"""What pages of docs/extending have run on a card: kernels that a reader adds, compiled and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from pctt.backends.devices import mode
from tests.docs.test_extending import PAGES, commands, copy_tree, put_in_place, run

WANTED = {page.stem: page for page in PAGES if commands(page, "run with ttnn")}


@pytest.mark.slow
@pytest.mark.one_chip
@pytest.mark.parametrize("page", WANTED)
def test_a_page_followed_literally_runs_on_the_simulator(page: str, tmp_path: Path) -> None:
    """In a copy of the tree, in a process and on a simulator of its own, which a card is not."""
    if mode() != "simulator":
        pytest.skip("the card is open in this process, and a second one cannot open it")
    copy_tree(tmp_path)
    put_in_place(WANTED[page], tmp_path)
    for command in commands(WANTED[page], "run with ttnn"):
        run(command, tmp_path)


def test_the_page_of_kernels_is_among_them() -> None:
    assert set(WANTED) == {"kernel"}
