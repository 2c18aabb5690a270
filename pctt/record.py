"""The record of a run: `metrics.jsonl`, one JSON object a line, in the order in which things happened.

The file is the truth about a run; plots, tables and tensorboard are views of it. Two promises hold:

- A run that stops and resumes leaves the same bytes as one that never stopped. Therefore no field depends on
  the wall clock, except under the key `seconds`; and whoever writes a checkpoint first records everything up
  to its batch.
- A crash costs at most the line being written. A line counts once its newline is there.
"""

import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pctt.checkpoint import remedy

FILE_NAME = "metrics.jsonl"


class Recorder:
    """Appends records to the `metrics.jsonl` of a run folder, each at once, so that it can be followed live.

    Args:
        folder: the run folder; created if absent.
        tensorboard: whether to mirror the numbers into `folder/tensorboard` too: scalars under `kind/field`,
            the items of a list or dict under `kind/field/i`. Deeper nesting, text and nulls are not mirrored.
        resume_after: the global batch number of the checkpoint that the run continues from; later records are
            dropped as by `truncate_after`. Without it, records are added to those present.

    Raises:
        ImportError: tensorboard is asked for and not installed.
        FileNotFoundError: `resume_after` is given and there is no record.

    Example:
        >>> with Recorder(Path("run")) as recorder:  # doctest: +SKIP
        ...     recorder.log("batch", step=1, energies={"dense1": 0.5})
    """

    def __init__(self, folder: Path, tensorboard: bool = False, resume_after: int | None = None) -> None:
        folder = Path(folder)
        # First, so that a missing package leaves no trace in the folder.
        writer = _summary_writer() if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        if resume_after is not None:
            truncate_after(self.path, resume_after)
        elif self.path.exists():
            _truncate(self.path, _whole_lines(self.path.read_bytes()))
        try:
            # Unbuffered: nothing is left over to be written again after an error.
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise _not_written(self.path, error) from error
        purge_step = None if resume_after is None else resume_after + 1
        self._writer = writer and writer(str(folder / "tensorboard"), purge_step=purge_step)

    def log(self, kind: str, **fields: object) -> None:
        """Append one record, `{"kind": kind, **fields}`.

        Args:
            kind: what the record describes, such as "batch", "epoch", "trajectory" or "result".
            **fields: JSON values, torch or numpy scalars and arrays, and lists and dicts of these. Numbers
                keep their value exactly; those that are not finite become null. `step` is the global batch
                number.

        Raises:
            TypeError: a field holds something else.
            OSError: the line cannot be written, for instance because the disk is full.
        """
        record = {"kind": kind} | {name: _plain(value, name) for name, value in fields.items()}
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n")
        if self._writer:
            for tag, number in _scalars(record):
                self._writer.add_scalar(tag, number, record.get("step"))

    def log_record(self, kind: str, fields: Mapping[str, object]) -> None:
        """`log` with the fields as one mapping: the shape of a callback of `Trainer.fit`."""
        self.log(kind, **fields)

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        self._file.close()
        if self._writer:
            self._writer.close()

    def _append(self, line: bytes) -> None:
        start = self._file.seek(0, os.SEEK_END)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(start)  # no half line, to which the next record would be glued
            raise _not_written(self.path, error) from error

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without the half-written last line that a crash may have left.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: any other line is no JSON object; the message names its number.
    """
    return [record for _, record in _records(Path(path))]


def truncate_after(path: Path, step: int) -> None:
    """Take a record back to the moment at which the checkpoint of batch `step` was written.

    The file is cut before its first record with a later `step`, or before a record of kind "result", which a
    run that goes on has not reached yet; records without `step` stay when they stand before that. A
    half-written last line goes too. Only the end of the file is removed, in one operation that needs no disk
    space: a crash leaves the old file or the new one.

    Args:
        path: a `metrics.jsonl`.
        step: global batch number of the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is broken.
    """
    path = Path(path)
    end = 0
    for line_end, record in _records(path):
        later = isinstance(record.get("step"), int) and record["step"] > step
        if later or record.get("kind") == "result":
            break
        end = line_end
    _truncate(path, end)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole record with the offset at which its line ends."""
    data = path.read_bytes()
    end = 0
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); repair that line.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object; repair that line.")
        end += len(line) + 1
        yield end, record


def _not_written(path: Path, error: OSError) -> OSError:
    """The error as one sentence, and nothing else, or Python would put number and name around it."""
    reason = error.strerror or str(error)
    kept = "the records before are kept"
    return OSError(f"a record was not written ({reason}) to {path}; {remedy(error)}; {kept}.")


def _whole_lines(data: bytes) -> int:
    """How many of the bytes belong to lines that have their newline."""
    return data.rfind(b"\n") + 1


def _truncate(path: Path, size: int) -> None:
    if size == path.stat().st_size:
        return
    with open(path, "r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def _plain(value: object, name: str) -> Any:
    """The value as JSON types; not-finite numbers become None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key, name): _plain(item, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}/{i}") for i, item in enumerate(value)]
    to_list = getattr(value, "tolist", None)  # torch and numpy alike, neither of which is needed here
    if to_list is None:
        raise TypeError(f"{name!r} must be numbers, text, lists or dicts, got {value!r}; convert it first.")
    return _plain(to_list(), name)


def _key(key: object, name: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{name!r} must have text as keys, got {key!r}; convert it first.")
    return key


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    kind = record["kind"]
    for field, value in record.items():
        if field in ("kind", "step"):
            continue
        if isinstance(value, dict):
            items = [(f"{field}/{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            items = [(f"{field}/{i}", item) for i, item in enumerate(value)]
        else:
            items = [(field, value)]
        yield from ((f"{kind}/{tag}", item) for tag, item in items if type(item) in (int, float))


def _summary_writer() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise ImportError('tensorboard is not installed; run: pip install "pctt[log]"') from error
