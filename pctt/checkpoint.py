"""One checkpoint, one file: named tensors and JSON metadata in safetensors form, replaced atomically.

The file can be read without pctt: its tensors are ordinary safetensors entries, and the safetensors metadata
holds one string under the key `pctt`, a JSON object with

    format    version of this layout, an integer
    digest    SHA-256 of the whole file, in hexadecimal, taken with 64 zeros in its own place
    names     the tensor names in the order they were given, which safetensors itself does not keep
    metadata  what the caller passed

Reading executes nothing that the file contains: there is no pickle anywhere. A file without a digest is from
an earlier pctt, and is read.

Two helpers serve the rest of a run folder: `replace_file` writes any file as whole as a checkpoint, and
`hold` keeps a second run out.
"""

import errno
import hashlib
import json
import math
import os
import re
import struct
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

FORMAT = 1
METADATA_KEY = "pctt"
LOCK = ".lock"
MOST_HEADER_BYTES = 2**26  # more is no description of a network; parsed, JSON takes some 20 times its size

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Tree: TypeAlias = "Mapping[str, Tensor | Tree]"


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says which file, why, and what to do.

    It is an `OSError` because the cause lies with a file or a disk and never with the caller's arguments,
    which are refused as `ValueError`. Code that guards file access with `except OSError` therefore handles it
    too.
    """


class FolderInUse(CheckpointError):
    """Another process holds the run folder."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, JSON]) -> None:
    """Write one checkpoint so that `path` holds the previous version or this one, whole, at every moment.

    The bytes go to a hidden file beside `path`, reach the disk, and only then take its name. Tensors keep
    their bits, not their device or strides; those that share memory are stored once per name. A path has one
    writer at a time.

    Args:
        path: the file to write; its folder exists.
        tensors: dense tensors by `/`-joined name, as `flatten` gives them.
        metadata: JSON values with string keys and finite numbers; floats return exactly. Tuples are refused
            since they would return as lists.

    Raises:
        ValueError: a name or a metadata value that would not return as it was given; nothing has been
            touched.
        CheckpointError: the disk is full, the folder cannot be written, ...; the previous file is as it was.
    """
    replace_file(path, _serialise(tensors, metadata), "checkpoint")


def replace_file(path: Path, data: bytes, what: str) -> None:
    """The writing of `write` for any file. what: its name in the error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            _remove_leftovers(path)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:  # also on Ctrl-C; after a successful replace there is nothing left to remove
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        kept = f"the previous {what} is kept" if os.path.isfile(path) else f"no {what} exists there yet"
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path} was not written ({reason}); {remedy(error)}; {kept}.") from error
    _sync_folder(path)


def make_folder(folder: Path) -> None:
    """The folder and those above it. Raises CheckpointError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"the folder {folder} was not made ({reason}); {remedy(error)}.") from error


@contextmanager
def hold(folder: Path) -> Generator[None]:
    """Keep `folder` for this process until the block ends, or the process does, however it does.

    The lock is on a file in the folder and belongs to the process, so one that was killed leaves the file and
    no lock. Where the file system has no locks, that is a warning.

    Raises:
        FolderInUse: another process holds it.
        CheckpointError: the folder cannot be written.
    """
    if os.name != "posix":  # no flock there
        yield
        return
    path = folder / LOCK
    descriptor = _locked(path)
    try:
        yield
    finally:
        with suppress(OSError):  # removed while locked, or it could be another's by then
            path.unlink()
        os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor of the file at `path`, made if absent and locked."""
    import fcntl

    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(f"{path.parent} cannot be used ({reason}); {remedy(error)}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FolderInUse(
                f"another run is at work in {path.parent}; wait for its end, or choose another folder."
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
            warnings.warn(
                f"{path.parent} cannot be locked ({reason}); see to it that no other run uses it.",
                stacklevel=4,
            )
        # Whoever held it may have removed the file after it was opened here; that lock is worth nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote: the same tensors in the same order, bit for bit, and equal metadata.

    The tensors are copies on the CPU; the file may be replaced or removed while they are in use.

    Args:
        path: a file written by `write`.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        CheckpointError: the file is missing, unreadable, incomplete, not a checkpoint, or of another format
            version.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path} is missing or no file; give the path of a checkpoint or start a new run."
        )
    try:
        _check_bytes(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path} cannot be read ({reason}); check its permissions.") from error
    except MemoryError:
        raise
    except Exception as error:  # a hostile header reaches torch with any dtype and shape, hence any exception
        raise _damaged(path, f"is not a whole safetensors file ({one_line(error)})") from error
    names, metadata = _read_header(path, header)
    if sorted(names) != sorted(tensors):
        raise _damaged(path, "does not hold the tensors that its header lists")
    return {name: tensors[name] for name in names}, metadata


def flatten(tree: Tree) -> dict[str, Tensor]:
    """Name every tensor of a tree of dicts by its path: `{"a": {"b": t}}` becomes `{"a/b": t}`, order kept.

    Raises:
        ValueError: a key that is empty or contains `/`, an empty branch (which has no path, so it could not
            return), or a leaf that is no tensor.
    """
    return dict(_leaves(tree, prefix=""))


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tree of dicts whose `flatten` is `tensors`.

    Raises:
        ValueError: a name with an empty part, or one name that is a tensor and also a branch (`a` beside
            `a/b`).
    """
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *branches, leaf = _parts(name)
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} lies below {branch!r}, itself a tensor; rename one of them.")
        if leaf in node:
            raise ValueError(f"{name!r} is both a tensor and a branch; rename one of them.")
        node[leaf] = tensor
    return tree


def _leaves(tree: Tree, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"keys must be text without '/' and not empty, got {prefix}{key!r}; rename it.")
        name = prefix + key
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping) and value:  # pyright: ignore[reportUnnecessaryIsInstance]
            yield from _leaves(value, prefix=name + "/")
        else:
            raise ValueError(f"{name!r} must be a tensor or a non-empty dict, got {value!r}; leave it out.")


def _parts(name: str) -> list[str]:
    parts = name.split("/")
    if not all(parts):
        raise ValueError(f"tensor names must be non-empty parts joined by '/', got {name!r}; use flatten().")
    return parts


def _serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, JSON]) -> bytes:
    for name in tensors:
        if _parts(name) == ["__metadata__"]:
            raise ValueError("a tensor cannot be named '__metadata__', which safetensors keeps; rename it.")
    try:
        returned = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"metadata must be JSON with finite numbers; convert or drop this: {error}."
        ) from error
    if returned != metadata:
        raise ValueError("metadata must return from JSON unchanged; use text as keys and no tuples.")
    header = json.dumps(
        {"format": FORMAT, "digest": _NO_DIGEST, "names": list(tensors), "metadata": returned}
    )
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if storage in storages else plain  # safetensors refuses shared memory
        storages.add(storage)
    data = safetensors.torch.save(stored, metadata={METADATA_KEY: header})
    size = struct.unpack("<Q", data[:8])[0]
    if size > MOST_HEADER_BYTES:
        raise ValueError(
            f"names and metadata must be at most {MOST_HEADER_BYTES} bytes, as more is not read, got {size}; "
            "store large arrays as tensors."
        )
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(_NO_DIGEST.encode(), digest.encode(), 1)  # ours is the first: it opens the metadata


_NO_DIGEST = "0" * 64


def parse_json(text: str | bytes) -> Any:
    """JSON as the standard has it: no key twice in an object, and every number finite.

    Raises:
        ValueError: the text is something else, or nested too deeply.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repeats
        )
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{one_line(text)} is too large for a number")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {one_line(twice)!r} stands there twice")
    return found


def one_line(what: object) -> str:
    """Foreign text as a part of one sentence."""
    text = " ".join(str(what).split())
    return text if len(text) <= 200 else text[:200] + "..."


def _check_bytes(path: Path) -> None:
    """Refuses a file whose header is too large or ambiguous, or whose digest is not that of its bytes.

    A checkpoint that replaces this one meanwhile is read instead, and it is whole too.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if size > MOST_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes; at most {MOST_HEADER_BYTES} are read")
        text = file.read(size)
        header = parse_json(text)
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        inner = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
        found = (
            re.match(r'\{"format": \d+, "digest": "([0-9a-f]{64})"', inner)
            if isinstance(inner, str)
            else None
        )
        if found is None:  # of an earlier pctt, or no checkpoint
            return
        digest = hashlib.sha256(start + text.replace(found[1].encode(), _NO_DIGEST.encode(), 1))
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != found[1]:
        raise ValueError("its bytes have changed since they were written")


def _read_header(path: Path, header: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    if METADATA_KEY not in header:
        raise CheckpointError(
            f"{path} is a safetensors file but no checkpoint (its metadata has no key {METADATA_KEY!r}); "
            "give a file that pctt wrote."
        )
    try:
        content = parse_json(header[METADATA_KEY])
    except ValueError as error:
        raise _damaged(path, f"has a broken header ({one_line(error)})") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {one_line(repr(version))}, and this pctt reads format {FORMAT}; "
            "use the pctt version that wrote it."
        )
    names, metadata = content.get("names"), content.get("metadata")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged(path, "lists no tensor names in its header")
    if not isinstance(metadata, dict):
        raise _damaged(path, "holds no metadata object in its header")
    return names, metadata


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path} {fault}; restore it from a copy, or start a new run.")


def remedy(error: OSError) -> str:
    """What to do about a file that cannot be written."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "free some space or choose another folder"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "make its folder writable or choose another one"
        case errno.ENOENT | errno.ENOTDIR:
            return "create its folder first"
        case _:
            return "check the disk"


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of this checkpoint whose writer was killed. Those of living writers stay."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.tmp")
    for entry in path.parent.iterdir():
        leftover = pattern.fullmatch(entry.name)
        if leftover and not _is_alive(int(leftover[1])):
            with suppress(OSError):  # someone else may remove it first; a leftover is no reason not to save
                entry.unlink()


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 would end the process instead of asking for it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(path: Path) -> None:
    """Make the new name survive a power cut. File systems that cannot do this for folders are let be."""
    if os.name != "posix":
        return
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{path} was written but may not survive a power cut ({reason} for its folder); check the disk."
        ) from error
