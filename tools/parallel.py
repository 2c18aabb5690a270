"""Milliseconds per training batch of one process, and of several: data parallel and layer parallel.

The contenders run in turn, round after round, on the same network and the same whole batches; every process
has one thread. The table shows the median over rounds of each round's median, and of the ratios within each
round. Beside it:

    CPU       processor time of the busiest rank per batch, over that of one process: what the ratio would be
              if no rank ever waited for a core or for a message
    perfect   what the matrix products alone allow: data, a share of the batch; layers, the largest share of
              the products and before it the first sweep, which goes through all ranks in turn
    alone     the communication of a batch and nothing else: the all_reduce; the messages, one after the other

Numbers are float32; the network is a chain of tanh layers with a linear output, learning by Adam.

    python tools/parallel.py --widths 784,256,256,10 784,128x9,10 --batch 64 --rounds 5
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import pctt
from pctt.assemble import assemble
from pctt.groups import layout
from pctt.parallel import DataParallel, Group, LayerParallel, Ranks, Traffic
from pctt.parallel.cut import Cut, Message, Section, Task, balanced, loads, product_terms


@dataclass(frozen=True)
class Case:
    """What is trained. widths: units of node 0 to L."""

    name: str
    widths: tuple[int, ...]
    batch: int
    steps: int

    def net(self) -> pctt.Network:
        hidden = [pctt.Dense(units, "tanh") for units in self.widths[1:-1]]
        return pctt.chain(self.widths[0], [*hidden, pctt.Dense(self.widths[-1])])

    def data(self) -> dict[str, torch.Tensor]:
        source = torch.Generator().manual_seed(0)
        inputs = torch.rand(self.batch, self.widths[0], generator=source)
        labels = torch.randint(0, self.widths[-1], (self.batch,), generator=source)
        targets = torch.nn.functional.one_hot(labels, self.widths[-1]).float()
        return {"input": inputs, self.net().output: targets}

    def inference(self) -> pctt.Inference:
        return pctt.Inference(num_steps=self.steps, rate=0.1)


LEARNING = pctt.Adam(1e-6)  # so small that nothing diverges, however often it is run


def widths_of(text: str) -> tuple[int, ...]:
    """784,128x9,10: 128x9 stands for nine times 128."""
    widths: list[int] = []
    for part in text.split(","):
        units, _, times = part.partition("x")
        widths += [int(units)] * int(times or 1)
    return tuple(widths)


def timed(group: Group, kind: str, case: Case, seconds: float) -> tuple[float, float, Traffic]:
    """Milliseconds of a batch, the median, and of processor time, the mean; what this rank sends for one."""
    train = {"one": one, "data": data_parallel, "layers": layer_parallel}[kind](group, case)
    for _ in range(3):
        train()
    group.traffic = Traffic()
    train()
    per_batch, group.traffic = group.traffic, Traffic()
    samples: list[float] = []
    begun, busy = time.perf_counter(), time.process_time()
    going_on = torch.ones(1)
    while going_on > 0:
        for _ in range(5):
            start = time.perf_counter()
            train()
            samples.append(1e3 * (time.perf_counter() - start))
        going_on = torch.tensor([float(group.rank == 0 and time.perf_counter() - begun < seconds)])
        group.all_reduce(going_on)
    busy = 1e3 * (time.process_time() - busy) / len(samples)
    return median(samples), busy, per_batch


def one(group: Group, case: Case) -> Callable[[], object]:
    del group
    net = case.net()
    engine = pctt.Engine(
        net, pctt.init(net), case.inference(), ("input", net.output), learning=LEARNING, batch_size=case.batch
    )
    batch, step = case.data(), 0

    def train() -> None:
        nonlocal step
        step += 1
        engine.relax(batch)
        engine.learn(LEARNING.rate, step)

    return train


def data_parallel(group: Group, case: Case) -> Callable[[], object]:
    trainer = pctt.Trainer(case.net(), case.inference(), LEARNING, batch_size=case.batch)
    parallel = DataParallel(trainer, group)
    rows = parallel.share(torch.arange(case.batch))
    share = {name: values[rows] for name, values in case.data().items()}
    return lambda: parallel.train_batch(share)


def layer_parallel(group: Group, case: Case) -> Callable[[], object]:
    parallel = LayerParallel(case.net(), case.inference(), LEARNING, group)
    batch = case.data()
    return lambda: parallel.train_batch(batch)


def communication(group: Group, case: Case, seconds: float) -> tuple[float, float]:
    """Milliseconds of one all_reduce as data parallel has it, and of a batch's messages, one by one."""
    flat = torch.zeros(case.net().num_weights() + 2 * len(case.widths) + 1)
    entries = [entry for section in sections(cut_of(case, group.size)) for entry in section]
    messages = [entry for entry in entries if isinstance(entry, Message)]
    net = case.net()
    tensors = {
        node: torch.zeros(case.batch, net.widths[node])
        for node in {int(message.slot.buffer.partition("@nodes")[2]) for message in messages}
    }

    def exchange() -> None:
        for message in (message for message in messages if message.target == group.rank):
            group.expect(tensors[int(message.slot.buffer.partition("@nodes")[2])], message.source)
        for message in messages:
            tensor = tensors[int(message.slot.buffer.partition("@nodes")[2])]
            if message.source == group.rank:
                group.send(tensor, message.target, message)
            elif message.target == group.rank:
                group.receive(tensor, message.source)

    found: list[float] = []
    for run in (lambda: group.all_reduce(flat), exchange):
        samples: list[float] = []
        for _ in range(max(5, int(20 * seconds))):
            start = time.perf_counter()
            run()
            samples.append(1e3 * (time.perf_counter() - start))
        found.append(median(samples))
    return found[0], found[1]


def cut_of(case: Case, size: int) -> Cut:
    where = layout(case.net(), grouped=False)
    program = assemble(where, case.inference(), (0, len(case.widths) - 1), learning=LEARNING)
    return Cut(where, program, balanced(loads(where, program), size))


def sections(cut: Cut) -> list[Section]:
    return [cut.initialise, *cut.steps, cut.finish, cut.learn]


def perfect(case: Case, size: int) -> tuple[float, float]:
    """Time over that of one process if only products took any, with data and with layers shared out."""
    where = layout(case.net(), grouped=False)
    program = assemble(where, case.inference(), (0, len(case.widths) - 1), learning=LEARNING)
    cut = cut_of(case, size)
    sweep, own = 0, [0] * size
    for section in sections(cut):
        for task in (entry for entry in section if isinstance(entry, Task)):
            terms = product_terms(program, task.instruction)
            if section is cut.initialise:
                sweep += terms
            else:
                own[task.rank] += terms
    return -(-case.batch // size) / case.batch, (sweep + max(own)) / (sweep + sum(own))


def answers(found: list[Any]) -> list[Any]:
    for answer in found:
        if not isinstance(answer, tuple):
            raise SystemExit(f"a rank failed: {answer}")
    return found


def measure(case: Case, size: int, rounds: int, seconds: float, pool: Ranks) -> None:
    contenders = {
        "one process": ("one", 1),
        f"data, {size} ranks": ("data", size),
        f"layers, {size} ranks": ("layers", size),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    busy: dict[str, list[float]] = {name: [] for name in contenders}
    traffic: dict[str, list[Traffic]] = {}
    alone: list[tuple[float, float]] = []
    for _ in range(rounds):
        for name, (kind, ranks) in contenders.items():
            found = answers(pool.run(timed, kind, case, seconds, size=ranks))
            times[name].append(found[0][0])
            busy[name].append(max(cpu for _, cpu, _ in found))
            traffic[name] = [sent for _, _, sent in found]
        alone.append(answers(pool.run(communication, case, seconds, size=size))[0])
    ideals = (1.0, *perfect(case, size))
    waits = ("", *(f"{median(column):.2f}" for column in zip(*alone, strict=True)))
    for name, ideal, wait in zip(contenders, ideals, waits, strict=True):
        over, cpu = (
            median(a / b for a, b in zip(column[name], column["one process"], strict=True))
            for column in (times, busy)
        )
        sent = traffic[name] if wait else [Traffic()]
        reductions = f"{sent[0].reductions} of {sent[0].reduction_bytes / 1024:.1f} KiB" if wait else ""
        number, size_sent = sum(s.messages for s in sent), sum(s.message_bytes for s in sent) / 1024
        cells = [case.name, str(case.batch), name, f"{median(times[name]):.2f}"]
        cells += [f"[{min(times[name]):.2f}, {max(times[name]):.2f}]", f"{over:.2f}", f"{cpu:.2f}"]
        cells += [f"{ideal:.2f}", reductions, f"{number} of {size_sent:.0f} KiB" if number else "", wait]
        print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--widths",
        nargs="+",
        default=["784,256,256,10", "784,128x9,10", "512x9"],
        help="of each network, units of all nodes; 128x9 is nine times 128 (default: three networks)",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[64], help="samples per batch (default 64)")
    parser.add_argument("--steps", type=int, default=20, help="inference steps (default 20)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and round (default 1)")
    options = parser.parse_args(arguments)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, gloo; "
        f"T={options.steps}, {options.rounds} rounds"
    )
    head = ("network", "batch", "contender", "ms per batch", "[least, most]", "over one", "CPU", "perfect")
    head += ("reductions per rank", "messages of all", "alone, ms")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    with Ranks(options.ranks) as pool:
        for text in options.widths:
            for batch in options.batch:
                case = Case(text, widths_of(text), batch, options.steps)
                measure(case, options.ranks, options.rounds, options.seconds, pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
