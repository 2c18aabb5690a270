"""Two chips as one, on what ttnn opens, beside the emulation of two chips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pctt import SGD, Dense, Engine, Inference, chain, init
from pctt.backends.emulated import Emulated
from pctt.backends.lowering import CardBuffer
from pctt.backends.tenstorrent import Tenstorrent
from pctt.program import BATCH, Instruction, Slot

NET = chain(20, [*[Dense(40, "tanh")] * 2, Dense(10)])
SAMPLES = 40  # 32 samples on the first chip, 8 on the second

BUFFERS = {
    # Of an entry per core from the fifth on; a row per layer; tiles spread over all cores.
    "on cores": CardBuffer("weight_gradient@layers1", 3, 64, 96, first=5),
    "rows": CardBuffer("bias_gradient@layers1", 3, 1, 96, first=5),
    "spread": CardBuffer("weight_gradient@layers2", 1, 64, 96, first=None),
    "bfloat16": CardBuffer("weight_gradient@layers3", 2, 64, 32, "bfloat16", 0),
}


@pytest.fixture(scope="module")
def card() -> Tenstorrent:
    return Tenstorrent(torch.float32, "mesh:2")


def chips_of(handle: Any) -> list[Tensor]:
    """What each chip holds."""
    import ttnn  # pyright: ignore[reportMissingImports]

    return [ttnn.to_torch(own)[0].float() for own in ttnn.get_device_tensors(handle.tensor)]


@pytest.mark.parametrize("name", BUFFERS)
def test_the_sum_over_chips_is_the_emulated_one_to_the_bit(card: Tenstorrent, name: str) -> None:
    """Of different numbers on each chip, which a tensor split over the chips brings there."""
    buffer = BUFFERS[name]
    parted = CardBuffer("parted@nodes0", buffer.count, BATCH, buffer.columns, buffer.format, buffer.first)
    emulation = Emulated(torch.float32, f"{card.chip.name}:2")
    rows = 64 if buffer.rows != 1 else 32
    values = torch.randn(buffer.count, 2 * rows, buffer.columns)
    found: list[Tensor] = []
    for backend in (card, emulation):
        backend.planned_rows = 2 * rows
        backend._buffers = {entry.name: entry for entry in (buffer, parted)}
        handles: dict[str, Any] = {b.name: backend.allocate(b, 2 * rows) for b in (buffer, parted)}
        for entry in range(buffer.count):
            backend.write(handles[parted.name], Slot(parted.name, entry, entry + 1), values[entry])
        out, source = (Slot(b.name, 0, buffer.count) for b in (buffer, parted))
        options = (("chips", 2),)
        if buffer.rows == 1:  # of each chip the first row
            source = out
            chips = torch.stack(values.split(rows, 1))
            parts = [chips[0, :, :1], chips[1, :, :1]]
            _put_rows(backend, handles[buffer.name], parts)
        backend.bind([Instruction("all_reduce", (out,), (source,), options=options)], handles, {})()
        whole = backend.get(handles[buffer.name], 0, buffer.count)
        first, second = whole.chunk(2, 1)
        assert torch.equal(first, second), "the chips differ"
        found.append(first[:, : buffer.rows])
    assert torch.equal(*found)
    assert found[0].abs().max() > 1.0


def _put_rows(backend: Any, handle: Any, parts: list[Tensor]) -> None:
    """Other rows on each chip, where the host would write the same."""
    if isinstance(backend, Emulated):
        for own, part in zip(handle, parts, strict=True):
            own[:, :1] = part
        return
    ttnn = backend.ttnn
    whole = torch.cat([torch.zeros(2, handle.buffer.first, 1, 96), torch.stack(parts)], 1)
    host = ttnn.from_torch(
        whole,
        dtype=ttnn.float32,
        layout=ttnn.TILE_LAYOUT,
        mesh_mapper=ttnn.ShardTensorToMesh(backend.device, dim=0),
    )
    ttnn.copy_host_to_device_tensor(host, handle.tensor)


@pytest.mark.parametrize("weights_at", ["end", "every_step"])
def test_a_mesh_trains_as_its_emulation(card: Tenstorrent, weights_at: str) -> None:
    """Three learning steps, the third of which replays a trace where dispatch is fast. A chip rounds the
    terms of a product once more than its emulation; a share that is left out is 20% of a change or more.
    """
    weights, rule = init(NET), SGD(0.1, momentum=0.5)
    settings = Inference(num_steps=2, rate=0.1, weights_at=weights_at)
    moved, energies = [], []
    for backend, device in (("tenstorrent", "mesh:2"), ("emulated", f"{card.chip.name}:2")):
        source = torch.Generator().manual_seed(3)
        engine = Engine(
            NET,
            weights,
            settings,
            ("input", NET.output),
            learning=rule,
            backend=backend,
            device=device,
            batch_size=SAMPLES,
        )
        for step in (1, 2, 3):
            batch = {
                "input": torch.randn(SAMPLES, 20, generator=source),
                NET.output: torch.randn(SAMPLES, 10, generator=source),
            }
            engine.set_learning(rule.rate, step)
            energies.append(sum(engine.relax(batch, learn=weights_at == "end").energies))
        assert torch.equal(engine.read_activity("input"), batch["input"])
        after = engine.weights()
        moved.append({k: after[k]["weight"] - weights[k]["weight"] for k in NET.names})
        if backend == "tenstorrent":
            for name, handle in engine._persistent.items():
                if "@layers" in name:
                    first, second = chips_of(handle)
                    assert torch.equal(first, second), name
    assert energies[:3] == pytest.approx(energies[3:], rel=2.0**-8)
    for name in NET.names:
        ours, theirs = (tree[name] for tree in moved)
        assert (ours - theirs).norm() <= 2.0**-6 * theirs.norm(), name


# --- traps of ttnn ------------------------------------------------------------------------------------------


def test_all_reduce_of_ttnn_is_not_what_it_says(card: Tenstorrent) -> None:
    """Why `all_reduce` here is an exchange and additions. If this fails, ttnn has mended it."""
    ttnn, device = card.ttnn, card.device
    values = torch.randn(2, 1, 64, 96)
    whole = values.sum(0, keepdim=True)
    spread = ttnn.from_torch(
        values,
        dtype=ttnn.float32,
        layout=ttnn.TILE_LAYOUT,
        device=device,
        memory_config=ttnn.L1_MEMORY_CONFIG,
        mesh_mapper=ttnn.ShardTensorToMesh(device, dim=0),
    )
    ttnn.synchronize_device(device)
    found = ttnn.to_torch(ttnn.get_device_tensors(ttnn.all_reduce(spread))[0])
    error = (found - whole).abs().max()
    assert 2.0**-13 < error < 2.0**-6, "fp32 numbers are cut to TF32"
