"""The reference of the API: every public name has a docstring of its own, and a place in the site."""

import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

import pctt
from pctt import config

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "docs" / "_site"
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
MODULES = (
    *(
        "data",
        "feed",
        "theory",
        "backprop",
        "placement",
        "placement.plan",
        "placement.chips",
        "placement.draw",
    ),
    *("placement.cost", "placement.fused_cost", "placement.fused_report", "parallel", "profile", "dashboard"),
    *("record", "checkpoint", "plots", "config", "presets", "variants", "backends", "backends.precision"),
)
each_module = pytest.mark.parametrize("name", ["pctt", *(f"pctt.{name}" for name in MODULES)])


def public(name: str) -> Iterator[tuple[str, Any]]:
    """Classes and functions that a module exports: those in `__all__`, else those it defines."""
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    for key in list(vars(module)) if exported is None else exported:  # `pctt` loads its names when asked
        thing = getattr(module, key)
        own = not key.startswith("_") and getattr(thing, "__module__", "") == name
        if (own or exported is not None) and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield key, thing


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, inherited ones of pctt too, as (name, function)."""
    for key in dir(cls):
        owner = next((base for base in cls.__mro__ if key in vars(base)), object)
        if key.startswith("_") or not owner.__module__.startswith("pctt"):
            continue
        found = vars(owner)[key]
        if isinstance(found, property):
            found = found.fget
        elif isinstance(found, (cached_property, staticmethod, classmethod)):
            found = getattr(found, "func", None) or getattr(found, "__func__", None)
        if inspect.isfunction(found):
            yield key, found


def said(thing: Any) -> str:
    """The docstring that somebody wrote: neither inherited nor what `dataclass` makes up."""
    text = thing.__doc__ or ""
    written_by_itself = dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
    inherited = inspect.isclass(thing) and any(text == base.__doc__ for base in thing.__mro__[1:])
    return "" if written_by_itself or inherited else text


@each_module
def test_every_public_thing_has_a_docstring(name: str) -> None:
    silent = [] if importlib.import_module(name).__doc__ else [name]
    for key, thing in public(name):
        silent += [] if said(thing) else [key]
        for method, function in members(thing) if inspect.isclass(thing) else ():
            docs = (getattr(vars(base).get(method), "__doc__", None) for base in thing.__mro__)
            silent += [] if function.__doc__ or any(docs) else [f"{key}.{method}"]
    assert not silent, f"without a docstring: {', '.join(silent)}"


def test_every_argument_of_what_pctt_exports_is_named_in_its_docstring() -> None:
    """An argument that the reference does not explain has to be guessed."""
    unnamed: list[str] = []
    for key, thing in public("pctt"):
        if inspect.isclass(thing) and issubclass(thing, (BaseException, pctt.Status)):
            continue
        words = set(re.findall(r"\w+", said(thing)))
        unnamed += [f"{key}({name})" for name in inspect.signature(thing).parameters if name not in words]
    assert not unnamed


def documented_by_example() -> list[str]:
    names = (module.name for module in pkgutil.walk_packages(pctt.__path__, "pctt."))
    files = ((name, ROOT / f"{name.replace('.', '/')}.py") for name in names)
    runs = re.compile(r">>> (?!.*doctest: \+SKIP)")
    return [name for name, file in files if file.is_file() and runs.search(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", documented_by_example())
def test_the_examples_in_docstrings_give_what_they_show(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


# --- the site -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of the reference alone, built as `make docs` builds all."""
    for needed in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(needed, reason='the site is built by Sphinx: pip install "pctt[docs]"')
    folder = tmp_path_factory.mktemp("site")
    only = ["-D", "root_doc=docs/api/index", "-D", "include_patterns=docs/api/*.md"]
    # Other pages are absent here, so what the site says of them are warnings; `make docs` has them all.
    command = [sys.executable, "-m", "sphinx", "-q", *only, "-c", str(SITE), str(ROOT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def inventory(site: Path) -> dict[str, str]:
    """{name: kind} of what can be linked to, from `objects.inv` (as Sphinx documents its format)."""
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        found = InventoryFile.load(file, "", lambda base, path: path)
    return {name: kind for kind, names in found.items() if kind.startswith("py:") for name in names}


def test_everything_public_is_in_the_inventory_of_the_site(site: Path) -> None:
    listed = inventory(site)
    missing = [f"pctt.{name}" for name in pctt.__all__ if f"pctt.{name}" not in listed]
    for module in MODULES:
        missing += [] if listed.get(f"pctt.{module}") == "py:module" else [f"pctt.{module}"]
        for key, thing in public(f"pctt.{module}"):
            names = {f"pctt.{module}.{key}", f"{thing.__module__}.{key}", f"pctt.{key}"}
            missing += [] if names & set(listed) else [f"pctt.{module}.{key}"]
    assert not missing
    for name, kind in (("Trainer.fit", "py:method"), ("Network.nodes", "py:property")):
        assert listed[f"pctt.{name}"] == kind


def test_the_site_needs_no_connection(site: Path) -> None:
    """Nothing that a browser loads by itself lies elsewhere; links for the reader to follow may."""
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="([^"]+)"', text)
        assert not [found for found in loaded if re.match(r"(https?:)?//", found)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text(encoding="utf-8")), style.name


def test_docstrings_are_shown_as_they_are_meant(site: Path) -> None:
    """A name and its explanation, an example, and characters that are markup to Sphinx but not to us."""
    text = (site / "docs" / "api" / "inference.html").read_text(encoding="utf-8")
    assert re.search(r"<dt>num_steps</dt><dd><p>number of inference steps T, at least 0\.", text)
    assert "[B, *shape]" in text and "TypeAliasForwardRef" not in text
    assert re.search(r'class="doctest.*?recall', text, flags=re.DOTALL)


# --- what makes it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            ["rate: above 0.    betas: in [0, 1)."],
            ["rate", "    above 0.", "", "betas", "    in [0, 1).", ""],
        ),
        (
            ["rate: above", "    0.", "Raises ValueError."],
            ["rate", "    above 0.", "", "Raises ValueError.", ""],
        ),
        (["the others: all"], ["the others: all", ""]),
        (["other: no argument"], ["other: no argument", ""]),
        (["", "    a_1 = b*c", "", "done"], ["::", "", "    a_1 = b*c", "", "done", ""]),
        (["a_ *b* |c|"], [r"a\_ \*b\* \|c\|", ""]),
        (["see `rate` and `1 + rate`s"], [r"see :py:obj:`rate` and ``1 + rate``\ s", ""]),
        (["Args:", "    rate: above 0."], ["rate", "    above 0.", ""]),
        (["Returns:", "    A number."], ["Returns a number.", ""]),
        ([">>> rate", "1"], [">>> rate", "1", ""]),
    ],
)
def test_prose_becomes_markup(docstring: list[str], expected: list[str]) -> None:
    specification = importlib.util.spec_from_file_location("docstrings", SITE / "docstrings.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.converted(docstring, {"rate", "betas"}) == expected


def test_what_builds_the_site_is_pinned_and_asked_for_by_name() -> None:
    extras = config._toml().loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("docs", "notebook"):
        for requirement in extras["optional-dependencies"][name]:
            package = re.split(r"[><=]", requirement)[0]
            assert re.search(rf"^{package}==", pinned, flags=re.MULTILINE), package
