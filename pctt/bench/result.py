"""What a benchmark found, as text and as numbers; times in milliseconds per training batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from pctt.bench.sameness import Sameness

NAME = 17  # columns of a name in a table


@dataclass(frozen=True)
class Line:
    """A contender in one case.

    runtime: versions of what it runs on.    rounds: the median of each.    cpu_rounds: milliseconds that all
    its threads have worked per batch, in each.    cpu_over_pctt: how many times as much work.
    over_pctt: how many times as long as pctt.    mflop: of its algorithm's products.    floor: their time.
    cpu_floor: what all threads work for them, None where they are not on the CPU.
    first_batch: seconds of the first training batch, with compilation and all that is set up for it.
    peak_bytes: the most its process has held.    work: "same", "backprop" or what else it does. same: how far
    its numbers are from ours.
    """

    name: str
    algorithm: str
    runtime: dict[str, str]
    rounds: tuple[float, ...]
    cpu_rounds: tuple[float, ...]
    over_pctt: float
    cpu_over_pctt: float
    mflop: float
    floor: float
    cpu_floor: float | None
    first_batch: float
    peak_bytes: int | None
    work: str
    same: Sameness | None = None

    @property
    def ms(self) -> float:
        return median(self.rounds)

    @property
    def cpu_ms(self) -> float:
        return median(self.cpu_rounds)

    def to_dict(self) -> dict[str, Any]:
        figures = {
            "rounds": list(self.rounds),
            "cpu_rounds": list(self.cpu_rounds),
            "ms": self.ms,
            "ms_range": [min(self.rounds), max(self.rounds)],
            "cpu_ms": self.cpu_ms,
            "over_floor": self.ms / self.floor,
            "cpu_over_floor": None if self.cpu_floor is None else self.cpu_ms / self.cpu_floor,
        }
        return {**asdict(self), **figures}


@dataclass(frozen=True)
class CaseResult:
    """One network, batch size and algorithm on one device.

    gemm_rounds: milliseconds of the square product in each round.    gemm_gflops: their rate.
    bytes_over_needed: what pctt's engine holds over what nobody can do without.
    """

    network: str
    widths: tuple[int, ...]
    batch_size: int
    algorithm: str
    device: str
    gemm_rounds: tuple[float, ...]
    gemm_cpu_rounds: tuple[float, ...]
    gemm_gflops: float
    bytes_over_needed: float
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.network}, B={self.batch_size}, {self.algorithm}{where}"

    def to_dict(self) -> dict[str, Any]:
        lists = {
            "widths": list(self.widths),
            "gemm_rounds": list(self.gemm_rounds),
            "gemm_cpu_rounds": list(self.gemm_cpu_rounds),
        }
        return {**asdict(self), **lists, "lines": [line.to_dict() for line in self.lines]}

    def as_text(self) -> str:
        """A table, at most 110 columns wide."""
        ours = self.lines[0]
        lines = [
            f"{self.title}: {ours.mflop:,.0f} MFLOP, {ours.floor:.2f} ms at the {self.gemm_gflops:,.0f} "
            f"GFLOP/s of a large product; buffers {self.bytes_over_needed:.2f}x the least",
            f"{'contender':<{NAME}}{'ms [least, most]':>25}{'/floor':>9}{'/pctt':>7}{'CPU ms':>9}"
            f"{'first s':>9}{'peak MB':>9}  work",
        ]
        for line in self.lines:
            span = f"{line.ms:.2f} [{min(line.rounds):.2f}, {max(line.rounds):.2f}]"
            peak = "" if line.peak_bytes is None else f"{line.peak_bytes / 1e6:.0f}"
            lines.append(
                f"{line.name:<{NAME}}{span:>25}{line.ms / line.floor:>9.2f}{line.over_pctt:>7.2f}"
                f"{line.cpu_ms:>9.2f}{line.first_batch:>9.2f}{peak:>9}  {line.work}"
            )
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Variant:
    """A line of the table of variants. over_pc: of its time.    flops_over_pc: of its products."""

    variant: str
    num_steps: int
    ms: float
    over_pc: float
    flops_over_pc: float
    rounds: tuple[float, ...]


def variants_as_text(title: str, lines: Iterable[Variant]) -> str:
    text = [
        f"{title}: variants, run in turn",
        f"{'variant':<14}{'T':>4}{'ms':>9}{'/pc':>8}{'products/pc':>13}",
    ]
    text += [
        f"{line.variant:<14}{line.num_steps:>4}{line.ms:>9.2f}{line.over_pc:>8.2f}{line.flops_over_pc:>13.2f}"
        for line in lines
    ]
    return "\n".join(text) + "\n"


@dataclass(frozen=True)
class Failure:
    """A peer without figures, or with some that say nothing. asked: whether the user named it."""

    peer: str
    sentence: str
    asked: bool


@dataclass(frozen=True)
class Benchmark:
    """environment: machine, versions, date.    settings: of the run."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    cases: tuple[CaseResult, ...]
    variants: tuple[Variant, ...]
    failures: tuple[Failure, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "environment": self.environment,
            "settings": self.settings,
            "cases": [case.to_dict() for case in self.cases],
            "variants": [{**asdict(line), "rounds": list(line.rounds)} for line in self.variants],
            "failed": [asdict(failure) for failure in self.failures],
        }
