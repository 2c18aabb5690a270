"""Data sets: what is accepted, what is refused and in which words, and what splitting may and may not do."""

import gzip
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pctt.data import DATASET_NAMES, Dataset, Split, find_folder, load, split_validation

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def _no_data_folder_from_outside(request, monkeypatch):
    """Only tests that ask for real data may see the PCTT_DATA of whoever runs them."""
    if "real_data" not in request.fixturenames:
        monkeypatch.delenv("PCTT_DATA", raising=False)


@pytest.fixture
def real_data():
    if not os.environ.get("PCTT_DATA"):
        pytest.skip("PCTT_DATA is not set: no real MNIST to read")


def image_bytes(num: int, height: int = 28, width: int = 28) -> bytes:
    """An IDX image file in which pixel k of image n is (n + k) mod 256."""
    pixels = bytes((n + k) % 256 for n in range(num) for k in range(height * width))
    return struct.pack(">IIII", 0x803, num, height, width) + pixels


def label_bytes(labels: list[int]) -> bytes:
    return struct.pack(">II", 0x801, len(labels)) + bytes(labels)


def write_image_set(folder, suffix="", **replaced: bytes):
    """Three training and two test images with labels; `replaced` gives a file by its variable's name."""
    files = {
        TRAIN_IMAGES: replaced.get("train_images", image_bytes(3)),
        TRAIN_LABELS: replaced.get("train_labels", label_bytes([7, 0, 9])),
        TEST_IMAGES: replaced.get("test_images", image_bytes(2)),
        TEST_LABELS: replaced.get("test_labels", label_bytes([1, 2])),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return folder


def rows(num: int, width: int = 2) -> Split:
    """Row n holds the numbers n, and its label is n: a row that loses its label shows."""
    return Split(torch.arange(num).float()[:, None].expand(num, width), torch.arange(num))


# Split and Dataset


def test_a_split_is_as_long_as_its_labels():
    assert len(rows(5)) == 5


@pytest.mark.parametrize(
    ("inputs", "labels", "words"),
    [
        (torch.tensor([[0.0], [1.0], [float("nan")]]), torch.zeros(3).long(), "NaN or Inf, first in row 2"),
        (
            torch.tensor([[0.0, 1.0], [float("inf"), 0.0]]),
            torch.zeros(2).long(),
            "NaN or Inf, first in row 1",
        ),
        (torch.tensor([[float("-inf")]]), torch.zeros(1).long(), "NaN or Inf, first in row 0"),
        (torch.zeros(3, 2), torch.tensor([0, -1, -2]), "got -1 at row 1"),
        (torch.zeros(3, 2), torch.zeros(3), r"labels must be torch.int64, got torch.float32; call"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32), "got torch.int32"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(3, 2), torch.zeros(2).long(), "inputs have 3 rows, labels 2"),
        (torch.zeros(3, 2), torch.zeros(0).long(), "inputs have 3 rows, labels 0"),
        (torch.zeros(0, 2), torch.zeros(0).long(), "inputs are empty"),
        (torch.zeros(2, 0), torch.zeros(2).long(), "inputs are empty"),
        (torch.zeros(2, 4, 4), torch.zeros(2).long(), r"must be \[N, D\], got \[2, 4, 4\]; flatten"),
        (torch.zeros(2), torch.zeros(2).long(), r"must be \[N, D\]"),
        (torch.zeros(2, 3), torch.zeros(2, 10).long(), "give class numbers, not one-hot rows"),
        (
            torch.zeros(2, 3, dtype=torch.uint8),
            torch.zeros(2).long(),
            "must be floating point, got torch.uint8",
        ),
        (np.zeros((2, 3)), torch.zeros(2).long(), "inputs must be a torch tensor, got ndarray"),
        (torch.zeros(2, 3), [0, 1], "labels must be a torch tensor, got list"),
    ],
)
def test_a_bad_split_is_refused_in_one_sentence_that_says_where(inputs, labels, words):
    with pytest.raises(ValueError, match=words) as caught:
        Split(inputs, labels)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_label_beyond_the_classes_is_refused_with_its_row(part):
    splits = {"train": rows(3), "test": rows(3)} | {part: rows(5)}
    with pytest.raises(ValueError, match=f"{part} labels must be below num_classes = 3, got 3 at row 3"):
        Dataset("counting", **splits, num_classes=3, image_shape=(1, 2))


@pytest.mark.parametrize("part", ["train", "test"])
def test_inputs_that_are_not_images_of_the_given_shape_are_refused(part):
    splits = {"train": rows(3), "test": rows(3)} | {part: rows(3, width=3)}
    with pytest.raises(ValueError, match=rf"{part} inputs are 3 wide and image_shape is \(1, 2\)"):
        Dataset("counting", **splits, num_classes=3, image_shape=(1, 2))


@pytest.mark.parametrize(
    ("image_shape", "shape"), [((2, 3), (1, 2, 3)), ((1, 2, 3), (1, 2, 3)), ((3, 1, 2), (3, 1, 2))]
)
def test_the_shape_of_a_data_set_always_has_channels(image_shape, shape):
    """What a convolution is told; height taken for channels would still multiply to the same width."""
    split = rows(3, width=6)
    assert Dataset("counting", split, split, num_classes=3, image_shape=image_shape).shape == shape


@pytest.mark.parametrize("image_shape", [(), (2,), (1, 1, 1, 2), (-1, -2), (0, 2), (-1, -2, 1)])
def test_an_image_shape_that_is_none_is_refused(image_shape):
    """Two negative sizes multiply to the right width."""
    with pytest.raises(ValueError, match=r"must be \(height, width\) or \(channels, height, width\)"):
        Dataset("counting", rows(3), rows(3), num_classes=3, image_shape=image_shape)


def test_there_is_one_name_per_class_or_none():
    split = rows(3)
    assert Dataset("counting", split, split, 3, (1, 2)).class_names == ()
    assert Dataset("counting", split, split, 3, (1, 2), ("a", "b", "c")).class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="must be one name per class, got 2 for 3 classes"):
        Dataset("counting", split, split, 3, (1, 2), ("a", "b"))


# load


def test_importing_the_package_does_not_import_scikit_learn():
    code = "import sys, pctt.data; sys.exit('sklearn' in sys.modules)"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_digits_are_those_of_scikit_learn_each_exactly_once():
    """1437 + 360 rows that together are load_digits; a row in both parts would leak test data."""
    from sklearn.datasets import load_digits

    digits = load("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert (digits.num_classes, digits.image_shape) == (10, (8, 8))
    assert digits.train.inputs.dtype == torch.float32
    assert digits.train.inputs.min() == 0 and digits.train.inputs.max() == 1

    pixels, labels = load_digits(return_X_y=True)
    expected = np.column_stack([pixels, labels])
    inputs = torch.cat([digits.train.inputs, digits.test.inputs]) * 16  # exact: sixteenths in binary
    found = np.column_stack([inputs, torch.cat([digits.train.labels, digits.test.labels])])
    assert sorted(found.tolist()) == sorted(expected.tolist())


def test_digits_are_split_alike_every_time_and_stratified():
    """Every class has its share of the 360 rows to within one, which an unstratified draw misses."""
    first, second = load("digits"), load("digits")
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.test.labels, second.test.labels)
    share = torch.bincount(first.train.labels) + torch.bincount(first.test.labels)
    assert (torch.bincount(first.test.labels) - share * 360 / 1797).abs().max() < 1


def test_digits_without_scikit_learn_name_the_command_that_helps(monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pctt\[data\]"'):
        load("digits")


def test_a_data_folder_that_has_no_effect_is_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match="data_dir has no effect on digits"):
        load("digits", tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones():
    known = "choose one of digits, mnist, fashion_mnist, cifar10, or folder:PATH for a folder of images"
    for name in ("cifar", "folder:", "folder", ""):
        with pytest.raises(ValueError, match=f"'{name}' is unknown; {known}"):
            load(name)
    assert DATASET_NAMES == ("digits", "mnist", "fashion_mnist", "cifar10")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("fashion_mnist", "."),
        ("fashion_mnist", "fashion_mnist"),
        ("fashion_mnist", "fashion-mnist"),
    ],
)
def test_idx_files_are_found_in_the_folder_or_its_subfolder(tmp_path, name, folder, suffix):
    write_image_set(tmp_path / folder, suffix)
    dataset = load(name, tmp_path)
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == (name, 10, (28, 28))
    assert dataset.train.labels.tolist() == [7, 0, 9]
    assert dataset.test.labels.tolist() == [1, 2]
    assert dataset.train.inputs.shape == (3, 784)
    expected = [np.float32((2 + k) % 256) / np.float32(255) for k in range(784)]
    assert dataset.train.inputs[2].tolist() == expected


def test_the_folder_comes_from_the_argument_and_else_from_the_environment(tmp_path, monkeypatch):
    here = write_image_set(tmp_path / "here")
    there = write_image_set(tmp_path / "there", test_labels=label_bytes([3, 4]))
    monkeypatch.setenv("PCTT_DATA", str(there))
    assert load("mnist").test.labels.tolist() == [3, 4]
    assert load("mnist", here).test.labels.tolist() == [1, 2]
    assert load("mnist", str(here)).test.labels.tolist() == [1, 2]


def test_one_data_set_is_not_taken_for_another_with_the_same_file_names(tmp_path):
    """Both name their files alike; trained on the wrong one, only the accuracy would look odd."""
    write_image_set(tmp_path / "mnist")
    with pytest.raises(FileNotFoundError, match="by its name the folder of another data set"):
        load("fashion_mnist", tmp_path / "mnist")
    write_image_set(tmp_path / "fashion-mnist", test_labels=label_bytes([5, 6]))
    assert load("fashion_mnist", tmp_path).test.labels.tolist() == [5, 6]
    assert load("mnist", tmp_path).test.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "url"),
    [("mnist", "yann.lecun.com/exdb/mnist"), ("fashion_mnist", "github.com/zalandoresearch/fashion-mnist")],
)
def test_missing_files_are_named_together_with_where_they_are_published(tmp_path, name, url):
    partial = write_image_set(tmp_path / "partial")
    (partial / TEST_LABELS).unlink()
    cases = {
        None: "no folder was given",
        tmp_path / "nowhere": "nowhere is not a folder",
        tmp_path: "lacks all of its files",
        partial: f"lacks {TEST_LABELS};",
    }
    for data_dir, words in cases.items():
        with pytest.raises(FileNotFoundError, match=words) as caught:
            load(name, data_dir)
        message = str(caught.value)
        assert url in message and "--data-dir" in message and "PCTT_DATA" in message
        assert all(file in message for file in (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS))
        assert "\n" not in message


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"train_labels": label_bytes([7, 0])}, "has 3 images but .* has 2 labels"),
        ({"test_labels": label_bytes([1, 2, 3])}, "has 2 images but .* has 3 labels"),
        ({"train_labels": label_bytes([7, 10, 11])}, "has label 10 at index 1, where 0 to 9 exist"),
        ({"test_images": image_bytes(2, 28, 27)}, r"has shape \(2, 28, 27\), not \[N, 28, 28\]"),
        ({"train_images": label_bytes([1, 2, 3])}, r"has shape \(3,\), not \[N, 28, 28\]"),
        ({"train_labels": image_bytes(3)}, r"has shape \(3, 28, 28\), not \[N\]"),
        (
            {"train_labels": struct.pack(">II3b", 0x901, 3, 7, 0, 9)},
            "holds int8 where this data set has uint8",
        ),
        ({"train_images": image_bytes(3)[:-1]}, "holds only 2351"),
    ],
)
def test_files_that_contradict_each_other_or_the_data_set_are_refused_by_name(tmp_path, replaced, words):
    write_image_set(tmp_path, **replaced)
    with pytest.raises(ValueError, match=words) as caught:
        load("mnist", tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_truncated_gzip_file_is_refused_by_name(tmp_path):
    path = write_image_set(tmp_path, ".gz") / f"{TEST_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{TEST_IMAGES}.gz is a truncated or corrupt gzip file"):
        load("mnist", tmp_path)


@pytest.mark.usefixtures("real_data")
def test_real_mnist_has_its_published_counts():
    """60,000 and 10,000 images; class counts as in the authors' description, 5923 zeros and 980 zeros."""
    mnist = load("mnist")
    assert (len(mnist.train), len(mnist.test)) == (60000, 10000)
    assert torch.bincount(mnist.train.labels).tolist()[0] == 5923
    assert torch.bincount(mnist.test.labels).tolist()[0] == 980
    assert mnist.train.labels[:3].tolist() == [5, 0, 4]
    assert find_folder("mnist").is_dir()


# split_validation


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    num=st.integers(2, 60),
    fraction=st.floats(0.0, 0.99, exclude_min=True),
    seed=st.integers(0, 2**63),
)
def test_a_validation_split_is_a_partition_that_keeps_labels_with_rows(num, fraction, seed):
    """No row twice, none lost, each with its own label; otherwise validation measures something else."""
    held_out = round(fraction * num)
    if held_out in (0, num):
        with pytest.raises(ValueError, match="leaves one part empty"):
            split_validation(rows(num), fraction, seed)
        return
    train, validation = split_validation(rows(num), fraction, seed)
    assert validation is not None
    assert (len(train), len(validation)) == (num - held_out, held_out)
    for part in (train, validation):
        assert torch.equal(part.inputs[:, 0].long(), part.labels)
    assert sorted(train.labels.tolist() + validation.labels.tolist()) == list(range(num))


def test_the_last_part_of_the_seeded_permutation_is_held_out():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    train, validation = split_validation(rows(10), 0.3, seed=3)
    assert validation is not None
    assert train.labels.tolist() + validation.labels.tolist() == order
    assert validation.labels.tolist() == order[-3:]


def test_a_validation_split_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    split_validation(rows(10), 0.3, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_holds_out_other_rows():
    """Chance of two seeds agreeing on 50 of 100 rows is one in C(100, 50), 1e29."""
    parts = [split_validation(rows(100), 0.5, seed)[1] for seed in (0, 1)]
    assert parts[0] is not None and parts[1] is not None
    assert set(parts[0].labels.tolist()) != set(parts[1].labels.tolist())


def test_a_fraction_of_zero_holds_nothing_out():
    split = rows(4)
    train, validation = split_validation(split, 0, seed=0)
    assert train is split
    assert validation is None


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got"):
        split_validation(rows(4), fraction, seed=0)
