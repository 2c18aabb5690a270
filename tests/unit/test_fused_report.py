"""`pctt plan --fused` says where layers lie in the fused kernel, with the bytes that the backend asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pctt import SGD, Dense, Engine, Inference, chain, init
from pctt.backends.fused_plan import FusedPlan
from pctt.cli import main
from pctt.placement.fused_cost import fused_placement
from pctt.placement.fused_report import FusedReport

NET = chain(100, [Dense(160, "tanh"), Dense(64, "tanh"), Dense(10)])
INFERENCE = Inference(4, 0.1)


@pytest.fixture(scope="module")
def report() -> FusedReport:
    placement = fused_placement(NET, "n150", 2, 32, INFERENCE, SGD(0.1))
    return FusedReport(NET, placement, placement.cost(), 32, 4)


def test_each_core_of_the_network_is_drawn_once(report: FusedReport) -> None:
    plan = report.floor_plan()
    assert len(plan.cores) == report.placement.cores.total
    assert [use.label for use in plan.cores].count("dense1") == report.placement.cores.slices[1]


def test_the_fullest_core_holds_what_the_backend_asks_for(report: FusedReport) -> None:
    engine = Engine(
        NET,
        init(NET),
        INFERENCE,
        ("input", NET.output),
        learning=SGD(0.1),
        backend="emulated",
        fused=True,
        cores_per_layer=2,
    )
    assert isinstance(engine.backend, FusedPlan)
    fullest = max(use.total_bytes for use in report.floor_plan().cores)
    assert fullest == engine.backend.bytes_per_core() == report.to_dict()["l1_bytes"]


def test_the_text_is_ascii_and_fits_a_terminal(report: FusedReport) -> None:
    text = report.as_text()
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 110
    for name in NET.names:
        assert f"{name} " in text


def test_the_command_prints_it_as_text_and_as_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    short = ["--set", "inference.num_steps=2"]
    assert main(["plan", "digits", "--fused", *short]) == 0
    assert "fused on n150" in capsys.readouterr().out
    assert main(["plan", "digits", "--fused", "--json", *short]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fused"] and found["l1_bytes"] <= found["l1_available"]
    assert found["seconds"]["training step"] > 2 * found["seconds"]["inference step"]


def test_a_network_that_does_not_fit_is_a_failure_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    wide = 'layers=[{units=4096, activation="tanh"}, {units=4096, activation="tanh"}]'
    assert main(["plan", "digits", "--fused", "--set", wide]) != 0
    assert "cores" in capsys.readouterr().err
