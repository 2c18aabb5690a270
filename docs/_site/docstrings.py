"""Docstrings of pctt as reStructuredText.

They are prose without markup: `name: what it is` per argument, several on a line with four spaces between,
equations and code indented, names in single backticks, asterisks and underscores that mean themselves. The
few that have headings such as Args and Returns are read too.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAMES = r"[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*"
FIELD = re.compile(rf"({NAMES}): (.*)")
BETWEEN = re.compile(rf"(?<=\S)    (?={NAMES}: )")
HEADING = re.compile(r"(Args|Returns|Raises|Yields|Example):$")
ALIAS = re.compile(r"TypeAliasForwardRef\('([^']*)'\)")
MARKUP = re.compile(r"[\\*_|`]")
PAGE = re.compile(r"\b(docs/[\w/-]+)\.md\b")
REPOSITORY = Path(__file__).resolve().parents[2]


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _named)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _process(app: Any, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    del app, name, options
    if dataclasses.is_dataclass(thing) and lines and lines[0].startswith(f"{_name(thing)}("):
        lines.clear()  # what `dataclass` writes where there is no docstring
    lines[:] = converted(lines, argument_names(thing) if what != "module" else set())


def _named(*given: Any) -> tuple[str | None, str | None]:
    """Signatures with the names of type aliases, also where these stand in a union."""
    *_, arguments, returned = given
    shown = [text and ALIAS.sub(r"\1", text) for text in (arguments, returned)]
    return shown[0], shown[1]


def argument_names(thing: Any) -> set[str]:
    """What may stand before a colon: arguments, fields and attributes."""
    names = set(vars(thing)) | set(dir(thing)) if inspect.isclass(thing) else set[str]()
    if dataclasses.is_dataclass(thing):
        names |= {field.name for field in dataclasses.fields(thing)}
    try:
        names |= set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        pass
    return names


def converted(lines: Iterable[str], known: set[str]) -> list[str]:
    """The lines of a docstring, dedented, as those of reStructuredText.

    known: names that may be described; where it is empty any may.
    """
    result: list[str] = []
    for block in _blocks(_without_headings(lines)):
        if block[0].startswith(">>>"):
            result += [*block, ""]
        elif block[0].startswith("    "):
            result += ["::", "", *block, ""]
        else:
            result += _prose(block, known)
    return result


def _without_headings(lines: Iterable[str]) -> list[str]:
    """Sections such as `Args:` as the rest is written."""
    result: list[str] = []
    heading = ""
    for line in lines:
        found = HEADING.match(line)
        if found:
            heading = found[1]
            if result and result[-1].strip():
                result.append("")
        elif heading and line.startswith("    "):
            word = heading if heading in ("Returns", "Raises", "Yields") else ""
            said = line[4:]
            if word and not line.startswith("        "):
                said = f"{word} {said[0].lower() + said[1:] if word != 'Raises' else said}"
            result.append(said)
        else:
            heading = heading if not line.strip() else ""
            result.append(line)
    return result


def _blocks(lines: Iterable[str]) -> list[list[str]]:
    """Paragraphs. A block of code may have blank lines of its own, where indented lines follow."""
    blocks: list[list[str]] = []
    gap = True
    for line in lines:
        if not line.strip():
            gap = True
            continue
        if gap and blocks and line.startswith("    ") and blocks[-1][0].startswith("    "):
            blocks[-1] += ["", line]
        elif gap:
            blocks.append([line])
        else:
            blocks[-1].append(line)
        gap = False
    return blocks


def _prose(block: list[str], known: set[str]) -> list[str]:
    """Sentences, and a definition list of the names described among them."""
    parts: list[tuple[str, list[str]]] = []  # name, or "" for a sentence, and its lines
    for line in (part for whole in block for part in BETWEEN.split(whole)):
        field = FIELD.match(line)
        names = set(field[1].split(", ")) if field else set[str]()
        if field and (names & known or (not known and line[0].islower())):
            parts.append((field[1], [field[2]]))
        elif not parts:
            parts.append(("", [line]))
        elif parts[-1][0] and not line.startswith(" ") and line[0].isupper() and _ended(parts[-1][1]):
            parts.append(("", [line]))
        else:
            parts[-1][1].append(line.strip())
    result: list[str] = []
    for name, text in parts:
        said = _inline(" ".join(text))
        result += [_inline(name), f"    {said}", ""] if name else [said, ""]
    return result


def _ended(text: list[str]) -> bool:
    return text[-1].rstrip().endswith((".", ":", ";"))


def _inline(text: str) -> str:
    """A line with its markup: code in backticks, pages of the documentation as links."""
    result: list[str] = []
    for number, part in enumerate(text.split("`")):
        if number % 2:
            is_name = re.fullmatch(r"[A-Za-z_][\w.]*", part)
            result.append(f":py:obj:`{part}`" if is_name else f"``{part}``")
        else:
            result.append(PAGE.sub(_link, MARKUP.sub(lambda found: f"\\{found[0]}", part)))
    for number in range(1, len(result), 2):  # a letter beside inline markup would undo it
        if result[number - 1] and result[number - 1][-1].isalnum():
            result[number - 1] += "\\ "
        if number + 1 < len(result) and result[number + 1][:1].isalnum():
            result[number + 1] = f"\\ {result[number + 1]}"
    return "".join(result)


def _link(found: re.Match[str]) -> str:
    page = found[1].replace("\\", "")
    return f":doc:`{page}.md </{page}>`" if (REPOSITORY / f"{page}.md").is_file() else found[0]


def _name(thing: object) -> str:
    return getattr(thing, "__name__", "")
