"""A long run takes no more of the device's memory, nor of ttnn's program cache, than its first batches did.

ttnn's allocator and cache are real on the mock device; the numbers are not. 10,000 batches were run once by
hand (docs/results/reliability.md); here a few hundred have to show a leak of one buffer, which is at least 32
bytes of every bank.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

SCRIPT = """
import json
import torch
import ttnn
import pctt

def figures(device):
    views = [ttnn.device.get_memory_view(device, kind) for kind in (ttnn.BufferType.L1, ttnn.BufferType.DRAM)]
    taken = [view.total_bytes_allocated_per_bank for view in views]
    return [*taken, *(view.largest_contiguous_bytes_free_per_bank for view in views),
            device.num_program_cache_entries()]

net = pctt.chain(32, [pctt.Dense(32, "tanh"), pctt.Dense(32, "tanh"), pctt.Dense(10)])
engine = pctt.Engine(net, pctt.init(net), pctt.Inference(2, 0.1), ("input", "dense3"),
                     learning=pctt.Adam(1e-3), backend="tenstorrent", batch_size=32, fused=FUSED)
device = engine.backend.device
kept = []
for number in range(1, 301):
    rows = 30 if number % 50 == 0 else 32  # the last batch of an epoch is smaller
    batch = {"input": torch.ones(rows, 32), "dense3": torch.ones(rows, 10) / 10}
    engine.set_learning(1e-3, number)
    engine.relax(batch, learn=FUSED)
    if not FUSED:
        engine.learn(1e-3, number)
    if LEAKS:
        kept.append(ttnn.from_torch(torch.ones(1, 32), device=device, memory_config=ttnn.L1_MEMORY_CONFIG))
    if number in (60, 300):
        print(json.dumps({"after": number, "figures": figures(device)}))
"""


def figures(mock_cards: Any, fused: bool, leaks: bool) -> list[list[int]]:
    printed = mock_cards.run("n150", "-c", f"FUSED, LEAKS = {fused}, {leaks}\n{SCRIPT}")
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"after"')]
    assert [line["after"] for line in lines] == [60, 300]
    return [line["figures"] for line in lines]


@pytest.mark.parametrize("fused", [False, True], ids=["TT-NN", "fused"])
def test_hundreds_of_batches_leave_memory_and_program_cache_as_they_were(
    mock_cards: Any, fused: bool
) -> None:
    early, late = figures(mock_cards, fused, leaks=False)
    assert early[0] > 0 and early[-1] > 0  # something is allocated and compiled, so there is something to see
    assert late == early


def test_a_tensor_that_is_kept_from_every_batch_would_show(mock_cards: Any) -> None:
    """The planted fault: figures that never change show nothing."""
    early, late = figures(mock_cards, fused=False, leaks=True)
    assert late[0] > early[0]
