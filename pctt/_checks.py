"""Checks of arguments that more than one module makes, so that the same mistake gets the same sentence."""

from __future__ import annotations

import math
from typing import Any


def require_finite_positive(name: str, value: float) -> None:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")


def require_between(name: str, value: float, low: float, high: float) -> None:
    """low <= value < high"""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value!r}.")


def require_betas(rule: Any) -> None:
    """Two decays in [0, 1) as `rule.betas`, of a frozen dataclass; a list becomes a tuple."""
    betas = rule.betas
    if isinstance(betas, list):  # as it comes out of TOML or JSON
        betas = tuple(betas)
        object.__setattr__(rule, "betas", betas)
    if not isinstance(betas, tuple) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}.")
    for beta in betas:
        require_between("betas", beta, 0.0, 1.0)


def require_count(name: str, value: int, least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
