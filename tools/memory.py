"""Associative memories on MNIST: recall of stored images from noise and from their upper half.

Stores the first so many training images in a HierarchicalMemory and in a RecurrentMemory and recalls them,
from the image plus Gaussian noise and from its upper half. Prints the mean squared error per pixel as a
Markdown table, beside a modern Hopfield network and the nearest stored image, which keep the images
themselves.

    python tools/memory.py --counts 50 100 250 --picture docs/figures/memory.png
    python tools/memory.py --data digits --counts 20 --updates 100
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import pctt
from pctt import ask, plots
from pctt.data import load
from pctt.memory import HierarchicalMemory, RecurrentMemory, hopfield, nearest

CLEANING = pctt.Inference(50, 0.05, dynamics="momentum", momentum=0.9)
"""From noise the hierarchical memory stops early: all units being free, it ends at its mean memory."""


def error(answers: Tensor, stored: Tensor) -> float:
    return float((answers - stored).square().mean())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="mnist", help="data set (default mnist)")
    parser.add_argument("--data-dir", help="folder of its files, else PCTT_DATA")
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 100, 250], help="images stored")
    parser.add_argument("--updates", type=int, default=150, help="learning steps of the hierarchical memory")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[64, 256], help="of it, from the memory down"
    )
    parser.add_argument("--steps", type=int, default=300, help="inference steps of recall")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ridge", type=float, default=1e-4, help="of the recurrent memory")
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="a .png of the first count's images")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = load(options.data, options.data_dir)
    upper = ask.parts_known("upper", data.shape)
    units = data.train.inputs.shape[1]
    completing = pctt.Inference(options.steps, 0.05, dynamics="momentum", momentum=0.9)
    rows: list[tuple[str, Tensor]] = []
    print("| Stored | From | Given | Hierarchical | Recurrent | Hopfield | Nearest | Seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for count in options.counts:
        stored = data.train.inputs[:count]
        begun = time.process_time()
        deep = HierarchicalMemory(units, options.layers, seed=options.seed)
        epochs = -(-options.updates // -(-count // deep.batch_size))
        outcome = deep.fit(stored, epochs, pctt.Adam(options.learning_rate))
        if not outcome.status.ok:
            print(f"training failed: {outcome.message}", file=sys.stderr)
            return 1
        flat = RecurrentMemory(units)
        flat.learn(stored, options.ridge)
        spent = time.process_time() - begun
        draws = torch.randn(stored.shape, generator=torch.Generator().manual_seed(options.seed))
        cases = {
            "noise": (stored + options.noise * draws, None),
            "upper half": (stored * upper, upper),
        }
        for name, (given, known) in cases.items():
            answers = {
                "hierarchical": deep.recall(given, known, CLEANING if known is None else completing),
                "recurrent": flat.recall(
                    given, known, pctt.Inference(options.steps, 0.2, dynamics="momentum", momentum=0.9)
                ),
                "hopfield": hopfield(stored, given, known),
                "nearest": nearest(stored, given, known),
            }
            cells = [f"{error(answer, stored):.5f}" for answer in answers.values()]
            line = [str(count), name, f"{error(given, stored):.5f}", *cells, f"{spent:.0f}"]
            print("| " + " | ".join(line) + " |", flush=True)
            if count == options.counts[0]:
                rows += [("stored", stored[:10])] if not rows else []
                rows += [(f"given: {name}", given[:10])]
                rows += [(f"  {key}", answers[key][:10]) for key in ("hierarchical", "recurrent")]
        if options.picture is not None and count == options.counts[0]:
            plots.draw_pictures(options.picture, rows, data.shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
