"""Rounds: every contender in turn, so that what disturbs the machine disturbs all of them.

Only one contender works at a time; the others wait at their pipes. A round asks each of them for
`seconds`, and begins one contender later than the round before. The figure of a contender is the median
over rounds of each round's median, and a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from pctt.bench import work
from pctt.bench.peers import Answer, Contender, PeerFailed, Worker, own_contenders
from pctt.bench.result import CaseResult, Failure, Line, Variant
from pctt.bench.sameness import Measure, Sameness
from pctt.bench.work import GEMM, RATES, Case, Settings
from pctt.variants import VARIANTS

Tick = Callable[[], None]
KEY = "batch"
OTHER = "other work"


@dataclass
class Entrant:
    """A contender that is prepared, with its rounds so far."""

    contender: Contender
    worker: Worker
    answer: Answer
    same: Sameness | None
    verdict: str
    rounds: list[float] = field(default_factory=list[float])
    cpu_rounds: list[float] = field(default_factory=list[float])
    peak_bytes: int | None = None


def bench_case(
    case: Case,
    settings: Settings,
    peers: Iterable[Contender] = (),
    device: str = "cpu",
    tick: Tick = lambda: None,
) -> tuple[CaseResult, list[Failure]]:
    """All figures of one case, and what happened to the peers that have none.

    device: of pctt and of torch backprop.    tick: called after every round.
    Raises RuntimeError where a contender of our own fails.
    """
    failures = list[Failure]()
    with ExitStack() as held:
        entrants = _prepared(
            case, settings, [*own_contenders(case.algorithm), *peers], device, held, failures
        )
        for number in range(settings.rounds):
            turn = number % len(entrants)
            for entrant in entrants[turn:] + entrants[:turn]:
                try:
                    _round(entrant, settings.seconds)
                except PeerFailed as error:
                    _take_note(entrant.contender, str(error), failures)
                    entrant.worker.close()
                    entrants.remove(entrant)
            tick()
        return _result(case, settings, device, entrants), failures


def _prepared(
    case: Case,
    settings: Settings,
    contenders: Iterable[Contender],
    device: str,
    held: ExitStack,
    failures: list[Failure],
) -> list[Entrant]:
    problem = work.problem(case)
    measure, found = Measure(case, problem, settings), list[Entrant]()
    for contender in contenders:
        if any(each.peer == contender.package for each in failures):
            continue  # another way of what has failed already
        algorithm = contender.algorithm
        if algorithm == GEMM:
            given = work.gemm_message(device)
        else:
            given = work.message(case, problem, settings, algorithm, RATES[algorithm], device, contender.way)
        with ExitStack() as until_prepared:
            try:
                worker = until_prepared.enter_context(Worker(contender, settings.threads, settings.limit))
                worker.start()
                answer = worker.prepare(KEY, given)
                same = _compared(contender, answer, measure)
            except PeerFailed as error:
                _take_note(contender, str(error), failures)
                continue
            held.push(until_prepared.pop_all())
        verdict = _verdict(contender, answer, same)
        if verdict == OTHER:
            reason = "it shows no numbers" if same is None else str(same)
            _take_note(contender, f"{contender.name}: does not do the same work: {reason}.", failures)
        found.append(Entrant(contender, worker, answer, same, verdict))
    return found


def _compared(contender: Contender, answer: Answer, measure: Measure) -> Sameness | None:
    """None of what is no predictive coding, or shows no numbers."""
    if contender.algorithm not in VARIANTS or answer.activities is None or answer.weights is None:
        return None
    try:
        return measure.compare(answer.activities, answer.weights, answer.about.get("activate", "output"))
    except (ValueError, KeyError) as error:
        raise PeerFailed(f"{contender.name}: its numbers do not fit: {error}.") from None


def _verdict(contender: Contender, answer: Answer, same: Sameness | None) -> str:
    """What a table says about its work."""
    if contender.algorithm not in VARIANTS:
        return contender.algorithm
    if same is None or not same.ok:
        return OTHER
    return "same" if answer.about.get("activate", "output") == "output" else "same, tanh before W"


def _round(entrant: Entrant, seconds: float) -> None:
    found = entrant.worker.run(KEY, seconds)
    entrant.rounds.append(median(found.milliseconds))
    entrant.cpu_rounds.append(found.cpu)
    entrant.peak_bytes = found.peak_bytes


def _take_note(contender: Contender, sentence: str, failures: list[Failure]) -> None:
    """Raises RuntimeError for a contender of our own, without which there is nothing to compare."""
    if contender.package is None:
        raise RuntimeError(sentence)
    failures.append(Failure(contender.package, sentence, contender.asked))


def _result(case: Case, settings: Settings, device: str, entrants: list[Entrant]) -> CaseResult:
    by_name = {entrant.contender.name: entrant for entrant in entrants}
    gemm, pctt = by_name.pop(GEMM), by_name["pctt"]
    rate = 2 * work.gemm_size(device) ** 3 / (1e-3 * median(gemm.rounds))
    worked = rate * median(gemm.rounds) / median(gemm.cpu_rounds)
    lines = list[Line]()
    for entrant in by_name.values():
        mflop = 1e-6 * work.flops(case, entrant.contender.algorithm, settings)
        lines.append(
            Line(
                name=entrant.contender.name,
                algorithm=entrant.contender.algorithm,
                runtime=entrant.worker.runtime,
                rounds=tuple(entrant.rounds),
                cpu_rounds=tuple(entrant.cpu_rounds),
                over_pctt=beside(entrant.rounds, pctt.rounds),
                cpu_over_pctt=beside(entrant.cpu_rounds, pctt.cpu_rounds),
                mflop=mflop,
                floor=1e9 * mflop / rate,
                cpu_floor=1e9 * mflop / worked if device == "cpu" else None,
                first_batch=entrant.answer.first_batch,
                peak_bytes=entrant.peak_bytes,
                work=entrant.verdict,
                same=entrant.same,
            )
        )
    return CaseResult(
        network=case.network,
        widths=case.widths,
        batch_size=case.batch_size,
        algorithm=case.algorithm,
        device=device,
        gemm_rounds=tuple(gemm.rounds),
        gemm_cpu_rounds=tuple(gemm.cpu_rounds),
        gemm_gflops=1e-9 * rate,
        bytes_over_needed=pctt.answer.about["bytes"] / work.bytes_needed(case),
        lines=tuple(lines),
    )


def beside(times: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long: the median over rounds."""
    return median(a / b for a, b in zip(times, others, strict=True))


# --- variants -----------------------------------------------------------------------------------------------


def bench_variants(
    case: Case, settings: Settings, device: str = "cpu", tick: Tick = lambda: None
) -> list[Variant]:
    """A line per variant: milliseconds per training batch, and products, beside those of plain PC."""
    problem, times = work.problem(case), {name: list[float]() for name in VARIANTS}
    contender, steps = Contender("pctt", "pctt", "pc"), dict[str, int]()
    try:
        with Worker(contender, settings.threads, settings.limit) as worker:
            worker.start()
            for name in VARIANTS:
                given = work.message(case, problem, settings, name, work.RATE_OF_VARIANTS, device)
                steps[name] = worker.prepare(name, given).about["num_steps"]
            for _ in range(settings.rounds):
                for name in VARIANTS:
                    times[name].append(median(worker.run(name, settings.seconds / 2).milliseconds))
                tick()
    except PeerFailed as error:
        raise RuntimeError(str(error)) from None
    products = {name: work.flops(case, name, settings) for name in VARIANTS}
    return [
        Variant(
            name,
            steps[name],
            median(times[name]),
            beside(times[name], times["pc"]),
            products[name] / products["pc"],
            tuple(times[name]),
        )
        for name in VARIANTS
    ]
