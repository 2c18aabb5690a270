"""Every page of docs/extending, followed literally: its blocks are put into a copy of the tree, and what it
says to run is run there.

A comment before a fenced block says what the block is for:

    <!-- first: PAGE -->              the blocks of another page come before those of this one
    <!-- new: FILE -->                a new file
    <!-- before: FILE: ANCHOR -->     lines that go before the line that holds ANCHOR
    <!-- after: FILE: ANCHOR -->      likewise after it
    <!-- replace: FILE: ANCHOR -->    lines in the place of the line that holds ANCHOR
    <!-- run -->                      commands, run when all blocks are in place
    <!-- run with ttnn -->            commands that need a simulator or a card: tests/device/test_extending.py

FILE must have exactly one line that holds ANCHOR, so a page cannot outlive what it was written for.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "extending"
PAGES = sorted(FOLDER.glob("*.md"))
COPIED = ("pctt", "kernels", "tests", "tools", "docs", "pyproject.toml", "README.md")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

KINDS = "first|new|before|after|replace|run with ttnn|run"
DIRECTIVE = re.compile(rf"\s*<!-- ({KINDS})(?:: (\S+?))?(?:: (.+))? -->")


@dataclass(frozen=True)
class Marked:
    """A block and what it is for. text: without the indentation of its fence."""

    what: str
    file: str
    anchor: str
    text: str
    line: int


def marked(page: Path) -> Iterator[Marked]:
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if "<!--" not in line:
            continue
        found = DIRECTIVE.fullmatch(line)
        assert found, f"{page.name}, line {number}: not understood: {line}"
        what, file, anchor = (part or "" for part in found.groups())
        body: list[str] = []
        if what != "first":
            number, fence = next(lines)
            indent = re.match(r"(\s*)```\w+$", fence)
            assert indent, f"{page.name}, line {number}: {what} is for the fenced block that comes next"
            for number, line in lines:
                if line.strip() == "```":
                    break
                assert not line or line.startswith(indent[1]), f"{page.name}, line {number}: indented less"
                body.append(line[len(indent[1]) :] + "\n")
        yield Marked(what, file, anchor.strip("`"), "".join(body), number)


def put_in_place(page: Path, tree: Path) -> None:
    """The blocks of a page, in their order, into a copy of the tree."""
    for block in marked(page):
        where = f"{page.name}, line {block.line}"
        if block.what == "first":
            put_in_place(page.parent / block.file, tree)
        elif block.what == "new":
            assert not (tree / block.file).exists(), f"{where}: {block.file} is there already"
            (tree / block.file).write_text(block.text, encoding="utf-8")
        elif not block.what.startswith("run"):
            lines = (tree / block.file).read_text(encoding="utf-8").splitlines(keepends=True)
            places = [place for place, line in enumerate(lines) if block.anchor in line]
            assert len(places) == 1, (
                f"{where}: {block.file} has {len(places)} lines with {block.anchor!r}, not one"
            )
            start, stop = {"before": (0, 0), "after": (1, 1), "replace": (0, 1)}[block.what]
            lines[places[0] + start : places[0] + stop] = [block.text]
            (tree / block.file).write_text("".join(lines), encoding="utf-8")


def run(command: str, tree: Path) -> None:
    words = shlex.split(command, comments=True)
    program = {"python": [sys.executable], "pctt": [sys.executable, "-m", "pctt"]}
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(
        [*program[words[0]], *words[1:]], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def copy_tree(target: Path) -> None:
    """What the pages change and run."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis", "figures", "results")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target / name)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    copy_tree(tmp_path)
    return tmp_path


def commands(page: Path, what: str) -> list[str]:
    return [line for block in marked(page) if block.what == what for line in block.text.splitlines()]


@pytest.mark.slow
@each_page
def test_a_page_followed_literally_gives_an_extension_that_passes_its_tests(page: Path, tree: Path) -> None:
    put_in_place(page, tree)
    assert commands(page, "run"), f"{page.name} says nothing to run"
    for command in commands(page, "run"):
        run(command, tree)


@each_page
def test_code_put_in_place_is_formatted_as_the_rest(page: Path, tree: Path) -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    put_in_place(page, tree)
    for command in ("check", "format --check"):
        run(f"python -m ruff {command} --no-cache pctt tests", tree)


def test_a_page_that_has_drifted_from_the_code_is_noticed(tree: Path) -> None:
    """An anchor that is there twice, or no more, and a file that is there already."""
    page = tree / "page.md"
    for directive, words in (
        ("before: pctt/variants.py: import", "lines with 'import', not one"),
        ("after: pctt/variants.py: no such line", "has 0 lines with"),
        ("new: pctt/variants.py", "is there already"),
    ):
        page.write_text(f"<!-- {directive} -->\n```python\nx = 1\n```\n")
        with pytest.raises(AssertionError, match=words):
            put_in_place(page, tree)


def test_blocks_go_where_their_comments_say(tree: Path) -> None:
    (tree / "there.txt").write_text("one\n  two\nthree\n")
    page = tree / "page.md"
    page.write_text(
        "- x\n  <!-- before: there.txt: `two` -->\n  ```text\n    1.5\n  ```\n"
        "<!-- after: there.txt: three -->\n```text\n4\n```\n"
        "<!-- replace: there.txt: one -->\n```text\n1\n```\n"
        "<!-- new: new.txt -->\n```text\na\n\nb\n```\n"
    )
    put_in_place(page, tree)
    assert (tree / "there.txt").read_text() == "1\n  1.5\n  two\nthree\n4\n"
    assert (tree / "new.txt").read_text() == "a\n\nb\n"
