"""The page about runs: whole HTML, self-contained, with the numbers of the record and nothing that a file
could smuggle in.
"""

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pctt
from pctt import record
from pctt.dashboard import page
from pctt.dashboard.axes import axis, label
from pctt.dashboard.chart import SMALL, WIDE, Chart, Series
from pctt.dashboard.command import dashboard
from pctt.dashboard.folder import read
from pctt.dashboard.markup import VOID, element, number
from pctt.dashboard.parts import accuracy
from pctt.dashboard.style import colour, sheet
from pctt.dashboard.thin import running_mean, spread, thin

HOSTILE = '"><script>alert(1)</script><img src="http://evil.example/x" onerror=\'a\'>&lt;\x00\ud800'


class Checker(HTMLParser):
    """Reads a page as a browser would and notes what is in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data: list[float] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute of {tag} stands twice"
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.data.append(float(dict(attrs)["value"] or "nan"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def checked(*folders: Path) -> Checker:
    return Checker(page(folders))


def log_run(
    folder: Path, num_batches: int = 6, layers: tuple[str, ...] = ("dense1", "dense2"), ends: bool = True
) -> Path:
    with record.Recorder(folder) as recorder:
        recorder.log("backend", step=1, backend="reference", device="cpu", precision=None)
        for epoch in (1, 2):
            for batch in range(num_batches // 2):
                step = (epoch - 1) * (num_batches // 2) + batch + 1
                if batch == 0:
                    energy = [[0.1 * (row + 1) / step for _ in layers] for row in range(4)]
                    recorder.log("trajectory", step=step, layers=list(layers), energy=energy)
                values = {name: (index + 1.5) / step for index, name in enumerate(layers)}
                recorder.log(
                    "batch",
                    step=step,
                    epoch=epoch,
                    energies=values,
                    error_norms={name: math.sqrt(value) for name, value in values.items()},
                    inference_steps=3,
                    learning_rate=0.001 / step,
                )
            fields = {"train_energy": 0.125 / epoch, "validation_accuracy": 0.75 + epoch / 16}
            recorder.log("epoch", epoch=epoch, step=step, seconds=0.375 * epoch, **fields)
        if ends:
            recorder.log("result", test_accuracy=0.84375, test_samples=32, epochs=2, step=num_batches)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return log_run(tmp_path / "run")


# -- the page --------------------------------------------------------------------------------------


def test_every_tag_is_closed_and_nothing_is_referred_to_outside(folder: Path) -> None:
    text = page([folder])
    found = Checker(text)
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "://" not in text and "@import" not in text and "url(" not in text


def test_numbers_are_those_of_the_record(folder: Path) -> None:
    found = checked(folder)
    records = record.read(folder / record.FILE_NAME)
    result, last = records[-1], [entry for entry in records if entry["kind"] == "batch"][-1]
    expected = [result["test_accuracy"], result["test_samples"], *last["energies"].values()]
    expected += last["error_norms"].values()
    for entry in records:
        if entry["kind"] == "epoch":
            expected += [entry["train_energy"], entry["validation_accuracy"], entry["seconds"]]
            expected.append(1e3 * entry["seconds"] / 3)
    assert set(expected) <= set(found.data)
    assert "84.38%" in found.text


def test_curves_pass_through_the_recorded_values(folder: Path) -> None:
    """Read back from the path by the axis, to a tenth of a unit of the drawing."""
    run = read(folder)
    values = run.per_layer["energies"]["dense2"]
    chart = Chart("Energy", "batch", "energy", [Series("dense2", run.steps, values, "k0")], log=True)
    axes = chart.axes()
    assert axes is not None
    path = next(a["d"] for a in Checker(str(chart.svg())).named("path") if a["class"] == "line")
    points = np.array([[float(n) for n in point.split()] for point in re.split("[ML]", path or "")[1:]])
    across, upward = axes
    np.testing.assert_allclose(points[:, 0], across.at(run.steps), atol=0.051)
    shares = (points[:, 1] - upward.start) / (upward.end - upward.start)
    read_back = upward.low * (upward.high / upward.low) ** shares
    np.testing.assert_allclose(read_back, [2.5 / step for step in range(1, 7)], rtol=2e-3)


def test_accuracies_are_drawn_in_percent(folder: Path) -> None:
    validation, test = (series.y.tolist() for series in accuracy([read(folder)]).series[1:])
    assert validation == [81.25, 87.5] and test == [84.375]


def test_charts_are_said_in_words_and_what_moves_is_reached_by_keyboard(folder: Path) -> None:
    found = checked(folder)
    charts = found.named("svg")
    assert charts and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert any("dense1 1.5 to 0.25" in str(chart["aria-label"]) for chart in charts)
    assert all(box["tabindex"] == "0" for box in found.named("div") if box.get("class") == "scroll")
    assert found.named("html")[0]["lang"] == "en"


def test_without_the_script_all_trajectories_are_there(folder: Path) -> None:
    found = checked(folder)
    assert [f["data-name"] for f in found.named("figure") if f.get("data-name")] == ["Batch 1", "Batch 4"]
    assert not [tag for tag, attributes in found.tags if "hidden" in attributes]


def test_dark_and_light_and_paper_have_their_rules(folder: Path) -> None:
    text = page([folder])
    assert "@media screen and (prefers-color-scheme:dark)" in text and "@media print" in text


def test_the_policy_allows_the_script_of_the_page_and_no_other(folder: Path) -> None:
    found = checked(folder)
    policy = next(m["content"] for m in found.named("meta") if m.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert len(found.named("script")) == 1


def test_a_real_run_is_shown_with_its_configuration(tmp_path: Path) -> None:
    net = pctt.chain(4, [pctt.Dense(5, "tanh"), pctt.Dense(3)])
    trainer = pctt.Trainer(net, pctt.Inference(3, 0.1), batch_size=8)
    inputs, labels = np.random.rand(16, 4).astype("float32"), np.arange(16) % 3
    with record.Recorder(tmp_path) as recorder:
        recorder.log("backend", step=1, **trainer.place())
        trainer.fit((inputs, labels), 1, callbacks=[recorder.log_record], save_to=tmp_path)
    found = checked(tmp_path)
    assert net.num_weights() in found.data
    assert "network.layers[0].activation" in found.text
    assert "There is no result" in found.text


def test_a_run_on_a_card_shows_its_cores_and_memory(tmp_path: Path) -> None:
    net = pctt.chain(32, [pctt.Dense(64, "tanh", name="<b>first"), pctt.Dense(10)])
    trainer = pctt.Trainer(net, pctt.Inference(2, 0.1), backend="emulated", batch_size=8)
    trainer.save(tmp_path)
    log_run(tmp_path)
    path = tmp_path / record.FILE_NAME
    place = json.dumps({"kind": "backend", "step": 1, **trainer.place()})
    path.write_text("\n".join([place, *path.read_text().splitlines()[1:]]) + "\n")
    found = checked(tmp_path)
    assert len(found.named("rect")) == 64 and len(found.named("meter")) == 3
    assert "dense2 64->10" in found.text and "<b>first" in found.text
    (tmp_path / "checkpoint.safetensors").unlink()
    assert "placement on the card cannot be shown" in checked(tmp_path).text


def test_unknown_fields_of_a_batch_are_drawn_too(tmp_path: Path) -> None:
    """Weight updates, say, wherever a later version records them."""
    with record.Recorder(tmp_path) as recorder:
        for step in (1, 2):
            recorder.log(
                "batch", step=step, energies={"a": 1.0}, weight_updates={"a": 0.03 * step}, beta=step
            )
    found = checked(tmp_path)
    assert "Weight updates" in found.text and "Beta" in found.text and 0.06 in found.data


# -- several runs ----------------------------------------------------------------------------------


def test_several_runs_are_compared_and_differences_listed(tmp_path: Path) -> None:
    folders = [log_run(tmp_path / name / "run") for name in ("a", "b")]
    for rate, folder in zip((0.1, 0.2), folders, strict=True):
        config = {"inference": {"rate": rate, "num_steps": 5}, "data": {"name": "digits"}}
        (folder / "config.json").write_text(json.dumps(config))
    found = checked(*folders)
    cells = found.text
    assert cells.count("inference.rate") == 3 and cells.count("inference.num_steps") == 2
    assert [a["href"] for a in found.named("a")] == ["#run-1", "#run-2"]
    assert {s["id"] for s in found.named("section") if s.get("id")} == {"run-1", "run-2"}
    assert str(folders[0]) in cells and str(folders[1]) in cells  # told apart, though both are called run
    assert checked(folders[0], folders[0]).text.count("configurations are equal") == 1


# -- what is odd -----------------------------------------------------------------------------------


def test_a_half_written_last_line_is_left_out_and_said(folder: Path) -> None:
    path = folder / record.FILE_NAME
    path.write_bytes(path.read_bytes()[:-9])
    found = checked(folder)
    assert "only half there" in found.text and "There is no result" in found.text


def test_a_record_without_lines_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / record.FILE_NAME).touch()
    assert "Nothing is recorded yet" in checked(tmp_path).text


def test_failure_move_resumption_gaps_and_nulls_are_warned_of(tmp_path: Path) -> None:
    log_run(tmp_path, ends=False)
    (tmp_path / "config.json").write_text('{"training": {"epochs": 1}}')
    with record.Recorder(tmp_path) as recorder:
        recorder.log("backend", step=7, backend="emulated", device="n150", precision=None)
        recorder.log("halved", step=7, status="DIVERGED", inference_rate=0.05)
        recorder.log("skipped", step=7, epoch=3, status="NON_FINITE")
        recorder.log("batch", step=9, epoch=3, energies={"dense1": math.nan, "dense2": 1.0})
        recorder.log("failed", step=10, status="DIVERGED", message="lower inference.rate.")
    warnings = "\n".join(read(tmp_path).warnings)
    for words in (
        "failed (DIVERGED): lower inference.rate.",
        "resumed elsewhere: from batch 7 on emulated (n150), before on reference (cpu)",
        "begun for 1 epochs and has done 2",
        "1 energies in the record are missing",
        "skipped: 1, first 7 (NON_FINITE)",
        "halved 1 times, last at batch 7, to 0.05",
        "in 1 places",
    ):
        assert words in warnings
    assert "failed: diverged" in checked(tmp_path).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no run \(metrics.jsonl is missing\)"),
        (b'{"kind": "batch"}\nnonsense\n{}\n', "line 2 is not JSON"),
        (b"[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_a_folder_without_a_readable_run_gives_one_sentence(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / record.FILE_NAME).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        page([tmp_path])
    assert "\n" not in str(caught.value)


def test_no_folder_gives_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        page([tmp_path / "none"])
    with pytest.raises(ValueError, match="at least one run folder"):
        page([])


@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 10**6])
def test_other_damaged_files_are_warned_of(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert any(name.split(".")[0] in sentence.lower() for sentence in read(folder).warnings)
    checked(folder)


def test_hostile_files_cannot_inject_html(tmp_path: Path) -> None:
    """Every text a file holds, keys and names of layers too, comes out as text."""
    clean, folder = log_run(tmp_path / "clean"), log_run(tmp_path / "run", layers=(HOSTILE, "dense2"))
    with record.Recorder(folder) as recorder:
        recorder.log("backend", step=7, backend=HOSTILE, device=HOSTILE, precision={HOSTILE: HOSTILE})
        recorder.log("batch", step=7, energies={HOSTILE: 1.0}, **{HOSTILE: {HOSTILE: 1.0}})
        recorder.log("trajectory", step=HOSTILE, layers=[HOSTILE, 7], energy=[[1.0], [2.0, 3.0]])
        recorder.log("failed", status=HOSTILE, message=HOSTILE)
    config = {HOSTILE: HOSTILE, "layers": [{"units": HOSTILE}], "training": {"epochs": HOSTILE}}
    config |= {"data": {"name": HOSTILE}, "inference": {"num_steps": HOSTILE, "rate": HOSTILE}}
    (folder / "config.json").write_text(json.dumps(config))
    for folders in ([folder], [clean, folder]):
        text = page(folders)
        text.encode()
        found = Checker(text)
        assert not found.named("img") and len(found.named("script")) == 1
        assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
        assert "<img" not in text and "\x00" not in text and "alert(1)" in found.text


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "batch"},
        {"kind": "batch", "step": "x", "energies": [1], "error_norms": 3},
        {"kind": "batch", "step": 10**400, "epoch": True, "energies": {"a": "x", "b": None, "c": 10**400}},
        {
            "kind": "batch",
            "step": 1,
            "energies": {"a": 1e308, "b": 5e-324, "c": -1.0},
            "learning_rate": -1e308,
        },
        {"kind": "trajectory", "layers": "abc", "energy": [[1]]},
        {"kind": "trajectory", "layers": [None], "energy": []},
        {"kind": "trajectory", "layers": ["a"], "energy": [[], ["x"], [1]]},
        {"kind": "trajectory", "layers": ["a"], "energy": [1]},
        {"kind": "epoch", "epoch": None, "seconds": "long"},
        {"kind": "epoch", "epoch": 1, "validation_accuracy": 1e308},
        {"kind": "result", "test_accuracy": None},
        {"kind": ["unheard", "of"]},
        {},
    ],
)
def test_odd_records_are_passed_over(tmp_path: Path, entry: dict[str, Any]) -> None:
    line = json.dumps(entry) + "\n"
    (tmp_path / record.FILE_NAME).write_text(2 * line)
    assert not re.search(r"\b(nan|inf)\b", "".join(str(a.get("d")) for a in checked(tmp_path).named("path")))
    log_run(tmp_path)
    checked(tmp_path)


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_batches", "num_layers", "num_runs"), [(20_000, 4, 1), (600, 150, 1), (300, 9, 8)]
)
def test_a_long_record_gives_a_page_below_two_megabytes(
    tmp_path: Path, num_batches: int, num_layers: int, num_runs: int
) -> None:
    layers = tuple(f"layer{index}" for index in range(num_layers))
    folders = [log_run(tmp_path / f"run{index}", num_batches, layers) for index in range(num_runs)]
    assert len(page(folders).encode()) < 2_000_000


@given(st.lists(st.floats(-9, 9) | st.just(math.nan), max_size=300), st.integers(16, 64))
def test_thinning_keeps_extremes_and_ends_and_order(numbers: list[float], most: int) -> None:
    values = np.array(numbers, dtype=float)
    kept = [index for piece in thin(values, most) for index in piece]
    known = np.flatnonzero(~np.isnan(values))
    assert kept == sorted(set(kept)) and len(kept) <= most and set(kept) <= set(known)
    if len(known):
        assert {known[0], known[-1]} <= set(kept)
        assert values[kept].min() == values[known].min() and values[kept].max() == values[known].max()
    if len(values) <= most:
        assert kept == list(known)


def test_single_outliers_of_a_long_record_are_kept() -> None:
    values = np.sin(np.arange(100_000.0))
    values[[12_345, 67_890]] = 50.0, -50.0
    kept = [index for piece in thin(values, 1000) for index in piece]
    assert {12_345, 67_890} <= set(kept) and len(kept) <= 1000


def test_a_gap_breaks_the_line() -> None:
    assert thin(np.array([1.0, 2.0, math.nan, 3.0]), 16) == [[0, 1], [3]]


def test_the_mean_passes_over_gaps() -> None:
    np.testing.assert_allclose(running_mean(np.array([1.0, math.nan, 3.0]), 3), [1.0, math.nan, 3.0])
    np.testing.assert_allclose(running_mean(np.array([0.0, 3.0, 6.0, 9.0]), 3), [1.5, 3.0, 6.0, 7.5])


def test_spread_takes_both_ends() -> None:
    assert spread(3, 5) == [0, 1, 2] and spread(100, 3) == [0, 50, 99] and spread(0, 3) == []


# -- geometry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [WIDE, SMALL])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("least", "greatest"),
    [(1e-13, 1.0), (0.4, 0.5), (1.0, 1.0), (0.9, 11.0), (1e-5, 3e6), (0.00101, 0.00102)],
)
@pytest.mark.parametrize("last", [1, 2, 82, 10**6])
def test_marks_lie_within_the_drawing_and_apart(
    size: tuple[int, int], log: bool, least: float, greatest: float, last: int
) -> None:
    series = Series("a", np.array([1.0, last]), np.array([least, greatest]), "k0")
    svg = str(Chart("t", "batch", "energy per sample", [series], log=log, size=size).svg())
    marks = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="(\w+)">([^<]*)<', svg)
    assert {kind for _, _, kind, _ in marks} == {"end", "mid"}
    letter = 7.6  # widest digit at 13 px, generously
    boxes: list[tuple[float, float, float]] = []
    for x, y, kind, text in marks:
        left = float(x) - letter * len(text) * (1.0 if kind == "end" else 0.5)
        assert 24 <= left and left + letter * len(text) <= size[0] and 10 <= float(y) <= size[1] - 4
        boxes.append((left, left + letter * len(text), float(y)))
    for index, (left, right, y) in enumerate(boxes):
        for left2, right2, y2 in boxes[:index]:
            assert right <= left2 or right2 <= left or abs(y - y2) >= 13


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_ticks_are_few_and_between_the_ends(a: float, b: float) -> None:
    found = axis([np.array([a, b])], 0.0, 100.0)
    assert found is not None
    ticks = found.ticks(6)
    places = found.at(np.array(ticks))
    assert len(ticks) <= 8 and np.isfinite(places).all()
    assert np.all((places > -0.5) & (places < 100.5))


def test_marks_are_short() -> None:
    assert [label(v) for v in (0.0, 1000.0, 0.025, 0.00025, 2e9)] == ["0", "1,000", "0.025", "2.5e-4", "2e9"]
    assert label(1e-13, powers=True) == "10⁻¹³"


def test_each_curve_has_a_colour_in_both_themes() -> None:
    for count in (1, 7, 8, 64):
        for index in range(count):
            assert sheet([count]).count(f".{colour(index, count)}{{--ink:#") == 2


def test_markup_escapes_text_and_attributes() -> None:
    assert element("p", "<&>", element("b", "x"), title='"') == '<p title="&quot;">&lt;&amp;&gt;<b>x</b></p>'
    assert number(0.1 + 0.2) == '<data value="0.30000000000000004">0.3</data>' and number(math.nan) == "–"


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_beside_the_run_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dashboard(folder, json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "dashboard" and said["out"] == str(folder / "dashboard.html")
    assert (folder / "dashboard.html").read_text(encoding="utf-8") == page([folder])
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "dashboard.html"}


def test_the_command_takes_several_runs_and_another_name(folder: Path, tmp_path: Path) -> None:
    assert dashboard(folder, (folder,), out=tmp_path / "new" / "all.html") == 0
    Checker((tmp_path / "new" / "all.html").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=r"must end in \.html"):
        dashboard(folder, out=tmp_path / "page.pdf")


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "dashboard.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        dashboard(folder)
    assert (folder / "dashboard.html").read_text() == "old"
    assert len(list(folder.iterdir())) == 2
