"""Plans: what lies where and why, the same program as the engine runs, and the command that prints it."""

import json
from pathlib import Path

import pytest

import pctt
from pctt import cli
from pctt.data import load
from pctt.placement.plan import plan

INFERENCE = pctt.Inference(num_steps=3, rate=0.1)


def chain(*widths: int) -> pctt.Network:
    layers = [*(pctt.Dense(units, "tanh") for units in widths[1:-1]), pctt.Dense(widths[-1])]
    return pctt.chain(input=widths[0], layers=layers)


@pytest.mark.parametrize("widths", [(64, 32, 32, 10), (784, 256, 256, 10)])
def test_a_plan_has_the_program_and_the_layout_of_the_engine(widths: tuple[int, ...]) -> None:
    """A plan of something else than what runs would be worth nothing."""
    net = chain(*widths)
    engine = pctt.Engine(
        net,
        pctt.init(net),
        INFERENCE,
        clamped=("input", net.output),
        learning=pctt.SGD(0.1),
        backend="emulated",
        device="n150",
    )
    found = plan(net, "n150", 32, INFERENCE, pctt.SGD(0.1))
    assert found.program == engine.program and found.layout == engine.layout


def test_resident_layers_lie_on_the_core_of_the_node_they_predict() -> None:
    found = plan(chain(64, 32, 32, 32, 10), "n150")
    assert {use.label: use.core for use in found.floor_plan().cores} == {
        "input": (0, 0),
        "dense1": (1, 0),
        "dense2": (2, 0),
        "dense3": (3, 0),
        "dense4": (4, 0),
    }
    assert found.reasons == {}
    assert found.floor_plan().lines[1] == "dense2 32->32 tanh: core (2,0)"


def test_a_layer_too_large_for_a_core_is_spread_and_says_why() -> None:
    found = plan(chain(784, 256, 10), "n150", 32, INFERENCE, pctt.Adam(1e-3))
    assert 1 in found.reasons
    # Master weights, gradients and two moments in fp32 alone: 4 x 800 x 256 x 4 bytes, more than a core has.
    needed = int(found.reasons[1].split("would take ")[1].split(" of ")[0].replace(",", ""))
    assert needed > 4 * 800 * 256 * 4 > 1_393_312
    assert found.reasons[1].endswith("of 1,393,312 bytes")
    assert len(found.floor_plan().cores) == 64, "its tiles are on every core"


def test_layers_without_a_core_are_spread_and_say_why() -> None:
    """2 x 2 cores hold the input and layers 1 to 3."""
    found = plan(chain(32, 32, 32, 32, 32, 32), "n150", grid=(2, 2))
    assert set(found.reasons) == {4, 5}
    assert found.reasons[4] == "the chip has 4 cores, all taken by the input and earlier layers"


def test_batches_are_padded_to_whole_tiles() -> None:
    assert plan(chain(32, 32, 32), batch_size=33).rows == 64


def test_an_unknown_chip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chip must be one of n150, .*p150.*, got 'n15'"):
        plan(chain(32, 32, 32), "n15")


@pytest.mark.parametrize("chip", ["n150", "p150"])
@pytest.mark.parametrize("widths", [(64, 32, 32, 32, 10), (784, 256, 256, 10)])
def test_text_is_ascii_and_at_most_110_columns_wide(widths: tuple[int, ...], chip: str) -> None:
    text = plan(chain(*widths), chip, 32, INFERENCE, pctt.Adam(1e-3)).as_text()
    assert text.isascii() and max(map(len, text.splitlines())) <= 110


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_command_prints_places_budget_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "digits") == cli.OK
    printed = capsys.readouterr().out
    assert "64-128-128-128-10 on n150, 8 x 8 cores, batches of 32" in printed
    for word in ("dense1 64->128 gelu: core (1,0)", "inference step", "training step", "floor us", "free"):
        assert word in printed


def test_json_is_one_object_with_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--chip", "p150", "--batch-size", 64, "--set", "inference.num_steps=7", "--json")
    assert run("plan", "mnist", *arguments) == cli.OK
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said["kind"] == "plan" and said["chip"] == "p150" and said["grid"] == [11, 10]
    assert said["widths"] == [784, 256, 256, 10] and said["rows"] == 64 and said["num_steps"] == 7
    step, whole = said["costs"]["inference step"], said["costs"]["training step"]
    others = [c for name, c in said["costs"].items() if name not in ("inference step", "training step")]
    assert whole["programs"] == 7 * step["programs"] + sum(c["programs"] for c in others)


def test_the_number_of_inputs_is_that_of_the_data() -> None:
    pytest.importorskip("sklearn")
    assert cli.SHAPES["digits"] == load("digits").shape
    assert cli.SHAPES["mnist"] == cli.SHAPES["fashion_mnist"] == (1, 28, 28)


def test_the_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.svg"
    assert run("plan", "digits", "--picture", path) == cli.OK
    assert "dense4" in path.read_text() and str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("digits", "--chip", "n15"), cli.USAGE, "chip must be one of n150, n300, "),
        (("digits", "--picture", "plan.pdf"), cli.USAGE, "must end in .svg or .png, got 'plan.pdf'"),
        (("digit",), cli.USAGE, "'digit' is neither a preset"),
        (("digits", "--set", "inference.steps=3"), cli.USAGE, "unknown key inference.steps"),
        (("digits", "--batch-size", 100_000), cli.FAILED, "the network does not fit the n150: "),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(
    arguments: tuple[object, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", *arguments) == code
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1
