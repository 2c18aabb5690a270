"""The notebooks show what their cells give, and the tool that runs them notices when they do not."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "notebooks.py"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
WANTED = 'notebooks are run by nbclient and ipykernel: pip install "pctt[notebook]"'
nbformat = pytest.importorskip("nbformat", reason=WANTED)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """The tool in a process of its own: what Jupyter leaves open and warns of is no matter of ours."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=WANTED)
    command = [sys.executable, "-W", "ignore", str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# --- those of the documentation -----------------------------------------------------------------------------


def test_there_are_some() -> None:
    assert len(NOTEBOOKS) >= 4


@each
def test_running_a_notebook_shows_what_is_stored(path: Path) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(
            package, reason='the notebooks draw and read digits: pip install "pctt[plot,data]"'
        )
    before = path.read_bytes()
    done = run("--check", path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before


@each
def test_what_is_stored_is_whole_small_and_of_no_machine(path: Path) -> None:
    notebook = tool.read(path)
    assert not tool.faults(notebook, path.stat().st_size)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/|site-packages|\d\d:\d\d:\d\d", text)
    tool.clean(notebook)
    assert nbformat.writes(notebook) + "\n" == text, "stored by hand; run tools/notebooks.py"
    pictures = [kind for cell in tool.code_cells(notebook) for kind, _ in tool.shown(cell) if "image" in kind]
    assert pictures


@each
def test_every_cell_that_ends_in_a_value_has_shown_it(path: Path) -> None:
    """A notebook shows an expression that stands last without a semicolon, and what is printed."""
    for number, cell in enumerate(tool.code_cells(tool.read(path)), start=1):
        last = ast.parse(cell.source).body[-1]
        is_value = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call)
        if is_value or "print(" in cell.source:
            assert cell.outputs, f"code cell {number} has no output"


@each
def test_links_in_the_text_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in tool.read(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    assert links
    for link in links:
        assert re.match(r"https?:", link) or (path.parent / link).is_file(), link


# --- the tool -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("energy 1.00 -> 0.50", "energy 1.02 -> 0.49", True),
        ("energy 1.00 -> 0.50", "energy 1.00 -> 0.60", False),
        ("energy 1.00", "energy -1.00", False),
        ("1,437 samples", "1437 samples", True),
        ("1,437 samples", "2,437 samples", False),
        ("right: True", "right: False", False),
        ("off by 1e-17", "off by 3e-16", True),
        ("a  b\n", "a b", True),
        ("nan", "0.0", False),
        ("[1, 2]", "[1, 2, 3]", False),
    ],
)
def test_texts_are_the_same_but_for_the_last_digits(one: str, other: str, same: bool) -> None:
    assert tool.same_text(one, other) is same


def notebook_of(source: str, *outputs: Any, tags: tuple[str, ...] = ()) -> Any:
    cell = nbformat.v4.new_code_cell(source, id="cell")
    cell.outputs = list(outputs)
    cell.metadata = {"tags": list(tags)} if tags else {}
    return nbformat.v4.new_notebook(cells=[cell])


def printed(text: str, name: str = "stdout") -> Any:
    return nbformat.v4.new_output("stream", name=name, text=text)


def test_another_output_and_a_lost_one_are_differences_unless_they_are_times() -> None:
    stored, now = notebook_of("f()", printed("0.5 ms\n")), notebook_of("f()", printed("0.9 ms\n"))
    assert len(tool.differences(stored, now)) == 1
    assert len(tool.differences(stored, notebook_of("f()"))) == 1
    assert not tool.differences(stored, stored)
    timed = (notebook_of("f()", *cell.cells[0].outputs, tags=("timing",)) for cell in (stored, now))
    assert not tool.differences(*timed)


@pytest.mark.parametrize(
    ("output", "word"),
    [
        (printed("saved in /home/somebody/run\n"), "path"),
        (printed("C:\\Users\\me\\run\n"), "path"),
        (printed("a warning\n", "stderr"), "stderr"),
        (nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]), "error"),
    ],
)
def test_what_must_not_be_stored_is_a_fault(output: Any, word: str) -> None:
    (found,) = tool.faults(notebook_of("f()", output), 1000)
    assert word in found


def test_an_empty_and_a_large_notebook_are_faults() -> None:
    assert "no output" in tool.faults(notebook_of("f()"), 1000)[0]
    assert "draw smaller" in tool.faults(notebook_of("f()", printed("x")), 200_000)[0]


def test_a_notebook_out_of_date_is_noticed_and_stored_anew(tmp_path: Path) -> None:
    path = tmp_path / "old.ipynb"
    stale = notebook_of("print('two')\n1 + 1", printed("one\n"))
    path.write_text(nbformat.writes(stale), encoding="utf-8")
    before = path.read_bytes()
    done = run("--check", path)
    assert done.returncode == 1 and "code cell 1" in done.stderr
    assert path.read_bytes() == before
    assert run(path).returncode == 0
    assert tool.shown(tool.read(path).cells[0]) == [("stdout", "two\n"), ("value", "2")]
    assert not tool.read(path).cells[0].execution_count


def test_a_cell_that_fails_stores_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.ipynb"
    path.write_text(nbformat.writes(notebook_of("raise ValueError('no such thing')")), encoding="utf-8")
    before = path.read_bytes()
    done = run(path)
    assert done.returncode == 1 and "no such thing" in done.stderr
    assert path.read_bytes() == before and [found.name for found in tmp_path.iterdir()] == ["bad.ipynb"]


def test_what_is_no_notebook_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.ipynb").write_text("no", encoding="utf-8")
    for name in ("text.ipynb", "absent.ipynb"):
        done = run(tmp_path / name)
        assert done.returncode == 2 and name in done.stderr and "Traceback" not in done.stderr
