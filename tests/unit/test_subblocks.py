"""How a resident product is cut into blocks on a card, which TT-NN refuses where its rules are not kept."""

from __future__ import annotations

import pytest

from pctt.backends.tenstorrent import MOST_FLOAT32_TILES, subblock


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("columns", range(1, 17))
def test_blocks_divide_the_result_fill_the_registers_and_are_rows_or_whole_widths(
    rows: int, columns: int
) -> None:
    height, width = subblock(rows, columns)
    assert rows % height == 0 and columns % width == 0
    assert height * width <= MOST_FLOAT32_TILES
    assert height == 1 or width == columns


def test_a_block_is_as_large_as_may_be() -> None:
    assert subblock(4, 1) == (4, 1)
    assert subblock(2, 2) == (2, 2)
    assert subblock(1, 8) == (1, 4)
    assert subblock(3, 2) == (1, 2)  # three rows of two are six tiles
