"""Folders that a command leaves: a free name, and all of it or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pctt.typed import UsageError


def free_folder(name: str) -> Path:
    """The first of runs/NAME-1, -2, ... that is not there."""
    number = 1
    while (Path("runs") / f"{name}-{number}").exists():
        number += 1
    return Path("runs") / f"{name}-{number}"


def new_folder(out: Path | None, name: str) -> Path:
    """`out`, or one that is free. Raises UsageError if `out` holds something."""
    if out is None:
        return free_folder(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; choose another --out.")
    return out


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """A folder beside `folder` that takes its name when all is done, and is gone if something fails."""
    folder = folder.absolute()
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder.parent}: {error.strerror}; choose another --out.") from None
    try:
        yield staging
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
