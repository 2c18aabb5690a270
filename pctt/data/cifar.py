"""CIFAR-10: where its files may lie, and how each of its two published versions is read.

The binary version has five files for training and one for testing. Each is a row of records: one byte for
the label, then 3072 for the image, red plane first, each plane row by row. The Python version holds the same
numbers as pickles, which are read by `plain_pickle` and never executed.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from .plain_pickle import PickledArray, RefusedError, read_pickle

URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
IMAGE_SHAPE = (3, 32, 32)
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAINING = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
FOLDERS = ("cifar10", "cifar-10")

NUM_PIXELS = 3 * 32 * 32
RECORD_BYTES = 1 + NUM_PIXELS
MAX_RECORDS = 10_000  # in each published file
MAX_PICKLE_BYTES = 1 << 26  # twice the published 31 MB, which bytes written as text need
MAX_ARCHIVE_BYTES = 1 << 28  # unpacked; the published ones have 185 MB
CHUNK_BYTES = 1 << 20

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Version:
    """How one published version names its files, how large they may be, and what reads one."""

    archive: str
    folder: str
    suffix: str
    max_bytes: int
    parse: Callable[[bytes, str], Batch]

    @property
    def files(self) -> dict[str, str]:
        """From the name of a file to the name of its part."""
        return {part + self.suffix: part for part in (*TRAINING, TEST)}


def read_cifar10(data_dir: str | os.PathLike[str] | None = None) -> tuple[Batch, Batch]:
    """The training and the test part of CIFAR-10, as ((images, labels), (images, labels)).

    Returns: images uint8 [N, 3, 32, 32], labels uint8 [N] 0 to 9; of the published files 50,000 and 10,000.
    Raises FileNotFoundError as `find_cifar10` does, ValueError, naming the file, for one that is not what it
    should be. Files that all hold equally many images, but fewer than the published ones, are accepted.
    """
    place, version = _find(data_dir)
    read = _read_folder if place.is_dir() else _read_archive
    batches = {part: version.parse(content, label) for part, label, content in read(place, version)}
    missing = [name for name, part in version.files.items() if part not in batches]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}; get it again from {URL}.")
    counts = {part: len(labels) for part, (_, labels) in batches.items()}
    if len(set(counts.values())) > 1:
        held = ", ".join(f"{part} {count}" for part, count in counts.items())
        raise ValueError(
            f"{place} should hold equally many images in each file and has {held}; get it again from {URL}."
        )
    images, labels = (np.concatenate(arrays) for arrays in zip(*(batches[p] for p in TRAINING), strict=True))
    return (images, labels), batches[TEST]


def find_cifar10(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the six files of CIFAR-10, or the archive that does.

    Looks in `data_dir`, else in the environment variable PCTT_DATA: in its subfolder cifar10 or cifar-10,
    then in the folder itself; in each for the files of the binary version, beside each other or in
    cifar-10-batches-bin, for cifar-10-binary.tar.gz, and then for the same of the Python version.
    Raises FileNotFoundError, saying which files are expected and where they are published.
    """
    return _find(data_dir)[0]


def _find(data_dir: str | os.PathLike[str] | None) -> tuple[Path, Version]:
    given = data_dir or os.environ.get("PCTT_DATA")
    if not given:
        raise _not_found("no folder was given")
    root = Path(given).expanduser()
    if not root.is_dir():
        raise _not_found(f"{root} is not a folder")
    incomplete = f"{root} lacks all of its files"
    for base in (*(root / name for name in FOLDERS), root):
        for version in VERSIONS:
            for folder in (base, base / version.folder):
                missing = [name for name in version.files if not (folder / name).is_file()]
                if not missing:
                    return folder, version
                if len(missing) < len(version.files):
                    incomplete = f"{folder} lacks {', '.join(missing)}"
            if (base / version.archive).is_file():
                return base / version.archive, version
    raise _not_found(incomplete)


def _not_found(problem: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"CIFAR-10: {problem}; it needs {BINARY.archive}, or the files {', '.join(BINARY.files)} from it, "
        f"published at {URL}: put them in a folder and give it as data_dir (--data-dir) or PCTT_DATA."
    )


def _read_folder(folder: Path, version: Version) -> Iterator[tuple[str, str, bytes]]:
    """(part, what to call the file, its content) of every file."""
    for name, part in version.files.items():
        with (folder / name).open("rb") as file:
            yield part, str(folder / name), _read_whole(file, folder / name, version)


def _read_archive(path: Path, version: Version) -> Iterator[tuple[str, str, bytes]]:
    """The same of a .tar.gz, in one pass that writes nothing and ends with the checksum at its end."""
    with path.open("rb") as packed:
        try:
            unpacked = _Bounded(gzip.GzipFile(fileobj=packed))
            with tarfile.open(fileobj=unpacked, mode="r|") as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
                for member in archive:
                    part = version.files.get(PurePosixPath(member.name).name)
                    file = archive.extractfile(member) if part and member.isreg() else None
                    if part and file:
                        label = f"{path}:{member.name}"
                        yield part, label, _read_whole(file, label, version)
            while unpacked.read(CHUNK_BYTES):
                pass
        except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
            raise ValueError(
                f"{path} is a truncated or corrupt .tar.gz file ({error}); get it again from {URL}."
            ) from error


class _Bounded:
    """A file that ends in an error after MAX_ARCHIVE_BYTES, for archives that unpack without end."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._left = MAX_ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.TarError(f"it unpacks to more than {MAX_ARCHIVE_BYTES} bytes")
        return data


def _read_whole(file: IO[bytes], label: Path | str, version: Version) -> bytes:
    content = file.read(version.max_bytes + 1)
    if len(content) > version.max_bytes:
        raise ValueError(
            f"{label} has more than the {version.max_bytes} bytes that are possible; "
            f"get the original file from {URL}."
        )
    return content


def _parse_binary(content: bytes, label: str) -> Batch:
    if not content or len(content) % RECORD_BYTES:
        raise ValueError(
            f"{label} has {len(content)} bytes, which is not a whole number of records of {RECORD_BYTES}; "
            f"get the file again from {URL}."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
    return _checked(records[:, 1:], records[:, 0], label)


def _parse_pickle(content: bytes, label: str) -> Batch:
    instead = f"the binary version, {BINARY.archive} from {URL}, holds the same images and no programs"
    try:
        batch = read_pickle(content)
    except RefusedError as error:
        raise ValueError(
            f"{label} contains {error}, which no CIFAR-10 file does, and was not read, since a pickle can "
            f"run programs; {instead}."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{label} is a truncated or corrupt pickle ({error}); get it again; {instead}."
        ) from error
    data, labels = (_entry(batch, name) for name in ("data", "labels"))
    images = data.value if isinstance(data, PickledArray) else None
    if images is None or images.ndim != 2 or images.shape[1] != NUM_PIXELS or not len(images):
        raise ValueError(f'{label} has no array [N, {NUM_PIXELS}] called "data"; get it again; {instead}.')
    if not isinstance(labels, list) or not all(type(k) is int and 0 <= k < 256 for k in labels):
        raise ValueError(f'{label} has no list of classes called "labels"; get it again; {instead}.')
    if len(images) != len(labels):
        raise ValueError(
            f"{label} has {len(images)} images but {len(labels)} labels; get it again; {instead}."
        )
    return _checked(images, np.array(labels, np.uint8), label)


def _entry(batch: Any, name: str) -> Any:
    """The entry of a dictionary under a name, which Python 2 wrote as bytes."""
    return batch.get(name.encode(), batch.get(name)) if isinstance(batch, dict) else None


def _checked(images: np.ndarray, labels: np.ndarray, label: str) -> Batch:
    """Images [N, 3072] as [N, 3, 32, 32], and their labels, which must be classes."""
    wrong = np.flatnonzero(labels >= len(CLASS_NAMES))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{label} has label {labels[row]} at index {row}, where 0 to {len(CLASS_NAMES) - 1} exist; "
            f"get the original file from {URL}."
        )
    return np.array(images.reshape(-1, *IMAGE_SHAPE)), np.array(labels)  # copies, which may be written to


BINARY = Version(
    "cifar-10-binary.tar.gz", "cifar-10-batches-bin", ".bin", MAX_RECORDS * RECORD_BYTES, _parse_binary
)
PYTHON = Version("cifar-10-python.tar.gz", "cifar-10-batches-py", "", MAX_PICKLE_BYTES, _parse_pickle)
VERSIONS = (BINARY, PYTHON)
