"""What `import pctt` gives: the names of the stub, none of them loaded before it is asked for."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pctt

STUB = Path(pctt.__file__).with_suffix(".pyi")


def test_importing_pctt_loads_neither_torch_nor_numpy():
    """They take most of the time that an import takes; a program that only asks for the version, or completes
    a command line, should not wait for them.
    """
    code = (
        "import sys, pctt; pctt.__version__; dir(pctt); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_stub_is_that_of_its_module():
    """A name whose module has moved would be an error only for the user who asks for it."""
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    names = {alias.name: node.module for node in imports for alias in node.names}
    assert set(pctt.__all__) == set(names) and len(names) > 70
    assert all(alias.asname == alias.name for node in imports for alias in node.names)  # re-exported
    for name, module in names.items():
        expected = importlib.import_module(f"pctt.{name}" if module == "pctt" else str(module))
        assert getattr(pctt, name) is (expected if module == "pctt" else getattr(expected, name))
    assert set(names) <= set(dir(pctt))


def test_a_star_import_gives_them_all_and_a_slip_is_an_attribute_error():
    namespace: dict[str, object] = {}
    exec("from pctt import *", namespace)
    assert set(pctt.__all__) <= set(namespace)
    with pytest.raises(AttributeError, match="no attribute 'chian'"):
        _ = pctt.chian
