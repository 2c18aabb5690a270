"""Links from a page to a file of the repository: each such file is a page of the site, with its colours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

FOLDER = "source"
INDEX = (
    '<!doctype html><meta charset="utf-8"><title>pctt</title><meta http-equiv="refresh" content="0; url={0}">'
)


class SourceLinks(SphinxTransform):
    """Turns what would be offered as a download into a link to the page of that file."""

    default_priority = 5  # before the files to download are gathered

    def apply(self, **_: Any) -> None:
        root = Path(self.app.srcdir).resolve()
        for link in list(self.document.findall(addnodes.download_reference)):
            page = root / self.env.docname
            path = (page.parent / link["reftarget"]).resolve()
            if link["reftarget"].startswith("/"):
                path = (root / link["reftarget"].lstrip("/")).resolve()
            name = path.relative_to(root).as_posix()
            _linked(self.env).setdefault(self.env.docname, set()).add(name)
            up = "../" * self.env.docname.count("/")
            found = nodes.reference("", "", *link.children, refuri=f"{up}{FOLDER}/{name}.html", internal=True)
            link.replace_self(found)


def _linked(env: Any) -> dict[str, set[str]]:
    """{page: files that it links to}"""
    if not hasattr(env, "pctt_linked"):
        env.pctt_linked = {}
    return env.pctt_linked


def _forget(app: Any, env: Any, page: str) -> None:
    del app
    _linked(env).pop(page, None)


def _pages(app: Any) -> Iterator[tuple[str, dict[str, str], str]]:
    root = Path(app.srcdir)
    for name in sorted(set[str]().union(*_linked(app.env).values())):
        try:
            lexer = get_lexer_for_filename(name)
        except ClassNotFound:
            lexer = TextLexer()
        text = (root / name).read_text(encoding="utf-8")
        body = f"<h1>{name}</h1>" + highlight(text, lexer, HtmlFormatter(cssclass="highlight"))
        yield f"{FOLDER}/{name}", {"title": PurePosixPath(name).name, "body": body}, "page.html"


def _front(app: Any, error: Exception | None) -> None:
    """The first page lies where the sources have it; `index.html` of the site leads there."""
    if error is None and app.builder.format == "html":
        target = app.builder.get_target_uri(app.config.root_doc)
        (Path(app.outdir) / "index.html").write_text(INDEX.format(target), encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    app.add_transform(SourceLinks)
    app.connect("env-purge-doc", _forget)
    app.connect("html-collect-pages", _pages)
    app.connect("build-finished", _front)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
