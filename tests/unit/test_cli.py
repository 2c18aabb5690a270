"""The command line: what it leaves behind, what it refuses, and with which exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import records, tiny_toml

from pctt import DeviceLost, Engine, cli, record
from pctt.backends import devices
from pctt.run import Trainer

NO_CHIP = """
class DispatchCoreType:
    WORKER = "worker"

DispatchCoreConfig = str

def open_device(**settings):
    raise RuntimeError("No chip")
"""  # a stand-in for ttnn


TINY = tiny_toml(num_steps=5, batch_size=64)


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_train_leaves_config_metrics_checkpoint_and_picture(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", tiny, "--out", out) == cli.OK
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "curves.png",
    }
    printed = capsys.readouterr().out
    last = records(out)[-1]
    assert last["kind"] == "result" and last["epochs"] == 2
    assert f"{last['test_accuracy']:.2%} on 360 samples" in printed


def test_eval_repeats_the_accuracy_of_the_last_epoch(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", tiny, "--out", out)
    capsys.readouterr()
    assert run("eval", out, "--json") == cli.OK
    assert json.loads(capsys.readouterr().out)["test_accuracy"] == records(out)[-1]["test_accuracy"]


def test_json_output_is_one_object_a_line_and_nothing_else(tiny, tmp_path, capsys):
    assert run("train", tiny, "--out", tmp_path / "run", "--json") == cli.OK
    captured = capsys.readouterr()
    kinds = [json.loads(line)["kind"] for line in captured.out.splitlines()]
    assert kinds == ["start", "epoch", "epoch", "result"] and captured.err == ""


def test_a_run_in_two_parts_is_the_run_in_one(tiny, tmp_path):
    """2 epochs, then on to 4, equals 4 epochs at a constant rate: weights, records and result."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("train", tiny, "--out", whole, "--epochs", 4)
    run("train", tiny, "--out", parts)
    assert run("train", tiny, "--out", parts, "--epochs", 4, "--resume") == cli.OK
    assert records(whole) == records(parts)
    assert (whole / "checkpoint.safetensors").read_bytes() == (parts / "checkpoint.safetensors").read_bytes()


def test_resuming_a_complete_run_changes_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", tiny, "--out", out)
    before = records(out)
    assert run("train", tiny, "--out", out, "--resume") == cli.OK
    assert "complete already" in capsys.readouterr().out and records(out) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_as_if_never_stopped(tiny, tmp_path, number):
    """SIGKILL loses what came after the last checkpoint, SIGTERM nothing; the end is the same bits."""
    command = [
        sys.executable,
        "-m",
        "pctt",
        "train",
        str(tiny),
        "--epochs",
        "40",
        "--set",
        "training.checkpoint_every=7",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", whole], check=True, capture_output=True, env=environment)
    victim = subprocess.Popen(
        [*command, "--out", parts], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    metrics = parts / record.FILE_NAME
    deadline = time.monotonic() + 60
    while (
        not (metrics.is_file() and metrics.read_bytes().count(b'"batch"') > 60)
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    victim.send_signal(number)
    _, errors = victim.communicate(timeout=60)
    assert victim.returncode == (-signal.SIGKILL if number == signal.SIGKILL else cli.FAILED)
    assert number == signal.SIGKILL or b"--resume" in errors
    assert record.read(metrics)[-1]["kind"] != "result", "the run ended before the signal; make it longer"
    subprocess.run([*command, "--out", parts, "--resume"], check=True, capture_output=True, env=environment)
    assert records(whole) == records(parts)
    assert (whole / "checkpoint.safetensors").read_bytes() == (parts / "checkpoint.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "nonsense"], "neither a preset"),
        (
            ["train", "digits", "--set", "inference.num_step=3"],
            "unknown key inference.num_step; known here: num_steps",
        ),
        (["train", "digits", "--set", "inference.rate=-1"], "rate must be a finite number above 0"),
        (["train", "digits", "--set", "inference.rate=fast"], "inference.rate must be a number, got 'fast'"),
        (["train", "digits", "--set", "inference"], "key=value"),
        (["train", "digits", "--set", "inference.rate.x=1"], "no setting inference.rate.x"),
        (["train", "digits", "--algorithm", "magic"], "algorithm must be one of pc, backprop"),
        (["train", "digits", "--resume"], "name that folder"),
        (["train", "digits", "--epochs", "-1"], "epochs must be a whole number"),
        (["train", "digits", "--backend", "nope"], "backend must be one of"),
        (["train", "digits", "--set", "init.gain=-1"], "gain must be a finite number above 0"),
        (["train", "digits", "--backend", "emulated", "--device", "n151"], "emulated backend must be one of"),
        (["train", "digits", "--backend", "tenstorrent", "--device", "n150"], "must be a number such as 0"),
        (["train", "digits", "--set", "precision.states=bfloat16"], "no effect on the reference backend"),
        (
            ["train", "digits", "--backend", "emulated", "--set", "precision.states=fp8"],
            "precision: states must be one of float32, bfloat16",
        ),
    ],
)
def test_wrong_usage_exits_2_with_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == cli.USAGE
    errors = capsys.readouterr().err
    assert sentence in errors and len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


EMULATED = ("train", "digits", "--backend", "emulated", "--set")
SOFTMAX = '{units=10, activation="softmax", energy={kind="categorical"}}'


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "absent.toml"], "no configuration file absent.toml"),
        (["train", "mnist"], "train-images-idx3-ubyte"),
        (["train", "digits", "--data", "nope"], "choose one of digits"),
        (["train", "digits", "--device", "cuda"], "cuda"),
        (["eval", "nowhere"], "holds no run"),
        (["train", "digits", "--resume", "--out", "nowhere"], "holds no run"),
        ([*EMULATED, "layers=[{units=60000}, {units=10}]"], "does not fit the n150"),
        ([*EMULATED, "training.batch_size=1000000"], "a batch_size of at most 256"),
        ([*EMULATED, f"layers=[{SOFTMAX}]"], "layer 'dense1' has a softmax or a categorical energy"),
        ([*EMULATED, "learning.clip_norm=1.0"], "clip_norm is not run by the card backends"),
    ],
)
def test_what_cannot_be_done_exits_1_with_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PCTT_DATA", raising=False)
    assert run(*arguments) == cli.FAILED
    errors = capsys.readouterr().err
    assert sentence in errors and len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize(
    ("variable", "value", "ttnn", "sentence"),
    [
        (None, None, None, 'needs ttnn: pip install "pctt[tt]"'),
        (None, None, "", "there is no Tenstorrent device"),
        ("TT_METAL_SIMULATOR", "/nonexistent/libttsim.so", None, "/nonexistent/libttsim.so does not exist"),
        ("TT_METAL_SIMULATOR", "/", NO_CHIP, "No chip"),
        ("TT_METAL_MOCK_CLUSTER_DESC_PATH", "/", "", "mock device computes nothing"),
    ],
)
def test_a_card_that_cannot_be_used_exits_1_with_one_sentence(
    variable, value, ttnn, sentence, capsys, tmp_path, monkeypatch
):
    """On machines without ttnn (None), and with one (the text of a stand-in) that finds no device."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("TT_METAL_SIMULATOR", "TT_METAL_MOCK_CLUSTER_DESC_PATH"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(devices, "cards", list)
    monkeypatch.setattr(devices, "_open", {})
    find = devices.importlib.util.find_spec
    if ttnn is None:
        monkeypatch.setattr(
            devices.importlib.util, "find_spec", lambda name: None if name == "ttnn" else find(name)
        )
    else:
        (tmp_path / "ttnn.py").write_text(ttnn)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "ttnn", raising=False)
    try:
        assert run("train", "digits", "--backend", "tenstorrent") == cli.FAILED
    finally:
        if ttnn is not None:
            sys.modules.pop("ttnn", None)
    errors = capsys.readouterr().err
    assert sentence in errors and len(errors.strip().splitlines()) == 1
    assert not list((tmp_path / "here").iterdir()), "nothing may be left behind"


def backends_of(folder: Path) -> list[tuple[int, str]]:
    """Where a run says that it went on elsewhere: (step, backend)."""
    return [(line["step"], line["backend"]) for line in records(folder) if line["kind"] == "backend"]


def test_a_run_on_an_emulated_card_says_so_everywhere(tiny, tmp_path, capsys):
    """In what is printed, in the record's first line, in config.json; and eval runs there too."""
    out = tmp_path / "run"
    place = ("--backend", "emulated", "--device", "p100a")
    settings = ("--set", "precision.operands=float32", "precision.fidelity=HiFi2")
    assert run("train", tiny, "--out", out, "--epochs", 1, *place, *settings) == cli.OK
    assert "backend emulated, p100a with 11x10 cores, HiFi2, bfloat16 weights" in capsys.readouterr().out
    first = records(out)[0]
    assert (first["kind"], first["backend"], first["device"]) == (
        "backend",
        "emulated",
        "p100a with 11x10 cores",
    )
    assert first["precision"]["operands"] == "float32" and first["precision"]["weights"] == "bfloat16"
    saved = json.loads((out / "config.json").read_text())
    assert saved["training"]["device"] == "p100a" and saved["precision"]["fidelity"] == "HiFi2"
    assert run("eval", out, "--json") == cli.OK
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["test_accuracy"] == records(out)[-1]["test_accuracy"]
    assert (evaluated["backend"], evaluated["device"]) == ("emulated", "p100a with 11x10 cores")
    assert evaluated["precision"] == first["precision"]
    assert run("eval", out, "--backend", "reference", "--json") == cli.OK
    evaluated = json.loads(capsys.readouterr().out)
    assert (evaluated["backend"], evaluated["device"], evaluated["precision"]) == ("reference", "cpu", None)


def test_eval_refuses_a_device_of_another_backend(tiny, tmp_path, capsys):
    run("train", tiny, "--out", tmp_path / "run", "--epochs", 1)
    assert run("eval", tmp_path / "run", "--backend", "emulated", "--device", "cuda:0") == cli.USAGE
    assert "must be one of n150" in capsys.readouterr().err


def test_a_run_that_goes_on_elsewhere_records_where_and_only_then(tiny, tmp_path):
    """21 batches an epoch. Precision is part of where; a resume in the same place adds no line."""
    out = tmp_path / "run"
    emulated = ("--backend", "emulated")
    run("train", tiny, "--out", out, "--epochs", 1, *emulated, "--set", "precision.states=bfloat16")
    assert run("train", tiny, "--out", out, "--epochs", 2, "--resume") == cli.OK
    assert run("train", tiny, "--out", out, "--epochs", 3, "--resume") == cli.OK
    assert run("train", tiny, "--out", out, "--epochs", 4, "--resume", *emulated) == cli.OK
    assert backends_of(out) == [(1, "emulated"), (22, "reference"), (64, "emulated")]
    assert records(out)[-1]["kind"] == "result" and records(out)[-1]["step"] == 84


def test_a_device_that_fails_exits_1_and_the_run_goes_on_as_if_it_had_not(
    tiny, tmp_path, capsys, monkeypatch
):
    """In the middle of epoch 2; then while the test data are evaluated."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ("train", tiny, "--backend", "emulated", "--out")
    assert run(*command, whole) == cli.OK
    learn = Engine.learn

    def fail(engine: Engine, rate: float, step: int) -> None:
        if step == 30:
            raise DeviceLost("ttnn failed on the device: it hung")
        learn(engine, rate, step)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "learn", fail)
        capsys.readouterr()
        assert run(*command, parts, "--json") == cli.FAILED
        printed = capsys.readouterr()
    assert "it hung" in printed.err and f"--out {parts} --resume" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["status"] == "DEVICE_LOST"
    last = records(parts)[-1]
    assert (last["kind"], last["status"], last["step"]) == ("failed", "DEVICE_LOST", 30)
    assert (parts / "curves.png").is_file()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda trainer, data: fail(trainer.engine, 0.0, 30))
        assert run(*command, parts, "--resume") == cli.FAILED
        assert "evaluating: ttnn failed" in capsys.readouterr().err
    assert records(parts)[-1]["kind"] == "failed"
    assert run(*command, parts, "--resume") == cli.OK
    assert records(whole) == records(parts)
    assert (whole / "checkpoint.safetensors").read_bytes() == (parts / "checkpoint.safetensors").read_bytes()


def test_a_network_that_no_card_runs_can_be_resumed_on_the_reference_only(tiny, tmp_path, capsys):
    """The sentence blames the layer, not the checkpoint, and the run stays as it was."""
    out = tmp_path / "run"
    command = ("train", tiny, "--set", f"layers=[{SOFTMAX}]", "--out", out)
    assert run(*command, "--epochs", 1) == cli.OK
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    capsys.readouterr()
    assert run(*command, "--resume", "--backend", "emulated") == cli.FAILED
    errors = capsys.readouterr().err
    assert "layer 'dense1' has a softmax" in errors and "does not hold a run" not in errors
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_unknown_options_exit_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run("train", "digits", "--epoch", "3")
    assert caught.value.code == cli.USAGE


def test_a_folder_that_holds_something_is_not_overwritten(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert run("train", tiny, "--out", out) == cli.USAGE
    assert "add --resume" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_resuming_with_another_setting_is_refused_by_name(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", tiny, "--out", out)
    assert run("train", tiny, "--out", out, "--resume", "--set", "learning.rate=0.1") == cli.USAGE
    assert "learning.rate = 0.003, not 0.1" in capsys.readouterr().err
    assert run("train", tiny, "--out", out, "--resume", "--epochs", 1) == cli.USAGE
    assert "has done 2 epochs" in capsys.readouterr().err


def test_a_rate_that_diverges_exits_1_and_keeps_the_run(tiny, tmp_path, capsys):
    """The sentence names layer and remedy, and the checkpoint from before stays readable."""
    out = tmp_path / "run"
    assert (
        run("train", tiny, "--out", out, "--set", "inference.rate=50", "inference.num_steps=30") == cli.FAILED
    )
    errors = capsys.readouterr().err
    assert "worst in layer" in errors and "lower inference.rate" in errors
    assert records(out)[-1]["kind"] == "failed" and records(out)[-1]["step"] == 1
    assert run("eval", out) == cli.OK


def test_a_data_set_with_other_classes_than_the_output_is_refused(tiny, tmp_path, capsys):
    text = tiny.read_text().replace("units = 10", "units = 7")
    tiny.write_text(text)
    assert run("train", tiny, "--out", tmp_path / "run") == cli.USAGE
    assert "7 units, digits has 10 classes" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_named_and_nothing_is_lost(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", tiny, "--out", out)
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert run("eval", out) == cli.FAILED
    assert run("train", tiny, "--out", out, "--epochs", 3, "--resume") == cli.FAILED
    assert "checkpoint.safetensors" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_doctor_finds_what_training_on_digits_needs(capsys):
    assert run("doctor", "--json") == cli.OK
    findings = {entry["name"]: entry for entry in map(json.loads, capsys.readouterr().out.splitlines())}
    assert findings["torch"]["ok"] and findings["sklearn"]["ok"]
    assert all(entry["ok"] or entry["fix"] or "put them in" in entry["detail"] for entry in findings.values())


def test_doctor_names_a_simulator_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setenv("TT_METAL_SIMULATOR", "/nonexistent/libttsim.so")
    run("doctor")
    assert "/nonexistent/libttsim.so does not exist" in capsys.readouterr().out


def test_choosing_another_kind_drops_the_settings_of_the_old_one(tiny, tmp_path):
    """`learning.kind=sgd` on an Adam preset would otherwise fail on Adam's betas."""
    out = tmp_path / "run"
    settings = ("learning.rate=0.05", "learning.kind=sgd", "learning.momentum=0.9")
    assert run("train", tiny, "--out", out, "--epochs", 1, "--set", *settings) == cli.OK
    learning = json.loads((out / "config.json").read_text())["learning"]
    assert learning["kind"] == "sgd" and learning["rate"] == 0.05 and "betas" not in learning


def test_a_folder_for_data_that_need_none_is_reported(tiny, tmp_path, capsys):
    assert run("train", tiny, "--out", tmp_path / "run", "--data-dir", tmp_path) == cli.OK
    assert "no effect on digits" in capsys.readouterr().err


# --- graphs, generation and recall --------------------------------------------------------------------------

GRAPH = """
clamp = {image = "images", label = "labels"}

[[layers]]
name = "hidden"
units = 16
activation = "tanh"
of = ["image", "label"]

[[layers]]
name = "second"
units = 16
activation = "tanh"
of = ["hidden"]

[[layers]]
name = "third"
units = 16
activation = "tanh"
of = ["second"]
shared = "second"

[[layers]]
name = "label"
units = 10
of = ["image", "third"]

[training]
epochs = 1
"""

BLOCKS = """
[[layers]]
kind = "block"
steps = [{kind = "conv2d", channels = 4, kernel = 3, padding = 1}, "gelu", {kind = "max_pool2d", kernel = 2}]

[[layers]]
units = 10

[inference]
num_steps = 5
rate = 0.05

[training]
epochs = 1
"""


@pytest.fixture(scope="module")
def generative(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("generative") / "run"
    assert run("train", "digits_generative", "--epochs", 1, "--out", out) == cli.OK
    return out


@pytest.mark.parametrize("text", [GRAPH, BLOCKS], ids=["graph", "blocks"])
def test_graphs_and_blocks_are_trained_evaluated_and_resumed_from_toml(text, tmp_path, capsys):
    path, out = tmp_path / "net.toml", tmp_path / "run"
    path.write_text(text)
    assert run("train", path, "--out", out) == cli.OK
    assert run("train", path, "--out", out, "--epochs", 2, "--resume") == cli.OK
    capsys.readouterr()
    assert run("eval", out, "--json") == cli.OK
    assert json.loads(capsys.readouterr().out)["test_accuracy"] == records(out)[-1]["test_accuracy"]


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ('"third"]', '"fourth"]', "reads 'fourth', which is no node"),
        ('shared = "second"', 'shares = "second"', "unknown key layers[2].shares"),
        ('shared = "second"', 'shared = "label"', "cannot use the weights"),
        ('label = "labels"', 'label = "names"', "clamp.label must be one of images, labels, zeros"),
        ('image = "images", ', "", "clamp must put images at one node"),
        ("units = 10\n", "units = 7\n", "node 'label' has 7 units, digits has 10 classes"),
        ('of = ["image", "third"]', "of = []", "of must name at least one node"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_by_name(before, after, sentence, tmp_path, capsys):
    path = tmp_path / "net.toml"
    assert before in GRAPH
    path.write_text(GRAPH.replace(before, after))
    assert run("train", path, "--out", tmp_path / "run") == cli.USAGE
    assert sentence in capsys.readouterr().err


def test_generate_draws_classes_and_samples(generative, tmp_path, capsys):
    pictures = tmp_path / "some.png"
    capsys.readouterr()
    assert run("generate", generative, "--classes", "0,3", "--count", 2, "--steps", 20, "--json") == cli.OK
    answer = json.loads(capsys.readouterr().out)
    assert (answer["pictures"], answer["classes"]) == (4, [0, 3]) and Path(answer["out"]).is_file()
    command = ("generate", generative, "--prior", "--langevin", "--count", 3, "--steps", 20)
    assert run(*command, "--out", pictures) == cli.OK
    assert pictures.read_bytes().startswith(b"\x89PNG") and "3 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["noise", "upper", "lower", "left", "right", "mask"])
def test_recall_shows_given_and_recalled_beside_the_original(part, generative, tmp_path, capsys):
    mask = tmp_path / "mask.npy"
    np.save(mask, np.arange(64).reshape(8, 8) % 3 > 0)
    capsys.readouterr()
    given = mask if part == "mask" else part
    out = tmp_path / "recalled.png"
    assert (
        run("recall", generative, "--from", given, "--count", 4, "--steps", 30, "--out", out, "--json")
        == cli.OK
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["pictures"] == 4 and out.is_file() and answer["given_squared_error"] > 0.0
    assert answer["recalled_squared_error"] < answer["given_squared_error"]


def test_a_pc_graph_can_be_asked_everything(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "digits_pcgraph", "--epochs", 2, "--out", out) == cli.OK
    assert run("eval", out) == cli.OK
    assert run("generate", out, "--classes", 1, "--count", 1, "--steps", 50) == cli.OK
    assert run("recall", out, "--count", 2, "--steps", 50) == cli.OK


def test_a_chain_down_generates(tmp_path, capsys):
    config = tmp_path / "two.toml"
    config.write_text(TINY + "\n[[backward]]\nunits = 16\n\n[[backward]]\nunits = 64\n")
    assert (
        run("train", config, "--epochs", 1, "--set", "inference.rate=0.02", "--out", tmp_path / "run")
        == cli.OK
    )
    assert run("generate", tmp_path / "run", "--count", 1) == cli.OK
    assert run("recall", tmp_path / "run", "--count", 2, "--steps", 20) == cli.OK
    assert run("generate", tmp_path / "run", "--prior") == cli.FAILED
    assert "name some" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "recall"])
def test_a_run_that_predicts_no_pictures_is_not_asked_for_any(command, tiny, tmp_path, capsys):
    run("train", tiny, "--epochs", 1, "--out", tmp_path / "run")
    assert run(command, tmp_path / "run") == cli.FAILED
    assert "no generative direction" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["generate", "RUN", "--classes", "11"], cli.USAGE, "numbers from 0 to 9"),
        (["generate", "RUN", "--classes", "one"], cli.USAGE, "numbers from 0 to 9"),
        (["generate", "RUN", "--classes", "1", "--prior"], cli.USAGE, "exclude each other"),
        (["generate", "RUN", "--count", "0"], cli.USAGE, "--count must be at least 1"),
        (["generate", "RUN", "--out", "a.gif"], cli.USAGE, "must end in .png"),
        (["recall", "RUN", "--from", "top"], cli.USAGE, "--from must be noise, upper"),
        (["recall", "RUN", "--from", "absent.npy"], cli.FAILED, "no mask absent.npy"),
        (["recall", "RUN", "--noise", "-1"], cli.USAGE, "--noise must be at least 0"),
        (["generate", "nowhere"], cli.FAILED, "holds no run"),
        (["recall", "nowhere"], cli.FAILED, "holds no run"),
    ],
)
def test_questions_that_make_no_sense_are_refused(arguments, code, sentence, generative, capsys):
    arguments = [generative if argument == "RUN" else argument for argument in arguments]
    capsys.readouterr()
    assert run(*arguments) == code
    errors = capsys.readouterr().err
    assert sentence in errors and len(errors.strip().splitlines()) == 1


def test_a_mask_of_another_size_is_refused(generative, tmp_path, capsys):
    np.save(tmp_path / "mask.npy", np.ones((3, 3)))
    assert run("recall", generative, "--from", tmp_path / "mask.npy") == cli.USAGE
    assert "9 pixels" in capsys.readouterr().err


def test_a_run_without_classes_has_no_accuracy_and_says_so(tmp_path, capsys):
    config = tmp_path / "pictures.toml"
    clamp = '{input = "zeros", dense2 = "images"}'
    config.write_text(f"clamp = {clamp}\n" + TINY.replace("units = 10", "units = 64"))
    assert (
        run("train", config, "--epochs", 1, "--set", "inference.rate=0.02", "--out", tmp_path / "run")
        == cli.OK
    )
    assert records(tmp_path / "run")[-1]["test_accuracy"] is None
    assert run("eval", tmp_path / "run") == cli.FAILED
    assert "without their classes" in capsys.readouterr().err
    assert run("generate", tmp_path / "run", "--count", 2, "--steps", 20) == cli.OK
    assert run("generate", tmp_path / "run", "--classes", 1) == cli.USAGE


def test_an_option_given_twice_is_refused_and_not_half_forgotten(capsys):
    """Of two --set the parser would take the last alone, and train with the other setting's default."""
    twice = ["--set", "inference.rate=0.05", "--set", "inference.num_steps=3"]
    assert cli.main(["train", "digits", *twice]) == cli.USAGE
    assert (
        "--set stands there 2 times; give it once, with all its values behind it." in capsys.readouterr().err
    )


FRONT = """
import os, sys
import pctt.__main__ as front
assert "torch" not in sys.modules  # it reads the setting when it is loaded
sys.argv = ["pctt", "--help"]
try:
    front.main()
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(given, expected):
    """Else a batch on a machine with other work takes tens of times as long."""
    set_by_user = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {key: value for key, value in os.environ.items() if key not in set_by_user} | given
    done = subprocess.run([sys.executable, "-c", FRONT], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == f"{expected} True", done.stderr
