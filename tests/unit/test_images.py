"""Images in folders: files packed by hand or written by pillow, and what is refused, in which words."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pctt.data import images, load, load_image_folder

Image = pytest.importorskip("PIL.Image")
LIMIT = settings(derandomize=True, deadline=None, max_examples=150)


def png(pixels: np.ndarray, depth=8, size: tuple[int, int] | None = None) -> bytes:
    """A PNG file from the standard's description: RGB [H, W, 3] or gray [H, W]; `size` may tell a lie."""
    height, width = size or pixels.shape[:2]
    color = 2 if pixels.ndim == 3 else 0
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def picture(number: int, height: int = 2, width: int = 3) -> np.ndarray:
    """RGB [H, W, 3], different for every number and every two places that could be mixed up."""
    row, column, channel = np.indices((height, width, 3))
    return ((number + 40 * channel + 7 * row + column) % 256).astype(np.uint8)


def write_classes(root: Path, **counts: int) -> Path:
    """Image n, counted over all classes, is picture(n)."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            (root / name / f"{number:03}.png").write_bytes(png(picture(number)))
            number += 1
    return root


def numbers(split) -> list[int]:
    """Which pictures a split holds, told by their first pixel's red."""
    return (split.inputs[:, 0] * 255).round().int().tolist()


# What is read


def test_a_hand_packed_image_is_read_channel_by_channel(tmp_path):
    write_classes(tmp_path, zebra=2, ant=2)
    dataset = load_image_folder(tmp_path, test=0.5)
    assert (dataset.num_classes, dataset.image_shape, dataset.shape) == (2, (3, 2, 3), (3, 2, 3))
    assert dataset.class_names == ("ant", "zebra")
    assert dataset.train.inputs.dtype == torch.float32 and dataset.train.labels.dtype == torch.int64
    for split in (dataset.train, dataset.test):
        assert sorted(split.labels.tolist()) == [0, 1]
        for row, number, label in zip(split.inputs, numbers(split), split.labels, strict=True):
            assert int(label) == (0 if number >= 2 else 1)  # pictures 0 and 1 are zebras
            expected = picture(number).transpose(2, 0, 1).ravel().astype(np.float32) / np.float32(255)
            assert row.tolist() == expected.tolist()


def test_the_name_folder_and_a_path_loads_the_same(tmp_path):
    root = write_classes(tmp_path / "pets", cat=5, dog=5)
    named, direct = load(f"folder:{root}"), load_image_folder(root)
    assert named.name == direct.name == f"folder:{root}"
    assert torch.equal(named.train.inputs, direct.train.inputs)
    assert torch.equal(named.test.labels, direct.test.labels)
    with pytest.warns(UserWarning, match="data_dir has no effect on folder:"):
        load(f"folder:{root}", tmp_path)


def test_folders_within_a_class_are_read_and_hidden_files_are_not(tmp_path):
    write_classes(tmp_path, a=2, b=2)
    (tmp_path / "a" / "more" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "more" / "deep" / "x.png").write_bytes(png(picture(9)))
    (tmp_path / "a" / ".DS_Store").write_bytes(b"nothing")
    (tmp_path / ".git").mkdir()
    (tmp_path / "readme.txt").write_text("beside the classes, where it may stand")
    dataset = load_image_folder(tmp_path, test=0.5)
    assert sorted(numbers(dataset.train) + numbers(dataset.test)) == [0, 1, 2, 3, 9]
    assert dataset.class_names == ("a", "b")


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "webp", "ppm", "jpg"])
def test_the_formats_that_are_named_are_read(tmp_path, suffix):
    """A gray of 128 is stored exactly by all but JPEG and WebP, which may be off by their rounding."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("L", (8, 8), 128).convert("RGB").save(tmp_path / name / f"{number}.{suffix}")
    dataset = load_image_folder(tmp_path)
    assert (dataset.train.inputs * 255 - 128).abs().max() <= (2 if suffix in ("jpg", "webp") else 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "RGB"])
@pytest.mark.parametrize("gray", [False, True])
def test_every_way_to_store_eight_bits_becomes_the_same_pixels(tmp_path, mode, gray):
    (tmp_path / "a").mkdir()
    white = Image.new("L", (3, 2), 255).convert(mode)
    for number in range(2):
        white.save(tmp_path / "a" / f"{number}.tiff")
    dataset = load_image_folder(tmp_path, gray=gray)
    assert dataset.image_shape == ((2, 3) if gray else (3, 2, 3))
    assert dataset.train.inputs.unique().tolist() == [1.0]


def test_a_palette_with_transparent_entries_is_read_without_a_word(tmp_path):
    """pillow warns of it, and a warning is an error here."""
    (tmp_path / "a").mkdir()
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 51])
    for number in range(2):
        image.save(tmp_path / "a" / f"{number}.png", transparency=b"\x80\x10")
    red, green, blue = load_image_folder(tmp_path).train.inputs.reshape(3, 6)
    assert (red.unique().tolist(), green.unique().tolist()) == ([1.0], [0.0])
    assert blue.unique().tolist() == [np.float32(51) / np.float32(255)]


def test_gray_is_the_brightness_of_itu_601(tmp_path):
    """299 red + 587 green + 114 blue in 1000, to one level."""
    write_classes(tmp_path, a=2)
    dataset = load_image_folder(tmp_path, gray=True, test=0.5)
    expected = [picture(n) @ np.array([0.299, 0.587, 0.114]) for n in range(2)]
    found = {round(float(row[0]) * 255): row for s in (dataset.train, dataset.test) for row in s.inputs}
    for pixels in expected:
        row = found[min(found, key=lambda level: abs(level - pixels[0, 0]))]
        assert np.abs(row.numpy() * 255 - pixels.ravel()).max() <= 1


@pytest.mark.parametrize("size", [(4, 4), (2, 9), (24, 30)])
def test_a_size_brings_all_images_to_it_bilinearly(tmp_path, size):
    """Against torch's antialiased interpolation; pillow rounds after each of two passes: one level apart."""
    (tmp_path / "a").mkdir()
    sources = {"0": picture(5, 12, 10), "1": picture(60, 7, 20)}
    for name, pixels in sources.items():
        (tmp_path / "a" / f"{name}.png").write_bytes(png(pixels))
    with pytest.raises(
        ValueError, match=r"1\.png is 7 x 20 \(height x width\) and \S*0\.png is 12 x 10; bring"
    ):
        load_image_folder(tmp_path)
    dataset = load_image_folder(tmp_path, size=size, test=0.5)
    assert dataset.image_shape == (3, *size)
    found = torch.cat([dataset.train.inputs, dataset.test.inputs]).reshape(2, 3, *size) * 255
    for pixels in sources.values():
        source = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float64))
        expected = torch.nn.functional.interpolate(source, size, mode="bilinear", antialias=True)
        assert (found - expected).abs().amax(dim=(1, 2, 3)).min() <= 1 + 1e-3


# The split


@LIMIT
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    test=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63),
)
def test_each_class_gives_its_share_and_keeps_one(counts, test, seed):
    """To within one image, which an unstratified draw misses."""
    is_test = images._held_out(counts, test, seed)
    parts = np.split(is_test, np.cumsum(counts)[:-1])
    for part, count in zip(parts, counts, strict=True):
        assert len(part) == count and 0 < part.sum() < count
        assert abs(part.sum() - test * count) < 1


def test_every_image_is_in_one_part_and_the_seed_decides_in_which(tmp_path):
    """Two seeds hold out the same 10 of 20 and 5 of 10 with a chance of 1 in C(20, 10) C(10, 5) = 4.6e7."""
    write_classes(tmp_path, a=20, b=10)
    before = torch.get_rng_state()
    first, again, other = (load_image_folder(tmp_path, test=0.5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(numbers(first.train) + numbers(first.test)) == list(range(30))
    assert numbers(first.test) == numbers(again.test) != numbers(other.test)
    assert first.test.labels.tolist() == [0] * 10 + [1] * 5


def test_the_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    root = write_classes(tmp_path, a=6, b=6)
    first = load_image_folder(root)
    walk, iterdir = os.walk, Path.iterdir
    monkeypatch.setattr(os, "walk", lambda top: ((p, d, f[::-1]) for p, d, f in walk(top)))
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(iterdir(self), reverse=True)))
    assert numbers(load_image_folder(root).test) == numbers(first.test)


# What is refused

WHOLE = png(picture(1, 16, 16))


def saved(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(1, 16, 16)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "is no image, or a truncated or corrupt one", id="empty"),
        pytest.param(b"hello", "is no image", id="text"),
        pytest.param(WHOLE[:100], "is no image, or a truncated", id="cut"),
        pytest.param(WHOLE[:20], "is no image, or a truncated", id="cut-in-header"),
        pytest.param(png(picture(1), size=(200, 300)), "is no image, or a truncated", id="rows-missing"),
        pytest.param(png(picture(1), size=(8192, 8193)), "has more than 67108864 pixels", id="bomb"),
        pytest.param(
            png(picture(1), size=(9500, 9500)), "has more than 67108864 pixels", id="bomb-warned-of"
        ),
        pytest.param(
            png(picture(1), size=(60000, 60000)), "has more than 67108864 pixels", id="bomb-refused"
        ),
        pytest.param(png(np.ones((2, 3)), 16), 'has more than 8 bits per channel .mode "I;16"', id="16-bit"),
        pytest.param(saved("EPS"), "is no image", id="eps-which-starts-ghostscript"),
        pytest.param(saved("PCX"), "is no image", id="a-format-that-is-not-named"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image", id="svg"),
    ],
)
def test_what_is_no_whole_image_of_eight_bits_is_refused_by_name(tmp_path, content, words):
    write_classes(tmp_path, a=2, b=2)
    bad = tmp_path / "b" / "bad.png"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_image_folder(tmp_path)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_a_float_image_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(2):
        Image.new("F", (3, 2), 0.5).save(tmp_path / "a" / f"{number}.tiff")
    with pytest.raises(ValueError, match=r'more than 8 bits per channel \(mode "F"\)'):
        load_image_folder(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_what_is_no_file_is_refused_by_name_and_not_waited_for(tmp_path):
    write_classes(tmp_path, a=2)
    for make in (lambda path: path.symlink_to("nowhere"), os.mkfifo):
        make(tmp_path / "a" / "bad.png")
        with pytest.raises(ValueError, match=r"bad\.png is not a file that can be read"):
            load_image_folder(tmp_path)
        (tmp_path / "a" / "bad.png").unlink()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"), a=1)


STARTS = [b"", *(saved(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"))]


@settings(LIMIT, max_examples=300)
@given(start=st.sampled_from(STARTS), place=st.integers(0, 10**6), content=st.binary(min_size=1, max_size=8))
def test_damage_raises_nothing_but_value_error_that_names_the_file(scratch, start, place, content):
    """pillow's decoders raise a dozen kinds of exception on damaged files; none may get through."""
    place %= len(start) + 1
    path = scratch / "a" / "bad.png"
    path.write_bytes(start[:place] + content + start[place + len(content) :])
    try:
        load_image_folder(scratch, size=(4, 4))
    except ValueError as error:
        assert str(path) in str(error)


def test_a_folder_without_classes_or_with_too_few_images_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere is not a folder; give a folder that holds one folder"
    ):
        load_image_folder(tmp_path / "nowhere")
    (tmp_path / "one.png").write_bytes(WHOLE)
    with pytest.raises(
        ValueError, match="holds no folders; give a folder that holds one folder of images per"
    ):
        load_image_folder(tmp_path)
    write_classes(tmp_path, lonely=1, many=3)
    with pytest.raises(ValueError, match="lonely holds 1 images, and a class needs 2"):
        load_image_folder(tmp_path)


def test_the_parts_of_a_data_set_are_not_taken_for_its_classes(tmp_path):
    """ROOT/train/CLASS would be read as the classes "test" and "train", and train without a word."""
    for part in ("train", "test"):
        write_classes(tmp_path / part, a=2, b=2)
    with pytest.raises(ValueError, match=r"holds test, train, which are no classes; .* such as \S*test"):
        load_image_folder(tmp_path)
    assert load_image_folder(tmp_path / "train").class_names == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"test": 0}, "test must be between 0 and 1, got 0"),
        ({"test": 1.0}, "test must be between 0 and 1, got 1.0"),
        ({"test": float("nan")}, "test must be between 0 and 1"),
        ({"size": 32}, r"size must be \(height, width\), got 32"),
        ({"size": (1, 2, 3)}, r"size must be \(height, width\)"),
        ({"size": (0, 2)}, "height must be a whole number of at least 1, got 0"),
        ({"size": (2, 2.0)}, "width must be a whole number of at least 1, got 2.0"),
        ({"size": (10**5, 10**5)}, "size must have at most 67108864 pixels"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        load_image_folder(write_classes(tmp_path, a=2), **settings)


def test_without_pillow_the_message_names_the_command_that_helps(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pctt\[data\]"'):
        load_image_folder(tmp_path)


def test_importing_the_data_sets_does_not_import_pillow():
    code = "import sys, pctt.data; sys.exit('PIL' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
