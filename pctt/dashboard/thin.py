"""Fewer points of a curve that look the same: first, last, least and greatest of each stretch (M4, Jugel et
al., VLDB 2014), so no extreme is lost.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

LEAST = 16  # points of a curve, however many curves there are


def thin(values: np.ndarray, most: int) -> list[list[int]]:
    """Indices to join by lines: pieces between missing values, at most `most` indices in all.

    values: [N], NaN where missing. Up to `most` values are all kept; of more, gaps within a stretch close.
    """
    there = ~np.isnan(values)
    if len(values) <= most:
        stretches = [[i] if there[i] else [] for i in range(len(values))]
    else:
        edges = np.linspace(0, len(values), max(1, most // 4) + 1).astype(int)
        stretches = [
            _four(values, first + np.flatnonzero(there[first:last])) for first, last in pairwise(edges)
        ]
    pieces: list[list[int]] = [[]]
    for stretch in stretches:
        if stretch:
            pieces[-1] += stretch
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _four(values: np.ndarray, indices: np.ndarray) -> list[int]:
    if not len(indices):
        return []
    part = values[indices]
    kept = {0, int(part.argmin()), int(part.argmax()), len(part) - 1}
    return [int(indices[i]) for i in sorted(kept)]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window, shorter at the ends; missing values do not count and stay missing."""
    there = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(there, mean, np.nan)
