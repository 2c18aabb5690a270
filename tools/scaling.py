"""Prints the tables of docs/scaling.md: chains of one width on boxes of several chips, predicted.

python tools/scaling.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache

import pctt
from pctt.placement.boxes import BOXES
from pctt.placement.scaling import Scaling, scaling

WIDTHS = (128, 256, 512)
WIDEST = 1024
DEPTHS = (8, 32, 128)
NUM_STEPS = 20
ONE_CHIP = "galaxy"
"""The box whose chip is an n150's."""


@cache
def planned(width: int, depth: int, box: str) -> Scaling:
    """Layers of one width with tanh and biases, Adam, batches of 32 for each copy."""
    net = pctt.chain(width, [pctt.Dense(width, "tanh") for _ in range(depth)])
    return scaling(net, box, 32, pctt.Inference(NUM_STEPS, 0.1), pctt.Adam(1e-3))


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:,.1f}"


def rows_of_chips() -> Iterator[str]:
    """Chips that one copy takes, and an inference step on one of them."""
    yield "| Width | Cores per layer | Layers per chip | " + " | ".join(f"{d} layers" for d in DEPTHS) + " |"
    yield "|---|---|---|" + "---|" * len(DEPTHS)
    for width in (*WIDTHS, WIDEST):
        deepest = planned(width, DEPTHS[-1], ONE_CHIP)
        share = deepest.shares[0]
        held = share.last - share.first + 1
        chips = (f"{planned(width, depth, ONE_CHIP).num_chips}" for depth in DEPTHS)
        yield f"| {width} | {share.cores // (held + 1)} | {held} | {' | '.join(chips)} |"


def rows_of_steps() -> Iterator[str]:
    """An inference step where the network is cut over chips: alone, and with both messages of a boundary."""
    yield "| Box | Width | Up, B | Down, B | Messages, us | Step alone, us | Nothing hidden, us | Adds |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in BOXES:
        for width in (*WIDTHS, WIDEST) if name == ONE_CHIP else WIDTHS:
            found = planned(width, DEPTHS[-1], name)
            alone, exposed = found.step_alone, found.step_exposed
            assert alone is not None and exposed is not None
            up, down = found.boundaries[0]
            yield (
                f"| {name} | {width} | {up:,} | {down:,} | {microseconds(found.message_seconds)} | "
                f"{microseconds(alone)} | {microseconds(exposed)} | {100 * (exposed / alone - 1):.0f} % |"
            )


def rows_of_training() -> Iterator[str]:
    """A training step of one copy, the sum of gradients over all copies, and what the box does per second."""
    yield (
        "| Box | Width | Layers | Chips per copy | Copies | Training step, us | of it the first sweep | "
        "all_reduce, us | Samples per second |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in BOXES:
        for width in WIDTHS:
            for depth in DEPTHS:
                found = planned(width, depth, name)
                if not found.replicas:
                    yield f"| {name} | {width} | {depth} | {found.num_chips} | 0 | - | - | - | - |"
                    continue
                training, samples = found.training, found.samples_per_second
                assert training is not None and samples is not None
                sweep = sum(share.before or 0.0 for share in found.shares) / training
                yield (
                    f"| {name} | {width} | {depth} | {found.num_chips} | {found.replicas} | "
                    f"{microseconds(training)} | {100 * sweep:.0f} % | "
                    f"{microseconds(found.reduce_seconds)} | {samples:,.0f} |"
                )


TABLES = (rows_of_chips, rows_of_steps, rows_of_training)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("\n\n".join("\n".join(table()) for table in TABLES))


if __name__ == "__main__":
    main()
