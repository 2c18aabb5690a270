"""Pickles of plain values, read as data: nothing that a file names is looked up, imported or called.

A pickle is a list of instructions for a small stack machine, and `pickle.load` follows them, also where they
say "import os and call system". Here the standard library's `pickletools` only takes the list apart, and this
module follows the few instructions that lists, dictionaries, text, numbers and NumPy arrays of bytes need.
Where a file names `numpy.dtype`, the name is compared with the ones known below, and that is all.
"""

import math
import pickletools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_INSTRUCTIONS = (
    1 << 20
)  # a CIFAR-10 batch has 60,000; bounds memory, which is what a hostile file could take
MAX_DIMENSIONS = 32  # NumPy 1's own limit
MAX_REASON = 120  # characters

ENCODE = "_codecs.encode"  # how Python 3 writes bytes for Python 2
DTYPE = "numpy.dtype"
NDARRAY = "numpy.ndarray"
RECONSTRUCT = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)  # NumPy 1, NumPy 2
KNOWN = (ENCODE, DTYPE, NDARRAY, *RECONSTRUCT)

# Instructions that push the value which stands beside them.
VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINUNICODE",
    "SHORT_BINUNICODE",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(ValueError):
    """A pickle that asks for something other than plain values; the message says for what."""


@dataclass(eq=False)
class PickledArray:
    """An array of a pickle; `value` is None until the file has given its numbers."""

    value: np.ndarray | None = None


@dataclass(frozen=True)
class _Name:
    """A name from the file, one of KNOWN, that stands for itself."""

    name: str


@dataclass(frozen=True)
class _Bytes:
    """numpy.dtype("u1"), the only kind of number that is read."""


_MARK = object()


def read_pickle(content: bytes) -> Any:
    """The value in a pickle of protocol 2 to 4: dict, list, tuple, bytes, str, int, bool, None, PickledArray.

    Text that Python 2 wrote as `str` comes as bytes.
    Raises RefusedError where the file asks for anything else, ValueError for what is no whole pickle.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd backslashes in names, which end in an error anyway
            return _run(content)
    except RefusedError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:MAX_REASON]  # some quote the rest of the file
        raise ValueError(reason) from error


def _run(content: bytes) -> Any:
    """The stack machine. An instruction on the wrong kind of value ends in one of Python's own errors."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    instructions: Iterator[tuple[Any, Any, Any]] = pickletools.genops(content)
    for count, (opcode, argument, place) in enumerate(instructions):
        if count == MAX_INSTRUCTIONS:
            raise RefusedError(f"more than {MAX_INSTRUCTIONS} instructions")
        name = opcode.name
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINSTRING", "SHORT_BINSTRING"):
            stack.append(argument.encode("latin-1"))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(_above_mark(stack)))
        elif name in TUPLES:
            stack.append(tuple(_pop(stack, TUPLES[name])))
        elif name in ("APPEND", "APPENDS"):
            items = _pop(stack, 1) if name == "APPEND" else _above_mark(stack)
            _require(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = _pop(stack, 2) if name == "SETITEM" else _above_mark(stack)
            target = _require(stack[-1], dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_require(key, (bytes, str, int))] = value
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            names = argument.split(" ", 1) if name == "GLOBAL" else _pop(stack, 2)
            stack.append(_named(".".join(names)))
        elif name == "REDUCE":
            called, arguments = _pop(stack, 2)
            stack.append(_made(_require(called, _Name).name, _require(arguments, tuple)))
        elif name == "BUILD":
            target, state = _pop(stack, 2)
            _fill(target, _require(state, tuple))
            stack.append(target)
        elif name == "STOP":
            (result,) = stack
            if place != len(content) - 1:
                raise ValueError(f"{len(content) - 1 - place} bytes follow its end")
            return result
        elif name not in ("PROTO", "FRAME"):
            raise RefusedError(f"the pickle instruction {name}")
    raise ValueError("its end is missing")


def _named(name: str) -> _Name:
    if name not in KNOWN:
        raise RefusedError(f"{name[:80]!r}")
    return _Name(name)


def _made(called: str, arguments: tuple[Any, ...]) -> Any:
    """What the file means by calling one of KNOWN with these arguments."""
    if called == ENCODE:
        text, encoding = arguments
        if encoding != "latin1":
            raise RefusedError("bytes that are written as text in another way than Python's")
        return _require(text, str).encode("latin-1")
    if called == DTYPE:
        kind = _require(arguments[0], (str, bytes))
        if kind not in ("u1", b"u1"):
            raise RefusedError(f"an array of numbers of the kind {kind[:80]!r}")
        return _Bytes()
    if called in RECONSTRUCT and arguments[0] == _Name(NDARRAY):
        return PickledArray()
    raise RefusedError(f"a call of {called}")


def _fill(target: Any, state: tuple[Any, ...]) -> None:
    """Gives an array its numbers; the state of its dtype says nothing about bytes that is not known."""
    if isinstance(target, _Bytes):
        return
    version, shape, dtype, is_fortran, data = state
    if version != 1 or dtype != _Bytes() or not isinstance(is_fortran, bool | int):
        raise ValueError("an array that is described in an unknown way")
    sizes = tuple(_require(size, int) for size in _require(shape, tuple))
    if len(sizes) > MAX_DIMENSIONS or min(sizes, default=0) < 0:
        raise ValueError(f"an array of {len(sizes)} dimensions, or of a size below 0")
    if math.prod(sizes) != len(_require(data, bytes)):
        raise ValueError(f"an array of shape {sizes} with {len(data)} bytes")
    order = "F" if is_fortran else "C"
    _require(target, PickledArray).value = np.frombuffer(data, np.uint8).reshape(sizes, order=order)


def _above_mark(stack: list[Any]) -> list[Any]:
    """Takes all that lies above the topmost mark, and the mark, off the stack."""
    start = len(stack) - 1
    while stack[start] is not _MARK:
        if start == 0:
            raise IndexError("no mark on the stack")
        start -= 1
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _pop(stack: list[Any], count: int) -> list[Any]:
    """Takes the topmost `count` values off the stack, the lowest first."""
    items = stack[-count:]
    if len(items) < count or any(item is _MARK for item in items):
        raise IndexError("too few values on the stack")
    del stack[-count:]
    return items


def _require(value: Any, kinds: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kinds):
        raise TypeError(f"unexpected {type(value).__name__}")
    return value
