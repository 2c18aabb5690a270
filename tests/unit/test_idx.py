"""Reading IDX files: the expected bytes are packed by hand, with struct, from the format's description."""

import gzip
import hashlib
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pctt.data import find_folder, read_idx

LIMIT = settings(derandomize=True, deadline=None, max_examples=150)

# code of the format, struct's letter, NumPy's name
KINDS = [
    (0x08, "B", "u1"),
    (0x09, "b", "i1"),
    (0x0B, "h", "i2"),
    (0x0C, "i", "i4"),
    (0x0D, "f", "f4"),
    (0x0E, "d", "f8"),
]
SIX = struct.pack(">BBBBII6B", 0, 0, 8, 2, 2, 3, 1, 2, 3, 4, 5, 250)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A file to overwrite from Hypothesis examples, which must not share a function-scoped tmp_path."""
    return tmp_path_factory.mktemp("idx") / "file"


def written(folder: Path, content: bytes) -> Path:
    path = folder / "images-idx"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("wrap", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_hand_packed_matrix_is_read_row_by_row(tmp_path, wrap):
    """Last dimension fastest; read the other way round, every image would be transposed and still train."""
    array = read_idx(written(tmp_path, wrap(SIX)))
    assert array.dtype == np.uint8
    assert array.tolist() == [[1, 2, 3], [4, 5, 250]]


@st.composite
def arrays(draw):
    """(file content, shape, values, NumPy name) of a random IDX array of any kind of number."""
    code, letter, name = draw(st.sampled_from(KINDS))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count = int(np.prod(shape))
    if letter in "fd":
        value = st.floats(width=32 if letter == "f" else 64, allow_nan=False)
    else:
        info = np.iinfo(name)
        value = st.integers(int(info.min), int(info.max))
    values = draw(st.lists(value, min_size=count, max_size=count))
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)
    return header + struct.pack(f">{count}{letter}", *values), shape, values, name


@LIMIT
@given(case=arrays(), zipped=st.booleans())
def test_whatever_struct_packs_comes_back(scratch, case, zipped):
    """Every kind, rank and byte order; a forgotten byte swap would turn label 1 into 16777216."""
    content, shape, values, name = case
    scratch.write_bytes(gzip.compress(content) if zipped else content)
    array = read_idx(scratch)
    assert array.shape == tuple(shape)
    assert array.dtype == np.dtype(name) and array.dtype.isnative
    assert array.ravel().tolist() == values


@LIMIT
@given(content=st.binary(max_size=64), start=st.sampled_from([b"", SIX[:4], SIX, gzip.compress(SIX)[:10]]))
def test_arbitrary_bytes_raise_nothing_but_value_error(scratch, content, start):
    scratch.write_bytes(start + content)
    try:
        array = read_idx(scratch)
    except ValueError as error:
        assert str(scratch) in str(error)
    else:
        assert (start + content)[4 : 4 + 4 * array.ndim] == struct.pack(f">{array.ndim}I", *array.shape)


@LIMIT
@given(place=st.integers(0, len(gzip.compress(SIX)) - 1), value=st.integers(0, 255))
def test_one_wrong_byte_in_a_gzip_file_is_refused_or_harmless(scratch, place, value):
    """The checksum at the end is read, so a flipped bit in the pixels never gets through."""
    content = bytearray(gzip.compress(SIX, mtime=0))
    content[place] = value
    scratch.write_bytes(content)
    try:
        array = read_idx(scratch)
    except ValueError as error:
        assert str(scratch) in str(error)
    else:
        assert array.tolist() == [[1, 2, 3], [4, 5, 250]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "does not begin like an IDX file", id="empty"),
        pytest.param(SIX[:3], "does not begin like an IDX file", id="three-bytes"),
        pytest.param(b"\x89PNG" + SIX[4:], "does not begin like an IDX file", id="another-format"),
        pytest.param(b"\x01" + SIX[1:], "does not begin like an IDX file", id="first-byte-not-zero"),
        pytest.param(b"\0\x01" + SIX[2:], "does not begin like an IDX file", id="second-byte-not-zero"),
        pytest.param(b"\0\0\x0a\x01" + SIX[4:], "does not begin like an IDX file", id="unknown-kind"),
        pytest.param(b"\0\0\x08\x00" + SIX[4:], "0 dimensions", id="no-dimension"),
        pytest.param(b"\0\0\x08\x21" + SIX[4:], "33 dimensions", id="too-many-dimensions"),
        pytest.param(SIX[:9], "ends within its header", id="cut-header"),
        pytest.param(struct.pack(">BBBBII", 0, 0, 8, 2, 0, 3), "holds nothing", id="zero-rows"),
        pytest.param(SIX[:-1], "6 bytes, and holds only 5", id="too-short"),
        pytest.param(SIX + b"\0", "6 bytes, and holds more", id="trailing-byte"),
        pytest.param(gzip.compress(SIX[:-1]), "holds only 5", id="too-short-inside-gzip"),
        pytest.param(gzip.compress(SIX + b"\0"), "holds more", id="trailing-byte-inside-gzip"),
        pytest.param(gzip.compress(SIX)[:-9], "truncated or corrupt gzip", id="gzip-cut-in-data"),
        pytest.param(gzip.compress(SIX)[:-1], "truncated or corrupt gzip", id="gzip-cut-in-checksum"),
        pytest.param(gzip.compress(SIX)[:5], "truncated or corrupt gzip", id="gzip-cut-in-header"),
        pytest.param(gzip.compress(SIX) + b"tail", "truncated or corrupt gzip", id="gzip-with-a-tail"),
        pytest.param(gzip.compress(SIX)[:10] + b"\xff" * 20, "truncated or corrupt gzip", id="gzip-of-noise"),
    ],
)
def test_what_is_not_exactly_one_idx_array_is_refused_by_name(tmp_path, content, words):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=words) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "get " in str(caught.value)


@pytest.mark.parametrize("wrap", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("num_dimensions", [1, 3, 32])
def test_an_absurd_header_allocates_nothing(tmp_path, wrap, num_dimensions):
    """A damaged header may claim 2**1024 bytes; the reader must find out by reading, in one small chunk."""
    header = struct.pack(f">BBBB{num_dimensions}I", 0, 0, 8, num_dimensions, *[2**32 - 1] * num_dimensions)
    path = written(tmp_path, wrap(header + b"abc"))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="holds only 3"):
            read_idx(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20  # bytes; one chunk is 1 MiB and zlib works on a few


def test_the_crc_of_the_gzip_file_is_checked(tmp_path):
    """Content right, checksum wrong: the file was damaged somewhere, even if not where we look."""
    content = bytearray(gzip.compress(SIX))
    content[-8:-4] = struct.pack("<I", zlib.crc32(SIX) ^ 1)
    with pytest.raises(ValueError, match="CRC"):
        read_idx(written(tmp_path, bytes(content)))


@pytest.mark.skipif(not os.environ.get("PCTT_DATA"), reason="PCTT_DATA is not set: no real MNIST to read")
def test_the_real_mnist_training_images_have_the_published_checksum():
    """The header, packed by hand, and the array's bytes together are the original file."""
    folder = find_folder("mnist")
    path = next(folder.glob("train-images-idx3-ubyte*"))
    array = read_idx(path)
    file_again = struct.pack(">IIII", 0x803, 60000, 28, 28) + array.tobytes()
    assert hashlib.md5(file_again, usedforsecurity=False).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"
