"""`pctt dashboard`."""

from __future__ import annotations

from pathlib import Path

from pctt.dashboard.document import read_all, render, write
from pctt.report import print_json

NAME = "dashboard.html"


def dashboard(
    run: Path, others: tuple[Path, ...] = (), /, *, out: Path | None = None, json: bool = False
) -> int:
    """A page about one run or several: curves, inference, accuracy, differences; opens without a network.

    Args:
        run: Run folder that `pctt train` wrote; a run under way too.
        others: More of them, to compare.
        out: The .html to write; else dashboard.html, in the run folder if it is one run.
        json: Print one JSON object instead of text.
    """
    found = read_all([run, *others])
    path = out or (Path(NAME) if others else run / NAME)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"a page's name must end in .html, got {path.name!r}; rename it.")
    write(render(found), path)
    warnings = [f"{one.name}: {sentence}" for one in found for sentence in one.warnings]
    if json:
        fields = {"out": str(path), "runs": [str(one.folder) for one in found], "warnings": warnings}
        print_json("dashboard", fields)
    else:
        print(f"{len(found)} {'run' if len(found) == 1 else 'runs'} in {path}")
        for sentence in warnings:
            print(f"  {sentence}")
    return 0
