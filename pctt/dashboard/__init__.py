"""A page about runs: `page` makes the HTML, `write` puts it into a file."""

from pctt.dashboard.document import page, write

__all__ = ["page", "write"]
