"""pctt: neural networks trained by predictive coding, on Tenstorrent cards and, by the same program, on the
CPU.

The names below come from the modules that `__init__.pyi` says, each when it is first asked for: importing
pctt alone does not import torch, which takes longer than all the rest.
"""

import ast
import pkgutil
from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def _public_names() -> dict[str, str]:
    """{name: the module it is imported from}, out of the stub that type checkers and editors read too."""
    stub = pkgutil.get_data(__name__, "__init__.pyi")
    if stub is None:
        raise ImportError("pctt/__init__.pyi is missing; install pctt again.")
    imports = [node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_PUBLIC = _public_names()

__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pctt' has no attribute {name!r}")
    where = _PUBLIC[name]
    thing = import_module(f"pctt.{name}") if where == __name__ else getattr(import_module(where), name)
    globals()[name] = thing  # so that the next time is an ordinary look-up
    return thing


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
