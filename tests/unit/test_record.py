"""The record of a run: lines return, a crash costs one, and resuming leaves the bytes of an unbroken run."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pctt import record
from pctt.record import Recorder


def log_run(recorder: Recorder, steps: range, seconds: float = 0.0) -> None:
    """What a trainer logs: a batch record each step, and every third step ends an epoch."""
    for step in steps:
        recorder.log("batch", step=step, energies={"dense1": 1 / step}, learning_rate=1e-3)
        if step % 3 == 0:
            recorder.log("epoch", epoch=step // 3, step=step, validation_accuracy=None, seconds=seconds)


def test_records_return_as_they_were_logged_in_order(tmp_path: Path) -> None:
    with Recorder(tmp_path / "new" / "run") as recorder:
        recorder.log("config", text="ä\n/", flag=True, nothing=None)
        recorder.log("batch", step=3, energies={"dense1": 0.1}, nested=[[1, 2.5], ()])
    assert record.read(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"kind": "config", "text": "ä\n/", "flag": True, "nothing": None},
        {"kind": "batch", "step": 3, "energies": {"dense1": 0.1}, "nested": [[1, 2.5], []]},
    ]


@given(value=st.floats())
def test_floats_return_exactly_and_those_that_are_not_finite_as_null(value: float) -> None:
    expected = value if math.isfinite(value) else None
    assert repr(json.loads(json.dumps(record._plain(value, "x")))) == repr(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(1.5), 1.5),
        (torch.tensor(7), 7),
        (torch.tensor([1.0, math.nan, math.inf], requires_grad=True), [1.0, None, None]),
        (torch.tensor([[0.1]], dtype=torch.bfloat16), [[0.10009765625]]),
        (np.float32(0.5), 0.5),
        (np.float64(-math.inf), None),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1, 2]]), [[1, 2]]),
        ({"a": torch.tensor(2.0)}, {"a": 2.0}),
    ],
)
def test_torch_and_numpy_values_become_plain_numbers(tmp_path: Path, value: Any, expected: Any) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.log("batch", value=value)
    assert record.read(recorder.path) == [{"kind": "batch", "value": expected}]


@pytest.mark.parametrize("value", [object(), {1: 2}, 1j, [Path("x")], torch.tensor(1j)])
def test_values_without_a_json_form_are_refused_and_leave_no_line(tmp_path: Path, value: Any) -> None:
    with Recorder(tmp_path) as recorder:
        with pytest.raises(TypeError, match="'field"):
            recorder.log("batch", field=value)
    assert recorder.path.read_bytes() == b""


def test_lines_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in range(3):
            recorder.log("batch", step=step)
            assert len(record.read(recorder.path)) == step + 1


def test_a_second_recorder_adds_to_the_record_and_closing_twice_is_harmless(tmp_path: Path) -> None:
    for step in range(2):
        recorder = Recorder(tmp_path)
        recorder.log("batch", step=step)
        recorder.close()
        recorder.close()
    assert [line["step"] for line in record.read(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_recorder_opened_on_a_half_written_line_removes_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "a"}\n{"kin')
    with Recorder(tmp_path) as recorder:
        recorder.log("b")
    assert record.read(path) == [{"kind": "a"}, {"kind": "b"}]


def test_a_line_that_only_half_fits_is_taken_back_and_the_file_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next record would be glued to it and the whole file refused."""
    recorder = Recorder(tmp_path)
    recorder.log("batch", step=1)

    class HalfFull:
        def __init__(self, file: Any) -> None:
            self.file, self.writes = file, 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes == 2:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:5])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "_file", HalfFull(recorder._file))
        with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
            recorder.log("batch", step=2)
    recorder.log("batch", step=3)
    recorder.close()
    assert [line["step"] for line in record.read(recorder.path)] == [1, 3]


# -- resuming --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(steps=st.integers(1, 12), data=st.data())
def test_a_resumed_record_has_the_bytes_of_an_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, steps: int, data: st.DataObject
) -> None:
    """The crash comes at any byte after the checkpoint was written."""
    checkpoint = data.draw(st.integers(0, steps), label="step of the checkpoint")
    folder = tmp_path_factory.mktemp("run")
    with Recorder(folder) as recorder:
        recorder.log("config", seed=0)
        log_run(recorder, range(1, checkpoint + 1))
        saved = recorder.path.stat().st_size
        log_run(recorder, range(checkpoint + 1, steps + 1))
        recorder.log("result", test_accuracy=0.5)
    unbroken = recorder.path.read_bytes()
    crash = data.draw(st.integers(saved, len(unbroken)), label="bytes written before the crash")
    recorder.path.write_bytes(unbroken[:crash])
    with Recorder(folder, resume_after=checkpoint) as recorder:
        assert recorder.path.stat().st_size == saved
        log_run(recorder, range(checkpoint + 1, steps + 1))
        recorder.log("result", test_accuracy=0.5)
    assert recorder.path.read_bytes() == unbroken


def test_records_without_a_step_stay_only_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = b'{"kind": "config"}\n{"kind": "batch", "step": 2}\n{"kind": "note"}\n'
    path.write_bytes(
        before + b'{"kind": "batch", "step": 3}\n{"kind": "note"}\n{"kind": "batch", "step": 2}\n'
    )
    record.truncate_after(path, 2)
    assert path.read_bytes() == before


def test_a_finished_run_that_goes_on_drops_its_result(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    before = b'{"kind": "batch", "step": 2}\n'
    path.write_bytes(before + b'{"kind": "result", "test_accuracy": 0.5}\n')
    record.truncate_after(path, 2)
    assert path.read_bytes() == before


def test_resuming_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Recorder(tmp_path, resume_after=1)


# -- broken files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"{", b'{"kind": "c"}', b"\x00\x00", b"\xff"])
def test_only_a_last_line_without_its_newline_is_passed_over(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"kind": "a"}\n{"kind": "b"}\n'
    path.write_bytes(whole + tail)
    assert [line["kind"] for line in record.read(path)] == ["a", "b"]
    record.truncate_after(path, 0)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"1", b"\xff", b'{"a": 1} {"b": 2}', b"[" * 100_000])
def test_any_other_broken_line_is_named_by_its_number_and_the_file_kept(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    data = b'{"kind": "a"}\n' + line + b'\n{"kind": "b"}\n'
    path.write_bytes(data)
    for function in (record.read, lambda path: record.truncate_after(path, 0)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not"):
            function(path)
    assert path.read_bytes() == data


# -- tensorboard -----------------------------------------------------------------------------------


def test_tensorboard_shows_the_scalars_lists_and_layers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path, tensorboard=True) as recorder:
        for step in (1, 2):
            recorder.log(
                "batch", step=step, energies={"dense1": 0.5 * step}, norms=[1.0, math.nan, step], name="x"
            )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert shown == {
        "batch/energies/dense1": [(1, 0.5), (2, 1.0)],
        "batch/norms/0": [(1, 1.0), (2, 1.0)],
        "batch/norms/2": [(1, 1.0), (2, 2.0)],
    }


def test_a_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "pctt\[log\]"'):
        Recorder(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
