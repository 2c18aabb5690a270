"""Plans in characters and as pictures: every core in its place, bars as long as the bytes, whole files."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pctt.placement import draw
from pctt.placement.draw import KINDS, CoreUse, FloorPlan, as_text, save_picture

figures = pytest.importorskip("matplotlib.figure")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
KIB = 1024

PLAN = FloorPlan(
    title="two layers",
    grid=(3, 2),
    l1_bytes=1000 * KIB,
    cores=(
        CoreUse((0, 0), "input", None, {"activities and errors": 50 * KIB}),
        CoreUse((1, 0), "dense1", 1, {"weights": 100 * KIB, "circular buffers": 150 * KIB}),
        CoreUse((2, 1), "dense2", 2, {"weights": 700 * KIB, "transient": 600 * KIB}),
    ),
    lines=("dense1 64->256 tanh: core (1,0)", "dense2 256->10: core (2,1)"),
)


def full(columns: int = 13, rows: int = 10, label: str = "dense{}") -> FloorPlan:
    """Every core of a large chip in use, by a layer each."""
    places = [(x, y) for y in range(rows) for x in range(columns)]
    uses = tuple(CoreUse(at, label.format(i), i, {"weights": i * KIB}) for i, at in enumerate(places))
    return FloorPlan("a full chip", (columns, rows), 1000 * KIB, uses, tuple(use.label for use in uses))


def test_text_shows_grid_bars_and_legend() -> None:
    """Laid out by hand. 1300 KiB of 1000 is 300 KiB = 307,200 bytes too many."""
    assert as_text(PLAN).splitlines() == [
        "two layers",
        "",
        "    x=0    x=1    x=2",
        "y=0 input  dense1 .",
        "y=1 .      .      dense2",
        "",
        "L1 per core, 1,024,000 B; 3 of 6 cores in use",
        "(0,0) input  [#-------------------]    51,200 B   5.0%",
        "(1,0) dense1 [#####---------------]   256,000 B  25.0%",
        "(2,1) dense2 [####################] 1,331,200 B 130.0%  307,200 B too many",
        "",
        "dense1 64->256 tanh: core (1,0)",
        "dense2 256->10: core (2,1)",
    ]


@pytest.mark.parametrize(
    ("used", "marks"), [(0, 0), (1, 1), (499, 10), (549, 11), (999, 19), (1000, 20), (1001, 20), (9000, 20)]
)
def test_a_bar_is_empty_only_for_nothing_and_full_only_when_nothing_is_left(used: int, marks: int) -> None:
    plan = replace(PLAN, l1_bytes=1000, cores=(CoreUse((0, 0), "a", 0, {"weights": used}),))
    (bar,) = re.findall(r"\[(.*)\]", as_text(plan))
    assert bar == "#" * marks + "-" * (20 - marks)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PLAN, id="small"),
        pytest.param(full(), id="largest chip"),
        pytest.param(full(label="convolution_with_a_long_name{}"), id="long labels"),
        pytest.param(replace(PLAN, lines=("word " * 60, "x" * 300), title="t" * 150), id="long lines"),
        pytest.param(replace(PLAN, title="γ·ε of the Größe 2µ", lines=("784→256",)), id="not ASCII"),
        pytest.param(replace(PLAN, cores=(), lines=()), id="nothing in use"),
        pytest.param(full(columns=35, rows=1), id="as wide as fits"),
    ],
)
def test_text_is_ascii_and_at_most_110_columns_wide(plan: FloorPlan) -> None:
    text = as_text(plan)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 110
    assert text.endswith("\n")
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_label_that_is_cut_keeps_the_end_that_tells_it_from_its_neighbours() -> None:
    plan = full(label="convolution_with_a_long_name{}")
    rows = [line.split()[1:] for line in as_text(plan).splitlines() if re.match(r"y=\d", line)]
    assert [len(row) for row in rows] == [13] * 10
    for y, row in enumerate(rows):
        for x, label in enumerate(row):
            assert label.endswith(str(13 * y + x))
    assert len({label for row in rows for label in row}) == 130


def test_a_grid_too_wide_for_text_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"a grid of 60 columns does not fit into 110 characters; use save_p"
    ):
        as_text(full(columns=60, rows=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cores": (CoreUse((3, 0), "a", 0, {}),)}, r"core \(3, 0\) \(a\) is listed twice or lies outside"),
        (
            {"cores": (PLAN.cores[0], PLAN.cores[0])},
            r"core \(0, 0\) \(input\) is listed twice or lies outside",
        ),
        ({"l1_bytes": 0}, "l1_bytes must be a whole number of at least 1, got 0"),
        ({"grid": (0, 2), "cores": ()}, "columns must be a whole number of at least 1, got 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PLAN, **change)


@pytest.mark.parametrize(
    ("sizes", "layer", "words"),
    [
        (
            {"wieghts": 1},
            0,
            "kind of bytes on core .* must be one of weights, learning state, activities and",
        ),
        ({"weights": -1}, 0, "bytes of weights on core .* must be a whole number of at least 0, got -1"),
        ({"weights": 1.5}, 0, "bytes of weights on core .* must be a whole number of at least 0, got 1.5"),
        ({}, -1, "layer must be a whole number of at least 0, got -1"),
    ],
)
def test_a_use_that_cannot_be_is_refused(sizes: dict[str, Any], layer: int, words: str) -> None:
    """A misspelt kind would otherwise count in the text and be missing from the picture."""
    with pytest.raises(ValueError, match=words):
        CoreUse((0, 0), "a", layer, sizes)


def test_an_svg_is_xml_that_holds_every_label_and_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    assert save_picture(PLAN, path) == path
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    kinds = {
        "weights",
        "activities and errors",
        "transient",
        "circular buffers",
    }  # there is no learning state
    assert {PLAN.title, *PLAN.lines, "input", "dense1", "dense2", "dense1 (1,0)", *kinds} <= set(words)
    assert "learning state" not in words
    assert "L1 of a core, 1,024,000 B" in words


def test_the_same_plan_gives_the_same_svg(tmp_path: Path) -> None:
    first, second = (save_picture(PLAN, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(PLAN, id="small"),
        pytest.param(full(), id="largest chip"),
        pytest.param(replace(PLAN, cores=(), lines=()), id="nothing in use"),
        pytest.param(replace(PLAN, title="cost: $x_{$", lines=("$\\frac$",)), id="not mathematics"),
        pytest.param(
            replace(PLAN, cores=(CoreUse((0, 0), "$x_{$", 3, {"weights": 1}),)), id="label not mathematics"
        ),
    ],
)
def test_every_plan_gives_a_png(plan: FloorPlan, tmp_path: Path) -> None:
    path = save_picture(plan, tmp_path / "new" / "folder" / "plan.PNG")
    assert path.read_bytes().startswith(PNG_MAGIC)
    assert list(path.parent.iterdir()) == [path], "a temporary file was left"


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure that save_picture made, for looking into."""
    made: list[Any] = []

    class Figure(figures.Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figures, "Figure", Figure)

    def draw_plan(plan: FloorPlan) -> Any:
        save_picture(plan, tmp_path / "plan.png")
        return made[-1]

    return draw_plan


def test_bars_stack_the_bytes_of_each_core_by_kind_up_to_its_total(drawn: Any) -> None:
    _, _, bars = drawn(PLAN).axes
    drawn_kinds = [container.get_label() for container in bars.containers]
    assert drawn_kinds == [kind for kind in KINDS if kind != "learning state"]
    ends = [0.0] * 3
    for container in bars.containers:
        for place, (use, bar) in enumerate(zip(PLAN.cores, container.patches, strict=True)):
            assert bar.get_x() == pytest.approx(ends[place])
            assert bar.get_width() == pytest.approx(use.bytes_by_kind.get(container.get_label(), 0) / KIB)
            ends[place] += bar.get_width()
    assert ends == pytest.approx([50, 250, 1300])
    limit = next(line for line in bars.lines if line.get_label().startswith("L1"))
    assert list(limit.get_xdata()) == [1000, 1000]
    assert bars.get_xlim()[1] > 1300, "what does not fit must be seen"
    assert [text.get_text() for text in bars.get_yticklabels()] == [
        "input (0,0)",
        "dense1 (1,0)",
        "dense2 (2,1)",
    ]


def test_the_grid_has_every_core_with_the_origin_at_the_top_left(drawn: Any) -> None:
    grid, _, _ = drawn(PLAN).axes
    centres = {(round(p.get_x() + 0.46), round(p.get_y() + 0.46)) for p in grid.patches}
    assert centres == {(x, y) for x in range(3) for y in range(2)}
    assert {text.get_text(): text.get_position() for text in grid.texts} == {
        "input": (0, 0),
        "dense1": (1, 0),
        "dense2": (2, 1),
    }
    low, high = grid.get_ylim()
    assert low > high


@pytest.mark.parametrize("num_layers", [1, 7, 8, 130])
def test_cores_share_a_colour_exactly_when_they_share_a_layer(drawn: Any, num_layers: int) -> None:
    places = [(x, y) for y in range(10) for x in range(13)]
    uses = tuple(CoreUse(at, "a", i % num_layers, {}) for i, at in enumerate(places))
    grid, _, bars = drawn(replace(PLAN, grid=(13, 10), cores=uses)).axes
    colours = [patch.get_facecolor() for patch in grid.patches]
    assert len(set(colours)) == num_layers
    assert all(colour == colours[i % num_layers] for i, colour in enumerate(colours))
    to_rgba = pytest.importorskip("matplotlib.colors").to_rgba
    swatches = [to_rgba(line.get_color()) for line in bars.lines if line.get_marker() == "s"]
    assert swatches == colours


@pytest.mark.parametrize("name", ["plan.pdf", "plan", "svg"])
def test_another_suffix_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"must end in \.svg or \.png, got '{name}'; rename it"):
        save_picture(PLAN, tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())


def test_a_drawing_that_fails_keeps_the_previous_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.png"
    path.write_bytes(b"previous")

    def fail(self: Any, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figures.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_picture(PLAN, path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"plan.png": b"previous"}


def test_a_folder_that_is_a_file_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_picture(PLAN, tmp_path / "file" / "plan.svg")


def test_drawing_leaves_matplotlib_global_state_alone(tmp_path: Path) -> None:
    """pyplot would pick a window system, and settings left behind would change other people's pictures."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom pctt.placement.draw import *\n"
        "plan = FloorPlan('t', (2, 1), 9, (CoreUse((0, 0), 'a', 0, {'weights': 3}),), ())\n"
        "as_text(plan)\n"
        "assert 'matplotlib' not in sys.modules, 'imported before it is needed'\n"
        "import matplotlib\nbefore = matplotlib.rcParams.copy()\n"
        "save_picture(plan, Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        # Reading the backend's name would choose one, and import pyplot for that.
        "names = [name for name in before if name != 'backend']\n"
        "assert all(matplotlib.rcParams[name] == before[name] for name in names)\n"
    )
    root = Path(draw.__file__).parents[2]
    command = [sys.executable, "-c", program, str(tmp_path / "plan.svg")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'^drawing needs matplotlib: pip install "pctt\[plot\]"\.$'
    ):
        save_picture(PLAN, tmp_path / "new" / "plan.svg")
    assert not list(tmp_path.iterdir())
