"""HTML and SVG elements. Only `element` makes markup and it escapes all else, so nothing in a file of a run
can become part of the page but as text.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

VOID = ("meta", "link", "br", "input")
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is markup already."""


NOTHING = Markup("–")


def escape(text: object) -> Markup:
    """`text` as the content of an element or an attribute; what HTML cannot hold becomes U+FFFD."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_NOT_TEXT.sub("\ufffd", str(text))))


def _attribute(name: str, value: object) -> str:
    text = html.escape(_NOT_TEXT.sub("\ufffd", str(value)))
    return f'{name}="{text}"'


def element(tag: str, /, *children: str | None, **attributes: object) -> Markup:
    """An element. children: text, or markup from here; None is left out.

    attributes: `class_` is class, `aria_label` aria-label; None and False leave one out, True gives no value.
    """
    words = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(_attribute(name, value))
    opening = f"<{' '.join(words)}>"
    if tag in VOID:
        return Markup(opening)
    return Markup(f"{opening}{join(child for child in children if child is not None)}</{tag}>")


def join(parts: Iterable[str], by: str = "") -> Markup:
    return Markup(by.join(escape(part) for part in parts))


def number(value: float | None, form: str = ".4g") -> Markup:
    """A number to read, with its exact value beside it; a dash for none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    exact = int(value) if float(value).is_integer() and abs(value) < 1e15 else value
    return element("data", format(value, form), value=repr(exact))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], caption: str) -> Markup:
    """A table that scrolls by itself, with the keyboard too. The first cell of a row is its head."""
    top = element("tr", *(element("th", head, scope="col") for head in heads))
    body: list[Markup] = []
    for row in rows:
        first, *rest = row
        body.append(element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest)))
    content = element("table", element("caption", caption), element("thead", top), element("tbody", *body))
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)
