"""Text as a sequence of characters, and how it is cut into windows for training."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pctt._checks import require_between, require_count

PYDOC = "pydoc"
MIN_PART = 2  # a character to read, and the one that follows it


@dataclass(frozen=True, eq=False)
class Text:
    """A text in three consecutive parts, each character as its index in `symbols`.

    symbols: the different characters, sorted by code point. train, validation, test: int64 [N], N = 0 for a
    part that was not asked for.
    Raises ValueError where a part is anything else or an index has no symbol.
    """

    symbols: tuple[str, ...]
    train: Tensor
    validation: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        if not self.symbols or any(not isinstance(c, str) or len(c) != 1 for c in self.symbols):
            raise ValueError("symbols must be one or more single characters; give tuple(sorted(set(text))).")
        if list(self.symbols) != sorted(set(self.symbols)):
            raise ValueError("symbols must be sorted and different; give tuple(sorted(set(text))).")
        for part in ("train", "validation", "test"):
            _check_ids(part, getattr(self, part))
            self._check_range(part, getattr(self, part))

    def encode(self, text: str) -> Tensor:
        """The text as int64 [len(text)], each character as its index in `symbols`.

        Raises ValueError, naming the first one, where a character is not among them.
        """
        return _encode(self.symbols, text)

    def decode(self, ids: Tensor) -> str:
        """The text that int64 `ids` [N] stand for, the reverse of `encode`.

        Raises ValueError for any other tensor, or an index without a symbol.
        """
        _check_ids("ids", ids)
        self._check_range("ids", ids)
        return "".join([self.symbols[k] for k in ids.tolist()])

    def _check_range(self, name: str, ids: Tensor) -> None:
        wrong = (ids < 0) | (ids >= len(self.symbols))
        if wrong.any():
            place = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"{name} must be indices of the {len(self.symbols)} symbols, got {int(ids[place])} at "
                f"position {place}; make them with encode."
            )


def load_text(path: str | os.PathLike[str], validation: float = 0.1, test: float = 0.1) -> Text:
    """The text of a UTF-8 file, cut into training, validation and test, in this order.

    path: of the file, or "pydoc" for the English documentation that comes with Python (a file of that name is
    "./pydoc"). Line ends become "\\n"; a byte order mark is dropped.
    validation, test: fractions of the characters, in [0, 1), rounded to whole ones; 0 leaves a part empty.
    Raises FileNotFoundError where there is no such file, ValueError for a file that is empty, not UTF-8, or
    too short to give every part asked for two characters, and for other fractions.
    """
    require_between("validation", validation, 0, 1)
    require_between("test", test, 0, 1)
    if validation + test >= 1:
        raise ValueError(
            f"validation and test must leave something to train on, got {validation} and {test}; "
            "choose fractions whose sum is below 1."
        )
    text = _pydoc_text() if path == PYDOC else _read(Path(path).expanduser())
    sizes = [round(fraction * len(text)) for fraction in (validation, test)]
    sizes = [len(text) - sum(sizes), *sizes]
    asked = (True, validation > 0, test > 0)
    if any(size < MIN_PART for size, is_asked in zip(sizes, asked, strict=True) if is_asked):
        raise ValueError(
            f"{path} has {len(text)} characters, of which training, validation and test would get "
            f"{', '.join(map(str, sizes))}; each needs {MIN_PART}, so use a longer text or other fractions."
        )
    symbols = tuple(sorted(set(text)))
    train, held_out, last = _encode(symbols, text).split(sizes)
    return Text(symbols, train, held_out, last)


def windows(ids: Tensor, length: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """A sequence as `batch_size` streams, cut into chunks: (inputs, targets) for truncated recurrence.

    ids: int64 [N]. Returns: both int64 [num_chunks, batch_size, length], with (N - 1) // (batch_size *
    length) chunks. Row b of chunk k + 1 goes on where row b of chunk k ended, so that a carried state fits;
    each target is the character after its input. What fills no chunk is dropped from the end.
    Raises ValueError where N is too small for one chunk, or a size is not a whole number of at least 1.
    """
    _check_ids("ids", ids)
    require_count("length", length, 1)
    require_count("batch_size", batch_size, 1)
    num_chunks = (len(ids) - 1) // (batch_size * length)
    if num_chunks < 1:
        raise ValueError(
            f"{batch_size} windows of {length} and the character after them need {batch_size * length + 1}, "
            f"and there are {len(ids)}; choose a smaller length or batch_size, or use a longer text."
        )
    num_used = num_chunks * batch_size * length
    shape = (batch_size, num_chunks, length)
    inputs, targets = (
        part.reshape(shape).transpose(0, 1).contiguous() for part in (ids[:num_used], ids[1 : num_used + 1])
    )
    return inputs, targets


def excerpts(ids: Tensor, length: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows that begin at random places: (inputs, targets), each int64 [count, length].

    ids: int64 [N], N above `length`. Every place is equally likely and may come more than once; each target
    is the character after its input. The same seed gives the same windows.
    Raises ValueError where N is too small, or a size is not a whole number of at least 1.
    """
    _check_ids("ids", ids)
    require_count("length", length, 1)
    require_count("count", count, 1)
    if len(ids) <= length:
        raise ValueError(
            f"a window of {length} and the character after it need {length + 1}, and there are {len(ids)}; "
            "choose a smaller length or use a longer text."
        )
    starts = torch.randint(len(ids) - length, (count, 1), generator=torch.Generator().manual_seed(seed))
    places = starts + torch.arange(length)
    return ids[places], ids[places + 1]


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is not a file; give the path of a UTF-8 text, or "{PYDOC}" for one that Python brings.'
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start} ({error.reason}); save it in that encoding."
        ) from error
    if not text:
        raise ValueError(f"{path} is empty; give a file with text in it.")
    return text


def _pydoc_text() -> str:
    """What Python's `help` says about the language: all topics, in alphabetical order."""
    try:  # imported here because it is half a megabyte that hardly anyone needs
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this Python lacks pydoc_data, the text of its own documentation; give the path of a text file."
        ) from error
    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"


def _encode(symbols: tuple[str, ...], text: str) -> Tensor:
    known, codes = (np.frombuffer(_utf32(part), "<u4") for part in ("".join(symbols), text))
    places = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    wrong = np.flatnonzero(known[places] != codes)
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"character {text[place]!r} at position {place} is not among the {len(symbols)} symbols of this "
            "text; leave it out or replace it."
        )
    return torch.from_numpy(places.astype(np.int64, copy=False))


def _utf32(text: str) -> bytes:
    """Four bytes a character, little-endian; also for lone surrogates, which a Python str may hold."""
    return text.encode("utf-32-le", "surrogatepass")


def _check_ids(name: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} must be a torch.int64 tensor [N], got {got}; make it with Text.encode.")
