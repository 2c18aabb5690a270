"""Networks of many kinds on mock cards: what the Tenstorrent backend asks of ttnn is legal, fits and stays.

Per card one process trains every case on two batches, the second with compiling forbidden, and notes what
ttnn did: python test_matrix.py CARD, under the variables of tools/mock_sfpi.py, prints one JSON line a case.
"""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import pctt
from pctt.backends.precision import POLICIES
from pctt.energies import Gaussian
from pctt.network import Network
from tools import mock_sfpi

pytestmark = pytest.mark.slow


FACTORS: dict[str, list[Any]] = {
    # Not multiples of a tile's 32; one tile; more layers than a row of the grid has cores; wide ones, which
    # are spread over the cores; a width of one.
    "widths": [
        (40, 70, 70, 70, 5),
        (33, 10),
        (64, *[64] * 12),
        (784, 256, 256, 10),
        (1, 1, 1, 1),
        (64, 64, 96, 96, 32),
    ],
    "activation": ["tanh", "relu", "gelu", "sigmoid", "silu", "leaky_relu", "hard_tanh"],
    "policy": list(POLICIES),
    "learning": [
        pctt.SGD(0.1),
        pctt.SGD(0.1, momentum=0.9, weight_decay=0.01),
        pctt.Adam(1e-2, weight_decay=0.01),
        pctt.AdamW(1e-2),
    ],
    "inference": [
        pctt.Inference(num_steps=4, rate=0.1),
        pctt.Inference(num_steps=4, rate=0.1, dynamics="momentum", momentum=0.5),
        pctt.Inference(num_steps=4, rate=0.1, prediction="fixed"),
    ],
    "batch": [5, 32, 64],
    "activate": ["output", "input"],
    "bias": [True, False],
    "grouped": [True, False],
}


STEPS = pctt.Inference(num_steps=4, rate=0.1)
SGD = pctt.SGD(0.1, momentum=0.9)
VARIED = {
    activate: pctt.chain(40, [*[pctt.Dense(70, "tanh", activate=activate)] * 3, pctt.Dense(10)])
    for activate in ("output", "input")
}


def pairwise(factors: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Choices of one level per factor, such that every pair of levels of two factors is in one of them.

    Each choice starts from a pair not yet covered and takes, factor by factor, the level that covers most.
    """
    names = list(factors)
    levels = [range(len(factors[name])) for name in names]
    open_pairs = {
        ((a, i), (b, j)): None  # a dict keeps its order, a set would not
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in levels[a]
        for j in levels[b]
    }
    while open_pairs:
        chosen = dict(next(iter(open_pairs)))
        for factor in range(len(names)):
            if factor not in chosen:
                chosen[factor] = max(
                    levels[factor],
                    key=lambda level: sum(
                        tuple(sorted([(factor, level), other])) in open_pairs for other in chosen.items()
                    ),
                )
        for pair in itertools.combinations(sorted(chosen.items()), 2):
            open_pairs.pop(pair, None)
        yield {name: factors[name][chosen[factor]] for factor, name in enumerate(names)}


@dataclass(frozen=True)
class Case:
    """One network, and how it is relaxed and trained."""

    name: str
    net: Network
    clamped: tuple[str, ...]
    inference: pctt.Inference = FACTORS["inference"][0]
    learning: Any = FACTORS["learning"][0]
    policy: str = "mixed"
    batch: int = 32
    grouped: bool = True
    placed: tuple[str, ...] = ()
    record: bool = False


def paired(widths: tuple[int, ...], activation: str, activate: str, bias: bool, **settings: Any) -> Case:
    last = activation if activate == "input" else "identity"
    functions = [*[activation] * (len(widths) - 2), last]
    layers = [
        pctt.Dense(units, function, bias=bias, activate=activate)
        for units, function in zip(widths[1:], functions, strict=True)
    ]
    net = pctt.chain(widths[0], layers)
    learning = settings["learning"]
    words = (
        "-".join(map(str, widths)),
        f"{activation} at the {activate}",
        "" if bias else "no bias",
        f"{settings['inference'].prediction} {settings['inference'].dynamics}",
        f"{type(learning).__name__}{' momentum' if getattr(learning, 'momentum', 0) else ''}",
        settings["policy"],
        f"batch of {settings['batch']}",
        "" if settings["grouped"] else "not grouped",
    )
    return Case(", ".join(filter(None, words)), net, ("input", net.output), **settings)


def cases(num_cores: int = 64) -> list[Case]:
    """num_cores: of the card."""
    tanh, precise = pctt.Dense(70, "tanh"), pctt.Dense(70, "tanh", energy=Gaussian(2.0))
    units = Gaussian(tuple(0.5 + number for number in range(10)))
    plain = pctt.chain(40, [tanh, tanh, pctt.Dense(10)])
    long = pctt.chain(32, [pctt.Dense(32, "tanh")] * (num_cores + 4))
    both = ("input", "dense3")
    return [
        *(paired(**choice) for choice in pairwise(FACTORS)),
        Case("precisions", pctt.chain(40, [precise, precise, pctt.Dense(10, energy=units)]), both),
        Case("free input", plain, ("dense3",)),
        Case("free output", plain, ("input",)),
        Case("placed hidden nodes", plain, both, placed=("dense1", "dense2")),
        Case("placed free input", plain, ("dense3",), placed=("input",)),
        Case("energies of every step", plain, both, record=True),
        Case("more layers than cores", long, ("input", long.output)),
        *(
            Case(
                f"{name}, tanh at the {activate}", net, ("input", net.output), pctt.variant(name, STEPS), SGD
            )
            for name in ("exact", "zil", "ipc", "epc", "gauss-seidel", "boosted")
            for activate, net in VARIED.items()
        ),
        Case("a start at zero", plain, both, pctt.Inference(4, 0.1, initial="zeros")),
        Case("a carried start", plain, both, pctt.Inference(4, 0.1, initial="carried")),
    ]


# --- in a process with a mock card --------------------------------------------------------------------------


def run_case(case: Case, device: Any) -> dict[str, Any]:
    """What ttnn did in a training batch after the first, and what it allocated."""
    import ttnn

    from pctt.backends.lowering import is_reordered, num_programs
    from pctt.placement.budget import budget

    def allocated() -> int:
        return ttnn.device.get_memory_view(device, ttnn.BufferType.L1).total_bytes_allocated_per_bank

    device.clear_program_cache()  # a program that is there already would show no circular buffers
    if allocated():
        return {"error": f"{allocated()} bytes of the case before are still allocated"}
    engine = pctt.Engine(
        case.net,
        pctt.init(case.net),
        case.inference,
        case.clamped,
        case.placed,
        case.learning,
        backend="tenstorrent",
        grouped=case.grouped,
        precision=POLICIES[case.policy],
        batch_size=case.batch,
    )
    widths = dict(zip(case.net.nodes, case.net.widths, strict=True))

    def train(batch: int, step: int) -> None:
        given = {name: torch.ones(batch, widths[name]) / widths[name] for name in case.clamped + case.placed}
        engine.relax(given, case.record)
        engine.learn(0.1, step)

    def captured(batch: int, step: int) -> list[dict[str, Any]]:
        """ttnn's own record of what it did: programs run, buffers allocated."""
        ttnn.graph.begin_graph_capture(ttnn.graph.RunMode.NORMAL)
        try:
            train(batch, step)
        finally:
            graph = ttnn.graph.end_graph_capture()
        return graph

    first = captured(case.batch, 1)
    before = allocated()
    device.set_program_cache_misses_allowed(False)
    try:
        second = captured(case.batch, 2)
        train(case.batch - 2, 3)  # the last batch of an epoch
    finally:
        device.set_program_cache_misses_allowed(True)

    program = engine.program
    sections = [program.initialise, program.measure_initial]
    for number in range(1, program.num_steps + 1):
        sections += [program.step(number), *[program.measure] * case.record]
    sections += [program.finish, program.measure, program.gradients, program.update]
    operations = [instruction for section in sections for instruction in section]
    gathered = [  # whose entries are brought together first
        i
        for i in operations
        if num_programs(i) > 1
        and is_reordered(engine.backend.buffer(i.inputs[0].buffer), i.inputs[0], engine.backend.grid[0])
    ]
    planned = budget(program, engine.backend.chip, engine.backend.grid, engine.backend.planned_rows)
    changes = [
        {"buffer_allocate": 1, "buffer_deallocate": -1}.get(node["node_type"], 0)
        * int((node["params"] or {}).get("max_size_per_bank", 0))
        for node in second
    ]
    return {
        "error": None,
        "programs": sum(node["node_type"] == "program_execution" for node in second),
        "operations": sum(map(num_programs, operations)) + len(gathered),
        "kinds": sorted(
            {
                node["params"]["type"]
                for node in (*first, *second)
                if node["node_type"] in ("buffer", "buffer_allocate")
            }
        ),
        "tensors": before + max(itertools.accumulate(changes, initial=0)),
        "tensors planned": planned.tensors + planned.reserved,
        "circular buffers": largest_circular(first),
        "circular buffers planned": planned.circular_buffers,
    }


def largest_circular(graph: list[dict[str, Any]]) -> int:
    """Bytes of the circular buffers, of the program that has most, that are not aliased to tensors."""
    sizes = [0]
    for node in graph:
        if node["node_type"] == "circular_buffer_deallocate_all":
            sizes.append(0)
        elif node["node_type"] == "circular_buffer_allocate" and node["params"]["globally_allocated"] == "0":
            sizes[-1] += int(node["params"]["size"])
    return max(sizes)


def main() -> None:
    from pctt.backends.devices import close_devices, open_device

    torch.set_num_threads(1)
    device = open_device()
    size = device.compute_with_storage_grid_size()
    for case in cases(size.x * size.y):
        try:
            found = run_case(case, device)
        except (RuntimeError, ValueError, NotImplementedError, AssertionError, TypeError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()  # an engine is full of cycles, and its tensors must go before the next
        print(json.dumps({"case": case.name, **found}), flush=True)
    close_devices()


# --- in pytest ----------------------------------------------------------------------------------------------

Found = dict[str, dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[pytest.param(chip, marks=pytest.mark.xdist_group(f"mock {chip}")) for chip in mock_sfpi.CARDS],
)
def found(request: pytest.FixtureRequest, mock_cards: Any) -> Found:
    """What `run_case` found for each case, by name, on one mock card."""
    printed = mock_cards.run(request.param, __file__)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
    rows = {line.pop("case"): line for line in lines}
    assert len(rows) == len(cases()), printed[-4000:]
    return rows


def run(found: Found) -> Found:
    """The cases that ran to their end."""
    return {name: row for name, row in found.items() if row["error"] is None}


def test_every_operation_is_legal_and_the_second_batch_compiles_nothing(found: Found) -> None:
    """A shape, format or place that ttnn refuses, L1 that overflows, a program built again in each batch."""
    errors = {name: row["error"] for name, row in found.items() if row["error"] is not None}
    assert not errors, "\n".join(f"{name}: {error}" for name, error in errors.items())


def test_every_card_operation_is_one_program(found: Found) -> None:
    """Else ttnn has put in what nobody asked for: a move to interleaved memory, a change of format."""
    wrong = {n: row for n, row in run(found).items() if row["programs"] != row["operations"]}
    assert run(found) and not wrong, wrong


def test_nothing_lies_outside_l1(found: Found) -> None:
    wrong = {name: row for name, row in run(found).items() if row["kinds"] != ["L1"]}
    assert run(found) and not wrong, wrong


def test_the_budget_covers_what_ttnn_allocates(found: Found) -> None:
    """A budget that is too small lets networks pass that end in an out-of-memory error on the card."""
    wrong = {
        name: row
        for name, row in run(found).items()
        if any(row[what] > row[f"{what} planned"] for what in ("tensors", "circular buffers"))
    }
    assert run(found) and not wrong, wrong


def test_every_pair_of_levels_is_in_a_case() -> None:
    factors = {"a": [0, 1, 2], "b": ["x", "y"], "c": [True, False], "d": [0, 1, 2, 3]}
    rows = list(pairwise(factors))
    for one, other in itertools.combinations(factors, 2):
        pairs = {(row[one], row[other]) for row in rows}
        assert pairs == set(itertools.product(factors[one], factors[other]))
    assert len(rows) < 3 * 2 * 2 * 4 / 2


if __name__ == "__main__":
    main()
