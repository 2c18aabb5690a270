"""Line charts as inline SVG: thin lines, their colours from the page's style sheet, so that they follow its
theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pctt.dashboard.axes import Axis, axis, label
from pctt.dashboard.markup import Markup, element
from pctt.dashboard.thin import LEAST, thin

WIDE = (640, 320)
SMALL = (400, 260)
MARGINS = (94, 36, 14, 46)  # left, right, top, bottom
FEW = 40  # points up to which each has a dot


@dataclass(frozen=True)
class Series:
    """One curve. x, y: [N], NaN where there is no value.    colour: a class of the style sheet.

    look: "line"; "faint" for raw values behind a line; "ring" for single points to stand out.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    look: str = "line"


@dataclass(frozen=True)
class Chart:
    """title: for whoever cannot see it.    points: of all curves together.    y_like: values that the axis
    shall hold too, so that charts can be compared.    whole: x counts something.    size: [width, height].
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log: bool = False
    whole: bool = True
    size: tuple[int, int] = WIDE
    points: int = 12_000
    y_like: Sequence[np.ndarray] = ()

    def axes(self) -> tuple[Axis, Axis] | None:
        """The axes; None where there is nothing to draw."""
        (width, height), (left, right, top, bottom) = self.size, MARGINS
        drawn = [self._drawn(series) for series in self.series]
        across = axis(
            [series.x[~np.isnan(y)] for series, y in zip(self.series, drawn, strict=True)],
            left,
            width - right,
        )
        upward = axis([*drawn, *self.y_like], height - bottom, top, self.log)
        return None if across is None or upward is None else (across, upward)

    def svg(self) -> Markup | None:
        """The chart; None where there is nothing to draw."""
        axes = self.axes()
        if axes is None:
            return None
        across, upward = axes
        width, height = self.size
        share = max(LEAST, self.points // max(1, len(self.series)))
        curves = [self._curve(series, across, upward, share) for series in self.series]
        return element(
            "svg",
            element("title", f"{self.title}: {self._in_words()}"),
            *self._marks(across, upward),
            *curves,
            viewBox=f"0 0 {width} {height}",
            role="img",
            aria_label=f"{self.title}: {self._in_words()}",
        )

    def _drawn(self, series: Series) -> np.ndarray:
        known = ~np.isnan(series.x) & np.isfinite(series.y) & ((series.y > 0) | (not self.log))
        return np.where(known, series.y, np.nan)

    def _in_words(self) -> str:
        said: list[str] = []
        for series in self.series:
            values = self._drawn(series)
            values = values[~np.isnan(values)]
            if series.look != "faint" and len(values) and len(said) < 12:
                ends = f"{values[0]:.4g} to {values[-1]:.4g}" if len(values) > 1 else f"{values[0]:.4g}"
                said.append(f"{series.name} {ends}")
        return f"{self.y_label} by {self.x_label}; {', '.join(said)}"

    def _curve(self, series: Series, across: Axis, upward: Axis, share: int) -> Markup:
        y = self._drawn(series)
        pieces = thin(y, share if series.look == "line" else max(LEAST, share))
        at_x, at_y = across.at(series.x), upward.at(np.where(np.isnan(y), 1.0, y))
        shapes: list[Markup] = []
        if series.look != "ring":
            lines = "".join(_line(at_x[piece], at_y[piece]) for piece in pieces)
            shapes.append(element("path", d=lines, class_=series.look))
        count = sum(map(len, pieces))
        if series.look == "ring" or (series.look == "line" and count <= FEW and self.size == WIDE):
            dots = "".join(f"M{at_x[i]:.1f} {at_y[i]:.1f}h0" for piece in pieces for i in piece)
            if series.look == "ring":
                shapes += [
                    element("circle", cx=f"{at_x[i]:.1f}", cy=f"{at_y[i]:.1f}", r=6, class_="ring")
                    for piece in pieces
                    for i in piece
                ]
            else:
                shapes.append(element("path", d=dots, class_="dots"))
        return element("g", element("title", series.name), *shapes, class_=series.colour)

    def _marks(self, across: Axis, upward: Axis) -> list[Markup]:
        """Grid, numbers and names of the axes."""
        width, height = self.size
        middle = (across.start + across.end) / 2
        marks: list[Markup] = []
        grid = ""
        ticks = upward.ticks(6)
        powers = self.log and bool(ticks) and (min(ticks) < 0.01 or max(ticks) > 1e4)
        for value in ticks:
            at = float(upward.at(value))
            grid += f"M{across.start} {at:.1f}H{across.end}"
            marks.append(
                element("text", label(value, powers), x=across.start - 7, y=f"{at + 4:.1f}", class_="end")
            )
        foot = upward.start
        for value in across.ticks(6 if width > SMALL[0] else 4, self.whole):
            at = float(across.at(value))
            grid += f"M{at:.1f} {foot}v5"
            marks.append(element("text", label(value), x=f"{at:.1f}", y=foot + 19, class_="mid"))
        grid += f"M{across.start} {foot}H{across.end}"
        marks.append(element("text", self.x_label, x=middle, y=height - 8, class_="mid name"))
        turned = f"translate(14 {(upward.start + upward.end) / 2}) rotate(-90)"
        marks.append(element("text", self.y_label, transform=turned, class_="mid name"))
        return [element("path", d=grid, class_="grid"), *marks]


def _line(x: np.ndarray, y: np.ndarray) -> str:
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)]
    return f"M{points[0]}h0" if len(points) == 1 else "M" + "L".join(points)
