"""Reading CIFAR-10: files packed by hand from the format's description, pickles also by Python's own writer.

The hostile pickles are first shown to do harm under `pickle.loads`, so that their refusal means something.
"""

import contextlib
import copyreg
import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pctt.data import cifar, find_cifar10, load, plain_pickle
from pctt.data.plain_pickle import PickledArray, RefusedError, read_pickle

LIMIT = settings(derandomize=True, deadline=None, max_examples=150)
PARTS = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
PER_FILE = 2


@pytest.fixture(autouse=True)
def _no_data_folder_from_outside(request, monkeypatch):
    if "real_cifar" not in request.fixturenames:
        monkeypatch.delenv("PCTT_DATA", raising=False)


@pytest.fixture
def real_cifar():
    try:
        find_cifar10()
    except FileNotFoundError:
        pytest.skip("PCTT_DATA is not set or holds no CIFAR-10")


def pixel(image: int, channel: int, row: int, column: int) -> int:
    """Different for every two places that could be mixed up."""
    return (31 * image + 83 * channel + 5 * row + column) % 256


def planes(image: int) -> bytes:
    """Red plane, green plane, blue plane, each row by row, as the format says."""
    return bytes(pixel(image, c, h, w) for c in range(3) for h in range(32) for w in range(32))


def label(image: int) -> int:
    return image * 7 % 10


IMAGES = [planes(image) for image in range(PER_FILE * len(PARTS))]


def images_of(part: str) -> range:
    return range(PARTS.index(part) * PER_FILE, (PARTS.index(part) + 1) * PER_FILE)


def binary(part: str) -> bytes:
    return b"".join(struct.pack("B3072s", label(n), IMAGES[n]) for n in images_of(part))


def python2(part: str) -> bytes:
    """What Python 2 and NumPy 1 wrote, assembled by hand from the list of pickle's instructions."""
    data = b"".join(IMAGES[n] for n in images_of(part))
    labels = b"".join(b"K" + bytes([label(n)]) for n in images_of(part))
    names = b"".join(b"U\x05a.png" for _ in images_of(part))
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07"
        + (b"(K\x01K" + bytes([PER_FILE]) + b"M\x00\x0c\x86")
        + (
            b"cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
            + b"J\xff\xff\xff\xff" * 2
            + b"K\x00tb"
        )
        + (b"\x89T" + struct.pack("<i", len(data)) + data + b"tb")
    )
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03"
        + (b"U\x06labelsr\x04\x00\x00\x00](" + labels + b"e")
        + (b"U\x04data" + array)
        + (b"U\tfilenames](" + names + b"eu.")
    )


def entries(part: str) -> dict[str, object]:
    data = np.frombuffer(b"".join(IMAGES[n] for n in images_of(part)), np.uint8).reshape(-1, 3072)
    return {"labels": [label(n) for n in images_of(part)], "data": data}


def python3(protocol: int, as_bytes: bool = True, order: str = "C"):
    def write(part: str) -> bytes:
        content = {
            name.encode() if as_bytes else name: np.array(value, order=order) if name == "data" else value
            for name, value in entries(part).items()
        }
        return pickle.dumps(content, protocol)

    return write


def write_files(folder: Path, write=binary, suffix=".bin", **replaced: bytes | None) -> Path:
    """The six files, with some replaced, or left out where the replacement is None."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        content = replaced.get(part, b"") if part in replaced else write(part)
        if content is not None:
            (folder / f"{part}{suffix}").write_bytes(content)
    return folder


def packed(folder: str, write=binary, suffix=".bin", names=PARTS) -> bytes:
    """A tar file as published: a folder, its six files, and others."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        top = tarfile.TarInfo(folder)
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name in ["readme.html", *names]:
            content = b"<html>" if name == "readme.html" else write(name)
            member = tarfile.TarInfo(f"{folder}/{name if '.' in name else name + suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_archive(folder: Path, content: bytes, name="cifar-10-binary.tar.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def check(dataset) -> None:
    """Every pixel at its place, as float32, and every label, as int64."""
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == ("cifar10", 10, (3, 32, 32))
    assert dataset.shape == (3, 32, 32) and dataset.class_names[3] == "cat"
    images = torch.cat([dataset.train.inputs, dataset.test.inputs])
    labels = torch.cat([dataset.train.labels, dataset.test.labels])
    assert (len(dataset.train), len(dataset.test)) == (5 * PER_FILE, PER_FILE)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert labels.tolist() == [label(n) for n in range(6 * PER_FILE)]
    n, c, h, w = np.indices((6 * PER_FILE, 3, 32, 32))
    expected = pixel(n, c, h, w).astype(np.float32) / np.float32(255)
    assert np.array_equal(images.numpy().reshape(-1, 3, 32, 32), expected)


# Where the files are, and what they hold


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin", "cifar10", "cifar10/cifar-10-batches-bin"])
def test_the_binary_version_is_read_plane_by_plane(tmp_path, folder):
    """Read pixel by pixel instead, every image would be three small gray ones, and would still train."""
    write_files(tmp_path / folder)
    check(load("cifar10", tmp_path))
    assert find_cifar10(tmp_path) == tmp_path / folder


@pytest.mark.parametrize("folder", [".", "cifar10"])
def test_the_archive_is_read_as_it_was_downloaded_and_not_unpacked(tmp_path, folder):
    write_archive(tmp_path / folder, gzip.compress(packed("cifar-10-batches-bin")))
    before = sorted(tmp_path.rglob("*"))
    check(load("cifar10", tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(python2, id="python2-by-hand"),
        pytest.param(python3(2), id="protocol-2"),
        pytest.param(python3(3), id="protocol-3"),
        pytest.param(python3(4), id="protocol-4"),
        pytest.param(python3(4, as_bytes=False), id="text-keys"),
        pytest.param(python3(4, order="F"), id="column-by-column"),
    ],
)
def test_the_python_version_is_read_without_pickle(tmp_path, monkeypatch, write):
    content = {part: write(part) for part in PARTS}
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.delattr(pickle, name)
    write_files(tmp_path / "cifar-10-batches-py", content.__getitem__, suffix="")
    check(load("cifar10", tmp_path))


def test_the_hand_assembled_pickle_is_one_to_python_itself():
    batch = pickle.loads(python2("test_batch"), encoding="bytes")
    assert batch[b"data"].tolist() == [list(IMAGES[n]) for n in images_of("test_batch")]
    assert batch[b"labels"] == [label(n) for n in images_of("test_batch")]


def test_the_python_archive_is_read_too(tmp_path):
    content = gzip.compress(packed("cifar-10-batches-py", python2, suffix=""))
    write_archive(tmp_path, content, "cifar-10-python.tar.gz")
    check(load("cifar10", tmp_path))


def test_a_complete_version_is_preferred_to_an_incomplete_one_and_binary_to_python(tmp_path):
    write_files(tmp_path / "cifar-10-batches-bin", test_batch=None)
    write_files(tmp_path / "cifar-10-batches-py", python2, suffix="")
    assert find_cifar10(tmp_path).name == "cifar-10-batches-py"
    write_archive(tmp_path, gzip.compress(packed("cifar-10-batches-bin")))
    assert find_cifar10(tmp_path).name == "cifar-10-binary.tar.gz"
    write_files(tmp_path / "cifar-10-batches-bin")
    assert find_cifar10(tmp_path).name == "cifar-10-batches-bin"


def test_the_folder_comes_from_the_argument_and_else_from_the_environment(tmp_path, monkeypatch):
    here, there = write_files(tmp_path / "here"), write_files(tmp_path / "there")
    monkeypatch.setenv("PCTT_DATA", str(there))
    assert find_cifar10() == there
    assert find_cifar10(here) == here


def test_missing_files_are_named_together_with_where_they_are_published(tmp_path):
    partial = write_files(tmp_path / "partial", data_batch_4=None)
    cases = {
        None: "no folder was given",
        tmp_path / "nowhere": "nowhere is not a folder",
        tmp_path: "lacks all of its files",
        partial: "partial lacks data_batch_4.bin;",
    }
    for data_dir, words in cases.items():
        with pytest.raises(FileNotFoundError, match=words) as caught:
            load("cifar10", data_dir)
        message = str(caught.value)
        for word in ("cs.toronto.edu", "cifar-10-binary.tar.gz", "test_batch.bin", "--data-dir", "PCTT_DATA"):
            assert word in message
        assert "\n" not in message


# Damaged files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "has 0 bytes, which is not a whole number of records of 3073", id="empty"),
        pytest.param(binary("test_batch")[:-1], "has 6145 bytes, which is not", id="cut"),
        pytest.param(binary("test_batch") + b"\0", "has 6147 bytes, which is not", id="longer"),
        pytest.param(binary("test_batch")[:3073], "equally many images .* test_batch 1", id="half"),
        pytest.param(b"\x0a" + bytes(6145), "has label 10 at index 0, where 0 to 9 exist", id="label"),
        pytest.param(bytes(3073) + b"\xff" + bytes(3072), "has label 255 at index 1", id="label-later"),
    ],
)
def test_a_damaged_binary_file_is_refused_by_name(tmp_path, content, words):
    write_files(tmp_path, test_batch=content)
    with pytest.raises(ValueError, match=words) as caught:
        load("cifar10", tmp_path)
    assert str(tmp_path) in str(caught.value) and "get " in str(caught.value)


@pytest.mark.parametrize(("write", "suffix"), [(binary, ".bin"), (python2, "")])
def test_a_file_that_is_too_long_is_not_read_whole(tmp_path, write, suffix):
    """A sparse file of a terabyte must not fill the memory."""
    write_files(tmp_path, write, suffix)
    path = tmp_path / f"data_batch_1{suffix}"
    os.truncate(path, 1 << 34)
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=r"data_batch_1\S* has more than the \d+ bytes that are possible"
        ):
            load("cifar10", tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 << 26  # the limit is 2**26; reading may hold it twice


TAR = packed("cifar-10-batches-bin")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "truncated or corrupt .tar.gz", id="empty"),
        pytest.param(TAR, "truncated or corrupt .tar.gz .*Not a gzipped file", id="not-gzipped"),
        pytest.param(gzip.compress(b"hello" * 1000), "truncated or corrupt .tar.gz", id="no-tar"),
        pytest.param(gzip.compress(TAR)[:-30], "truncated or corrupt .tar.gz", id="cut"),
        pytest.param(gzip.compress(TAR)[:-8] + bytes(8), "CRC check failed", id="checksum"),
        pytest.param(gzip.compress(TAR[:30000]), "truncated or corrupt .tar.gz", id="cut-inside"),
        pytest.param(gzip.compress(packed("x", names=PARTS[:-1])), "lacks test_batch.bin", id="incomplete"),
        pytest.param(
            gzip.compress(packed("x", write=lambda part: binary(part)[:-1])),
            "cifar-10-binary.tar.gz:x/data_batch_1.bin has 6145 bytes",
            id="damaged-member",
        ),
    ],
)
def test_a_damaged_archive_is_refused_by_name(tmp_path, content, words):
    write_archive(tmp_path, content)
    with pytest.raises(ValueError, match=words) as caught:
        load("cifar10", tmp_path)
    assert str(tmp_path) in str(caught.value) and "get it again" in str(caught.value).replace(
        "the file", "it"
    )


def test_an_archive_that_unpacks_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 1 << 20)
    write_archive(tmp_path, gzip.compress(TAR + bytes(2 << 20)))
    with pytest.raises(ValueError, match="it unpacks to more than 1048576 bytes"):
        load("cifar10", tmp_path)


def test_a_link_in_an_archive_leads_nowhere(tmp_path):
    """A member that points to a file outside would otherwise bring that file in."""
    write_files(tmp_path / "outside")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for part in PARTS:
            member = tarfile.TarInfo(f"{part}.bin")
            member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "outside" / f"{part}.bin")
            archive.addfile(member)
    write_archive(tmp_path / "inside", gzip.compress(stream.getvalue()))
    with pytest.raises(ValueError, match=r"lacks data_batch_1\.bin"):
        load("cifar10", tmp_path / "inside")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder to overwrite from Hypothesis examples, which must not share a function-scoped tmp_path."""
    return tmp_path_factory.mktemp("cifar")


@LIMIT
@given(place=st.integers(0, len(TAR) - 1), content=st.binary(min_size=1, max_size=40))
def test_damage_within_an_archive_raises_nothing_but_value_error(scratch, place, content):
    """Of the tar format's own fields, since gzip's checksum is made to fit."""
    place -= place % 512  # headers stand at multiples of 512
    damaged = TAR[:place] + content + TAR[place + len(content) :]
    write_archive(scratch, gzip.compress(damaged, 1))
    try:
        load("cifar10", scratch)
    except ValueError as error:
        assert str(scratch) in str(error)


# Pickles


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": None}, r'no array \[N, 3072\] called "data"'),
        ({"data": [1, 2]}, "no array"),
        ({"data": np.zeros((2, 3071), np.uint8)}, "no array"),
        ({"data": np.zeros((0, 3072), np.uint8)}, "no array"),
        ({"data": np.zeros((2, 3, 1024), np.uint8)}, "no array"),
        ({"labels": None}, 'no list of classes called "labels"'),
        ({"labels": [1, "2"]}, "no list of classes"),
        ({"labels": [1, -1]}, "no list of classes"),
        ({"labels": [1, 2**40]}, "no list of classes"),
        ({"labels": [1, 2, 3]}, "has 2 images but 3 labels"),
        ({"labels": [1, 10]}, "has label 10 at index 1, where 0 to 9 exist"),
    ],
)
def test_a_pickle_with_other_contents_is_refused_by_name(tmp_path, changed, words):
    content = pickle.dumps(entries("test_batch") | changed, 4)
    write_files(tmp_path, python2, suffix="", test_batch=content)
    with pytest.raises(ValueError, match=words) as caught:
        load("cifar10", tmp_path)
    assert str(tmp_path / "test_batch") in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02.", b"\x80\x02N", python2("test_batch")[:-1], b"N.N", b"c\\\xa6\nx\n."]
)
def test_a_damaged_pickle_is_refused_by_name(tmp_path, content):
    write_files(tmp_path, python2, suffix="", test_batch=content)
    with pytest.raises(ValueError, match="truncated or corrupt pickle") as caught:
        load("cifar10", tmp_path)
    assert str(tmp_path / "test_batch") in str(caught.value)
    assert "cifar-10-binary.tar.gz" in str(caught.value)


class Calls:
    """Pickled, it is the instruction to call `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def touches(path: Path) -> list[bytes]:
    """Pickles that make a file, each by another way that pickle offers."""
    command = f"touch {path}"
    source = f"open({str(path)!r}, 'w').close()"
    called = [
        Calls(os.system, command),
        Calls(eval, source),
        Calls(exec, source),
        Calls(subprocess.call, ["touch", str(path)]),
    ]
    nested = [{b"data": call, b"labels": []} for call in called]
    contents = [pickle.dumps(value, protocol) for value in [*called, *nested] for protocol in range(2, 6)]
    contents += [pickle.dumps(value, 0) for value in called]
    inst = f"(S'{command}'\nios\nsystem\n.".encode()
    obj = b"(cos\nsystem\nU" + bytes([len(command)]) + command.encode() + b"o."
    # under the name of an array, and as the state of one
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    late = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    late += b"cos\nsystem\n" + text + b"\x85Rb."
    return [*contents, inst, obj, late]


def test_the_hostile_pickles_are_hostile(tmp_path):
    for number, content in enumerate(touches(tmp_path / "proof")):
        with contextlib.suppress(Exception):  # what comes after the harm is of no interest
            pickle.loads(content)
        assert (tmp_path / "proof").exists(), number
        (tmp_path / "proof").unlink()


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path):
    contents = touches(tmp_path / "proof")
    assert len(contents) > 30
    for content in contents:
        with pytest.raises(RefusedError):
            read_pickle(content)
        assert not (tmp_path / "proof").exists()


def test_a_hostile_file_is_refused_with_the_way_out(tmp_path):
    hostile = pickle.dumps(Calls(os.system, f"touch {tmp_path / 'proof'}"), 2)
    write_files(tmp_path, python2, suffix="", data_batch_3=hostile)
    with pytest.raises(ValueError, match=r"contains 'posix.system', which no CIFAR-10 file does") as caught:
        load("cifar10", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "data_batch_3") in message
    assert "binary version, cifar-10-binary.tar.gz from https://www.cs.toronto.edu" in message
    assert "\n" not in message
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x02c__main__\nx\n.", id="any-name"),
        pytest.param(b"\x80\x02cantigravity\nfly\n.", id="a-module-not-imported"),
        pytest.param(b"\x80\x02cnumpy\nload\n.", id="another-name-of-numpy"),
        pytest.param(b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.", id="an-attribute-of-a-known-name"),
        pytest.param(b"\x80\x02Pkey\n.", id="persistent-id"),
        pytest.param(b"\x80\x02\x82\x01.", id="extension"),
        pytest.param(b"\x80\x02cnumpy\nndarray\n)\x81.", id="new-object"),
        pytest.param(b"\x80\x02cnumpy\nndarray\n)R.", id="a-known-name-called-as-no-file-does"),
        pytest.param(b"\x80\x02cnumpy\ndtype\nU\x01O\x85R.", id="objects"),
        pytest.param(b"\x80\x02cnumpy\ndtype\nU\x02i8\x85R.", id="other-numbers"),
        pytest.param(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", id="codec"),
        pytest.param(b"\x80\x02G" + bytes(8) + b".", id="float"),
        pytest.param(pickle.dumps({1, 2}, 4), id="set"),
        pytest.param(pickle.dumps(bytearray(3), 5), id="bytearray"),
        pytest.param(pickle.dumps(np.zeros(3, "O"), 2), id="array-of-objects"),
        pytest.param(pickle.dumps(Path("/"), 2), id="another-class"),
    ],
)
def test_what_is_no_plain_value_is_refused(content):
    with pytest.raises(RefusedError) as caught:
        read_pickle(content)
    assert str(caught.value)
    assert "antigravity" not in sys.modules


def test_a_registered_extension_is_not_looked_up():
    copyreg.add_extension("os", "system", 0xF0)
    try:
        with pytest.raises(RefusedError, match="EXT1"):
            read_pickle(b"\x80\x02\x82\xf0U\x04true\x85R.")
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x02}r\xff\xff\xff\x7f.", id="memo-of-16-GiB"),
        pytest.param(b"\x80\x03B\xff\xff\xff\x7fabc.", id="bytes-of-2-GiB"),
        pytest.param(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", id="bytes-of-8-EiB"),
        pytest.param(b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", id="frame-of-8-EiB"),
        pytest.param(b"\x80\x02T\xff\xff\xff\x7fabc.", id="text-of-2-GiB"),
        pytest.param(b"\x80\x02}(" + b"N" + b"\x85" * 100_000 + b"Nu.", id="deep-key"),
        pytest.param(b"\x80\x02i" + b"a" * 1_000_000 + b"\nS" + b"b" * 1_000_000 + b"\n.", id="long-words"),
        pytest.param(b"\x80\x02S" + b"b" * 1_000_000 + b"\n.", id="text-without-quotes"),
        pytest.param(
            b"\x80\x02cnumpy\ndtype\nN" + b"\x85q\x00h\x00\x86" * 60 + b"\x85R.", id="a-name-of-2-to-the-60"
        ),
        pytest.param(
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R.",
            id="array-of-2-GiB",
        ),
    ],
)
def test_a_pickle_takes_no_more_than_it_holds(content):
    """Each of these is a few bytes that make a careless reader allocate, recurse or print without end."""
    tracemalloc.start()
    try:
        try:
            read_pickle(content)
        except ValueError as error:
            assert len(str(error)) < 200
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20  # bytes; 100,000 nested tuples of 48 bytes are 5 MB


def test_a_pickle_of_too_many_instructions_is_given_up(monkeypatch):
    monkeypatch.setattr(plain_pickle, "MAX_INSTRUCTIONS", 100)
    assert read_pickle(b"\x80\x02(" + b"N" * 96 + b"t.") == (None,) * 96  # 100 with the others
    with pytest.raises(RefusedError, match="more than 100 instructions"):
        read_pickle(b"\x80\x02(" + b"N" * 97 + b"t.")


def test_a_value_is_remembered_under_the_number_the_file_gives_it():
    """5 as number 9, 6 as number 3, then both again."""
    assert read_pickle(b"\x80\x02(K\x05q\x09K\x06r\x03\0\0\0h\x09j\x03\0\0\0t.") == (5, 6, 5, 6)


def test_a_key_that_is_no_text_or_number_is_refused():
    """The hash of a deeply nested tuple is taken by recursion in C, which may end the process."""
    with pytest.raises(ValueError, match="unexpected tuple"):
        read_pickle(pickle.dumps({(1, 2): 3}, 2))


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.text(max_size=8)
    | st.binary(min_size=1, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.binary(min_size=1, max_size=3) | st.integers(), inner)
    ),
    max_leaves=12,
)


@settings(LIMIT, max_examples=100)
@given(value=PLAIN, protocol=st.sampled_from([2, 3, 4]))
def test_plain_values_come_back_as_python_wrote_them(value, protocol):
    found = read_pickle(pickle.dumps(value, protocol))
    assert found == value
    assert repr(found) == repr(value)  # True is not 1, nor () []


def test_values_that_are_shared_stay_shared():
    """A text written once and meant twice; a list that is remembered before it is filled."""
    shared = [1, 2]
    first, second, text, again = read_pickle(pickle.dumps([shared, shared, b"abc", b"abc"], 3))
    assert first is second and first == [1, 2]
    assert text == again == b"abc"


@LIMIT
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    protocol=st.sampled_from([2, 3, 4]),
    order=st.sampled_from("CF"),
)
def test_arrays_of_bytes_come_back_as_numpy_wrote_them(shape, protocol, order):
    size = int(np.prod(shape))
    array = np.array(np.arange(1, size + 1, dtype=np.uint8).reshape(shape), order=order)
    content = pickle.dumps(array, protocol)
    if protocol == 2 and not size:  # b"" is written as a call of bytes, which no CIFAR-10 file has
        return
    found = read_pickle(content)
    assert isinstance(found, PickledArray) and found.value is not None
    assert found.value.dtype == np.uint8 and found.value.shape == array.shape
    assert np.array_equal(found.value, array)


SMALL = {b"labels": [3, 300, -1, 70000], "text": (True, None, b"abc"), b"data": np.ones((2, 3), np.uint8)}
STARTS = [b"", b"\x80\x02", b"\x80\x02cnumpy\ndtype\n", *(pickle.dumps(SMALL, p) for p in (0, 2, 3, 4, 5))]


@settings(LIMIT, max_examples=400)
@given(start=st.sampled_from(STARTS), content=st.binary(max_size=24))
def test_arbitrary_bytes_raise_nothing_but_value_error(start, content):
    try:
        read_pickle(start + content)
    except ValueError as error:
        assert "\n" not in str(error)


@settings(LIMIT, max_examples=400)
@given(
    start=st.sampled_from(STARTS[3:]), place=st.integers(0, 10**6), content=st.binary(min_size=1, max_size=3)
)
def test_a_pickle_with_some_bytes_changed_raises_nothing_but_value_error(start, place, content):
    place %= len(start)
    try:
        read_pickle(start[:place] + content + start[place + len(content) :])
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.usefixtures("real_cifar")
def test_real_cifar10_has_its_published_counts():
    """6000 images of each of ten classes, 1000 of them for testing, which begin with a cat and two ships."""
    dataset = load("cifar10")
    assert torch.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert torch.bincount(dataset.test.labels).tolist() == [1000] * 10
    assert dataset.test.labels[:3].tolist() == [3, 8, 8]
