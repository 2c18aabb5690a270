"""Networks on several chips: the model against hand arithmetic."""

import json
from dataclasses import fields

import pytest

import pctt
from pctt import cli
from pctt.placement.boxes import BOXES, SOURCES, Box, box
from pctt.placement.fused_cost import fused_placement
from pctt.placement.scaling import scaling

ADAM, STEPS = pctt.Adam(1e-3), pctt.Inference(20, 0.1)


def deep(width: int, depth: int) -> pctt.Network:
    return pctt.chain(width, [pctt.Dense(width, "tanh") for _ in range(depth)])


def test_boxes_have_the_chips_and_links_of_the_vendors_descriptions() -> None:
    """Chips; and GB/s between two neighbours each way: links of 100 Gbit/s, on Blackhole of 30 GB/s."""
    found = {b.name: (b.num_chips, b.links * b.link_bytes_per_second / 1e9) for b in BOXES.values()}
    assert found == {"n300": (2, 12.5), "t3000": (8, 12.5), "galaxy": (32, 50.0), "p150x4": (4, 120.0)}
    assert set(SOURCES) == {field.name for field in fields(Box)} - {"name"} and all(SOURCES.values())
    with pytest.raises(ValueError, match="box must be one of n300, t3000, galaxy, p150x4, got 'rack'"):
        box("rack")


def test_a_message_takes_a_hop_and_its_bytes_over_all_links() -> None:
    """25,000 bytes: 2 us at 12.5 GB/s, 0.5 us over four such links."""
    assert box("t3000").message_seconds(25_000) == pytest.approx(2.8e-6)
    assert box("galaxy").message_seconds(25_000) == pytest.approx(1.3e-6)


def test_a_ring_of_four_sends_six_quarters() -> None:
    """Each member sends a quarter three times to add up and three times to tell: 6 (0.8 us + 2 us)."""
    assert box("t3000").all_reduce_seconds(100_000, 4) == pytest.approx(6 * 2.8e-6)


@pytest.mark.parametrize(("depth", "chips"), [(1, 1), (63, 1), (64, 2), (126, 2), (127, 3)])
def test_layers_of_one_core_fill_a_chip_less_the_copy_below(depth: int, chips: int) -> None:
    """64 cores: a node below and 63 layers on each chip."""
    found = scaling(deep(64, depth), "galaxy", 32, STEPS, pctt.SGD(0.1))
    assert found.num_chips == chips and found.replicas == 32 // chips
    assert [share.last - share.first + 1 for share in found.shares] == [63] * (depth // 63) + [depth % 63] * (
        depth % 63 > 0
    )


def test_bytes_and_messages_of_a_boundary_by_hand() -> None:
    """33 samples are two rows of tiles, 40 units two columns: 64 x 64 numbers, bfloat16 up, float32 down. 7
    steps: two messages each, one of the sweep, one for the gradient.
    """
    found = scaling(deep(40, 70), "galaxy", 33, pctt.Inference(7, 0.1), pctt.SGD(0.1))
    assert found.boundaries == ((64 * 64 * 2, 64 * 64 * 4),) and found.messages == 16
    both = 2 * 0.8e-6 + 64 * 64 * 6 / 50e9
    assert found.message_seconds == pytest.approx(both)
    assert found.step_alone is not None and found.step_exposed == pytest.approx(found.step_alone + both)


def test_on_one_chip_a_training_step_is_that_of_the_fused_kernel() -> None:
    net = deep(64, 3)
    found = scaling(net, "n300", 32, STEPS, ADAM)
    alone = fused_placement(net, "n300", None, 32, STEPS, ADAM).cost()
    assert found.training == pytest.approx(alone.training) and found.step_exposed == alone.step
    assert found.boundaries == () and found.replicas == 2


def test_a_few_equal_layers_stand_for_many() -> None:
    """16 layers planned in full. Of three layers no neighbours stand in different rows of cores, which are up
    to 20 hops of 9 cycles further apart: twice in a step of 16,000 cycles, 2.2 %, and as much of what comes
    before it. L1 differs by what counts messages and instructions, below 2 KiB.
    """
    net = deep(64, 16)
    (share,) = scaling(net, "galaxy", 32, STEPS, ADAM).shares
    whole = fused_placement(net, "n150", None, 32, STEPS, ADAM)
    cost = whole.cost()
    assert share.cores == whole.cores.total == 17
    assert share.l1_bytes == pytest.approx(whole.l1_bytes, abs=2048)
    assert share.step == pytest.approx(cost.step, rel=0.022)
    assert share.before == pytest.approx(cost.before, rel=0.022)


def test_gradients_of_the_fullest_chip_are_added_up() -> None:
    """64 x 64 weights and 64 biases per layer, 4 bytes each: 63 layers on the first chip."""
    found = scaling(deep(64, 70), "galaxy", 32, STEPS, pctt.SGD(0.1))
    assert found.reduce_bytes == 63 * (64 * 64 + 64) * 4
    assert found.reduce_seconds == box("galaxy").all_reduce_seconds(found.reduce_bytes, 16)


def test_what_no_chip_holds_is_refused_by_its_layer() -> None:
    """Weights, gradients and two moments of 2048 x 2048 in fp32 alone are 67 MB; 64 cores have 89 MB, of
    which the copy of the source takes half.
    """
    with pytest.raises(ValueError, match="layer 'dense1' does not fit one n150, and no layer is shared"):
        scaling(deep(2048, 2), "galaxy", 32, STEPS, ADAM)


def test_the_command_prints_the_plan_and_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "digits", "--box", "t3000"]) == cli.OK
    printed = capsys.readouterr().out
    assert "on t3000: 8 chips (2 x 4 n300)" in printed and "Predicted, not measured" in printed
    assert printed.isascii() and max(map(len, printed.splitlines())) <= 110
    assert cli.main(["plan", "digits", "--box", "galaxy", "--json"]) == cli.OK
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "plan" and said["num_chips"] == 1 and said["replicas"] == 32
    for arguments, words in (
        (("--box", "rack"), "box must be one of n300, t3000, galaxy, p150x4, got 'rack'."),
        (("--box", "galaxy", "--picture", "plan.svg"), "a picture shows one chip; drop --box or --picture."),
    ):
        assert cli.main(["plan", "digits", *arguments]) == cli.USAGE
        assert words in capsys.readouterr().err
