"""The driver: reproducible, resumable bit for bit, stops before a divergence reaches the weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import pctt
from pctt import checkpoint, record, run
from pctt.backends import tenstorrent
from pctt.backends.lowering import CardBuffer
from pctt.backends.precision import PrecisionPolicy
from pctt.backends.tenstorrent import CardTensor
from pctt.data import Split


def blobs(num: int = 96, seed: int = 0) -> Split:
    """Three well separated Gaussian clouds in 6 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    centres = 3.0 * torch.eye(3, 6)
    return Split(centres[labels] + 0.3 * torch.randn(num, 6, generator=generator), labels)


def network() -> pctt.Network:
    return pctt.chain(6, [pctt.Dense(8, "tanh"), pctt.Dense(8, "tanh"), pctt.Dense(3)])


def trainer(**settings) -> pctt.Trainer:
    settings = {"batch_size": 20, "seed": 3, **settings}
    learning = settings.pop("learning", pctt.Adam(1e-2, schedule=pctt.WarmupCosine()))
    return pctt.Trainer(network(), settings.pop("inference", pctt.Inference(8, 0.2)), learning, **settings)


def same(a: dict, b: dict) -> bool:
    a, b = checkpoint.flatten(a), checkpoint.flatten(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("algorithm", ["pc", "backprop"])
def test_separated_clouds_are_learnt(algorithm):
    """Well separated classes must reach 100 %; a sign error anywhere in learning gives chance instead."""
    t = trainer(algorithm=algorithm)
    result = t.fit(blobs(), 15, blobs(seed=1))
    assert result.status is pctt.Status.COMPLETED
    assert result.validation_accuracy == 1.0
    assert t.evaluate(blobs(seed=2)) == 1.0


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, second, other = trainer(), trainer(), trainer(seed=4)
    for t in (first, second, other):
        t.fit(blobs(), 2)
    assert same(first.weights, second.weights)
    assert not same(first.weights, other.weights)


def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own():
    """Batch order is (seed, epoch): resuming draws the same order without storing a generator."""
    t = trainer()
    orders = [t._order(96, epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(96)) for order in orders)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert torch.equal(orders[1], trainer()._order(96, 1))


@pytest.mark.parametrize("learning", [pctt.SGD(0.05, momentum=0.9), pctt.Adam(1e-2), pctt.AdamW(1e-2)])
@pytest.mark.parametrize("stop_after", [3, 5, 7])
def test_a_run_stopped_anywhere_resumes_bit_for_bit(tmp_path, learning, stop_after):
    """5 batches an epoch: stops in mid-epoch, at its end, after it; weights, state, records are equal."""

    def fit(t, folder, resume_after=None, stop=None):
        with record.Recorder(folder, resume_after=resume_after) as recorder:

            def watch(kind, fields):
                if kind == "batch" and fields["step"] == stop:
                    t.stop()

            return t.fit(blobs(), 3, blobs(seed=1), [recorder.log_record, watch], save_to=folder)

    whole = trainer(learning=learning)
    fit(whole, tmp_path / "whole")
    result = fit(trainer(learning=learning), tmp_path / "parts", stop=stop_after)
    assert result.status is pctt.Status.STOPPED and result.steps == stop_after
    resumed = pctt.load(tmp_path / "parts")
    fit(resumed, tmp_path / "parts", resume_after=resumed.progress.step)
    assert same(whole.weights, resumed.weights)
    assert same(whole.engine.learning_state(), resumed.engine.learning_state())
    whole_lines, part_lines = (
        [{**entry, "seconds": 0} for entry in record.read(tmp_path / part / record.FILE_NAME)]
        for part in ("whole", "parts")
    )
    assert whole_lines == part_lines


def test_a_run_goes_on_on_another_backend_with_the_same_weights_and_state(tmp_path):
    """Whoever wrote the checkpoint: masters and moments are fp32 on both sides, so nothing may change."""
    backends = ("reference", "emulated", "reference")
    first = trainer(backend=backends[0])
    for epochs, backend in enumerate(backends[1:], start=1):
        assert first.fit(blobs(), epochs, save_to=tmp_path).status.ok
        second = pctt.load(tmp_path, backend=backend)
        assert same(first.weights, second.weights)
        assert same(first.engine.learning_state(), second.engine.learning_state())
        first = second
    assert first.fit(blobs(), 10, blobs(seed=1)).validation_accuracy == 1.0


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize(
    ("method", "fails_at"),
    [("relax", 7), ("learn", 7), ("predict", 10), ("learning_state", 10), ("weights", 10)],
)
def test_a_device_that_fails_ends_the_run_and_the_checkpoint_goes_on_bit_for_bit(
    tmp_path, monkeypatch, backend, method, fails_at
):
    """5 batches an epoch: it fails in the middle of epoch 2, or at its end while evaluating or saving."""

    def fit(t, folder, resume_after=None):
        with record.Recorder(folder, resume_after=resume_after) as recorder:
            return t.fit(blobs(), 3, blobs(seed=1), [recorder.log_record], save_to=folder)

    whole, broken = trainer(backend=backend), trainer(backend=backend)
    fit(whole, tmp_path / "whole")
    sound = getattr(broken.engine, method)

    def fail(*arguments, **settings):
        if broken.progress.step == fails_at:
            raise pctt.DeviceLost("ttnn failed on the device: it hung")
        return sound(*arguments, **settings)

    monkeypatch.setattr(broken.engine, method, fail)
    result = fit(broken, tmp_path / "parts")
    assert result.status is pctt.Status.DEVICE_LOST and not result.status.ok
    assert result.steps == fails_at and f"after batch {fails_at}: " in result.message
    assert "it hung" in result.message and "last checkpoint" in result.message
    resumed = pctt.load(tmp_path / "parts", backend=backend)
    assert resumed.progress.step == 5
    fit(resumed, tmp_path / "parts", resume_after=5)
    assert same(whole.weights, resumed.weights)
    whole_lines, part_lines = (
        [{**entry, "seconds": 0} for entry in record.read(tmp_path / part / record.FILE_NAME)]
        for part in ("whole", "parts")
    )
    assert whole_lines == part_lines


def test_rows_that_only_fill_a_tile_do_not_count():
    """A batch of 20 takes 32 rows on a card; counted, the 12 would add to every energy what biases do there.

    Products keep 8 bits or more of every operand, and an error here is no small difference of large numbers,
    so a few 2^-8 of an energy are to be expected.
    """
    energies = []
    weights = pctt.init(network())
    for layer in weights.values():
        layer["bias"].fill_(0.5)
    for backend in ("reference", "emulated"):
        t = trainer(backend=backend, weights=weights)
        t.fit(blobs(20), 1, callbacks=[lambda kind, fields: energies.append((kind, fields))])
    first, second = (fields["energies"] for kind, fields in energies if kind == "batch")
    assert first == {name: pytest.approx(value, rel=0.05) for name, value in second.items()}


def test_a_mock_device_is_not_trained_on(monkeypatch):
    """Every number read from it is zero: a checkpoint would be overwritten by zeros."""
    monkeypatch.delenv("TT_METAL_SIMULATOR", raising=False)
    monkeypatch.setenv("TT_METAL_MOCK_CLUSTER_DESC_PATH", "/somewhere/n150.yaml")
    with pytest.raises(pctt.BackendUnavailable, match="mock device computes nothing"):
        trainer(backend="tenstorrent")


def test_a_trainer_says_where_it_computes():
    policy = PrecisionPolicy(states="bfloat16", fidelity="HiFi2")
    card = trainer(backend="emulated", device="p150", precision=policy).place()
    assert card["backend"] == "emulated" and card["device"].startswith("p150 with 11x10")
    assert card["precision"]["states"] == "bfloat16" and card["precision"]["fidelity"] == "HiFi2"
    assert trainer().place() == {"backend": "reference", "device": "cpu", "precision": None}


TT_FATAL = "TT_FATAL @ /a/b.cpp:3: ok\ninfo:\nThe card has hung.\nbacktrace:\n --- frame"


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (RuntimeError(TT_FATAL), pctt.DeviceLost, "ttnn failed on the device: The card has hung$"),
        (RuntimeError("bus error"), pctt.DeviceLost, "ttnn failed on the device: bus error$"),
        (AssertionError("a fault of pctt"), AssertionError, "a fault of pctt"),
        (ValueError("a fault of the caller"), ValueError, "a fault of the caller"),
    ],
)
def test_what_ttnn_raises_at_work_is_a_lost_device_and_a_fault_of_pctt_is_not(raised, expected, words):
    """Wherever the device must answer: running, reading, writing, allocating, waiting."""

    def fail(*arguments, **settings):
        raise raised

    class Broken:
        def __getattr__(self, name):
            return fail

    backend = object.__new__(tenstorrent.Tenstorrent)
    backend.ttnn = Broken()
    backend.device, backend.traces, backend.queues = Broken(), False, True
    backend.num_chips, backend.waits = 1, False
    backend._place = lambda *arguments: None
    section = tenstorrent.Section([fail], [], {})
    tensor = CardTensor(backend, CardBuffer("weight@layers0", 1, 32, 32), None)
    tensor.views[0, 1] = None
    calls = [
        section,
        tenstorrent.Sequence(backend, [section]),
        backend.synchronise,
        lambda: backend.get(tensor, 0, 1),
        lambda: backend.put(tensor, tensor.buffer, 0, torch.zeros(32, 32)),
        lambda: backend.allocate(tensor.buffer, 32),
    ]
    for call in calls:
        with pytest.raises(expected, match=words):
            call()


def test_plain_sgd_which_has_no_state_saves_and_resumes(tmp_path):
    t = trainer(learning=pctt.SGD(0.1))
    t.fit(blobs(), 1)
    t.save(tmp_path)
    assert same(pctt.load(tmp_path).weights, t.weights)


def test_weights_come_back_as_they_were_saved_with_every_setting(tmp_path):
    t = trainer(algorithm="backprop", inference=pctt.Inference(5, 0.3, "fixed"))
    t.fit(blobs(), 1)
    t.save(tmp_path)
    again = pctt.load(tmp_path)
    for name in ("net", "inference", "learning", "seed", "batch_size", "algorithm", "progress"):
        assert getattr(again, name) == getattr(t, name), name


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoint.write(tmp_path / run.CHECKPOINT, {"a": torch.zeros(1)}, {"format": "other"})
    with pytest.raises(checkpoint.CheckpointError, match="does not hold a run"):
        pctt.load(tmp_path)
    with pytest.raises(checkpoint.CheckpointError):
        pctt.load(tmp_path / "nowhere")


@pytest.mark.parametrize("rate", [5.0, 50.0])
def test_a_rate_that_diverges_stops_the_run_and_keeps_weights_and_checkpoint(tmp_path, rate):
    """The batch that diverges must not touch weights, and the checkpoint before it must stay."""
    t = trainer()
    t.fit(blobs(), 1, save_to=tmp_path)
    kept = (tmp_path / run.CHECKPOINT).read_bytes()
    wild = pctt.Trainer(
        network(), replace(t.inference, rate=rate, num_steps=60), t.learning, weights=t.weights
    )
    before = wild.weights
    result = wild.fit(blobs(), 2, save_to=tmp_path)
    assert result.status in (pctt.Status.DIVERGED, pctt.Status.NON_FINITE)
    assert "lower inference.rate" in result.message and result.steps == 0
    assert same(before, wild.weights)
    assert (tmp_path / run.CHECKPOINT).read_bytes() == kept


def test_records_of_a_batch_are_the_energies_of_its_own_relaxation():
    """The log's energies are compared with `infer` on the same samples and the weights before the update."""
    t, events = trainer(batch_size=96), []
    weights, data = t.weights, blobs()
    t.fit(data, 1, callbacks=[lambda kind, fields: events.append((kind, fields))])
    order = t._order(96, 0)
    targets = torch.nn.functional.one_hot(data.labels[order], 3).float()
    result = pctt.infer(t.net, weights, {"input": data.inputs[order], "dense3": targets}, t.inference)
    (trajectory,) = [fields for kind, fields in events if kind == "trajectory"]
    (batch,) = [fields for kind, fields in events if kind == "batch"]
    # the result holds the same numbers in the dtype of the weights
    assert torch.equal(torch.tensor(trajectory["energy"]), result.energy)
    assert torch.equal(torch.tensor(list(batch["energies"].values())), result.energy[-1])
    for name, norm in batch["error_norms"].items():
        # fp32 sums over 96 * 8 terms, in two orders: 768 ulp of 6e-8 at the very most
        assert norm == pytest.approx(float(result.errors[name].square().sum(-1).mean().sqrt()), rel=5e-5)


def test_numpy_arrays_and_target_vectors_are_accepted():
    data = blobs()
    arrays = (data.inputs.double().numpy(), data.labels.numpy())
    vectors = (data.inputs, torch.nn.functional.one_hot(data.labels, 3).float())
    results = []
    for given in (data, arrays, vectors):
        t = trainer()
        t.fit(given, 1)
        results.append(t.weights)
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize(
    ("inputs", "labels", "sentence"),
    [
        (torch.zeros(4, 5), torch.zeros(4, dtype=torch.long), r"inputs must be \[N, 6\]"),
        (
            torch.full((4, 6), torch.nan),
            torch.zeros(4, dtype=torch.long),
            "NaN or infinite values, first in row 0",
        ),
        (torch.zeros(4, 6), torch.tensor([0, 1, 2, 3]), "labels must be 0 to 2.*row 3 has 3"),
        (torch.zeros(4, 6), torch.tensor([0, -1, 2, 2]), "row 1 has -1"),
        (torch.zeros(4, 6), torch.zeros(3, dtype=torch.long), "got 4 and 3"),
        (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), "at least one"),
        (torch.zeros(4, 6), torch.zeros(4), "labels must be whole numbers"),
        (torch.zeros(4, 6), torch.full((4, 3), torch.inf), "targets hold NaN or infinite"),
        (np.zeros((4, 6, 2)), np.zeros(4, dtype=int), r"inputs must be \[N, 6\]"),
    ],
)
def test_data_that_do_not_fit_are_refused_in_one_sentence(inputs, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        trainer().fit((inputs, labels), 1)


def test_targets_of_a_categorical_output_must_be_distributions():
    layers = [pctt.Dense(8, "tanh"), pctt.Dense(3, "softmax", energy=pctt.Categorical())]
    t = pctt.Trainer(pctt.chain(6, layers))
    with pytest.raises(ValueError, match="row 0 is not"):
        t.fit((torch.zeros(2, 6), torch.tensor([[0.5, 0.2, 0.2], [1.0, 0.0, 0.0]])), 1)


def test_predictions_do_not_depend_on_how_many_are_asked_for_at_once(monkeypatch):
    t, inputs = trainer(), blobs().inputs
    whole = t.predict(inputs)
    monkeypatch.setattr(run, "EVALUATION_BATCH", 7)
    # another batch size may take another summation order of 8 products: a few ulp
    torch.testing.assert_close(trainer().predict(inputs), whole, rtol=0, atol=8 * 2**-23)


@pytest.mark.parametrize("output", [pctt.Dense(3), pctt.Dense(3, energy=pctt.Gaussian(4.0)), "categorical"])
def test_the_twin_records_the_error_of_its_output(output):
    """Its norm is that of target minus prediction, whatever the energy: not derived from the loss."""
    if output == "categorical":
        output = pctt.Dense(3, "softmax", energy=pctt.Categorical())
    net, data, events = pctt.chain(6, [pctt.Dense(8, "tanh"), output]), blobs(), []
    t = pctt.Trainer(net, algorithm="backprop", batch_size=96)
    weights = t.weights
    t.fit(data, 1, callbacks=[lambda kind, fields: events.append((kind, fields))])
    logits = torch.tanh(data.inputs @ weights["dense1"]["weight"]) @ weights["dense2"]["weight"]
    prediction = logits.softmax(-1) if output.activation == "softmax" else logits
    error = torch.nn.functional.one_hot(data.labels, 3) - prediction
    (batch,) = [fields for kind, fields in events if kind == "batch"]
    # fp32 sums over 96 samples in another order: 96 roundings of 6e-8 at the very most
    expected = pytest.approx(float(error.square().sum(-1).mean().sqrt()), rel=1e-5)
    assert batch["error_norms"] == {"dense1": 0.0, "dense2": expected}


def test_the_state_of_a_trainer_is_that_of_its_twin_in_torch():
    """Names and tensors beside torch's own: a Sequential that is filled from them predicts the same."""
    t = trainer()
    t.fit(blobs(), 1)
    state = t.state_dict()
    assert list(state) == [f"dense{n}.{key}" for n in (1, 2, 3) for key in ("weight", "bias")]
    twin = pctt.to_torch(t.net, t.weights)
    inputs = blobs(seed=1).inputs
    # sums of at most 8 products, three times, in another order
    torch.testing.assert_close(twin(inputs), t.predict(inputs), rtol=0, atol=3e-5)
    state["dense1.weight"].zero_()  # a copy
    assert t.weights["dense1"]["weight"].any()

    other = trainer(seed=9)
    other.load_state_dict(t.state_dict())
    assert same(other.weights, t.weights)
    other.load_state_dict({name: values.numpy() for name, values in t.state_dict().items()})
    assert same(other.weights, t.weights)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dense1.weight": None}, "lacks 'dense1.weight'"),
        ({"dense4.weight": torch.zeros(8, 3)}, "has 'dense4.weight', which this network does not have"),
        ({"dense1.weight": torch.zeros(6, 9)}, "dense1"),
        ({"dense2.bias": torch.full((8,), torch.nan)}, "layer 'dense2' are NaN or infinite"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change, sentence):
    t = trainer()
    before = t.weights
    state = {name: values for name, values in {**t.state_dict(), **change}.items() if values is not None}
    with pytest.raises(ValueError, match=sentence):
        t.load_state_dict(state)
    assert same(t.weights, before)
