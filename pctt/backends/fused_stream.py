"""The instructions that the kernels of `kernels/training_step` read, as words.

Their numbers stand in the header that the kernels include, and are read from there.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path


def _kernels() -> Path:
    """The sources of the kernels: beside the package in a checkout, under the prefix of an installation."""
    homes = Path(__file__).resolve().parents[2], Path(sys.prefix) / "share" / "pctt"
    for home in homes:
        if (home / "kernels" / "training_step" / "stream.h").is_file():
            return home / "kernels" / "training_step"
    raise ImportError(
        f"the sources of pctt's kernels are in neither {homes[0] / 'kernels'} nor {homes[1] / 'kernels'}; "
        "install pctt again."
    )


KERNELS = _kernels()


def _enumerations(header: str) -> dict[str, dict[str, int]]:
    """{name of an enum: {name: value}} of a C++ header whose enumerators all have values."""
    text = re.sub(r"//[^\n]*", "", header)
    found: dict[str, dict[str, int]] = {}
    for name, body in re.findall(r"enum (\w+) : uint32_t \{(.*?)\}", text, re.DOTALL):
        pairs = re.findall(r"(\w+) = ([\d +*x]+)", body)
        found[name] = {key: sum(_product(term) for term in value.split("+")) for key, value in pairs}
    return found


def _product(term: str) -> int:
    result = 1
    for factor in term.split("*"):
        result *= int(factor, 0)
    return result


_HEADER = (KERNELS / "stream.h").read_text()
_ENUMS = _enumerations(_HEADER)
PROCESSOR, ARGUMENT, WINDOW = _ENUMS["Processor"], _ENUMS["Argument"], _ENUMS["Window"]
CODE, LINK, MOVEMENT = _ENUMS["Code"], _ENUMS["Link"], _ENUMS["Movement"]
_FLAGS = _ENUMS["ProductFlag"]
IN0, IN1, OUT, TRANSPOSED = (
    _FLAGS[name] for name in ("IN0_BFLOAT16", "IN1_BFLOAT16", "OUT_BFLOAT16", "TRANSPOSED")
)
BFLOAT16 = 1
"""The flag of a load or a store."""
PARAMETERS = {
    **dict.fromkeys(("LOAD", "STORE", "FILL", "NUMBER", "SCALE", "SHIFT"), 1),
    **dict.fromkeys(("ADD_CONSTANT", "MULTIPLY_CONSTANT", "SUBTRACT_FROM", "LEAKY_RELU"), 1),
    "CLAMP": 2,
}
"""Words that follow a link; none where it is not named."""
COUNTER_BYTES = int(re.findall(r"COUNTER_BYTES = (\d+)", _HEADER)[0])


@dataclass(frozen=True)
class Ref:
    """An address in L1: `offset` bytes into a tensor, on the core that uses it or on another."""

    tensor: str
    offset: int = 0
    core: int | None = None


Word = int | Ref


def link(kind: str, register: int = 0, second: int = 0, flags: int = 0) -> int:
    return LINK[kind] | register << 8 | second << 12 | flags << 16


def header(code: str, go: bool, done: int, send: bool) -> int:
    """The first word of an instruction of the compute kernel."""
    assert done < 1 << 16
    return CODE[code] | go << 8 | done << 9 | send << 25
