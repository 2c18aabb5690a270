"""Graphs on a mock card: what the Tenstorrent backend asks of ttnn is legal and fits, and the second
batch compiles nothing; what ttnn does not give is refused by name.
"""

from typing import Any

import pytest

TRAIN = """
from pctt.backends.devices import close_devices, open_device
from tests.device.test_graph import NETWORKS
from tests.mock.test_matrix import Case, run_case

net = NETWORKS["NAME"]
found = run_case(Case("NAME", net, ("input", net.output)), open_device())
assert found["error"] is None, found
assert found["kinds"] == KINDS, found
for what in ("tensors", "circular buffers"):
    assert found[what] <= found[f"{what} planned"], found
print(found)
print("done", found["programs"], found["operations"])
close_devices()
"""

REFUSED = """
import pctt
from pctt.backends.devices import close_devices

net = pctt.chain((1, 4, 4), [pctt.Block([pctt.Conv2d(2, 3), "tanh"], name="seen"), pctt.Dense(2)])
try:
    pctt.Engine(net, pctt.init(net), pctt.Inference(2, 0.1), ("input", net.output), backend="tenstorrent")
except ValueError as error:
    print("refused:", error)
close_devices()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kinds"), [("gated", ["L1"]), ("parts", ["DRAM", "L1"])])
def test_a_graph_trains(mock_cards: Any, name: str, kinds: list[str]) -> None:
    """Of operations that move numbers within a sample one is several programs of ttnn, some of which keep a
    table in DRAM.
    """
    printed = mock_cards.run("n150", "-c", TRAIN.replace("NAME", name).replace("KINDS", repr(kinds)))
    _, programs, operations = next(line for line in printed.splitlines() if line.startswith("done")).split()
    if name == "gated":
        assert programs == operations
    else:
        assert int(programs) > int(operations)


def test_a_convolution_is_refused_by_name(mock_cards: Any) -> None:
    printed = mock_cards.run("n150", "-c", REFUSED)
    assert "refused: layer 'seen' has a convolution, which TT-NN's plain operations do not give" in printed
