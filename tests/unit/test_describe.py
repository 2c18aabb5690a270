"""What `print` and notebooks show: short, true, and never an error."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pctt
from pctt import config, describe, layers, learning, presets, recurrent
from pctt.backends.precision import PrecisionPolicy
from pctt.data import Dataset, Split
from pctt.inference import Nudge
from pctt.parallel.group import _digest
from pctt.placement.plan import plan

NAMES: dict[str, Any] = {
    **{name: getattr(pctt, name) for name in pctt.__all__},
    **{name: getattr(layers, name) for name in layers.__all__},
    **{cls.__name__: cls for cls in (config.RunConfig, config.DataConfig, config.TrainingConfig)},
    **{cls.__name__: cls for cls in (config.InitConfig, config.Wired, PrecisionPolicy)},
}
SETTINGS = [
    pctt.Inference(),
    pctt.Inference(40, 0.05, dynamics="adam", betas=(0.5, 0.9), tolerance=1e-3),
    pctt.Inference(nudge=Nudge(0.1, "centred", "loss")),
    pctt.Nudge(0.5),
    pctt.SGD(0.1, momentum=0.5),
    pctt.AdamW(schedule=learning.WarmupCosine(0.2)),
    pctt.Gaussian((1.0, 2.0), learned="diagonal"),
    pctt.Categorical(),
    pctt.Dense(10, "softmax", energy=pctt.Categorical(), name="label"),
    pctt.Linear(3, mask="off_diagonal"),
    pctt.Conv2d(6, 5, padding=(1, 2), bias=False),
    pctt.Add((1, -1)),
    pctt.Block([pctt.Conv2d(4, 3), "relu", [pctt.MaxPool2d(2), pctt.Flatten()]], name="eye"),
    pctt.Block([pctt.Step(pctt.Linear(3), (0,), "x"), pctt.Step(pctt.Add(), (0, 1))]),
    pctt.LSTMCell(4, "gates"),
    recurrent.RNNCell(4),
    pctt.Planning(horizon=4, corrections=1),
    pctt.ControlModel(state=2, action=1, observation=2, bound=1.0),
    PrecisionPolicy(operands="float32"),
    *(preset() for preset in presets.PRESETS.values()),
]


@pytest.mark.parametrize("value", SETTINGS, ids=lambda value: type(value).__name__)
def test_settings_can_be_pasted_back(value: Any) -> None:
    text = repr(value)
    assert "\n" not in text
    if "in all" not in text:  # a tuple that was cut
        assert eval(text, NAMES) == value


def test_a_setting_at_its_defaults_is_its_name() -> None:
    assert repr(pctt.Inference()) == "Inference()"
    assert repr(pctt.Inference(rate=0.05)) == "Inference(rate=0.05)"
    assert repr(pctt.Adam(schedule=pctt.Constant())) == "Adam()"
    assert repr(pctt.Dense(8)) == "Dense(8)"


def test_a_map_of_ones_own_prints_as_it_likes() -> None:
    @dataclasses.dataclass(frozen=True)
    class Plain(layers.Map):
        size: int = 3

    @dataclasses.dataclass(frozen=True)
    class Special(layers.Map):
        def __repr__(self) -> str:
            return "special"

    assert (repr(Plain()), repr(Plain(4)), repr(Special())) == ("Plain()", "Plain(size=4)", "special")


def test_a_long_tuple_is_cut() -> None:
    assert repr(pctt.Gaussian((2.0,) * 5000)) == "Gaussian(precision=(2.0, 2.0, 2.0, ... 5000 in all))"
    block = pctt.Block(["tanh"] * 100)
    assert len(repr(block)) < 200 and repr(block).endswith("... 100 in all])")


# --- networks -----------------------------------------------------------------------------------------------

CHAIN = pctt.chain(64, [pctt.Dense(32, "tanh"), pctt.Dense(10)])
NETWORKS = {
    "chain": CHAIN,
    "pair": pctt.chain(8, [pctt.Dense(6), pctt.Dense(4)], backward=[pctt.Dense(6), pctt.Dense(8)]),
    "images": pctt.chain((1, 8, 8), [pctt.Conv2d(2, 3), pctt.Flatten(), pctt.Dense(3)]),
    "cycle": pctt.pc_graph({"image": 6, "hidden": 4, "label": 2}),
    "shared": pctt.unroll(pctt.LSTMCell(3), 3, 2, pctt.Dense(2)),
}


@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_the_table_of_a_network_has_every_node_and_all_weights(net: pctt.Network) -> None:
    """The column of weights adds up to the numbers in the tensors that `init` draws."""
    drawn = sum(values.numel() for tree in pctt.init(net).values() for values in tree.values())
    head, *rows = repr(net).splitlines()
    assert f"{drawn:,} weights" in head and f"{len(net.nodes)} nodes" in head
    assert {row.split()[0] for row in rows} >= set(net.nodes)
    numbers = [row.split()[-1].replace(",", "") for row in rows if not row.strip().startswith("node")]
    assert sum(int(number) for number in numbers if number.isdigit()) == drawn
    assert max(map(len, rows)) < 150
    borrowed = [net.nodes[net.owner(index)] for index in net.indices if net.owner(index) != index]
    assert [row.split()[-1] for row in rows if " those of " in row] == borrowed


def test_a_large_network_is_shown_in_part() -> None:
    text = repr(pctt.chain(4, [pctt.Dense(4)] * 5000))
    assert len(text.splitlines()) < 40
    assert "dense1 " in text and "dense5000 " in text and "more ..." in text and "dense2500" not in text
    missing = re.search(r"\.\.\. ([\d,]+) more", text)
    shown = [line for line in text.splitlines() if re.match(r"  (input|dense\d+) ", line)]
    assert missing is not None and int(missing[1].replace(",", "")) + len(shown) == 5001


def test_a_network_that_does_not_hold_together_is_described_all_the_same() -> None:
    broken = pctt.Network(3, (pctt.Dense(3),), ("a", "b"))
    wrong = pctt.graph({"x": 3}, {"y": (pctt.Dense(2), "x")})
    wrong = dataclasses.replace(wrong, wiring=dataclasses.replace(wrong.wiring, sources=(("nowhere",),)))
    for net in (broken, wrong):
        assert repr(net).startswith("Network")


@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_the_picture_of_a_network_has_a_box_per_node_and_an_arrow_per_source(net: pctt.Network) -> None:
    root = ElementTree.fromstring(net._repr_svg_())
    boxes = [found for found in root.iter(f"{SVG}rect") if "node" in found.get("class", "")]
    assert len(boxes) == len(net.nodes)
    assert {text.text for text in root.iter(f"{SVG}text")} >= set(net.nodes)
    arrows = [found.get("class") for found in root.iter(f"{SVG}path") if found.get("marker-end")]
    pairs = [(source, index) for index in net.indices for source in set(net.sources(index))]
    assert len(arrows) == len(pairs)
    assert arrows.count("back") == sum(source >= index for source, index in pairs)


SVG = "{http://www.w3.org/2000/svg}"


def test_boxes_lie_apart_and_within_the_picture() -> None:
    for net in (*NETWORKS.values(), pctt.chain(4, [pctt.Dense(4)] * 500)):
        root = ElementTree.fromstring(net._repr_svg_())
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        boxes = [r for r in root.iter(f"{SVG}rect") if "node" in r.get("class", "")]
        assert len(boxes) <= 24
        corners = [(float(box.get("x", 0)), float(box.get("y", 0))) for box in boxes]
        for number, (x, y) in enumerate(corners):
            assert 0 < x < width - 112 and 0 < y < height - 62
            for a, b in corners[:number]:
                assert abs(a - x) >= 112 or abs(b - y) >= 62


def test_names_are_text_in_pictures() -> None:
    net = pctt.chain(2, [pctt.Dense(2, name="<b>&")])
    texts = [text.text for text in ElementTree.fromstring(net._repr_svg_()).iter(f"{SVG}text")]
    assert "<b>&" in texts


# --- results, trainers, plans -------------------------------------------------------------------------------


def asked(num_steps: int = 5) -> pctt.InferenceResult:
    x, y = torch.randn(3, 64), torch.eye(10)[:3]
    inference = pctt.Inference(num_steps, 0.05)
    return pctt.infer(CHAIN, pctt.init(CHAIN), {"input": x, "dense2": y}, inference)


def test_a_result_says_how_it_ended_and_what_was_free() -> None:
    result = asked()
    head, settings, _, *rows = repr(result).splitlines()
    first, last = (float(result.energy[at].sum()) for at in (0, -1))
    assert head == (f"InferenceResult: COMPLETED after 5 steps, batch of 3, energy {first:.4g} -> {last:.4g}")
    assert settings.strip() == "Inference(num_steps=5, rate=0.05)"
    states = {row.split()[0]: row.split()[2] for row in rows}
    assert states == {"input": "clamped", "dense1": "free", "dense2": "clamped"}
    error = result.errors["dense1"].square().mean().sqrt()
    assert rows[1].split()[-1] == f"{float(error):.3g}"


def test_the_curve_of_a_result_is_there_when_there_is_one() -> None:
    root = ElementTree.fromstring(asked()._repr_svg_() or "")
    assert {"total", "dense1", "dense2"} <= {text.text for text in root.iter(f"{SVG}text")}
    assert asked(0)._repr_svg_() is None


def test_a_result_without_values_is_described_all_the_same() -> None:
    with FakeTensorMode():
        empty = torch.empty(3, 2)
    result = dataclasses.replace(asked(), energy=empty, errors={"dense1": empty})
    assert repr(result).startswith("InferenceResult: COMPLETED")


def test_a_trainer_says_what_it_does_and_how_far_it_is() -> None:
    trainer = pctt.Trainer(CHAIN, pctt.Inference(4, 0.05), pctt.SGD(0.01), batch_size=8)
    outcome = trainer.fit((torch.rand(20, 64), torch.arange(20) % 10), epochs=2)
    assert repr(outcome) == "FitResult: COMPLETED, 2 epochs, 6 learning steps"
    text = repr(trainer)
    for needed in ("predictive coding", "batches of 8", "2 epochs, 6 learning steps", "reference, cpu"):
        assert needed in text
    assert "Inference(num_steps=4, rate=0.05)" in text and "SGD(rate=0.01)" in text
    assert text.endswith(repr(CHAIN))
    diverging = pctt.Trainer(CHAIN, pctt.Inference(rate=50.0)).fit((torch.rand(4, 64), torch.arange(4)), 1)
    assert repr(diverging).startswith("FitResult: ") and diverging.message in repr(diverging)


def test_a_plan_prints_whole_and_is_drawn_by_itself() -> None:
    found = plan(CHAIN)
    assert str(found) == found.as_text()
    assert len(repr(found).splitlines()) == 4 and "64-32-10 on n150" in repr(found)
    root = ElementTree.fromstring(found._repr_svg_())
    cores = [rect for rect in root.iter(f"{SVG}rect") if "core" in rect.get("class", "").split()]
    assert len(cores) == found.grid[0] * found.grid[1]
    assert sum("used" in rect.get("class", "") for rect in cores) == 3
    assert repr(found.floor_plan()).startswith("FloorPlan") and "L1 per core" in str(found.floor_plan())


def test_data_say_how_much_there_is() -> None:
    split = Split(torch.rand(5, 4), torch.arange(5) % 2)
    assert repr(split) == "Split: 5 samples of 4 numbers, torch.float32"
    assert repr(Dataset("small", split, split, 2, (2, 2))) == (
        "Dataset: small, 2 classes, 1 x 2 x 2; 5 training and 5 test samples"
    )


def test_ranks_tell_networks_apart_that_print_alike() -> None:
    """Otherwise two ranks would train different networks and not notice."""
    some = [pctt.Dense(4)] * 400
    one = pctt.chain(4, [*some, pctt.Dense(4, "tanh"), *some])
    other = pctt.chain(4, [*some, pctt.Dense(4, "relu"), *some])
    assert repr(one) == repr(other) and one != other
    assert _digest([one]) != _digest([other])
    assert _digest([one, 1]) == _digest([dataclasses.replace(one), 1])


def test_what_is_shown_of_rows_is_the_ends() -> None:
    assert describe.rows_shown(3) == [0, 1, 2]
    assert describe.rows_shown(10, most=4) == [0, 1, 2, 9]
