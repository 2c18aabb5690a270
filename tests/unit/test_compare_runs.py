"""Two tools: the comparison of run folders, on real runs that are the same, that part at a known batch, and
damaged ones; and the line counter, on files counted by hand.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pctt
from pctt import record
from pctt.run import CHECKPOINT

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


compare_runs, count_lines = load_tool("compare_runs"), load_tool("count_lines")


def train(folder: Path, *, seed: int = 0, epochs: int = 2, rate: float | None = None) -> Path:
    """Three batches an epoch; with `rate`, goes on with the run in `folder` at that learning rate."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(24, 6, generator=generator), torch.arange(24) % 3
    if rate is not None:
        trainer = pctt.load(folder)
        trainer.learning = replace(trainer.learning, rate=rate)
    else:
        net = pctt.chain(6, [pctt.Dense(5, "tanh"), pctt.Dense(3)])
        trainer = pctt.Trainer(net, pctt.Inference(4, 0.1), pctt.Adam(1e-2), seed=seed, batch_size=8)
    resume_after = None if rate is None else trainer.progress.step
    with record.Recorder(folder, resume_after=resume_after) as recorder:
        result = trainer.fit((inputs, labels), epochs, callbacks=[recorder.log_record], save_to=folder)
    assert result.status.ok
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_run_and_its_repetition_are_the_same_although_they_took_other_times(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train(tmp_path / "b")
    texts = [(folder / record.FILE_NAME).read_text() for folder in (run, other)]
    assert texts[0] != texts[1]  # by their seconds
    assert compare_runs.main([str(run), str(other)]) == 0
    assert capsys.readouterr().out.startswith("the same")


def test_a_run_stopped_and_resumed_is_the_same(run: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "b", epochs=1)
    assert not compare_runs.compare(run, folder).is_same
    train(folder, rate=1e-2)
    assert compare_runs.compare(run, folder).is_same


def test_another_seed_parts_at_the_first_batch_in_every_layer(run: Path, tmp_path: Path) -> None:
    found = compare_runs.compare(run, train(tmp_path / "b", seed=1))
    assert found.batch.step == 1 and found.record_line[0] == 1
    # Before the error has come down, the lowest layer may have no energy in either.
    assert "dense2" in found.batch.energies
    assert {"seed"} == set(found.metadata)
    assert {"weights/dense1/weight", "weights/dense2/bias"} <= {tensor.name for tensor in found.tensors}


def test_another_rate_after_resuming_parts_at_the_batch_after_its_first_update(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batch 4 is the first of the second epoch: the record tells its rate, batch 5 has other energies."""
    folder = train(train(tmp_path / "b", epochs=1), rate=2e-2)
    assert compare_runs.main([str(run), str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"] and found["batch"]["step"] == 5
    _, one, other = found["record_line"]
    assert (one["step"], one["kind"], one["learning_rate"], other["learning_rate"]) == (
        4,
        "batch",
        0.01,
        0.02,
    )
    lines = [record.read(f / record.FILE_NAME) for f in (run, folder)]
    energies = [
        next(e["energies"] for e in entries if e["kind"] == "batch" and e["step"] == 5) for entries in lines
    ]
    for name, pair in found["batch"]["energies"].items():
        assert pair == [energies[0][name], energies[1][name]] and pair[0] != pair[1]


def test_one_bit_of_one_weight_is_found_with_its_size(run: Path, copy: Path) -> None:
    tensors, metadata = pctt.checkpoint.read(copy / CHECKPOINT)
    weight = tensors["weights/dense1/weight"].view(-1)
    before = float(weight[7])
    weight[7] = torch.nextafter(weight[7], torch.tensor(math.inf))
    after = float(weight[7])
    pctt.checkpoint.write(copy / CHECKPOINT, tensors, metadata)
    found = compare_runs.compare(run, copy)
    assert found.record_line is None and found.batch is None and len(found.tensors) == 1
    only = found.tensors[0]
    assert (only.name, only.count, only.greatest) == ("weights/dense1/weight", 1, abs(after - before))


def test_zeros_of_other_sign_differ_and_equal_nans_do_not() -> None:
    zeros, nan = torch.zeros(2, 2), torch.full((3,), math.nan)
    assert compare_runs.compare_tensors({"a": zeros, "n": nan}, {"a": zeros.clone(), "n": nan.clone()}) == []
    assert [d.name for d in compare_runs.compare_tensors({"a": zeros}, {"a": -zeros})] == ["a"]


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, dtype=torch.float64), None])
def test_another_shape_or_format_or_a_missing_tensor_is_a_difference(other: torch.Tensor | None) -> None:
    mine = {"a": torch.zeros(2), "s": torch.zeros(())}
    theirs = {"s": torch.zeros(())} if other is None else {"a": other, "s": torch.zeros(())}
    (found,) = compare_runs.compare_tensors(mine, theirs)
    assert found.name == "a" and found.greatest is None


def test_a_record_that_ends_earlier_differs_at_its_end(run: Path, copy: Path) -> None:
    path = copy / record.FILE_NAME
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    found = compare_runs.compare(run, copy)
    assert found.record_line[0] == len(lines) and found.record_line[2] is None and found.batch is None
    assert any("energies are the same" in line for line in compare_runs.describe(found))


def edit(folder: Path, change: Any) -> None:
    path = folder / record.FILE_NAME
    records = record.read(path)
    change(records)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))


def test_a_null_energy_and_an_error_norm_are_told(run: Path, copy: Path) -> None:
    def change(records: list[dict[str, Any]]) -> None:
        batches = [entry for entry in records if entry["kind"] == "batch"]
        batches[1]["error_norms"]["dense1"] += 1.0
        batches[2]["energies"]["dense1"] = None

    edit(copy, change)
    found = compare_runs.compare(run, copy)
    assert found.batch.step == 3 and set(found.batch.energies) == {"dense1"}
    assert found.record_line[1]["step"] == 2
    assert any("and None" in line for line in compare_runs.describe(found))


@pytest.mark.parametrize("name", [CHECKPOINT, record.FILE_NAME])
@pytest.mark.parametrize("content", [None, b"nonsense\n{}\n"])
def test_damaged_and_missing_files_give_a_sentence_and_exit_code_2(
    run: Path, copy: Path, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    assert compare_runs.main([str(run), str(copy)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and name in output.err


def test_help_and_bad_usage(run: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_runs.main([str(run)])
    assert caught.value.code == 2
    done = subprocess.run(
        [sys.executable, TOOLS / "compare_runs.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "Exit code: 0 the same, 1 they differ, 2 one cannot be read." in done.stdout


# -- the line counter ------------------------------------------------------------------------------

PYTHON = '''"""A module.

Two paragraphs.
"""

import os  # code

# a comment
TEXT = """# no comment,
nor a docstring
"""
"""What TEXT is."""


def f():
    "One line."
    return (
        1,

        # within
    )
'''

C = """// one
/* two
   three */
int a; /* four */

int b;
"""


def test_lines_are_of_the_kind_that_a_reader_would_say() -> None:
    """By hand: code 1 + 3 + def, return (, 1, ) = 8; blank 1 + 1 + 2 + 1; docstrings 4 + 1 + 1."""
    assert count_lines.count_python(PYTHON) == {"code": 8, "comments": 2, "docstrings": 6, "blank": 5}
    assert count_lines.count_c(C) == {"comments": 3, "code": 2, "blank": 1}
    assert count_lines.count_text("# Head\n\nwords\n") == {"text": 2, "blank": 1}


def test_packages_are_summed_and_long_files_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {
        "a.py": PYTHON,
        "sub/b.py": "x = 1\n" * 30,
        "sub/c.md": "x\n",
        ".hidden/d.py": "(",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert count_lines.main([str(tmp_path), "--limit", "25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"][str(tmp_path / "sub")] == {"code": 30, "text": 1}
    assert found["files"] == {str(tmp_path): 1, str(tmp_path / "sub"): 2}
    assert found["long"] == {str(tmp_path / "sub" / "b.py"): 30}
    assert count_lines.main([str(tmp_path), "--limit", "25", "--check"]) == 1
    assert "| all | 3 | 38 | 2 | 6 | 1 | 5 |" in capsys.readouterr().out


def test_what_cannot_be_counted_gives_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert count_lines.main([str(tmp_path / "none")]) == 2
    (tmp_path / "a.py").write_text("(")
    assert count_lines.main([str(tmp_path)]) == 2
    assert "a.py is not Python" in capsys.readouterr().err
