"""The benchmark runs and counts right; what it times is nobody's business here."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from pctt.variants import VARIANTS

BENCH = Path(__file__).parents[2] / "tools" / "bench.py"


def hand_count(widths: list[int], batch_size: int, num_steps: int) -> int:
    """FLOPs of the products of a training step: sweep, gradients, T x (prediction, feedback) of layers 2..L.

    From a feedforward start the error reaches node l at step L - l: step t needs feedback and prediction of
    the last t layers, layer 2 at the earliest.
    """
    layers = [2 * batch_size * fan_in * fan_out for fan_in, fan_out in pairwise(widths)]
    steps = [2 * sum(layers[max(1, len(layers) - t) :]) for t in range(1, num_steps + 1)]
    return 2 * sum(layers) + sum(steps)


@pytest.mark.slow
def test_the_benchmark_prints_one_object_per_case_with_the_flops_counted_by_hand():
    command = [sys.executable, BENCH, "--rounds", "1", "--seconds", "0.01", "--threads", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    figures, variants = lines[:3], lines[3:]
    cases = [([784, 256, 256, 10], 64), ([784, 256, 256, 10], 256), ([784, *[128] * 9, 10], 64)]
    for entry, (widths, batch_size) in zip(figures, cases, strict=True):
        assert entry["batch_size"] == batch_size
        assert entry["mflop"] * 1e6 == pytest.approx(hand_count(widths, batch_size, 20), rel=1e-12)
        # the bound the project set itself: no more than twice what nobody can do without
        assert entry["bytes_over_needed"] <= 2.0
    assert [line["variant"] for line in variants] == list(VARIANTS)
    products = {line["variant"]: line["flops_over_pc"] for line in variants}
    # A pair takes everything twice; weights that move at every step take a gradient and a sweep of all layers
    # then: 784-256-256-10, T=20, sweeps and gradients of all layers 1 + 1 and 20 + 21, feedback of 2 and 3.
    assert products["pc"] == 1.0 and products["nudge+-"] == pytest.approx(2.0)
    first, others = 784 * 256, 256 * 256 + 256 * 10
    plain = hand_count([784, 256, 256, 10], 64, 20) / 128
    assert products["ipc"] == pytest.approx((41 * first + 61 * others) / plain)
