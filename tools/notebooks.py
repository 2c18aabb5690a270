"""Runs the notebooks of docs/notebooks and stores what they show, or sees whether that is what they show.

    python tools/notebooks.py
    python tools/notebooks.py --check docs/notebooks/first-steps.ipynb

A notebook runs from its first cell in a kernel of its own, in an empty folder, on one thread. What is stored
depends on the cells and on nothing else: times, versions and numbers of runs are left out.

--check stores nothing. Texts must be the same, numbers in them to a few per cent, since they differ in the
last digits from machine to machine; pictures must be there. A cell with the tag `timing` may say anything.

Exit code: 0; 1 if a cell fails, or with --check shows something else; 2 for a file that is no notebook.

Needs nbclient and ipykernel: pip install "pctt[notebook]".
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"
TIMEOUT = 600  # seconds for a cell
MOST_BYTES = 150_000
NEAR, SMALL = 0.05, 1e-9  # numbers that are the same to this part, or both about 0
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")
PLACE = re.compile(r"(?:^|[\s\"'(=])(?:/(?:home|root|tmp|usr|work|opt|var|Users|mnt)/|[A-Z]:\\)")
TIMING = "timing"


def read(path: Path) -> Any:
    """The notebook in a file. Raises ValueError for one that is none."""
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)  # pyright: ignore[reportUnknownVariableType]
        nbformat.validate(notebook)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # of every kind, from JSON to a schema
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no notebook: {reason}.") from None
    return notebook


def run(notebook: Any) -> None:
    """Executes all cells, in place. Raises RuntimeError with the traceback of a cell that fails."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,  # else their number depends on when the kernel sends them
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise RuntimeError(re.sub(r"\x1b\[[0-9;]*m", "", str(error))) from None


def clean(notebook: Any) -> None:
    """Leaves out, in place, what differs from run to run: counts, versions, and warnings on stderr."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in code_cells(notebook):
        cell.execution_count = None
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.pop("transient", None)
            if "execution_count" in output:
                output.execution_count = None
            if "data" in output:
                output.metadata = {}


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> list[tuple[str, str]]:
    """(kind, text) of each output of a cell, the text of a picture being what a terminal shows instead."""
    found: list[tuple[str, str]] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append((str(output.name), str(output.text)))
        elif output.output_type == "error":
            found.append(("error", str(output.evalue)))
        else:
            pictures = sorted(kind for kind in output.data if kind.startswith("image/"))
            # Of a picture of matplotlib the text is its size.
            text = "" if "image/png" in pictures else str(output.data.get("text/plain", ""))
            found.append((" ".join(pictures) or "value", text))
    return found


def same_text(one: str, other: str) -> bool:
    """Whether two texts say the same, numbers to a few per cent."""
    if NUMBER.sub("#", " ".join(one.split())) != NUMBER.sub("#", " ".join(other.split())):
        return False
    numbers = ([float(found.replace(",", "")) for found in NUMBER.findall(text)] for text in (one, other))
    return all(math.isclose(a, b, rel_tol=NEAR, abs_tol=SMALL) for a, b in zip(*numbers, strict=True))


def differences(stored: Any, now: Any) -> list[str]:
    """What a notebook shows now and did not when it was stored, a sentence each."""
    found: list[str] = []
    for number, (before, after) in enumerate(zip(code_cells(stored), code_cells(now), strict=True), start=1):
        if TIMING in before.metadata.get("tags", []):
            continue
        old, new = shown(before), shown(after)
        if [kind for kind, _ in old] != [kind for kind, _ in new]:
            kinds = (", ".join(kind for kind, _ in each) or "nothing" for each in (old, new))
            found.append("code cell {} shows {} now, stored is {}".format(number, *reversed([*kinds])))
            continue
        for (_, one), (_, other) in zip(old, new, strict=True):
            if not same_text(one, other):
                lines = difflib.unified_diff(
                    one.splitlines(), other.splitlines(), "stored", "now", lineterm=""
                )
                found.append("\n".join([f"code cell {number}:", *lines]))
    return found


def faults(notebook: Any, size: int) -> list[str]:
    """What is wrong with a notebook as it is stored.    size: of its file, in bytes."""
    found: list[str] = []
    if size > MOST_BYTES:
        found.append(f"{size:,} bytes, at most {MOST_BYTES:,}; draw smaller pictures")
    cells = code_cells(notebook)
    if not any(cell.outputs for cell in cells):
        found.append("no output is stored")
    for number, cell in enumerate(cells, start=1):
        for kind, text in shown(cell):
            if kind in ("error", "stderr"):
                found.append(f"code cell {number} ends in {kind}: {text}")
            place = PLACE.search(text)
            if place:
                found.append(f"code cell {number} shows a path of a machine: {place[0].strip()}...")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of docs/notebooks")
    parser.add_argument("--check", action="store_true", help="store nothing; exit with 1 if outputs differ")
    options = parser.parse_args(arguments)
    paths: list[Path] = options.notebooks or sorted(FOLDER.glob("*.ipynb"))
    try:
        import ipykernel  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import nbclient  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError:
        print('notebooks: running them needs pip install "pctt[notebook]".', file=sys.stderr)
        return 2
    import nbformat

    code = 0
    for path in paths:
        try:
            notebook, stored = read(path), read(path)
        except ValueError as error:
            print(f"notebooks: {error}", file=sys.stderr)
            return 2
        try:
            run(notebook)
        except RuntimeError as error:
            print(f"{path.name}: a cell fails\n{error}", file=sys.stderr)
            code = 1
            continue
        clean(notebook)
        text = nbformat.writes(notebook) + "\n"
        found = faults(notebook, len(text.encode()))
        if options.check:
            found += differences(stored, notebook)
        elif not found:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        for fault in found:
            print(f"{path.name}: {fault}", file=sys.stderr)
        code = 1 if found else code
        if not found:
            print(f"{path.name}: {len(text.encode()):,} bytes, {'the same' if options.check else 'stored'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
