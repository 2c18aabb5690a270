"""Several processes against one: data parallel to rounding, layer parallel to the bit.

One pool of three processes serves the whole module; a job is a function of this file that every rank runs.

Tolerances. Shares change only the order of a sum: a gradient of B samples is off by at most 2 B u times the
sum of its terms' sizes, here below 40 u * 20, and what ten learning steps make of that is of the same order;
Adam divides by a root that may be 100 times smaller than the largest gradient. 1e-11 is 500 times that.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from helpers import LEARNINGS, NETWORKS, assert_trees_near, identical, random_weights, supervised

import pctt
from pctt import SGD, Adam, Dense, Engine, Gaussian, Inference, Status, Trainer, chain
from pctt.assemble import assemble
from pctt.groups import layout
from pctt.parallel import DataParallel, Group, LayerParallel, PeerLost, Ranks, Traffic
from pctt.parallel.cut import Cut, Message, Task, balanced, loads

pytestmark = pytest.mark.xdist_group("parallel")

NUM_STEPS = 3
BOUND = 1e-11
INFERENCES = {
    "pc": Inference(8, 0.1),
    "fixed": Inference(8, 0.1, prediction="fixed"),
    "momentum": Inference(8, 0.1, dynamics="momentum", momentum=0.5),
    "adam": Inference(8, 0.02, dynamics="adam"),
    "zil": Inference(8, 1.0, weights_at="staircase"),
    "zeros": Inference(8, 0.1, initial="zeros"),
    "boosted": Inference(8, 0.1, wave_boost=3.0),
}
SHARED = {
    **INFERENCES,
    "errors": Inference(8, 0.1, variables="errors"),
    "gauss-seidel": Inference(8, 0.1, sweep="gauss_seidel"),
    "heun": Inference(8, 0.1, dynamics="heun"),
    "centred": Inference(8, 0.1, nudge=pctt.Nudge(0.1, style="loss", sign="centred")),
}
SPLIT = {**INFERENCES, "ipc": Inference(8, 0.1, weights_at="every_step")}
SHARES = {2: [[5, 2], [0, 3], [1, 6]], 3: [[2, 3, 2], [4, 0, 1], [1, 1, 5]]}
NET = NETWORKS["some biases"]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(3) as pool:
        yield pool
    assert not multiprocessing.active_children()


def batch_of(net, step, size):
    return supervised(net, size, seed=100 + step)


def trainer_of(net, inference, learning, **options):
    return Trainer(net, inference, learning, weights=random_weights(net), **options)


def everything(results):
    """What the ranks returned; an exception any of them raised is raised here."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def same_bits(one, other):
    return all(identical(one[name][key], other[name][key]) for name in one for key in one[name])


# --- data parallel ------------------------------------------------------------------------------------------


def share_out(group: Group, cases):
    """Some learning steps of every case, with the shares of SHARES."""
    answers = []
    for net, inference, learning in cases:
        parallel = DataParallel(trainer_of(net, inference, learning), group)
        relaxations = []
        for step, sizes in enumerate(SHARES[group.size]):
            batch = batch_of(net, step, sum(sizes))
            own = {name: values.split(sizes)[group.rank] for name, values in batch.items()}
            group.traffic = Traffic()
            relaxations.append(parallel.train_batch(own))
        parallel.agree_on_weights()
        answers.append((parallel.engine.weights(), relaxations, group.traffic))
    return answers


def alone(net, inference, learning, batches, grouped=True):
    """The same of one process that has the whole batches."""
    engine = Engine(
        net, random_weights(net), inference, ("input", net.output), learning=learning, grouped=grouped
    )
    relaxations = []
    for step, batch in enumerate(batches, start=1):
        engine.set_learning(learning.rate, step)
        relaxations.append(engine.relax(batch))
        engine.learn(learning.rate, step)
    return engine.weights(), relaxations


def data_cases():
    rules = [SGD(0.05, momentum=0.9, clip_norm=0.3), Adam(1e-2)]
    cases = [(NET, inference, rules[n % 2]) for n, inference in enumerate(SHARED.values())]
    cases += [(NET, SHARED[name], rule) for name in ("pc", "fixed") for rule in rules]
    names = ("categorical", "one precision", "equal throughout", "placements mixed")
    return cases + [(NETWORKS[name], SHARED["pc"], LEARNINGS["adamw, all"]) for name in names]


@pytest.mark.parametrize("size", [2, 3])
def test_unequal_shares_train_as_one_process_does_with_the_whole_batch(ranks, size):
    """Weights after some steps, energies of every step; a rank may have no sample at all.

    A mean of the ranks' means would weigh the samples of a small share too much, and still train.
    """
    cases = data_cases()
    answers = everything(ranks.run(share_out, cases, size=size))
    batches = {
        net: [batch_of(net, step, sum(sizes)) for step, sizes in enumerate(SHARES[size])]
        for net, _, _ in cases
    }
    for number, (net, inference, learning) in enumerate(cases):
        expected, relaxations = alone(net, inference, learning, batches[net])
        for answer in answers:
            weights, found, _ = answer[number]
            assert_trees_near(weights, expected, BOUND)
            assert same_bits(weights, answers[0][number][0])
            for a, b in zip(found, relaxations, strict=True):
                assert a.status is b.status is Status.COMPLETED
                assert a.energies == pytest.approx(b.energies, rel=1e-11, abs=1e-13)
                assert a.error_norms == pytest.approx(b.error_norms, rel=1e-11, abs=1e-13)


def test_a_plain_mean_of_the_ranks_means_would_be_seen():
    """The planted fault of the test above: it is far outside its tolerance."""
    batch = batch_of(NET, 0, 7)
    gradients = []
    for rows in (slice(0, 5), slice(5, 7), slice(0, 7)):
        engine = Engine(NET, random_weights(NET), SHARED["pc"], ("input", NET.output))
        engine.relax({name: values[rows] for name, values in batch.items()})
        engine.compute_gradients()
        gradients.append(engine.gradients()["dense4"]["weight"])
    first, second, whole = gradients
    assert (0.5 * (first + second) - whole).abs().max() > 1e6 * BOUND
    assert ((5 * first + 2 * second) / 7 - whole).abs().max() < 1e-14


def test_a_step_is_one_reduction_of_the_gradients_and_a_few_numbers(ranks):
    case = (NET, SHARED["pc"], Adam(1e-2))
    for answer in everything(ranks.run(share_out, [case], size=2)):
        numbers = NET.num_weights() + 3 + 2 * len(NET.names)
        assert answer[0][2] == Traffic(0, 0, 1, 8 * numbers)


def fit_shared(group: Group, data, folder, epochs, going_on):
    records = []
    if going_on:
        trainer = pctt.load(folder)
    else:
        trainer = trainer_of(NET, SHARED["pc"], LEARNINGS["adam, all"], batch_size=8)
    result = DataParallel(trainer, group).fit(
        data,
        epochs,
        validation=(data[0], data[1].argmax(-1)),
        callbacks=[lambda kind, fields: records.append(kind)],
        save_to=folder if going_on else f"{folder}/{group.rank}",
    )
    return result, trainer.weights, records


@pytest.mark.parametrize("size", [2, 3])
def test_a_fit_is_that_of_a_trainer_and_only_rank_0_writes(ranks, tmp_path, size):
    """26 samples in batches of 8: the last has 2, fewer than three ranks; and a run goes on from a
    checkpoint.
    """
    nodes = batch_of(NET, 0, 26)
    data = nodes["input"], nodes[NET.output]
    one = trainer_of(NET, SHARED["pc"], LEARNINGS["adam, all"], batch_size=8)
    expected = one.fit(data, 2)
    answers = everything(ranks.run(fit_shared, data, str(tmp_path), 2, False, size=size))
    for result, weights, _ in answers:
        assert (result.status, result.steps) == (Status.COMPLETED, expected.steps)
        assert_trees_near(weights, one.weights, BOUND)
        assert same_bits(weights, answers[0][1])
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert answers[0][0].validation_accuracy is not None
    assert answers[0][2] == (["batch"] * 4 + ["epoch"]) * 2
    assert not any(records for _, _, records in answers[1:])
    one.fit(data, 3)
    for _, weights, _ in everything(ranks.run(fit_shared, data, str(tmp_path / "0"), 3, True, size=size)):
        assert_trees_near(weights, one.weights, BOUND)


def diverge_on_one(group: Group):
    parallel = DataParallel(trainer_of(NET, Inference(40, 0.4), SGD(0.1)), group)
    before = parallel.engine.weights()
    share = batch_of(NET, 0, 4)
    if group.rank == 1:
        share = {name: 1e160 * values for name, values in share.items()}
    relaxation = parallel.train_batch(share)
    return relaxation.status, same_bits(before, parallel.engine.weights()), parallel.trainer.progress.step


def test_what_goes_wrong_on_one_rank_ends_all_before_any_weight_moves(ranks):
    assert everything(ranks.run(diverge_on_one)) == [(Status.NON_FINITE, True, 0)] * 3


def fit_diverging(group: Group):
    trainer = trainer_of(NET, Inference(40, 3.0), SGD(0.1))
    nodes = batch_of(NET, 0, 6)
    return DataParallel(trainer, group).fit((nodes["input"], nodes[NET.output]), 1)


def test_a_fit_that_diverges_says_the_same_on_all_ranks(ranks):
    one, other = everything(ranks.run(fit_diverging, size=2))
    assert one == other and not one.status.ok
    assert "all 2 ranks end" in one.message and "inference.rate" in one.message


def begin_apart(group: Group, what: str):
    weights = random_weights(NET, seed=group.rank if what == "weights" else 0)
    if what == "layers":
        LayerParallel(NET, SHARED["pc"], SGD(0.1), group, random_weights(NET, seed=group.rank))
    rate = 0.1 + 0.1 * group.rank if what == "settings" else 0.1
    DataParallel(Trainer(NET, Inference(8, rate), SGD(0.1), weights=weights), group)


@pytest.mark.parametrize("what", ["weights", "settings", "layers"])
def test_ranks_that_begin_differently_are_refused_on_all(ranks, what):
    for answer in ranks.run(begin_apart, what):
        assert isinstance(answer, ValueError) and "must be the same on all 3 ranks" in str(answer)


NOBODY = Group(0, 2, torch.device("cpu"), 1.0)
LEARNED = chain(5, [Dense(6, energy=Gaussian(1.0, learned="diagonal")), Dense(4)])


@pytest.mark.parametrize(
    ("named", "trainer"),
    [
        ("weights_at='every_step'", lambda: Trainer(NET, SPLIT["ipc"])),
        ("tolerance", lambda: Trainer(NET, Inference(tolerance=1e-3))),
        ("dynamics='langevin'", lambda: Trainer(NET, Inference(dynamics="langevin"))),
        ("algorithm='backprop'", lambda: Trainer(NET, algorithm="backprop")),
        ("a learned variance", lambda: Trainer(LEARNED)),
        ("backend='emulated'", lambda: Trainer(NET, backend="emulated")),
        (
            "NormaliseBatch",
            lambda: Trainer(
                chain((2, 4, 4), [pctt.Block([pctt.NormaliseBatch(), pctt.Flatten()]), Dense(3)])
            ),
        ),
    ],
)
def test_what_shared_batches_do_not_give_exactly_is_refused_by_name(named, trainer):
    with pytest.raises(ValueError, match="data parallel training does not take") as refused:
        DataParallel(trainer(), NOBODY)
    assert named in str(refused.value)


# --- layer parallel -----------------------------------------------------------------------------------------


def split_layers(group: Group, cases):
    answers = []
    for net, inference, learning in cases:
        parallel = LayerParallel(net, inference, learning, group, random_weights(net))
        relaxations = []
        for step in range(NUM_STEPS):
            group.traffic = Traffic()
            size = 3 if step == 1 else 5
            relaxations.append(parallel.train_batch(batch_of(net, step, size)))
        traffic = group.traffic
        group.traffic = Traffic()
        parts = parallel.weights(), parallel.bytes_allocated()
        answers.append((parallel.gather_weights(), relaxations, traffic, *parts))
    return answers


def layer_cases(size):
    rules = [LEARNINGS["sgd, momentum"], LEARNINGS["adam"]]
    mixed = NETWORKS["placements mixed"]
    cases = [(mixed, inference, rules[n % 2]) for n, inference in enumerate(SPLIT.values())]
    if size == 3:
        return [*cases, (NET, SPLIT["ipc"], rules[1]), (NETWORKS["two groups"], SPLIT["pc"], rules[0])]
    others = [
        net
        for net in NETWORKS.values()
        if net.wiring is None and len(net.layers) > 1 and not any(rule.learns_variance for rule in net.rules)
    ]
    return cases + [(net, SPLIT["pc"], LEARNINGS["adamw, all"]) for net in others]


@pytest.mark.parametrize("size", [2, 3])
def test_split_layers_train_as_one_process_does_to_the_bit(ranks, size):
    """Every chain of the table, both placements, energies with precisions and categorical ones; the layers'
    energies are those of one process to rounding of their sums.
    """
    cases = layer_cases(size)
    answers = everything(ranks.run(split_layers, cases, size=size))
    assert len(cases) > (30 if size == 2 else 9)
    for number, (net, inference, learning) in enumerate(cases):
        batches = [batch_of(net, step, 3 if step == 1 else 5) for step in range(NUM_STEPS)]
        expected, relaxations = alone(net, inference, learning, batches, grouped=False)
        owned = {}
        for answer in answers:
            weights, found, _, own, _ = answer[number]
            assert same_bits(weights, expected)
            owned |= own
            for a, b in zip(found, relaxations, strict=True):
                assert (a.status, a.num_steps) == (b.status, b.num_steps)
                assert a.energies == pytest.approx(b.energies, rel=1e-13, abs=1e-13)
                assert a.error_norms == pytest.approx(b.error_norms, rel=1e-13, abs=1e-13)
        assert same_bits(owned, expected)
        grouped, _ = alone(net, inference, learning, batches, grouped=True)
        assert_trees_near(expected, grouped, BOUND)


def cut_of(net, inference, size):
    where = layout(net, grouped=False)
    program = assemble(where, inference, (0, len(net.layers)), learning=SGD(0.1))
    return Cut(where, program, balanced(loads(where, program), size))


def ranks_of(cut):
    """The rank of each layer, by what it runs."""
    found = {}
    for entry in cut.learn:
        if isinstance(entry, Task) and entry.instruction.op == "sgd":
            found[int(entry.instruction.out[0].buffer.partition("@layers")[2])] = entry.rank
    return [found[index] for index in sorted(found)]


def messages(section):
    return [entry for entry in section if isinstance(entry, Message)]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("prediction", ["live", "fixed"])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_a_step_sends_one_message_each_way_over_a_boundary_and_only_there(placement, prediction, size):
    """Strict predictive coding with euler: up and down once, once the errors have come that far; and the
    sizes are those of the boundary's node.
    """
    net = chain(5, [Dense(width, "tanh", activate=placement) for width in (7, 6, 9, 8, 4)])
    cut = cut_of(net, Inference(12, 0.1, prediction=prediction), size)
    ranks = ranks_of(cut)
    boundaries = {
        (ranks[node - 1], ranks[node]): node for node in range(1, 5) if ranks[node - 1] < ranks[node]
    }
    for number, step in enumerate(cut.steps, start=1):
        expected = []
        for (below, above), node in boundaries.items():
            if number >= 5 - node:  # E2: the first error comes to node l in step L - l
                up = prediction == "live" or placement == "output"
                expected += [(below, above, node)] * up + [(above, below, node)]
        found = []
        for message in messages(step):
            node = int(message.slot.buffer.partition("@nodes")[2])
            found.append((message.source, message.target, node))
        assert sorted(found) == sorted(expected)
    assert len(messages(cut.initialise)) == size - 1  # the first sweep
    assert all(abs(m.source - m.target) == 1 for m in messages([*cut.initialise, *cut.finish, *cut.learn]))


def test_the_messages_counted_are_those_of_the_cut(ranks):
    net, size = NETWORKS["some biases"], 3
    answers = everything(ranks.run(split_layers, [(net, SPLIT["pc"], SGD(0.1))], size=size))
    cut = cut_of(net, SPLIT["pc"], size)
    everywhere = [m for part in (cut.initialise, *cut.steps, cut.finish, cut.learn) for m in messages(part)]
    for rank, answer in enumerate(answers):
        sent = [message for message in everywhere if message.source == rank]
        widths = [net.widths[int(message.slot.buffer.partition("@nodes")[2])] for message in sent]
        energies = 4 * len(net.layers) * 8
        assert answer[0][2] == Traffic(len(sent), 8 * 5 * sum(widths), 1, energies)


def test_a_cut_runs_every_instruction_once_and_a_rank_holds_its_layers_only(ranks):
    net = chain(40, [Dense(40, "tanh")] * 6)
    program = assemble(layout(net, grouped=False), SPLIT["pc"], (0, 6), learning=SGD(0.1))
    cut = cut_of(net, SPLIT["pc"], 3)
    parts = [cut.initialise, *cut.steps, cut.finish, cut.learn]
    tasks = [entry.instruction for part in parts for entry in part if isinstance(entry, Task)]
    assert tasks == program.training_step()
    case = [(net, SPLIT["pc"], Adam(1e-3))]
    on_three = [answer[0][4] for answer in everything(ranks.run(split_layers, case, size=3))]
    (on_one,) = [answer[0][4] for answer in everything(ranks.run(split_layers, case, size=1))]
    assert on_one < sum(on_three) < 1.1 * on_one  # the boundaries' nodes stand on two ranks
    assert max(on_three) < 0.6 * on_one


def test_layers_are_split_so_that_the_largest_part_is_smallest():
    """Against all splits, tried out."""
    costs = [27, 42, 28, 16, 64, 8, 20]
    for size in (1, 2, 3, 4, 7):
        splits = [(0, *begins, 7) for begins in combinations(range(1, 7), size - 1)]
        least = min(max(sum(costs[a:b]) for a, b in pairwise(split)) for split in splits)
        ranks = balanced(costs, size)
        assert sorted(ranks) == list(ranks) and set(ranks) == set(range(size))
        assert max(sum(c for c, r in zip(costs, ranks, strict=True) if r == n) for n in range(size)) == least
    with pytest.raises(ValueError, match="7 layers cannot be split over 8 ranks"):
        balanced(costs, 8)


def test_the_load_of_a_layer_is_its_products():
    """T steps, clamped ends: the first layer predicts in the sweep and learns; layer l, above a node that
    moves from step L - l + 1 on, sends feedback and predicts in each step since; all add up to the program's
    products.
    """
    net, num_steps = chain(5, [Dense(7, "tanh"), Dense(6, "tanh"), Dense(4)]), 8
    where = layout(net, grouped=False)
    program = assemble(where, Inference(num_steps, 0.1), (0, 3), learning=SGD(0.1))
    assert loads(where, program) == [35 * 2, 42 * (2 + 2 * (num_steps - 1)), 24 * (2 + 2 * num_steps)]
    assert 2 * 11 * sum(loads(where, program)) == program.flops(11)


def split_diverging(group: Group):
    parallel = LayerParallel(NET, Inference(40, 3.0), SGD(0.1), group, random_weights(NET))
    before = parallel.weights()
    relaxation = parallel.train_batch(batch_of(NET, 0, 6))
    return relaxation, same_bits(before, parallel.weights())


def test_divergence_is_seen_by_all_ranks_before_weights_move(ranks):
    answers = everything(ranks.run(split_diverging))
    assert not answers[0][0].status.ok and all(unmoved for _, unmoved in answers)
    assert len({relaxation.status for relaxation, _ in answers}) == 1


@pytest.mark.parametrize(
    ("named", "net", "inference"),
    [
        ("a graph", chain(4, [pctt.Block(pctt.Linear(3)), Dense(2)]), Inference()),
        ("a learned variance", LEARNED, Inference()),
        ("variables='errors'", NET, SHARED["errors"]),
        ("sweep='gauss_seidel'", NET, SHARED["gauss-seidel"]),
        ("dynamics='heun'", NET, SHARED["heun"]),
        ("dynamics='langevin'", NET, Inference(dynamics="langevin")),
        ("a nudge", NET, SHARED["centred"]),
        ("initial='carried'", NET, Inference(initial="carried")),
        ("tolerance", NET, Inference(tolerance=1e-3)),
    ],
)
def test_what_a_cut_was_not_shown_to_do_is_refused_by_name(named, net, inference):
    with pytest.raises(ValueError, match="layer parallel training does not take") as refused:
        LayerParallel(net, inference, SGD(0.1), NOBODY)
    assert named in str(refused.value)


def test_ranks_of_layers_out_of_order_are_refused():
    for ranks in ((0, 1, 0, 1), (0, 0, 1), (1, 1, 1, 1), (0, 0, 0, 2)):
        with pytest.raises(ValueError, match="ranks must name a rank for each of 4 layers"):
            LayerParallel(NET, SPLIT["pc"], SGD(0.1), NOBODY, ranks=ranks)


# --- ranks that fail ----------------------------------------------------------------------------------------


def lose_one(group: Group, kind: str, how: str):
    """Rank 1 dies, or sleeps, at the third batch."""
    if kind == "data":
        parallel = DataParallel(trainer_of(NET, SHARED["pc"], SGD(0.1)), group)
    else:
        parallel = LayerParallel(NET, SHARED["pc"], SGD(0.1), group, random_weights(NET))
    for step in range(5):
        if step == 2 and group.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(2.0)
            return
        parallel.train_batch(batch_of(NET, step, 4))


@pytest.mark.parametrize("kind", ["data", "layers"])
def test_when_a_rank_is_killed_the_others_end_with_a_sentence(ranks, kind):
    begun = time.monotonic()
    first, killed, last = ranks.run(lose_one, kind, "killed", timeout=20.0)
    assert killed is None and time.monotonic() - begun < 15.0
    for rank, answer in ((0, first), (2, last)):
        assert isinstance(answer, PeerLost)
        assert str(answer).endswith(f"has ended, so rank {rank} of 3 ends too.")


@pytest.mark.parametrize("kind", ["data", "layers"])
def test_a_rank_that_does_not_answer_is_not_waited_for_without_end(ranks, kind):
    begun = time.monotonic()
    waiting, _ = ranks.run(lose_one, kind, "asleep", size=2, timeout=1.0)
    assert isinstance(waiting, PeerLost) and time.monotonic() - begun < 10.0
    assert "did not answer within 1 s, so rank 0 of 2 ends too." in str(waiting)


SCRIPT = """
    import os, signal, sys
    import pctt
    import torch
    from pctt import parallel

    torch.set_num_threads(1)

    def main(group):
        net = pctt.chain(4, [pctt.Dense(5, "tanh"), pctt.Dense(3)])
        trainer = pctt.Trainer(net, pctt.Inference(rate=0.1), pctt.SGD(0.1), batch_size=4)
        x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
        result = parallel.DataParallel(trainer, group).fit((x, y), 2, save_to="run")
        assert result.status.ok
        bad = pctt.Trainer(net, pctt.Inference(rate=9.0), pctt.SGD(0.1), batch_size=4)
        return parallel.DataParallel(bad, group).fit((x, y), 2, save_to="bad")

    sys.exit(parallel.run(main, timeout=20.0))
"""


def test_under_torchrun_a_run_ends_with_its_status(tmp_path):
    """A run that saves and then one that diverges, on a port that the system chooses."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pctt.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    said = [line for line in ended.stderr.splitlines() if line.startswith("pctt: ")]
    assert ended.returncode != 0 and len(said) == 1 and "all 2 ranks end" in said[0], ended.stderr
    assert pctt.load(tmp_path / "run").progress.epoch == 2
    assert not (tmp_path / "bad").exists()


def test_without_torchrun_a_program_says_what_it_lacks(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert pctt.parallel.run(lambda group: None) == 1
    assert "start this program with torchrun" in capsys.readouterr().err


def test_settings_can_be_replaced_between_runs_of_a_pool(ranks):
    """A pool takes fewer ranks than it has, and again all, one job after the other."""
    for size in (1, 3, 2):
        case = (NET, replace(SHARED["pc"], num_steps=size), SGD(0.1))
        assert len(everything(ranks.run(split_layers, [case], size=size))) == size
