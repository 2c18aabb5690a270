"""The fused kernel on mock cards: every launch is legal, L1 is taken as predicted to the byte, and one set of
kernels and programs serves all that follows.
"""

from typing import Any

import pytest

from pctt import Adam, AdamW, Inference
from tests.device.test_fused import CASES, Case, dense

BROAD = Case(dense((784, 512, 512, 10), "tanh"), Inference(8, 0.1), Adam(0.001), 32, None)
"""Its layers need several cores each for L1."""

NETWORKS = {
    **CASES,
    "784-256-256-10": Case(dense((784, 256, 256, 10), "tanh"), Inference(8, 0.1), Adam(0.001), 64, None),
    "784-512-512-10": BROAD,
    "fifty layers": Case(dense((32,) * 51, "tanh", "input"), Inference(50, 0.1), AdamW(0.01), 32),
    "batches of 256": Case(dense((64, 64, 10), "relu"), Inference(8, 0.1), rows=256),
}

PRELUDE = """
import gc
from dataclasses import replace

import ttnn

from pctt.backends.fused_plan import CIRCULAR_BUFFER_BYTES
from pctt.backends.devices import close_devices, open_device
from tests.device.test_fused import backend_of, batch, engine_of, train_batch
from tests.mock.test_fused_mock import BROAD, NETWORKS

device = open_device()


def allocated(kind=ttnn.BufferType.L1):
    return ttnn.device.get_memory_view(device, kind).total_bytes_allocated_per_bank

"""
POSTLUDE = """
print("done")
close_devices()
"""

TRAIN = """
for name, case in NETWORKS.items():
    gc.collect()
    assert allocated() == 0, name
    engine = engine_of(case)
    backend = backend_of(engine)
    train_batch(engine, batch(case, 0), 1)
    predicted = backend.bytes_per_core() - CIRCULAR_BUFFER_BYTES
    assert allocated() == predicted, (name, allocated(), predicted)

    before = backend.launches
    device.set_program_cache_misses_allowed(False)
    try:
        train_batch(engine, batch(case, 1), 2)
        assert backend.launches == before + 1, name
        train_batch(engine, {node: values[:7] for node, values in batch(case, 2).items()}, 3)
    finally:
        device.set_program_cache_misses_allowed(True)
    assert allocated() == predicted, (name, allocated(), predicted)
    assert allocated(ttnn.BufferType.DRAM) == 0, name
    print(name, backend.cores.slices, backend.bytes_per_core())
    del engine, backend
"""

SPREAD = """
engine = engine_of(BROAD)
backend = backend_of(engine)
assert max(backend.cores.slices) > 1, backend.cores
assert backend.bytes_per_core() <= backend.chip.l1_bytes
train_batch(engine, batch(BROAD, 0), 1)
predicted = backend.bytes_per_core() - CIRCULAR_BUFFER_BYTES
assert allocated() == predicted, (allocated(), predicted)

fewer = max(backend.cores.slices) - 1
del engine, backend
gc.collect()
try:
    engine_of(replace(BROAD, cores=fewer))
except ValueError as error:
    print("refused:", error)
"""


def run_on(mock_cards: Any, chip: str, script: str) -> list[str]:
    lines = mock_cards.run(chip, "-c", PRELUDE + script + POSTLUDE).splitlines()
    assert "done" in lines
    return lines


@pytest.mark.parametrize("chip", ["n150", "p150"])
def test_networks_train_in_the_memory_predicted_with_one_set_of_kernels(mock_cards: Any, chip: str) -> None:
    """Neither a second batch nor one of fewer samples misses the program cache, nothing lies in DRAM."""
    run_on(mock_cards, chip, TRAIN)
    for name in ("reader", "compute", "writer"):
        (kernels,) = (mock_cards.folder / "cache" / chip).glob(f"**/kernels/{name}")
        assert len(list(kernels.iterdir())) == 1, f"{name} was compiled more than once"


@pytest.mark.parametrize("chip", ["n150", "p150"])
def test_layers_get_as_few_cores_as_their_memory_needs(mock_cards: Any, chip: str) -> None:
    """One core less is refused."""
    lines = run_on(mock_cards, chip, SPREAD)
    assert any(line.startswith("refused: the network does not fit the fused kernel") for line in lines)
