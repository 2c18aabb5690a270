"""Meshes of mock chips: opening one; what a training step asks of ttnn there is legal, fits and is compiled
once. Two chips of a Wormhole card, two of a Blackhole card, eight of four cards.
"""

from __future__ import annotations

from typing import Any

import pytest

TRAIN = """
import gc
import torch
import pctt
from pctt.backends.devices import close_devices, open_device
from pctt.placement.budget import budget

chips = CHIPS
device = open_device(f"mesh:{chips}")
import ttnn

assert tuple(device.shape) == (1, chips), device.shape


def l1():
    return ttnn.device.get_memory_view(device, ttnn.BufferType.L1).total_bytes_allocated_per_bank


nets = {
    "chain": pctt.chain(40, [*[pctt.Dense(70, "tanh")] * 3, pctt.Dense(10)]),
    "spread": pctt.chain(64, [pctt.Dense(256, "tanh"), pctt.Dense(1600, "tanh"), pctt.Dense(10)]),
    "graph": pctt.graph(
        {"input": 40}, {"h": (pctt.Dense(70, "tanh"), "input"), "y": (pctt.Dense(10), "h", "input")}
    ),
}
for name, net in nets.items():
    for weights_at in ("end", "every_step"):
        empty = l1()
        settings = pctt.Inference(num_steps=2, rate=0.1, weights_at=weights_at)
        rule = pctt.SGD(0.1, momentum=0.5)
        engine = pctt.Engine(
            net, pctt.init(net), settings, ("input", net.output), learning=rule,
            backend="tenstorrent", device=f"mesh:{chips}", batch_size=40 * chips,
        )
        assert engine.backend.planned_rows == 64 * chips
        size = 40 * chips - 5
        batch = {"input": torch.zeros(size, net.widths[0]), net.output: torch.zeros(size, 10)}
        entries = []
        for step in (1, 2):
            engine.set_learning(0.1, step)
            engine.relax(batch, learn=weights_at == "end")  # the second time compiling is an error
            entries.append(device.num_program_cache_entries())
        assert entries[0] == entries[1], entries
        shapes = {tuple(values.shape) for values in engine.gradients()[net.names[0]].values()}
        assert len(shapes) == 2, shapes
        backend = engine.backend
        planned = budget(engine.program, backend.chip, backend.grid, backend.share(backend.planned_rows))
        used = l1() - empty
        assert planned.tensors <= used <= planned.tensors + planned.reserved, (used, planned)
        extra = used - planned.tensors  # semaphores, which stay for all that exchanges as much
        exchanges = sum(i.op == "all_reduce" for i in dict.fromkeys(engine.program.training_step()))
        each = 128 if "BLACKHOLE" in str(device.arch()) else 64
        assert extra <= each * exchanges and extra % each == 0, (extra, exchanges)
        assert bool(extra) == (weights_at == "end"), extra
        print("ran", name, weights_at, used - planned.tensors)
        del engine, backend
        gc.collect()
close_devices()
print("closed")
"""

FEW = """
import pctt
from pctt.backends.devices import close_devices, open_device

for device in ("mesh:3", "mesh:2", 0):
    try:
        open_device(device)
        print("opened", device)
    except pctt.BackendUnavailable as error:
        print("refused:", error)
close_devices()
open_device(0)
print("opened 0 alone")
close_devices()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "chips"),
    [
        pytest.param("n300", 2, marks=pytest.mark.xdist_group("mock mesh")),
        pytest.param("p300", 2, marks=pytest.mark.xdist_group("mock mesh")),
        pytest.param("t3000", 8, marks=pytest.mark.xdist_group("mock mesh")),
    ],
)
def test_networks_train_on_a_mesh(mock_cards: Any, system: str, chips: int) -> None:
    printed = mock_cards.run(system, "-c", TRAIN.replace("CHIPS", str(chips)))
    assert printed.count("ran ") == 6 and printed.endswith("closed\n"), printed


def test_a_mesh_needs_its_chips_and_the_device_for_itself(mock_cards: Any) -> None:
    printed = mock_cards.run("n300", "-c", FEW)
    assert "refused: ttnn sees 2 chips here, too few for mesh:3" in printed
    assert "opened mesh:2" in printed
    assert "refused: a process has one mesh open, or cards, not both" in printed
    assert "opened 0 alone" in printed
