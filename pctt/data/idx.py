"""IDX files, the format of MNIST and its relatives, and where to find them.

An IDX file is two zero bytes, one byte for the kind of number, one for the number of dimensions, each
dimension as a big-endian uint32, then the numbers, big-endian, last dimension fastest.
"""

import gzip
import io
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMENSIONS = 32  # NumPy 1's own limit
GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 1 << 20

IMAGE_SHAPE = (28, 28)
NUM_CLASSES = 10
FILE_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Source:
    """Where a data set is published, and what its folder may be called."""

    title: str
    url: str
    folders: tuple[str, ...]


SOURCES = {
    "mnist": Source("MNIST", "http://yann.lecun.com/exdb/mnist", ("mnist",)),
    "fashion_mnist": Source(
        "Fashion-MNIST",
        "https://github.com/zalandoresearch/fashion-mnist",
        ("fashion_mnist", "fashion-mnist"),
    ),
}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, plain or gzipped (told apart by content, not by name), in native byte order.

    Memory follows what the file holds, never what its header claims.
    Raises ValueError, naming the file, for anything that is not exactly one IDX array.
    """
    path = Path(path)
    with path.open("rb") as file:
        is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        if not is_gzip:
            return _parse(file, path)
        try:
            return _parse(gzip.GzipFile(fileobj=file), path)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is a truncated or corrupt gzip file ({error}); get it again."
            ) from error


def read_image_set(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The training and the test part of a data set of SOURCES, as ((images, labels), (images, labels)).

    Returns: images uint8 [N, 28, 28], labels uint8 [N] below 10.
    Raises FileNotFoundError as `find_folder` does, ValueError for a file that is not what its name says.
    """
    folder = find_folder(name, data_dir)
    images, labels, test_images, test_labels = (_find_file(folder, file_name) for file_name in FILE_NAMES)
    return _read_pair(images, labels), _read_pair(test_images, test_labels)


def find_folder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the four files of a data set of SOURCES.

    Looks in `data_dir`, else in the environment variable PCTT_DATA: in its subfolder named after the data
    set if there is one, else in the folder itself, unless that is named after another data set, whose files
    have the same names and would pass for this one's.
    Raises FileNotFoundError, saying which files are expected and where they are published.
    """
    source = SOURCES[name]
    given = data_dir or os.environ.get("PCTT_DATA")
    if not given:
        raise _not_found(source, "no folder was given")
    root = Path(given).expanduser()
    if not root.is_dir():
        raise _not_found(source, f"{root} is not a folder")

    folder = next((root / sub for sub in source.folders if (root / sub).is_dir()), root)
    others = {sub for other in SOURCES.values() if other is not source for sub in other.folders}
    if folder is root and root.resolve().name.lower() in others:
        raise _not_found(source, f"{root} is by its name the folder of another data set")
    missing = [file_name for file_name in FILE_NAMES if _find_file(folder, file_name) is None]
    if missing:
        lacks = "all of its files" if len(missing) == len(FILE_NAMES) else ", ".join(missing)
        raise _not_found(source, f"{folder} lacks {lacks}")
    return folder


def _not_found(source: Source, problem: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{source.title}: {problem}; it needs the files {', '.join(FILE_NAMES)} (each as it is or with .gz), "
        f"published at {source.url}: put them in a folder and give it as data_dir (--data-dir) or PCTT_DATA."
    )


def _find_file(folder: Path, file_name: str) -> Path | None:
    candidates = (folder / file_name, folder / f"{file_name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read_pair(images_path: Path | None, labels_path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """One part's images [N, 28, 28] and labels [N], checked against each other."""
    assert images_path is not None and labels_path is not None  # find_folder has seen all four
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, array in ((images_path, images), (labels_path, labels)):
        if array.dtype != np.uint8:
            raise ValueError(
                f"{path} holds {array.dtype} where this data set has uint8; get the original file."
            )
    if images.ndim != 3 or images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"{images_path} has shape {images.shape}, not [N, 28, 28]; get the original images.")
    if labels.ndim != 1:
        raise ValueError(f"{labels_path} has shape {labels.shape}, not [N]; get the original labels.")
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} has {len(images)} images but {labels_path} has {len(labels)} labels; "
            "get both files again from one place."
        )
    wrong = np.flatnonzero(labels >= NUM_CLASSES)
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{labels_path} has label {labels[row]} at index {row}, where 0 to {NUM_CLASSES - 1} exist; "
            "get the original labels."
        )
    return images, labels


def _parse(stream: io.BufferedReader | gzip.GzipFile, path: Path) -> np.ndarray:
    """Header, then exactly as many bytes as the header announces, then nothing."""
    magic = _read_at_most(stream, 4)
    if len(magic) < 4 or magic[0] or magic[1] or magic[2] not in DTYPES:
        raise ValueError(f"{path} does not begin like an IDX file (0x{magic.hex()}); get the original file.")
    dtype, num_dimensions = np.dtype(DTYPES[magic[2]]), magic[3]
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(
            f"{path} announces {num_dimensions} dimensions, where 1 to {MAX_DIMENSIONS} are possible; "
            "get the original file."
        )
    header = _read_at_most(stream, 4 * num_dimensions)
    if len(header) < 4 * num_dimensions:
        raise ValueError(f"{path} ends within its header; get the file again.")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    num_bytes = math.prod(shape) * dtype.itemsize  # Python integers: an absurd header cannot overflow
    if num_bytes == 0:
        raise ValueError(f"{path} announces shape {shape}, which holds nothing; get the original file.")

    data = _read_at_most(stream, num_bytes + 1)
    if len(data) != num_bytes:
        found = f"only {len(data)}" if len(data) < num_bytes else "more"
        raise ValueError(
            f"{path} announces shape {shape}, {num_bytes} bytes, and holds {found}; get the file again."
        )
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _read_at_most(stream: io.BufferedReader | gzip.GzipFile, limit: int) -> bytearray:
    """Up to `limit` bytes, in chunks, so that a limit taken from a header allocates nothing by itself."""
    data = bytearray()
    while len(data) < limit:
        chunk = stream.read(min(limit - len(data), CHUNK_BYTES))
        if not chunk:
            break
        data += chunk
    return data
