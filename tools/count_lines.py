"""Lines of code, comments, docstrings and text, per package, and the files that have grown long.

    python tools/count_lines.py
    python tools/count_lines.py --limit 300 --check
    python tools/count_lines.py pctt/backends

A line with code and a comment is code, a blank line within a docstring belongs to it. Markdown is text.

Exit code: 0, or with --check 1 if a file has more lines than the limit; 2 for a folder that is not there.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("pctt", "kernels", "tools", "tests", "docs")
KINDS = ("code", "comments", "docstrings", "text", "blank")
PYTHON, C, TEXT = (".py",), (".cpp", ".h", ".hpp"), (".md",)
LAYOUT = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENDMARKER, tokenize.ENCODING),
)


def count_file(path: Path) -> Counter[str]:
    """Lines by kind. Raises ValueError for Python that cannot be parsed."""
    source = path.read_text(encoding="utf-8")
    if path.suffix in PYTHON:
        try:
            return count_python(source)
        except (SyntaxError, tokenize.TokenError) as error:
            raise ValueError(f"{path} is not Python: {error}.") from None
    return count_c(source) if path.suffix in C else count_text(source)


def count_python(source: str) -> Counter[str]:
    kinds = dict.fromkeys(range(1, len(source.splitlines()) + 1), "blank")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kinds[token.start[0]] = "code" if kinds[token.start[0]] == "code" else "comments"
        elif token.type not in LAYOUT:
            kinds |= dict.fromkeys(range(token.start[0], token.end[0] + 1), "code")
    for node in ast.walk(ast.parse(source)):
        # Also those below an attribute, which explain it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                kinds |= dict.fromkeys(range(node.lineno, (node.end_lineno or node.lineno) + 1), "docstrings")
    return Counter(kinds.values())


def count_c(source: str) -> Counter[str]:
    """By the beginnings of lines, which suffices for the style of the kernels."""
    counts: Counter[str] = Counter()
    within = False
    for line in map(str.strip, source.splitlines()):
        begins = line.startswith("/*")
        if within or begins or line.startswith("//"):
            counts["comments"] += 1
            within = (within or begins) and "*/" not in line
        else:
            counts["code" if line else "blank"] += 1
    return counts


def count_text(source: str) -> Counter[str]:
    return Counter("text" if line.strip() else "blank" for line in source.splitlines())


def files(folder: Path) -> Iterator[Path]:
    """The sources below `folder`, without hidden ones and caches."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts
        if path.suffix in PYTHON + C + TEXT and path.is_file():
            if not any(part.startswith((".", "__pycache__")) for part in inner):
                yield path


def table(packages: dict[str, Counter[str]], numbers: Counter[str]) -> list[str]:
    """Of counts by package, in Markdown."""
    lines = [f"| Package | Files | {' | '.join(map(str.capitalize, KINDS))} |", "|---" * 7 + "|"]
    for name, counts in packages.items():
        cells = [name, f"{numbers[name]}", *(f"{counts[kind]:,}" for kind in KINDS)]
        lines.append(f"| {' | '.join(cells)} |")
    total = sum(packages.values(), Counter[str]())
    cells = ["all", f"{numbers.total()}", *(f"{total[kind]:,}" for kind in KINDS)]
    return [*lines, f"| {' | '.join(cells)} |"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help=f"default: {', '.join(FOLDERS)}")
    parser.add_argument("--limit", type=int, default=400, help="lines of a long file (default 400)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a file is longer")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    folders: list[Path] = options.folders or [ROOT / name for name in FOLDERS]
    packages: dict[str, Counter[str]] = {}
    numbers: Counter[str] = Counter()
    long: list[tuple[int, str]] = []
    try:
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"there is no folder {folder}.")
            for path in files(folder):
                name = _name(path.parent)
                counts = count_file(path)
                packages.setdefault(name, Counter()).update(counts)
                numbers[name] += 1
                if counts.total() > options.limit:
                    long.append((counts.total(), _name(path)))
    except (OSError, ValueError) as error:
        print(f"count_lines: {error}", file=sys.stderr)
        return 2
    long.sort(reverse=True)
    if options.json:
        fields = {"packages": packages, "files": numbers, "long": {name: size for size, name in long}}
        print(json.dumps(fields))
    else:
        print("\n".join(table(packages, numbers)))
        print(f"\nfiles above {options.limit} lines: {len(long) or 'none'}")
        print("".join(f"{size:>7,}  {name}\n" for size, name in long), end="")
    return 1 if options.check and long else 0


def _name(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
