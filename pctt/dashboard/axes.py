"""Where a value lies on an axis, and which values are marked on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

GREATEST, LEAST = 1e300, 1e-300  # values on a linear and on a logarithmic axis, whose ends are beyond
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """low, high: values at the ends.    start, end: the same in units of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, values: np.ndarray | float) -> np.ndarray:
        """Where `values` lie."""
        low, high, at = self.low, self.high, np.clip(np.asarray(values, dtype=float), -GREATEST, GREATEST)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), np.log10(np.maximum(at, LEAST))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int, whole: bool = False) -> list[float]:
        """At most about `most` round values between the ends.    whole: whole numbers only."""
        if not self.log:
            return _round_numbers(self.low, self.high, most, whole)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        if last - first >= 1:
            step = math.ceil((last - first + 1) / most)
            return [10.0**power for power in range(first, last + 1, step)]
        finer = [
            mantissa * 10.0**power for power in range(first - 1, last + 1) for mantissa in (1.0, 2.0, 5.0)
        ]
        within = [value for value in finer if self.low <= value <= self.high]
        return within if len(within) > 1 else _round_numbers(self.low, self.high, most, False)


def axis(values: list[np.ndarray], start: float, end: float, log: bool = False) -> Axis | None:
    """An axis that holds all `values`, those above 0 where it is logarithmic; None if there are none."""
    each = np.concatenate([np.empty(0), *(part.ravel() for part in values)])
    each = each[np.isfinite(each) & ((each > 0) | (not log))]
    if not len(each):
        return None
    low, high = float(each.min()), float(each.max())
    if log:
        low, high = max(low, LEAST), max(high, LEAST)
        room = min(max((high / low) ** 0.03, 1.02), 1e6)
        return Axis(low / room, high * room, start, end, True)
    low, high = (min(max(end, -GREATEST / 2), GREATEST / 2) for end in (low, high))
    room = 0.03 * (high - low) or max(1.0, abs(low)) * 0.05
    return Axis(low - room, high + room, start, end)


def _round_numbers(low: float, high: float, most: int, whole: bool) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    count = min(int(math.floor(high / step + 1e-9) - first), 2 * most)
    return [(first + i) * step for i in range(count + 1)]


def label(value: float, powers: bool = False) -> str:
    """A mark's number, short.    powers: powers of ten as such."""
    if powers:
        power = round(math.log10(value))
        if math.isclose(value, 10.0**power):
            return "10" + str(power).translate(_RAISED)
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}"
    digits, power = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
