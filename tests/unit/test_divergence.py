"""Batches that go wrong: the run ends, goes on without them or with a smaller rate, and resumes exactly."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import BATCH, assert_same_run, clouds, fit, records, same, train, trainer

import pctt
from pctt import cli, record, run
from pctt.config import TrainingConfig
from pctt.engine import Relaxation, Status


@pytest.mark.parametrize("algorithm", ["pc", "backprop"])
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_a_skipped_batch_is_as_if_it_had_not_been(backend: str, algorithm: str) -> None:
    """Against a loop over the other batches, with Adam's count of steps; NaN must not stay in any buffer."""
    if (backend, algorithm) == ("emulated", "backprop"):
        pytest.skip("the twin runs in torch, whatever the backend of the engine")
    inputs, targets = clouds(wild=(1, 2))
    t = trainer(backend=backend, algorithm=algorithm, on_divergence="skip_batch")
    by_hand = trainer(backend=backend, algorithm=algorithm)
    order = t._order(len(inputs), 0)
    for number, batch in enumerate(order.split(BATCH)):
        if number not in (1, 2):
            nodes = {"input": inputs[batch], "dense3": targets[batch]}
            assert by_hand._train_batch(nodes, None, 1e-2, number == 0).status.ok
            by_hand.progress.step += 1
    result, lines = fit(t, (inputs, targets), 1)
    assert result.status is Status.COMPLETED and result.steps == 5
    assert same(t.weights, by_hand.weights)
    assert same(t.engine.learning_state(), by_hand.engine.learning_state())
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [line["step"] for line in skipped] == [2, 3]
    assert all(line["epoch"] == 1 and line["status"] == "NON_FINITE" for line in skipped)
    assert all(line["layer"] in t.net.names for line in skipped)
    assert [line["step"] for line in lines if line["kind"] == "batch"] == [1, 4, 5]
    assert math.isfinite(lines[-1]["train_energy"])


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dynamics", ["euler", "momentum", "adam", "heun", "langevin"])
def test_a_halved_rate_is_the_rate_of_a_run_that_began_with_half(dynamics, backend, monkeypatch):
    """The first batch is called diverged once, and tried again."""
    if backend == "emulated" and dynamics in ("heun", "langevin", "adam"):
        pytest.skip("not run by the card backends")
    settings = {"momentum": 0.5} if dynamics == "momentum" else {}
    half = pctt.Inference(6, 0.02, dynamics=dynamics, **settings)
    expected = trainer(inference=half, backend=backend)
    fit(expected, clouds(), 2)
    t = trainer(inference=replace(half, rate=0.04), backend=backend, on_divergence="halve_rate")
    relax, calls = t.engine.relax, itertools.count()

    def once(*arguments: Any, **others: Any) -> Relaxation:
        found = relax(*arguments, **others)
        return replace(found, status=Status.DIVERGED) if next(calls) == 0 else found

    monkeypatch.setattr(t.engine, "relax", once)
    result, lines = fit(t, clouds(), 2)
    assert result.status is Status.COMPLETED
    assert same(t.weights, expected.weights)
    (halved,) = [line for line in lines if line["kind"] == "halved"]
    assert (halved["step"], halved["inference_rate"]) == (1, 0.02)


def test_a_rate_that_diverges_is_halved_until_it_does_not(tmp_path):
    """Each time by half, from the batch at fault on, until it no longer diverges."""
    wild = pctt.Inference(60, 8.0)
    result, _ = fit(trainer(inference=wild), clouds(), 1)
    assert result.status in (Status.DIVERGED, Status.NON_FINITE)
    t = trainer(inference=wild, on_divergence="halve_rate")
    result, lines = fit(t, clouds(), 3)
    assert result.status is Status.COMPLETED
    rates = [line["inference_rate"] for line in lines if line["kind"] == "halved"]
    assert (
        rates == [8.0 * 0.5**n for n in range(1, len(rates) + 1)] and t.setbacks.halvings == len(rates) >= 2
    )


@pytest.mark.parametrize("on_divergence", ["halve_rate", "skip_batch"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_with_setbacks_resumes_bit_for_bit(tmp_path, on_divergence, stop):
    """Stopped before, between and after two of them; weights, counters and record are those of one run."""
    wild = (1, 3) if on_divergence == "skip_batch" else ()
    inference = pctt.Inference(60, 8.0) if on_divergence == "halve_rate" else pctt.Inference(8, 0.1)

    def go(t: pctt.Trainer, folder: Path, resume_after: int | None, stop: int) -> None:
        with record.Recorder(folder, resume_after=resume_after) as recorder:

            def watch(kind: str, fields: dict[str, Any]) -> None:
                if kind in ("batch", "skipped") and fields["step"] == stop:
                    t.stop()

            t.fit(clouds(wild=wild), 2, callbacks=[recorder.log_record, watch], save_to=folder)

    whole = trainer(inference=inference, on_divergence=on_divergence)
    go(whole, tmp_path / "whole", None, 0)
    assert whole.setbacks.skipped + whole.setbacks.halvings >= 2
    go(trainer(inference=inference, on_divergence=on_divergence), tmp_path / "part", None, stop)
    t = pctt.load(tmp_path / "part")
    assert t.progress.step == stop and t.on_divergence == on_divergence
    go(t, tmp_path / "part", stop, 0)
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_halving_gives_up_and_says_so(tmp_path):
    inputs, targets = clouds(wild=(2,))
    t = trainer(on_divergence="halve_rate")
    result, lines = fit(t, (inputs, targets), 1, save_to=tmp_path)
    assert result.status is Status.NON_FINITE and result.steps == 2
    assert "batch 3" in result.message and "after 10 halvings of the rate" in result.message
    assert len([line for line in lines if line["kind"] == "halved"]) == run.MOST_HALVINGS == 10


@pytest.mark.parametrize(("num", "limit"), [(100, 5), (4000, 100)])
def test_skipping_gives_up_after_an_epoch_or_a_hundred_in_a_row(num, limit):
    inputs, targets = clouds(num)
    targets[:] = 1e30
    t = trainer(on_divergence="skip_batch")
    before = t.weights
    result, lines = fit(t, (inputs, targets), 1)
    assert result.status is Status.NON_FINITE and len(lines) == limit - 1 == result.steps
    assert f"after {limit - 1} batches in a row that were skipped" in result.message
    assert same(before, t.weights)


def test_batches_skipped_now_and_then_do_not_add_up(monkeypatch):
    monkeypatch.setattr(run, "MOST_SKIPPED", 3)
    t = trainer(on_divergence="skip_batch")
    result, _ = fit(t, clouds(200, wild=(0, 1, 3, 4, 6, 7, 9)), 1)
    assert result.status is Status.COMPLETED and t.setbacks == run.Setbacks(0, 7, 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inference": pctt.Inference(4, 0.1, weights_at="every_step")}, "with weights_at='every_step'"),
        ({"backend": "emulated", "fused": True, "batch_size": 32}, "in the fused kernel"),
    ],
)
@pytest.mark.parametrize("on_divergence", ["halve_rate", "skip_batch"])
def test_where_a_batch_cannot_be_undone_only_stop_is_possible(given, words, on_divergence, tmp_path):
    with pytest.raises(ValueError, match=f"{words} they have moved by then; use on_divergence='stop'"):
        trainer(**given, on_divergence=on_divergence)
    t = trainer(**given)
    t.on_divergence = on_divergence
    with pytest.raises(ValueError, match="use on_divergence='stop'"):
        t.fit(clouds(), 1)


def test_a_card_that_cannot_train_such_a_run_can_still_evaluate_it(tmp_path):
    trainer(on_divergence="skip_batch").save(tmp_path)
    t = pctt.load(tmp_path, backend="emulated", fused=True)
    assert 0.0 <= t.evaluate(clouds()) <= 1.0
    with pytest.raises(ValueError, match="in the fused kernel"):
        t.fit(clouds(), 1)


def test_backprop_has_no_rate_to_halve_and_other_words_are_refused():
    with pytest.raises(ValueError, match="algorithm='backprop' has none"):
        trainer(algorithm="backprop", on_divergence="halve_rate")
    for make in (lambda: trainer(on_divergence="go on"), lambda: TrainingConfig(on_divergence="go on")):
        with pytest.raises(ValueError, match="on_divergence must be one of stop, halve_rate, skip_batch"):
            make()


def test_the_command_says_what_was_halved_and_may_change_its_mind(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    command = (tiny, "--out", out, "--set", "inference.rate=8.0", "inference.num_steps=30")
    assert train(*command) == cli.FAILED
    capsys.readouterr()
    assert train(*command, "training.on_divergence=halve_rate", "--resume") == cli.OK
    errors = capsys.readouterr().err
    assert "worst in layer" in errors and "inference.rate is 4 from now on." in errors
    kinds = [line["kind"] for line in records(out)]
    assert "halved" in kinds and "failed" not in kinds and kinds[-1] == "result"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [3, 5])
def test_weights_that_are_no_longer_finite_reach_no_checkpoint(tmp_path, monkeypatch, value, step):
    """An update may make them so at energies that were finite; the next energy would show it, one checkpoint
    too late. Batch 5 is the end of the epoch.
    """
    t = trainer()
    t.fit(clouds(), 0, save_to=tmp_path)
    t.save(tmp_path)
    kept, learn = (tmp_path / run.CHECKPOINT).read_bytes(), t.engine.learn

    def broken(rate: float, number: int) -> None:
        learn(rate, number)
        if number == step:
            weights = t.weights
            weights["dense2"]["weight"][0, 0] = value
            t.engine.load_weights(weights)

    monkeypatch.setattr(t.engine, "learn", broken)
    result = t.fit(clouds(), 2, save_to=tmp_path, save_every=3)
    assert result.status is Status.NON_FINITE
    assert f"after batch {step} the weights of layer 'dense2' are NaN or infinite" in result.message
    if step == 3:
        assert (tmp_path / run.CHECKPOINT).read_bytes() == kept
    assert pctt.load(tmp_path).progress.step == (0 if step == 3 else 3)
    with pytest.raises(ValueError, match="'dense2' are NaN or infinite, so they are not written"):
        t.save(tmp_path)


def test_weights_that_broke_without_a_checkpoint_are_blamed_and_no_batch_is_skipped_for_them(monkeypatch):
    t = trainer(on_divergence="skip_batch")
    weights = t.weights
    weights["dense1"]["bias"][0] = math.nan
    t.engine.load_weights(weights)
    result, lines = fit(t, clouds(), 1)
    assert result.status is Status.NON_FINITE and not lines
    assert "the weights of 'dense1' were NaN or infinite before" in result.message


def test_data_of_another_length_do_not_go_on_with_a_half_done_epoch(tmp_path):
    t = trainer()
    t.progress.batch = 4
    with pytest.raises(ValueError, match="stopped after batch 4 of an epoch, and these data make only 2"):
        t.fit(clouds(40), 1)
