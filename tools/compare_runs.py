"""Whether two runs are bit-identical, or where they part.

Compares weights and learning state of the checkpoints, bit for bit, and the records without `seconds`. For
records that differ it names the first batch whose energies differ, and by how much in each layer.

    python tools/compare_runs.py runs/a runs/b
    python tools/compare_runs.py runs/a runs/b --json

Exit code: 0 the same, 1 they differ, 2 one cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pctt import checkpoint, record
from pctt.run import CHECKPOINT

SAME, DIFFER, UNREADABLE = 0, 1, 2
CLOCK = "seconds"  # the only field that depends on the clock
Records = Sequence[dict[str, Any]]


@dataclass
class TensorDifference:
    """greatest: absolute difference of two entries, None where shapes, formats or NaN leave none.
    count: of entries that differ.
    """

    name: str
    greatest: float | None
    count: int
    reason: str


@dataclass
class BatchDifference:
    """energies: {layer: (a, b)}, of the layers that differ."""

    step: int
    energies: dict[str, tuple[float | None, float | None]]


@dataclass
class Comparison:
    """metadata: settings and progress in the checkpoints that differ.    record_line: the first line of the
    records that differs, from 1, in both as it is there.    batch: the first batch whose energies differ.
    """

    tensors: list[TensorDifference] = field(default_factory=list[TensorDifference])
    metadata: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, tuple[Any, Any]])
    record_line: tuple[int, Any, Any] | None = None
    batch: BatchDifference | None = None

    @property
    def is_same(self) -> bool:
        return not self.tensors and not self.metadata and self.record_line is None


def compare(a: Path, b: Path) -> Comparison:
    """Raises OSError or ValueError for a folder that holds no readable run."""
    (tensors_a, metadata_a), (tensors_b, metadata_b) = (checkpoint.read(run / CHECKPOINT) for run in (a, b))
    records_a, records_b = (record.read(run / record.FILE_NAME) for run in (a, b))
    metadata = {
        name: (metadata_a.get(name), metadata_b.get(name))
        for name in dict.fromkeys([*metadata_a, *metadata_b])
        if metadata_a.get(name) != metadata_b.get(name)
    }
    return Comparison(
        compare_tensors(tensors_a, tensors_b),
        metadata,
        first_difference(records_a, records_b),
        first_batch(records_a, records_b),
    )


def compare_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[TensorDifference]:
    """The tensors that differ in a bit, by name."""
    found: list[TensorDifference] = []
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            found.append(TensorDifference(name, None, 0, f"only in {'A' if name in a else 'B'}"))
            continue
        one, other = a[name], b[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            kinds = " and ".join(f"{list(tensor.shape)} {tensor.dtype}" for tensor in (one, other))
            found.append(TensorDifference(name, None, 0, f"{kinds}".replace("torch.", "")))
            continue
        differing = (_bits(one) != _bits(other)).any(-1)
        if differing.any():
            distance = (one.double() - other.double()).abs().max().item()
            count = int(differing.sum())
            greatest = distance if distance < float("inf") else None
            found.append(TensorDifference(name, greatest, count, f"{count} of {one.numel()} entries"))
    return found


def first_difference(a: Records, b: Records) -> tuple[int, Any, Any] | None:
    """Number and contents of the first line that differs in more than its times; None for a line that one
    record lacks.
    """
    for number, (one, other) in enumerate(
        zip_longest(map(_without_clock, a), map(_without_clock, b)), start=1
    ):
        if _text(one) != _text(other):
            return number, one, other
    return None


def first_batch(a: Records, b: Records) -> BatchDifference | None:
    """The first batch, of those both records have, whose energies differ."""
    energies_a, energies_b = (
        {
            entry["step"]: entry["energies"]
            for entry in records
            if entry.get("kind") == "batch"
            and isinstance(entry.get("step"), int)
            and isinstance(entry.get("energies"), dict)
        }
        for records in (a, b)
    )
    for step in sorted(energies_a.keys() & energies_b.keys()):
        one, other = energies_a[step], energies_b[step]
        if one != other:
            names = dict.fromkeys([*one, *other])
            pairs = {name: (one.get(name), other.get(name)) for name in names}
            return BatchDifference(step, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})
    return None


def describe(found: Comparison) -> list[str]:
    """The comparison in lines of text."""
    if found.is_same:
        return ["the same: weights, learning state and record (without times), bit for bit"]
    lines: list[str] = []
    if found.batch is not None:
        lines.append(f"record: energies part at batch {found.batch.step}")
        lines += [f"  {name:<20} {_distance(*pair)}" for name, pair in found.batch.energies.items()]
    elif found.record_line is not None:
        lines.append("record: energies are the same in every batch that both have")
    else:
        lines.append("record: the same")
    if found.record_line is not None:
        number, *both = found.record_line
        lines.append(f"record: line {number} is the first that differs")
        lines += [f"  {run}: {_short(entry)}" for run, entry in zip("AB", both, strict=True)]
    lines.append(f"tensors: {len(found.tensors)} differ" if found.tensors else "tensors: the same")
    for tensor in found.tensors:
        by = f", by up to {tensor.greatest:.3g}" if tensor.greatest is not None else ""
        lines.append(f"  {tensor.name:<40} {tensor.reason}{by}")
    for name, both in found.metadata.items():
        lines.append(f"checkpoint: {name} differs")
        lines += [f"  {run}: {_short(entry)}" for run, entry in zip("AB", both, strict=True)]
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A", help="run folder")
    parser.add_argument("b", type=Path, metavar="B", help="run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    try:
        found = compare(options.a, options.b)
    except (OSError, ValueError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return UNREADABLE
    if options.json:
        print(json.dumps({"same": found.is_same, **asdict(found)}))
    else:
        print("\n".join(describe(found)))
    return SAME if found.is_same else DIFFER


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of each entry, so that NaN equals itself and -0 differs from 0."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _without_clock(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != CLOCK}


def _text(entry: Mapping[str, Any] | None) -> str:
    return json.dumps(entry)  # in which 1 and 1.0, and the order of keys, differ


def _distance(a: object, b: object) -> str:
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
        return f"{a} and {b}"
    relative = abs(a - b) / max(abs(a), abs(b))
    return f"{a!r} and {b!r}, by {abs(a - b):.3g}, relative {relative:.3g}"


def _short(entry: Any) -> str:
    text = "nothing" if entry is None else json.dumps(entry)
    return text if len(text) <= 160 else text[:160] + " ..."


if __name__ == "__main__":
    sys.exit(main())
