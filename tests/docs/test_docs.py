"""The documentation does what it says: its Python and commands run, its names, links and tables are right.

A page that drifts from the code misleads everyone who trusts it, silently. So nothing here can be skipped: a
block that cannot run does not belong in the documentation.
"""

import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import re
import shlex
import struct
import textwrap
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import pctt
from pctt import Status, cli, config, presets, record
from pctt.bench import work as bench_work
from pctt.bench.peers import Answer, Contender, Round
from pctt.bench.workers.serve import arrays_of
from pctt.data.idx import FILE_NAMES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNS = ROOT / "docs" / "runs.md"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Those under a comment that says where they go (test_extending.py puts them there) have no language."""
    found: list[Block] = []
    opened: tuple[str, int] | None = None
    lines: list[str] = []
    above = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"\s*```(\w*)", line)
        if not fence:
            lines.append(line)
        elif opened is None:
            placed = above.strip().startswith("<!--") and page.parent.name == "extending"
            opened, lines = ("" if placed else fence[1], number + 1), []
        else:
            found.append(Block(opened[0], "\n".join(lines) + "\n", opened[1]))
            opened = None
        above = line
    assert opened is None, f"{page}: the block that begins on line {opened} is never closed"
    return found


def prose(page: Path) -> str:
    return re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def tables(page: Path, *head: str) -> Iterator[list[str]]:
    """The rows of every table of the page whose head is `head`, cell by cell, without backticks."""
    wanted = False
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            wanted = False
            continue
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if cells == list(head):
            wanted = True
        elif wanted and not set(line) <= set("|-: "):
            yield cells


# --- Python -------------------------------------------------------------------------------------------------


@each_page
def test_every_python_block_runs_and_prints_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a page share a namespace. A text block that comes next after a block that prints shows its
    output, in order; `...` stands for lines left out.
    """
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    shown = ""
    for block in blocks(page):
        if block.language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                # Blank lines put the block where it stands, so that a traceback names the page's own line.
                text = "\n" * (block.line - 1) + textwrap.dedent(block.text)
                exec(compile(text, str(page), "exec"), namespace)
            shown = output.getvalue()
        elif shown and block.language == "text":
            printed = iter(shown.splitlines())
            for line in block.text.splitlines():
                assert line == "..." or line in printed, (
                    f"{page.name} shows a line that is not printed: {line}"
                )
            shown = ""


def test_the_pages_that_promise_running_python_have_some() -> None:
    """Without it a slip in the fences would let every block go unseen."""
    counts = {page.name: sum(block.language == "python" for block in blocks(page)) for page in PAGES}
    assert {name for name, count in counts.items() if count} >= {
        "README.md",
        "architecture.md",
        "concepts.md",
        "mathematics.md",
    }
    assert counts["mathematics.md"] >= 6


# --- commands -----------------------------------------------------------------------------------------------


def shell_lines(page: Path) -> list[str]:
    """The lines of the page's shell blocks; of a loop its first turn."""
    lines: list[str] = []
    for block in blocks(page):
        first: dict[str, str] = {}
        for line in block.text.splitlines() if block.language == "sh" else ():
            loop = re.match(r"for (\w+) in (\S+)", line)
            if loop:
                first[f"${loop[1]}"] = loop[2]
            for variable, value in first.items():
                line = line.replace(variable, value)
            lines.append(line.strip())
    return lines


def commands(page: Path) -> list[str]:
    """The `pctt ...` lines among them."""
    return [line for line in shell_lines(page) if line.startswith("pctt ")]


def write_mnist(folder: Path) -> None:
    """Four IDX files of random pixels: a command on MNIST runs in a moment and without the real files."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for name, count in zip(FILE_NAMES, (40, 40, 20, 20), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        values = generator.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run commands in, with what the pages assume: `small.toml`, DIR, short presets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PCTT_DATA", raising=False)
    write_mnist(tmp_path / "DIR")
    (tmp_path / "small.toml").write_text(toml_example(), encoding="utf-8")
    for name, preset in presets.PRESETS.items():
        monkeypatch.setitem(presets.PRESETS, name, shortened(preset()))
    monkeypatch.setattr("pctt.bench.measuring.Worker", NoWorker)
    return tmp_path


class NoWorker:
    """A contender of `pctt bench` that does nothing, fast; `test_bench.py` runs real ones."""

    runtime: ClassVar[dict[str, str]] = {}

    def __init__(self, contender: Contender, *_: float) -> None:
        self.contender = contender

    def start(self) -> None:
        pass

    def prepare(self, _: str, work: dict[str, Any]) -> Answer:
        engine = None if self.contender.adapter == "torch" else trained(work)
        if engine is None:
            return Answer(0.1, None, None, {})
        activities = [engine.read_activity(name) for name in engine.net.nodes[1:-1]]
        weights = [list(layer.values()) for layer in engine.weights().values()]
        return Answer(0.1, activities, weights, {"bytes": 1, "num_steps": engine.program.num_steps})

    def run(self, *_: object) -> Round:
        return Round([1.0], 1.0, 1)

    def close(self) -> None:
        pass

    def __enter__(self) -> "NoWorker":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def trained(work: dict[str, Any]) -> pctt.Engine:
    """The engine of a work of `pctt bench` after one training batch."""
    given = arrays_of(work)
    layers = [tuple(map(torch.from_numpy, layer)) for layer in given["weights"]]
    problem = bench_work.Problem(layers, *(torch.from_numpy(given[key]) for key in ("inputs", "targets")))
    settings = bench_work.Settings(num_steps=given["num_steps"], rate=given["rate"])
    inference = bench_work.inference(given["algorithm"], settings)
    engine = bench_work.engine(problem, tuple(given["widths"]), inference)
    bench_work.train(engine, problem, given["learning_rate"], 1)
    return engine


def shortened(preset: config.RunConfig) -> Callable[[], config.RunConfig]:
    return lambda: replace(preset, training=replace(preset.training, epochs=2))


@each_page
def test_every_command_shown_runs(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, since a run is resumed and evaluated after it was begun."""
    for line in shell_lines(page):
        for name, value in re.findall(r"(PCTT_\w+)=(\S+)", line):
            monkeypatch.setenv(name, value)
    for command in commands(page):
        assert cli.main(shlex.split(command, comments=True)[1:]) == 0, command
    trains = any(command.startswith("pctt train") for command in commands(page))
    assert not trains or list(place.glob("runs/*/checkpoint.safetensors"))


@each_page
def test_every_command_and_option_named_in_the_text_exists(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    help_texts = ""
    for name in ("train", "eval", "generate", "recall", "plan", "profile", "bench", "dashboard", "doctor"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
        help_texts += capsys.readouterr().out
    known = set(re.findall(r"--[a-z-]+", help_texts))
    for code in inline_code(page):
        if re.match(r"(pctt |--)", code):
            assert set(re.findall(r"--[a-z-]+", code)) <= known, code
    asked: list[object] = []
    commands = ("train", "evaluate", "generate", "recall", "plan", "profile", "bench", "dashboard", "doctor")
    for name in commands:
        monkeypatch.setattr(cli, name, only_parsed(getattr(cli, name), asked))
    lines = [code for code in inline_code(page) if code.startswith("pctt ")]
    for line in lines:
        words = shlex.split(line)[1:]
        bare = len(words) == 1 and words[0] not in ("doctor", "bench")  # named without its argument
        whole = [*words, "X"] if bare else words
        assert cli.main(whole) == 0, line
    assert len(asked) == len(lines)


def only_parsed(command: Any, asked: list[object]) -> Any:
    """A command of the same signature that notes that it was called and does nothing."""

    def run(*arguments: object, **options: object) -> int:
        asked.append((arguments, options))
        return 0

    run.__wrapped__ = command  # the signature that the parser reads
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def test_the_readme_shows_training_resuming_evaluating_and_the_doctor() -> None:
    shown = " ".join(commands(ROOT / "README.md"))
    for needed in ("pctt train mnist --data-dir", "--resume", "--set", "pctt eval", "pctt doctor"):
        assert needed in shown


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_make_target_named_is_in_the_makefile(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    code = [
        *inline_code(page),
        *(line for b in blocks(page) if b.language in ("", "sh") for line in b.text.splitlines()),
    ]
    for line in code:
        named = re.match(r"make (\w+)", line.strip())
        assert not named or named[1] in targets, line


# --- links and names ----------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}, which is not there"
        if fragment:
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert fragment in map(slug, headings), f"{page.name} links to {target}; there is no such heading"


@each_page
def test_every_module_path_and_name_in_backticks_exists(page: Path) -> None:
    """`pctt/network.py` is a file of the repository, or one that the page tells to make; `pctt.infer` an
    object that can be reached.
    """
    made = re.findall(r"<!-- new: (\S+) -->", page.read_text(encoding="utf-8"))
    for code in inline_code(page):
        if re.fullmatch(r"(pctt|tests|tools|docs|kernels)/[\w./]*", code):
            assert (ROOT / code).exists() or code in made, f"{page.name} names {code}"
        name = re.match(r"pctt(\.\w+)+", code)
        if name:
            first, *rest = name[0].split(".")[1:]
            package = importlib.import_module("pctt")
            thing = getattr(package, first, None) or importlib.import_module(f"pctt.{first}")
            for part in rest:
                thing = getattr(thing, part)


def test_figures_are_whole_and_small() -> None:
    figures = ROOT / "docs" / "figures"
    assert ElementTree.parse(figures / "chain.svg").getroot().tag.endswith("svg")
    picture = figures / "digits-curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


# --- the tables of runs.md ----------------------------------------------------------------------------------


def toml_example() -> str:
    """The complete one; others on the page show parts."""
    return next(block.text for block in blocks(RUNS) if block.language == "toml")


def test_the_toml_example_is_read_and_uses_every_section(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(toml_example(), encoding="utf-8")
    read = config.read_toml(tmp_path / "small.toml")
    assert len(read.layers) == 3 and read.layers[1].name == "middle"
    # A precision is only for a card, and the example is for any machine; scaling is a word, no section.
    sections = {f.name for f in dataclasses.fields(read)} - {"precision", "scaling", "backward"}
    sections -= {"inputs", "clamp"}  # of graphs
    assert sections == set(config._toml().loads(toml_example()))


@each_page
def test_every_toml_block_is_a_configuration_of_a_network(page: Path) -> None:
    for block in blocks(page):
        if block.language == "toml":
            read = config.from_dict(config.RunConfig, config._toml().loads(block.text))
            assert read.network((1, 8, 8)).num_weights() > 0, f"{page.name}, line {block.line}"


TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(choice) for choice in get_args(hint) if choice is not types.NoneType)
    if get_origin(hint) is dict:
        return "table"
    if get_origin(hint) is tuple:
        inner = type_name(get_args(hint)[0])
        return f"list of {inner.replace('list', 'lists') if inner.startswith('list') else inner + 's'}"
    return TYPES[hint]


def keys(cls: type, prefix: str = "", kind: str = "") -> Iterator[tuple[str, str, str, Any]]:
    """(key, kind, type, default) of every scalar that a configuration of this class can hold."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        tables = [choice for choice in get_args(hint) if dataclasses.is_dataclass(choice)]
        name = prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{name}.", kind)
        elif get_origin(hint) is tuple and (tables or config.Dense in get_args(get_args(hint)[0])):
            # of layers the dense ones; blocks and maps have a section of their own
            yield from keys(config.Dense if not tables else tables[0], f"{name}[].", kind)
        elif len(tables) == 1:  # a table that may be left out
            yield from keys(tables[0], f"{name}.", kind)
        elif tables:
            yield f"{name}.kind", kind, "text", config.NAMES[type(default)]
            for choice in tables:
                yield from keys(choice, f"{name}.", config.NAMES[choice])
        else:
            yield name, kind, type_name(hint), default


def test_the_table_of_keys_is_that_of_the_dataclasses() -> None:
    """Key, kind, type and default of RunConfig and all that it holds, no more and no less."""
    documented: dict[tuple[str, str], tuple[str, Any]] = {}
    for key, kinds, kind_of_value, default, meaning in tables(
        RUNS, "Key", "Kind", "Type", "Default", "Meaning"
    ):
        special = {"required": dataclasses.MISSING, "none": None}
        value = special[default] if default in special else config.parse_value(default)
        assert meaning
        for kind in kinds.split(", "):
            assert (key, kind) not in documented, f"{key} stands there twice"
            documented[key, kind] = (kind_of_value, value)
    actual = {
        (key, kind): (type_of_value, list(default) if isinstance(default, tuple) else default)
        for key, kind, type_of_value, default in keys(config.RunConfig)
    }
    assert documented == actual


def documented_fields(*head: str) -> dict[tuple[str, ...], set[str]]:
    fields: dict[tuple[str, ...], set[str]] = {}
    field = head.index("Field")
    for row in tables(RUNS, *head):
        fields.setdefault(tuple(row[:field]), set()).add(row[field])
    return fields


def test_the_tables_of_records_and_of_json_lines_are_what_a_run_writes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = documented_fields("Kind", "Field", "Value", "Meaning")
    assert cli.main(["train", "digits", "--epochs", "1", "--out", "run", "--json"]) == 0
    written: dict[tuple[str, ...], set[str]] = {}
    for line in record.read(place / "run" / "metrics.jsonl"):
        written.setdefault((line["kind"],), set()).update(set(line) - {"kind"})
    assert written == records

    printed = {("pctt train", kind): fields for kind, fields in json_lines(capsys).items()}
    for kind in ("epoch", "result"):
        assert printed.pop(("pctt train", kind)) == records[(kind,)]
    diverging = ["train", "digits", "--out", "bad", "--json", "--set", "inference.rate=3"]
    assert cli.main(diverging) == 1
    printed |= {("pctt train", kind): fields for kind, fields in json_lines(capsys).items()}
    assert cli.main(["eval", "run", "--json"]) == 0
    printed |= {("pctt eval", kind): fields for kind, fields in json_lines(capsys).items()}
    generative = ["train", "digits_generative", "--epochs", "1", "--out", "generative", "--json"]
    assert cli.main(generative) == 0
    capsys.readouterr()
    for command in ("generate", "recall"):
        assert cli.main([command, "generative", "--count", "2", "--steps", "3", "--json"]) == 0
        printed |= {(f"pctt {command}", kind): fields for kind, fields in json_lines(capsys).items()}
    assert cli.main(["dashboard", "run", "--json"]) == 0
    printed |= {("pctt dashboard", kind): fields for kind, fields in json_lines(capsys).items()}
    assert cli.main(["doctor", "--json"]) == 0
    printed |= {("pctt doctor", kind): fields for kind, fields in json_lines(capsys).items()}
    assert printed == documented_fields("Command", "Kind", "Field", "Meaning")


def json_lines(capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["kind"]: set(line) - {"kind"} for line in lines}


def test_the_run_folder_holds_what_the_page_lists(place: Path) -> None:
    assert cli.main(["train", "digits", "--epochs", "1", "--out", "run", "--tensorboard"]) == 0
    assert cli.main(["dashboard", "run"]) == 0
    listed = {row[0].strip("/") for row in tables(RUNS, "File", "Holds")}
    assert {path.name for path in (place / "run").iterdir()} == listed


def test_the_tables_of_statuses_and_exit_codes_are_those_of_the_code() -> None:
    statuses = {row[0]: row[1] == "yes" for row in tables(RUNS, "Status", "ok", "When")}
    assert statuses == {status.name: status.ok for status in Status}
    codes = [int(row[0]) for row in tables(RUNS, "Exit code", "When")]
    assert codes == [cli.OK, cli.FAILED, cli.USAGE]


def test_resuming_is_refused_for_another_setting_and_allowed_for_more_epochs(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What "Resume" promises: exit code 2 that names the setting, and a record with one result at its end."""
    run = ["train", "digits", "--out", "run"]
    assert cli.main([*run, "--epochs", "1"]) == 0
    assert cli.main([*run, "--epochs", "2", "--resume", "--seed", "1"]) == 2
    assert "training.seed" in capsys.readouterr().err
    assert cli.main([*run, "--epochs", "2", "--resume"]) == 0
    kinds = [line["kind"] for line in record.read(place / "run" / "metrics.jsonl")]
    assert kinds.count("result") == 1 and kinds[-1] == "result" and kinds.count("epoch") == 2
