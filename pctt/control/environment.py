"""The environments of gymnasium, an optional extra."""

from __future__ import annotations

import importlib
from typing import Any


def environment(name: str, **settings: Any) -> Any:
    """gymnasium.make(name, **settings). Raises ModuleNotFoundError where gymnasium is not installed."""
    try:
        gymnasium = importlib.import_module("gymnasium")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the environment "{name}" comes with gymnasium, which is missing; pip install "pctt[control]"'
        ) from error
    return gymnasium.make(name, **settings)
