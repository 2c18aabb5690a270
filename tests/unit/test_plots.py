"""The picture of a run: written for every kind of run, showing the recorded numbers, without global state."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pctt import plots
from pctt.plots import draw_run

figures = pytest.importorskip("matplotlib.figure")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def make_records(num_layers: int = 3, num_epochs: int = 2, num_batches: int = 40) -> list[dict[str, Any]]:
    names = [f"dense{layer + 1}" for layer in range(num_layers)]
    records: list[dict[str, Any]] = []
    for epoch in range(1, num_epochs + 1):
        for batch in range(1, num_batches + 1):
            step = (epoch - 1) * num_batches + batch
            energies = {name: (layer + 1) / step for layer, name in enumerate(names)}
            records.append(
                {"kind": "batch", "step": step, "epoch": epoch, "energies": energies, "learning_rate": 1e-3}
            )
        energy = [[0.0] * (num_layers - 1) + [1.0], [0.1] * num_layers, [0.2] * num_layers]
        records.append({"kind": "trajectory", "step": step, "layers": names, "energy": energy})
        accuracy = {"train_accuracy": 0.9, "validation_accuracy": 1 - 0.1 / epoch}
        records.append({"kind": "epoch", "epoch": epoch, "step": step, "seconds": 1.0, **accuracy})
    return [*records, {"kind": "result", "test_accuracy": 0.9731}]


def without(kind: str) -> list[dict[str, Any]]:
    return [record for record in make_records() if record["kind"] != kind]


NULLS = [
    {"kind": "batch", "step": 1, "energies": {"dense1": None, "dense2": -1.0}},
    {"kind": "trajectory", "step": 1, "layers": ["dense1"], "energy": [[None], [0.0]]},
    {"kind": "epoch", "epoch": 1, "step": 1, "validation_accuracy": None},
    {"kind": "result", "test_accuracy": None},
    {"kind": "unheard of"},
]


@pytest.mark.parametrize(
    "records",
    [
        pytest.param(make_records(), id="three layers"),
        pytest.param(make_records(num_layers=1, num_epochs=1, num_batches=1), id="one of everything"),
        pytest.param(make_records(num_layers=7), id="as many layers as colours"),
        pytest.param(make_records(num_layers=8), id="one layer more"),
        pytest.param(make_records(num_layers=30, num_epochs=40), id="thirty layers"),
        *(
            pytest.param(without(kind), id=f"no {kind}")
            for kind in ("batch", "trajectory", "epoch", "result")
        ),
        pytest.param([{"kind": "batch", "step": 1, "learning_rate": 0.1}], id="batches without energies"),
        pytest.param(NULLS, id="nulls"),
        pytest.param([], id="nothing"),
    ],
)
def test_every_kind_of_run_gives_one_png_of_the_full_size(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    path = tmp_path / "new" / "run.png"
    assert draw_run(records, path, title="a run") == path
    data = path.read_bytes()
    assert data.startswith(PNG_MAGIC)
    assert struct.unpack(">II", data[16:24]) == (1820, 637)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure that draw_run made, for looking into."""
    made: list[Any] = []

    class Figure(figures.Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figures, "Figure", Figure)

    def draw(records: list[dict[str, Any]]) -> Any:
        draw_run(records, tmp_path / "run.png")
        return made[-1]

    return draw


def test_the_panels_show_the_recorded_numbers(drawn: Any) -> None:
    batches, accuracy, inference = drawn(make_records()).axes
    assert [axes.get_yscale() for axes in (batches, accuracy, inference)] == ["log", "linear", "log"]
    raw = batches.lines[0]
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(1, 81))
    np.testing.assert_allclose(raw.get_ydata(), 1 / np.arange(1, 81), rtol=1e-15)
    lines = {line.get_label(): line for line in accuracy.lines}
    np.testing.assert_allclose(lines["validation"].get_ydata(), [90.0, 95.0], rtol=1e-12)
    test = lines["test, last epoch: 97.31 %"]
    assert list(test.get_xdata()) == [2]
    first, *_, last = inference.lines
    np.testing.assert_array_equal(first.get_ydata(), [np.nan, 0.1, 0.2])  # zero has no logarithm
    np.testing.assert_array_equal(last.get_ydata(), [1.0, 0.1, 0.2])
    assert inference.get_title() == "Energy while inferring, batch 80"


def test_a_layer_has_one_colour_in_both_energy_panels_and_no_two_layers_share_one(drawn: Any) -> None:
    for num_layers in (3, 7, 8, 30):
        batches, _, inference, *_ = drawn(make_records(num_layers)).axes
        colours = [line.get_color() for line in batches.lines[1::2]]
        assert len(set(colours)) == num_layers
        assert colours == [line.get_color() for line in inference.lines]


def test_many_layers_get_a_colour_bar_and_few_a_legend(drawn: Any) -> None:
    few, many = drawn(make_records(7)), drawn(make_records(8))
    assert (len(few.legends), len(few.axes)) == (1, 3)
    assert (len(many.legends), len(many.axes)) == (0, 4)


def test_the_running_mean_keeps_constants_and_averages_the_rest() -> None:
    constant = np.full(9, 2.5)
    np.testing.assert_allclose(plots._running_mean(constant, 4), constant, rtol=1e-15)
    np.testing.assert_allclose(plots._running_mean(np.array([1.0, 2.0, 6.0]), 3), [1.5, 3.0, 4.0], rtol=1e-15)
    np.testing.assert_array_equal(plots._running_mean(np.array([1.0, np.nan, 6.0]), 3), [1.0, np.nan, 6.0])


def test_drawing_leaves_matplotlib_global_state_alone(tmp_path: Path) -> None:
    """pyplot would pick a window system, and keep every figure alive."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom pctt.plots import draw_run\n"
        "assert 'matplotlib' not in sys.modules, 'imported before it is needed'\n"
        "draw_run([], Path(sys.argv[1]))\n"
        "assert 'matplotlib' in sys.modules\nassert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(plots.__file__).parents[1]
    command = [sys.executable, "-c", program, str(tmp_path / "run.png")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "pctt\[plot\]"'):
        draw_run([], tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()
